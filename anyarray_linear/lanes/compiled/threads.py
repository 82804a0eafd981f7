"""The pool: native threads that help with a program, and sleep when there is none.

They know nothing of Python: they hold no interpreter, end with the process, and are there for a thread that outlives the
main one. A program runs alone where the pool is at work for another thread's step, or where the system has no such threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from typing import Any

import numpy as np

from . import layout as at
from .building import Code

_WATCHING = 2000
"""How often a thread looks for the next program before it goes to sleep: some 0.1 ms."""


class Pool:
    """Up to so many threads beside the caller's, for the code of one dtype."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.begin()

    def begin(self) -> None:
        """There is no thread yet: at first, and in the child of a fork, where there is none any more."""
        self.count = 0
        self.lock = threading.Lock()
        """Held by the thread whose step the pool works on."""
        self.memory = np.zeros(at.POOL + 8, np.int64)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.memory))  # its threads look at it until the process ends
        self.address = -(-self.memory.ctypes.data // 64) * 64
        self.offset = (self.address - self.memory.ctypes.data) // 8
        self.library: Any = None

    def grow(self, count: int) -> int:
        """How many there are, of the `count` that are wanted."""
        if count > self.count and self.library is not False:
            with signals_elsewhere():
                while self.count < count and self._start():
                    self.count += 1
        return min(self.count, count)

    def _start(self) -> bool:
        if self.library is None and not self._prepare():
            self.library = False
            return False
        handle = ctypes.c_void_p()
        worker, pool = ctypes.c_void_p(self.code.worker), ctypes.c_void_p(self.address)
        if self.library.pthread_create(ctypes.byref(handle), None, worker, pool):
            return False
        self.library.pthread_detach(handle)
        return True

    def _prepare(self) -> bool:
        """The mutex and the condition that they sleep by."""
        if sys.platform == "win32":
            return False
        library = self.library = ctypes.CDLL(None)
        p = self.memory[self.offset :]
        for index, name in (
            (at.LOCK, "pthread_mutex_lock"), (at.UNLOCK, "pthread_mutex_unlock"),
            (at.WAIT, "pthread_cond_wait"), (at.WAKE, "pthread_cond_broadcast"),
        ):  # fmt: skip
            p[index] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        p[at.PATIENCE] = _WATCHING
        mutex, condition = (ctypes.c_void_p(self.address + 8 * i) for i in (at.MUTEX, at.CONDITION))
        return not library.pthread_mutex_init(mutex, None) and not library.pthread_cond_init(condition, None)


class signals_elsewhere:
    """A context in which new threads get no signals, where there are any: Ctrl-C is for Python's own."""

    def __enter__(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            self.before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def __exit__(self, *exc: object) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


_pools: dict[str, Pool] = {}
_making = threading.Lock()


def pool_for(code: Code) -> Pool:
    """The pool of the process for code of that dtype."""
    with _making:
        if code.name not in _pools:  # the memory of a pool is never freed
            _pools[code.name] = Pool(code)
        return _pools[code.name]


def _forget() -> None:
    global _making
    for pool in _pools.values():
        pool.begin()
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def yielding() -> int:
    """The address of what lets another thread have the core; 0 where there is none."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
