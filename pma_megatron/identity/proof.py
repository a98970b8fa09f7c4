"""Every source proves itself when it is opened, and all of them together before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Schedule, is_vocabulary
from pma_megatron.formats.source import Source
from pma_megatron.identity.consumed_samples import refuse_contradictions
from pma_megatron.identity.copies import Contents, contents_of, refuse_copies
from pma_megatron.identity.lineage import (
    SampledBox,
    Values,
    least_left,
    of_one_run,
    places_of,
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

    def of_places(self) -> Evidence:
        """Where to look alone, which is all that opens the other sources."""
        nothing = Contents(self.contents.path, {}, {}, exact=False)
        return replace(self, contents=nothing, values=Values.none(), steps={})


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
    with BlockReader(source.path, items) as reader:
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


@dataclass(slots=True)
class Strangers:
    """Compares the sources of a merge with each other, one after the other: of what they hold, two
    at a time are kept.

    Attributes:
        refs: oldest first.
        evidence: of each that was added, without what it holds.
    """

    refs: Sequence[CheckpointRef]
    evidence: list[Evidence] = field(default_factory=list)
    _held: Values = field(default_factory=Values.none)
    _signs: list[tuple[str | None, str | None]] = field(default_factory=list)
    _failed: Exception | None = None

    def add(self, evidence: Evidence) -> None:
        """The next one, from the oldest on. It raises nothing: other ranks do not wait for that."""
        try:
            self._add(evidence)
        except Exception as error:  # `refuse` raises it, where all ranks are told
            self._failed = self._failed or error

    def _add(self, evidence: Evidence) -> None:
        number = len(self.evidence)
        # Files of another model differ for another reason, which the plan names.
        alike = number > 0 and evidence.model == self.evidence[-1].model
        if number and alike:
            older, newer = self.refs[number - 1], self.refs[number]
            schedules = self.evidence[-1].schedule, evidence.schedule
            left = least_left(older, newer, schedules)
            self._signs.append(of_one_run(older, newer, self._held, evidence.values, left))
        elif number:
            self._signs.append((None, None))
        self._held = evidence.values
        self.evidence.append(replace(evidence, values=Values.none(), places=()))

    def refuse(self) -> dict[int, str]:
        """Compare all that were added.

        Returns:
            number of a source -> that it looks like one of another run than the source before it,
            or like one of two saves.

        Raises:
            CheckpointError: two contradict each other, or are one; names both.
        """
        refuse_contradictions(self.refs)
        if self._failed is not None:
            raise self._failed
        each = self.evidence
        refuse_copies([e.contents for e in each], lambda n: each[n].schedule.learning_rate)
        counted = refuse_other_steps(self.refs, [e.steps for e in each])
        for error, _ in self._signs:
            if error is not None:
                raise CheckpointError(error)
        said = {n: sentence for n, (_, sentence) in enumerate(self._signs, 1) if sentence}
        return {**counted, **said}


def _model(source: Source) -> str:
    shapes = sorted(
        (key, tensor.shape[1:] if is_vocabulary(key) else tensor.shape)
        for key, tensor in source.space.weights.items()
    )
    return hashlib.sha256(repr(shapes).encode()).hexdigest()
