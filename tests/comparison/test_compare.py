"""Two checkpoints side by side: real ones in several layouts, and made ones for odd values."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import deepspeed_runs
from conftest import DENSE, digests, folder_of, request_for, train
from pma_megatron import compare, merge
from pma_megatron.cli import main
from pma_megatron.cli.verbs import NOT_THE_SAME
from pma_megatron.comparison.differences import Comparison, TensorComparison
from pma_megatron.errors import CheckpointError, PlanError, UsageError
from pma_megatron.formats import registry
from pma_megatron.testing import run_ranks
from pma_megatron.testing.plain_reads import WEIGHT, Checkpoint
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
from zips import restamp

MAIN, SHOWN = "param", "main params"


def named(found: Comparison) -> dict[tuple[str, str], TensorComparison]:
    return {(tensor.state, tensor.key): tensor for tensor in found.tensors}


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(registry.get("torch_dist", str(folder)), folder)


def saved(folder: Path, **tensors: torch.Tensor) -> Path:
    dcp.save({"model": tensors}, checkpoint_id=str(folder), no_dist=True)
    return folder


def test_every_number_is_that_of_whole_tensors(dense_run: Path) -> None:
    one, other = folder_of(dense_run, 4), folder_of(dense_run, 6)
    found = compare(one, other)
    first, second = opened(one), opened(other)
    assert len(found.tensors) == len(first.tensors) and not found.same
    for place in first.tensors:
        a, b = (each.values(place).double().numpy() for each in (first, second))
        state = SHOWN if place[0] == MAIN else place[0]
        got = named(found)[state, place[1]].values
        assert got.elements == a.size and got.different == np.count_nonzero(a != b), place
        assert got.beyond == got.different and got.not_finite == 0
        assert got.max_difference == np.abs(b - a).max(initial=0.0), place
        relative = np.linalg.norm(b - a) / np.linalg.norm(a) if got.different else 0.0
        assert got.relative_difference == pytest.approx(relative, rel=1e-12), place
    places = first.tensors
    differences = [(second.values(p).double() - first.values(p).double()) for p in places]
    distance = math.fsum(float(d.square().sum()) for d in differences)
    norm = math.fsum(float(first.values(p).double().square().sum()) for p in places)
    assert found.total.relative_difference == pytest.approx(math.sqrt(distance / norm), rel=1e-12)
    assert found.total.elements == sum(d.numel() for d in differences)
    assert sum(v.different for v in found.by_state().values()) == found.total.different > 0


def measured(rank: int, world_size: int, one: str, other: str) -> list[dict[str, Any]]:
    return [compare(one, other, threads=threads).to_json() for threads in (1, 3)]


def test_neither_ranks_nor_threads_change_a_number(dense_run: Path) -> None:
    one, other = (str(folder_of(dense_run, n)) for n in (2, 6))
    results = [
        each
        for ranks in (1, 2, 3)
        for own in run_ranks(measured, ranks, one, other)
        for each in own
    ]
    assert len(results) == 12 and all(each == results[0] for each in results)


def test_layouts_do_not_count(dense_run: Path, tmp_path: Path) -> None:
    """The same training, saved as `dp_reshardable` and as `fully_reshardable`."""
    config = replace(DENSE, optim_format="fully_reshardable")
    run_ranks(train, 2, {str(tmp_path / "fully"): (config, 1)})
    one, other = folder_of(dense_run, 2), folder_of(tmp_path / "fully", 2)
    found = compare(one, other)
    assert found.same and found.total.different == 0
    assert {t.state for t in found.tensors} == {WEIGHT, SHOWN, "exp_avg", "exp_avg_sq"}
    assert len({side.optimizer_layout for side in found.sides}) == 2
    weights = compare(one, other, weights_only=True)
    assert weights.tensors == tuple(t for t in found.tensors if t.state == WEIGHT)


def test_one_bit_is_found_and_damage_is_not_called_a_difference(run: Path, tmp_path: Path) -> None:
    one, other = folder_of(run, 4), tmp_path / "iter_0000004"
    shutil.copytree(one, other)
    assert compare(one, other).same
    known = opened(other)
    key = "decoder.layers.mlp.linear_fc2.weight"
    piece = known.tensors["exp_avg", key].pieces[0]
    path, offset = registry.get("torch_dist", str(other)).files(other).locate(piece.payload)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    item = piece.payload.item
    with pytest.raises(CheckpointError, match="damaged"):
        compare(one, other)
    restamp(path, item.offset, item.length)
    found = compare(one, other)
    (tensor,) = (t for t in found.tensors if not t.same)
    assert (tensor.state, tensor.key, tensor.values.different) == ("exp_avg", key, 1)
    exact = [each.values(("exp_avg", key)).double() for each in (opened(one), opened(other))]
    assert tensor.values.max_difference == float((exact[1] - exact[0]).abs().max()) > 0


def test_a_merge_and_what_it_was_made_of(dense_run: Path, save: Path) -> None:
    """Kept moments are the newest's; averaged ones are not; the other way round is as far."""
    (output,) = merge(request_for(dense_run, save)).outputs
    newest = folder_of(dense_run, 8)
    found = compare(newest, output)
    states = found.by_state()
    assert states["exp_avg"].different == 0 < states[SHOWN].different
    back = compare(output, newest)
    assert back.by_state()[SHOWN].max_difference == states[SHOWN].max_difference


