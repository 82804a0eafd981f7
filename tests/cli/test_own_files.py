"""Files as people have them: what `train` makes of each, or with which words it refuses it; and that what `predict` writes for
the test samples is as right as `train` said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from anyarray_linear import cli
from anyarray_linear.cli import _results, _training
from anyarray_linear.datasets import load_data, load_digits, split

Rows = list[list[Any]]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process, in an empty folder; without its drawings, which take longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_training, "report", lambda *args: "")
    monkeypatch.setattr(_results, "picture", lambda *args: b"")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anyarray-linear", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Outcome(end.value.code, *capsys.readouterr())

    return run


def table_of(name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features, targets and the columns' names of a data set of scikit-learn; where that is not, some like it."""
    if find_spec("sklearn") is not None:
        from sklearn import datasets

        data = getattr(datasets, f"load_{name}")()
        y = data.target_names[data.target] if name != "diabetes" else data.target.astype(int)
        return data.data, y, list(data.feature_names)
    rng = np.random.default_rng(len(name))
    N, D, classes = {"wine": (178, 13, 3), "iris": (150, 4, 3), "breast_cancer": (569, 30, 2), "diabetes": (442, 10, 0)}[name]
    names = [f"{name} {i}" for i in range(D)]
    if not classes:
        X = rng.normal(size=(N, D))
        return X, (150 + 40 * X[:, 0] + 30 * rng.normal(size=N)).astype(int), names
    ids = np.sort(np.arange(N) % classes)
    return rng.normal(size=(N, D)) + 3 * np.eye(classes, D)[ids], np.array([f"class_{i}" for i in range(classes)])[ids], names


