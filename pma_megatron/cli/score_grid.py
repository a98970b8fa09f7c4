"""What `pma evaluate` and `pma forecast` share: the grid's flags, the model, the scores."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.settings import MEGATRON, declared
from pma_megatron.base.spelling import as_flag
from pma_megatron.cli.asked import grid_of, refuse_no_scorer
from pma_megatron.cli.consoles import new_console, new_table
from pma_megatron.errors import UsageError
from pma_megatron.formats import registry
from pma_megatron.launch import main as run_script
from pma_megatron.megatron.score import Scored, score_merges
from pma_megatron.runs.folders import is_checkpoint
from pma_megatron.runs.tokens import format_tokens
from pma_megatron.scores.grid import UNMERGED, Grid
from pma_megatron.scores.results import Score, Scores

Provider = Callable[[str, list[str]], Scored]


def score(arguments: argparse.Namespace, others: Sequence[str] = ()) -> Scores | None:
    """Score the grid; None on all ranks but 0.

    Raises:
        UsageError: flags that cannot be met.
        PmaError: see `score_merges`.
    """
    if arguments.load is None:
        raise UsageError("say where the checkpoints are: --load DIR")
    refuse_other_trainers(Path(arguments.load))
    grid = grid_of(arguments)
    refuse_no_scorer(arguments)
    if arguments.megatron is not None:
        return _through_megatron(arguments, others)
    with process_group_from_environment(arguments.timeout_s):
        comm = Comm()
        with provided(arguments, arguments.load, comm) as scored:
            scores = score_merges(
                scored.models,
                arguments.load,
                grid,
                scored.score,
                metadata=scored.metadata,
                threads=arguments.threads,
                others=others,
                comm=comm,
            )
        return scores if comm.is_main else None


def show_scores(scores: Scores) -> None:
    """The scores as a table, and what was left out."""
    console = new_console()
    losses = [column for name in scores.metrics for column in (name, "minus unmerged")]
    title = f"{scores.load}: {len(scores.points)} averages scored"
    table = new_table(title, "iteration", "tokens", "method", "N", "V", *losses)
    end = None
    for point in scores.points:
        if end not in (None, point.end_iteration):
            table.add_section()
        end = point.end_iteration
        tokens = scores.tokens[end]
        cells = [text for name in scores.metrics for text in _cells(scores, point, name)]
        table.add_row(
            str(end),
            "unknown" if tokens is None else format_tokens(tokens),
            point.method,
            str(point.last),
            point.spacing,
            *cells,
        )
    console.print(table)
    left_out: dict[tuple[int, str], dict[int, str]] = {}
    for skipped in scores.skipped:
        reasons = left_out.setdefault((skipped.last, skipped.spacing), {})
        reasons[skipped.end_iteration] = skipped.reason
    for (last, spacing), reasons in left_out.items():
        iteration, reason = list(reasons.items())[-1]
        name = f"N = {last}{f', V = {spacing}' if spacing else ''}"
        console.print(
            f"left out: {name} at {len(reasons)} ends; at iteration {iteration}: {reason}",
            soft_wrap=True,
        )


def _cells(scores: Scores, point: Score, metric: str) -> tuple[str, str]:
    gain = "" if point.method == UNMERGED else f"{scores.gain(point, metric):+.4f}"
    return f"{point.losses[metric]:.4f}", gain


@contextlib.contextmanager
def provided(arguments: argparse.Namespace, load: str, comm: Comm) -> Iterator[Scored]:
    """What `--provider` builds for the checkpoints at `load`; closed at the end of the block."""
    provider = comm.agree("provider", lambda: provider_of(arguments.provider))
    scored = comm.agree("provider", lambda: provider(load, list(arguments.rest)))
    try:
        yield scored
    finally:
        scored.close()


def refuse_other_trainers(root: Path) -> None:
    """Averages are scored in a live Megatron model, which other trainers' folders do not fit.

    Raises:
        UsageError: the checkpoints below `root` are of another trainer.
    """
    folders = [path for path in (root, *root.glob("*")) if is_folder(path) and is_checkpoint(path)]
    formats = {registry.detect(folder) for folder in folders}
    if registry.TORCH_DIST not in formats and any(
        f.startswith(registry.DEEPSPEED) for f in formats
    ):
        raise UsageError(
            f"{root} holds DeepSpeed checkpoints, and averages are scored in a live Megatron "
            "model. Write them with pma merge --load ... --save ... --sweep METHODS:NUMBERS, and "
            "evaluate each in your own script after engine.load_checkpoint"
        )
    if formats == {registry.SAFETENSORS}:
        raise UsageError(
            f"{root} holds Hugging Face models, and averages are scored in a live Megatron model. "
            "Write them with pma merge --load ... --save ... --sweep METHODS:NUMBERS, and evaluate "
            "each as any model, for instance with lm_eval --model hf --model_args pretrained=FOLDER"
        )


def _through_megatron(arguments: argparse.Namespace, others: Sequence[str]) -> Scores | None:
    """Run Megatron's script with `--pma-score`, on every rank; rank 0 gets the scores."""
    with tempfile.TemporaryDirectory(prefix="pma_evaluate_") as folder:
        out = Path(folder) / "scores.json"
        run_megatron(arguments.megatron, _megatron_flags(arguments, others, out))
        if os.environ.get("RANK", "0") != "0":
            return None
        if not out.is_file():
            raise did_not_evaluate(arguments.megatron)
        return Scores.from_json(json.loads(out.read_text()))


def run_megatron(script: str, flags: Sequence[str]) -> None:
    """Run a script of Megatron's in this process, with the hooks of `pma_megatron.launch`.

    Raises:
        SystemExit: it could not be started; the message has been printed.
    """
    code = run_script([script, *flags])
    if code:
        raise SystemExit(code)


def did_not_evaluate(script: str) -> UsageError:
    """What to say of a script that ended without an evaluation."""
    return UsageError(
        f"{script} did not evaluate: give it validation data and --eval-iters after --, as in "
        "training"
    )


def with_megatron(load: str) -> list[str]:
    """The flags with which a script of Megatron's builds the model of a run and evaluates it."""
    return ["--load", load, "--use-checkpoint-args", "--skip-train"]


def _megatron_flags(arguments: argparse.Namespace, others: Sequence[str], out: Path) -> list[str]:
    from pma_megatron.megatron.flags import name_of  # flags that no other command needs

    ours = [*with_megatron(arguments.load), "--pma-score"]
    for each in declared(Grid, MEGATRON):
        typed = getattr(arguments, each.name)
        if typed is not None and typed is not False and typed != []:
            words = () if typed is True else typed if each.many else [typed]
            ours += [as_flag(name_of(each, "score_")), *map(str, words)]
    ours += ["--pma-score-others", *others] if others else []
    ours += ["--pma-threads", str(arguments.threads), "--pma-score-out", str(out)]
    return [*ours, *arguments.rest]


def provider_of(text: str) -> Provider:
    """The function that `MODULE:FUNCTION` or `FILE.py:FUNCTION` names.

    Raises:
        UsageError: there is none.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(
            f"--provider {text!r} is not MODULE:FUNCTION or FILE.py:FUNCTION, as in "
            "pma_megatron.testing.provider:tiny"
        )
    try:
        module = (
            _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
    except (ImportError, OSError) as error:
        raise UsageError(
            f"--provider {text}: {where} cannot be imported ({error}): give the path of its file, "
            "or put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"--provider {text}: {where} has no function {name}")
    return found


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up by name
    spec.loader.exec_module(module)
    return module
