"""`train --processes N` on CUDA, without MPI: ranks that we start meet by CuPy's store, and NCCL carries what they say.

On the CPU stand-in for CUDA, with CuPy's own process group and store, and with a fake in the place of NCCL itself
(`fake_nccl/`): NCCL has not run, and no part of this ran on a GPU.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anyarray_linear import load_model
from anyarray_linear.distributed import supervising
from anyarray_linear.distributed.launching import launched, number_here
from anyarray_linear.distributed.supervising import StartedRanks

BOUND = 120.0
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def begin(tmp_path):
    """Start the command with so many processes, on as many cards; MPI is out of reach."""
    fake = tmp_path / "fake"
    fake.mkdir()
    paths = Path(__file__).parent / "fake_nccl", tmp_path, *sys.path
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PMI_", "OMPI_", "ANYARRAY_"))},
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "FAKE_NCCL": str(fake), "CUPY_CPU_DEVICES": "3", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no MPI here')")
    begun = []

    def start(count, *arguments, **more):
        command = [sys.executable, "-m", "anyarray_linear", "train", "--processes", str(count), "--hidden", "16", *arguments]
        begun.append(subprocess.Popen(
            command, env={**environment, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        ))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def ranks_of(process):
    """The process ids that the first line names."""
    line = process.stdout.readline()
    assert " ranks over NCCL: " in line, line + process.stderr.read()
    return [int(pid) for pid in re.findall(r"is process (\d+)", line)]


def read_to(process, start):
    for line in process.stderr:
        if line.startswith(start):
            return
    raise AssertionError(f"it ended before {start}")


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1][:3]


def group_of(pid):
    """All processes of the session that `pid` leads: rank 0's has CuPy's store."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.stand_in
def test_each_rank_has_a_card_and_all_train_what_one_process_does(begin, tmp_path):
    out, err = begin(2, "--epochs", "2", "--out", "two").communicate(timeout=BOUND)
    assert out.startswith("2 ranks over NCCL: "), err
    assert err.count("epoch 1") == 1  # rank 0 alone speaks
    assert [(tmp_path / "fake" / f"rank{rank}.device").read_text() for rank in range(2)] == ["0", "1"]
    subprocess.run(
        [sys.executable, "-m", "anyarray_linear", "train", "--device", "cuda", "--hidden", "16", "--epochs", "2", "--out", "one"],
        cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    mine, theirs = (load_model(tmp_path / name / "model.safetensors").parameters() for name in ("two", "one"))
    assert mine.keys() == theirs.keys()
    for name, W in mine.items():  # float32 sums in another order, through 82 steps of Adam
        assert np.abs(W - theirs[name]).max() < 1e-3, name


@pytest.mark.stand_in
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_and_nothing_is_left_of_any(begin, tmp_path, rank):
    process = begin(3, "--epochs", "1000000", "--out", "out")
    pids = ranks_of(process)
    read_to(process, "epoch 2")
    everyone = [pid for leader in pids for pid in group_of(leader)]
    assert len(everyone) == 4  # three ranks, and the store
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=BOUND)
    assert time.monotonic() - began < BOUND / 2
    assert process.returncode == 128 + signal.SIGKILL
    assert f"rank {rank} (process {pids[rank]}) was killed by SIGKILL; the others were ended" in said
    assert not any(map(is_there, everyone))


@pytest.mark.stand_in
def test_what_is_wrong_on_one_rank_is_told_in_its_words(begin):
    process = begin(2, "--epochs", "1000000", "--out", "out", FAKE_FAULT="1")
    _, said = process.communicate(timeout=BOUND)
    assert process.returncode == 1, said
    assert "RuntimeError: NCCL_ERROR_SYSTEM_ERROR: the card has fallen off" in said
    assert re.search(r"rank 1 \(process \d+\) ended with exit code 1; the others were ended", said)


@pytest.mark.stand_in
@pytest.mark.parametrize(("arguments", "words"), [(("--hidden", "x"), "no list of sizes"), (("--data", "no.csv"), "no.csv")])
def test_what_all_find_wrong_is_told_once(begin, arguments, words):
    process = begin(2, "--out", "out", *arguments)
    _, said = process.communicate(timeout=BOUND)
    assert process.returncode == 2, said
    assert said.count("error: ") == said.count(words) == 1, said


@pytest.mark.stand_in
def test_a_signal_stops_all_after_a_step_and_the_hint_goes_on(begin, tmp_path):
    process = begin(2, "--epochs", "1000000", "--out", "out")
    pids = ranks_of(process)
    read_to(process, "epoch 2")
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=BOUND)
    assert process.returncode == 130, said
    assert '"interrupted": true' in (tmp_path / "out" / "summary.json").read_text()
    *_, train, name, folder, resume, processes, count = shlex.split(out.splitlines()[-1])
    assert (train, name, folder, resume, processes, count) == ("train", "--out", "out", "--resume", "--processes", "2")
    assert not any(map(is_there, pids))


def plain(tmp_path, monkeypatch, count, code):
    """Ranks that run `code`, without CUDA."""
    (tmp_path / "ranks_run.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("ANYARRAY_RANK", "ANYARRAY_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    return StartedRanks(count, "ranks_run", [])


def test_ranks_are_told_their_number_and_one_place_to_meet(tmp_path, monkeypatch, capfd):
    code = (
        "import os, pathlib; e = os.environ\n"
        "pathlib.Path(__file__).with_suffix('.' + e['ANYARRAY_RANK']).write_text("
        "' '.join([e['ANYARRAY_PROCESSES'], e['CUPYX_DISTRIBUTED_HOST'], e['CUPYX_DISTRIBUTED_PORT']]))\n"
        "print('rank', e['ANYARRAY_RANK'])\n"
    )
    assert plain(tmp_path, monkeypatch, 3, code).run() == 0
    told = {(tmp_path / f"ranks_run.{rank}").read_text() for rank in range(3)}
    assert len(told) == 1
    assert told.pop().startswith("3 127.0.0.1 ")
    assert capfd.readouterr().out == "rank 0\n"


def test_a_number_of_ours_is_found_where_no_mpi_says_one(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PMI_", "OMPI_COMM", "ANYARRAY_"))]:
        monkeypatch.delenv(name)
    assert (launched(), number_here()) == ((1, 0), None)
    monkeypatch.setenv("ANYARRAY_PROCESSES", "4")  # of mpiexec, which we started
    assert (launched(), number_here()) == ((1, 0), None)
    monkeypatch.setenv("ANYARRAY_RANK", "3")
    assert (launched(), number_here()) == ((4, 3), (3, 4))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="NCCL is not for systems without process groups")
def test_the_others_have_a_moment_to_speak_and_are_then_ended(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervising, "_GRACE", 1.0)
    code = "import os, sys, time\nif os.environ['ANYARRAY_RANK'] == '1': sys.exit('one is enough')\ntime.sleep(600)"
    ranks = plain(tmp_path, monkeypatch, 3, code)
    assert ranks.run() == 1
    assert re.fullmatch(r"one is enough\nrank 1 \(process \d+\) ended with exit code 1; the others were ended\n", capfd.readouterr().err)
    assert [process.returncode for process in ranks.processes] == [-9, 1, -9]


def test_what_rank_0_says_itself_is_not_repeated(tmp_path, monkeypatch, capfd):
    code = "import os, sys, time\nif os.environ['ANYARRAY_RANK'] == '0': time.sleep(0.5)\nsys.exit('no such file')"
    assert plain(tmp_path, monkeypatch, 2, code).run() == 1
    assert capfd.readouterr().err == "no such file\n"
