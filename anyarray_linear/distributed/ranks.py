"""What is the same for ranks however they speak: which device each has, and how gradients travel in one buffer."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

from ..arrays import cards, doctor
from ..arrays.device import Device
from ..arrays.place import Array, computing_on, dtype_name
from ..arrays.selection import select_device
from .group import Group, RankError
from .launching import fitting_threads


class Late(Exception):
    """Some rank has not come to what the others wait for."""


class Ranks(Group):
    """Ranks that are processes. How they speak, a class of its own says by `exchange`, `_summed` and `_library`.

    places: the machine and the process id of each. seats: cores and BLAS threads of those on this machine.
    """

    def __init__(self, timeout: float, half: bool) -> None:
        self.timeout, self.half = float(timeout), bool(half)
        self.places: list[tuple[str, int]] = []
        self.seats: list[tuple[set[int], int]] = []
        self._staging: dict[tuple[int, str], Any] = {}
        self._warned = False

    def device(self, spec: Any = "auto") -> Device:
        if spec == "auto":
            spec = os.environ.get("ANYARRAY_DEVICE") or ("cuda" if doctor.count() else "auto")
        # a launcher may let each rank see one card only, which is cuda:0 for all of them
        return select_device(f"cuda:{self.local_rank % max(1, doctor.count())}" if spec == "cuda" else spec)

    def claim(self, device: Device) -> None:
        if device.kind == "cpu":
            self._warn_of_threads()
        if device.kind != "cuda":
            return
        card = cards.load_cupy().cuda.runtime.getDeviceProperties(device.index)["uuid"], device.native.pci_bus_id
        everyone = self.exchange((self.places[self.rank][0], card))
        both = tuple(rank for rank, theirs in enumerate(everyone) if theirs == everyone[self.rank])
        if len(both) > 1:
            raise RankError(
                f"{self._named(both)} have the same device, {device}; start no more ranks on a machine than it has devices, "
                "and let each choose its own: device=group.device()",
                both,
            )

    def _warn_of_threads(self) -> None:
        fitting = fitting_threads(self.seats)
        if fitting is not None and self.rank == 0 and not self._warned:
            most = max(threads for _, threads in self.seats)
            warnings.warn(
                f"{len(self.seats)} ranks on this machine have up to {most} BLAS threads each, more than its cores, and "
                f"slow each other down; start them with OPENBLAS_NUM_THREADS={fitting}",
                stacklevel=2,
            )
        self._warned = True

    def __str__(self) -> str:
        where = ", ".join(f"{rank} is process {pid} on {host}" for rank, (host, pid) in enumerate(self.places))
        return f"{self.size} rank{'s' * (self.size > 1)} over {self._library()}: {where}"

    def _library(self) -> str:
        """By what the ranks speak."""
        raise NotImplementedError

    def _named(self, ranks: tuple[int, ...]) -> str:
        return " and ".join("rank {} (process {} on {})".format(rank, *reversed(self.places[rank])) for rank in ranks)

    def average(
        self, value: Array, gradients: dict[str, Array], wants_stop: bool
    ) -> tuple[Array, dict[str, Array], bool]:
        gradients = {name: gradients[name] for name in sorted(gradients)}  # in one order on all ranks
        first = next(iter(gradients.values()))
        with computing_on(first) as xp:
            packed = [xp.reshape(dW, (-1,)) for dW in gradients.values()]
            exact = xp.float32 if dtype_name(first.dtype) == "float16" else first.dtype  # a loss of 65505 is no infinity
            flag = xp.full((1,), float(wants_stop), dtype=exact, device=Device.of(first).native)
            tail = [xp.astype(xp.reshape(value, (1,)), exact, copy=False), flag]
            if self.half or exact != first.dtype:  # the loss keeps its precision, at the price of a second, small message
                flat, _ = self._summed(xp.astype(self._packed(xp, packed), xp.float16, copy=False), False)
                flat = xp.astype(flat, first.dtype, copy=False)
                last, stop = self._summed(xp.concat(tail), True)
            else:
                flat, stop = self._summed(self._packed(xp, [*packed, *tail]), True)
                last = flat[-2:]
            summed, start = {}, 0
            for name, dW in gradients.items():
                size = int(np.prod(dW.shape))
                summed[name] = xp.reshape(flat[start : start + size], dW.shape)
                start += size
            return xp.astype(xp.reshape(last[:1], ()), value.dtype, copy=False), summed, stop > 0

    def _packed(self, xp: Any, arrays: list[Array]) -> Array:
        """All in one array; on NumPy in the same memory each step, as fresh pages cost more than the copying."""
        if not isinstance(arrays[0], np.ndarray):
            return xp.concat(arrays)
        key = sum(x.size for x in arrays), arrays[0].dtype.char
        if key not in self._staging:
            self._staging[key] = np.empty(*key)
        return np.concatenate(arrays, out=self._staging[key])

    def _summed(self, x: Array, flagged: bool) -> tuple[Array, float]:
        """`x`, which is ours to write to, summed over all ranks, and its last element, of use if that is the flag."""
        raise NotImplementedError
