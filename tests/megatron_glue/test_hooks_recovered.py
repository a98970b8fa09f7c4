"""What a job with `--pma-recover` stores with snapshots, and with entries of its average."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from test_hooks import keep
from test_megatron_flags import parse

from pma_megatron.megatron import hooks, watch
from pma_megatron.online.store import FOLDER
from pma_megatron.runs import recovery_log
from pma_megatron.runs.describe import args_of
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.storage.paths import path_of
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

CONFIG = TinyConfig(warmup_iters=2)
EVERY, LOST, END = 2, (41, 42, 43), 70
TOKENS = EVERY * CONFIG.global_batch_size * CONFIG.seq_length
RECOVERS = "--pma-recover --pma-recover-warmup 20 --pma-recover-margin-iterations 0"
TAKES = f"--pma-snapshot-interval-tokens {TOKENS} --pma-save --pma-last 3 --pma-interval-tokens "


def train(rank: int, world_size: int, root: str, flags: str, saves: Sequence[int]) -> None:
    """Train on from what `root` holds, to the last of `saves`; the loss is lost and comes back."""
    trainer = TinyTrainer(CONFIG)
    begun = Path(root).is_dir()
    if begun:
        trainer.load(root)
    args = parse(flags, save=root, load=root if begun else None, seq_length=CONFIG.seq_length)
    args.consumed_train_samples, args.iteration = trainer.consumed_samples, trainer.iteration
    args.log_interval = 1
    keep(args)
    hooks.sharded_metadata = lambda args: None  # type: ignore[assignment]
    watch.load_again = lambda ref, *_: trainer.roll_back(root, ref.iteration)  # type: ignore
    session = hooks.MegatronSession(
        args, hooks.argument_parser.settings(args), trainer.models, trainer.optimizer, None
    )
    while trainer.iteration < saves[-1]:
        trainer.train(1)
        args.consumed_train_samples, now = trainer.consumed_samples, trainer.iteration
        loss = math.nan if now in LOST else 3 + 0.01 * (now * 7 % 5)
        session.stepped({"iteration": now, "loss_dict": {"lm loss": loss}, "grad_norm": 1.0})
        if now in saves:
            session.saving()
            trainer.args = {k: v for k, v in vars(args).items() if k.startswith("pma_")}
            trainer.save(root)
            if session.online is not None:
                session.online.save_state(f"{root}-pma/{FOLDER}")
    if session.thin is not None:
        session.thin.finish()
    trainer.close()


def said(root: Path) -> dict[int | None, tuple[Any, ...]]:
    """By iteration: the state of a checkpoint, and what it says of recoveries."""
    found = {}
    for ref in list_checkpoints(root):
        args = args_of(path_of(ref.path))
        memory = json.loads(args[recovery_log.STATE])
        found[ref.iteration] = ref.unhealthy_because, args[recovery_log.RECORD], memory
    return found


def test_a_snapshot_says_what_a_full_save_of_its_iteration_would(tmp_path: Path) -> None:
    """After a recovery, after a restart, and after the loss was judged to be well."""
    full, thin = tmp_path / "full" / "run", tmp_path / "thin" / "run"
    run_ranks(train, 1, str(full), RECOVERS, range(30, END + 1, EVERY))
    run_ranks(train, 1, str(thin), f"{RECOVERS} {TAKES}{TOKENS}", (20, 30, 40, 50))
    run_ranks(train, 1, str(thin), f"{RECOVERS} {TAKES}{TOKENS}", (END,))
    wanted, snapshots = said(full), said(thin / "pma_snapshots")
    assert {state for state, *_ in wanted.values()} > {None} and wanted[END][0] is None
    assert len({record for _, record, _ in wanted.values()}) == 2
    after = range(LOST[-1] + 1, END + 1, EVERY)
    assert {k: snapshots[k] for k in after} == {k: wanted[k] for k in after}
    for ref in list_checkpoints(Path(f"{thin}-pma/{FOLDER}")):
        args = args_of(path_of(ref.path))
        memory = json.loads(args[recovery_log.STATE])
        assert (args[recovery_log.RECORD], memory) == wanted[ref.iteration][1:], ref.iteration
