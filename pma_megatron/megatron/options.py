"""What the `--pma-*` flags of a training job ask for, read from Megatron's argument namespace.

An option that was not given is None there (a switch: False); `settings` fills in the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pma_megatron.base.locations import refuse_remote, refuse_remote_values
from pma_megatron.base.spelling import FrontEnd, speaking
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import Method
from pma_megatron.runs.selection import DEFAULT_LAST, SelectionRequest
from pma_megatron.runs.tokens import consumed_tokens_of
from pma_megatron.scores.grid import Grid, parse_ends, parse_method
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import LAST, MARGIN_ITERATIONS

OPTIMIZER_STATES = ("latest", "average", "reset")
SHARES = ("auto", "source", "slice")
SNAPSHOT_DTYPES = ("fp32", "bf16")
EXIT_CODE = 85
"""Of a job whose attempts to recover are spent; nothing in Megatron uses it."""

_SWITCHES = ("pma_init", "pma_save", "pma_eval", "pma_recover", "pma_score")

USED_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pma_load": ("pma_init", "pma_score"),
        "pma_last": ("pma_init", "pma_save"),
        "pma_interval_tokens": ("pma_init", "pma_save"),
        "pma_interval_iterations": ("pma_init",),
        "pma_tolerance": ("pma_init", "pma_score"),
        "pma_end_iteration": ("pma_init",),
        "pma_iterations": ("pma_init",),
        "pma_exclude": ("pma_init", "pma_score"),
        "pma_allow_gaps": ("pma_init", "pma_score"),
        "pma_method": ("pma_init", "pma_save"),
        "pma_alpha": ("pma_init", "pma_save"),
        "pma_floor": ("pma_init", "pma_save"),
        "pma_coefficients": ("pma_init", "pma_save"),
        "pma_optimizer_state": ("pma_init",),
        "pma_share": ("pma_init",),
        "pma_threads": ("pma_init", "pma_save", "pma_recover", "pma_score"),
        "pma_check_sources": ("pma_init",),
        "pma_save_dir": ("pma_save",),
        "pma_window_dir": ("pma_save",),
        "pma_snapshot_dtype": ("pma_snapshot_interval_tokens",),
        "pma_snapshot_dir": ("pma_snapshot_interval_tokens",),
        "pma_keep": ("pma_snapshot_interval_tokens",),
        "pma_recover_last": ("pma_recover",),
        "pma_recover_optimizer_state": ("pma_recover",),
        "pma_recover_attempts": ("pma_recover",),
        "pma_recover_margin_iterations": ("pma_recover",),
        "pma_recover_warmup": ("pma_recover",),
        "pma_recover_patience": ("pma_recover",),
        "pma_recover_fatal_rise": ("pma_recover",),
        "pma_score_methods": ("pma_score",),
        "pma_score_lasts": ("pma_score",),
        "pma_score_intervals_tokens": ("pma_score",),
        "pma_score_intervals_iterations": ("pma_score",),
        "pma_score_ends": ("pma_score",),
        "pma_score_others": ("pma_score",),
        "pma_score_out": ("pma_score",),
    }
)
"""For every option, the flags that make use of it; it is refused without any of them."""

NAMES: tuple[str, ...] = (*_SWITCHES, "pma_snapshot_interval_tokens", *USED_BY)
"""Every name that `add_arguments` adds to Megatron's argument namespace."""

FLAGS = FrontEnd(
    {name.removeprefix("pma_"): "--" + name.replace("_", "-") for name in NAMES}
    | {
        name.removeprefix("pma_score_"): "--" + name.replace("_", "-")
        for name in NAMES
        if name.startswith("pma_score_")
    }
)
"""Settings as a Megatron script spells them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySettings:
    """How to recover.

    Attributes:
        spike: when the series is lost.
        last: how many healthy checkpoints are averaged.
        method: how they are weighted.
        optimizer_state: moments become those of the newest healthy checkpoint (`latest`), their
            `average`, or zero (`reset`).
        attempts: from one newest healthy checkpoint, each one full checkpoint further back.
        margin_iterations: healthy iterations between a checkpoint and the onset.
        threads: reader threads per rank.
    """

    spike: SpikeSettings = field(default_factory=SpikeSettings)
    last: int = LAST
    method: Method = field(default_factory=Method)
    optimizer_state: str = "latest"
    attempts: int = 3
    margin_iterations: int = MARGIN_ITERATIONS
    threads: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a job was asked to do: `init`, `save`, `eval_`, `snapshots`; the rest says how."""

    init: bool
    """Replace what Megatron resumed with the average, before the first iteration."""
    save: bool
    """Keep a running average and save it whenever Megatron saves."""
    eval_: bool
    """Evaluate the running average too, wherever Megatron evaluates."""
    load: str | None
    """Root of the sources of `init`."""
    selection: SelectionRequest
    """The sources of `init`."""
    method: Method
    """How sources, or the window of the running average, are weighted."""
    optimizer_state: str
    """One of `OPTIMIZER_STATES`, for `init`."""
    share: str
    """One of `SHARES`: how replicas divide the reading of `init`."""
    threads: int
    """Reader threads per rank."""
    check_sources: bool
    """Read records whole that `init` reads in part, to compare their checksums."""
    window: int
    """Members of the running average."""
    interval_tokens: int | None
    """Tokens from one member of the running average to the next."""
    save_dir: str | None
    """Root that the running average is saved under."""
    window_dir: str | None
    """Node-local folder for the window; None keeps it in host memory."""
    snapshot_interval_tokens: int | None
    """Tokens from one snapshot to the next; None for no snapshots."""
    snapshot_dtype: str
    """One of `SNAPSHOT_DTYPES`."""
    snapshot_dir: str | None
    """Root of the snapshots."""
    keep: int | None
    """How many of the newest snapshots to keep; None keeps all."""
    recover: RecoverySettings | None
    """How to recover from loss spikes; None to leave them."""
    score: Grid | None
    """Averages that are scored in the first evaluation, under --skip-train."""
    score_others: tuple[str, ...]
    """Folders whose newest checkpoint is scored too, as it is."""
    score_out: str | None
    """File that gets the scores as JSON."""

    @property
    def snapshots(self) -> bool:
        """Whether snapshots are written."""
        return self.snapshot_interval_tokens is not None


