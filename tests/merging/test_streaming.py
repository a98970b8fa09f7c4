"""What the kernel streams from files to files is what it averages in memory, to the bit."""

from __future__ import annotations

import itertools
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import digests, folder_of, request_for
from pma_megatron import SelectionRequest, merge
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging import streaming, sums
from pma_megatron.merging.sums import LETTERS, Sum, average, choose
from pma_megatron.transfer import blocks
from pma_megatron.transfer.buffers import BlockBuffer, BlockBuffers, Room

BEST, TORCH = choose(), choose("torch")
COMPILED = BEST.compiled
pytestmark = pytest.mark.skipif(
    COMPILED is None or not COMPILED.STREAMS, reason=f"nothing is streamed here: {BEST}"
)
HALF, SINGLE = torch.bfloat16, torch.float32
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DONE, NOT_READ, NOT_FINITE, NOT_PROVED, NOT_WRITTEN = streaming.Outcome


class Files:
    """Numbered files of a folder, open to be read and written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack, self.descriptors = folder, ExitStack(), list[int]()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, content: bytes, flags: int = os.O_RDWR) -> int:
        path = self._folder / f"f{len(self.descriptors)}"
        path.write_bytes(content)
        self.descriptors.append(os.open(path, flags))
        self._stack.callback(os.close, self.descriptors[-1])
        return self.descriptors[-1]


def raw(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def bits(values: torch.Tensor) -> torch.Tensor:
    """Bits of the elements, with one and the same for every NaN."""
    found = values.view(INTEGERS[values.dtype.itemsize]).clone()
    found[values.isnan()] = -1
    return found


def random_bits(numel: int, dtype: torch.dtype, seed: int, *, finite: bool) -> torch.Tensor:
    """Every kind of number: subnormal, of any size, and (unless `finite`) NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    values = made.view(dtype)
    if finite:
        values = torch.where(values.abs() < 1e30, values, torch.ones(()).to(dtype))
    return values.contiguous()


def averaged(
    kernel: sums.Kernel, sources: Sequence[torch.Tensor], how: Sum, wanted: Sequence[torch.dtype]
) -> tuple[list[torch.Tensor], bool]:
    """In memory."""
    outs = [torch.empty(sources[0].numel(), dtype=dtype) for dtype in wanted]
    given_, made = ([BlockBuffer(t, t.numel()) for t in each] for each in (sources, outs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "KERNEL", kernel)
        finite = average(given_, [how], [made], BlockBuffers())
    return outs, finite


def streamed(
    number: int,
    sources: Sequence[torch.Tensor],
    how: Sum,
    wanted: Sequence[torch.dtype],
    places: Sequence[tuple[int, int]],
    *,
    step: int,
    proof: Any = None,
) -> Any:
    """One call of the kernel for files that hold the sources."""
    numel, dtypes = sources[0].numel(), [each.dtype for each in sources]
    buffers = Room().buffers([*dtypes, *wanted], step)
    letters = ["".join(LETTERS[dtype] for dtype in each) for each in (dtypes, wanted)]
    outs = tuple(buffers[len(sources) :])
    asked = (how.weights, how.divisor, how.dtype == torch.float64, outs, letters[1])
    given_ = tuple(buffers[: len(sources)])
    return COMPILED.stream(
        number, numel, step, given_, letters[0], (asked,), tuple(places), proof, True
    )


NUMBERS = st.integers(0, 1 << 30)
ALL = list(LETTERS)


@settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    numel=st.one_of(st.integers(1, 300), st.integers(1, 9000)),
    step=st.integers(1, 5000),
    dtypes=st.lists(st.sampled_from(ALL[:3]), min_size=1, max_size=5),
    only_half=st.booleans(),
    wanted=st.lists(st.sampled_from(ALL[:3]), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([1.0, 0.0, 0.3, 2.0, -1.0]), min_size=5, max_size=5),
    divisor=st.sampled_from([1.0, 3.0, 4.0]),
    seed=NUMBERS,
)
def test_a_stream_gives_the_bits_of_an_average_and_the_checksums_of_what_it_moved(
    tmp_path: Path,
    numel: int,
    step: int,
    dtypes: list[torch.dtype],
    only_half: bool,
    wanted: list[torch.dtype],
    weights: list[float],
    divisor: float,
    seed: int,
) -> None:
    if only_half:  # what has a way of its own
        dtypes, wanted = [HALF] * len(dtypes), [HALF]
    sources = [random_bits(numel, dtype, seed + k, finite=True) for k, dtype in enumerate(dtypes)]
    how = Sum(tuple(weights[: len(sources)]), divisor, SINGLE)
    right, finite = averaged(TORCH, sources, how, wanted)
    for number in range(len(COMPILED.INSTRUCTION_SETS)):
        with Files(tmp_path) as files:
            places = [(files.add(b"x" * 7 + raw(each)), 7) for each in sources]
            outs = [(files.add(b"y" * 5), 5) for _ in wanted]
            found = streamed(number, sources, how, wanted, [*places, *outs], step=step)
            outcome, at, _, _, crcs, _ = found
            if not finite:
                assert (outcome, at % step) == (NOT_FINITE, 0)
                continue
            assert outcome == DONE
            assert crcs[: len(sources)] == [zlib.crc32(raw(each)) for each in sources]
            for (descriptor, offset), made, crc in zip(
                outs, right, crcs[len(sources) :], strict=True
            ):
                content = os.pread(descriptor, 1 << 20, offset)
                assert zlib.crc32(content) == crc
                values = torch.frombuffer(bytearray(content), dtype=made.dtype)
                assert torch.equal(bits(values), bits(made))


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(2000, 7000),
    count=st.integers(1, 6),
    weights=st.lists(st.floats(-4, 4, width=16), min_size=6, max_size=6),
    divisor=st.sampled_from([1.0, 2.0, 3.0, 1e-30]),
    finite=st.booleans(),
    seed=NUMBERS,
)
def test_bfloat16_of_all_bit_patterns_in_memory(
    numel: int, count: int, weights: list[float], divisor: float, finite: bool, seed: int
) -> None:
    """The kernel has a short way for it, with other instructions."""
    sources = [random_bits(numel, HALF, seed + k, finite=finite) for k in range(count)]
    how = Sum(tuple(weights[:count]), divisor, SINGLE)
    (right,), is_finite = averaged(TORCH, sources, how, [HALF])
    for name in COMPILED.INSTRUCTION_SETS:
        (made,), said = averaged(choose(name), sources, how, [HALF])
        assert said == is_finite
        assert torch.equal(bits(made), bits(right)), name


