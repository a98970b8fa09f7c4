"""What a trainer's own retention deletes of what an average or a recovery is made of.

Megatron's `--save-retain-interval` deletes the checkpoint before the one that it has just saved,
unless its iteration is a multiple (megatron/training/checkpointing.py, `iter_finalize_fn`, from
core_v0.14 on). `most_recent_k` keeps so many of the newest; it is a setting of Megatron-Bridge
(src/megatron/bridge/training/checkpointing.py, `cleanup_old_non_persistent_checkpoint`), and in
Megatron-LM a field that no flag sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pma_megatron.megatron.flags import Settings
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.storage.paths import in_store, real

_INSTEAD = "leave it out, and let `pma prune` free the space: it knows what is needed"


@dataclass(frozen=True, slots=True)
class _Retention:
    """What stays of a run.

    Attributes:
        flag: what says so, as it was given.
        every: multiples of so many iterations stay; None for all.
        most: so many of the newest stay; None for all.
        saved_every: iterations between saves.
    """

    flag: str
    every: int | None
    most: int | None
    saved_every: int

    def why_not_last(self, count: int) -> str | None:
        """Why the newest `count` are not those that were saved, to follow the flag; or None."""
        if self.every is not None and self.every > self.saved_every and count > 1:
            return f"leaves of every {self.saved_every} iterations only multiples of {self.every}"
        if self.most is not None and self.most < count:
            return f"leaves {self.most} checkpoints"
        return None

    def why_not_spaced(self, count: int, step: float, tolerance: float) -> str | None:
        """Why some of `count` places, `step` iterations apart, may be empty; or None."""
        if self.every is not None and self.every / 2 > tolerance * step:
            return (
                f"leaves multiples of {self.every} iterations, and places {step:g} iterations "
                f"apart need one within {tolerance * step:g}"
            )
        if self.most is not None:
            reach = (self.most - 1) * self.saved_every
            if reach < (count - 1 - tolerance) * step:
                return f"leaves {self.most} checkpoints, which reach {reach} iterations back"
        return None


def warnings(args: Any, settings: Settings) -> Iterator[str]:
    """Sentences on what this job will miss.

    Args:
        args: Megatron's arguments.
        settings: what the job was asked to do.
    """
    for kept in _retentions(args):
        if settings.init and _same_folder(settings.load, getattr(args, "save", None)):
            why = _why_not(kept, args, settings.selection, settings.window)
            if why is not None:
                yield (
                    f"{kept.flag} {why}: the next start with --pma-init will not find the "
                    f"checkpoints that it asks for; {_INSTEAD}"
                )
        if settings.save:
            wanted = SelectionRequest(interval_tokens=settings.interval_tokens)
            why = _why_not(kept, args, wanted, settings.window)
            if why is not None:
                yield (
                    f"{kept.flag} {why}: the running average goes on, since it has its window for "
                    "itself, but `pma merge` cannot make the same one of the run's checkpoints; "
                    f"{_INSTEAD}"
                )
            if kept.every is not None and in_store(settings.save_dir or ""):
                yield (
                    f"{kept.flag} deletes nothing at {settings.save_dir}: all averages stay there; "
                    "`pma prune` frees what is not needed"
                )
        if settings.recover is not None:
            recover = settings.recover
            count = recover.last + recover.attempts - 1
            count += -(-recover.margin_iterations // kept.saved_every)
            why = kept.why_not_last(count)
            if why is not None:
                yield (
                    f"{kept.flag} {why}: a recovery may find fewer checkpoints than its "
                    f"{recover.attempts} attempts with {recover.last} each take, or go back "
                    f"farther; {_INSTEAD}"
                )


def _retentions(args: Any) -> Iterator[_Retention]:
    every, most = getattr(args, "save_retain_interval", None), getattr(args, "most_recent_k", None)
    saved_every = getattr(args, "save_interval", None)
    if getattr(args, "save", None) is None or not saved_every:
        return
    if every:
        yield _Retention(f"--save-retain-interval {every}", int(every), None, int(saved_every))
    if most is not None and most >= 0:
        yield _Retention(f"most_recent_k = {most}", None, int(most), int(saved_every))


def _why_not(kept: _Retention, args: Any, wanted: SelectionRequest, count: int) -> str | None:
    if wanted.iterations is not None:
        gone = [i for i in wanted.iterations if kept.every is not None and i % kept.every]
        return f"deletes iteration {gone[0]}" if gone else None
    if wanted.interval_iterations is not None:
        return kept.why_not_spaced(count, wanted.interval_iterations, wanted.tolerance)
    if wanted.interval_tokens is not None:
        tokens = (getattr(args, "global_batch_size", 0) or 0) * (
            getattr(args, "seq_length", 0) or 0
        )
        step = wanted.interval_tokens / tokens if tokens else 0.0
        return kept.why_not_spaced(count, step, wanted.tolerance) if step else None
    return kept.why_not_last(count)


def _same_folder(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return False
    return real(one) == real(other)
