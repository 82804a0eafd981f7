"""The bench command: that it times the same work, one implementation at a time, and says nothing about speed it has not measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer

from anyarray_linear.cli import _bench_worker, bench
from anyarray_linear.cli._bench_worker import IMPLEMENTATIONS, Server, drawn
from anyarray_linear.cli._common import StopSignals, exit_code_of

ROOT = Path(__file__).parents[1]
LAYER = {"kind": "layer", "batch": [3], "sizes": [5, 4]}
STEP = {"kind": "step", "batch": [6], "sizes": [5, 7, 3]}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SPOILED = "from anyarray_linear.cli import _bench_worker as w; {}; w.main()"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command in this process, its workers in theirs, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench.bench)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        capsys.readouterr()
        return Outcome(exit_code_of(app), *capsys.readouterr())

    return run


def spoil(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have every worker run `code` before it serves; `w` is its module."""
    monkeypatch.setattr(bench, "_WORKER", [sys.executable, "-c", SPOILED.format(code)])


def test_writes_medians_ratios_and_limits_that_follow_from_the_rounds(run: Callable[..., Outcome]) -> None:
    outcome = run("--quick", "--peers", "numpy", "--only", "layer1,step1", "--json", "b.json", "--plot", "b.png")
    assert outcome.code == 0, outcome.err
    assert "layer1" in outcome.out
    assert "step1" in outcome.out
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads(Path("b.json").read_text())
    assert set(report["cases"]) == {"layer1", "step1"}
    assert report["cases"]["layer1"]["batch"] + report["cases"]["layer1"]["sizes"] == [1, 16, 16]
    assert not report["stand_in"]
    for case in report["cases"].values():
        assert set(case["results"]) == {"ours", "numpy"}
        for result in (*case["results"].values(), case["limit"]["products"]):
            assert len(result["rounds"]) == report["rounds"] == 3
            assert result["median"] == sorted(result["rounds"])[1]
            assert 0 < min(result["rounds"]) <= result["q1"] <= result["median"] <= result["q3"] <= max(result["rounds"])
        ours = case["results"]["ours"]["median"]
        assert case["ratios"] == {"numpy": pytest.approx(case["results"]["numpy"]["median"] / ours)}
        moved = case["bytes_besides"] / report["roofs"]["bytes_per_second"]
        assert case["limit"]["seconds"] == pytest.approx(case["limit"]["products"]["median"] + moved)
        assert case["limit"]["reached"] == pytest.approx(case["limit"]["seconds"] / ours)


