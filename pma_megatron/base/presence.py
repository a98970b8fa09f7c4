"""Which ranks of a job are there, alive and moving: told through its rendezvous store.

Collectives wait for ever, or fail with a word on sockets, where a rank is missing. So ranks meet
here before each of them. Who waits looks at the others meanwhile: a rank whose process is gone, or
that has moved neither a byte nor a step for the time allowed, ends the wait by an error that names
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from pma_megatron.base.durations import format_duration
from pma_megatron.base.processes import is_gone, moved_bytes, this_process
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import RankError

TIMEOUT_S = 300.0
"""How long another rank may stand still, unless the user says otherwise."""

_ROOT = "pma_megatron"
_BEAT_S = 1.0
_LOOK_EVERY_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.02
_MOVED_BYTES = 4096  # less than this is the beat's own noise
_MANY_RANKS = 64
_SLICE = timedelta(seconds=_LOOK_EVERY_S)
_LEFT = f"{_ROOT}/left"


@dataclass(slots=True)
class _Own:
    """This process, whichever object speaks for it: all ranks make the same calls in one order."""

    call: int = 0
    ticks: int = 0
    stage: str = "start"


_own = _Own()


@dataclass(slots=True)
class _Life:
    """What a rank last told: where it is, and a number that grows while it moves."""

    process: str
    call: int = 0
    stage: str = "start"
    beat: int = 0
    waits: bool = False


@dataclass(frozen=True, slots=True)
class _Word:
    """What a rank says as it goes.

    Attributes:
        call: the meeting that it was about to come to, or had come to.
        asked: True if somebody asked it to end.
        speaker: the rank that tells the user.
        cause: why, a sentence.
    """

    call: int
    asked: bool
    speaker: int
    cause: str

    @property
    def error(self) -> RankError:
        return RankError(self.cause, lost=True, speaker=self.speaker, asked=self.asked)


class Presence:
    """What one rank tells of itself and knows of the others.

    Args:
        store: the rendezvous store of the job.
        rank: this one.
        size: number of ranks.
        timeout_s: how long another rank may stand still.
        hint: a clause on where that time comes from, for the error of a rank that stood still.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float, hint: str) -> None:
        self.hint = hint
        self._store, self._rank, self._size = store, rank, size
        self.timeout_s = timeout_s
        self._life = _Life(this_process())
        self._lock = threading.Lock()
        self._next_look_s = 0.0
        self._near: dict[int, str] | None = None
        with self._answering():
            self._tell()

    def tick(self) -> None:
        """This rank has moved, from any thread."""
        _own.ticks += 1

    @contextlib.contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Inside the block others see that this rank is in `stage`, and whether it moves."""
        _own.stage = stage
        over = threading.Event()
        beats = threading.Thread(target=self._beat, args=(over,), daemon=True)
        beats.start()
        try:
            yield
        finally:
            over.set()
            beats.join()

    def meet(self) -> None:
        """Wait until every rank makes this call.

        Raises:
            RankError: one will not come: it left, it died, or it stood still for too long.
        """
        place = f"{_ROOT}/{_own.call}"
        with self._answering():
            self._refuse_left()
            if self._store.add(f"{place}/came", 1) == self._size:
                self._store.set(f"{place}/all", "1")
                self._tidy(_own.call - 1)
            else:
                self._wait(lambda: bool(self._store.check([f"{place}/all"])))
        _own.call += 1
        self._life.waits = False

    def wait_for(self, work: Any, mates: Collection[int]) -> None:
        """Wait for a collective that those ranks take part in.

        Raises:
            RankError: as `meet`.
        """
        watch = _Watch(self, mates, work.is_completed)
        while not _completed(work):
            with self._answering():
                self._refuse_left()
                self._life.waits = True
                self._tell()
                watch.look()
        if self._life.waits:
            self._life.waits = False
            with self._answering():
                self._tell()

    def look(self) -> None:
        """End this rank's work if another rank has failed or is gone.

        Raises:
            RankError: one has or is.
        """
        key = f"{_ROOT}/{_own.call}/failed"
        with self._answering():
            if self._store.check([key]):
                raise RankError(self._store.get(key).decode())
            self._refuse_left()
            near = self._neighbours()
            dead = [rank for rank, process in near.items() if is_gone(process)]
            # What a rank says before it ends is in the store before its process is gone.
            self._refuse_left()
            if dead:
                raise self.died(dead)

    def look_at_times(self) -> None:
        """`look`, every half second however often it is called; the call itself is a move."""
        self.tick()
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            self.look()

    def failed(self, cause: str) -> None:
        """Tell the ranks that are at work; this one goes on to the next meeting."""
        with contextlib.suppress(RuntimeError):  # the store's own host may be gone
            self._store.set(f"{_ROOT}/{_own.call}/failed", cause)

    def leave(self, cause: str, *, asked: bool = False, speaker: int = 0) -> None:
        """Tell all ranks that this one comes to no meeting any more.

        Args:
            cause: why, a sentence.
            asked: True if somebody asked it to end.
            speaker: the rank that tells the user.
        """
        with contextlib.suppress(RuntimeError):
            if self._last_word() is None:
                word = _Word(_own.call, asked, speaker, cause)
                self._store.set(_LEFT, json.dumps(asdict(word)))

    def why_ended(self) -> RankError | None:
        """What may lie behind a request to end: a rank that failed, or died without a word."""
        with contextlib.suppress(RuntimeError):
            # What a rank says before it ends is in the store before its process is gone.
            dead = [r for r, process in self._neighbours().items() if is_gone(process)]
            word = self._last_word()
            if word is not None:
                return None if word.asked else word.error
            return self.died(dead) if dead else None
        return None

    def died(self, ranks: Collection[int]) -> RankError:
        """The error of ranks whose processes are gone, told to all."""
        return self._gone(
            ranks,
            f"{_named(ranks)} died in stage {_own.stage!r}: killed (out of "
            "memory?), crashed, or its machine failed. Look at its own output, then "
            "run the same command again",
        )

    def broken(self, error: BaseException) -> RankError:
        """The error of a collective that failed because a connection did; waits up to 2 s for a
        better reason."""
        until_s = time.monotonic() + 2.0
        while time.monotonic() < until_s:  # a socket closes before the process is gone
            try:
                self._refuse_left()
                known = self.why_ended()
            except RankError as left:
                known = left
            except RuntimeError:
                break
            if known is not None:
                return known
            time.sleep(0.05)
        return self._gone(
            (),
            f"a rank died or lost its connection in stage {_own.stage!r} "
            f"({_first_line(error)}). Look at the output of the others, then run the "
            "same command again",
        )

    def _gone(self, ranks: Collection[int], message: str) -> RankError:
        alive = [rank for rank in range(self._size) if rank not in ranks]
        speaker = alive[0] if ranks else self._rank
        self.leave(message, speaker=speaker)
        return RankError(message, lost=True, speaker=speaker)

    def _wait(self, done: Callable[[], bool]) -> None:
        watch, pause_s = _Watch(self, range(self._size), done), _FIRST_PAUSE_S
        next_look_s = time.monotonic() + _LOOK_EVERY_S
        while not done():
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, max(_LONGEST_PAUSE_S, self._size / 5000))
            if time.monotonic() >= next_look_s:
                self._refuse_left()
                self._life.waits = True
                self._tell()
                watch.look()
                next_look_s = time.monotonic() + max(_LOOK_EVERY_S, self._size / 50)

    def _refuse_left(self) -> None:
        word = self._last_word()
        if word is not None:
            raise word.error

    def _last_word(self) -> _Word | None:
        """What a rank that left has said, None if none has.

        Ranks are never further apart than one meeting, either way: who is let out of it first may
        leave before the others find out that it is over, and who is stopped as it ends has not
        counted it yet. What is older is of a work that was given up before this one began.
        """
        if not self._store.check([_LEFT]):
            return None
        word = _Word(**json.loads(self._store.get(_LEFT)))
        return word if word.call >= _own.call - 1 else None

    def _tidy(self, call: int) -> None:
        """Everybody is past that meeting."""
        for name in ("came", "all"):
            with contextlib.suppress(RuntimeError, NotImplementedError):
                self._store.delete_key(f"{_ROOT}/{call}/{name}")

    def _tell(self) -> None:
        with self._lock:
            self._life.call, self._life.stage = _own.call, _own.stage
            self._store.set(f"{_ROOT}/life/{self._rank}", json.dumps(asdict(self._life)))

    def life(self, rank: int) -> _Life | None:
        """What a rank last told; None if it never came."""
        key = f"{_ROOT}/life/{rank}"
        if not self._store.check([key]):
            return None
        return _Life(**json.loads(self._store.get(key)))

    def _beat(self, over: threading.Event) -> None:
        ticks, nbytes = -1, moved_bytes()
        while not over.wait(_BEAT_S):
            before = ticks, nbytes
            ticks, nbytes = _own.ticks, moved_bytes()
            if ticks == before[0] and nbytes - before[1] < _MOVED_BYTES:
                continue
            self._life.beat += 1
            try:
                self._tell()
            except RuntimeError:  # the main thread will find that out too
                return

    def _neighbours(self) -> dict[int, str]:
        """The processes of the other ranks on this machine, as far as they are known."""
        if self._near is None or len(self._near) < len(self._candidates()):
            self._near = self._near or {}
            for rank in self._candidates():
                life = None if rank in self._near else self.life(rank)
                if life is not None:
                    self._near[rank] = life.process
        return self._near

    def _candidates(self) -> list[int]:
        local, count = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        if local and count:
            first = self._rank - int(local)
            near = range(first, min(first + int(count), self._size))
        else:
            near = range(self._size if self._size <= _MANY_RANKS else 0)
        return [rank for rank in near if rank != self._rank]

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                "the rendezvous store of this job does not answer any more "
                f"({_first_line(error)}): torchrun, or the rank or machine that kept it, has "
                "ended. Run the same command again",
                lost=True,
                speaker=0 if kept_by_torchrun() else self._rank,
            ) from error


def _completed(work: Any) -> bool:
    """Wait a little for a collective; whether it has ended.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(_SLICE)
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


