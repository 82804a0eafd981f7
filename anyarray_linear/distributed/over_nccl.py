"""Ranks whose gradients NCCL sums on their cards, by `cupyx.distributed`; the rest that they say goes over MPI or NCCL."""

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
from .launching import number_here, seat
from .over_mpi import MPIGroup
from .ranks import Ranks


def nccl(*, timeout: float = 300.0, half: bool = False) -> Group:
    """As `mpi`, with the gradients summed by NCCL through `cupyx.distributed`: one CUDA device for each process.

    A wish to stop takes effect one step later than over MPI, for the host does not wait for the step at hand.

    Every process must call it. In processes that `train --processes` started, it needs no MPI: CuPy's own store brings them
    together. Raises `ImportError` without mpi4py elsewhere, `DeviceUnavailableError` without a device, `RankError` where two
    ranks have one device, and `RuntimeError` where CuPy has no NCCL.
    """
    return NCCLGroup(timeout, half) if number_here() is None else CardsGroup(timeout, half)


class _SummedOnCards(Ranks):
    """Ranks whose gradients NCCL sums on their devices, without the host waiting for them."""

    _sums: Any = None
    _flag: Any = None
    _joined = 0
    _place: Device

    def _wait(self, done: Callable[[], bool], number: int) -> None:
        """Wait until it is done, which is of the collective operation of that number."""
        raise NotImplementedError

    def _join(self, **how: Any) -> None:
        """Make the communicator, which belongs to the device of this rank."""
        import cupyx.distributed
        from cupy.cuda import nccl

        if not nccl.available:
            raise RuntimeError("CuPy finds no NCCL here; install it as CuPy's manual says, or train over MPI alone")
        with self._place:
            self._sums = cupyx.distributed.init_process_group(self.size, self.rank, **how)

    def _summed(self, x: Array, flagged: bool) -> tuple[Array, float]:
        if Device.of(x) != self._place:
            raise ValueError(
                f"the gradients are on {Device.of(x)}, but this rank's NCCL is on {self._place}; "
                "build the model with device=group.device()"
            )
        self._joined += 1
        self._sums.all_reduce(x, x)  # on the current stream, as everything before and after it
        return x, self._flag_before(x) if flagged else 0.0

    def _flag_before(self, x: Array) -> float:
        """The last element of the sum *before* this one, which is there by now: so the host never waits for this one."""
        before = self._flag
        self._flag = *_on_its_way(x[-1:]), self._joined
        if before is None:
            return 0.0
        host, done, number = before
        self._wait(done, number)
        return float(host[0])


class NCCLGroup(_SummedOnCards, MPIGroup):
    """Ranks over mpi4py, whose gradients NCCL sums."""

    def __init__(self, timeout: float, half: bool) -> None:
        MPIGroup.__init__(self, None, timeout, half, None)
        self._place = self.device("cuda")
        with self.running():
            self.claim(self._place)
            self._join(use_mpi=True)

    def _wait(self, done: Callable[[], bool], number: int) -> None:
        MPIGroup._wait(self, done, number)

    def _unfinished(self) -> bool:
        return self._sums is not None

    def _library(self) -> str:
        return f"NCCL and {super()._library()}"

    @contextmanager
    def running(self) -> Iterator[None]:
        self._flag = self._flag if self._comm is not None else None
        with super().running():
            yield


class CardsGroup(_SummedOnCards):
    """Ranks that `StartedRanks` are, on the cards of one machine: NCCL carries all, and CuPy's store brought them together.

    Who fails ends its process, and the one that started them ends the others and names it.
    """

    def __init__(self, timeout: float, half: bool) -> None:
        import socket

        super().__init__(timeout, half)
        self.rank, self.size = number_here() or (0, 1)
        self.local_rank, self._is_running = self.rank, False
        self._place = self.device("cuda")
        self._join()  # at the host and port that CuPy reads from the environment
        atexit.register(self._sums.stop)  # or the process with rank 0's store would outlive it
        told = self.exchange(((socket.gethostname(), os.getpid()), seat()))
        self.places, self.seats = [place for place, _ in told], [own for _, own in told]
        self.claim(self._place)

    def _library(self) -> str:
        return "NCCL"

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._is_running:
            yield
            return
        self._is_running, self._flag = True, None
        try:
            yield
            self.exchange(None)
        finally:
            self._is_running = False

    def exchange(self, value: Any) -> list[Any]:
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = self._gathered(np.asarray([mine.size]))[:, 0]
        everyone = self._gathered(np.pad(mine, (0, int(sizes.max()) - mine.size)))
        return [pickle.loads(part[:size].tobytes()) for part, size in zip(everyone, sizes, strict=True)]

    def _gathered(self, mine: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What each rank gave, all of one size, as the rows of an array on the host."""
        import cupy

        with self._place:
            x = cupy.asarray(mine)
            everyone = cupy.empty((self.size, mine.size), mine.dtype)
            self._joined += 1
            self._sums.all_gather(x, everyone, mine.size)
            host, done = _on_its_way(everyone)
            self._wait(done, self._joined)
        return host  # type: ignore[no-any-return]

    def _wait(self, done: Callable[[], bool], number: int) -> None:
        began = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if waited > self.timeout:
                raise RankError(f"some rank gave no sign for {self.timeout:.0f} s; all are ended")
            time.sleep(0 if waited < 1 else 1e-3)


def _on_its_way(x: Array) -> tuple[Any, Callable[[], bool]]:
    """Memory of the host that receives `x` once the stream has come so far, and whether it has."""
    import cupy
    import cupyx

    host, event = cupyx.empty_pinned(x.shape, x.dtype), cupy.cuda.Event(disable_timing=True)
    x.get(out=host, blocking=False)
    event.record()
    return host, lambda: bool(event.done)
