"""README and docs/: examples run, links lead somewhere, flags exist.

An example in Python runs in this process, or where the comment above it says:

    <!-- runs in: deepspeed -->          `engine` is a live engine
    <!-- runs in: megatron -->           `model_chunks` and `optimizer` are Megatron's
    <!-- not run: why -->                it only has to compile
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import verbs
from test_launch_scripts import known_flags

import pma_megatron
from pma_megatron.cli.flags import parser
from pma_megatron.testing import TinyTrainer, run_ranks
from pma_megatron.testing.config import TinyConfig
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

ROOT = Path(__file__).parents[1]
GUIDES = [
    ROOT / "README.md",
    ROOT / "patches" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINKED = [
    *GUIDES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "launch").rglob("README.md")),
]
GENERATED = ROOT / "docs" / "results.md"  # its numbers and commands have tests of their own


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Examples in Python.


@dataclass(frozen=True)
class Example:
    """A fenced block: where it stands, what it needs, its text."""

    name: str
    where: str
    source: str


_PYTHON = re.compile(
    r"(?:^<!-- (?P<note>(?:runs in|not run): .*?) -->\n)?^```python\n(?P<source>.*?)^```$",
    re.M | re.S,
)


def examples() -> Iterator[Example]:
    for path in GUIDES:
        if path == GENERATED:
            continue
        for number, found in enumerate(_PYTHON.finditer(path.read_text()), 1):
            note = found["note"] or "runs in: python"
            where = "" if note.startswith("not run") else note.partition(": ")[2]
            yield Example(f"{named(path)} {number}", where, found["source"])


EXAMPLES = list(examples())


def of(*where: str) -> list[Any]:
    found = [each for each in EXAMPLES if not where or each.where in where]
    return [pytest.param(each, id=each.name) for each in found]


def code(example: Example, root: Path) -> Any:
    """The example with the paths of a tiny run, and with as few checkpoints as that has."""
    source = example.source
    for written, there in {
        "/ckpts/": f"{root}/ckpts/",
        "/logs/run.log": f"{ROOT}/tests/logs/core_v0.12.0.log",
        "last=10": "last=3",
        "interval_iterations=1000": "interval_iterations=1",
    }.items():
        source = source.replace(written, there)
    return compile(source, example.name, "exec")


@pytest.mark.parametrize("example", of())
def test_examples_compile(example: Example) -> None:
    compile(example.source, example.name, "exec")
    assert example.where in ("", "python", "megatron", "deepspeed")


@pytest.mark.megatron
@pytest.mark.parametrize("example", of("python"))
def test_examples_run(example: Example, dense_run: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_run, tmp_path / "ckpts" / "run")
    exec(code(example, tmp_path), {"__name__": "example"})
    merged = list((tmp_path / "ckpts").glob("run-pma/iter_*"))
    assert bool(merged) == ("merge(" in example.source)


def in_megatron(rank: int, world_size: int, example: Example, root: Path) -> list[bool]:
    """Resume the newest checkpoint and run the example; which main params have changed."""
    trainer = TinyTrainer(TinyConfig(warmup_iters=2))
    trainer.load(root / "ckpts" / "run")
    before = {name: value.clone() for name, value in trainer.main_params().items()}
    names = {"model_chunks": trainer.models, "optimizer": trainer.optimizer}
    exec(code(example, root), names)
    after = trainer.main_params()
    trainer.close()
    return [not torch.equal(before[name], value) for name, value in after.items()]


@pytest.mark.megatron
@pytest.mark.parametrize("example", of("megatron"))
def test_examples_run_in_megatron(example: Example, dense_run: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_run, tmp_path / "ckpts" / "run")
    changed = run_ranks(in_megatron, 2, example, tmp_path)
    assert all(any(rank) for rank in changed)


def in_deepspeed(
    rank: int, world_size: int, each: list[tuple[Example, Path]]
) -> list[tuple[int, bool]]:
    """Train three tags per example, and run it in a fresh engine; the engine's step afterwards, and
    whether the client state says what was averaged."""
    return [_in_deepspeed(rank, example, root) for example, root in each]


def _in_deepspeed(rank: int, example: Example, root: Path) -> tuple[int, bool]:
    config = DeepSpeedConfig(stage=2)
    first = TinyDeepSpeed(config)
    for _ in range(3):
        first.train(2)
        first.save(root / "ckpts" / "ds-run")
    first.close()
    trainer = TinyDeepSpeed(config, seed=1)
    draw = torch.Generator().manual_seed(rank)
    names: dict[str, Any] = {
        "pma_megatron": importlib.import_module("pma_megatron"),
        "engine": trainer.engine,
        "deepspeed": SimpleNamespace(initialize=lambda _: (trainer.engine, None)),
        "data": [torch.randn(4, 5, generator=draw).bfloat16() for _ in range(3)],
        "evaluate_now": True,
        "save_now": True,
    }
    exec(code(example, root), names)
    step = trainer.engine.global_steps
    trainer.close()
    return step, "pma" in names.get("client_state", {})


def test_examples_run_in_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    chosen = [example for example in EXAMPLES if example.where == "deepspeed"]
    each = [(example, tmp_path / str(number)) for number, example in enumerate(chosen)]
    for results in run_ranks(in_deepspeed, 2, each):
        for (example, root), (step, said) in zip(each, results, strict=True):
            if "OnlineAverage" in example.source:  # a loop over the data of a new run
                averages = root / "ckpts" / "ds-run-pma"
                assert step == 3, example.name
                assert (averages / "latest").is_file() and (averages / "window").is_dir()
            else:
                assert step == 6, example.name
                assert said == ("client_state =" in example.source), example.name


# Links.

_FENCED = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)
_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
_LINK = re.compile(r"\[[^\]]*\]\((?P<to>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(?P<title>.+?)\s*#*$", re.M)


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return _FENCED.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: set[str] = set()
    for heading in _HEADING.finditer(prose(path)):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading["title"]).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        more = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
        found.add(f"{slug}-{more}" if more else slug)
    return found


@pytest.mark.parametrize("path", LINKED, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.finditer(_SPAN.sub("", prose(path))):
        to, _, anchor = link["to"].partition("#")
        if "://" in to:
            continue
        target = (path.parent / to).resolve() if to else path
        assert target.exists() and target.is_relative_to(ROOT), f"{named(path)}: {link['to']}"
        if anchor:
            assert anchor in anchors(target), f"{named(path)}: {link['to']}"


_NAMED = re.compile(r"(?<![\w./-])(?:tests|launch|patches|docs|pma_megatron)/[\w./-]*\w")
_DOTTED = re.compile(r"\bpma_megatron(?:\.[A-Za-z_]\w*)+")


@pytest.mark.parametrize("path", [p for p in LINKED if p != GENERATED], ids=named)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in _NAMED.findall(re.sub(r"\]\([^)]*\)", "]", path.read_text())):
        assert (ROOT / name).exists(), f"{named(path)}: {name}"


@pytest.mark.parametrize("path", GUIDES, ids=named)
def test_names_of_the_package_exist(path: Path) -> None:
    for dotted in _DOTTED.findall(path.read_text()):
        found: Any = pma_megatron
        for name in dotted.split(".")[1:]:
            if not hasattr(found, name):
                importlib.import_module(f"{found.__name__}.{name}")
            found = getattr(found, name)


# Commands and flags.

_FLAG = re.compile(r"(?<![\w-])--[a-z](?:[\w-]*\w)?(?!\w|-?\*)")
FOREIGN = {
    "launch/gpu_check.sh": {"--cpu", "--list", "--only", "--peer", "--peer-says", "--wheels"},
    "aws": {"--recursive"},
    "pip": {"--no-build-isolation", "--no-deps"},
    "sbatch": {"--nodes"},
    "torchrun": {"--nnodes", "--nproc-per-node"},
    "torchtitan": {"--checkpoint"},
    "Megatron": {
        "--async-save",
        "--bf16",
        "--check-for-nan-in-loss-and-grad",
        "--make-vocab-size-divisible-by",
        "--ckpt-format",
        "--ckpt-step",
        "--dataloader-save",
        "--eval-iters",
        "--finetune",
        "--iterations-to-skip",
        "--load",
        "--load-main-params-from-ckpt",
        "--log-interval",
        "--log-validation-ppl-to-tensorboard",
        "--lr",
        "--lr-decay-iters",
        "--lr-decay-style",
        "--lr-wsd-decay-iters",
        "--min-lr",
        "--moe-layer-freq",
        "--no-gradient-accumulation-fusion",
        "--no-load-optim",
        "--override-ckpt-iteration",
        "--no-load-rng",
        "--optimizer",
        "--non-persistent-ckpt-type",
        "--override-opt_param-scheduler",
        "--save",
        "--save-interval",
        "--save-retain-interval",
        "--tensorboard-dir",
        "--sft",
        "--skip-train",
        "--use-checkpoint-args",
        "--verify-integrity",
    },
    "Megatron-DeepSpeed": {"--deepspeed", "--kd", "--mos", "--universal-checkpoint"},
    "DeepSpeed's converter": {"--inject_missing_state", "--input_folder", "--output_folder"},
    "hf": {"--local-dir"},
    "lm_eval": {"--device", "--model", "--model_args", "--tasks"},
    "launch/": {"--dry-run", "--list", "--points", "--recipes", "--seeds"},
    "patches/apply.sh": {"--check", "--reverse"},
    "an example's own model": {"--batches", "--float32"},
}
"""Flags in the docs that are other programs'."""


