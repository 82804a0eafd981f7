"""Training steps under NVIDIA's `compute-sanitizer`, if it is here: accesses out of bounds, and races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .answering import SECONDS, tell

TOOLS = "memcheck", "racecheck"


def steps() -> None:
    """A few steps of each dtype: what is checked."""
    import numpy as np

    from anyarray_linear import Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy, TrainingStep, select_device

    device, rng = select_device("cuda:0"), np.random.default_rng(0)
    X, y = rng.standard_normal((33, 17)), device.asarray(rng.integers(10, size=33))
    for dtype in ("float32", "float16"):
        first, last = (Linear(*sizes, dtype=dtype, device=device, seed=0) for sizes in ((17, 31), (31, 10)))
        step = TrainingStep(Sequential(first, ReLU(), last), SoftmaxCrossEntropy(), Adam(clip_norm=1.0))
        for _ in range(5):
            value = step(device.asarray(X, dtype=dtype), y)
        print(dtype, step.how, float(value))


def main() -> None:
    """Tell how many errors each tool found."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), f"{cuda}/bin"]))
    if program is None or not Path(program).exists():
        tell(not_here="compute-sanitizer is not on this machine")
        return
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", __spec__.name, "steps"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(5, SECONDS / len(TOOLS) - 1))
        except subprocess.TimeoutExpired:
            tell(tool=tool, not_here="did not end in its time")
            continue
        print(done.stdout, done.stderr)
        summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", done.stdout)
        if summary is None:
            tell(tool=tool, not_here=" ".join(done.stdout.strip().splitlines()[-2:]))
        elif done.returncode:
            tell(tool=tool, wrong=summary[0])
        else:
            tell(tool=tool, found=summary[0])


if __name__ == "__main__":
    steps() if sys.argv[1:] == ["steps"] else main()
