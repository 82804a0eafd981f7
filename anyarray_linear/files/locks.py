"""Folders into which one process, and one thread of it, writes at a time."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .atomic import sweep

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

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
