"""Rows that are only ever added, in a file beside the checkpoints, so that these do not grow with them.

A row is a line of JSON, written once. A checkpoint says how much of the file is its own, and the SHA-256 of that; what
follows is of later ones, or of an epoch that was never saved. So each checkpoint in the folder has its rows, and an old row
is trusted no more than a new one: whoever reads any of them has checked them all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import atomic_write, flush, named
from .sealed import MAX_HEADER, CheckpointError, as_json, dumped, excess, told

NAME = "epochs.jsonl"
Row = Mapping[str, Any]


class Journal:
    """The rows of one training, in `folder`, which the caller has locked; it begins with `rows`."""

    def __init__(self, folder: str | os.PathLike[str], rows: Sequence[Row] = ()) -> None:
        import hashlib

        self.path = Path(folder) / NAME
        data = b"".join(map(_line, rows))
        self._count, self._size, self._digest = len(rows), len(data), hashlib.sha256(data)
        if not _is_begun(self.path, data):
            atomic_write(self.path, data, follow=False)

    def keep(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Write those of all `rows` that are not in the file yet, and return what a checkpoint has to say of all of them.

        Raises `TypeError` for a row that JSON cannot hold, `ValueError` for one of millions of entries, and `OSError`.
        """
        new = b"".join(map(_line, rows[self._count :]))
        if new:
            if not self._appended(new):  # somebody has removed it
                atomic_write(self.path, b"".join(map(_line, rows)), follow=False)
            self._digest.update(new)
            self._count, self._size = len(rows), self._size + len(new)
        return {"rows": self._count, "bytes": self._size, "sha256": self._digest.hexdigest()}

    def _appended(self, data: bytes) -> bool:
        """Write `data` behind the rows that are there, and remove what was; `False` if they are not there."""
        try:
            with _opened(self.path, "r+b") as file:
                if file.seek(0, os.SEEK_END) < self._size:
                    return False
                file.truncate(self._size)
                file.seek(self._size)
                file.write(data)
                flush(file, self.path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise named(error, "the history was not written, and the last checkpoint is intact", self.path) from error
        return True


def rows_of(folder: str | os.PathLike[str], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of which a checkpoint in `folder` has `said` what `Journal.keep` returned.

    Raises `CheckpointError` unless they are all there and as they were written.
    """
    import hashlib
    import json

    path, size = Path(folder) / NAME, said.get("bytes")
    try:
        if type(size) is not int or not 0 <= size <= _size_of(path):
            raise CheckpointError(f"{path} is cut short, so the history is not whole")
        lines: list[bytes] = []
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while size > 0 and (line := file.readline(min(size, MAX_HEADER))):
                if reason := excess(len(line), line):
                    raise CheckpointError(f"{path} is refused: in line {len(lines) + 1}, {reason}")
                size -= len(line)
                digest.update(line)
                lines.append(line)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; the history is in it, so copy it with the checkpoints") from None
    if digest.hexdigest() != said.get("sha256") or len(lines) != said.get("rows"):
        raise CheckpointError(f"{path} is damaged: its rows do not have the checksum that they were written with")
    try:
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {told(error)}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{path} is damaged: one of its rows is no JSON object")
    return rows


def _line(row: Row) -> bytes:
    line = dumped(as_json("a row of the history", row)).encode() + b"\n"
    if reason := excess(len(line), line):
        raise ValueError(f"a row of the history is not written: {reason.replace('header', 'line')}; keep less in it")
    return line


def _opened(path: Path, mode: str) -> BinaryIO:
    """The file, if it is one; no link is followed."""
    flags = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK"))
    return open(path, mode, opener=lambda name, given: os.open(name, given | flags))  # type: ignore[return-value]


def _size_of(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{path} is no regular file")
    return status.st_size


def _is_begun(path: Path, data: bytes) -> bool:
    """Whether the file is there, nobody else's by a link, and begins with `data`."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size < len(data):
        return False
    with _opened(path, "rb") as file:
        return file.read(len(data)) == data
