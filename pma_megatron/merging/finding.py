"""Which checkpoints and trackers the ranks see, put together."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.errors import SelectionError
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.merging.listing import average_in_words
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.saved_over import changed_files
from pma_megatron.runs.branches import marked
from pma_megatron.runs.describe import describe
from pma_megatron.runs.discover import choose, list_checkpoints, looked_at, pointers_of
from pma_megatron.runs.notices import changed_settings_notes, settings_of, too_early_notes
from pma_megatron.runs.recovery_log import History
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection
from pma_megatron.runs.trackers import Pointer
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.storage.together import of_each


@dataclass(frozen=True, slots=True)
class Sight:
    """Which ranks see the same sources, so that one of them lists them for all.

    Attributes:
        rank: this one.
        lookers: per rank, the first rank that sees what it sees.
        one: whether all ranks see one storage, without having compared what they see.
    """

    rank: int
    lookers: tuple[int, ...]
    one: bool

    @property
    def looks(self) -> bool:
        """Whether this rank looks for those that see the same."""
        return self.lookers[self.rank] == self.rank

    def like(self, rank: int) -> tuple[int, ...]:
        """The ranks that see what `rank` sees, itself included, in order."""
        looker = self.lookers[rank]
        return tuple(other for other, theirs in enumerate(self.lookers) if theirs == looker)


def who_looks(request: MergeRequest, comm: Comm, everywhere: bool) -> Sight:
    """Compare what the ranks see. Every rank makes this call.

    Processes of one system with one mount table see the same files, and of those one looks at the
    folders that rank 0 has found: nodes that see these very folders, by inodes and times, see one
    storage. So a job of 1,000 ranks on shared storage lists it once, and looks at the folders once
    a node.

    Args:
        request: names the roots.
        comm: the ranks.
        everywhere: roots may be disks of single nodes; otherwise rank 0 sees what all see.
    """
    roots = roots_of(request)
    if comm.size == 1 or not everywhere or all(map(in_store, roots)):
        return Sight(comm.rank, (0,) * comm.size, one=True)
    places = comm.gather(_place(roots))
    first = [places.index(place) for place in places]

    def list_() -> list[str]:
        return [str(folder) for root in roots for folder in looked_at(root)[0]]

    folders = comm.on_main("discover", list_)

    def view() -> str:
        inside = [str(path_of(root) / SNAPSHOTS) for root in roots]
        return _view(map(path_of, [*roots, *inside, *(folders or list_())]))

    views = comm.gather(
        comm.agree("discover", lambda: view() if first[comm.rank] == comm.rank else "")
    )
    of_ranks = [views[leader] for leader in first]
    return Sight(comm.rank, tuple(of_ranks.index(view) for view in of_ranks), one=False)


def look_around(
    request: MergeRequest, comm: Comm, everywhere: bool
) -> tuple[dict[str, CheckpointRef], dict[str, tuple[int, ...]], dict[str, Pointer] | None]:
    """Checkpoints seen by any rank, path -> the ranks that see it whole, and what trackers say.

    Every rank makes this call; see `who_looks` for what `everywhere` is.

    Raises:
        SelectionError: on every rank: rank 0 sees no such root.
    """
    sight = who_looks(request, comm, everywhere)
    return *_all_refs(request, comm, sight), _pointers(request, comm, sight)


def _all_refs(
    request: MergeRequest, comm: Comm, sight: Sight
) -> tuple[dict[str, CheckpointRef], dict[str, tuple[int, ...]]]:
    roots = roots_of(request)
    known = _described(roots, comm) if sight.one else _described_by_view(roots, comm, sight)

    def look() -> list[CheckpointRef]:
        try:
            return [ref for root in roots for ref in list_checkpoints(root, known=known)]
        except SelectionError:
            if not comm.is_main:
                return []
            raise

    found = comm.agree("discover", look if sight.looks else list)
    refs: dict[str, CheckpointRef] = {}
    seen: dict[str, tuple[int, ...]] = {}
    for rank, theirs in enumerate(comm.gather(found)):
        for ref in theirs:
            if ref.path not in refs or (ref.complete and not refs[ref.path].complete):
                refs[ref.path] = ref
            if ref.complete:
                seen[ref.path] = tuple(sorted({*seen.get(ref.path, ()), *sight.like(rank)}))
    if sight.one:
        seen = {path: tuple(range(comm.size)) for path in refs}
    ordered = sorted(marked([*refs.values()]), key=lambda ref: (ref.iteration or 0, ref.path))
    return {ref.path: ref for ref in ordered}, seen


def roots_of(request: MergeRequest) -> list[str]:
    paths = request.selection.paths
    return [request.load] if paths is None else list(paths)


def _described(roots: Sequence[str], comm: Comm) -> dict[str, CheckpointRef]:
    """Whole checkpoints by folder, on rank 0: the ranks share the looking, as all of them see one
    storage. What is not whole for one of them, rank 0 looks at itself."""
    if comm.size == 1:
        return {}
    found = comm.on_main("discover", lambda: [looked_at(root) for root in roots])

    shares = comm.collect(comm.agree("discover", lambda: _share(found, comm.rank, comm.size)))
    return {folder: ref for share in shares for folder, ref in share.items()}


def _described_by_view(roots: Sequence[str], comm: Comm, sight: Sight) -> dict[str, CheckpointRef]:
    """The same where roots may be disks of single nodes: ranks that see the same folders share the
    looking; who looks for them gets what it would see itself."""
    found = comm.agree("discover", lambda: [looked_at(r) for r in roots] if sight.looks else [])
    found = comm.gather(found)[sight.lookers[comm.rank]]
    like = sight.like(comm.rank)
    mine = comm.agree("discover", lambda: _share(found, like.index(comm.rank), len(like)))
    shares = comm.gather(mine)
    return {folder: ref for rank in like for folder, ref in shares[rank].items()}


def _share(
    found: Sequence[tuple[Sequence[Path], History]], rank: int, size: int
) -> dict[str, CheckpointRef]:
    """Whole checkpoints of those whose turn it is; folder -> what it is."""
    every = [(folder, history) for folders, history in found for folder in folders]
    mine = {
        folder: history
        for number, (folder, history) in enumerate(every)
        if _turn(len(every) - 1 - number, size) == rank
    }
    refs = of_each(lambda folder: describe(folder, mine[folder]), mine)
    return {str(folder): ref for folder, ref in zip(mine, refs, strict=True) if ref.complete}


def _place(roots: Sequence[str]) -> str:
    """What tells the processes that see the same files by the same names from all others."""
    try:
        root = Path("/proc/self/root/").stat()
        system = Path("/proc/sys/kernel/random/boot_id").read_text()
        mounts = Path("/proc/self/ns/mnt").readlink()
        said = (system, str(mounts), root.st_dev, root.st_ino, os.geteuid(), os.getgroups())
    except OSError:  # not Linux: each process looks by itself
        said = (socket.gethostname(), str(os.getpid()), 0, 0, 0, [])
    digest = hashlib.sha256(repr((said, [str(Path.cwd() / root) for root in roots])).encode())
    return digest.hexdigest()


def _view(folders: Iterable[Path]) -> str:
    """What tells these very folders from others of the same names, on another disk."""
    digest = hashlib.sha256()
    for folder in folders:
        try:
            stat = folder.stat()
            said = stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
        except OSError as error:
            said = (error.errno or 0, 0, 0)
        digest.update(repr((str(folder), said)).encode())
    return digest.hexdigest()


def owners_of(visible: Sequence[Sequence[int]]) -> list[int]:
    """Per source, the rank that opens it: taken in turns as `_described` takes them, so that who
    has described one need not parse it again.

    Args:
        visible: per source, oldest first, the ranks that can read it.
    """
    last = len(visible) - 1
    return [ranks[_turn(last - n, len(ranks))] for n, ranks in enumerate(visible)]


def _turn(number: int, ranks: int) -> int:
    """Whose turn it is with the checkpoint that comes `number` before the newest: up from rank 0,
    which lays out the output after the newest, then down again from the last rank.

    >>> [_turn(number, 4) for number in range(10)]
    [0, 1, 2, 3, 3, 2, 1, 0, 0, 1]
    """
    rounds, place = divmod(number, ranks)
    return ranks - 1 - place if rounds % 2 else place


def chosen(
    refs: list[CheckpointRef], request: MergeRequest, found: dict[str, Pointer] | None, comm: Comm
) -> Selection:
    """What rank 0 selects: that looks into the root too.

    Of an update of a rolling average nothing is noted: its sources are no window of the run, and of
    the window that the average is of, the plan from all its checkpoints says what there is to say.

    Raises:
        SelectionError: on every rank.
    """

    def select() -> Selection | str:
        try:
            selection = choose(refs, request.widest(), request.load, found, request.resumed)
            return selection if request.rolling is None else replace(selection, notes=())
        except SelectionError as error:
            return str(error)

    made = comm.on_main("select", select)
    if isinstance(made, str):
        raise SelectionError(made)
    return made


def schedule_notes(selection: Selection, visible: Sequence[Sequence[int]], comm: Comm) -> list[str]:
    """What is said of the window, on every rank; who opens a source looks at it."""
    owners = owners_of(visible)

    def look() -> tuple[list[str], dict[str, dict[str, Any]], dict[str, str | None]]:
        mine = [ref for ref, n in zip(selection.refs, owners, strict=True) if n == comm.rank]
        early = too_early_notes(selection) if owners[0] == comm.rank else []
        averages = {ref.path: _average_in(ref) for ref in mine} if selection.refs[1:] else {}
        return early, {ref.path: settings_of(ref) for ref in mine}, averages

    shares = comm.collect(comm.agree("schedule", look))

    def notes() -> list[str]:
        early = [note for each, _, _ in shares for note in each]
        settings = {path: said for _, part, _ in shares for path, said in part.items()}
        made = {path: said for *_, part in shares for path, said in part.items()}
        averages = [
            f"{ref.path} is an average itself ({made[ref.path]}), and counts as one checkpoint"
            for ref in selection.refs
            if made.get(ref.path)
        ]
        return [*early, *averages, *changed_settings_notes(selection, settings)]

    return comm.on_main("schedule", notes)


def _average_in(ref: CheckpointRef) -> str | None:
    folder = path_of(ref.folder)
    words = average_in_words(folder)
    return None if words is None or changed_files(folder, quick=True) else words


def _pointers(request: MergeRequest, comm: Comm, sight: Sight) -> dict[str, Pointer] | None:
    """What the trackers say, of the first rank that sees a root; one answer for all ranks."""

    def look() -> dict[str, Pointer] | None:
        return pointers_of(request.load) if request.selection.paths is None else None

    mine = comm.agree("trackers", lambda: look() if sight.looks else None)
    found: dict[str, Pointer] = {}
    for theirs in comm.gather(mine):
        for name, pointer in (theirs or {}).items():
            known = found.get(name)
            if known is None or (known.problem is not None and pointer.problem is None):
                found[name] = pointer
    return found or None
