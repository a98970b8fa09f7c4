"""What the `--pma-*` flags of a training job ask for, read from Megatron's argument namespace.

An option that was not given is None there (a switch: False); `settings` fills in the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from pma_megatron.base.remote_paths import refuse_remote, refuse_remote_values
from pma_megatron.base.settings import MEGATRON, Declared, declared, described, made, same, setting
from pma_megatron.base.spelling import FrontEnd, as_flag, speaking
from pma_megatron.errors import UsageError
from pma_megatron.live.load import Live
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.online.window import refuse_remote_window
from pma_megatron.runs.selection_request import DEFAULT_LAST, SelectionRequest
from pma_megatron.runs.tokens import consumed_tokens_of, parse_tokens
from pma_megatron.scores.grid import Grid
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import LAST, HealthyRequest
from pma_megatron.spikes.request import RecoveryRequest
from pma_megatron.storage.addresses import Address

EXIT_CODE = 85
"""Of a job whose attempts to recover are spent; nothing in Megatron uses it."""


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySettings:
    """How to recover."""

    spike: SpikeSettings = field(default_factory=SpikeSettings)
    last: int = setting(LAST, "how many healthy checkpoints", metavar="N")
    method: Method = field(default_factory=Method)
    optimizer_state: str = same(RecoveryRequest, "optimizer_state")
    attempts: int = setting(
        3,
        "from one healthy checkpoint, each one full checkpoint further back; then the job ends "
        f"with exit code {EXIT_CODE}",
        metavar="K",
    )
    margin_iterations: int = same(HealthyRequest, "margin_iterations")
    threads: int = same(MergeRequest, "threads", flag="threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a job was asked to do: `init`, `save`, `eval_`, `snapshots`; the rest says how."""

    init: bool = setting(
        False,
        "start from an average: after Megatron has resumed from --load, its weights and main "
        "params become the average of earlier checkpoints; iteration, data and LR stay",
    )
    load: str | None = setting(
        None,
        "root of the sources; without it, --load",
        metavar="DIR",
        of=(MEGATRON,),
        used_by=("init", "score"),
    )
    selection: SelectionRequest = field(default_factory=SelectionRequest)
    method: Method = field(default_factory=Method)
    optimizer_state: str = same(Live, "optimizer_state", used_by=("init",))
    share: str = same(Live, "share", used_by=("init",))
    threads: int = same(Live, "threads", used_by=("init", "save", "score"))
    check_sources: bool = same(Live, "check_sources", used_by=("init",))
    save: bool = setting(
        False,
        "keep a window of the last weights, --pma-interval-tokens apart, and save its average "
        "beside each of Megatron's checkpoints",
    )
    window: int = same(
        SelectionRequest, "last", default=DEFAULT_LAST, flag="last", used_by=("save",)
    )
    interval_tokens: int | None = same(SelectionRequest, "interval_tokens", used_by=("save",))
    save_dir: str | None = setting(
        None,
        "root for it, an address of an object store too; without it, <save>-pma",
        metavar="DIR",
        used_by=("save",),
    )
    window_dir: str | None = setting(
        None,
        "node-local disk that holds the window; without it, host memory does",
        metavar="DIR",
        used_by=("save",),
    )
    eval_: bool = setting(
        False, "evaluate the average of --pma-save too, on the same batches", flag="eval"
    )
    snapshot_interval_tokens: int | None = setting(
        None,
        "write weights alone every so many tokens, whatever --save-interval is",
        metavar="V",
        read=parse_tokens,
        of=(MEGATRON,),
    )
    snapshot_dtype: str = setting(
        "fp32", "of snapshots", choices=("fp32", "bf16"), used_by=("snapshot_interval_tokens",)
    )
    snapshot_dir: str | None = setting(
        None,
        "root for them, an address of an object store too; without it, <save>/pma_snapshots",
        metavar="DIR",
        used_by=("snapshot_interval_tokens",),
    )
    keep: int | None = setting(
        None,
        "newest snapshots to keep; without it, all",
        metavar="K",
        used_by=("snapshot_interval_tokens",),
    )
    recovers: bool = setting(
        False,
        "on a loss spike that does not recover, go back to the average of healthy checkpoints in "
        "process, while iteration, data and LR move on",
        flag="recover",
        of=(MEGATRON,),
    )
    recover: RecoverySettings | None = None
    scores: bool = setting(
        False,
        "with --skip-train: score many averages of --load on the batches that Megatron evaluates "
        "on, and write none of them (what pma evaluate --megatron does)",
        flag="score",
        of=(MEGATRON,),
    )
    score: Grid | None = None
    score_others: tuple[str, ...] = setting(
        (),
        "further runs whose newest checkpoint is scored as it is",
        metavar="DIR",
        used_by=("score",),
    )
    score_out: str | None = setting(
        None, "file that gets the scores as JSON", metavar="FILE", used_by=("score",)
    )

    @property
    def snapshots(self) -> bool:
        """Whether snapshots are written."""
        return self.snapshot_interval_tokens is not None


