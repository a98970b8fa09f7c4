"""What a merge did: the report for people and scripts, and the provenance in the checkpoint."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.spelling import as_argument
from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import EXPORT, ONLINE_AVERAGE
from pma_megatron.formats.output import Folder
from pma_megatron.formats.rates import rate_flags
from pma_megatron.merging.coefficients import implied_decay_weights
from pma_megatron.merging.integrity import Compared
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.publish import PROVENANCE_FILE
from pma_megatron.merging.request import MergeRequest, Method, Output
from pma_megatron.merging.verification import Verification
from pma_megatron.runs.discover import describe
from pma_megatron.runs.selection import SelectionRequest
from pma_megatron.version import __version__

PROVENANCE_VERSION = 1


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
        checksums: how what was read stands to its checksums (`integrity.Compared`).
    """

    outputs: tuple[str, ...]
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]
    peak_memory_above_baseline_bytes: tuple[int, ...]
    plan: Mapping[str, Any]
    verification: tuple[Verification, ...]
    ranks: int
    checksums: Mapping[str, Any]
    exports: tuple[str, ...] = ()

    @property
    def published(self) -> tuple[str, ...]:
        """Every folder that was published."""
        return (*self.outputs, *self.exports)

    @property
    def resume(self) -> tuple[str, ...]:
        """How training is told to go on from each output: Megatron's flags, or a call."""
        return tuple(how_to_resume(Path(f), self.plan["lr_factor"]) for f in self.outputs)

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
    ref = describe(folder)
    known = registry.get(ref.format, str(folder))
    args = known.common(folder)["args"]
    if "consumed_train_samples" not in args:
        return known.tracker.resumed(folder.parent)
    flags: dict[str, tuple[str, ...]] = {"--load": (as_argument(folder.parent),)}
    if ref.weights_only:
        flags["--no-load-optim"] = ()
    if lr_factor is not None:
        flags |= rate_flags(args, known.schedule(folder))
    return shlex.join(word for flag, values in flags.items() for word in (flag, *values))


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
                "topology": source.topology,
                "optimizer_layout": source.space.kind,
            }
            for source, ref in zip(plan.sources, plan.selection.refs, strict=True)
        ],
        "outputs": [describe_output(output) for output in plan.outputs],
        "policy": [asdict(row) for row in plan.table],
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


def provenance(
    plan: MergePlan,
    output: Output,
    folder: Folder,
    ranks: int,
    seconds: Mapping[str, float],
    compared: Compared,
) -> dict[str, Any]:
    """What `pma.json` says: where a folder comes from, and all that verifying it takes.

    Paths in it are absolute: it is read from other folders than the one of the merge.
    """
    request = asdict(plan.request)
    paths = tuple(str(Path(source.path).absolute()) for source in plan.sources)
    request["selection"] = asdict(SelectionRequest(paths=paths))
    for name in ("load", "save", "export", "like"):
        if request[name] is not None:
            request[name] = str(Path(request[name]).absolute())
    request.pop("passed_over")  # the plan's are all of them
    described = describe_plan(plan)
    origin = _origin(plan, output) if folder is Folder.MODEL else None
    for source, path in zip(described["sources"], paths, strict=True):
        source["path"] = path
    return {
        **({"kind": EXPORT} if folder is Folder.MODEL else {}),
        "provenance_version": PROVENANCE_VERSION,
        "pma_megatron": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": ranks,
        "seconds": dict(seconds),
        "checksums": asdict(compared),
        "output": describe_output(output),
        "plan": described,
        "request": request,
        **({} if origin is None else {"origin": origin}),
    }


def _origin(plan: MergePlan, output: Output) -> dict[str, Any] | None:
    """What the only source of an output was merged from; None for any other output."""
    used = [s.path for s, value in zip(plan.sources, output.values, strict=True) if value != 0]
    if len(used) != 1:
        return None
    try:
        made = read_provenance(Path(used[0]))
        return {"output": made["output"], "plan": {"sources": made["plan"]["sources"]}}
    except (CheckpointError, VerifyError, KeyError):  # no merge, or nothing that can be said of it
        return None


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `pma.json` says of a merge, or of a running average that was saved (`kind`).

    Raises:
        CheckpointError, VerifyError: there is none, or it cannot be read or is damaged.
    """
    return checked_provenance(folder, read_marker(folder).value)


def checked_provenance(folder: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, once it is clear that everything is in it that this package reads.

    Raises:
        CheckpointError: something is not, or another release wrote it.
    """
    path, version = folder / PROVENANCE_FILE, value.get("provenance_version")
    if value.get("kind") == ONLINE_AVERAGE:
        return dict(value)
    if version != PROVENANCE_VERSION:
        raise CheckpointError(
            f"{path} has provenance version {version}, this release reads "
            f"{PROVENANCE_VERSION}: use the pma_megatron that wrote it, {value.get('pma_megatron')}"
        )
    try:
        request_again(value)
        sources, values = value["plan"]["sources"], value["output"]["coefficients"]
        paths = value["request"]["selection"]["paths"]
        good = len(sources) == len(values) == len(paths)
        good &= all(isinstance(source["path"], str) for source in sources)
        good &= all(isinstance(source["metadata_digest"], str) for source in sources)
        good &= all(isinstance(source["iteration"], (int, type(None))) for source in sources)
        good &= isinstance(value["output"]["method"], str) and "created" in value
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks what a merge says ({error!r}): damaged") from error
    if not good:
        raise CheckpointError(f"{path} contradicts itself about its sources: damaged")
    for source, asked in zip(sources, paths, strict=True):
        if source["path"] != asked:
            raise CheckpointError(
                f"{path} says in plan.sources that {source['path']} was averaged, and in "
                f"request.selection.paths that {asked} was: damaged or edited. Restore it"
            )
    return dict(value)


def request_again(recorded: Mapping[str, Any]) -> MergeRequest:
    """The request that made a folder, from its provenance, with the sources by path.

    Of an export it is one of a checkpoint too: who makes the plan again says what it is to make.
    """
    saved = dict(recorded["request"])
    paths = tuple(str(path) for path in saved["selection"]["paths"])
    coefficients = tuple(float(value) for value in recorded["output"]["coefficients"])
    policy = saved["policy"]
    return MergeRequest(
        load=saved["load"],
        selection=SelectionRequest(paths=paths),
        method=Method(name="custom", values=coefficients, allow_any=True),
        policy=Policy(
            optimizer_state=policy["optimizer_state"],
            average=policy["average"],
            overrides=tuple((pattern, action) for pattern, action in policy["overrides"]),
        ),
        dtype=saved["dtype"],
        lr_factor=saved.get("lr_factor"),
    )
