"""Hostile files: whatever a checkpoint says, nothing runs or is opened elsewhere, no traceback.

The variants come from `launch/attack/hostile.py`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pathlib
import pickle
import resource
import threading
import tracemalloc
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hostile import FRAGMENTS, PROGRAMS, SYSTEM, VALUES, variant_of
from mutations import LIMIT_BYTES, Watch
from pma_megatron.base.boxes import Box
from pma_megatron.base.memory import collector_at_rest
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item
from pma_megatron.formats.dcp.cover import cover, covered
from pma_megatron.formats.dcp.metadata import parse
from pma_megatron.formats.inert import Record, fields_of
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.pickles import dump_inert, load_inert
from pma_megatron.formats.torch_dist.chunks import StoredChunk, metadata_bytes

OFTEN = settings(
    max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def _metadata() -> bytes:
    """What torch's own classes say of two tensors and an object, pickled by Python."""
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (2, 4))]
    chunks = [
        StoredChunk("a", (4, 4), box, torch.bfloat16, Item("__0_0.distcp", 100 * n, 100))
        for n, box in enumerate(boxes)
    ]
    chunks.append(StoredChunk("b", (), Box((), ()), torch.float32, Item("__1_0.distcp", 0, 50)))
    return metadata_bytes(chunks, {"rng_state/shard_0_1": Item("__1_0.distcp", 50, 70)})


def _common() -> dict[str, Any]:
    state = OrderedDict(weight=torch.ones(3, dtype=torch.bfloat16), bias=torch.zeros(2, 2).t())
    state._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    return {
        "args": Namespace(seq_length=8, consumed_train_samples=16, at=Path("a"), dtype=torch.half),
        "iteration": 8,
        "big": 1 << 100,
        "small": -5,
        "bytes": b"\xff\x00",
        "flag": True,
        "shape": torch.Size([1, 2]),
        "kinds": {1.5: None, (1, "a"): [(), [1, 2]]},
        "text": "ä\n",
        "set": {1},
        "counts": defaultdict(int, a=1),
        "state": state,
        "many": list(range(3000)),
        "alias": state,
    }


def _saved(value: Any) -> dict[str, bytes]:
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


METADATA = _metadata()
COMMON = next(data for name, data in _saved(_common()).items() if name.endswith("data.pkl"))


