"""What a merge did, for people and scripts; what its output keeps of it is in `provenance`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import as_argument
from pma_megatron.formats import registry
from pma_megatron.formats.rates import rate_flags
from pma_megatron.formats.side_files import table
from pma_megatron.formats.source import Source, versions_of
from pma_megatron.formats.trainers.saves import published_as
from pma_megatron.merging.coefficients import implied_decay_weights
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.request import Output
from pma_megatron.merging.verification import Verification
from pma_megatron.runs.describe import describe
from pma_megatron.storage.paths import absolute, in_store, path_of


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """The result of one merge.

    Attributes:
        outputs: published checkpoints, in the order of the plan's outputs.
        exports: published Hugging Face models, in the same order.
        seconds: wall time per stage: plan, merge, verify, publish.
        bytes: `read` and `written`, over all ranks.
        peak_memory_above_baseline_bytes: per rank.
        plan: the plan as plain values (sources, coefficients, policy, digest).
        verification: what was checked, per published folder: checkpoints, then models.
        ranks: number of ranks.
        checksums: how what was read stands to its checksums (`source_checksums.Compared`).
        kernels: what summed, each once: the kernel in C with an instruction set, or torch and why
            (`sums.Kernel`).
        reused: `units` and `bytes` of work that a merge which was cut off had done: they were read
            back, and not done again.
    """

    outputs: tuple[str, ...]
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]
    peak_memory_above_baseline_bytes: tuple[int, ...]
    plan: Mapping[str, Any]
    verification: tuple[Verification, ...]
    ranks: int
    checksums: Mapping[str, Any]
    kernels: tuple[str, ...]
    exports: tuple[str, ...] = ()
    reused: Mapping[str, int] = field(default_factory=dict)

    @property
    def published(self) -> tuple[str, ...]:
        """Every folder that was published."""
        return (*self.outputs, *self.exports)

    @property
    def resume(self) -> tuple[str, ...]:
        """How training is told to go on from each output: Megatron's flags, or a call."""
        return tuple(how_to_resume(path_of(f), self.plan["lr_factor"]) for f in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them: the plan's, and what came of it."""
        own = asdict(self)
        published, exported = own.pop("outputs"), own.pop("exports")
        plan = {**own.pop("plan"), **own, "published": published, "resume": list(self.resume)}
        return {**plan, "exported": exported} if exported else plan


def how_to_resume(folder: Path, lr_factor: float | None = None) -> str:
    """How training is told to go on from the checkpoint in `folder`.

    Args:
        folder: named by its root's tracker.
        lr_factor: of the learning rates in it; None if they are the run's.
    """
    if in_store(folder):
        return from_a_copy(folder)
    folder = path_of(absolute(folder))  # it is typed elsewhere
    save = published_as(folder)
    ref = describe(save.checkpoint)
    known = registry.get(ref.format, str(save.checkpoint))
    if save.trainer is not None:
        alone = known.resumed(save.checkpoint, save.checkpoint) if ref.weights_only else None
        return alone or save.trainer.resumed(folder)
    args = known.common(folder)["args"]
    if "consumed_train_samples" not in args:
        return known.resumed(folder, folder) or known.tracker.resumed(folder.parent)
    # Of another --save every restart of the job would begin with the average again.
    root = (as_argument(folder.parent),)
    flags: dict[str, tuple[str, ...]] = {"--load": root, "--save": root}
    if ref.weights_only:
        flags["--no-load-optim"] = ()
    if lr_factor is not None:
        flags |= rate_flags(args, known.schedule(folder))
    return shlex.join(word for flag, values in flags.items() for word in (flag, *values))


def from_a_copy(folder: Path) -> str:
    """Trainers read folders."""
    return f"the trainer's own way, from a copy of {folder.parent} on a disk (or a mount of it)"


def _versions(source: Source) -> dict[str, str]:
    """What tells objects of a store from those that are written there later."""
    versions = versions_of(source.path, source.stamps)
    return {"versions": versions} if versions else {}


def describe_plan(plan: MergePlan) -> dict[str, Any]:
    """The plan as plain values: what `plan --json` prints and provenance keeps."""
    return {
        "iteration": plan.iteration,
        "sources": [
            {
                "path": source.path,
                "iteration": ref.iteration,
                "consumed_tokens": ref.consumed_tokens,
                "consumed_samples": ref.consumed_samples,
                "metadata_digest": source.metadata_digest,
                **_versions(source),
                "topology": source.topology,
                "optimizer_layout": source.space.kind,
            }
            for source, ref in zip(plan.sources, plan.selection.refs, strict=True)
        ],
        "outputs": [describe_output(output) for output in plan.outputs],
        "policy": [asdict(row) for row in plan.table],
        "side_files": [asdict(row) for row in table(plan.side_files)],
        "lr_factor": plan.request.lr_factor,
        "passed_over": [asdict(each) for each in plan.selection.passed_over],
        "notes": list(plan.selection.notes),
        "bytes": {"read": plan.read_bytes, "written": plan.written_bytes},
        "digest": plan.digest,
        **({} if plan.export is None else {"export": plan.export.describe()}),
    }


def describe_output(output: Output) -> dict[str, Any]:
    """Coefficients of one output, and the decay that they imply."""
    return {
        "name": output.name,
        "method": output.coefficients.describe(),
        "source": output.coefficients.source,
        "coefficients": list(output.values),
        "implied_decay_weights": list(implied_decay_weights(output.values)),
    }
