"""How to resume from a recovery, and past the bad data: a Megatron command, or a DeepSpeed call."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pma_megatron.base.spelling import as_argument, typed
from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Schedule
from pma_megatron.formats.rates import rate_flags
from pma_megatron.spikes.healthy import Span
from pma_megatron.storage.paths import in_store

_SKIP = "--iterations-to-skip"

# Flags that a full resume from the newest checkpoint in --load must not have, and their values.
_DROPPED = {
    "--ckpt-step": 1,
    "--finetune": 0,
    "--no-load-optim": 0,
    "--no-load-rng": 0,
    # of Megatron-DeepSpeed
    "--load-tag": 1,
    "--no-load-lr-state": 0,
    "--reset-iteration": 0,
}


# Up to core_v0.16 the flag names iterations from 0, not as the log does (Megatron-LM b4e4d9618e,
# megatron/training/training.py). Of the arguments that a checkpoint has from all of these releases
# and from no later one this is one, and the other way round.
_COUNTS_FROM_0, _COUNTS_FROM_1 = "hybrid_attention_ratio", "async_strategy"

OF_COPY = "${COPY:?a folder with a copy of the recovery}"
"""The folder of a recovery that lies in a store, as a shell takes it, which stops where `COPY` is
not set: of a folder that is not there Megatron begins anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """How to resume.

    Attributes:
        flags: to add to the run's launch command, or to replace there; () for a switch.
        command: the launch command with that done, None where none was given.
        notes: sentences for the user.
        call: the Python call that resumes, of a script that has no flags for it; else None.
    """

    flags: Mapping[str, tuple[str, ...]]
    command: tuple[str, ...] | None
    notes: tuple[str, ...]
    call: str | None = None

    def spelled(self) -> str:
        """The call, or the command or the flags alone as typed in a shell."""
        if self.call is not None:
            return self.call
        words = self.command or tuple(
            w for flag, values in self.flags.items() for w in (flag, *values)
        )
        return " ".join(f'"{word}"' if word == OF_COPY else shlex.quote(word) for word in words)


def resume_script(
    call: str,
    root: str,
    iteration: int | None,
    *,
    skip: Span | None,
    lr_factor: float | None,
    command: Sequence[str],
) -> Resume:
    """How a script with a DeepSpeed engine, whose flags nobody else knows, resumes from `root`.

    Args:
        call: what it calls to load.
        root: where the recovery lies.
        iteration: of the recovery.
        skip: iterations whose data is not to be trained on again.
        lr_factor: of the learning rates in the recovery.
        command: refused.

    Raises:
        UsageError: something only the script itself can do was asked for.
    """
    if command:
        raise UsageError(
            "the launch command after -- cannot be changed: the checkpoints hold no arguments of "
            f"it, so how the script is told what to load is not known. Leave it out, and let "
            f"{call} run"
        )
    there = f"the copy of {root}" if in_store(root) else root
    notes = [f"save to {there} from then on, so that its `latest` moves; the old folder stays"]
    if skip is not None:
        notes.append(
            f"after the load engine.global_steps is {iteration}: a script that goes on with its "
            f"data from there meets iterations {skip.first} to {skip.last} again, unless it passes "
            "over their batches. DeepSpeed has no setting for that"
        )
    if lr_factor is not None:
        notes += _slower(root, lr_factor)
    return Resume(flags={}, command=None, notes=tuple(notes), call=call)


