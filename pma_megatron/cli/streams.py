"""Standard output and error that nobody may be reading: a job does not fail of that.

Without this a closed pipe (`| head -1`), a full disk or a closed descriptor (`2>&-`) would raise
from the line that tells of a merge, after the merge.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class Stream:
    """A text stream that swallows everything after the first error of its file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if anything can be written."""
        return self._tried(self._stream.write, text) or len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write all, if anything can be written."""
        self._tried(self._stream.writelines, lines)

    def flush(self) -> None:
        """Hand on what is buffered, if anything can be written."""
        self._tried(self._stream.flush)

    def close(self) -> str | None:
        """Flush; returns why something was lost, None if nothing was or its reader went away."""
        self.flush()
        lost = self.error is not None and self.error.errno != errno.EPIPE
        return self.error.strerror if self.error is not None and lost else None

    def _tried(self, call: Any, *values: Any) -> Any:
        if self.error is not None:
            return None
        try:
            return call(*values)
        except OSError as error:
            self.error = error
            # What the stream still holds goes nowhere, or the interpreter would fail at its end.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            return None


@contextlib.contextmanager
def forgiving() -> Iterator[Stream]:
    """In the block both streams take everything; yields standard output.

    Descriptors 0 to 2 that are closed are opened, so that no checkpoint becomes one of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names on a disk need not be Unicode
    with Path(os.devnull).open("w") as nowhere:
        output, error = (Stream(stream or nowhere) for stream in before)
        sys.stdout, sys.stderr = output, error
        try:
            yield output
        finally:
            output.flush()
            error.flush()
            sys.stdout, sys.stderr = before
