"""What is handed out: a source archive with everything, a wheel with the package alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from pma_megatron.version import __version__

ROOT = Path(__file__).parents[1]
CARRIED = (".ci", "docs", "launch", "patches", "pma_megatron", "tests")
LOOSE = {
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "SECURITY.md",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
}
MADE = {"PKG-INFO", "setup.cfg"}
MADE_BY_USE = ("__pycache__", "*.py[co]", ".*_cache", "*.egg-info", "*.so")
KERNEL = "pma_megatron/merging/_kernel"
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler here"
)


def run(cwd: Path, *command: object, **environment: str) -> str:
    """What a command of this Python prints in `cwd`; it must succeed."""
    # Coverage is of this tree, not of its copies.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**mine, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a fresh clone has it: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    copy.mkdir()
    for name in CARRIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*MADE_BY_USE))
    for name in LOOSE:
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """Folder with the archive, and the wheel that was made from it."""
    out = source.parent / "dist"
    run(source.parent, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


def wheel_in(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_the_archive_holds_everything(source: Path, built: Path) -> None:
    root = f"pma_megatron-{__version__}"
    with tarfile.open(built / f"{root}.tar.gz") as archive:
        found = {
            member.name.removeprefix(f"{root}/") for member in archive if member.isfile()
        } - MADE
    wanted = {name for name in files_below(source) if not name.startswith("pma_megatron.egg-info")}
    assert {name for name in found if not name.startswith("pma_megatron.egg-info")} == wanted
    assert {name.split("/")[0] for name in wanted} == LOOSE | set(CARRIED)
    assert f"{KERNEL}.c" in wanted


def test_the_wheel_holds_the_package_alone(source: Path, built: Path) -> None:
    with zipfile.ZipFile(wheel_in(built)) as wheel:
        found = {name for name in wheel.namelist() if not name.endswith(".so")}
    metadata = f"pma_megatron-{__version__}.dist-info/"
    wanted = {f"pma_megatron/{name}" for name in files_below(source / "pma_megatron")}
    wanted.remove(f"{KERNEL}.c")  # what is compiled from it is there instead
    assert {name for name in found if not name.startswith(metadata)} == wanted
    assert "pma_megatron/py.typed" in wanted
    assert {f"{metadata}{name}" for name in ("METADATA", "RECORD", "entry_points.txt")} <= found


def test_an_index_would_take_both(built: Path) -> None:
    said = run(built, "-m", "twine", "check", "--strict", *built.iterdir(), COLUMNS="400")
    assert said.count("PASSED") == 2, said


def installed(wheel: Path, into: Path) -> Path:
    flags = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    run(into.parent, "-m", "pip", "install", *flags, "--target", into, wheel)
    return into


def kernel_of(into: Path) -> str:
    """What sums in a package that was installed there."""
    says = "from pma_megatron.merging import sums; print(sums.KERNEL)"
    return run(into.parent, "-c", says, PYTHONPATH=str(into), PMA_MEGATRON_KERNEL="")


@needs_compiler
def test_the_wheel_holds_one_kernel_for_every_python(built: Path) -> None:
    with zipfile.ZipFile(wheel_in(built)) as wheel:
        found = [name for name in wheel.namelist() if name.endswith(".so")]
    limited = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")
    if limited:
        assert found == [f"{KERNEL}.abi3.so"]
        assert "-cp311-abi3-" in wheel_in(built).name
    else:
        assert found == [f"{KERNEL}{sysconfig.get_config_var('EXT_SUFFIX')}"]


def test_without_a_compiler_the_package_works_and_says_what_it_lacks(
    built: Path, tmp_path: Path
) -> None:
    (archive,) = built.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (source,) = tmp_path.iterdir()
    wheels = tmp_path / "wheels"
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source)
    run(tmp_path, *build, CC="/bin/false", PMA_MEGATRON_REQUIRE_KERNEL="")
    said = kernel_of(installed(wheel_in(wheels), tmp_path / "installed"))
    assert said.startswith("torch (several times slower than the kernel in C, which was not comp")
    strict = {**os.environ, "CC": "/bin/false", "PMA_MEGATRON_REQUIRE_KERNEL": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "t")]
    refused = subprocess.run(command, cwd=source, env=strict, capture_output=True, check=False)
    assert refused.returncode != 0


def test_an_installed_wheel_runs(built: Path, tmp_path: Path) -> None:
    into = installed(wheel_in(built), tmp_path / "installed")
    where = "import pma_megatron; print(pma_megatron.__file__)"
    assert run(tmp_path, "-c", where, PYTHONPATH=str(into)).startswith(f"{into}/pma_megatron/")
    assert (into / "pma_megatron" / "pages" / "page.html").is_file()
    said = run(tmp_path, "-m", "pma_megatron", "--version", PYTHONPATH=str(into))
    assert said == f"pma_megatron {__version__}\n"
    if shutil.which(os.environ.get("CC", "cc")) is not None:
        assert kernel_of(into).startswith("the kernel in C (")


def test_hooks_run_the_ruff_that_is_pinned() -> None:
    pinned = (ROOT / "launch" / "constraints.txt").read_text().split()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = [hook["rev"] for hook in hooks if hook["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}" in pinned
