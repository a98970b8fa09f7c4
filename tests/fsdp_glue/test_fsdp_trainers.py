"""Trainers on FSDP2, themselves, on a CPU: they train, and go on from an average of their saves.

Accelerate and Hugging Face's Trainer choose FSDP for ranks with GPUs alone; that one choice is made
for them here. Lightning and torchtitan (`test_torchtitan`) run where they are installed, which the
`test` extra does not ask for: `pip install lightning torchtitan triton`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import request_for
from fsdp_runs import averaged, launched, merged, moments_of, the_newest, weights_of
from pma_megatron import Policy, export_model, list_checkpoints, merge
from pma_megatron.merging.report import how_to_resume
from pma_megatron.testing import run_ranks
from pma_megatron.testing.plain_reads import assert_within_one_rounding, same_bytes

pytestmark = pytest.mark.slow
STATE = "state of the trainer: schedule, random states, progress"


# Accelerate and Hugging Face's Trainer.


def fsdp_on_cpu() -> None:
    """Accelerate's own choice of FSDP, which it makes where ranks have GPUs."""
    state = importlib.import_module("accelerate.state")
    kinds = importlib.import_module("accelerate.utils").DistributedType
    begin = state.AcceleratorState.__init__

    def chosen(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == kinds.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = kinds.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = kinds.FSDP

    state.AcceleratorState.__init__ = chosen


def accelerate_on(rank: int, world_size: int, root: str, resume: str = "") -> Any:
    """Six steps with three saves, or two steps after a load. What was held at each."""
    launched(rank, world_size)
    fsdp_on_cpu()
    accelerate = importlib.import_module("accelerate")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    torch.manual_seed(5 if resume else 0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    held, draw = [], torch.Generator().manual_seed(rank)

    def look() -> Any:
        inner = optimizer.optimizer
        return weights_of(model), moments_of(model, inner), inner.param_groups[0]["lr"]

    if resume:
        accelerator.load_state(resume)
        held.append(look())
    for step in range(1, 3 if resume else 7):
        accelerator.backward(model(torch.randn(4, 5, generator=draw)).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 2 == 0 and not resume:
            accelerator.save_state(f"{root}/step_{step}")
            held.append(look())
    return held


def test_accelerate_goes_on_from_an_average_under_fsdp2(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    root = tmp_path / "run"
    held = run_ranks(accelerate_on, 2, str(root), timeout_s=800)[0]
    output = merged(root, tmp_path / "out", STATE)
    assert how_to_resume(output) == f'accelerator.load_state("{output}")'
    alone = request_for(root, tmp_path / "alone", policy=Policy(optimizer_state="drop"))
    assert "load_fsdp_model" in merge(alone).resume[0], "an optimizer is not there to be loaded"
    for ranks in (2, 3):
        (weights, moments, rate) = run_ranks(accelerate_on, ranks, "", str(output))[0][0]
        averaged(weights, [each[0] for each in held])
        the_newest(moments, held[-1][1])
        assert rate == held[-1][2]


def trainer_on(rank: int, world_size: int, root: str, resume: str | None = None) -> Any:
    """Six steps of Hugging Face's Trainer, or two after a resume. What was held at each save."""
    launched(rank, world_size)
    fsdp_on_cpu()
    hf = importlib.import_module("transformers")
    torch.manual_seed(5 if resume else 0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = hf.LlamaConfig(vocab_size=31, num_attention_heads=2, **sizes)
    model, held = hf.LlamaForCausalLM(config), []
    model.config.save_pretrained(f"{root}.config")

    def look() -> Any:
        live, optimizer = trainer.model_wrapped, trainer.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        return weights_of(live), moments_of(live, inner), inner.param_groups[0]["lr"]

    class Look(hf.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            held.append(look())

        on_save = on_train_begin

    fsdp = {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    arguments = hf.TrainingArguments(
        output_dir=root,
        use_cpu=True,
        fsdp="full_shard",
        fsdp_config=fsdp,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=8 if resume else 6,
        save_steps=2,
        include_num_input_tokens_seen=True,
        report_to=[],
        disable_tqdm=True,
    )
    draw = torch.Generator().manual_seed(1)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(31, (64, 8), generator=draw)]
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Look()])
    trainer.train(resume_from_checkpoint=resume)
    return held, trainer.state.global_step


def test_hugging_face_trainer_goes_on_from_an_average_under_fsdp2(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    root = tmp_path / "run"
    held = run_ranks(trainer_on, 2, str(root), timeout_s=800)[0][0][1:]
    refs = list_checkpoints(root)
    assert [(ref.iteration, ref.consumed_tokens) for ref in refs] == [(2, 64), (4, 128), (6, 192)]
    output = merged(root, tmp_path / "out", STATE, interval_tokens=64)
    newest = root / "checkpoint-6"
    assert {p.name for p in output.iterdir()} == {
        *(p.name for p in newest.iterdir()),
        *("pma.json", "pma.json.sha256"),
    }
    for name in ("trainer_state.json", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert (output / name).read_bytes() == (newest / name).read_bytes()
    assert how_to_resume(output) == f'trainer.train(resume_from_checkpoint="{output}")'
    again = str(tmp_path / "again")
    ((weights, moments, rate), *_), step = run_ranks(trainer_on, 2, again, str(output))[0]
    averaged(weights, [each[0] for each in held])
    the_newest(moments, held[-1][1])
    assert (rate, step) == (held[-1][2], 8)
    opened_by_transformers(output, tmp_path, weights)

    stale = {name: value.bfloat16() for name, value in held[-1][0].items()}
    save_file(stale, newest / "model.safetensors")
    remade = request_for(root, tmp_path / "remade")
    made = load_file(Path(merge(remade).outputs[0]) / "model.safetensors")
    for name, value in made.items():
        parts = [each[0][name].double() for each in held[-2:]]
        assert_within_one_rounding(value, parts, name)
    assert made.keys() == stale.keys()

    (newest / "trainer_state.json").unlink()
    torn = list_checkpoints(root)[-1]
    assert torn.writing and "trainer_state.json" in str(torn.incomplete_because)
    (newest / "trainer_state.json").write_text('{"global_step": 4}')
    assert "trainer_state.json in it 4" in str(list_checkpoints(root)[-1].incomplete_because)


def opened_by_transformers(output: Path, tmp_path: Path, weights: Any) -> None:
    """The average as a model for others: those of the trainer, to the bit."""
    model = tmp_path / "model"
    export_model(output, save=model, like=tmp_path / "run.config", dtype="fp32")
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    opened, problems = auto.from_pretrained(model, output_loading_info=True)
    assert not any(problems.values())
    assert all(same_bytes(value, weights[name]) for name, value in opened.state_dict().items())


# Lightning.


def lightning_on(rank: int, world_size: int, root: str, resume: str | None = None) -> Any:
    """Six steps under `ModelParallelStrategy`, or two after a resume. What was held at saves."""
    launched(rank, world_size)
    pl = importlib.import_module("lightning.pytorch")
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    held = []

    def look(trainer: Any) -> Any:
        optimizer = trainer.optimizers[0]
        rate = optimizer.param_groups[0]["lr"]
        model = trainer.lightning_module
        return weights_of(model), moments_of(model, optimizer), rate, trainer.global_step

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5 if resume else 0)
            self.a, self.b = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def configure_model(self) -> None:
            for module in (self.a, self.b, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
            return [optimizer], [{"scheduler": decay, "interval": "step"}]

        def training_step(self, batch: Any, _: int) -> Any:
            self.calls += 1
            return self.b(torch.tanh(self.a(batch[0]))).square().mean()

    class Look(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, _: Any) -> None:
            held.append(look(trainer))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step % 2 == 0:
                held.append(look(trainer))

    strategies = importlib.import_module("lightning.pytorch.strategies")
    callbacks = importlib.import_module("lightning.pytorch.callbacks")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.ModelParallelStrategy(world_size, tensor_parallel_size=1),
        max_steps=8 if resume else 6,
        callbacks=[
            Look(),
            callbacks.ModelCheckpoint(dirpath=root, every_n_train_steps=2, save_top_k=-1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    draw = torch.Generator().manual_seed(1)
    rows = torch.utils.data.TensorDataset(torch.randn(64, 5, generator=draw))
    data = torch.utils.data.DataLoader(rows, batch_size=2)
    trainer.fit(Model(), data, ckpt_path=resume)
    return held


def test_lightning_goes_on_from_an_average_under_fsdp2(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    root = tmp_path / "run"
    held = run_ranks(lightning_on, 2, str(root), timeout_s=800)[0][1:]
    assert [ref.iteration for ref in list_checkpoints(root)] == [2, 4, 6]
    output = merged(root, tmp_path / "out", "where Lightning's loops and callbacks stood")
    assert output.name == "epoch=0-step=6.ckpt"
    assert how_to_resume(output) == f'trainer.fit(model, ckpt_path="{output}")'
    for ranks in (2, 1):
        again = str(tmp_path / f"again{ranks}")
        found = run_ranks(lightning_on, ranks, again, str(output), timeout_s=800)[0]
        weights, moments, rate, step = found[0]
        averaged(weights, [each[0] for each in held])
        the_newest(moments, held[-1][1])
        assert (rate, step) == held[-1][2:] and found[-1][3] == 8
