"""One checkpoint's folder as a `CheckpointRef`: what its name and its content say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pma_megatron.base import steps
from pma_megatron.base.openfiles import is_unreadable, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Incomplete, Schedule
from pma_megatron.formats.contract import Common
from pma_megatron.formats.marker import UPLOADING_FILE, SnapshotMarker, read_snapshot_marker
from pma_megatron.formats.schema import is_count
from pma_megatron.formats.source import Source
from pma_megatron.formats.trainers.saves import common_of, save_of, unfinished
from pma_megatron.runs import recovery_log
from pma_megatron.runs.folders import ITERATION
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.tokens import consumed_samples_of, consumed_tokens_of
from pma_megatron.storage.paths import path_of

STEP = re.compile(r"^global_step(\d+)(?:_universal)?$")
"""What DeepSpeed calls a tag by itself (engine.py, `save_checkpoint`), and how it is converted."""
SHORT = re.compile(r"^iter_(\d{1,6})$")
"""A name that Megatron does not write, nor look for: it has seven digits or more."""


def iteration_of(folder: Path) -> int | None:
    """The iteration in the name of an `iter_*` folder, None for any other name."""
    match = ITERATION.match(folder.name)
    return int(match[1]) if match else None


def _iteration_named(folder: Path) -> int | None:
    """The iteration in a name that a trainer gives by itself, None for any other."""
    match = ITERATION.match(folder.name) or STEP.match(folder.name) or SHORT.match(folder.name)
    return int(match[1]) if match else None


def describe(folder: Path, history: recovery_log.History | None = None) -> CheckpointRef:
    """One checkpoint folder as a reference; damage, and what kept it from being read, ends up in
    `incomplete_because`.

    Args:
        folder: `iter_*`, `release`, or a tag of DeepSpeed, or what lies under such a name.
        history: the run's spike recoveries.
    """
    steps.at(f"look at {folder.name}")
    try:
        none = _why_none(folder)
        if none is None:
            return _described(folder, history)
    except CheckpointError as error:
        none = Incomplete.of(error)
    except OSError as error:
        said = f"{error.filename or folder} cannot be read ({error.strerror})"
        none = Incomplete(said, unreadable=is_unreadable(error))
    return _incomplete(folder, "unknown", _iteration_named(folder), none)


def _why_none(folder: Path) -> Incomplete | None:
    """Why what has a checkpoint's name cannot even be looked into; None if it can."""
    short = SHORT.match(folder.name)
    if short and registry.detect(folder) not in (*registry.UNTRACKED, registry.TORCH_DCP):
        return Incomplete(
            f"Megatron would call it iter_{int(short[1]):07d} and does not find it under this "
            "name: give it that name, or move it elsewhere"
        )
    if folder.is_symlink() and not folder.exists():
        return Incomplete(f"it is a link to {folder.readlink()}, which is not there")
    if not folder.is_dir():
        return Incomplete("it is a file, and checkpoints are folders")
    first = next(folder.iterdir(), None)
    if first is not None:
        first.lstat()  # a folder may be listed, and what is in it not be seen
    elif iteration_of(folder) is None:
        return Incomplete("it is empty: still being written, or cut off", unfinished=True)
    return None


