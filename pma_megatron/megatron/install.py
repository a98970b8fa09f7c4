"""Puts the decorators on an unpatched Megatron-LM, in the running process."""

from __future__ import annotations

from pma_megatron.megatron import decorators
from pma_megatron.megatron.tree_functions import TreeFunction, install_all

KNOWN = "core_v0.12 to core_v0.19 and main of 2026-08"

TARGETS = (
    TreeFunction("arguments", "add_megatron_arguments", decorators.arguments, ("parser",)),
    TreeFunction("training", "setup_model_and_optimizer", decorators.setup),
    TreeFunction(
        "training", "training_log", decorators.training_log, ("iteration", "loss_dict", "grad_norm")
    ),
    TreeFunction(
        "checkpointing",
        "save_checkpoint",
        decorators.save_checkpoint,
        (
            "iteration",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "num_floating_point_operations_so_far",
            "checkpointing_context",
            "non_persistent_ckpt",
        ),
        also=("training",),
    ),
    TreeFunction("training", "evaluate", decorators.evaluate, ("data_iterator", "model", "config")),
    TreeFunction(
        "training",
        "evaluate_and_print_results",
        decorators.evaluate_and_print_results,
        ("prefix", "iteration", "model", "write_to_tensorboard"),
    ),
)


def install() -> None:
    """Hook Megatron-LM; see `install_all`."""
    install_all("megatron.training", TARGETS, f"Megatron-LM ({_version()})", KNOWN)


def _version() -> str:
    try:
        from megatron.core import __version__
    except ImportError:
        return "megatron-core of unknown version"
    return f"megatron-core {__version__}"
