"""Several processes train as one: the same weights, one message per step, and nobody waits for ever.

The ranks are real processes over a real MPI; without mpi4py and `mpiexec`, these tests are skipped. On CuPy they ran on the CPU
stand-in for CUDA, and the NCCL path over a fake process group only.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import distributed_worker as worker
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyarray_linear import SGD, Adam, Linear, Sequential, distributed, fit, load_checkpoint, load_model
from anyarray_linear.arrays.cores import usable_cores
from anyarray_linear.cli import _ranks
from anyarray_linear.cli._app import app
from anyarray_linear.cli._common import one_line
from anyarray_linear.cli._results import show
from anyarray_linear.distributed import Group, RankError, launching, over_mpi
from anyarray_linear.distributed.launching import fitting_threads
from anyarray_linear.files.checkpoints import checkpoints
from anyarray_linear.initializers import layer_seed
from anyarray_linear.training.data import epoch_order

ROOT = Path(__file__).parents[2]
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "OPENBLAS_NUM_THREADS": "1",
    "CUPY_CPU_DEVICES": "4",  # of the stand-in
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # Open MPI's own two locks against root, and its one against more ranks than cores
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
TOGETHER = [
    "linear", "linear_accumulated", "adam", "momentum", "half", "one_message", "rank0_rules", "stop", "callback", "nan_skipped",
    "nan_fatal", "nan_slow", "failure", "failure_before", "disagreement", "other_weights", "other_optimizer",
    "other_moments", "differences", "other_files", "fault",
    "weighted", "stateful",
]  # fmt: skip
BOUND = 120.0  # seconds in which every job must have ended that loses a rank; they take 1 to 8
PATIENCE = 600.0  # for jobs that only have to come to their end

pytestmark = pytest.mark.timeout(1800)  # beyond the patience of the tests themselves, who say more when it ends

needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None, reason="there is no mpi4py, or no mpiexec"
)
on_stand_in = pytest.mark.stand_in


def started(size, *command, launcher="", options=(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    return subprocess.Popen(
        [MPIEXEC + launcher, *options, "-n", str(size), sys.executable, *map(str, command)],
        env={**ENVIRONMENT, **environment}, stdout=stdout, stderr=stderr, text=True,
    )  # fmt: skip


def launched(size, folder, *scenarios, timeout=PATIENCE, **environment):
    """Run scenarios on `size` ranks; what each found, the exit code, and what all of them said.

    The launcher of Open MPI 5 may itself crash or hang after `MPI_Abort`, under a program of ten lines too, and did hang after
    other ends (openpmix/prrte#1839). If a rank has asked it to end all, and it does not, it is killed, and that is printed.
    """
    with tempfile.TemporaryFile("w+") as heard:  # no pipe, which a rank that is left behind would keep open
        process = started(size, worker.__file__, folder, *scenarios, stdout=heard, stderr=subprocess.STDOUT, **environment)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            heard.seek(0)
            if not (is_open_mpi() and "MPI_ABORT was invoked" in heard.read()):
                raise
            print(f"mpiexec had not ended {timeout:.0f} s after its start, though a rank had called MPI_Abort: it was killed")
        finally:
            process.kill()
        heard.seek(0)
        said = heard.read()
    paths = [folder / f"{rank}.pickle" for rank in range(size)]
    return [pickle.loads(path.read_bytes()) if path.exists() else {} for path in paths], process.returncode, said


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of so many ranks found in the scenarios that end well, in one job per number of ranks; and its folder."""

    @functools.cache
    def run(size):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        found, code, said = launched(size, folder, *(TOGETHER if size > 1 else ["linear", "adam", "momentum"]))
        assert code == 0, said
        return found, folder

    return run


def is_open_mpi():
    said = subprocess.run([MPIEXEC, "--version"], capture_output=True, check=False).stdout
    return b"Open MPI" in said or b"OpenRTE" in said  # the second is what version 4 calls its launcher


def largest_difference(mine, theirs):
    assert mine.keys() == theirs.keys()
    return max(float(np.abs(mine[name].astype("f8") - theirs[name].astype("f8")).max()) for name in mine)


# ---------------------------------------------------------------------------------------------------------------------
# the same training


@given(st.integers(0, 10**6), st.integers(0, 300), st.integers(1, 40))
def test_the_shares_of_all_ranks_are_the_batch_and_nearly_alike(start, rows, size):
    group, shares = Group(), []
    group.size = size
    for group.rank in range(size):
        shares.append(group.share(start, start + rows))
    assert shares[0][0] == start
    assert shares[-1][1] == start + rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
    sizes = {b - a for a, b in shares}
    assert max(sizes) - min(sizes) <= 1


def rounding_bound(dtype):
    """How far rounding can move the weights of `linear_model` in its training apart, by the Frobenius norm.

    With squared error, a step is `W - lr (W H - Y)`, with the symmetric `H = 2/(n o) A^T A`, `A = (X, 1)`. Where
    `lr |H| <= 2`, which is asserted, it is no expansion, so errors at most add up. What a step adds is at most
    `lr |dg| + 2u (|W| + lr |g|)`, where `|dg| <= gamma_k 2/(n o) (|A| |W|^T + |T|)^T |A|`, and a gradient goes through at most
    `k = in + 1 + n + P + 8` roundings: those of the product `Z`, of the difference, factor and weight, of the product `dW` and
    of the sum over ranks (Higham, 2002, section 3.1). Both trainings may be so far from the exact one.
    """
    X, T = (x.astype("f8") for x in worker.linear_data(dtype))
    model, options = worker.linear_model(dtype), worker.linear_options()
    W = np.concatenate([np.asarray(model.W, "f8"), np.asarray(model.b, "f8").T], axis=1)
    lr, u, total = options["optimizer"].learning_rate(), np.finfo(dtype).eps / 2, 0.0
    for epoch in range(worker.EPOCHS):
        order = epoch_order(layer_seed(worker.SEED), epoch, worker.ROWS)
        for i in range(0, worker.ROWS, worker.BATCH):
            rows = order[i : i + worker.BATCH]
            A = np.concatenate([X[rows], np.ones((len(rows), 1))], axis=1)
            factor = 2 / (len(rows) * T.shape[1])
            assert lr * factor * np.linalg.norm(A.T @ A, 2) <= 2
            k = A.shape[1] + len(rows) + 4 + 8
            gamma = k * u / (1 - k * u)
            g = factor * (A @ W.T - T[rows]).T @ A
            dg = gamma * factor * (np.abs(A) @ np.abs(W).T + np.abs(T[rows])).T @ np.abs(A)
            total += lr * np.linalg.norm(dg) + 2 * u * (np.linalg.norm(W) + lr * np.linalg.norm(g))
            W = W - lr * g
    return 2 * total


def assert_linear_as_one_process(found, dtype):
    model = worker.linear_model(dtype)
    fit(model, *worker.linear_data(dtype), **worker.linear_options())
    one = worker.weights(model)
    squares = sum(((found[name].astype("f8") - one[name]) ** 2).sum() for name in one)
    assert np.sqrt(squares) <= rounding_bound(dtype)
    assert found["W"].dtype == dtype


@needs_mpi
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_reach_the_weights_of_one_process_within_rounding(together, size, dtype):
    found, _ = together(size)
    for scenarios in found:
        assert_linear_as_one_process(scenarios["linear"][dtype], dtype)


@needs_mpi
def test_micro_batches_on_ranks_reach_the_weights_of_one_process(together):
    for scenarios in together(4)[0]:
        assert_linear_as_one_process(scenarios["linear_accumulated"]["float64"], "float64")


@needs_mpi
def test_weights_of_samples_mean_on_ranks_what_they_mean_in_one_process(together):
    """The weighted mean is that over the whole batch, also where all that a rank has of it weighs nothing."""
    model, w = worker.linear_model("float64"), np.arange(worker.ROWS) % 4.0
    fit(model, *worker.linear_data("float64"), sample_weight=w, **worker.linear_options())
    for scenarios in together(4)[0]:
        assert largest_difference(scenarios["weighted"], worker.weights(model)) < 1e-12


@needs_mpi
def test_states_are_those_of_rank_0_after_each_epoch_and_masks_differ(together):
    first, *others = (scenarios["stateful"] for scenarios in together(4)[0])
    for rank, other in enumerate(others, 1):
        assert largest_difference(other["weights"], first["weights"]) == 0
        assert np.array_equal(other["mean"], first["mean"])
        assert other["step"] == first["step"]
        assert other["stream"] == rank
        assert not np.array_equal(other["mask"], first["mask"])


@pytest.mark.parametrize("accumulate", [2, 3, 10, 99])
def test_micro_batches_in_one_process_reach_the_same_weights(accumulate):
    model = worker.linear_model("float64")
    fit(model, *worker.linear_data("float64"), microbatches=accumulate, **worker.linear_options())
    assert_linear_as_one_process(worker.weights(model), "float64")


def test_micro_batches_bound_the_rows_that_are_worked_on_at_once():
    rows = []

    class Watched(Linear):
        def forward(self, X):
            rows.append(X.shape[0])
            return super().forward(X)

    layer = Watched(6, 4, dtype="float64", seed=2)
    fit(layer, *worker.linear_data("float64"), microbatches=4, **worker.linear_options())
    assert max(rows) == 3  # of a batch of 10
    with pytest.raises(ValueError, match="microbatches is 0"):
        fit(layer, *worker.linear_data("float64"), microbatches=0, **worker.linear_options())


class Perturbed(Sequential):
    """A model each of whose gradients is off by as much as rounding can make it, the signs drawn at random."""

    rng: np.random.Generator

    def gradients(self, dZ, caches, *, needs_dX=True):
        dX, exact = super().gradients(dZ, caches, needs_dX=needs_dX)
        X, sizes = caches[0]["X"], dict.fromkeys(exact, 0.0)
        for i in range(len(X)):  # the sum over the rows of what each contributes, without its sign
            _, row_caches = super().forward(X[i : i + 1])
            for name, row in super().gradients(dZ[i : i + 1], row_caches, needs_dX=False)[1].items():
                sizes[name] = sizes[name] + np.abs(row)
        k = len(X) + sum(layer.in_features for layer in self if isinstance(layer, Linear))
        bound = 2 * k * np.finfo("f8").eps
        signs = {name: self.rng.choice([-1.0, 1.0], size=g.shape) for name, g in exact.items()}
        return dX, {name: g + signs[name] * bound * sizes[name] for name, g in exact.items()}


def spread(rule):
    """How far training moves when every gradient is off by its rounding bound: the largest of three draws."""
    one, found = worker.deep_model(), []
    fit(one, *worker.deep_data(), **worker.deep_options(rule=rule))
    for seed in range(3):
        model = worker.deep_model(kind=Perturbed)
        model.rng = np.random.default_rng(seed)
        fit(model, *worker.deep_data(), **worker.deep_options(rule=rule))
        found.append(largest_difference(worker.weights(model), worker.weights(one)))
    return worker.weights(one), max(found)


@needs_mpi
@pytest.mark.parametrize(
    ("scenario", "rule"),
    [("adam", lambda: Adam(1e-2, clip_norm=1.0)), ("momentum", lambda: SGD(0.1, momentum=0.9, nesterov=True))],
)
def test_ranks_train_a_deep_network_as_one_process_does(together, scenario, rule):
    one, far = spread(rule)
    history = fit(worker.deep_model(), *worker.deep_data(), **worker.deep_options(rule=rule))
    for size in (1, 2, 4):
        for found in together(size)[0]:
            assert largest_difference(found[scenario]["weights"], one) <= far
            assert found[scenario]["steps"] == 50
            # each loss is a mean of some 93 terms of weights that are so close; they are of size 1
            losses = [(row["loss"], other["loss"]) for row, other in zip(found[scenario]["rows"], history.rows, strict=True)]
            np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-10)