def _described(folder: Path, history: recovery_log.History | None) -> CheckpointRef:
    name, iteration = registry.detected(folder), _iteration_named(folder)
    if name not in [known.name for known in registry.FORMATS] and _may_be_begun(folder):
        begun = "no metadata.json: still being written, cut off, or another format"
        return _incomplete(folder, "unknown", iteration, Incomplete(begun, unfinished=True))
    marker = None
    try:
        known = registry.get(name, str(folder))
        if iteration is None:
            iteration = known.iteration_of(folder)
        marker = read_snapshot_marker(folder)
        signs = (at / UPLOADING_FILE for at in (folder, folder.parent))
        if any(sign.is_file() for sign in signs):  # on a disk too, which may be a mounted store
            return _incomplete(
                folder, name, iteration, Incomplete(_UPLOADING, unfinished=True), marker
            )
        reason = known.completeness(folder)
        if reason is not None:
            return _incomplete(folder, name, iteration, reason, marker)
        common = common_of(folder, known)
        if iteration is None and folder.name != "release" and is_count(common["iteration"]):
            iteration = common["iteration"]
        busy = unfinished(folder, known)
        if busy is not None:
            return _incomplete(folder, name, iteration, Incomplete(busy, unfinished=True))
        args = common["args"]
        wrong = _wrong_iteration(iteration, common["iteration"])
        if wrong is None and marker is not None:
            wrong = _wrong_iteration(iteration, marker.iteration)
        if wrong is not None:
            return _incomplete(folder, name, iteration, Incomplete(wrong), marker)
        tokens, unknown = consumed_tokens_of(args)
        if "tokens" in common:
            tokens, unknown = common["tokens"], common.get("tokens_unknown")
    except CheckpointError as error:
        return _incomplete(folder, name, iteration, Incomplete.of(error), marker)
    doubt = (history or recovery_log.History(())).doubt(iteration, args)
    return CheckpointRef(
        path=str(folder),
        format=name,
        iteration=iteration,
        consumed_samples=consumed_samples_of(args)
        if "consumed_train_samples" in args
        else _count(common.get("samples")),
        consumed_tokens=tokens,
        tokens_unknown_because=unknown,
        complete=True,
        snapshot=marker is not None,
        weights_only=bool(common.get("weights_only")),
        unhealthy_because=doubt.reason if doubt else None,
        judged=doubt is None or doubt.judged,
        branch=None if marker is None else marker.branch,
        warning=known.written_after(folder),
        saved_in=_saved_in(folder, name),
    )


_UPLOADING = "it is being uploaded or deleted, or that was cut off: run the same command again"


def _incomplete(
    folder: Path,
    name: str,
    iteration: int | None,
    why: Incomplete,
    marker: SnapshotMarker | None = None,
) -> CheckpointRef:
    unknown = False
    if why.unreadable and marker is None:
        try:
            marker = read_snapshot_marker(folder)
        except CheckpointError as error:
            unknown = is_unreadable(error)
    return CheckpointRef(
        path=str(folder),
        format=name,
        iteration=iteration,
        tokens_unknown_because="the checkpoint is not complete",
        complete=False,
        incomplete_because=why.reason,
        snapshot=marker is not None,
        writing=why.unfinished,
        unreadable=why.unreadable,
        branch=None if marker is None else marker.branch,
        branch_unknown=unknown,
        saved_in=_saved_in(folder, name),
    )


def _saved_in(folder: Path, name: str) -> str | None:
    save = save_of(folder, name)
    return str(save.folder) if save.inside else None


def _may_be_begun(folder: Path) -> bool:
    """Whether a folder of no known format may become one: Megatron names the format last."""
    if iteration_of(folder) is None or (folder / "metadata.json").is_file():
        return False
    return registry.detect(folder) != registry.LEGACY


def common_at(folder: Path) -> Common:
    """What the checkpoint in a folder says beside its tensors.

    Raises:
        CheckpointError: there is none, or it cannot be read: nothing is known of it then.
    """
    try:
        return common_of(folder, registry.get(registry.detect(folder), str(folder)))
    except OSError as error:
        raise unread(error.filename or folder, error) from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder} cannot be read as a checkpoint: {error}") from error


def args_of(folder: Path) -> dict[str, Any]:
    """The arguments of training in a checkpoint; {} where its trainer keeps none.

    Raises:
        CheckpointError: as `common_at`.
    """
    return dict(common_at(folder)["args"])


def schedule_of(ref: CheckpointRef | Source) -> Schedule:
    """Where it stood in its learning-rate schedule; nothing is known of one that is damaged."""
    try:
        return registry.get(ref.format, ref.path).schedule(path_of(ref.path))
    except (CheckpointError, OSError):
        return Schedule()


def _wrong_iteration(named: int | None, saved: Any) -> str | None:
    if named is None or saved is None or int(saved) == named:
        return None
    return f"its folder says iteration {named}, its content {saved}: renamed or overwritten"


def _count(value: Any) -> int | None:
    return value if is_count(value) else None
