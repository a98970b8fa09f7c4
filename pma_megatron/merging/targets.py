"""Where outputs go, and what is refused there before the first byte is written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from pma_megatron.base.openfiles import is_unreadable, unread
from pma_megatron.base.spelling import first_few, given, named, switch
from pma_megatron.errors import CheckpointError, PublishError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import (
    EXPORT,
    MARKER_FILE,
    SAVING,
    SEAL_FILE,
    SNAPSHOTS,
    UPLOADING_FILE,
    read_snapshot_marker,
)
from pma_megatron.formats.output import Folder
from pma_megatron.formats.trainers.saves import checkpoint_in, output_name
from pma_megatron.merging.folder_checksums import names_in
from pma_megatron.merging.leftovers import STAGING, Target, staged_bytes, unfinished
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.rewritten import rewritten
from pma_megatron.merging.saved_over import saved_over, since
from pma_megatron.runs.folders import holds_checkpoint, is_checkpoint
from pma_megatron.storage.paths import in_store, path_of, place_of

_SHOWN = 4  # files that one message names


def targets(plan: MergePlan, token: str) -> tuple[Target, ...]:
    """Where the outputs of `plan` go, checkpoints first; `token` tells two jobs' staging apart."""
    newest, request = plan.sources[-1], plan.request
    name = output_name(plan.save, registry.get(newest.format, newest.path), plan.iteration)
    found = []
    for number, output in enumerate(plan.outputs):
        finals = {}
        if request.save is not None:
            finals[Folder.CHECKPOINT] = place_of(request.save) / output.name / name
        if request.export is not None:
            finals[Folder.MODEL] = _real(place_of(request.export)) / output.name
        for folder, final in finals.items():
            root = final.parent
            found.append(Target(root, final, root, folder, number).staged_as(token))
    return tuple(sorted(found, key=lambda target: target.folder is Folder.MODEL))


def refuse(plan: MergePlan, wanted: Sequence[Target]) -> None:
    """Check everything that can be known before the first byte is written.

    Raises:
        PublishError: the output would touch a source, a live run or a foreign checkpoint, exists
            already, does not fit on the disk, or lies where nothing can be looked at.
    """
    _refuse_nested(wanted)
    _look(wanted)
    for target in wanted:
        try:
            _refuse(plan, target)
        except OSError as error:
            raise PublishError(
                f"{given(target.setting, target.root)} cannot be used: {error.filename or 'it'} "
                f"cannot be looked at ({error.strerror}). "
                f"{_INSTEAD.get(error.errno or 0, 'Choose another')} {named(target.setting)}"
            ) from error
    there = already(plan, wanted)
    for target, same in zip(wanted, there, strict=True):
        free = same and not all(there)
        if target.final.exists() and not (plan.request.overwrite or free or unfinished(target)):
            kept = "it is kept until the new one is complete"
            if in_store(target.final):
                kept = "no store can do that at once: it goes before the new one comes"
            raise PublishError(
                f"{target.final} exists. Use {switch('overwrite')} to replace it ({kept}), or "
                f"another {named(target.setting)}"
            )
    _refuse_full(plan, [target for target, same in zip(wanted, there, strict=True) if not same])


def refuse_since(plan: MergePlan, target: Target, *, is_there: bool) -> None:
    """Check once more, right before a folder on a disk gets its name: hours may have passed, and a
    lock tells trainers nothing.

    Args:
        plan: the merge.
        target: what it is about to publish.
        is_there: whether it replaces something, as was found when it began.

    Raises:
        PublishError: something has come there that would be lost, or that is a run's.
    """
    if target.final.exists() and not is_there:
        raise PublishError(
            f"{target.final} has come to be while this merge was at work, and is not replaced. "
            f"Look at who writes there: another {named(target.setting)} is this merge's own"
        )
    try:
        _refuse_foreign(target)
        refuse_loss(plan, target)
    except OSError as error:
        raise PublishError(
            f"{target.final} is not published, for {error.filename or target.root} cannot be "
            f"looked at any more ({error.strerror})"
        ) from error


_INSTEAD = {
    errno.EACCES: "Ask its owner for the right to read, write and enter it (chmod u+rwx), or "
    "choose another",
    errno.ENAMETOOLONG: "Choose a shorter",
    errno.ELOOP: "Its links lead back to themselves: choose another",
}


def _look(wanted: Sequence[Target]) -> None:
    """See what stores hold now where something is to be put."""
    for target in wanted:
        if in_store(target.final):
            path_of(target.final if target.folder is Folder.MODEL else target.root, again=True)


def _refuse_nested(wanted: Sequence[Target]) -> None:
    """No output is, or lies in, another: what replaces or deletes one would take the other."""
    for one, other in itertools.combinations(wanted, 2):
        first, second = _real(one.final), _real(other.final)
        if first == second or first in second.parents or second in first.parents:
            raise PublishError(
                f"the outputs {first} and {second} are one folder, or lie in each other. Choose "
                f"another {named(one.setting)} or {named(other.setting)}: folders beside each "
                "other"
            )


