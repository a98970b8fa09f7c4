"""The weighted sum: every kernel gives the bits of the definition, whatever the processor.

The oracle rounds exact fractions; what torch gives, and what each kernel gives, is compared with it
and with each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pma_megatron.merging import sums
from pma_megatron.merging.sums import Sum, average, choose
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS, BlockBuffer, BlockBuffers

ONE = Sum((1.0,), 1.0, torch.float32)
TORCH = choose("torch")
BEST = choose()
SETS = () if BEST.compiled is None else BEST.compiled.INSTRUCTION_SETS
COMPILED = [choose(name) for name in SETS]
needs_kernel = pytest.mark.skipif(not COMPILED, reason=f"sums by {BEST}")
HALF, SINGLE, DOUBLE = (torch.bfloat16, torch.float16), torch.float32, torch.float64
SIZES = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32, torch.float64: 64}
INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def buffer(tensor: torch.Tensor) -> BlockBuffer:
    return BlockBuffer(tensor, tensor.numel())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bits of the elements, with one and the same for every NaN."""
    as_integers = tensor.view(INTEGERS[SIZES[tensor.dtype]]).clone()
    as_integers[tensor.isnan()] = -1
    return as_integers


def averaged(
    kernel: sums.Kernel,
    sources: Sequence[torch.Tensor],
    hows: Sequence[Sum],
    wanted: Sequence[Sequence[torch.dtype]],
) -> tuple[list[list[torch.Tensor]], bool]:
    numel = sources[0].numel()
    outs = [[torch.full((numel,), 7.0, dtype=dtype) for dtype in own] for own in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "KERNEL", kernel)
        finite = average(
            [buffer(each) for each in sources],
            hows,
            [[buffer(out) for out in own] for own in outs],
            BlockBuffers(),
        )
    return outs, finite


def flat(outs: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return list(itertools.chain(*outs))


# An oracle of single elements, in exact arithmetic.


def rounded(exact: Fraction, dtype: torch.dtype, zero: float = 0.0) -> float:
    """The nearest value of a dtype, ties to even. `zero` is what an exact 0 becomes."""
    precision, least, most = {
        torch.bfloat16: (8, -133, 127),
        torch.float16: (11, -24, 15),
        torch.float32: (24, -149, 127),
        torch.float64: (53, -1074, 1023),
    }[dtype]
    if exact == 0:
        return zero
    size = abs(exact)
    exponent = math.floor(math.log2(size.numerator) - math.log2(size.denominator))
    exponent -= Fraction(2) ** exponent > size
    exponent += Fraction(2) ** (exponent + 1) <= size
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    value = round(size / unit) * unit  # to even
    sign = -1.0 if exact < 0 else 1.0
    return sign * (math.inf if value >= Fraction(2) ** (most + 1) else float(value))


def exact_average(values: Sequence[float], how: Sum) -> float:
    """The definition in `sums`, of finite values."""
    total = None
    for value, weight in zip(values, how.weights, strict=True):
        if weight == 0.0:
            continue
        product = Fraction(value) * Fraction(weight)
        signed_zero = math.copysign(0.0, value * weight)
        if total is None:
            total = rounded(product, how.dtype, signed_zero)
        elif math.isinf(total):
            pass
        else:
            zero = (
                -0.0 if product == 0 == total and str(signed_zero) == str(total) == "-0.0" else 0.0
            )
            total = rounded(product + Fraction(total), how.dtype, zero)
    total = 0.0 if total is None else total
    if math.isinf(total):
        return total
    quotient = rounded(Fraction(total) / Fraction(how.divisor), how.dtype, total)
    return quotient if math.isinf(quotient) else rounded(Fraction(quotient), SINGLE, quotient)


PLAIN = st.floats(width=16, allow_nan=False, allow_infinity=False)
ANY = {
    torch.bfloat16: st.integers(0, 0xFFFF).map(lambda n: _value(n << 16)),
    torch.float16: st.floats(width=16),
    torch.float32: st.floats(width=32),
}


def _value(pattern: int) -> float:
    return float(np.uint32(pattern).view(np.float32))


WEIGHTS = {
    SINGLE: st.sampled_from([0.0, 1.0, 1.0, 2.0, -1.0, 3.0, 7.0, -5.0, 1023.0, 0.5, 0.125]),
    DOUBLE: st.floats(-2, 2, allow_nan=False) | st.sampled_from([0.1, 1 / 3, -0.7, 0.0, 1.0]),
}


@st.composite
def cases(draw: Any) -> tuple[list[torch.Tensor], list[Sum], list[list[torch.dtype]]]:
    """Sources of some dtypes and one length, how up to three outputs are summed, their dtypes."""
    count, numel = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    sources = []
    for _ in range(count):
        dtype = draw(st.sampled_from(list(ANY)))
        few = draw(st.lists(ANY[dtype] | PLAIN, min_size=1, max_size=8))
        sources.append(torch.tensor(few).repeat(numel)[:numel].to(dtype))
    hows, wanted = [], []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from([SINGLE, SINGLE, DOUBLE]))
        weights = draw(st.lists(WEIGHTS[dtype], min_size=count, max_size=count))
        divisor = draw(st.sampled_from([1.0, 2.0, 3.0, 10.0, 55.0])) if dtype == SINGLE else 1.0
        hows.append(Sum(tuple(weights), divisor, dtype))
        own = draw(st.sets(st.sampled_from([*HALF, SINGLE]), min_size=1))
        wanted.append(sorted(own, key=str) + ([DOUBLE] if dtype == DOUBLE else []))
    return sources, hows, wanted


