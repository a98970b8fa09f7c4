"""Trainers that give every tag of DeepSpeed a root of its own, and resume from a merge."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from safetensors.torch import load_file, save_file

from conftest import digests
from deepspeed_runs import AROUND, check_masters, merge_run, records, surrounded, tag
from pma_megatron import MergeRequest, SelectionRequest, inspect, list_checkpoints, verify
from pma_megatron.errors import CheckpointError
from pma_megatron.merging.report import how_to_resume
from pma_megatron.testing import run_ranks
from pma_megatron.testing.plain_reads import assert_within_one_rounding
from pma_megatron.watching.follow import watch
from pma_megatron.watching.request import WatchRequest


def test_tags_below_numbered_folders_are_one_run(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, name in ((2, "checkpoint-2"), (4, "checkpoint_4"), (6, "checkpoint-6")):
        shutil.copytree(tag(flat, number), tag(out / name, number))
        (out / name / "latest").write_text(f"global_step{number}")
    shutil.copytree(flat, out / "another_run")
    assert [(ref.iteration, ref.complete) for ref in list_checkpoints(out)] == [
        (2, True),
        (4, True),
        (6, True),
    ]
    ours = merge_run(out, tmp_path / "merged" / "checkpoint-6")
    theirs = merge_run(flat, tmp_path / "merged-flat")
    for file in theirs.glob("*.pt"):
        mine, flat_file = records(ours / file.name), records(file)
        assert {n for n in flat_file if mine[n] != flat_file[n]} <= {"data.pkl"}  # sources' paths
        assert set(mine) == set(flat_file)
    assert (ours.parent / "latest").read_text() == "global_step6"


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("lost", ["marker", "files of the checkpoint", "all"])
def test_a_torn_newest_save_is_listed_by_number(
    flat: Path, tmp_path: Path, kind: str, lost: str
) -> None:
    newest = surrounded(flat, tmp_path / "run", kind)[6]
    inside = newest / AROUND[kind][1].format(6)
    if lost == "marker":
        (newest / AROUND[kind][2]).unlink()
    elif lost == "all":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        for file in inside.iterdir():
            file.unlink()
    refs = list_checkpoints(tmp_path / "run")
    assert [(ref.iteration, ref.complete) for ref in refs] == [(2, True), (4, True), (6, False)]
    assert refs[-1].writing and newest in (Path(refs[-1].path), Path(refs[-1].path).parent)
    why = str(refs[-1].incomplete_because)
    assert AROUND[kind][2] in why if lost == "marker" else "cut off" in why


@pytest.mark.parametrize(
    ("state", "name", "said"),
    [
        ('{"global_step": 4}', "checkpoint-6", "says iteration 6, trainer_state.json in it 4"),
        ('{"global_step": 4}', "six", "says iteration 4, the checkpoint beside it 6: of two saves"),
        ('{"global_step": 6}', "checkpoint-8", "says iteration 8, trainer_state.json in it 6"),
        ('{"global_st', "checkpoint-6", "trainer_state.json"),
        ('{"global_step": "six"}', "checkpoint-6", "global_step"),
    ],
)
def test_state_of_another_save_than_the_tag(
    flat: Path, tmp_path: Path, state: str, name: str, said: str
) -> None:
    newest = surrounded(flat, tmp_path / "run", "trainer")[6]
    (newest / "trainer_state.json").write_text(state)
    newest.rename(newest.with_name(name))
    refs = list_checkpoints(tmp_path / "run")
    assert [(ref.iteration, ref.complete) for ref in refs] == [(2, True), (4, True), (6, False)]
    assert said in str(refs[-1].incomplete_because)


def test_engines_count_may_lag_behind_the_trainers(flat: Path, tmp_path: Path) -> None:
    newest = surrounded(flat, tmp_path / "run", "trainer")[6]
    (newest / "trainer_state.json").write_text('{"global_step": 7}')
    newest.rename(newest.with_name("checkpoint-7"))
    refs = list_checkpoints(tmp_path / "run")
    assert [(ref.iteration, ref.complete) for ref in refs] == [(2, True), (4, True), (6, True)]


@pytest.mark.parametrize("kind", AROUND)
def test_a_final_model_beside_them_does_not_hide_the_saves(
    flat: Path, tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "run"
    surrounded(flat, root, kind)
    save_file({"w": torch.zeros(3)}, root / "model.safetensors")
    (root / "config.json").write_text("{}")
    found = [(ref.iteration, ref.complete) for ref in list_checkpoints(root)]
    assert found == [(2, True), (4, True), (6, True)]


@pytest.mark.parametrize("kind", AROUND)
def test_links_and_copies_of_a_save_are_not_listed_twice(
    flat: Path, tmp_path: Path, kind: str
) -> None:
    saves = surrounded(flat, tmp_path / "run", kind)
    (tmp_path / "run" / "best").symlink_to(saves[4].name)
    if kind == "lightning":
        shutil.copytree(saves[6], tmp_path / "run" / "last.ckpt")
    refs = list_checkpoints(tmp_path / "run")
    assert [ref.folder for ref in refs] == [str(saves[n]) for n in (2, 4, 6)]
    if kind == "lightning":
        shutil.rmtree(saves[6])
        assert [ref.iteration for ref in list_checkpoints(tmp_path / "run")] == [2, 4, 6]


@pytest.mark.parametrize("kind", [None, *AROUND])
def test_a_watch_deletes_no_average_that_training_saved_over(
    flat: Path, tmp_path: Path, kind: str | None
) -> None:
    """No file of these says what lies where, and all small ones may be as they were."""
    saves = {n: tag(flat, n) for n in (2, 4, 6)}
    if kind is not None:
        saves = surrounded(flat, tmp_path / "all", kind)
    run, averages = tmp_path / "run", tmp_path / "averages"
    how = WatchRequest(
        merge=MergeRequest(
            load=str(run), save=str(averages), selection=SelectionRequest(last=2), threads=1
        ),
        once=True,
        keep=1,
    )
    for number in (2, 4):
        shutil.copytree(saves[number], run / saves[number].name)
    made = watch(how, tell=lambda _: None).published
    assert made == (str(averages / saves[4].name),)
    shutil.copytree(saves[4], made[0], dirs_exist_ok=True)
    before = digests(Path(made[0]))
    shutil.copytree(saves[6], run / saves[6].name)
    told: list[dict[str, Any]] = []
    assert watch(how, tell=told.append).failed is not None
    assert "training has saved a checkpoint over the average" in str(told[-1])
    assert digests(Path(made[0])) == before


def test_inspect_names_a_folder_that_is_there(flat: Path, tmp_path: Path) -> None:
    newest = surrounded(flat, tmp_path / "run", "trainer")[6]
    with pytest.raises(CheckpointError, match=rf"for instance {newest} \("):
        inspect(tmp_path / "run")
    assert inspect(newest).ref.iteration == 6


def set_up(rank: int, world_size: int) -> None:
    """What launchers of these trainers set, for ranks that have met already."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False


