"""Ranks over MPI, by mpi4py: what they wait for together, what they hear meanwhile, and how gradients are summed."""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.place import Array
from .group import Group, RankError
from .launching import process_space, seat
from .ranks import Late, Ranks

_GRACE = 5.0  # seconds in which the others must say so too
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has none


def mpi(*, comm: Any = None, timeout: float = 300.0, half: bool = False, device_buffers: bool | None = None) -> Group:
    """The group of all processes that `mpiexec` started, for `fit(..., group=mpi())`.

    comm: an mpi4py communicator, if not all of them. timeout: after so many seconds without a sign of a rank, the others
    stop; it must be longer than the slowest callback and the writing of a checkpoint. half: send gradients as float16 (see
    `docs/distributed_reference.md` for the error and where it pays). device_buffers: whether this MPI takes CUDA memory,
    which is otherwise asked of it; where it does not, gradients go through host memory.

    Every process must call it. Raises `ImportError` without mpi4py.
    """
    return MPIGroup(comm, timeout, half, device_buffers)


class MPIGroup(Ranks):
    """Ranks over mpi4py."""

    def __init__(self, comm: Any, timeout: float, half: bool, device_buffers: bool | None) -> None:
        import socket

        super().__init__(timeout, half)
        self.MPI = _mpi4py()
        self.base = (self.MPI.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = self.base.rank, self.base.size
        here = self.base.Split_type(self.MPI.COMM_TYPE_SHARED)
        self.local_rank, self.seats = here.rank, here.allgather(seat())
        self.device_buffers = self._takes_device_buffers() if device_buffers is None else bool(device_buffers)
        self.places = self.base.allgather((socket.gethostname(), os.getpid()))
        spaces = self.base.allgather((socket.gethostname(), process_space()))
        self._seen = [rank for rank, space in enumerate(spaces) if space == spaces[self.rank] and space[1]]
        self._comm: Any = None  # of what is running now: what a failure leaves unfinished must not meet what comes later
        self._session = 0  # its number, and the tag of the messages about it
        self._joined = 0  # how many collective operations of it this rank has joined
        self._news: dict[int, tuple[int, tuple[int, ...], str]] = {}  # what ranks that stop have said
        self._kept: list[Any] = []  # messages on their way, and what was left unfinished
        self._said = False

    def _takes_device_buffers(self) -> bool:
        """Whether this MPI says that it takes CUDA memory, as MPI 4.1 lets it, or `ANYARRAY_MPI_CUDA=1` says so for it."""
        kinds = self.MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
        return "cuda" in kinds or os.environ.get("ANYARRAY_MPI_CUDA", "0") == "1"

    def _library(self) -> str:
        text = " ".join(self.MPI.Get_library_version().replace("Version:", " ").splitlines()[0].split())
        return text.partition(",")[0].rstrip("\0")

    # -----------------------------------------------------------------------------------------------------------------
    # waiting, and what may be heard meanwhile

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._comm is not None:  # inside another one
            yield
            return
        self._session, self._joined = self._session + 1, 0
        try:
            self._comm, request = self.base.Idup()
            self._complete(request)
            yield
            self.exchange(None)
        except BaseException as error:
            silent = self._part(error)
            if isinstance(error, Late):
                what = f"{self._named(silent)} gave no sign for {self.timeout:.0f} s"
                if not silent:
                    what = (
                        f"some rank was not ready within {self.timeout:.0f} s, and nobody can tell which, for by now all "
                        "answer; if one may take so long, for a callback or a checkpoint, give mpi(timeout=...) more seconds"
                    )
                raise RankError(what, silent) from None
            raise
        finally:
            self._comm = None
            self._news.clear()

    def _complete(self, request: Any, *buffers: Any) -> None:
        """Wait for a collective operation that this rank has just joined."""
        self._joined += 1
        try:
            self._wait(request.Test, self._joined)
        except BaseException:
            self._kept.append((request, buffers))  # MPI may still write to them, and mpi4py does not keep them
            self._staging.clear()
            raise

    def _wait(self, done: Callable[[], bool], number: int) -> None:
        """Wait until it is done. Raises `RankError` when another rank stops, and `Late` after `timeout`.

        number: of the collective operation that is waited for. Whoever stops after having joined it holds up nobody here.
        """
        began = looked = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if waited < 0.002:
                _yield()  # with more ranks than cores, the one that is waited for may need this one
                continue
            self._hear()
            for joined, about, what in self._news.values():
                if not about:  # it has waited too long for what this one waits for
                    raise Late
                if joined < number:
                    raise RankError(what, about)
            if began + waited > looked + 0.5:
                self._look(done)
                looked = time.monotonic()
            if waited > self.timeout:
                raise Late
            time.sleep(0 if waited < 1 else 1e-3)

    def _hear(self) -> None:
        """Note what other ranks have said about why they stop."""
        status = self.MPI.Status()
        while self.base.Iprobe(tag=self._session, status=status):
            self._news[status.source] = self.base.recv(source=status.source, tag=self._session)

    def _look(self, done: Callable[[], bool]) -> None:
        """Raise `RankError` if a process on this machine is no more, and what it should have sent does not come."""
        for rank in self._seen:
            try:
                os.kill(self.places[rank][1], 0)
            except ProcessLookupError:
                time.sleep(0.2)
                if not done():
                    raise RankError(f"{self._named((rank,))} has died", (rank,)) from None
            except PermissionError:
                pass  # it is there, and somebody else's

    def _part(self, error: BaseException) -> tuple[int, ...]:
        """Tell the other ranks why this one stops, and wait a moment for them to say so too; those that did not."""
        about: tuple[int, ...] = (self.rank,)
        what = f"{self._named(about)} stopped: {type(error).__name__}: {error}"
        if isinstance(error, RankError):
            about, what = error.ranks, str(error)
        elif isinstance(error, Late):
            about = ()
        others = set(range(self.size)) - {self.rank}
        until = time.monotonic() + _GRACE
        self._kept += [self.base.isend((self._joined, about, what), rank, self._session) for rank in others]
        while others - self._news.keys() and time.monotonic() < until:
            self._hear()
            time.sleep(1e-3)
        silent = tuple(sorted(others - self._news.keys()))
        ends_all = bool(silent) or self._unfinished()  # and so may cut rank 0 short
        theirs = self._news[0][2] if 0 in self._news else ""
        own, of_rank_0 = (text.partition(" stopped: ")[2] or text for text in (what, theirs))
        self.echoes = own == of_rank_0 and not ends_all
        if ends_all:
            atexit.register(self._abort)
        return silent

    def _unfinished(self) -> bool:
        """Whether something would keep this process from ending, such as a sum that some rank never joined."""
        return False

    def _abort(self) -> None:
        """End all ranks: MPI would wait for those that are silent."""
        self.base.Abort(1)

    def exchange(self, value: Any) -> list[Any]:
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        size = np.asarray([mine.size])
        self._complete(self._comm.Iallgather(size, sizes), size, sizes)
        everyone = np.empty(int(sizes.sum()), np.uint8)
        self._complete(self._comm.Iallgatherv(mine, [everyone, sizes]), mine, everyone, sizes)
        return [pickle.loads(part.tobytes()) for part in np.split(everyone, np.cumsum(sizes)[:-1])]

    # -----------------------------------------------------------------------------------------------------------------
    # the gradients

    def _summed(self, x: Array, flagged: bool) -> tuple[Array, float]:
        place = Device.of(x)
        if place.kind != "cuda":
            host = place.to_numpy(x)
            host = host if host.flags.writeable else host.copy()
            self._complete(self._comm.Iallreduce(self.MPI.IN_PLACE, host), host)
            return place.asarray(host), float(host[-1])
        if self.device_buffers:
            import cupy

            cupy.cuda.get_current_stream().synchronize()  # MPI knows no streams, and would send what is not there yet
            self._complete(self._comm.Iallreduce(self.MPI.IN_PLACE, x), x)
            return x, float(x[-1])
        host = self._pinned(x)
        x.get(out=host)  # which waits for the stream
        self._complete(self._comm.Iallreduce(self.MPI.IN_PLACE, host), host)
        x.set(host)
        return x, float(host[-1])

    def _pinned(self, x: Array) -> Any:
        """Page-locked memory on the host for `x`, the same each time."""
        import logging

        import cupyx

        if not self._said and self.rank == 0:
            logging.getLogger(__name__).warning(
                "%s does not say that it is CUDA-aware, so gradients go through host memory; "
                "if it is, set ANYARRAY_MPI_CUDA=1",
                self._library(),
            )
        self._said = True
        key = x.size, x.dtype.char
        if key not in self._staging:
            self._staging[key] = cupyx.empty_pinned(x.shape, x.dtype)
        return self._staging[key]


def _mpi4py() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            'several processes need mpi4py and an MPI: pip install "anyarray_linear[mpi]", and for want of an MPI '
            f"pip install mpich ({error})"
        ) from error
    return MPI
