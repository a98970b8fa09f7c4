"""The Python surface: which names are public, what `dir` shows, and that every example runs.

The names and verbs of the command line are frozen in test_cli, Megatron's in test_megatron_flags.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import pma_megatron
import pma_megatron.deepspeed
import pma_megatron.testing

PACKAGE = Path(pma_megatron.__file__).parent
PUBLIC = {
    "pma_megatron": {
        "CheckpointRef",
        "Coefficients",
        "Comparison",
        "Inspection",
        "MergePlan",
        "MergeReport",
        "MergeRequest",
        "Method",
        "PmaError",
        "Policy",
        "PruneReport",
        "PruneRequest",
        "RecoveryRequest",
        "SelectionRequest",
        "WatchRequest",
        "__version__",
        "compare",
        "export_model",
        "inspect",
        "list_checkpoints",
        "merge",
        "plan",
        "prune",
        "recover",
        "verify",
        "watch",
    },
    "pma_megatron.deepspeed": {"OnlineAverage", "load_merged", "pma_init"},
    "pma_megatron.fsdp": {"load_merged"},
    "pma_megatron.testing": {
        "FAULT_ENV",
        "Fault",
        "Outcome",
        "RankFailure",
        "RankTimeout",
        "TinyConfig",
        "TinyTrainer",
        "inject",
        "rank_outcomes",
        "run_ranks",
    },
}
"""What people import: adding is a decision, removing breaks them."""


def examples() -> dict[str, Path]:
    """Every module of the package with an example, by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>>" in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_frozen(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == PUBLIC[module]


def test_every_public_name_is_there_and_documented() -> None:
    for name in PUBLIC["pma_megatron"] - {"__version__"}:
        assert inspect.getdoc(getattr(pma_megatron, name)), name
    with pytest.raises(AttributeError, match="no attribute 'average'"):
        pma_megatron.average  # noqa: B018


def test_completion_shows_the_public_names_alone() -> None:
    assert dir(pma_megatron) == sorted(PUBLIC["pma_megatron"] | {"deepspeed", "fsdp"})
    assert pma_megatron.deepspeed.pma_init


@pytest.mark.parametrize("module", examples())
def test_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0, f"{module} has >>> where doctest finds no example"
    assert found.failed == 0


def test_what_needs_no_checkpoint_has_an_example() -> None:
    shown = {
        test.name.rpartition(".")[2]
        for module in examples()
        for test in doctest.DocTestFinder().find(importlib.import_module(module))
        if test.examples
    }
    missing = {
        "CheckpointRef",
        "Coefficients",
        "MergeRequest",
        "Method",
        "PmaError",
        "Policy",
        "RecoveryRequest",
        "SelectionRequest",
        "coefficients",
        "format_tokens",
        "parse_tokens",
        "recommend",
        "select",
    } - shown
    assert not missing
