"""What a training job must and must not be for each use; asked once, before the model is built."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import as_flag
from pma_megatron.errors import UsageError
from pma_megatron.megatron.flags import RecoverySettings, Settings
from pma_megatron.megatron.resumed import refuse_unknown
from pma_megatron.runs.told_files import SCORES, refuse_file
from pma_megatron.storage.paths import real

_OWN_LAYOUT = "it keeps weights and main params in a layout of its own, which is not averaged"

_QUANTIZED = " and would have to be quantized again from the average"

_UNSUPPORTED: Mapping[str, str] = {
    "use_megatron_fsdp": _OWN_LAYOUT,
    "use_custom_fsdp": _OWN_LAYOUT,
    "use_torch_fsdp2": _OWN_LAYOUT,
    "use_layer_wise_distributed_optimizer": _OWN_LAYOUT,
    "optimizer_cpu_offload": "its main params are split between host and device",
    "fp8_param_gather": "weights are stored in 8 bits" + _QUANTIZED,
    "fp4_param": "weights are stored in 4 bits" + _QUANTIZED,
    "perform_rl_step": "a second copy of the weights does the rollouts",
    "ckpt_convert_format": "Megatron exits once it has converted",
    "moe_use_upcycling": "Megatron saves a new model while it sets up, which no earlier checkpoint "
    "can be averaged with",
}
"""Attribute of Megatron's arguments -> why it does not work."""
_CALLED = {
    "use_layer_wise_distributed_optimizer": "the layer-wise (dist_muon) optimizer",
    "fp4_param": "--fp4-param-gather",
}
"""Attributes that are not the name of their flag."""

_SIZES = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("EP", "expert_model_parallel_size"),
    ("DP", "data_parallel_size"),
)


def refuse(args: Any, settings: Settings) -> None:
    """Raise UsageError where `settings` cannot work in this job."""
    _refuse_unsupported(args)
    _refuse_numbers(args, settings)
    if settings.init:
        _refuse_init(args, settings)
    if settings.eval_ and not settings.save:
        raise UsageError(
            "--pma-eval evaluates the running average, which --pma-save keeps: add --pma-save"
        )
    if settings.save:
        _refuse_save(args, settings)
    if settings.snapshots:
        _refuse_snapshots(args, settings)
    if settings.recover is not None:
        _refuse_recover(args, settings.recover)
    if settings.score is not None:
        _refuse_score(args, settings)
    _refuse_shared_folders(args, settings)
    _refuse_method(settings)


def refuse_beside(args: Any, ours: str, others: Mapping[str, str]) -> None:
    """Raise UsageError where `ours` is asked for beside one of `others`, attribute -> why not."""
    for name, why in others.items():
        if getattr(args, name, None):
            raise UsageError(f"{ours} cannot be used with {as_flag(name)}: {why}")


def sizes(args: Any) -> str:
    """The parallel sizes of the job, for messages: `TP 2, PP 1, CP 1, EP 8, DP 16`."""
    return ", ".join(f"{short} {getattr(args, name, 1)}" for short, name in _SIZES)


def _refuse_unsupported(args: Any) -> None:
    used = (name for name in _UNSUPPORTED if getattr(args, name, None))
    found = [(_CALLED.get(name, as_flag(name)), _UNSUPPORTED[name]) for name in used]
    if str(getattr(args, "optimizer", "")).startswith("dist_"):
        found.append((f"--optimizer {args.optimizer}", _OWN_LAYOUT))
    shards = getattr(args, "gtp_weight_remat_size", None) or 1
    expert_shards = getattr(args, "expert_gtp_weight_remat_size", None) or 1
    if shards > 1 or expert_shards > 1:
        which = "" if shards > 1 else "expert-"
        flag = f"--{which}tensor-parallel-num-weight-shards"
        found.append((flag, f"its weight shards are not averaged (found {sizes(args)})"))
    for flag, why in found:
        raise UsageError(
            f"--pma-* flags cannot be used with {flag}: {why}; leave out one of the two, or "
            "average saved checkpoints with `pma merge`"
        )
    layout = getattr(args, "ckpt_format", "torch_dist")
    if layout != "torch_dist":
        raise UsageError(
            f"--pma-* flags need --ckpt-format torch_dist (Megatron's default), found {layout}: "
            "other formats are neither read nor written here"
        )


