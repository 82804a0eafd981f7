"""The command line: what it writes, what it refuses and how it says so, and what a signal leaves behind."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import anyarray_linear
from anyarray_linear import cli, load_model
from anyarray_linear.cli import _results, _run, _scores, _training, devices, predict
from anyarray_linear.cli._common import StopSignals
from anyarray_linear.datasets import load_digits, split
from anyarray_linear.files.checkpoints import checkpoints
from anyarray_linear.files.models import read_metadata
from anyarray_linear.testing import usable_devices

ROOT = Path(__file__).parents[2]
FILES = {"config.json", "model.safetensors", "history.jsonl", "curves.png", "report.html", "summary.json"}
COMMANDS = ("train", "predict", "export", "devices", "verify", "explain")
SMALL = ("--hidden", "16", "--device", "cpu")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anyarray-linear", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Outcome(end.value.code, *capsys.readouterr())

    return run


@contextmanager
def started(*arguments: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own, which does not outlive the context."""
    command = [sys.executable, "-m", "anyarray_linear", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=cwd, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_refused(outcome: Outcome, *words: str) -> None:
    """One line that says all of `words`, exit code 2, and no traceback."""
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    code = len(lines) - next((i for i, line in enumerate(reversed(lines)) if not line.startswith("  ")), 0)
    assert lines[code - 1].startswith("error: ")  # what mends it, as code, may stand below
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    for word in words:
        assert word in outcome.err


def loads(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A .csv with names that need quotes, a target in the middle, and features of very different sizes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "flowers.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["year", "kind", "width, mm", "always"])
        for i in range(120):
            kind = ("lily", "rose, red")[i % 2]
            writer.writerow([2000 + int(rng.integers(20)), kind, 1e-3 * (rng.normal() + 6 * (i % 2)), 7])
    return path


@pytest.fixture
def prices(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A regression whose target is far from 0, exactly linear in features far from 0."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(300, 2)) * [10, 0.1] + [5000, -3]
    y = 250_000 + 800 * (X[:, 0] - 5000) - 40_000 * (X[:, 1] + 3)
    path = tmp_path / "prices.npz"
    np.savez(path, X=X, y=y)
    return path, X, y


# ---------------------------------------------------------------------------------------------------------------------
# train: what it writes


@pytest.mark.slow
def test_defaults_reach_97_percent_on_unseen_digits(run: Callable[..., Outcome]) -> None:
    summaries = []
    for seed in range(5):
        assert run("train", "--device", "cpu", "--seed", seed, "--out", f"seed{seed}").code == 0
        summaries.append(loads(Path(f"seed{seed}/summary.json")))
    assert np.mean([summary["test"]["accuracy"] for summary in summaries]) >= 0.97


def test_run_folder_holds_the_trained_model_and_how_it_came_about(run: Callable[..., Outcome]) -> None:
    outcome = run("train", "--epochs", 3, "--seed", 4, *SMALL)
    assert outcome.code == 0
    (folder,) = Path("runs").iterdir()
    assert {path.name for path in folder.iterdir()} == FILES | {"checkpoints"}
    summary = loads(folder / "summary.json")
    assert list(summary) == ["device", "seconds", "epochs", "model_epoch", "train", "validation", "test"]
    assert summary["device"] == "cpu"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert {"loss", "accuracy", "validation_loss", "validation_accuracy", "lr"} <= history[0].keys()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert loads(folder / "config.json")["options"]["hidden"] == "16"
    # the test samples again, by hand: the score is that of the saved model on samples it was not trained on
    *_, X, y = split(*load_digits(), test=0.2, seed=4)
    Z = load_model(folder / "model.safetensors")(X)
    assert summary["test"]["accuracy"] == np.mean(Z.argmax(axis=1) == y)
    assert read_metadata(folder / "model.safetensors")["classes"] == list("0123456789")
    assert "summary.json" in outcome.out
    assert "validation" in outcome.out


def test_run_is_a_function_of_its_seed(run: Callable[..., Outcome]) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("train", "--epochs", 1, "--seed", seed, "--out", out, *SMALL).code == 0
    a, b, c = (Path(out, "model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "sgd", "--schedule", "cosine"),
        ("--optimizer", "adamw", "--schedule", "step", "--weight-decay", "0.1"),
        ("--schedule", "warmup", "--clip-norm", "1", "--activation", "tanh"),
        ("--activation", "gelu", "--dtype", "float64", "--hidden", "16,8"),
        ("--activation", "sigmoid", "--hidden", "none", "--validation", "0"),
        ("--activation", "silu", "--test", "0", "--batch-size", "7"),
    ],
)
def test_every_option_trains(run: Callable[..., Outcome], options: tuple[str, ...]) -> None:
    assert run("train", *SMALL, "--epochs", 2, "--out", "out", *options).code == 0
    history = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]
    assert history[1]["loss"] < history[0]["loss"]
    summary = loads(Path("out/summary.json"))
    assert ("test" in summary) == ("--test" not in options)
    assert ("validation" in summary) == ("--validation" not in options)


def test_it_trains_and_predicts_on_every_device_and_resumes_on_another(run: Callable[..., Outcome]) -> None:
    for device in usable_devices():
        if device.kind not in ("cpu", "cuda"):
            continue
        out = str(device).replace(":", "")
        assert run("train", "--epochs", 2, "--hidden", 16, "--device", device, "--out", out).code == 0
        assert loads(Path(out, "summary.json"))["device"] == str(device)
        assert run("train", "--resume", "--epochs", 3, "--device", "cpu", "--out", out).code == 0
        assert loads(Path(out, "summary.json"))["device"] == "cpu"
        np.savez("digits.npz", X=load_digits()[0][:50])
        predicted = rows_of(run("predict", out, "digits.npz", "--device", device).out)
        assert np.mean([row["prediction"] for row in predicted] == load_digits()[1][:50].astype(str)) > 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Scaling


def options_for(path: Path, **changes: Any) -> Any:
    given = {
        "data": path, "target": None, "task": None, "features": None, "drop": None, "standardize": True, "test": 0.2, "validation": 0.1, "hidden": "8",
        "activation": "tanh", "init": "xavier_normal", "early_stopping": None, "dtype": "float64", "device": "cpu", "tf32": False, "epochs": 1, "batch_size": 32, "optimizer": "adam",
        "lr": 1e-2, "schedule": "constant", "weight_decay": None, "clip_norm": None, "seed": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize("hidden", ["8", "8,4", "none"])
def test_model_for_raw_data_is_the_trained_one_on_scaled_data(prices: Any, hidden: str) -> None:
    job = _run.prepare(options_for(prices[0], hidden=hidden))
    X, y = job.scaled("train")
    np.testing.assert_allclose(X.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(X.std(axis=0), 1)
    np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-9)
    raw_X, raw_y = job.parts["train"]
    expected = job.model(X) * raw_y.std() + raw_y.mean()
    np.testing.assert_allclose(job.for_raw_data()(raw_X), expected, rtol=1e-9)


def test_scaled_loss_is_told_in_the_units_of_the_raw_target(prices: Any) -> None:
    job = _run.prepare(options_for(prices[0]))
    X, y = job.scaled("train")
    told, _ = job.loss.forward(job.model(X), y)
    raw_X, raw_y = job.parts["train"]
    np.testing.assert_allclose(told, np.mean((job.for_raw_data()(raw_X)[:, 0] - raw_y) ** 2), rtol=1e-9)


def test_scale_is_that_of_the_training_samples_alone(prices: Any) -> None:
    job = _run.prepare(options_for(prices[0]))
    assert job.x_scaling is not None
    np.testing.assert_allclose(job.x_scaling.shift, job.parts["train"][0].mean(axis=0))
    assert sum(len(y) for _, y in job.parts.values()) == len(prices[2])


def test_column_that_never_varies_is_ignored(flowers: Path) -> None:
    job = _run.prepare(options_for(flowers, target="kind"))
    X = job.parts["test"][0]
    model = job.for_raw_data()
    np.testing.assert_array_equal(model(X), model(X + np.array([0, 0, 1000.0])))


def test_regression_learns_a_target_far_from_zero(run: Callable[..., Outcome], prices: Any) -> None:
    path, _, y = prices
    assert run("train", "--data", path, "--hidden", "none", "--lr", 0.05, "--out", "out", "--device", "cpu").code == 0
    summary = loads(Path("out/summary.json"))
    assert list(summary["test"]) == ["loss", "r2", "rmse", "mae", "baseline_rmse"]
    assert summary["test"]["loss"] < 1e-3 * np.var(y)
    predicted = [float(row["prediction"]) for row in rows_of(run("predict", "out", path).out)]
    assert np.mean((np.array(predicted) - y) ** 2) < 1e-3 * np.var(y)


def test_column_that_float32_cannot_tell_apart_is_refused_by_name(run: Callable[..., Outcome]) -> None:
    Path("times.csv").write_text("size,time,y\n" + "".join(f"{i},{1.7e9 + i},{i % 2}\n" for i in range(40)))
    assert_refused(run("train", "--data", "times.csv", "--out", "out"), "times.csv", "'time'", "float32", "float64")
    assert run("train", "--data", "times.csv", "--out", "out", "--dtype", "float64", "--epochs", 1).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# predict


def test_predict_reads_columns_by_name_and_writes_class_names(run: Callable[..., Outcome], flowers: Path) -> None:
    trained = run("train", "--data", flowers, "--target", "kind", "--out", "out", "--epochs", 20, *SMALL)
    assert trained.code == 0
    table = rows_of(flowers.read_text())
    with Path("shuffled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["more", "width, mm", "always", "year"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "more": "0"} for row in table)
    assert run("predict", "out", "shuffled.csv", "--out", "predicted.csv", "--probabilities") == (0, "", "")
    predicted = rows_of(Path("predicted.csv").read_text())
    assert list(predicted[0]) == ["prediction", "probability_lily", "probability_rose, red"]
    right = np.mean([mine["prediction"] == theirs["kind"] for mine, theirs in zip(predicted, table, strict=True)])
    assert right > 0.9
    for row in predicted:
        p = {name: float(row[f"probability_{name}"]) for name in ("lily", "rose, red")}
        assert sum(p.values()) == pytest.approx(1)
        assert row["prediction"] == max(p, key=p.__getitem__)
    printed = run("predict", "out/model.safetensors", flowers)
    assert [row["prediction"] for row in rows_of(printed.out)] == [row["prediction"] for row in predicted]


def test_probabilities_do_not_overflow() -> None:
    (row,) = rows_of(predict._csv(np.array([[1000, 0]], np.float32), ["a", "b"], True))
    assert row == {"prediction": "a", "probability_a": "1.0", "probability_b": "0.0"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_have_the_digits_of_their_dtype_and_lose_none(dtype: str) -> None:
    Z = np.array([[98.19576], [1 / 3], [1e-30], [-2.5e20]], dtype)
    told = [row["prediction"] for row in rows_of(predict._csv(Z, None, False))]
    np.testing.assert_array_equal(np.array(told).astype(dtype), Z[:, 0])
    assert told[0] == "98.19576"


def test_predict_refuses_what_it_cannot_read_or_may_not_write(run: Callable[..., Outcome], flowers: Path) -> None:
    assert run("train", "--data", flowers, "--target", "kind", "--out", "out", "--epochs", 1, *SMALL).code == 0
    Path("cut.safetensors").write_bytes(Path("out/model.safetensors").read_bytes()[:-10])
    Path("other.csv").write_text("a,b\n1,2\n")
    before = flowers.read_bytes()
    assert_refused(run("predict", "nothing", flowers), "nothing")
    assert_refused(run("predict", "cut.safetensors", flowers), "cut.safetensors")
    assert_refused(run("predict", "out", "nothing.csv"), "nothing.csv")
    assert_refused(run("predict", "out", "other.csv"), "other.csv", "year")
    assert_refused(run("predict", "out", flowers, "--device", "gpu"), "gpu")
    assert_refused(run("predict", "out", flowers, "--out", flowers), "--out")
    assert_refused(run("predict", "out", flowers, "--out", "no/folder.csv"), "folder.csv")
    assert_refused(run("predict", "out"), "Missing argument 'DATA'; see: anyarray-linear predict --help")
    assert_refused(run("predict", flowers, "out"), "flowers.csv is data, and no model; MODEL,", "comes first")
    assert_refused(run("predict", ".", flowers), ". holds no model.safetensors; give the folder of a run, such as out, the newest")
    assert_refused(run("predict", "out", flowers, "more"), "(more); see: anyarray-linear predict --help")
    assert_refused(run("help"), "No such command 'help'; see: anyarray-linear --help")
    assert_refused(run("train", flowers), "flowers.csv); data go in by --data FILE")
    assert flowers.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--activation", "step"), ("--activation", "step", "relu")),
        (("--optimizer", "lion"), ("--optimizer", "lion", "adam")),
        (("--schedule", "x"), ("--schedule", "cosine")),
        (("--dtype", "int8"), ("--dtype", "float32")),
        (("--dtype", "float16", "--device", "cpu"), ("float16", "float32")),
        (("--device", "gpu"), ("gpu", "cuda")),
        (("--device", "cuda:99"), ("cuda:99",)),
        (("--epochs", "0"), ("--epochs", "0")),
        (("--epochs", "many"), ("--epochs", "'many' ")),
        (("--batch-size", "0"), ("--batch-size",)),
        (("--lr", "-1"), ("lr", "-1")),
        (("--lr", "nan"), ("lr", "nan")),
        (("--lr", "0", "--schedule", "cosine"), ("lr",)),
        (("--hidden", "12,x"), ("--hidden", "12,x", "128,64")),
        (("--hidden", "0"), ("--hidden",)),
        (("--hidden", "2147483647"), ("out of memory", "--hidden")),
        (("--test", "1"), ("--test", "fraction")),
        (("--validation", "1e-9"), ("--validation: 1e-09 of 1438 samples leaves one part empty",)),
        (("--validation", "nan"), ("--validation", "fraction")),
        (("--seed", "-1"), ("--seed",)),
        (("--weight-decay", "-1"), ("weight_decay",)),
        (("--clip-norm", "0"), ("clip_norm",)),
        (("--target", "y"), ("--target", "--data")),
        (("--data", "nothing.csv"), ("nothing.csv",)),
        (("--resume",), ("--resume", "config.json")),
        (("--checkpoint-every", "0"), ("--checkpoint-every",)),
        (("--unknown",), ("--unknown",)),
        (("more",), ("more",)),
    ],
)
def test_bad_option_is_refused_before_a_folder_is_made(
    run: Callable[..., Outcome], options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(run("train", "--out", "out", *options), *words)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1,2,a\n3,b\n", ("line 2",)),
        ("1,2,a\n3,x,b\n", ("line 2", "'x'")),
        ("1,nan,a\n3,4,b\n", ("nan",)),
        ("1,2,a\n3,inf,b\n", ("inf",)),
        ("1,2,1\n3,4,1\n", ('1',)),
        ("1,2,a\n3,4,a\n", ("'a'",)),
        ("1,2,a\n3,4,b\n", ("2 samples",)),
        ("", ("empty",)),
    ],
)
def test_bad_data_is_refused_before_a_folder_is_made(
    run: Callable[..., Outcome], content: str, words: tuple[str, ...]
) -> None:
    Path("bad.csv").write_text(content)
    assert_refused(run("train", "--data", "bad.csv", "--out", "out"), "bad.csv" if "2 samples" not in words else "", *words)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("size,weight,y\n1e308,1,1.5\n1e308,2,2.5\n-1e308,3,3\n1,4,4\n2,5,5\n", ("the column 'size'", "1e+308")),
        ("size,weight,y\n1,1,1e308\n2,2,-1e308\n3,3,1e308\n4,4,1e308\n5,5,0.5\n", ("the target", "1e+308")),
    ],
)
def test_numbers_whose_variance_overflows_are_told_by_their_column(
    run: Callable[..., Outcome], rows: str, words: tuple[str, ...]
) -> None:
    Path("big.csv").write_text(rows)
    outcome = run("train", "--data", "big.csv", "--out", "out", "--test", 0, "--validation", 0)
    assert_refused(outcome, "big.csv", *words)
    assert len(outcome.err.splitlines()) == 1  # and no warning of NumPy's
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_no_folder(run: Callable[..., Outcome]) -> None:
    outcome = run("train", "--optimizer", "sgd", "--lr", "1e30", "--out", "out", *SMALL)
    assert_refused(outcome, "step 2 (epoch 1, batch 2 of 41)", "learning rate")
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_is_told_when_a_signal_comes_in_the_same_epoch(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [], anyarray_linear.Linear.forward

    def watched(self: Any, X: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:  # two layers: step 10
            signal.raise_signal(signal.SIGINT)
        return forward(self, X)

    monkeypatch.setattr(anyarray_linear.Linear, "forward", watched)
    outcome = run("train", "--optimizer", "sgd", "--lr", "1e30", "--out", "out", *SMALL)
    assert_refused(outcome, "step 2 (epoch 1, batch 2 of 41)")
    assert "go on" not in outcome.out
    assert not Path("out").exists()


def test_a_model_whose_outputs_overflow_is_no_success(run: Callable[..., Outcome]) -> None:
    # one step, whose loss, gradient and weights are finite
    options = ("--optimizer", "sgd", "--lr", "1e25", "--epochs", 1, "--batch-size", 5000)
    outcome = run("train", *options, "--out", "out", *SMALL)
    assert_refused(outcome, "train, validation, test", "not finite", "--lr")
    assert not Path("out/model.safetensors").exists()
    assert not Path("out/summary.json").exists()


def test_folder_with_a_run_is_only_replaced_on_request_and_nothing_else_in_it(run: Callable[..., Outcome]) -> None:
    assert run("train", "--out", "out", "--epochs", 2, *SMALL).code == 0
    files = [Path("out/notes.txt"), Path("out/checkpoints/mine.safetensors")]
    for file in files:
        file.write_text("mine")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert_refused(run("train", "--out", "out", *SMALL), "out", "--overwrite", "--resume")
    assert_refused(run("train", "--out", "out", "--overwrite", "--lr", "nan", *SMALL), "lr")
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert run("train", "--out", "out", "--overwrite", "--epochs", 1, *SMALL).code == 0
    assert len(Path("out/history.jsonl").read_text().splitlines()) == 1
    assert len(checkpoints("out/checkpoints")) == 1
    assert [file.read_text() for file in files] == ["mine", "mine"]
    Path("file").write_text("")
    assert_refused(run("train", "--out", "file", *SMALL), "--out", "file")


def test_what_nobody_worded_keeps_its_traceback(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_training, "fit", lambda *args, **options: np.zeros(2) @ np.zeros(3))
    monkeypatch.setattr(sys, "argv", ["anyarray-linear", "train", "--out", "out", *SMALL])
    with pytest.raises(ValueError, match="matmul"):
        cli.main()
    assert not Path("out").exists()


def test_disk_that_is_full_at_the_end_is_one_line_and_resume_finishes(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        write = _results.atomic_write

        def full(path: Path, data: bytes, **options: Any) -> None:
            if path.name == "history.jsonl":
                raise OSError(28, "No space left on device", str(path))
            write(path, data, **options)

        patch.setattr(_results, "atomic_write", full)
        assert_refused(run("train", "--out", "out", "--epochs", 2, *SMALL), "history.jsonl", "No space left")
    assert not Path("out/summary.json").exists()
    assert run("train", "--out", "out", "--resume").code == 0
    assert {path.name for path in Path("out").iterdir()} == FILES | {"checkpoints"}


def test_a_config_that_cannot_be_written_leaves_the_one_that_was_there(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", "--out", "out", "--epochs", 1, *SMALL).code == 0
    names = FILES - {"summary.json"}  # which is gone while a run is resumed
    before = {path: path.read_bytes() for path in Path("out").iterdir() if path.name in names}
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("anyarray_linear.files.atomic.os.fsync", full)
        assert_refused(run("train", "--out", "out", "--resume", "--epochs", 2), "config.json", "No space left", "is unchanged")
    assert {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()} == before
    assert run("train", "--out", "out", "--resume", "--epochs", 2).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# What the run says of itself


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    names, y, y_train = ["a", "b", "c", "d", "never"], rng.integers(0, 4, 200), np.array([2, 2, 1])
    Z = rng.normal(size=(200, 5)) + 2 * np.eye(5)[y] - [0, 0, 0, 9, 9]  # "d" is never answered
    found = _scores.scores_of(Z, y, y_train, names)
    answers = Z.argmax(axis=1)
    told = metrics.classification_report(y, answers, output_dict=True, zero_division=0)
    assert found["accuracy"] == pytest.approx(told["accuracy"])
    for mine, theirs in (("macro_precision", "precision"), ("macro_recall", "recall"), ("macro_f1", "f1-score")):
        assert found[mine] == pytest.approx(told["macro avg"][theirs])
        each = [found["classes"][name][theirs.partition("-")[0]] for name in names[:4]]
        assert each == pytest.approx([told[str(i)][theirs] for i in range(4)])
    assert found["classes"]["never"] == {"precision": 0, "recall": 0, "f1": 0, "samples": 0}
    assert found["baseline_accuracy"] == np.mean(y == 2)
    assert found["loss"] == pytest.approx(metrics.log_loss(y, _scores.softmax(Z), labels=range(5)))
    for shape in ((200,), (200, 3)):
        y, y_train = 1000 + rng.normal(size=shape), rng.normal(size=shape)
        Z = y.reshape(200, -1) + rng.normal(size=(200, y.size // 200)) * [1, 2, 3][: y.size // 200]
        found = _scores.scores_of(Z, y, y_train, None)
        assert found["r2"] == pytest.approx(metrics.r2_score(y, Z))
        assert found["rmse"] ** 2 == pytest.approx(metrics.mean_squared_error(y, Z)) == pytest.approx(found["loss"])
        assert found["mae"] == pytest.approx(metrics.mean_absolute_error(y, Z))
        guess = np.broadcast_to(y_train.mean(axis=0), shape)
        assert found["baseline_rmse"] == pytest.approx(metrics.root_mean_squared_error(y.reshape(-1), guess.reshape(-1)))


@pytest.mark.parametrize(("Z", "r2"), [([[2.0], [2.0]], 1), ([[2.0], [3.0]], 0)])
def test_r2_of_a_target_that_never_varies_is_that_of_scikit_learn(Z: list[list[float]], r2: float) -> None:
    assert _scores.scores_of(np.array(Z), np.array([2.0, 2.0]), np.array([2.0]), None)["r2"] == r2


def test_table_has_the_scores_and_fits_80_columns(run: Callable[..., Outcome], flowers: Path, prices: Any) -> None:
    given = ("--device", "cpu", "--epochs", 2, "--test", "0.5")
    out = run("train", "--data", flowers, "--target", "kind", "--out", "a", *given).out
    for words in ("accuracy", "always the most frequent class", "F1, mean of the classes", "rose, red", "precision"):
        assert words in out
    out += run("train", "--data", prices[0], "--out", "b", *given).out
    for words in ("R²", "RMSE of always the mean", "MAE"):
        assert words in out
    drawn = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert len(drawn) > 20
    assert max(map(len, drawn)) <= 80
    assert "…" not in "".join(drawn)


def test_the_target_is_told_and_how_to_have_it_otherwise(run: Callable[..., Outcome]) -> None:
    rng = np.random.default_rng(0)
    np.savez("a.npz", X=rng.normal(size=(90, 2)), y=np.arange(90) * 3 % 70 + 25)
    out = run("train", "--data", "a.npz", "--epochs", 1, "--out", "a", *SMALL).out
    assert "the array 'y': 70 different whole numbers in 90 samples: a number to predict; to change that: --task class" in out
    assert "--task" not in run("train", "--data", "a.npz", "--epochs", 1, "--out", "b", "--task", "regression", *SMALL).out
    np.savez("a.npz", X=rng.normal(size=(90, 2)), y=np.arange(90) % 3 * 100)
    out = run("train", "--data", "a.npz", "--epochs", 1, "--out", "c", *SMALL).out
    assert "3 different whole numbers, so classes: '0', '100', '200'; to change that: --task regression" in out


def test_columns_are_dropped_and_an_id_is_warned_of(run: Callable[..., Outcome]) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{i},{rng.normal():.3f},{'x' if i % 2 else 'y'},{i % 3}" for i in range(60)]
    Path("a.csv").write_text("\n".join(["id,size,kind,note", *lines]))
    outcome = run("train", "--data", "a.csv", "--target", "kind", "--epochs", 1, "--out", "a", *SMALL)
    assert "warning: a.csv: column 'id' has another whole number in every row" in outcome.err
    given = ("--target", "kind", "--drop", "id, note", "--epochs", 1, "--out", "b")
    outcome = run("train", "--data", "a.csv", *given, *SMALL)
    assert "warning" not in outcome.err
    assert read_metadata("b/model.safetensors")["features"] == ["size"]
    assert len(rows_of(run("predict", "b", "a.csv").out)) == 60
    assert run("train", "--resume", "--epochs", 2, "--out", "b").code == 0
    assert_refused(run("train", "--data", "a.csv", "--drop", "id,", "--out", "c"), "--drop", "a,b")
    assert_refused(run("train", "--data", "a.csv", "--features", "none", "--out", "c"), "no column 'none'", "'size'")
    assert_refused(run("train", "--features", "a", "--out", "c"), "--features", "--data")


def test_what_text_needs_is_shown_below_the_error(run: Callable[..., Outcome]) -> None:
    Path("a.csv").write_text("city,kind\nParis,1\nRome,0\n")
    outcome = run("train", "--data", "a.csv", "--out", "out")
    assert_refused(outcome, "line 2, column 'city' is 'Paris'")
    assert [line.startswith("  ") for line in outcome.err.splitlines()[-4:]] == [False, True, True, True]
    assert "OneHotEncoder" in outcome.err


def test_every_sample_a_class_of_its_own_is_refused(run: Callable[..., Outcome]) -> None:
    Path("a.csv").write_text("size,name\n" + "".join(f"{i},n{i}\n" for i in range(30)))
    assert_refused(run("train", "--data", "a.csv", "--out", "out"), "column 'name'", "--target")


# ---------------------------------------------------------------------------------------------------------------------
# The best epoch is the model


def overfitting(path: Path) -> Path:
    """Data whose validation loss goes up again after some epochs, as its classes are noise."""
    rng = np.random.default_rng(5)
    np.savez(path, X=rng.normal(size=(120, 6)), y=(rng.random(120) < 0.5).astype(int))
    return path


def test_model_is_that_of_the_best_epoch_and_with_keep_last_of_the_last(run: Callable[..., Outcome], tmp_path: Path) -> None:
    data = overfitting(tmp_path / "noise.npz")
    given = ("--data", data, "--epochs", 12, "--lr", 0.05, "--hidden", 32, "--device", "cpu")
    outcome = run("train", "--out", "best", *given)
    rows = [json.loads(line) for line in Path("best/history.jsonl").read_text().splitlines()]
    best = int(np.argmin([row["validation_loss"] for row in rows])) + 1
    assert best < 12, "the data must overfit"
    summary = loads(Path("best/summary.json"))
    assert (summary["model_epoch"], summary["epochs"]) == (best, 12)
    assert f"the model is that of epoch {best}" in outcome.out
    assert summary["validation"]["loss"] == pytest.approx(rows[best - 1]["validation_loss"], rel=1e-4)
    assert run("train", "--out", "short", *given[:2], "--epochs", best, *given[4:]).code == 0
    assert Path("short/model.safetensors").read_bytes() == Path("best/model.safetensors").read_bytes()
    assert run("train", "--out", "last", "--keep", "last", *given).code == 0
    last = loads(Path("last/summary.json"))
    assert last["model_epoch"] == 12
    assert last["validation"]["loss"] == pytest.approx(rows[-1]["validation_loss"], rel=1e-4)
    # it is chosen when the files are written: the training is the same, and can be gone on with either way
    assert run("train", "--out", "last", "--resume", "--keep", "best").code == 0
    assert Path("last/model.safetensors").read_bytes() == Path("best/model.safetensors").read_bytes()
    assert run("train", "--out", "best", "--resume", "--epochs", 14).code == 0
    assert loads(Path("best/summary.json"))["model_epoch"] == best


def test_early_stopping_ends_training_and_is_resumed_exactly(run: Callable[..., Outcome], tmp_path: Path) -> None:
    data = overfitting(tmp_path / "noise.npz")
    given = ("--data", data, "--lr", 0.05, "--hidden", 32, "--device", "cpu", "--early-stopping", 3)
    outcome = run("train", "--out", "whole", "--epochs", 60, *given)
    losses = [json.loads(line)["validation_loss"] for line in Path("whole/history.jsonl").read_text().splitlines()]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 3 < 60
    assert "stopped early, after epoch" in outcome.out
    summary = loads(Path("whole/summary.json"))
    assert (summary["model_epoch"], summary["epochs"], summary["stopped_early"]) == (best, best + 3, True)
    # in two goes, between which nobody remembers how many epochs have passed without a better one
    assert run("train", "--out", "parts", "--epochs", best + 1, *given).code == 0
    assert run("train", "--out", "parts", "--resume", "--epochs", 60).code == 0
    for name in ("model.safetensors", "history.jsonl"):
        parts, whole = (Path(folder, name).read_bytes() for folder in ("parts", "whole"))
        assert name == "history.jsonl" or parts == whole
    assert loads(Path("parts/summary.json"))["epochs"] == best + 3
    assert "nothing to train: the run in whole was stopped early" in run("train", "--out", "whole", "--resume").out
    assert_refused(run("train", "--validation", 0, "--early-stopping", 3, "--out", "c"), "--early-stopping", "--validation")


def test_best_weights_that_are_lost_are_said(run: Callable[..., Outcome], tmp_path: Path) -> None:
    data = overfitting(tmp_path / "noise.npz")
    given = ("--data", data, "--epochs", 12, "--lr", 0.05, "--hidden", 32, "--device", "cpu")
    assert run("train", "--out", "out", *given).code == 0
    Path("out/checkpoints/best.safetensors").unlink()
    outcome = run("train", "--out", "out", "--resume")
    assert "warning: out/checkpoints/best.safetensors has not the weights of epoch" in outcome.err
    assert loads(Path("out/summary.json"))["model_epoch"] == 12


def test_a_checkpoint_is_no_model(run: Callable[..., Outcome], flowers: Path) -> None:
    assert run("train", "--data", flowers, "--target", "kind", "--out", "out", "--epochs", 2, *SMALL).code == 0
    folder = Path("out/checkpoints")
    for given in (folder / "best.safetensors", checkpoints(folder)[0], folder):
        assert_refused(run("predict", given, flowers), "no model", "take out/model.safetensors")
    if find_spec("onnx") is not None:
        assert_refused(run("export", folder / "best.safetensors"), "no model", "take out/model.safetensors")
    Path("out/model.safetensors").unlink()
    for given in ("out", folder, folder / "best.safetensors"):
        assert_refused(run("predict", given, flowers), "it is written by: anyarray-linear train --out out --resume")
    moved = Path("elsewhere.safetensors")
    moved.write_bytes((folder / "best.safetensors").read_bytes())
    assert_refused(run("predict", moved, flowers), "is a checkpoint", "save_model")


# ---------------------------------------------------------------------------------------------------------------------
# Resume, signals


def test_resume_with_nothing_to_do_says_so_and_what_to_type(run: Callable[..., Outcome]) -> None:
    assert run("train", "--out", "out", "--epochs", 3, *SMALL).code == 0
    outcome = run("train", "--out", "out", "--resume")
    assert outcome.code == 0
    assert "nothing to train: the run in out has all of its 3 epochs" in outcome.out
    assert "anyarray-linear train --out out --resume --epochs 13" in outcome.out
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert_refused(run("train", "--out", "out", "--resume", "--epochs", 2), "--epochs", "3 epochs already", "--epochs 13")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert "nothing to train" not in run("train", "--out", "out", "--resume", "--epochs", 4).out
    assert run("train", "--out", "cosine", "--epochs", 2, "--schedule", "cosine", *SMALL).code == 0
    out = run("train", "--out", "cosine", "--resume").out
    assert "nothing to train" in out
    assert "--epochs" not in out


def test_resume_takes_the_options_of_the_run_and_refuses_others(run: Callable[..., Outcome], flowers: Path) -> None:
    given = ("--data", flowers.name, "--target", "kind", "--hidden", "none", "--no-standardize", "--optimizer", "sgd")
    assert run("train", "--out", "out", "--epochs", 2, "--device", "cpu", *given).code == 0
    assert_refused(run("train", "--out", "out", "--resume", "--lr", 1), "--lr", "0.05")
    assert_refused(run("train", "--out", "out", "--resume", "--overwrite"), "--overwrite")
    assert_refused(run("train", "--resume"), "--out")
    before = loads(Path("out/config.json"))["options"]
    assert run("train", "--out", "out", "--resume", "--epochs", 4).code == 0
    assert loads(Path("out/config.json"))["options"] == {**before, "epochs": 4}
    assert len(Path("out/history.jsonl").read_text().splitlines()) == 4


def test_other_number_of_epochs_is_refused_where_the_schedule_depends_on_it(run: Callable[..., Outcome]) -> None:
    assert run("train", "--out", "out", "--epochs", 2, "--schedule", "cosine", *SMALL).code == 0
    assert_refused(run("train", "--out", "out", "--resume", "--epochs", 3), "--epochs")


def test_damaged_last_checkpoint_is_passed_over_and_named(run: Callable[..., Outcome], tmp_path: Path) -> None:
    assert run("train", "--out", "out", "--epochs", 2, *SMALL).code == 0
    last = checkpoints("out/checkpoints")[0]
    last.write_bytes(last.read_bytes()[:1000])
    with started("train", "--out", "out", "--resume", cwd=tmp_path) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0
    (warning,) = (line for line in err.splitlines() if line.startswith("warning: "))
    assert last.name in warning
    assert len(Path("out/history.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"[]", b"{}", b'{"options": 1}', b'{"options": [1, 2]}', b'{"options": {"lr": []}}',
        b'{"options": {"x": 1}}', b'{"options": {"hidden": {"a": 1}}}', b'{"options": {"epochs": "\xc3\xa9"}}',
        b'{"options": {"data": "\\u0000"}}', b"[" * 100_000, b'{"options": {"seed": ' + b"9" * 5000 + b"}}",
        b'{"options": {"epochs": NaN}}', b'{"options": {"overwrite": true}}',
    ],
)  # fmt: skip
def test_damaged_config_is_one_line(run: Callable[..., Outcome], content: bytes) -> None:
    Path("out").mkdir()
    Path("out/config.json").write_bytes(content)
    assert_refused(run("train", "--out", "out", "--resume"))
    assert Path("out/config.json").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value"),
    [("out", "elsewhere"), ("help", True), ("resume", False), ("overwrite", True), ("distributed", "mpi"), ("processes", "mpi"),
     ("no-such", 1), ("hidden", True), ("device", True), ("checkpoint_every", True), ("standardize", "x"), ("seed", "1 --out=elsewhere")],
)  # fmt: skip
def test_a_config_cannot_command_what_it_is_not_for(run: Callable[..., Outcome], name: str, value: object) -> None:
    assert run("train", "--out", "out", "--epochs", 1, *SMALL).code == 0
    config = loads(Path("out/config.json"))
    config["options"][name] = value
    Path("out/config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert_refused(run("train", "--out", "out", "--resume"), name.replace("_", "-"))
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_what_a_killed_run_left_half_written_is_removed(run: Callable[..., Outcome]) -> None:
    assert run("train", "--out", "out", "--epochs", 1, *SMALL).code == 0
    for option in ("--resume", "--overwrite"):
        for folder in ("out", "out/checkpoints"):
            Path(folder, ".0123456789ab.part").write_bytes(b"half")
            Path(folder, "mine.part").write_bytes(b"somebody else's")
        assert run("train", "--out", "out", "--epochs", 2, option, *SMALL[:2]).code == 0
        assert [path.name for path in Path("out").rglob("*.part")] == ["mine.part"] * 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_a_config_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "config.json")
    with started("train", "--out", "out", "--resume", cwd=tmp_path) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "config.json is no regular file" in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_training_with_all_files_and_resume_is_bit_identical(
    run: Callable[..., Outcome], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with started("train", "--out", "out", "--epochs", 10_000, "--checkpoint-every", 10, *SMALL, cwd=tmp_path) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("epoch 2 "):
            assert process.poll() is None
        assert_refused(run("train", "--out", "out", "--resume"), "out", str(process.pid))
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
    assert process.returncode == code
    assert "interrupted" in out
    assert "--resume" in out
    assert "Traceback" not in err
    assert {path.name for path in Path("out").iterdir()} == FILES | {"checkpoints"}
    assert not list(Path("out").rglob("*.part"))
    summary = loads(Path("out/summary.json"))
    assert summary["interrupted"] is True
    assert summary["epochs"] == len(Path("out/history.jsonl").read_text().splitlines()) >= 2
    epochs = summary["epochs"] + 2
    assert run("train", "--out", "out", "--resume", "--epochs", epochs).code == 0
    assert "interrupted" not in loads(Path("out/summary.json"))
    assert run("train", "--out", "whole", "--epochs", epochs, *SMALL).code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_second_signal_exits_at_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        assert stop.exit_code == 143
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 130
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_two_signals_leave_nothing_half_written(tmp_path: Path) -> None:
    # steps of 1e10 multiplications: the second signal comes while the first step goes on
    large = ("--hidden", "4000,4000", "--batch-size", 1000)
    folder = tmp_path / "out"
    with started("train", "--out", "out", "--device", "cpu", *large, cwd=tmp_path) as process:
        while not (folder / "config.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 143
    assert "Traceback" not in err
    if folder.exists():  # the first signal was in time for the run to end in order
        assert {path.name for path in folder.iterdir()} == FILES | {"checkpoints"}
        assert "interrupted" in out


def test_run_that_finished_no_epoch_has_its_files_too(tmp_path: Path) -> None:
    model = anyarray_linear.Linear(2, 2, seed=0)
    _results.write_results(tmp_path, model, {}, [], {"train": {"loss": float("inf")}}, "")
    assert (tmp_path / "history.jsonl").read_bytes() == b""
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert loads(tmp_path / "summary.json") == {"train": {"loss": None}}


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_help_teaches_and_loads_no_array_library_but_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['anyarray-linear', 'train', '--help']\n"
        "from anyarray_linear.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'cupy', 'torch', 'jax', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "anyarray-linear train --data" in done.stdout
    options = ("--data", "--hidden", "--activation", "--epochs", "--batch-size", "--optimizer", "--lr", "--schedule",
               "--dtype", "--device", "--seed", "--out", "--overwrite", "--resume")  # fmt: skip
    assert not [option for option in options if option not in done.stdout]


def test_version_names_what_is_installed(run: Callable[..., Outcome]) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert f"anyarray_linear {anyarray_linear.__version__}, Python {platform.python_version()}" in outcome.out
    for name in ("torch", "jax", "array-api-strict"):
        with suppress(metadata.PackageNotFoundError):
            assert f"{name} {metadata.version(name)}" in outcome.out
    assert f"numpy {np.__version__}" in outcome.out
    assert "array-api-compat" in outcome.out


def test_no_command_shows_the_help(run: Callable[..., Outcome]) -> None:
    outcome = run()
    assert outcome.code == 2
    for command in COMMANDS:
        assert command in outcome.out + outcome.err
    assert "error" not in outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_options_that_exist(run: Callable[..., Outcome], command: str) -> None:
    text = run(command, "--help").out
    examples, _, described = text.partition("Examples")[2].partition("╭")
    assert f"anyarray-linear {command}" in examples
    assert not [option for option in re.findall(r"--[a-z-]+", examples) if option not in described]


@pytest.mark.parametrize(("shell", "words", "count"), [("bash", "anyarray-linear ex", 1), ("zsh", "anyarray-linear train --ep", 2)])
def test_shell_completes_commands_and_options(shell: str, words: str, count: int) -> None:
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "_ANYARRAY_LINEAR_COMPLETE": f"complete_{shell}", "COMP_WORDS": words,
        "COMP_CWORD": str(count), "_TYPER_COMPLETE_ARGS": words,
    }  # fmt: skip
    command = [sys.executable, "-m", "anyarray_linear"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert {"bash": "explain", "zsh": "--epochs"}[shell] in done.stdout
    assert done.stderr == ""


def test_core_installation_names_the_extra(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    real = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("typer", "safetensors") else real(name))
    outcome = run("train")
    assert_refused(outcome, "typer, safetensors", 'pip install "anyarray_linear[train]"')
    assert len(outcome.err.splitlines()) == 1


def test_reader_that_has_seen_enough_is_no_error(run: Callable[..., Outcome], tmp_path: Path) -> None:
    assert run("train", "--out", "out", "--epochs", 1, *SMALL).code == 0
    for count in (10, 500_000):  # what stays in the buffer until the end, and what does not
        np.savez(tmp_path / "digits.npz", X=np.zeros((count, 64), np.float16))
        with started("predict", "out", "digits.npz", "--device", "cpu", cwd=tmp_path) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 1


# ---------------------------------------------------------------------------------------------------------------------
# The README


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in readme_blocks("python"):
        exec(block, names)
    printed = re.search(r"'accuracy': ([0-9.]+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) > 0.96
    assert names["layer"].dW.shape == (4, 3)
    np.testing.assert_array_equal(names["grads"]["W"], names["layer"].dW)


def test_the_readmes_commands_exist(run: Callable[..., Outcome]) -> None:
    lines = [line.partition("#")[0].split() for block in readme_blocks("bash") for line in block.splitlines()]
    ours = [words[1:] for words in lines if words and words[0] == "anyarray-linear"]
    assert len(ours) > 4
    for command, *words in ours:
        text = run(command, "--help").out
        assert not [word for word in words if word.startswith("--") and word not in text]


def test_a_card_fits_a_window_of_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    facts = {"compute_capability": "9.0", "driver_cuda": "13.0", "cupy": "14.2.0", "float32_products": "float32"}
    card = {"device": "cuda:0", "name": "NVIDIA H100 80GB HBM3", "memory_free": 78 << 30, "memory_total": 79 << 30, **facts}
    report = {"devices": [card], "examinations": {}, "warnings": [], "error": None, "chosen": "cuda:0", "reason": "it works"}
    devices._print(report, with_steps=False)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda:0"))
    assert row.split() == ["cuda:0", "NVIDIA", "H100", "80GB", "HBM3", "9.0", "78.0", "/", "79.0", "CUDA", "13.0", "14.2.0", "float32"]
