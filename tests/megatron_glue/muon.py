"""Runs of Megatron-LM with Muon on the CPU: for the test that resumes one, and for its golden run.

    PYTHONPATH=.:tests/megatron_glue python tests/megatron_glue/muon.py TREE EMERGING

writes tests/golden/muon/main-dist_muon-tp2.tar.xz, with the Megatron-LM source tree TREE and
EMERGING, an unpacked wheel of emerging-optimizers 0.3.0.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pma_megatron.testing.megatron_lm import Pretrained, run_pretrain

GOLDEN = Path(__file__).parents[1] / "golden" / "muon" / "main-dist_muon-tp2.tar.xz"
TENSOR_PARALLEL = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
SMALL = (
    *("--hidden-size", "8", "--num-attention-heads", "2", "--ffn-hidden-size", "16"),
    *("--vocab-size", "24", "--seq-length", "8", "--max-position-embeddings", "8"),
)

_BEFORE = """
import sys, types, typing
import typing_extensions
typing.override = typing_extensions.override  # of Python 3.12, which emerging-optimizers asks for
kernels = types.ModuleType("emerging_optimizers.triton_kernels")  # of a GPU
kernels.HAS_TRITON_340 = False
sys.modules[kernels.__name__] = kernels
"""


def pretrain(
    tree: str, emerging: str, folder: Path, flags: Sequence[str], ranks: int
) -> Pretrained:
    """`pretrain_gpt.py --optimizer dist_muon`.

    Args:
        tree: a Megatron-LM source tree.
        emerging: the folder in which `emerging_optimizers` lies.
        folder: for a file that Python reads when it starts.
        flags: further ones.
        ranks: processes.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_BEFORE)
    return run_pretrain(
        tree,
        ["--optimizer", "dist_muon", *flags],
        ranks=ranks,
        through="plain",
        omit=("--use-distributed-optimizer",),
        python_path=[folder, emerging],
    )


def _make(tree: str, emerging: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, "run")
        train = ["--train-iters", "8", "--save", str(run), "--save-interval", "2"]
        flags = [*SMALL, *TENSOR_PARALLEL, *train, "--no-save-rng"]
        pretrain(tree, emerging, Path(scratch, "python"), flags, ranks=2)
        shutil.rmtree(run / "iter_0000002")
        GOLDEN.parent.mkdir(exist_ok=True)
        shutil.make_archive(str(GOLDEN).removesuffix(".tar.xz"), "xztar", run)


if __name__ == "__main__":
    _make(*sys.argv[1:])
