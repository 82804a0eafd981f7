"""The `verify` command: what it proves, what it prints, and that a fault reaches the exit code."""

from __future__ import annotations

import json

import pytest
import typer
from spoiled import Spoiled
from typer.testing import CliRunner

from anyarray_linear.cli import verify as command


def run(*options):
    app = typer.Typer()
    app.command()(command.verify)
    return CliRunner().invoke(app, options)


class Wrong(Spoiled):
    spoil = ("db", (0, 3), 1.0)


@pytest.fixture
def one_shape(monkeypatch):
    monkeypatch.setattr(command, "SHAPES", (((8, 20), 5),))


def test_every_backend_that_works_here_is_verified_in_every_dtype(one_shape):
    result = run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"]
    verified = {(row["device"], row["dtype"]) for row in report["rows"]}
    assert {("cpu", "float32"), ("cpu", "float64")} <= verified
    for name in ("array_api_strict", "torch", "jax", "cupy"):
        assert (name in report["not_here"]) != any(row["backend"].startswith(f"{name} ") for row in report["rows"])
    for row in report["rows"]:
        assert all(0 < row[output] < 1 for output in ("Z", "dX", "dW", "db"))
        assert row["gradcheck"] < 1e-12
        assert row["adjoint"] < 1


def test_the_table_shows_what_the_json_says(one_shape):
    result = run("--device", "cpu")
    assert result.exit_code == 0
    for text in ("numpy", "float32", "8x20 -> 5", "ok", "versions: python", "All within the bounds."):
        assert text in result.stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_wrong_result_is_told_and_exits_with_1(one_shape, monkeypatch, options):
    monkeypatch.setattr(command, "Linear", Wrong)
    result = run("--device", "cpu", *options)
    assert result.exit_code == 1
    assert "db[0, 3] on cpu (float32)" in result.output
    assert "db gives the slope" in result.output
    assert "All within the bounds" not in result.output


def test_a_device_that_fails_to_compute_is_told_and_exits_with_1(one_shape, monkeypatch):
    class Failing(Spoiled):
        def forward(self, X):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(command, "Linear", Failing)
    result = run("--device", "cpu")
    assert result.exit_code == 1
    assert "RuntimeError: an illegal memory access" in result.output


def test_require_cuda_exits_with_1_when_none_was_verified(one_shape):
    result = run("--device", "cpu", "--require-cuda")
    assert "All within the bounds." in result.stdout  # which is true
    assert result.exit_code == 1
    assert "no CUDA device was verified" in result.output


@pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
def test_a_cuda_device_is_verified_by_its_own_name(backend, one_shape):
    result = run("--device", str(backend.device), "--require-cuda", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {(row["device"], row["dtype"]) for row in report["rows"]} == {
        (str(backend.device), dtype) for dtype in backend.dtypes
    }
    assert report["rows"][0]["name"] == backend.device.name
    assert set(report["cuda"][str(backend.device)]) >= {"cupy", "driver_cuda", "runtime_cuda", "float32_products"}


def test_the_table_fits_a_window_of_80_columns(one_shape, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("--device", "cpu").stdout
    (head,) = (line for line in out.splitlines() if line.startswith("dtype"))
    assert head.split()[-1] == "verdict"
    rows = [line for line in out.splitlines() if line.startswith("float")]
    assert len(rows) >= 2
    assert all("->" in row and row.rstrip().endswith("ok") for row in rows)
    assert max(map(len, (head, *rows))) <= 80


def test_a_wrong_training_step_is_told_and_exits_with_1(one_shape, monkeypatch):
    from anyarray_linear import SGD
    from anyarray_linear.testing import steps

    monkeypatch.setattr(steps, "SGD", lambda lr: SGD(0.99 * lr))
    result = run("--device", "cpu")
    assert result.exit_code == 1
    assert "after a training step" in result.output


@pytest.mark.parametrize("backend", ["cupy:0"], indirect=True)
def test_on_cupy_the_captured_step_is_verified(backend, one_shape):
    report = json.loads(run("--device", "cuda:0", "--json").stdout)
    assert {row["step_by"] for row in report["rows"]} == {"captured"}
    assert all(0 < row["step"] < 1 for row in report["rows"])


@pytest.mark.parametrize("backend", ["cupy:0"], indirect=True)
def test_the_doctor_takes_a_captured_step(backend, monkeypatch):
    from anyarray_linear.cli import devices

    app = typer.Typer()
    app.command()(devices.devices)
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["--doctor"])
    assert "training step" in result.stdout
    assert "right, captured" in result.stdout
    assert result.exit_code == 0
