"""What is to stay possible when checkpoints are deleted."""

from __future__ import annotations

from dataclasses import dataclass, field

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.settings import declared, described, needed, same, setting
from pma_megatron.base.spelling import FrontEnd, fields, given, named, one_of
from pma_megatron.errors import UsageError
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.runs.tokens import format_tokens, parse_tokens
from pma_megatron.spikes.healthy import LAST, HealthyRequest

_OF_WINDOW = (
    "last",
    "interval_tokens",
    "interval_iterations",
    "window_tokens",
    "tolerance",
    "end_iteration",
)
_RULES = (
    "keep_last",
    "keep_every_tokens",
    "keep_every_iterations",
    "keep_window",
    "keep_iterations",
    "keep_recovery_iterations",
)
_OF_RECOVERIES = ("recovery_last", "recovery_attempts", "margin_iterations")


def parse_window(text: str) -> SelectionRequest:
    """Read a window such as `last=10,interval-tokens=8B`, in the words of `pma merge`.

    Raises:
        UsageError: an unknown setting, no value, or a window that no merge could ask for.

    >>> parse_window("last=10,interval-tokens=8B").interval_tokens
    8000000000
    """
    known = {e.name: e for e in declared(SelectionRequest) if e.name in _OF_WINDOW}
    values = {}
    for part in text.split(","):
        name, _, said = part.strip().partition("=")
        setting_name = name.replace("-", "_")
        if setting_name not in known or setting_name in values:
            words = tuple(each.replace("_", "-") for each in known)
            why = "is there twice" if setting_name in values else one_of(name, words)
            raise UsageError(f"{text!r}: {name!r} {why}, as in last=10,interval-tokens=8B")
        each = known[setting_name]
        try:
            values[setting_name] = (each.setting.read or each.word)(said)
        except ValueError as error:
            raise UsageError(f"{text!r}: {name}={said!r} is no {each.word.__name__}") from error
    return SelectionRequest(**values)


def window_text(window: SelectionRequest) -> str:
    """A window as it would be typed."""
    said = []
    for each in declared(SelectionRequest):
        value = getattr(window, each.field)
        if each.name in _OF_WINDOW and value is not None and value != each.default:
            short = format_tokens(value) if each.name.endswith("tokens") else ""
            exact = short if short and parse_tokens(short) == value else value
            said.append(f"{each.name.replace('_', '-')}={exact}")
    return ",".join(said) or f"last={declared(SelectionRequest)[0].shown}"


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRequest:
    """What stays of a run; all else may go.

    Raises:
        UsageError: values out of range, or nothing that is to stay.

    >>> request = PruneRequest(root="/ckpts/run", keep_last=3, keep_every_tokens=100_000_000_000)
    >>> request.keep_window, request.recovery_last
    ((), 3)
    """

    root: str = field(
        metadata=needed("the folder that training saves to, or one of merges", metavar="DIR")
    )
    keep_last: int | None = setting(
        None, "the newest so many that training can resume from", metavar="K"
    )
    keep_every_tokens: int | None = setting(
        None,
        "the first one at or after every multiple of so many tokens, e.g. 100B",
        metavar="V",
        read=parse_tokens,
    )
    keep_every_iterations: int | None = setting(None, "the same of iterations", metavar="V")
    keep_window: tuple[SelectionRequest, ...] = setting(
        (),
        "what this average needs, now and as the run goes on, in the words of pma merge: "
        "last=10,interval-tokens=8B; may be given several times",
        metavar="WINDOW",
        read=parse_window,
        repeated=True,
    )
    keep_iterations: tuple[int, ...] = setting((), "these, whatever they are", metavar="I")
    keep_recovery_iterations: int | None = setting(
        None,
        "what a recovery from a loss spike needs, if its first iteration that was off lies up to "
        "so many iterations back",
        metavar="D",
    )
    recovery_last: int = setting(LAST, "how many checkpoints a recovery averages", metavar="N")
    recovery_attempts: int = setting(
        3, "attempts, each one healthy checkpoint further back", metavar="K"
    )
    margin_iterations: int = same(HealthyRequest, "margin_iterations")
    averages: tuple[str, ...] = setting(
        (),
        "further folders in which merges of this run may have been cut off: what they still need "
        "stays; those beside the run and in it are looked at anyway",
        metavar="DIR",
    )
    resume_iteration: int | None = setting(
        None,
        "the iteration that training resumes from, where no tracker says it and the files of a "
        "lower one are newer",
        metavar="I",
    )
    damaged: bool = setting(
        False, "damaged ones may go too, once nothing in them has changed for an hour"
    )
    without_locks: bool = setting(
        False,
        "delete where the file system has no locks, which tell that nobody reads a checkpoint",
    )

    def __post_init__(self) -> None:
        refuse_remote("root", self.root, stores=True, put=True)
        refuse_remote("averages", *self.averages, stores=True, put=True)
        if not any(getattr(self, name) not in (None, ()) for name in _RULES):
            raise UsageError(
                f"nothing says what is to stay: {given('keep_last', 5)}, "
                f"{named('keep_window')} and others ({', '.join(map(named, _RULES[1:]))})"
            )
        for each in declared(PruneRequest) if self.keep_recovery_iterations is None else ():
            if each.name in _OF_RECOVERIES and getattr(self, each.name) != each.default:
                raise UsageError(
                    f"{named(each.name)} counts for recoveries, which nothing is kept for without "
                    f"{named('keep_recovery_iterations')}: say how far back they may begin"
                )
        for name in (*_RULES, "recovery_last", "recovery_attempts"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{named(name)} must be at least 1, got {value}")


KEYWORDS = FrontEnd(fields(each.name for each in declared(PruneRequest)))
"""Settings as Python calls with a `PruneRequest` spell them."""
