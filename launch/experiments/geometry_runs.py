"""The runs behind docs/geometry.md: an MoE and a dense GPT at constant LR, and both annealed.

    python launch/experiments/geometry_runs.py OUT

Writes OUT/moe/run, OUT/dense/run (constant LR, to iteration 480) and OUT/moe/annealed,
OUT/dense/annealed (linear decay from 430 to 480, saved every 5). A few minutes on two cores.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pma_megatron.testing import TinyConfig, run_ranks
from quickstart_runs import Settings, train, trainer

MOE = TinyConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, seq_length=64,
    num_experts=4, expert_model_parallel_size=2, global_batch_size=16, micro_batch_size=8,
    lr=4e-3, warmup_iters=20, seed=1234,
)  # fmt: skip
CONFIGS = {
    "moe": MOE,  # as in ./launch/quickstart.sh
    "dense": replace(MOE, num_experts=None, expert_model_parallel_size=1, ffn_hidden_size=256),
}
START, END = 430, 480


def anneal(_rank: int, _world_size: int, settings: Settings) -> None:
    """From START, decay the LR linearly to zero at END."""
    config = replace(
        settings.config, decay="linear", decay_start_iter=START, decay_iters=END - START
    )
    with trainer(config) as run:
        run.load(settings.run, START)
        while run.iteration < END:
            run.train(5)
            run.save(settings.out / "annealed")


def main() -> None:
    """Train and anneal each model below the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name, config in CONFIGS.items():
        settings = Settings(
            out=Path(sys.argv[1]) / name, config=config, iterations=END, save_every=10,
            first_save=390, last=6, continued=60, eval_batches=24,
        )  # fmt: skip
        run_ranks(train, 2, settings, timeout_s=3000)
        run_ranks(anneal, 2, settings, timeout_s=3000)


if __name__ == "__main__":
    main()
