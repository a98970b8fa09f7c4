"""What each policy, dtype and method writes, on committed checkpoints (no training needed)."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import digests
from oracle import assert_average, global_tensors, read_by_torch, read_tensor
from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, inspect, merge, plan
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.formats import flat
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.merging.tasks import Average
from zips import restamp

GOLDEN = Path(__file__).parents[1] / "golden"
NAMED, BUCKETS = "0.15.3-fully_reshardable-dense", "main-dp_reshardable-dense"
GATHERED = "0.14.0-dp_zero_gather_scatter-dense"
Unpack = Callable[[str], tuple[Path, list[list[dict[str, Any]]]]]


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Name of a golden run -> its folder and what its trainers held, [rank][save]."""

    def get(name: str) -> tuple[Path, list[list[dict[str, Any]]]]:
        folder = tmp_path / name
        shutil.unpack_archive(GOLDEN / f"{name}.tar.xz", folder)
        ranks = [torch.load(f, weights_only=True) for f in sorted(folder.glob("live_rank*.pt"))]
        return folder, [[saves[i] for i in sorted(saves)] for saves in ranks]

    return get


def run(root: Path, **settings: Any) -> Path:
    """Merge all saves of `root`; returns the merged folder."""
    settings.setdefault("selection", SelectionRequest(last=len(list(root.glob("iter_*")))))
    save = root.parent / "pma"
    return Path(merge(MergeRequest(load=str(root), save=str(save), **settings)).outputs[0])


def steps(value: Any) -> list[Any]:
    """Every step counter in a nested value."""
    if isinstance(value, dict):
        own = [v for k, v in value.items() if k in ("step", "common_step")]
        return own + [s for v in value.values() for s in steps(v)]
    return [s for v in value for s in steps(v)] if isinstance(value, (list, tuple)) else []


def load_object(checkpoint: TorchDistCheckpoint, key: str) -> Any:
    item = checkpoint.objects[key]
    data = io.BytesIO(checkpoint.read(item.file, item.offset, item.length))
    return torch.load(data, weights_only=False)


def load_common(folder: Path) -> dict[str, Any]:
    checkpoint = TorchDistCheckpoint(folder)
    if checkpoint.common_is_entry:
        return load_object(checkpoint, "common_state/shard_0_1")[0]
    return torch.load(folder / "common.pt", weights_only=False)


@pytest.mark.megatron
@pytest.mark.parametrize("name", [NAMED, BUCKETS, GATHERED])
def test_reset_zeroes_moments_and_steps_and_nothing_else(name: str, unpack: Unpack) -> None:
    root, _ = unpack(name)
    folder = run(root, policy=Policy(optimizer_state="reset"))
    merged, newest = read_source(str(folder), {}, True), max(root.glob("iter_*"))
    for state in ("exp_avg", "exp_avg_sq"):
        for tensor in merged.space.states[state].values():
            assert not read_tensor(folder, tensor).any()
    checkpoint = TorchDistCheckpoint(folder)
    objects = [k for k in checkpoint.objects if ".optimizer/shard" in k]
    found = [
        steps(load_common(folder).get("optimizer")),
        *(steps(load_object(checkpoint, key)) for key in objects),
    ]
    counters = [step for group in found for step in group]
    assert counters and not any(counters)
    assert any(steps(load_common(newest).get("optimizer"))) or any(
        any(steps(load_object(TorchDistCheckpoint(newest), key))) for key in objects
    )
    before, after = load_common(newest), load_common(folder)
    assert after["opt_param_scheduler"] == before["opt_param_scheduler"]
    assert vars(after["args"]) == vars(before["args"])


@pytest.mark.megatron
@pytest.mark.parametrize("name", [NAMED, BUCKETS, GATHERED])
def test_drop_writes_rounded_main_params_and_no_optimizer(name: str, unpack: Unpack) -> None:
    root, states = unpack(name)
    folder = run(root, policy=Policy(optimizer_state="drop"))
    assert not [k for k in TorchDistCheckpoint(folder).tensors if "optimizer" in k]
    assert not [k for k in TorchDistCheckpoint(folder).objects if "optimizer" in k]
    common = load_common(folder)
    assert "optimizer" not in common and "opt_param_scheduler" not in common
    assert inspect(folder).optimizer_layout == "none"
    for key, sources in global_tensors(states, "main_params").items():
        got = read_by_torch(folder, [key])[key]
        exact = np.mean(sources, axis=0)
        half_step = np.abs(exact) * torch.finfo(torch.bfloat16).eps / 2
        assert (np.abs(got.double().numpy() - exact) <= half_step * (1 + 2**-10)).all(), key


def test_float32_weights_are_the_averaged_main_params(unpack: Unpack) -> None:
    root, states = unpack(BUCKETS)
    folder = run(root, dtype="fp32")
    merged = read_source(str(folder), {}, False)
    for key, sources in global_tensors(states, "main_params").items():
        got = read_by_torch(folder, [key])[key]
        assert got.dtype == merged.space.weights[key].dtype == torch.float32
        assert_average(got.double().numpy(), sources, [1 / len(sources)] * len(sources), key)


