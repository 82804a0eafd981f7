"""Whole processes: what an import costs, what starting the command line costs, and how much memory a training takes at most.

Run as `python -m benchmarks.start memory WHO CASE` (for the process of one contestant), it prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cases import CASES, LR, drawn, work
from .processes import answer_of, environment

IMPORTS = {
    "python": "pass",
    "numpy": "import numpy",
    "ours": "import anyarray_linear",
    "torch": "import torch",
    "jax": "import jax",
    "sklearn": "import sklearn.neural_network",
}
TRAIN = ("-m", "anyarray_linear", "train", "--overwrite", "--out")


def seconds(rounds: int, names: list[str]) -> dict[str, list[float]]:
    """Of whole processes, in turns: the imports of `names`, and `train` of the digits from start to end."""
    times: dict[str, list[float]] = {name: [] for name in (*names, "train")}
    with tempfile.TemporaryDirectory() as folder:
        commands = {name: ("-c", IMPORTS[name]) for name in names} | {"train": (*TRAIN, str(Path(folder, "run")))}
        for arguments in commands.values():  # files come into the cache of the machine, and compiled code into its own
            _run(arguments)
        for _ in range(rounds):
            for name, arguments in commands.items():
                start = time.perf_counter()
                _run(arguments)
                times[name].append(time.perf_counter() - start)
    return times


def _run(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)}: {done.stderr.strip()}")


def memory(who: str, name: str) -> dict[str, Any]:
    """Of a few training steps in a process of their own, in bytes: what they added to its peak, and what they must hold."""
    return answer_of("-m", "benchmarks.start", "memory", who, name)


def _memory(who: str, name: str) -> dict[str, Any]:
    from .worker import CONTESTANTS

    case = CASES[name]
    contestant, inputs = CONTESTANTS[who]("cpu"), drawn(case)
    contestant.step(**drawn({"kind": "step", "batch": [8], "sizes": [8, 8, 8]}), lr=LR)[0]()  # libraries load what they need
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is there
    before = _status("VmRSS")
    step = contestant.step(**inputs, lr=LR)[0]
    for _ in range(5):
        value = step()
    getattr(value, "block_until_ready", lambda: None)()
    N, sizes = case["batch"][0], case["sizes"]
    # four arrays of each parameter (weight, gradient, two moments), and what goes forward and comes back between the layers
    held = 4 * (4 * work(case)["bytes_besides"] // (4 * 7) + 2 * N * sum(sizes[1:]))
    return {"added": _status("VmHWM") - before, "held": held}


def _status(name: str) -> int:
    """Of this process, in bytes: `VmRSS`, the memory that it has, or `VmHWM`, the most that it had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(_memory(*sys.argv[2:])))
