"""The processes that contestants compute in: what they are given of the environment, and how one is asked."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""With these OpenBLAS takes kernels and blocks for a processor that is not there."""
TELLING = r"(OPENBLAS|OMP|MKL|GOTO|BLIS|VECLIB|NUMBA|XLA|CUPY|CUDA|ANYARRAY)_"
"""How environment variables start that change what is measured: they are told with the figures."""
WORKER = [sys.executable, "-m", "benchmarks.worker"]


class Failed(Exception):
    """What a contestant's process answered instead of a result."""


def environment(**more: str) -> dict[str, str]:
    """For a process that measures: the caller's variables without `UNSET`; this clone is imported, wherever it starts."""
    given = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = os.pathsep.join(filter(None, (str(ROOT), given.get("PYTHONPATH"))))
    return {**given, "PYTHONPATH": path, **more}


def telling() -> dict[str, str]:
    """The environment variables that change what is measured."""
    return {name: value for name, value in sorted(environment().items()) if re.match(TELLING, name)}


def ends_with_its_parent() -> None:
    """Have this process killed when the one that started it ends, or stopped processes would stay behind."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def answer_of(*arguments: str, **more: str) -> dict[str, Any]:
    """What `python ARGUMENTS` prints as its last line, as JSON; `more` is set in its environment."""
    done = subprocess.run([sys.executable, *arguments], env=environment(**more), capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"python {' '.join(arguments)}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class Worker:
    """The process of one contestant, which is stopped whenever nothing is asked of it."""

    def __init__(self, name: str, device: str, log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*WORKER, name, device], env=environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip
        try:
            hello = self._answer()
        except BaseException:
            self.__exit__()
            raise
        self.version: str = hello["version"]
        self.kinds: list[str] = hello["kinds"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises `Failed` with the worker's reason."""
        assert self.process.stdin is not None
        self._signal("SIGCONT")
        with suppress(BrokenPipeError):  # reading the answer says what happened
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"its process ended with code {self.process.wait()}: {' '.join(said) or 'it said nothing'}")
        self._signal("SIGSTOP")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # not on Windows
            self.process.send_signal(getattr(signal, name))
