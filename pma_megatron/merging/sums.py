"""The one loop that multiplies a weight by a coefficient: sums of blocks, in C or with torch.

`average` is that loop. It runs in C (`_kernel.c`) where the package was installed with a compiler,
with the best instructions that the processor has; otherwise, and for dtypes that the kernel does
not know, with torch. Both give the same bits, and so does every instruction set:

    sum      the first source whose weight is not 0, times its weight; every other one is added by a
             fused multiply-add, oldest first: weight times element plus sum, rounded once
    average  the sum divided by the divisor, unless that is 1
    output   the average in each wanted dtype, to nearest, ties to even

Sums are float32, or float64 where a tensor is stored so, or where the coefficients are not exact in
float32. A NaN stays a NaN, but which one is not defined (torch writes another bfloat16 with AVX2
than without).
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pma_megatron.errors import UsageError
from pma_megatron.merging.coefficients import exact_weights
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS, BlockBuffer, BlockBuffers

CHOICE = "PMA_MEGATRON_KERNEL"
"""Environment variable that forces what sums: `avx512`, `avx2`, `portable`, or `torch`."""

LETTERS = {torch.bfloat16: "b", torch.float16: "h", torch.float32: "f", torch.float64: "d"}
"""What the extension calls the dtypes that it knows."""
_THREAD_ELEMENTS = 1 << 20  # fewer are not worth a thread


@dataclass(frozen=True, slots=True)
class Kernel:
    """What sums.

    Attributes:
        compiled: the extension module; None for torch.
        instructions: its instruction set: `avx512`, `avx2`, or `portable`; empty for torch.
        why: why it is torch.
        wrong: what is wrong with what the environment asks for; nothing is summed then.
    """

    compiled: Any = None
    instructions: str = ""
    why: str = ""
    wrong: str = ""

    def refuse(self) -> None:
        """Raise UsageError where the environment asks for what is not there."""
        if self.wrong:
            raise UsageError(self.wrong)

    def __str__(self) -> str:
        if self.compiled is None:
            return f"torch ({self.why})"
        return f"the kernel in C ({self.instructions})"

    @property
    def number(self) -> int:
        """Of the instruction set, as the extension counts."""
        return int(self.compiled.INSTRUCTION_SETS.index(self.instructions))


def choose(wanted: str | None = None) -> Kernel:
    """The best kernel that was compiled and that this processor runs, or the one that is wanted.

    Args:
        wanted: `avx512`, `avx2`, `portable` or `torch`; anything else than None must be there.

    Raises:
        UsageError: the one that is wanted is not there.
    """
    if wanted == "torch":
        return Kernel(why=f"{CHOICE}=torch")
    why = "several times slower than the kernel in C, which was not compiled at installation"
    try:
        compiled = importlib.import_module("pma_megatron.merging._kernel")
        sets: tuple[str, ...] = compiled.INSTRUCTION_SETS
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            why = f"the kernel in C cannot be loaded: {error}"
        if wanted is None:
            return Kernel(why=why)
        sets = ()
    if wanted is not None and wanted not in sets:
        raise UsageError(
            f"{CHOICE}={wanted}: there is torch"
            + "".join(f", {name}" for name in sets)
            + " here"
            + ("" if sets else f" ({why})")
        )
    return Kernel(compiled, wanted or sets[-1])


def _wanted() -> Kernel:
    """What the environment asks for; importing the package fails for no mistake in it."""
    try:
        return choose(os.environ.get(CHOICE) or None)
    except UsageError as error:
        return Kernel(wrong=str(error))


KERNEL = _wanted()
"""What sums in this process."""


@dataclass(frozen=True, slots=True)
class Sum:
    """How one output is summed: sum of weight times source, in `dtype`, divided once."""

    weights: tuple[float, ...]
    divisor: float
    dtype: torch.dtype

    @staticmethod
    def of(values: Sequence[float]) -> Sum:
        """The sum that gives these coefficients."""
        exact = exact_weights(values)
        if exact is None:
            return Sum(tuple(values), 1.0, torch.float64)
        return Sum(tuple(map(float, exact[0])), float(exact[1]), torch.float32)

    def into(self, out: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        """Average whole float32 tensors of one device, oldest first; all are 1-D and as long.

        Gives the bits that a merge of the same tensors gives.

        >>> out = torch.empty(2)
        >>> Sum.of([0.5, 0.5]).into(out, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])])
        >>> out
        tensor([2.0000, 3.5000])
        """
        plain = all(
            each.device.type == "cpu" and each.dtype == torch.float32 and each.stride() == (1,)
            for each in (out, *sources)
        )
        KERNEL.refuse()
        if plain and out.numel() and KERNEL.compiled is not None:
            self._into_compiled(out, sources)
            return
        total = torch.empty(min(out.numel(), BLOCK_ELEMENTS), dtype=self.dtype, device=out.device)
        for first in range(0, out.numel(), BLOCK_ELEMENTS):
            target = out[first : first + BLOCK_ELEMENTS]
            part = total[: target.numel()]
            _sum(part, [each[first : first + BLOCK_ELEMENTS] for each in sources], self)
            target.copy_(part)

    def _into_compiled(self, out: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        whole = [BlockBuffer(each.detach(), each.numel()) for each in (*sources, out)]

        def part(first: int, last: int) -> None:
            *read, written = (each.data[4 * first : 4 * last] for each in whole)
            how = (self.weights, self.divisor, self.dtype == torch.float64, (written,), "f")
            KERNEL.compiled.average(
                KERNEL.number, last - first, tuple(read), "f" * len(read), (how,)
            )

        # No more threads than torch would use.
        threads = max(1, min(torch.get_num_threads(), out.numel() // _THREAD_ELEMENTS))
        edges = [out.numel() * k // threads for k in range(threads + 1)]
        if threads == 1:
            part(*edges)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(part, edges[:-1], edges[1:]))


def average(
    sources: Sequence[BlockBuffer],
    sums: Sequence[Sum],
    outputs: Sequence[Sequence[BlockBuffer]],
    scratch: BlockBuffers,
) -> bool:
    """Sum one block of all sources for every output, divide, and round to every wanted dtype.

    Args:
        sources: oldest first, of as many elements each.
        sums: how each output is summed; a weight per source.
        outputs: per sum, what becomes of its average: a buffer per wanted dtype. A float64 buffer
            gets a float64 sum as it is.
        scratch: what torch needs beside them.

    Returns:
        Whether every average is finite, in the dtype of its sum and in each that it is rounded to.

    Raises:
        UsageError: see `Kernel.refuse`.
    """
    return prepared(sources, sums, outputs, scratch)()


def prepared(
    sources: Sequence[BlockBuffer],
    sums: Sequence[Sum],
    outputs: Sequence[Sequence[BlockBuffer]],
    scratch: BlockBuffers,
) -> Callable[[], bool]:
    """`average` of these buffers, to be called whenever they have been filled again."""
    KERNEL.refuse()
    kinds = None
    if KERNEL.compiled is not None:
        wanted = [[each.tensor.dtype for each in own] for own in outputs]
        kinds = letters_of([each.tensor.dtype for each in sources], sums, wanted)
    if kinds is None:
        return functools.partial(_average_by_torch, sources, sums, outputs, scratch)
    asked = tuple(
        (
            how.weights,
            how.divisor,
            how.dtype == torch.float64,
            tuple(each.data for each in own),
            letters,
        )
        for how, own, letters in zip(sums, outputs, kinds[1], strict=True)
    )
    data = tuple(each.data for each in sources)
    numel = outputs[0][0].numel
    return functools.partial(KERNEL.compiled.average, KERNEL.number, numel, data, kinds[0], asked)


def letters_of(
    sources: Sequence[torch.dtype], sums: Sequence[Sum], outputs: Sequence[Sequence[torch.dtype]]
) -> tuple[str, list[str]] | None:
    """What the extension calls the dtypes of sources and outputs; None if it does not know them."""
    known = set(sources)
    for how, own in zip(sums, outputs, strict=True):
        known |= set(own)
        if how.dtype == torch.float32 and torch.float64 in known:
            return None
    if not known <= LETTERS.keys() or not outputs or not outputs[0]:
        return None
    letters = ["".join(LETTERS[each] for each in own) for own in outputs]
    return "".join(LETTERS[each] for each in sources), letters


def _average_by_torch(
    sources: Sequence[BlockBuffer],
    sums: Sequence[Sum],
    outputs: Sequence[Sequence[BlockBuffer]],
    scratch: BlockBuffers,
) -> bool:
    finite = True
    for how, own in zip(sums, outputs, strict=True):
        finite &= _one_by_torch(sources, how, own, scratch)
    return finite


def _one_by_torch(
    sources: Sequence[BlockBuffer], how: Sum, own: Sequence[BlockBuffer], scratch: BlockBuffers
) -> bool:
    numel = own[0].numel
    by_dtype = {each.tensor.dtype: each.tensor for each in own}

    def room(dtype: torch.dtype) -> torch.Tensor:
        found = by_dtype.get(dtype)
        return scratch.buffer(dtype, numel).tensor if found is None else found

    total, single = room(how.dtype), room(torch.float32)
    _sum(total, [each.tensor for each in sources], how)
    if single is not total:
        single.copy_(total)
    for each in own:
        if each.tensor is not total and each.tensor is not single:
            each.tensor.copy_(single)
    rounded = (each.tensor for each in own if each.tensor.itemsize < total.itemsize)
    return _is_finite(total) and all(map(_is_finite, rounded))


def _is_finite(values: torch.Tensor) -> bool:
    # A sum is finite only if all its terms are: one cheap pass, and a close look if it is not.
    total = values.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(torch.isfinite(values).all())


def _sum(total: torch.Tensor, sources: Sequence[torch.Tensor], how: Sum) -> None:
    """Sum and divide with torch."""
    begun = False
    for source, weight in zip(sources, how.weights, strict=True):
        if weight == 0.0:
            continue
        if not begun:
            total.copy_(source)
            if weight != 1.0:
                total.mul_(weight)
        elif _is_fused(total.dtype, source.dtype, total.device.type):
            total.add_(source, alpha=weight)
        else:
            _add_fused(total, source, weight)
        begun = True
    if not begun:
        total.zero_()
    if how.divisor != 1.0:
        total.div_(how.divisor)


@functools.cache
def _is_fused(total: torch.dtype, source: torch.dtype, device: str) -> bool:
    """Whether torch's `add_(block, alpha=weight)` rounds once here: on x86 it needs AVX2 for it."""
    if device != "cpu" or total not in (torch.float32, torch.float64):
        return True
    last = 2.0**-17 if total == torch.float32 else 2.0**-46
    # (1 + 2^-7) (1 + last) ends in last x 2^-7, half of what a product of this dtype can hold.
    sums = torch.full((67,), -(1 + 2.0**-7 + last), dtype=total)
    sums.add_(torch.full((67,), 1 + 2.0**-7).to(source), alpha=1 + last)
    return bool((sums == last * 2.0**-7).all())


