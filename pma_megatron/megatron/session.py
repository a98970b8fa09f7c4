"""The running average of one training job, as the places that `decorators` marks meet it.

There is one job in a process, so there is one session: `begin` makes it the one that the functions
of this module, which are the hooks that trees of Megatron and Megatron-DeepSpeed share, talk to.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from pma_megatron.base.log import say
from pma_megatron.megatron.evaluate import Evaluation

_session: Session | None = None
_guest: Running | None = None
"""Of a command that runs a script for its evaluation."""
_visited = False


class Running(Protocol):
    """What replaces the losses of an evaluation by those of averages too."""

    def run(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """In place of Megatron's `evaluate`; returns what that returns."""

    def report(self) -> None:
        """Print what was found."""


class Session(ABC):
    """The averages of one job.

    Attributes:
        online: the running average; None where none was asked for.
        running: the evaluation that is under way.
    """

    online: Any
    running: Running | None = None
    evaluates: bool = False
    """Whether the average is evaluated where Megatron evaluates."""

    @abstractmethod
    def stepped(self, arguments: Mapping[str, Any]) -> None:
        """An iteration has ended; `arguments` are those of Megatron's `training_log`."""

    @abstractmethod
    def saving(self) -> None:
        """Megatron is about to save, and may fork its writers."""

    @abstractmethod
    def saved(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Megatron has saved, by `fn(**arguments)`: save the running average too."""

    @contextlib.contextmanager
    def evaluation(self, prefix: str, iteration: int, write_to_tensorboard: bool) -> Iterator[None]:
        """Inside the block, `evaluate` scores the average too; at its end the results appear."""
        if self.online is None or not self.evaluates:
            yield
        elif self.online.average() is None:
            say(f"PMA: no average is evaluated yet: {self.online.why_none()}")
            yield
        else:
            weights = self.online.averaged_weights
            with self.during(Evaluation(prefix, iteration, write_to_tensorboard, weights)):
                yield

    @contextlib.contextmanager
    def during(self, running: Running) -> Iterator[None]:
        """Let `running` take part in the evaluation inside the block, and report at its end."""
        self.running = running
        try:
            yield
            running.report()
        finally:
            self.running = None

    def say_continued(self, notes: Sequence[str], resumed: int) -> None:
        """Say which entries a resumed job goes on with.

        Args:
            notes: what was wrong with the state on disk.
            resumed: the iteration that the job goes on from.
        """
        held = ", ".join(str(entry.iteration) for entry in self.online.entries)
        if resumed or held or notes:
            say(f"PMA: the running average continues with iterations {held or 'none'}")
        for note in notes:
            say(f"PMA: WARNING: {note}")


@contextlib.contextmanager
def taking_part(running: Running) -> Iterator[None]:
    """In the block, `running` takes part in the first evaluation of a script of Megatron's that
    this process runs, whatever its flags."""
    global _guest, _visited
    _guest, _visited = running, False
    try:
        yield
    finally:
        _guest = None


def is_visited() -> bool:
    """Whether a command runs the script for its evaluation."""
    return _guest is not None


def begin(session: Session) -> None:
    """From now on the hooks below talk to `session`."""
    global _session
    _session = session


def stepped(arguments: Mapping[str, Any]) -> None:
    """An iteration has ended; `arguments` are those of Megatron's `training_log`."""
    if _session is not None:
        _session.stepped(arguments)


def saving() -> None:
    """Megatron is about to save, and may fork its writers."""
    if _session is not None:
        _session.saving()


def saved(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Megatron has saved: save the running average too."""
    if _session is not None:
        _session.saved(fn, arguments)


@contextlib.contextmanager
def evaluation(prefix: str, iteration: int, write_to_tensorboard: bool) -> Iterator[None]:
    """Around Megatron's evaluation and its report, which those of the average follow."""
    global _visited
    if _session is None:
        yield
        return
    if _guest is not None and not _visited:
        _visited = True
        with _session.during(_guest):
            yield
        return
    with _session.evaluation(prefix, iteration, write_to_tensorboard):
        yield


def evaluate(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """In place of Megatron's `evaluate`; returns what that returns."""
    running = None if _session is None else _session.running
    return fn(**arguments) if running is None else running.run(fn, arguments)