def test_what_cannot_be_read_written_or_proved_is_said(tmp_path: Path) -> None:
    values = torch.arange(1000, dtype=SINGLE)
    how, step = Sum((1.0, 1.0), 2.0, SINGLE), 300

    def end(first: bytes, second: bytes, flags: int = os.O_RDWR, **rest: Any) -> Any:
        with Files(tmp_path) as files:
            places = [(files.add(first), 0), (files.add(second), 0), (files.add(b"", flags), 0)]
            if "stored" in rest:
                room = Room().buffers([HALF, HALF], step)
                rest["proof"] = (1, "b", *room, (files.add(rest.pop("stored")), 0))
            return streamed(0, [values] * 2, how, [SINGLE], places, step=step, **rest)

    whole, rounded = raw(values), raw(values.to(HALF))
    assert end(whole, whole)[0] == DONE
    assert end(whole, whole[:-1])[:4] == (NOT_READ, 900, 1, 0)
    assert end(whole[:8], whole)[:4] == (NOT_READ, 0, 0, 0)
    outcome, at, which, error, *_ = end(whole, whole, os.O_RDONLY)
    assert (outcome, at, which) == (NOT_WRITTEN, 0, 0)
    assert error != 0
    assert end(whole, whole, stored=rounded)[0] == DONE
    assert end(whole, whole, stored=rounded)[5] == zlib.crc32(rounded)
    assert end(whole, whole, stored=rounded[:-1])[:4] == (NOT_READ, 900, 2, 0)
    other = bytearray(rounded)
    other[2 * 650] ^= 1
    assert end(whole, whole, stored=bytes(other))[:2] == (NOT_PROVED, 600)
    infinite = values.clone()
    infinite[301] = float("inf")
    assert end(whole, raw(infinite))[:2] == (NOT_FINITE, 300)


