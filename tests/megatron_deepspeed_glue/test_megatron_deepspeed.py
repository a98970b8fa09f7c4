"""The hooks in Megatron-DeepSpeed: on a stand-in for its tree that trains a real engine.

The stand-in has the functions that are hooked, with their real parameters, and loads and saves as
they do. With MEGATRON_DEEPSPEED_PATH (a source tree) the hooks are held against the real ones.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from test_deepspeed_online import assert_same_tag

from conftest import request_for
from pma_megatron import SelectionRequest, launch, merge
from pma_megatron.megatron_deepspeed.install import TARGETS
from pma_megatron.testing import run_ranks

TREE = os.environ.get("MEGATRON_DEEPSPEED_PATH")
SEQ, BATCH = 8, 8
_STAND_IN = {
    "__init__": "import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n",
    "global_vars": """
ARGS = None
def get_args():
    assert ARGS is not None, "args is not initialized."
    return ARGS
def set_args(args):
    global ARGS
    ARGS = args
def get_tensorboard_writer():
    return None
get_wandb_writer = get_tensorboard_writer
""",
    "arguments": """
import argparse
def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("load", "save", "load-tag"):
        parser.add_argument(f"--{name}")
    for name in ("finetune", "deepspeed", "universal-checkpoint"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("train-iters", "save-interval", "stage"):
        parser.add_argument(f"--{name}", type=int)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    args = parser.parse_args()
    args.seq_length, args.consumed_train_samples, args.consumed_valid_samples = 8, 0, 0
    return args
""",
    "initialize": """
from megatron.arguments import parse_args
from megatron.global_vars import set_args
def initialize_megatron(extra_args_provider=None):
    set_args(parse_args(extra_args_provider))
""",
    "checkpointing": """
from megatron import global_vars
def save_checkpoint(iteration, model, optimizer, opt_param_scheduler):
    args, module = global_vars.get_args(), model[0].module
    plain = module.state_dict
    def nested(destination=None, prefix="", keep_vars=False):
        state, found = plain(prefix=prefix, keep_vars=keep_vars), {}
        for name, value in state.items():
            inner, _, last = name.rpartition(".")
            (found.setdefault(inner, {}) if inner else found)[last] = value
        return found
    module.state_dict = nested
    model[0].save_checkpoint(args.save, client_state={"args": args, "iteration": iteration})
    module.state_dict = plain
def load_checkpoint(model, optimizer, opt_param_scheduler, load_arg="load", strict=True,
                    load_only_weights=False):
    args = global_vars.get_args()
    plain = model[0].module.load_state_dict
    def load_state_dict(state, strict=True):
        inner = {f"{name}.{last}": v for name, value in state.items() if isinstance(value, dict)
                 for last, v in value.items()}
        plain({k: v for k, v in state.items() if not isinstance(v, dict)} | inner, strict=strict)
    model[0].module.load_state_dict = load_state_dict
    loaded, state = model[0].load_checkpoint(
        getattr(args, load_arg), load_module_strict=strict, tag=args.load_tag)
    args.consumed_train_samples = state["args"].consumed_train_samples
    return state["iteration"]
""",
    "training": """
import torch
from megatron.checkpointing import load_checkpoint, save_checkpoint
from megatron.global_vars import get_args
from megatron.initialize import initialize_megatron
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed
def setup_model_and_optimizer(model_provider_func, model_type):
    global TRAINER
    args = get_args()
    TRAINER = TinyDeepSpeed(DeepSpeedConfig(stage=args.stage))
    model, optimizer, scheduler = [TRAINER.engine], TRAINER.engine.optimizer, TRAINER.scheduler
    args.iteration = 0
    if args.load is not None:
        args.iteration = load_checkpoint(model, optimizer, scheduler)
    return model, optimizer, scheduler
def training_log(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale,
                 report_memory_flag, skipped_iter, grad_norm, params_norm, num_zeros_in_grad,
                 model=None, optimizer=None):
    pass
def evaluate(forward_step_func, data_iterator, model, process_non_loss_data_func, config,
             verbose=False):
    model[0].eval()
    with torch.no_grad():
        loss = model[0](next(data_iterator))
    model[0].train()
    get_args().consumed_valid_samples += 8
    return {"lm loss": loss}, None
def evaluate_and_print_results(prefix, forward_step_func, data_iterator, model, iteration,
                               process_non_loss_data_func, config, verbose=False,
                               write_to_tensorboard=True, test=False):
    evaluate(forward_step_func, data_iterator, model, process_non_loss_data_func, config)
def pretrain(model_provider):
    initialize_megatron()
    args = get_args()
    model, optimizer, scheduler = setup_model_and_optimizer(model_provider, "gpt")
    batches = iter(torch.randn(99, 4, 5, generator=torch.Generator().manual_seed(3)).bfloat16())
    while args.iteration < args.train_iters:
        TRAINER.train(1)
        args.iteration += 1
        args.consumed_train_samples += 8
        training_log({}, {}, 0.1, args.iteration, 1, True, 0, None, None, None)
        if args.iteration % args.save_interval == 0:
            save_checkpoint(args.iteration, model, optimizer, scheduler)
            evaluate_and_print_results(f"iteration {args.iteration}", None, batches, model,
                                       args.iteration, None, None)
    assert args.consumed_valid_samples == 8 * (99 - len(list(batches)))
    if args.load is not None:
        save_checkpoint(args.iteration, model, optimizer, scheduler)
    TRAINER.close()
""",
}
_SCRIPT = "from megatron.training import pretrain\npretrain(None)\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """pretrain_gpt.py in a tree with the stand-in."""
    folder = tmp_path / "tree" / "megatron"
    folder.mkdir(parents=True)
    for name, text in _STAND_IN.items():
        (folder / f"{name}.py").write_text(text)
    path = folder.parent / "pretrain_gpt.py"
    path.write_text(_SCRIPT)
    return path


def launched(rank: int, world_size: int, script: str, *arguments: str) -> int:
    """What `python -m pma_megatron.launch` returns; the script's exceptions pass."""
    return launch.main([script, *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_flags_do_what_the_library_does(
    script: Path, tmp_path: Path, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The saved average, and a start from the average, are the offline merge bit for bit."""
    root, again = tmp_path / "run", tmp_path / "again"
    common = (
        str(script),
        "--deepspeed",
        "--stage",
        str(stage),
        "--save-interval",
        "2",
        "--train-iters",
        "6",
        "--pma-last",
        "3",
    )
    interval = ("--pma-interval-tokens", str(2 * SEQ * BATCH))
    save = ("--save", str(root), "--pma-save", "--pma-eval", *interval)
    assert run_ranks(launched, 2, *common, *save, timeout_s=800, preloaded=False) == [0, 0]
    log = capfd.readouterr().out
    assert " pma validation loss at iteration 4 | lm loss value: " in log
    assert "no average is evaluated yet: 1 of 2 members" in log
    averages = Path(f"{root}-pma")
    (merged,) = merge(
        request_for(root, tmp_path / "merged", selection=SelectionRequest(last=3))
    ).outputs
    assert (averages / "latest").read_text() == "global_step6"
    assert_same_tag(averages / "global_step6", Path(merged))
    origin = json.loads((averages / "global_step6" / "pma.json").read_text())
    assert [entry["consumed_tokens"] for entry in origin["entries"]] == [128, 256, 384]

    start = ("--load", str(root), "--save", str(again), "--pma-init", *interval)
    assert run_ranks(launched, 2, *common, *start, timeout_s=800, preloaded=False) == [0, 0]
    assert "PMA-init: 3 checkpoints" in capfd.readouterr().out
    assert_same_tag(again / "global_step6", Path(merged))


def test_what_cannot_work_is_refused(script: Path) -> None:
    def said(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "pma_megatron.launch", str(script), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        return result.stderr

    assert "add --deepspeed" in said("--save", "x", "--pma-save", "--pma-interval-tokens", "9")
    init = ("--pma-init", "--load", "x", "--deepspeed")
    assert "Universal checkpoints" in said(*init, "--universal-checkpoint")
    assert "cannot be used with --finetune" in said(*init, "--finetune")
    assert "unrecognized arguments: --pma-keep" in said(*init, "--pma-keep", "3")


# The real tree.


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(TREE is None, reason="MEGATRON_DEEPSPEED_PATH is not set")
def test_the_real_tree_has_what_is_hooked() -> None:
    folder = Path(str(TREE)) / "megatron"
    for target in TARGETS:
        found = functions(folder / f"{target.module}.py")[target.name].args
        assert not found.vararg and not found.kwarg
        assert {arg.arg for arg in found.args} >= set(target.parameters)
        for name in target.also:
            assert target.name in (folder / f"{name}.py").read_text()
