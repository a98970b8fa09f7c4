"""What checkpoints lie in a run's folder, how far each had come, and which are whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from pma_megatron.base.once import once_each
from pma_megatron.base.openfiles import folders_in, is_folder
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import among, given, has, named, switch
from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.formats.trainers.hugging_face import LAST
from pma_megatron.formats.trainers.saves import checkpoint_in, saved_below
from pma_megatron.runs import recovery_log
from pma_megatron.runs.branches import branches_of, judged, unmarked, with_snapshots
from pma_megatron.runs.describe import SHORT, STEP, describe, iteration_of
from pma_megatron.runs.folders import ITERATION, is_checkpoint, what_is
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection, select
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.runs.torn import torn_saves
from pma_megatron.runs.trackers import Pointer, read_pointers
from pma_megatron.storage.paths import absolute, path_of, real
from pma_megatron.storage.together import of_each

TRACKER_FILE = registry.get(registry.TORCH_DIST, "").tracker.file or ""
_OWN_ROOT = re.compile(r"^checkpoint[-_]\d+$")
"""transformers/trainer_utils.py, PREFIX_CHECKPOINT_DIR; accelerate/accelerator.py, save_state."""

_STAGE = re.compile(r"^(.*?stage[-_]?\d+(?:[-_]ingredient[-_]?\d+)?)[-_]", re.IGNORECASE)
"""What comes before `stepN` where a model is trained in stages (`stage2-ingredient1-step1000`)."""


@once_each()
def list_checkpoints(
    root: str | Path,
    *,
    problem: Callable[[str], None] | None = None,
    known: Mapping[str, CheckpointRef] = MappingProxyType({}),
) -> list[CheckpointRef]:
    """Every checkpoint of the run at `root`, oldest first, whole or not.

    Thin snapshots below it (`pma_snapshots`) count too. Where a snapshot and a full checkpoint have
    one iteration, the full one is listed, unless it alone is incomplete; one that cannot be read
    may be whole.

    Some trainers save a folder around each checkpoint (`formats.trainers`): the checkpoints in
    those are listed. Where `root` holds no checkpoint but folders `checkpoint-N`, so are the tags
    of DeepSpeed in those.

    Args:
        root: the folder given to Megatron's --save or DeepSpeed's save_checkpoint, Trainer's
            output_dir, or one checkpoint's folder in it.
        problem: is told why the log of recoveries cannot be used; every checkpoint is then not
            judged. Without it that is an error.
        known: folder -> what `describe` says of it, where another rank has looked already.

    Raises:
        SelectionError: there is no such folder, or it cannot be read.
        CheckpointError: its log of recoveries cannot be read.
    """
    refuse_remote("", root, stores=True)
    root = path_of(root)
    if not is_folder(root):
        raise SelectionError(what_is(root))
    alone = root if is_checkpoint(root) else checkpoint_in(root)
    if alone is not None:
        inside = path_of(absolute(root)).parent
        ref = describe(alone, _history(inside, problem))
        beside = _checkpoint_folders(inside) if ref.snapshot or ref.branch_unknown else []
        unread, branches = branches_of(beside, describe)
        return judged([ref, *unread], branches)[:1]
    history = _history(root, problem)

    def look(folder: Path) -> CheckpointRef:
        found = known.get(str(folder))
        return describe(folder, history) if found is None else unmarked(found)

    pointers = read_pointers(root)
    folders = _checkpoint_folders(root, _tags_named(pointers))
    looked = of_each(look, folders)
    refs = {folder.name: ref for folder, ref in zip(folders, looked, strict=True)}
    refs, hidden = with_snapshots(refs, _checkpoint_folders(root / SNAPSHOTS), look)
    around = [*saved_below(root, refs), *(() if refs else _tags_with_own_roots(root))]
    refs |= dict(zip(map(str, around), of_each(look, around), strict=True))
    at = {ref.path: key for key, ref in refs.items()}
    torn = list(torn_saves(root, refs.values()))
    refs |= {at.get(ref.path, ref.path): ref for ref in torn}
    ordered = sorted(
        judged(_each_once(refs.values(), pointers), hidden),
        key=lambda ref: (ref.iteration is None, ref.iteration or 0, ref.path),
    )
    return _only_newest_writing(ordered, pointers)


def looked_at(root: str | Path) -> tuple[list[Path], recovery_log.History]:
    """Folders that `list_checkpoints` describes, oldest first, as far as names tell, and the
    history that it judges them by; none where it describes one or raises."""
    root = path_of(root)
    try:
        if not is_folder(root) or is_checkpoint(root) or checkpoint_in(root) is not None:
            return [], recovery_log.History(())
        history = _history(root, None)
        folders = _checkpoint_folders(root, _tags_named(read_pointers(root)))
    except (SelectionError, CheckpointError, OSError):
        return [], recovery_log.History(())
    return sorted(folders, key=lambda f: (iteration_of(f) or 0, f.name)), history


def _each_once(
    refs: Collection[CheckpointRef], pointers: Mapping[str, Pointer]
) -> list[CheckpointRef]:
    """Without links to others that are listed, unless a tracker names them, and Lightning's last.

    Lightning copies its newest save, or links to it, as `last.ckpt`.
    """
    named = {pointer.named for pointer in pointers.values()}
    links = {
        ref.folder for ref in refs if path_of(ref.folder).is_symlink() and _name(ref) not in named
    }
    ends = {real(ref.folder) for ref in refs if ref.folder not in links}
    numbered = {ref.iteration for ref in refs if ref.complete and not LAST.match(_name(ref))}
    return [
        ref
        for ref in refs
        if not (ref.folder in links and real(ref.folder) in ends)
        and not (ref.complete and LAST.match(_name(ref)) and ref.iteration in numbered)
    ]


def _name(ref: CheckpointRef) -> str:
    return path_of(ref.folder).name


def _history(root: Path, problem: Callable[[str], None] | None) -> recovery_log.History:
    """What the run's log says of checkpoints in `root`, which may be its folder of snapshots."""
    inside = path_of(absolute(root)).name == SNAPSHOTS
    try:
        return recovery_log.read(path_of(absolute(root)).parent if inside else root)
    except CheckpointError as error:
        if problem is None:
            raise
        problem(str(error))
        return recovery_log.History((), f"{recovery_log.FILE} is damaged")


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
            or (not ref.snapshot and path_of(ref.path).name in named)
        )
        else ref
        for ref in ordered
    ]


