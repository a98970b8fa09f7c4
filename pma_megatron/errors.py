"""One base error and one class per kind of failure.

Every message names the thing, what was expected, what was found, and what to do about it.
"""

from __future__ import annotations


class PmaError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        published: folders that the command had published before it failed.
        unpublished: those that it had not, if there are any of the first kind.
        kept: the folder of what it had done, with which the same command goes on; None if nothing.

    >>> from pma_megatron import SelectionRequest
    >>> try:
    ...     SelectionRequest(last=0)
    ... except PmaError as error:
    ...     print(type(error).__name__, error)
    UsageError last= must be at least 1, got 0
    """

    published: tuple[str, ...] = ()
    unpublished: tuple[str, ...] = ()
    kept: str | None = None


class UsageError(PmaError, ValueError):
    """A flag or argument cannot be what it is: unknown method, alpha out of range, bad pattern."""


class SelectionError(PmaError, ValueError):
    """The checkpoints asked for are not there: too few, a hole, incomplete, missing data."""


class CheckpointError(PmaError):
    """A checkpoint on disk is damaged, hostile, or of a form that is not supported."""


class MetricsError(PmaError):
    """A file of training metrics cannot be read, has no loss, or could mean several things."""


class PlanError(PmaError):
    """The sources cannot be merged with each other: layouts, shapes, or dtypes differ."""


class PublishError(PmaError):
    """The output cannot be written or published where the user asked for it."""


class VerifyError(PmaError):
    """A merged checkpoint is not what its sources and coefficients say it should be."""


class RankError(PmaError):
    """Another rank failed; the message carries its rank, stage and cause.

    Attributes:
        lost: True if that rank cannot tell anybody any more: it died, hangs, or has gone.
        speaker: the rank that tells the user.
        asked: True if somebody asked that rank to end.
    """

    def __init__(
        self, message: str, *, lost: bool = False, speaker: int = 0, asked: bool = False
    ) -> None:
        super().__init__(message)
        self.lost, self.speaker, self.asked = lost, speaker, asked


class PoisonedError(PmaError):
    """A live model is a mixture: loading into it failed half-way, so it must not be used."""
