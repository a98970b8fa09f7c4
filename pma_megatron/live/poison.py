"""A live model that a load has left half-way: nothing runs on it until a whole load has ended well.

Half of its values are of one checkpoint and half of another, and a caught exception would let
training go on with them. So a failed load hangs refusals on the model's forward pass and on the
steps of its optimizer; they go away by themselves. While nothing has failed, nothing is installed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pma_megatron.errors import PoisonedError

IsWhole = Callable[[Any, tuple[Any, ...], dict[str, Any]], bool]
"""(result, arguments, named arguments) of a load -> whether model and optimizer were loaded."""
Load = tuple[Any, str, Callable[..., Any], IsWhole]
_NOTHING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """What a live load writes into, and what must not be used when it fails.

    Attributes:
        modules: whose forward passes are refused; the first stands for all.
        methods: (object, name) of what is refused beside them: steps, saves.
        loads: (object, name, plain method, `IsWhole`) of the trainer's own loads. When each has
            ended well the model is whole again.
    """

    modules: tuple[Any, ...]
    methods: tuple[tuple[Any, str], ...]
    loads: tuple[Load, ...]


def state_loads(holders: Iterable[Any]) -> tuple[Load, ...]:
    """The loads of a trainer that hands each of `holders` its whole state."""
    return tuple((h, "load_state_dict", h.load_state_dict, lambda *_: True) for h in holders)


@contextlib.contextmanager
def poisoned_on_failure(trainer: Trainer, what: str) -> Iterator[None]:
    """Whatever ends the block but its end leaves a mixture, which is poisoned.

    Args:
        trainer: what the block writes into.
        what: is done in the block, for the message.
    """
    try:
        yield
    except BaseException as error:
        cure(trainer)
        _poisoned[trainer.modules[0]] = _Poison(trainer, what, error)
        raise


def cure(trainer: Trainer) -> None:
    """Model and optimizer are whole again."""
    found = _poisoned.pop(trainer.modules[0], None)
    if found is not None:
        found.remove()


def refuse_poisoned(module: Any) -> None:
    """Refuse what would use a mixture.

    Raises:
        PoisonedError: the model is one.
    """
    found = _poisoned.get(module)
    if found is not None:
        found.refuse()


@contextlib.contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` is `method` inside the block; what poisons `owner` meanwhile outlasts it."""
    before = _replace(owner, name, method)
    try:
        yield
    finally:
        if vars(owner).get(name) is method:
            _put_back(owner, name, before)
        for poison in _poisoned.values():
            poison.forget(method, before)


class _Poison:
    def __init__(self, trainer: Trainer, what: str, error: BaseException) -> None:
        self._why = f"{what} failed half-way ({type(error).__name__}: {error})"
        self._handles = [m.register_forward_pre_hook(self.refuse) for m in trainer.modules]
        self._before: list[tuple[Any, str, Any]] = []
        self._trainer, self._whole = trainer, [False] * len(trainer.loads)
        for owner, name in trainer.methods:
            self._before.append((owner, name, _replace(owner, name, self.refuse)))
        for number, (owner, name, plain, is_whole) in enumerate(trainer.loads):
            method = self._loading(number, plain, is_whole)
            self._before.append((owner, name, _replace(owner, name, method)))

    def refuse(self, *_: Any, **__: Any) -> None:
        """In place of a forward pass, a step or a save.

        Raises:
            PoisonedError: always.
        """
        raise PoisonedError(
            f"this model is a mixture of two states: {self._why}. Do not train on it or save it. "
            "Load a whole checkpoint, optimizer included, with the trainer's own load, or repeat "
            "the load that failed; or end the job"
        )

    def remove(self) -> None:
        """Everything is as it was."""
        for handle in self._handles:
            handle.remove()
        for owner, name, before in reversed(self._before):
            _put_back(owner, name, before)

    def forget(self, method: Callable[..., Any], before: Any) -> None:
        """What lay under a refusal is no longer there."""
        self._before = [(o, n, before if b is method else b) for o, n, b in self._before]

    def _loading(
        self, number: int, plain: Callable[..., Any], is_whole: IsWhole
    ) -> Callable[..., Any]:
        @functools.wraps(plain)
        def load(*args: Any, **kwargs: Any) -> Any:
            self._whole[number] = False
            result = plain(*args, **kwargs)
            self._whole[number] = is_whole(result, args, kwargs)
            if all(self._whole):
                cure(self._trainer)
            return result

        return load


_poisoned: WeakKeyDictionary[Any, _Poison] = WeakKeyDictionary()


def chain(modules: Sequence[Any]) -> tuple[Any, ...]:
    """Modules and what they wrap, the outermost first: any of them may be called."""
    found = []
    for module in modules:
        inner = module
        while isinstance(inner, torch.nn.Module):
            found.append(inner)
            inner = getattr(inner, "module", None)
    return tuple(found)


def _replace(owner: Any, name: str, method: Callable[..., Any]) -> Any:
    before = vars(owner).get(name, _NOTHING)
    setattr(owner, name, method)
    return before


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _NOTHING:
        delattr(owner, name)
    else:
        setattr(owner, name, before)