def trainer_on(rank: int, world_size: int, out: str, stage: int, **settings: Any) -> Any:
    """Train with Hugging Face's Trainer; returns main params at every save, steps, and the end."""
    set_up(rank, world_size)
    hf, get = importlib.import_module("transformers"), importlib.import_module("deepspeed.utils")
    torch.manual_seed(settings.pop("seed", 0))
    config = hf.LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model, held = hf.LlamaForCausalLM(config), []

    def look(trainer: Any) -> dict[str, torch.Tensor]:
        named = trainer.model_wrapped.module.named_parameters()
        return {name: get.safe_get_full_fp32_param(p).detach().clone() for name, p in named}

    class Look(hf.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            held.append({"masters": look(trainer)})

        def on_save(self, *_: Any, **__: Any) -> None:
            held.append({"masters": look(trainer)})

    zero = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    resume = settings.pop("resume", None)
    arguments = hf.TrainingArguments(
        output_dir=out,
        deepspeed=zero,
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    draw = torch.Generator().manual_seed(1)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(31, (64, 8), generator=draw)]
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Look()])
    trainer.train(resume_from_checkpoint=resume)
    return held, trainer.state.global_step


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_face_trainer_resumes_from_the_average(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    out = tmp_path / "out"
    held = run_ranks(trainer_on, 2, str(out), stage, max_steps=6, timeout_s=800)[0][0][1:]
    whole = digests(out)
    merged = merge_run(out, tmp_path / "merged")
    assert merged == tmp_path / "merged" / "checkpoint-6" and digests(out) == whole
    theirs = {p.name for p in (out / "checkpoint-6").iterdir()}
    ours = {p.name for p in merged.iterdir()}
    weights = {name for name in theirs if name.startswith("model") or "pytorch_model" in name}
    assert (stage == 3) is not bool(weights), "ZeRO-2 saves the model's weights beside the tag"
    assert ours == theirs | {"pma.json", "pma.json.sha256"}
    if weights:
        check_model(merged, out / "checkpoint-6", held)
    assert (merged / "latest").read_text() == "global_step6"
    assert how_to_resume(merged) == f'trainer.train(resume_from_checkpoint="{merged}")'
    verify(tmp_path / "merged")
    again = str(tmp_path / "again")
    (before, *_), step = run_ranks(
        trainer_on, 2, again, stage, resume=str(merged), max_steps=8, seed=1, timeout_s=800
    )[0]
    check_masters(before["masters"], held, "Trainer")
    assert step == 8


def check_model(merged: Path, newest: Path, held: list[dict[str, Any]]) -> None:
    """The model beside the tag is the average of the trainer's own main params, rounded once."""
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    opened, problems = auto.from_pretrained(merged, output_loading_info=True)
    assert not any(problems.values())
    old, new = (load_file(folder / "model.safetensors") for folder in (newest, merged))
    assert [(n, v.dtype, v.shape) for n, v in new.items()] == [
        (n, v.dtype, v.shape) for n, v in old.items()
    ]
    for name, value in new.items():
        assert not torch.equal(value, old[name]), f"{name} is the newest's"
        parts = [each["masters"][name].double() for each in held]
        assert_within_one_rounding(value, parts, name)
        assert torch.equal(opened.state_dict()[name], value)


STEPS = (2, 4, 6)


def accelerate_on(rank: int, world_size: int, out: str, resume: str = "") -> list[Any]:
    """Train with Accelerate under ZeRO-2; at every save also what Lightning's strategy writes.

    Lightning is not installed: its `DeepSpeedStrategy.save_checkpoint` calls the engine as here.
    Returns main params at every save, or what each of two loads gave.
    """
    set_up(rank, world_size)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate = importlib.import_module("accelerate")
    get = importlib.import_module("deepspeed.utils")
    zero = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=zero)
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16")
    torch.manual_seed(1 if resume else 0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, optimizer = accelerator.prepare(model, optimizer)

    def look() -> dict[str, Any]:
        named = engine.module.named_parameters()
        values = {n: get.safe_get_full_fp32_param(p).detach().clone() for n, p in named}
        return {"masters": values}

    if resume:
        accelerator.load_state(f"{resume}/accelerate/step_6")
        found = [look()]
        with torch.no_grad():
            for param in engine.module.parameters():
                param.zero_()
        engine.load_checkpoint(f"{resume}/lightning/epoch=0-step=6.ckpt")
        return [*found, look()]
    held, draw = [], torch.Generator().manual_seed(rank)
    for step in range(1, STEPS[-1] + 1):
        loss = engine(torch.randn(2, 5, generator=draw).bfloat16()).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            accelerator.save_state(f"{out}/accelerate/step_{step}")
            engine.save_checkpoint(f"{out}/lightning/epoch=0-step={step}.ckpt", tag="checkpoint")
            held.append(look())
    return held


@pytest.mark.slow
def test_accelerate_and_what_lightning_writes_resume_from_averages(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    out, merged = tmp_path / "out", tmp_path / "merged"
    held = run_ranks(accelerate_on, 2, str(out), timeout_s=800)[0]
    names = {"accelerate": "step_6", "lightning": "epoch=0-step=6.ckpt"}
    for trainer, name in names.items():
        assert [ref.iteration for ref in list_checkpoints(out / trainer)] == list(STEPS)
        assert merge_run(out / trainer, merged / trainer) == merged / trainer / name
        theirs = {p.name for p in (out / trainer / name).iterdir()}
        ours = {p.name for p in (merged / trainer / name).iterdir()}
        assert ours == theirs | {"pma.json", "pma.json.sha256"}
        verify(merged / trainer)
        assert str(merged / trainer / name) in how_to_resume(merged / trainer / name)
    found = run_ranks(accelerate_on, 2, "", str(merged), timeout_s=800)[0]
    for each, what in zip(found, names, strict=True):
        check_masters(each["masters"], held, what)
