"""The compiled lane's threads: as many as the user lets it have, in every thread and process that asks for a step."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
from test_compiled_lane import printed, run

from anyarray_linear import SGD, Linear, ReLU, Sequential, SoftmaxCrossEntropy, TrainingStep
from anyarray_linear.lanes.compiled import blas as products
from anyarray_linear.lanes.compiled import threads

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")

COUNT = """
import re
def threads(step):
    step(X, y)
    return int(re.search(r"(\\d+) thread", step.how).group(1))
"""
TWO = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": ""}  # whatever these tests are run with
needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="this process may use one core only"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


@needs_cores
@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_the_environment_says_how_many_threads(variable):
    if variable.startswith("OPENBLAS") and products.blas().name == "MKL":
        pytest.skip("OPENBLAS_NUM_THREADS is not MKL's")
    unset = dict.fromkeys(TWO, "")
    for count in (1, 2):
        assert printed(run(COUNT + "print(threads(make()))", **{**unset, variable: str(count)})) == [str(count)]


@needs_cores
def test_affinity_is_looked_at_before_each_step():
    found = printed(run(COUNT + """
        step, all_cores = make(), os.sched_getaffinity(0)
        print(threads(step), end=" ")
        os.sched_setaffinity(0, {min(all_cores)})
        print(threads(step), end=" ")
        os.sched_setaffinity(0, all_cores)
        print(threads(step), len(os.listdir("/proc/self/task")) <= 1 + 2 * len(all_cores))
    """.replace("\n        ", "\n"), **TWO))
    assert found[:3] == ["2", "1", "2"]
    assert found[3] == "True"  # one of ours and one of OpenBLAS's for each core at most


@needs_cores
def test_a_process_of_one_core_starts_no_thread():
    found = printed(run(COUNT + """
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        step, before = make(), len(os.listdir("/proc/self/task"))
        print(threads(step), len(os.listdir("/proc/self/task")) - before)
    """.replace("\n        ", "\n"), **TWO))
    assert found == ["1", "0"]


@needs_cores
def test_limits_of_threadpoolctl_hold_inside_and_no_longer():
    pytest.importorskip("threadpoolctl")
    found = printed(run(COUNT + """
        from threadpoolctl import threadpool_info, threadpool_limits
        step = make()
        print(threads(step), end=" ")
        with threadpool_limits(1):
            print(threads(step), {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}, end=" ")
        print(threads(step))
    """.replace("\n        ", "\n"), **TWO))
    assert found == ["2", "1", "True", "2"]


def test_numpy_s_own_products_keep_their_threads():
    found = printed(run("""
        from anyarray_linear.lanes.compiled.blas import blas
        before = blas().threads()
        train()
        print(before == blas().threads())
    """))
    assert found == ["True"]


@needs_fork
def test_a_step_goes_on_in_a_forked_child_with_threads_of_its_own():
    found = printed(run("""
        import warnings; warnings.simplefilter("ignore")
        def on(step):
            for _ in range(5): step(X, y)
            return step.how.startswith("compiled") and float(np.abs(step.model[0].W).sum())
        step, other = make(), make()
        on(step), on(other)
        def threads(): return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
        X @ X.T  # NumPy's BLAS has its threads again only when it is asked
        before = threads()
        child = os.fork()
        if child == 0:
            X @ X.T
            os._exit(0 if on(step) == on(other) and threads() == before else 1)
        print(os.waitpid(child, 0)[1], on(step) == on(other))
    """, **TWO))
    assert found == ["0", "True"]


@needs_fork
def test_a_fork_while_another_thread_is_in_a_step():
    """Whatever the pool was at then, the child's steps do not wait for threads that it does not have."""
    found = printed(run("""
        import signal, warnings; warnings.simplefilter("ignore")
        step, other, going = make(), make(), True
        step(X, y)
        def work():
            while going: other(X, y)
        thread = threading.Thread(target=work); thread.start()
        codes = []
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                for _ in range(3): step(X, y)
                os._exit(0 if step.how.startswith("compiled") else 1)
            codes.append(os.waitpid(child, 0)[1])
        going = False
        thread.join()
        print(*set(codes))
    """))
    assert found == ["0"]


def test_several_threads_one_of_which_outlives_the_main_one():
    found = printed(run("""
        expected, found = train(), []
        def later(i):
            if i == 0: threading.main_thread().join()
            for _ in range(3): found.append(train() == expected)
            if i == 0: print(len(found), all(found), flush=True)
        workers = [threading.Thread(target=later, args=(i,)) for i in range(4)]
        for worker in workers: worker.start()
        for worker in workers[1:]: worker.join()
    """))
    assert found == ["12", "True"]


@pytest.mark.parametrize(("rows", "expected"), [(64, 1), (4096, 2)])
def test_small_steps_before_code_is_loaded_take_no_threads_of_numpys_blas_and_large_ones_do(rows, expected):
    from anyarray_linear.lanes.compiled import blas

    library = blas.numpys()
    if not library.shares_its_number:
        pytest.skip("NumPy's BLAS has no number of threads here that can be set")
    before, seen = library.threads(), []

    class Watched(SoftmaxCrossEntropy):
        def forward(self, Z, target, weights=None):
            seen.append(library.threads())
            return super().forward(Z, target, weights)

    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((rows, 30)), rng.integers(0, 10, rows)
    step = TrainingStep(Sequential(Linear(30, 20, seed=0), ReLU(), Linear(20, 10, seed=1)), Watched(), SGD(0.1))
    library.set_threads(2)
    try:
        for _ in range(3):
            step(X, y)
            assert library.threads() == 2
            step.on_rows(X, y, np.arange(rows), 0, rows)
            assert library.threads() == 2
    finally:
        library.set_threads(before)
    assert seen == [expected] * 6  # also the first one, which may be that of a training that goes on
    assert step.how.startswith("portable: compiled code is for steps that are many")


def test_steps_of_one_dtype_share_a_pool_and_none_is_made_for_nothing(monkeypatch):
    code, made = threads.Code(0, 0, "a code of its own"), []
    monkeypatch.setattr(threads, "_pools", {})
    monkeypatch.setattr(threads, "Pool", lambda code: made.append(code) or object())  # the memory of one is never freed
    assert threads.pool_for(code) is threads.pool_for(code)
    assert made == [code]
