"""Keep an average current while its run goes on.

Look, merge if the sources are others than those of the average that is there, wait, look again.
Every average is made by the merge job of `pma merge`, from the sources.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pma_megatron.base.faults import point
from pma_megatron.base.log import visible
from pma_megatron.base.spelling import named
from pma_megatron.base.stopping import Stopped
from pma_megatron.errors import PmaError, PublishError, UsageError
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import EXPORT, MARKER_FILE
from pma_megatron.formats.source import stamps_of
from pma_megatron.merging.job import Show, merge, silent
from pma_megatron.merging.locks import WRITING, HeldError, held
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.request import MergeRequest
from pma_megatron.retention.pruning import Row, prune
from pma_megatron.retention.request import PruneRequest
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage import spool
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.watching import events as said
from pma_megatron.watching.charge import Charge, TakenOverError, in_charge_of
from pma_megatron.watching.commands import merged_by, run
from pma_megatron.watching.events import Events, Tell
from pma_megatron.watching.own import is_as_made, is_own, marked, old_of_own
from pma_megatron.watching.request import WatchRequest
from pma_megatron.watching.rolling import ExactError, update_of
from pma_megatron.watching.state import Looks, Seen, pinned, wanted_of

_RETRY_S, _LONGEST_S = 600.0, 3600.0
"""After a failure, and doubled by each up to the longest; any change of the run comes first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a watch that has ended stands.

    Attributes:
        iteration: of the average that is current; None if none is.
        published: the folders of that average.
        failed: what the last merge failed with; None if it did not.
        waiting: why no average could be made at the last look; None if one could.
    """

    iteration: int | None
    published: tuple[str, ...]
    failed: str | None
    waiting: str | None


def watch(
    request: WatchRequest, *, tell: Tell = lambda event: None, show: Show = silent
) -> Outcome:
    """Follow a run until it is told to stop, or as far as the request says.

    A merge that fails is an event, and is tried again when the run has changed.

    Args:
        request: what to follow.
        tell: is told every event.
        show: shows the progress of merges.

    Raises:
        UsageError: it was started with several ranks.
        PublishError: another watch has charge of this average, or its folder cannot be made.
        Stopped: this process was asked to end; no average is half made.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a watch is one process, and starts the ranks of each merge itself: start it without "
            f"torchrun, with {named('launch')} 'torchrun --nproc-per-node 8'"
        )
    if request.events is not None:
        said.refuse_unusable(request.events, [place for place, _ in request.places])
    spoken = Events(request.events, tell)
    with _in_charge(request) as (sure, charges):
        follower = _Follower(request, spoken, show, charges)
        load = request.merge.load
        spoken.say(said.STARTED, f"follows {load}, process {os.getpid()}", load=load)
        if not sure:
            text = "the file system has no locks: nothing keeps a second watch out, see to that"
            spoken.say(said.FAILED, text, error=text)
        try:
            return follower.follow()
        except Stopped as stop:
            spoken.say(said.STOPPED, f"by {stop}")
            raise
        except TakenOverError as error:
            spoken.say(said.FAILED, str(error), error=str(error))
            raise


@contextlib.contextmanager
def _in_charge(request: WatchRequest) -> Iterator[tuple[bool, list[Charge]]]:
    """Keep other watches out; yields False where a file system has no locks for that, and what is
    to be asked of stores from time to time."""
    sure, charges = True, []
    with contextlib.ExitStack() as stack:
        for root, name in request.places:
            if in_store(root):
                charges.append(stack.enter_context(in_charge_of(root, name)))
                continue
            try:
                root.mkdir(parents=True, exist_ok=True)
                sure &= stack.enter_context(held(root, name, WRITING))
            except HeldError as holder:
                raise PublishError(
                    f"another watch keeps an average in {root} current{holder}: end it, or choose "
                    f"another {named('save' if name == 'watch' else 'export')}"
                ) from None
            except OSError as error:
                raise PublishError(f"cannot write to {root}: {error.strerror}") from error
        yield sure, charges


@dataclass(frozen=True, slots=True)
class How:
    """What is said of how an average was made, where a rolling one was asked for."""

    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


