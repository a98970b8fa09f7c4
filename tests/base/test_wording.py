"""Messages name settings as the user types them, and none that the user does not have."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from test_megatron_flags import parse

from checkpoint_refs import WRITING, every, ref, untold
from conftest import request_for
from pma_megatron import MergeRequest, Policy, merge, plan
from pma_megatron.base.spelling import (
    FrontEnd,
    among,
    given,
    has,
    hint,
    keywords,
    mistyped,
    named,
    renamed,
    speaking,
    switch,
)
from pma_megatron.cli import main
from pma_megatron.cli.flags import parser
from pma_megatron.cli.verbs import front_end
from pma_megatron.deepspeed.options import OPTIONS
from pma_megatron.errors import PmaError
from pma_megatron.live.load import ARGUMENTS
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.flags import FLAGS
from pma_megatron.merging.request import Method
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.runs.tokens import given_tokens
from pma_megatron.scores.grid import Grid
from pma_megatron.spikes.healthy import HealthyRequest, choose_healthy
from pma_megatron.spikes.recovery import KEYWORDS as RECOVERY
from pma_megatron.spikes.recovery import RecoveryRequest
from test_layers import modules

FLAG, KEYWORD = re.compile(r"--[a-z][a-z-]*"), re.compile(r"\b[a-z_]+=")
SPACED = {"interval_tokens": 2 * 10**9, "last": 4}
REQUESTS: tuple[dict[str, Any], ...] = (
    {"last": 0},
    {"last": 9},
    {"last": 9, "exclude": (2000,)},
    {"last": 2, "exclude": (2500,)},
    {"last": 9, "end_iteration": 3000},
    {"end_iteration": 2500},
    {"end_iteration": 6000},
    {"end_iteration": 3000, "exclude": (3000,)},
    {"tolerance": 0.5},
    {"interval_tokens": 1, "interval_iterations": 1},
    {"window_tokens": 9, "interval_iterations": 1},
    {"window_tokens": 9, "last": 3},
    {"window_tokens": 15, "interval_tokens": 8},
    {"window_tokens": 1},
    {**SPACED, "tolerance": 0.1},
    {**SPACED, "last": 8},
    {**SPACED, "exclude": (2000,)},
    {"interval_iterations": 700, "last": 3, "tolerance": 0.01},
    {"window_tokens": 9 * 10**9, "interval_tokens": 10**9},
    {"iterations": ()},
    {"iterations": (1, 1)},
    {"iterations": (1000, 2500)},
    {"iterations": (1,), "last": 2},
    {"paths": ("/nowhere",)},
    {"paths": ("a", "a/")},
    {"paths": ("/run/iter_0006000",)},
)
RUNS = (
    [*every(1000, 5000), ref(6000, incomplete=WRITING)],
    [ref(1000), ref(1000, path="/run/copy"), *every(2000, 4000)],
    [untold(i) for i in (1000, 2000, 3000)],
    [],
)
METHODS = (
    {"name": "mean"},
    {"name": "ema", "alpha": 2.0},
    {"name": "sma", "alpha": 0.5},
    {"name": "custom"},
    {"name": "custom", "values": (0.5, 0.4)},
    {"floor": 0.5},
    {"name": "custom", "values": (1.5, -0.5)},
    {"name": "linear", "floor": 1.5},
    {"name": "custom", "values": (0.5, 0.25, 0.25)},
    {"allow_any": True},
)

HEALTHY: tuple[dict[str, Any], ...] = (
    {"onset": 0},
    {"onset": 10},
    {"onset": 1500, "margin_iterations": 900},
    {"onset": 9000, "margin_iterations": -1},
    {"onset": 9000, "last": 9},
)


def command_line(verb: str, *typed: str) -> FrontEnd:
    verbs = next(a for a in parser()._actions if a.dest == "verb").choices
    assert verbs is not None
    return front_end(verbs[verb], typed)


FRONT_ENDS = {
    "pma merge": command_line("merge"),
    "pma recover": command_line("recover"),
    "pma geometry": command_line("geometry"),
    "--pma flags": FLAGS,
    "load_merged()": OPTIONS,
    "merge_into()": ARGUMENTS,
    "recover()": RECOVERY,
    "merge()": FrontEnd(),
}
OBJECTS = (MergeRequest, SelectionRequest, Method, Policy, RecoveryRequest, HealthyRequest, Grid)
FIELDS = keywords(field.name for kind in OBJECTS for field in fields(kind))
"""The keywords that Python calls have."""


def refusals() -> Iterator[tuple[set[str], Callable[[], Any]]]:
    """The settings that a request has, and a call that may refuse it."""
    for refs in RUNS:
        for request in REQUESTS:
            yield set(request), lambda q=request, r=refs: select(r, SelectionRequest(**q))
    for method in METHODS:
        settings = {"values": "coefficients", "allow_any": "allow_any_coefficients"}
        names = {settings.get(name, name) for name in method if name != "name"}
        yield names, lambda m=method: Method(**m).of((1, 2), 2)
    for healthy in HEALTHY:
        yield set(healthy), lambda h=healthy: choose_healthy(RUNS[0], HealthyRequest(**h))


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_no_refusal_names_a_setting_that_its_user_does_not_have(name: str) -> None:
    front_end = FRONT_ENDS[name]
    spelled = set((front_end.spelled or FIELDS).values())
    messages = []
    with speaking(front_end):
        for settings, call in refusals():
            if all(map(has, settings)):
                try:
                    call()
                except PmaError as error:
                    messages.append(str(error))
    assert len(messages) >= 10
    for message in messages:
        assert set(FLAG.findall(message)) | set(KEYWORD.findall(message)) <= spelled, message
    assert any(FLAG.search(m) or KEYWORD.search(m) for m in messages)


@pytest.mark.parametrize("front_end", [command_line("evaluate"), FLAGS])
def test_a_grid_names_its_axes(front_end: FrontEnd) -> None:
    with speaking(front_end):
        with pytest.raises(PmaError, match=r"lasts must be at least 1") as caught:
            Grid(lasts=(0,))
        assert FLAG.findall(str(caught.value))[0] in (front_end.spelled or {}).values()
        with pytest.raises(PmaError) as caught:
            Grid(lasts=(9,)).points(RUNS[0])
    assert set(FLAG.findall(str(caught.value))) <= set((front_end.spelled or {}).values())


def test_the_flag_that_was_typed_is_the_one_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--interval-steps", "--interval-iterations"):
        assert main(["plan", "--load", str(tmp_path), flag, "0"]) == 2
        assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err
        assert main(["plan", "--load", str(tmp_path), f"{flag}=0"]) == 2
        assert f"{flag} must be at least 1" in capsys.readouterr().err


def test_sentences_have_no_holes() -> None:
    """`use or wait`: the ways out that do not exist leave nothing behind."""
    with pytest.raises(PmaError) as caught:
        select([ref(1000)], SelectionRequest(last=3))
    assert str(caught.value).endswith("found 1; wait until more are complete")


def test_one_mistake_is_told_in_the_words_of_whoever_made_it(
    dense_run: Path, save: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real calls: of the command, of Python, of a Megatron script."""
    places = ["--load", str(dense_run), "--save", str(save)]

    def python(**settings: Any) -> str:
        with pytest.raises(PmaError) as caught:
            merge(MergeRequest(**{"load": str(dense_run), "save": str(save)} | settings))
        return str(caught.value)

    def command(*typed: str) -> str:
        assert main(["merge", *places, *typed]) != 0
        return capsys.readouterr().err

    last = SelectionRequest(last=9)
    assert "use --last 4" in command("--last", "9")
    assert "use last=4" in python(selection=last)
    with speaking(FLAGS):
        assert "use --pma-last 4" in python(selection=last)
    for typed, settings, words in (
        (
            ("--policy", "x=newest", "--last", "2"),
            {"policy": Policy(overrides=(("x", "newest"),)), "selection": SelectionRequest(last=2)},
            "'x' matches no entry",
        ),
        (
            ("--save", str(dense_run), "--last", "2"),
            {"save": str(dense_run), "selection": SelectionRequest(last=2)},
            "is the run's own folder",
        ),
    ):
        told, said = command(*typed), python(**settings)
        assert words in told and f"{typed[0]} " in told
        assert words in said and not FLAG.search(said) and KEYWORD.search(said)
    merge(request_for(dense_run, save))
    assert "Use --overwrite to replace it" in command("--last", "2")
    assert "Use overwrite=True to replace it" in python(selection=SelectionRequest(last=2))
    why = {row.why for row in plan(request_for(dense_run, save, overwrite=True)).table}
    assert "optimizer_state='latest'" in why
    with pytest.raises(PmaError, match=r"--pma-alpha 2.0 must lie in"):
        argument_parser.settings(parse("--pma-init --pma-method ema --pma-alpha 2"))


