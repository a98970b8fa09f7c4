"""Who is at work in a folder of a store is told by the store's clock, not by a machine's."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pma_megatron.storage import claims
from pma_megatron.storage.claims import Claim, ClaimedError, claim, refuse_claimed, renewing
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.posix import PosixStore
from pma_megatron.storage.protocol import Store

SIGN = "run/.pma-uploading"
HOUR_S, PATIENCE_S = 3600.0, 100.0
_NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "s3", "posix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "posix":
        yield PosixStore(tmp_path)
    elif request.param == "s3":
        yield ObjectStore("s3", request.getfixturevalue("bucket"))
    else:
        yield ObjectStore("memory", f"claims-{next(_NUMBERS)}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the clock of this machine, as claims see it, ahead of the store's."""

    def ahead(by_s: float) -> None:
        moved = SimpleNamespace(time=lambda: time.time() + by_s, monotonic=time.monotonic)
        monkeypatch.setattr(claims, "time", moved)

    return ahead


def elsewhere(store: Store, sign: str) -> Claim:
    """The claim of a job on another machine, of which nothing here tells whether it lives."""
    made = claim(store, sign, "its work", {"files": ["a"]})
    made.said["process"] = "another-kernel 1 2 3"
    store.put(sign, json.dumps(made.said).encode())
    return made


@pytest.mark.parametrize("sign", [SIGN, ".pma-lock-watch"])
@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S, 0.0])
def test_a_live_job_is_not_taken_over_by_a_clock(
    store: Store, clock: Callable[[float], None], sign: str, by_s: float
) -> None:
    other = elsewhere(store, sign)
    clock(by_s)
    with pytest.raises(ClaimedError):
        claim(store, sign, "other work", {})
    with pytest.raises(ClaimedError):
        refuse_claimed(store, sign, "other work")
    other.check(store)
    assert [each.key for each in store.listed("")] == [sign]  # nothing is left behind


@pytest.mark.parametrize("by_s", [HOUR_S, 0.0])
def test_a_job_that_is_gone_is_taken_over(
    tmp_path: Path, clock: Callable[[float], None], by_s: float
) -> None:
    store = PosixStore(tmp_path)
    other = elsewhere(store, SIGN)
    last_s = time.time() - claims.FRESH_S - 10
    os.utime(tmp_path / SIGN, (last_s, last_s))
    clock(by_s)
    assert refuse_claimed(store, SIGN, "other work") == other.said
    made = claim(store, SIGN, "other work", {})
    assert not made.new
    with pytest.raises(ClaimedError):
        other.check(store)
    made.check(store)


def test_one_that_is_heard_of_meanwhile_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It renews its claim between the look at it and the look at the clock."""
    store = PosixStore(tmp_path)
    other = elsewhere(store, SIGN)
    last_s = time.time() - claims.FRESH_S - 10
    os.utime(tmp_path / SIGN, (last_s, last_s))
    head = PosixStore.head

    def renewed(self: PosixStore, key: str) -> object:
        if key != SIGN:
            os.utime(tmp_path / SIGN)
        return head(self, key)

    monkeypatch.setattr(PosixStore, "head", renewed)
    with pytest.raises(ClaimedError):
        claim(store, SIGN, "other work", {})
    other.check(store)


def test_a_claim_is_renewed_while_one_request_takes_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more after it, when somebody may remove it."""
    monkeypatch.setattr(claims, "_RENEWED_S", 0.0)
    monkeypatch.setattr(claims, "_LOOKED_S", 0.01)
    made, again = claim(store, SIGN, "its work", {}), threading.Event()
    put = type(store).put

    def noted(self: Store, key: str, data: bytes, *, create: bool = False) -> None:
        put(self, key, data, create=create)  # type: ignore[call-arg, arg-type]
        again.set()

    monkeypatch.setattr(type(store), "put", noted)
    with renewing(made, store):
        assert again.wait(PATIENCE_S)
    made.check(store)
    store.delete([SIGN])
    again.clear()
    assert not again.wait(0.1) and not store.listed("")
    with renewing(made, store):  # it is lost: nothing is put, and whoever asks is told
        pass
    with pytest.raises(ClaimedError):
        made.check(store)
    assert not store.listed("")
