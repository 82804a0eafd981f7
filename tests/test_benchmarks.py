"""The benchmarks: that they time the same work, one contestant at a time, and say nothing about speed they have not measured."""

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

pytest.importorskip("benchmarks", reason="not in a clone")

from benchmarks import __main__ as commands
from benchmarks import processes, race
from benchmarks.worker import CONTESTANTS, Server, drawn

LAYER = {"kind": "layer", "batch": [3], "sizes": [5, 4]}
STEP = {"kind": "step", "batch": [6], "sizes": [5, 7, 3]}
OPTIMIZER = {"kind": "optimizer", "batch": [], "sizes": [5, 7, 3]}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SPOILED = "from benchmarks import arrays, worker; {}; worker.main()"


class Outcome(NamedTuple):
    code: Any
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process, its workers in theirs, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                commands.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return run


def spoil(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have every worker run `code` before it serves."""
    monkeypatch.setattr(processes, "WORKER", [sys.executable, "-c", SPOILED.format(code)])


def test_medians_ratios_and_limits_are_those_of_the_rounds_of_all_runs(run: Callable[..., Outcome]) -> None:
    arguments = ("--peers", "numpy", "--only", "layer1", "--runs", "2", "--rounds", "2")
    outcome = run("peers", *arguments, "--json", "b.json", "--plot", "b.png")
    assert outcome.code == 0, outcome.err
    assert "layer1" in outcome.out
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads(Path("b.json").read_text())
    (case,) = report["cases"].values()
    assert not report["stand_in"]
    assert set(case["results"]) == {"ours", "numpy"}
    for result in (*case["results"].values(), case["limit"]["of"]):
        assert len(result["rounds"]) == 4
        assert result["median"] == np.median(result["rounds"])
        assert 0 < result["least"] == min(result["rounds"]) <= result["q1"] <= result["median"] <= result["q3"] <= max(result["rounds"])
    ours = case["results"]["ours"]["median"]
    assert case["ratios"]["ours"] == {"numpy": pytest.approx(case["results"]["numpy"]["median"] / ours)}
    moved = case["bytes_besides"] / report["roofs"]["bytes_per_second"]
    assert case["limit"]["reached"]["ours"] == pytest.approx((case["limit"]["of"]["median"] + moved) / ours)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("true = arrays.affine_gradients; arrays.affine_gradients = lambda *a: (*true(*a)[:2], 2 * true(*a)[2])", "db"),
        ("arrays.affine = lambda X, W, b: X @ W.T", "Z"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, code: str, what: str
) -> None:
    spoil(monkeypatch, code)
    outcome = run("peers", "--quick", "--peers", "numpy", "--only", "layer1", "--json", "b.json")
    assert outcome.code == 1
    assert f"NumPy computes something else: {what} is" in outcome.err
    case = json.loads(Path("b.json").read_text())["cases"]["layer1"]
    assert set(case["results"]) == {"ours"}
    assert case["ratios"] == {"ours": {}}


def test_the_check_takes_rounding_and_refuses_nan_another_size_and_a_missing_result() -> None:
    ours = {"Z": np.asarray([[1.0, -2.0]])}
    race.check("peer", {"Z": np.asarray([1.001, -2.0])}, ours)
    for theirs in ({"Z": np.asarray([[1.0, np.nan]])}, {"Z": np.asarray([[1.2, -2.0]])}, {"Z": np.ones((2, 2))}, {}):
        with pytest.raises(race.Different, match=r"peer .*Z"):
            race.check("peer", theirs, ours)


@pytest.mark.parametrize("who", ["ours", "hand", "torch", "jax", "thinc"])
@pytest.mark.parametrize("case", [LAYER, STEP, OPTIMIZER], ids=lambda case: case["kind"])
def test_every_contestant_that_is_here_computes_what_the_textbook_does(who: str, case: dict[str, Any]) -> None:
    if who in race.PEERS and find_spec(who) is None:
        pytest.skip(f"{who} is not installed")
    if not hasattr(CONTESTANTS[who], case["kind"]):
        pytest.skip("does not take part in this")
    theirs, textbook = (Server(CONTESTANTS[name]("cpu"))._results(case, drawn(case)) for name in (who, "numpy"))
    race.check(who, theirs, textbook)
    assert len(textbook) == (4 if case is LAYER else 5)


def test_a_disturbed_burst_does_not_pass_for_a_long_one_and_does_not_count() -> None:
    class Fake:
        """Calls that take a millisecond, but for a burst that is disturbed."""

        bursts = 0

        def layer(self, **inputs: Any) -> Callable[[], None]:
            return lambda: None

        def seconds(self, call: Callable[[], None], repeats: int) -> float:
            self.bursts += 1
            return 0.1 if self.bursts % 3 == 1 else 1e-3

    server = Server(Fake())
    assert server.prepare(LAYER, None, burst=0.02)["repeats"] >= 20
    assert server.burst() == {"seconds": 1e-3}


def test_processes_that_measure_are_not_told_of_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "123")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    told = processes.answer_of("-c", "import json, os; print(json.dumps(dict(os.environ)))")
    assert not {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"} & set(told)
    assert told["OPENBLAS_NUM_THREADS"] == "1"


@ON_LINUX
def test_a_worker_is_stopped_while_nothing_is_asked_of_it(tmp_path: Path) -> None:
    with processes.Worker("numpy", "cpu", tmp_path / "log") as worker:
        assert settled_state(worker.process.pid) == "T"
        worker.ask("prepare", case=LAYER, results=None, burst=1e-4)
        assert worker.ask("burst")["seconds"] > 0
        assert settled_state(worker.process.pid) == "T"


def settled_state(pid: int) -> str:
    """The state of a process, given time for a signal to arrive."""
    for _ in range(1000):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            break
        time.sleep(0.01)
    return state


@ON_LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_leaves_no_worker_behind(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ("peers", "--peers", "numpy", "--only", "layer1", "--rounds", "100000")
    command = [sys.executable, "-m", "benchmarks", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=processes.environment()) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            deadline = time.monotonic() + 120
            while len(workers := children.read_text().split()) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(workers) == 4  # ours, ours by hand, numpy, limit
            process.send_signal(number)
            code_of_exit = process.wait(timeout=240)
        finally:
            process.kill()
    assert code_of_exit == (143 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + 120
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_that_dies_is_reported_with_its_last_words(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "import sys; sys.argv[1] == 'numpy' and sys.exit('out of luck')")
    outcome = run("peers", "--quick", "--peers", "numpy", "--only", "layer1", "--json", "b.json")
    assert outcome.code == 0, outcome.err
    assert "not compared: NumPy: its process ended with code 1: out of luck" in outcome.out
    assert set(json.loads(Path("b.json").read_text())["cases"]["layer1"]["results"]) == {"ours"}

    spoil(monkeypatch, "import sys; sys.exit('no luck at all')")
    outcome = run("peers", "--quick", "--peers", "numpy", "--only", "layer1")
    assert outcome.code == 2
    assert outcome.err.strip() == "error: its process ended with code 1: no luck at all"


def test_what_cannot_be_chosen_is_refused_with_what_can(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, words in (
        (("--peers", "numpy,caffe"), ["--peers", "caffe"]),
        (("--only", "layer,conv"), ["--only", "conv", "layer1", "digits"]),
        (("--device", "tpu"), ["--device", "tpu"]),
    ):
        outcome = run("peers", *arguments)
        assert outcome.code == 2
        assert all(word in outcome.err for word in words), outcome.err
    monkeypatch.setattr(race.util, "find_spec", lambda name: None)
    outcome = run("peers", "--peers", "thinc")
    assert outcome.code == 2
    assert "thinc is not installed; pip install" in outcome.err


@pytest.mark.stand_in
def test_the_stand_in_is_named_and_gets_counts_but_no_timings(run: Callable[..., Outcome]) -> None:
    outcome = run("peers", "--device", "cuda:1", "--only", "layer1,step6", "--json", "b.json", "--plot", "b.png")
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
    counts = report["cases"]["step6"]["counts"]["hand"]
    assert counts["library_calls"] >= 8
    assert counts["launches"] >= 2
    assert counts["device_to_host"] == counts["host_to_device"] == counts["synchronizations"] == 0


@pytest.mark.stand_in
def test_the_hosts_time_is_a_ratio_to_bare_calls_and_said_to_be_no_gpus(run: Callable[..., Outcome]) -> None:
    outcome = run("host", "--runs", "1", "--json", "b.json")
    assert outcome.code == 0, outcome.err
    assert "no GPU" in outcome.out
    report = json.loads(Path("b.json").read_text())
    assert report["ratios"]["bare"]["median"] == 1
    assert {"hand", "fit"} <= set(report["ratios"])
    for name, ratio in report["ratios"].items():
        assert ratio["median"] > 0, name


@ON_LINUX
def test_a_training_needs_at_least_the_memory_that_it_must_hold(run: Callable[..., Outcome]) -> None:
    outcome = run("memory", "--peers", "numpy", "--only", "step3", "--runs", "1", "--json", "b.json")
    assert outcome.code == 0, outcome.err
    for case in json.loads(Path("b.json").read_text())["cases"].values():
        for who, added in case["added"].items():
            assert added["median"] > 0.9 * case["held"], who


@pytest.mark.slow
def test_whole_processes_are_timed_by_what_they_are(run: Callable[..., Outcome]) -> None:
    outcome = run("start", "--rounds", "1", "--json", "b.json")
    assert outcome.code == 0, outcome.err
    seconds = json.loads(Path("b.json").read_text())["seconds"]
    assert {"python", "numpy", "ours", "train"} <= set(seconds)
    assert "import anyarray_linear" in outcome.out
