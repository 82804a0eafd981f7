"""Measures what `distributed_reference.md` states: training steps and all-reduces on 1, 2 and 4 ranks.

    python docs/distributed_scaling.py measured.json      needs mpi4py and an mpiexec; takes some three minutes

One BLAS thread per rank. A figure is the median over the steps of a run, of the slowest rank; and of three runs, the median,
with the smallest and the largest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ((32, 64, 32, 10), (64, 64, 128, 10), (128, 784, 256, 10), (256, 784, 1024, 1024, 10), (64, 1024, 4096, 1024))
SIZES = (2, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 23)  # elements of float32
RUNS, SECONDS = 3, 0.4


class Timed:
    """A group that notes when its `average` begins and ends."""

    def __init__(self, group: Any) -> None:
        self.group, self.marks = group, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def average(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        answer = self.group.average(*arguments)
        self.marks.append((began, time.perf_counter()))
        return answer


def network(sizes: tuple[int, ...]) -> Any:
    from anyarray_linear import Linear, ReLU, Sequential

    layers: list[Any] = []
    for i in range(len(sizes) - 1):
        layers += [Linear(sizes[i], sizes[i + 1], dtype="float32", seed=i), ReLU()]
    return Sequential(*layers[:-1])


def step_times(group: Any, batch: int, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Seconds of a step and of the all-reduce in it, packing included: the median of each run, on the slowest rank."""
    from anyarray_linear import Adam, SoftmaxCrossEntropy, fit

    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"step": [], "average": []}
    model, optimizer, loss, steps = network(sizes), Adam(), SoftmaxCrossEntropy(), 30
    for run in range(RUNS + 1):
        timed = Timed(group)
        X = rng.standard_normal((batch * steps, sizes[0]), dtype=np.float32)
        y = rng.integers(sizes[-1], size=len(X))
        fit(model, X, y, loss=loss, optimizer=optimizer, epochs=1, batch_size=batch, progress=False, group=timed)
        begins, ends = (np.asarray(each) for each in zip(*timed.marks, strict=True))
        mine = statistics.median(np.diff(begins)), statistics.median(ends - begins)
        with group.running():
            step, average = max(group.exchange(mine))
        if run:
            found["step"].append(step)
            found["average"].append(average)
        else:  # warm by now
            steps = max(20, min(400, round(SECONDS / step), 200_000_000 // (4 * batch * sizes[0])))
    return found


def all_reduces(group: Any) -> dict[int, float]:
    """Seconds of a bare all-reduce by its bytes."""
    found = {}
    for size in SIZES:
        x, seconds = np.zeros(size, np.float32), []
        with group.running():
            for _ in range(max(8, min(400, 8_000_000 // size))):
                group._comm.Barrier()
                began = time.perf_counter()
                group._complete(group._comm.Iallreduce(group.MPI.IN_PLACE, x), x)
                seconds.append(time.perf_counter() - began)
            found[x.nbytes] = max(group.exchange(statistics.median(seconds)))
    return found


def all_done(requests: list[Any]) -> bool:
    """Whether all are complete. Each is asked, for that is when MPI moves on."""
    answers = [request.Test() for request in requests]
    return all(answers)


def overlaps(group: Any, batch: int, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Seconds of backward and all-reduce: one message afterwards, or one per array, afterwards or as soon as it is there."""
    model, packed, found = network(sizes), None, {"after": [], "apart": [], "overlapped": []}
    X = np.random.default_rng(group.rank).standard_normal((batch, sizes[0]), dtype=np.float32)
    Z, caches = model.forward(X)
    with group.running():
        for _ in range(60):
            for way, seconds in found.items():
                group._comm.Barrier()
                began, dZ, gradients, requests = time.perf_counter(), Z, [], []
                for i in reversed(range(len(model))):
                    dZ, more = model[i].gradients(dZ, caches[i], needs_dX=i > 0)
                    gradients += [dW.reshape(-1) for dW in more.values()]
                    if way == "overlapped":
                        requests += [group._comm.Iallreduce(group.MPI.IN_PLACE, dW) for dW in more.values()]
                        all_done(requests)
                if way == "apart":
                    requests = [group._comm.Iallreduce(group.MPI.IN_PLACE, dW) for dW in gradients]
                if requests:
                    group._wait(partial(all_done, requests), group._joined)
                else:
                    packed = np.concatenate(gradients, out=packed)  # the same memory each time
                    group._complete(group._comm.Iallreduce(group.MPI.IN_PLACE, packed), packed)
                seconds.append(time.perf_counter() - began)
        return {way: group.exchange(statistics.median(seconds))[0] for way, seconds in found.items()}


def measure(path: str) -> None:
    """What each rank does; rank 0 writes."""
    from anyarray_linear.distributed import Group, mpi

    found: dict[str, Any] = {"strong": [], "weak": [], "share": []}
    group = mpi()
    one = Group() if group.size == 1 else group  # as without a group
    for batch, *sizes in SHAPES:
        found["strong"].append(step_times(one, batch, tuple(sizes)))
        if group.size > 1:
            found["weak"].append(step_times(one, batch * group.size, tuple(sizes)))
        else:  # what a rank of 2 and of 4 has to compute
            found["share"].append([step_times(one, batch // P, tuple(sizes)) for P in (2, 4)])
    if group.size > 1:
        found["all_reduce"] = all_reduces(group)
    if group.size == 2:
        found["overlap"] = [overlaps(group, batch // 2, tuple(sizes)) for batch, *sizes in SHAPES]
        group.half = True
        found["half"] = [step_times(group, batch, tuple(sizes)) for batch, *sizes in SHAPES[3:]]
    if group.rank == 0:
        Path(path).write_text(json.dumps(found))


def main(path: str) -> None:
    """Run `measure` on 1, 2 and 4 ranks, each bound to a core where mpiexec can do that."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2, 4):
            part = Path(folder, f"{size}.json")
            command = [mpiexec, "-bind-to", "core", "-n", str(size), sys.executable, __file__, "--rank", str(part)]
            subprocess.run(command, env=environment, check=True)
            found[size] = json.loads(part.read_text())
    Path(path).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    measure(sys.argv[2]) if sys.argv[1] == "--rank" else main(sys.argv[1])
