"""Vocabularies that are padded otherwise among the sources, in a run that changed its TP size."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import folder_of, refused
from oracle import assert_average, global_tensors, read_by_torch, read_tensor
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge, plan, verify
from pma_megatron.errors import PlanError, VerifyError
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

TOKENS, DIVISOR = 257, 8
FULLY, FLAT = "fully_reshardable", "dp_reshardable"
NARROW = TinyConfig(vocab_size=264, optim_format=FULLY)
WIDE = replace(NARROW, vocab_size=272, tensor_model_parallel_size=2)
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
STATES = {"main_params": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
PHASES = ((NARROW, 4), (WIDE, 6), (NARROW, 8))
"""The run goes on from its newest checkpoint under another TP size: configuration, iteration."""


def train(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    """What was held at each save; each is made in both layouts of the optimizer."""
    held = []
    for config, iteration in PHASES:
        trainer = TinyTrainer(config)
        trainer.args = {"vocab_size": TOKENS, "make_vocab_size_divisible_by": DIVISOR}
        if held:
            trainer.load(f"{folder}/{FULLY}")
        trainer.train(iteration - trainer.iteration)
        for layout in (FULLY, FLAT):
            trainer.config = replace(config, optim_format=layout)
            trainer.save(f"{folder}/{layout}")
        held.append(trainer.snapshot())
        trainer.close()
    return held


def resume(rank: int, world_size: int, merges: dict[str, TinyConfig]) -> dict[str, Any]:
    """Per merge: what was loaded, the weights after a step with lr 0, and one step's loss."""
    found = {}
    for root, config in merges.items():
        trainer = TinyTrainer(config)
        trainer.load(root)
        loaded = trainer.snapshot()
        trainer.step_with_lr_zero()
        found[root] = loaded, trainer.model_params(), trainer.train(1)[0]
        trainer.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder of the run in both layouts, and the global tensors of each save."""
    folder = tmp_path_factory.mktemp("padded")
    states = run_ranks(train, 2, str(folder))
    saves = [[[rank[number]] for rank in states] for number in range(len(PHASES))]
    return folder, saves


def of_save(saves: list[Any], what: str, number: int) -> dict[str, np.ndarray]:
    return {key: found[0] for key, found in global_tensors(saves[number], what).items()}


def request(runs: Path, layout: str, save: Path, iterations: tuple[int, ...]) -> MergeRequest:
    paths = tuple(str(folder_of(runs / layout, each)) for each in iterations)
    return MergeRequest(
        load=str(runs / layout),
        save=str(save),
        selection=SelectionRequest(paths=paths),
        policy=Policy(optimizer_state="average"),
    )


@pytest.fixture(scope="module")
def merged(runs: tuple[Path, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, iterations) -> the merge of those."""
    folder, made = tmp_path_factory.mktemp("merged"), {}
    for layout in (FULLY, FLAT):
        for iterations in ((4, 6), (4, 6, 8)):
            save = folder / f"{layout}-{len(iterations)}"
            outcome = merge(request(runs[0], layout, save, iterations))
            made[layout, iterations] = Path(outcome.outputs[0])
    return made


CASES = [(layout, each) for layout in (FULLY, FLAT) for each in ((4, 6), (4, 6, 8))]


@pytest.mark.parametrize("layout, iterations", CASES)
def test_rows_that_all_have_are_averaged_and_padding_is_the_newest_s(
    layout: str, iterations: tuple[int, ...], runs: tuple[Path, list[Any]], merged: Any
) -> None:
    """Main params and moments; weights are main params rounded, padding included."""
    folder, (_, saves) = merged[layout, iterations], runs
    output = read_source(str(folder), {}, True)
    for what, state in STATES.items():
        sources = [of_save(saves, what, number) for number in range(len(iterations))]
        for key, newest in sources[-1].items():
            got = read_tensor(folder, output.space.states[state][key])
            assert got.shape == newest.shape, key
            rows = min(each[key].shape[0] for each in sources)
            assert (rows == 264) == (key in PADDED), key
            parts = [each[key][:rows] for each in sources]
            assert_average(got[:rows], parts, (1 / len(parts),) * len(parts), f"{state} {key}")
            assert np.array_equal(got[rows:], newest[rows:]), f"{state} {key}"
            if state == "param":
                rounded = torch.from_numpy(got).float().bfloat16()
                assert torch.equal(read_by_torch(folder, [key])[key], rounded), key
    verify(folder, deep=True)