def _add_fused(total: torch.Tensor, block: torch.Tensor, weight: float) -> None:
    """total + weight * block, rounded once, where torch has no instruction for it.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
    rounding to odd", IEEE Transactions on Computers 57 (4), 2008.
    """
    values, before = block.double(), total.double()
    if total.dtype == torch.float32:
        # The product of two float32 is exact in float64, which has more than 2 bits to spare.
        total.copy_(_odd(*_two_sum(values * weight, before)))
        return
    # 24 bits of an element times 27 of a weight are exact, and so is the sum of two such products.
    mantissa, exponent = math.frexp(weight)
    high = math.ldexp(round(math.ldexp(mantissa, 26)), exponent - 26)
    product, product_error = _two_sum(values * high, values * (weight - high))
    low, low_error = _two_sum(before, product_error)
    result, error = _two_sum(product, low)
    rest = _odd(*_two_sum(low_error, error))
    total.copy_(torch.where(torch.isfinite(rest), result + rest, result))


def _two_sum(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 sum and its rounding error, which together are exact."""
    total = one + other
    part = total - one
    return total, (one - (total - part)) + (other - part)


def _odd(total: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """A sum whose last bit is odd unless it is exact; what is not finite stays as it is."""
    bits = total.view(torch.int64)
    moved = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + moved * step).view(torch.float64)


def fold(average: torch.Tensor, member: torch.Tensor, alpha: float) -> None:
    """One step of an exponential average that runs on, in place (arXiv 2505.12082, eq. 4).

    A member that equals the average leaves it as it is to the bit, whatever alpha is.
    """
    average.lerp_(member, alpha)  # average + alpha (member - average)
