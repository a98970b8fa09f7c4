"""What `--pma-save` does around Megatron's saves: its threads are at rest, and all sums are added.

The trainer is megatron-core's. Of `megatron.training`, which no wheel holds, there is the module
that keeps the arguments.
"""

from __future__ import annotations

import sys
import threading
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_megatron_flags import parse

from conftest import DENSE, folder_of
from pma_megatron import verify
from pma_megatron.formats.marker import SEAL_FILE
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.megatron import hooks, save
from pma_megatron.megatron.trees import global_vars
from pma_megatron.testing import TinyTrainer, run_ranks

FLAGS = "--pma-save --pma-last 2 --pma-interval-tokens {tokens}"
SUMS = "pma-sums"
PATIENCE_S = 100.0


def keep(args: Namespace) -> None:
    """Make `args` the arguments of `megatron.training`."""
    names = (
        "megatron.training",
        "megatron.training.global_vars",
        "megatron.training.checkpointing",
    )
    training, variables, checkpointing = (ModuleType(name) for name in names)
    vars(training).update(global_vars=variables, checkpointing=checkpointing)
    now = {"args": args}
    vars(variables).update(get_args=lambda: now["args"], set_args=lambda new: now.update(args=new))
    sys.modules.update(zip(names, (training, variables, checkpointing), strict=True))


def summing() -> int:
    """Threads at work that add checksums."""
    return sum(thread.name == SUMS for thread in threading.enumerate())


def soon(goes_on: threading.Event) -> threading.Timer:
    """Sets it once somebody has had the time to wait for it; not waited for when a process ends."""
    timer = threading.Timer(1.0, goes_on.set)
    timer.daemon = True
    timer.start()
    return timer


def train(rank: int, world_size: int, root: str, late: bool) -> list[tuple[int, int]]:
    """Saves at iterations 2 and 4: threads at work when Megatron's begins, and after ours.

    Those of averages are complete at once, or, if `late`, when training has ended. Their checksums
    are added no sooner than they are waited for.
    """
    tokens = DENSE.global_batch_size * DENSE.seq_length
    args = parse(FLAGS.format(tokens=tokens), save=root, seq_length=DENSE.seq_length)
    args.consumed_train_samples = 0
    keep(args)
    plain, seen = save.record, []
    unfinished: list[Path] = []
    goes_on = threading.Event()

    def save_average() -> None:
        place = folder_of(Path(global_vars().get_args().save), trainer.iteration)
        before = (place / CONFIG_FILE).read_bytes() if (place / CONFIG_FILE).exists() else None
        metadata = trainer.save(global_vars().get_args().save) / CONFIG_FILE
        if late:
            unfinished.append(metadata.rename(metadata.with_suffix(".late")))
            if before is not None:  # it lies there until the save ends
                metadata.write_bytes(before)

    def slow(folder: Path, origin: Mapping[str, Any]) -> None:
        assert goes_on.wait(PATIENCE_S)
        plain(folder, origin)

    save.record = slow  # type: ignore[assignment]
    trainer = TinyTrainer(DENSE)
    hooks.ready(trainer.models, trainer.optimizer, trainer.scheduler)
    for iteration in range(1, 5):
        trainer.train(1)
        args.consumed_train_samples = trainer.consumed_samples
        hooks.stepped({"iteration": iteration})
        if iteration % 2 == 0:
            timer = soon(goes_on)
            hooks.saving()
            before = summing()
            timer.join()
            goes_on.clear()
            trainer.save(root)
            hooks.saved(
                lambda **_: save_average(), {"iteration": iteration, "optimizer": trainer.optimizer}
            )
            seen.append((before, summing()))
    trainer.close()
    for path in unfinished:
        path.rename(path.with_suffix(".json"))
    soon(goes_on)
    return seen


def test_sums_of_saved_averages_are_waited_for_before_a_save_and_at_the_end(tmp_path: Path) -> None:
    (seen,) = run_ranks(train, 1, str(tmp_path / "run"), False, preloaded=False)
    assert seen == [(0, 1), (0, 1)]  # a fork while one is at work would inherit its locks
    for iteration in (2, 4):  # the second was not written yet when training had ended
        folder = folder_of(tmp_path / "run-pma", iteration)
        assert (folder / SEAL_FILE).is_file()
        verify(folder)


@pytest.mark.parametrize("over", [False, True])
def test_an_average_whose_save_ends_last_says_what_it_is(tmp_path: Path, over: bool) -> None:
    """As with --async-save: Megatron ends the last one when training is over. Over an older one
    too: what is there until then makes nothing whole, and is not taken for it."""
    if over:
        run_ranks(train, 1, str(tmp_path / "run"), False, preloaded=False)
    (seen,) = run_ranks(train, 1, str(tmp_path / "run"), True, preloaded=False)
    assert seen == [(0, 0), (0, 0)]
    for iteration in (2, 4):
        folder = folder_of(tmp_path / "run-pma", iteration)
        assert (folder / SEAL_FILE).is_file()
        verify(folder)
