"""One function per verb: make the request, call the package, show what came back."""

from __future__ import annotations

import logging
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.stopping import having_published
from pma_megatron.cli import tables
from pma_megatron.cli.progress import show
from pma_megatron.cli.verbs import root_of, selection_of, show_result
from pma_megatron.errors import CheckpointError, SelectionError, UsageError
from pma_megatron.merging.inspection import look
from pma_megatron.merging.job import merge as merge_checkpoints
from pma_megatron.merging.job import plan as plan_merge
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.published import verify as verify_published
from pma_megatron.merging.report import describe_plan
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.folders import what_is

_log = logging.getLogger(__name__)


def merge(arguments: Namespace) -> None:
    """`pma merge`."""
    request = _request(arguments)
    with ExitStack() as over, process_group_from_environment(arguments.timeout_s):
        comm = Comm(request.merge_parallel_size)
        report = merge_checkpoints(request, comm, show(comm))
        over.enter_context(having_published(report.outputs))
        if comm.is_main:
            show_result(arguments, report.to_json(), lambda: tables.merged(report))


def plan(arguments: Namespace) -> None:
    """`pma plan`."""
    request = _request(arguments)
    made = plan_merge(request)
    show_result(arguments, describe_plan(made), lambda: tables.planned(made))


def list_(arguments: Namespace) -> None:
    """`pma list`."""
    refs = list_checkpoints(arguments.root, problem=_log.warning)
    if not refs:
        raise SelectionError(what_is(Path(arguments.root)))
    rows = [{**asdict(ref), "state": ref.state} for ref in refs]
    show_result(arguments, rows, lambda: tables.listed(arguments.root, refs))


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


def _request(arguments: Namespace) -> MergeRequest:
    values = arguments.coefficients
    method = "custom" if values and arguments.method == "sma" else arguments.method
    return MergeRequest(
        load=root_of(arguments),
        save=arguments.save,
        selection=selection_of(arguments),
        method=Method(
            name=method,
            alpha=arguments.alpha,
            floor=arguments.floor,
            values=None if values is None else tuple(values),
            allow_any=arguments.allow_any_coefficients,
        ),
        policy=Policy(
            optimizer_state=arguments.optimizer_state,
            average=arguments.average,
            overrides=_overrides(arguments.policy),
        ),
        dtype=arguments.dtype,
        lr_factor=arguments.lr_factor,
        sweep=tuple(arguments.sweep),
        threads=arguments.threads,
        merge_parallel_size=arguments.merge_parallel_size,
        overwrite=arguments.overwrite,
        check_sources=arguments.check_sources,
    )


def _overrides(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """`PATTERN=ACTION` flags as pairs.

    Raises:
        UsageError: one has no `=`.
    """
    pairs = []
    for text in texts:
        pattern, equals, action = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--policy {text!r} is not PATTERN=ACTION, as in '*.router.*=newest'")
        pairs.append((pattern, action))
    return tuple(pairs)
