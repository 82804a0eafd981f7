"""The lines of a text file of numbers, plain or packed by gzip: UTF-8, without comments, and never too long."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, cast

from ._checks import refusal

MAX_LINE = 4 * 2**20
"""Characters; a longer line is refused, so that a file without line ends cannot fill the memory."""
SMALL, MAX_RATIO = 64 * 2**20, 200
"""A packed file that has more characters, and shrank more than this, is taken for a bomb (zeros shrink 1,000 times)."""


class Lines:
    """An iterator over the lines of an open file that are no comments; `number` is that of the last one, from 1.

    A comment is a line that begins with `#`, but not one whose first cell is the `#` alone, as in the header `#,name,age`.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file, self.number = path, file, 0
        self._most = max(SMALL, MAX_RATIO * path.stat().st_size) if path.suffix.lower() == ".gz" else None
        self._read, self._quoted = 0, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while line := self.file.readline(MAX_LINE):
            self.number += 1
            if len(line) == MAX_LINE:
                raise refusal(
                    self.path, f"line {self.number} is longer than {MAX_LINE} characters; put each sample on its own line"
                )
            if "\0" in line:
                raise refusal(self.path, f"line {self.number} holds a NUL byte, so this is no text; save it as CSV UTF-8")
            self._read += len(line)
            if self._most is not None and self._read > self._most:
                raise refusal(self.path, "would unpack to more than 200 times its size, as a zip bomb does; unpack it first")
            if line.startswith("#") and not self._quoted and line[1:2] not in (",", ";", "\t"):
                continue
            if '"' in line:
                self._quoted ^= line.count('"') % 2 == 1
            return line
        raise StopIteration


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """The text of `path`, with its line ends as they are; what goes wrong in reading it is a `DataError`."""
    try:
        packed = path.suffix.lower() == ".gz"
        with cast("IO[bytes]", gzip.open(path)) if packed else path.open("rb") as file:
            yield TextIOWrapper(file, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise refusal(path, f"is not UTF-8 text (it holds the byte 0x{byte:02x}); save it as CSV UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise refusal(path, f"is damaged or no gzip file ({error}); write it again") from error
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror or error}; check its permissions and the disk") from error
    except MemoryError as error:
        raise refusal(path, "does not fit in memory; use fewer samples") from error


def delimiter_of(path: Path, line: str) -> str:
    """What stands between the cells of a table whose first line is given."""
    unquoted = re.sub(r'"[^"]*"', "", line)
    tabs = "\t" in unquoted and ("," not in unquoted or ".tsv" in (each.lower() for each in path.suffixes))
    return "\t" if tabs and ";" not in unquoted else ";" if ";" in unquoted else "\t" if tabs else ","
