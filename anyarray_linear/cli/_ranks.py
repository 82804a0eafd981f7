"""`--processes N`: the same command line in N processes on this machine."""

from __future__ import annotations

import os
import signal
import sys

from ..arrays import cards, doctor
from ..distributed.group import Group
from ..distributed.launching import EXPECTED, launch, launched
from ..distributed.supervising import StartedRanks
from ._common import bad


def start(count: int, transport: str | None, device: str) -> None:
    """In place of this process, start the command in `count` of them, or return if there is to be one, or this is one.

    transport: as `--distributed`; by default NCCL for CUDA, where CuPy has it, else MPI. NCCL needs no MPI: this process
    starts the ranks then, and stays to look after them.
    """
    if EXPECTED in os.environ:
        return
    if launched()[0] > 1:
        raise bad("processes", "it starts the processes itself; leave out mpiexec, or give --distributed mpi in its place")
    if count == 1:
        return
    device = os.environ.get("ANYARRAY_DEVICE", device) if device == "auto" else device
    found = 0 if device == "cpu" else doctor.count()
    if device.startswith("cuda:"):
        raise bad("processes", f"--device is {device}, and each process has a card of its own; give --device cuda")
    if found and count > found:
        there = "is 1 CUDA device" if found == 1 else f"are {found} CUDA devices"
        raise bad("processes", f"it is {count}, and there {there}, one for each; give --processes {found} or --device cpu")
    arguments, module = sys.argv[1:], __name__.partition(".")[0]
    if transport is None:
        transport = "nccl" if found and cards.has_nccl() else "mpi"
        arguments += ["--distributed", transport]
    if transport == "mpi":
        launch(count, module, arguments)
    raise SystemExit(_looked_after(StartedRanks(count, module, arguments)))


def _looked_after(ranks: StartedRanks) -> int:
    """The exit code of the ranks; meanwhile signals to this process are theirs."""
    passed = {number: number for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP"):
        passed[signal.SIGHUP] = signal.SIGTERM  # the terminal has gone: stop, and save

    def pass_on(number: int, frame: object) -> None:
        ranks.pass_on(passed[signal.Signals(number)])

    before = {number: signal.signal(number, pass_on) for number in passed}
    try:
        return ranks.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_size(group: Group) -> None:
    """Raise `RuntimeError` unless the processes that `start` started have found each other."""
    expected = os.environ.get(EXPECTED, "")
    if expected and group.size != int(expected):
        raise RuntimeError(
            f"{expected} processes were started, and this one sees {group.size}: the mpiexec that was found is not of the "
            "MPI that mpi4py loads; install one beside this Python, pip install mpich, or use the other's mpiexec yourself"
        )
