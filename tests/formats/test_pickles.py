"""Pickles without danger: what decodes is what Python's own module would have made, and back.

Hostile ones are in test_hostile.py.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.pickles import add_entry, dump_inert, load_inert

# Sets and bytes are calls in the older protocols: those stay as they are, inert.
KEYS = st.one_of(st.text(max_size=8), st.integers(-(2**70), 2**70), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(KEYS, st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=5),
    ),
    max_leaves=20,
)


class Alone(pickle.Unpickler):
    """Python's own, which may look nothing up."""

    def find_class(self, module: str, name: str) -> Any:
        raise AssertionError(f"{module}.{name} is named, and plain values name nothing")


@given(value=VALUES, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_values_decode_as_python_decodes_them(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found = load_inert(data, what="file")
    assert found == value and repr(found) == repr(value)


@given(value=VALUES)
def test_what_is_written_python_reads_and_we_read_again(value: Any) -> None:
    data = dump_inert(value)
    assert load_inert(data, what="file") == value
    assert Alone(io.BytesIO(data)).load() == value


@given(before=st.dictionaries(st.text(max_size=5), VALUES, max_size=5), value=VALUES)
def test_an_entry_is_added_and_the_others_stay(before: dict[str, Any], value: Any) -> None:
    data = add_entry(dump_inert(before), "new entry", value)
    assert load_inert(data, what="file") == {**before, "new entry": value}


def test_what_two_places_share_is_shared_again() -> None:
    shared = ["x"]
    found = load_inert(dump_inert({"a": shared, "b": shared}), what="file")
    assert found["a"] is found["b"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_pickle_that_ends_early_is_an_error_of_ours(cut: int) -> None:
    data = pickle.dumps({"iteration": 4, "names": ["a", "b"] * 10})
    with pytest.raises(CheckpointError, match=r"common\.pt cannot be read"):
        load_inert(data[:-cut], what="common.pt")