def given(args: Any, name: str) -> bool:
    """Whether one option, named as in the namespace, was given."""
    value = getattr(args, name, None)
    return value is not None and value is not False


def settings(args: Any) -> Settings:
    """The settings in Megatron's arguments.

    Raises:
        UsageError: values out of range or that contradict each other, named as Megatron's flags.
    """
    with speaking(FLAGS):
        made = _settings(args)
        named = ("save_dir", "window_dir", "snapshot_dir", "score_others", "score_out")
        refuse_remote_values({name: getattr(made, name) for name in named})
        if made.init or made.score:
            refuse_remote("load", made.load)
    return made


def tokens_now(args: Any) -> int:
    """Consumed until now, as the offline job counts them.

    Raises:
        UsageError: they are unknown.
    """
    if not args.consumed_train_samples:
        return 0
    tokens, reason = consumed_tokens_of(vars(args))
    if tokens is None:
        raise UsageError(
            f"--pma-save and snapshots go by consumed tokens, which are unknown because {reason}"
        )
    return tokens


def _settings(args: Any) -> Settings:
    def value(name: str, default: Any = None) -> Any:
        return getattr(args, f"pma_{name}") if given(args, f"pma_{name}") else default

    save = getattr(args, "save", None)
    coefficients = value("coefficients")
    return Settings(
        init=value("init", False),
        save=value("save", False),
        eval_=value("eval", False),
        load=value("load", getattr(args, "load", None)),
        selection=_selection(value),
        method=Method(
            name=value("method", "sma"),
            alpha=value("alpha"),
            floor=value("floor", 0.0),
            values=None if coefficients is None else tuple(coefficients),
        ),
        optimizer_state=value("optimizer_state", "latest"),
        share=value("share", "auto"),
        threads=value("threads", 2),
        check_sources=value("check_sources", False),
        window=value("last", DEFAULT_LAST),
        interval_tokens=value("interval_tokens"),
        save_dir=value("save_dir", save and f"{save.rstrip('/')}-pma"),
        window_dir=value("window_dir"),
        snapshot_interval_tokens=value("snapshot_interval_tokens"),
        snapshot_dtype=value("snapshot_dtype", "fp32"),
        snapshot_dir=value("snapshot_dir", save and f"{save.rstrip('/')}/pma_snapshots"),
        keep=value("keep"),
        recover=_recovery(value) if value("recover", False) else None,
        score=_grid(value) if value("score") else None,
        score_others=tuple(value("score_others", ())),
        score_out=value("score_out"),
    )


def _recovery(value: Callable[..., Any]) -> RecoverySettings:
    spike, own = SpikeSettings(), RecoverySettings()
    return RecoverySettings(
        spike=SpikeSettings(
            warmup=value("recover_warmup", spike.warmup),
            patience=value("recover_patience", spike.patience),
            fatal_rise=value("recover_fatal_rise", spike.fatal_rise),
        ),
        last=value("recover_last", own.last),
        optimizer_state=value("recover_optimizer_state", own.optimizer_state),
        attempts=value("recover_attempts", own.attempts),
        margin_iterations=value("recover_margin_iterations", own.margin_iterations),
        threads=value("threads", own.threads),
    )


def _grid(value: Callable[..., Any]) -> Grid:
    return Grid(
        methods=tuple(parse_method(text) for text in value("score_methods", ["sma"])),
        lasts=tuple(value("score_lasts", [DEFAULT_LAST])),
        intervals_tokens=tuple(value("score_intervals_tokens", ())),
        intervals_iterations=tuple(value("score_intervals_iterations", ())),
        ends=parse_ends(value("score_ends", ["newest"])),
        tolerance=value("tolerance", 0.25),
        exclude=tuple(value("exclude", ())),
        allow_gaps=value("allow_gaps", False),
    )


def _selection(value: Callable[..., Any]) -> SelectionRequest:
    # With --pma-save, --pma-last and --pma-interval-tokens describe the running average, so they
    # do not contradict a list of sources for --pma-init.
    listed = value("iterations")
    for_window = listed is not None and value("save", False)
    return SelectionRequest(
        last=None if for_window else value("last"),
        interval_tokens=None if for_window else value("interval_tokens"),
        interval_iterations=value("interval_iterations"),
        tolerance=value("tolerance", 0.25),
        end_iteration=value("end_iteration"),
        exclude=tuple(value("exclude", ())),
        allow_gaps=value("allow_gaps", False),
        iterations=None if listed is None else tuple(listed),
    )
