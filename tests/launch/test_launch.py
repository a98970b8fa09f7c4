"""The launcher, and the hooks that the decorated functions call.

How hooks are called and what is refused is seen on a stand-in for `megatron.training` of one
screen. With MEGATRON_LM_PATH (a Megatron-LM source tree) its own pretrain_gpt.py runs too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.megatron.install import TARGETS
from pma_megatron.testing.megatron_lm import PretrainFailure, run_pretrain

ROOT = Path(__file__).parents[2]
TREE = os.environ.get("MEGATRON_LM_PATH")
_STAND_IN = {
    "global_vars": """
ARGS = None
def get_args():
    assert ARGS is not None, "args is not initialized."
    return ARGS
""",
    "arguments": """
import argparse
def add_megatron_arguments(parser):
    parser.add_argument("--save")
    parser.add_argument("--load")
    return parser
""",
    "checkpointing": """
def save_checkpoint(iteration, model, optimizer, opt_param_scheduler,
                    num_floating_point_operations_so_far, checkpointing_context=None,
                    non_persistent_ckpt=False):
    return "saved"
""",
    "training": """
from megatron.training import arguments, global_vars
from megatron.training.checkpointing import save_checkpoint
import argparse
def setup_model_and_optimizer(model_type, model_provider_func=None):
    return ["model"], "optimizer", "scheduler"
def training_log(loss_dict, iteration, grad_norm=None, is_first_iteration=False):
    return "logged"
def evaluate(forward_step_func, data_iterator, model, process_non_loss_data_func, config):
    return "evaluated"
def evaluate_and_print_results(prefix, forward_step_func, data_iterator, model, iteration,
                               process_non_loss_data_func, config, verbose=False,
                               write_to_tensorboard=True):
    return evaluate(forward_step_func, data_iterator, model, None, config)
def pretrain():
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    assert save_checkpoint(0, None, None, None, 0) == "saved"  # before there are arguments
    global_vars.ARGS = parser.parse_args()
    assert setup_model_and_optimizer("gpt") == (["model"], "optimizer", "scheduler")
    assert training_log({}, 7) == "logged"
    assert evaluate_and_print_results("at 7", None, "data", "m", 7, None, "c") == "evaluated"
    assert save_checkpoint(7, "m", None, None, 0, non_persistent_ckpt=True) == "saved"
""",
}
_HOOKS = """
import contextlib, json, sys, types
EVENTS = []
def validate(args): EVENTS.append(["validate", args.pma_last])
def ready(*given): EVENTS.append(["ready", *given])
def stepped(arguments): EVENTS.append(["stepped", arguments["iteration"]])
def saving():
    pass


def saved(save_checkpoint, arguments):
    assert save_checkpoint(**arguments) == "saved"  # the undecorated one: no second event
    EVENTS.append(["saved", arguments])
@contextlib.contextmanager
def evaluation(prefix, iteration, write_to_tensorboard):
    EVENTS.append(["evaluation", prefix, iteration, write_to_tensorboard])
    yield
    EVENTS.append(["evaluation ends"])
def evaluate(evaluate, arguments):
    EVENTS.append(["evaluate", arguments["data_iterator"]])
    return evaluate(**arguments)
