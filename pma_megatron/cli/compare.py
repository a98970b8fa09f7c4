"""`pma compare`: how two checkpoints differ, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich.table import Table

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.spelling import first_few
from pma_megatron.cli.consoles import new_console, new_table
from pma_megatron.cli.progress import show
from pma_megatron.cli.verbs import NOT_THE_SAME, put_out, show_result
from pma_megatron.comparison.compare import compare
from pma_megatron.comparison.differences import Comparison, Difference, TensorComparison


def run(arguments: argparse.Namespace) -> int:
    """`pma compare`: 0 if both are the same, else `NOT_THE_SAME`."""
    with process_group_from_environment(arguments.timeout_s):
        comm = Comm()
        found = compare(
            arguments.first,
            arguments.second,
            weights_only=arguments.weights_only,
            atol=arguments.atol,
            rtol=arguments.rtol,
            threads=arguments.threads,
            comm=comm,
            show=show(comm),
        )
        if comm.is_main:
            show_result(arguments, found.to_json(), lambda: _print(found, arguments.most))
            put_out(arguments, found.to_json())
    return 0 if found.same else NOT_THE_SAME


def _print(found: Comparison, most: int) -> None:
    console = new_console()
    for name, side in zip(("first", "second"), found.sides, strict=True):
        said = [side.format, f"iteration {side.iteration}", side.topology]
        said.append(f"optimizer layout {side.optimizer_layout}")
        console.print(f"{name}: {side.path} ({', '.join(filter(None, said))})", soft_wrap=True)
    console.print(_states(found))
    worst = sorted(filter(_is_shown, found.tensors), key=_how_far, reverse=True)
    if worst and most:
        shown = f"the {most} that differ most of {len(worst)}" if len(worst) > most else "tensors"
        console.print(_tensors(worst[:most], f"{shown}: what differs"))
    for line in _lines(found):
        console.print(line, soft_wrap=True)


def _is_shown(tensor: TensorComparison) -> bool:
    return not tensor.same or tensor.values.different > 0 or tensor.dtypes[0] != tensor.dtypes[1]


def _how_far(tensor: TensorComparison) -> tuple[bool, int, float]:
    values = tensor.values
    return not tensor.compared, values.not_finite, values.relative_difference


def _states(found: Comparison) -> Table:
    columns = ("what", "tensors", "elements", "different", "max difference", "relative")
    table = new_table("by state", *columns)
    for state, values in found.by_state().items():
        count = sum(tensor.state == state for tensor in found.tensors)
        table.add_row(state, str(count), f"{values.elements:,}", *_numbers(values))
    return table


def _tensors(worst: list[TensorComparison], title: str) -> Table:
    columns = ("what", "tensor", "shape", "dtype", "different", "max difference", "relative")
    table = new_table(title, *columns)
    for tensor in worst:
        numbers = _numbers(tensor.values) if tensor.compared else ("", "", "")
        shape, dtype = _of_both(*tensor.shapes), _of_both(*tensor.dtypes)
        table.add_row(tensor.state, tensor.key, shape, dtype, *numbers)
    return table


def _of_both(one: object, other: object) -> str:
    if one == other:
        return str(one)
    first, second = ("none" if each is None else str(each) for each in (one, other))
    return f"{first} | {second}"


def _numbers(values: Difference) -> tuple[str, str, str]:
    share = f" ({100 * values.different / values.elements:.3g}%)" if values.different else ""
    return (
        f"{values.different:,}{share}",
        f"{values.max_difference:.4g}",
        f"{values.relative_difference:.4g}",
    )


def _lines(found: Comparison) -> Iterator[str]:
    first = [t for t in found.tensors if t.shapes[1] is None]
    second = [t for t in found.tensors if t.shapes[0] is None]
    shapes = [t for t in found.tensors if None not in t.shapes and not t.compared]
    total = found.total
    for which, what in (
        (first, "only in the first"),
        (second, "only in the second"),
        (shapes, "of another shape, not compared"),
    ):
        if which:
            yield f"{len(which)} {what}: {_named(which)}"
    if total.not_finite:
        yield f"{total.not_finite:,} elements differ of which one is NaN or Inf: no number has them"
    for note in found.notes:
        yield f"note: {note}"
    limit = (
        f" within atol {found.atol:g} and rtol {found.rtol:g}" if found.atol or found.rtol else ""
    )
    if found.same:
        equal = total.different == 0
        how = "bit for bit where they have one dtype" if equal else f"{total.different:,} differ"
        size = f"{total.elements:,} elements of {len(found.tensors)} tensors"
        yield f"the same{'' if equal else limit}: {size}, {how}"
    else:
        count = sum(not tensor.same for tensor in found.tensors)
        yield f"not the same{limit}: {count} of {len(found.tensors)} tensors"


def _named(tensors: list[TensorComparison]) -> str:
    return first_few((f"{t.state} {t.key}" for t in tensors), 3)