def newest_full(snapshot: Path) -> int | None:
    """Iteration of the newest whole full checkpoint not after the one at `snapshot`, or None.

    It is looked for in the run's folder, above `pma_snapshots`.
    """
    root = path_of(absolute(snapshot)).parent
    root = root.parent if root.name == SNAPSHOTS else root
    end = iteration_of(snapshot)
    numbers = ((iteration_of(folder), folder) for folder in _checkpoint_folders(root))
    numbered = [(n, folder) for n, folder in numbers if n is not None and (end is None or n <= end)]
    for iteration, folder in sorted(numbered, reverse=True):
        ref = describe(folder)
        if ref.complete and not ref.snapshot:
            return iteration
    return None


def choose(
    refs: list[CheckpointRef],
    request: SelectionRequest,
    root: str | Path,
    pointers: Mapping[str, Pointer] | None = None,
    resumed: int | None = None,
) -> Selection:
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
    root = path_of(root)
    if not refs:
        raise SelectionError(what_is(root))
    _refuse_one_checkpoint(root, request)
    if request.iterations is None and request.paths is None:
        _refuse_stages(refs, request)
    pointer = _pointer(refs, request, pointers or {})
    named = None if pointer is None else pointer.named
    at = next((ref for ref in refs if path_of(ref.path).name == named), None)
    if pointer is not None and pointer.folder is not None:
        if at is None:
            problem = f"has a {pointer.file} that names {pointer.folder!r}, which is no checkpoint"
            pointer = replace(pointer, problem=problem)
        elif resumed is None:
            resumed = at.iteration
    if resumed is None and at is not None and pointer is not None:
        _refuse_end_without_number(root, at, pointer, request)
    selection = select(refs, request, resumed)
    if request.iterations is None and request.paths is None:
        _refuse_mixed(selection.refs)
    newest = selection.refs[-1]
    own_root = newest.saved_in or _OWN_ROOT.match(path_of(newest.path).parent.name)
    if pointer is None or pointer.problem is None or own_root:
        return selection
    note = (
        f"{root} {pointer.problem}. Averages do not need it, they go by the folders; training "
        "does, to resume from there"
    )
    return replace(selection, notes=(*selection.notes, note))


def _pointer(
    refs: list[CheckpointRef], request: SelectionRequest, pointers: Mapping[str, Pointer]
) -> Pointer | None:
    """The tracker that counts: where several formats lie in a root, that of the newest
    checkpoint whose trainer has left one."""
    whole = [ref for ref in refs if ref.complete and ref.iteration not in request.exclude]
    known = dict.fromkeys(
        ref.format
        for ref in sorted(whole, key=lambda ref: -(ref.iteration or 0))
        if ref.format in pointers
    )
    there = [pointers[name] for name in known if not pointers[name].missing]
    return next(iter([*there, *(pointers[name] for name in known)]), None)


def _refuse_end_without_number(
    root: Path, at: CheckpointRef, pointer: Pointer, request: SelectionRequest
) -> None:
    """The average would end at one that cannot be used, nor be placed among the others."""
    free = request.allow_gaps or request.end_iteration is not None
    if at.complete or at.iteration is not None or free or request.iterations or request.paths:
        return
    ways = [
        f"name another end with {named('end_iteration')}" if has("end_iteration") else "",
        f"pass over it ({switch('allow_gaps')})" if has("allow_gaps") else "",
    ]
    raise SelectionError(
        f"{root / pointer.file} names {at.path} as the one to resume from, and it is incomplete "
        f"({at.incomplete_because}). {', or '.join(['Restore it', *filter(None, ways)])}"
    )