@needs_mpi
@pytest.mark.parametrize("scenario", ["adam", "momentum", "rank0_rules", "stop", "callback", "nan_skipped"])
def test_all_ranks_have_the_same_bits_and_the_same_history(together, scenario):
    for size in (2, 4):
        first, *others = (found[scenario] for found in together(size)[0])
        for other in others:
            assert largest_difference(other["weights"], first["weights"]) == 0
            assert {**other, "weights": 0} == {**first, "weights": 0}


@needs_mpi
def test_weights_and_seed_are_those_of_rank_0(together):
    model = worker.deep_model()
    start = worker.weights(model)
    for found in together(2)[0]:
        moved = largest_difference(found["rank0_rules"]["weights"], start)
        assert 0 < moved <= 50 * 1e-2 * 10  # 50 steps of Adam from there, not from the other rank's start


@needs_mpi
def test_a_step_is_one_all_reduce(together):
    for found in together(4)[0]:
        calls = found["one_message"]
        assert calls.count("Iallreduce") == 10
        # whatever else is said is said before, after the epoch and at the end: no more for more steps
        first = calls.index("Iallreduce")
        assert calls[first : first + 10] == ["Iallreduce"] * 10


@needs_mpi
def test_float16_messages_are_off_by_the_stated_error_at_most(together):
    for size in (2, 4):
        ranks = [found["half"] for found in together(size)[0]]
        u = 2.0**-11
        for name in ("a", "b"):
            mine = np.stack([rank["mine"][name].astype("f8") for rank in ranks])
            error = np.abs(ranks[0]["summed"][name] - mine.sum(0))
            assert (error <= ((1 + u) ** size - 1) * np.abs(mine).sum(0) + size * 2.0**-25).all()
            assert error.max() > 2.0**-22 * np.abs(mine).sum(0).max()  # so it was float16 that was sent
            for rank in ranks:
                assert rank["summed"][name].dtype == np.float32
                np.testing.assert_array_equal(rank["summed"][name], ranks[0]["summed"][name])
        # the loss is beyond float16 and keeps its precision
        assert float(ranks[0]["value"]) == sum(float(rank["loss"]) for rank in ranks)
        assert all(rank["stop"] is True for rank in ranks)


