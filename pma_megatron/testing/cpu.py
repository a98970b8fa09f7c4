"""Makes megatron-core run without CUDA: tensors on the CPU, collectives over gloo.

Written for megatron-core 0.12 to 0.19 and its main branch, of which only `megatron.core` is needed.
`install()` changes torch and megatron-core for the whole process and cannot be undone: call it in a
process that is there for nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

DEVICE_ENV = "PMA_TINY_DEVICE"
"""`cuda` leaves CUDA and NCCL as they are, for tiny runs on a GPU; anything else means the CPU."""
_TRITON = ("triton", "triton.language")
_CPU = torch.device("cpu")


@functools.lru_cache(maxsize=1)
def install() -> None:
    """Replace what megatron-core needs of CUDA, NCCL, Apex and Transformer Engine.

    Idempotent. Raises ImportError when megatron-core is not installed. With a GPU (`DEVICE_ENV`)
    only Apex and Transformer Engine are replaced, if they are missing, and NCCL if this job's ranks
    meet without it.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _fill_gaps_in_libraries()
    if not on_gpu():
        _replace_cuda()
        _CudaOnCpu().__enter__()  # type: ignore[no-untyped-call]
    if not on_gpu() or _ranks_meet_without_nccl():
        _use_gloo()
    _import_core()
    _replace_in_core()
    if not on_gpu():
        _replace_generator()


def on_gpu() -> bool:
    """Whether tiny runs are to use CUDA."""
    return os.environ.get(DEVICE_ENV) == "cuda"