def _refuse(plan: MergePlan, target: Target) -> None:
    root, final = _real(target.root), _real(target.final)
    for source in (_real(path_of(ref.folder)) for ref in plan.selection.refs):
        if _lies_in(final, source) or _lies_in(source, final):
            raise PublishError(
                f"the output {final} is or contains the source {source}: refused, sources are "
                f"never written to. Choose another {named(target.setting)}"
            )
        thin = source.parent.name == SNAPSHOTS and root == source.parent.parent
        # An update reads the average before, which lies among those that a watch makes.
        updated = plan.request.rolling is not None and (source / MARKER_FILE).is_file()
        own = thin or _is_same(root, source.parent)
        if target.folder is Folder.CHECKPOINT and own and not updated:
            raise PublishError(
                f"{given('save', root)} is the run's own folder: its tracker and retention "
                "would take the merge for a checkpoint of the run. Use "
                f"{given('save', f'{root}-pma')} or {root}/pma"
            )
    _refuse_long(plan, target)
    _refuse_odd(plan, target)
    _refuse_inside(target)
    _refuse_foreign(target)
    refuse_loss(plan, target)


def already(plan: MergePlan, wanted: Sequence[Target]) -> tuple[bool, ...]:
    """Per folder, whether this very request has published it before, where it makes several.

    A job that was killed between two of them is finished by the same command.
    """
    if len(wanted) == 1 or plan.request.overwrite:
        return (False,) * len(wanted)
    return tuple(is_of(target, plan) and not unfinished(target) for target in wanted)


