"""Two releases of DeepSpeed, each as the writer of sources and as the reader of the merge.

The older one lies in a folder of its own (`launch/test.sh` puts it there), and processes that want
it put that first on their path.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import refused, request_for
from deepspeed_runs import check_masters, check_weights, resume, tag, train
from oracle import assert_average, read_tensor
from pma_megatron import Policy, SelectionRequest, list_checkpoints, merge, verify
from pma_megatron.errors import PlanError
from pma_megatron.formats.deepspeed.source import read_source
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

RELEASE = "0.16.9"
OLD = Path(sys.prefix) / f"deepspeed-{RELEASE}"
# 0.16.9 waits for the last of several gathers (partition_parameters.py:1876), which is too early
# where they run beside each other, as Gloo's do: its ZeRO-3 may train to NaN on the CPU unless
# parameters are gathered one by one.
NOT_PERSISTENT = {"stage3_param_persistence_threshold": 0}
KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "zero2": DeepSpeedConfig(stage=2),
    "zero3": DeepSpeedConfig(stage=3, zero={"sub_group_size": 40, **NOT_PERSISTENT}),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
}
MOE = DeepSpeedConfig(stage=1, experts=4, expert_parallel_size=2)
NEW = ("zero1", "zero3")
ONLY_OLD = {"zero0_bf16": DeepSpeedConfig(stage=0)}
"""Until 0.18.4, ZeRO-0 with 16-bit weights was a BF16_Optimizer; no later release resumes it."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(
        not OLD.is_dir(),
        reason=f"pip install --no-deps --no-build-isolation --target {OLD} deepspeed=={RELEASE}",
    ),
]


def use(old: bool) -> None:
    """Import one of the two releases in this process."""
    if old:
        sys.path.insert(0, str(OLD))
    version = importlib.import_module("deepspeed").__version__
    assert (version == RELEASE) == old, version


def train_by(
    rank: int, world_size: int, old: bool, runs: Mapping[str, DeepSpeedConfig]
) -> dict[str, Any]:
    use(old)
    return train(rank, world_size, runs)


def resume_by(
    rank: int, world_size: int, old: bool, runs: Mapping[str, DeepSpeedConfig]
) -> dict[str, Any]:
    use(old)
    return resume(rank, world_size, runs)


def save_again(rank: int, world_size: int, old: Path, new: Path) -> None:
    use(old=False)
    trainer = TinyDeepSpeed(MOE, seed=1)
    trainer.load(old)
    trainer.save(new)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of `WRITER/KIND` runs and `merged/WRITER/KIND`, and what rank 0 held, by both."""
    folder = tmp_path_factory.mktemp("releases")
    held = {}
    for writer, kinds in (
        ("old", {**KINDS, **ONLY_OLD}),
        ("new", {kind: KINDS[kind] for kind in NEW}),
    ):
        runs = {str(folder / writer / kind): config for kind, config in kinds.items()}
        if writer == "old":
            runs[str(folder / "moe")] = MOE
        found = run_ranks(train_by, 2, writer == "old", runs, timeout_s=800)[0]
        for kind in kinds:
            held[writer, kind] = found[str(folder / writer / kind)]
            tags = [tag(folder / writer / kind, number) for number in (2, 4, 6)]
            merge_tags(tags, folder / "merged" / writer / kind)
    return folder, held


def merge_tags(tags: Sequence[Path], save: Path, **settings: Any) -> Path:
    settings["selection"] = SelectionRequest(paths=tuple(map(str, tags)))
    (output,) = merge(request_for(tags[-1].parent, save, **settings)).outputs
    assert verify(Path(output)).worst <= 1
    return Path(output)


def check(found: Any, sources: Sequence[Mapping[str, Any]], what: str) -> None:
    """Main params are the float64 average, weights are them rounded, and a still step keeps it."""
    client_state, before, after = found
    check_masters(before["masters"], sources, what)
    for name, got in before["masters"].items():
        assert torch.equal(after["masters"][name], got), (what, name)
    check_weights(before, torch.bfloat16)
    check_weights(after, torch.bfloat16)
    assert before["scheduler"] == sources[-1]["scheduler"]
    assert client_state["note"] == "saved after 6"
    assert client_state["pma"]["iterations"] == [2, 4, 6]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("reader", ["old", "new"])
def test_each_release_resumes_what_the_other_wrote(
    made: tuple[Path, dict[str, Any]], reader: str
) -> None:
    folder, held = made
    wanted = [("old", kind) for kind in KINDS]
    if reader == "old":
        wanted += [("old", kind) for kind in ONLY_OLD] + [("new", kind) for kind in NEW]
    configs = {**KINDS, **ONLY_OLD}
    roots = {str(folder / "merged" / w / kind): configs[kind] for w, kind in wanted}
    found = run_ranks(resume_by, 2, reader == "old", roots, timeout_s=800)[0]
    for writer, kind in wanted:
        root = str(folder / "merged" / writer / kind)
        check(found[root], held[writer, kind], f"{writer} {kind} in {reader}")


@pytest.mark.parametrize("kind", NEW)
def test_a_run_that_changed_its_release_merges(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    folder, held = made
    tags = [tag(folder / "old" / kind, 4), tag(folder / "new" / kind, 6)]
    save = tmp_path / "save"
    # DeepSpeed stopped to round buffers in 0.19.2.
    with refused(
        PlanError, "mean", "bfloat16", "overrides=(('mean', 'newest'),)", run=tags[0], save=save
    ):
        merge_tags(tags, save)
    output = merge_tags(tags, save, policy=Policy(overrides=(("mean*", "newest"),)))
    merged = read_source(str(output), {}, True).space.states["param"]
    assert set(merged) == set(held["old", kind][1]["masters"])
    for name, tensor in merged.items():
        pair = (held["old", kind][1], held["new", kind][2])
        exact = [each["masters"][name].double().numpy() for each in pair]
        assert_average(read_tensor(output, tensor), exact, (0.5, 0.5), name)


def test_moe_that_does_not_name_its_params_is_saved_again_by_the_newer_release(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    refs = list_checkpoints(made[0] / "moe")
    assert all("resume it with a newer DeepSpeed" in str(ref.incomplete_because) for ref in refs)
    run_ranks(save_again, 2, made[0] / "moe", tmp_path / "again")
    (ref,) = list_checkpoints(tmp_path / "again")
    assert ref.complete
    assert ref.iteration == 6