def test_values_are_typed_as_the_front_end_takes_them() -> None:
    def said() -> tuple[str, ...]:
        return (
            given("exclude", (4, 6)),
            given("save", Path("/a b")),
            given("tolerance", 0.25),
            given_tokens("last", 8 * 10**9),
            given_tokens("last", 8388 * 10**6),
            mistyped("optimizer_state", "mean"),
            switch("overwrite"),
            hint("exclude", "last"),
        )

    assert said() == (
        "exclude=(4, 6)",
        "save='/a b'",
        "tolerance=0.25",
        "last=8_000_000_000",
        "last=8_388_000_000",
        "optimizer_state='mean'",
        "overwrite=True",
        " (exclude= or last=)",
    )
    with speaking(command_line("merge")):
        assert said() == (
            "--exclude 4 6",
            "--save /a b",
            "--tolerance 0.25",
            "--last 8B",
            "--last 8388000000",
            "--optimizer-state 'mean'",
            "--overwrite",
            " (--exclude or --last)",
        )
    with speaking(command_line("verify")):
        assert hint("exclude") == ""


def test_the_first_front_end_speaks_in_all_threads_until_it_ends() -> None:
    assert named("last") == "last="
    with speaking(FLAGS):
        with speaking(OPTIONS), renamed(last="lasts"):
            assert (named("last"), given("exclude", 3)) == ("--pma-score-lasts", "--pma-exclude 3")
        said: list[str] = []
        thread = threading.Thread(target=lambda: said.append(named("tolerance")))
        thread.start()
        thread.join()
        assert said == ["--pma-tolerance"]
        assert among("paths", "iterations") == "--pma-iterations" and named("paths") == "paths"
    with pytest.raises(ValueError), speaking(OPTIONS):
        assert given("last", 3) == "last=3"
        raise ValueError
    assert named("last") == "last="


