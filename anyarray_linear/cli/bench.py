"""The `bench` command: how fast this package is beside what a user would pick instead, and beside what the machine can do.

How it measures, on a machine that others use too:

- Each implementation computes in a process of its own, so that no two thread pools meet; while one computes, the others are
  stopped (SIGSTOP), for the threads of some spin while they wait.
- What it computes is compared with ours before it is timed.
- A round asks every implementation once, in an order that rotates from round to round. The answer is the fastest of three
  bursts of at least 20 ms, after a quarter of a burst unmeasured: a disturbance only ever adds time.
- The figure is the median over the rounds, its spread the quartiles; a ratio is theirs / ours, of medians.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from importlib import util
from itertools import compress, pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..arrays import cards
from ..arrays.device import Device
from ..arrays.selection import select_device
from ..files.atomic import atomic_write
from ._bench_worker import BURSTS, COUNTED, DIGITS, cores
from ._common import StopSignals, bad
from ._results import write_json

PEERS = ("numpy", "torch", "jax", "thinc", "sklearn")
"""What this package is compared with: the modules that it takes."""
TITLES = {
    "layer": "Layer, forward and backward",
    "forward": "Layer, forward of three axes; NumPy's product is a batched one",
    "step": "Training step: forward, loss, backward, Adam",
}
LABELS = {"ours": "ours", "numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "thinc": "thinc", "sklearn": "scikit-learn"}
BURST = 0.02
"""Seconds."""
TOLERANCE = 0.05
"""How far a peer's results may be from ours, by the norm of the difference over that of ours. It tells other work from
rounding, and from eps inside or outside of Adam's bias correction; `verify` is the command for exactness."""

_WORKER = [sys.executable, "-m", "anyarray_linear.cli._bench_worker"]
_LAYERS = ((1, 16, 16), (32, 64, 64), (64, 784, 128), (256, 512, 512), (1024, 1024, 1024), (65536, 64, 64))
_STEPS = ((32, 64, 32, 10), (64, 64, 128, 10), (128, 784, 256, 10), (256, 784, 1024, 1024, 10), (64, 1024, 4096, 1024))
CASES: dict[str, dict[str, Any]] = {
    **{f"layer{i}": {"kind": "layer", "batch": [N], "sizes": sizes} for i, (N, *sizes) in enumerate(_LAYERS, 1)},
    "forward1": {"kind": "forward", "batch": [64, 4], "sizes": [256, 256]},
    **{f"step{i}": {"kind": "step", "batch": [N], "sizes": sizes} for i, (N, *sizes) in enumerate(_STEPS, 1)},
}
COUNTED_CASES = CASES | {"step6": {"kind": "step", "batch": [32], "sizes": [64, 128, 64, 10]}}
"""The cases on the CPU stand-in."""
NOT_IN_CASES, NOT_IN_DIGITS = ("sklearn",), ("numpy", "torch", "jax", "thinc")


class Different(Exception):
    """An implementation that computes something else than ours."""


class _Failed(Exception):
    """What a worker's process answered instead of a result."""


