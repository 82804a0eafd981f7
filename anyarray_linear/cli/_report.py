"""`report.html`: a run to look at, on one page that needs no network and no script and follows the reader's dark mode."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..arrays.place import Array
from ..protocol import join, leaves
from ..training import predict
from ._charts import Series, lines, scatter, thinned
from ._run import Run

Host = np.ndarray[Any, Any]

NORM_ROWS = 256
"""Training samples, the first ones, that the gradient norms are of."""
MAX_CLASSES = 30
"""More of them make no confusion matrix that anybody can read; the pairs that are confused most are listed then."""
_WORST, _ROWS, _FEATURES, _POINTS = 16, 100, 8, 1500


class Norms:
    """After each epoch, how long the parameters of each layer are as one vector, and their gradients on one fixed batch.

    One forward and one backward pass over `NORM_ROWS` samples; the norms are taken on the host, in float64.
    """

    def __init__(self, run: Run, X: Host, y: Host) -> None:
        dtype = run.model[0].dtype  # type: ignore[attr-defined]
        self.loss, self.place = run.loss, run.device
        self.X = run.device.asarray(X[:NORM_ROWS], dtype)
        self.y = run.device.asarray(y[:NORM_ROWS], None if run.classes is not None else dtype)

    def __call__(self, model: Any) -> dict[str, dict[str, float]]:
        """`{"weight_norms": {"0": ..., "2": ...}, "gradient_norms": {...}}`, by the names of the layers."""
        Z, caches = model.forward(self.X)
        _, cache = self.loss.forward(Z, self.y)
        _, gradients = model.gradients(self.loss.backward(cache), caches, needs_dX=False)
        layers = {name: layer.parameters() for name, layer in leaves(model) if layer.parameters()}
        return {
            "weight_norms": {name: self._norm(own.values()) for name, own in layers.items()},
            "gradient_norms": {name: self._norm(gradients[join(name, p)] for p in own) for name, own in layers.items()},
        }

    def _norm(self, arrays: Iterable[Array]) -> float:
        flat = [self.place.to_numpy(x).astype(np.float64).ravel() for x in arrays]
        return float(np.linalg.norm(np.concatenate(flat)))


def report(
    run: Run, model: Any, folder: Path, config: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any]
) -> str:
    """The page; `model` takes raw data, as the saved one does."""
    part = next(name for name in ("test", "validation", "train") if name in run.parts)
    sections = [
        ("result", "Result", _result(run, folder, config, rows, summary)),
        ("curves", "While training", _curves(run, rows)),
        *_answers(run, model, part),
        ("norms", "Weights and gradients", _norms(run, rows)),
        ("configuration", "Configuration", _configuration(run, config)),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>' for key, title, html in sections)
    title = f"{_source(config)}, {config['device']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}: anyarray_linear</title><style>{_STYLE}</style></head>'
        f'<body><a class="skip" href="#result">Skip to the result</a><header><h1>{escape(title)}</h1>'
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<footer>anyarray_linear {__version__}, NumPy {np.__version__}, Python {platform.python_version()}</footer>"
        "</body></html>\n"
    )


def _source(config: dict[str, Any]) -> str:
    data = config["options"]["data"]
    return "Handwritten digits" if data is None else Path(data).name


def _score(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4g}"


def _result(
    run: Run, folder: Path, config: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any]
) -> str:
    scores = {name: value for name, value in summary.items() if isinstance(value, dict)}
    part = next(name for name in ("test", "validation", "train") if name in scores)
    cards = [(f"{part} {name}", _score(name, value)) for name, value in reversed(scores[part].items())]
    cards += [("epochs", str(len(rows))), ("seconds", f"{summary['seconds']:.1f}"), ("device", config["device"])]
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in cards)
    columns = list(scores["train"])
    cells = [[name, len(run.parts[name][1]), *(_score(each, score[each]) for each in columns)]
             for name, score in scores.items()]  # fmt: skip
    table = _table(["", "samples", *columns], cells, "Scores")
    stopped = '<p class="bad">Training was interrupted; this is what was trained so far.</p>'
    commands = escape(_commands(folder, config, summary))
    on = f'<p>To answer for new samples, and to train on:</p><pre tabindex="0">{commands}</pre>'
    return f'{stopped if summary.get("interrupted") else ""}<dl class="tiles">{tiles}</dl>{table}{on}'


def _commands(folder: Path, config: dict[str, Any], summary: dict[str, Any]) -> str:
    out, options = shlex.quote(str(folder)), config["options"]
    more = "" if summary.get("interrupted") else f" --epochs {2 * options['epochs']}"
    again = f"anyarray-linear train --out {out} --resume{more}   # --device cuda: from here on, on a GPU"
    fixed = more and options["schedule"] != "constant"  # its end is part of the schedule
    return f"anyarray-linear predict {out} FILE" + ("" if fixed else f"\n{again}")


def _curves(run: Run, rows: list[dict[str, Any]]) -> str:
    def of(key: str) -> list[tuple[float, float]]:
        return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]

    def both(key: str) -> list[Series]:
        return [Series("training", of(key)), Series("validation", of(f"validation_{key}"))]

    charts = [lines("Loss", both("loss"), log=True, note="Training: the mean over the epoch, while the weights change.")]
    if run.classes is not None:
        charts.append(lines("Accuracy", both("accuracy"), percent=True, note="Both after the epoch."))
    charts.append(lines("Seconds per epoch", [Series("seconds", of("seconds"))], from_zero=True))
    names = [name for name in ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "lr", "seconds")
             if any(name in row for row in rows)]  # fmt: skip
    shown = thinned(rows, _ROWS)
    cells = [["" if row.get(name) is None else f"{row[name]:.4g}" for name in names] for row in shown]
    some = "" if len(shown) == len(rows) else f", {len(shown)} of {len(rows)} epochs"
    numbers = _table([name.replace("_", " ") for name in names], cells, "Numbers by epoch")
    return f'<div class="charts">{"".join(charts)}</div>{_folded(f"The numbers{some}", numbers)}'


def _norms(run: Run, rows: list[dict[str, Any]]) -> str:
    layers = [(name, f"{name}: {type(layer).__name__} {layer.in_features} to {layer.out_features}")
              for name, layer in leaves(run.model) if layer.parameters()]  # fmt: skip

    def of(key: str) -> list[Series]:
        return [
            Series(title, [(row["epoch"], row[key][name]) for row in rows if row.get(key, {}).get(name) is not None])
            for name, title in layers
        ]

    count = min(NORM_ROWS, len(run.parts["train"][1]))
    return (
        '<div class="charts">'
        + lines("Norm of weights and bias", of("weight_norms"), log=True)
        + lines(
            "Norm of their gradient",
            of("gradient_norms"),
            log=True,
            note=f"After each epoch, of the loss on one batch that stays the same: the first {count} training samples.",
        )
        + "</div><p>The norm of a layer is the length of all its parameters as one vector. A gradient that shrinks with the "
        "loss is learning that ends; one that is far smaller in the first layer than in the last one is vanishing.</p>"
    )


def _configuration(run: Run, config: dict[str, Any]) -> str:
    facts = [
        ("data", config["options"]["data"] or "the digits of the package"),
        ("samples", ", ".join(f"{len(y):,} {name}" for name, (_, y) in run.parts.items())),
        ("features", f"{run.parts['train'][0].shape[1]:,}"),
        *([("classes", f"{len(run.classes):,}")] if run.classes is not None else []),
        ("model", " → ".join(_told(layer) for layer in run.model)),
        ("device", f"{run.device} ({run.device.name}), because {run.device.reason}"),
    ]
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts)
    options = [[name.replace("_", "-"), "" if value is None else value] for name, value in config["options"].items()]
    return f'<dl class="facts">{listed}</dl>{_folded("All options", _table(["option", "value"], options, "Options"))}'


def _told(layer: Any) -> str:
    name = type(layer).__name__
    return f"{name}({layer.in_features}, {layer.out_features})" if layer.parameters() else name


def _answers(run: Run, model: Any, part: str) -> list[tuple[str, str, str]]:
    """The sections about the model's answers for one part of the data."""
    X, y = run.parts[part]
    Z = run.device.to_numpy(predict(model, X)).astype(np.float64)
    if run.classes is None:
        return [("answers", "Answers", _of_numbers(run, part, X, y, Z))]
    E = np.exp(Z - Z.max(axis=1, keepdims=True))
    P = E / E.sum(axis=1, keepdims=True)
    return [
        ("confusion", "Confusion", _confusion(run.classes, y, P.argmax(axis=1), part)),
        ("worst", "Worst answers", _worst(run, part, X, y, P)),
    ]


