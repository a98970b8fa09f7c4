"""The `--pma-*` flags: what they store, the settings they make, and what they refuse."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pma_megatron
from pma_megatron.deepspeed.options import Options
from pma_megatron.errors import UsageError
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.flags import EXIT_CODE, NAMES, USED_BY
from pma_megatron.megatron_deepspeed.hooks import _options
from pma_megatron.merging.request import Method
from pma_megatron.scores.grid import Grid

JOB = {
    "save": "/ckpts/run",
    "load": "/ckpts/run",
    "ckpt_format": "torch_dist",
    "data_parallel_size": 4,
    "tensor_model_parallel_size": 2,
    "use_distributed_optimizer": True,
}
"""What Megatron's own arguments say in a job that every use works in."""

FROZEN = {
    "pma-init",
    "pma-load",
    "pma-last",
    "pma-interval-tokens",
    "pma-interval-iterations",
    "pma-tolerance",
    "pma-end-iteration",
    "pma-iterations",
    "pma-exclude",
    "pma-allow-gaps",
    "pma-method",
    "pma-alpha",
    "pma-floor",
    "pma-coefficients",
    "pma-optimizer-state",
    "pma-share",
    "pma-threads",
    "pma-check-sources",
    "pma-save",
    "pma-save-dir",
    "pma-window-dir",
    "pma-eval",
    "pma-snapshot-interval-tokens",
    "pma-snapshot-dtype",
    "pma-snapshot-dir",
    "pma-keep",
    "pma-recover",
    "pma-recover-last",
    "pma-recover-optimizer-state",
    "pma-recover-attempts",
    "pma-recover-margin-iterations",
    "pma-recover-warmup",
    "pma-recover-patience",
    "pma-recover-fatal-rise",
    "pma-score",
    "pma-score-methods",
    "pma-score-lasts",
    "pma-score-intervals-tokens",
    "pma-score-intervals-iterations",
    "pma-score-ends",
    "pma-score-others",
    "pma-score-out",
}
"""What people have in their job scripts: adding is a decision, removing breaks them."""
NOT_IN_DEEPSPEED = {
    name
    for name in FROZEN
    if name == "pma-load"
    or name == "pma-keep"
    or "snapshot" in name
    or "recover" in name
    or "score" in name
}


def parse(text: str, **job: Any) -> argparse.Namespace:
    """Megatron's namespace after `text`, with `job` on top of `JOB`."""
    parser = argument_parser.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args(text.split(), argparse.Namespace(**{**JOB, **job}))


def test_flags_add_one_group_of_plain_values() -> None:
    parser = argparse.ArgumentParser()
    before = len(parser._action_groups)
    assert argument_parser.add_arguments(parser) is parser
    assert [group.title for group in parser._action_groups[before:]] == ["PMA (pma_megatron)"]
    given = ["--pma-init", "--pma-interval-tokens", "8B", "--pma-exclude", "1", "2"]
    args = vars(parser.parse_args(given))
    assert set(args) == set(NAMES)
    assert args["pma_interval_tokens"] == 8_000_000_000
    assert args["pma_exclude"] == [1, 2]
    plain = (bool, int, float, str, list, type(None))
    assert all(type(value) in plain for value in args.values())
    assert b"pma_megatron" not in pickle.dumps(args)


def test_a_default_that_is_printed_is_the_one_that_is_used() -> None:
    """Typed, it changes nothing of the settings."""
    job = "--pma-init --pma-save --pma-recover --pma-score --pma-snapshot-interval-tokens 8"
    printed = set()
    for action in argument_parser.add_arguments(argparse.ArgumentParser(add_help=False))._actions:
        assert action.help is not None and action.dest in NAMES
        found = re.search(r"\(default: ([^)]*)\)", action.help)
        if found is not None and action.dest != "pma_last":
            printed.add(action.dest)
            typed = f"{job} {action.option_strings[0]} {found[1]}"
            assert argument_parser.settings(parse(typed)) == argument_parser.settings(parse(job)), (
                typed
            )
        elif found is not None:
            assert int(found[1]) == argument_parser.settings(parse(job)).window
    assert len(printed) >= 15


