"""Every source proves itself when it is opened, and all of them together before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Schedule, is_vocabulary
from pma_megatron.formats.source import Source
from pma_megatron.identity.consumed_samples import refuse_contradictions
from pma_megatron.identity.copies import Contents, contents_of, refuse_copies
from pma_megatron.identity.lineage import (
    SampledBox,
    Values,
    other_runs,
    places_of,
    refuse_other_runs,
    values_at,
)
from pma_megatron.identity.optimizer_steps import Steps, refuse_other_steps
from pma_megatron.identity.rounded import refuse_foreign_weights
from pma_megatron.identity.samples import Inventory
from pma_megatron.runs.describe import schedule_of
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of
from pma_megatron.transfer.blocks import BlockReader


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one source shows to be compared with the others; small enough to be sent around.

    Attributes:
        model: SHA-256 of the names and shapes of its weights; rows that may pad the vocabulary do
            not count.
        contents: checksums of its files.
        places: where all sources are looked at.
        values: what it holds there.
        steps: what its optimizer has counted.
        schedule: where it stood in its learning-rate schedule.
    """

    model: str
    contents: Contents
    places: tuple[SampledBox, ...]
    values: Values
    steps: Steps = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)


def prove(source: Source, newest: Evidence | None, *, main_params: bool) -> Evidence:
    """Compare one source with itself, a few MiB of it. For a rank that can read it.

    Args:
        source: as it was opened, whole.
        newest: of the newest source, None for that one.
        main_params: False where the user averages the weights as they are.

    Raises:
        CheckpointError: it is a mixture of two checkpoints; names the files.
    """
    items = registry.get(source.format, source.path).files(path_of(source.path))
    pieces = Inventory(source)
    with BlockReader(source.path, items) as reader:  # one for all: where an item lies is known then
        if main_params:
            refuse_foreign_weights(source, pieces, reader)
        places = places_of(source, pieces) if newest is None else newest.places
        return Evidence(
            _model(source),
            contents_of(source, pieces, items),
            places,
            values_at(source, places, reader),
            source.counted_steps,
            schedule_of(source),
        )


def unconfirmed(source: Source, with_main_params: Callable[[], Source]) -> str | None:
    """What its main params say against weights that are averaged as they are; None for nothing.

    Args:
        source: opened for its weights alone.
        with_main_params: opens it again.
    """
    if source.snapshot or source.quantized or not source.optimizer_keys:
        return None
    try:
        with BlockReader.of(source.format, source.path) as reader:
            opened = with_main_params()
            refuse_foreign_weights(opened, Inventory(opened), reader)
    except (CheckpointError, PlanError) as error:
        return (
            f"the weights of {source.path} are averaged as they are, and its own main params do "
            f"not confirm them: if files of two saves lie there, the average is of neither. {error}"
        )
    return None


def refuse_strangers(
    refs: Sequence[CheckpointRef], evidence: Mapping[int, Evidence]
) -> dict[int, str]:
    """Compare the sources with each other.

    Returns:
        number of a source -> that it looks like one of another run than the source before it, or
        like one of two saves.

    Args:
        refs: oldest first.
        evidence: of each, by its number.

    Raises:
        CheckpointError: two contradict each other, or are one; names both.
    """
    refuse_contradictions(refs)
    each = [evidence[number] for number in range(len(refs))]
    refuse_copies([e.contents for e in each], lambda n: each[n].schedule.learning_rate)
    counted = refuse_other_steps(refs, [e.steps for e in each])
    # Files of another model differ for another reason, which the plan names.
    values = [e.values if e.model == each[-1].model else {} for e in each]
    refuse_other_runs(refs, values, [e.schedule for e in each])
    return {**counted, **other_runs(refs, values)}


def _model(source: Source) -> str:
    shapes = sorted(
        (key, tensor.shape[1:] if is_vocabulary(key) else tensor.shape)
        for key, tensor in source.space.weights.items()
    )
    return hashlib.sha256(repr(shapes).encode()).hexdigest()
