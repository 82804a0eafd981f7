"""Ranks that this process starts itself, one per card of this machine: if one fails, all end, and it is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .launching import NUMBER, environment_of

_GRACE = 5.0  # seconds in which the others may say themselves what is wrong, after one has failed
_LOOK = 0.05


class StartedRanks:
    """`python -m module arguments` in `count` processes, that meet by CuPy's store at a free port of this machine alone.

    Rank 0 alone speaks; what another one says to stderr is shown if it is the one that failed.
    """

    def __init__(self, count: int, module: str, arguments: list[str]) -> None:
        self._count, self._command = count, [sys.executable, "-m", module, *arguments]
        self._passed: set[int] = set()
        self._folder = tempfile.TemporaryDirectory()
        self.processes: list[subprocess.Popen[bytes]] = []

    def _start(self) -> None:
        meeting = {"CUPYX_DISTRIBUTED_HOST": "127.0.0.1", "CUPYX_DISTRIBUTED_PORT": str(_free_port())}
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for rank in range(self._count):
            command, environment = self._command, {**environment_of(self._count), **meeting, NUMBER: str(rank)}
            # in a session of its own, a signal from the keyboard reaches it once, by `pass_on`
            if rank == 0:
                process = subprocess.Popen(command, env=environment, start_new_session=True)
            else:
                with self._said(rank).open("wb") as said:
                    null = subprocess.DEVNULL
                    process = subprocess.Popen(
                        command, env=environment, stdin=null, stdout=null, stderr=said, start_new_session=True
                    )
            self.processes.append(process)

    def _said(self, rank: int) -> Path:
        return Path(self._folder.name, f"{rank}.txt")

    def pass_on(self, number: int) -> None:
        """Send a signal to all ranks, which stop by it after the step at hand."""
        self._passed.add(number)
        for process in self.processes:
            process.send_signal(number)

    def run(self) -> int:
        """Start them and wait until all have ended, or end them if one failed; the exit code of all, and why to stderr."""
        self._start()
        failed, until = None, 0.0
        while any(process.poll() is None for process in self.processes):
            if failed is None:
                failed = next((rank for rank in range(len(self.processes)) if self._has_failed(rank)), None)
                until = time.monotonic() + _GRACE
            elif time.monotonic() > until:
                break
            time.sleep(_LOOK)
        own = self.processes[0].returncode
        ended = [process.returncode is None for process in self.processes]
        for process in self.processes:
            self._end(process)
        if failed is None:
            failed = next((rank for rank in range(len(self.processes)) if self._has_failed(rank)), None)
        with self._folder:
            if failed is None:
                return max(_status(process.returncode) for process in self.processes)
            code = self.processes[failed].returncode
            if failed == 0 and code > 0:  # it has said why
                return code
            if own and own > 0 and code > 0:  # so it has, and this one was the first to leave for the same
                return own
            how = f"was killed by {_name_of(-code)}" if code < 0 else f"ended with exit code {code}"
            said = "" if failed == 0 else self._said(failed).read_text(errors="replace")
            others = "; the others were ended" if any(ended) else ""
            print(f"{said}rank {failed} (process {self.processes[failed].pid}) {how}{others}", file=sys.stderr)
            return _status(code)

    def _has_failed(self, rank: int) -> bool:
        code = self.processes[rank].poll()
        if not code:
            return False
        return not self._passed & {code - 128, -code}  # by a signal that was passed on, all stop

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it if it is there still, and what it has started: rank 0 has CuPy's store."""
        if process.returncode is None or process.returncode < 0:
            if hasattr(os, "killpg") and hasattr(signal, "SIGKILL"):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])


def _status(code: int) -> int:
    """The exit code of a process as a shell has it."""
    return code if code >= 0 else 128 - code


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