def resume(
    args: Mapping[str, Any],
    root: str,
    *,
    skip: Span | None,
    lr_factor: float | None,
    schedule: Schedule,
    command: Sequence[str] = (),
) -> Resume:
    """Flags, and the whole command, that resume a Megatron run from the recovery in `root`.

    Args:
        args: Megatron's arguments in the newest source.
        root: where the recovery lies; the run goes on saving there.
        skip: iterations whose data is consumed without a step (Megatron's `--iterations-to-skip`,
            core_v0.12 and newer), as the log numbers them.
        lr_factor: of all learning rates in the recovery, which the flags then follow.
        schedule: what the newest source says of its own.
        command: the run's launch command.

    Raises:
        UsageError: a flag to change stands inside a word of the command.
    """
    here, notes = as_argument(root), [f"the run goes on in {root}; the old folder stays as it is"]
    if in_store(root):
        here = OF_COPY
        notes = [
            f"Megatron resumes from folders: copy {root} to a disk that all nodes share, and say "
            "where it is (COPY=/that/folder). The run goes on there, and the old one stays as it is"
        ]
    flags: dict[str, tuple[str, ...]] = {"--load": (here,), "--save": (here,)}
    if skip is not None:
        passed_over, said = _passed_over(args, skip)
        flags |= passed_over
        notes.append(said)
    if lr_factor is not None:
        flags |= rate_flags(args, schedule, lr_factor)
        notes += _slower(root, lr_factor)
    if command:
        _refuse_hidden(command, flags)
        notes += _not_found(command)
    return Resume(
        flags=flags, command=_changed(command, flags) if command else None, notes=tuple(notes)
    )


def _passed_over(args: Mapping[str, Any], skip: Span) -> tuple[dict[str, tuple[str, ...]], str]:
    """The flag that skips iterations, as the log numbers them, and what to say of it."""
    which = f"iterations {skip.first} to {skip.last}"
    if "iterations_to_skip" not in args:
        return {}, (
            "the release that wrote the checkpoint has no --iterations-to-skip (its saved args "
            f"lack it), so the data of {which} comes again: another --seed would shuffle it "
            "differently"
        )
    said = f"the data of {which} is consumed without a step"
    older, newer = _COUNTS_FROM_0 in args, _COUNTS_FROM_1 in args
    first, last = skip.first, skip.last
    if older == newer:
        first -= 1
        said += (
            f", and that of {skip.first - 1} or {skip.last + 1} too: up to core_v0.16 "
            "--iterations-to-skip counts from 0, later from 1 as the log does, and the saved args "
            f"do not tell the release. With one from core_v0.17 on leave out {first}, with an "
            f"older one {last}"
        )
    elif older:
        first, last = first - 1, last - 1
        said += f" (--iterations-to-skip of this release counts from 0: {first} to {last})"
    new = range(max(0, first), last + 1)
    earlier = [i for i in args["iterations_to_skip"] or () if i not in new]
    return {_SKIP: tuple(map(str, (*earlier, *new)))}, said


def _slower(root: str, factor: float) -> list[str]:
    return [
        f"learning rates are times {factor:g}, also in the recovered checkpoint: a resume takes "
        "them from there. To go back to the old ones once the loss is back, scale them again: pma "
        f"merge --load {typed(root)} --save NEW --last 1 --lr-factor {1 / factor:g}"
    ]


def _refuse_hidden(command: Sequence[str], flags: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a command with a flag that cannot be changed because it stands inside a word.

    Raises:
        UsageError: it has one.
    """
    names = "|".join(map(re.escape, {**flags, **_DROPPED}))
    hidden = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")
    for word in command:
        found = hidden.search(word)
        if found is not None and word.partition("=")[0] != found[0]:
            raise UsageError(
                f"the launch command after -- has {found[0]} inside of one word, {word[:80]!r}, "
                "where it cannot be changed: the run would go on from the old folders. Leave the "
                "command out, and change the flags that are printed there by hand; or give it "
                "without the shell around it"
            )


def _not_found(command: Sequence[str]) -> list[str]:
    """That the command itself does not say what to load or to save to."""
    typed_flags = {word.partition("=")[0] for word in command}
    absent = [flag for flag in ("--load", "--save") if flag not in typed_flags]
    if not absent:
        return []
    return [
        f"the launch command has no {' and no '.join(absent)} to replace. If a script in it sets "
        "them, or does not hand on what stands after it, change them there: the run would go on "
        "in the old folders"
    ]


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
