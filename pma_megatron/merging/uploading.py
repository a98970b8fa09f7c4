"""From a staging folder on a disk to an object store, which has no rename.

Order: a sign that the folder is not whole (`UPLOADING_FILE`), away with what is replaced, all but
the files by which a checkpoint is known, by all ranks; compare; those files, the trainer's own
marker last; trackers; the sign is removed. A kill at any moment leaves nothing that a trainer or
`pma list` takes for whole, unless all of it is there, and the same command makes it so.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import read_source_file
from pma_megatron.base.spelling import first_few, named, switch
from pma_megatron.errors import CheckpointError, PublishError, SelectionError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import MARKERS
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE, UPLOADING_FILE
from pma_megatron.formats.output import Folder, OutputLayout
from pma_megatron.formats.trainers.saves import save_of
from pma_megatron.merging.engine import Progress
from pma_megatron.merging.leftovers import Target, removed
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.targets import refuse_loss
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import (
    FRESH_S,
    Claim,
    ClaimedError,
    claim,
    refuse_claimed,
    renewing,
)
from pma_megatron.storage.paths import in_store, path_of, stored
from pma_megatron.storage.protocol import Object, Store, same_version

Show = Callable[[str, int], AbstractContextManager[Progress]]
"""(stage, total bytes of this rank) -> context that yields a progress callback."""
_AT_ONCE = 3  # files of a rank, of each up to `ONE_PUT_BYTES` in memory
_LOOKED_S = 60.0
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Upload:
    """What is on its way to one target.

    Attributes:
        files: bytes of every staged file, by its name in the folder.
        versions: what the store called those that were put.
        claim: that the folder is this job's (rank 0 only).
    """

    files: Mapping[str, int]
    versions: dict[str, str]
    claim: Claim | None


Begun = Mapping[Target, Upload]
"""What is on its way, by its target."""


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


def refuse_claimed_by_others(wanted: Sequence[Target]) -> None:
    """Where another job uploads now, nothing is made first (rank 0 only).

    Raises:
        PublishError: one does, or the store does not tell.
    """
    for target in wanted:
        if in_store(target.final):
            with _uploading(target) as (store, key):
                refuse_claimed(store, below(key, UPLOADING_FILE), target.staging.name)


def begin(plan: MergePlan, target: Target, files: Mapping[str, int]) -> Claim:
    """Say that the folder is not whole, and remove what is replaced (rank 0 only).

    Raises:
        PublishError: the store refuses, another job uploads there, or somebody has written there
            what would be lost.
    """
    layout = plan.layouts[target.folder]
    with _uploading(target) as (store, key):
        sign, work = below(key, UPLOADING_FILE), target.staging.name
        before = refuse_claimed(store, sign, work)
        seen = _objects(store, key)
        if plan.request.overwrite:
            path_of(target.final, again=True)
            refuse_loss(plan, target)
        ours = {*files, *_known_before(target, before or {})}
        made = claim(store, sign, work, {"files": sorted(ours)})
        now = _objects(store, key)
        if made.new and now != seen:
            store.delete([sign])
            raise PublishError(
                f"{target.final} was written to at this moment, by somebody else: nothing there "
                f"was touched. Let that end, then run the same command again, or choose another "
                f"{named(target.setting)}"
            )
        # An empty object may be the folder of a console's.
        there = [name for name, each in now.items() if each.nbytes or name in ours]
        if made.new and there and not plan.request.overwrite:
            store.delete([sign])
            raise PublishError(
                f"{target.final} exists by now: another job made it meanwhile. Use "
                f"{switch('overwrite')} to replace it, or another {named(target.setting)}"
            )
        strange = [name for name in there if name not in ours]
        if strange:
            if made.new:
                store.delete([sign])
            raise PublishError(
                f"{target.final} holds {first_few(strange, _SHOWN)}, and nothing there says that "
                f"it was written with what is replaced, so it is neither deleted nor left in a new "
                f"checkpoint. Delete what is no longer needed, or choose another "
                f"{named(target.setting)}"
            )
        point("uploading", 0)
        gone = [name for name in there if name in ours]
        first = [*held_back(layout, gone)] if gone else []
        marks = [name for name in gone if name in first or PurePosixPath(name).name in _MARKS]
        store.delete(below(key, name) for name in marks)
        store.delete(below(key, name) for name in gone if name not in marks)
    return made


def _objects(store: Store, key: str) -> dict[str, Object]:
    """What lies in a folder now, by its name there, but for the sign of an upload."""
    found = {each.key.removeprefix(below(key)): each for each in store.listed(below(key))}
    return {name: each for name, each in found.items() if name != UPLOADING_FILE}


_MARKS = (MARKER_FILE, SEAL_FILE, *MARKERS, "latest")


def _known_before(target: Target, said: Mapping[str, Any]) -> set[str]:
    """What was written there by this package, as far as it says so."""
    found: set[str] = set()
    with contextlib.suppress(KeyError, TypeError):
        found |= {str(name) for name in said["files"]}
    with contextlib.suppress(CheckpointError, VerifyError):
        found |= {*(read_marker(target.final).sums or ()), MARKER_FILE, SEAL_FILE}
    return found


def upload(
    plan: MergePlan, wanted: Sequence[Target], comm: Comm, show: Show
) -> dict[Target, Upload]:
    """Put all but what makes it whole where targets in stores are; every rank makes this call.

    Returns:
        what `complete` needs, on rank 0.

    Raises:
        PublishError: the store refuses, or another job uploads there.
    """
    begun: dict[Target, Upload] = {}
    for target in wanted:
        if not in_store(target.final):
            continue
        # One list for all: who sees a file late (NFS) must not leave it out.
        files = comm.on_main("list", partial(files_of, target))
        claims: list[Claim] = []
        comm.agree("begin", partial(_begin, plan, target, files, comm, claims))
        begun[target] = Upload(files, {}, claims[0] if claims else None)
        put = comm.agree("upload", partial(_upload_share, plan, target, begun, comm, show))
        for each in comm.collect(put):
            begun[target].versions.update(each)
    return begun


def _begin(
    plan: MergePlan, target: Target, files: Mapping[str, int], comm: Comm, claims: list[Claim]
) -> None:
    if comm.is_main:
        claims.append(begin(plan, target, files))


def _upload_share(
    plan: MergePlan, target: Target, begun: Begun, comm: Comm, show: Show
) -> dict[str, str]:
    files = begun[target].files
    later = set(held_back(plan.layouts[target.folder], list(files)))
    early = {name: size for name, size in files.items() if name not in later}
    mine = {name: files[name] for name in _share(early, comm.rank, comm.size)}
    with show("upload", sum(mine.values())) as progress:
        return _put_all(target, mine, begun, comm, progress)


def _put_all(
    target: Target, files: Mapping[str, int], begun: Begun, comm: Comm, progress: Progress
) -> dict[str, str]:
    """Put some files; returns what the store calls them."""
    versions: dict[str, str] = {}
    with _uploading(target) as (store, key), ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = {pool.submit(_put, store, key, target, name, files[name]): name for name in files}
        left = set(jobs)
        try:
            while left:
                ended, left = wait(left, _LOOKED_S, FIRST_COMPLETED)
                for done in ended:
                    versions[jobs[done]] = done.result()
                    progress(files[jobs[done]])
                    comm.moved()
                    point("part", comm.rank)
                _renew(begun)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return versions


def _put(store: Store, key: str, target: Target, name: str, nbytes: int) -> str:
    path = target.staging / name
    found = path.stat().st_size
    if found != nbytes:
        raise PublishError(
            f"{path} has {found} bytes, and had {nbytes} when it was verified: another process "
            "changed it, or this machine does not see all of it yet. Run the same command again"
        )
    return store.put_file(below(key, name), path) or ""


def _renew(begun: Begun) -> None:
    """Say again that this job lives, at every target."""
    for target, each in begun.items():
        if each.claim is not None:
            with _uploading(target) as (store, _):
                each.claim.renew(store)


def _share(files: dict[str, int], rank: int, ranks: int) -> list[str]:
    """The files of one rank: the largest first, each to whom has least."""
    loads, mine = [0] * ranks, list[str]()
    for name in sorted(files, key=lambda name: (-files[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += files[name] + 1
        if owner == rank:
            mine.append(name)
    return mine


def complete(plan: MergePlan, target: Target, begun: Begun) -> None:
    """Compare what is there, put the files that make it whole, and the trackers (rank 0 only).

    Raises:
        PublishError: the store refuses, does not hold what was put there, or another job took over.
    """
    files, versions, own = begun[target].files, begun[target].versions, begun[target].claim
    assert own is not None
    held = held_back(plan.layouts[target.folder], list(files))
    with _uploading(target) as (store, key):
        early = {name: size for name, size in files.items() if name not in held}
        _refuse_missing(store, key, early, versions, target)
        point("uploaded", 0)
        for name in held:
            if name == held[-1]:
                point("upload_marker", 0)
            own.check(store)
            with renewing(own, store):
                versions[name] = _put(store, key, target, name, files[name])
            _renew(begun)
        _refuse_missing(store, key, files, versions, target)
        point("upload_tracker", 0)
        path_of(target.final, again=True)
        own.check(store)
        _point_to(plan, target, store)
        point("upload_end", 0)
        own.check(store)
        store.delete([below(key, UPLOADING_FILE)])
        with contextlib.suppress(OSError):  # in one step: whoever finds it later knows what it is
            target.staging.rename(target.spent)
        point("upload_left", 0)
        with contextlib.suppress(SelectionError):  # it is there, whether that is listed or not
            path_of(target.final, again=True)
    removed(target.staging)
    removed(target.spent)


def _refuse_missing(
    store: Store, key: str, files: Mapping[str, int], versions: Mapping[str, str], target: Target
) -> None:
    there = {each.key.removeprefix(below(key)): each for each in store.listed(below(key))}
    wrong = []
    for name, size in files.items():
        found = there.get(name)
        if found is None or found.nbytes != size:
            wrong.append(f"{name} ({'no' if found is None else found.nbytes} bytes, not {size})")
        elif not same_version(versions.get(name, ""), found.version):
            wrong.append(f"{name} (another object than was put there)")
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
    trainer = save_of(target.final, registry.detect(target.final)).trainer
    for name, original in () if trainer is None else trainer.root_copies:
        store.put(below(root, name), read_source_file(target.final / original))
    store.put(below(root, known.file), content.encode())


@contextlib.contextmanager
def _uploading(target: Target) -> Iterator[tuple[Store, str]]:
    """The store of a target and the key of its folder, for what is put there in the block.

    Raises:
        PublishError: the store refuses, or another job uploads there.
    """
    try:
        yield stored(target.final)
    except ClaimedError as other:
        if other.lost:
            raise PublishError(
                f"another job took over the upload to {target.final} ({other}): this one stops, "
                f"and deletes nothing there. Let that one end, or use another "
                f"{named(target.setting)}"
            ) from None
        raise PublishError(
            f"another job uploads to {target.final} now ({other}): wait, or use another "
            f"{named(target.setting)}; if it is dead, run the same command again in "
            f"{FRESH_S / 60:.0f} minutes"
        ) from None
    except OSError as error:
        raise PublishError(
            f"cannot upload {target.final}: {error.strerror or error}. What is there is not whole "
            "and not listed as such; run the same command again, which goes on, or choose another "
            f"{named(target.setting)}"
        ) from error
