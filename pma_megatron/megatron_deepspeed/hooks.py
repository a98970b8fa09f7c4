"""What happens in a Megatron-DeepSpeed job at each place that `decorators` marks.

One job, one `Session`: it is made when model and optimizer are ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.base.say import say
from pma_megatron.base.settings import MEGATRON_DEEPSPEED, declared, values
from pma_megatron.deepspeed.load import pma_init
from pma_megatron.deepspeed.online import OnlineAverage
from pma_megatron.errors import UsageError
from pma_megatron.live.load import Live
from pma_megatron.megatron import flags
from pma_megatron.megatron.evaluate import Evaluation
from pma_megatron.megatron.options import Settings, tokens_now
from pma_megatron.megatron.trees import changed_arguments, global_vars
from pma_megatron.online.store import FOLDER

_UNSUPPORTED = (
    (
        "universal_checkpoint",
        "Universal checkpoints are not averaged in a live engine; use "
        "`pma merge`, and load its result",
    ),
    ("kd", "a teacher is loaded beside the model"),
    ("mos", "a teacher is loaded beside the model"),
)
_session: Session | None = None


def validate(args: Any) -> None:
    """Refuse what cannot work, before the model is built.

    Raises:
        UsageError: see `flags.validate`; no DeepSpeed; a use of it that is not supported.
    """
    flags.validate(args)
    if not getattr(args, "deepspeed", False):
        raise UsageError("--pma-* flags work on a DeepSpeed engine here: add --deepspeed")
    for name, why in _UNSUPPORTED:
        if getattr(args, name, False):
            flag = name.replace("_", "-")
            raise UsageError(f"--pma-* flags cannot be used with --{flag}: {why}")


def load(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """In place of Megatron's `load_checkpoint`: what it loads becomes the average.

    Raises:
        PmaError: see `pma_init`.
    """
    chosen = flags.settings(_args())
    if not chosen.init or arguments["load_arg"] != "load":
        return fn(**arguments)
    with pma_init(arguments["model"][0], **_options(chosen)):
        return fn(**arguments)


def ready(model: Sequence[Any], optimizer: Any, opt_param_scheduler: Any) -> None:
    """Model and optimizer are built and loaded: continue a running average."""
    global _session
    settings = flags.settings(_args())
    if settings.save and optimizer is not None:
        _session = Session(_args(), settings, model[0])


def stepped(arguments: Mapping[str, Any]) -> None:
    """An iteration has ended; `arguments` are those of Megatron's `training_log`."""
    if _session is not None:
        _session.online.step(tokens_now(_args()), _args())


def saving() -> None:
    """Megatron is about to save."""
    if _session is not None:
        _session.online.wait()


def saved(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Megatron has saved: save the running average too."""
    if _session is not None:
        _session.saved(fn, arguments)


@contextlib.contextmanager
def evaluation(prefix: str, iteration: int, write_to_tensorboard: bool) -> Iterator[None]:
    """Around Megatron's evaluation and its report, which those of the average follow."""
    if _session is None:
        yield
        return
    with _session.evaluation(prefix, iteration, write_to_tensorboard):
        yield


def evaluate(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """In place of Megatron's `evaluate`; returns what that returns."""
    running = None if _session is None else _session.running
    return fn(**arguments) if running is None else running.run(fn, arguments)


class Session:
    """The running average of one job."""

    def __init__(self, args: Any, settings: Settings, engine: Any) -> None:
        """Make room, and continue what an earlier job has left. Collective."""
        assert settings.save_dir is not None
        self.running: Evaluation | None = None
        self._settings, self._root, tokens = settings, Path(settings.save_dir), tokens_now(args)
        self.online = OnlineAverage(
            engine,
            settings.method,
            settings.window,
            interval_tokens=settings.interval_tokens,
            consumed_tokens=tokens,
            window_dir=settings.window_dir,
        )
        say(self.online.report)
        notes = self.online.load_state(self._root / FOLDER, tokens)
        held = ", ".join(str(entry.iteration) for entry in self.online.entries)
        if engine.global_steps or held or notes:
            say(f"PMA: the running average continues with iterations {held or 'none'}")
        for note in notes:
            say(f"PMA: WARNING: {note}")

    def saved(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Save the average as a tag of its own, as Megatron saves, and the window's state."""
        average = self.online.average()
        if average is None:
            say(f"PMA: no average is saved yet: {self.online.why_none()}")
        else:
            say(f"PMA: saving {average.describe()}")
            changes = {"save": str(self._root)}
            with self.online.saving(self._root), changed_arguments(_args(), changes):
                fn(**arguments)
        self.online.save_state(self._root / FOLDER)

    @contextlib.contextmanager
    def evaluation(self, prefix: str, iteration: int, write_to_tensorboard: bool) -> Iterator[None]:
        """Inside the block, `evaluate` scores the average too; at its end the results appear."""
        if not self._settings.eval_:
            yield
            return
        if self.online.average() is None:
            say(f"PMA: no average is evaluated yet: {self.online.why_none()}")
            yield
            return
        self.running = Evaluation(
            prefix, iteration, write_to_tensorboard, self.online.averaged_weights
        )
        try:
            yield
            self.running.report()
        finally:
            self.running = None


def _options(settings: Settings) -> dict[str, Any]:
    return {
        **values(settings.selection, MEGATRON_DEEPSPEED),
        **values(settings.method, MEGATRON_DEEPSPEED),
        **{each.name: getattr(settings, each.field) for each in declared(Live)},
    }


def _args() -> Any:
    return global_vars().get_args()