class _Follower:
    def __init__(
        self, request: WatchRequest, spoken: Events, show: Show, charges: Sequence[Charge]
    ) -> None:
        self._request, self._events, self._show = request, spoken, show
        self._charges = charges
        self._merge = marked(request.merge)
        self._looks = Looks(request.merge)
        self._made: tuple[object, ...] | None = None
        self._failed: tuple[object, ...] | None = None
        self._failed_s, self._retry_s = 0.0, _RETRY_S / 2
        self._outcome = Outcome(None, (), None, None)

    def follow(self) -> Outcome:
        while True:
            self._step()
            if self._request.once or self._is_far_enough():
                return self._outcome
            time.sleep(self._request.poll_s)

    def _is_far_enough(self) -> bool:
        until, at = self._request.until_iteration, self._outcome.iteration
        failed = self._outcome.failed or self._outcome.waiting
        return until is not None and at is not None and at >= until and not failed

    def _step(self) -> None:
        seen = None
        try:
            self._check()
            seen = self._looks.look()
            self._act(seen)
        except TakenOverError:
            raise
        except Exception as error:  # the run goes on, and so does this
            self._fail(seen, error)

    def _check(self) -> None:
        """Nothing is made or deleted where another watch has taken over."""
        for each in self._charges:
            each.check()

    def _act(self, seen: Seen) -> None:
        if seen.waiting is not None:
            self._wait(seen.waiting)
            return
        if self._made == self._fingerprint(seen):
            self._stands(waiting=None)
            return
        too_soon = time.monotonic() - self._failed_s < self._retry_s
        if self._failed is not None and too_soon and self._failed == _every_file(seen):
            return
        self._make_current(seen)

    def _fingerprint(self, seen: Seen) -> tuple[object, ...]:
        """The sources, and whether what was made of them is there."""
        return (seen.sources, *map(_stamp_at, self._outcome.published))

    def _make_current(self, seen: Seen) -> None:
        request = pinned(self._merge, seen)
        first, self._made = self._made is None and self._failed is None, None
        wanted = wanted_of(request, rolling=self._request.rolling is not None)
        # What an attempt has published that failed after that is not made, and replaced, again.
        known = wanted.current
        published = wanted.folders
        sources = [ref.iteration for ref in seen.refs]
        numbers: dict[str, Any] = {"iteration": seen.end, "sources": sources}
        if known:
            text = f"{', '.join(published)} is of iterations {_named(sources)} already"
            self._events.say(said.CURRENT, text, published=published, **numbers)
        else:
            if wanted.unsafe is not None:
                raise wanted.unsafe
            start_s = time.monotonic()
            published, how = self._merged(replace(request, overwrite=wanted.replaces), wanted.plan)
            seconds = time.monotonic() - start_s
            text = f"{', '.join(published)} of iterations {_named(sources)}, in {seconds:.1f} s"
            numbers |= {"published": published, "seconds": round(seconds, 3), **how.fields}
            self._events.say(said.PUBLISHED, text + how.text, **numbers)
        self._outcome = Outcome(seen.end, published, None, None)
        self._made, self._failed = self._fingerprint(seen), None
        self._retry_s = _RETRY_S / 2
        point("watched", 0)
        try:
            if not (known and first) or self._request.events is not None:
                self._evaluate(seen.end, published)
            self._delete_old(seen.end, published)
        except (PmaError, OSError) as error:  # the average is there
            self._events.say(said.FAILED, f"after the merge: {error}", error=str(error))

    def _merged(self, request: MergeRequest, exact: MergePlan) -> tuple[tuple[str, ...], How]:
        """Update the average that is there if that was asked for and can be, else read all."""
        most = self._request.rolling
        if most is None:
            return self._made_by(request, self._request.words), How()
        try:
            update = update_of(request, exact, most)
            wanted = replace(update.request, overwrite=request.overwrite)
            published = self._made_by(wanted, self._request.unchosen_words)
        except ExactError as reason:
            why = str(reason)
        except (PmaError, OSError) as error:
            if getattr(error, "published", ()):
                raise  # what is missing of it is made when it is tried again
            why = f"the update failed: {type(error).__name__}: {error}"
        else:
            made = update.made
            fields = {"rolling": {"updates": made.updates, "bound": made.bound}}
            return published, How(f", {update.text}; {made.sentence()}", fields)
        how = How(f", from all its checkpoints: {why}", {"exact_because": why})
        return self._made_by(request, self._request.words), how

    def _made_by(self, request: MergeRequest, words: Sequence[str]) -> tuple[str, ...]:
        launch = self._request.launch
        if launch is not None:
            published = merged_by(launch, words, request)
        else:
            published = merge(request, show=self._show).published
        spool.forget()  # what was read of stores, lest it grows with every average
        for each in published:
            with contextlib.suppress(PmaError, OSError):  # it is there, whether that is seen or not
                path_of(each, again=True)
        return published

    def _wait(self, why: str) -> None:
        if _timeless(why) != _timeless(self._outcome.waiting):
            self._events.say(said.WAITING, why)
        self._stands(waiting=why)

    def _stands(self, *, waiting: str | None) -> None:
        at = self._outcome
        self._outcome = Outcome(at.iteration, at.published, at.failed if waiting else None, waiting)

    def _fail(self, seen: Seen | None, error: Exception) -> None:
        numbers: dict[str, Any] = {}
        if seen is not None and seen.refs:
            self._failed, self._failed_s = _every_file(seen), time.monotonic()
            self._retry_s = min(2 * self._retry_s, _LONGEST_S)
            numbers = {"iteration": seen.end, "sources": [ref.iteration for ref in seen.refs]}
        text = f"{type(error).__name__}: {error}"
        if numbers or _timeless(text) != _timeless(self._outcome.failed):
            self._events.say(said.FAILED, text, error=text, **numbers)
        self._outcome = Outcome(self._outcome.iteration, self._outcome.published, text, None)

    def _evaluate(self, iteration: int, published: Sequence[str]) -> None:
        """Run the command, unless the file of events says that it was run for this very average."""
        command = self._request.evaluate
        if command is None:
            return
        stamps = [list(_stamp(path_of(each)) or ()) for each in published]
        known = bool(stamps) and all(stamps)
        done = (e for e in self._events.earlier() if e.get("event") == said.EVALUATED)
        if known and any(e.get("stamps") == stamps and e.get("command") == command for e in done):
            return
        environment = {"PMA_ITERATION": str(iteration)}
        for each in published:
            exported = _is_export(path_of(each))
            environment.setdefault("PMA_EXPORT" if exported else "PMA_AVERAGE", each)
        code, _ = run(command, environment, read=False)
        text = f"{command}: exit code {code} for iteration {iteration}"
        fields = {"command": command, "code": code, "iteration": iteration, "stamps": stamps}
        self._events.say(said.EVALUATED, text, **fields)

    def _delete_old(self, end: int, published: Sequence[str]) -> None:
        """Of the averages up to `end` that this watch made, delete all but the newest few."""
        keep = self._request.keep
        if keep is None:
            return
        for folder in (path_of(each) for each in published if not _is_export(path_of(each))):
            self._check()
            old, stay = old_of_own(folder.parent, self._merge, end=end, keep=keep)
            for each, why in stay.items():
                text = f"{each} stays: {why}"
                self._events.say(said.FAILED, text, error=why, folder=each)
            if not old:
                continue
            wanted = PruneRequest(root=str(folder.parent), keep_iterations=(end,))
            mine = partial(_is_one_of, old, self._merge)
            for row in prune(wanted, delete=True, only=mine).rows:
                self._say_deleted(row, row.ref.folder in old)

    def _say_deleted(self, row: Row, wanted: bool) -> None:
        folder, why = row.ref.folder, row.problem or "; ".join(row.kept)
        if row.deleted:
            text = f"{folder}, an old average"
            self._events.say(said.DELETED, text, folder=folder, bytes=row.bytes)
        if wanted and why:
            text = f"{folder}, an old average, could not be deleted: {why}"
            self._events.say(said.FAILED, text, error=why, folder=folder)