"""
_SCRIPT = """
import json, sys
import hooks_of_the_test
sys.modules["pma_megatron.megatron.hooks"] = hooks_of_the_test
import pma_megatron.megatron
pma_megatron.megatron.hooks = hooks_of_the_test
from megatron.training.training import pretrain
if __name__ == "__main__":
    pretrain()
    print(json.dumps({"events": hooks_of_the_test.EVENTS, "argv": sys.argv, "path": sys.path[0]}))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the stand-in, a script, and hooks that write down how they are called."""
    training = tmp_path / "tree" / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").write_text("")
    for name, text in _STAND_IN.items():
        (training / f"{name}.py").write_text(text)
    (tmp_path / "tree" / "hooks_of_the_test.py").write_text(_HOOKS)
    (tmp_path / "tree" / "train.py").write_text(_SCRIPT)
    return tmp_path / "tree"


def launch(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m pma_megatron.launch` somewhere else than in the tree."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pma_megatron.launch", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_hooks_are_called_with_arguments_by_name(tree: Path, tmp_path: Path) -> None:
    done = launch(tree / "train.py", "--pma-init", "--pma-last", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["argv"] == [str(tree / "train.py"), "--pma-init", "--pma-last", "3"]
    assert said["path"] == str(tree)
    assert said["events"] == [
        ["validate", 3],
        ["ready", ["model"], "optimizer", "scheduler"],
        ["stepped", 7],
        ["evaluation", "at 7", 7, True],
        ["evaluate", "data"],
        ["evaluation ends"],
        [
            "saved",
            {
                "iteration": 7,
                "model": "m",
                "optimizer": None,
                "opt_param_scheduler": None,
                "num_floating_point_operations_so_far": 0,
                "checkpointing_context": None,
                "non_persistent_ckpt": True,
            },
        ],
    ]


def test_without_flags_nothing_is_called(tree: Path, tmp_path: Path) -> None:
    done = launch(tree / "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["events"] == []


def test_a_patched_tree_is_decorated_once(tree: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        path = tree / "megatron" / "training" / f"{target.module}.py"
        text = path.read_text().replace(
            f"\ndef {target.name}(", f"\n@pma.{target.decorator.__name__}\ndef {target.name}("
        )
        path.write_text(f"from pma_megatron.megatron import decorators as pma\n{text}")
    done = launch(tree / "train.py", "--pma-init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [event[0] for event in json.loads(done.stdout)["events"]]
    assert names == [
        "validate",
        "ready",
        "stepped",
        "evaluation",
        "evaluate",
        "evaluation ends",
        "saved",
    ]


def test_a_second_install_changes_nothing(tree: Path, tmp_path: Path) -> None:
    script = tree / "twice.py"
    script.write_text(
        "from pma_megatron.megatron.install import install\n"
        "from megatron.training import checkpointing, training\n"
        "before = dict(vars(training)), dict(vars(checkpointing))\n"
        "install()\n"
        "assert before == (vars(training), vars(checkpointing))\n"
        "assert training.save_checkpoint is checkpointing.save_checkpoint\n"
    )
    done = launch(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "old", "new", "words"),
    [
        ("training", "def training_log(", "def training_logs(", "training.training_log is missing"),
        (
            "training",
            "def training_log(loss_dict, iteration,",
            "def training_log(loss_dict, step,",
            "training.training_log has no parameter iteration",
        ),
        (
            "training",
            "def evaluate(forward_step_func, data_iterator, model,",
            "def evaluate(*args, data_iterator=0, model=0,",
            "takes any arguments",
        ),
        (
            "training",
            "import save_checkpoint",
            "import save_checkpoint as save",
            "training.save_checkpoint is not megatron.training.checkpointing.save_checkpoint",
        ),
    ],
)
def test_a_tree_that_lacks_something_is_refused_whole(
    tree: Path, module: str, old: str, new: str, words: str
) -> None:
    path = tree / "megatron" / "training" / f"{module}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    script = tree / "refused.py"
    script.write_text(
        "from pma_megatron.errors import UsageError\n"
        "from pma_megatron.megatron.install import TARGETS, install\n"
        "from pma_megatron.megatron.decorators import is_decorated\n"
        "import importlib\n"
        "try:\n    install()\nexcept UsageError as error:\n    print(error)\n"
        "for target in TARGETS:\n"
        "    home = importlib.import_module(f'megatron.training.{target.module}')\n"
        "    assert not is_decorated(getattr(home, target.name, None)), target.name\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout and "megatron-core" in done.stdout


def test_the_launcher_does_not_run_a_script_that_it_cannot_hook(tree: Path, tmp_path: Path) -> None:
    (tree / "megatron" / "training" / "training.py").write_text("")
    done = launch(tree / "train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "training.training_log is missing" in done.stderr and "Traceback" not in done.stderr


def test_the_launcher_says_what_is_wrong(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text("")
    for arguments, words in (
        ((), "no script to run"),
        (("--load", "/a"), "expected a script, found '--load'"),
        (("nowhere.py",), "there is no script 'nowhere.py'"),
        ((script,), "megatron.training cannot be imported"),
    ):
        done = launch(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr and "Traceback" not in done.stderr
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: torchrun")


def test_the_scripts_own_exit_and_errors_are_its_own(tree: Path, tmp_path: Path) -> None:
    script = tree / "exits.py"
    script.write_text("import sys\nsys.exit(7)\n")
    assert launch(script, cwd=tmp_path).returncode == 7
    script.write_text("raise UserWarning('mine')\n")
    done = launch(script, cwd=tmp_path)
    assert done.returncode == 1 and "UserWarning: mine" in done.stderr


_LOGGING_HOOKS = """
import contextlib, json, os, sys
import pma_megatron.megatron
from pma_megatron.megatron import argument_parser
def _say(*event):
    with open(os.environ["EVENTS"] + os.environ["RANK"], "a") as file:
        file.write(json.dumps(event) + "\\n")
