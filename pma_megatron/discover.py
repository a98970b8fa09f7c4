"""What checkpoints lie in a run's folder, how far each had come, and which are whole."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pma_megatron import audit
from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.folders import ITERATION, is_checkpoint, what_is
from pma_megatron.formats import registry
from pma_megatron.formats.marker import SNAPSHOTS, read_snapshot_marker
from pma_megatron.formats.schema import is_count
from pma_megatron.locations import refuse_remote
from pma_megatron.openfiles import folders_in, is_folder, read_pointer
from pma_megatron.refs import CheckpointRef
from pma_megatron.selection import Selection, SelectionRequest, select
from pma_megatron.spelling import among, given, has, named
from pma_megatron.tokens import consumed_tokens_of

TRACKER_FILE = registry.get(registry.TORCH_DIST, "").tracker.file
_OWN_ROOT = re.compile(r"^checkpoint[-_]\d+$")
"""transformers/trainer_utils.py, PREFIX_CHECKPOINT_DIR; accelerate/accelerator.py, save_state."""
_log = logging.getLogger(__name__)


def list_checkpoints(root: str | Path) -> list[CheckpointRef]:
    """Every checkpoint of the run at `root`, oldest first, whole or not.

    Thin snapshots below it (`pma_snapshots`) count too. Where a snapshot and a full checkpoint have
    one iteration, the full one is listed, unless it alone is incomplete.

    Hugging Face's Trainer and Accelerate give every tag of DeepSpeed a root of its own: where
    `root` holds no checkpoint but folders `checkpoint-N`, the tags in those are listed.

    Args:
        root: the folder given to Megatron's --save or DeepSpeed's save_checkpoint, Trainer's
            output_dir, or one checkpoint's folder in it.

    Raises:
        SelectionError: there is no such folder.
    """
    refuse_remote("", root)
    root = Path(root)
    if not is_folder(root):
        raise SelectionError(what_is(root))
    if is_checkpoint(root):
        return [describe(root, audit.read(root.parent))]
    history = audit.read(root)
    refs = {folder.name: describe(folder, history) for folder in _checkpoint_folders(root)}
    for folder in _checkpoint_folders(root / SNAPSHOTS):
        full = refs.get(folder.name)
        if full is None or not full.complete:
            thin = describe(folder, history)
            if full is None or thin.complete:
                refs[folder.name] = thin
    if not refs:
        refs = {str(folder): describe(folder, history) for folder in _tags_with_own_roots(root)}
    return sorted(
        refs.values(), key=lambda ref: (ref.iteration is None, ref.iteration or 0, ref.path)
    )


def newest_full(snapshot: Path) -> int | None:
    """Iteration of the newest whole full checkpoint not after the one at `snapshot`, or None.

    It is looked for in the run's folder, above `pma_snapshots`.
    """
    root = snapshot.parent.parent if snapshot.parent.name == SNAPSHOTS else snapshot.parent
    end = iteration_of(snapshot)
    numbers = ((iteration_of(folder), folder) for folder in _checkpoint_folders(root))
    numbered = [(n, folder) for n, folder in numbers if n is not None and (end is None or n <= end)]
    for iteration, folder in sorted(numbered, reverse=True):
        ref = describe(folder)
        if ref.complete and not ref.snapshot:
            return iteration
    return None


def iteration_of(folder: Path) -> int | None:
    """The iteration in the name of an `iter_*` folder, None for any other name."""
    match = ITERATION.match(folder.name)
    return int(match[1]) if match else None


def describe(folder: Path, history: audit.History | None = None) -> CheckpointRef:
    """One checkpoint folder as a reference; damage ends up in `incomplete_because`.

    Args:
        folder: `iter_*`, `release`, or a tag of DeepSpeed.
        history: the run's spike recoveries.
    """
    name = registry.detect(folder)
    iteration = iteration_of(folder)
    samples, tokens, unknown, reason, snapshot = None, None, None, None, False
    recoveries, weights_only = 0, False
    try:
        snapshot = read_snapshot_marker(folder) is not None
        known = registry.get(name, str(folder))
        iteration = known.iteration(folder) if known.iteration else iteration
        reason = known.completeness(folder)
        if reason is None:
            common = known.common(folder)
            reason = _wrong_iteration(iteration, common["iteration"])
            tokens, unknown = consumed_tokens_of(common["args"])
            samples = _count(common["args"].get("consumed_train_samples"))
            weights_only = bool(common.get("weights_only"))
            recoveries = _count(common["args"].get(audit.RECORD)) or 0
    except CheckpointError as error:
        reason = str(error)
    return CheckpointRef(
        path=str(folder),
        format=name,
        iteration=iteration,
        consumed_samples=samples,
        consumed_tokens=tokens,
        tokens_unknown_because=unknown if reason is None else "the checkpoint is not complete",
        complete=reason is None,
        incomplete_because=reason,
        snapshot=snapshot,
        weights_only=weights_only,
        unhealthy_because=history.distrust(iteration, recoveries) if history else None,
    )


def common_args(folder: Path) -> dict[str, Any]:
    """Megatron's arguments in a checkpoint; {} where there is none or it cannot be read."""
    try:
        found = registry.get(registry.detect(folder), str(folder)).common(folder)["args"]
    except (CheckpointError, OSError):
        return {}
    return dict(found)