def test_flags_are_made_of_settings_alone() -> None:
    """Whoever adds a flag by hand types its help and its default a second time."""
    for folder in ("megatron", "megatron_deepspeed"):
        for path in (Path(pma_megatron.__file__).parent / folder).glob("*.py"):
            assert path.read_text().count(".add_argument(") == (
                path.name == "argument_parser.py"
            ), path


def test_flags_are_frozen() -> None:
    def added(add: Callable[[argparse.ArgumentParser], object]) -> set[str]:
        add(parser := argparse.ArgumentParser(add_help=False))
        return {option for action in parser._actions for option in action.option_strings}

    assert added(argument_parser.add_arguments) == {f"--{name}" for name in FROZEN}
    deepspeed = {f"--{name}" for name in FROZEN - NOT_IN_DEEPSPEED}
    assert added(argument_parser.add_deepspeed_arguments) == deepspeed
    assert EXIT_CODE == 85  # of a job whose attempts to recover are spent


def test_nothing_given_is_not_enabled_and_neither_is_a_namespace_without_the_flags() -> None:
    assert not argument_parser.enabled(parse(""))
    assert not argument_parser.enabled(argparse.Namespace())
    assert all(argument_parser.enabled(argparse.Namespace(**{name: 0.0})) for name in NAMES)


def test_settings_fill_in_the_defaults() -> None:
    made = argument_parser.settings(
        parse("--pma-init --pma-save --pma-interval-tokens 8B", save="/a/run/")
    )
    assert (made.init, made.save, made.eval_, made.snapshots) == (True, True, False, False)
    assert (made.load, made.save_dir) == ("/ckpts/run", "/a/run-pma")
    assert made.snapshot_dir == "/a/run/pma_snapshots"
    assert (made.method.name, made.optimizer_state, made.share) == ("sma", "latest", "auto")
    assert (made.window, made.threads, made.snapshot_dtype) == (10, 2, "fp32")
    assert made.selection.interval_tokens == made.interval_tokens == 8_000_000_000
    assert made.selection.last is None


def test_settings_take_every_option() -> None:
    made = argument_parser.settings(
        parse(
            "--pma-init --pma-load /src --pma-last 4 --pma-interval-tokens 1B --pma-tolerance 0 "
            "--pma-end-iteration 90 --pma-exclude 70 80 --pma-method ema --pma-alpha 0.2 "
            "--pma-optimizer-state reset --pma-share source --pma-threads 3 --pma-save "
            "--pma-save-dir /out --pma-window-dir /nvme --pma-eval "
            "--pma-snapshot-interval-tokens 500M --pma-snapshot-dtype bf16 "
            "--pma-snapshot-dir /snap --pma-keep 8"
        )
    )
    assert made.init and made.save and made.eval_ and made.snapshots
    assert (made.load, made.save_dir, made.window_dir) == ("/src", "/out", "/nvme")
    assert (made.snapshot_dir, made.snapshot_dtype, made.keep) == ("/snap", "bf16", 8)
    assert (made.selection.last, made.selection.tolerance) == (4, 0.0)
    assert (made.selection.end_iteration, made.selection.exclude) == (90, (70, 80))
    assert (made.method.name, made.method.alpha) == ("ema", 0.2)
    assert (made.optimizer_state, made.share, made.threads) == ("reset", "source", 3)


def test_listed_sources_do_not_contradict_the_window_of_the_running_average() -> None:
    window = "--pma-save --pma-last 4 --pma-interval-tokens 1B"
    made = argument_parser.settings(parse(f"--pma-init --pma-iterations 10 20 {window}"))
    assert made.selection.iterations == (10, 20)
    assert (made.window, made.interval_tokens) == (4, 1_000_000_000)


@pytest.mark.parametrize(
    "text",
    [
        "--pma-init",
        "--pma-init --pma-load /elsewhere --pma-last 3 --pma-interval-iterations 100",
        "--pma-init --pma-iterations 10 20 30 --pma-method custom --pma-coefficients .2 .3 .5",
        "--pma-init --pma-method 1-sqrt --pma-floor 0.1",
        "--pma-save --pma-interval-tokens 8B --pma-eval",
        "--pma-snapshot-interval-tokens 8B --pma-keep 1",
        "--pma-init --pma-snapshot-interval-tokens 8B --pma-keep 10",
    ],
)
def test_what_works_is_not_refused(text: str) -> None:
    argument_parser.validate(parse(text))


