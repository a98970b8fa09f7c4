"""What a watch follows, and what it does with each average."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from pma_megatron.base.durations import parse_duration
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.settings import described, needed, setting
from pma_megatron.base.spelling import given, named, override
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.storage.paths import place_of, real

_FIXED = ("paths", "iterations", "tokens", "end_iteration")


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class WatchRequest:
    """An average that follows a run.

    Raises:
        UsageError: values out of range, or an average that cannot follow a run.

    >>> request = WatchRequest(merge=MergeRequest(load="/ckpts/run", save="/ckpts/avg"))
    >>> request.poll_s, request.keep
    (60.0, None)
    """

    merge: MergeRequest = field(
        metadata=needed("the average, whose selection ends wherever the run is", of=())
    )
    poll_s: float = setting(
        60.0,
        "how long to wait between two looks at the run, e.g. 30, 5m",
        metavar="S",
        read=parse_duration,
        shown="60",
    )
    once: bool = setting(False, "look once, make the average current, and end")
    until_iteration: int | None = setting(
        None, "end when the average of this iteration or a later one is current", metavar="I"
    )
    keep: int | None = setting(None, "delete old averages, all but the newest so many", metavar="K")
    evaluate: str | None = setting(
        None,
        "shell command for each average: PMA_AVERAGE is its folder, PMA_EXPORT that of the model, "
        "PMA_ITERATION its iteration",
        metavar="CMD",
    )
    events: Path | None = setting(
        None, "file to which every event is added, a line of JSON each", metavar="FILE", read=Path
    )
    launch: str | None = setting(
        None,
        "what starts the ranks of a merge, e.g. 'torchrun --nproc-per-node 8'; without it this "
        "process merges",
        metavar="CMD",
    )
    rolling: int | None = setting(
        None,
        "update the average that is there, in float32, by what joins and what leaves, up to K "
        "times before one is computed from all checkpoints again; without it, each is",
        metavar="K",
    )
    words: tuple[str, ...] = setting(
        (), "the merge as it was typed, for the command of `launch`", of=()
    )
    unchosen_words: tuple[str, ...] = setting(
        (), "the same without which checkpoints it takes and how they are weighted", of=()
    )

    def __post_init__(self) -> None:
        self.merge.refuse_no_output()
        for name in ("load", "save", "export", "like"):
            refuse_remote(name, getattr(self.merge, name), stores=True)
        for name in _FIXED:
            if getattr(self.merge.selection, name) is not None:
                raise UsageError(
                    f"{named(name)} says where an average ends for good, and this one follows the "
                    "run: leave it out, or use pma merge"
                )
        for name in ("keep", "until_iteration", "rolling"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{named(name)} must be at least 1, got {value}")
        if self.poll_s <= 0:
            raise UsageError(f"{named('poll_s')} must be more than 0, got {self.poll_s}")
        if self.keep is not None and self.merge.save is None:
            raise UsageError(
                f"{given('keep', self.keep)} has no effect on an export, of which there is one: "
                f"leave it out, or give {named('save')}"
            )
        if self.rolling is not None:
            self._refuse_no_sum()
        for name in ("evaluate", "launch"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise UsageError(f"{named(name)} is empty: say which command, or leave it out")
        if self.evaluate is not None and self.merge.sweep:
            raise UsageError(
                f"{named('evaluate')} is for one average, and {named('sweep')} makes several: "
                "leave out one of the two"
            )
        if self.launch is not None:
            _refuse_half_a_word(self.launch)
        folders = self.merge.load, self.merge.save
        if folders[1] is not None and len({real(each) for each in folders if each}) < 2:
            raise UsageError(
                f"{given('save', folders[1])} is the run's own folder: its tracker and retention "
                f"would take the average for a checkpoint of the run. Use {folders[1]}-watch"
            )

    def _refuse_no_sum(self) -> None:
        """Refuse what cannot be gone on with by adding and taking off.

        Raises:
            UsageError: naming it.
        """
        asked, why = self.merge, None
        if asked.method.name != "sma":
            why = f"{given('method', asked.method.name)}, whose coefficients all change"
        elif asked.sweep:
            why = f"{named('sweep')}, which makes several averages"
        elif asked.save is None:
            why = f"{named('export')} alone, which keeps no float32 main params"
        elif asked.policy.optimizer_state == "average":
            why = f"{given('optimizer_state', 'average')}: second moments could become negative"
        elif averaged := [p for p in asked.policy.overrides if _averages_moments(*p)]:
            why = f"{override(*averaged[0])}: second moments could become negative"
        elif asked.policy.drops_optimizer:
            why = "weights alone, which are rounded"
        if why is not None:
            raise UsageError(
                f"{given('rolling', self.rolling)} needs a float32 sum that goes on, and cannot be "
                f"combined with {why}: leave out one of the two"
            )

    @property
    def places(self) -> tuple[tuple[Path, str], ...]:
        """Folders of which one watch at a time has charge, each with a name for its lock."""
        found = [] if self.merge.save is None else [(place_of(self.merge.save), "watch")]
        if self.merge.export is not None:
            export = place_of(real(self.merge.export))
            found.append((export.parent, f"watch-{export.name}"))
        return tuple(found)


def _averages_moments(pattern: str, action: str) -> bool:
    """Whether an override says so in its words; `rolling` looks at what the others match."""
    return action == "average" and pattern.startswith("optimizer.")


def _refuse_half_a_word(launch: str) -> None:
    try:
        shlex.split(launch)
    except ValueError as error:
        raise UsageError(f"{named('launch')} {launch!r} is no command: {error}") from error
