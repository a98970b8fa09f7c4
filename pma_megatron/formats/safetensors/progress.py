"""How far a model had come in its run, by the name of its folder and by what lies in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.schema import is_count, wrong

TRAINER_FILE = "trainer_state.json"
"""What transformers' Trainer leaves in every checkpoint (trainer_callback.py, TrainerState)."""
_STEP = re.compile(
    r"(?:^|[-_.])(?:global[-_]?step|checkpoint|ckpt|step|iter|iteration)[-_=]?(\d+)(?![\d.]*[a-z])",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"(?:^|[-_.])(?:tokens?[-_=]?(\d+(?:\.\d+)?)([KMBT]?)|(\d+(?:\.\d+)?)([KMBT])[-_]?tokens?)"
    r"(?![\da-z])",
    re.IGNORECASE,
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps and tokens, None where they are not known."""

    iteration: int | None = None
    tokens: int | None = None


def named(name: str) -> Progress:
    """What a folder's name says.

    >>> named("checkpoint-500"), named("stage1-step140000-tokens294B")
    (Progress(iteration=500, tokens=None), Progress(iteration=140000, tokens=294000000000))
    >>> named("main"), named("llama-3.1-8B")
    (Progress(iteration=None, tokens=None), Progress(iteration=None, tokens=None))
    """
    step, tokens = _STEP.search(name), _TOKENS.search(name)
    count = None
    if tokens is not None:
        number, unit = tokens[1] or tokens[3], tokens[2] or tokens[4] or ""
        count = int(Fraction(number) * _UNITS[unit.upper()])
    return Progress(int(step[1]) if step and len(step[1]) < 19 else None, count)


def progress_of(path: Path) -> Progress:
    """What a folder says: the state of the Trainer in it, what a merge says of itself, its name.

    Raises:
        CheckpointError: the Trainer's state is damaged, or says another step than the name.
    """
    said = _of_trainer(path) if (path / TRAINER_FILE).is_file() else Progress()
    made, called = _of_merge(path), named(path.name)
    if None not in (said.iteration, called.iteration) and said.iteration != called.iteration:
        raise CheckpointError(
            f"its folder says iteration {called.iteration}, {TRAINER_FILE} in it "
            f"{said.iteration}: renamed or overwritten"
        )

    def first(field: str) -> Any:
        values = (getattr(each, field) for each in (said, made, called))
        return next((value for value in values if value is not None), None)

    return Progress(first("iteration"), first("tokens"))


def _of_trainer(path: Path) -> Progress:
    file = path / TRAINER_FILE
    state = read_json(file)
    for field in ("global_step", "num_input_tokens_seen"):
        value = state.get(field)
        if value is not None and not (is_count(value) or value == -1):
            raise wrong(f"{file}: {field}", "a count", value)
    step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    counted = is_count(tokens) and tokens > 0  # 0 where the Trainer was not told to count
    return Progress(step if is_count(step) else None, tokens if counted else None)


def _of_merge(path: Path) -> Progress:
    """Of the newest of what was averaged."""
    try:
        plan = read_json(path / MARKER_FILE)["plan"]
        iteration, tokens = plan["iteration"], plan["sources"][-1]["consumed_tokens"]
    except (CheckpointError, KeyError, TypeError, IndexError):
        return Progress()  # it has no mark, or one that says nothing here
    return Progress(
        iteration if is_count(iteration) else None, tokens if is_count(tokens) else None
    )
