"""The run that a format is checked on: what its author says of it, and averages of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pma_megatron import MergeRequest, Policy, SelectionRequest, list_checkpoints, merge, plan
from pma_megatron.errors import PmaError
from pma_megatron.formats import registry
from pma_megatron.formats.contract import Format
from pma_megatron.formats.marker import OWN_FILES, SNAPSHOTS
from pma_megatron.merging.planning import MergePlan
from pma_megatron.testing.plain_reads import Checkpoint, Key, digests
from pma_megatron.testing.watching import Opened, watched


@dataclass(frozen=True)
class Average:
    """An average that was published.

    Attributes:
        output: it.
        plan: what the same request says that it does.
        opened: what the merge opened outside of the run and of the output.
    """

    output: Checkpoint
    plan: MergePlan
    opened: tuple[Opened, ...]


class ConformanceRun:
    """A run of one format, its averages, and what its author says of it.

    A subclass states `format`, `root`, `oracle` and `hostile`, and overrides what is not as below.

    Attributes:
        format: name of the format in the registry.
        optimizer_state: what becomes of moments in averages, see `Policy`.
        has_tracker: whether the run's root says which checkpoint to resume from.
        weights_are_main_params: whether float32 weights stand for main params.
        names_moments: whether moments are stored with the name of their parameter.
        spare: patterns of files that a checkpoint does without.
        counts_samples: whether a checkpoint says how many samples it was trained on.
        beside: further files that a folder may hold -> whether an output gets them.
        left: names of files of the run that no output gets.
        made: names of files that an output has and a source need not have.
    """

    format: ClassVar[str]
    optimizer_state: ClassVar[str] = "average"
    has_tracker: ClassVar[bool] = True
    weights_are_main_params: ClassVar[bool] = False
    names_moments: ClassVar[bool] = True
    spare: ClassVar[tuple[str, ...]] = ()
    counts_samples: ClassVar[bool] = True
    beside: ClassVar[Mapping[str, bool]] = {
        "ours/rank0/sampler.bin": True,
        "ours.pt": True,
        "ours.json": True,
        "model.safetensors": False,
    }
    left: ClassVar[tuple[str, ...]] = ()
    made: ClassVar[tuple[str, ...]] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls) -> Path:
        """Root of a real run of at least two checkpoints, which nobody else writes to."""
        raise NotImplementedError

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """Values of tensors of one checkpoint, whole, from anything but this package's formats."""
        raise NotImplementedError

    def hostile(self, folder: Path, outside: Path) -> Iterator[str]:
        """Make `folder`, a copy of a checkpoint, hostile; yield what it says now, and do it again.

        After every yield it is a sound copy once more. `outside` is another copy of the checkpoint,
        none of whose files may be opened, whatever names `folder` says.
        """
        raise NotImplementedError

    # What the checks share.

    @classmethod
    def known(cls) -> Format:
        """The format."""
        return registry.get(cls.format, "")

    @pytest.fixture(scope="class")
    @classmethod
    def folders(cls, root: Path) -> Iterator[list[Path]]:
        """The checkpoints of the run, oldest first; no check may change a byte of them."""
        before = digests(root)
        yield [Path(ref.path) for ref in list_checkpoints(root)]
        assert digests(root) == before, "a source was written to"

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoints(cls, folders: list[Path]) -> list[Checkpoint]:
        """The checkpoints of the run, opened, oldest first."""
        return [Checkpoint(cls.known(), folder) for folder in folders]

    @pytest.fixture(scope="class")
    @classmethod
    def of_one(
        cls, root: Path, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Average:
        """The average of the newest alone."""
        return cls._averaged(root, 1, tmp_path_factory.mktemp("one"))

    @pytest.fixture(scope="class")
    @classmethod
    def of_two(
        cls, root: Path, of_one: Average, tmp_path_factory: pytest.TempPathFactory
    ) -> Average:
        """The average of the newest two; by then, whatever is imported late has been."""
        return cls._averaged(root, 2, tmp_path_factory.mktemp("two"))

    @classmethod
    def _averaged(cls, root: Path, last: int, save: Path) -> Average:
        request = MergeRequest(
            load=str(root),
            save=str(save / "pma"),
            selection=SelectionRequest(last=last),
            policy=Policy(optimizer_state=cls.optimizer_state),
        )
        planned = plan(request)
        # The log of recoveries that a run's snapshots are judged by lies in the folder above them.
        run = root.parent if root.name == SNAPSHOTS else root
        with watched([run, save]) as opened:
            (output,) = merge(request).outputs
        return Average(Checkpoint(cls.known(), Path(output)), planned, tuple(opened))

    def _refusal(self, folder: Path) -> str | None:
        """Why a folder is no source, as the format says it; None if it is one."""
        try:
            reason = self.known().completeness(folder)
            if reason is not None:
                return reason.reason
            self.known().common(folder)
            self.known().read_source(str(folder), {}, True)
        except PmaError as error:
            return str(error)
        return None

    def _needed(self, folder: Path) -> list[str]:
        files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in OWN_FILES)
        return [
            p.relative_to(folder).as_posix()
            for p in files
            if not any(p.match(pattern) for pattern in self.spare)
        ]
