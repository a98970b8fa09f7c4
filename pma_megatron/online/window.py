"""What a running average remembers on one rank: a ring of entries, or one exponential average.

Nothing here is collective. The weighting is the offline job's (`sums.Sum`), over the same
float32 values, so that the average of a window is, bit for bit, the merge of its iterations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import given, named
from pma_megatron.errors import UsageError
from pma_megatron.merging.coefficients import DECAYS, Coefficients
from pma_megatron.merging.request import Method
from pma_megatron.merging.sums import Sum, fold
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.online.shard import VectorPart
from pma_megatron.runs.tokens import format_tokens, why_incomparable

EMA = "ema"
_FEWEST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One member of the average.

    Attributes:
        iteration: of the run.
        tokens: consumed until then; iterations where the average goes by those.
        samples: consumed until then, at the sequence length that `tokens` counts with; None if
            unknown.
        interval: tokens from one entry to the next as it was taken, None if unknown.
        args: Megatron's arguments as of then, to be stored with it.
        learning_rate: that training went on with, None if unknown; to be stored with it.
        members: how many members it stands for (more than 1 for an exponential average).
    """

    iteration: int
    tokens: int
    samples: int | None = None
    interval: int | None = None
    args: Any = None
    learning_rate: float | None = None
    members: int = 1

    @property
    def consumed_samples(self) -> int | None:
        """For `why_incomparable`, as what follows."""
        return self.samples

    @property
    def consumed_tokens(self) -> int | None:
        """Never None."""
        return self.tokens

    @property
    def tokens_unknown_because(self) -> str | None:
        """Always None."""
        return None

    def describe(self) -> str:
        """The name to use in a message."""
        return f"iteration {self.iteration} ({format_tokens(self.tokens)} tokens)"


@dataclass(frozen=True, eq=False, slots=True)
class WindowAverage:
    """The average as of now, formed tensor by tensor when asked for.

    Attributes:
        entries: what it is made of, oldest first; of an exponential average the newest alone.
        coefficients: how.
        not_by_tokens_because: why the coefficients are made from iterations, where they are made
            from positions and the entries' tokens do not measure them; else None.
        made: slot -> the averaged elements, 1-D float32 on the host; do not change them.
    """

    entries: tuple[Member, ...]
    coefficients: Coefficients | None
    made: Callable[[VectorPart[Any]], torch.Tensor]
    not_by_tokens_because: str | None = None

    def describe(self) -> str:
        """`sma of 3 (iterations 10, 20, 30)`."""
        if self.coefficients is None:
            newest = self.entries[-1]
            return f"{EMA} of {newest.members} (newest: iteration {newest.iteration})"
        numbers = ", ".join(str(entry.iteration) for entry in self.entries)
        return f"{self.coefficients.describe()} of {len(self.entries)} (iterations {numbers})"


class Window:
    """The last N entries, in host memory or in files of a node-local folder.

    `capture` returns at once; everything that reads waits for it first.
    """

    def __init__(
        self, copy: HostCopy, method: Method, last: int, folder: Path | None = None
    ) -> None:
        """Make room for all entries now, so that a job that has too little does not start.

        Raises:
            UsageError: the folder's files cannot be made.
        """
        self.copy, self.method, self.last = copy, method, last
        self._vectors = [_vector(copy.shard.numel, folder, k) for k in range(self._count)]
        self._held: list[tuple[Member, int]] = []
        self._staging = copy.buffer() if self._stages else None
        self._pool = ThreadPoolExecutor(1, "pma-window")
        self._taking: Future[None] | None = None

    @property
    def _count(self) -> int:
        return self.last

    @property
    def _stages(self) -> bool:
        # Pinning the whole ring would take N times the weights away from the system.
        return self.copy.on_gpu

    @property
    def entries(self) -> tuple[Member, ...]:
        """Oldest first."""
        return tuple(entry for entry, _ in self._held)

    def capture(self, entry: Member) -> None:
        """Remember the live main params as of now, in place of the oldest if the ring is full."""
        self.settle()
        target = self._next()
        self.copy.start(target if self._staging is None else self._staging)
        if self._staging is not None:
            self._taking = self._pool.submit(self._take, target, self._staging)
        self._keep(entry, target)

    def settle(self) -> None:
        """Wait until what was captured last is in place."""
        taking, self._taking = self._taking, None
        if taking is not None:
            taking.result()
        else:
            self.copy.wait()

    def vector(self, entry: Member) -> torch.Tensor:
        """The values of an entry, 1-D float32; valid until it drops out."""
        self.settle()
        return self._vectors[next(index for held, index in self._held if held == entry)]

    def restore(self, entry: Member, fill: Callable[[torch.Tensor], None]) -> None:
        """Remember what `fill` writes into a vector, as the newest entry."""
        self.settle()
        target = self._next()
        fill(target)
        self._keep(entry, target)

    def clear(self) -> None:
        """Forget all entries."""
        self.forget(-1)

    def forget(self, since: int) -> None:
        """Forget entries of iteration `since` and later; an exponential average cannot in part."""
        self.settle()
        self._held = [(entry, index) for entry, index in self._held if entry.iteration < since]

    def average(self) -> WindowAverage | None:
        """What the entries average to; None while there are too few."""
        self.settle()
        if self.why_none() is not None:
            return None
        entries = self.entries
        positions, why = _positions(entries)
        made = self.method.of(positions, len(entries))
        how, sources = Sum.of(made.values), [self._vectors[index] for _, index in self._held]

        def average(slot: VectorPart[Any]) -> torch.Tensor:
            out = torch.empty(slot.live.numel, dtype=torch.float32)
            how.into(out, [slot.of(source) for source in sources])
            return out

        return WindowAverage(entries, made, average, why if self.method.name in DECAYS else None)

    def why_none(self) -> str | None:
        """Why there is no average yet, or None."""
        needed = _FEWEST if self.method.values is None else len(self.method.values)
        held = sum(entry.members for entry in self.entries)
        if held < needed:
            return f"{held} of {needed} members"
        positions, why = _positions(self.entries)
        if self.method.name in DECAYS and not positions:
            return (
                f"method {self.method.name!r} needs to know how far apart its members are, and "
                f"iterations do not grow from one to the next, nor can tokens be compared: {why}"
            )
        return None

    def _next(self) -> torch.Tensor:
        used = {index for _, index in self._held}
        free = [index for index in range(len(self._vectors)) if index not in used]
        return self._vectors[free[0] if free else self._held.pop(0)[1]]

    def _keep(self, entry: Member, target: torch.Tensor) -> None:
        index = next(k for k, vector in enumerate(self._vectors) if vector is target)
        self._held.append((entry, index))

    def _take(self, target: torch.Tensor, staging: torch.Tensor) -> None:
        self.copy.wait()
        target.copy_(staging)


