"""The patches: a line per function and import; a patched tree trains as a plain one, bit for bit.

With MEGATRON_LM_PATH (a Megatron-LM source tree of a release that has a patch) copies of it are
patched and trained. With MEGATRON_DEEPSPEED_PATH a copy of that tree is patched and compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conftest import digests
from oracle import read_by_torch
from pma_megatron.megatron.install import TARGETS
from pma_megatron.megatron.tree_functions import TreeFunction
from pma_megatron.megatron_deepspeed.install import TARGETS as DEEPSPEED_TARGETS
from pma_megatron.testing.megatron_lm import Through, run_pretrain

PATCHES = Path(__file__).parents[2] / "patches"
ALL = sorted(PATCHES.glob("*/pma.patch"))
TREE = os.environ.get("MEGATRON_LM_PATH")
real = pytest.mark.skipif(TREE is None, reason="MEGATRON_LM_PATH names no Megatron-LM tree")

DEEPSPEED_TREE = os.environ.get("MEGATRON_DEEPSPEED_PATH")
DEEPSPEED = "megatron-deepspeed-"
_HUNK = re.compile(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@$")


def apply(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`patches/apply.sh` with these arguments."""
    return subprocess.run(
        ["bash", str(PATCHES / "apply.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_is_a_patch_for_each_release_that_is_named() -> None:
    names = {path.parent.name for path in ALL}
    releases = {"core_v0.15.3", "core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0"}
    releases.add("main-d98e8a64ddf34856e74b24714e3bedb2f5a39553")
    assert names == {*releases, f"{DEEPSPEED}4efb479d5317ce9b86096b9d8e3e8030b0b5263b"}


def tree_of(path: Path) -> tuple[tuple[TreeFunction, ...], str]:
    """What a patch is to decorate, and the package its decorators lie in."""
    if path.parent.name.startswith(DEEPSPEED):
        return DEEPSPEED_TARGETS, "megatron_deepspeed"
    return TARGETS, "megatron"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.parent.name)
def test_a_patch_adds_imports_and_decorators_and_nothing_else(path: Path) -> None:
    lines = path.read_text().splitlines()
    added = [line[1:] for line in lines if re.match(r"\+(?!\+\+ )", line)]
    removed = [line for line in lines if re.match(r"-(?!-- )", line)]
    targets, package = tree_of(path)
    wanted = [f"@pma.{target.decorator.__name__}" for target in targets]
    imports = [f"from pma_megatron.{package} import decorators as pma"] * 3
    assert removed == []
    assert sorted(added) == sorted([*wanted, *imports])
    hunks = [_HUNK.match(line) for line in lines if line.startswith("@@")]
    assert [match and match.groups() for match in hunks] == [("2", "3")] * (len(targets) + 3)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.parent.name)
def test_every_decorator_stands_above_the_function_of_its_file(path: Path) -> None:
    text = path.read_text()
    parts = {Path(part.split(" ", 1)[0]).stem: part for part in text.split("diff --git a/")[1:]}
    for target in tree_of(path)[0]:
        # Where Megatron has a decorator of its own there, that is the line of context.
        below = rf"(@_otel_trace_fn\('{target.name}'|def {target.name}\()"
        decorated = rf"^\+@pma\.{target.decorator.__name__}\n {below}"
        assert re.search(decorated, parts[target.module], re.MULTILINE), target.name


def test_what_is_no_tree_or_has_no_patch_is_refused_by_name(tmp_path: Path) -> None:
    done = apply(tmp_path)
    assert done.returncode == 2 and "is not a Megatron source tree" in done.stderr
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 16\nPATCH = 9\n")
    before = digests(tmp_path)
    for version, folder in ((16, "core_v0.16.1"), (14, "main-")):
        info.write_text(f"MAJOR = 0\nMINOR = {version}\nPATCH = 9\n")
        before = digests(tmp_path)
        done = apply(tmp_path)
        assert done.returncode == 1
        assert f"no patch fits megatron-core 0.{version}.9 in {tmp_path}" in done.stderr
        assert f"what git says to {folder}" in done.stderr
        assert "pma_megatron.launch" in done.stderr
        assert digests(tmp_path) == before
    assert apply().returncode == 2
    assert apply(tmp_path, "--force").returncode == 2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the real tree, without what training does not need."""
    skip = shutil.ignore_patterns(".git", "tests", "docs", "images", "__pycache__")
    return Path(shutil.copytree(str(TREE), tmp_path / "tree", ignore=skip))


@real
def test_a_patch_goes_in_once_and_comes_out_again(tree: Path) -> None:
    before = digests(tree)
    assert apply(tree, "--check").stdout.startswith("fits: patch ")
    assert digests(tree) == before
    assert apply(tree).stdout.startswith("applied: patch ")
    patched = digests(tree)
    changed = {name for name in before if before[name] != patched[name]}
    assert changed == {f"megatron/training/{target.module}.py" for target in TARGETS}
    assert apply(tree).stdout.startswith("applied already: patch ")
    assert apply(tree, "--check").stdout.startswith("applied already: patch ")
    assert digests(tree) == patched
    assert apply(tree, "--reverse").stdout.startswith("taken out: patch ")
    assert digests(tree) == before
    assert apply(tree, "--reverse").stdout.startswith("nothing to take out: patch ")


@pytest.mark.skipif(DEEPSPEED_TREE is None, reason="MEGATRON_DEEPSPEED_PATH is not set")
def test_the_patch_of_megatron_deepspeed_goes_in_once_and_comes_out_again(tmp_path: Path) -> None:
    megatron = Path(str(DEEPSPEED_TREE)) / "megatron"
    files = {f"{target.module}.py" for target in DEEPSPEED_TARGETS}
    for name in (*files, "core/package_info.py"):
        copy = tmp_path / "megatron" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(megatron / name, copy)
    before = digests(tmp_path)
    assert apply(tmp_path).stdout.startswith(f"applied: patch {DEEPSPEED}")
    patched = digests(tmp_path)
    assert {n for n in before if before[n] != patched[n]} == {f"megatron/{name}" for name in files}
    for name in files:
        compile((tmp_path / "megatron" / name).read_text(), name, "exec")
    assert apply(tmp_path, "--reverse").stdout.startswith("taken out: patch ")
    assert digests(tmp_path) == before


@real
def test_a_tree_inside_another_repository_is_patched_too(tree: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tree.parent)], check=True)
    before = digests(tree)
    assert apply(tree).returncode == 0
    assert digests(tree) != before


@real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_patched_and_launched_trees_train_as_a_plain_one_bit_for_bit(
    tree: Path, tmp_path: Path
) -> None:
    ways: list[tuple[str, Through, bool]] = [
        ("plain", "plain", False),
        ("launched", "launcher", False),
        ("patched", "plain", True),
        ("patched and launched", "launcher", True),
    ]
    seen = {}
    for name, through, patched in ways:
        if patched and "applied" not in apply(tree).stdout:
            pytest.fail("the patch did not go in")
        save = tmp_path / name
        options = "--train-iters 3 --save-interval 3 --dist-ckpt-optim-fully-reshardable"
        arguments = [*options.split(), "--save", str(save)]
        run = run_pretrain(tree, arguments, ranks=2, through=through)
        assert set(run.losses) == {1, 2, 3}
        seen[name] = run.losses, tensors(save / "iter_0000003")
    losses, saved = seen.pop("plain")
    assert any(key.startswith("optimizer.") for key in saved)
    for name, (other_losses, other_saved) in seen.items():
        assert other_losses == losses, name
        assert other_saved.keys() == saved.keys(), name
        for key, value in saved.items():
            assert torch.equal(other_saved[key], value), f"{name}: {key}"


@real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_flags_a_patched_tree_does_what_the_launcher_does(tree: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", ["--train-iters", "8", "--save-interval", "2"]
    steps.append("--dist-ckpt-optim-fully-reshardable")
    run_pretrain(
        tree, [*steps, "--save", str(run), "--exit-interval", "4"], ranks=2, through="plain"
    )
    average = (
        "--pma-init --pma-last 2 --pma-save --pma-eval --pma-interval-tokens 256 --pma-recover"
    )
    flags = [*steps, "--load", str(run), *average.split(), "--eval-interval", "2"]
    flags += ["--pma-snapshot-interval-tokens", "256"]
    launched = run_pretrain(tree, [*flags, "--save", str(tmp_path / "launched")], ranks=2)
    assert apply(tree).returncode == 0
    patched = run_pretrain(
        tree, [*flags, "--save", str(tmp_path / "patched")], ranks=2, through="plain"
    )
    assert set(launched.losses) == {5, 6, 7, 8} and patched.losses == launched.losses
    scored = [
        [line.strip() for line in made.output.splitlines() if "pma validation loss" in line]
        for made in (launched, patched)
    ]
    assert scored[0] == scored[1] != []
    for folder in ("iter_0000008", "../launched-pma/iter_0000008"):
        one = tensors(tmp_path / "launched" / folder)
        other = tensors(tmp_path / "patched" / folder.replace("launched", "patched"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    taken = [
        sorted(p.name for p in (tmp_path / name / "pma_snapshots").glob("iter_*"))
        for name in ("launched", "patched")
    ]
    assert taken[0] == taken[1] != []


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return read_by_torch(folder, [key for key, entry in metadata.items() if hasattr(entry, "size")])
