"""Which kernel sums, what it refuses, and whole merges by each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_sums import BEST, COMPILED, SETS, TORCH, needs_kernel

from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, merge
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.merging import sums
from pma_megatron.merging.sums import choose

GOLDEN = Path(__file__).parents[1] / "golden" / "main-dp_reshardable-dense.tar.xz"


@needs_kernel
def test_the_kernel_refuses_what_would_read_or_write_beside_a_buffer() -> None:
    kernel = BEST.compiled.average
    four, six = bytearray(16), memoryview(bytearray(24))
    how = ((1.0,), 1.0, False, (four,), "f")
    for bad in (
        (9, 4, (four,), "f", (how,)),
        (-1, 4, (four,), "f", (how,)),
        (0, 5, (four,), "f", (how,)),
        (0, -1, (four,), "f", (how,)),
        (0, 4, (six[1:],), "f", (how,)),
        (0, 4, (four,), "x", (how,)),
        (0, 4, (four,), "ff", (how,)),
        (0, 2, (four,), "d", (how,)),
        (0, 4, (four,), "f", (((1.0, 1.0), 1.0, False, (four,), "f"),)),
        (0, 4, (four,), "f", (((1.0,), 1.0, False, (four,), "fb"),)),
        (0, 2, (four,), "f", (((1.0,), 1.0, False, (four,), "d"),)),
        (0, 4, (four,), "f", (((1.0,), 1.0, False, (bytearray(15),), "f"),)),
    ):
        with pytest.raises(ValueError):
            kernel(*bad)
    for odd in (
        (0, 4, [four], "f", (how,)),
        (0, 4, (four,), "f", ((1.0,),)),
        (0, 4, (3,), "f", (how,)),
        (0, 4, (four,), "f", ((("1",), 1.0, False, (four,), "f"),)),
    ):
        with pytest.raises(TypeError):
            kernel(*odd)
    with pytest.raises(TypeError, match="read-only"):
        kernel(0, 4, (four,), "f", (((1.0,), 1.0, False, (bytes(16),), "f"),))
    assert kernel(0, 4, (four,), "f", (how,)) is True


def test_the_environment_chooses_what_sums() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "from pma_megatron.merging.sums import KERNEL; print(KERNEL)"],
        env={**os.environ, sums.CHOICE: "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "torch (PMA_MEGATRON_KERNEL=torch)\n"
    for name in SETS:
        assert str(choose(name)) == f"the kernel in C ({name})"
    with pytest.raises(UsageError, match="avx1024"):
        choose("avx1024")
    wrong = subprocess.run(
        [sys.executable, "-c", "from pma_megatron.merging.sums import KERNEL; KERNEL.refuse()"],
        env={**os.environ, sums.CHOICE: "avx1024"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UsageError: PMA_MEGATRON_KERNEL=avx1024: there is torch" in wrong.stderr


def test_without_the_extension_torch_sums_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pma_megatron.merging._kernel", None)
    assert choose().compiled is None
    assert "not compiled" in str(choose())
    with pytest.raises(UsageError, match="there is torch here"):
        choose("avx2")


def test_a_merge_refuses_what_its_dtype_does_not_hold(tmp_path: Path) -> None:
    root, save = tmp_path / "run", tmp_path / "save"
    shutil.unpack_archive(GOLDEN, root)
    method = Method(name="custom", values=(2e6, 2e6), allow_any=True)
    request = MergeRequest(
        load=str(root),
        save=str(save),
        method=method,
        dtype="fp16",
        selection=SelectionRequest(last=2),
    )
    with pytest.raises(CheckpointError, match=r"reaches .* float16 ends at 65504: take .*bf16"):
        merge(request)
    assert not save.exists()


@pytest.mark.parametrize("average", ["main-params", "weights"])
def test_a_merge_writes_the_same_bytes_whatever_sums(
    tmp_path: Path, average: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact and inexact coefficients in one pass, by every kernel, and by torch without FMA."""
    root = tmp_path / "run"
    shutil.unpack_archive(GOLDEN, root)
    written: dict[str, dict[str, bytes]] = {}
    emulated = sums.Kernel(why="without FMA")
    for kernel in (TORCH, emulated, *COMPILED):
        monkeypatch.setattr(sums, "KERNEL", kernel)
        if kernel is emulated:
            monkeypatch.setattr(sums, "_is_fused", lambda *_: False)
        request = MergeRequest(
            load=str(root),
            save=str(tmp_path / str(kernel)),
            policy=Policy(average=average, optimizer_state="average"),
            sweep=("sma,1-sqrt:2",),
        )
        report = merge(request)
        assert report.kernels == (str(kernel),)
        written[str(kernel)] = {
            f"{Path(folder).parent.name}/{file.name}": file.read_bytes()
            for folder in report.outputs
            for file in Path(folder).iterdir()
            if file.suffix == ".distcp"
        }
    first, *others = written.values()
    assert len(first) > 1
    assert all(other == first for other in others)
