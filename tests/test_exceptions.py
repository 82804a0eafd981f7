"""Every exception of the package comes whole out of another process, and out of a copy."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import pickle
import pkgutil

import numpy as np
import pytest

import anyarray_linear
from anyarray_linear import CheckpointError, History, NonFiniteError
from anyarray_linear.datasets import DataError
from anyarray_linear.distributed import RankError

LEFT_OUT = ("anyarray_linear.cli", "anyarray_linear.lanes.cupy", "anyarray_linear.lanes.compiled.source", "anyarray_linear.interop", "anyarray_linear.__main__")
EXAMPLES = [
    NonFiniteError("step 3 gave NaN", 3, History(rows=[{"epoch": 1, "loss": 0.5}], skipped=2)),
    RankError("rank 1 and rank 2 have died", (1, 2)),
    CheckpointError("m.safetensors is \x1b[31mdamaged" + "\x1b" * 9000),
    DataError("a.csv: line 3 is empty"),
    anyarray_linear.DeviceUnavailableError("cuda:3 is not there"),
]


def own_exceptions():
    for module in pkgutil.walk_packages(anyarray_linear.__path__, "anyarray_linear."):
        if not module.name.startswith(LEFT_OUT):
            importlib.import_module(module.name)
    found, new = set(), [BaseException]
    while new:
        kinds = {kind for each in new for kind in each.__subclasses__()} - found
        found |= kinds
        new = list(kinds)
    return {kind for kind in found if kind.__module__.startswith("anyarray_linear.") and not kind.__name__.startswith("_")}


def test_every_public_exception_has_its_example_here():
    internal = {"Late", "Declined"}  # caught where it is raised
    assert {kind for kind in own_exceptions() if kind.__name__ not in internal and not kind.__module__.startswith(LEFT_OUT)} == {
        type(error) for error in EXAMPLES
    }


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_an_exception_survives_pickle_and_copy_with_all_it_has(error, way):
    noted = way(error)
    assert type(noted) is type(error)
    assert str(noted) == str(error)
    assert vars(noted) == vars(error)
    assert len(str(noted)) <= 8000


def diverge(rate):
    from anyarray_linear import SGD, Linear, MeanSquaredError, fit

    X = np.full((8, 1), 1e200)
    return fit(Linear(1, 1, seed=0), X, X, loss=MeanSquaredError(), optimizer=SGD(rate), epochs=1, progress=False)


def test_a_training_that_diverges_in_a_pool_says_so():
    """Such an error hung `multiprocessing.Pool` for ever, which could not unpickle it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(NonFiniteError, match="step 1") as caught:
        pool.apply_async(diverge, (1e30,)).get(timeout=240)
    assert caught.value.step == 1
    assert caught.value.history.rows == []
