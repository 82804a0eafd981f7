"""The commands of `python -m benchmarks`."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import statistics
import sys
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from anyarray_linear import select_device
from anyarray_linear.arrays import cards
from anyarray_linear.arrays.cores import usable_cores

from . import host as host_time
from . import start as whole_processes
from .cases import CASES, COUNTED_CASES
from .processes import Failed, answer_of, telling
from .race import LABELS, PEERS, Race, missing, summarise, summary
from .tables import console, roofline, show, show_machine
from .worker import BURSTS

BURST = 0.02
"""Seconds."""

Runs = Annotated[int, typer.Option(min=1, help="How often all is repeated with new processes.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured.")]
PeersOption = Annotated[
    str | None, typer.Option(metavar="A,B", help=f"Of {', '.join(PEERS)}; by default all that are installed.")
]

app = typer.Typer(name="benchmarks", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback()
def _about() -> None:
    """How fast this package is beside what a user would pick instead, and beside what the machine can do.

    Run it in a clone, on a machine that has nothing else to do. `pip install -e ".[bench]"` brings the peers but PyTorch,
    whose default build brings gigabytes of CUDA along: choose one at pytorch.org.
    """


@app.command()
def peers(
    device: Annotated[str, typer.Option(metavar="SPEC", help='"cpu", "cuda" or "cuda:N".')] = "cpu",
    peers: PeersOption = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="A,B", help='Cases by names or how these start: "layer", "step3", "optimizer", "digits".'),
    ] = None,
    runs: Runs = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is asked in a run.")] = 5,
    burst: Annotated[float, typer.Option(min=0.01, help="Milliseconds that a burst of calls takes.")] = BURST * 1e3,
    quick: Annotated[bool, typer.Option("--quick", help="One run of 3 short rounds: a look, no measurement.")] = False,
    json_: Json = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a roofline as PNG.")] = None,
) -> None:
    """Layers, training steps, the optimizer and the digits, beside peers and the limit of the machine.

    Every contestant has a process of its own; what it computes is checked against ours first; rounds are interleaved.
    Figures are medians with quartiles, in microseconds; ratios are theirs / ours, so that more than 1 is in our favour.
    Below them are the least times and their ratios: on a machine with other work, many rounds of short bursts make these
    telling. A training step of ours is timed twice, as `TrainingStep` and written out by hand. The limit is the bare matrix
    products into memory that is there already, and the bytes that must be moved besides, at the measured bandwidth; for the
    optimizer it is copying 7 arrays. numpy is the textbook formulas, on CUDA in CuPy; sklearn joins in the digits only. All
    of it takes some minutes.

    **Examples**

    - `python -m benchmarks peers --quick`
    - `python -m benchmarks peers --only layer,step --peers torch,jax --plot roofline.png`
    - `python -m benchmarks peers --only step --rounds 40 --burst 1` (the machine has other work)
    - `python -m benchmarks peers --device cuda --json peers.json`
    """
    try:
        place = select_device(device)
    except ValueError as unknown:
        raise _bad("device", str(unknown)) from None
    stand_in = place.name.startswith("CuPy CPU emulated")
    names, absent = ([], {}) if stand_in else _peers(peers)
    cases, digits = _chosen(only, COUNTED_CASES if stand_in else CASES)
    if quick:
        runs, rounds = 1, 3
    report = {
        "device": str(place),
        "name": place.name,
        "stand_in": stand_in,
        "cautions": cards.cautions(place.index) if place.index is not None else [],
        "runs": runs,
        "rounds": rounds,
        "estimator": f"median over all rounds of the fastest of {BURSTS} bursts; spread: quartiles",
        **_circumstances(),
        "not_here": absent,
        "complaints": [],
        "roofs": None,
        "cases": {},
        "digits": None,
    }
    for caution in report["cautions"]:
        print(f"caution: {caution}", file=sys.stderr)
    race = Race(names, str(place), report, rounds, burst / 1e4 if quick else burst / 1e3)
    if stand_in:
        race.count(cases)
    else:
        for _ in range(runs):
            race.run(cases, digits, quick)
        summarise(report)
    report["complaints"] = list(dict.fromkeys(report["complaints"]))
    _write(json_, report)
    drawn = plot is not None and any(case.get("flops") for case in report["cases"].values())
    if drawn:
        roofline(report).savefig(plot, format="png")
    show(report)
    if plot is not None and not drawn:
        print(f"{plot} was not drawn, for no case with products was timed", file=sys.stderr)
    if report["complaints"]:
        raise typer.Exit(1)


@app.command()
def host(runs: Runs = 5, json_: Json = None) -> None:
    """The host's time per training step on the CuPy path: on the CPU stand-in for CUDA, where nothing is computed.

    64-128-64-10 with batch 64 and Adam, as ratios to asking CuPy for the same 11 products and 10 kernels with nothing around
    them, in turns in the same process. It is the host's time; how long a GPU would take it does not say.
    """
    if not select_device("cuda:0").name.startswith("CuPy CPU emulated"):
        raise typer.BadParameter("only the CPU stand-in of CuPy has dry runs, and the CuPy here is not it")
    # zeros, not NaN, in what is never computed: fit would end at a loss of NaN
    answers = [answer_of("-m", "benchmarks.host", CUPY_CPU_POISON="0") for _ in range(runs)]
    report = {"runs": runs, "stand_in": True, **_circumstances(), "left_out": answers[-1]["left_out"]}
    for what in ("seconds", "ratios"):
        report[what] = {name: summary([answer[what][name] for answer in answers]) for name in answers[0][what]}
    _write(json_, report)
    title = f"The host's time on the CPU stand-in, dry: no GPU, nothing computed. {runs} runs; medians and quartiles"
    table = Table("", "us", "quartiles", "/ bare", "quartiles", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, ratio in report["ratios"].items():
        time = report["seconds"][name]
        table.add_row(
            host_time.WHAT[name], f"{time['median'] * 1e6:.1f}", f"{time['q1'] * 1e6:.1f}..{time['q3'] * 1e6:.1f}",
            f"{ratio['median']:.2f}", f"{ratio['q1']:.2f}..{ratio['q3']:.2f}",
        )  # fmt: skip
    out = console()
    out.print(table)
    for name, why in report["left_out"].items():
        out.print(f"without {host_time.WHAT[name]}: {why}", markup=False, soft_wrap=True)
    show_machine(out, report)


@app.command()
def start(
    rounds: Annotated[int, typer.Option(min=1, help="How often each process is started.")] = 15, json_: Json = None
) -> None:
    """Whole processes: imports of this package and of others, and `train` of the digits from start to end."""
    names = [name for name in whole_processes.IMPORTS if name in ("python", "ours") or not missing([name])]
    times = whole_processes.seconds(rounds, names)
    seconds = {name: summary(each) for name, each in times.items()}
    report = {"rounds": rounds, "stand_in": False, **_circumstances(), "seconds": seconds}
    _write(json_, report)
    title = f"Whole processes, {rounds} rounds"
    table = Table("", "ms", "quartiles", "beyond numpy's", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    numpy = report["seconds"]["numpy"]["median"]
    for name, each in report["seconds"].items():
        what = "train the digits" if name == "train" else whole_processes.IMPORTS[name]
        q1, q3 = each["q1"] * 1e3, each["q3"] * 1e3
        table.add_row(what, f"{each['median'] * 1e3:.0f}", f"{q1:.0f}..{q3:.0f}", f"{(each['median'] - numpy) * 1e3:.0f}")
    out = console()
    out.print(table)
    show_machine(out, report)


@app.command()
def memory(
    peers: PeersOption = None,
    only: Annotated[str, typer.Option(metavar="A,B", help="Cases of training steps.")] = "step3,step4,step5",
    runs: Runs = 3,
    json_: Json = None,
) -> None:
    """The peak of memory that training steps add to a process, beside the arrays that they must hold.

    Parameters, gradients, two moments, and what goes forward and comes back between the layers.
    """
    if sys.platform != "linux":
        raise typer.BadParameter("the peak of a process's memory is read as Linux tells it")
    cases, _ = _chosen(only, {name: case for name, case in CASES.items() if case["kind"] == "step"})
    names, absent = _peers(peers)
    names = ["ours", "hand", *(name for name in names if name != "sklearn")]
    report: dict[str, Any] = {"runs": runs, "stand_in": False, **_circumstances(), "not_here": absent}
    report |= {"left_out": {}, "cases": {}}
    out = console()
    columns = ("MB added to the peak", "must hold", *(LABELS[name] for name in names))
    table = Table(*columns, title=f"{runs} runs, medians", title_justify="left", box=box.SIMPLE_HEAD)
    for name in cases:
        found = report["cases"][name] = {"held": 0, "added": {}}
        for who in names:
            try:
                answers = [whole_processes.memory(who, name) for _ in range(runs)]
                found["held"], found["added"][who] = answers[0]["held"], summary([answer["added"] for answer in answers])
            except Failed as failed:
                report["left_out"][f"{name}: {LABELS[who]}"] = str(failed)
        added = {who: statistics.median(each["rounds"]) for who, each in found["added"].items()}
        cells = (f"{added[who] / 1e6:.1f}" if who in added else "" for who in names)
        table.add_row(f"{name}: {'-'.join(map(str, CASES[name]['sizes']))}", f"{found['held'] / 1e6:.1f}", *cells)
    _write(json_, report)
    out.print(table)
    for what, why in report["left_out"].items():
        out.print(f"without {what}: {why}", markup=False, soft_wrap=True)
    show_machine(out, report)


def _bad(name: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"--{name}")


def _peers(asked: str | None) -> tuple[list[str], dict[str, str]]:
    """The peers to compare with, and why others are not among them."""
    names = list(PEERS) if asked is None else [name for name in asked.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise _bad("peers", f"there is no {', '.join(unknown)}; give some of {','.join(PEERS)}")
    absent = missing(names)
    if asked is not None and absent:
        install = "torch" if list(absent) == ["torch"] else '-e ".[bench]"'
        raise _bad("peers", f"{', '.join(absent.values())}; pip install {install}")
    return [name for name in names if name not in absent], absent


def _chosen(only: str | None, cases: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The cases that `--only` gives by how their names start, and whether the digits are among them."""
    names = [*cases, "digits"]
    starts = [""] if only is None else [start for start in only.split(",") if start]
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise _bad("only", f"no case starts with {start!r}; there are {', '.join(names)}")
    *chosen, last = (any(name.startswith(start) for start in starts) for name in names)
    return dict(compress(cases.items(), chosen)), last


def _circumstances() -> dict[str, Any]:
    """The machine, and what in the environment changes the figures."""
    model = None
    with suppress(OSError):  # only Linux has it
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    machine = {
        "processor": model[1] if model else platform.processor(),
        "cores": len(usable_cores()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    }
    return {"machine": machine, "environment": telling(), "versions": {}}


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    """Run the command line; what the user can mend is one line on standard error and exit code 2."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds, so that no process stays behind
    try:
        app(prog_name="python -m benchmarks")
    except (Failed, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
