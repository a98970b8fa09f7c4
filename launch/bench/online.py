"""Step time of a training run with and without a running average, interleaved, on this machine.

    python launch/bench/online.py --hidden-size 256 --rounds 20

Trains one tiny GPT. Rounds alternate between leaving the average out and taking an entry in every
iteration, which is far more often than any run would. Prints medians, and the median of the ratios
of neighbouring rounds, which does not depend on how the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from pma_megatron import Method
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks


def measure(
    rank: int,
    world_size: int,
    config: TinyConfig,
    method: Method,
    last: int,
    rounds: int,
    iterations: int,
) -> dict[str, Any]:
    """Seconds per iteration of each round, and of the swaps, on this rank."""
    trainer = TinyTrainer(config)
    per_iteration = config.global_batch_size * config.seq_length
    online = OnlineAverage(trainer.models, trainer.optimizer, method, last, per_iteration)

    def one_round(watch: bool) -> float:
        start_s = time.perf_counter()
        for _ in range(iterations):
            trainer.train(1)
            if watch:
                online.step(trainer.iteration, trainer.consumed_samples * config.seq_length)
        return (time.perf_counter() - start_s) / iterations

    one_round(True)  # moments are made, memory is touched
    pairs = [(one_round(False), one_round(True)) for _ in range(rounds)]
    swaps = {}
    for name in ("averaged_weights", "averaged_state"):
        times = []
        for _ in range(rounds):
            start_s = time.perf_counter()
            with getattr(online, name)():
                pass
            times.append(time.perf_counter() - start_s)
        swaps[name] = statistics.median(times)
    return {
        "owned_parameters": online.shard.numel,
        "without_s": statistics.median(before for before, _ in pairs),
        "with_s": statistics.median(after for _, after in pairs),
        "ratio": statistics.median(after / before for before, after in pairs),
        **{f"{name}_s": value for name, value in swaps.items()},
    }


def main() -> None:
    """Measure and print one JSON object per rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=4, help="per round")
    parser.add_argument("--last", type=int, default=6)
    parser.add_argument("--method", default="sma")
    given = parser.parse_args()
    width = given.hidden_size
    config = TinyConfig(hidden_size=width, ffn_hidden_size=2 * width, num_attention_heads=4)
    method = Method(name=given.method, alpha=0.2 if given.method == "ema" else None)
    found = run_ranks(
        measure,
        given.ranks,
        config,
        method,
        given.last,
        given.rounds,
        given.iterations,
        timeout_s=600,
    )
    for rank, result in enumerate(found):
        print(json.dumps({"rank": rank, **result}))


if __name__ == "__main__":
    main()
