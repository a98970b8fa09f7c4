"""What a user can ask for is declared once: requests, flags and keywords cannot come apart."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from pma_megatron import cli
from pma_megatron.base.settings import PMA, declared, made, nested
from pma_megatron.cli.flags import Checks, Deletion, Modes, Paged, Sameness, parser
from pma_megatron.cli.score_flags import Compared, Loss, Scorer
from pma_megatron.cli.verbs import Common, Files, Logged, OnRanks, Written
from pma_megatron.deepspeed.options import KEYWORDS, Options
from pma_megatron.errors import UsageError
from pma_megatron.live.load import Live
from pma_megatron.megatron.flags import RecoverySettings, Settings
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.retention.request import PruneRequest
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.scores.grid import Grid
from pma_megatron.spikes.healthy import HealthyRequest, Span
from pma_megatron.spikes.request import RecoveryRequest
from pma_megatron.spikes.settings import SpikeSettings
from pma_megatron.watching.request import WatchRequest

REQUESTS: tuple[type, ...] = (
    MergeRequest,
    SelectionRequest,
    Method,
    Policy,
    RecoveryRequest,
    HealthyRequest,
    SpikeSettings,
    Grid,
    PruneRequest,
    WatchRequest,
)
OTHERS: tuple[type, ...] = (
    Common,
    OnRanks,
    Written,
    Files,
    Checks,
    Compared,
    Deletion,
    Logged,
    Loss,
    Modes,
    Paged,
    Sameness,
    Scorer,
    Live,
    RecoverySettings,
    Settings,
)
VERBS: dict[str, argparse.ArgumentParser] = dict(
    next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
)
DEFAULT = re.compile(r"\(default: ([^)]*)\)")


@pytest.mark.parametrize("kind", (*REQUESTS, *OTHERS))
def test_every_field_says_what_it_is(kind: type) -> None:
    said = {each.field: each.setting.help for each in declared(kind)}
    parts = {*nested(kind), *(("recover", "score") if kind is Settings else ())}
    assert set(said) | parts == {each.name for each in fields(kind)}
    assert all(len(text) > 5 for text in said.values())
    assert all("default" not in text for text in said.values()), "the field has it"


@pytest.mark.parametrize("kind", REQUESTS)
def test_docstrings_of_requests_say_what_their_fields_are(kind: type) -> None:
    text = " ".join((inspect.getdoc(kind) or "").split())
    assert all(f"{each.field}: {' '.join(each.help.split())}" in text for each in declared(kind))


@pytest.mark.parametrize("verb", VERBS)
def test_no_flag_of_pma_is_declared_nowhere(verb: str) -> None:
    known = {each.name for kind in (*REQUESTS, *OTHERS) for each in declared(kind, PMA)}
    flags = {action.dest for action in VERBS[verb]._actions if action.option_strings}
    assert flags - {"help"} <= known


@pytest.mark.parametrize("verb", VERBS)
def test_a_default_that_is_printed_is_the_one_that_is_used(verb: str) -> None:
    """Typed, it changes nothing: neither what was parsed nor the request that is made of it."""
    of_folders = ("list", "inspect", "verify", "export", "compare", "prune", "report")
    alone = verb in ("completion", *of_folders)
    given = {"completion": ["zsh"], "compare": ["/run", "/other"], "report": ["/run", "--out", "x"]}
    words = given.get(verb, ["/run"] if alone else ["--load", "/run"])
    kinds = {"recover": RecoveryRequest, "evaluate": Grid, "forecast": Grid}
    onset = {"save": "/new", "onset": 3, "skip": None} if verb == "recover" else {}

    def request(*typed: str) -> object:
        values = {**vars(VERBS[verb].parse_args([*words, *typed])), **onset}
        if alone:
            return values
        own = {name: values.get(name) for name in ("timeout_s", "poll_s")}
        return own, made(kinds.get(verb, MergeRequest), values)

    printed = 0
    for action in VERBS[verb]._actions:
        for text in DEFAULT.findall(action.help or ""):
            printed += 1
            same = request(action.option_strings[-1], *text.split())
            if action.dest == "last":
                assert text == {"recover": "3"}.get(verb, "10")
            else:
                assert same == request(), (action.dest, text)
    assert printed >= 3 or alone


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_defaults_and_an_example(verb: str) -> None:
    text = VERBS[verb].format_help()
    assert f" {verb} " in text.partition("examples:\n")[2]
    for action in VERBS[verb]._actions:
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert DEFAULT.search(action.help or ""), action.dest


def test_flags_are_made_of_settings_alone() -> None:
    """Whoever adds a flag by hand types its help and its default a second time."""
    found = {
        path.name: re.findall(r"\.add_argument\(\s*(.[^,]*)", path.read_text())
        for path in Path(cli.__file__).parent.glob("*.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {
        "flags.py": [
            *(
                '"--version"',
                "where",
                '"first"',
                '"second"',
                '"root"',
                '"path"',
                '"shell"',
                '"path"',
            )
        ]
    }


def test_what_was_not_given_has_its_default() -> None:
    assert made(MergeRequest, {"load": "/run", "last": None}) == MergeRequest(load="/run")
    typed = {"load": "/run", "exclude": [1, 2], "policy": ["a=b=drop"]}
    assert made(MergeRequest, typed, threads=3) == MergeRequest(
        load="/run",
        selection=SelectionRequest(exclude=(1, 2)),
        policy=Policy(overrides=(("a=b", "drop"),)),
        threads=3,
    )
    recovery = made(RecoveryRequest, {"load": "/run", "save": "/new", "onset": 7, "patience": 40})
    assert recovery.spike == SpikeSettings(patience=40) and recovery.last is None
    internal: dict[str, Any] = {"spans": (Span(1, 2),), "onset": 7}
    assert made(HealthyRequest, internal).spans == (), "no front end has it"


def test_the_type_of_a_word_is_that_of_the_field() -> None:
    found = {each.name: (each.word, each.many) for each in declared(SelectionRequest)}
    assert found["last"] == (int, False) and found["tolerance"] == (float, False)
    assert found["exclude"] == (int, True) and found["iterations"] == (int, True)
    assert found["allow_gaps"] == (bool, False) and found["paths"] == (str, True)
    found = {each.name: (each.word, each.many) for each in declared(Grid)}
    assert found["ends"] == found["methods"] == (str, True)


@dataclass(frozen=True)
class Bare:
    """A request that says nothing of its field."""

    last: int = 3


def test_a_field_that_declares_nothing_is_no_setting() -> None:
    assert declared(Bare) == ()


OF_DEEPSPEED = {
    "last": None,
    "interval_tokens": None,
    "interval_iterations": None,
    "tolerance": 0.25,
    "end_iteration": None,
    "window_tokens": None,
    "exclude": [],
    "allow_gaps": False,
    "iterations": None,
    "paths": None,
    "method": "sma",
    "alpha": None,
    "floor": 0.0,
    "coefficients": None,
    "optimizer_state": "latest",
    "share": "auto",
    "threads": 2,
}
"""What tags that were saved after a start from an average say of it, and people have in scripts."""


def test_keywords_of_deepspeed_calls_are_frozen() -> None:
    assert Options().record() == OF_DEEPSPEED
    assert Options(method=None, tolerance=None).record() == OF_DEEPSPEED
    assert set(KEYWORDS) == {*OF_DEEPSPEED, "check_sources"}
    given = {"paths": [("/run", "global_step1"), "/other/global_step2"], "exclude": (3,)}
    assert Options(**given).record() == OF_DEEPSPEED | {
        "paths": ["/run/global_step1", "/other/global_step2"],
        "exclude": [3],
    }


def test_a_keyword_that_there_is_not_is_told_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"no keyword argument 'interval_token': did you mean"):
        Options(interval_token=3)
    with pytest.raises(TypeError, match=r"'xyz': they have last, interval_tokens, .*sources$"):
        Options(xyz=3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Policy(optimizer_state="mean"), "latest, average, reset, drop"),
        (lambda: Options(optimizer_state="drop").request("/run", None), "latest, average, reset$"),
        (lambda: Options(share="all").request("/run", None), "auto, source, slice"),
        (lambda: Policy(average="x"), "main-params, weights"),
        (lambda: Method(name="x"), "sma, ema, wma, custom, linear"),
        (lambda: MergeRequest(load="/run", dtype="x"), "bf16, fp16, fp32"),
    ],
)
def test_an_unknown_word_is_told_with_those_that_it_may_be(call: Any, words: str) -> None:
    with pytest.raises(UsageError, match=rf"is unknown; choose one of {words}"):
        call()
