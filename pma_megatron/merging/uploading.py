"""From a staging folder on a disk to an object store, which has no rename.

Order: a sign that the folder is not whole (`UPLOADING_FILE`), away with what is replaced, all but
the files by which a checkpoint is known, by all ranks; compare; those files, the trainer's own
marker last; trackers; the sign is removed. A kill at any moment leaves nothing that a trainer or
`pma list` takes for whole, unless all of it is there, and the same command makes it so.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from functools import partial
from pathlib import PurePosixPath

from pma_megatron.base.comm import Comm
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import read_source_file
from pma_megatron.base.spelling import first_few, named
from pma_megatron.errors import CheckpointError, PublishError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import MARKERS
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE, UPLOADING_FILE
from pma_megatron.formats.output import Folder, OutputLayout
from pma_megatron.formats.trainers.saves import save_of
from pma_megatron.merging.engine import Progress
from pma_megatron.merging.leftovers import Target, removed
from pma_megatron.merging.planning import MergePlan
from pma_megatron.storage.paths import in_store, path_of, stored
from pma_megatron.storage.protocol import Store

Show = Callable[[str, int], AbstractContextManager[Progress]]
"""(stage, total bytes of this rank) -> context that yields a progress callback."""
_AT_ONCE = 2  # files of a rank, each in parts
_SHOWN = 4


def refuse_unseen(wanted: Sequence[Target], comm: Comm) -> None:
    """Every rank writes into one staging folder: a rank on another machine must see it too.

    Raises:
        PublishError: this one does not.
    """
    stores = [target for target in wanted if in_store(target.final)]
    if stores:
        comm.agree("see", partial(_refuse_unseen, stores))


def _refuse_unseen(wanted: Sequence[Target]) -> None:
    for target in (each for each in wanted if not each.staging.is_dir()):
        raise PublishError(
            f"{socket.gethostname()} does not see {target.staging}, where {target.final} is made "
            "before it is uploaded: set PMA_MEGATRON_SPOOL to a folder that all nodes share, or "
            "start all ranks on one node"
        )


def files_of(target: Target) -> dict[str, int]:
    """Bytes of every staged file, by its name in the folder."""
    files = (path for path in sorted(target.staging.rglob("*")) if path.is_file())
    return {path.relative_to(target.staging).as_posix(): path.stat().st_size for path in files}


def held_back(layout: OutputLayout, names: Sequence[str]) -> list[str]:
    """Files of an output without which nobody takes it for whole, in the order of their upload."""
    last = [layout.last_file] if layout.last_file is not None else []
    if not last and layout.files:  # all files together make it whole
        last = [min(layout.files, key=lambda name: (layout.files[name], name))]
    known = [name for name in names if PurePosixPath(name).name in (*MARKERS, "latest")]
    ordered = dict.fromkeys([*known, SEAL_FILE, MARKER_FILE, *last])
    return [name for name in ordered if name in names and name not in last] + last


def begin(plan: MergePlan, target: Target) -> None:
    """Say that the folder is not whole, and remove what is replaced (rank 0 only).

    Raises:
        PublishError: the store refuses.
    """
    layout = plan.layouts[target.folder]
    with _uploading(target) as (store, key):
        there = [each.key.removeprefix(f"{key}/") for each in store.listed(f"{key}/")]
        names = list(files_of(target))
        ours = {*names, *_known_before(target)}
        said = {"files": sorted(ours), "by": f"process {os.getpid()} on {socket.gethostname()}"}
        store.put(f"{key}/{UPLOADING_FILE}", json.dumps(said).encode())
        point("uploading", 0)
        gone = [name for name in there if name in ours]
        first = [*held_back(layout, gone)] if gone else []
        marks = [name for name in gone if name in first or PurePosixPath(name).name in _MARKS]
        store.delete(f"{key}/{name}" for name in marks)
        store.delete(f"{key}/{name}" for name in gone if name not in marks)


_MARKS = (MARKER_FILE, SEAL_FILE, *MARKERS, "latest")


def _known_before(target: Target) -> set[str]:
    """What was written there by this package, as far as it says so."""
    found: set[str] = set()
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        said = json.loads(read_source_file(target.final / UPLOADING_FILE))
        found |= {str(name) for name in said["files"]}
    with contextlib.suppress(CheckpointError, VerifyError):
        found |= {*(read_marker(target.final).sums or ()), MARKER_FILE, SEAL_FILE}
    return found


def upload(plan: MergePlan, wanted: Sequence[Target], comm: Comm, show: Show) -> None:
    """Put all but what makes it whole where targets in stores are; every rank makes this call.

    Raises:
        PublishError: the store refuses.
    """
    for target in wanted:
        if not in_store(target.final):
            continue
        comm.on_main("begin", partial(begin, plan, target))
        comm.agree("upload", partial(_upload_share, plan, target, comm, show))


def _upload_share(plan: MergePlan, target: Target, comm: Comm, show: Show) -> None:
    files = files_of(target)
    later = set(held_back(plan.layouts[target.folder], list(files)))
    early = {name: size for name, size in files.items() if name not in later}
    mine = {name: files[name] for name in _share(early, comm.rank, comm.size)}
    with show("upload", sum(mine.values())) as progress:
        _put_all(target, mine, comm, progress)


def _put_all(target: Target, files: dict[str, int], comm: Comm, progress: Progress) -> None:
    with _uploading(target) as (store, key), ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = {
            pool.submit(store.put_file, f"{key}/{name}", target.staging / name): name
            for name in files
        }
        try:
            for done in as_completed(jobs):
                done.result()
                progress(files[jobs[done]])
                comm.moved()
                point("part", comm.rank)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _share(files: dict[str, int], rank: int, ranks: int) -> list[str]:
    """The files of one rank: the largest first, each to whom has least."""
    loads, mine = [0] * ranks, list[str]()
    for name in sorted(files, key=lambda name: (-files[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += files[name] + 1
        if owner == rank:
            mine.append(name)
    return mine


def complete(plan: MergePlan, target: Target) -> None:
    """Compare what is there, put the files that make it whole, and the trackers (rank 0 only).

    Raises:
        PublishError: the store refuses, or does not hold what was put there.
    """
    files = files_of(target)
    held = held_back(plan.layouts[target.folder], list(files))
    with _uploading(target) as (store, key):
        _refuse_missing(store, key, {n: size for n, size in files.items() if n not in held}, target)
        point("uploaded", 0)
        for name in held:
            if name == held[-1]:
                point("upload_marker", 0)
            store.put_file(f"{key}/{name}", target.staging / name)
        _refuse_missing(store, key, files, target)
        point("upload_tracker", 0)
        path_of(target.final, again=True)
        _point_to(plan, target, store)
        point("upload_end", 0)
        store.delete([f"{key}/{UPLOADING_FILE}"])
        path_of(target.final, again=True)
    removed(target.staging)


def _refuse_missing(store: Store, key: str, files: dict[str, int], target: Target) -> None:
    there = {each.key.removeprefix(f"{key}/"): each.nbytes for each in store.listed(f"{key}/")}
    wrong = [
        f"{name} ({there.get(name, 'no')} bytes, not {size})"
        for name, size in files.items()
        if there.get(name) != size
    ]
    if wrong:
        raise PublishError(
            f"{target.final} does not hold what was uploaded: {first_few(wrong, _SHOWN)}. Another "
            "job may be at work there: let it end, then run the same command again"
        )


def _point_to(plan: MergePlan, target: Target, store: Store) -> None:
    """Have the trainer resume from it: its copies in the root first, the tracker last."""
    known = registry.get(plan.sources[-1].format, plan.sources[-1].path).tracker
    content = known.content_of(target.final.name)
    tracked = target.folder is Folder.CHECKPOINT and not plan.save.inside
    if not tracked or known.file is None or content is None:
        return
    root = stored(target.root)[1]
    above = f"{root}/" if root else ""
    trainer = save_of(target.final, registry.detect(target.final)).trainer
    for name, original in () if trainer is None else trainer.root_copies:
        store.put(f"{above}{name}", read_source_file(target.final / original))
    store.put(f"{above}{known.file}", content.encode())


@contextlib.contextmanager
def _uploading(target: Target) -> Iterator[tuple[Store, str]]:
    """The store of a target and the key of its folder, for what is put there in the block.

    Raises:
        PublishError: the store refuses.
    """
    try:
        yield stored(target.final)
    except OSError as error:
        raise PublishError(
            f"cannot upload {target.final}: {error.strerror or error}. What is there is not whole "
            "and not listed as such; run the same command again, which goes on, or choose another "
            f"{named(target.setting)}"
        ) from error
