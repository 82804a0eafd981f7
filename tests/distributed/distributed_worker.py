"""What each rank runs in the tests of `distributed`: `mpiexec -n P python distributed_worker.py FOLDER SCENARIO...`.

Each rank leaves what it has seen in `FOLDER/RANK.pickle`, by scenario.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np

from anyarray_linear import (
    SGD,
    Adam,
    Dropout,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    Tanh,
    distributed,
    fit,
)
from anyarray_linear.schedules import cosine

ROWS, BATCH, EPOCHS = 93, 10, 5  # 50 steps; the last batch of an epoch has 3 rows, of which one of 4 ranks gets none
SEED = 5
NEVER = -2


def linear_data(dtype):
    rng = np.random.default_rng(1)
    return rng.standard_normal((ROWS, 6)).astype(dtype), rng.standard_normal((ROWS, 4)).astype(dtype)


def linear_options():
    return {"loss": MeanSquaredError(), "optimizer": SGD(0.25), "batch_size": BATCH, "epochs": EPOCHS, "seed": SEED, "progress": False}


def linear_model(dtype, device=None):
    return Linear(6, 4, dtype=dtype, seed=2, device=device)


def deep_data():
    rng = np.random.default_rng(3)
    X = rng.standard_normal((ROWS, 6))
    return X, (X[:, 0] > 0) + (X[:, 1] > 0.5).astype(int)


def deep_model(seed=7, kind=Sequential):
    return kind(Linear(6, 8, seed=seed), ReLU(), Linear(8, 3, seed=seed + 1))


def deep_options(**changes):
    rule = changes.pop("rule", lambda: Adam(1e-2, clip_norm=1.0))
    options = {"loss": SoftmaxCrossEntropy(), "batch_size": BATCH, "epochs": EPOCHS, "seed": SEED, "progress": False}
    return {**options, "optimizer": rule(), **changes}


def weights(model):
    from anyarray_linear import Device
    from anyarray_linear.protocol import parameters

    return {name: np.array(Device.of(W).to_numpy(W)) for name, W in parameters(model).items()}


def told(action):
    """What `action` raised, as `(class, message, ranks, seconds)`, or what it gave."""
    began = time.monotonic()
    try:
        return action()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "ranks", None), time.monotonic() - began


class StopAfter:
    """Asks to stop after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0


class Faulty(SoftmaxCrossEntropy):
    """A loss that does `fault` at its call of that number, counted from 1 without `fit`'s look at a row."""

    def __init__(self, call, fault):
        self._call, self._fault, self._calls = call, fault, -1

    def forward(self, Z, target):
        self._calls += 1
        value, cache = super().forward(Z, target)
        return (self._fault(value) if self._calls == self._call else value), cache

    def __repr__(self):
        return repr(SoftmaxCrossEntropy())  # a resumed training goes on with that one


class InUnits(MeanSquaredError):
    """A loss with a number in it."""

    def __init__(self, unit):
        self.unit = unit


class Centred:
    """A layer with a state: the running mean of its input, which is taken away."""

    def __init__(self):
        self.mean = np.zeros(8)

    def forward(self, X):
        if len(X):
            self.mean = 0.9 * self.mean + 0.1 * X.mean(axis=0)
        return X - self.mean, None

    def gradients(self, dZ, cache, *, needs_dX=True):
        return dZ, {}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        return dZ

    def parameters(self):
        return {}

    def state(self):
        return {"mean": self.mean}

    def to(self, device=None, dtype=None):
        return self

    def __call__(self, X):
        return X - self.mean


def fail(value):
    raise ValueError("this rank has had enough")


