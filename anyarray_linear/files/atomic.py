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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .offered import if_offered

_CHUNK = 1 << 20
_UNSURE = "a power cut could undo what was written here last, as it cannot be flushed"
_PART = re.compile(r"\.[0-9a-f]{12}\.part")  # the name of a file that is being written


def atomic_write(
    path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], object], *, follow: bool = True
) -> None:
    """Write `data` to the file `path`, so that a crash at any moment leaves either the old file or the new one.

    data: the bytes, or a function that writes them to a binary file it is given: `lambda file: np.save(file, x)`.
    follow: what happens to a `path` that is a symbolic link. It stays one, and what it points to is replaced; but where the
    name is ours and not the user's, `follow=False` replaces the link, which may have come with somebody else's folder.
    A file that was there leaves its permissions, where the file system lets it.

    Raises `OSError` (of the subclass that fits) naming the file; the file that was there is intact then, and nothing else
    is left in the folder.
    """
    folder, name = os.path.split(os.path.realpath(path) if follow else os.path.abspath(path))
    target = Path(os.path.realpath(folder), name)
    if callable(data):
        buffer = io.BytesIO()
        data(buffer)
        data = buffer.getvalue()
    replaced = target.exists() and not target.is_symlink()
    if replaced and not target.is_file():
        if target.is_dir():
            what = "this is no file to be replaced, but a folder; give the name of a file"
            raise IsADirectoryError(errno.EISDIR, what, str(target))
        raise OSError(errno.EINVAL, "this is no file to be replaced", str(target))
    part = target.with_name(f".{os.urandom(6).hex()}.part")
    try:
        try:
            with open(part, "xb") as file:
                if replaced and hasattr(os, "fchmod"):  # what is for one's own eyes stays so
                    with if_offered(target, "the file has the permissions of a new one", errno.EPERM):
                        os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                flush(file, target.parent)
            if not _holds(part, data):
                raise OSError(errno.EIO, "what was read back is not what was written")
            os.replace(part, target)
        except BaseException:  # also an interrupt from the keyboard
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise named(error, "this file was not written, and what was there is unchanged", target) from error
    try:
        _flush_folder(target.parent)
    except OSError as error:
        raise named(error, "this file was written, but a power cut could undo that", target) from error


def named(error: OSError, state: str, target: str | Path) -> OSError:
    """The same error with the file's name, which errors of writing lack, and with what has become of it."""
    return type(error)(error.errno, f"{error.strerror or error}; {state}", str(target))


def flush(file: BinaryIO, folder: str | os.PathLike[str]) -> None:
    """Bring what was written to `file`, in `folder`, to where a power cut does not reach it."""
    file.flush()
    with if_offered(folder, _UNSURE):
        os.fsync(file.fileno())


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
    if os.name == "nt":
        return
    with if_offered(folder, _UNSURE, errno.EBADF, errno.EACCES, errno.EPERM):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half-written in `folder`. Only for who holds its lock: others may be writing."""
    for entry in os.scandir(folder):
        if _PART.fullmatch(entry.name):
            with suppress(OSError):  # it is in nobody's way
                os.unlink(entry)
