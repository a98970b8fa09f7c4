"""The order of parameters that the package assumes is the one that Megatron's modules have."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from pma_megatron.base.boxes import Box
from pma_megatron.formats.torch_dist.registration import Rank, buffer_ranks, compare, rules
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

TINY = TinyConfig(qk_layernorm=True)
MODELS = {
    "dense": TINY,
    "layernorm, learned positions": replace(
        TINY, normalization="LayerNorm", position_embedding="learned_absolute"
    ),
    "experts": replace(TINY, num_experts=4, expert_model_parallel_size=2),
    "experts beside the rest": replace(TINY, num_experts=4),
    "stages of chunks, tied embeddings": replace(
        TINY,
        num_layers=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        tie_embeddings=True,
    ),
    "tensor parallel": replace(TINY, tensor_model_parallel_size=2),
    "multi-token prediction": replace(TINY, mtp_num_layers=2),
}


def buffers(
    rank: int, world_size: int, configs: dict[str, TinyConfig]
) -> dict[str, list[list[tuple[str, Box]]]]:
    """Per model and buffer: the chunks that a checkpoint will have of it, in the buffer's order."""
    found: dict[str, list[list[tuple[str, Box]]]] = {}
    for name, config in configs.items():
        trainer = TinyTrainer(config)
        places = trainer.places()
        for number, model in enumerate(trainer.models):
            names = {p: n for n, p in model.named_parameters()}
            for buffer in (*model.buffers, *model.expert_parallel_buffers):
                chunks = []
                for parameter in sorted(buffer.params, key=lambda p: buffer.param_index_map[p][0]):
                    inner = names[parameter].removeprefix("module.").removeprefix("module.")
                    key = inner if len(trainer.models) == 1 else f"model{number}.{inner}"
                    chunks += [
                        (place.key, Box(place.global_offset, place.local_shape))
                        for place in sorted(places[key], key=lambda place: place.start)
                    ]
                found.setdefault(name, []).append(chunks)
        trainer.close()
    return found


@pytest.fixture(scope="module")
def registered() -> list[dict[str, list[list[tuple[str, Box]]]]]:
    return run_ranks(buffers, 2, MODELS)


def in_order(ranks: list[Rank]) -> bool:
    return all(compare(a, b) == 1 for a, b in itertools.pairwise(ranks))


@pytest.mark.parametrize("name", MODELS)
def test_buffers_of_a_model_follow_one_rule(
    registered: list[dict[str, list[list[tuple[str, Box]]]]], name: str
) -> None:
    """Each pair of neighbours is ordered, by the same rule in all buffers of all ranks."""
    of_all_ranks = [chunks for rank in registered for chunks in rank[name]]
    assert sum(map(len, of_all_ranks)) > 20
    followed = [
        rule
        for rule in rules(with_experts=True)
        if all(in_order(buffer_ranks(rule, chunks)) for chunks in of_all_ranks)
    ]
    assert followed
