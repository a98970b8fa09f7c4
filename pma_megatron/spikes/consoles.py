"""Rows of the lines that trainers print: a step, and numbers by name.

Where each form comes from stands at its function. A file has rows of one form: that of the first
function that finds any.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pma_megatron.spikes import columns

Row = dict[str, Any]
STEP = "step"
"""What a row calls its iteration."""
SPLIT = "split"
"""What a row calls the data of which its loss is, where its line has a word for it."""
_NUMBER = (
    r"[-+]?(?:\d[\d,]{0,40}\.?\d{0,40}(?:[eE][-+]?\d{1,9})?|\.\d{1,40}"
    r"|(?i:nan|inf|infinity|none|null))"
)
"""NaN and Inf however they are spelled, and what is printed for them."""
_COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TITAN = re.compile(r"(?<!validate )\bstep:\s*(\d+)\s+(?=\S)")
_NEMO = re.compile(r"Training epoch \d+, iteration (\d+)/\d+ \| (.*)")
_OLMO = re.compile(r"\[step=(\d+)/(?:\d+|\?\?\?),epoch=[^][]*\]")
_OLMO_METRIC = re.compile(rf"^\s+([A-Za-z][^=]*?)=({_NUMBER})\s*$")
_BAR = re.compile(r"^\s*\d+%\|[^|]*\|\s*(\d+)/(\d+) \[")
_DICT = re.compile(r"\{'[^{}]*\}")
_BARE = re.compile(r"(?<=: )(-?)(nan|inf)(?=[,}])")
_ANY_STEP = re.compile(
    r"\b(?:global[ _]step|step|iter|iteration)s?\b[\s:=\[]{0,30}(\d{1,3}(?:,\d{3}){1,4}|\d+)"
    r"(?:\.0*)?(?:\s{0,9}/\s{0,9}\d[\d,]*)?\b",
    re.IGNORECASE,
)
# A number after `:` or `=`, and one after a word. Their names are looked for backwards, which takes
# a time in proportion to the line; one pattern for both would try each letter of it as a beginning.
_VALUE = re.compile(rf"[:=]\s*({_NUMBER})(?![\w.])")
_WORD_VALUE = re.compile(rf"(?<=\w)\s+({_NUMBER})(?![\w.])")
_NO_NAME = re.compile(r"[^\w./ -]")
_NUMBER_OF = re.compile(r"\b[A-Za-z]{1,40}[\s:=]{0,4}\d{0,40}\.\d")  # `val 2.6`
_LETTER = re.compile(r"[A-Za-z]")


def titan_rows(lines: Iterable[str]) -> Iterator[Row]:
    """torchtitan: `step: N  loss: X  grad_norm: Y  memory: ...` (components/metrics.py, `log`)."""
    for line in lines:
        text = _COLORS.sub("", line) if "step:" in line and "loss:" in line else ""
        found = _TITAN.search(text)
        pairs = dict(_pairs(text[found.end() :])) if found else {}
        if found and "loss" in pairs:
            yield {STEP: found[1], **pairs}


def nemo_rows(lines: Iterable[str]) -> Iterator[Row]:
    """NeMo 2: `Training epoch E, iteration N/M | key: value | ...` (progress_printer.py).

    Its iterations count from 0 as printed.
    """
    for line in lines:
        found = _NEMO.search(line) if "Training epoch" in line else None
        if found:
            pairs = (part.rpartition(":") for part in found[2].split("|"))
            yield {STEP: found[1], **{key.strip(): value.strip() for key, _, value in pairs}}


def olmo_rows(lines: Iterable[str]) -> Iterator[Row]:
    """OLMo-core: `[step=N/M,epoch=E]`, then a line `    name=value` each (console_logger.py)."""
    row: Row | None = None
    for line in lines:
        found = _OLMO.search(line)
        if found:
            yield from [row] if row and len(row) > 1 else []
            row = {STEP: found[1]}
        elif row is not None:
            metric = _OLMO_METRIC.match(line)
            if metric:
                row[metric[1]] = metric[2].replace(",", "")
            elif line.strip():
                yield from [row] if len(row) > 1 else []
                row = None
    yield from [row] if row and len(row) > 1 else []


def trainer_rows(lines: Iterable[str]) -> Iterator[Row]:
    """transformers' Trainer: `{'loss': X, ..., 'epoch': E}`, and the step in the progress bar that
    is drawn again after it (trainer_callback.py, `ProgressCallback`).

    A row without a bar has no step.
    """
    row: Row | None = None
    for line in lines:
        bar = _BAR.match(line)
        if bar and row is not None:
            yield {STEP: bar[1], **row}
            row = None
        found = _DICT.search(line) if "{'" in line and "loss'" in line else None
        values = _literal(found[0]) if found else None
        if values is not None:
            yield from [row] if row is not None else []
            row = values
    yield from [row] if row is not None else []


def other_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Whatever has a step and a loss in one line: `step 10/1000 | loss 2.5`, a bar of Lightning."""
    for line in lines:
        if "loss" not in line.lower():
            continue
        text = _COLORS.sub("", line)
        step = _ANY_STEP.search(text)
        if step is None:
            continue
        text = f"{text[: step.start()]}|{text[step.end() :]}"
        pairs = columns.numbered([*_word_pairs(text), *_pairs(text)])
        if any("loss" in key.lower() for key in pairs):
            yield {**pairs, **_split_of(text), STEP: step[1].replace(",", "")}


FORMS: tuple[Callable[[Iterable[str]], Iterator[Row]], ...] = (
    titan_rows,
    nemo_rows,
    olmo_rows,
    trainer_rows,
    other_rows,
)
"""In the order in which they are tried."""


def _split_of(text: str) -> dict[str, str]:
    """That a line is of an evaluation: a word for it stands outside of names, values and paths."""
    rest, start = [], 0
    for found in _VALUE.finditer(text):
        name = _NO_NAME.split(text[start : found.start()])[-1]
        rest.append(text[start : found.start() - len(name)])
        start = found.end()
    words = _NUMBER_OF.sub(" ", "|".join([*rest, text[start:]])).split()
    said = " ".join(word for word in words if word.count("/") < 2)
    return {SPLIT: "evaluation"} if columns.says_evaluation(said) else {}


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """What has a name, `:` or `=`, and a number."""
    return ((key, value) for key, value in _named(_VALUE, text) if key)


def _word_pairs(text: str) -> Iterator[tuple[str, str]]:
    """`loss 2.5` and `grad_norm 0.5`; of `train loss 2.5` and `val loss 2.6` both words."""
    for key, value in _named(_WORD_VALUE, text):
        before, word = ["", "", *key.split()][-2:]
        if re.search(r"loss$|\wnorm$", word):
            yield f"{before} {word}" if columns.is_split(before) else word, value


def _named(value: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Each number and what stands before it back to the one before, or to a punctuation mark."""
    start = 0
    for found in value.finditer(text):
        name = _NO_NAME.split(text[start : found.start()])[-1]
        letter = _LETTER.search(name)
        yield name[letter.start() :].strip(" -") if letter else "", found[1].replace(",", "")
        start = found.end()


def _literal(text: str) -> Row | None:
    """The numbers of a printed dictionary; None if it is none, or none of a training step."""
    try:
        value = ast.literal_eval(_BARE.sub(r"'\1\2'", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) and "loss" in value else None