# ---------------------------------------------------------------------------------------------------------------------
# stopping, and going on with another number of ranks


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_a_stop_flag_on_one_rank_stops_all_after_the_same_step(together, size):
    found, folder = together(size)
    for rank in found:
        assert rank["stop"]["interrupted"] is True
        assert rank["stop"]["steps"] == 17
    assert checkpoints(folder / "stopped")[0].name == "step-000000017.safetensors"


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_a_callback_on_one_rank_stops_all_after_the_same_epoch(together, size):
    for rank in together(size)[0]:
        assert rank["callback"]["steps"] == 20
        assert len(rank["callback"]["rows"]) == 2
        assert not rank["callback"]["interrupted"]


@needs_mpi
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_training_stopped_on_4_ranks_goes_on_with_any_number(together, size, tmp_path):
    shutil.copytree(together(4)[1] / "stopped", tmp_path / "stopped")
    found, code, said = launched(size, tmp_path, "resume", WORKER_CHECKPOINTS="stopped")
    assert code == 0, said
    one, far = spread(lambda: Adam(1e-2, clip_norm=1.0))
    for rank in found:
        assert largest_difference(rank["resume"]["weights"], one) <= far
        assert len(rank["resume"]["rows"]) == 5
        assert rank["resume"]["steps"] == 50


