"""Text files of metrics, line by line, gzipped ones too."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Generator
from pathlib import Path, PurePath

from pma_megatron.errors import MetricsError

_GZIPPED = (".gz", ".gzip")
_LONGEST = 1 << 24  # characters; a row of any table is far below
_LONGEST_PRINTED = 16_384  # characters; what a trainer prints per iteration is far below


def suffix(path: Path) -> str:
    """The suffix that says what is in a file, whether it is gzipped or not.

    >>> suffix(Path("run.csv.gz")), suffix(Path("run.log"))
    ('.csv', '.log')
    """
    return PurePath(path.stem).suffix if path.suffix in _GZIPPED else path.suffix


def lines(path: Path, newline: str | None = None) -> Generator[str, None, None]:
    """The lines of a text file, with their ends; progress bars end theirs too (`newline` None).

    Raises:
        MetricsError: it is called gzipped and is not, or is cut off; or a line has no end.
        OSError: it cannot be read.
    """
    try:
        zipped = path.suffix in _GZIPPED
        with path.open("rb") as said, gzip.open(said) if zipped else said as raw:
            text = io.TextIOWrapper(raw, "utf-8-sig", errors="replace", newline=newline)
            while line := text.readline(_LONGEST):
                if len(line) == _LONGEST:
                    raise MetricsError(
                        f"{path}: has a line of more than {_LONGEST:,} characters: it is no file "
                        "of metrics by iteration; give the log itself, or a table with a row each"
                    )
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MetricsError(f"{path}: is no whole gzip file ({error}); unpack what there is") from (
            error
        )


def printed(path: Path) -> Generator[str, None, None]:
    """The lines of a text file that a trainer may have printed: without the endless ones."""
    return (line for line in lines(path) if len(line) <= _LONGEST_PRINTED)


def not_printed(path: Path) -> list[str]:
    """What to say of the lines that `printed` leaves out: a sentence, or none."""
    count = sum(len(line) > _LONGEST_PRINTED for line in lines(path))
    said = f"{count} line(s) of more than {_LONGEST_PRINTED:,} characters were not looked at."
    return [said] if count else []