@pytest.mark.parametrize(
    ("only", "code", "what"),
    [
        ("layer1", "w._affine_gradients = lambda dZ, X, W: (dZ @ W, dZ.T @ X, dZ.mean(axis=0, keepdims=True) * 2)", "db"),
        ("layer1", "w._affine = lambda X, W, b: X @ W.T", "Z"),
        ("step1", "true = w._affine_gradients; w._affine_gradients = lambda *a: (0 * true(*a)[0], *true(*a)[1:])", "change of 0.W"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, only: str, code: str, what: str
) -> None:
    spoil(monkeypatch, code)
    outcome = run("--quick", "--peers", "numpy", "--only", only, "--json", "b.json")
    assert outcome.code == 1
    assert f"NumPy computes something else: {what} is" in outcome.err
    case = json.loads(Path("b.json").read_text())["cases"][only]
    assert set(case["results"]) == {"ours"}
    assert case["ratios"] == {}


def test_the_check_takes_rounding_and_refuses_nan_another_size_and_a_missing_result() -> None:
    ours = {"Z": np.asarray([[1.0, -2.0]])}
    bench.check("peer", {"Z": np.asarray([1.001, -2.0])}, ours)
    for theirs in ({"Z": np.asarray([[1.0, np.nan]])}, {"Z": np.asarray([[1.2, -2.0]])}, {"Z": np.ones((2, 2))}, {}):
        with pytest.raises(bench.Different, match=r"peer .*Z"):
            bench.check("peer", theirs, ours)


@pytest.mark.parametrize("peer", ["numpy", "torch", "jax", "thinc"])
@pytest.mark.parametrize("case", [LAYER, STEP], ids=["layer", "step"])
def test_every_peer_that_is_installed_computes_what_we_do(peer: str, case: dict[str, Any]) -> None:
    if find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    theirs, ours = (Server(IMPLEMENTATIONS[name]("cpu"))._results(case, drawn(case)) for name in (peer, "ours"))
    bench.check(peer, theirs, ours)
    assert len(ours) == (4 if case is LAYER else 5)


def test_the_work_of_a_layer_is_counted_as_the_derivation_has_it() -> None:
    N, n_in, n_out = 3, 5, 4
    products = [(N, n_in, n_out), (N, n_out, n_in), (n_out, N, n_in)]  # Z, dX and dW, rows by summands by columns
    arrays = drawn(LAYER)
    assert bench.work(LAYER)["flops"] == sum(2 * i * j * k for i, j, k in products)
    with_gradients = 2 * (arrays["X"].nbytes + arrays["W"].nbytes + arrays["b"].nbytes + arrays["dZ"].nbytes)  # Z is as dZ
    assert bench.work(LAYER)["bytes"] == with_gradients
    assert bench.work(LAYER)["bytes_besides"] == 3 * N * n_out * 4


def test_the_limit_of_a_step_leaves_out_the_gradient_that_nobody_asks_for() -> None:
    N, first, second = 6, 5 * 7, 7 * 3
    assert bench.work(STEP)["flops"] == 2 * N * (2 * first + 3 * second)
    assert bench.work(STEP)["bytes_besides"] == 7 * 4 * (first + 7 + second + 3)


def test_the_order_rotates_so_that_each_comes_first_equally_often() -> None:
    asked: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, do: str) -> dict[str, Any]:
            asked.append(self.name)
            return {"seconds": 1.0}

    answers = bench._interleaved({name: Fake(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(asked) == "abcbcacab"
    assert {name: len(each) for name, each in answers.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_burst_lasts_long_enough_and_the_fastest_one_counts() -> None:
    class Fake:
        """Calls that take a millisecond, but for a burst that is disturbed."""

        bursts = 0

        def layer(self, **inputs: Any) -> Callable[[], None]:
            return lambda: None

        def seconds(self, call: Callable[[], None], repeats: int) -> float:
            self.bursts += 1
            return 0.1 if self.bursts % 3 == 1 else 1e-3

    server = Server(Fake())
    repeats = server.prepare(LAYER, None, burst=0.02)["repeats"]
    assert repeats >= 20  # the disturbed burst did not pass for a long one
    assert server.burst() == {"seconds": 1e-3}


def test_by_clock_gives_the_time_of_one_call() -> None:
    assert 1e-3 <= _bench_worker.by_clock(lambda: time.sleep(1e-3), 50) < 0.04


@ON_LINUX
def test_a_worker_is_stopped_while_nothing_is_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with StopSignals() as stop, bench._Worker("numpy", "cpu", tmp_path / "log", stop) as worker:
        assert _settled_state(worker.process.pid) == "T"
        worker.ask("prepare", case=LAYER, results=None, burst=1e-4)
        assert worker.ask("burst")["seconds"] > 0
        assert _settled_state(worker.process.pid) == "T"


def _settled_state(pid: int) -> str:
    """The state of a process, given a moment for a signal to arrive."""
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            break
        time.sleep(0.01)
    return state


@ON_LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_leaves_no_worker_behind(number: signal.Signals, tmp_path: Path) -> None:
    code = "import typer; from anyarray_linear.cli.bench import bench; from anyarray_linear.cli._common import exit_code_of; "
    code += "app = typer.Typer(); app.command()(bench); import sys; sys.exit(exit_code_of(app))"
    command = [sys.executable, "-c", code, "--peers", "numpy", "--only", "layer1", "--rounds", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            deadline = time.monotonic() + 60
            while len(workers := children.read_text().split()) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(workers) == 3  # ours, numpy, limit
            time.sleep(1)
            process.send_signal(number)
            code_of_exit = process.wait(timeout=60)
        finally:
            process.kill()
    assert code_of_exit == (143 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + 20
    while (left := [pid for pid in workers if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_that_dies_is_reported_with_its_last_words(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "import sys; sys.argv[1] == 'numpy' and sys.exit('out of luck')")
    outcome = run("--quick", "--peers", "numpy", "--only", "layer1", "--json", "b.json")
    assert outcome.code == 0, outcome.err
    assert "not compared: NumPy: its process ended with code 1: out of luck" in outcome.out
    assert set(json.loads(Path("b.json").read_text())["cases"]["layer1"]["results"]) == {"ours"}

    spoil(monkeypatch, "import sys; sys.exit('no luck at all')")
    outcome = run("--quick", "--peers", "numpy", "--only", "layer1")
    assert outcome.code == 2
    assert outcome.err.strip() == "error: ours: its process ended with code 1: no luck at all"


def test_what_cannot_be_chosen_is_refused_with_what_can(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, words in (
        (("--peers", "numpy,caffe"), ["--peers", "caffe", "numpy,torch,jax,thinc,sklearn"]),
        (("--only", "layer,conv"), ["--only", "conv", "layer1", "digits"]),
        (("--device", "tpu"), ["--device", "tpu"]),
    ):
        outcome = run(*arguments)
        assert outcome.code == 2
        assert all(word in outcome.err for word in words), outcome.err
    monkeypatch.setattr(bench.util, "find_spec", lambda name: None)
    outcome = run("--peers", "thinc")
    assert outcome.code == 2
    assert "thinc is not installed; pip install" in outcome.err


def test_the_stand_in_is_named_and_gets_counts_but_no_timings(run: Callable[..., Outcome]) -> None:
    if find_spec("cupy_backends") is None or find_spec("cupy_backends.cpu_counters") is None:
        pytest.skip("the CPU stand-in of CuPy is not installed")
    outcome = run("--device", "cuda:1", "--only", "layer1,step6", "--json", "b.json", "--plot", "b.png")
    assert outcome.code == 0, outcome.err
    assert "CPU stand-in" in outcome.out
    assert "microseconds" not in outcome.out
    assert not Path("b.png").exists()
    report = json.loads(Path("b.json").read_text())
    assert report["stand_in"]
    assert report["roofs"] is None
    for case in report["cases"].values():
        assert set(case) == {"kind", "batch", "sizes", "counts"}
    # 3 products of each layer, but for dX of the first; the loss alone needs a kernel each way
    counts = report["cases"]["step6"]["counts"]
    assert counts["library_calls"] >= 8
    assert counts["launches"] >= 2
    assert counts["device_to_host"] == counts["host_to_device"] == counts["synchronizations"] == 0
