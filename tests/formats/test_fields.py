"""Every field of every small file holds another type once: an answer or an error of ours, never a
traceback. `launch/attack/mutations.py` draws such variants by chance; here none is left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from deepspeed_runs import train
from hostile import SYSTEM
from pma_megatron.errors import PmaError
from pma_megatron.formats import items, registry
from pma_megatron.formats.base import Item
from pma_megatron.formats.inert import CALL, Record
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.pickles import load_inert
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
from runs import to_universal

VALUES: tuple[Any, ...] = (
    None,
    -1,
    "",
    [None],
    [{"a": -1}],
    {"a": None},
    {1: 2},
    Record(SYSTEM, CALL, ("true",), None),
)
KINDS = {
    "without ZeRO": DeepSpeedConfig(stage=0),
    "ZeRO-1": DeepSpeedConfig(stage=1),
    "ZeRO-3": DeepSpeedConfig(stage=3),
    "experts": DeepSpeedConfig(stage=1, experts=2, expert_parallel_size=2),
    "pipeline": DeepSpeedConfig(stage=1, pipeline_stages=2, tied=True),
}
UNIVERSAL = "Universal"
GOLDEN = Path(__file__).parents[1] / "golden"
MEGATRON = ("main-fully_reshardable-dense",)
_DEPTH = 3

Place = tuple[Any, ...]
"""Keys and indexes from a file's content to a field."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per kind, with one checkpoint or more."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("fields")
    run_ranks(train, 2, {str(folder / name): kind for name, kind in KINDS.items()})
    converted = {str(folder / name): str(folder / UNIVERSAL / name) for name in ("ZeRO-1",)}
    run_ranks(to_universal, 1, converted, init=False)
    for name in MEGATRON:
        shutil.unpack_archive(GOLDEN / f"{name}.tar.xz", folder / name)
    return folder


def places(value: Any, depth: int = _DEPTH) -> Iterator[Place]:
    """Where a value can be replaced: every key of dictionaries, the first of a list."""
    if depth == 0:
        return
    inner: Any = ()
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, (list, tuple)) and value:
        inner = [(0, value[0])]
    for key, held in inner:
        yield (key,)
        yield from ((key, *rest) for rest in places(held, depth - 1))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """`value` with `new` at a place; what is on the way there is copied."""
    if not place:
        return new
    first, *rest = place
    if isinstance(value, dict):
        return type(value)({**value, first: replaced(value[first], tuple(rest), new)})
    return type(value)([replaced(value[0], tuple(rest), new), *value[1:]])


def read_whole(folder: Path) -> None:
    """All that the package asks of a checkpoint before it reads payloads."""
    known = registry.get(registry.detect(folder), str(folder))
    known.iteration_of(folder)
    why = known.completeness(folder)
    known.common(folder)
    known.schedule(folder)
    if why is None:
        known.read_source(str(folder), {}, True)


def pickles(folder: Path) -> dict[bytes, Any]:
    """What the zips of a checkpoint say, each once."""
    files = ItemFiles(folder)
    known = registry.get(registry.detect(folder), str(folder))
    whole = (Item(file.name, 0, file.stat().st_size) for file in folder.glob("*.pt"))
    return {
        files.read_record(item, "data.pkl"): files.decode(item, item.file)
        for item in {*whole, *known.items(folder)}
    }


@pytest.mark.parametrize("name", [*KINDS, f"{UNIVERSAL}/ZeRO-1", *MEGATRON])
def test_no_field_of_another_type_is_a_traceback(runs: Path, name: str) -> None:
    folder = next(f for f in sorted((runs / name).iterdir()) if f.is_dir())
    read_whole(folder)
    failures = []
    for data, content in pickles(folder).items():
        for place in places(content):
            for new in VALUES:
                error = damaged(folder, data, place, new)
                if error is not None:
                    failures.append(f"{place} = {new!r}: {error!r}")
    assert not failures


def damaged(folder: Path, data: bytes, place: Place, new: Any) -> Exception | None:
    """Read a folder of which the pickle `data` says `new` at `place`; an error not ours."""

    def decode(found: bytes, **settings: Any) -> Any:
        value = load_inert(found, **settings)
        return replaced(value, place, new) if found == data else value

    with mock.patch.object(items, "load_inert", decode):
        try:
            read_whole(folder)
        except PmaError:
            return None
        except Exception as error:
            return error
    return None