def test_megatron_resumes_in_the_newest_s_layout(merged: Any) -> None:
    """A step with learning rate 0 changes nothing; the next one trains."""
    configs = {(4, 6): WIDE, (4, 6, 8): NARROW}
    roots = {
        str(folder.parent): replace(configs[iterations], optim_format=layout)
        for (layout, iterations), folder in merged.items()
    }
    for rank in run_ranks(resume, 2, roots):
        for root, (loaded, after, loss) in rank.items():
            assert np.isfinite(loss), root
            for name, weight in loaded["model_params"].items():
                assert torch.equal(weight, after[name]), (root, name)
                main = loaded["main_params"][name]
                assert torch.equal(main.to(weight.dtype), weight), (root, name)


def test_it_is_said(runs: tuple[Path, list[Any]], merged: Any, tmp_path: Path) -> None:
    """In the plan's table and notes, and in `pma.json`."""
    planned = plan(request(runs[0], FULLY, tmp_path / "pma", (4, 6)))
    rows = [row for row in planned.table if "rows from 264 on" in row.why]
    assert {row.state for row in rows} == {"main params", "weight", "exp_avg", "exp_avg_sq"}
    assert all(row.entries == 2 and row.example in PADDED for row in rows)
    (note,) = (each for each in planned.selection.notes if "padded to" in each)
    assert "264, 272" in note and "rows 264 to 271" in note and all(key in note for key in PADDED)
    recorded = json.loads((merged[FULLY, (4, 6)] / "pma.json").read_text())["plan"]
    assert note in recorded["notes"]
    assert [row for row in recorded["policy"] if "rows from 264 on" in row["why"]]


def merge_over_ranks(rank: int, world_size: int, requests: list[MergeRequest]) -> None:
    for each in requests:
        merge(each)


def test_ranks_do_not_change_the_result(
    runs: tuple[Path, list[Any]], merged: Any, tmp_path: Path
) -> None:
    """Two ranks that share the tensors write the same bytes; two that share the sources agree."""
    asked = request(runs[0], FLAT, tmp_path / "two", (4, 6))
    grid = replace(asked, save=str(tmp_path / "grid"), merge_parallel_size=2)
    run_ranks(merge_over_ranks, 2, [asked, grid])
    one, two = merged[FLAT, (4, 6)], folder_of(tmp_path / "two", 6)
    names = [path.name for path in one.glob("*.distcp")]
    assert names and all((one / n).read_bytes() == (two / n).read_bytes() for n in names)
    verify(folder_of(tmp_path / "grid", 6), deep=True)


def test_deep_finds_an_edit_in_the_padding(merged: Any, tmp_path: Path) -> None:
    """A row of a moment that is not the newest's, and no checksum that could tell."""
    folder = Path(shutil.copytree(merged[FULLY, (4, 6)], tmp_path / "run" / "iter_0000006"))
    moment = read_source(str(folder), {}, True).space.states["exp_avg"][PADDED[1]]
    piece = max(moment.pieces, key=lambda each: each.box.offsets[0] + each.box.sizes[0])
    row = read_tensor(folder, moment)[-1].astype(np.float32).tobytes()
    record, _ = ItemFiles(folder).find(piece.payload)
    path, first, last = folder / record.file, record.start, record.start + record.nbytes
    data = path.read_bytes()
    at = data.rindex(row, first, last)
    edited = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
    crcs = [zlib.crc32(each[first:last]).to_bytes(4, "little") for each in (data, edited)]
    path.write_bytes(edited.replace(*crcs))
    with pytest.raises(VerifyError, match=PADDED[1]):
        verify(folder, deep=True, full=False)


@pytest.mark.parametrize(
    ("iteration", "changes", "words"),
    [
        (4, {"vocab_size": 260}, ("vocab_size is 260 there and 257 in the newest",)),
        (4, {"padded_vocab_size": 256}, ("padded_vocab_size is 256",)),
        (4, {"make_vocab_size_divisible_by": None}, ("do not say how it is padded",)),
        (6, {"make_vocab_size_divisible_by": 4}, ("no one vocabulary", "multiple of 8")),
        (6, {"tokenizer_model": "/models/other"}, ("tokenizer_model", "/models/other")),
    ],
    ids=["tokens", "size", "silent", "multiple", "tokenizer"],
)
def test_what_padding_does_not_explain_is_refused(
    iteration: int,
    changes: dict[str, Any],
    words: tuple[str, ...],
    runs: tuple[Path, list[Any]],
    tmp_path: Path,
) -> None:
    """Rows of other tokens have no average, whatever their number."""
    run, save = tmp_path / FULLY, tmp_path / "pma"
    for each in (4, 6):
        shutil.copytree(folder_of(runs[0] / FULLY, each), folder_of(run, each))
    path = folder_of(run, iteration) / "common.pt"
    common = torch.load(path, weights_only=False)
    vars(common["args"]).update(changes)
    torch.save(common, path)
    told = ("264 rows", "272 in the newest", PADDED[0], "leave what is from before", *words)
    with refused(PlanError, *told, run=run, save=save):
        merge(request(tmp_path, FULLY, save, (4, 6)))