def _confusion(classes: Sequence[str], y: Host, answer: Host, part: str) -> str:
    wrong = int(np.count_nonzero(y != answer))
    told = f"<p>{wrong:,} of {len(y):,} {part} samples are answered wrongly.</p>"
    if len(classes) > MAX_CLASSES:
        pairs, counts = np.unique(np.stack([y, answer])[:, y != answer], axis=1, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:_WORST]
        listed = [[classes[pairs[0, i]], classes[pairs[1, i]], int(counts[i])] for i in most]
        return told + _table(["class", "answer", "samples"], listed, "The pairs that are confused most")
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (y, answer), 1)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in classes)
    body = []
    for i, row in enumerate(counts.tolist()):
        total = sum(row) or 1
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss"}" style="--share:{_strength(n / total):.0f}%">{n or ""}</td>'
            for j, n in enumerate(row)
        )
        body.append(f'<tr><th scope="row">{escape(classes[i])}</th>{cells}</tr>')
    return (
        f"{told}<p>A row is a class, a column an answer; the colour says which share of the class has it.</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Confusion matrix"><table class="matrix"><thead><tr>'
        f"<th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _strength(share: float) -> float:
    """How strong a cell's colour is, in percent; one sample in a hundred should be seen."""
    return 0.0 if share == 0 else 18 + 62 * share**0.5


def _worst(run: Run, part: str, X: Host, y: Host, P: Host) -> str:
    assert run.classes is not None
    of_truth = P[np.arange(len(y)), y]
    worst = np.argsort(of_truth, kind="stable")[:_WORST].tolist()
    answers = P.argmax(axis=1)
    told = (
        f"<p>The {part} samples whose true class got the lowest probabilities. Samples are counted from 0, in the order of "
        "the data.</p>"
    )
    if run.is_digits:
        return f'{told}<ul class="images">' + "".join(
            f"<li>{_image(X[i], run.classes[y[i]])}<b>{escape(run.classes[y[i]])}</b> "
            f'<span class="{"bad" if answers[i] != y[i] else ""}">seen as {escape(run.classes[answers[i]])}</span>'
            f"<small>true class {of_truth[i]:.1%}<br>sample {run.rows[part][i]}</small></li>"
            for i in worst
        ) + "</ul>"
    names, some = _feature_names(run, X)
    cells = [
        [int(run.rows[part][i]), run.classes[y[i]], run.classes[answers[i]], f"{of_truth[i]:.1%}",
         *(f"{value:.4g}" for value in X[i, : len(names)])]
        for i in worst
    ]  # fmt: skip
    return told + _table(["sample", "class", "answer", "its class got", *names], cells, "Worst answers") + some


def _of_numbers(run: Run, part: str, X: Host, y: Host, Z: Host) -> str:
    targets, outputs = (x.reshape(len(y), -1).astype(np.float64) for x in (y, Z))
    error = np.linalg.norm(outputs - targets, axis=1)
    worst = np.argsort(-error, kind="stable")[:_WORST].tolist()
    pairs = list(zip(targets[:, 0].tolist(), outputs[:, 0].tolist(), strict=True))
    shown = list(thinned([pair for pair in pairs if np.isfinite(pair).all()], _POINTS))
    several = f"The first of {targets.shape[1]} outputs. " if targets.shape[1] > 1 else ""
    note = f"{several}{len(shown):,} of {len(pairs):,} {part} samples; on the line, answer and target are equal."
    chart = scatter("Answer and target", shown, "target", "answer", note) if shown else ""
    names, some = _feature_names(run, X)
    cells = [
        [int(run.rows[part][i]), f"{targets[i, 0]:.5g}", f"{outputs[i, 0]:.5g}", f"{error[i]:.3g}",
         *(f"{value:.4g}" for value in X[i, : len(names)])]
        for i in worst
    ]  # fmt: skip
    table = _table(["sample", "target", "answer", "error", *names], cells, "Worst answers")
    return f'<div class="charts">{chart}</div><h3>Worst answers</h3>{table}{some}'


def _feature_names(run: Run, X: Host) -> tuple[list[str], str]:
    names = list(run.features or (f"x{i}" for i in range(X.shape[1])))
    some = f'<p class="note">The first {_FEATURES} of {len(names)} features.</p>' if len(names) > _FEATURES else ""
    return names[:_FEATURES], some


def _image(x: Host, name: str) -> str:
    """8x8 pixels in the colour of the text."""
    ink = [(i % 8, i // 8, value) for i, value in enumerate(x.tolist()) if value > 0]
    pixels = "".join(f'<rect x="{i}" y="{j}" width="1.02" height="1.02" opacity="{value:.2g}"/>' for i, j, value in ink)
    return f'<svg viewBox="0 0 8 8" role="img" aria-label="a handwritten {escape(name)}">{pixels}</svg>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], label: str) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


_STYLE = """
:root{--paper:#fff;--raised:#f5f6f8;--ink:#1b1f24;--soft:#59636e;--rule:#d9dde2;--link:#0757a8;--bad:#b3261e;--hit:#1a7f5a;
--miss:#d1392b;--c0:#0b62c4;--c1:#c2500a;--c2:#17805c;--c3:#8a3ab9;--c4:#8a6a00;--c5:#b0205e}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--raised:#1d2127;--ink:#e6e9ed;--soft:#a0a9b4;--rule:#343b44;
--link:#7db8f5;--bad:#ff8a80;--hit:#3fbf8f;--miss:#ff6f61;--c0:#6cb0ff;--c1:#ffa15c;--c2:#5fd3a6;--c3:#cf9bf2;--c4:#e3c04f;
--c5:#ff8fb8}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:3.5rem}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0 auto;max-width:72rem;padding:0 1rem 2rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
section:first-child h2{border:0;margin-top:.4rem}
p{max-width:44rem}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.3rem .6rem;z-index:2}
nav{display:flex;gap:.2rem 1rem;flex-wrap:wrap;padding:.3rem 0}
nav a{padding:.2rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:0 0 1rem}
.tiles div{background:var(--raised);border-radius:.5rem;padding:.6rem .8rem}
.tiles dt{color:var(--soft);font-size:.85rem}.tiles dd{margin:0;font-size:1.4rem;font-weight:600}
.facts div{display:grid;grid-template-columns:7rem 1fr;gap:.5rem;padding:.25rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
@media(max-width:30rem){.facts div{grid-template-columns:1fr;gap:0}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1.2rem}
figure{margin:0}figcaption{font-weight:600;margin-bottom:.3rem}
figure svg{display:block;width:100%;height:auto;max-width:34rem}
figure text{fill:var(--soft);font-size:11px}
.turned{transform:rotate(-90deg);transform-box:fill-box;transform-origin:center}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.dashed{stroke-dasharray:5 3}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
.dot{stroke-width:0}.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}.dot.c3{fill:var(--c3)}
.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}.faint{opacity:.55}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.4rem}.legend svg{width:1.4rem;height:.5rem}
.note{color:var(--soft);font-size:.85rem;margin:.3rem 0 0}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500}
.matrix th,.matrix td{padding:.2rem;text-align:center;border:1px solid var(--paper);min-width:1.9rem;height:1.9rem}
.matrix th{font-weight:600;color:var(--ink)}
.matrix td{background:color-mix(in srgb,var(--hue) var(--share),var(--raised))}
.hit{--hue:var(--hit)}.miss{--hue:var(--miss)}
.images{list-style:none;display:grid;grid-template-columns:repeat(auto-fill,minmax(6.7rem,1fr));gap:.8rem;padding:0}
.images svg{display:block;width:100%;max-width:7rem;background:var(--raised);border-radius:.4rem;fill:var(--ink);
margin-bottom:.3rem}
.images span{white-space:nowrap;font-size:.9rem}
.images small{display:block;color:var(--soft)}
.bad{color:var(--bad);font-weight:600}
code{white-space:nowrap}
pre{background:var(--raised);padding:.7rem;border-radius:.5rem;overflow-x:auto;font-size:.85rem}
details{margin:1rem 0}summary{cursor:pointer;color:var(--link);padding:.2rem 0}
footer{margin-top:2.5rem;color:var(--soft);font-size:.85rem}
@media print{nav,.skip{display:none}}
"""