ODD = {
    "equal": ([1.0, 2.0], [1.0, 2.0], 0, 0, 0.0),
    "not a number in both": ([math.nan, 1.0], [math.nan, 1.0], 0, 0, 0.0),
    "not a number in one": ([math.nan, 1.0], [0.0, 1.0], 1, 1, 0.0),
    "infinite in both": ([math.inf, 1.0], [math.inf, 2.0], 1, 0, 1.0),
    "signs of infinity": ([math.inf, 1.0], [-math.inf, 1.0], 1, 1, 0.0),
    "a zero below zero": ([0.0, 1.0], [-0.0, 1.0], 1, 0, 0.0),
    "largest": ([3e38, 1.0], [-3e38, 1.0], 1, 0, 6e38),
    "smallest": ([0.0, 1.0], [1e-45, 1.0], 1, 0, 2.0**-149),
}


def test_odd_values(tmp_path: Path) -> None:
    first = {name: torch.tensor(one) for name, (one, *_) in ODD.items()}
    second = {name: torch.tensor(other) for name, (_, other, *_) in ODD.items()}
    found = compare(saved(tmp_path / "a", **first), saved(tmp_path / "b", **second))
    for name, (_, _, different, strange, largest) in ODD.items():
        got = named(found)[WEIGHT, name].values
        assert (got.different, got.not_finite) == (different, strange), name
        assert got.max_difference == pytest.approx(largest, rel=1e-6), name
    assert found.total.not_finite == 2