def _refuse_numbers(args: Any, settings: Settings) -> None:
    for flag, value in (
        ("--pma-last", settings.window),
        ("--pma-threads", settings.threads),
        ("--pma-keep", settings.keep),
        ("--pma-snapshot-interval-tokens", settings.snapshot_interval_tokens),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")


def _refuse_init(args: Any, settings: Settings) -> None:
    if getattr(args, "load", None) is None:
        also = (
            "--pma-load names the sources of the average and does not replace it. "
            if getattr(args, "pma_load", None)
            else ""
        )
        raise UsageError(
            "--pma-init needs --load: Megatron first resumes iteration, samples, LR schedule and "
            f"RNG from there, then its weights become the average. {also}Add --load with the "
            "run's own --save"
        )
    others = {
        "skip_train": "Megatron builds or loads no optimizer under --skip-train, so there are no "
        "main params to average into; merge with `pma merge` and evaluate that checkpoint",
        "finetune": "--finetune starts at iteration 0 with fresh data, LR schedule and optimizer, "
        "while --pma-init continues one run; leave out one of the two",
        "no_load_optim": "the optimizer state and LR schedule of the newest source would be lost; "
        "leave out --no-load-optim, and use --pma-optimizer-state reset for fresh moments",
    }
    refuse_beside(args, "--pma-init", others)
    refuse_unknown(args, "--pma-init")


def _refuse_save(args: Any, settings: Settings) -> None:
    if getattr(args, "save", None) is None:
        raise UsageError(
            "--pma-save needs --save: the running average is saved when Megatron saves, beside it"
        )
    if settings.interval_tokens is None:
        raise UsageError(
            "--pma-save needs --pma-interval-tokens: how far apart the members of the running "
            "average are, for instance 8B"
        )


def _refuse_snapshots(args: Any, settings: Settings) -> None:
    if settings.snapshot_dir is None or getattr(args, "save", None) is None:
        raise UsageError(
            "--pma-snapshot-interval-tokens needs --save: a snapshot has weights alone and is of "
            "no use without the checkpoints that training resumes from"
        )
    if settings.keep is None or not (settings.init or settings.save):
        return
    # A window at a wider spacing than the snapshots' spans more of them than it has members.
    spacing = settings.interval_tokens or settings.snapshot_interval_tokens or 1
    span = (settings.window - 1) * spacing // (settings.snapshot_interval_tokens or spacing) + 1
    needed = max(settings.window, span)
    if settings.keep < needed:
        raise UsageError(
            f"--pma-keep {settings.keep} is smaller than the window: {settings.window} members "
            f"(--pma-last) span {needed} snapshots; raise --pma-keep to at least {needed}"
        )


def _refuse_recover(args: Any, recover: RecoverySettings) -> None:
    if getattr(args, "save", None) is None or not getattr(args, "save_interval", None):
        raise UsageError(
            "--pma-recover needs --save and --save-interval: it goes back to checkpoints of this "
            "run"
        )
    others = {
        "no_save_optim": "checkpoints without optimizer state cannot be gone back to",
        "skip_train": "nothing is trained",
    }
    refuse_beside(args, "--pma-recover", others)
    refuse_unknown(args, "--pma-recover")
    for name in ("last", "attempts"):
        if getattr(recover, name) < 1:
            raise UsageError(
                f"--pma-recover-{name} must be at least 1, got {getattr(recover, name)}"
            )
    if recover.margin_iterations < 0:
        raise UsageError(
            f"--pma-recover-margin-iterations must be at least 0, got {recover.margin_iterations}"
        )


def _refuse_score(args: Any, settings: Settings) -> None:
    for name in ("load", "skip_train"):
        if not getattr(args, name, None):
            raise UsageError(
                f"--pma-score needs {as_flag(name)}: it scores averages of saved "
                "checkpoints in Megatron's evaluation, and does not train"
            )
    for flag, used in (
        ("--pma-init", settings.init),
        ("--pma-save", settings.save),
        ("--pma-snapshot-interval-tokens", settings.snapshots),
        ("--pma-recover", settings.recover is not None),
    ):
        if used:
            raise UsageError(
                f"--pma-score and {flag} cannot be combined: one evaluates, the other "
                "trains; leave out one of the two"
            )
    if settings.score_out is not None:
        out = settings.score_out
        refuse_file(f"--pma-score-out {out}", Path(out), SCORES)


def _refuse_shared_folders(args: Any, settings: Settings) -> None:
    """Two writers, or a writer and a reader, in one folder."""
    folders = {
        "--save": getattr(args, "save", None),
        "--load": getattr(args, "load", None),
        "--pma-load": settings.load if settings.init else None,
        "--pma-save-dir": settings.save_dir if settings.save else None,
        "--pma-window-dir": settings.window_dir if settings.save else None,
        "--pma-snapshot-dir": settings.snapshot_dir if settings.snapshots else None,
    }
    written = {"--pma-save-dir", "--pma-window-dir", "--pma-snapshot-dir"}
    named = {flag: real(path) for flag, path in folders.items() if path}
    for one, other in combinations(named, 2):
        # --pma-init may read earlier snapshots of the run that goes on writing them.
        snapshots = {one, other} == {"--pma-load", "--pma-snapshot-dir"}
        if named[one] == named[other] and written & {one, other} and not snapshots:
            raise UsageError(
                f"{other} is the folder of {one} ({named[one]}): what is written there would "
                f"mix with, or overwrite, what is there; give {other} a folder of its own"
            )


def _refuse_method(settings: Settings) -> None:
    if settings.method.name == "ema" and settings.method.alpha is None:
        raise UsageError(
            "--pma-method ema needs --pma-alpha: the weight of the newer one, for instance 0.2"
        )
    counts = set()
    if settings.init:
        listed = settings.selection.iterations
        counts.add(settings.window if listed is None else len(listed))
    if settings.save:
        counts.add(settings.window)
    for count in sorted(counts):
        # Evenly spaced, because only the parameters are looked at.
        settings.method.of(range(1, count + 1), count)
