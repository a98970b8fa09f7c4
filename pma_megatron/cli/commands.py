"""One function per verb: make the request, call the package, show what came back."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict, replace

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.stopping import having_published
from pma_megatron.cli import tables
from pma_megatron.cli.progress import show
from pma_megatron.cli.verbs import show_result
from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.merging.export_job import export_model
from pma_megatron.merging.inspection import look
from pma_megatron.merging.job import merge as merge_checkpoints
from pma_megatron.merging.job import plan as plan_merge
from pma_megatron.merging.listing import listed
from pma_megatron.merging.published import verify as verify_published
from pma_megatron.merging.report import describe_plan
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.folders import what_is
from pma_megatron.storage.paths import path_of
from pma_megatron.watching.own import WATCHED

_log = logging.getLogger(__name__)


def merge(arguments: Namespace) -> None:
    """`pma merge`."""
    request = replace(arguments.request, watched=os.environ.get(WATCHED))
    with ExitStack() as over, process_group_from_environment(arguments.timeout_s):
        comm = Comm(request.merge_parallel_size)
        report = merge_checkpoints(request, comm, show(comm))
        over.enter_context(having_published(report.published))
        if comm.is_main:
            show_result(arguments, report.to_json(), lambda: tables.merged(report))


def export(arguments: Namespace) -> None:
    """`pma export`."""
    names = ("like", "dtype", "max_shard_bytes", "threads", "overwrite", "check_sources")
    given = {name: getattr(arguments, name) for name in names}
    with ExitStack() as over, process_group_from_environment(arguments.timeout_s):
        comm = Comm()
        report = export_model(
            arguments.path, save=arguments.export, comm=comm, show=show(comm), **given
        )
        over.enter_context(having_published(report.published))
        if comm.is_main:
            show_result(arguments, report.to_json(), lambda: tables.merged(report))


def plan(arguments: Namespace) -> None:
    """`pma plan`."""
    found = plan_merge(arguments.request)
    show_result(arguments, describe_plan(found), lambda: tables.planned(found))


def list_(arguments: Namespace) -> None:
    """`pma list`."""
    refs = list_checkpoints(arguments.root, problem=_log.warning)
    if not refs:
        raise SelectionError(what_is(path_of(arguments.root)))
    found = listed(refs)
    rows = [
        {**asdict(each.ref), "state": each.ref.state, "bytes": each.bytes, "origin": each.origin}
        for each in found
    ]
    show_result(arguments, rows, lambda: tables.listed(arguments.root, found))


def inspect(arguments: Namespace) -> None:
    """`pma inspect`."""
    found = look(arguments.path)
    show_result(arguments, asdict(found), lambda: tables.inspected(found))
    if found.problem is not None:
        raise CheckpointError(found.problem)


def verify(arguments: Namespace) -> None:
    """`pma verify`."""
    with process_group_from_environment(arguments.timeout_s):
        comm = Comm()
        checked = verify_published(
            arguments.path,
            samples=arguments.samples,
            deep=arguments.deep,
            files_only=arguments.files_only,
            comm=comm,
        )
        if comm.is_main:
            show_result(arguments, asdict(checked), lambda: tables.verified(checked))
