"""The report of a run: that it says what happened, needs nothing but itself, and can be read anywhere."""

from __future__ import annotations

import csv
import json
import re
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from test_cli import options_for

from anyarray_linear import Linear, MeanSquaredError, load_model
from anyarray_linear.cli import _answers, _charts, _curves, _norms, _report, _run, _scores, main
from anyarray_linear.datasets import load_data, load_digits, split


def trained(folder: Path, *arguments: object) -> Path:
    """The folder of a run of the command line in this process."""
    options = ("--device", "cpu", "--hidden", 16, "--out", folder, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["anyarray-linear", "train", *map(str, options)])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "digits", "--epochs", 3, "--seed", 4)


NAMES = ("<script>alert(1)</script>", "a & b", '"c"')


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .csv whose names would be code in a page that did not escape them; the last class cannot be told."""
    path, rng = tmp_path_factory.mktemp("data") / "<b>odd.csv", np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["<i>width", "row", "kind"])
        writer.writerows([rng.normal() + 3 * (i % 3), i, NAMES[i % 3]] for i in range(120))
    return path


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("data") / "numbers.npz", np.random.default_rng(1)
    X = rng.normal(size=(200, 12))
    np.savez(path, X=X, y=100 + 5 * X[:, 0] + np.where(np.arange(200) == 77, 500, 0))
    return path


class Page(HTMLParser):
    """What is in a page: its tables and texts; and that every tag is closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._label = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "div" and dict(attrs).get("role") == "region":
            self._label = dict(attrs)["aria-label"]
            self.tables[self._label] = []
        if tag == "tr":
            self.tables[self._label].append([])
        if tag in ("td", "th"):
            self.tables[self._label][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open[-2:]):  # or in the bdi of a name
            self.tables[self._label][-1][-1] += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_needs_no_network_and_runs_no_script(digits: Path) -> None:
    page = page_of(digits)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base", "form"}
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "action") if name in attrs]
    assert addresses
    assert all(address is not None and address.startswith(("#", "data:")) for address in addresses)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {address[1:] for address in addresses if address.startswith("#")} <= ids
    css = (digits / "report.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css


def test_confusion_matrix_and_worst_images_are_those_of_the_saved_model(digits: Path) -> None:
    X, y = load_digits()
    _, _, test_rows, _ = split(np.arange(len(X)), y, test=0.2, seed=4)
    Z = load_model(digits / "model.safetensors")(X[test_rows]).astype(np.float64)
    answers, truth = Z.argmax(axis=1), y[test_rows]
    page = page_of(digits)
    found = [[int(cell or 0) for cell in row[1:]] for row in page.tables["Confusion matrix"][1:]]
    expected = [[int(np.sum((truth == i) & (answers == j))) for j in range(10)] for i in range(10)]
    assert found == expected
    assert f"{np.sum(truth != answers)} of {len(truth)} test samples" in page.text
    loss = np.log(np.exp(Z - Z.max(axis=1, keepdims=True)).sum(axis=1)) - (Z[range(len(Z)), truth] - Z.max(axis=1))
    worst = test_rows[np.argsort(-loss)[:16]]
    at = [page.text.index(f"sample {row}") for row in worst]
    assert at == sorted(at)
    assert len([tag for tag, attrs in page.tags if "handwritten" in (attrs.get("aria-label") or "")]) == 16


def test_norms_in_the_history_are_those_of_the_layers_and_of_a_gradient_by_hand() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(300, 3)), rng.normal(size=(300, 2))
    layer = Linear(3, 2, seed=0)
    layer.b = rng.normal(size=(1, 2))
    run: Any = type("Run", (), {"model": [layer], "loss": MeanSquaredError(), "device": layer.device, "classes": None})
    found = _norms.Norms(run, X, y)(layer)
    X, y = X[:256], y[:256]
    dZ = 2 * (X @ layer.W.T + layer.b - y) / y.size
    expected = np.sqrt(np.sum((dZ.T @ X) ** 2) + np.sum(dZ.sum(axis=0) ** 2))
    assert found["gradient_norms"][""] == pytest.approx(expected, rel=1e-12)
    assert found["weight_norms"][""] == pytest.approx(np.sqrt(np.sum(layer.W**2) + np.sum(layer.b**2)), rel=1e-12)


def test_history_has_the_norms_after_each_epoch_and_the_last_are_the_saved_models(digits: Path) -> None:
    rows = [json.loads(line) for line in (digits / "history.jsonl").read_text().splitlines()]
    layer = load_model(digits / "model.safetensors")[2]
    last = np.sqrt(np.sum(layer.W.astype(float) ** 2) + np.sum(layer.b.astype(float) ** 2))
    assert rows[-1]["weight_norms"]["2"] == pytest.approx(last, rel=1e-12)
    assert rows[0]["weight_norms"]["2"] != pytest.approx(last, rel=1e-3)
    assert all(row["gradient_norms"].keys() == {"0", "2"} for row in rows)