def _is_one_of(folders: frozenset[str], request: MergeRequest, ref: CheckpointRef) -> bool:
    if ref.folder not in folders:
        return False
    folder = path_of(ref.folder)
    return is_own(folder, request) and is_as_made(folder)


def _every_file(seen: Seen) -> tuple[object, ...]:
    """The run, and every file of the sources: one that was damaged may have been restored."""
    found: list[object] = [seen.run]
    for ref in seen.refs:
        with contextlib.suppress(OSError):
            found.append(stamps_of(path_of(ref.folder)))
    return tuple(found)


def _named(iterations: Sequence[int | None]) -> str:
    return visible(", ".join(map(str, iterations)))


def _timeless(text: str | None) -> str | None:
    """A message without the times that it says, which differ at each attempt.

    >>> _timeless("gave up after 3 retries, 90.25s of 180 s")
    'gave up after 3 retries, # of #'
    """
    return None if text is None else _TIMES.sub("#", text)


_TIMES = re.compile(r"\b\d+(?:\.\d+)?\s?(?:ns|us|ms|s|seconds?)\b")


def _is_export(folder: Path) -> bool:
    return read_json(folder / MARKER_FILE).get("kind") == EXPORT


def _stamp_at(folder: str) -> tuple[int, int] | None:
    """The same of a folder that may lie in a store, which may not answer now."""
    with contextlib.suppress(PmaError, OSError):
        return _stamp(path_of(folder))
    return None


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What tells one average of a name from another."""
    try:
        stat = (folder / MARKER_FILE).stat()
    except OSError:
        return None
    return 0 if in_store(folder) else stat.st_ino, stat.st_mtime_ns