def texts(path: Path) -> str:
    return path.read_text().replace("\\\n", " ")


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """(verb, rest) of every `pma` command in a block or a span of code."""
    text = texts(path)
    blocks = "\n".join(found[0] for found in _FENCED.finditer(text)).split("\n")
    spans = [" ".join(f[0].strip("`").split()) for f in _SPAN.finditer(_FENCED.sub("", text))]
    for line in (*blocks, *spans):
        for found in re.finditer(r"(?:\bpma|-m pma_megatron) ([a-z]+)\b([^`]*)", line):
            if found[1] == "validation":  # ` pma validation loss`: a line of Megatron's log
                continue
            rest = re.split(r"(?:^| )-- |\s#\s|\s\s+#|, `?pma | > | \| |\)\"", found[2])[0]
            yield found[1], rest


@pytest.mark.parametrize("path", GUIDES, ids=named)
def test_commands_exist_with_the_flags_they_are_given(path: Path) -> None:
    known = verbs()
    for verb, rest in commands(path):
        assert verb in known, f"{named(path)}: pma {verb}"
        options = {option for action in known[verb]._actions for option in action.option_strings}
        assert set(_FLAG.findall(rest)) <= options, f"{named(path)}: pma {verb}{rest}"


@pytest.mark.parametrize("path", [p for p in GUIDES if p != GENERATED], ids=named)
def test_whole_commands_parse(path: Path) -> None:
    for verb, rest in commands(path):
        words = shlex.split(rest)
        if len(words) > 1 and not re.search(r"\.\.\.|<|\(|\b[A-Z]+\b", rest):
            parser().parse_args([verb, *words])


def test_flags_exist() -> None:
    own = {
        option for verb in verbs().values() for a in verb._actions for option in a.option_strings
    }
    own |= known_flags()
    found = {
        named(path): set(_FLAG.findall(re.sub(r"<!--.*?-->|`-+`", "", texts(path))))
        for path in GUIDES
        if path != GENERATED
    }
    foreign = set().union(*FOREIGN.values())
    unknown = {name: flags - own - foreign for name, flags in found.items()}
    assert not {name: flags for name, flags in unknown.items() if flags}
    assert foreign <= set().union(*found.values()), "flags that no page names any more"


# The front page.


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split("\n")) < 200


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = tmp_path / "timeline.svg"
    script = ROOT / "launch" / "figures" / "timeline.py"
    subprocess.run([sys.executable, str(script), str(drawn)], check=True)
    pinned = (ROOT / "launch" / "constraints.txt").read_text().split()
    assert drawn.read_text().rstrip().endswith("</svg>")
    if f"matplotlib=={matplotlib.__version__}" in pinned:
        assert drawn.read_bytes() == (ROOT / "docs" / "img" / "timeline.svg").read_bytes()