def test_average_weights_reads_the_16_bit_weights_only(unpack: Unpack) -> None:
    root, states = unpack(NAMED)
    made = plan(
        MergeRequest(
            load=str(root), selection=SelectionRequest(last=2), policy=Policy(average="weights")
        )
    )
    averaged = [unit for unit in made.units if isinstance(unit.task, Average)]
    weights = set(made.sources[-1].space.weights)
    assert {unit.task.key for unit in averaged} == weights
    assert all(dtype == torch.bfloat16 for unit in averaged for dtype in unit.task.dtypes)
    folder = run(root, policy=Policy(average="weights"))
    for key, sources in global_tensors(states, "model_params").items():
        # The mean of two 16-bit numbers is exact in float32: one rounding is all there is.
        rounded = torch.from_numpy(np.mean(sources, axis=0)).float().bfloat16()
        assert torch.equal(read_by_torch(folder, [key])[key], rounded), key


@pytest.mark.parametrize("name", [BUCKETS, GATHERED])
@pytest.mark.parametrize("optimizer_state", ["latest", "average", "reset"])
def test_pieces_in_columns_make_the_very_files_that_objects_make(
    name: str, optimizer_state: str, unpack: Unpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of this size has few pieces, and a large one has too many for objects."""
    root, _ = unpack(name)
    policy = Policy(optimizer_state=optimizer_state)
    expected = _contents(run(root, policy=policy))
    monkeypatch.setattr(flat, "MANY", 0)
    assert _contents(run(root, policy=policy, overwrite=True)) == expected


def _contents(folder: Path) -> dict[str, str]:
    own = ("pma.json", "pma.json.sha256", "common.pt")
    return {name: sha for name, sha in digests(folder).items() if Path(name).name not in own}


def test_a_pattern_keeps_a_tensor_and_its_main_params(unpack: Unpack) -> None:
    for name in (NAMED, BUCKETS):
        root, states = unpack(name)
        pattern = "decoder.final_layernorm.*"
        folder = run(root, policy=Policy(overrides=((pattern, "newest"),)), overwrite=True)
        merged = read_source(str(folder), {}, True)
        for key, sources in global_tensors(states, "main_params").items():
            main = read_tensor(folder, merged.space.states["param"][key])
            if key.startswith("decoder.final_layernorm"):
                assert np.array_equal(main, sources[-1])
            else:
                assert_average(main, sources, [1 / len(sources)] * len(sources), key)
            rounded = torch.from_numpy(main).float().bfloat16()
            assert torch.equal(read_by_torch(folder, [key])[key], rounded), key


def test_a_pattern_drops_objects(unpack: Unpack) -> None:
    root, _ = unpack(NAMED)
    folder = run(root, policy=Policy(overrides=(("*_extra_state*", "drop"),)))
    kept = TorchDistCheckpoint(folder).objects
    assert not [key for key in kept if "_extra_state" in key] and "rng_state" in str(list(kept))


def test_a_parameter_in_a_shared_buffer_cannot_be_dropped_alone(unpack: Unpack) -> None:
    root, _ = unpack(BUCKETS)
    with pytest.raises(UsageError, match="cannot be dropped alone"):
        run(root, policy=Policy(overrides=(("decoder.final_layernorm.*", "drop"),)))


def test_decay_weights_use_true_token_positions(unpack: Unpack) -> None:
    root, states = unpack("0.12.3-fully_sharded_model_space-dense")
    folder = run(root, method=Method(name="1-sqrt"))
    made = plan(
        MergeRequest(
            load=str(root),
            method=Method(name="1-sqrt"),
            selection=SelectionRequest(last=len(states[0])),
        )
    )
    merged = read_source(str(folder), {}, True)
    for key, sources in global_tensors(states, "main_params").items():
        main = read_tensor(folder, merged.space.states["param"][key])
        assert_average(main, sources, made.outputs[0].values, key)


def test_what_a_file_server_keeps_of_a_removed_file_is_not_copied(unpack: Unpack) -> None:
    root, _ = unpack(NAMED)
    for folder in root.glob("iter_*"):
        (folder / ".nfs000000000000abcd").write_bytes(b"x")
        (folder / "notes.txt").write_bytes(b"x")
    made = run(root)
    assert (made / "notes.txt").exists() and not list(made.glob(".nfs*"))


def test_a_merge_is_a_source_like_any_other(unpack: Unpack) -> None:
    """Merges of merges: a published output can be listed, selected and averaged again."""
    root, _ = unpack(NAMED)
    folder = run(root)
    first = min(root.glob("iter_*"))
    again = MergeRequest(
        load=str(root),
        save=str(root.parent / "again"),
        selection=SelectionRequest(paths=(str(first), str(folder))),
    )
    assert len(merge(again).plan["sources"]) == 2


def test_weights_that_are_not_their_main_params_are_refused(unpack: Unpack) -> None:
    """The map of a flat buffer is proved: weights edited after the save stop the merge."""
    root, _ = unpack(BUCKETS)
    newest = TorchDistCheckpoint(max(root.glob("iter_*")))
    tensor = newest.tensors["output_layer.weight"]
    path, start = newest.locate(tensor.pieces[0].payload)
    stamp = path.stat()
    with path.open("r+b") as stream:
        stream.seek(start + tensor.pieces[0].payload.nbytes - 2)
        stream.write(b"\x11\x22")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    item = tensor.pieces[0].payload.item
    restamp(path, item.offset, item.length)
    with pytest.raises(PlanError, match="files of two saves") as refused:
        run(root)
    assert "average" not in str(refused.value)  # of such weights no average is offered
    assert not list((root.parent / "pma").glob("iter_*"))
