"""What is shown of a report: tables on the terminal, and the roofline as a picture."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from .cases import KINDS
from .race import LABELS, OURS
from .worker import COUNTED


def console() -> Console:
    """Wide enough for the tables, also where the output goes to a file."""
    return Console(width=max(Console().width, 150), highlight=False)


def show(report: dict[str, Any]) -> None:
    """Print the whole report; complaints go to standard error."""
    out = console()
    where = f"{report['name']} ({report['device']})" if report["name"] != report["device"] else report["device"]
    if report["stand_in"]:
        out.print(f"{where} is the CPU stand-in for CUDA: no GPU, so no timings, only what is asked of the device.")
        out.print(_counts(report["cases"]))
    else:
        rounds = f"{report['runs']} runs of {report['rounds']} rounds"
        out.print(f"{where}, float32, {rounds}: {report['estimator']}. Times in microseconds.", soft_wrap=True)
        for kind, title in KINDS.items():
            for base in OURS:
                of_kind = {name: case for name, case in report["cases"].items() if case["kind"] == kind}
                cases = {name: case for name, case in of_kind.items() if base in case["results"]}
                if cases:
                    out.print(_case_table(title, base, cases))
        if report["digits"] is not None:
            out.print(_digits_table(report["digits"]))
        if report["roofs"] is not None:
            flops, moved = report["roofs"]["flops_per_second"] / 1e9, report["roofs"]["bytes_per_second"] / 1e9
            out.print(f"measured roofs: {flops:.0f} GFLOP/s in a large product, {moved:.1f} GB/s in a large copy")
        if report["device"].startswith("cuda"):
            out.print("launches are not counted on a real card; the CPU stand-in of CuPy counts them")
    show_machine(out, report)
    for name, why in report["not_here"].items():
        out.print(f"not compared: {LABELS[name]}: {why}", markup=False, soft_wrap=True)
    for name, case in report["cases"].items():
        for who, how in case.get("how", {}).items():
            out.print(f"{name}: {LABELS[who]}: {how}", markup=False, soft_wrap=True)
        for who, why in case.get("left_out", {}).items():
            if f"{name}: {LABELS[who]}: {why}" not in report["complaints"]:
                out.print(f"{name}: without {LABELS[who]}: {why}", markup=False, soft_wrap=True)
    for complaint in report["complaints"]:
        print(complaint, file=sys.stderr)


def show_machine(out: Console, report: dict[str, Any]) -> None:
    """What the figures were measured on, and what speaks against them."""
    machine = report["machine"]
    versions = ", ".join(dict.fromkeys(report["versions"].values()))
    out.print(f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}; {versions}", soft_wrap=True)
    if not report["stand_in"] and machine["load_before"] > 0.3 * machine["cores"]:
        busy = f"The machine was busy before this began (load {machine['load_before']:.1f}): measure again."
        out.print(busy, style="yellow", soft_wrap=True)
    for name, value in report["environment"].items():
        out.print(f"environment: {name}={value}", markup=False, soft_wrap=True)


def _case_table(title: str, base: str, cases: dict[str, Any]) -> Table:
    others = [who for who in LABELS if any(who in case["ratios"][base] for case in cases.values())]
    labels = LABELS | {"ours": "TrainingStep", "hand": "by hand"}
    columns = ("", "ours", "limit reached", *(f"{labels[who]} / ours" for who in others))
    title += "; ours written out by hand" if base == "hand" else ""
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    for name, case in cases.items():
        results, ratio = case["results"], case["ratios"][base]
        table.add_row(
            f"{name}\n{_shape(case)}",
            f"{_time(results[base]['median'])}\n{_spread(results[base])}\n{_least(results[base])}",
            f"{case['limit']['reached'][base]:.0%}\n{_time(case['limit']['seconds'])}",
            *(_against(results[who], results[base], ratio[who]) if who in ratio else "" for who in others),
        )
    return table


def _shape(case: dict[str, Any]) -> str:
    batch = "x".join(map(str, case["batch"]))
    return "-".join(map(str, case["sizes"])) + (f", batch {batch}" if batch else "")


def _time(seconds: float) -> str:
    """In microseconds."""
    return f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 1}f}"


def _spread(times: dict[str, Any]) -> str:
    return f"{_time(times['q1'])}..{_time(times['q3'])}"


def _least(times: dict[str, Any]) -> str:
    """The least time: what other work on the machine disturbs least."""
    return f"least {_time(times['least'])}"


def _against(times: dict[str, Any], base: dict[str, Any], ratio: float) -> str:
    return f"[bold]{ratio:.2f}[/]\n{_spread(times)}\n{_least(times)}: {times['least'] / base['least']:.2f}"


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
    table = Table("one warm call", "", *(name.replace("_", " ") for name in COUNTED), box=box.SIMPLE_HEAD)
    for name, case in cases.items():
        for who, counts in case["counts"].items():
            table.add_row(f"{name}: {_shape(case)}", LABELS[who], *(str(counts[what]) for what in COUNTED))
    return table


def roofline(report: dict[str, Any]) -> Any:
    """A matplotlib figure: what each contestant achieves, over the flops per byte of the case, below the roofs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    peak, bandwidth = report["roofs"]["flops_per_second"] / 1e9, report["roofs"]["bytes_per_second"] / 1e9
    cases = {name: case for name, case in report["cases"].items() if case["flops"]}
    intensity = {name: case["flops"] / case["bytes"] for name, case in cases.items()}
    ends = [*intensity.values(), peak / bandwidth]
    x = np.geomspace(min(ends) / 3, max(ends) * 3, 200)
    axes.plot(x, np.minimum(peak, bandwidth * x), color="black", label=f"{peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s, measured")
    for who, marker in zip(LABELS, "oX^sDvP*", strict=True):
        points = [
            (intensity[name], case["flops"] / case["results"][who]["median"] / 1e9)
            for name, case in cases.items()
            if who in case["results"]
        ]
        if points:
            front = 3 if who in OURS else 2
            axes.plot(*zip(*points, strict=True), marker, label=LABELS[who], zorder=front, alpha=0.8)
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
