"""The mark that this tool leaves in folders that it writes, and what a thin snapshot's says.

A snapshot looks like any weights-only checkpoint of Megatron, but its "weights" are main parameters
stored in one dtype. Only the mark tells the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import is_unreadable
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.inert import brief
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.schema import is_count, wrong
from pma_megatron.version import __version__

MARKER_FILE = "pma.json"
SEAL_FILE = f"{MARKER_FILE}.sha256"
OWN_FILES = frozenset({MARKER_FILE, SEAL_FILE})
"""They describe the other files, so what is made of a checkpoint gets its own."""
SAVING = ".pma-saving-"
"""What a file is called, before the name of the running average that is being saved beside it."""
UPLOADING_FILE = ".pma-uploading"
"""Lies in the folder of an output in an object store until all of it is there."""
NOT_CONTENT = OWN_FILES | {UPLOADING_FILE}
SNAPSHOTS = "pma_snapshots"
"""Folder below a run's --save that holds its thin snapshots, `iter_*` each."""
BRANCHES_FILE = "pma_branches.json"
"""Lies beside the snapshots of a run that went back: the branches that began so, which are known by
this before they have a snapshot of their own, and after they have lost it."""
SNAPSHOT = "snapshot"
ONLINE_AVERAGE = "online_average"
EXPORT = "export"
"""What a Hugging Face model is called that was exported."""
SNAPSHOT_VERSION = 1
MAIN_PARAMS = "main_params"


def is_merge(said: Mapping[str, Any]) -> bool:
    """Whether a `pma.json` says that `pma merge` made the checkpoint.

    >>> is_merge({"provenance_version": 2}), is_merge({"kind": ONLINE_AVERAGE})
    (True, False)
    """
    return said.get("kind") is None and "provenance_version" in said


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """Which branch of a run wrote a snapshot: one begins where the run goes back.

    Attributes:
        number: how often the run had gone back by then.
        after: what the branches before it wrote up to this iteration belongs to it too.
    """

    number: int
    after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotMarker:
    """What a snapshot says of itself.

    Attributes:
        iteration: of the run.
        dtype: dtype of the stored main parameters, as torch spells it without `torch.`.
        holds: what the tensors are; this release knows `main_params`.
        branch: of the run; None where nothing is said, which counts as the first.
    """

    iteration: int
    dtype: str
    holds: str = MAIN_PARAMS
    branch: Branch | None = None

    def to_json(self) -> dict[str, Any]:
        """What `pma.json` says beside the checksums of files."""
        return {
            "kind": SNAPSHOT,
            "snapshot_version": SNAPSHOT_VERSION,
            "pma_megatron": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **asdict(self),
        }


def read_snapshot_marker(folder: Path) -> SnapshotMarker | None:
    """The mark of the snapshot in `folder`; None for a trainer's checkpoint or a merge.

    Raises:
        CheckpointError: it is a snapshot of a form that this release does not know, or its mark
            cannot be read now (`base.openfiles.is_unreadable`).
    """
    try:
        value = read_json(folder / MARKER_FILE)
    except CheckpointError as error:
        if is_unreadable(error):
            raise
        return None  # not marked, so it stands for nothing but what its format says
    if value.get("kind") != SNAPSHOT:
        return None
    version, holds = value.get("snapshot_version"), value.get("holds")
    if version != SNAPSHOT_VERSION or holds != MAIN_PARAMS:
        raise CheckpointError(
            f"{folder / MARKER_FILE} says snapshot version {brief(version)} holding "
            f"{brief(holds)}, this release reads version {SNAPSHOT_VERSION} holding "
            f"{MAIN_PARAMS!r}: use the pma_megatron that wrote it, "
            f"{brief(value.get('pma_megatron'))}, or {left_out('it')}"
        )
    iteration, dtype = value.get("iteration"), value.get("dtype")
    if not is_count(iteration) or type(dtype) is not str:
        raise wrong(f"{folder / MARKER_FILE}: iteration and dtype", "both", (iteration, dtype))
    return SnapshotMarker(
        iteration=iteration, dtype=dtype, branch=branch_in(value, folder / MARKER_FILE)
    )


def branch_in(said: Mapping[str, Any], where: object) -> Branch | None:
    """The branch that the mark of a snapshot says; None where it says none.

    Args:
        said: what its `pma.json` says.
        where: that lies, for messages.

    Raises:
        CheckpointError: what it says is no branch.
    """
    branch = said.get("branch")
    if branch is None:
        return None
    found = branch if isinstance(branch, dict) else {}
    number, after = found.get("number"), found.get("after")
    if not is_count(number) or not is_count(after):
        raise wrong(f"{where}: branch", "number and after", branch)
    return Branch(number=number, after=after)


PROVENANCE_VERSION = 1
"""Of what `pma.json` says of a merge (`merging.provenance`)."""