@needs_kernel
@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_kernel_gives_the_bits_of_torch(case: Any) -> None:
    sources, hows, wanted = case
    theirs, finite = averaged(TORCH, sources, hows, wanted)
    for kernel in COMPILED:
        ours, is_finite = averaged(kernel, sources, hows, wanted)
        assert is_finite == finite, kernel
        for one, other in zip(flat(ours), flat(theirs), strict=True):
            assert torch.equal(bits(one), bits(other)), (kernel, one, other)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_torch_gives_what_the_definition_says(case: Any) -> None:
    sources, hows, _ = case
    sources = [torch.nan_to_num(each, 1.0, 1.0, 1.0) for each in sources]
    wanted: list[list[torch.dtype]] = [[SINGLE, *HALF]] * len(hows)
    made, finite = averaged(TORCH, sources, hows, wanted)
    all_finite = True
    for how, (single, *halves) in zip(hows, made, strict=True):
        for place in range(sources[0].numel()):
            expected = exact_average([float(each[place]) for each in sources], how)
            if math.isinf(expected) or math.isnan(float(single[place])):
                all_finite = False  # what follows an overflow is not finite; which, is no promise
                assert not math.isfinite(float(single[place]))
                continue
            assert str(float(single[place])) == str(expected)
            for half in halves:
                nearest = rounded(Fraction(expected), half.dtype, expected)
                assert str(float(half[place])) == str(nearest)
                all_finite &= math.isfinite(nearest)
    assert finite == all_finite


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("stored", [*HALF, SINGLE])
def test_emulated_fused_multiply_add_is_the_real_one(
    stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without the instruction, torch is made to round once as well."""
    generator = torch.Generator().manual_seed(1)
    scales = 2.0 ** torch.randint(-12, 12, (3, 5000), generator=generator)
    sources = [(torch.randn(5000, generator=generator) * s).to(stored) for s in scales]
    weights = (1.0, 3.0, -1.0 / 3.0) if dtype == DOUBLE else (1.0, 3.0, 11184811.0)
    how = Sum(weights, 1.0, dtype)
    expected = [
        exact_average([float(each[place]) for each in sources], how) for place in range(5000)
    ]
    for fused in (True, False):
        if fused and not sums._is_fused(dtype, stored, "cpu"):
            continue
        if not fused:
            monkeypatch.setattr(sums, "_is_fused", lambda *_: False)
        ((single,),), _ = averaged(TORCH, sources, [how], [[SINGLE]])
        assert single.tolist() == expected


@needs_kernel
@pytest.mark.parametrize("stored", [*HALF, SINGLE])
@pytest.mark.parametrize("numel", [1, 2047, 2048, 2049, 100_003])
def test_chunks_and_their_ends(stored: torch.dtype, numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    sources = [torch.randn(numel, generator=generator).to(stored) for _ in range(5)]
    hows = [
        Sum.of([0.2] * 5),
        Sum.of([0.1, 0.2, 0.3, 0.15, 0.25]),
        Sum.of([0.123, 0.3, 0.077, 0.2, 0.3]),
    ]
    assert [how.dtype for how in hows] == [SINGLE, SINGLE, DOUBLE]
    wanted: list[list[torch.dtype]] = [[SINGLE, *HALF]] * 3
    theirs, _ = averaged(TORCH, sources, hows, wanted)
    for kernel in COMPILED:
        ours, finite = averaged(kernel, sources, hows, wanted)
        assert finite
        assert all(map(torch.equal, flat(ours), flat(theirs))), kernel


@needs_kernel
@pytest.mark.parametrize("dtype", HALF)
def test_every_half_is_read_and_written(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = np.random.default_rng(0)
    random = torch.from_numpy(generator.integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32))
    itself = Sum((1.0,), 1.0, SINGLE)
    around = every.float()
    near = [torch.nextafter(around, torch.tensor(end)) for end in (-math.inf, math.inf)]
    ties = (around.view(torch.int32) + (1 << 12)).view(torch.float32)
    for kernel in COMPILED:
        ((single, half),), finite = averaged(kernel, [every], [itself], [[SINGLE, dtype]])
        assert not finite
        assert torch.equal(bits(single), bits(every.float()))
        assert torch.equal(bits(half), bits(every))
        for values in (random, around, ties, *near):
            ((half,),), _ = averaged(kernel, [values.contiguous()], [itself], [[dtype]])
            assert torch.equal(bits(half), bits(values.to(dtype))), kernel


@pytest.mark.parametrize("kernel", [TORCH, *COMPILED], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70, 4999])
def test_what_is_not_finite_is_noticed(kernel: sums.Kernel, bad: float, place: int) -> None:
    sources = [torch.ones(5000), torch.ones(5000, dtype=torch.bfloat16)]
    how = Sum((1.0, 1.0), 2.0, SINGLE)
    assert averaged(kernel, sources, [how], [[torch.float16]])[1]
    sources[1][place] = bad
    assert not averaged(kernel, sources, [how], [[torch.float16]])[1]
    assert averaged(kernel, sources, [Sum((1.0, 0.0), 1.0, SINGLE)], [[SINGLE]])[1]
    large = [torch.full((5000,), 3e38)] * 2  # finite, though their sum is not
    assert averaged(kernel, large, [Sum((1.0, 0.0), 1.0, SINGLE)], [[SINGLE]])[1]
    assert not averaged(kernel, large, [how], [[SINGLE]])[1]


@pytest.mark.parametrize("values", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4], [0.123, 0.377, 0.2, 0.3]])
@pytest.mark.parametrize("numel", [0, 1, 3_000_017])
def test_whole_tensors_are_averaged_as_blocks_are(
    values: list[float], numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(numel, generator=generator) for _ in values]
    how, out = Sum.of(values), torch.empty(numel)
    how.into(out, sources)
    exact = sum(value * each.double() for value, each in zip(values, sources, strict=True))
    assert torch.allclose(out.double(), torch.as_tensor(exact), rtol=0, atol=1e-6)
    if numel:
        first = slice(0, min(numel, BLOCK_ELEMENTS))
        ((block,),), _ = averaged(TORCH, [each[first] for each in sources], [how], [[SINGLE]])
        assert torch.equal(block, out[first])
    again = torch.empty(numel)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        how.into(again.zero_(), sources)
        assert torch.equal(out, again)
    columns = torch.stack(sources, 1)  # not contiguous, so that torch sums
    how.into(again.zero_(), [columns[:, k] for k in range(len(values))])
    assert torch.equal(out, again)
    monkeypatch.setattr(sums, "KERNEL", TORCH)
    how.into(again.zero_(), sources)
    assert torch.equal(out, again)


@pytest.mark.parametrize("kernel", [TORCH, *COMPILED], ids=str)
@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [
        (torch.float16, 65519.0, 65520.0),
        (torch.bfloat16, 3.3953e38, 3.4e38),
        (torch.float32, 3.4e38, math.inf),
    ],
)
def test_what_becomes_infinite_only_when_it_is_rounded_is_not_finite(
    kernel: sums.Kernel, dtype: torch.dtype, fits: float, too_large: float
) -> None:
    for sign in (1, -1):
        for value, finite in ((fits, True), (too_large, False)):
            source = torch.ones(300)
            source[177] = sign * value
            ((out, whole),), said = averaged(kernel, [source], [ONE], [[dtype, SINGLE]])
            assert said is finite is bool(out.isfinite().all()), (value, dtype)
            assert torch.equal(whole, source)


@needs_kernel
@pytest.mark.parametrize("divisor", [2, 3, 6, 8, 55, 1 << 24])
def test_quotients_are_those_of_a_division(divisor: int) -> None:
    """Powers of two are no division inside; results may be subnormal and ties."""
    random = np.random.default_rng(divisor).integers(0, 1 << 32, 1 << 17, np.uint32)
    small = (random & 0x80FFFFFF) | np.uint32(divisor.bit_length() << 22)
    how = Sum((1.0,), float(divisor), SINGLE)
    for pattern in (random, small, np.array([0, 1 << 31], np.uint32)):
        values = torch.from_numpy(pattern.view(np.float32))
        for kernel in COMPILED:
            ((made,),), _ = averaged(kernel, [values], [how], [[SINGLE]])
            assert torch.equal(bits(made), bits(values / divisor)), kernel


@needs_kernel
@pytest.mark.parametrize("numel", [7, 5000])
def test_the_smallest_numbers_count_whatever_the_application_has_set(numel: int) -> None:
    """`torch.set_flush_denormal` is of the thread: it stays, and an average is what it was."""
    sources = [torch.full((numel,), value) for value in (1e-40, 3e-40)]
    how = Sum((1.0, 1.0), 2.0, SINGLE)
    wanted = averaged(TORCH, sources, [how], [[SINGLE, torch.bfloat16]])[0][0]
    assert all(bool(each.all()) for each in wanted)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such setting")
    try:
        made = [averaged(k, sources, [how], [[SINGLE, torch.bfloat16]])[0][0] for k in COMPILED]
        assert not bool((sources[0] * 1).any())
    finally:
        torch.set_flush_denormal(False)
    assert all(
        torch.equal(bits(a), bits(b)) for each in made for a, b in zip(each, wanted, strict=True)
    )