@needs_mpi
def test_a_training_stopped_on_4_ranks_goes_on_without_mpi(together, tmp_path):
    shutil.copytree(together(4)[1] / "stopped", tmp_path / "stopped")
    model = worker.deep_model()
    fit(model, *worker.deep_data(), **worker.deep_options(checkpoint=tmp_path / "stopped", resume=True))
    one, far = spread(lambda: Adam(1e-2, clip_norm=1.0))
    assert largest_difference(worker.weights(model), one) <= far


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_a_bad_step_on_one_rank_is_called_off_on_all(together, size):
    for rank in together(size)[0]:
        assert rank["nan_skipped"]["skipped"] == 1
        for scenario in ("nan_fatal", "nan_slow"):  # also where the others have left before one has seen it
            kind, message, _, _ = rank[scenario]
            assert kind == "NonFiniteError"
            assert "step 15" in message


# ---------------------------------------------------------------------------------------------------------------------
# ranks that fail, differ, fall silent or die


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_fails_is_named_on_all(together, size):
    found, folder = together(size)
    for scenario, error in (("failure", "this rank has had enough"), ("failure_before", "row 3")):
        for rank, scenarios in enumerate(found):
            kind, message, about, seconds = scenarios[scenario][0] if scenario == "failure" else scenarios[scenario]
            assert error in message
            assert seconds < BOUND
            if rank == 1:
                assert kind == "ValueError"
            else:
                assert (kind, about) == ("RankError", (1,))
                assert "rank 1 (process" in message
    # the checkpoint of the epoch before is intact, and a group that has told of a failure trains on as if it had not
    assert load_checkpoint(folder / "failed", worker.deep_model(), Adam(1e-2))["step"] == 10
    for scenarios in found:
        assert largest_difference(scenarios["failure"][1]["weights"], scenarios["adam"]["weights"]) == 0


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_other_arguments_on_one_rank_are_told_before_anything_changes(together, size):
    for rank in together(size)[0]:
        (kind, message, about, _), unchanged = rank["disagreement"]
        assert (kind, about) == ("RankError", (1,))
        assert "batch_size 11, but rank 0 has 10" in message
        assert unchanged


@needs_mpi
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("X", "has X with the SHA-256"),
        ("rows", "has X with the SHA-256"),
        ("y", "has y with the SHA-256"),
        ("validation", "has the validation y with the SHA-256"),
        ("model", "has model Sequential(Linear(6, 8, dtype=float64, device=cpu), Tanh(), "),
        ("loss", "has loss InUnits, a MeanSquaredError() with {'unit': '3'}, but rank 0 has InUnits"),
        ("schedule", "has in step 2 the learning rate 0.0099"),
    ],
)
def test_what_one_rank_has_otherwise_is_named_before_anything_is_trained(together, name, words):
    for size in (2, 4):
        for rank in together(size)[0]:
            kind, message, about, _ = rank["differences"][name]
            assert (kind, about) == ("RankError", (1,))
            assert words in message


@needs_mpi
def test_a_schedule_is_asked_for_no_step_that_is_never_taken(together):
    for rank in together(2)[0]:
        assert rank["differences"]["short schedule"]["steps"] == 2


