"""`python -m benchmarks.on_gpu`: that it runs where nothing is installed, keeps its time, and says what it ran on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("benchmarks", reason="not in a clone")

from benchmarks.arrays import Plain
from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import report, spread, steps

ROOT = Path(__file__).parents[1]

@pytest.fixture
def run(tmp_path):
    with on_gpu.Run(tmp_path / "out", 480, None) as run:
        yield run


def part(name, seconds, code):
    """A part of one process that runs this code, with `tell` in it."""
    code = f"from benchmarks.on_gpu.answering import tell\n{code}"
    return on_gpu.Part(name, seconds, lambda run: iter([([sys.executable, "-c", code], {})]))


def results(run):
    return json.loads((run.folder / "results.json").read_text())


@pytest.fixture
def time_is_up_when_told(run, monkeypatch):
    """The clock of the run stands until the part has told something, however long it took to start; then all time is up."""
    now = time.monotonic()
    run.began = now

    def clock():
        told = any(each["lines"] for each in run.found["parts"].values())
        return now + 1000 * told

    monkeypatch.setattr(on_gpu, "time", SimpleNamespace(**{**vars(time), "monotonic": clock}))


def test_what_a_part_finds_is_written(run):
    run.part(part("one", 30, "tell(a=1)\ntell(about_card={'name': 'A'}, b=2, card=[1.0, 2.0])\nprint('seen')"))
    found = results(run)
    assert found["parts"]["one"]["lines"] == [{"a": 1}, {"b": 2, "card": [1.0, 2.0]}]
    assert found["parts"]["one"]["trouble"] == []
    assert found["card"] == {"name": "A"}
    assert "seen" in (run.folder / "log.txt").read_text()


@pytest.mark.usefixtures("time_is_up_when_told")
def test_a_part_that_takes_too_long_is_stopped_with_all_its_processes_and_keeps_what_it_found(run, tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
tell(before=1)
time.sleep(600)
"""
    run.part(part("long", 4, code))
    mine = results(run)["parts"]["long"]
    assert mine["lines"] == [{"before": 1}]
    assert "was stopped after its 4 s" in mine["trouble"][0]
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_part_that_fails_does_not_end_the_others(run):
    run.part(part("bad", 30, "tell(before=1)\nraise SystemExit(3)"))
    run.part(part("good", 30, "tell(after=1)"))
    found = results(run)["parts"]
    assert "ended with code 3" in found["bad"]["trouble"][0]
    assert found["good"]["lines"] == [{"after": 1}]


def test_all_parts_together_keep_the_time(run):
    run.began -= 479.5
    run.part(part("late", 60, "tell(a=1)"))
    assert "no time was left" in results(run)["parts"]["late"]["trouble"][0]
    assert sum(each.seconds for each in on_gpu.PARTS[:-1]) <= 450


@pytest.mark.usefixtures("time_is_up_when_told")
def test_collecting_tests_is_not_of_the_time_of_a_suite_but_of_the_time_of_all(run):
    run.seconds = 6.2
    run.part(part("suite", 4 * 480 / run.seconds, "import time\ntell(collecting=60)\ntime.sleep(600)"))
    assert "was stopped after its 6 s" in results(run)["parts"]["suite"]["trouble"][0]