class _Watch:
    """Since when the ranks that are waited for have not moved, as seen from here."""

    def __init__(
        self, presence: Presence, ranks: Collection[int], done: Callable[[], bool]
    ) -> None:
        self._presence, self._done = presence, done
        self._ranks = [rank for rank in ranks if rank != presence._rank]
        self._seen: dict[int, tuple[_Life | None, float]] = {}
        self._start_s = time.monotonic()

    def look(self) -> None:
        """Raise if one of them is gone or stands still.

        Raises:
            RankError: naming them.
        """
        now_s, missing = time.monotonic(), {}
        for rank in self._ranks:
            life = self._presence.life(rank)
            arrived = life is not None and (life.call, life.waits) >= (_own.call, True)
            if not arrived:
                missing[rank] = life
                if rank not in self._seen:
                    self._seen[rank] = (life, self._start_s)
                elif self._seen[rank][0] != life:
                    self._seen[rank] = (life, now_s)
        dead = [r for r, life in missing.items() if life is not None and is_gone(life.process)]
        if dead and not self._done():  # who came last may have gone on, and ended, since
            self._presence._refuse_left()
            raise self._presence.died(dead)
        limit_s = self._presence.timeout_s
        still = [rank for rank in missing if now_s - self._seen[rank][1] > limit_s]
        if still:
            where = {rank: life.stage for rank, life in missing.items() if life is not None}
            raise self._presence._gone(
                still, _stood_still(still, where, limit_s, self._presence.hint)
            )


def _stood_still(ranks: list[int], where: dict[int, str], limit_s: float, hint: str) -> str:
    came = [rank for rank in ranks if rank in where]
    never = [rank for rank in ranks if rank not in where]
    told = []
    if came:
        stages = ", ".join(sorted({repr(where[rank]) for rank in came}))
        told.append(f"{_named(came)} moved nothing, last seen in stage {stages}")
    if never:
        told.append(f"{_named(never)} never came")
    return (
        f"{' and '.join(told)}: waited {format_duration(limit_s)} in stage {_own.stage!r}. A disk "
        f"or network that hangs, or a process that is stopped; {hint}"
    )


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {first_few(sorted(ranks), 8)}"


def kept_by_torchrun() -> bool:
    """True if the rendezvous store lives in torchrun's own process, not in rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
