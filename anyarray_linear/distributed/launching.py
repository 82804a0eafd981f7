"""How this process was launched: by which `mpiexec`, on which cores, beside whom."""

from __future__ import annotations

import os

from ..arrays.cores import usable_cores


def launched() -> tuple[int, int]:
    """How many processes `mpiexec` started together, and the number of this one, by what MPICH and Open MPI tell them."""
    for names in (("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        size, rank = (os.environ.get(name, "") for name in names)
        if size.isdecimal() and rank.isdecimal():
            return int(size), int(rank)
    return 1, 0


def seat() -> tuple[set[int], int]:
    """The cores that this process may use, and how many threads its BLAS takes."""
    own = usable_cores()
    given = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return own, next((int(text) for text in given if text.isdecimal() and int(text)), len(own))


def fitting_threads(seats: list[tuple[set[int], int]]) -> int | None:
    """How many BLAS threads each process on a machine should have, where they have more; else `None`."""
    there = set().union(*(own for own, _ in seats))
    fitting = max(1, len(there) // len(seats))
    return fitting if sum(threads for _, threads in seats) > max(len(there), len(seats)) else None


def process_space() -> str:
    """What tells whether two processes see each other by number; `""` where that cannot be told."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except (OSError, AttributeError):
        return ""
