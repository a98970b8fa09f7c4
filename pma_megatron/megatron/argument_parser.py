"""The `--pma-*` flags of a Megatron training script: added, read, and refused.

Megatron pickles its whole argument namespace into every checkpoint, so what is stored there is
plain (bool, int, float, str, list) and loads where this package is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from pma_megatron.base.settings import MEGATRON_DEEPSPEED, argument
from pma_megatron.base.spelling import as_flag, speaking
from pma_megatron.errors import UsageError
from pma_megatron.megatron import checks
from pma_megatron.megatron.flags import BY_NAME, FLAGS, NAMES, USED_BY, Settings, given, settings

__all__ = [
    "Settings",
    "add_arguments",
    "add_deepspeed_arguments",
    "enabled",
    "given",
    "settings",
    "validate",
]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group of `--pma-*` flags to Megatron's parser, and return that parser."""
    text = "averages of this run's checkpoints, at load, at save, in evaluation"
    return _add(parser, text, NAMES)


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add those flags of the group that Megatron-DeepSpeed jobs can use."""
    had = {n for n in NAMES if MEGATRON_DEEPSPEED in BY_NAME[n].declared.setting.of}
    usable = [n for n in NAMES if n in had and (n not in USED_BY or had & {*USED_BY[n]})]
    return _add(parser, "averages of this run's tags, at load, at save, in evaluation", usable)


def _add(
    parser: argparse.ArgumentParser, text: str, names: Iterable[str]
) -> argparse.ArgumentParser:
    group = parser.add_argument_group("PMA (pma_megatron)", text)
    for name in names:
        each = BY_NAME[name].declared
        how = argument(each)
        if each.setting.choices and each.setting.make is None:
            how["choices"] = each.setting.choices
        group.add_argument(as_flag(name), **how)
    return parser


def enabled(args: Any) -> bool:
    """Whether any `--pma-*` flag was given; False for a namespace that has none of them."""
    return any(given(args, name) for name in NAMES)


def validate(args: Any) -> None:
    """Refuse, before anything is built or read, what cannot work.

    Args:
        args: Megatron's arguments, after its own validation.

    Raises:
        UsageError: an option without the flag that uses it, a use whose needs are not met, a
            parallel or optimizer setup that is not supported.
    """
    with speaking(FLAGS):
        _validate(args)


def _validate(args: Any) -> None:
    for name, users in USED_BY.items():
        if given(args, name) and not any(given(args, user) for user in users):
            needed = " or ".join(map(as_flag, users))
            raise UsageError(
                f"{as_flag(name)} has no effect without {needed}: add it, or leave this flag out"
            )
    checks.refuse(args, settings(args))
