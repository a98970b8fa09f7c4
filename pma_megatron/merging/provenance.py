"""`pma.json`, which a merge leaves in its output: where it comes from, and how to make it again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.errors import CheckpointError, PmaError
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import EXPORT, ONLINE_AVERAGE, PROVENANCE_VERSION
from pma_megatron.formats.output import Folder
from pma_megatron.formats.schema import is_count
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.publish import PROVENANCE_FILE
from pma_megatron.merging.report import describe_output, describe_plan
from pma_megatron.merging.request import MergeRequest, Method, Output
from pma_megatron.merging.rolling import ROLLING
from pma_megatron.merging.saved_over import saved_over
from pma_megatron.merging.source_checksums import Compared
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.storage.paths import absolute, path_of
from pma_megatron.version import __version__


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
    paths = tuple(absolute(source.path) for source in plan.sources)
    said = plan.request.selection.tokens
    request["selection"] = asdict(SelectionRequest(paths=paths, tokens=said))
    for name in ("load", "save", "export", "like"):
        if request[name] is not None:
            request[name] = absolute(request[name])
    request.pop("passed_over")  # the plan's are all of them
    rolling = request.pop("rolling")
    described = describe_plan(plan)
    origin = plan.origins.get(output.name) if folder is Folder.MODEL else None
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
        **({} if rolling is None else {ROLLING: json.loads(rolling)}),
        **({} if origin is None else {"origin": origin}),
    }


def with_origins(plan: MergePlan, comm: Comm) -> MergePlan:
    """The plan of an export, with what the only source of each output was merged from.

    A rank that sees the source reads its `pma.json`. Every rank makes this call.
    """
    if plan.export is None:
        return plan

    def read() -> dict[str, tuple[dict[str, Any] | None, str | None]]:
        found = {}
        for output in plan.outputs:
            used = [number for number, value in enumerate(output.values) if value != 0]
            if len(used) == 1 and plan.visible[used[0]][0] == comm.rank:
                found[output.name] = _origin(path_of(plan.selection.refs[used[0]].folder))
        return found

    parts = comm.gather(comm.agree("origin", read))
    said = {name: each for part in parts for name, each in part.items()}
    notes = tuple(dict.fromkeys(note for _, note in said.values() if note is not None))
    return replace(
        plan,
        origins={name: made for name, (made, _) in said.items() if made is not None},
        export=replace(plan.export, notes=(*plan.export.notes, *notes)),
        selection=replace(plan.selection, notes=(*plan.selection.notes, *notes)),
    )


def _origin(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What a merged source was merged from; or a note, where that cannot be said."""
    if not os.path.lexists(folder / PROVENANCE_FILE):
        return None, None
    try:
        value = read_marker(folder).value
        if value.get("kind") is not None or saved_over(folder):
            return None, None
        return _told(checked_provenance(folder, value)), None
    except (PmaError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        note = (
            f"the model card does not say what {folder} was merged from, for its {PROVENANCE_FILE} "
            f"does not: {str(error)[:200] or type(error).__name__}"
        )
        return None, note


def _told(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a model card has of a merge, each of the type that it is formatted as.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: something is not.
    """
    sources = made["plan"]["sources"]
    for source in sources:
        if not isinstance(source["path"], str) or not all(
            type(source.get(name)) in (int, type(None)) for name in ("iteration", "consumed_tokens")
        ):
            raise TypeError(f"a source is {str(source)[:100]}")
    values = made["output"]["coefficients"]
    if not all(type(value) in (int, float) for value in values):
        raise TypeError(f"its coefficients are {str(values)[:100]}")
    output = {**made["output"], "coefficients": [float(value) for value in values]}
    return {"output": output, "plan": {"sources": sources}}


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
        selection=SelectionRequest(paths=paths, tokens=_said_tokens(saved["selection"])),
        method=Method(name="custom", values=coefficients, allow_any=True),
        policy=Policy(
            optimizer_state=policy["optimizer_state"],
            average=policy["average"],
            overrides=tuple((pattern, action) for pattern, action in policy["overrides"]),
        ),
        dtype=saved["dtype"],
        lr_factor=saved.get("lr_factor"),
    )


def _said_tokens(selection: Mapping[str, Any]) -> tuple[int, ...] | None:
    """What the user said of each source; releases before had no such setting.

    Raises:
        TypeError: they are no counts.
    """
    said = selection.get("tokens")
    if said is None:
        return None
    if not all(is_count(value) for value in said):
        raise TypeError(f"selection.tokens is {str(said)[:100]}")
    return tuple(said)
