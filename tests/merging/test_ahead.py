"""Units that are looked for before their turn come in order, each with what was found of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from pma_megatron.merging import ahead


def units_of(count: int, read_bytes: int = 1) -> Any:
    return [SimpleNamespace(number=number, read_bytes=read_bytes) for number in range(count)]


def found_of(unit: Any, *, is_cold: bool = False) -> Any:
    return SimpleNamespace(number=unit.number, is_cold=is_cold)


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_every_unit_comes_once_in_order_with_what_is_its_own(
    count: int, threads: int, is_cold: bool
) -> None:
    def find(unit: Any) -> Any:
        return None if unit.number % 5 == 4 else found_of(unit, is_cold=is_cold)

    with ThreadPoolExecutor(threads) as scouts:
        came = [
            (unit, wait())
            for unit, wait in ahead.found_ahead(units_of(count), find, scouts, threads)
        ]
    assert [unit.number for unit, _ in came] == [*range(count)]
    assert all(found is None or found.number == unit.number for unit, found in came)


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("threads", [2, 16])
@pytest.mark.parametrize("part", [8, 1, 0.5])
def test_what_is_asked_of_storage_beforehand_is_bounded(
    is_cold: bool, threads: int, part: float
) -> None:
    lock, asked, taken, most = threading.Lock(), [0], [0], [0]
    read_bytes = int(ahead.AHEAD_BYTES / part)

    def find(unit: Any) -> Any:
        with lock:
            asked[0] += unit.read_bytes
            most[0] = max(most[0], asked[0] - taken[0])
        return found_of(unit, is_cold=is_cold)

    with ThreadPoolExecutor(threads) as scouts:
        units = units_of(64, read_bytes)
        for unit, wait in ahead.found_ahead(units, find, scouts, threads):
            wait()
            with lock:
                taken[0] += unit.read_bytes
    # What is being taken, and what was asked for last, are beside what is ahead.
    assert most[0] <= 2 * ahead.AHEAD_BYTES + 2 * read_bytes


def test_a_failure_is_that_of_the_units_it_concerns() -> None:
    def find(unit: Any) -> Any:
        if unit.number == 2:
            raise OSError("gone")
        return found_of(unit, is_cold=True)

    with ThreadPoolExecutor(1) as scouts:
        came = ahead.found_ahead(units_of(6), find, scouts, 1)
        for unit, wait in came:
            if unit.number == 2:
                with pytest.raises(OSError, match="gone"):
                    wait()
                break
            assert wait() is not None
