"""What checkpoints lie in a run's folder, how far each had come, and which are whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pma_megatron import audit
from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.folders import ITERATION, is_checkpoint, what_is
from pma_megatron.formats import registry
from pma_megatron.formats.base import Incomplete
from pma_megatron.formats.marker import SNAPSHOTS, read_snapshot_marker
from pma_megatron.formats.schema import is_count
from pma_megatron.locations import refuse_remote
from pma_megatron.openfiles import folders_in, is_folder
from pma_megatron.refs import CheckpointRef
from pma_megatron.selection import Selection, SelectionRequest, select
from pma_megatron.spelling import among, given, has, named
from pma_megatron.tokens import consumed_tokens_of
from pma_megatron.trackers import Pointer, read_pointers

TRACKER_FILE = registry.get(registry.TORCH_DIST, "").tracker.file
_STEP = re.compile(r"^global_step(\d+)(?:_universal)?$")
"""What DeepSpeed calls a tag by itself (engine.py, `save_checkpoint`), and how it is converted."""
_OWN_ROOT = re.compile(r"^checkpoint[-_]\d+$")
"""transformers/trainer_utils.py, PREFIX_CHECKPOINT_DIR; accelerate/accelerator.py, save_state."""


def list_checkpoints(
    root: str | Path, *, problem: Callable[[str], None] | None = None
) -> list[CheckpointRef]:
    """Every checkpoint of the run at `root`, oldest first, whole or not.

    Thin snapshots below it (`pma_snapshots`) count too. Where a snapshot and a full checkpoint have
    one iteration, the full one is listed, unless it alone is incomplete.

    Hugging Face's Trainer and Accelerate give every tag of DeepSpeed a root of its own: where
    `root` holds no checkpoint but folders `checkpoint-N`, the tags in those are listed.

    Args:
        root: the folder given to Megatron's --save or DeepSpeed's save_checkpoint, Trainer's
            output_dir, or one checkpoint's folder in it.
        problem: is told why the log of recoveries cannot be used; every checkpoint is then not
            judged. Without it that is an error.

    Raises:
        SelectionError: there is no such folder, or it cannot be read.
        CheckpointError: its log of recoveries cannot be read.
    """
    refuse_remote("", root)
    root = Path(root)
    if not is_folder(root):
        raise SelectionError(what_is(root))
    if is_checkpoint(root):
        return [describe(root, _history(root.parent, problem))]
    history = _history(root, problem)
    refs = {folder.name: describe(folder, history) for folder in _checkpoint_folders(root)}
    for folder in _checkpoint_folders(root / SNAPSHOTS):
        full = refs.get(folder.name)
        if full is None or not full.complete:
            thin = describe(folder, history)
            if full is None or thin.complete:
                refs[folder.name] = thin
    if not refs:
        refs = {str(folder): describe(folder, history) for folder in _tags_with_own_roots(root)}
    ordered = sorted(
        refs.values(), key=lambda ref: (ref.iteration is None, ref.iteration or 0, ref.path)
    )
    return _only_newest_writing(ordered, read_pointers(root))


def _history(root: Path, problem: Callable[[str], None] | None) -> audit.History:
    try:
        return audit.read(root)
    except CheckpointError as error:
        if problem is None:
            raise
        problem(str(error))
        return audit.History((), f"{audit.FILE} is damaged")


def _only_newest_writing(
    ordered: list[CheckpointRef], pointers: Mapping[str, Pointer]
) -> list[CheckpointRef]:
    """Of the unfinished ones, the newest may be at work; a tracker is written after its save."""
    newest = {ref.snapshot: ref.path for ref in ordered if ref.iteration is not None}
    named = {pointer.folder for pointer in pointers.values()}
    return [
        replace(ref, writing=False)
        if ref.writing
        and (
            ref.path != newest.get(ref.snapshot)
            or (not ref.snapshot and Path(ref.path).name in named)
        )
        else ref
        for ref in ordered
    ]


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
    iteration = iteration_of(folder)
    try:
        return _described(folder, history)
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or folder} cannot be read ({error.strerror})"
    return _incomplete(folder, "unknown", iteration, Incomplete(reason))


def _described(folder: Path, history: audit.History | None) -> CheckpointRef:
    name, iteration = registry.detect(folder), iteration_of(folder)
    if name not in [known.name for known in registry.FORMATS] and _may_be_begun(folder):
        begun = "no metadata.json: still being written, cut off, or another format"
        return _incomplete(folder, "unknown", iteration, Incomplete(begun, unfinished=True))
    try:
        known = registry.get(name, str(folder))
        iteration = known.iteration(folder) if known.iteration else iteration
        marker = read_snapshot_marker(folder)
        snapshot = marker is not None
        reason = known.completeness(folder)
        if reason is not None:
            return _incomplete(folder, name, iteration, reason, snapshot=snapshot)
        common = known.common(folder)
        args = common["args"]
        said = _said_by(folder.name, iteration)
        wrong = _wrong_iteration(said, common["iteration"])
        if wrong is None and marker is not None:
            wrong = _wrong_iteration(said, marker.iteration)
        if wrong is not None:
            return _incomplete(folder, name, iteration, Incomplete(wrong), snapshot=snapshot)
        tokens, unknown = consumed_tokens_of(args)
    except CheckpointError as error:
        return _incomplete(folder, name, iteration, Incomplete(str(error)))
    doubt = (history or audit.History(())).doubt(iteration, args)
    return CheckpointRef(
        path=str(folder),
        format=name,
        iteration=iteration,
        consumed_samples=_count(args.get("consumed_train_samples", common.get("samples"))),
        consumed_tokens=tokens,
        tokens_unknown_because=unknown,
        complete=True,
        incomplete_because=None,
        snapshot=snapshot,
        weights_only=bool(common.get("weights_only")),
        unhealthy_because=doubt.reason if doubt else None,
        judged=doubt is None or doubt.judged,
        warning=known.written_after(folder),
    )


def _incomplete(
    folder: Path, name: str, iteration: int | None, why: Incomplete, *, snapshot: bool = False
) -> CheckpointRef:
    return CheckpointRef(
        path=str(folder),
        format=name,
        iteration=iteration,
        consumed_samples=None,
        consumed_tokens=None,
        tokens_unknown_because="the checkpoint is not complete",
        complete=False,
        incomplete_because=why.reason,
        snapshot=snapshot,
        writing=why.unfinished,
    )


def _may_be_begun(folder: Path) -> bool:
    """Whether a folder of no known format may become one: Megatron names the format last."""
    if iteration_of(folder) is None or (folder / "metadata.json").is_file():
        return False
    return registry.detect(folder) != registry.LEGACY


def common_args(folder: Path) -> dict[str, Any]:
    """Megatron's arguments in a checkpoint; {} where there is none or it cannot be read."""
    try:
        found = registry.get(registry.detect(folder), str(folder)).common(folder)["args"]
    except (CheckpointError, OSError):
        return {}
    return dict(found)


