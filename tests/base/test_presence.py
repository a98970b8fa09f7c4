"""What a rank makes of one that is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from pma_megatron.base import presence
from pma_megatron.base.presence import Presence
from pma_megatron.errors import RankError


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Presence, Presence]]:
    """This rank, and another one whose process is gone."""
    monkeypatch.setattr(presence, "_own", presence._Own())
    monkeypatch.setattr(presence, "is_gone", lambda process: True)
    store = HashStore()
    yield Presence(store, 0, 2, 1.0, ""), Presence(store, 1, 2, 1.0, "")


AHEAD = pytest.mark.parametrize("ahead", [-1, 0, 1])
"""Whoever came last to a meeting is let out of it first, and may leave before the others find out
that it is over; and who is stopped right then has let the others out and not counted it yet."""


@AHEAD
def test_who_was_asked_to_end_did_not_die(both: tuple[Presence, Presence], ahead: int) -> None:
    here, gone = both
    presence._own.call = 7 + ahead
    gone.leave("rank 1 was stopped by SIGINT", asked=True)
    presence._own.call = 7
    assert here.why_ended() is None


@AHEAD
def test_what_who_failed_has_said_is_why(both: tuple[Presence, Presence], ahead: int) -> None:
    here, gone = both
    presence._own.call = 7 + ahead
    gone.leave("rank 1 failed: no space")
    presence._own.call = 7
    assert str(here.why_ended()) == "rank 1 failed: no space"


@AHEAD
def test_nobody_waits_for_who_left(both: tuple[Presence, Presence], ahead: int) -> None:
    here, gone = both
    presence._own.call = 7 + ahead
    gone.leave("rank 1 failed: no space")
    presence._own.call = 7
    with pytest.raises(RankError, match="no space"):
        here.look()
    with pytest.raises(RankError, match="no space"):
        here.meet()


def test_a_word_that_comes_while_one_looks(
    both: tuple[Presence, Presence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the process is gone, so it is looked for after that."""
    here, gone = both

    def leaves(process: str) -> bool:
        gone.leave("rank 1 was stopped by SIGINT", asked=True)
        return True

    monkeypatch.setattr(presence, "is_gone", leaves)
    assert here.why_ended() is None


def test_what_was_given_up_long_ago_ends_nothing(both: tuple[Presence, Presence]) -> None:
    here, gone = both
    gone.leave("rank 1 was stopped by SIGINT", asked=True)
    presence._own.call = 7
    assert "rank 1 died" in str(here.why_ended())
    presence._own.call = 8
    with pytest.raises(RankError, match="died"):  # what was said since then counts
        here.meet()


def test_who_left_without_a_word_died(both: tuple[Presence, Presence]) -> None:
    assert "rank 1 died" in str(both[0].why_ended())
