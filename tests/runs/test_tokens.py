"""Token counts: parsed, written, read from saved arguments; and the guide by model size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma_megatron.errors import UsageError
from pma_megatron.runs.tokens import consumed_tokens_of, format_tokens, parse_tokens, recommend

B = 10**9


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *[("8B", 8 * B), ("500M", 500_000_000), ("1.5T", 1500 * B), ("250K", 250_000)],
        *[("8_000_000_000", 8 * B), (" 4.194304 b ", 4_194_304_000), ("0.1B", 100_000_000)],
        *[("42", 42), (42, 42), ("1.0", 1), ("0", 0), (0, 0)],
    ],
)
def test_parse_tokens(text, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        *["", "B", "_1", "-8B", "8X", "8BB", "8e9", "nan", "inf", "1__0", "0x10", "٨B", "1.B"],
        *["1,000", "8 9", -1, True, None, 8.0],
    ],
)
def test_parse_tokens_refuses_garbage(text) -> None:
    with pytest.raises(UsageError, match=r"is not a token count: .* as in 8B, 500M"):
        parse_tokens(text)
    with pytest.raises(UsageError, match=r"'1.5' is 1.5 tokens, not a whole number"):
        parse_tokens("1.5")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (8_388_608_000, "8.39B"),
        (8 * B, "8B"),
        (1_408_300_000_000, "1.4083T"),
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (999_999, "1M"),
        (-2 * B, "-2B"),
        (10**16, "10000T"),
    ],
)
def test_format_tokens(tokens: int, text: str) -> None:
    assert format_tokens(tokens) == text


@given(st.integers(0, 10**15))
def test_formatting_loses_no_more_than_it_shows(tokens: int) -> None:
    assert abs(parse_tokens(format_tokens(tokens)) - tokens) <= 0.005 * tokens


SKIPPED = {"skipped_train_samples": 9, "iterations_to_skip": [7]}
BOTH_WAYS = SKIPPED | {"decrease_batch_size_if_needed": True}
ARGS = {"consumed_train_samples": 1000, "seq_length": 4096, "skipped_train_samples": 0}


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 4_096_000),
        ({"rampup_batch_size": ["16", "16", "100"]}, 4_096_000),
        ({"skipped_train_samples": None}, 4_096_000),
        # --iterations-to-skip counts a batch as consumed and as skipped.
        (SKIPPED, 991 * 4096),
        ({"skipped_train_samples": 100}, 900 * 4096),
        # --decrease-batch-size-if-needed counts as skipped what it never consumed.
        ({"skipped_train_samples": 100, "decrease_batch_size_if_needed": True}, 4_096_000),
    ],
)
def test_tokens_are_the_samples_trained_on_times_their_length(changes: dict, tokens: int) -> None:
    assert consumed_tokens_of(ARGS | changes) == (tokens, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"consumed_train_samples": None}, "have no consumed_train_samples"),
        ({"seq_length": None}, "have no seq_length"),
        ({"consumed_train_samples": 0}, "say consumed_train_samples = 0, not a positive integer"),
        ({"seq_length": -1}, "say seq_length = -1"),
        ({"seq_length": "4096"}, "say seq_length = '4096'"),
        ({"skipped_train_samples": -3}, "say skipped_train_samples = -3"),
        ({"skipped_train_samples": 1000}, "nothing was trained on"),
        (BOTH_WAYS, "mixes --iterations-to-skip"),
    ],
)
def test_arguments_that_give_no_count_say_why(changes: dict, reason: str) -> None:
    tokens, because = consumed_tokens_of(ARGS | changes)
    assert tokens is None and because is not None and reason in because


@pytest.mark.parametrize(
    ("active", "total", "kind", "interval", "last"),
    [
        *[(None, 411_000_000, "dense", 2 * B, 6), (None, 2 * B, "dense", 5 * B, 6)],
        *[(8 * B, 8 * B, "dense", 15 * B, 10), (None, 70 * B, "dense", 40 * B, 10)],
        *[(700_000_000, 7 * B, "moe", 4 * B, 10), (1_300_000_000, 13 * B, "moe", 8 * B, 10)],
        *[(10 * B, 100 * B, "moe", 80 * B, 10), (None, 100 * B, "moe", 80 * B, 10)],
        # Halfway in log size is halfway in log interval: sqrt(2*8)=4 -> sqrt(5*15)=8.66.
        (None, 4 * B, "dense", 8_700_000_000, 8),
    ],
)
def test_the_guide_goes_through_the_papers_table(active, total, kind, interval, last) -> None:
    advice = recommend(active, total, kind)
    assert (advice.interval_tokens, advice.last) == (interval, last)
    assert advice.basis.startswith("a guide, interpolated from arXiv 2505.12082")
    assert "outside" not in advice.basis


def test_the_guide_stops_at_the_ends_of_the_table_and_says_so() -> None:
    huge, tiny = recommend(None, 1000 * B, "dense"), recommend(10**6, 10**7, "moe")
    assert (huge.interval_tokens, tiny.interval_tokens) == (40 * B, 4 * B)
    assert "dense, 411M to 70B" in huge.basis and "so taken at 70B" in huge.basis


@given(st.lists(st.integers(10**6, 10**12), min_size=2, max_size=2))
def test_larger_models_never_get_a_shorter_interval(sizes) -> None:
    small, large = (recommend(None, size, "dense") for size in sorted(sizes))
    assert small.interval_tokens <= large.interval_tokens and small.last <= large.last


def test_the_guide_refuses_sizes_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"unknown model kind 'hybrid': choose one of dense, moe"):
        recommend(None, B, "hybrid")
    with pytest.raises(UsageError, match=r"must be positive"):
        recommend(None, 0, "dense")
    with pytest.raises(UsageError, match=r"2B active parameters are more than the total, 1B"):
        recommend(2 * B, B, "moe")