def test_what_is_written_again_is_what_was_read() -> None:
    """The oracle is torch's own reader."""
    records = _saved(_common())
    name = next(name for name in records if name.endswith("data.pkl"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for each, data in records.items():
            written = dump_inert(load_inert(data, what="common.pt")) if each == name else data
            archive.writestr(each, written)
    stream.seek(0)
    got, expected = torch.load(stream, weights_only=False), _common()
    assert vars(got.pop("args")) == vars(expected.pop("args"))
    for each in (got, expected):
        each["tensors"] = {key: t.tolist() for key, t in each["state"].items()}
        assert each["state"] is each.pop("alias")
        each["attributes"] = each.pop("state")._metadata
    assert got == expected
    assert type(got["counts"]) is defaultdict and got["counts"].default_factory is int


@pytest.fixture(scope="module")
def watch() -> Watch:
    """Sees every import, exec and open of this thread while it is on; no hook can be taken off."""
    parse(METADATA, "a file")
    dump_inert(load_inert(COMMON, what="a file"))  # whatever is imported late is imported now
    return Watch([], threading.get_ident())


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """The block may neither run or open anything nor take more than 1 GiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, hard))
    watch.on = True
    try:
        with collector_at_rest():  # which may end what other tests have left
            yield
    finally:
        watch.on = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        seen, watch.seen = watch.seen, Counter()
    assert not seen


@OFTEN
@given(random=st.randoms(use_true_random=False))
def test_a_variant_of_metadata_is_read_or_refused(watch: Watch, random: Random) -> None:
    data = variant_of(METADATA, random)
    try:
        with watched(watch):
            parse(data, "a file")
    except CheckpointError as error:
        assert str(error).startswith("a file")


@OFTEN
@given(random=st.randoms(use_true_random=False))
def test_a_variant_of_a_saved_object_is_read_or_refused(watch: Watch, random: Random) -> None:
    data = variant_of(COMMON, random)
    try:
        with watched(watch):
            dump_inert(load_inert(data, what="a file"))
    except CheckpointError as error:
        assert len(str(error)) < 1000


@OFTEN
@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=12))
def test_assembled_opcodes_are_read_or_refused(watch: Watch, parts: list[bytes]) -> None:
    try:
        with watched(watch):
            load_inert(b"\x80\x04" + b"".join(parts) + b".", what="a file")
    except CheckpointError as error:
        assert str(error).startswith("a file")


def test_the_watch_sees_what_it_must_not(watch: Watch, tmp_path: Path) -> None:
    for deed in (
        lambda: (tmp_path / "a").write_text("a"),
        lambda: exec("1"),
        lambda: bytearray(2 << 30),
        lambda: __import__("this_is_not_there"),
        lambda: (tmp_path / "b").mkdir(),
    ):
        with (
            pytest.raises((AssertionError, MemoryError)),
            watched(watch),
            contextlib.suppress(ImportError),
        ):
            deed()


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_hostile_program_costs_nothing(number: int) -> None:
    program = PROGRAMS[number]
    before = vars(pathlib.PosixPath).copy(), vars(Namespace).copy(), vars(OrderedDict).copy()
    tracemalloc.start()
    try:
        load_inert(program, what="a file")
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < (128 << 20) + 40 * len(program)
    assert (vars(pathlib.PosixPath), vars(Namespace), vars(OrderedDict)) == before


def _with(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Put `new` at `path` of a decoded pickle: keys, indexes, and names of attributes."""
    *above, last = path
    for step in above:
        value = fields_of(value)[step] if isinstance(value, Record) else value[step]  # type: ignore[index]
    if isinstance(value, Record) and isinstance(value.state, tuple):
        value.state = (*value.state[:last], new, *value.state[last + 1 :])
    elif isinstance(value, Record):
        value.state[last] = new
    else:
        value[last] = new


def _first(mapping: dict[Any, Any]) -> Any:
    return next(iter(mapping))


_ENTRY = ("state_dict_metadata", "a")
FIELDS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "entries": (("state_dict_metadata",), ({},)),
    "an entry": (_ENTRY, ()),
    "an object": (("state_dict_metadata", "rng_state/shard_0_1"), ()),
    "properties": ((*_ENTRY, "properties"), ()),
    "dtype": ((*_ENTRY, "properties", 0), (torch.float32, torch.bool, torch.complex64)),
    "layout": ((*_ENTRY, "properties", 1), ()),
    "requires_grad": ((*_ENTRY, "properties", 2), (True, False)),
    "memory_format": ((*_ENTRY, "properties", 3), ()),
    "pin_memory": ((*_ENTRY, "properties", 4), (True, False)),
    "size": ((*_ENTRY, "size"), ()),
    "chunks": ((*_ENTRY, "chunks"), ()),
    "a chunk": ((*_ENTRY, "chunks", 0), ()),
    "offsets": ((*_ENTRY, "chunks", 0, "offsets"), ()),
    "sizes": ((*_ENTRY, "chunks", 0, "sizes"), ()),
    "storage_data": (("storage_data",), ()),
    "mcore_data": (("mcore_data",), (None, {})),
    "planner_data": (("planner_data",), (None, {})),
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_of_metadata_holds_another_kind_of_value(field: str) -> None:
    path, allowed = FIELDS[field]
    for new in VALUES:
        value = load_inert(METADATA, what="a file")
        _with(value, path, new)
        data = dump_inert(value)
        if any(new is each or (type(new) is type(each) and new == each) for each in allowed):
            continue
        with pytest.raises(CheckpointError, match="a file"):
            parse(data, "a file")


@pytest.mark.parametrize("field", ["relative_path", "offset", "length", "fqn", "index offset"])
def test_no_place_of_metadata_holds_another_kind_of_value(field: str) -> None:
    good = {
        "relative_path": ("x", "__0_0.distcp"),
        "offset": (),
        "length": (0, 1),
        "fqn": (),
        "index offset": (),
    }[field]
    for new in VALUES:
        value = load_inert(METADATA, what="a file")
        index, info = next(iter(fields_of(value)["storage_data"].items()))  # type: ignore[index]
        if field in ("fqn", "index offset"):
            _with(index, (field.removeprefix("index "),), new)
        else:
            _with(info, (field,), new)
        if any(type(new) is type(each) and new == each for each in good):
            continue
        if field == "offset" and type(new) is int and 0 <= new < 2**62:
            continue
        if field == "length" and type(new) is int and 0 <= new <= 100:
            continue
        with pytest.raises(CheckpointError, match="a file"):
            parse(dump_inert(value), "a file")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../a",
        "a/../../b",
        "a//b",
        "a/",
        "a/./b",
        "a\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 300,
        "a/" * 600 + "a",
        None,
        1,
        b"a",
        ["a"],
        ("a",),
    ],
)
def test_names_that_point_elsewhere(name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"a file: relative_path names .*refused"):
        plain_name(name, "a file: relative_path")


def test_names_inside() -> None:
    names = ["__0_0.distcp", "a/b.pt", ".hidden", "..a", "ä b"]
    assert [plain_name(name, "a file") for name in names] == names


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_chunks_cover_a_tensor_or_do_not(data: st.DataObject) -> None:
    """The oracle counts how often each element is written."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    axes = [sorted({0, n, *data.draw(st.sets(st.integers(0, n), max_size=2))}) for n in shape]
    tiles = [
        Box(tuple(low for low, _ in cell), tuple(high - low for low, high in cell))
        for cell in itertools.product(*(list(itertools.pairwise(axis)) for axis in axes))
    ]
    boxes = data.draw(st.permutations(tiles))
    if data.draw(st.booleans()):
        boxes = boxes[data.draw(st.integers(0, 1)) :]
        if data.draw(st.booleans()):
            sizes = tuple(data.draw(st.integers(0, n)) for n in shape)
            boxes = [*boxes, Box((0,) * len(shape), sizes)]
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        part = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        count[part] += 1
    once = bool((count == 1).all())
    assert cover(boxes, shape) == once
    columns = (np.array(c, dtype=np.int64).reshape(len(boxes), len(shape)) for c in _columns(boxes))
    assert covered(*columns, shape) == once


def _columns(boxes: list[Box]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [box.offsets for box in boxes], [box.sizes for box in boxes]


@example(b"\x80\x02" + b"]" * 100)
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        load_inert(data, what="a file")


def test_a_record_stands_for_what_would_have_run() -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("touch owned",)

    found = load_inert(pickle.dumps(Hostile()), what="a file")
    assert (str(found.name), found.args) == (f"{os.system.__module__}.system", ("touch owned",))
    assert dump_inert(found) == dump_inert(load_inert(dump_inert(found), what="a file"))
    assert str(SYSTEM) == "os.system"