def test_looking_at_the_norms_changes_no_bit_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_norms = trained(tmp_path / "with", "--epochs", 2)
    monkeypatch.setattr(_norms.Norms, "__call__", lambda self, model: {})
    without = trained(tmp_path / "without", "--epochs", 2)
    assert (with_norms / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()


def test_resumed_run_shows_its_epochs_from_before(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "--epochs", 2)
    trained(folder, "--resume", "--epochs", 4)
    assert [row[0] for row in page_of(folder).tables["Numbers by epoch"]] == ["epoch", "1", "2", "3", "4"]
    assert "norms from" not in page_of(folder).text
    charts = [attrs["aria-label"] for tag, attrs in page_of(folder).tags if tag == "svg" and "aria-label" in attrs]
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    (told,) = (label for label in charts if label.startswith("Norm of weights"))
    assert f"from {rows[0]['weight_norms']['0']:.4g} to {rows[3]['weight_norms']['0']:.4g}" in told


@pytest.mark.filterwarnings("ignore:.*another whole number")
def test_names_from_the_data_are_text_and_no_code(table: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "a <b> & 'c'", "--data", table, "--epochs", 2)
    page = page_of(folder)
    assert not {tag for tag, _ in page.tags} & {"script", "b", "i"}
    head, *rows = page.tables["Worst answers"]
    assert head == ["sample", "class", "answer", "its class got", "<i>width", "row"]
    X, y, classes, _ = load_data(table)
    for sample, name, _, _, width, row in rows:
        assert float(row) == int(sample)
        assert classes is not None
        assert name == classes[y[int(sample)]] == NAMES[int(sample) % 3]
        assert float(width) == pytest.approx(X[int(sample), 0], rel=1e-3)
    assert "'" in page.text
    assert "predict 'a <b> & '\"'\"'c'\"'\"'' FILE" in page.text
    assert str(tmp_path) not in page.text
    assert str(table.parent) not in (folder / "report.html").read_text(encoding="utf-8")
    assert all("<bdi>" + escape(name) in (folder / "report.html").read_text(encoding="utf-8") for name in NAMES)


def test_regression_shows_answers_beside_targets_and_the_worst_first(numbers: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "--data", numbers, "--epochs", 5, "--test", "0.9", "--validation", "0")
    X, y, *_ = load_data(numbers)
    head, *rows = page_of(folder).tables["Worst answers"]
    assert head == ["sample", "target", "answer", "error", *(f"x{i}" for i in range(8))]
    errors = [float(row[3]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    Z = load_model(folder / "model.safetensors")(X.astype(np.float32))
    for sample, target, answer, *_ in rows:
        assert float(target) == pytest.approx(y[int(sample)], rel=1e-4)
        assert float(answer) == pytest.approx(Z[int(sample), 0], rel=1e-3)
    assert rows[0][0] == "77"
    assert "first 8 of 12 features" in page_of(folder).text


def test_many_classes_make_a_list_of_the_pairs_and_no_matrix() -> None:
    y = np.array([0, 0, 0, 1, 1, 2] * 10)
    html = _answers.confused([f"k{i}" for i in range(50)], y, np.where(y == 1, 4, np.where(y == 2, 3, y)), "test")
    assert Page(html).tables == {
        "The pairs that are confused most": [["class", "answer", "samples"], ["k1", "k4", "20"], ["k2", "k3", "10"]]
    }
    assert "A matrix of 50 classes could not be read. These are 2 of the 2 pairs" in Page(html).text


def test_class_that_no_sample_is_of_is_said() -> None:
    y = np.array([0, 0, 2])
    page = Page(_answers.confused(["a", "b", "<c>", "d"], y, y, "test"))
    assert "No test sample is of b, d." in page.text
    assert page.tables["Confusion matrix"][0] == ["", "a", "b", "<c>", "d"]


def test_many_classes_are_listed_worst_first() -> None:
    rng = np.random.default_rng(0)
    names = [f"k{i:03}" for i in range(150)]
    y = rng.integers(0, 150, 2000)
    answers = np.where(rng.random(2000) < 0.7, y, rng.integers(0, 150, 2000))
    score = _scores.scores_of(np.eye(150)[answers], y, y, names)
    page = Page(_answers.by_class(score["classes"], "test"))
    rows = page.tables["Class by class"][1:]
    assert len(rows) == 100
    assert [row[3] for row in rows] == [f"{f:.2%}" for f in sorted(each["f1"] for each in score["classes"].values())[:100]]
    assert "The 100 of 150 classes with the lowest F1" in page.text


def test_calibration_is_of_the_groups_that_have_samples() -> None:
    P = np.array([[0.95, 0.05], [0.9, 0.1], [0.45, 0.55], [0.6, 0.4]])
    html = _answers._certainty(P, np.array([True, True, False, True]), "test")
    (told,) = (attrs["aria-label"] for tag, attrs in Page(html).tags if tag == "svg")
    assert told == "How sure, how right (calibration): right, 0% at 55%, 100% at 60%, 100% at 92%"


def test_run_without_a_finished_epoch_has_a_page(numbers: Path, tmp_path: Path) -> None:
    run = _run.prepare(options_for(numbers))
    options = {**vars(options_for(numbers)), "data": str(numbers)}
    summary = {"seconds": 0.1, "interrupted": True, "train": {"loss": float("nan")}, "test": {"loss": 1.0}}
    outputs = {name: run.for_raw_data()(X.astype("float64")) for name, (X, _) in run.parts.items()}
    page = Page(_report.report(run, outputs, tmp_path, {"options": options, "device": "cpu"}, [], summary))
    assert "interrupted" in page.text
    assert "There is nothing to draw" in page.text


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [1e-30, 1e30], [0.0, 1.0, float("nan")], [-1.0, float("inf"), 5.0], []])
def test_any_values_make_a_chart_inside_its_frame(values: list[float], log: bool) -> None:
    page = Page(_charts.figure(_charts.by_epoch("Loss", [_charts.Series("a", list(enumerate(values, 1)))], log=log)))
    dots = [attrs for tag, attrs in page.tags if tag == "use"]
    drawn = [value for value in values if np.isfinite(value) and (value > 0 or not log)]
    assert len(dots) == len(drawn)
    for dot in dots:
        assert 40 <= float(dot["x"] or 0) <= 360
        assert 0 <= float(dot["y"] or 0) <= 210


def test_an_axis_of_shares_ends_at_100_percent() -> None:
    points = [(1, 0.35), (2, 0.999), (3, 1.0)]
    chart = _charts.by_epoch("Accuracy", [_charts.Series("a", points)], percent=True)
    numbers = re.findall(r">\s*(\d+)%\s*<", _charts.figure(chart))
    assert max(map(int, numbers)) == 100
    assert min(map(int, numbers)) >= 30


def test_colours_of_a_chart_are_the_pages_and_its_ids_its_own() -> None:
    both = [_charts.figure(_charts.by_epoch(title, [_charts.Series("a", [(1, 2), (2, 1)])])) for title in ("One", "Two")]
    assert both[0] == _charts.figure(_charts.by_epoch("One", [_charts.Series("a", [(1, 2), (2, 1)])]))
    assert not re.findall(r"(?:stroke|fill): #", "".join(both))
    ids = [attrs["id"] for html in both for _, attrs in Page(html).tags if "id" in attrs]
    assert len(set(ids)) == len(ids) >= 2
    assert "<style" not in "".join(both)


def test_the_picture_is_the_same_drawing_and_marks_the_models_epoch() -> None:
    rows = [{"epoch": i, "loss": 1 / i, "validation_loss": 2 / i, "accuracy": 0.5, "validation_accuracy": 0.4} for i in (1, 2, 3)]
    charts = _curves.learning(rows, 2)
    assert [chart.title for chart in charts] == ["Loss", "Accuracy"]
    assert charts[0].told == "Loss by epoch: training from 1 to 0.3333; validation from 2 to 0.6667; the model is that of epoch 2"
    assert _charts.picture(charts).startswith(b"\x89PNG")


def test_long_training_is_thinned_and_keeps_its_last_epoch() -> None:
    html = _charts.figure(_charts.by_epoch("Loss", [_charts.Series("a", [(i, 1 / i) for i in range(1, 100_001)])], log=True))
    assert len(html) < 20_000
    assert "to 1e-05" in html


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_the_page_without_complaint_at_every_width(
    digits: Path, table: Path, tmp_path: Path, size: str, scheme: str
) -> None:
    folder = digits if scheme == "light" else trained(tmp_path / "run", "--data", table, "--epochs", 2)
    with browser.opened((folder / "report.html").as_uri(), tmp_path / "profile", size, scheme) as (page, wrong):
        assert page.locator("figure > svg").count() >= 5
        assert all(box["width"] > 200 for box in (svg.bounding_box() for svg in page.locator("figure > svg").all()))
        assert browser.overflow(page) <= 0
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, paper[4:-1].split(","))) > 200) == (scheme == "light")
        small = page.evaluate("[...document.querySelectorAll('figure text')].map(e => e.getBoundingClientRect().height)")
        assert min(small) > 9
        assert wrong == []


def test_keyboard_reaches_everything_that_moves_or_opens(digits: Path, tmp_path: Path) -> None:
    with browser.opened((digits / "report.html").as_uri(), tmp_path / "profile", "phone") as (page, wrong):
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.tagName + ':' + document.activeElement.textContent.slice(0, 12)"))
            if reached[-1].startswith("SUMMARY:The numbers") and reached[-1] not in reached[:-1]:  # Tab goes round
                page.keyboard.press("Enter")
                page.wait_for_selector("details[open]")
        assert reached[0] == "A:Skip to the "
        assert {"SUMMARY:The numbers", "SUMMARY:All options"} <= set(reached)
        assert any(name.startswith("PRE:") for name in reached)
        assert sum(name.startswith("DIV:") for name in reached) >= 3  # the tables, which scroll sideways
        assert wrong == []
    # this Chromium lets the keyboard scroll what has no tabindex too, other browsers do not
    assert {attrs.get("tabindex") for _, attrs in page_of(digits).tags if attrs.get("role") == "region"} == {"0"}
