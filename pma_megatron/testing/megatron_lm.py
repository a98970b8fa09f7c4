"""Runs Megatron-LM's own training scripts on the CPU, for tests of what is hooked into them.

`cpu.install` makes megatron-core run; this adds what `megatron.training` needs on top, and starts
the ranks. The tree is only read. In the Python that runs this there must be the packages that
`pretrain_gpt.py` imports (regex, pyyaml, requests, six, psutil) and an installed megatron-core
wheel, for its compiled data index.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import runpy
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import MagicMock

Through = Literal["plain", "launcher", "evaluate", "geometry"]
_VERBS = ("evaluate", "geometry")

TINY: tuple[str, ...] = tuple(
    shlex.split("""
    --distributed-backend gloo --transformer-impl local --attention-backend unfused
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --vocab-size 8192 --tokenizer-type NullTokenizer
    --make-vocab-size-divisible-by 8 --mock-data --num-workers 0
    --no-create-attention-mask-in-dataloader --micro-batch-size 1 --global-batch-size 4 --lr 1e-3
    --min-lr 1e-4 --lr-decay-iters 100 --clip-grad 1.0 --bf16 --disable-bias-linear --swiglu
    --untie-embeddings-and-output-weights --position-embedding-type rope --normalization RMSNorm
    --attention-dropout 0 --hidden-dropout 0 --use-distributed-optimizer --seed 42
    --log-interval 1 --eval-interval 1000 --eval-iters 1
    """)
)
"""Arguments of `pretrain_gpt.py` for a GPT that a CPU core trains in milliseconds per iteration."""

_LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) ")
_FORWARDED = "PMA_TESTING_IMPORT"
_JOB = "PMA_TESTING_JOB"


class PretrainFailure(RuntimeError):
    """A training script ended with an error or not in time; carries the end of its output."""


@dataclass(frozen=True)
class Pretrained:
    """What a finished run printed: stdout and stderr of all ranks, interleaved."""

    output: str

    @property
    def losses(self) -> dict[int, str]:
        """Training loss per iteration, as printed."""
        return {int(iteration): loss for iteration, loss in _LOSS.findall(self.output)}


def run_pretrain(
    tree: Path | str,
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    through: Through = "launcher",
    omit: Sequence[str] = (),
    script: str = "pretrain_gpt.py",
    imports: str | None = None,
    python_path: Sequence[Path | str] = (),
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Pretrained:
    """Train with a script of the Megatron-LM in `tree`, one process per rank, under torchrun.

    Args:
        tree: a Megatron-LM source tree, patched or not.
        arguments: of the script, after `TINY`; the last of two equal flags counts.
        ranks: processes on this machine.
        through: `launcher` starts it with `pma_megatron.launch`, `plain` as it is; `evaluate` and
            `geometry` with that verb of `pma` and `--megatron`, whose flags come first in
            `arguments`, up to a `--`.
        omit: words of `TINY` that are left out, for instance `--bf16`.
        script: relative to `tree`.
        imports: a module that every rank imports before the script runs.
        python_path: folders in front of the import path, for `imports`.
        environment: on top of this process's.
        timeout_s: after which all processes are killed.

    Raises:
        PretrainFailure: it did not end with exit code 0 in time.
    """
    root = Path(__file__).parents[2]
    old = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    paths = [*map(str, python_path), str(tree), str(root), *old]
    job = secrets.token_hex(8)
    end = [*arguments].index("--") + 1 if through in _VERBS else 0
    own, rest = arguments[:end], arguments[end:]
    tiny = [word for word in TINY if word not in omit]
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        _JOB: job,
        **({_FORWARDED: imports} if imports else {}),
        **(environment or {}),
    }
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *("--local-addr", "localhost", "--nproc-per-node", str(ranks)),
        *("-m", "pma_megatron.testing.megatron_lm", through, str(Path(tree) / script)),
        *(*own, *tiny, *rest),
    ]
    # Not a pipe: what a killed rank leaves behind (checkpoint writers) would hold it open.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit code {process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            ended = f"still running after {timeout_s} s"
        finally:
            _kill(process, job)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise PretrainFailure(f"{ended}:\n{output[-12000:]}")
    return Pretrained(output)


def install() -> None:
    """Replace what `megatron.training` needs of CUDA, compilers and packages that are not here.

    Changes the whole process, like `cpu.install`, which it calls. With a GPU (`cpu.DEVICE_ENV`),
    CUDA stays as it is.
    """
    from pma_megatron.testing import cpu

    cpu.install()  # first: torch looks for a real triton while it is imported
    for name, inner in (("triton", ("triton.language",)), ("pydantic", ()), ("einops", ())):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            for each in (name, *inner):
                sys.modules[each] = MagicMock(__version__="0")
    if not cpu.on_gpu():
        _replace_more_of_cuda()
    _use_the_wheels_data_index()
    with contextlib.suppress(ImportError):  # gone from 0.17 on
        importlib.import_module("megatron.legacy.fused_kernels").load = lambda _args: None


def _replace_more_of_cuda() -> None:
    import torch
    from torch import distributed

    from pma_megatron.testing import cpu

    nothing, zero = cpu.constant(None), cpu.constant(0)
    cuda: Any = torch.cuda
    for name in ("set_stream", "ipc_collect", "reset_peak_memory_stats", "check_error", "cudart"):
        setattr(cuda, name, nothing)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
    ):
        setattr(cuda, name, zero)
    cuda.memory_stats = lambda *_args, **_kwargs: {}
    cuda.mem_get_info = lambda *_args, **_kwargs: (1 << 33, 1 << 34)
    cuda.Event = cuda.Stream  # ready at once
    cuda.Stream.query = lambda *_args: True
    cuda.Stream.elapsed_time = lambda *_args: 0.0
    cuda.nvtx = SimpleNamespace(
        range_push=nothing, range_pop=nothing, range=lambda *_args: contextlib.nullcontext()
    )
    original = distributed.init_process_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)  # a CUDA device, to which gloo cannot be bound
        original(*args, **kwargs)

    distributed.init_process_group = init_process_group


def _use_the_wheels_data_index() -> None:
    """Take `helpers_cpp`, which a source tree would compile, from an installed megatron-core."""
    package = "megatron.core.datasets"
    utils: Any = importlib.import_module(f"{package}.utils")
    utils.compile_helpers = lambda: None
    folders = [str(Path(entry, *package.split("."))) for entry in sys.path if entry]
    found = importlib.machinery.PathFinder.find_spec("helpers_cpp", folders)
    if found is None or found.loader is None:
        raise ImportError(
            "no compiled helpers_cpp in any megatron/core/datasets on sys.path: install a "
            "megatron-core wheel (pip install megatron-core), or run make in that folder of the "
            "source tree"
        )
    spec = importlib.util.spec_from_file_location(f"{package}.helpers_cpp", found.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[f"{package}.helpers_cpp"] = module


def _kill(process: subprocess.Popen[bytes], job: str) -> None:
    """All of a job: the checkpoint writers of a rank that was killed would outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{_JOB}={job}".encode() in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def _main(argv: list[str]) -> int:
    through, script, *arguments = argv
    install()
    if _FORWARDED in os.environ:
        importlib.import_module(os.environ[_FORWARDED])
    if through == "launcher":
        from pma_megatron.launch import main

        return main([script, *arguments])
    if through in _VERBS:
        from pma_megatron.cli import main as pma

        return pma([through, "--megatron", script, *arguments])
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