def device() -> torch.device:
    """Where tiny runs compute: this process's current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else _CPU


def has_transformer_engine() -> bool:
    """Whether megatron-core can take its optimizer from Transformer Engine."""
    return importlib.util.find_spec("transformer_engine") is not None


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Apex's and Transformer Engine's optimizer of this name.

    The step count is `step` of each param group, not a tensor per parameter: megatron-core's
    distributed optimizer saves and loads the count only in this form.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        **_unused: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; decay is decoupled."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
            correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(param.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (square / correction2).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(mean, denominator, value=-group["lr"] / correction1)


class _CudaOnCpu(TorchFunctionMode):
    """Sends every `device="cuda"` to the CPU, and calls CPU tensors `torch.cuda.*` by type name."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if any(_is_cuda(arg) for arg in args):
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _Stream:
    """A CUDA stream or event that has nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _other: _Stream) -> None:
        pass

    wait_event = record_event = wait_stream

    def record(self, *_args: Any) -> None:
        pass

    wait = synchronize = record


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def constant(value: Any) -> Callable[..., Any]:
    """A function of anything that returns `value`."""
    return lambda *_args, **_kwargs: value


def _replace_cuda() -> None:
    # torch looks its own functions up once, by identity: let it do so before they are replaced.
    import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()
    cuda: Any = torch.cuda
    generator = torch.default_generator
    properties = SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=1 << 34, multi_processor_count=1
    )
    constants = {
        "is_available": True,
        "device_count": 1,
        "current_device": _CPU,
        "get_device_capability": (8, 0),
        "get_device_properties": properties,
        "stream": contextlib.nullcontext(),
        "current_stream": _Stream(),
        "default_stream": _Stream(),
    }
    for name, value in constants.items():
        setattr(cuda, name, constant(value))
    for name in ("set_device", "synchronize", "empty_cache", "_lazy_init"):
        setattr(cuda, name, _nothing)
    cuda.Stream = cuda.Event = _Stream
    # The "CUDA" generator is the CPU's own, so that one seed decides everything.
    cuda.default_generators = (generator,)
    for module in (cuda, cuda.random):
        module.manual_seed = module.manual_seed_all = lambda seed: _nothing(
            generator.manual_seed(seed)
        )
        module.get_rng_state = lambda *_args, **_kwargs: generator.get_state()
        module.set_rng_state = lambda state, *_args, **_kwargs: _nothing(generator.set_state(state))


def _ranks_meet_without_nccl() -> bool:
    """As several ranks on one GPU do, which NCCL refuses (`ranks.backend`)."""
    return dist.is_initialized() and "nccl" not in str(dist.get_backend_config())


def _use_gloo() -> None:
    def new_group(*args: Any, _original: Any = dist.new_group, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        kwargs.pop("pg_options", None)
        return _original(*args, **kwargs)

    modules: list[Any] = [dist, dist.distributed_c10d]
    for module in modules:
        module.new_group = new_group


def _fill_gaps_in_libraries() -> None:
    """Names that some megatron-core expects of another Python, numpy or torch than is here."""
    typing, numpy = import_module("typing"), import_module("numpy")
    filesystem = import_module("torch.distributed.checkpoint.filesystem")
    if not hasattr(typing, "override"):  # core >= 0.18 before Python 3.12
        typing.override = lambda method: method
    if not hasattr(numpy, "product"):  # core <= 0.15 with numpy 2
        numpy.product = numpy.prod
    if hasattr(filesystem, "SerializationFormat"):  # core 0.12 with torch >= 2.7
        filesystem._write_item = functools.partial(
            _write_item, filesystem._write_item, filesystem.SerializationFormat.TORCH_SAVE
        )


def _write_item(original: Any, serialization: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) + len(kwargs) < 6:
        kwargs["serialization_format"] = serialization
    return original(*args, **kwargs)


def _import_core() -> None:
    try:
        import_module("megatron.core.models.gpt")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        # core >= 0.18 imports triton unconditionally, for kernels that a CPU never runs. Once that
        # is done the stand-in goes away, so that nobody else takes it for the real one.
        stand_in = MagicMock(__version__="0")
        sys.modules.update(dict.fromkeys(_TRITON, stand_in))
        import_module("megatron.core.models.gpt")
        import_module("megatron.core.optimizer")
        for name in _TRITON:
            del sys.modules[name]


def _replace_generator() -> None:
    generator = torch.default_generator
    random = import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_args, **_kwargs: generator.get_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: generator.set_state(state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _replace_in_core() -> None:
    core = "megatron.core"
    utils = import_module(f"{core}.utils")
    try:
        utils.get_te_version()
    except ImportError:  # core 0.12 cannot do without an answer
        utils._te_version = import_module("packaging.version").Version("0.0.0")
    fp8 = import_module(f"{core}.fp8_utils")
    if hasattr(fp8, "_quantize_param_shard_impl"):  # core 0.12
        fp8._quantize_param_shard_impl = _nothing
    moe = import_module(f"{core}.transformer.moe.moe_utils")
    if not hasattr(moe, "te_general_gemm"):
        moe.te_general_gemm = None

    norm = import_module(f"{core}.transformer.torch_norm").WrappedTorchNorm
    norm.__new__ = functools.partial(_norm_in_sequence_parallel, norm.__new__)

    if not (on_gpu() and has_transformer_engine()):
        optimizer = import_module(f"{core}.optimizer")
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
        distributed = import_module(f"{core}.optimizer.distrib_optimizer")
        distributed.Adam = FusedAdam
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True

    writer = import_module(f"{core}.dist_checkpointing.strategies.filesystem_async")
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(writer, name):
            setattr(writer, name, _results_queue)
    if hasattr(writer, "_process_memory"):  # a log line that would need psutil
        writer._process_memory = constant(0)


def _norm_in_sequence_parallel(original: Any, cls: Any, config: Any, *args: Any, **kw: Any) -> Any:
    """Torch's norm also under sequence parallelism (needed by MoE with tensor parallelism).

    megatron-core sums the gradients of parameters that are marked.
    """
    plain = copy.copy(config)
    plain.sequence_parallel = False
    norm = original(cls, plain, *args, **kw)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


@functools.lru_cache(maxsize=1)
def _results_queue(*_args: Any) -> Any:
    """The queue on which checkpoint writers answer.

    megatron-core spawns a manager for it, which imports the main module once more; a forked one
    starts at once and needs no guarded main.
    """
    return multiprocessing.get_context("fork").Manager().Queue()
