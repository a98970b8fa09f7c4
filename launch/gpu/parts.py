"""The parts of the check: what each shows, in which process it runs, how long it may take."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpu.findings import Finding

if TYPE_CHECKING:
    from gpu.job import Job

TREE_ENV = "MEGATRON_LM_PATH"
"""Names a Megatron-LM source tree."""
PEER_ENV, PEER_SAYS_ENV = "PMA_GPU_CHECK_PEER", "PMA_GPU_CHECK_PEER_SAYS"
"""What `--peer` and `--peer-says` are, for the process that measures merges."""
PEER = "another program's merge"
"""The finding about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part.

    Attributes:
        name: as typed for `--only`.
        title: what it shows, for the page.
        function: `module:name` of what yields its findings.
        group: parts of one group follow each other in one process, which saves its start; with
            one job at a time, so do those of groups that begin with the same word.
        limit_s: seconds after which it is ended.
        needs: modules without which it is `not here`.
        tree: whether it needs a Megatron-LM tree.
        alone: whether its numbers mean something only if nothing else runs.
        in_group: whether its process is in a process group of its own (world size 1).
    """

    name: str
    title: str
    function: str
    group: str
    limit_s: float
    needs: tuple[str, ...] = ()
    tree: bool = False
    alone: bool = False
    in_group: bool = True

    def load(self) -> Callable[[Job], Iterator[Finding]]:
        """The function."""
        module, _, name = self.function.partition(":")
        loaded: Callable[[Job], Iterator[Finding]] = getattr(importlib.import_module(module), name)
        return loaded

    def why_not(self) -> str:
        """Why it cannot run here; "" if it can."""
        missing = [name for name in self.needs if not _is_installed(name)]
        if missing:
            return f"{missing[0]} is not installed"
        tree = os.environ.get(TREE_ENV, "")
        if self.tree and not (tree and Path(tree, "pretrain_gpt.py").is_file()):
            return f"{TREE_ENV} names no Megatron-LM tree (it is {tree!r})"
        return ""


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent
        return False


_CORE = ("megatron.core",)
_ZERO = ("deepspeed",)


def _part(name: str, title: str, function: str, group: str, **more: object) -> Part:
    values = {"limit_s": 150.0, **more}
    return Part(name=name, title=title, function=f"gpu.{function}", group=group, **values)  # type: ignore[arg-type]


PARTS = (
    _part(
        "megatron-init",
        "PMA-init by slice and by source, each optimizer, against a resume from the offline merge",
        "core:init",
        "core",
        needs=_CORE,
    ),
    _part(
        "megatron-recovery",
        "recovery from a burst in training, and the loss after it",
        "broken:recovery",
        "core-rest",
        needs=_CORE,
    ),
    _part(
        "megatron-snapshots",
        "thin snapshots, and their merge with full checkpoints",
        "core:snapshots",
        "core-rest",
        needs=_CORE,
    ),
    _part(
        "megatron-score",
        "a grid of averages scored in a live model",
        "core:score",
        "core-rest",
        needs=_CORE,
    ),
    _part(
        "megatron-export",
        "merge and export in one pass: resumed by Megatron, opened by `transformers`",
        "export:merged",
        "core-rest",
        needs=(*_CORE, "safetensors"),  # of the package itself, but --wheels asks for nothing
    ),
    _part(
        "megatron-online",
        "running average, its swaps and its checkpoint, each optimizer",
        "core:online",
        "core-online",
        needs=_CORE,
    ),
    _part(
        "script-save-eval",
        "`--pma-save --pma-eval` in Megatron-LM's script, and its average as a checkpoint",
        "script:save_eval",
        "script-save-eval",
        needs=_CORE,
        tree=True,
        limit_s=180.0,
        in_group=False,
    ),
    _part(
        "script-async-save",
        "the same with `--async-save` and its persistent worker",
        "script:async_save",
        "script-async-save",
        needs=_CORE,
        tree=True,
        limit_s=180.0,
        in_group=False,
    ),
    _part(
        "script-init",
        "`--pma-init` in Megatron-LM's script, against a resume from the offline merge",
        "script:init",
        "script-init",
        needs=_CORE,
        tree=True,
        limit_s=180.0,
        in_group=False,
    ),
    _part(
        "script-recover",
        "`--pma-recover` in Megatron-LM's script, broken in training",
        "script:recover",
        "script-recover",
        needs=_CORE,
        tree=True,
        limit_s=180.0,
        in_group=False,
    ),
    _part(
        "deepspeed-live",
        "live start of ZeRO-0 to 3 and with offload, against the offline merge",
        "zero:live",
        "zero",
        needs=_ZERO,
        limit_s=180.0,
    ),
    _part(
        "deepspeed-online",
        "running average of ZeRO-0 to 3 and with offload, its swaps and its checkpoint",
        "zero:online",
        "zero-online",
        needs=_ZERO,
        limit_s=180.0,
    ),
    _part(
        "two-ranks",
        "two data-parallel ranks that share the GPU over gloo: Megatron and DeepSpeed",
        "pair:two_ranks",
        "pair",
        needs=_CORE,
        in_group=False,
        limit_s=180.0,
    ),
    _part(
        "optimizer-instances",
        "two instances of the distributed optimizer, each over two of four ranks, over gloo",
        "pair:instances",
        "pair-instances",
        needs=_CORE,
        in_group=False,
        limit_s=180.0,
    ),
    _part(
        "fsdp2",
        "live start of FSDP2, one rank, against a resume from the offline merge",
        "fsdp:live",
        "fsdp2",
    ),
    _part(
        "cost-step",
        "a training step with a running average and without, interleaved",
        "costs:step",
        "core-costs",
        needs=_CORE,
        alone=True,
    ),
    _part(
        "cost-copy",
        "the copy of an entry against the card's own pinned copy to the host",
        "costs:copy",
        "core-costs",
        needs=_CORE,
        alone=True,
    ),
    _part(
        "cost-swap",
        "how long a swap holds up training",
        "costs:swap",
        "core-costs",
        needs=_CORE,
        alone=True,
    ),
    _part(
        "cost-init",
        "PMA-init per GB of checkpoints",
        "costs:init",
        "core-costs",
        needs=_CORE,
        alone=True,
    ),
    _part(
        "cost-merge",
        "an offline merge on the node's cores against its reads and writes alone",
        "costs:merge_",
        "core-costs",
        needs=_CORE,
        alone=True,
    ),
)
"""In the order of the page; groups start in this order."""
BY_NAME = {part.name: part for part in PARTS}
