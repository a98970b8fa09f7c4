"""The command line as data: every flag of every verb, and the request that they make."""

from __future__ import annotations

import argparse

from pma_megatron.cli import commands, evaluate, forecast, geometry, recover
from pma_megatron.cli.verbs import add_selection, add_timeout, new_verb
from pma_megatron.merging.coefficients import METHODS
from pma_megatron.merging.policy import AVERAGES, OPTIMIZER_STATES
from pma_megatron.version import __version__

_MERGE_EXAMPLE = """examples:
  torchrun --nproc-per-node 8 -m pma_megatron merge --load /ckpts/run --save /ckpts/run-pma \\
      --method sma --last 10 --interval-tokens 8B
  pma plan --load /ckpts/run --save /ckpts/run-pma --iterations 8000 9000 10000 --method wma
  torchrun --nproc-per-node 8 -m pma_megatron merge --load /ckpts/run --save /ckpts/sweep \\
      --sweep sma,wma,1-sqrt:3,6,10
"""


def parser() -> argparse.ArgumentParser:
    """The parser of `pma`."""
    top = argparse.ArgumentParser(
        prog="pma",
        description="Average checkpoints of one pre-training run, shard by shard, into one that "
        "training resumes from.",
    )
    top.add_argument("--version", action="version", version=f"pma_megatron {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, run, text in (
        ("merge", commands.merge, "merge checkpoints into a new one; start it with torchrun"),
        ("plan", commands.plan, "say what merge would do with the same flags; writes nothing"),
    ):
        verb = new_verb(verbs, name, run, text, epilog=_MERGE_EXAMPLE)
        add_selection(verb)
        _averaging(verb)
        _running(verb)
    for each in (recover, evaluate, forecast, geometry):
        each.add(verbs)
    verb = new_verb(
        verbs, "list", commands.list_, "list a run's checkpoints: tokens, complete or not"
    )
    verb.add_argument("root", help="the folder that training saves to")
    verb = new_verb(verbs, "inspect", commands.inspect, "say what is in one checkpoint")
    verb.add_argument("path", help="one iter_* folder, or the --save folder above it")
    verb = new_verb(
        verbs,
        "verify",
        commands.verify,
        "check every byte of what was published, and a merge against its sources",
    )
    verb.add_argument("path", help="one merged iter_* folder, or the --save folder above it")
    verb.add_argument("--samples", type=int, default=256, help="slices to recompute (default 256)")
    verb.add_argument(
        "--deep",
        action="store_true",
        help="recompute every element in float64, with torchrun on several ranks",
    )
    verb.add_argument(
        "--files-only", action="store_true", help="check the files alone; the sources may be gone"
    )
    add_timeout(verb)
    return top


def _averaging(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("how to average")
    group.add_argument("--method", default="sma", metavar="M", help=", ".join(METHODS))
    group.add_argument("--alpha", type=float, help="ema: weight of the newer one, in (0, 1]")
    group.add_argument(
        "--floor", type=float, default=0.0, help="decay methods: where the decay ends, in [0, 1)"
    )
    group.add_argument(
        "--coefficients", type=float, nargs="+", metavar="C", help="custom: oldest first, sum 1"
    )
    group.add_argument(
        "--allow-any-coefficients", action="store_true", help="custom: negative or any sum"
    )
    group.add_argument(
        "--optimizer-state",
        default="latest",
        metavar="S",
        help=f"moments and step: {', '.join(OPTIMIZER_STATES)} (default latest)",
    )
    group.add_argument(
        "--average",
        default="main-params",
        metavar="WHAT",
        help=f"{' or '.join(AVERAGES)}: weights reads the 16-bit weights and writes a "
        "weights-only checkpoint",
    )
    group.add_argument(
        "--policy",
        nargs="+",
        default=[],
        metavar="PATTERN=ACTION",
        help="average, newest or drop entries by key pattern; the first match wins",
    )
    group.add_argument(
        "--lr-factor",
        type=float,
        metavar="F",
        help="of all learning rates in the result, from where a resume takes them",
    )
    group.add_argument("--dtype", help="of averaged weights: bf16, fp16, fp32 (default: as stored)")
    group.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="M,..:N,..",
        help="several outputs from one pass, e.g. sma,wma,1-sqrt:3,6,10; each in --save/M-lastN",
    )


def _running(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("how to run")
    group.add_argument("--save", metavar="DIR", help="folder for the merged iter_*")
    group.add_argument("--overwrite", action="store_true", help="replace an existing merge")
    group.add_argument("--threads", type=int, default=2, help="per rank (default 2)")
    add_timeout(group)
    group.add_argument(
        "--check-sources",
        action="store_true",
        help="read records whole that the merge reads in part, to compare their checksums",
    )
    group.add_argument(
        "--merge-parallel-size",
        type=int,
        default=1,
        metavar="R",
        help="ranks that share the sources of a slice and all-reduce it; for sources on "
        "node-local disks (default 1: ranks share the bytes)",
    )