def test_the_grid_to_score(tmp_path: Path) -> None:
    text = (
        "--pma-score --pma-score-methods sma ema:0.2 --pma-score-lasts 3 6 --pma-exclude 7 "
        "--pma-score-intervals-tokens 4B 8B --pma-score-ends every:2 --pma-tolerance 0.1 "
        "--pma-threads 3 --pma-score-others /decay "
    )
    out = str(tmp_path / "out.json")
    text += f"--pma-score-out {out}"
    args = parse(text, skip_train=True)
    argument_parser.validate(args)
    made = argument_parser.settings(args)
    assert made.score == Grid(
        methods=(Method(), Method(name="ema", alpha=0.2)),
        lasts=(3, 6),
        ends="every:2",
        intervals_tokens=(4_000_000_000, 8_000_000_000),
        exclude=(7,),
        tolerance=0.1,
    )
    assert (made.score_others, made.score_out, made.threads) == (("/decay",), out, 3)
    assert argument_parser.settings(parse("--pma-init")).score is None
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for wrong in (tracker, tmp_path / "iter_0000004" / "out.json", tmp_path / "no" / "out.json"):
        args = parse(f"--pma-score --pma-score-out {wrong}", skip_train=True)
        with pytest.raises(UsageError, match=f"--pma-score-out {wrong}"):
            argument_parser.validate(args)


INIT = "--pma-init"
SAVE = "--pma-save --pma-interval-tokens 8B"
SNAPSHOTS = "--pma-snapshot-interval-tokens 8B"
SCORE = {"skip_train": True}


