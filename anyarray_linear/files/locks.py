"""Folders into which one process, and one thread of it, writes at a time."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .atomic import named, sweep
from .offered import if_offered

if sys.platform == "win32":
    import msvcrt
else:
    try:
        import fcntl
    except ImportError:  # a system that is neither
        fcntl = None  # type: ignore[assignment]

_UNLOCKED = "this file system has no locks, so see to it that no other process writes into this folder"
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


if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which no other process, and no other thread of this one, can enter `locked(folder)`.

    The folder is made if need be. The lock goes with its process, however that ends, so nothing stale can block. The thread
    that has it may enter again. Entering removes what a killed process left half-written.

    Where the file system has no locks, only this process is kept out, and a `RuntimeWarning` says so.

    Raises `BlockingIOError` naming the process that has the lock, and `OSError` where `.lock` is no file of ours.
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
        with _locked_file(key):
            sweep(key)
            yield
    finally:
        if os.getpid() == process:  # and not a fork that leaves the block too
            del _held[key]


def _say(descriptor: int, who: str) -> None:
    """Write who has the lock, for others to tell; a full disk does not take it away."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, who.encode())


@contextmanager
def _locked_file(folder: str) -> Iterator[None]:
    """Hold the lock of the file in `folder` that says which process has it."""
    descriptor = _taken(folder)
    process = os.getpid()
    _descriptors.add(descriptor)
    try:
        _say(descriptor, str(process))
        yield
        if os.getpid() == process:
            _say(descriptor, "")
    finally:
        if os.getpid() == process:  # a fork has closed it
            _descriptors.remove(descriptor)
            os.close(descriptor)


def _taken(folder: str) -> int:
    """The descriptor of the file in `folder` that is locked, once it is this process that has locked it."""
    path = os.path.join(folder, ".lock")
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            descriptor = _opened(path)
        except FileNotFoundError:  # the folder has just been removed
            continue
        try:
            pid = _pid(path, descriptor)
            with if_offered(path, _UNLOCKED, errno.ENOLCK, errno.EBADF):
                _lock(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise error if error.filename else named(error, "the folder could not be locked", path) from error
            raise _refusal(folder, f"process {pid}" if pid else "another process") from error
        os.close(descriptor)  # who had it before has removed that file, and a lock of it would keep nobody out


def _opened(path: str) -> int:
    """The descriptor of the lock file, which is made if need be. No link is followed: it could lead to anybody's file."""
    with suppress(FileNotFoundError):
        _check_kind(path, os.lstat(path).st_mode)  # before it is opened, for which a pipe may wait, and a device act
    flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")  # those that there are on this system
    descriptor = os.open(path, sum((getattr(os, flag, 0) for flag in flags), os.O_RDWR | os.O_CREAT), 0o666)
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise _no_lock(path, "a symbolic link" if stat.S_ISLNK(mode) else "no regular file")


def _no_lock(path: str, what: str) -> OSError:
    return OSError(errno.EINVAL, f"this is {what}, and no lock of this library; remove it, or choose another folder", path)


def _pid(path: str, descriptor: int) -> str:
    """The number of the process that has the lock, or had it and was killed."""
    found = os.read(descriptor, 21)
    if len(found) > 20 or not all(b"0" <= found[i : i + 1] <= b"9" for i in range(len(found))):
        raise _no_lock(path, "a file with something else in it")  # perhaps by a hard link; it would be emptied
    return found.decode("ascii")


def _refusal(folder: str | os.PathLike[str], who: str) -> BlockingIOError:
    why = f"{who} is writing into this folder; choose another one, or wait until it has ended"
    return BlockingIOError(errno.EAGAIN, why, os.fspath(folder))


def _lock(descriptor: int) -> None:
    """Lock the file for this process, or raise `OSError` at once."""
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # Windows lets nobody read a locked byte, and the first ones tell who
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    elif fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    else:
        # not lockf: closing any other descriptor of the file, as whoever copies the folder does, would end its lock
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