def is_of(target: Target, plan: MergePlan) -> bool:
    """Whether a published folder is what this plan makes, as far as its `pma.json` says.

    Raises:
        CheckpointError: that cannot be read now.
    """
    try:
        made = json.loads((target.final / MARKER_FILE).read_text())
        digest, values = made["plan"]["digest"], made["output"]["coefficients"]
        exported = made.get("kind") == EXPORT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and is_unreadable(error):
            raise unread(target.final / MARKER_FILE, error) from error
        return False
    same = digest == plan.digest and values == list(plan.outputs[target.output].values)
    return bool(same and exported == (target.folder is Folder.MODEL))


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or below it, by whatever names and mounts."""
    return any(_is_same(each, folder) for each in (path, *path.parents))


def _is_same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _real(path: Path) -> Path:
    return path_of(os.path.realpath(path))  # `resolve` raises for names that cannot be looked at


def _refuse_long(plan: MergePlan, target: Target) -> None:
    """Names that the file system cannot hold, those of the files in the output included."""
    layout = plan.layouts[target.folder]
    names = (*layout.files, *layout.carried, SEAL_FILE)
    longest = target.staging / max(names, key=len)
    part = max((os.fsencode(each) for each in longest.absolute().parts), key=len)
    if len(part) > _NAME_BYTES:
        raise PublishError(
            f"a folder of the output would have a name of {len(part)} bytes "
            f"({os.fsdecode(part[:20])}...), and a file system holds {_NAME_BYTES}: choose a "
            f"shorter {named(target.setting)}"
        )
    if len(os.fsencode(longest.absolute())) >= _PATH_BYTES:
        raise PublishError(
            f"files of the output would have paths of {len(os.fsencode(longest.absolute()))} "
            f"bytes, and the system takes {_PATH_BYTES - 1}: choose a shorter "
            f"{named(target.setting)}"
        )


_NAME_BYTES, _PATH_BYTES = 255, 4096  # NAME_MAX and PATH_MAX of Linux


def _refuse_inside(target: Target) -> None:
    """A checkpoint is not a place to put others: its owner deletes, copies and lists it whole."""
    asked = _real(target.final if target.folder is Folder.MODEL else target.root)
    for folder in (asked, *asked.parents):
        if target.folder is Folder.MODEL and folder == asked and _is_model(folder):
            continue  # whether it may be replaced is another question
        if holds_checkpoint(folder) or _is_save(folder):
            below = f"lies in {folder}, a checkpoint"
            below = "is a checkpoint itself" if folder == asked else below
            raise PublishError(
                f"{given(target.setting, asked)} {below}: what is kept in it goes when "
                "it is deleted, and counts as its own. Give merges a folder beside the run's, such "
                f"as {folder.parent}-pma"
            )


def _is_model(folder: Path) -> bool:
    return registry.detect(folder) in registry.UNTRACKED


def refuse_loss(plan: MergePlan, target: Target) -> None:
    """An output that is replaced may hold what somebody else put there: that is not deleted.

    Where its `pma.json` does not say what was written with it, what the new one would hold too is
    taken for its own, and nothing else.

    Raises:
        PublishError: it does.
        CheckpointError: a file that must be compared cannot be read.
        OSError: the folder cannot be looked at.
    """
    if not target.final.is_dir():
        return
    _refuse_unmarked(target)
    try:
        sums, why = read_marker(target.final).sums, f"its {MARKER_FILE} has no list of files"
    except (CheckpointError, VerifyError) as error:
        sums, why = None, str(error)
    layout = plan.layouts[target.folder]
    known = {*layout.files, *layout.small_files, *layout.carried} if sums is None else set(sums)
    if unfinished(target) and in_store(target.final):  # what is there was being replaced
        with contextlib.suppress(CheckpointError, TypeError):
            known |= {*read_json(target.final / UPLOADING_FILE).get("files", ())}
    strangers = sorted(set(names_in(target.final)) - known)
    if strangers:
        doubt = "" if sums is not None else f" as far as can be told ({why})"
        raise PublishError(
            f"{target.final} would be replaced, and holds {first_few(strangers, _SHOWN)}, "
            f"which was not written with it{doubt} and would be lost. Move what is yours "
            f"elsewhere, or choose another {named(target.setting)}"
        )
    changed = rewritten(target.final)
    if changed:
        raise PublishError(
            f"{target.final} would be replaced, and {since(changed, target.folder)} and would be "
            f"lost. Move it elsewhere, or choose another {named(target.setting)}"
        )


def _refuse_odd(plan: MergePlan, target: Target) -> None:
    """Names that are taken by something that a merge can neither replace nor stand beside."""
    final, elsewhere = target.final, f"Choose another {named(target.setting)}"
    if os.path.lexists(target.root) and not target.root.is_dir():
        raise PublishError(
            f"{given(target.setting, target.root)} is {_kind(target.root)}, no folder. {elsewhere}"
        )
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
        raise PublishError(
            f"{final}, the name of the output, is {_kind(final)}. Remove it, or choose another "
            f"{named(target.setting)}"
        )
    if os.path.ismount(final):
        raise PublishError(
            f"{final}, the name of the output, is a mount point, which cannot be renamed over. "
            f"{elsewhere}"
        )
    if target.folder is not Folder.CHECKPOINT or plan.save.inside:
        return
    newest = plan.sources[-1]
    file = registry.get(newest.format, newest.path).tracker.file
    tracker = target.root / (file or "")
    if file is not None and os.path.lexists(tracker) and not tracker.is_file():
        raise PublishError(
            f"{tracker} is {_kind(tracker)}, and must become the file that names the newest "
            f"checkpoint. Remove it, or choose another {named('save')}"
        )


def _is_save(folder: Path) -> bool:
    """Whether a trainer saved it around a checkpoint."""
    inside = checkpoint_in(folder)
    return inside is not None and inside != folder


def _kind(path: Path) -> str:
    if path.is_symlink():
        return f"a symbolic link (to {path.readlink()})"
    mode = path.stat().st_mode
    return "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "no file"


def _refuse_unmarked(target: Target) -> None:
    begun = unfinished(target) and in_store(target.final)
    if target.final.is_dir() and not begun and not (target.final / MARKER_FILE).is_file():
        raise PublishError(
            f"{given(target.setting, target.root)} holds {target.final.name}, a folder by the name "
            "of the output which this tool did not write. Give merges a folder of their own"
        )


def _refuse_foreign(target: Target) -> None:
    if not target.root.is_dir():
        return
    _refuse_unmarked(target)
    if target.folder is not Folder.CHECKPOINT:
        return
    for folder in target.root.iterdir():
        if not folder.is_dir() or folder.name.startswith(STAGING):
            continue
        if not (folder.name.startswith("iter_") or is_checkpoint(folder) or _is_save(folder)):
            continue
        if _is_model(folder):
            continue  # no tracker ever points at the one or the other
        if (target.root / f"{SAVING}{folder.name}").is_file() and folder != target.final:
            continue  # a running average, which is not whole yet
        ours = any((folder / name).is_file() for name in (MARKER_FILE, UPLOADING_FILE))
        merged = ours and read_snapshot_marker(folder) is None
        if not merged:
            raise PublishError(
                f"{given('save', target.root)} holds {folder.name}, which this tool did not write: "
                "it is a training run's folder. Give merges a folder of their own"
            )
        changed = saved_over(folder, quick=True)
        if changed:
            raise PublishError(
                f"{given('save', target.root)} holds {folder.name}, and {since(changed)}. It is a "
                "training run's folder now. Give merges a folder of their own"
            )


def _refuse_full(plan: MergePlan, missing: Sequence[Target]) -> None:
    """Folders on one file system must fit it together."""
    needed: dict[int, int] = {}
    for target in missing:
        existing = next(p for p in (target.work, *target.work.parents) if p.exists())
        device = existing.stat().st_dev
        own = plan.layouts[target.folder].nbytes
        needed[device] = needed.get(device, 0) + own - min(own, staged_bytes(target))
        free = shutil.disk_usage(existing).free
        if free < needed[device]:
            raise PublishError(
                f"{existing} has {free / 2**30:.2f} GiB free, the output needs "
                f"{needed[device] / 2**30:.2f} GiB. Free space or choose another "
                f"{named(target.setting)}"
            )
        if not os.access(existing, os.W_OK):
            raise PublishError(
                f"{existing} is not writable: choose another {named(target.setting)}"
            )