def test_every_checksum_of_every_size_and_alignment_is_that_of_zlib(tmp_path: Path) -> None:
    """Of what is read and of what is written, by the instructions that each set has."""
    room = memoryview(bytearray(3 << 20))
    base = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 64
    content = raw(random_bits((1 << 19) + 64, HALF, 1, finite=True))
    sizes = [*range(1, 300), 511, 512, 513, 1000, 4095, 8193, 262_143, 1 << 18]
    with Files(tmp_path) as files:
        source, out = files.add(content), files.add(b"")
        for number, numel in itertools.product(range(len(COMPILED.INSTRUCTION_SETS)), sizes):
            for shift, step in ((0, numel), (2, numel), (14, numel), (34, -(-numel // 3))):
                into = room[base + shift : base + shift + 2 * numel]
                made = room[(2 << 20) + 62 - shift :][: 2 * numel]
                start = 2 * (numel + shift)
                found = COMPILED.stream(
                    number,
                    numel,
                    step,
                    (into,),
                    "b",
                    (((1.0,), 1.0, False, (made,), "b"),),
                    ((source, start), (out, 0)),
                    None,
                    True,
                )
                right = zlib.crc32(content[start : start + 2 * numel])
                assert found == (DONE, found[1], 0, 0, [right, right], 0), (number, numel, shift)


def test_a_set_has_a_checksum_of_its_own() -> None:
    """Those of narrow vectors too where the processor has wide ones: they are tested above."""
    named = dict(zip(COMPILED.INSTRUCTION_SETS, COMPILED.CHECKSUMS, strict=True))
    assert named.pop("avx512", None) in (None, "sse", "avx512")
    assert {*named.values()} == {"sse"}


def test_nonsense_is_refused() -> None:
    room, fixed = memoryview(bytearray(64)), bytes(64)
    asked = ((1.0,), 1.0, False, (room,), "f")
    wide = ((1.0,), 1.0, True, (room,), "d")
    good = (0, 8, 8, (room,), "f", (asked,), ((0, 0), (0, 0)), None, True)

    def refused(error: type[Exception], place: int, bad: Any, *more: Any) -> None:
        with pytest.raises(error):
            COMPILED.stream(*good[:place], bad, *more, *good[place + 1 + len(more) :])

    refused(ValueError, 0, 99)
    refused(ValueError, 1, -1)
    refused(ValueError, 2, 0)
    refused(ValueError, 2, 64)
    refused(ValueError, 4, "x")
    refused(ValueError, 6, ((0, 0),))
    refused(ValueError, 7, (5, "b", room, room, (0, 0)))
    for kind in "dx\u0162":  # float64 is no proof: its room would be half of what is written
        refused(ValueError, 7, (0, kind, room, room, (0, 0)))
    refused(ValueError, 3, (room,), "d", (wide,), ((0, 0), (0, 0)), (0, "f", room, room, (0, 0)))
    refused(TypeError, 3, (fixed,))
    refused(TypeError, 5, (((1.0,), 1.0, False, (fixed,), "f"),))
    refused(TypeError, 6, (0, (0, 0)))
    refused(TypeError, 7, 3)
    refused(TypeError, 7, (0, "b", fixed, room, (0, 0)))
    refused(TypeError, 7, (0, "b", room, fixed, (0, 0)))
    assert fixed == bytes(64)


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Nothing is streamed until the list has an element; then what is streamed is counted."""
    counts: list[int] = []
    ranges = streaming.ranges

    def counted(work: Any) -> list[streaming.Range]:
        if not counts:
            return []
        found = ranges(work)
        counts[0] += len(found)
        return found

    monkeypatch.setattr(streaming, "ranges", counted)
    return counts


@pytest.mark.parametrize("run", ["dense_run", "moe_run"])
def test_a_merge_is_the_same_by_streams_and_by_blocks(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, by_blocks: list[int]
) -> None:
    root = request.getfixturevalue(run)
    plain = merge(request_for(root, tmp_path / "blocks", selection=SelectionRequest(last=3)))
    by_blocks.append(0)
    streams = merge(request_for(root, tmp_path / "streams", selection=SelectionRequest(last=3)))
    assert by_blocks[0] > 10
    (one,), (other,) = plain.outputs, streams.outputs
    mine, theirs = (
        {name: digest for name, digest in digests(Path(made)).items() if name not in OWN_FILES}
        for made in (one, other)
    )
    assert mine == theirs
    assert len(mine) > 3
    assert plain.bytes == streams.bytes
    assert plain.checksums == streams.checksums


def test_a_source_that_ends_while_it_is_streamed(
    dense_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a signal, as where a file is mapped into memory: an error that names it."""
    root = tmp_path / "run"
    shutil.copytree(dense_run, root)
    stream, shards = streaming.stream, sorted(folder_of(root, 6).glob("*.distcp"))

    def cut(*args: Any, **rest: Any) -> Any:
        for shard in shards:
            os.truncate(shard, 10)
        return stream(*args, **rest)

    monkeypatch.setattr(streaming, "stream", cut)
    with pytest.raises(CheckpointError, match=r"iter_0000006.*truncated or replaced"):
        merge(request_for(root, tmp_path / "out", selection=SelectionRequest(last=2)))
    assert not list((tmp_path / "out").glob("iter*"))


def test_what_is_not_in_the_page_cache_is_asked_for_ahead_in_calls_that_count(
    dense_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reads no more for one advice than the device's read-ahead; steps are longer then."""
    last = SelectionRequest(last=2)
    (warm,) = merge(request_for(dense_run, tmp_path / "warm", selection=last)).outputs
    sizes, steps, advise, call = [], set(), os.posix_fadvise, streaming._call

    def advised(descriptor: int, at: int, nbytes: int, advice: int) -> None:
        sizes.append(nbytes)
        advise(descriptor, at, nbytes, advice)

    def called(*args: Any) -> Any:
        steps.add(args[-1])
        return call(*args)

    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(streaming, "_call", called)
    monkeypatch.setattr(blocks, "_is_cached", lambda *_: False)
    monkeypatch.setattr(blocks, "_read_ahead_bytes", lambda _: 1000)
    report = merge(request_for(dense_run, tmp_path / "cold", selection=last))
    assert steps == {streaming.COLD}
    assert max(sizes) <= 1000 and sum(sizes) > report.bytes["read"] // 4
    mine, theirs = (
        {name: digest for name, digest in digests(Path(made)).items() if name not in OWN_FILES}
        for made in (warm, *report.outputs)
    )
    assert mine == theirs
