"""Pickles from a GPU: on their device again, or where their reader says."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from anyarray_linear import Adam, DeviceUnavailableError, Linear, Sequential
from anyarray_linear.arrays import pickling, selection
from anyarray_linear.arrays.selection import loading_on


class FromAGPU:
    """What a CuPy array in a model is in a pickle."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return pickling._restore, (np.arange(3.0), f"cuda:{self.number}")


@pytest.fixture
def pickled():
    return pickle.dumps({"W": FromAGPU(40), "b": FromAGPU(41)})  # so many nobody has


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.delenv("ANYARRAY_DEVICE", raising=False)


def test_a_pickle_from_a_device_that_is_not_here_says_how_to_load_it(pickled, nothing_said):
    with pytest.raises(DeviceUnavailableError, match=r"pickled on cuda:40; .*ANYARRAY_DEVICE=cpu.*loading_on\(\"cpu\"\)"):
        pickle.loads(pickled)


def on_cpu(loaded):
    return all(type(x.array) is np.ndarray and np.array_equal(x.array, np.arange(3.0)) for x in loaded.values())


def test_whoever_reads_it_may_say_where_it_shall_be(pickled, nothing_said, monkeypatch):
    with loading_on("cpu"):
        assert on_cpu(pickle.loads(pickled))
    with pytest.raises(DeviceUnavailableError):
        pickle.loads(pickled)
    monkeypatch.setenv("ANYARRAY_DEVICE", "cpu")
    assert on_cpu(pickle.loads(pickled))


def test_it_is_said_in_a_process_of_ones_own_too(pickled, tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(selection.cuda_device(40)))
    code = "import pathlib, pickle, sys; print(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()))"
    environment = {**os.environ, "ANYARRAY_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_a_device_that_is_here_stays_what_it_was(backend, monkeypatch):
    """Also where `ANYARRAY_DEVICE` says another: models of several cards do not gather on one."""
    if backend.name != "cupy:1":
        pytest.skip("a second CUDA device")
    model = Sequential(Linear(2, 3, dtype="float32", device="cuda:1", seed=0))
    optimizer = Adam()
    optimizer.step(model, {"0.W": backend.asarray(np.ones((3, 2), "float32")), "0.b": backend.asarray(np.ones((1, 3), "float32"))})
    data = pickle.dumps((model, optimizer, model[0].device))
    monkeypatch.setenv("ANYARRAY_DEVICE", "cuda:0")
    again, rule, device = pickle.loads(data)
    assert str(again[0].device) == str(device) == "cuda:1"
    with loading_on("cpu"):
        again, rule, device = pickle.loads(data)
    assert str(again[0].device) == str(device) == "cpu"
    assert np.array_equal(again[0].W, backend.to_numpy(model[0].W))
    assert all(type(x) is np.ndarray for moments in rule.moments().values() for x in moments.values())
    rule.step(again, {"0.W": np.ones((3, 2), "float32"), "0.b": np.ones((1, 3), "float32")})
