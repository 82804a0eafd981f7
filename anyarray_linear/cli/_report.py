"""`report.html`: a run to look at, on one page that needs no network and no script and follows the reader's dark mode."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ._answers import answers
from ._charts import figure, thinned
from ._curves import learning, norms, seconds
from ._html import Name, facts, folded, table, text
from ._norms import NORM_ROWS
from ._run import Run
from ._scores import LABELS, parts_of, shown
from ._style import STYLE

Host = np.ndarray[Any, Any]

_ROWS = 100
_TILES = ("accuracy", "macro_f1", "baseline_accuracy", "r2", "rmse", "mae", "baseline_rmse", "loss")


def report(
    run: Run,
    outputs: Mapping[str, Host],
    folder: Path,
    config: dict[str, Any],
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
) -> str:
    """The page; `outputs` are those of the saved model for each part of the data."""
    scores = parts_of(summary)
    part = next(name for name in ("test", "validation", "train") if name in scores)
    sections = [
        ("result", "Result", _result(run, part, folder, config, rows, summary)),
        ("curves", "While training", _curves(rows, summary)),
        *answers(run, outputs[part], part, scores[part]),
        ("norms", "Weights and gradients", _norms(run, rows)),
        ("configuration", "Configuration", _configuration(run, config, summary)),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>' for key, title, html in sections)
    source, device = _source(config), config["device"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f'<link rel="icon" href="data:,"><title>{escape(source)}, {escape(device)}: anyarray_linear</title>'
        f"<style>{STYLE}</style></head>"
        f'<body><a class="skip" href="#result">Skip to the result</a><header><h1>{text(Name(source))}, {escape(device)}</h1>'
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<footer>anyarray_linear {__version__}, NumPy {np.__version__}, Python {platform.python_version()}</footer>"
        "</body></html>\n"
    )


def _source(config: dict[str, Any]) -> str:
    data = config["options"]["data"]
    return "Handwritten digits" if data is None else Path(data).name


def _result(
    run: Run, part: str, folder: Path, config: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any]
) -> str:
    scores = parts_of(summary)
    score = scores[part]
    tiles = [(f"{part} {LABELS[name]}" if i == 0 else LABELS[name], shown(name, score[name]))
             for i, name in enumerate(name for name in _TILES if name in score)]  # fmt: skip
    of = summary.get("model_epoch", len(rows))
    early = ", stopped early" if "stopped_early" in summary else ""
    tiles.append(("the model is of epoch", f"{of} of {len(rows)}{early}"))
    cells = [[LABELS[name], *(shown(name, each[name]) for each in scores.values())] for name in LABELS if name in score]
    cells.append(["samples", *(f"{len(run.parts[name][1]):,}" for name in scores)])
    stopped = '<p class="bad">Training was interrupted; this is what was trained so far.</p>'
    commands = escape(_commands(folder, config, summary))
    on = f'<p>To answer for new samples, and to train on:</p><pre tabindex="0">{commands}</pre>'
    sentence = f"{run.reading.target}: {run.reading.told}."
    told = f"<p>{escape(sentence[0].upper() + sentence[1:])}</p>" if config["options"]["data"] else ""
    interrupted = stopped if summary.get("interrupted") else ""
    return f"{interrupted}{facts(tiles, 'tiles')}{told}{table(['', *scores], cells, 'Scores')}{on}"


def _commands(folder: Path, config: dict[str, Any], summary: dict[str, Any]) -> str:
    """What to type in the folder that the run's is in."""
    out, options = shlex.quote(folder.name or "."), config["options"]
    more = "" if summary.get("interrupted") else f" --epochs {2 * options['epochs']}"
    again = f"anyarray-linear train --out {out} --resume{more}   # --device cuda: from here on, on a GPU"
    fixed = more and options["schedule"] != "constant"  # its end is part of the schedule
    return f"anyarray-linear predict {out} FILE" + ("" if fixed else f"\n{again}")


def _curves(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    charts = "".join(map(figure, learning(rows, _chosen(summary))))
    names = [name for name in ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "lr", "seconds")
             if any(name in row for row in rows)]  # fmt: skip
    some = thinned(rows, _ROWS)
    cells = [["" if row.get(name) is None else f"{row[name]:.4g}" for name in names] for row in some]
    told = "The numbers" if len(some) == len(rows) else f"The numbers, {len(some)} of {len(rows)} epochs"
    numbers = table([name.replace("_", " ") for name in names], cells, "Numbers by epoch")
    return f'<div class="charts">{charts}</div>{folded(told, numbers)}'


def _chosen(summary: dict[str, Any]) -> int | None:
    """The epoch of the model, if it is not the last one."""
    epoch = summary.get("model_epoch")
    return None if epoch == summary.get("epochs") else epoch


def _norms(run: Run, rows: list[dict[str, Any]]) -> str:
    count = min(NORM_ROWS, len(run.parts["train"][1]))
    charts = "".join(map(figure, (*norms(run.model, rows, count), seconds(rows))))
    return (
        f'<div class="charts">{charts}</div><p>The norm of a layer is the length of all its parameters as one vector. A '
        "gradient that shrinks with the loss is learning that ends; one that is far smaller in the first layer than in the "
        "last one is vanishing.</p>"
    )


def _configuration(run: Run, config: dict[str, Any], summary: dict[str, Any]) -> str:
    told = [
        ("data", Name(_source(config))),
        ("samples", ", ".join(f"{len(y):,} {name}" for name, (_, y) in run.parts.items())),
        ("features", f"{run.parts['train'][0].shape[1]:,}"),
        *([("classes", f"{len(run.classes):,}")] if run.classes is not None else []),
        ("model", " → ".join(_told(layer) for layer in run.model)),
        ("device", f"{run.device} ({run.device.name}), because {run.device.reason}"),
        ("time", f"{summary['seconds']:.1f} s"),
    ]
    given = dict(config["options"])
    if given["data"] is not None:
        given["data"] = _source(config)  # where it lies is not for the page
    options = [[name.replace("_", "-"), "" if value is None else value] for name, value in given.items()]
    return facts(told, "facts") + folded("All options", table(["option", "value"], options, "Options"))


def _told(layer: Any) -> str:
    name = type(layer).__name__
    return f"{name}({layer.in_features}, {layer.out_features})" if layer.parameters() else name
