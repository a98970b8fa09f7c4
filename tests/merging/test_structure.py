"""Every rank finishes what it wrote; nothing is finished twice, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import digests, request_for
from pma_megatron import MergeRequest, SelectionRequest, merge, verify
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PublishError
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging import structure, tasks
from pma_megatron.testing import run_ranks

RANKS = 2


def merging(rank: int, ranks: int, request: MergeRequest) -> tuple[int, int, int]:
    """Merge; how many items this rank finished, of how many it exchanged checksums, and writes."""
    counts = [0, 0, 0]
    gather, made = Comm.gather, structure._write

    def gathered(self: Comm, value: Any) -> Any:
        if isinstance(value, dict) and all(isinstance(key, int) for key in value):
            counts[1] += len(value)
        return gather(self, value)

    def written(*args: Any) -> Any:
        found = made(*args)
        counts[0] += found.items
        return found

    flush = structure._Pending._flush

    def flushed(self: Any) -> None:
        counts[2] += bool(self._data)
        flush(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "UNIT_ELEMENTS", 200)  # of large models, tensors are several units
        patch.setattr(Comm, "gather", gathered)
        patch.setattr(structure, "_write", written)
        patch.setattr(structure._Pending, "_flush", flushed)
        merge(request)
    return counts[0], counts[1], counts[2]


def test_ranks_share_the_finish_and_change_nothing(moe_run: Path, tmp_path: Path) -> None:
    last = SelectionRequest(last=2)
    alone = merge(request_for(moe_run, tmp_path / "alone", selection=last))
    request = request_for(moe_run, tmp_path / "shared", selection=last)
    counts = run_ranks(merging, RANKS, request)
    items = [finished for finished, _, _ in counts]
    assert min(items) > sum(items) // 4
    assert 0 < max(shared for _, shared, _ in counts) < sum(items) // 2
    for finished, _, writes in counts:
        assert writes < 2 * finished  # the end of one and the head of the next are one write
    (one,) = alone.outputs
    other = tmp_path / "shared" / Path(one).name
    mine, theirs = (
        {name: digest for name, digest in digests(Path(made)).items() if name not in OWN_FILES}
        for made in (one, other)
    )
    assert mine == theirs
    verify(str(other))


@pytest.mark.parametrize("change", ["twice", "not at all"])
def test_an_item_that_is_finished_twice_or_not_at_all_publishes_nothing(
    change: str, dense_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = structure._shares

    def wrong(*args: Any) -> Any:
        (layout, *_), (numbers, crc) = args, shares(*args)
        one = next(n for n in numbers if layout.items[n].skeleton is not None)
        others = [n for n in numbers if n != one]
        return (others if change == "not at all" else [one, *numbers]), crc

    monkeypatch.setattr(structure, "_shares", wrong)
    with pytest.raises(PublishError):
        merge(request_for(dense_run, tmp_path / "out", selection=SelectionRequest(last=2)))
    assert not list((tmp_path / "out").glob("iter*"))