@dataclass(frozen=True, slots=True)
class Flag:
    """One of the `--pma-*` flags.

    Attributes:
        name: in Megatron's argument namespace.
        users: those that make use of it; () for one that is a use itself.
        declared: the setting.
    """

    name: str
    users: tuple[str, ...]
    declared: Declared


_PARTS: Mapping[str, tuple[str, tuple[type, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "selection": ("", (SelectionRequest,), ("init",)),
        "method": ("", (Method,), ("init", "save")),
        "recover": ("recover_", (RecoverySettings, SpikeSettings), ("recover",)),
        "score": ("score_", (Grid,), ("score",)),
    }
)
"""Fields of `Settings` that are requests: how their flags begin, whose settings they are, the flags
that make use of them."""


def _flags() -> Iterator[Flag]:
    """All flags, in the order in which help shows them; again for each further use."""
    own = {each.field: each for each in declared(Settings, MEGATRON)}
    for name in Settings.__dataclass_fields__:
        if name in own:
            yield Flag(name_of(own[name]), _prefixed(own[name].setting.used_by), own[name])
            continue
        prefix, kinds, users = _PARTS[name]
        for kind in kinds:
            for each in declared(kind, MEGATRON):
                yield Flag(name_of(each, prefix), _prefixed(users), each)


def name_of(each: Declared, prefix: str = "") -> str:
    """A setting in Megatron's argument namespace."""
    return f"pma_{each.setting.flag or prefix + each.name}"


def _prefixed(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"pma_{name}" for name in names)


def _united() -> dict[str, Flag]:
    found: dict[str, Flag] = {}
    for flag in _flags():
        known = found.setdefault(flag.name, flag)
        found[flag.name] = replace(known, users=tuple(dict.fromkeys(known.users + flag.users)))
    return found


BY_NAME: Mapping[str, Flag] = MappingProxyType(_united())
"""Every flag by its name in Megatron's argument namespace."""

NAMES: tuple[str, ...] = tuple(BY_NAME)
"""Every name that `add_arguments` adds to Megatron's argument namespace."""

USED_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {flag.name: flag.users for flag in BY_NAME.values() if flag.users}
)
"""For every option, the flags that make use of it; it is refused without any of them."""


def _without(prefix: str) -> dict[str, str]:
    """The flags whose names begin so, by the rest of their names."""
    found = (name for name in NAMES if name.startswith(prefix))
    return {name.removeprefix(prefix): as_flag(name) for name in found}


FLAGS = FrontEnd(_without("pma_recover_") | _without("pma_") | _without("pma_score_"))
"""Settings as a Megatron script spells them."""


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
        _refuse_remote_save(getattr(args, "save", None))
        found = _settings(args)
        named = ("score_others", "score_out")
        refuse_remote_values({name: getattr(found, name) for name in named})
        refuse_remote_window(found.window_dir)
        for name in ("save_dir", "snapshot_dir"):
            refuse_remote(name, getattr(found, name), stores=True, put=True)
        if found.init or found.score:
            refuse_remote("load", found.load, stores=not found.score)
    return found


def _refuse_remote_save(save: str | None) -> None:
    address = Address.of(save or "")
    if address is not None and address.scheme != "msc":  # which Megatron has a client for
        raise UsageError(
            f"--save {save} is an address, and Megatron saves to folders: mount it, or give a "
            "folder. --pma-save-dir and --pma-snapshot-dir take addresses"
        )


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
    own = _values(args, Settings)
    save = getattr(args, "save", None)
    places = {"load": getattr(args, "load", None)}
    if save:
        places["save_dir"] = f"{save.rstrip('/')}-pma"
        places["snapshot_dir"] = f"{save.rstrip('/')}/pma_snapshots"
    return made(
        Settings,
        {**places, **own},
        selection=_selection(args),
        method=made(Method, _values(args, Method)),
        recover=_recovery(args) if "recovers" in own else None,
        score=made(Grid, _values(args, Grid, "score_")) if "scores" in own else None,
    )


def _values(args: Any, kind: type, prefix: str = "") -> dict[str, Any]:
    """The settings of a request that were given."""
    names = {each.name: name_of(each, prefix) for each in declared(kind, MEGATRON)}
    return {each: getattr(args, name) for each, name in names.items() if given(args, name)}


def _recovery(args: Any) -> RecoverySettings:
    spike = made(SpikeSettings, _values(args, SpikeSettings, "recover_"))
    return made(RecoverySettings, _values(args, RecoverySettings, "recover_"), spike=spike)


def _selection(args: Any) -> SelectionRequest:
    values = _values(args, SelectionRequest)
    if "iterations" in values and given(args, "pma_save"):
        # With --pma-save, --pma-last and --pma-interval-tokens describe the running average, so
        # they do not contradict a list of sources for --pma-init.
        values |= {"last": None, "interval_tokens": None}
    return made(SelectionRequest, values)