# Where flags stand in the sources.

OF_A_SCRIPT = {
    "launch",
    "megatron.argument_parser",
    "megatron.checks",
    "megatron.flags",
    "megatron.init",
    "megatron.evaluate_grid",
    "megatron.retained",
    "megatron_deepspeed.hooks",
}
"""Modules that only a Megatron script with `--pma-*` flags gets into: its dialect is theirs."""
OF_OTHERS = {
    "base.comm": {"--nproc-per-node"},  # of torchrun
    "export.template": {"--exclude", "--local-dir"},  # of `hf download`
    "export.families.trained": {"--use-rope-scaling"},  # of Megatron
    "formats.registry": {  # of Megatron
        "--ckpt-convert-format",
        "--ckpt-convert-save",
        "--ckpt-format",
    },
    "formats.dcp.format": {"--load", "--checkpoint"},  # of Megatron and torchtitan
    "formats.torch_dist.format": {  # of Megatron
        "--load",
        "--dist-ckpt-optim-fully-reshardable",
        "--save-tokenizer-assets",
        "--verify-integrity",
    },
    "formats.deepspeed.format": {  # of DeepSpeed's converter
        "--inject_missing_state",
        "--input_folder",
        "--output_folder",
    },
    "formats.rates": {"--"},  # before the names of Megatron's settings
    "formats.torch_dist.buckets": {"--dist-ckpt-optim-fully-reshardable"},  # of Megatron
    "live.plan": {"--make-vocab-size-divisible-by"},  # of Megatron
    "pages.merged": {"--export", "--from", "--save"},  # commands on a page that people read
    "pages.page": {"--json", "--out"},
    "pages.recovered": {"--dry-run", "--load", "--metrics", "--save"},
    "megatron.curvature": {  # of Megatron and torchrun
        "--bf16",
        "--fp16",
        "--no-gradient-accumulation-fusion",
        "--nproc-per-node",
    },
    "megatron.evaluate_geometry": {  # of Megatron
        "--exit-duration-in-mins",
        "--multiple-validation-sets",
    },
    "megatron.load": {"--ckpt-step"},  # of Megatron
    "megatron.params": {"--optimizer-cpu-offload"},  # of Megatron
    "merging.report": {"--load", "--save", "--no-load-optim"},  # of Megatron, to resume
    "spikes.relaunch": {  # the same, and one whole command `pma merge`
        "--",
        "--ckpt-step",
        "--finetune",
        "--iterations-to-skip",
        "--load",
        "--load-main-params-from-ckpt",
        "--load-tag",
        "--no-load-lr-state",
        "--no-load-optim",
        "--no-load-rng",
        "--non-persistent-ckpt-type",
        "--non-persistent-global-ckpt-dir",
        "--non-persistent-local-ckpt-algo",
        "--non-persistent-local-ckpt-dir",
        "--non-persistent-save-interval",
        "--override-ckpt-iteration",
        "--reset-iteration",
        "--save",
        "--seed",
        "--last",
        "--lr-factor",
    },
    "megatron.hooks": {"--save-retain-interval"},  # of Megatron
    "megatron.save": {"--save-retain-interval"},  # of Megatron
    "watching.commands": {  # of a `pma merge`
        "--allow-any-coefficients",
        "--coefficients",
        "--end-iteration",
        "--json",
        "--method",
        "--overwrite",
        "--paths",
    },
    "watching.follow": {"--nproc-per-node"},  # of torchrun
    "watching.request": {"--nproc-per-node"},  # of torchrun
    "runs.tokens": {"--iterations-to-skip", "--decrease-batch-size-if-needed"},  # of Megatron
}
"""Flags that modules may spell, for they are no settings of this package."""


def texts(path: Path) -> Iterator[str]:
    """String literals, but no docstrings."""
    tree = ast.parse(path.read_text())
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        literal = isinstance(node, ast.Constant) and id(node) not in described
        if literal and isinstance(node.value, str):
            yield node.value


def test_settings_are_spelled_by_nobody_but_the_front_end() -> None:
    """A flag in a string is one that Python's users read too, unless it is another program's."""
    flag = re.compile(r"(?<![\w-])--(?:[a-z][\w-]*|$)")
    found = {
        name: {each for text in texts(path) for each in flag.findall(text)}
        for name, path in modules().items()
        if name.partition(".")[0] != "cli" and name not in {*OF_A_SCRIPT, "base.spelling"}
    }
    assert {name: flags for name, flags in found.items() if flags} == OF_OTHERS
