"""What a format of checkpoints offers: all that the rest of the package knows of it.

`formats.registry` is the table of the formats that fulfil this contract, and names the format of a
folder. `pma_megatron.testing.conformance` checks a format against it on real checkpoints. A folder
that a trainer saves around a checkpoint is no format's business: see `formats.trainers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from pma_megatron.base.spelling import left_out, typed
from pma_megatron.formats.base import Incomplete, Item, Schedule
from pma_megatron.formats.flat import FlatMap
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.output import Changes, OutputLayout
from pma_megatron.formats.side_files import SideRule
from pma_megatron.formats.source import Source


class _Required(TypedDict):
    iteration: int | None
    args: dict[str, Any]


class Common(_Required, total=False):
    """Plain values that a checkpoint has beside its tensors.

    Attributes:
        iteration: at which it was saved; None if it does not say.
        args: arguments of the training script, {} if it keeps none.
        samples: that training had consumed, where `args` do not say it.
        tokens: that it was trained on, where `args` do not say it; `tokens_unknown` where that is
            None: why, to complete "tokens are unknown because ...".
        weights_only: whether it was saved without an optimizer.
    """

    samples: Any
    tokens: int | None
    tokens_unknown: str | None
    weights_only: bool


class ReadSource(Protocol):
    """Open the checkpoint at `path` as a source.

    `ranges` is the map of the newest source's flat buffers, {} for that one itself; a format that
    stores names does not need it. `main_params` says whether main params are wanted. `peers` are
    other checkpoints of the run that can be read here: where one alone does not say which main
    params are whose, they may.
    """

    def __call__(
        self, path: str, ranges: FlatMap, main_params: bool, peers: Sequence[str] = ()
    ) -> Source: ...


LayOut = Callable[[str, Changes], OutputLayout]
"""Lay out an output after the checkpoint at a path."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """The file of a root that names the checkpoint to resume from.

    Attributes:
        file: its name; None for a format that has no such file: its folders are named one by one.
        folder_of: content -> name of the checkpoint's folder; None if it makes no sense.
        content_of: name of the folder -> content; None where trainers that give such names write
            no tracker, and go by the names.
        resume: how training is told to resume from `{root}`.
        optional: True where a root without one is as it should be.
    """

    file: str | None
    folder_of: Callable[[str], str | None]
    content_of: Callable[[str], str | None]
    resume: str
    optional: bool = False

    @property
    def by_flag(self) -> bool:
        """Whether `resume` is a flag of the launch command; a call in the script if not."""
        return self.resume.startswith("-")

    def resumed(self, root: Path | str) -> str:
        """`resume` with a root in it, as a shell or Python takes it."""
        return resume_call(self.resume, root=root)


def resume_call(text: str, **paths: Path | str) -> str:
    """Paths in what resumes, as a shell takes those of a flag and Python those of a call."""
    if text.startswith("-"):
        return text.format(**{name: typed(path) for name, path in paths.items()})
    quoted = {name: json.dumps(str(path), ensure_ascii=False) for name, path in paths.items()}
    return text.format(**{name: path[1:-1] for name, path in quoted.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format. Its members are in the order in which one merge first asks for each.

    Five rules hold for all members that are called. They look at nothing but the folder that they
    are given (`read_source` at its `peers` too) and at what its links lead to. They open files by
    `base.openfiles` alone, so they create and change nothing, in that folder or elsewhere. They
    decode pickles by `formats.pickles` and run nothing that a file names. They do not communicate:
    one rank may call while the others do not. The same bytes give the same answer on every rank.

    A file that cannot be read may surface as OSError: the registry makes a CheckpointError of it.

    Finding the checkpoints of a run. Every rank that looks at the run's root asks: rank 0, or all
    of them where roots may be disks of single nodes.

    1. `tracker`: what the root says to resume from. Its functions read nothing and raise nothing;
       what they return is a name of one folder, never a path.
    2. `any_folder_name`: True where folders are known by their files, False where they are called
       `iter_*` or `release`. (`registry.detect` then names the format of each folder.)
    3. `iteration_of`: iteration of a folder, whole or not, that no usual name tells; None if
       unknown. It may read the pickles of small files. It never raises over a damaged one.
    4. `completeness`: why a folder is not a whole checkpoint of a kind that can be merged, or None.
       It reads metadata and the directories of zips, never a payload, and at most the pickles of
       files. Damage is an answer here, not an exception.
    5. `common`: see `Common`. It is asked of whole checkpoints. It reads pickles and no payload,
       and raises CheckpointError where they are damaged or hold a value of another type.
    6. `written_after`: what the times of a whole folder cannot rule out, as a clause for a
       warning; None if nothing. It looks at times alone and never raises.
    7. `schedule`: where it stood in its learning-rate schedule, as far as it says. Rank 0 asks,
       before and after sources are opened. It raises as `common` does; callers do without.

    Opening the sources.

    8. `read_source`: one checkpoint in model space. For every source one rank that sees it calls,
       the newest first; the result is sent to all others, so it is small and can be pickled. It
       reads metadata, and payloads only as far as main params without names must be recognised by
       their values. It raises CheckpointError for what is incomplete, damaged, hostile or of two
       saves, PlanError where main params cannot be told apart. It never averages or rounds.
    9. `files`: the zips of a folder, to find payload bytes with `ItemFiles.locate`. Every rank
       calls, for the sources that it sees. It opens nothing before it is asked for a record.
    10. `saved_together`: file -> what one process wrote at once, the file itself or its folder. A
        plain function of the name. Of each, one sample must fit the other sources.
    11. `weights_alone`: whether an output of averaged weights without main params can be written.
    12. `other_layouts`: how the checkpoint `{tag}` becomes one that merges with those that were
        saved under other parallel sizes, where it does not as it is; empty where all do.

    Deciding what is written.

    13. `lay_out`: the files of an output after the newest source. One rank that sees that source
        calls. It reads small files and pickles, no payload, and raises UsageError for what cannot
        be resumed from. It never writes: staging, the engine and rank 0 do, from what it returns.
        The small files come in the order in which a trainer writes them.
    14. `side_files`: what becomes of the files in a folder that neither `items` nor the small files
        of `lay_out` name, row by row: `formats.side_files` looks for them, after `lay_out`.
    15. `folder_name`: (path of the newest source, its iteration) -> what the output is called.
        Every rank asks; it looks at the two arguments alone.
    16. `resumed`: (folder, where a copy of what it holds lies or will lie) -> how training is told
        to go on from there, where that depends on the trainer that wrote it; None where
        `Tracker.resume` says it. It reads the folder alone, and raises as `common` does.

    Averaging, checking and publishing. The output is opened by `read_source` and `files` like any
    checkpoint before it gets its name; then rank 0 writes what `Tracker.content_of` says.

    17. `named_layouts`: how a run is saved so that main params have names, for the message of a
        rank that finds that those without are not their weights; empty where all have names.
    18. `unchecked_order`: where the map of an output's flat buffers is not what names and shapes
        alone say, or more than they say, a clause each. Rank 0 asks. It reads no file.
    19. `own_names`: True where tensors are called as the model itself calls them, so that an export
        for another library renames nothing. `own_config`: True where the model's configuration and
        tokenizer lie in the checkpoint's folder. Every rank asks.
    20. `items`: every zip in a folder's files, with the key of what it holds, for messages. Rank 0
        asks when a published folder is verified. It reads what `completeness` reads, and raises
        CheckpointError for a folder that is not whole.

    Recovering a run from a spike.

    19. `converted`: what a folder is that no training saved, because another was converted to it;
        empty where training itself saves them, so that a run goes on from one.
    """

    name: str
    tracker: Tracker
    any_folder_name: bool = False
    iteration_of: Callable[[Path], int | None] = lambda path: None
    completeness: Callable[[Path], Incomplete | None]
    common: Callable[[Path], Common]
    written_after: Callable[[Path], str | None] = lambda path: None
    schedule: Callable[[Path], Schedule]
    read_source: ReadSource
    files: Callable[[Path], ItemFiles] = ItemFiles
    saved_together: Callable[[str], str] = lambda file: file
    weights_alone: bool = False
    other_layouts: str = ""
    lay_out: LayOut
    side_files: tuple[SideRule, ...] = ()
    folder_name: Callable[[str, int | None], str]
    resumed: Callable[[Path, Path], str | None] = lambda folder, there: None
    named_layouts: str = ""
    unchecked_order: Callable[[Source], tuple[str, ...]] = lambda source: ()
    own_names: bool = False
    own_config: bool = False
    items: Callable[[Path], dict[Item, str]]
    converted: str = ""

    def instead_of_flat(self) -> str:
        """What to do about main params that are not their weights: no average of those, for files
        of two saves may be the cause."""
        return (
            f"What works: {left_out('this checkpoint')}, restore its files from one save, or "
            f"{self.named_layouts}"
        )