@needs_mpi
def test_the_command_names_the_rank_whose_file_has_other_classes(together):
    found, folder = together(4)
    first, *others = (rank["other_files"] for rank in found)
    kind, message, about, _ = first
    assert (kind, about) == ("RankError", (1,))
    assert others == [2] * 3  # the exit code of those who leave the telling to rank 0
    assert "has classes ('a', 'c'), but rank 0 has ('a', 'b')" in message
    assert not (folder / "out").exists()


@needs_mpi
def test_a_fault_of_the_program_keeps_its_traceback_on_the_rank_that_has_it(together):
    found, folder = together(4)
    kind, message, about, _ = found[0]["fault"]
    assert (kind, about) == ("RankError", (1,))
    assert "stopped: KeyError: 'a fault'" in message
    assert found[1]["fault"][:2] == ("KeyError", "'a fault'")
    assert [rank["fault"] for rank in found[2:]] == [2, 2]
    assert not (folder / "fault").exists()


@pytest.mark.parametrize("group", ["mpi", distributed.mpi])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(TypeError, match=r"give the group itself: group=distributed.mpi\(\)"):
        fit(worker.deep_model(), *worker.deep_data(), group=group, **worker.deep_options())


def test_ranks_that_waited_too_long_for_each_other_and_answer_are_told_what_to_change():
    """Whoever took too long has come by the time at which the others ask: nobody is silent, nobody can be named."""

    class Late(over_mpi.MPIGroup):
        def __init__(self):
            self._comm, self._session, self._news, self.timeout = None, 0, {}, 3.0
            self.base = SimpleNamespace(Idup=lambda: (None, None))

        def _complete(self, request, *buffers):
            pass

        def _part(self, error):
            return ()

    words = r"not ready within 3 s, and nobody can tell which.*timeout"
    with pytest.raises(RankError, match=words) as caught, Late().running():
        raise over_mpi.Late
    assert caught.value.ranks == ()


@needs_mpi
@pytest.mark.parametrize("scenario", ["other_weights", "other_optimizer", "other_moments"])
def test_a_checksum_that_differs_stops_all_and_names_the_rank(together, scenario):
    for size, ranks in ((4, (1,)), (2, (0, 1))):  # of two, nobody can tell which one is right
        found, folder = together(size)
        for rank in found:
            kind, message, about, _ = rank[scenario]
            assert (kind, about) == ("RankError", ranks)
            assert "rank 1 (process" in message
            assert f"after epoch {3 if scenario == 'other_weights' else 1}" in message
        if scenario == "other_weights":
            assert load_checkpoint(folder / "spoiled", worker.deep_model(), Adam(1e-2))["epoch"] == 2


@needs_mpi
@pytest.mark.parametrize("scenario", ["silence", "crash"])
def test_a_rank_that_gives_no_sign_is_named_in_bounded_time(tmp_path, scenario):
    found, code, said = launched(3, tmp_path, scenario, timeout=BOUND, WORKER_SURVIVORS="0 2")
    assert code != 0, said
    for rank in (0, 2):
        kind, message, about, seconds = found[rank][scenario]
        assert (kind, about) == ("RankError", (1,)), message
        assert "rank 1 (process" in message
        assert "gave no sign for 4 s" in message
        assert seconds < BOUND / 2
    if scenario == "silence":
        assert load_checkpoint(tmp_path / "silent", worker.deep_model(), Adam(1e-2))["step"] == 10


@needs_mpi
def test_a_killed_rank_ends_the_job_and_the_last_checkpoint_goes_on_with_fewer(tmp_path):
    began = time.monotonic()
    _, code, said = launched(4, tmp_path, "kill")
    assert code != 0
    assert time.monotonic() - began < BOUND
    # it was killed in step 34; rank 0 may have been writing the checkpoint of step 33 then
    assert load_checkpoint(tmp_path / "killed", worker.deep_model(), Adam(1e-2))["step"] in (30, 33)
    found, code, said = launched(2, tmp_path, "resume", WORKER_CHECKPOINTS="killed")
    assert code == 0, said
    one, far = spread(lambda: Adam(1e-2, clip_norm=1.0))
    for rank in found:
        assert largest_difference(rank["resume"]["weights"], one) <= far


@needs_mpi
def test_a_killed_rank_is_named_by_the_launcher(tmp_path):
    _, _, said = launched(4, tmp_path, "kill", launcher="" if is_open_mpi() else ".gforker")
    named = r"process rank 1 with PID" if is_open_mpi() else r"1: ?Return code = \d+, signaled with Killed"
    assert re.search(named, " ".join(said.split())), said