@pytest.mark.parametrize(
    ("text", "job", "words"),
    [
        (INIT, {"load": None}, "--pma-init needs --load"),
        (f"{INIT} --pma-load /a", {"load": None}, "--pma-load names the sources"),
        (INIT, {"finetune": True}, "--finetune starts at iteration 0"),
        (INIT, {"no_load_optim": True}, "--pma-optimizer-state reset"),
        (INIT, {"skip_train": True, "no_load_optim": True}, "--skip-train"),
        (f"{INIT} --pma-last 0", {}, "--pma-last must be at least 1, got 0"),
        (f"{INIT} --pma-threads 0", {}, "--pma-threads must be at least 1, got 0"),
        (f"{INIT} --pma-iterations 1 2 --pma-last 2", {}, "so --pma-last would have no effect"),
        (
            f"{INIT} --pma-interval-tokens 1B --pma-interval-iterations 5",
            {},
            "--pma-interval-tokens and --pma-interval-iterations cannot be combined",
        ),
        (f"{INIT} --pma-method ema", {}, "--pma-method ema needs --pma-alpha"),
        (f"{INIT} --pma-method ema --pma-alpha 2", {}, "--pma-alpha 2.0 must lie in (0, 1]"),
        (f"{INIT} --pma-alpha 0.2", {}, "alpha"),
        (f"{INIT} --pma-method custom --pma-coefficients .5 .5", {}, "10"),
        ("--pma-eval", {}, "add --pma-save"),
        ("--pma-save", {}, "--pma-save needs --pma-interval-tokens"),
        (SAVE, {"save": None}, "--pma-save needs --save"),
        (f"{SAVE} --pma-save-dir /ckpts/run", {"load": None}, "is the folder of --save"),
        (f"{SAVE} --pma-save-dir /ckpts/x/../old", {"load": "/ckpts/old"}, "folder of --load"),
        (f"{SAVE} --pma-window-dir /a --pma-save-dir /a", {}, "is the folder of --pma-save-dir"),
        (SNAPSHOTS, {"save": None}, "--pma-snapshot-interval-tokens needs --save"),
        (f"{SNAPSHOTS} --pma-snapshot-dir /ckpts/run", {}, "is the folder of --save"),
        (f"{SNAPSHOTS} --pma-keep 0", {}, "--pma-keep must be at least 1, got 0"),
        ("--pma-snapshot-interval-tokens 0", {}, "must be at least 1, got 0"),
        (f"{INIT} {SNAPSHOTS} --pma-keep 9", {}, "raise --pma-keep to at least 10"),
        (
            f"{INIT} --pma-last 5 --pma-interval-tokens 16B {SNAPSHOTS} --pma-keep 8",
            {},
            "raise --pma-keep to at least 9",
        ),
        ("--pma-score", {}, "--pma-score needs --skip-train"),
        ("--pma-score", {"load": None, **SCORE}, "--pma-score needs --load"),
        (f"--pma-score {SAVE}", SCORE, "--pma-score and --pma-save cannot be combined"),
        ("--pma-score --pma-score-ends some", SCORE, "--pma-score-ends 'some' is not all"),
        ("--pma-score --pma-score-methods mean", SCORE, "--pma-score-methods 'mean' is unknown"),
        (INIT, {"ckpt_format": "torch"}, "--ckpt-format torch_dist (Megatron's default), found"),
        (SAVE, {"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        (SAVE, {"use_custom_fsdp": True}, "--use-custom-fsdp"),
        (SAVE, {"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        (SAVE, {"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
        (SAVE, {"fp8_param_gather": True}, "--fp8-param-gather"),
        (SAVE, {"fp4_param": True}, "--fp4-param-gather"),
        (SAVE, {"optimizer": "dist_muon"}, "--optimizer dist_muon"),
        (SAVE, {"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
        (SAVE, {"expert_gtp_weight_remat_size": 2}, "--expert-tensor-parallel-num-weight-shards"),
    ],
)
def test_what_cannot_work_is_refused(text: str, job: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        argument_parser.validate(parse(text, **job))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(USED_BY))
def test_an_option_without_its_flag_is_refused(name: str) -> None:
    args = parse("")
    setattr(args, name, 1)
    assert argument_parser.enabled(args), "or nobody would look"
    with pytest.raises(UsageError, match="has no effect without"):
        argument_parser.validate(args)


@pytest.mark.parametrize(
    "text",
    [
        "--pma-interval-tokens 8X",
        "--pma-method mean",
        "--pma-optimizer-state drop",
        "--pma-share all",
        "--pma-snapshot-dtype fp16",
    ],
)
def test_the_parser_refuses_unknown_words(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(text)
    assert text.split()[0] in capsys.readouterr().err


def test_recover_has_settings_only_where_it_is_asked_for() -> None:
    assert argument_parser.settings(parse("--pma-init")).recover is None
    made = argument_parser.settings(
        parse("--pma-recover --pma-recover-last 5 --pma-recover-patience 40")
    )
    assert made.recover is not None
    assert (made.recover.last, made.recover.spike.patience) == (5, 40)
    assert made.recover.optimizer_state == "latest"


@pytest.mark.parametrize(
    ("text", "job", "words"),
    [
        ("--pma-recover", {"save": None}, "--save-interval"),
        ("--pma-recover", {"save_interval": None}, "--save-interval"),
        ("--pma-recover", {"no_save_optim": True}, "--no-save-optim"),
        ("--pma-recover", {"skip_train": True}, "--skip-train"),
        ("--pma-recover --pma-recover-last 0", {}, "--pma-recover-last"),
        ("--pma-recover --pma-recover-attempts 0", {}, "--pma-recover-attempts"),
        ("--pma-recover --pma-recover-patience 1", {}, "patience"),
        ("--pma-recover-last 3", {}, "no effect without --pma-recover"),
    ],
)
def test_recover_refuses(text: str, job: dict[str, Any], words: str) -> None:
    args = parse(text, **{"save_interval": 10, **job})
    with pytest.raises(UsageError, match=words):
        argument_parser.validate(args)


def test_recover_is_accepted() -> None:
    argument_parser.validate(
        parse("--pma-recover --pma-recover-margin-iterations 0", save_interval=10)
    )


def test_every_flag_of_a_selection_reaches_a_deepspeed_engine() -> None:
    """One that is parsed and then lost on the way would pass over checkpoints in silence."""
    parser = argument_parser.add_deepspeed_arguments(argparse.ArgumentParser())
    args = parser.parse_args(
        [
            "--pma-init",
            "--pma-last",
            "3",
            "--pma-interval-iterations",
            "4",
            "--pma-tolerance",
            "0.1",
            "--pma-end-iteration",
            "9",
            "--pma-exclude",
            "5",
            "7",
            "--pma-allow-gaps",
        ]
    )
    wanted = argument_parser.settings(args).selection
    assert wanted.allow_gaps and wanted.exclude == (5, 7)
    assert (
        Options(**_options(argument_parser.settings(args))).request("/run", 8).selection == wanted
    )