def validate(args):
    argument_parser.validate(args)
    _say("validate")
def ready(model, optimizer, opt_param_scheduler):
    _say("ready", len(model), hasattr(optimizer, "step"), hasattr(opt_param_scheduler, "step"))
def stepped(arguments): _say("stepped", arguments["iteration"])
def saving(): pass
def saved(save_checkpoint, arguments): _say("saved", arguments["iteration"])
@contextlib.contextmanager
def evaluation(prefix, iteration, write_to_tensorboard):
    _say("evaluation", prefix, iteration)
    yield
def evaluate(evaluate, arguments):
    result = evaluate(**arguments)
    _say("evaluate", "lm loss" in result[0])
    return result
pma_megatron.megatron.hooks = sys.modules["pma_megatron.megatron.hooks"] = sys.modules[__name__]
"""


@pytest.mark.slow
@pytest.mark.skipif(TREE is None, reason="MEGATRON_LM_PATH names no Megatron-LM tree")
def test_pretrain_gpt_calls_every_hook(tmp_path: Path) -> None:
    (tmp_path / "logging_hooks.py").write_text(_LOGGING_HOOKS)
    save = str(tmp_path / "run")
    arguments = f"--train-iters 4 --save {save} --save-interval 2 --eval-interval 4 --pma-save"
    run_pretrain(
        str(TREE),
        [*arguments.split(), "--pma-interval-tokens", "256"],
        ranks=2,
        imports="logging_hooks",
        python_path=[tmp_path],
        environment={"EVENTS": str(tmp_path / "events")},
    )
    for rank in range(2):
        text = (tmp_path / f"events{rank}").read_text()
        events = [json.loads(line) for line in text.splitlines()]
        assert events == [
            ["validate"],
            ["ready", 1, True, True],
            ["stepped", 1],
            ["stepped", 2],
            ["saved", 2],
            ["stepped", 3],
            ["stepped", 4],
            ["evaluation", "iteration 4", 4],
            ["evaluate", True],
            ["saved", 4],
            ["evaluation", "iteration 4 on validation set", 4],
            ["evaluate", True],
            ["evaluation", "iteration 4 on test set", 4],
            ["evaluate", True],
        ]


@pytest.mark.slow
@pytest.mark.skipif(TREE is None, reason="MEGATRON_LM_PATH names no Megatron-LM tree")
def test_pretrain_gpt_says_what_is_refused_before_it_builds_a_model(tmp_path: Path) -> None:
    hooks = "def validate(args):\n    argument_parser.validate(args)\n"
    (tmp_path / "refusing_hooks.py").write_text(
        "import sys\nimport pma_megatron.megatron\n"
        "from pma_megatron.megatron import argument_parser\n"
        f"{hooks}pma_megatron.megatron.hooks = sys.modules[__name__]\n"
    )
    with pytest.raises(PretrainFailure) as caught:
        run_pretrain(
            str(TREE),
            ["--train-iters", "2", "--pma-init"],
            imports="refusing_hooks",
            python_path=[tmp_path],
        )
    assert "UsageError: --pma-init needs --load" in str(caught.value)
