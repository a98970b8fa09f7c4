"""Names of columns, tags and fields: which is the iteration, which the loss, which is neither."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import first_few
from pma_megatron.errors import MetricsError

# Names as they are compared: lower case, words apart by one space.
ITERATION = ("iteration", "iter", "global step", "trainer global step", "train global step", "step")
LOSS = (
    "lm loss",
    "loss",
    "train loss",
    "training loss",
    "train lm loss",
    "train ce loss",
    "lm loss training lm loss",
    "train samples train loss",  # Megatron-DeepSpeed, DeepSpeed
    "reduced train loss",  # NeMo
    "train reduced train loss",
    "loss metrics global avg loss",  # torchtitan
)
GRAD_NORM = ("grad norm", "gradient norm", "train grad norm", "optim total grad norm")
SAMPLES = ("consumed samples", "consumed train samples")
RUN = ("run", "run id", "run name", "experiment", "experiment id", "experiment name")
_TRAINING = {"train", "training"}
_EVALUATION = {"eval", "evaluation", "val", "valid", "validation", "validate", "dev", "test"}
# Names of columns whose values are names that people gave; a run may well be called "test".
_GIVEN = {"run", "run name", "run id", "experiment", "project", "group", "job", "user", "host"}

# deepspeed/monitor: the step of everything under this name is `global_samples`
_MONITOR = "train samples "


def pick(
    path: Path, what: str, names: list[str], known: tuple[str, ...], explicit: str | None
) -> str | None:
    """The one of `names` to use: the explicit one, or the one that means what is `known`.

    Raises MetricsError when the explicit one is missing, or several would do.
    """
    if explicit is not None:
        if explicit in names:
            return explicit
        of_run = named([name for name in names if run_of(name) == explicit], known)
        if len(of_run) != 1:
            raise missing(path, what, explicit, names)
        return of_run[0]
    found = named(names, known)
    runs = [run for run in map(run_of, found) if run is not None]
    if len(found) > 1 and len(set(runs)) == len(found):
        raise MetricsError(
            f"{path}: has the {what} of {len(found)} runs, {listed(runs)}; choose one with {what}="
        )
    if len(found) > 1:
        raise ambiguous(path, what, found)
    return found[0] if found else None


def has_iteration(header: str) -> bool:
    """Whether a CSV header has a column for the iteration."""
    try:
        return bool(named(next(csv.reader([header]), []), ITERATION))
    except csv.Error:  # a field that is too long
        return False


def named(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Those of `names` that mean one of what is `known`."""
    return [name for name in names if _plain(name) in known]


def is_monitor(name: str) -> bool:
    """Whether a name is of DeepSpeed's monitors, whose steps count samples."""
    return _plain(name).startswith(_MONITOR)


def is_split(word: str) -> bool:
    """Whether a word says of which data a loss is: `train`, `val`.

    >>> is_split("Val"), is_split("lm")
    (True, False)
    """
    return word.lower() in _TRAINING | _EVALUATION


def of_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row says that it is of an evaluation: `split: val`, `eval: true`.

    >>> of_evaluation({"step": 5, "split": "val", "loss": 2.6})
    True
    >>> of_evaluation({"step": 5, "run": "test", "val_loss": 2.6})
    False
    """
    for name, value in row.items():
        if value is True or (isinstance(value, str) and value.strip().lower() == "true"):
            says = str(name)
        elif isinstance(value, str) and len(value) <= 40 and _plain(str(name)) not in _GIVEN:
            says = value
        else:
            continue
        if says_evaluation(says):
            return True
    return False


def is_empty(value: Any) -> bool:
    """Whether a value is what writers of tables put for NaN: nothing, or a word for it."""
    return value is None or (
        isinstance(value, str) and value.strip().lower() in ("", "none", "null", "n/a", "<na>")
    )


def says_evaluation(text: str) -> bool:
    """Whether words of an evaluation are in a text, and none of training.

    >>> says_evaluation("[Eval] step 50"), says_evaluation("training, test=train")
    (True, False)
    """
    words = set(re.findall("[a-z]+", text.lower()))
    return bool(words & _EVALUATION) and not words & _TRAINING


def numbered(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Values by name; a name that has several values is numbered, since none of them is the one.

    >>> numbered([("loss", "2.5"), ("lr", "1e-3"), ("loss", "2.6"), ("lr", "1e-3")])
    {'lr': '1e-3', 'loss [1]': '2.5', 'loss [2]': '2.6'}
    """
    different = [*dict.fromkeys(pairs)]
    several = Counter(name for name, _ in different)
    single = {name: value for name, value in different if several[name] == 1}
    for name in several:
        values = [value for each, value in different if each == name]
        if len(values) > 1:
            single |= {f"{name} [{i}]": value for i, value in enumerate(values, 1)}
    return single


def unlike(names: list[str]) -> list[str]:
    """Names of columns, numbered where several have the same.

    >>> unlike(["step", "loss", "loss"])
    ['step', 'loss [1]', 'loss [2]']
    """
    several = Counter(names)
    return [
        f"{name} [{names[: i + 1].count(name)}]" if several[name] > 1 else name
        for i, name in enumerate(names)
    ]


def run_of(name: str) -> str | None:
    """The run in the name of a column as W&B exports it, `run - key`; None in any other."""
    run, dash, _ = name.rpartition(" - ")
    return run if dash else None


def _plain(name: str) -> str:
    """`run 7 - train/lm_loss` (as W&B exports it) becomes `train lm loss`; so does `lm-loss`."""
    last = name.rsplit(" - ", 1)[-1]
    if last.endswith(("__MIN", "__MAX")):
        return ""
    return re.sub(r"[\s_/-]+", " ", last).strip().lower()


def listed(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    return first_few((repr(name[:60]) for name in names), 20)


def ambiguous(path: Path, what: str, found: list[str]) -> MetricsError:
    """The error that several columns would do."""
    return MetricsError(f"{path}: {listed(found)} could each be the {what}; name it with {what}=")


def missing(path: Path, what: str, name: str, names: Iterable[str]) -> MetricsError:
    """The error that a named column is not there."""
    return MetricsError(f"{path}: {what}={name!r} is not there; it has {listed(names)}")