def bench(
    device: Annotated[str, typer.Option(metavar="SPEC", help='"cpu", "cuda" or "cuda:N".')] = "cpu",
    peers: Annotated[
        str | None, typer.Option(metavar="A,B", help=f"Of {', '.join(PEERS)}; by default all that are installed.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="A,B", help='Cases by their names or how these start: "layer", "step3", "digits".'),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each is asked; by default 15.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds of short bursts: a look, not a measurement.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a roofline as PNG.")] = None,
) -> None:
    """Time this package beside its peers, and beside the limit of the machine.

    Every implementation has a process of its own; what it computes is checked against ours first; rounds are interleaved.
    Figures are medians with quartiles, in microseconds; ratios are theirs / ours, so that more than 1 is in our favour.
    The limit is the bare matrix products into memory that is there already, and the bytes that must be moved besides, at
    the measured bandwidth. numpy is the textbook formulas, on CUDA in CuPy; sklearn joins in the digits only. All of it
    takes some minutes, on a machine that has nothing else to do.

    Peers that are not installed are left out. pip install "anyarray_linear[bench]" brings all but PyTorch, whose default
    build brings gigabytes of CUDA along: choose one at pytorch.org.

    **Examples**

    - `anyarray-linear bench --quick`
    - `anyarray-linear bench --only layer,step --peers torch,jax --plot roofline.png`
    - `anyarray-linear bench --device cuda --json bench.json`
    """
    place = _place(device)
    stand_in = place.name.startswith("CuPy CPU emulated")
    names, missing = ([], {}) if stand_in else _peers(peers)
    cases, digits = _chosen(only, COUNTED_CASES if stand_in else CASES)
    rounds = rounds or (3 if quick else 15)
    report: dict[str, Any] = {
        "device": str(place),
        "name": place.name,
        "stand_in": stand_in,
        "cautions": cards.cautions(place.index) if place.index is not None else [],
        "machine": _machine(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if re.match(_TELLING, name)},
        "rounds": 0 if stand_in else rounds,
        "estimator": f"median over rounds of the fastest of {BURSTS} bursts; spread: quartiles",
        "versions": {},
        "not_here": missing,
        "complaints": [],
        "roofs": None,
        "cases": {},
        "digits": None,
    }
    for caution in report["cautions"]:
        print(f"caution: {caution}", file=sys.stderr)
    with StopSignals() as stop, ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        workers = {}
        for name in ("ours", *names, *(("limit",) if cases and not stand_in else ())):
            if (name in NOT_IN_CASES and not digits) or (name in NOT_IN_DIGITS and not cases):
                continue
            try:
                workers[name] = stack.enter_context(_Worker(name, str(place), Path(folder, f"{name}.log"), stop))
                report["versions"][name] = workers[name].version
            except _Failed as failed:
                if name not in PEERS:
                    raise RuntimeError(f"{name}: {failed}") from failed
                report["not_here"][name] = str(failed)
        if "limit" in workers:
            report["roofs"] = workers["limit"].ask("roofs", quick=quick)
        race = _Race(workers, report, Path(folder), rounds, BURST / 10 if quick else BURST)
        for name, case in cases.items():
            report["cases"][name] = race.counted(case) if stand_in else race.timed(name, case)
        if digits and not stand_in:
            report["digits"] = race.digits()
    if json_ is not None:
        write_json(json_, report)
    if plot is not None and report["roofs"] is not None:
        atomic_write(plot, lambda file: roofline(report).savefig(file, format="png"))
    _print(report)
    if plot is not None and report["roofs"] is None:
        print(f"{plot} was not drawn, for no case was timed", file=sys.stderr)
    if report["complaints"]:
        raise typer.Exit(1)


_TELLING = r"(OPENBLAS|OMP|MKL|GOTO|BLIS|VECLIB|XLA|CUPY|CUDA|ANYARRAY)_"  # how environment variables that matter start


def _place(spec: str) -> Device:
    try:
        return select_device(spec)
    except ValueError as unknown:
        raise bad("device", str(unknown)) from None


