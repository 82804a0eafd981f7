"""The sections of the report about a model's answers: class by class, which for which, how sure, and the worst ones."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ._charts import figure, scatter, shares, thinned
from ._html import HINT, Name, Number, note, table, text, wide
from ._run import Run
from ._scores import confusion, shown, softmax

Host = np.ndarray[Any, Any]
Section = tuple[str, str, str]

MAX_CLASSES = 30
"""More of them make no confusion matrix that anybody can read; the pairs that are confused most are listed then."""
_LISTED, _WORST, _FEATURES, _POINTS, _BINS = 100, 16, 8, 600, 10


def answers(run: Run, Z: Host, part: str, score: dict[str, Any]) -> list[Section]:
    """The sections about outputs `Z` `(N, outputs)` for one part of the data."""
    X, y = run.parts[part]
    Z = Z.astype(np.float64)
    if run.classes is None:
        return [("answers", "Answers", _of_numbers(run, part, X, y, Z))]
    P = softmax(Z)
    guesses = P.argmax(axis=1)
    return [
        ("classes", "Class by class",
         f'<div class="pair"><div>{by_class(score["classes"], part)}</div>{_certainty(P, y == guesses, part)}</div>'),
        ("confusion", "Confusion", confused(run.classes, y, guesses, part)),
        ("worst", "Worst answers", _worst(run, part, X, y, P)),
    ]  # fmt: skip


def by_class(scores: dict[str, Any], part: str) -> str:
    """Precision, recall and F1 of each class; of very many, of those with the lowest F1."""
    rows = sorted(scores.items(), key=lambda item: item[1]["f1"]) if len(scores) > _LISTED else list(scores.items())
    cells = [
        [Name(name), *(Number(shown(each, score[each]), score[each]) for each in ("precision", "recall", "f1")),
         f"{score['samples']:,}"]
        for name, score in rows[:_LISTED]
    ]  # fmt: skip
    some = f"The {_LISTED} of {len(scores)} classes with the lowest F1. " if len(scores) > _LISTED else ""
    told = (
        f"{some}Precision: which share of the answers is right. Recall: which share of the {part} samples of the class is "
        "found. F1: the harmonic mean of both."
    )
    return table(["class", "precision", "recall", "F1", "samples"], cells, "Class by class") + note(told)


def confused(classes: Sequence[str], y: Host, guesses: Host, part: str) -> str:
    """Which class is answered for which."""
    wrong, K = int(np.count_nonzero(y != guesses)), len(classes)
    told = f"<p>{wrong:,} of {len(y):,} {part} samples are answered wrongly.</p>"
    if K > MAX_CLASSES:
        pairs, counts = np.unique(np.stack([y, guesses])[:, y != guesses], axis=1, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:_WORST]
        listed = [[Name(classes[pairs[0, i]]), Name(classes[pairs[1, i]]), int(counts[i])] for i in most]
        some = note(f"A matrix of {K} classes could not be read. These are {len(most)} of the {len(counts)} pairs that are "
                    "confused; classes and pairs that are not listed are left out.")  # fmt: skip
        return told + table(["class", "answer", "samples"], listed, "The pairs that are confused most") + some
    counts = confusion(y, guesses, K)
    head = "".join(f'<th scope="col">{text(Name(name))}</th>' for name in classes)
    body = []
    for i, row in enumerate(counts.tolist()):
        total = sum(row) or 1
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss"}" style="--share:{_strength(n / total):.0f}%">{n or ""}</td>'
            for j, n in enumerate(row)
        )
        body.append(f'<tr><th scope="row">{text(Name(classes[i]))}</th>{cells}</tr>')
    matrix = f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    absent = [classes[i] for i in range(K) if not counts[i].any()]
    nobody = f"<p>No {part} sample is of {', '.join(text(Name(name)) for name in absent)}.</p>" if absent else ""
    return (
        f"{told}<p>A row is a class, a column an answer; the colour says which share of the class has it.</p>"
        f"{wide(matrix, 'Confusion matrix')}{nobody}"
    )


def _strength(share: float) -> float:
    """How strong a cell's colour is, in percent; one sample in a hundred should be seen."""
    return 0.0 if share == 0 else 18 + 62 * share**0.5


