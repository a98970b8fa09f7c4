"""Whether training has saved a checkpoint of its own over an average, whose `pma.json` stays."""

from __future__ import annotations

from pathlib import Path

from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.trainers.saves import published_as
from pma_megatron.runs.describe import describe
from pma_megatron.storage.paths import in_store


def changed_files(folder: Path, *, quick: bool = False) -> tuple[str, ...]:
    """Files of other sizes than `pma.json` lists; what is not there has not changed.

    Args:
        folder: which.
        quick: look at the small ones alone, if there are any: those that say what lies where differ
            wherever a trainer has saved, and a large average has thousands of others.

    () where it lists none, cannot be read or is not there; and in stores, into which no trainer
    saves.
    """
    if in_store(folder):
        return ()
    try:
        sums = read_marker(folder).sums
    except (CheckpointError, VerifyError):
        return ()
    looked = {name: each for name, each in (sums or {}).items() if each.sha256} if quick else sums
    return tuple(
        name
        for name, each in sorted((looked or sums or {}).items())
        if _is_other(folder / name, each.bytes)
    )


def saved_over(folder: Path, *, quick: bool = False) -> tuple[str, ...]:
    """The same of a folder that is a whole checkpoint nevertheless, so that a trainer saved it.

    An average that was damaged is none, or ends early.
    """
    changed = changed_files(folder, quick=quick)
    if not changed:
        return ()
    try:
        whole = describe(published_as(folder).checkpoint).complete
    except CheckpointError:
        return ()
    return changed if whole else ()


def _is_other(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size != nbytes
    except OSError:
        return False
