"""What happens in a Megatron-DeepSpeed job at each place that `decorators` marks.

One job, one session: it is made when model and optimizer are ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pma_megatron.base.log import say
from pma_megatron.base.settings import MEGATRON_DEEPSPEED, declared, values
from pma_megatron.deepspeed.load import pma_init
from pma_megatron.deepspeed.online import OnlineAverage
from pma_megatron.errors import UsageError
from pma_megatron.live.load import Live
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.checks import refuse_beside
from pma_megatron.megatron.flags import Settings, tokens_now
from pma_megatron.megatron.session import (
    Session,
    begin,
    evaluate,
    evaluation,
    saved,
    saving,
    stepped,
)
from pma_megatron.megatron.trees import changed_arguments, current_args
from pma_megatron.online.average_upload import NotSavedError
from pma_megatron.online.store import FOLDER
from pma_megatron.storage.paths import place_of

__all__ = ["evaluate", "evaluation", "load", "ready", "saved", "saving", "stepped", "validate"]

_UNSUPPORTED = {
    "universal_checkpoint": "Universal checkpoints are not averaged in a live engine; use "
    "`pma merge`, and load its result",
    "kd": "a teacher is loaded beside the model",
    "mos": "a teacher is loaded beside the model",
}


def validate(args: Any) -> None:
    """Refuse what cannot work, before the model is built.

    Raises:
        UsageError: see `argument_parser.validate`; no DeepSpeed; a use of it that is not supported.
    """
    argument_parser.validate(args)
    if not getattr(args, "deepspeed", False):
        raise UsageError("--pma-* flags work on a DeepSpeed engine here: add --deepspeed")
    refuse_beside(args, "--pma-* flags", _UNSUPPORTED)


def load(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """In place of Megatron's `load_checkpoint`: what it loads becomes the average.

    Raises:
        PmaError: see `pma_init`.
    """
    chosen = argument_parser.settings(current_args())
    if not chosen.init or arguments["load_arg"] != "load":
        return fn(**arguments)
    with pma_init(arguments["model"][0], **_options(chosen)):
        return fn(**arguments)


def ready(model: Sequence[Any], optimizer: Any, opt_param_scheduler: Any) -> None:
    """Model and optimizer are built and loaded: continue a running average."""
    settings = argument_parser.settings(current_args())
    if settings.save and optimizer is not None:
        begin(EngineSession(current_args(), settings, model[0]))


class EngineSession(Session):
    """The running average of one job."""

    def __init__(self, args: Any, settings: Settings, engine: Any) -> None:
        """Make room, and continue what an earlier job has left. Collective."""
        assert settings.save_dir is not None
        self.evaluates, self._root = settings.eval_, place_of(settings.save_dir)
        tokens = tokens_now(args)
        self.online = OnlineAverage(
            engine,
            settings.method,
            settings.window,
            interval_tokens=settings.interval_tokens,
            consumed_tokens=tokens,
            window_dir=settings.window_dir,
        )
        say(self.online.report)
        self.online.place(self._root)  # raises before the first step where nothing can be saved
        notes = self.online.load_state(self._root / FOLDER, tokens, args)
        self.say_continued(notes, engine.global_steps)

    def stepped(self, arguments: Mapping[str, Any]) -> None:
        """Take an entry if it is time."""
        self.online.step(tokens_now(current_args()), current_args())

    def saving(self) -> None:
        """Have no copy of ours under way."""
        self.online.wait()

    def saved(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Save the average as a tag of its own, as Megatron saves, and the window's state."""
        average = self.online.average()
        if average is None:
            say(f"PMA: no average is saved yet: {self.online.why_none()}")
        else:
            say(f"PMA: saving {average.describe()}")
            with contextlib.suppress(NotSavedError), self.online.saving(self._root) as (folder, _):
                changes = {"save": str(folder.parent)}
                with changed_arguments(current_args(), changes):
                    fn(**arguments)
        self.online.save_state(self._root / FOLDER)


def _options(settings: Settings) -> dict[str, Any]:
    return {
        **values(settings.selection, MEGATRON_DEEPSPEED),
        **values(settings.method, MEGATRON_DEEPSPEED),
        **{each.name: getattr(settings, each.field) for each in declared(Live)},
    }
