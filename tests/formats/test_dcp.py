"""Plain DCP checkpoints of real FSDP2 runs, as each trainer writes them, against the contract."""

from __future__ import annotations

import pickle
import shutil
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp

from pma_megatron import (
    MergeRequest,
    Policy,
    SelectionRequest,
    list_checkpoints,
    merge,
    plan,
    verify,
)
from pma_megatron.errors import CheckpointError, PlanError, SelectionError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM
from pma_megatron.formats.dcp.checkpoint import named_iteration
from pma_megatron.formats.dcp.keys import names_of
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


# What others save.


def save(folder: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)


def steps(root: Path, make: Any) -> Path:
    """Two checkpoints of what `make` says of an iteration."""
    for iteration in (1, 2):
        save(root / f"step_{iteration}", make(iteration))
    return root


def rounded(iteration: int, main: str) -> dict[str, Any]:
    """16-bit weights, and main params by name in the state of an optimizer."""
    exact = torch.arange(12.0).reshape(4, 3) / 7 + iteration / 5
    state = {"layer.weight": {main: exact, "exp_avg": exact / 10, "step": torch.tensor(1.0)}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": ["layer.weight"]}]}
    return {"model": {"layer.weight": exact.bfloat16()}, "optim": optimizer}


@pytest.mark.parametrize("main", ["master_param", "fp32_param"])
def test_16_bit_weights_follow_the_main_params_of_their_optimizer(
    tmp_path: Path, main: str
) -> None:
    (output,) = merge(request(steps(tmp_path / "run", lambda i: rounded(i, main)))).outputs
    loaded = rounded(0, main)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    exact = torch.arange(12.0).double().reshape(4, 3) / 7 + 1.5 / 5
    value = loaded["optim"]["state"]["layer.weight"][main]
    assert bool(((value.double() - exact).abs() <= 2.0**-22 * exact.abs()).all())
    assert torch.equal(loaded["model"]["layer.weight"], value.bfloat16())


def test_a_reference_of_the_weights_is_not_their_main_params(tmp_path: Path) -> None:
    """What training stays near equals the weights where they were not trained yet."""

    def make(iteration: int) -> dict[str, Any]:
        state, anchor = rounded(iteration, "master_param"), torch.arange(6.0) / 7
        frozen = {"master_param": anchor, "anchor": anchor, "exp_avg": anchor / 10}
        states = state["optim"]["state"]
        states["layer.weight"]["anchor"] = torch.arange(12.0).reshape(4, 3)
        state["model"]["frozen"], states["frozen"] = anchor.bfloat16(), frozen
        state["optim"]["param_groups"][0]["params"].append("frozen")
        return state

    (output,) = merge(request(steps(tmp_path / "run", make))).outputs
    loaded = make(0)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    value = loaded["optim"]["state"]["layer.weight"]
    exact = torch.arange(12.0).double().reshape(4, 3) / 7 + 1.5 / 5
    assert bool(((value["master_param"].double() - exact).abs() <= 2.0**-22 * exact.abs()).all())
    assert torch.equal(value["anchor"], torch.arange(12.0).reshape(4, 3))
    assert torch.equal(loaded["model"]["layer.weight"], value["master_param"].bfloat16())


def test_16_bit_weights_without_main_params_are_told(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        state = rounded(iteration, "master_param")
        del state["optim"]["state"]["layer.weight"]["master_param"]
        return state

    planned = plan(request(steps(tmp_path / "run", make)))
    assert any("16 bits and no main params" in note for note in planned.selection.notes)
    assert planned.rules["weight", "layer.weight"].why == "no main params are stored for it"


def test_main_params_that_do_not_say_whose_they_are_stop_a_merge(tmp_path: Path) -> None:
    """Megatron's Float16OptimizerWithFloat16Params under `--ckpt-format torch_dcp`."""

    def make(iteration: int) -> dict[str, Any]:
        state = rounded(iteration, "exp_avg_sq")
        state["optim"]["fp32_from_fp16_params"] = [[torch.ones(4, 3) * iteration]]
        return state

    run = steps(tmp_path / "run", make)
    with pytest.raises(PlanError, match="do not say which parameter"):
        plan(request(run))
    assert plan(request(run, policy=Policy(average="weights"))).rules


@pytest.mark.parametrize("name", ["w", 0])
def test_a_second_copy_of_the_model_is_averaged_under_its_own_name(
    tmp_path: Path, name: str | int
) -> None:
    def make(iteration: int) -> dict[str, Any]:
        value = torch.full((2,), float(iteration))
        state = {name: {"exp_avg": value}}
        groups = [{"lr": 0.1, "params": [name]}]
        optimizer = {"state": state, "param_groups": groups}
        return {"ema": {"w": value * 10}, "model": {"w": value}, "optimizer": optimizer}

    asked = request(steps(tmp_path / "run", make))
    assert any("ema.w" in note for note in plan(asked).selection.notes)
    (output,) = merge(asked).outputs
    loaded = {"ema": {"w": torch.zeros(2)}, "model": {"w": torch.zeros(2)}}
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    assert loaded["model"]["w"].tolist() == [1.5, 1.5] and loaded["ema"]["w"].tolist() == [15, 15]
    source = registry.get("torch_dcp", "").read_source(output, {}, True)
    assert set(source.space.weights) == {"w", "ema.w"} and MAIN_PARAM not in source.space.states


def test_float64_is_averaged_in_float64(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        exact = torch.arange(5, dtype=torch.float64) / 7 + 2.0**24 + iteration
        return {"model": {"count": exact, "w": torch.ones(3) * iteration}}

    for ranks in (1, 2):
        asked = request(steps(tmp_path / f"{ranks}" / "run", make))
        (output,) = run_ranks(_merged, ranks, asked)[0]
        loaded = make(7)
        dcp.load(loaded, checkpoint_id=output, no_dist=True)
        mean = (make(1)["model"]["count"] + make(2)["model"]["count"]) / 2
        error = (loaded["model"]["count"] - mean).abs()
        assert bool((error <= 2.0**-51 * mean).all()), error
        assert verify(output, deep=True).deep


def test_float64_that_was_summed_in_float32_is_found(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        return {"model": {"count": torch.arange(5, dtype=torch.float64) / 7 + iteration}}

    (output,) = merge(request(steps(tmp_path / "run", make))).outputs
    loaded = make(0)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    exact = loaded["model"]["count"]
    (file,) = Path(output).glob("*.distcp")
    data, held = file.read_bytes(), exact.numpy().tobytes()
    assert data.count(held) == 1 and verify(output, full=False, deep=True).deep
    narrow = exact.float().double().numpy().tobytes()
    for old, new in ((held, narrow), (_crc(held), _crc(narrow))):  # of both headers of the record
        assert old in data
        data = data.replace(old, new)
    file.write_bytes(data)
    with pytest.raises(VerifyError, match="count"):
        verify(output, full=False, deep=True)


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _merged(rank: int, world_size: int, asked: MergeRequest) -> tuple[str, ...]:
    return merge(asked).outputs


# What Megatron writes by DCP alone: `--ckpt-format torch_dcp` and `fsdp_dtensor`.


def megatron_fsdp(iteration: int) -> dict[str, Any]:
    """Names and nesting of `fsdp_dtensor` (megatron/training/checkpointing.py); Megatron-FSDP
    itself needs CUDA."""
    weight = torch.arange(6.0).reshape(3, 2) * iteration
    moments = {"exp_avg": weight / 10, "exp_avg_sq": weight**2}
    args = Namespace(consumed_train_samples=8 * iteration, seq_length=4, ckpt_format="fsdp_dtensor")
    return {
        "args": args,
        "iteration": iteration,
        "model": {"module.linear_fc1.weight_w": weight, "module.norm.weight": weight[0]},
        "optimizer": {
            "state": {"module.linear_fc1.weight_w": moments},
            "param_to_group_meta": {"module.linear_fc1.weight_w": {"lr": 0.1, "step": iteration}},
        },
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 8 * iteration},
    }


def test_megatrons_own_dcp_checkpoints(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path / "run" / f"iter_{iteration:07d}", megatron_fsdp(iteration))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    refs = list_checkpoints(tmp_path / "run")
    assert [(r.iteration, r.consumed_tokens, r.state) for r in refs] == [
        (1, 32, "complete"),
        (2, 64, "complete"),
    ]
    report = merge(request(tmp_path / "run", policy=Policy(optimizer_state="reset")))
    assert report.resume == (f"--load {tmp_path / 'merged'}",)
    assert (tmp_path / "merged" / "latest_checkpointed_iteration.txt").read_text() == "2"
    loaded = megatron_fsdp(0)
    dcp.load(loaded, checkpoint_id=report.outputs[0], no_dist=True)
    for name, value in megatron_fsdp(3)["model"].items():
        assert torch.equal(loaded["model"][name], value / 2), name
    optimizer = loaded["optimizer"]
    assert not any(t.any() for t in optimizer["state"]["module.linear_fc1.weight_w"].values())
    assert optimizer["param_to_group_meta"]["module.linear_fc1.weight_w"] == {"lr": 0.1, "step": 0}
    assert loaded["iteration"] == 2 and loaded["opt_param_scheduler"]["num_steps"] == 16


def test_rates_are_scaled_where_groups_and_schedulers_have_them(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path / "run" / f"iter_{iteration:07d}", megatron_fsdp(iteration))
    (output,) = merge(request(tmp_path / "run", lr_factor=0.5)).outputs
    loaded = megatron_fsdp(0)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    meta = loaded["optimizer"]["param_to_group_meta"]["module.linear_fc1.weight_w"]
    assert meta == {"lr": 0.05, "step": 2} and loaded["opt_param_scheduler"]["max_lr"] == 0.05


def test_a_module_may_be_called_as_an_optimizer_calls_its_parts() -> None:
    """A model with modules `state` and `param_groups`, saved flat beside its optimizer."""
    paths: dict[str, tuple[str | int, ...]] = {
        "state.out.weight": ("state.out.weight",),
        "param_groups.out.weight": ("param_groups.out.weight",),
        "optimizer.state.state.out.weight.exp_avg": ("optimizer", "state.state.out.weight.exp_avg"),
        "optimizer.param_groups.state.out.weight.lr": (
            "optimizer",
            "param_groups.state.out.weight.lr",
        ),
    }
    names = names_of(paths, dict.fromkeys(list(paths)[:3], (2,)))
    assert names.states == {
        "exp_avg": {"state.out.weight": "optimizer.state.state.out.weight.exp_avg"}
    }
    assert names.weights["state.out.weight"] == "state.out.weight"


def test_short_names_of_scripts_are_good_names(tmp_path: Path) -> None:
    """Megatron alone pads iterations to seven digits, and looks for such names."""
    for iteration in (5, 10):
        save(tmp_path / "run" / f"iter_{iteration}", rounded(iteration, "master_param"))
    refs = list_checkpoints(tmp_path / "run")
    assert [(ref.iteration, ref.state) for ref in refs] == [(5, "complete"), (10, "complete")]


@pytest.mark.parametrize(
    ("name", "iteration"),
    [
        ("step-1000", 1000),
        ("checkpoint-20", 20),
        ("epoch=1-step=300.ckpt", 300),
        ("iter_0000100", 100),
        ("global_step400", 400),
        ("best", None),
        ("v2", None),
        ("epoch-3", None),
    ],
)
def test_iterations_in_names(name: str, iteration: int | None) -> None:
    assert named_iteration(Path(name)) == iteration
