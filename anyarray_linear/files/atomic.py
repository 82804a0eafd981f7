"""Files that are whole or not there.

A process may be killed, a disk may fill up and a machine may lose power at any moment. So a file is first written beside
its place, flushed, read back, and only then moved there: whoever looks sees the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20
_PART = re.compile(r"\.[0-9a-f]{12}\.part")  # the name of a file that is being written


def atomic_write(path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `data` to the file `path`, so that a crash at any moment leaves either the old file or the new one.

    data: the bytes, or a function that writes them to a binary file it is given: `lambda file: np.save(file, x)`.
    A `path` that is a symbolic link stays one; what it points to is replaced. A file that was there leaves its permissions.

    Raises `OSError` (of the subclass that fits) naming the file; the file that was there is intact then, and nothing else
    is left in the folder.
    """
    target = Path(os.path.realpath(path))
    if callable(data):
        buffer = io.BytesIO()
        data(buffer)
        data = buffer.getvalue()
    if target.exists() and not target.is_file():
        error = IsADirectoryError if target.is_dir() else OSError
        raise error(errno.EISDIR if target.is_dir() else errno.EINVAL, "this is no file to be replaced", str(target))
    part = target.with_name(f".{os.urandom(6).hex()}.part")
    try:
        try:
            with open(part, "xb") as file:
                if sys.platform != "win32" and target.exists():  # what is for one's own eyes stays so
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not _holds(part, data):
                raise OSError(errno.EIO, "what was read back is not what was written")
            os.replace(part, target)
        except BaseException:  # also an interrupt from the keyboard
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise _named(error, "this file was not written, and what was there is unchanged", target) from error
    try:
        _flush_folder(target.parent)
    except OSError as error:
        raise _named(error, "this file was written, but a power cut could undo that", target) from error


def _named(error: OSError, state: str, target: Path) -> OSError:
    """The same error with the file's name, which errors of writing lack, and with what has become of it."""
    return type(error)(error.errno, f"{error.strerror or error}; {state}", str(target))


def _holds(path: Path, data: bytes) -> bool:
    with open(path, "rb", buffering=0) as file:
        at = 0
        while chunk := file.read(_CHUNK):
            if chunk != data[at : at + len(chunk)]:
                return False
            at += len(chunk)
    return at == len(data)


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; Windows has no call for it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system, such as some network ones, that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half-written in `folder`. Only for who holds its lock: others may be writing."""
    for entry in os.scandir(folder):
        if _PART.fullmatch(entry.name):
            os.unlink(entry)
