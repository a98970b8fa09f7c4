"""One file of HTML with everything inside, from what other commands left.

All text goes through the template, which escapes it; only pictures, which this package draws, are
put in as they are. The page allows no script and loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import is_folder, read_source_file, why_closed
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.trainers.saves import checkpoint_in
from pma_megatron.merging.published import published
from pma_megatron.pages import merged, recovered, scored
from pma_megatron.pages.section import COLOURS, Part, Section, shown
from pma_megatron.runs import recovery_log
from pma_megatron.runs.folders import is_checkpoint
from pma_megatron.scores.results import Scores
from pma_megatron.version import __version__

_TEMPLATE = "page.html"
_NOT_WHOLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
_KINDS = (
    "a folder that pma wrote (a merge, an export, a saved running average), a run's folder with "
    f"a {recovery_log.FILE}, what `pma evaluate --out` or `pma forecast --out` wrote, or what "
    "`pma merge --json` or `pma recover --json` printed"
)


def section_of(path: Path, prefix: str, check: Callable[[Path], str] | None = None) -> Section:
    """What a page says of one thing.

    Args:
        path: a folder or a file; see `_KINDS`.
        prefix: for names inside its pictures; letters and digits.
        check: compares every byte of a folder, and says what it found; None looks at sizes alone.

    Raises:
        UsageError: it is none of these.
        CheckpointError, VerifyError: it is damaged.
    """
    if path.name == recovery_log.FILE:
        return recovered.of_log(path.parent, recovery_log.read(path.parent))
    if not is_folder(path):
        return _of_file(path, prefix)
    why = why_closed(path)
    if why is not None:
        raise UsageError(f"{path} cannot be looked into ({why}): ask for the right to")
    log = (path / recovery_log.FILE).is_file()
    try:
        folder = published(path)
    except CheckpointError:
        if not log:
            raise
    else:
        if (folder / MARKER_FILE).is_file():
            compared = None if check is None else check(folder)
            try:
                return merged.of_folder(path, prefix, compared)
            except _NOT_WHOLE as error:
                raise CheckpointError(
                    f"{folder / MARKER_FILE} lacks what a merge says ({error!r}): damaged"
                ) from error
    if log:
        return recovered.of_log(path, recovery_log.read(path))
    raise UsageError(f"{_why_none(path, folder)}: give {_KINDS}")


def _why_none(path: Path, folder: Path) -> str:
    """Why there is no page of a folder, or of the checkpoint that its tracker names."""
    log = f"{path} has no {recovery_log.FILE}"
    if is_checkpoint(folder) or checkpoint_in(folder) is not None:
        no_marker = (
            f"{folder} has no {MARKER_FILE}: training saved it, or that file of an average is gone"
        )
        return no_marker if folder == path.absolute() else f"{log}, and {no_marker}"
    return f"{log}, and nothing in it says that pma wrote it"


def _of_file(path: Path, prefix: str) -> Section:
    try:
        value = json.loads(read_source_file(path))
    except (CheckpointError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give {_KINDS}") from error
    try:
        found = _of_value(value, prefix)
    except _NOT_WHOLE as error:
        raise UsageError(f"{path} is not whole ({error!r}): give {_KINDS}") from error
    if found is None:
        raise UsageError(f"{path} is nothing that there is a page for: give {_KINDS}")
    return found


def _of_value(value: Any, prefix: str) -> Section | None:
    if not isinstance(value, dict):
        return None
    if "forecast" in value:
        return scored.of_forecast(value, prefix)
    if "scores_version" in value:
        return scored.of_scores(Scores.from_json(value), prefix)
    if "onset" in value and "chosen" in value:
        return recovered.of_diagnosis(value)
    if "published" in value and "verification" in value:
        return merged.of_report(value, prefix)
    return None


def rendered(sections: Sequence[Section]) -> bytes:
    """The page, in UTF-8."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda picture: Markup(picture.svg)  # drawn by `pictures`
    text = environment.get_template(_TEMPLATE).render(
        sections=sections,
        colours=COLOURS,
        legend=_used(sections),
        version=__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return text.encode()


def _plain(value: Any) -> Any:
    return value if hasattr(value, "__html__") else shown(value)


def _used(sections: Iterable[Section]) -> tuple[Part, ...]:
    parts = {row.part for s in sections for table in s.tables for row in table.rows}
    return tuple(part for part in Part if part in parts)