def _certainty(P: Host, right: Host, part: str) -> str:
    """How often the answers are right that the model gives with about the same probability."""
    sure = P.max(axis=1)
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    points = [(float(sure[bins == i].mean()), float(right[bins == i].mean())) for i in range(_BINS) if (bins == i).any()]
    chart = shares(
        "How sure, how right (calibration)",
        points,
        "probability of the answer",
        "right",
        f"The {part} samples in {_BINS} groups by the probability of their answer, those without a sample left out. On the "
        "line, answers are right as often as the model says; below it, the model is too sure.",
    )
    return figure(chart)


def _worst(run: Run, part: str, X: Host, y: Host, P: Host) -> str:
    assert run.classes is not None
    of_truth = P[np.arange(len(y)), y]
    worst = np.argsort(of_truth, kind="stable")[:_WORST].tolist()
    guesses = P.argmax(axis=1)
    told = (
        f"<p>The {part} samples whose true class got the lowest probabilities. Samples are counted from 0, in the order of "
        "the data.</p>"
    )
    if run.is_digits:
        return f'{told}<ul class="images">' + "".join(
            f"<li>{_image(X[i], run.classes[y[i]])}<b>{escape(run.classes[y[i]])}</b> "
            f'<span class="{"bad" if guesses[i] != y[i] else ""}">seen as {escape(run.classes[guesses[i]])}</span>'
            f"<small>true class {of_truth[i]:.1%}<br>sample {run.rows[part][i]}</small></li>"
            for i in worst
        ) + "</ul>"
    names, some = _feature_names(run, X)
    cells = [
        [int(run.rows[part][i]), Name(run.classes[y[i]]), Name(run.classes[guesses[i]]), f"{of_truth[i]:.1%}",
         *(f"{value:.4g}" for value in X[i, : len(names)])]
        for i in worst
    ]  # fmt: skip
    return told + table(["sample", "class", "answer", "its class got", *names], cells, "Worst answers") + HINT + some


def _of_numbers(run: Run, part: str, X: Host, y: Host, Z: Host) -> str:
    targets, outputs = (x.reshape(len(y), -1).astype(np.float64) for x in (y, Z))
    error = np.linalg.norm(outputs - targets, axis=1)
    worst = np.argsort(-error, kind="stable")[:_WORST].tolist()
    pairs = list(zip(targets[:, 0].tolist(), outputs[:, 0].tolist(), strict=True))
    drawn = list(thinned([pair for pair in pairs if np.isfinite(pair).all()], _POINTS))
    several = f"The first of {targets.shape[1]} outputs. " if targets.shape[1] > 1 else ""
    some = f"{several}{len(drawn):,} of {len(pairs):,} {part} samples"
    charts = figure(
        scatter("Answer and target", drawn, "target", "answer", line="equal", note=f"{some}; on the line, both are equal.")
    ) + figure(
        scatter(
            "What is left: target minus answer",
            [(answer, target - answer) for target, answer in drawn],
            "answer",
            "target - answer",
            line="zero",
            note="Without a pattern, nothing is left to learn from the features; a funnel or a bow is one.",
        )
    )
    names, more = _feature_names(run, X)
    cells = [
        [int(run.rows[part][i]), f"{targets[i, 0]:.5g}", f"{outputs[i, 0]:.5g}", f"{error[i]:.3g}",
         *(f"{value:.4g}" for value in X[i, : len(names)])]
        for i in worst
    ]  # fmt: skip
    listed = table(["sample", "target", "answer", "error", *names], cells, "Worst answers")
    return f'<div class="charts">{charts}</div><h3>Worst answers</h3>{listed}{HINT}{more}'


def _feature_names(run: Run, X: Host) -> tuple[list[Name], str]:
    names = [Name(name) for name in run.features or (f"x{i}" for i in range(X.shape[1]))]
    some = note(f"The first {_FEATURES} of {len(names)} features.") if len(names) > _FEATURES else ""
    return names[:_FEATURES], some


def _image(x: Host, name: str) -> str:
    """8x8 pixels in the colour of the text."""
    ink = [(i % 8, i // 8, value) for i, value in enumerate(x.tolist()) if value > 0]
    pixels = "".join(f'<rect x="{i}" y="{j}" width="1.02" height="1.02" opacity="{value:.2g}"/>' for i, j, value in ink)
    return f'<svg viewBox="0 0 8 8" role="img" aria-label="a handwritten {escape(name)}">{pixels}</svg>'
