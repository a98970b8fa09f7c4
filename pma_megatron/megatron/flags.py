"""The `--pma-*` flags of a Megatron training script: added, read, and refused.

Megatron pickles its whole argument namespace into every checkpoint, so what is stored there is
plain (bool, int, float, str, list) and loads where this package is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pma_megatron.base.spelling import speaking
from pma_megatron.errors import UsageError
from pma_megatron.megatron import checks
from pma_megatron.megatron.options import (
    EXIT_CODE,
    FLAGS,
    NAMES,
    OPTIMIZER_STATES,
    SHARES,
    SNAPSHOT_DTYPES,
    USED_BY,
    RecoverySettings,
    Settings,
    given,
    settings,
)
from pma_megatron.merging.coefficients import METHODS
from pma_megatron.runs.selection import DEFAULT_LAST
from pma_megatron.runs.tokens import parse_tokens
from pma_megatron.spikes.detector import SpikeSettings

__all__ = [
    "Settings",
    "add_arguments",
    "add_deepspeed_arguments",
    "enabled",
    "given",
    "settings",
    "validate",
]

_MEGATRON_LM_ALONE = (
    "--pma-load",
    "--pma-snapshot-interval-tokens",
    "--pma-snapshot-dtype",
    "--pma-snapshot-dir",
    "--pma-keep",
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group of `--pma-*` flags to Megatron's parser, and return that parser."""
    group = parser.add_argument_group(
        "PMA (pma_megatron)", "averages of this run's checkpoints, at load, at save, in evaluation"
    )
    _add_init(group.add_argument)
    _add_save(group.add_argument)
    _add_recover(group.add_argument)
    _add_score(group.add_argument)
    return parser


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add those flags of the group that Megatron-DeepSpeed jobs can use."""
    group = parser.add_argument_group(
        "PMA (pma_megatron)", "averages of this run's tags, at load, at save, in evaluation"
    )

    def add(name: str, **settings: Any) -> None:
        if name not in _MEGATRON_LM_ALONE:
            group.add_argument(name, **settings)

    _add_init(add)
    _add_save(add)
    return parser


# fmt: off
def _add_init(add: Callable[..., Any]) -> None:
    add("--pma-init", action="store_true",
        help="start from an average: after Megatron has resumed from --load, its weights and main "
        "params become the average of earlier checkpoints; iteration, data and LR stay")
    add("--pma-load", metavar="DIR", help="root of the sources (default: --load)")
    add("--pma-last", type=int, metavar="N", help=f"how many (default {DEFAULT_LAST})")
    add("--pma-interval-tokens", type=_tokens, metavar="V", help="spacing, e.g. 8B, 500M")
    add("--pma-interval-iterations", type=int, metavar="V", help="spacing in iterations")
    add("--pma-tolerance", type=float, metavar="F",
        help="how far off its place a source may lie, as a fraction of V (default 0.25)")
    add("--pma-end-iteration", type=int, metavar="I", help="newest source (default: newest)")
    add("--pma-iterations", type=int, nargs="+", metavar="I", help="exactly these sources")
    add("--pma-exclude", type=int, nargs="+", metavar="I", help="not these sources")
    add("--pma-allow-gaps", action="store_true",
        help="pass over what is damaged, spoiled or not judged between the sources, not refuse")
    add("--pma-method", choices=METHODS, metavar="M", help=f"{', '.join(METHODS)} (default sma)")
    add("--pma-alpha", type=float, metavar="A", help="ema: weight of the newer one, in (0, 1]")
    add("--pma-floor", type=float, metavar="F",
        help="decay methods: where the decay ends, in [0, 1)")
    add("--pma-coefficients", type=float, nargs="+", metavar="C",
        help="custom: oldest first, sum 1")
    add("--pma-optimizer-state", choices=OPTIMIZER_STATES,
        help="moments and step after --pma-init (default latest: what Megatron resumed)")
    add("--pma-share", choices=SHARES,
        help="replicas of a shard read different sources and all-reduce, or different slices of "
        "all sources (default auto)")
    add("--pma-threads", type=int, metavar="T", help="reader threads per rank (default 2)")
    add("--pma-check-sources", action="store_true",
        help="with --pma-init: read records whole that are read in part, to compare their "
        "checksums")


def _add_save(add: Callable[..., Any]) -> None:
    add("--pma-save", action="store_true",
        help="keep a window of the last N weights, --pma-interval-tokens apart, and save its "
        "average beside each of Megatron's checkpoints")
    add("--pma-save-dir", metavar="DIR", help="root for it (default: <save>-pma)")
    add("--pma-window-dir", metavar="DIR",
        help="node-local disk that holds the window (default: host memory)")
    add("--pma-eval", action="store_true",
        help="evaluate the average of --pma-save too, on the same batches")
    add("--pma-snapshot-interval-tokens", type=_tokens, metavar="V",
        help="write weights alone every V tokens, whatever --save-interval is")
    add("--pma-snapshot-dtype", choices=SNAPSHOT_DTYPES, help="of snapshots (default fp32)")
    add("--pma-snapshot-dir", metavar="DIR", help="root for them (default: <save>/pma_snapshots)")
    add("--pma-keep", type=int, metavar="K", help="newest snapshots to keep (default: all)")


def _add_recover(add: Callable[..., Any]) -> None:
    spike, own = SpikeSettings(), RecoverySettings()
    add("--pma-recover", action="store_true",
        help="on a loss spike that does not recover, go back to the average of healthy checkpoints "
        "in process, while iteration, data and LR move on")
    add("--pma-recover-last", type=int, metavar="N",
        help=f"how many healthy checkpoints (default {own.last})")
    add("--pma-recover-optimizer-state", choices=OPTIMIZER_STATES,
        help="moments: of the newest healthy checkpoint (latest, default), average, or reset")
    add("--pma-recover-attempts", type=int, metavar="K",
        help="from one healthy checkpoint, each one further back; then the job ends with exit "
        f"code {EXIT_CODE} (default {own.attempts})")
    add("--pma-recover-margin-iterations", type=int, metavar="M",
        help="healthy iterations between a checkpoint and the onset "
        f"(default {own.margin_iterations})")
    add("--pma-recover-warmup", type=int, metavar="N",
        help=f"iterations that are learned from and not judged (default {spike.warmup})")
    add("--pma-recover-patience", type=int, metavar="N",
        help=f"iterations that a spike has to recover by itself (default {spike.patience})")
    add("--pma-recover-fatal-rise", type=float, metavar="NATS",
        help=f"rise in loss from which one that stays is lost (default {spike.fatal_rise:g})")


def _add_score(add: Callable[..., Any]) -> None:
    add("--pma-score", action="store_true",
        help="with --skip-train: score many averages of --load on the batches that Megatron "
        "evaluates on, and write none of them (what pma evaluate --megatron does)")
    add("--pma-score-methods", nargs="+", metavar="M", help="e.g. sma ema:0.2 (default sma)")
    add("--pma-score-lasts", type=int, nargs="+", metavar="N",
        help=f"how many (default {DEFAULT_LAST}); the newest alone is always scored")
    add("--pma-score-intervals-tokens", type=_tokens, nargs="+", metavar="V", help="e.g. 4B 8B")
    add("--pma-score-intervals-iterations", type=int, nargs="+", metavar="V")
    add("--pma-score-ends", nargs="+", metavar="E",
        help="newest source of each: all, newest, every:K, or iterations (default newest)")
    add("--pma-score-others", nargs="+", metavar="DIR",
        help="further runs whose newest checkpoint is scored as it is")
    add("--pma-score-out", metavar="FILE", help="gets the scores as JSON")
# fmt: on


def enabled(args: Any) -> bool:
    """Whether any `--pma-*` flag was given; False for a namespace that has none of them."""
    return any(given(args, name) for name in NAMES)


def validate(args: Any) -> None:
    """Refuse, before anything is built or read, what cannot work.

    Args:
        args: Megatron's arguments, after its own validation.

    Raises:
        UsageError: an option without the flag that uses it, a use whose needs are not met, a
            parallel or optimizer setup that is not supported.
    """
    with speaking(FLAGS):
        _validate(args)


def _validate(args: Any) -> None:
    for name, users in USED_BY.items():
        if given(args, name) and not any(given(args, user) for user in users):
            needed = " or ".join(f"--{user.replace('_', '-')}" for user in users)
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect without {needed}: add it, "
                "or leave this flag out"
            )
    checks.refuse(args, settings(args))


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
