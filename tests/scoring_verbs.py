"""Adds `evaluate` and `forecast` to the parser of `pma` where it does not have them."""

from __future__ import annotations

import argparse

from pma_megatron.cli import evaluate, flags, forecast

_original = flags.parser


def parser() -> argparse.ArgumentParser:
    top = _original()
    [verbs] = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    for name, module in (("evaluate", evaluate), ("forecast", forecast)):
        if name not in verbs.choices:
            module.add(verbs)
    return top


flags.parser = parser
