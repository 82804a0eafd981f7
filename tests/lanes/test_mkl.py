"""Where the package `mkl` is installed, the compiled step takes its products from MKL, and nothing else changes.

That these products are right is tested by `test_compiled_lane`, which takes them from where the lane does.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version

import pytest

from anyarray_linear.lanes.compiled import blas as products


def installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)
if not installed("mkl"):
    pytest.skip("the package mkl is not installed", allow_module_level=True)


def printed(code, **environment):
    """What code prints in a process of its own, where `train()` takes three compiled steps and returns `how`."""
    start = """
        import ctypes, os
        import numpy as np
        from anyarray_linear import *
        from anyarray_linear.lanes.compiled import blas, steps
        steps.patience = lambda step: 0
        X = np.random.default_rng(0).standard_normal((256, 300)).astype("float32"); y = np.arange(256) % 200
        def train():
            model = Sequential(Linear(300, 400, dtype="float32", seed=0), ReLU(), Linear(400, 200, dtype="float32", seed=1))
            step = TrainingStep(model, SoftmaxCrossEntropy(), Adam(0.01))
            for _ in range(3): step(X, y)
            return step.how
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


def test_the_step_says_that_it_is_taken():
    (how,) = printed("print(train())")
    assert how.startswith("compiled: products by MKL, ")


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="only Linux lists the threads of a process there")
def test_no_pool_of_its_own_stands_beside_the_lanes():
    before, how, after = printed("""
        threads = lambda: len(os.listdir("/proc/self/task"))
        X @ X.T  # NumPy's own, which are there since its import or its first product
        print(threads())
        print(train())
        print(threads())
    """)
    ours = int(how.rpartition(", ")[2].split()[0])
    assert int(after) - int(before) == ours - 1


def test_it_may_be_told_how_many_threads_there_are():
    assert printed("print(train())", OMP_NUM_THREADS="1")[0].endswith(", 1 thread")
    assert printed("blas.blas().set_threads(1); print(train())")[0].endswith(", 1 thread")  # as threadpoolctl does


def test_what_the_user_told_it_is_as_it_was():
    found = printed("""
        library, local = blas.blas(), ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(blas.blas().local)
        library.set_threads(1); local(2)
        own = blas._own(); numpys = own.threads()
        train()
        print(local(0), library.threads(), own.threads() == numpys)
    """)
    assert found == ["2 1 True"]


def test_it_is_called_in_the_thread_that_computes():
    assert products.blas().local
    assert not products.blas().shares_its_number