def _refuse_mixed(chosen: Sequence[CheckpointRef]) -> None:
    """Formats that an average mixes, which nobody asked for by name."""
    formats: dict[str, list[int | None]] = {}
    for ref in chosen:
        formats.setdefault(ref.format, []).append(ref.iteration)
    if len(formats) > 1:
        found = "; ".join(f"{name}: {numbers}" for name, numbers in formats.items())
        raise SelectionError(
            f"the average of {chosen[0].describe()} to {chosen[-1].describe()} mixes checkpoint "
            f"formats ({found}). Take one of them with {among('iterations', 'paths')}, or leave "
            f"the others out with {named('exclude')}"
        )


def _refuse_stages(refs: Sequence[CheckpointRef], request: SelectionRequest) -> None:
    """Several stages of a run, as the folders are called: each counts from 0."""
    stages: dict[str, str] = {}
    for ref in refs:
        stage = _STAGE.match(_name(ref))
        if stage and ref.iteration not in request.exclude:
            stages.setdefault(stage[1], ref.folder)
    if len(stages) > 1:
        raise SelectionError(
            f"there are checkpoints of several stages ({', '.join(stages.values())}), and steps "
            "do not tell which is newer, for each stage counts anew. Name those of one with "
            f"{among('paths', 'iterations')}, or move each stage to a folder of its own"
        )


def pointers_of(root: str | Path) -> dict[str, Pointer] | None:
    """What the trackers in `root` say; None where that is no run's folder."""
    root = path_of(root)
    return read_pointers(root) if is_folder(root) and not is_checkpoint(root) else None


def _refuse_one_checkpoint(root: Path, request: SelectionRequest) -> None:
    """A checkpoint's folder where the run's is wanted."""
    alone = is_checkpoint(root) or checkpoint_in(root) is not None
    if request.paths is None and request.last != 1 and alone:
        end = iteration_of(root)
        up_to = "" if end is None else f", with {given('end_iteration', end)} to end there"
        raise SelectionError(
            f"{root} is one checkpoint, and an average takes several of its run. Give the folder "
            f"above it, {root.parent}{up_to if has('end_iteration') else ''}"
        )


def pointed(root: Path) -> Path:
    """The checkpoint that the tracker in `root` names, or `root` itself without a tracker.

    Where trainers go by the names of folders, it is the newest whole one, which they resume from.

    Raises:
        CheckpointError: the tracker makes no sense.
    """
    for pointer in read_pointers(root).values():
        if pointer.folder is not None:
            return root / pointer.folder
        if not pointer.missing:
            raise CheckpointError(f"{root} {pointer.problem}. Name one checkpoint's folder")
    return _newest_by_name(root) or root


def _newest_by_name(root: Path) -> Path | None:
    """The newest whole checkpoint of a root in which none has a tracker; None where some have."""
    if not is_folder(root) or is_checkpoint(root):
        return None
    refs = list_checkpoints(root, problem=lambda _: None)
    whole = [ref for ref in refs if ref.complete and ref.iteration is not None]
    named = (registry.get(r.format, r.path).tracker.content_of(path_of(r.path).name) for r in whole)
    if not whole or not all(name is None for name in named):
        return None
    newest = whole[-1].iteration or 0
    for ref in (r for r in refs if r.unreadable and (r.iteration or 0) > newest):
        raise CheckpointError(
            f"{ref.path} may be the newest of {root}, and cannot be read now "
            f"({ref.incomplete_because}). Try again, or name one checkpoint's folder"
        )
    return path_of(whole[-1].path)


def _checkpoint_folders(root: Path, named: Collection[str] = ()) -> list[Path]:
    """Checkpoints in `root`, and whatever has the name of one: it may be one that is damaged.

    Args:
        root: a run's folder.
        named: further names, by which a tracker knows a checkpoint.
    """
    if not is_folder(root):
        return []
    found = {path.name: path for path in folders_in(root) if is_checkpoint(path)}
    for path in root.iterdir():
        if path.name in named or any(p.match(path.name) for p in (ITERATION, STEP, SHORT)):
            found.setdefault(path.name, path)
    return list(found.values())


def _tags_named(pointers: Mapping[str, Pointer]) -> set[str]:
    """Names that trackers of DeepSpeed say: those of tags may be any."""
    names = (pointers[name].named for name in registry.TAGS if name in pointers)
    return {name for name in names if name is not None}


def _tags_with_own_roots(root: Path) -> list[Path]:
    """By these names alone: one level below any other folder lie other runs."""
    tags: dict[Path, list[Path]] = {}
    for own in (path for path in folders_in(root) if _OWN_ROOT.match(path.name)):
        try:
            named = _tags_named(read_pointers(own))
            folders = _checkpoint_folders(own, named)
        except (SelectionError, OSError):
            tags[own] = [own]  # its reason is found where it is described
            continue
        tags[own] = [
            folder
            for folder in folders
            if registry.detect(folder) in registry.TAGS
            or STEP.match(folder.name)
            or folder.name in named
        ]
    if all(folders == [own] or not folders for own, folders in tags.items()):
        return []
    return [folder for own, folders in tags.items() for folder in folders or [own]]
