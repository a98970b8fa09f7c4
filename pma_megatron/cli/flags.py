"""The command line as data: every flag of every verb, and the request that they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from pma_megatron.base.settings import add_flags, declared, setting
from pma_megatron.cli import asked
from pma_megatron.cli.request_files import expanded
from pma_megatron.cli.score_flags import add_evaluate, add_forecast, add_geometry
from pma_megatron.cli.verbs import Files, Logged, OnRanks, Parser, Written, add_selection, new_verb
from pma_megatron.errors import UsageError
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import SAMPLES, MergeRequest, Method
from pma_megatron.retention.request import PruneRequest
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.spikes.request import RecoveryRequest
from pma_megatron.spikes.settings import SpikeSettings
from pma_megatron.version import __version__
from pma_megatron.watching.request import WatchRequest

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
_RECOVER_EXAMPLES = """
  pma recover --load /ckpts/run --metrics /ckpts/run/tensorboard --save /ckpts/run-2 --dry-run
  torchrun --nproc-per-node 8 -m pma_megatron recover --load /ckpts/run --onset 81234 \\
      --save /ckpts/run-2 --skip 81234:81300 -- torchrun ... pretrain_gpt.py <all flags of the run>
  pma recover --load /ckpts/run --history          # what --pma-recover did in training
"""
_COMPARE_EXAMPLES = """
  pma compare /ckpts/run/iter_0090000 /backup/run/iter_0090000
  torchrun --nproc-per-node 8 -m pma_megatron compare /ckpts/run-pma /ckpts/other-pma \\
      --weights-only --rtol 1e-3 --out differences.json
"""
_PRUNE_EXAMPLES = """
  pma prune /ckpts/run --keep-window last=10,interval-tokens=8B --keep-last 3
  pma prune /ckpts/run --keep-window last=10,interval-tokens=8B --keep-every-tokens 100B --yes
  pma prune /ckpts/run-pma --keep-last 2 --yes          # old averages
"""
_WATCH_EXAMPLES = """
  pma watch --load /ckpts/run --save /ckpts/run-watch --last 10 --interval-tokens 8B --keep 3
  pma watch --load /ckpts/run --save /ckpts/run-watch --last 10 \\
      --launch 'torchrun --nproc-per-node 8' --evaluate './eval.sh "$PMA_AVERAGE"' --events w.jsonl
  pma watch --from average.yaml --once          # from cron
"""
_REPORT_EXAMPLES = """
  pma report /ckpts/run-pma --out merge.html
  pma report /ckpts/run-pma/iter_0100000 forecast.json /ckpts/run --verify --out run.html
"""
_COMPLETION_EXAMPLES = """
  eval "$(pma completion bash)"                                  # in ~/.bashrc
  eval "$(pma completion zsh)"                                   # in ~/.zshrc, after compinit
  pma completion fish > ~/.config/fish/completions/pma.fish