@needs_mpi
def test_a_killed_rank_is_named_by_the_others_where_the_launcher_lets_them_live(tmp_path):
    if not is_open_mpi():
        pytest.skip("MPICH's mpiexec ends them at once")
    found, code, said = launched(4, tmp_path, "kill", timeout=BOUND, options=["--enable-recovery"], WORKER_SURVIVORS="0 2 3")
    assert code != 0
    for rank in (0, 2, 3):
        kind, message, about, seconds = found[rank]["kill"]
        assert (kind, about) == ("RankError", (1,)), said
        assert re.search(r"rank 1 \(process \d+ on .*\) has died", message)
        assert seconds < BOUND / 2


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def command(size, folder, *arguments, **environment):
    options = "-m", "anyarray_linear", "train", "--device", "cpu", "--hidden", "16", "--out", folder
    return started(size, *options, *arguments, **environment)


@needs_mpi
def test_the_command_trains_on_ranks_and_resumes_on_others(tmp_path):
    out, err = command(3, tmp_path / "a", "--distributed", "mpi", "--epochs", "2").communicate(timeout=PATIENCE)
    assert out.count("3 ranks over") == out.count("accuracy") == 1, out + err  # rank 0 alone prints
    assert err.count("epoch 2") == 1
    command(2, tmp_path / "a", "--distributed", "mpi", "--epochs", "3", "--resume").communicate(timeout=PATIENCE)
    command(1, tmp_path / "b", "--epochs", "3").communicate(timeout=PATIENCE)  # one process, without MPI
    mine, theirs = ((tmp_path / name / "history.jsonl").read_text().splitlines() for name in "ab")
    assert len(mine) == len(theirs) == 3
    ours, one = (float(re.search(r'"loss": ([0-9.e-]+)', rows[-1])[1]) for rows in (mine, theirs))
    assert ours == pytest.approx(one, rel=1e-3)  # float32, and 123 steps of Adam


@needs_mpi
@pytest.mark.parametrize("fails", [False, True])
def test_no_rank_waits_for_rank_0_to_write_the_results(tmp_path, fails):
    found, code, said = launched(3, tmp_path, "slow_results", **({"WORKER_FAILS": "1"} if fails else {}))
    assert code == 0, said
    (first, seen), *others = (rank["slow_results"] for rank in found)
    assert seen == [True, True]  # they had left when rank 0 began its report
    assert [code for code, _ in others] == [None, None]
    if fails:  # which is the error of rank 0 alone
        assert first[:2] == ("OSError", "[Errno 28] No space left on device: 'report.html'")
    else:
        assert first is None
    assert (tmp_path / "a folder" / "summary.json").exists() != fails


def test_after_a_stop_the_command_to_go_on_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "my runs"
    summary = {"device": "cpu", "seconds": 1.0, "train": {"loss": 1.0}, "interrupted": True, "epochs": 3, "model_epoch": 3}
    for ranks, processes, itself, line in (
        ({}, None, False, f"anyarray-linear train --out '{folder}' --resume"),
        ({"ranks": 4}, "mpi", False, f"mpiexec -n 4 anyarray-linear train --out '{folder}' --resume --distributed mpi"),
        ({"ranks": 4}, "mpi", True, f"anyarray-linear train --out '{folder}' --resume --processes 4"),
    ):
        show(folder, summary | ranks, processes, itself)
        said = capsys.readouterr().out.splitlines()[-1]
        assert said == line
        *_, train, out, given, resume = shlex.split(said.removesuffix(" --distributed mpi").removesuffix(" --processes 4"))
        assert (train, out, given, resume) == ("train", "--out", str(folder), "--resume")


