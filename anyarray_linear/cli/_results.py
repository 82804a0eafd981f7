"""What `train` leaves in its folder, and the table it ends with."""

from __future__ import annotations

import io
import json
import math
import shlex
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..arrays.words import printable
from ..files.atomic import atomic_write
from ..files.models import save_model
from ._streams import Terminal

SUMMARY = "summary.json"
FILES = (SUMMARY, "config.json", "model.safetensors", "history.jsonl", "curves.png", "report.html")
"""In the order in which they are removed; the summary is the first to go, and the last to come."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, for a reader as well as for a program."""
    atomic_write(path, (json.dumps(_plain(content), indent=2) + "\n").encode(), follow=False)


def write_results(
    folder: Path, model: Any, metadata: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any], report: str
) -> None:
    """Write all files but config.json, each of them whole, and the summary last: where it is, the others are."""
    picture = io.BytesIO()
    curves(rows).savefig(picture, format="png")
    if (folder / "model.safetensors").is_symlink():  # which may have come with somebody else's folder
        (folder / "model.safetensors").unlink()
    save_model(model, folder / "model.safetensors", metadata=metadata)
    lines = "".join(json.dumps(_plain(row)) + "\n" for row in rows)
    atomic_write(folder / "history.jsonl", lines.encode(), follow=False)
    atomic_write(folder / "curves.png", picture.getvalue(), follow=False)
    atomic_write(folder / "report.html", report.encode(errors="backslashreplace"), follow=False)  # names of other encodings
    write_json(folder / SUMMARY, summary)


def _plain(value: Any) -> Any:
    """The value with `None` for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(folder: Path, summary: dict[str, Any], processes: str | None = None) -> None:
    """Print the summary as a table, and where the files are."""
    console = Terminal()
    scores = {name: value for name, value in summary.items() if isinstance(value, dict)}
    columns = list(scores["train"])
    table = Table("", *columns, title=f"{summary['device']}, {summary['seconds']:.1f} s")
    for name, score in scores.items():
        table.add_row(name, *(format(score[column], ".2%" if column == "accuracy" else ".4g") for column in columns))
    console.print(table)
    console.print(f"{escape(printable(str(folder)))}: {', '.join(FILES)}", soft_wrap=True)
    console.print(f"Look at it: {escape((folder / 'report.html').resolve().as_uri())}", soft_wrap=True)
    if "interrupted" in summary:
        line = f"anyarray-linear train --out {shlex.quote(str(folder))} --resume"
        if processes is not None:
            line = f"mpiexec -n {summary.get('ranks', 1)} {line} --distributed {processes}"
        console.print(
            f"interrupted after {summary['epochs']} epochs; these are the files of what was trained so far. Go on with\n"
            f"{escape(printable(line))}",
            soft_wrap=True,
        )


def curves(rows: list[dict[str, Any]]) -> Any:
    """A matplotlib figure of loss and accuracy over the epochs; without pyplot, so that it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = ["loss", "accuracy"] if any("accuracy" in row for row in rows) else ["loss"]
    figure = Figure(figsize=(5 * len(names), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, label in ((name, "training"), (f"validation_{name}", "validation")):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        elif rows and min(row["loss"] for row in rows) > 0:
            axes.set_yscale("log")
        if rows:
            axes.legend()
        else:
            axes.set_title("no epoch was finished")
    return figure