def test_wheels_of_what_is_missing_are_taken_along(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("carried_along", "numpy"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "here = True")
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
    with on_gpu.Run(tmp_path / "out", 480, wheels) as run:
        assert run.found["carried"] == ["carried_along-1.0-py3-none-any.whl"]  # numpy is here
        run.part(part("one", 30, "import carried_along\ntell(here=carried_along.here)"))
        assert results(run)["parts"]["one"]["lines"] == [{"here": True}]


def item(nodeid, backend=None):
    session = SimpleNamespace(shouldstop=False)
    return SimpleNamespace(nodeid=nodeid, callspec=SimpleNamespace(params={"backend": backend}), session=session)


ITEMS = [
    item("a.py::plain"), item("a.py::other"),
    item("b.py::f[1-cupy:0]", "cupy:0"), item("b.py::f[2-cupy:0]", "cupy:0"), item("b.py::f[numpy]", "numpy"),
    item("b.py::g[cupy:0]", "cupy:0"), item("b.py::plain"), item("c.py::plain"), item("c.py::f[cupy:0]", "cupy:0"),
    item("c.py::g[cupy:0]", "cupy:0"), item("c.py::h[cupy:0]", "cupy:0"),
]  # fmt: skip
ORDER = [
    "b.py::f[1-cupy:0]", "c.py::f[cupy:0]", "a.py::plain",  # one of every module
    "b.py::g[cupy:0]", "c.py::g[cupy:0]", "b.py::f[2-cupy:0]", "c.py::h[cupy:0]",  # by turns, every function before a second case
    "b.py::f[numpy]", "c.py::plain", "a.py::other", "b.py::plain",  # what needs no card
]  # fmt: skip


def test_the_first_tests_are_of_every_module_on_the_card_where_there_are_such_and_then_by_turns():
    assert [each.nodeid for each in spread.spread(ITEMS)] == ORDER


def test_the_suite_stops_when_its_time_is_up_and_then_has_the_rest(monkeypatch, tmp_path):
    told = []
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(spread, "tell", lambda **found: told.append(found))
    monkeypatch.setattr(spread, "_done", tmp_path / "done")
    monkeypatch.setattr(spread, "_end", None)
    monkeypatch.setattr(spread, "SECONDS", 100)
    spread.pytest_collection_modifyitems(first := [*ITEMS])
    spread.pytest_runtest_setup(first[0])
    assert not first[0].session.shouldstop
    (tmp_path / "done").write_text("".join(f"{name}\n" for name in ORDER[:4]))
    monkeypatch.setattr(spread, "SECONDS", -1)
    spread.pytest_collection_modifyitems(rest := [*ITEMS])
    assert [each.nodeid for each in rest] == ORDER[4:]
    with pytest.raises(pytest.skip.Exception, match="no time was left"):
        spread.pytest_runtest_setup(rest[0])
    assert rest[0].session.shouldstop
    assert [(line.get("collected"), line.get("before"), line.get("stopped")) for line in told] == [
        (11, 0, None), (7, 4, None), (None, None, "its time was up"),
    ]  # fmt: skip


FOUND = {
    "began": "2026-01-01T00:00:00Z",
    "card": {"name": "NVIDIA Imaginary", "compute_capability": "9.0", "versions": {"numpy": "2"}, "smi": {"driver_version": "580.1"}},
    "parts": {
        "suite": {"seconds": 9.0, "trouble": [], "lines": [
            {"collected": 9, "modules": 3, "before": 0, "collecting": 5.0}, {"test": "a.py::f", "outcome": "passed"}, {"test": "b.py::g", "outcome": "failed", "wrong": "E   1 is | not 2"},
        ]},
        "steps": {"seconds": 9.0, "trouble": ["was stopped"], "lines": [
            {"contestant": "step", "precision": "float32", "model": "small", "batch": 64, "sizes": [64, 10],
             "wall": [9.0, 10.0, 11.0], "card": [7.0, 8.0, 9.0], "how": "captured"},
            {"contestant": "jax", "precision": "float32", "not_here": "no module"},
        ]},
    },
}  # fmt: skip


def test_the_report_has_the_card_the_table_and_what_is_wrong():
    text = report.markdown(FOUND)
    assert text.startswith("# On NVIDIA Imaginary")
    assert "driver 580.1" in text
    assert "| float32 | 64-10, batch 64 | 10.0 (9.0 to 11.0); 8.0 |" in text
    assert "without JAX, jitted: no module" in text
    assert "1 passed, 1 failed, of 2 modules of 3, collected in 5.0 s" in text
    assert "- suite: b.py::g: E   1 is | not 2" in text
    assert "stand-in" not in text


def test_the_stand_in_is_called_that_and_its_results_are_no_results():
    found = FOUND | {"card": FOUND["card"] | {"stand_in": True}}
    assert report.STAND_IN in report.markdown(found)
    assert report.section([found]) == report.section([]) == "None yet: no run on a card has been committed."
    assert "### NVIDIA Imaginary" in report.section([found, FOUND])


def test_the_page_on_performance_has_its_gpu_part_from_committed_results():
    page = (ROOT / "docs" / "performance.md").read_text()
    part = page.partition("<!-- python -m benchmarks.on_gpu.report")[2].partition("-->")[2].partition("<!-- up to here -->")[0]
    assert part.strip() == report.section(report.committed())


def test_what_is_kept_of_tests_is_how_many_ended_how_and_which_failed():
    lines = FOUND["parts"]["suite"]["lines"]
    kept = report.folded(lines)
    assert kept == [{"outcomes": {"passed": 1, "failed": 1}, "in_modules": 2}, lines[0], lines[2]]
    assert report.folded(kept) == kept
    parts = {**FOUND["parts"], "suite": {**FOUND["parts"]["suite"], "lines": kept}}
    assert report.markdown({**FOUND, "parts": parts}) == report.markdown(FOUND)


def test_the_first_loss_is_that_of_the_textbook(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "SCRATCH", tmp_path)
    inputs = steps.drawn({"kind": "step", "batch": [64], "sizes": (64, 128, 10)})
    first, _ = Plain("cpu").step(**steps.cast(inputs, "float64"), lr=1e-3)
    assert steps.exact_loss("small", "float32", inputs) == pytest.approx(float(first()), rel=1e-14)
    assert steps.exact_loss("small", "float32", {}) == steps.exact_loss("small", "float32", inputs)  # kept


def test_the_other_libraries_take_the_steps_that_ours_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "SCRATCH", tmp_path)
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    inputs = steps.drawn({"kind": "step", "batch": [64], "sizes": (64, 128, 10)})
    exact = steps.exact_loss("small", "float32", inputs)
    for precision, dtype in (("float32", "float32"), ("float16", "float16")):
        eager = object.__new__(steps.TorchOf)  # what its constructor needs is a card
        eager.torch, eager.device, eager.dtype = torch, torch.device("cpu"), getattr(torch, dtype)
        jitted = object.__new__(steps.JaxOf)
        jitted.jax, jitted.place = jax, jax.devices("cpu")[0]
        for contestant in (eager, jitted):
            first, _ = contestant.step(**steps.cast(inputs, dtype), lr=1e-3)
            assert abs(float(contestant.get(first())) - exact) <= steps.FIRST_LOSS[precision] * exact


@pytest.mark.slow
@pytest.mark.stand_in
def test_all_of_it_runs_to_its_end_on_the_stand_in_from_an_unpacked_archive(tmp_path):
    archive = subprocess.check_output(["git", "-C", str(ROOT), "archive", "HEAD"])
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "benchmarks.on_gpu", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["parts"]) == [each.name for each in on_gpu.PARTS]
    assert [line for each in found["parts"].values() for line in each["lines"] if line.get("wrong")] == []
    assert report.STAND_IN in done.stdout
    assert all("wall" not in line for line in found["parts"]["steps"]["lines"])


def test_a_slice_of_the_suite_that_its_time_ends_is_no_failure_but_one_that_ran_nothing_is():
    cut = {"trouble": ["-m pytest -q was stopped after its 66 s"], "lines": [{"test": "tests/test_linear.py::test", "outcome": "passed"}]}
    assert on_gpu.failures({"suite": cut}) == []
    assert on_gpu.failures({"suite": {**cut, "lines": [{"collected": 7}]}}) == cut["trouble"]
    assert on_gpu.failures({"verify": cut}) == cut["trouble"]
    assert on_gpu.failures({"suite": {"trouble": [], "lines": [{"wrong": "a test"}]}}) == [{"wrong": "a test"}]
