"""What the user asked for, checked as far as it can be without looking at a checkpoint."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.settings import PMA, described, needed, refuse_unknown_words, setting
from pma_megatron.base.sizes import parse_size
from pma_megatron.base.spelling import given, has, listing, mistyped, named
from pma_megatron.errors import UsageError
from pma_megatron.merging.coefficients import (
    DECAYS,
    DEFAULT_ALPHA,
    METHODS,
    Coefficients,
    coefficients,
)
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.rolling import loaded
from pma_megatron.runs.gaps import PassedOver
from pma_megatron.runs.selection import Selection, newest_of
from pma_megatron.runs.selection_request import SelectionRequest

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")
SAMPLES = 256
"""Slices of an output that `verify` recomputes, unless the user says otherwise."""

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SWEEP = re.compile(r"^(?P<methods>[^:]+):(?P<lasts>\d+(?:,\d+)*)$")


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """How coefficients are made. Why SMA: docs/defaults.md.

    Raises:
        UsageError: an unknown name.

    >>> Method(name="ema", alpha=0.5).of((), 3).values
    (0.25, 0.25, 0.5)
    """

    name: str = setting("sma", "how checkpoints are weighted", metavar="M", choices=METHODS)
    alpha: float | None = setting(
        None,
        "ema: weight of each newer one against the average of those before it, in (0, 1]; "
        f"{DEFAULT_ALPHA} if not given",
        metavar="A",
    )
    floor: float = setting(0.0, "decay methods: where the decay ends, in [0, 1)", metavar="F")
    values: tuple[float, ...] | None = setting(
        None, "custom: coefficients, oldest first, that sum to 1", metavar="C"
    )
    allow_any: bool = setting(
        False, "custom: coefficients may be negative and have any sum", of=(PMA,)
    )

    def __post_init__(self) -> None:
        refuse_unknown_words(self)
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise UsageError(f"{given('alpha', self.alpha)} must lie in (0, 1]")

    def of(self, positions: Sequence[int], count: int) -> Coefficients:
        """Coefficients of `count` checkpoints at `positions` (() where unknown)."""
        return coefficients(
            self.name,
            tokens=tuple(positions) or None,
            count=count,
            alpha=self.alpha,
            floor=self.floor,
            values=self.values,
            allow_any=self.allow_any,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One merged checkpoint of a job: its name in a sweep and one coefficient per source."""

    name: str
    coefficients: Coefficients
    values: tuple[float, ...]
    """float64 per source of the job, oldest first; zero where the source is not used."""


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRequest:
    """One merge job.

    Raises:
        UsageError: values out of range, or settings that contradict each other.

    >>> request = MergeRequest(
    ...     load="/ckpts/run",
    ...     save="/ckpts/run-pma",
    ...     selection=SelectionRequest(last=10, interval_tokens=8_000_000_000),
    ...     method=Method(name="wma"),
    ... )
    >>> request.method.name, request.policy.optimizer_state, request.threads
    ('wma', 'latest', 2)
    """

    load: str = field(metadata=needed("the folder that training saves to", metavar="DIR"))
    save: str | None = setting(None, "folder that gets the merged iter_*", metavar="DIR")
    selection: SelectionRequest = field(default_factory=SelectionRequest)
    method: Method = field(default_factory=Method)
    policy: Policy = field(default_factory=Policy)
    lr_factor: float | None = setting(
        None,
        "of all learning rates that the result stores, in param groups and scheduler, from where "
        "a resume takes them",
        metavar="F",
    )
    dtype: str | None = setting(
        None,
        "of averaged weights: as stored without it, those of an export as its config.json says",
        metavar="D",
        choices=tuple(_DTYPES),
    )
    sweep: tuple[str, ...] = setting(
        (),
        "several outputs from one pass over the sources, e.g. sma,wma,1-sqrt:3,6,10; each in "
        "a folder M-lastN of its own",
        metavar="M,..:N,..",
    )
    threads: int = setting(2, "reader threads per rank", metavar="T")
    merge_parallel_size: int = setting(
        1,
        "ranks that share the sources of a slice and all-reduce it, for sources on node-local "
        "disks; with 1, ranks share the bytes",
        metavar="R",
    )
    overwrite: bool = setting(
        False,
        "replace an existing output: on a disk it is kept until the new one is published; in an "
        "object store it is deleted when the upload begins",
    )
    check_sources: bool = setting(
        False, "read records whole that the merge reads in part, to compare their checksums"
    )
    resumed: int | None = setting(
        None,
        "iteration that a live job has loaded, where the average ends unless `selection` says "
        "otherwise; None for what the run's tracker names",
        of=(),
    )
    export: str | None = setting(
        None,
        "folder that becomes the average as a Hugging Face model: safetensors, configuration, "
        "tokenizer, from the same pass over the sources; a merged checkpoint need not be made",
        metavar="DIR",
        of=(PMA,),
    )
    like: str | None = setting(
        None,
        "folder of a Hugging Face model of the same family and sizes, whose config.json and "
        "tokenizer the export gets; its weights are not needed",
        metavar="DIR",
        of=(PMA,),
    )
    max_shard_bytes: int = setting(
        5_000_000_000,
        "of one safetensors file of the export, e.g. 5GB, 500MiB",
        metavar="SIZE",
        read=parse_size,
        shown="5GB",
        flag="max_shard_size",
        of=(PMA,),
    )
    passed_over: tuple[PassedOver, ...] = setting(
        (), "what was left out by whoever chose the paths of `selection`, for the report", of=()
    )
    watched: str | None = setting(
        None, "settings of the watch that makes this average, by which it knows its own", of=()
    )
    rolling: str | None = setting(
        None, "what a rolling average says of itself (`rolling.Rolling`), as JSON", of=()
    )

    def __post_init__(self) -> None:
        for name in ("load", "save", "export", "like"):
            put = name in ("save", "export")
            refuse_remote(name, getattr(self, name), stores=True, put=put)
        refuse_unknown_words(self)
        if self.lr_factor is not None and not 0 < self.lr_factor < math.inf:
            raise UsageError(f"{named('lr_factor')} must be positive, got {self.lr_factor}")
        if self.lr_factor is not None and self.policy.drops_optimizer:
            raise UsageError(
                f"{named('lr_factor')} has no effect on a checkpoint of weights alone, which "
                "stores no learning rates: leave it out"
            )
        self._refuse_half_an_export()
        if self.rolling is not None and loaded(self.rolling) is None:
            raise UsageError(
                "what a watch hands on of a rolling average (PMA_ROLLING) cannot be read: only a "
                "watch sets it, unset it"
            )
        if self.threads < 1:
            raise UsageError(f"{named('threads')} must be at least 1, got {self.threads}")
        for text in self.sweep:
            if _SWEEP.match(text) is None:
                raise UsageError(
                    f"{mistyped('sweep', text)} is not METHOD[,METHOD]:LAST[,LAST], as in "
                    "sma,wma:3,6,10"
                )
        negative = any(value < 0 for value in self.method.values or ())
        if negative and self.policy.optimizer_state == "average":
            raise UsageError(
                f"{given('optimizer_state', 'average')} with negative coefficients could make "
                "second moments negative: use latest or reset"
            )
        if self.sweep:
            self._refuse_beside_a_sweep()

    def _refuse_beside_a_sweep(self) -> None:
        method, listed = self.method, self.list_setting
        if method.name != Method().name:
            raise UsageError(
                f"{named('sweep')} makes its own coefficients: leave out "
                f"{given('method', method.name)}"
            )
        for name in ("last", "window_tokens"):
            value = getattr(self.selection, name)
            if value is not None:
                raise UsageError(
                    f"{named('sweep')} says how many checkpoints each average takes: leave out "
                    f"{given(name, value)}"
                )
        if listed is not None:
            raise UsageError(
                f"{named('sweep')} takes the newest checkpoints for each average, as many as it "
                f"says, and {named(listed)} names them: leave out one of the two"
            )
        methods = {name for name, _ in self._sweep()}
        for name, asked, has_part, whose in (
            ("alpha", method.alpha is not None, "ema" in methods, "ema"),
            ("floor", method.floor != 0, methods & set(DECAYS), ", ".join(DECAYS)),
            ("coefficients", method.values is not None, False, "custom"),
            ("allow_any_coefficients", method.allow_any, False, "custom"),
        ):
            if asked and not has_part:
                raise UsageError(
                    f"{named(name)} has no effect on {given('sweep', self.sweep)}, it is for "
                    f"{whose}: leave it out"
                )

    def refuse_no_output(self) -> None:
        """Refuse what a plan can do without: a place for what is merged.

        Raises:
            UsageError: there is none.
        """
        if self.save is None and self.export is None:
            instead = f", or {named('export')}" if has("export") else ""
            raise UsageError(
                f"merge needs {named('save')}, the folder for the merged checkpoint{instead}"
            )

    def _refuse_half_an_export(self) -> None:
        if self.max_shard_bytes < 1:
            raise UsageError(
                f"{named('max_shard_bytes')} must be at least 1, got {self.max_shard_bytes}"
            )
        if self.like is not None and self.export is None:
            raise UsageError(
                f"{given('like', self.like)} has no effect without {named('export')}, the folder "
                "of the export"
            )
        if self.lr_factor is not None and not self.writes_checkpoint:
            raise UsageError(
                f"{named('lr_factor')} has no effect on an export, which stores no learning rates: "
                f"leave it out, or give {named('save')} too"
            )

        state = self.policy.optimizer_state
        if state in ("average", "reset") and not self.writes_checkpoint:
            raise UsageError(
                f"{given('optimizer_state', state)} has no effect on an export, which stores no "
                f"optimizer: leave it out, or give {named('save')} too"
            )

    @property
    def writes_checkpoint(self) -> bool:
        """Whether a checkpoint is made, not an export alone."""
        return self.save is not None or self.export is None

    def settled(self) -> MergeRequest:
        """The same without what has no effect: an export has no optimizer."""
        if self.writes_checkpoint:
            return self
        return replace(self, policy=replace(self.policy, optimizer_state="drop"))

    @property
    def list_setting(self) -> str | None:
        """The setting that names the checkpoints one by one, None where none does."""
        for name in ("paths", "iterations"):
            if getattr(self.selection, name) is not None:
                return name
        return None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as torch names it."""
        import torch  # not above: the flags of the command line are made of this module

        return None if self.dtype is None else getattr(torch, _DTYPES[self.dtype])

    def widest(self) -> SelectionRequest:
        """The selection that feeds every output of the job."""
        lasts = [last for _, last in self._sweep()]
        return replace(self.selection, last=max(lasts)) if lasts else self.selection

    def outputs(self, selection: Selection) -> tuple[Output, ...]:
        """Coefficients of every output over the selected sources."""
        count = len(selection.refs)
        if not self.sweep:
            made = self.method.of(selection.positions, count)
            return (Output(name="", coefficients=made, values=made.values),)
        result = []
        for method, last in self._sweep():
            # Not those of the widest: an older checkpoint may have denied it the tokens.
            positions = newest_of(selection, last, self.selection).positions
            made = Method(
                name=method,
                alpha=self.method.alpha if method == "ema" else None,
                floor=self.method.floor if method in DECAYS else 0.0,
            ).of(positions, last)
            values = (0.0,) * (count - last) + made.values
            result.append(Output(name=f"{method}-last{last}", coefficients=made, values=values))
        return tuple(result)

    def notes_of_outputs(self, selection: Selection) -> tuple[str, ...]:
        """What is said of averages of a sweep that are in another unit than the widest one."""
        found = []
        for last in sorted({last for _, last in self._sweep()}):
            own = newest_of(selection, last, self.selection)
            if own.position_unit != selection.position_unit:
                new = [note for note in own.notes if note not in selection.notes]
                said = [f"positions are in {own.position_unit}, which can be compared here", *new]
                found += [f"of the last {last}: {note}" for note in said]
        return tuple(found)

    def _sweep(self) -> list[tuple[str, int]]:
        pairs: dict[tuple[str, int], None] = {}
        for text in self.sweep:
            match = _SWEEP.match(text)
            assert match is not None
            for method in match["methods"].split(","):
                for last in match["lasts"].split(","):
                    pairs[method, int(last)] = None
        return list(pairs)


def refuse_other_plans(digests: Sequence[str]) -> None:
    """Ranks of one job that were asked for other merges, as by another file of `--from`.

    Args:
        digests: of each rank's plan.

    Raises:
        UsageError: they differ.
    """
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UsageError(
            f"rank {others[0]} ({len(others)} in all) was asked for another merge than rank 0, by "
            "its arguments or by a file that they name: start all ranks alike"
        )


def in_its_words(
    work: Callable[Concatenate[MergeRequest, P], R],
) -> Callable[Concatenate[MergeRequest, P], R]:
    """Decorator: what is said in `work` has a checkpoint left out of the list that names it, where
    the request, which comes first, has such a list (`paths`, `iterations`)."""

    @functools.wraps(work)
    def speaking(request: MergeRequest, *args: P.args, **settings: P.kwargs) -> R:
        with listing(request.list_setting):
            return work(request, *args, **settings)

    return speaking  # type: ignore[return-value]  # `request` may be given by name too
