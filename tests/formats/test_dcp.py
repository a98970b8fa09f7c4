"""Plain DCP checkpoints of real FSDP2 runs, as each trainer writes them, against the contract."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.fsdp

from pma_megatron import MergeRequest, Policy, SelectionRequest, list_checkpoints, merge, plan
from pma_megatron.errors import CheckpointError, PlanError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.testing import run_ranks
from pma_megatron.testing.conformance import FormatConformance
from pma_megatron.testing.plain_reads import WEIGHT, Key
from pma_megatron.testing.tiny_fsdp import (
    ACCELERATE,
    NUMBERED,
    STATE_DICT,
    TORCHTITAN,
    FsdpConfig,
    TinyFsdp,
)

SAVES = 2
PARTS = {"pytorch_model_fsdp_0": "", "optimizer_0": ""}


def train(rank: int, world_size: int, roots: Mapping[str, str]) -> dict[str, Any]:
    """A run per style; what it holds at every save."""
    held: dict[str, Any] = {}
    for style, root in roots.items():
        run = TinyFsdp(FsdpConfig(style=style))
        for _ in range(SAVES):
            run.train(2)
            folder = run.save(root)
            held[str(folder)] = run.snapshot()
    return held


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints of two ranks, and what they held."""
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    folder = tmp_path_factory.mktemp("fsdp")
    roots = {style: str(folder / style) for style in (TORCHTITAN, ACCELERATE, STATE_DICT, NUMBERED)}
    return folder, run_ranks(train, 2, roots)[0]


class Dcp(FormatConformance):
    """One way to name what is saved."""

    format = "torch_dcp"
    has_tracker = False
    counts_samples = False
    weights_are_main_params = True
    style: ClassVar[str]
    _held: ClassVar[dict[str, Any]]

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, runs: tuple[Path, dict[str, Any]]) -> Path:
        cls._held = runs[1]
        return runs[0] / cls.style

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """What the model and the optimizer held."""
        held = self._held[str(folder)]
        found = {(WEIGHT, name): value for name, value in held["weight"].items()}
        for state in ("exp_avg", "exp_avg_sq"):
            found |= {(state, name): value for name, value in held[state].items()}
        return found

    def hostile(self, folder: Path, outside: Path) -> Iterator[str]:
        """Shards of another folder, by relative and by absolute names."""
        for name in (f"../../{outside.name}/__0_0.distcp", f"{outside}/__0_0.distcp", "/dev/zero"):
            for file in folder.rglob(".metadata"):
                metadata = pickle.loads(file.read_bytes())
                for stored in metadata.storage_data.values():
                    stored.relative_path = name
                file.write_bytes(pickle.dumps(metadata))
            yield f"shards in {name}"


class TestTorchtitan(Dcp):
    style = TORCHTITAN


class TestAccelerate(Dcp):
    style = ACCELERATE


class TestStateDict(Dcp):
    style = STATE_DICT


class TestNumbered(Dcp):
    """Parameters of the optimizer are numbers: moments are averaged all the same."""

    style = NUMBERED
    names_moments = False

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        return {
            place: value for place, value in super().oracle(folder).items() if place[0] == WEIGHT
        }


# What is not as it should be.


@pytest.fixture
def run(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A run of torchtitan's naming that a test may change."""
    return Path(shutil.copytree(runs[0] / TORCHTITAN, tmp_path / "run"))


def request(run: Path, last: int = 2, **settings: Any) -> MergeRequest:
    return MergeRequest(
        load=str(run),
        save=str(run.with_name("merged")),
        selection=SelectionRequest(last=last),
        **settings,
    )


def test_one_flipped_bit_is_named_and_nothing_is_published(run: Path) -> None:
    source = registry.get("torch_dcp", "").read_source(str(run / "step-2"), {}, True)
    piece = source.space.weights["layers.0.weight"].pieces[0]
    path, offset = registry.get("torch_dcp", "").files(run / "step-2").locate(piece.payload)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        merge(request(run))
    assert not list(run.with_name("merged").glob("*"))


def test_a_renamed_checkpoint_does_not_pass_for_another(run: Path) -> None:
    (run / "step-4").rename(run / "step-9")
    ref = list_checkpoints(run)[-1]
    assert not ref.complete and "iteration 9" in str(ref.incomplete_because)


def test_a_copy_is_no_second_checkpoint(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Where nothing inside says an iteration, the bytes tell."""
    run = Path(shutil.copytree(runs[0] / STATE_DICT, tmp_path / "run"))
    shutil.copytree(run / "step_4", run / "step_6")
    with pytest.raises(CheckpointError, match="is a copy"):
        plan(request(run))


def test_an_unfinished_save_is_being_written(run: Path) -> None:
    (run / "step-4" / ".metadata").unlink()
    ref = list_checkpoints(run)[-1]
    assert ref.state == "being written" and ref.iteration == 4


def test_a_save_that_was_cut_off_before_its_optimizer_is_no_newest_source(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Accelerate and Trainer begin the optimizer's folder after the model's."""
    run = Path(shutil.copytree(runs[0] / ACCELERATE, tmp_path / "run"))
    shutil.rmtree(run / "checkpoint-4" / "optimizer_0")
    with pytest.raises(PlanError, match=r"has no optimizer state, and .*checkpoint-2 has"):
        plan(request(run))
    assert plan(request(run, policy=Policy(optimizer_state="drop"))).rules


def test_one_foreign_file_does_not_decide_the_format(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(runs[0] / ACCELERATE / "checkpoint-4", tmp_path / "checkpoint-4"))
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"of another trainer")
    assert registry.detect(folder) == "torch_dcp"
    (ref,) = list_checkpoints(tmp_path)
    assert ref.complete


def test_formats_are_not_mixed(run: Path, tmp_path: Path) -> None:
    """A root in which two trainers saved."""
    archive = Path(__file__).parents[1] / "golden" / "main-fully_reshardable-dense.tar.xz"
    shutil.unpack_archive(archive, tmp_path / "other")
    shutil.move(tmp_path / "other" / "iter_0000002", run / "iter_0000002")
    shutil.rmtree(run / "step-2")
    with pytest.raises(SelectionError, match="mixes checkpoint formats"):
        plan(request(run, last=len(list_checkpoints(run))))
