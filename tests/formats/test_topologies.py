"""Sources saved under other parallel sizes and optimizer layouts than the newest one merge too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oracle import assert_average, global_tensors, read_by_torch, read_tensor
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.identity import proof
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

DENSE = TinyConfig(seed=1)
MOE = replace(DENSE, num_experts=4)
FULLY = "fully_reshardable"
RUNS = {
    "dp2": replace(DENSE),
    "dp2-buckets": replace(DENSE, seed=2, bucket_size=4000),
    "dp2-fully": replace(DENSE, seed=3, optim_format=FULLY),
    "tp2": replace(DENSE, seed=4, tensor_model_parallel_size=2),
    "tp2-fully": replace(DENSE, seed=5, tensor_model_parallel_size=2, optim_format=FULLY),
    "pp2": replace(DENSE, seed=6, pipeline_model_parallel_size=2),
    "float16": replace(DENSE, seed=7, use_distributed_optimizer=False),
    "moe-ep1": replace(MOE, seed=8),
    "moe-ep2": replace(MOE, seed=9, expert_model_parallel_size=2),
    "moe-ep2-fully": replace(MOE, seed=10, expert_model_parallel_size=2, optim_format=FULLY),
}
PAIRS = [
    ("dp2", "tp2"),
    ("tp2", "dp2"),
    ("pp2", "dp2"),
    ("dp2", "pp2"),
    ("tp2", "dp2-buckets"),
    ("dp2", "dp2-fully"),
    ("tp2-fully", "pp2"),
    ("tp2", "tp2-fully"),
    ("dp2-fully", "tp2-fully"),
    ("float16", "tp2"),
    ("pp2", "float16"),
    ("moe-ep1", "moe-ep2"),
    ("moe-ep2", "moe-ep1"),
    ("moe-ep1", "moe-ep2-fully"),
    ("moe-ep2-fully", "moe-ep1"),
]
FAST = (("tp2", "dp2"), ("moe-ep1", "moe-ep2"))


def train(rank: int, world_size: int, name: str, root: str) -> list[dict[str, Any]]:
    trainer, states = TinyTrainer(RUNS[name]), []
    for _ in range(2):
        trainer.train(2)
        trainer.save(root)
        states.append(trainer.snapshot())
    return states


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (run folder, states[rank][save]), each trained once."""
    made: dict[str, tuple[Path, list[list[dict[str, Any]]]]] = {}

    def get(name: str) -> tuple[Path, list[list[dict[str, Any]]]]:
        if name not in made:
            root = tmp_path_factory.mktemp(name) / "run"
            made[name] = (root, run_ranks(train, 2, name, str(root)))
        return made[name]

    return get


@pytest.mark.parametrize(
    "older, newer",
    [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_sources_of_two_topologies_merge(
    older: str, newer: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output has the newest source's layout, main params and moments their float64 average."""
    # They are of two runs, of which samples may tell by chance, and then the merge is refused.
    monkeypatch.setattr(proof, "of_one_run", lambda *_: (None, None))
    (old_root, old_states), (new_root, new_states) = trained(older), trained(newer)
    paths = (str(old_root / "iter_0000002"), str(new_root / "iter_0000004"))
    request = MergeRequest(
        load=str(new_root),
        save=str(tmp_path / "pma"),
        selection=SelectionRequest(paths=paths),
        policy=Policy(optimizer_state="average"),
    )
    folder = Path(merge(request).outputs[0])
    merged = read_source(str(folder), {}, True)
    for what, state in (
        ("main_params", "param"),
        ("exp_avg", "exp_avg"),
        ("exp_avg_sq", "exp_avg_sq"),
    ):
        old, new = global_tensors(old_states, what), global_tensors(new_states, what)
        assert set(old) == set(new) == set(merged.space.states[state])
        for key in old:
            sources = [old[key][0], new[key][1]]
            assert not np.array_equal(*sources) or not sources[0].any(), key
            found = read_tensor(folder, merged.space.states[state][key])
            assert_average(found, sources, (0.5, 0.5), f"{state} {key}")
            if state == "param":
                rounded = torch.from_numpy(found).float().bfloat16()
                assert torch.equal(read_by_torch(folder, [key])[key], rounded), key