def text_of(head: list[str] | None, rows: Rows, delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerows([*([] if head is None else [head]), *rows])
    return file.getvalue()


def known(name: str, **options: Any) -> str:
    X, y, names = table_of(name)
    return text_of([*names, "target"], [[*x, t] for x, t in zip(X.tolist(), y.tolist(), strict=True)], **options)


def blobs(labels: list[Any], head: list[str] | None = ["a", "b", "label"], count: int = 90) -> tuple[list[str] | None, Rows]:  # noqa: B006
    """Rows of two numbers and a label, which is easily told from them."""
    rng = np.random.default_rng(7)
    ids = rng.integers(0, len(labels), count)
    return head, [[f"{a:.3f}", f"{b:.3f}", labels[i]] for i, (a, b) in zip(ids, rng.normal(size=(count, 2)) + 4 * ids[:, None], strict=True)]


def iris_as_kaggle_has_it() -> str:
    X, y, _ = table_of("iris")
    rows = [[i + 1, *x, f"Iris-{t}"] for i, (x, t) in enumerate(zip(X.tolist(), y.tolist(), strict=True))]
    return text_of(["Id", "SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm", "Species"], rows)


def imbalanced() -> str:
    rng = np.random.default_rng(1)
    ids = rng.choice(3, 400, p=[0.94, 0.04, 0.02])
    return text_of(["a", "b", "fraud"], [[*x, i] for i, x in zip(ids.tolist(), (rng.normal(size=(400, 2)) + ids[:, None]).tolist(), strict=True)])


def with_column(name: str, cells: list[Any]) -> str:
    """Blobs with one more column, of these cells over and over."""
    head, rows = blobs(["yes", "no"])
    return text_of([name, *head], [[cells[i % len(cells)], *row] for i, row in enumerate(rows)])


# The files that are trained on: what they hold, how they are called, options, classes (`None`: numbers), and what is said.
TAKEN: dict[str, tuple[str | bytes, str, tuple[str, ...], tuple[str, ...] | int | None, str]] = {
    "wine": (known("wine"), "wine.csv", (), 3, "3 different texts, so classes"),
    "iris with an Id": (iris_as_kaggle_has_it(), "Iris.csv", (), 3, "warning: Iris.csv: column 'Id' has another whole number"),
    "iris without it": (iris_as_kaggle_has_it(), "Iris.csv", ("--drop", "Id"), 3, "3 different texts"),
    "diabetes": (known("diabetes"), "diabetes.csv", (), None, "a number to predict; to change that: --task classification"),
    "breast cancer, packed": (gzip.compress(known("breast_cancer").encode()), "cancer.csv.gz", (), 2, "2 different texts"),
    "imbalanced": (imbalanced(), "fraud.csv", (), ("0", "1", "2"), "--task regression"),
    "semicolons": (text_of(*blobs(["x", "y"]), delimiter=";"), "a.csv", (), ("x", "y"), ""),
    "tabs": (text_of(*blobs(["x", "y"]), delimiter="\t"), "a.tsv", (), ("x", "y"), ""),
    "a byte order mark": ("\ufeff" + text_of(*blobs(["x", "y"])), "a.csv", (), ("x", "y"), ""),
    "carriage returns": (text_of(*blobs(["x", "y"])).replace("\n", "\r\n"), "a.csv", (), ("x", "y"), ""),
    "comments": ("# measured in May\n" + text_of(*blobs(["x", "y"])) + "# the end\n", "a.csv", (), ("x", "y"), ""),
    "no header": (text_of(*blobs([0, 1], None)), "a.csv", (), ("0", "1"), "2 different whole numbers, so classes"),
    "names with commas and quotes": (text_of(*blobs(["x, y", 'the "z"'])), "a.csv", (), ('the "z"', "x, y"), ""),
    "names of other scripts": (text_of(*blobs(["猫", "ëgel", "עברית"])), "a.csv", (), ("ëgel", "עברית", "猫"), ""),
    "truth values as features": (with_column("member", ["True", "False", "FALSE"]), "a.csv", (), ("no", "yes"), ""),
    "truth values as the target": (text_of(*blobs(["True", "False"])), "a.csv", (), ("False", "True"), ""),
    "years as labels": (text_of(*blobs([2021, 2019, 2020])), "a.csv", (), ("2019", "2020", "2021"), "3 different whole numbers"),
    "labels from 1": (text_of(*blobs([1, 2, 3])), "a.csv", (), ("1", "2", "3"), ""),
    "labels in hundreds": (text_of(*blobs([100, 200, 300])), "a.csv", (), ("100", "200", "300"), ""),
    "negative labels": (text_of(*blobs([-1, 1])), "a.csv", (), ("-1", "1"), ""),
    "labels as floats": (text_of(*blobs(["1.0", "2.0"])), "a.csv", (), ("1.0", "2.0"), ""),
    "labels with zeros before": (text_of(*blobs(["007", "042"])), "a.csv", (), ("007", "042"), ""),
    "a column that never varies": (with_column("unit", [7]), "a.csv", (), ("no", "yes"), ""),
    "text left out": (with_column("city", ["Paris", "Rome"]), "a.csv", ("--drop", "city"), ("no", "yes"), ""),
    "dates left out": (with_column("day", ["2024-01-31"]), "a.csv", ("--features", "a,b"), ("no", "yes"), ""),
    "ratings as numbers": (text_of(*blobs([1, 2, 3, 4, 5])), "a.csv", ("--task", "regression"), None, "a number to predict"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_file_is_trained_on_and_predict_is_as_right_as_was_said(run: Callable[..., Outcome], name: str) -> None:
    content, file, options, classes, says = TAKEN[name]
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = ("--device", "cpu", "--epochs", 8, "--hidden", "16", "--lr", "0.02", "--out", "out")
    outcome = run("train", "--data", file, *options, *given)
    assert outcome.code == 0, outcome.err
    assert says in outcome.out + outcome.err
    assert ("warning" in outcome.err) == ("warning" in says)
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    found = tuple(summary["test"].get("classes", ())) or None
    assert (len(found or ()) if isinstance(classes, int) else found) == classes

    # what stands in the file's last column for the test samples, as a reader of it sees it, and what predict writes
    text = gzip.decompress(content).decode() if isinstance(content, bytes) else content.removeprefix("\ufeff")
    lines = "".join(line for line in io.StringIO(text, newline="") if not line.startswith("#"))
    rows = list(csv.reader(io.StringIO(lines, newline=""), delimiter=next(d for d in "\t;," if d in lines.splitlines()[0])))
    written = np.array([row[-1] for row in rows[0 if name == "no header" else 1 :]])
    predicted = np.array([row["prediction"] for row in csv.DictReader(io.StringIO(run("predict", "out", file).out))])
    ids = np.unique(written, return_inverse=True)[1] if classes is not None else written.astype(float)
    *_, test_rows, _ = split(np.arange(len(written)), ids, test=0.2, seed=0)
    if classes is not None:
        assert set(predicted) <= set(written)
        assert np.mean(predicted[test_rows] == written[test_rows]) == summary["test"]["accuracy"]
        assert summary["test"]["accuracy"] >= summary["test"]["baseline_accuracy"]
    else:
        y, Z = written[test_rows].astype(float), predicted[test_rows].astype(float)
        assert 1 - np.sum((y - Z) ** 2) / np.sum((y - y.mean()) ** 2) == pytest.approx(summary["test"]["r2"], abs=1e-5)


REFUSED: dict[str, tuple[str | bytes, str, tuple[str, ...]]] = {
    "a column of text": (with_column("city", ["Paris", "Rome"]), "a.csv", ("line 2, column 'city' is 'Paris'", "OneHotEncoder")),
    "an empty cell": (with_column("age", [31, ""]), "a.csv", ("line 3, column 'age' is empty", "SimpleImputer")),
    "NA": (with_column("age", [31, "NA"]), "a.csv", ("line 3, column 'age' is 'NA', a missing value", "SimpleImputer")),
    "a question mark": (with_column("age", ["?"]), "a.csv", ("line 2, column 'age' is '?', a missing value", "SimpleImputer")),
    "nan": (with_column("age", [31, "nan"]), "a.csv", ("line 3, column 'age' is nan", "SimpleImputer")),
    "a date": (with_column("day", ["31.01.2024"]), "a.csv", ("column 'day' is '31.01.2024', not a number but a date",)),
    "a decimal comma": ("a;b\n1,5;0\n", "a.csv", ("column 'a' is '1,5', not a number", "decimal=','")),
    "no target": (text_of(*blobs(["x", ""])), "a.csv", ("column 'label' is empty",)),
    "another encoding": (text_of(*blobs(["é", "b"])).encode("latin-1"), "a.csv", ("is not UTF-8 text", "save it as CSV UTF-8")),
    "a spreadsheet": (b"PK\3\4", "a.xlsx", ("is neither a .npz nor a .csv file",)),
    "one class": (text_of(*blobs(["x"])), "a.csv", ("every sample is of the class 'x'",)),
    "names of people": (text_of(*blobs([f"n{i}" for i in range(999)], count=30)), "a.csv", ("another value", "--target")),
    "a broken line": (text_of(*blobs(["x", "y"])) + "1,2\n", "a.csv", ("line 92 has 2 cells but the first row has 3",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_file_is_refused_with_the_place_and_the_cure(run: Callable[..., Outcome], name: str) -> None:
    content, file, words = REFUSED[name]
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = run("train", "--data", file, "--out", "out")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {file}: ")
    for word in words:
        assert word in outcome.err
    assert not Path("out").exists()


@pytest.mark.parametrize("names", [("X", "y"), ("data", "target")])
def test_arrays_of_digits_are_as_right_as_was_said(run: Callable[..., Outcome], names: tuple[str, str]) -> None:
    X, y = load_digits()
    np.savez("digits.npz", **{names[0]: X, names[1]: y.astype(float)})
    assert run("train", "--data", "digits.npz", "--device", "cpu", "--epochs", 2, "--hidden", 16, "--out", "out").code == 0
    predicted = [row["prediction"] for row in csv.DictReader(io.StringIO(run("predict", "out", "digits.npz").out))]
    *_, test_rows, _ = split(np.arange(len(y)), y, test=0.2, seed=0)
    accuracy = np.mean(np.array(predicted)[test_rows] == y[test_rows].astype(str))
    assert accuracy == json.loads(Path("out/summary.json").read_text())["test"]["accuracy"]


@pytest.mark.slow
def test_a_hundred_thousand_rows_of_fifty_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(100_000, 50)).astype(np.float32), rng.integers(0, 3, 100_000)
    np.savetxt(tmp_path / "large.csv", np.c_[X, y], delimiter=",", fmt=["%.9g"] * 50 + ["%d"])
    data = load_data(tmp_path / "large.csv")
    np.testing.assert_array_equal(data.X.astype(np.float32), X)
    np.testing.assert_array_equal(data.y, y)