class Scenarios:
    def __init__(self, folder):
        self.folder = folder
        self.group = distributed.mpi(timeout=60)
        self.rank = self.group.rank

    def deep(self, model=None, data=None, **changes):
        model = deep_model() if model is None else model
        options = deep_options(**changes)
        history = fit(model, *(data or deep_data()), group=self.group, **options)
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows]
        steps = options["optimizer"].steps
        return {"weights": weights(model), "rows": rows, "interrupted": history.interrupted, "skipped": history.skipped, "steps": steps}

    def linear(self, accumulate=1):
        found = {}
        for dtype in ("float32", "float64"):
            model = linear_model(dtype, self.group.device(os.environ.get("WORKER_DEVICE", "cpu")))
            fit(model, *linear_data(dtype), group=self.group, microbatches=accumulate, **linear_options())
            found[dtype] = weights(model)
        return found

    def linear_accumulated(self):
        return self.linear(accumulate=2)

    def weighted(self):
        model = linear_model("float64")
        fit(model, *linear_data("float64"), group=self.group, sample_weight=np.arange(ROWS) % 4.0, microbatches=2, **linear_options())
        return weights(model)

    def stateful(self):
        model = Sequential(Linear(6, 8, seed=1), Centred(), Dropout(0.5, seed=2), Linear(8, 3, seed=3))
        model[2].step = 100 * self.rank  # fit starts from rank 0's
        fit(model, *deep_data(), group=self.group, **deep_options())
        first = model[2].forward(np.ones((4, 8)))[1]["K"]
        return {"weights": weights(model), "mean": model[1].mean, "step": model[2].step, "stream": model[2].stream, "mask": first}

    def adam(self):
        return self.deep()

    def momentum(self):
        return self.deep(rule=lambda: SGD(0.1, momentum=0.9, nesterov=True))

    def half(self):
        self.group.half = True
        try:
            rng = np.random.default_rng(self.rank)
            gradients = {"b": rng.standard_normal((3, 50)).astype("f4"), "a": (rng.standard_normal(7) * 1e-6).astype("f4")}
            loss = np.asarray(1e5 + self.rank, dtype="f4")
            with self.group.running():
                value, summed, stop = self.group.average(loss, gradients, self.rank == 1)
            return {"mine": gradients, "loss": loss, "summed": summed, "value": value, "stop": stop}
        finally:
            self.group.half = False

    def one_message(self):
        """How often each collective is called in a training of one epoch of 10 steps."""
        calls = []

        class Watched:
            def __init__(self, comm):
                self.comm = comm

            def __getattr__(self, name):
                if name.startswith("I"):
                    calls.append(name)
                return getattr(self.comm, name)

        with self.group.running():
            self.group._comm = Watched(self.group._comm)
            self.deep(epochs=1)
        return calls

    def rank0_rules(self):
        """Other weights and another seed on each rank."""
        return self.deep(model=deep_model(seed=7 + 10 * self.rank), seed=None)

    def stop(self):
        return self.deep(stop=StopAfter(17) if self.rank == 1 else None, checkpoint=self.folder / "stopped")

    def callback(self):
        return self.deep(callbacks=[lambda model, row: self.rank == self.group.size - 1 and row["epoch"] == 2])

    def nan_skipped(self):
        return self.deep(loss=Faulty(5, lambda value: value * np.nan) if self.rank == 1 else Faulty(NEVER, fail), skip_nonfinite=1)

    def nan_fatal(self):
        loss = Faulty(15, lambda value: value * np.nan) if self.rank == 1 else Faulty(NEVER, fail)
        return told(lambda: self.deep(loss=loss))

    def nan_slow(self):
        """All look at the fatal step again, by one more all-reduce, whose end rank 0 notices after the others have left."""

        class Late:
            def __init__(self, request):
                self.request, self.until = request, time.monotonic() + 0.5

            def Test(self):
                return time.monotonic() > self.until and self.request.Test()

        class Slow:
            def __init__(self, comm):
                self.comm, self.calls = comm, 0

            def Iallreduce(self, *arguments):
                self.calls += 1
                request = self.comm.Iallreduce(*arguments)
                return Late(request) if self.calls == 21 else request

            def __getattr__(self, name):
                return getattr(self.comm, name)

        def action():
            with self.group.running():
                if self.rank == 0:
                    self.group._comm = Slow(self.group._comm)
                return self.deep(loss=Faulty(15, lambda value: value * np.nan) if self.rank == 1 else Faulty(NEVER, fail))

        return told(action)

    def failure(self):
        def action():
            return self.deep(loss=Faulty(14, fail) if self.rank == 1 else Faulty(NEVER, fail), checkpoint=self.folder / "failed")

        first = told(action)
        return first, self.deep()  # and the group is as good as new

    def failure_before(self):
        """One rank has data of its own, and it is bad."""
        X, y = deep_data()
        if self.rank == 1:
            X[3, 2] = np.nan
        return told(lambda: self.deep(data=(X, y)))

    def disagreement(self):
        model = deep_model(seed=7 + 10 * self.rank)
        before = weights(model)
        told_ = told(lambda: self.deep(model=model, batch_size=BATCH + (self.rank == 1)))
        return told_, all((before[name] == W).all() for name, W in weights(model).items())

    def differences(self):
        """What is told where one thing is otherwise on rank 1."""
        mine = self.rank == 1
        X, y = deep_data()
        other_X, other_y, other_rows = X.copy(), y.copy(), X.copy()
        other_X[40, 3] += 1e-9
        other_y[41] = (y[41] + 1) % 3
        other_rows[[7, 8]] = X[[8, 7]]
        layers = Linear(6, 8, seed=7), Tanh() if mine else ReLU(), Linear(8, 3, seed=8)
        one_hot = np.eye(3)[y]
        trials = {
            "X": {"data": (other_X if mine else X, y)},
            "rows": {"data": (other_rows if mine else X, y)},
            "y": {"data": (X, other_y if mine else y)},
            "validation": {"validation": (X[:9], (other_y if mine else y)[40:49])},
            "model": {"model": Sequential(*layers)},
            "loss": {"loss": InUnits(3.0 if mine else 2.0), "data": (X, one_hot)},
            "schedule": {"rule": lambda: Adam(cosine(1e-2, 60 if mine else 50))},
            "short schedule": {"rule": lambda: Adam([1e-2, 1e-3].__getitem__), "batch_size": 93, "epochs": 2},
        }
        return {name: told(lambda changes=changes: self.deep(**changes)) for name, changes in trials.items()}

    def other_files(self):
        """The command, with a file of the same numbers and of another class on rank 1."""
        from anyarray_linear.cli._app import app

        names = "ac" if self.rank == 1 else "ab"
        path = self.folder / f"{self.rank}.csv"
        path.write_text("u,v,kind\n" + "".join(f"{i},{i * i % 7},{names[i % 2]}\n" for i in range(40)))
        action = ["train", "--device", "cpu", "--distributed", "mpi", "--data", str(path), "--out", str(self.folder / "out")]
        return told(lambda: app(action, standalone_mode=False))

    def fault(self):
        """The command, with a fault of the program on rank 1, which needs its traceback."""
        from anyarray_linear.cli import _training as train
        from anyarray_linear.cli._app import app

        def norms(*arguments):
            raise KeyError("a fault")

        whole = train.Norms
        train.Norms = norms if self.rank == 1 else whole
        action = ["train", "--device", "cpu", "--distributed", "mpi", "--epochs", "1", "--out", str(self.folder / "fault")]
        try:
            return told(lambda: app(action, standalone_mode=False))
        finally:
            train.Norms = whole

    def other_weights(self):
        def spoil(model, row):
            if self.rank == 1 and row["epoch"] == 3:
                model[0].W = model[0].W + 1e-12

        return told(lambda: self.deep(callbacks=[spoil], checkpoint=self.folder / "spoiled"))

    def other_optimizer(self):
        rule = Adam(1e-2)

        def spoil(model, row):
            if self.rank == 1:
                rule.steps += 1

        return told(lambda: self.deep(rule=lambda: rule, callbacks=[spoil]))

    def other_moments(self):
        rule = Adam(1e-2)

        def spoil(model, row):
            if self.rank == 1:
                state = rule.state_dict()
                state["moments"]["0.W"]["V"][0, 0] += 1e-12
                rule.load_state_dict(state)

        return told(lambda: self.deep(rule=lambda: rule, callbacks=[spoil]))

    # each of these in a run of its own

    def resume(self):
        return self.deep(checkpoint=self.folder / os.environ["WORKER_CHECKPOINTS"], resume=True)

    def silence(self):
        self.group.timeout = 4.0  # ample for a rank that is only slow
        loss = Faulty(14, lambda value: time.sleep(600)) if self.rank == 1 else Faulty(NEVER, fail)
        return told(lambda: self.deep(loss=loss, checkpoint=self.folder / "silent"))

    def crash(self):
        """A rank whose program ends by an error of its own, outside of `fit`."""
        self.group.timeout = 4.0  # ample for a rank that is only slow
        if self.rank == 1:
            raise KeyError("not in fit")
        return told(self.deep)

    def kill(self):
        if self.rank == 0:
            print(self.group, flush=True)

        def die(value):
            os.kill(os.getpid(), signal.SIGKILL)

        loss = Faulty(34, die) if self.rank == 1 else Faulty(NEVER, fail)
        return told(lambda: self.deep(loss=loss, checkpoint=self.folder / "killed", checkpoint_every=3))

    def slow_results(self):
        """The command, where rank 0 writes its report only once all others have left."""
        from anyarray_linear.cli import _training as train
        from anyarray_linear.cli._app import app

        left = [self.folder / f"{rank}.left" for rank in range(1, self.group.size)]
        write, seen = train.report, []

        def report(*arguments):
            until = time.monotonic() + 20
            while not all(path.exists() for path in left) and time.monotonic() < until:
                time.sleep(0.01)
            seen.extend(path.exists() for path in left)
            if "WORKER_FAILS" in os.environ:
                raise OSError(28, "No space left on device", "report.html")
            return write(*arguments)

        train.report = report
        out = str(self.folder / "a folder")
        action = ["train", "--device", "cpu", "--hidden", "16", "--epochs", "1", "--distributed", "mpi", "--out", out]
        code = told(lambda: app(action, standalone_mode=False))
        if self.rank:
            left[self.rank - 1].touch()
        return code, seen

    def shared_device(self):
        return told(lambda: self.deep(model=deep_model().to(self.group.device("cuda"))))

    def device_buffers(self):
        """Whether the stream is synchronized before each message from device memory, on the CPU stand-in for CUDA."""
        import cupy

        self.group.device_buffers = True
        events, current = [], cupy.cuda.get_current_stream

        class Stream:
            def synchronize(self):
                events.append("synchronize")
                current().synchronize()

            def __getattr__(self, name):
                return getattr(current(), name)

        class Watched:
            def __init__(self, comm):
                self.comm = comm

            def Iallreduce(self, here, x):
                events.append(("Iallreduce", type(x).__module__, events[-1]))
                return self.comm.Iallreduce(here, x)

            def __getattr__(self, name):
                return getattr(self.comm, name)

        cupy.cuda.get_current_stream = Stream
        try:
            with self.group.running():
                self.group._comm = Watched(self.group._comm)
                found = self.linear()
        finally:
            cupy.cuda.get_current_stream = current
        return found, [event for event in events if event != "synchronize"]

    def nccl(self):
        """The NCCL path over a FAKE process group: the sums are MPI's, over host memory. No part of NCCL runs."""
        import cupy
        import cupyx.distributed

        fake = FakeProcessGroup(self.group.base)
        cupyx.distributed.init_process_group = fake.init
        cupy.cuda.nccl.available = True
        self.group = distributed.nccl(timeout=60)
        result = {"linear": [], "stop": None, "half": None}
        device = self.group.device("cuda")
        with device:
            stream = cupy.cuda.Stream(non_blocking=True)
        for around in (contextlib.nullcontext(), stream):
            with device, around:
                fake.stream = cupy.cuda.get_current_stream().ptr
                result["linear"].append(self.linear_on_device())
        fake.stream = cupy.cuda.Stream.null.ptr
        model = deep_model().to(device)
        result["stop"] = self.deep(model=model, stop=StopAfter(17) if self.rank == 1 else None)
        self.group.half = True
        result["half"] = self.deep(model=deep_model().to(device, "float32"), epochs=1)
        self.group.half = False
        result["calls"] = fake.calls
        return result

    def nccl_elsewhere(self):
        """After `nccl`: rank 0 computes on a device that is not the one of its communicator."""
        return told(lambda: self.deep(model=deep_model().to("cuda:3" if self.rank == 0 else self.group.device("cuda"))))

    def linear_on_device(self):
        model = linear_model("float64", self.group.device("cuda"))
        fit(model, *linear_data("float64"), group=self.group, **linear_options())
        return weights(model)