class ExponentialAverage(Window):
    """The recursion M <- a x + (1 - a) M, from M = the first entry (arXiv 2505.12082 eq. 4).

    Its only entry is the newest one, with the number of members so far.
    """

    @property
    def _count(self) -> int:
        return 1

    @property
    def _stages(self) -> bool:
        return True

    def capture(self, entry: Member) -> None:
        """Add the live main params as of now."""
        self.settle()
        assert self._staging is not None
        members = self.entries[0].members if self._held else 0
        self.copy.start(self._staging)
        take = self._fold if members else self._take
        self._taking = self._pool.submit(take, self._vectors[0], self._staging)
        self._held = [(replace(entry, members=members + 1), 0)]

    def average(self) -> WindowAverage | None:
        """The average of all entries so far; None before the second."""
        self.settle()
        if self.why_none() is not None:
            return None
        return WindowAverage(self.entries, None, lambda slot: slot.of(self._vectors[0]))

    def _fold(self, target: torch.Tensor, staging: torch.Tensor) -> None:
        assert self.method.alpha is not None
        self.copy.wait()
        fold(target, staging, self.method.alpha)


def make_window(copy: HostCopy, method: Method, last: int, folder: Path | None = None) -> Window:
    """A ring of `last` entries, or an exponential average.

    Raises:
        UsageError: custom coefficients of another number; EMA without alpha; a parameter out of
            range, or of another method; the folder.
    """
    if method.name == EMA:
        if method.alpha is None:
            raise UsageError(f"a running EMA needs {named('alpha')}, the weight of a new member")
        return ExponentialAverage(copy, method, 1, folder)
    if last < _FEWEST:
        raise UsageError(
            f"{named('last')} must be at least {_FEWEST} for a running average, got {last}"
        )
    if method.values is not None and len(method.values) != last:
        raise UsageError(
            f"{len(method.values)} custom coefficients were given for a window of {last}: give one "
            f"per member, oldest first ({named('coefficients')}), or change {named('last')}"
        )
    method.of(range(1, last + 1), last)  # what is out of range must not wait for the first average
    return Window(copy, method, last, folder)


def refuse_remote_window(folder: str | Path | None) -> None:
    """The window is memory of this node: no store can hold it.

    Raises:
        UsageError: it is an address.
    """
    refuse_remote(
        "window_dir",
        folder,
        instead="the window is memory of this node that lies on its disk, is changed in place "
        "while training goes on, and ends with the job: give a folder of a node-local disk. What a "
        "restart goes on with is saved with the averages, which may go to an address",
    )


def _positions(entries: Sequence[Member]) -> tuple[tuple[int, ...], str | None]:
    """How far the run was at each entry, as the offline job sees it, and why not in tokens: tokens,
    or iterations where those cannot be compared, or () where neither grows."""
    why = why_incomparable(entries)
    if why is None:
        return tuple(entry.tokens for entry in entries), None
    iterations = tuple(entry.iteration for entry in entries)
    grows = all(older < newer for older, newer in pairwise(iterations))
    return iterations if grows else (), why


def vectors_needed(method: Method, last: int) -> int:
    """How many vectors the window itself holds."""
    return 1 if method.name == EMA else last


def _vector(numel: int, folder: Path | None, number: int) -> torch.Tensor:
    if folder is None or numel == 0:
        return torch.empty(numel, dtype=torch.float32)
    # Reserved as a whole: a full disk must be an error now, not a signal at the first write. The
    # name goes at once, so that nothing stays behind, however the job ends.
    path = folder / f"pma-window-{os.getpid()}-{number}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, 4 * numel)
        return torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{given('window_dir', folder)}: {4 * numel} bytes cannot be reserved there: {error}"
        ) from error
    finally:
        path.unlink(missing_ok=True)