def choose(
    refs: list[CheckpointRef], request: SelectionRequest, root: str | Path,
    pointers: Mapping[str, Pointer] | None = None, resumed: int | None = None,
) -> Selection:  # fmt: skip
    """Select among `refs`, refusing a run that mixes formats without saying which to take.

    An average ends at what training resumes from, where the request does not say where: what a job
    has loaded, else what the tracker names, else the newest complete checkpoint.

    Args:
        refs: all of the run.
        request: which of them.
        root: the run's folder, for messages.
        pointers: see `pointers_of`.
        resumed: iteration that a live job has loaded.

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
        if ref.format != "unknown" and not ref.writing and ref.iteration not in excluded:
            formats.setdefault(ref.format, []).append(ref.iteration)
    if len(formats) > 1 and request.iterations is None and request.paths is None:
        found = "; ".join(f"{name}: {numbers}" for name, numbers in formats.items())
        raise SelectionError(
            f"{root} mixes checkpoint formats ({found}). Take one of them with "
            f"{among('iterations', 'paths')}, or leave the others out with {named('exclude')}"
        )
    pointer = (pointers or {}).get(next(iter(formats), ""))
    if resumed is None and pointer is not None and pointer.folder is not None:
        resumed = next((r.iteration for r in refs if Path(r.path).name == pointer.folder), None)
        if all(Path(ref.path).name != pointer.folder for ref in refs):
            problem = f"has a {pointer.file} that names {pointer.folder!r}, which is no checkpoint"
            pointer = replace(pointer, problem=problem)
    selection = select(refs, request, resumed)
    own_root = _OWN_ROOT.match(Path(selection.refs[-1].path).parent.name)
    if pointer is None or pointer.problem is None or own_root:
        return selection
    note = (
        f"{root} {pointer.problem}. Averages do not need it, they go by the folders; training "
        "does, to resume from there"
    )
    return replace(selection, notes=(*selection.notes, note))


def pointers_of(root: str | Path) -> dict[str, Pointer] | None:
    """What the trackers in `root` say; None where that is no run's folder."""
    root = Path(root)
    return read_pointers(root) if is_folder(root) and not is_checkpoint(root) else None


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
    for pointer in read_pointers(root).values():
        if pointer.folder is not None:
            return root / pointer.folder
        if not pointer.missing:
            raise CheckpointError(f"{root} {pointer.problem}. Name one checkpoint's folder")
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


def _said_by(name: str, otherwise: int | None) -> int | None:
    match = _STEP.match(name)
    return int(match[1]) if match else otherwise


def _wrong_iteration(named: int | None, saved: Any) -> str | None:
    if named is None or saved is None or int(saved) == named:
        return None
    return f"its folder says iteration {named}, its content {saved}: renamed or overwritten"


def _count(value: Any) -> int | None:
    return value if is_count(value) else None