class FakeProcessGroup:
    """In the place of `cupyx.distributed`'s process group; checks what NCCL would need, and sums on the host by MPI."""

    def __init__(self, comm):
        self.comm, self.calls, self.stream = comm, [], None

    def init(self, n_devices, rank, *, use_mpi):
        import cupy

        assert (n_devices, rank, use_mpi) == (self.comm.size, self.comm.rank, True)
        self.device = cupy.cuda.Device().id  # NCCL's communicator belongs to the device that is current now
        return self

    def all_reduce(self, in_array, out_array, op="sum", stream=None):
        import cupy
        from mpi4py import MPI

        assert op == "sum"
        for x in (in_array, out_array):
            assert isinstance(x, cupy.ndarray)
            assert x.flags.c_contiguous
            assert x.dtype.char in "efd"  # what NCCL and its sum take, of all dtypes here
            assert x.device.id == self.device == cupy.cuda.Device().id
        assert in_array.shape == out_array.shape
        assert stream is None  # then it is the current one, on which all before and after it must run, too
        assert cupy.cuda.get_current_stream().ptr == self.stream
        alike = self.comm.allgather((in_array.dtype.char, in_array.size))
        assert len(set(alike)) == 1
        self.calls.append(alike[0])
        host = in_array.get()
        wide = host.astype("f8")
        self.comm.Allreduce(MPI.IN_PLACE, wide)
        out_array.set(wide.astype(host.dtype))


def main(folder, *names):
    scenarios = Scenarios(folder)
    found = {}
    for name in names:
        found[name] = getattr(scenarios, name)()
        part = folder / f"{scenarios.rank}.part"
        part.write_bytes(pickle.dumps(found))
        part.replace(folder / f"{scenarios.rank}.pickle")
    # the first rank to end after a failure ends all others; so let these write, too
    survivors = [folder / f"{rank}.pickle" for rank in os.environ.get("WORKER_SURVIVORS", "").split()]
    until = time.monotonic() + 20
    while not all(path.exists() for path in survivors) and time.monotonic() < until:
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
