"""Ranks over MPI whose gradients NCCL sums, through `cupyx.distributed`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..arrays.device import Device
from ..arrays.place import Array
from .group import Group
from .over_mpi import MPIGroup


def nccl(*, timeout: float = 300.0, half: bool = False) -> Group:
    """As `mpi`, with the gradients summed by NCCL through `cupyx.distributed`: one CUDA device for each process.

    A wish to stop takes effect one step later than over MPI, for the host does not wait for the step at hand.

    Every process must call it. Raises `ImportError` without mpi4py, `DeviceUnavailableError` without a device, `RankError`
    where two ranks have one device, and `RuntimeError` where CuPy has no NCCL.
    """
    return NCCLGroup(timeout, half)


class NCCLGroup(MPIGroup):
    """Ranks over mpi4py, whose gradients NCCL sums on their devices, without the host waiting for them."""

    _sums: Any = None

    def __init__(self, timeout: float, half: bool) -> None:
        super().__init__(None, timeout, half, None)
        self._flag: Any = None
        self._place = self.device("cuda")
        with self.running():
            self.claim(self._place)
            import cupyx.distributed
            from cupy.cuda import nccl

            if not nccl.available:
                raise RuntimeError("CuPy finds no NCCL here; install it as CuPy's manual says, or train over MPI alone")
            with self._place:
                self._sums = cupyx.distributed.init_process_group(self.size, self.rank, use_mpi=True)

    def _unfinished(self) -> bool:
        return self._sums is not None

    def _library(self) -> str:
        return f"NCCL and {super()._library()}"

    @contextmanager
    def running(self) -> Iterator[None]:
        self._flag = self._flag if self._comm is not None else None
        with super().running():
            yield

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
        import cupy
        import cupyx

        before = self._flag
        host, event = cupyx.empty_pinned((1,), x.dtype), cupy.cuda.Event(disable_timing=True)
        x[-1:].get(out=host, blocking=False)
        event.record()
        self._flag = host, event, self._joined
        if before is None:
            return 0.0
        host, event, number = before
        self._wait(lambda: event.done, number)
        return float(host[0])
