"""Files that are whole or not there, and folders into which one process writes at a time.

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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

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


_held: dict[str, int] = {}  # the thread that holds a folder
_descriptors: set[int] = set()  # of the locked files
_holding = threading.Lock()


def _forget_locks() -> None:
    """A forked process has its parent's descriptors, and with them its locks, which must end with the parent."""
    global _holding
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _held.clear()
    _holding = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which no other process, and no other thread of this one, can enter `locked(folder)`.

    The folder is made if need be. The lock goes with its process, however that ends, so nothing stale can block. The thread
    that has it may enter again. Entering removes what a killed process left half-written.

    Raises `BlockingIOError` naming the process that has the lock.
    """
    key, me, process = os.path.realpath(folder), threading.get_ident(), os.getpid()
    with _holding:
        holder = _held.setdefault(key, -1)
        if holder == -1:
            _held[key] = me
    if holder == me:
        yield
        return
    if holder != -1:  # told apart from another process
        raise _refusal(folder, f"another thread of this process, {process},")
    try:
        with _locked_file(folder):
            sweep(folder)
            yield
    finally:
        if os.getpid() == process:  # and not a fork that leaves the block too
            del _held[key]


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half-written in `folder`. Only for who holds its lock: others may be writing."""
    for entry in os.scandir(folder):
        if _PART.fullmatch(entry.name):
            os.unlink(entry)


@contextmanager
def _locked_file(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of the file in `folder` that says which process has it."""
    descriptor = _taken(folder)
    process = os.getpid()
    _descriptors.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, str(process).encode())
        yield
        if os.getpid() == process:
            os.ftruncate(descriptor, 0)
    finally:
        if os.getpid() == process:  # a fork has closed it
            _descriptors.remove(descriptor)
            os.close(descriptor)


def _taken(folder: str | os.PathLike[str]) -> int:
    """The descriptor of the file in `folder` that is locked, once it is this process that has locked it."""
    path = os.path.join(folder, ".lock")
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder has just been removed
            continue
        try:
            pid = os.read(descriptor, 20).decode("ascii", "replace")
            _lock(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            raise _refusal(folder, f"process {pid}" if pid else "another process") from error
        os.close(descriptor)  # who had it before has removed that file, and a lock of it would keep nobody out


def _refusal(folder: str | os.PathLike[str], who: str) -> BlockingIOError:
    why = f"{who} is writing into this folder; choose another one, or wait until it has ended"
    return BlockingIOError(errno.EAGAIN, why, os.fspath(folder))


def _lock(descriptor: int) -> None:
    """Lock the file for this process, or raise `OSError` at once."""
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # Windows lets nobody read a locked byte, and the first ones tell who
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        # not lockf: closing any other descriptor of the file, as whoever copies the folder does, would end its lock
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
