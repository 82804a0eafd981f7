"""Running out of memory: by which names it comes, and what it says to the user."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from . import cards

if TYPE_CHECKING:
    from .device import Device


@contextmanager
def explained_memory(device: Device, cure: str) -> Iterator[None]:
    """Running out of memory says how much was asked for, what was free and what to change, and gives back what was taken."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = str(error) or "an allocation failed"
        if "memory" not in what and "alloc" not in what:  # as CUBLAS_STATUS_NOT_INITIALIZED does not say so
            what = f"out of memory ({what})"
        try:
            free, total = _available(device)
            there = f"{device} had {free / 2**20:,.0f} MiB free of {total / 2**20:,.0f} MiB; "
        except (NotImplementedError, RuntimeError):  # of another namespace, or a card that has no room for the question
            there = ""
        # the frames that failed still hold their arrays; without them, the device's pool can be emptied
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        with suppress(RuntimeError):
            device.empty_cache()
        raise MemoryError(f"{what}; {there}{cure}") from None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: CuPy, torch and JAX say so by other exceptions than `MemoryError` too."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return bool(re.search(_NAMES, str(error)))


_NAMES = (
    "cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED"
    "|CUBLAS_STATUS_NOT_INITIALIZED"  # cuBLAS found no memory for its handle: the card is full
    "|CUDA error: out of memory|can't allocate memory"  # torch
    "|RESOURCE_EXHAUSTED"  # JAX
)


def _available(device: Device) -> tuple[int, int]:
    """What new arrays may take, and all there is, in bytes: their pool in CuPy has some unused, and may have a limit."""
    free, total = device.memory()
    if device.kind == "cuda":
        with device:
            pool = cards.pools()[-1]
            free += pool.free_bytes()
            free = min(free, pool.get_limit() - pool.used_bytes()) if pool.get_limit() else free
    return free, total