def _peers(asked: str | None) -> tuple[list[str], dict[str, str]]:
    """The peers to compare with, and why others are not among them."""
    names = list(PEERS) if asked is None else [name for name in asked.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise bad("peers", f"there is no {', '.join(unknown)}; give some of {','.join(PEERS)}")
    missing = {name: f"{name} is not installed" for name in names if util.find_spec(name) is None}
    if asked is not None and missing:
        install = "torch" if list(missing) == ["torch"] else '"anyarray_linear[bench]"'
        raise bad("peers", f"{', '.join(missing.values())}; pip install {install}")
    return [name for name in names if name not in missing], missing


def _chosen(only: str | None, cases: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The cases that `--only` gives by how their names start, and whether the digits are among them."""
    names = [*cases, "digits"]
    starts = [""] if only is None else [start for start in only.split(",") if start]
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise bad("only", f"no case starts with {start!r}; there are {', '.join(names)}")
    *chosen, last = (any(name.startswith(start) for start in starts) for name in names)
    return dict(compress(cases.items(), chosen)), last


def _machine() -> dict[str, Any]:
    model = None
    with suppress(OSError):  # only Linux has it
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    }


class _Worker:
    """The process of one implementation, which is stopped whenever nothing is asked of it."""

    def __init__(self, name: str, device: str, log: Path, stop: StopSignals) -> None:
        self.name, self.stop, self.log = name, stop, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*_WORKER, name, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        try:
            self.version: str = self._answer()["version"]
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises `_Failed` with the worker's reason."""
        assert self.process.stdin is not None
        self._signal("SIGCONT")
        with suppress(BrokenPipeError):  # reading the answer says what happened
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if self.stop.is_set():
            raise typer.Exit(self.stop.exit_code)
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise _Failed(f"its process ended with code {self.process.wait()}: {' '.join(said) or 'it said nothing'}")
        self._signal("SIGSTOP")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _Failed(answer["error"])
        return answer

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # not on Windows
            self.process.send_signal(getattr(signal, name))


class _Race:
    """All workers together, case by case."""

    def __init__(
        self, workers: dict[str, _Worker], report: dict[str, Any], folder: Path, rounds: int, burst: float
    ) -> None:
        self.workers, self.report, self.folder, self.rounds, self.burst = workers, report, folder, rounds, burst

    def counted(self, case: dict[str, Any]) -> dict[str, Any]:
        """What our side of a case asks of the device."""
        self.workers["ours"].ask("prepare", case=case, results=None, burst=None)
        return {**case, "counts": self.workers["ours"].ask("count")}

    def timed(self, name: str, case: dict[str, Any]) -> dict[str, Any]:
        """Check and time one case with everybody who can do it."""
        found: dict[str, Any] = {**case, **work(case), "repeats": {}, "left_out": {}}
        able = {}
        for peer, worker in self.workers.items():
            if peer in NOT_IN_CASES:
                continue
            path = self.folder / f"{peer}.npz"
            try:
                answer = worker.ask("prepare", case=case, results=None if peer == "limit" else str(path), burst=self.burst)
                if peer in PEERS:
                    check(LABELS[peer], _loaded(path), _loaded(self.folder / "ours.npz"))
                able[peer], found["repeats"][peer] = worker, answer["repeats"]
            except Different as different:
                self.report["complaints"].append(f"{name}: {different}")
                found["left_out"][peer] = str(different)
            except _Failed as failed:
                if peer not in PEERS:
                    raise RuntimeError(f"{name}: {peer}: {failed}") from failed
                found["left_out"][peer] = str(failed)
        times = _interleaved(able, self.rounds)
        results = {peer: _summary([answer["seconds"] for answer in each]) for peer, each in times.items()}
        products, ours = results.pop("limit"), results["ours"]["median"]
        moved = found["bytes_besides"] / self.report["roofs"]["bytes_per_second"]
        limit = {"products": products, "seconds_of_bytes": moved, "seconds": products["median"] + moved}
        limit["reached"] = limit["seconds"] / ours
        return found | {"results": results, "ratios": _ratios(results), "limit": limit}

    def digits(self) -> dict[str, Any]:
        """Whole trainings, a seed each round."""
        both = {name: worker for name, worker in self.workers.items() if name in ("ours", *NOT_IN_CASES)}
        for worker in both.values():
            worker.ask("digits", seed=0)  # warms up
        times = _interleaved(both, self.rounds, "digits", seed=True)
        results = {name: _summary([each["seconds"] for each in answers]) for name, answers in times.items()}
        for name, answers in times.items():
            results[name]["accuracy"] = _summary([each["accuracy"] for each in answers])
        return {**DIGITS, "results": results, "ratios": _ratios(results)}


def work(case: dict[str, Any]) -> dict[str, int]:
    """What a case must compute and move, in float32.

    `flops` of its matrix products; `bytes` that its inputs and outputs have, each counted once; `bytes_besides`, those that
    the limit adds to the products: bias and its gradient for a layer (`Z` read and written, `dZ` read), for a training step
    the optimizer's (`W`, `dW` and two moments read, all but `dW` written).
    """
    N, sizes = prod(case["batch"]), case["sizes"]
    weights = [n_in * n_out for n_in, n_out in pairwise(sizes)]
    count = sum(weights) + sum(sizes[1:])
    if case["kind"] == "step":
        flops = N * (6 * sum(weights) - 2 * weights[0])
        return {
            "flops": flops,
            "bytes": 4 * (8 * count + N * sizes[0] + 2 * N * sum(sizes[1:])),
            "bytes_besides": 4 * 7 * count,
        }
    passes = 1 if case["kind"] == "forward" else 2  # a backward pass has a gradient for each array of the forward one
    return {
        "flops": (2 if passes == 1 else 6) * N * weights[0],
        "bytes": 4 * passes * (N * sum(sizes) + count),
        "bytes_besides": 4 * (passes + 1) * N * sizes[1],
    }


def check(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise `Different` unless `theirs` are `ours` but for rounding, result by result."""
    for what, expected in ours.items():
        got = theirs.get(what)
        if got is None:
            raise Different(f"{name} gives no {what}")
        if got.size != expected.size:
            raise Different(f"{name} gives a {what} of shape {got.shape}, and ours has {expected.shape}")
        distance = float(np.linalg.norm(got.reshape(expected.shape) - expected)) / float(np.linalg.norm(expected))
        if not distance <= TOLERANCE:
            raise Different(f"{name} computes something else: {what} is {distance:.1%} from ours")


def _loaded(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _interleaved(
    workers: dict[str, _Worker], rounds: int, do: str = "burst", *, seed: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Every worker's answer in each round, asked in an order that rotates."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    names = list(workers)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            answers[name].append(workers[name].ask(do, **({"seed": i} if seed else {})))
    return answers


def _summary(values: list[float]) -> dict[str, Any]:
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "rounds": values}


def _ratios(results: dict[str, Any]) -> dict[str, float]:
    """Theirs / ours, of medians."""
    return {peer: each["median"] / results["ours"]["median"] for peer, each in results.items() if peer != "ours"}


# What is shown -------------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 132), highlight=False)
    where = f"{report['name']} ({report['device']})" if report["name"] != report["device"] else report["device"]
    if report["stand_in"]:
        console.print(f"{where} is the CPU stand-in for CUDA: no GPU, so no timings, only what is asked of the device.")
        console.print(_counts(report["cases"]))
    else:
        console.print(
            f"{where}, float32, {report['rounds']} rounds: {report['estimator']}. Times in microseconds.", soft_wrap=True
        )
        for kind, title in TITLES.items():
            cases = {name: case for name, case in report["cases"].items() if case["kind"] == kind}
            if cases:
                console.print(_case_table(title, cases))
        if report["digits"] is not None:
            console.print(_digits_table(report["digits"]))
        if report["roofs"] is not None:
            flops, moved = report["roofs"]["flops_per_second"] / 1e9, report["roofs"]["bytes_per_second"] / 1e9
            console.print(f"measured roofs: {flops:.0f} GFLOP/s in a large product, {moved:.1f} GB/s in a large copy")
        if report["device"].startswith("cuda"):
            console.print("launches are not counted on a real card; the CPU stand-in of CuPy counts them")
    machine = report["machine"]
    versions = ", ".join(dict.fromkeys(report["versions"].values()))
    console.print(f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}; {versions}", soft_wrap=True)
    if not report["stand_in"] and machine["load_before"] > 0.3 * machine["cores"]:
        busy = f"The machine was busy before this began (load {machine['load_before']:.1f}): measure again."
        console.print(busy, style="yellow", soft_wrap=True)
    for name, value in report["environment"].items():
        console.print(f"environment: {name}={value}", markup=False, soft_wrap=True)
    for name, why in report["not_here"].items():
        console.print(f"not compared: {LABELS[name]}: {why}", markup=False, soft_wrap=True)
    for name, case in report["cases"].items():
        for peer, why in case.get("left_out", {}).items():
            console.print(f"{name}: without {LABELS[peer]}: {why}", markup=False, soft_wrap=True)
    for complaint in report["complaints"]:
        print(complaint, file=sys.stderr)


def _case_table(title: str, cases: dict[str, Any]) -> Table:
    peers = [peer for peer in LABELS if any(peer in case["ratios"] for case in cases.values())]
    columns = ("", "ours", "limit reached", *(f"{LABELS[peer]} / ours" for peer in peers))
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    for name, case in cases.items():
        results = case["results"]
        table.add_row(
            f"{name}\n{_shape(case)}",
            f"{_time(results['ours']['median'])}\n{_spread(results['ours'])}",
            f"{case['limit']['reached']:.0%}\n{_time(case['limit']['seconds'])}",
            *(f"[bold]{case['ratios'][peer]:.2f}[/]\n{_spread(results[peer])}" if peer in results else "" for peer in peers),
        )
    return table


def _shape(case: dict[str, Any]) -> str:
    return f"{'-'.join(map(str, case['sizes']))}, batch {'x'.join(map(str, case['batch']))}"


def _time(seconds: float) -> str:
    """In microseconds."""
    return f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 1}f}"


def _spread(times: dict[str, Any]) -> str:
    return f"{_time(times['q1'])}..{_time(times['q3'])}"


def _digits_table(digits: dict[str, Any]) -> Table:
    title = f"Digits: 64-{digits['hidden']}-10, batch {digits['batch_size']}, {digits['epochs']} epochs; a seed each round"
    columns = ("", "seconds", "quartiles", "test accuracy", "quartiles", "/ ours")
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, result in digits["results"].items():
        accuracy = result["accuracy"]
        table.add_row(
            LABELS[name], f"{result['median']:.3f}", f"{result['q1']:.3f}..{result['q3']:.3f}",
            f"{accuracy['median']:.2%}", f"{accuracy['q1']:.2%}..{accuracy['q3']:.2%}",
            f"{digits['ratios'][name]:.2f}" if name in digits["ratios"] else "",
        )  # fmt: skip
    return table


def _counts(cases: dict[str, Any]) -> Table:
    table = Table("one warm call", *(name.replace("_", " ") for name in COUNTED), box=box.SIMPLE_HEAD)
    for name, case in cases.items():
        table.add_row(f"{name}: {_shape(case)}", *(str(case["counts"][what]) for what in COUNTED))
    return table


def roofline(report: dict[str, Any]) -> Any:
    """A matplotlib figure: what each implementation achieves, over the flops per byte of the case, below the roofs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    peak, bandwidth = report["roofs"]["flops_per_second"] / 1e9, report["roofs"]["bytes_per_second"] / 1e9
    cases = report["cases"]
    intensity = {name: case["flops"] / case["bytes"] for name, case in cases.items()}
    ends = [*intensity.values(), peak / bandwidth]
    x = np.geomspace(min(ends) / 3, max(ends) * 3, 200)
    axes.plot(x, np.minimum(peak, bandwidth * x), color="black", label=f"{peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s, measured")
    for peer, marker in zip(LABELS, "o^sDvP", strict=True):
        points = [
            (intensity[name], case["flops"] / case["results"][peer]["median"] / 1e9)
            for name, case in cases.items()
            if peer in case["results"]
        ]
        if points:
            front = 3 if peer == "ours" else 2
            axes.plot(*zip(*points, strict=True), marker, label=LABELS[peer], zorder=front, alpha=0.8)
    for name, case in cases.items():
        lowest = min(each["median"] for each in case["results"].values())
        axes.annotate(
            name, (intensity[name], case["flops"] / lowest / 1e9), (0, 7), textcoords="offset points",
            fontsize=7, ha="center",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="flops per byte of inputs and outputs", ylabel="GFLOP/s")
    axes.set_title(f"{report['name']}, float32. What fits a cache may lie above the slope.", fontsize=10)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(loc="lower right", fontsize=8)
    return figure
