"""What a recovery from a loss spike is asked for, checked as far as it can be without the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.settings import declared, described, needed, same, setting
from pma_megatron.base.spelling import FrontEnd, fields, given, mistyped, named, one_of
from pma_megatron.errors import UsageError
from pma_megatron.merging.policy import RESUMED_STATES, Policy
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.spikes.healthy import HealthyRequest, Span
from pma_megatron.spikes.settings import SpikeSettings

MOST_SKIPPED = 500  # PaLM (arXiv 2204.02311, section 5.1) skipped 200 to 500 batches


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryRequest:
    """A recovery from a loss spike.

    Raises:
        UsageError: neither metrics nor onset, or both.

    >>> request = RecoveryRequest(load="/ckpts/run", save="/ckpts/run-2", metrics="/logs/run.log")
    >>> request.optimizer_state, request.skip_data
    ('latest', True)
    """

    load: str = field(metadata=needed("the run's folder or address; only read", metavar="DIR"))
    save: str = field(
        metadata=needed(
            "a new folder, for the merge and the run as it goes on, or an address", metavar="DIR"
        )
    )
    metrics: tuple[str, ...] | None = setting(
        None,
        "the run's log, TensorBoard file or folder, CSV, JSONL or trainer_state.json; several are "
        "parts of one run, in the order in which they were written",
        metavar="PATH",
    )
    onset: int | None = setting(
        None, "or the first iteration that was off, where it is known", metavar="I"
    )
    loss: str | None = setting(
        None,
        "column, key or tag of the loss in the metrics, if unusual; or one of several runs in them",
        metavar="NAME",
    )
    grad_norm: str | None = setting(None, "the same of the gradient norm", metavar="NAME")
    spike: SpikeSettings = field(default_factory=SpikeSettings)
    last: int | None = same(HealthyRequest, "last")
    interval_tokens: int | None = same(HealthyRequest, "interval_tokens")
    interval_iterations: int | None = same(HealthyRequest, "interval_iterations")
    margin_iterations: int = same(HealthyRequest, "margin_iterations")
    further_back: int = same(HealthyRequest, "further_back")
    exclude: tuple[int, ...] = same(HealthyRequest, "exclude")
    method: Method = field(default_factory=Method)
    optimizer_state: str = same(
        Policy,
        "optimizer_state",
        help="moments and step, the latest being those of the newest healthy checkpoint",
        choices=RESUMED_STATES,
    )
    skip: Span | None = setting(
        None,
        "iterations whose data is not trained on again, or `none`; without it, those from the "
        f"first that may have been off to where the metrics told it, at most {MOST_SKIPPED}; none "
        "where the onset was given instead of metrics",
        metavar="A:B",
    )
    skip_data: bool = setting(True, "False to train on all data again", of=())
    lr_factor: float | None = setting(
        None,
        "of all learning rates, in the result and in the printed command, in (0, 1]",
        metavar="F",
    )
    command: tuple[str, ...] = setting(
        (), "the run's launch command, to be printed with the changes made", of=()
    )
    threads: int = same(MergeRequest, "threads")
    overwrite: bool = setting(False, "replace an earlier recovery in the same folder")

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str | Path):
            object.__setattr__(self, "metrics", (str(self.metrics),))
        refuse_remote("load", self.load, stores=True)
        refuse_remote("save", self.save, stores=True, put=True)
        refuse_remote("metrics", *(self.metrics or ()), stores=True)
        if self.metrics is not None and self.onset is not None:
            raise UsageError(
                f"{named('onset')} and {named('metrics')} cannot stand together, for each says "
                f"where the run went wrong: leave out {named('metrics')} (then name the data to "
                f"pass over with {named('skip')}), or {named('onset')}"
            )
        if self.metrics is None and self.onset is None:
            raise UsageError(
                f"say where the run went wrong: {given('metrics', 'FILE')} (its log, TensorBoard "
                f"folder, CSV or JSONL), or {named('onset')}, its first iteration "
                "that was off, one of the two"
            )
        if self.lr_factor is not None and not 0 < self.lr_factor <= 1:
            raise UsageError(f"{given('lr_factor', self.lr_factor)} must lie in (0, 1]")
        if self.optimizer_state not in RESUMED_STATES:
            raise UsageError(
                f"{mistyped('optimizer_state', self.optimizer_state)} cannot resume; "
                f"{one_of(self.optimizer_state, RESUMED_STATES)}"
            )


KEYWORDS = FrontEnd(
    fields(
        each.name for kind in (RecoveryRequest, SpikeSettings, Method) for each in declared(kind)
    )
)
"""Settings as Python calls with a `RecoveryRequest` spell them."""