"""
SHELLS = ("bash", "zsh", "fish")
_OF_A_FOLDER = (
    (
        "list",
        "listing:run",
        "list a run's checkpoints: tokens, complete or not",
        "root",
        "the folder that training saves to",
        "\n  pma list /ckpts/run",
    ),
    (
        "inspect",
        "commands:inspect",
        "say what is in one checkpoint",
        "path",
        "one iter_* folder, or the --save folder above it",
        "\n  pma inspect /ckpts/run/iter_0090000\n  pma inspect /ckpts/run-pma --json",
    ),
    (
        "verify",
        "commands:verify",
        "check every byte of what was published, and a merge against its sources",
        "path",
        "one merged iter_* folder, or the --save folder above it",
        "\n  pma verify /ckpts/run-pma --samples 1024\n  pma verify /ckpts/run-pma --files-only",
    ),
)
"""Verbs that take one folder: name, function, what it does, argument, what that is, examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What `pma verify` takes."""

    samples: int = setting(SAMPLES, "slices to recompute in float64", metavar="N")
    deep: bool = setting(
        False, "recompute every element in float64, with torchrun on several ranks"
    )
    files_only: bool = setting(False, "check the files alone; the sources may be gone")


@dataclass(frozen=True, kw_only=True, slots=True)
class Modes:
    """What `pma recover` does instead of a merge."""

    dry_run: bool = setting(False, "find and choose; write nothing")
    history: bool = setting(False, "print the log of recoveries in training")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """Whether `pma prune` deletes."""

    yes: bool = setting(False, "delete what may go; without it nothing is deleted")
    dry_run: bool = setting(False, "delete nothing, as without --yes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Paged:
    """How `pma report` looks at folders."""

    check: bool = setting(
        False,
        "read every byte of each folder and compare it with its pma.json; without it, sizes alone "
        "are looked at",
        flag="verify",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sameness:
    """What `pma compare` compares, and what counts as the same."""

    weights_only: bool = setting(False, "leave out main params and the states of the optimizer")
    atol: float = setting(
        0.0, "absolute difference up to which two values count as equal", metavar="X"
    )
    rtol: float = setting(
        0.0, "the same as a multiple of the first value; both are added", metavar="X"
    )
    most: int = setting(20, "tensors to show, those that differ most first", metavar="N")


def parser() -> argparse.ArgumentParser:
    """The parser of `pma`."""
    top = Parser(
        prog="pma",
        description="Average checkpoints of one pre-training run, shard by shard, into one that "
        "training resumes from.",
    )
    top.add_argument("--version", action="version", version=f"pma_megatron {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    merging = "merge checkpoints into a new one; start it with torchrun"
    planning = "say what merge would do with the same flags; writes nothing"
    for name, text, request in (
        ("merge", merging, asked.merge_of),
        ("plan", planning, asked.plan_of),
    ):
        verb = new_verb(verbs, name, f"commands:{name}", text, _MERGE_EXAMPLES, request)
        add_selection(verb)
        _add_averaging(verb)
        group = verb.add_argument_group("how to run")
        add_flags(group, MergeRequest, "save", "overwrite", "threads")
        add_flags(group, OnRanks)
        add_flags(group, MergeRequest, "check_sources", "merge_parallel_size")
        add_flags(group, Written)
        add_flags(group, Logged)
    _add_export(verbs)
    _add_recover(verbs)
    add_evaluate(verbs)
    add_forecast(verbs)
    add_geometry(verbs)
    _add_compare(verbs)
    _add_prune(verbs)
    _add_watch(verbs)
    _add_report(verbs)
    for name, run, text, where, what, examples in _OF_A_FOLDER:
        only_looks = name in ("list", "inspect")
        verb = new_verb(verbs, name, run, text, examples, only_looks=only_looks)
        verb.add_argument(where, help=what)
    add_flags(verb, Checks)
    add_flags(verb, OnRanks)
    _add_completion(verbs)
    return top


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """What was typed, and `rest`: what follows a `--`.

    Raises:
        SystemExit: it is wrong (2), or help was asked for (0), and that was printed.
    """
    top = parser()
    verbs = next(a.choices for a in top._actions if isinstance(a, argparse._SubParsersAction))
    try:
        words = expanded(words, verbs)
    except UsageError as error:
        verbs[words[0]].error(str(error))
    end = words.index("--") if "--" in words else len(words)
    known, unknown = top.parse_known_args(words[:end], argparse.Namespace(rest=words[end + 1 :]))
    if getattr(known, "from_file", None) is not None:
        known.parser.error("--from is written out: it is read before all others")
    if known.rest and not hasattr(known, "passes_on"):
        unknown = [*unknown, *words[end:]]
    if unknown:
        known.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return known


def _add_compare(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = "say how two checkpoints of any layouts differ; exits with 3 if they do"
    verb = new_verb(verbs, "compare", "compare:run", text, _COMPARE_EXAMPLES, asked.comparison_of)
    verb.add_argument("first", help="a checkpoint's folder, or the root above it: the reference")
    verb.add_argument("second", help="the one that is compared with it")
    add_flags(verb, Sameness)
    group = verb.add_argument_group("how to run")
    add_flags(group, MergeRequest, "threads")
    add_flags(group, OnRanks)
    add_flags(group, Files, "out")


def _add_prune(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = "say which checkpoints of a run may go, and delete them with --yes"
    verb = new_verb(verbs, "prune", "prune:run", text, _PRUNE_EXAMPLES, asked.pruning_of)
    verb.add_argument("root", help="the folder that training saves to, or one of merges")
    add_flags(verb, Deletion)
    group = verb.add_argument_group("what stays")
    kept = [each.name for each in declared(PruneRequest) if each.name.startswith("keep_")]
    add_flags(group, PruneRequest, *kept)
    group = verb.add_argument_group("recoveries that stay possible")
    add_flags(group, PruneRequest, "recovery_last", "recovery_attempts", "margin_iterations")
    group = verb.add_argument_group("what else is looked at")
    add_flags(group, PruneRequest, "averages", "resume_iteration", "damaged", "without_locks")


def _add_watch(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = "keep an average of a run current while the run goes on"
    verb = new_verb(verbs, "watch", "watch:run", text, _WATCH_EXAMPLES, asked.watching_of)
    group = verb.add_argument_group("which checkpoints")
    add_flags(group, MergeRequest, "load")
    add_flags(group, SelectionRequest, "last", "interval_tokens", "interval_iterations")
    add_flags(group, SelectionRequest, "tolerance", "window_tokens", "exclude", "allow_gaps")
    add_flags(_add_averaging(verb), WatchRequest, "rolling")
    group = verb.add_argument_group("what is done with each")
    add_flags(group, MergeRequest, "save")
    add_flags(group, WatchRequest, "keep", "evaluate", "events")
    group = verb.add_argument_group("how to run")
    add_flags(group, WatchRequest, "poll_s", "once", "until_iteration", "launch")
    add_flags(group, MergeRequest, "threads", "check_sources")
    add_flags(group, Written)
    add_flags(group, Logged)


def _add_report(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = "write a page of HTML about merges, scores, forecasts and recoveries, in one file"
    verb = new_verb(verbs, "report", "report:run", text, _REPORT_EXAMPLES, asked.report_of)
    verb.add_argument(
        "path",
        nargs="+",
        help="a folder that pma wrote, a run's folder with a log of recoveries, or a file that "
        "--out or --json of evaluate, forecast, merge or recover gave",
    )
    where = {"help": "the page", "metavar": "FILE.html"}
    add_flags(verb, Files, "out", out=where)["out"].required = True
    add_flags(verb, Paged)


def _add_averaging(verb: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    averaging = verb.add_argument_group("how to average")
    add_flags(averaging, Method)
    add_flags(averaging, Policy)
    add_flags(averaging, MergeRequest, "lr_factor", "dtype", "sweep")
    group = verb.add_argument_group("a Hugging Face model of the average")
    add_flags(group, MergeRequest, "export", "like", "max_shard_bytes")
    return averaging


def _add_completion(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = "print what a shell needs to complete commands, flags and paths"
    run, examples = "completion:run", _COMPLETION_EXAMPLES
    verb = new_verb(verbs, "completion", run, text, examples, only_looks=True, common=False)
    verb.add_argument("shell", choices=SHELLS, help="which shell: " + ", ".join(SHELLS))


def _add_export(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = "write one checkpoint, merged or not, as a Hugging Face model"
    verb = new_verb(verbs, "export", "commands:export", text, _EXPORT_EXAMPLES, asked.export_of)
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


def _add_recover(verbs: argparse._SubParsersAction[Parser]) -> None:
    verb = new_verb(
        verbs,
        "recover",
        "recover:run",
        "merge healthy checkpoints from before a loss spike, and print the resume command; what "
        "follows -- is the run's own launch command, printed again with the changes",
        _RECOVER_EXAMPLES,
        asked.recovery_of,
    )
    add_flags(verb, RecoveryRequest, "load")["load"].required = True
    add_flags(verb, RecoveryRequest, "save")
    add_flags(verb, Modes)
    add_flags(verb, RecoveryRequest, "overwrite", "threads")
    add_flags(verb, OnRanks)
    add_flags(verb, Written)
    add_flags(verb, Logged)
    group = verb.add_argument_group("where the run went wrong")
    add_flags(group, RecoveryRequest, "metrics", "onset", "loss", "grad_norm")
    add_flags(group, SpikeSettings)
    group = verb.add_argument_group("what to merge")
    add_flags(group, RecoveryRequest, "last", "interval_tokens", "interval_iterations")
    add_flags(group, RecoveryRequest, "margin_iterations", "further_back", "exclude")
    add_flags(group, Method, "method", "alpha")
    add_flags(group, RecoveryRequest, "optimizer_state")
    group = verb.add_argument_group("how to go on")
    add_flags(group, RecoveryRequest, "skip", "lr_factor")
    verb.set_defaults(passes_on=True)
