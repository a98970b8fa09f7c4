"""Scores of an earlier `pma evaluate`, for a forecast: what they are of, and what has changed."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pma_megatron.base.settings import declared
from pma_megatron.base.spelling import named
from pma_megatron.cli.score_grid import score
from pma_megatron.errors import UsageError
from pma_megatron.runs.discover import choose, list_checkpoints, pointers_of
from pma_megatron.runs.notices import announce
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.scores.grid import Grid
from pma_megatron.scores.identity import state_of
from pma_megatron.scores.results import Checkpoint, Other, Scores
from pma_megatron.storage.paths import path_of, real

_AGAIN = "score all again without --scores"
_log = logging.getLogger(__name__)


def refuse_other_run(arguments: argparse.Namespace, scores: Scores) -> None:
    """Take the run that the scores are of, unless `--load` says where it has been moved to.

    What is gone by now says nothing against its scores.

    Raises:
        UsageError: `--load` is another run, a checkpoint is not what was scored, or the flags ask
            for other averages.
    """
    for each in declared(Grid):
        typed, default = getattr(arguments, each.name), each.default
        untyped = (None, default, list(default) if each.many else default)
        if typed not in untyped and (each.name, typed) != ("ends", ["all"]):
            raise UsageError(
                f"{named(each.name)} has no effect with --scores, which holds what was scored: "
                f"leave it out, or {_AGAIN}"
            )
    moved = arguments.load is not None and real(arguments.load) != real(scores.load)
    if arguments.load is None:
        arguments.load = scores.load
    where = {
        each.iteration: _now_at(each, scores.load, arguments.load) for each in scores.checkpoints
    }
    states = {each.iteration: state_of(each, where[each.iteration]) for each in scores.checkpoints}
    changed = [iteration for iteration, state in states.items() if state == "changed"]
    if moved and (changed or "same" not in states.values()):
        raise UsageError(
            f"--scores {arguments.scores} is of {scores.load}, and --load {arguments.load} does "
            f"not hold the checkpoints that were scored: leave out --load, or {_AGAIN}"
        )
    if changed:
        raise UsageError(
            f"--scores {arguments.scores}: {where[changed[-1]]} is not what was scored, its files "
            f"have changed since: {_AGAIN}"
        )
    closed = [iteration for iteration, state in states.items() if state == "closed"]
    if closed:
        _log.warning(
            "%s may not be read: whether it is still what was scored was not looked at",
            where[closed[-1]],
        )
    if "unknown" in states.values():
        _log.warning(
            "--scores %s does not say which files were scored, as releases before did not note "
            "them: whether %s still holds them was not looked at",
            arguments.scores,
            arguments.load,
        )


def _now_at(checkpoint: Checkpoint, was: str, now: str) -> Path:
    """Where a checkpoint of the run `was` lies if that is at `now`."""
    if was == now:
        return path_of(checkpoint.path)
    begin = was.rstrip("/") + "/"
    inside = checkpoint.path.removeprefix(begin)
    return path_of(now) / (inside if checkpoint.path.startswith(begin) else path_of(inside).name)


def newest_of(folder: str) -> CheckpointRef:
    """The newest checkpoint of an annealing run, as it is scored."""
    refs, pointers = list_checkpoints(folder), pointers_of(folder)
    selection = choose(refs, SelectionRequest(last=1), folder, pointers)
    announce(selection)
    return selection.refs[-1]


def with_others(
    arguments: argparse.Namespace, scores: Scores, roots: Sequence[str]
) -> Scores | None:
    """Saved scores, and those of annealing runs as they are now; None on all ranks but 0.

    With a model, all of them are scored again: ranks that looked at the folders would have to agree
    on which. Without one, a loss counts as long as its checkpoint is the newest and what it was.

    Raises:
        UsageError: one has to be scored and there is no model, or the model scores other batches.
    """
    known = {real(other.root): other for other in scores.others}
    has_model = arguments.provider is not None or arguments.megatron is not None
    again, kept = [], []
    for root in roots:
        other = known.get(real(root))
        if other is None:
            again.append(root)
        elif not path_of(root).exists():
            _log.warning(
                "%s is not there any more: its loss in --scores %s is taken", root, arguments.scores
            )
            kept.append(replace(other, root=root))
        elif has_model:
            again.append(root)
        else:
            _refuse_stale(other, root)
            kept.append(replace(other, root=root))
    more = _scored_again(arguments, scores, again) if again else scores
    if more is None:
        return None
    named = {real(root) for root in roots}
    rest = [other for other in scores.others if real(other.root) not in named]
    return replace(scores, others=(*rest, *kept, *(more.others if again else ())))


def _refuse_stale(other: Other, root: str) -> None:
    newest, was = newest_of(root), other.checkpoint
    same_name = path_of(newest.path).name == path_of(was.path).name
    state = state_of(was, path_of(newest.path)) if same_name else "changed"
    if state == "unknown":
        _log.warning("%s: the scores do not say whether it is still what was scored", newest.path)
    elif state != "same":
        why = (
            f"{newest.path} is not what was scored, its files have changed since"
            if same_name
            else f"its newest checkpoint is {newest.path}, and {was.path} was scored"
        )
        raise UsageError(
            f"--annealed {root}: {why}: say what scores it again, --megatron or --provider"
        )


def _scored_again(
    arguments: argparse.Namespace, scores: Scores, roots: Sequence[str]
) -> Scores | None:
    """Annealing runs, and the newest checkpoint of the run, by which batches are compared."""
    newest = scores.checkpoints[-1]
    arguments.lasts, arguments.ends, arguments.exclude = [1], [str(newest.iteration)], []
    more = score(arguments, roots)
    if more is None:
        return None
    found = more.checkpoints[-1]
    if newest.metadata_digest not in (None, found.metadata_digest):
        raise UsageError(
            f"--scores {arguments.scores}: {found.path} is not what was scored: {_AGAIN}"
        )
    [was] = [
        point.losses
        for point in scores.points
        if point.end_iteration == newest.iteration and point.last == 1
    ]
    now = more.points[-1].losses
    if repr(dict(was)) != repr(dict(now)):  # a NaN is what it was, too
        raise UsageError(
            f"--scores {arguments.scores} says {dict(was)} for iteration {newest.iteration}, the "
            f"model says {dict(now)}: it scores other batches, so annealing runs cannot be "
            "compared. Score all again without --scores"
        )
    return more
