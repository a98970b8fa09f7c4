"""How to resume from a recovery, and past the bad data: a Megatron command, or a DeepSpeed call."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pma_megatron.base.spelling import as_argument, in_full, typed
from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Schedule
from pma_megatron.formats.rates import rate_flags
from pma_megatron.spikes.healthy import Span
from pma_megatron.storage.paths import absolute, in_store

_SKIP = "--iterations-to-skip"

# Flags that a full resume from the newest checkpoint in --load must not have, and their values.
_DROPPED = {
    "--ckpt-step": 1,
    "--finetune": 0,
    "--no-load-optim": 0,
    "--no-load-rng": 0,
    "--load-main-params-from-ckpt": 0,
    "--override-ckpt-iteration": 1,
    # of Megatron-DeepSpeed
    "--load-tag": 1,
    "--no-load-lr-state": 0,
    "--reset-iteration": 0,
}

# Megatron loads a non-persistent checkpoint that is as new as the one in --load, or newer
# (core_v0.16.1, megatron/training/checkpointing.py): one from the spike.
_KIND = "--non-persistent-ckpt-type"
_NON_PERSISTENT = {
    _KIND: 1,
    "--non-persistent-save-interval": 1,
    "--non-persistent-global-ckpt-dir": 1,
    "--non-persistent-local-ckpt-dir": 1,
    "--non-persistent-local-ckpt-algo": 1,
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
    deepspeed: bool,
    skip: Span | None,
    lr_factor: float | None,
    command: Sequence[str],
) -> Resume:
    """How a script or a trainer, whose flags nobody else knows, resumes from `root`.

    Args:
        call: what it calls to load.
        root: where the recovery lies.
        iteration: of the recovery.
        deepspeed: whether the script itself has an engine of DeepSpeed.
        skip: iterations whose data is not to be trained on again.
        lr_factor: of the learning rates in the recovery.
        command: refused.

    Raises:
        UsageError: something only the script itself can do was asked for.
    """
    if command:
        raise UsageError(
            "the launch command after -- cannot be changed: the checkpoints hold no arguments of "
            f"it, so how the script is told what to load is not known. Leave it out, and "
            f"resume with {call}"
        )
    there = f"the copy of {root}" if in_store(root) else root
    notes = ["save to another folder than the old one from then on; that stays as it is"]
    stands, setting = f"the recovery is of iteration {iteration}", ""
    if deepspeed:
        notes = [f"save to {there} from then on, so that its `latest` moves; the old folder stays"]
        stands = f"after the load engine.global_steps is {iteration}"
        setting = ". DeepSpeed has no setting for that"
    if skip is not None:
        notes.append(
            f"{stands}: a script that goes on with its data from there meets iterations "
            f"{skip.first} to {skip.last} again, unless it passes over their batches{setting}"
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
    root = absolute(root)
    here = as_argument(root)
    notes = [f"the run goes on in {root}; the old folder stays as it is"]
    if in_store(root):
        here = OF_COPY
        notes = [
            f"Megatron resumes from folders: copy {root} to a disk that all nodes share, and say "
            "where it is (COPY=/that/folder). The run goes on there, and the old one stays as it is"
        ]
    flags: dict[str, tuple[str, ...]] = {"--load": (here,), "--save": (here,)}
    if skip is not None:
        passed_over, said = _passed_over(args, skip, _skipped_before(command))
        flags |= passed_over
        notes.append(said)
    if lr_factor is not None:
        flags |= rate_flags(args, schedule, lr_factor)
        notes += _slower(root, lr_factor)
    left_out = _left_out(args, command)
    notes += _non_persistent(args, command, left_out)
    if command:
        _refuse_hidden(command, {**left_out, **flags})
        notes += _not_found(command)
    changed = _changed(command, flags, left_out) if command else None
    return Resume(flags=flags, command=changed, notes=tuple(notes))


def _passed_over(
    args: Mapping[str, Any], skip: Span, before: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], str]:
    """The flag that skips iterations, as the log numbers them, and what to say of it.

    Args:
        args: Megatron's, saved.
        skip: what is to be skipped.
        before: what the launch command skips already, as it stands there.
    """
    which = f"iterations {skip.first} to {skip.last}"
    if "iterations_to_skip" not in args and not before:
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
    new = [str(i) for i in range(max(0, first), last + 1)]
    earlier = dict.fromkeys([*map(str, args.get("iterations_to_skip") or ()), *before])
    return {_SKIP: (*(i for i in earlier if i not in new), *new)}, said


def _skipped_before(command: Sequence[str]) -> tuple[str, ...]:
    """What a launch command has after `--iterations-to-skip`: an earlier recovery put it there."""
    found: list[str] = []
    for at, word in enumerate(command):
        flag, equals, value = word.partition("=")
        if flag != _SKIP:
            continue
        rest = itertools.takewhile(lambda each: not _is_flag(each), command[at + 1 :])
        found = [value] if equals else [*rest]  # as argparse: the last one counts
    return tuple(found)


def _left_out(args: Mapping[str, Any], command: Sequence[str]) -> dict[str, int]:
    """Flags that the command must not have, and how many values each takes."""
    given = command or [f"--{name.replace('_', '-')}={v}" for name, v in args.items() if v]
    typed_flags = {word.partition("=")[0] for word in given}
    kind = " ".join(given).replace("=", " ").partition(f"{_KIND} ")[2]
    # Those lie in the folder that is loaded from, and the new one has none.
    in_load = kind.startswith("global") and "--non-persistent-global-ckpt-dir" not in typed_flags
    return _DROPPED if not kind or in_load else {**_DROPPED, **_NON_PERSISTENT}


def _non_persistent(
    args: Mapping[str, Any], command: Sequence[str], left_out: Mapping[str, int]
) -> list[str]:
    """That non-persistent checkpoints would be loaded before the recovery."""
    typed_flags = {word.partition("=")[0] for word in command}
    # A command that does not say which kind may start a script that does, as the job before.
    seen = _KIND in typed_flags
    stale = [
        flag for flag in (left_out if seen else _left_out(args, ())) if flag in _NON_PERSISTENT
    ]
    if seen:
        stale = [flag for flag in stale if flag in typed_flags]
    if not stale:
        return []
    what = f"{', '.join(stale)} left out of the command" if seen else f"leave out {stale[0]}"
    return [
        f"{what}: Megatron would go on from the newest non-persistent checkpoint, which may be of "
        "the spike. Give them again with another folder for them, or once the old ones are deleted "
        "on every node"
    ]


def _slower(root: str, factor: float) -> list[str]:
    exact = math.frexp(factor)[0] == 0.5  # by a power of two, and back, nothing is rounded
    return [
        f"learning rates are times {in_full(factor)}, also in the recovered checkpoint: a resume "
        "takes them from there. To go back to the old ones once the loss is back, scale them "
        f"again: pma merge --load {typed(root)} --save NEW --last 1 --lr-factor "
        f"{in_full(1 / factor)}"
        f"{'' if exact else ' (those are the old ones up to rounding)'}"
    ]


def _refuse_hidden(command: Sequence[str], flags: Iterable[str]) -> None:
    """Refuse a command with a flag that cannot be changed because it stands inside a word.

    Raises:
        UsageError: it has one.
    """
    names = "|".join(map(re.escape, flags))
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


def _changed(
    command: Sequence[str], flags: Mapping[str, tuple[str, ...]], left_out: Mapping[str, int]
) -> tuple[str, ...]:
    """The command without the old values of `flags`, and without what stops a resume, plus them."""
    kept, at = [], 0
    while at < len(command):
        flag, equals, _ = command[at].partition("=")
        at += 1
        if flag not in flags and flag not in left_out:
            kept.append(command[at - 1])
            continue
        values = 0 if equals else left_out.get(flag, len(flags.get(flag, ())))
        while values and at < len(command) and not _is_flag(command[at]):
            at += 1
            values -= flag != _SKIP  # which takes as many as there are
    return (*kept, *(word for flag, values in flags.items() for word in (flag, *values)))


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and not word[1:2].isdigit())
