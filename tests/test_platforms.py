"""Where there is no POSIX, and where no thread can start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import without_posix

import anyarray_linear
from anyarray_linear import Adam, Linear

PACKAGE = Path(anyarray_linear.__file__).parent
TESTS = Path(__file__).parent

EVERYTHING = """
import sys
sys.path.insert(0, sys.argv[1])
import os, warnings, without_posix
without_posix.remove()
import numpy as np
assert not hasattr(os, "fchmod") and not hasattr(os, "register_at_fork")
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "the folder|.*this file system has no locks", RuntimeWarning)
from anyarray_linear import *
from anyarray_linear.cli import main
X, y = np.eye(8, dtype="float32"), np.arange(8)
model = Sequential(Linear(8, 300, dtype="float32", seed=0), ReLU(), Linear(300, 300, dtype="float32", seed=2), Linear(300, 8, dtype="float32", seed=1))
def train(epochs):
    return fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=epochs, batch_size=4, checkpoint="run", resume=True)
assert len(train(2).rows) == 2
assert len(train(3).rows) == 3
save_model(model, "m")
save_model(model, "m")
assert np.array_equal(predict(load_model("m"), X), predict(model, X))
assert select_device("cpu").kind == "cpu"
try:
    sys.argv = ["anyarray-linear", "train", "--out", "cli", "--epochs", "1", "--hidden", "none", "--device", "cpu"]
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def python(code, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_training_files_and_the_command_work_without_posix(tmp_path):
    """No forward worked: the lane asked for `os.register_at_fork`."""
    pytest.importorskip("typer")
    done = python(EVERYTHING, tmp_path, TESTS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_core_of_the_suite_passes_without_posix(tmp_path):
    files = ["test_linear.py", "test_activations.py", "test_losses.py", "test_optimizers.py", "test_sequential.py"]
    files += ["files/test_checkpoint.py", "files/test_history_file.py", "training/test_training.py", "training/test_resume.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "without_posix", "-p", "no:cacheprovider", "--backends", "numpy"]
    command += ["-o", "filterwarnings=error\nignore:.*this file system has no locks:RuntimeWarning"]
    not_about_it = "not pipe and not fork and not copies and not lock and not permissions and not signal and not kill and not largest and not may_not"
    not_about_it += " and not read_back and not process and not full_disk and not read_only"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)])}
    done = subprocess.run(
        [*command, "-k", not_about_it, *(str(TESTS / file) for file in files)],
        cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_no_name_of_posix_is_asked_for_at_import_or_without_asking_whether_it_is_there():
    """Every `os.NAME` and `signal.NAME` of the package that other systems lack stands under a `hasattr` or `getattr` of it."""
    names, found = {*without_posix.CALLS, *without_posix.SIGNALS}, []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
                asked = f'hasattr({node.value.id}, "{node.attr}")' in text or "AttributeError" in text
                if node.attr in names and not asked:
                    found.append(f"{path.relative_to(PACKAGE)}: {node.value.id}.{node.attr}")
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node.col_offset == 0:
                modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module]
                found += [f"{path.relative_to(PACKAGE)}: {name}" for name in modules if name in without_posix.MODULES]
    assert found == []


# ---------------------------------------------------------------------------------------------------------------------
# Threads


def test_where_no_thread_can_start_a_training_runs_without_helpers(monkeypatch):
    def step():
        model = Linear(1024, 1024, seed=0)
        Adam().step(model, {"W": np.ones((1024, 1024)), "b": np.ones((1, 1024))})
        return model.W.tobytes()

    def refused(thread):
        raise RuntimeError("can't start new thread")

    expected = step()
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert step() == expected


OUTLIVES = """
import threading, time
import numpy as np
from anyarray_linear import Adam, Linear
model, optimizer, gradients = Linear(1024, 1024), Adam(), {"W": np.ones((1024, 1024)), "b": np.ones((1, 1024))}
def train():
    threading.main_thread().join()
    for _ in range(3):
        optimizer.step(model, gradients)
    print("done", flush=True)
if WARM:
    optimizer.step(model, gradients)
threading.Thread(target=train).start()
"""


@pytest.mark.parametrize("warm", [True, False])
def test_a_training_that_outlives_the_main_thread_goes_on(tmp_path, warm):
    done = python(OUTLIVES.replace("WARM", str(warm)), tmp_path)
    said = [line for line in done.stderr.splitlines() if "compiling" not in line]  # once on a machine
    assert (done.stdout, said) == ("done\n", [])
