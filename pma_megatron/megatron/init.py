"""`--pma-init`: PMA-init with Megatron's arguments, once per command.

A job that a scheduler restarts with the same flags must not average again: what Megatron resumes
then descends from the average already. So every checkpoint saved after a PMA-init says so in its
arguments, and a restart of the same command finds that and goes on training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import say
from pma_megatron.errors import CheckpointError, SelectionError, UsageError
from pma_megatron.formats import registry
from pma_megatron.live.load import LiveReport
from pma_megatron.megatron.flags import USED_BY, Settings, given
from pma_megatron.megatron.load import merge_into
from pma_megatron.megatron.resumed import resumed_args, resumed_folder
from pma_megatron.storage.paths import path_of

RECORD = "pma_init_record"
"""Attribute of Megatron's arguments, and so of every later checkpoint's."""


def init(
    args: Any,
    settings: Settings,
    models: Sequence[Any],
    optimizer: Any,
    metadata: Mapping[str, Any] | None,
) -> None:
    """Average into what Megatron resumed, unless this command already did. Every rank calls it.

    Args:
        args: Megatron's arguments after its load; gets the record of what was done.
        settings: of this job.
        models: the model chunks.
        optimizer: their optimizer.
        metadata: what the model's `sharded_state_dict` gets.

    Raises:
        UsageError: Megatron resumed nothing.
        CheckpointError: what it resumed cannot be read, so nobody knows whether this was done.
        PmaError: see `merge_into`.
    """
    comm = Comm()
    iteration = int(getattr(args, "iteration", 0) or 0)
    if iteration == 0 or getattr(args, "finetune", False):
        raise UsageError(
            f"--pma-init: Megatron resumed no training run from --load {args.load} (iteration "
            f"{iteration}). PMA-init continues a run: check --load, and leave out --finetune"
        )
    loaded, done = comm.on_main("record", lambda: _record_of(args, iteration))
    flags = _flags(args)
    # A record of before a flag was known says nothing of it.
    if done is not None and {**dict.fromkeys(flags), **done["flags"]} == flags:
        setattr(args, RECORD, done)
        say(
            f"PMA-init was done at iteration {done['iteration']} and {loaded} descends from it: "
            "not averaging again. To average anew, change a --pma flag, for instance "
            f"--pma-end-iteration {iteration}"
        )
        return
    report = _average(args, settings, models, optimizer, metadata, loaded)
    sources = list(report.sources)
    setattr(args, RECORD, {"iteration": iteration, "flags": flags, "sources": sources})
    say(f"PMA-init: {report}")


def _average(
    args: Any,
    settings: Settings,
    models: Sequence[Any],
    optimizer: Any,
    metadata: Mapping[str, Any] | None,
    loaded: str,
) -> LiveReport:
    assert settings.load is not None
    try:
        return merge_into(
            models,
            optimizer,
            load=settings.load,
            selection=settings.selection,
            method=settings.method,
            optimizer_state=settings.optimizer_state,
            share=settings.share,
            threads=settings.threads,
            check_sources=settings.check_sources,
            metadata=metadata,
            # Sources of the run itself end at what Megatron resumed, also under --ckpt-step.
            resumed=int(args.iteration) if settings.load == args.load else None,
        )
    except SelectionError as error:
        if loaded.rpartition("/")[0] == str(path_of(args.load)):
            raise
        raise SelectionError(
            f"{error}. Megatron has resumed {loaded}, a non-persistent checkpoint, and averages "
            "are not made of those: to resume one of the others, leave out "
            "--non-persistent-ckpt-type for this start"
        ) from error


def _flags(args: Any) -> dict[str, Any]:
    used = {name for name, users in USED_BY.items() if "pma_init" in users}
    used.remove("pma_check_sources")  # it makes no other average
    return {n: getattr(args, n) if given(args, n) else None for n in USED_BY if n in used}


def _record_of(args: Any, iteration: int) -> tuple[str, dict[str, Any] | None]:
    """What Megatron has resumed from, and the record in it."""
    try:
        folder = resumed_folder(args, iteration)
        if registry.detect(folder) == registry.LEGACY:
            return str(folder), None  # no job with --pma-* flags saves those
        found = resumed_args(folder, iteration).get(RECORD)
    except CheckpointError as error:
        raise CheckpointError(
            f"--pma-init: whether this was done before cannot be told: {error}. Start again when "
            "it can be read, or leave out --pma-init to train on from there as it is"
        ) from error
    return str(folder), found if isinstance(found, dict) and "flags" in found else None
