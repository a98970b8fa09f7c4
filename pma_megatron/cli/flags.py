"""The command line as data: every flag of every verb, and the request that they make."""

from __future__ import annotations

import argparse

from pma_megatron.base.settings import add_flags
from pma_megatron.cli import commands, compare, evaluate, forecast, geometry, recover
from pma_megatron.cli.verbs import OnRanks, add_selection, new_verb
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.version import __version__

_MERGE_EXAMPLES = """
  torchrun --nproc-per-node 8 -m pma_megatron merge --load /ckpts/run --save /ckpts/run-pma \\
      --method sma --last 10 --interval-tokens 8B
  pma plan --load /ckpts/run --save /ckpts/run-pma --iterations 8000 9000 10000 --method wma
  torchrun --nproc-per-node 8 -m pma_megatron merge --load /ckpts/run --save /ckpts/sweep \\
      --sweep sma,wma,1-sqrt:3,6,10
  pma merge --load /ckpts/run --last 10 --export /models/run-sma --like /models/template
"""
_EXPORT_EXAMPLES = """
  pma export /ckpts/run-pma/iter_0100000 --save /models/run-sma --like /models/template
  torchrun --nproc-per-node 8 -m pma_megatron export /ckpts/run-pma --save /models/run-fp32 \\
      --like /models/template --dtype fp32 --max-shard-size 10GB
"""
_OF_A_FOLDER = (
    (
        "list",
        commands.list_,
        "list a run's checkpoints: tokens, complete or not",
        "root",
        "the folder that training saves to",
        "\n  pma list /ckpts/run",
    ),
    (
        "inspect",
        commands.inspect,
        "say what is in one checkpoint",
        "path",
        "one iter_* folder, or the --save folder above it",
        "\n  pma inspect /ckpts/run/iter_0090000\n  pma inspect /ckpts/run-pma --json",
    ),
    (
        "verify",
        commands.verify,
        "check every byte of what was published, and a merge against its sources",
        "path",
        "one merged iter_* folder, or the --save folder above it",
        "\n  pma verify /ckpts/run-pma --samples 1024\n  pma verify /ckpts/run-pma --files-only",
    ),
)
"""Verbs that take one folder: name, function, what it does, argument, what that is, examples."""


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
        verb = new_verb(verbs, name, run, text, _MERGE_EXAMPLES)
        add_selection(verb)
        group = verb.add_argument_group("how to average")
        add_flags(group, Method)
        add_flags(group, Policy)
        add_flags(group, MergeRequest, "lr_factor", "dtype", "sweep")
        group = verb.add_argument_group("a Hugging Face model of the average")
        add_flags(group, MergeRequest, "export", "like", "max_shard_bytes")
        group = verb.add_argument_group("how to run")
        add_flags(group, MergeRequest, "save", "overwrite", "threads")
        add_flags(group, OnRanks)
        add_flags(group, MergeRequest, "check_sources", "merge_parallel_size")
    _add_export(verbs)
    for each in (recover, evaluate, forecast, geometry, compare):
        each.add(verbs)
    for name, run, text, where, what, examples in _OF_A_FOLDER:
        verb = new_verb(verbs, name, run, text, examples)
        verb.add_argument(where, help=what)
    add_flags(verb, commands.Checks)
    add_flags(verb, OnRanks)
    return top


def _add_export(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write one checkpoint, merged or not, as a Hugging Face model"
    verb = new_verb(verbs, "export", commands.export, text, _EXPORT_EXAMPLES)
    verb.add_argument("path", help="one iter_* folder or DeepSpeed tag, or the root above it")
    where = {"flag": "save", "help": "folder that becomes the model; it must not exist"}
    dtype = {"help": "of the weights, as config.json says without it"}
    group = verb.add_argument_group("the model")
    add_flags(
        group, MergeRequest, "export", "like", "dtype", "max_shard_bytes", export=where, dtype=dtype
    )
    group = verb.add_argument_group("how to run")
    add_flags(group, MergeRequest, "overwrite", "threads", "check_sources")
    add_flags(group, OnRanks)
