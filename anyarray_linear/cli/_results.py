"""What `train` leaves in its folder, and the table it ends with."""

from __future__ import annotations

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
from ._charts import picture
from ._curves import learning
from ._folder import FILES, SUMMARY
from ._scores import LABELS, parts_of, shown
from ._streams import Terminal

_CLASSES = 12


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, for a reader as well as for a program."""
    atomic_write(path, (json.dumps(_plain(content), indent=2) + "\n").encode(), follow=False)


def write_results(
    folder: Path, model: Any, metadata: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any], report: str
) -> None:
    """Write all files but config.json, each of them whole, and the summary last: where it is, the others are."""
    if (folder / "model.safetensors").is_symlink():  # which may have come with somebody else's folder
        (folder / "model.safetensors").unlink()
    save_model(model, folder / "model.safetensors", metadata=metadata)
    lines = "".join(json.dumps(_plain(row)) + "\n" for row in rows)
    atomic_write(folder / "history.jsonl", lines.encode(), follow=False)
    atomic_write(folder / "curves.png", picture(learning(rows)), follow=False)
    atomic_write(folder / "report.html", report.encode(errors="backslashreplace"), follow=False)  # names of other encodings
    write_json(folder / SUMMARY, summary)


def _plain(value: Any) -> Any:
    """The value with `None` for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(folder: Path, summary: dict[str, Any], processes: str | None = None, itself: bool = False) -> None:
    """Print the scores as tables, and where the files are; `itself`: the command has started its `processes`."""
    console = Terminal()
    scores = parts_of(summary)
    device = summary["device"] + (f" in {summary['products']}" if "products" in summary else "")
    table = Table("", *scores, title=f"{device}, {summary['seconds']:.1f} s")
    for name in (name for name in LABELS if name in scores["train"]):
        table.add_row(LABELS[name], *(shown(name, score[name]) for score in scores.values()))
    console.print(table)
    part, score = next((name, scores[name]) for name in ("test", "validation", "train") if name in scores)
    if "classes" in score:
        console.print(_by_class(part, score["classes"]))
    if "stopped_early" in summary:
        console.print(f"stopped early, after epoch {summary['epochs']}: the loss on validation did not improve any more")
    if summary.get("model_epoch") not in (None, summary.get("epochs")):
        told = f"the model is that of epoch {summary['model_epoch']}, of the best loss on validation; --keep last: the last"
        console.print(told, soft_wrap=True, highlight=False)
    console.print(f"{escape(printable(str(folder)))}: {', '.join(FILES)}", soft_wrap=True)
    console.print(f"Look at it: {escape((folder / 'report.html').resolve().as_uri())}", soft_wrap=True)
    if "interrupted" in summary:
        line = f"anyarray-linear train --out {shlex.quote(str(folder))} --resume"
        if itself:
            line += f" --processes {summary.get('ranks', 1)}"
        elif processes is not None:
            line = f"mpiexec -n {summary.get('ranks', 1)} {line} --distributed {processes}"
        console.print(
            f"interrupted after {summary['epochs']} epochs; these are the files of what was trained so far. Go on with\n"
            f"{escape(printable(line))}",
            soft_wrap=True,
        )


def _by_class(part: str, scores: dict[str, Any]) -> Table:
    """How well each class is found; of many, those that are found worst."""
    few = sorted(scores, key=lambda name: scores[name]["f1"])[:_CLASSES] if len(scores) > _CLASSES else scores
    some = "class by class" if few is scores else f"the {_CLASSES} of {len(scores)} classes with the lowest F1"
    table = Table("class", "precision", "recall", "F1", "samples", title=f"{part}, {some}")
    for name in few:
        each = scores[name]
        shares = (shown(kind, each[kind]) for kind in ("precision", "recall", "f1"))
        name = printable(name)
        table.add_row(escape(name if len(name) <= 30 else name[:29] + "…"), *shares, str(each["samples"]))
    return table
