"""Puts the decorators on an unpatched Megatron-DeepSpeed, in the running process."""

from __future__ import annotations

from pma_megatron.megatron.tree_functions import TreeFunction, install_all
from pma_megatron.megatron_deepspeed import decorators

KNOWN = "main of 2025 (4efb479d)"

TARGETS = (
    TreeFunction(
        "arguments",
        "parse_args",
        decorators.arguments,
        ("extra_args_provider",),
        also=("initialize",),
    ),
    TreeFunction("training", "setup_model_and_optimizer", decorators.setup),
    TreeFunction(
        "checkpointing",
        "load_checkpoint",
        decorators.load_checkpoint,
        ("model", "load_arg"),
        also=("training",),
    ),
    TreeFunction("training", "training_log", decorators.training_log, ("iteration",)),
    TreeFunction(
        "checkpointing",
        "save_checkpoint",
        decorators.save_checkpoint,
        ("iteration", "model", "optimizer", "opt_param_scheduler"),
        also=("training",),
    ),
    TreeFunction("training", "evaluate", decorators.evaluate, ("data_iterator", "model")),
    TreeFunction(
        "training",
        "evaluate_and_print_results",
        decorators.evaluate_and_print_results,
        ("prefix", "iteration", "model", "write_to_tensorboard"),
    ),
)


def install() -> None:
    """Hook Megatron-DeepSpeed; see `install_all`."""
    install_all("megatron", TARGETS, "Megatron-DeepSpeed", KNOWN)