def test_what_only_one_has_other_shapes_and_other_dtypes(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    one = saved(tmp_path / "a", both=x, left=x, shape=x, dtype=x, bits=torch.tensor([2**53, 1]))
    other = saved(
        tmp_path / "b",
        both=x,
        right=x,
        shape=x.reshape(2, 3),
        dtype=x.bfloat16(),
        bits=torch.tensor([2**53 + 1, 1]),
    )
    found = compare(one, other)
    tensors = named(found)
    assert not found.same and {t.key for t in found.tensors if not t.same} == {
        *("left", "right", "shape", "bits")
    }
    assert tensors[WEIGHT, "dtype"].dtypes == ("float32", "bfloat16")
    assert tensors[WEIGHT, "shape"].shapes == ((6,), (2, 3))
    assert tensors[WEIGHT, "left"].shapes == ((6,), None)
    assert tensors[WEIGHT, "bits"].values.different == 1  # float64 does not tell them apart


FAR = {
    "beyond float64": ([1.7e308, 1.0], [-1.7e308, 1.0]),
    "squares beyond float64": ([1e200, 1.0], [2e200, 1.0]),
    "squares too small for it": ([1e-200, 0.0], [2e-200, 0.0]),
    "from nothing": ([0.0, 0.0], [1.0, 1.0]),
}


@pytest.mark.parametrize("name", FAR)
def test_what_float64_cannot_hold_is_never_the_same(tmp_path: Path, name: str) -> None:
    one, other = (torch.tensor(values, dtype=torch.float64) for values in FAR[name])
    found = compare(saved(tmp_path / "a", x=one), saved(tmp_path / "b", x=other), rtol=1e-3)
    assert not found.same and found.total.different >= 1 and found.total.max_difference > 0
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["total"]["relative_difference"] is None


def test_what_is_not_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(3)
    for name, value in (("a", x), ("b", x * 2)):
        state = {"model": {"w": x}, "extra": {"q": value}}
        dcp.save(state, checkpoint_id=str(tmp_path / name), no_dist=True)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [note for note in found.notes if "extra.q" in note] == list(found.notes[:2])
    code, out, _ = told(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 0 and "3 elements of 1 tensors" in out and "extra.q" in out


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Stage of ZeRO -> a tag of the same training."""
    folder = tmp_path_factory.mktemp("zero")
    runs = {str(folder / str(stage)): DeepSpeedConfig(stage=stage) for stage in (1, 3)}
    run_ranks(deepspeed_runs.train, 2, runs)
    return {stage: deepspeed_runs.tag(folder / str(stage)) for stage in (1, 3)}


def changed(tag: Path, folder: Path, files: str, change: Callable[[Any], None]) -> Path:
    copy = Path(shutil.copytree(tag, folder / tag.name))
    for file in copy.glob(files):
        state = torch.load(file, weights_only=False)
        change(state)
        torch.save(state, file)
    return copy


def add_to_main_params(state: Any) -> None:
    for group in state["optimizer_state_dict"]["fp32_flat_groups"]:
        group.data.add_(7)


def add_to_frozen(state: Any) -> None:
    for name in ("module", "frozen_param_fragments"):
        if "frozen" in (state.get(name) or {}):
            state[name]["frozen"].data.add_(5)


@pytest.mark.parametrize("weights_only", [False, True])
def test_values_that_are_stored_elsewhere_than_as_weights(
    tags: dict[int, Path], tmp_path: Path, weights_only: bool
) -> None:
    """ZeRO-3 stores main params alone; what is frozen lies apart from what is trained."""
    changes = {
        "main": (3, "*optim_states.pt", add_to_main_params, SHOWN),
        "frozen3": (3, "*model_states.pt", add_to_frozen, WEIGHT),
        "frozen1": (1, "mp_rank*model_states.pt", add_to_frozen, WEIGHT),
    }
    for name, (stage, files, change, state) in changes.items():
        other = changed(tags[stage], tmp_path / name, files, change)
        found = compare(tags[stage], other, weights_only=weights_only)
        assert {t.state for t in found.tensors if not t.same} == {state}, name
    found = compare(tags[1], tags[3], weights_only=weights_only)
    assert found.total.different == 0
    assert all("@1" in t.key for t in found.tensors if not t.same)  # buffers of the other rank


@pytest.mark.parametrize(
    ("atol", "rtol", "beyond"), [(0, 0, 3), (0.1, 0, 2), (0, 0.1, 2), (0.1, 0.1, 1), (1, 1, 0)]
)
def test_tolerances_are_those_of_allclose(
    tmp_path: Path, atol: float, rtol: float, beyond: int
) -> None:
    one, other = torch.tensor([0.0, 1.0, 9.0, 4.0]), torch.tensor([0.05, 1.25, 9.5, 4.0])
    folders = saved(tmp_path / "a", x=one), saved(tmp_path / "b", x=other)
    found = compare(*folders, atol=atol, rtol=rtol)
    close = torch.isclose(other.double(), one.double(), atol=atol, rtol=rtol)
    assert found.total.beyond == int((~close).sum()) == beyond
    assert found.same == (beyond == 0) and found.total.different == 3


def told(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["compare", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_command(
    dense_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = folder_of(dense_run, 4), folder_of(dense_run, 8)
    copy = Path(shutil.copytree(one, tmp_path / one.name))
    code, out, _ = told(capsys, one, copy)
    assert code == 0 and "the same" in out and "bit for bit" in out
    file = tmp_path / "found.json"
    code, out, _ = told(capsys, one, dense_run, "--json", "--out", file)  # the tracker names 8
    assert code == NOT_THE_SAME and json.loads(out) == json.loads(file.read_text())
    assert json.loads(out) == json.loads(json.dumps(compare(one, other).to_json()))
    code, out, _ = told(capsys, one, other, "--most", 2)
    assert code == NOT_THE_SAME and "the 2 that differ most of" in out
    assert told(capsys, one, other, "--atol", 1e9)[0] == 0
    before = digests(one)
    for out in (one / "metadata.json", one / "new.json", tmp_path):
        assert told(capsys, one, other, "--out", out)[0] == 2
    assert digests(one) == before
    assert told(capsys, one, other, "--most", -1)[0] == 2
    assert "differ most" not in told(capsys, one, other, "--most", 0)[1]
    said = tmp_path / "elastic.json"  # what torchrun prints of a rank that ends with another code
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(said))
    assert told(capsys, one, other)[0] == NOT_THE_SAME and "not the same" in said.read_text()


def refusals(run: Path, tmp_path: Path) -> Iterable[tuple[type[Exception], str, tuple[Any, ...]]]:
    one, other = folder_of(run, 4), folder_of(run, 6)
    link = tmp_path / one.name
    link.symlink_to(one)
    yield UsageError, "one checkpoint", (one, one)
    yield UsageError, "one checkpoint", (one, link)
    yield CheckpointError, "does not exist", (one, tmp_path / "none")
    yield UsageError, "hdfs://", (one, "hdfs://bucket/iter_0000006")
    yield PlanError, "no tensor of one name", (one, saved(tmp_path / "other", x=torch.ones(2)))
    (other / "metadata.json").unlink()
    yield CheckpointError, "not a whole checkpoint|metadata.json", (one, other)


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    for kind, message, pair in refusals(run, tmp_path):
        with pytest.raises(kind, match=message):
            compare(*pair)
    for name, value in (("atol", -1.0), ("rtol", math.nan), ("threads", 0)):
        with pytest.raises(UsageError, match=name):
            compare(folder_of(run, 2), folder_of(run, 4), **{name: value})
