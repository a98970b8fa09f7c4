"""What a merge into a live DeepSpeed engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pma_megatron.base.locations import refuse_remote
from pma_megatron.base.spelling import FrontEnd, keywords
from pma_megatron.live.load import live_request
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.runs.selection import SelectionRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Keyword arguments of `load_merged` and `pma_init`.

    Attributes:
        last, interval_tokens, interval_iterations, tolerance, end_iteration, window_tokens,
            exclude, allow_gaps, iterations: which tags; see `SelectionRequest`.
        paths: exactly these, as folders of tags or as (root, tag) pairs.
        method, alpha, floor, coefficients: how they are weighted; see `Method`.
        optimizer_state: moments become `latest` (the newest source's), `average`, or `reset` (zero,
            and the step count with them).
        share: how replicas divide the reading (`live_load`): `slice`, `source`, `auto` (slice).
        threads: reader threads per rank.
        check_sources: read records whole that are read in part, to compare their checksums.
    """

    last: int | None = None
    interval_tokens: int | None = None
    interval_iterations: int | None = None
    tolerance: float = 0.25
    end_iteration: int | None = None
    window_tokens: int | None = None
    exclude: tuple[int, ...] = ()
    allow_gaps: bool = False
    iterations: tuple[int, ...] | None = None
    paths: Sequence[str | Path | tuple[str, str]] | None = None
    method: str = "sma"
    alpha: float | None = None
    floor: float = 0.0
    coefficients: Sequence[float] | None = None
    optimizer_state: str = "latest"
    share: str = "auto"
    threads: int = 2
    check_sources: bool = False

    def request(self, load: str, resumed: int | None) -> MergeRequest:
        """The sources below `load`, up to `resumed` unless the options name the newest.

        Raises:
            UsageError: values out of range, or that contradict each other.
        """
        chosen = SelectionRequest(
            last=self.last,
            interval_tokens=self.interval_tokens,
            interval_iterations=self.interval_iterations,
            tolerance=self.tolerance,
            end_iteration=self.end_iteration,
            window_tokens=self.window_tokens,
            exclude=tuple(self.exclude),
            allow_gaps=self.allow_gaps,
            iterations=None if self.iterations is None else tuple(self.iterations),
            paths=None if self.paths is None else tuple(map(_folder, self.paths)),
        )
        values = None if self.coefficients is None else tuple(self.coefficients)
        method = Method(name=self.method, alpha=self.alpha, floor=self.floor, values=values)
        return live_request(
            load,
            chosen,
            method,
            self.optimizer_state,
            self.share,
            self.threads,
            self.check_sources,
            resumed,
        )

    def record(self) -> dict[str, Any]:
        """Plain values that tell one command from another."""
        paths = None if self.paths is None else [_folder(path) for path in self.paths]
        plain = asdict(self) | {"paths": paths}
        del plain["check_sources"]  # it makes no other average
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }


OPTIONS = FrontEnd(keywords(field.name for field in fields(Options)))
"""Settings as `load_merged` and `pma_init` spell them."""


def _folder(path: str | Path | tuple[str, str]) -> str:
    parts = path if isinstance(path, tuple) else (path,)
    refuse_remote("paths", *parts)
    return str(Path(*parts))
