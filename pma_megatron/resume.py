"""What to change in a Megatron launch command to resume from a recovery, and past the bad data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pma_megatron.errors import UsageError
from pma_megatron.healthy import Span

_RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
_OVERRIDE = "--override-opt_param-scheduler"
_SKIP = "--iterations-to-skip"

# Flags that a full resume from the newest checkpoint in --load must not have, and their values.
_DROPPED = {
    "--ckpt-step": 1,
    "--finetune": 0,
    "--no-load-optim": 0,
    "--no-load-rng": 0,
    "--use-checkpoint-opt_param-scheduler": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """How to resume.

    Attributes:
        flags: to add to the run's launch command, or to replace there; () for a switch.
        command: the launch command with that done, None where none was given.
        notes: sentences for the user.
    """

    flags: Mapping[str, tuple[str, ...]]
    command: tuple[str, ...] | None
    notes: tuple[str, ...]

    def spelled(self) -> str:
        """The command, or the flags alone, as typed in a shell."""
        words = self.command or tuple(w for flag, values in self.flags.items()
                                      for w in (flag, *values))  # fmt: skip
        return shlex.join(words)


def resume(args: Mapping[str, Any], root: str, *, skip: Span | None, lr_factor: float | None,
           command: Sequence[str] = ()) -> Resume:  # fmt: skip
    """Flags, and the whole command, that resume a Megatron run from the recovery in `root`.

    Args:
        args: Megatron's arguments in the newest source.
        root: where the recovery lies; the run goes on saving there.
        skip: iterations whose data is consumed without a step (Megatron's `--iterations-to-skip`,
            core_v0.12 and newer).
        lr_factor: of all learning rates, for a while.
        command: the run's launch command.

    Raises:
        UsageError: a factor out of range.
    """
    flags: dict[str, tuple[str, ...]] = {"--load": (root,), "--save": (root,)}
    notes = [f"the run goes on in {root}; the old folder stays as it is"]
    if skip is not None:
        iterations = tuple(str(i) for i in range(skip.first, skip.last + 1))
        if "iterations_to_skip" in args:
            earlier = (str(i) for i in args["iterations_to_skip"] or () if i not in skip)
            flags[_SKIP] = (*earlier, *iterations)
            notes.append(
                f"the data of iterations {skip.first} to {skip.last} is consumed without a step"
            )
        else:
            notes.append(
                f"the release that wrote the checkpoint has no --iterations-to-skip (its saved "
                f"args lack it), so the data of iterations {skip.first} to {skip.last} comes "
                "again: another --seed would shuffle it differently"
            )
    if lr_factor is not None:
        flags |= _slower(args, lr_factor)
        notes.append(
            f"learning rates are times {lr_factor:g}: once the loss is back, resume without these "
            f"--lr flags, and with {_OVERRIDE} once more, so that Megatron takes the old ones"
        )
    return Resume(
        flags=flags, command=_changed(command, flags) if command else None, notes=tuple(notes)
    )


def _slower(args: Mapping[str, Any], factor: float) -> dict[str, tuple[str, ...]]:
    if not 0 < factor <= 1:
        raise UsageError(f"--lr-factor {factor} must lie in (0, 1]")
    rates = {name: args.get(name) for name in _RATES}
    if not rates["lr"]:
        raise UsageError(
            "--lr-factor: the newest source's saved args have no lr. Leave the flag out, and lower "
            f"--lr by hand, with {_OVERRIDE}"
        )
    flags = {
        "--" + name.replace("_", "-"): (f"{rate * factor:.9g}",)
        for name, rate in rates.items()
        if isinstance(rate, (int, float)) and rate
    }
    return {**flags, _OVERRIDE: ()}


def _changed(command: Sequence[str], flags: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The command without the old values of `flags`, and without what stops a resume, plus them."""
    kept, at = [], 0
    while at < len(command):
        flag, equals, _ = command[at].partition("=")
        at += 1
        if flag not in flags and flag not in _DROPPED:
            kept.append(command[at - 1])
            continue
        values = 0 if equals else _DROPPED.get(flag, len(flags.get(flag, ())))
        while values and at < len(command) and not _is_flag(command[at]):
            at += 1
            values -= flag != _SKIP  # which takes as many as there are
    return (*kept, *(word for flag, values in flags.items() for word in (flag, *values)))


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and not word[1:2].isdigit())