def choose(refs: list[CheckpointRef], request: SelectionRequest, root: str | Path) -> Selection:
    """Select among `refs`, refusing a run that mixes formats without saying which to take.

    Raises:
        SelectionError: nothing there, mixed formats, or the request cannot be met.
    """
    root = Path(root)
    if not refs:
        raise SelectionError(what_is(root))
    _refuse_one_checkpoint(root, request)
    excluded = set(request.exclude)
    formats: dict[str, list[int | None]] = {}
    for ref in refs:
        if ref.format != "unknown" and ref.iteration not in excluded:
            formats.setdefault(ref.format, []).append(ref.iteration)
    if len(formats) > 1 and request.iterations is None and request.paths is None:
        found = "; ".join(f"{name}: {numbers}" for name, numbers in formats.items())
        raise SelectionError(
            f"{root} mixes checkpoint formats ({found}). Take one of them with "
            f"{among('iterations', 'paths')}, or leave the others out with {named('exclude')}"
        )
    selection = select(refs, request)
    own_root = _OWN_ROOT.match(Path(selection.refs[-1].path).parent.name)
    if root.is_dir() and not is_checkpoint(root) and not own_root:
        _warn_of_tracker(root, selection.refs[-1].format)
    return selection


def _warn_of_tracker(root: Path, name: str) -> None:
    tracker = registry.get(name, str(root)).tracker
    path = root / tracker.file
    content = read_pointer(path)
    folder = None if content is None else tracker.folder_of(content)
    if folder is None or (name in registry.TAGS and not (root / folder).is_dir()):
        what = "has no" if content is None else f"names {folder!r}, which is not there, in"
        _log.warning(
            "%s %s %s. Checkpoints are found by their folders, so the merge does not need it; "
            "training does, to resume from there.", root, what, tracker.file,
        )  # fmt: skip


def _refuse_one_checkpoint(root: Path, request: SelectionRequest) -> None:
    """A checkpoint's folder where the run's is wanted."""
    if request.paths is None and request.last != 1 and is_checkpoint(root):
        end = iteration_of(root)
        up_to = "" if end is None else f", with {given('end_iteration', end)} to end there"
        raise SelectionError(
            f"{root} is one checkpoint, and an average takes several of its run. Give the folder "
            f"above it, {root.parent}{up_to if has('end_iteration') else ''}"
        )


def pointed(root: Path) -> Path:
    """The checkpoint that the tracker in `root` names, or `root` itself without a tracker.

    Raises:
        CheckpointError: the tracker makes no sense.
    """
    for known in registry.FORMATS:
        path = root / known.tracker.file
        content = read_pointer(path)
        if content is not None:
            folder = known.tracker.folder_of(content)
            if folder is None:
                raise CheckpointError(f"{path} says {content!r}: damaged. Name one folder")
            return root / folder
    return root


def _checkpoint_folders(root: Path) -> list[Path]:
    if not is_folder(root):
        return []
    return [path for path in folders_in(root) if is_checkpoint(path)]


def _tags_with_own_roots(root: Path) -> list[Path]:
    """By these names alone: one level below any other folder lie other runs."""
    roots = [path for path in folders_in(root) if _OWN_ROOT.match(path.name)]
    found = (folder for own in roots for folder in _checkpoint_folders(own))
    return [folder for folder in found if registry.detect(folder) in registry.TAGS]


def _wrong_iteration(named: int | None, saved: Any) -> str | None:
    if named is None or saved is None or int(saved) == named:
        return None
    return f"its folder says iteration {named}, its content {saved}: renamed or overwritten"


def _count(value: Any) -> int | None:
    return value if is_count(value) else None
