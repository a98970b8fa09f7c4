"""What a rank makes of one that is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from pma_megatron.base import presence
from pma_megatron.base.presence import Presence


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Presence, Presence]]:
    """This rank, and another one whose process is gone."""
    monkeypatch.setattr(presence, "_own", presence._Own())
    monkeypatch.setattr(presence, "is_gone", lambda process: True)
    store = HashStore()
    yield Presence(store, 0, 2, 1.0, ""), Presence(store, 1, 2, 1.0, "")


@pytest.mark.parametrize("ahead", [0, 1])
def test_who_was_asked_to_end_did_not_die(both: tuple[Presence, Presence], ahead: int) -> None:
    """Whoever came last to a meeting is let out of it first, and may leave before the others
    find out that it is over."""
    here, gone = both
    presence._own.call = 7 + ahead
    gone.leave("rank 1 was stopped by SIGINT", asked=True)
    presence._own.call = 7
    assert here.why_ended() is None


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_who_failed_has_said_is_why(both: tuple[Presence, Presence], ahead: int) -> None:
    here, gone = both
    presence._own.call = 7 + ahead
    gone.leave("rank 1 failed: no space")
    presence._own.call = 7
    assert str(here.why_ended()) == "rank 1 failed: no space"


def test_who_left_without_a_word_died(both: tuple[Presence, Presence]) -> None:
    assert "rank 1 died" in str(both[0].why_ended())
