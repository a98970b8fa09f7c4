"""Whether training has saved a checkpoint of its own over an average, whose `pma.json` stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pma_megatron.base.spelling import first_few
from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.output import Folder
from pma_megatron.formats.trainers.saves import published_as
from pma_megatron.runs.describe import describe

_SHOWN = 4  # files that one message names


def changed_files(folder: Path, *, quick: bool = False) -> tuple[str, ...]:
    """Files of other sizes than `pma.json` lists; what is not there has not changed.

    Args:
        folder: which.
        quick: look at the small ones alone where `.metadata` is among them: it says what lies
            where, and differs wherever a trainer has saved. A large average has thousands more.

    () where it lists none, cannot be read or is not there. In stores it is what was listed last.
    """
    try:
        sums = read_marker(folder).sums
    except (CheckpointError, VerifyError):
        return ()
    looked = sums or {}
    if quick and any(PurePosixPath(name).name == METADATA_FILE for name in looked):
        looked = {name: each for name, each in looked.items() if each.sha256}
    return tuple(
        name for name, each in sorted(looked.items()) if _is_other(folder / name, each.bytes)
    )


def saved_over(folder: Path, *, quick: bool = False) -> tuple[str, ...]:
    """The same of a folder that is a whole checkpoint nevertheless, so that a trainer saved it.

    An average that was damaged is none, or ends early. Files of equal sizes are not told apart:
    `rewritten` does that.
    """
    changed = changed_files(folder, quick=quick)
    return changed if changed and is_whole(folder) else ()


def is_whole(folder: Path) -> bool:
    """Whether what lies in a folder is a checkpoint, or a model, that can be used."""
    try:
        return describe(published_as(folder).checkpoint).complete
    except CheckpointError:
        return False


def since(changed: Sequence[str], folder: Folder = Folder.CHECKPOINT) -> str:
    """A clause on files that have changed, and who did that.

    >>> since(("common.pt",))
    'common.pt in it is not what pma.json lists: training has saved a checkpoint over the average'
    """
    who = "somebody has edited it since"
    if folder is Folder.CHECKPOINT:
        who = "training has saved a checkpoint over the average"
    verb = "are" if changed[1:] else "is"
    return f"{first_few(changed, _SHOWN)} in it {verb} not what {MARKER_FILE} lists: {who}"


def _is_other(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size != nbytes
    except OSError:
        return False
