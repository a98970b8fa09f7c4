"""Export one checkpoint as it is: a plan whose only target is a Hugging Face model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import FrontEnd, speaking
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.trainers.saves import checkpoint_in
from pma_megatron.merging.agreement import AVERAGED
from pma_megatron.merging.exporting import dtype_of, template_of
from pma_megatron.merging.job import Show, merge, silent
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.report import MergeReport
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.runs.discover import pointed
from pma_megatron.runs.folders import is_checkpoint, what_is
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.storage.paths import path_of

_NAMES = ("like", "dtype", "max_shard_bytes", "threads", "overwrite", "check_sources")
KEYWORDS = FrontEnd({**{name: f"{name}=" for name in _NAMES}, "export": "save=", "path": "path="})
"""Settings as Python calls of `export_model` spell them."""


@speaking(KEYWORDS)
def export_model(
    path: str | Path,
    *,
    save: str | Path,
    like: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    threads: int = 2,
    overwrite: bool = False,
    check_sources: bool = False,
    comm: Comm | None = None,
    show: Show = silent,
) -> MergeReport:
    """Write one checkpoint, merged or not, as a Hugging Face model. Every rank makes this call.

    In the dtype in which it stores its weights, the export has those, bit for bit; in any other,
    its main params rounded once, where it has any.

    Args:
        path: a checkpoint's folder, or a root whose tracker names one.
        save: the folder that becomes the model; it must not exist.
        like: folder of a Hugging Face model of the same family and sizes, for its `config.json` and
            tokenizer. A DeepSpeed checkpoint can do without: what lies beside it is taken then, and
            where nothing does, the export has no configuration.
        dtype: `bf16`, `fp16` or `fp32`; None for what `config.json` says.
        max_shard_bytes: of one file.
        threads: reader threads per rank.
        overwrite: replace an export that is there.
        check_sources: read records whole that are read in part, to compare their checksums.
        comm: the ranks; by default those of the current process group.
        show: shows progress.

    Returns:
        what was done; `exports` names the folder.

    Raises:
        UsageError, CheckpointError, PlanError, PublishError: it cannot be done; nothing was
            written.
        VerifyError: the result is not what it must be.
        RankError: another rank failed.
    """
    refuse_remote("path", path, stores=True)
    comm = comm or Comm()
    folder = comm.on_main("export", lambda: _chosen(path_of(path)))
    request = MergeRequest(
        load=str(folder.parent),
        selection=SelectionRequest(paths=(str(folder),)),
        method=Method(name="custom", values=(1.0,)),
        export=str(save),
        like=None if like is None else str(like),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        threads=threads,
        overwrite=overwrite,
        check_sources=check_sources,
    )
    weights = comm.on_main("export", lambda: _stores(folder, request))
    if weights:
        request = replace(request, policy=Policy(average="weights"))
    return merge(request, comm, show)


def _chosen(path: Path) -> Path:
    folder = pointed(path).absolute()
    if is_folder(folder) and is_checkpoint(folder):
        return folder
    inside = checkpoint_in(folder) if is_folder(folder) else None
    if inside is None:
        raise CheckpointError(what_is(folder))
    return inside


def _stores(folder: Path, request: MergeRequest) -> bool:
    """Whether all of its weights are stored in the dtype of the export, so that they are it."""
    format_name = registry.detect(folder)
    known = registry.get(format_name, str(folder))
    why = known.completeness(folder)
    if why is not None:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {why}")
    source = known.read_source(str(folder), {}, False)
    dtypes = {
        tensor.dtype if tensor.pieces else None
        for tensor in source.space.weights.values()
        if tensor.dtype in AVERAGED
    }
    weights = {**source.frozen, **source.space.weights}
    dtype, _ = dtype_of(request, template_of(request, source), weights)
    return dtypes == {dtype}