@needs_mpi
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hidden", "x"), "no list of sizes"),
        (("--out", "used"), "holds a run already"),
        (("--epochs", "x"), "'x' "),
    ],
    ids=["found by all", "found by rank 0", "found before MPI"],
)
def test_the_command_refuses_on_all_ranks(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    process = command(3, tmp_path / "a", "--distributed", "mpi", *arguments)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert err.count("error: ") == err.count(words) == 1, err  # what rank 0 says, others need not repeat
    assert "Traceback" not in err


@needs_mpi
def test_sigterm_to_mpiexec_stops_all_ranks_after_a_step(tmp_path):
    process = command(2, tmp_path / "a", "--distributed", "mpi", "--epochs", "1000000")
    for line in process.stderr:
        if line.startswith("epoch 3"):
            break
    if is_open_mpi():
        process.kill()
        process.communicate()
        pytest.skip("Open MPI's mpiexec kills its ranks at once instead")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode in (143, 15)
    assert '"interrupted": true' in (tmp_path / "a" / "summary.json").read_text()


def by_processes(count, folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "anyarray_linear", "train", "--processes", str(count), "--device", "cpu", "--hidden", "16",
         "--out", str(folder), *arguments],
        env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@needs_mpi
def test_processes_in_one_word_train_what_mpiexec_trains(tmp_path):
    out, err = by_processes(2, tmp_path / "a", "--epochs", "2").communicate(timeout=PATIENCE)
    assert out.startswith("2 ranks over"), err
    command(2, tmp_path / "b", "--distributed", "mpi", "--epochs", "2").communicate(timeout=PATIENCE)
    mine, theirs = (load_model(tmp_path / name / "model.safetensors").parameters() for name in "ab")
    assert largest_difference(mine, theirs) == 0
    assert "processes" not in (tmp_path / "a" / "config.json").read_text()
    out, err = by_processes(3, tmp_path / "a", "--resume", "--epochs", "3").communicate(timeout=PATIENCE)
    assert out.startswith("3 ranks over"), err


@needs_mpi
def test_of_processes_in_one_word_one_that_dies_is_named_and_all_end(tmp_path):
    process = by_processes(2, tmp_path / "a", "--epochs", "1000000")
    victim = int(re.search(r"1 is process (\d+)", process.stdout.readline())[1])
    for line in process.stderr:
        if line.startswith("epoch 2"):
            break
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    said = "".join(process.communicate(timeout=BOUND))
    assert time.monotonic() - began < BOUND
    assert process.returncode != 0
    assert str(victim) in said  # in the launcher's words, which ends the others, or in theirs


@needs_mpi
def test_the_cores_are_shared_unless_the_user_has(tmp_path):
    code = "import os, sys; print(os.environ['OPENBLAS_NUM_THREADS'])"
    module = tmp_path / "said.py"
    module.write_text(code)
    start = "from anyarray_linear.distributed.launching import launch; launch(2, 'said', [])"
    bare = {name: value for name, value in ENVIRONMENT.items() if not name.endswith("_NUM_THREADS")}
    paths = {"PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])}
    for threads, expected in (({}, max(1, len(usable_cores()) // 2)), ({"OPENBLAS_NUM_THREADS": "7"}, 7)):
        out = subprocess.check_output([sys.executable, "-c", start], env={**bare, **paths, **threads}, text=True, timeout=PATIENCE)
        assert out.split() == [str(expected)] * 2


def refused(*arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of typer, or of ours
        app(["train", *arguments], standalone_mode=False)
    return one_line(caught.value)


@pytest.fixture
def not_launched(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PMI_", "OMPI_COMM", "ANYARRAY_PROCESSES"))]:
        monkeypatch.delenv(name)


def test_without_mpi_the_word_says_what_to_install(monkeypatch, not_launched):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    assert "mpi4py is not installed: pip install" in refused("--processes", "2", "--device", "cpu")
    monkeypatch.setattr(launching, "find_spec", lambda name: object())
    monkeypatch.setattr(launching.shutil, "which", lambda *program, path: None)
    assert "there is no mpiexec: pip install" in refused("--processes", "2", "--device", "cpu")


def test_the_word_and_mpiexec_are_not_for_each_other(monkeypatch, not_launched):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "0")
    assert "leave out mpiexec" in refused("--processes", "2")


def test_each_process_has_a_card_of_its_own(monkeypatch, not_launched):
    monkeypatch.setattr(_ranks.doctor, "count", lambda: 2)
    assert "there are 2 CUDA devices, one for each; give --processes 2 or --device cpu" in refused("--processes", "3")
    assert "give --device cuda" in refused("--processes", "2", "--device", "cuda:1")
    started = []

    class Ranks:
        def __init__(self, *given):
            started.append(given)

        def run(self):
            return 3

    def launch(*given):  # which does not return either
        started.append(given)
        raise SystemExit(4)

    monkeypatch.setattr(_ranks, "launch", launch)
    monkeypatch.setattr(_ranks, "StartedRanks", Ranks)
    for nccl, transport, code in ((True, "nccl", 3), (False, "mpi", 4)):  # NCCL without MPI
        monkeypatch.setattr(_ranks.cards, "has_nccl", lambda nccl=nccl: nccl)
        with pytest.raises(SystemExit, match=str(code)):
            _ranks.start(2, None, "auto")
        assert started.pop()[2][-2:] == ["--distributed", transport]
        with pytest.raises(SystemExit, match="4"):
            _ranks.start(2, None, "cpu")
        assert started.pop()[2][-2:] == ["--distributed", "mpi"]


def test_processes_that_do_not_find_each_other_say_so(monkeypatch, not_launched):
    monkeypatch.setenv("ANYARRAY_PROCESSES", "4")
    assert "4 processes were started, and this one sees 1" in refused("--epochs", "1", "--device", "cpu")


@pytest.mark.parametrize(("size", "rank"), [("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")])
def test_processes_that_train_alone_are_warned_of_once(tmp_path, monkeypatch, size, rank):
    for name in [name for name in os.environ if name.startswith(("PMI_", "OMPI_COMM"))]:
        monkeypatch.delenv(name)
    alone = "each of these 3 processes trains alone"

    def said():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            app(["train", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out"), "--overwrite"], standalone_mode=False)
        return sum(alone in str(warning.message) for warning in caught)

    assert said() == 0
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "0")
    assert said() == 1
    monkeypatch.setenv(rank, "1")
    assert said() == 0


@needs_mpi
def test_more_blas_threads_than_cores_are_warned_of_once(tmp_path):
    threads = str(2 * os.cpu_count())
    _, code, said = launched(2, tmp_path, "adam", "momentum", OPENBLAS_NUM_THREADS=threads)
    assert code == 0, said
    assert said.count(f"2 ranks on this machine have up to {threads} BLAS threads") == 1
    assert re.search(r"start them with OPENBLAS_NUM_THREADS=\d", said)


@pytest.mark.parametrize(
    ("seats", "fitting"),
    [
        ([({0, 1, 2, 3}, 4)], None),  # a rank alone
        ([({0, 1, 2, 3}, 4)] * 2, 2),
        ([({0, 1, 2, 3}, 2)] * 2, None),
        ([({0, 1, 2, 3}, 3), ({0, 1, 2, 3}, 1)], None),
        ([({0, 1, 2, 3}, 4), ({0, 1, 2, 3}, 1)], 2),
        ([({0}, 1), ({1}, 1)], None),  # bound by the launcher
        ([({0}, 2), ({1}, 2)], 1),
        ([({0, 1}, 1)] * 4, None),  # more ranks than cores, which no threads can help
        ([({0, 1}, 2)] * 4, 1),
    ],
)
def test_the_threads_that_fit(seats, fitting):
    assert fitting_threads(seats) == fitting


def test_without_mpi4py_the_command_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['mpi4py'] = None; sys.argv[1:] = ['train', '--distributed', 'mpi']; from anyarray_linear.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert 'pip install "anyarray_linear[mpi]"' in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# CuPy, on the CPU stand-in for CUDA: no part of this ran on a GPU


@needs_mpi
@on_stand_in
def test_cupy_on_4_ranks_reaches_the_weights_of_one_process_on_numpy(tmp_path):
    found, code, said = launched(4, tmp_path, "linear", WORKER_DEVICE="auto")
    assert code == 0, said
    assert said.count("gradients go through host memory") == 1
    for rank in found:
        for dtype in ("float32", "float64"):
            assert_linear_as_one_process(rank["linear"][dtype], dtype)


@needs_mpi
@on_stand_in
def test_the_stream_is_synchronized_before_mpi_reads_device_memory(tmp_path):
    found, code, said = launched(2, tmp_path, "device_buffers", WORKER_DEVICE="auto")
    assert code == 0, said
    for rank in found:
        weights, events = rank["device_buffers"]
        assert_linear_as_one_process(weights["float32"], "float32")
        assert len(events) == 2 * 50  # a step each in two trainings
        for _, kind, before in events:
            assert kind.startswith("cupy")
            assert before == "synchronize"


@needs_mpi
@on_stand_in
def test_the_nccl_path_on_a_fake_process_group(tmp_path):
    """The fake checks contiguity, dtype, device and stream; nothing of NCCL itself ran."""
    found, code, said = launched(2, tmp_path, "nccl", "nccl_elsewhere")
    assert code != 0, said  # after a failure there may be a sum on the device that never ends, so all ranks are ended
    kind, message, *_ = found[0]["nccl_elsewhere"]
    assert kind == "ValueError"
    assert "on cuda:3, but this rank's NCCL is on cuda:0" in message
    for rank in found:
        nccl = rank["nccl"]
        for weights in nccl["linear"]:  # on the default stream, and on one of the user's
            assert_linear_as_one_process(weights, "float64")
        # the flag of rank 1's step 17 is read while step 18 is under way
        assert (nccl["stop"]["steps"], nccl["stop"]["interrupted"]) == (18, True)
        assert {dtype for dtype, _ in nccl["calls"]} == {"d", "e", "f"}
        packed = 6 * 4 + 4 + 2
        assert nccl["calls"][:100] == [("d", packed)] * 100  # one sum per step
        assert ("f", 2) in nccl["calls"]  # loss and flag beside float16 gradients


@needs_mpi
@on_stand_in
def test_two_ranks_on_one_device_are_refused(tmp_path):
    found, code, said = launched(3, tmp_path, "shared_device", CUPY_CPU_DEVICES="2")
    assert code == 0, said
    for rank in found:
        kind, message, about, _ = rank["shared_device"]
        assert kind == "RankError"
        assert about == (0, 2), message
