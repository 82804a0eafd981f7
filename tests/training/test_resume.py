"""A training that stops after any step and goes on ends in the same bits as one that never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tampered import resealed
from test_equivalence import Training

from anyarray_linear import (
    SGD,
    Adam,
    AdamW,
    CheckpointError,
    Linear,
    MeanSquaredError,
    NonFiniteError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    fit,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from anyarray_linear.files.checkpoints import checkpoints
from anyarray_linear.schedules import cosine, step_decay

OPTIMIZERS = {
    "sgd": lambda: SGD(step_decay(0.1, 7, 0.5), momentum=0.9, nesterov=True, clip_norm=1.0),
    "adam": lambda: Adam(cosine(1e-2, 40, warmup=5)),
    "adamw": lambda: AdamW(cosine(1e-2, 40), clip_norm=0.5),
}
STEPS_PER_EPOCH, EPOCHS = 7, 4  # 50 rows, 40 of them for training, in batches of 6


class StopAfter:
    """A stop flag that is set once so many steps are done."""

    def __init__(self, steps):
        self.steps = steps

    def is_set(self):
        self.steps -= 1
        return self.steps <= 0


def data():
    rng = np.random.default_rng(3)
    return rng.standard_normal((50, 6)).astype(np.float32), rng.integers(0, 3, 50)


def network(backend=None, sizes=(6, 8, 3)):
    place = {"device": None if backend is None else backend.device, "dtype": "float32"}
    return Sequential(Linear(*sizes[:2], seed=1, **place), ReLU(), Linear(*sizes[1:], seed=2, **place))


def train(model, optimizer, **options):
    X, y = data()
    options = {"X": X, "y": y, "loss": SoftmaxCrossEntropy(), "epochs": EPOCHS, "batch_size": 6, "validation": 0.2, "seed": 11,
               "progress": False, **options}  # fmt: skip
    return fit(model, optimizer=optimizer, **options)


def weights(model, backend=None):
    return {k: np.array(p if backend is None else backend.to_numpy(p)) for k, p in model.parameters().items()}


def rows(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows]


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_stopping_after_any_step_and_going_on_changes_no_bit(backend, rule, tmp_path):
    whole = network(backend)
    history = train(whole, OPTIMIZERS[rule]())
    # 20 of the 28 steps on NumPy; on the others the first, the last and those around an epoch's end
    stops = sorted(random.Random(rule).sample(range(1, EPOCHS * STEPS_PER_EPOCH), 20))
    for stop in stops if backend.name == "numpy" else [1, 7, 8, 27]:
        folder = tmp_path / str(stop)
        first = train(network(backend), OPTIMIZERS[rule](), checkpoint=folder, stop=StopAfter(stop))
        assert first.interrupted
        resumed = network(backend)
        second = train(resumed, OPTIMIZERS[rule](), checkpoint=folder, resume=True)
        assert_same(weights(resumed, backend), weights(whole, backend))
        assert rows(second) == rows(history)
        assert not second.interrupted


class CutInHalf(AdamW):
    """A rule that Ctrl-C, pressed twice, interrupts in one of its steps, between two parameters."""

    _cut = 0

    def update(self, xp, W, *more):
        new = super().update(xp, W, *more)
        if self.steps + 1 == self._cut:
            W[...] = new[0]  # as a lane does that updates in place
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return new


def test_a_step_that_a_second_ctrl_c_cuts_in_half_is_not_saved(tmp_path):
    whole, optimizer = network(), CutInHalf(1e-2)
    train(whole, CutInHalf(1e-2))
    optimizer._cut = 4
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert train(network(), optimizer, checkpoint=tmp_path, checkpoint_every=2).interrupted
    finally:
        signal.signal(signal.SIGINT, before)
    assert optimizer.steps == 3  # the fourth is not counted
    resumed, again = network(), CutInHalf(1e-2)
    assert load_checkpoint(tmp_path, resumed, again)["step"] == again.steps == 2
    train(resumed, CutInHalf(1e-2), checkpoint=tmp_path, resume=True)
    assert_same(weights(resumed), weights(whole))


def test_a_run_may_stop_many_times(tmp_path):
    whole, optimizer = network(), Adam(1e-2)
    history = train(whole, optimizer)
    for _ in range(100):
        model = network()
        latest = train(model, Adam(1e-2), checkpoint=tmp_path, resume=True, stop=StopAfter(3))
        if not latest.interrupted:
            break
    assert_same(weights(model), weights(whole))
    assert rows(latest) == rows(history)


def test_a_finished_run_resumes_to_itself_and_goes_on_to_more_epochs(tmp_path):
    whole = network()
    history = train(whole, Adam(1e-2), epochs=EPOCHS + 2)
    train(network(), Adam(1e-2), checkpoint=tmp_path)
    again = network()
    assert len(train(again, Adam(1e-2), checkpoint=tmp_path, resume=True).rows) == EPOCHS
    longer = network()
    assert rows(train(longer, Adam(1e-2), checkpoint=tmp_path, resume=True, epochs=EPOCHS + 2)) == rows(history)
    assert_same(weights(longer), weights(whole))


@pytest.fixture(scope="module")
def book():
    """50 steps by the book, and how far float32 may be from them, in any order of the sums."""
    return Training()


@pytest.mark.parametrize("stop", [1, 25, 49])
def test_a_checkpoint_goes_on_where_another_backend_left_it(backend, book, stop, tmp_path):
    def go_on(device, folder, **options):
        model = book.model(device)
        fit(model, book.X, book.Y, loss=MeanSquaredError(), optimizer=SGD(book.lr, momentum=book.momentum), epochs=book.steps,
            batch_size=32, checkpoint=tmp_path / folder, progress=False, **options)  # fmt: skip
        return model

    go_on(backend.device, "there", stop=StopAfter(stop))
    here = go_on("cpu", "there", resume=True)
    go_on("cpu", "here", stop=StopAfter(stop))
    there = go_on(backend.device, "here", resume=True)
    assert all(backend.owns(p) for p in there.parameters().values())
    for model, where in ((here, None), (there, backend)):
        for name, W in weights(model, where).items():
            assert (np.abs(W - book.exact[name]) <= book.bound[name]).all(), name


def test_checkpoints_are_kept_by_number_and_the_best_apart(tmp_path):
    losses = []
    train(network(), Adam(1e-1), epochs=12, checkpoint=tmp_path, callbacks=[lambda m, row: losses.append(row["validation_loss"])])
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{7 * epoch:09}.safetensors" for epoch in (12, 11, 10)]
    best = load_model(tmp_path / "best.safetensors")
    at_best = network()
    train(at_best, Adam(1e-1), epochs=int(np.argmin(losses)) + 1)
    assert_same(weights(best), weights(at_best))


def test_of_epochs_that_are_equally_good_the_first_is_the_best(tmp_path):
    """A validation on samples of zeros, without a bias: its loss is that of zeros, whatever the weights are."""
    def trained(epochs, **options):
        model = Linear(3, 2, bias=False, seed=0)
        rng = np.random.default_rng(0)
        X, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        held = np.zeros((4, 3)), np.ones((4, 2))
        history = fit(
            model, X, y, loss=MeanSquaredError(), optimizer=Adam(1e-2), epochs=epochs, validation=held, progress=False, **options
        )
        return model, history

    _, history = trained(4, checkpoint=tmp_path)
    assert len({row["validation_loss"] for row in history.rows}) == 1
    first, _ = trained(1)
    assert_same(weights(load_model(tmp_path / "best.safetensors")), weights(first))


def interrupt(model, row):
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", ["stop", "interrupt"])
def test_the_best_is_known_across_an_interrupt_and_a_resume(end, tmp_path):
    losses = [row["validation_loss"] for row in train(network(), Adam(1e-1), epochs=12).rows]
    best = int(np.argmin(losses)) + 1
    assert 1 < best < 12
    assert losses[best] > losses[best - 1]  # so that one who starts to compare after the best would take a later one
    options = {"epochs": 12, "checkpoint": tmp_path}

    def at_best(model, row):
        if row["epoch"] == best:
            return True if end == "stop" else interrupt(model, row)

    first = train(network(), Adam(1e-1), callbacks=[at_best], **options)
    assert (len(first.rows), first.interrupted) == (best, end == "interrupt")
    found = weights(load_model(tmp_path / "best.safetensors"))
    second = train(network(), Adam(1e-1), resume=True, **options)
    assert len(second.rows) == (best if end == "stop" else 12)  # a callback's word to stop holds
    assert_same(weights(load_model(tmp_path / "best.safetensors")), found)
    at_best = network()
    train(at_best, Adam(1e-1), epochs=best)
    assert_same(found, weights(at_best))


def test_an_epoch_whose_loss_is_not_a_number_is_not_the_best(tmp_path):
    class Often(SoftmaxCrossEntropy):
        """NaN in every step of the second epoch."""

        calls = -1  # fit looks at one row before

        def forward(self, Z, target):
            value, cache = super().forward(Z, target)
            self.calls += 1
            return (value * np.nan if 7 < self.calls <= 14 else value), cache

    X, y = data()
    history = fit(network(), X[:40], y[:40], loss=Often(), optimizer=SGD(1e-9), batch_size=6, epochs=2, skip_nonfinite=7,
                  checkpoint=tmp_path, progress=False)  # fmt: skip
    assert np.isnan(history.rows[1]["loss"])
    state = load_checkpoint(tmp_path, network(), SGD(1e-9))
    assert state["best"] == history.rows[0]["loss"]


@pytest.mark.parametrize("when", ["callback", "flag"])
def test_ctrl_c_in_the_last_epochs_callbacks_is_told(when):
    flag = threading.Event()
    press = flag.set if when == "flag" else lambda: signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        history = train(network(), Adam(), epochs=2, stop=flag, callbacks=[lambda m, row: row["epoch"] == 2 and press()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (len(history.rows), history.interrupted) == (2, True)


def test_checkpoint_every_writes_after_so_many_steps(tmp_path):
    train(network(), Adam(), epochs=1, checkpoint=tmp_path, checkpoint_every=3, stop=StopAfter(7))
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:09}.safetensors" for step in (7, 6, 3)]


def test_a_folder_with_checkpoints_is_not_trained_over(tmp_path):
    train(network(), Adam(), epochs=1, checkpoint=tmp_path)
    model = network()
    before = weights(model)
    with pytest.raises(ValueError, match="resume=True"):
        train(model, Adam(), epochs=1, checkpoint=tmp_path)
    assert_same(weights(model), before)


OTHERS = {
    "batch_size": (Adam, {"batch_size": 5}),
    "seed": (Adam, {"seed": 12}),
    "training rows": (Adam, {"validation": 0.3}),
    "validation": (Adam, {"X": data()[0][:40], "y": data()[1][:40], "validation": (data()[0][40:], data()[1][40:])}),
    "accumulate": (Adam, {"microbatches": 2}),
    "loss": (Adam, {"loss": MeanSquaredError(), "y": np.eye(3, dtype=np.float32)[data()[1]]}),
    "rows": (Adam, {"X": data()[0][:45], "y": data()[1][:45]}),
    "data": (Adam, {"X": data()[0] * 3}),
    "data (the targets)": (Adam, {"y": data()[1][::-1]}),
    "optimizer is Adam(lr=0.001, weight": (lambda: Adam(2e-3), {}),
    "optimizer is Adam(lr=0.001": (lambda: Adam(clip_norm=1.0), {}),
    "optimizer": (lambda: Adam(cosine(1e-3, 40)), {}),
    "learning rate in step 7": (lambda: Adam(cosine(1e-3, 41)), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_and_nothing_changed(name, tmp_path):
    optimizer, change = OTHERS[name]
    first = (lambda: Adam(cosine(1e-3, 40))) if name.startswith("learning") else Adam
    start = {"validation": None, "X": data()[0][:40], "y": data()[1][:40]} if name == "validation" else {}
    train(network(), first(), epochs=1, checkpoint=tmp_path, **start)
    model, optimizer = network(), optimizer()
    before = weights(model)
    with pytest.raises(CheckpointError, match=re.escape(f"of another training: its {name.partition(' (')[0]}")):
        train(model, optimizer, checkpoint=tmp_path, resume=True, **change)
    assert_same(weights(model), before)
    assert optimizer.steps == 0


# NumPy takes no nested sequences any more since 2.5
NESTED = [1, [2, np.int64(3)]] if np.lib.NumpyVersion(np.__version__) < "2.5.0" else [1, np.int64(3)]


@pytest.mark.parametrize("seed", [
    lambda: np.random.SeedSequence((1, 2, 3)), lambda: np.random.SeedSequence(np.asarray([1, 2, 3])),
    lambda: np.random.SeedSequence(NESTED, spawn_key=(4,)), lambda: np.random.default_rng(5), lambda: None,
])  # fmt: skip
def test_any_seed_resumes(seed, tmp_path):
    batches = {"whole": [], "parts": []}

    def watched(name):
        class Seen(SoftmaxCrossEntropy):
            def forward(self, Z, target):
                if len(target) > 1:  # fit's look at one row, whichever that is
                    batches[name].append(target.tolist())
                return super().forward(Z, target)

        return Seen()

    first = train(network(), Adam(), checkpoint=tmp_path, seed=seed(), loss=watched("parts"), stop=StopAfter(9))
    assert first.interrupted
    again = network()
    last = train(again, Adam(), checkpoint=tmp_path, seed=seed(), loss=watched("parts"), resume=True)
    stored = load_checkpoint(tmp_path, network(), Adam())["training"]["seed"]
    assert json.dumps(stored)
    if seed() is not None:
        whole = network()
        assert rows(train(whole, Adam(), seed=seed(), loss=watched("whole"))) == rows(last)
        assert_same(weights(again), weights(whole))
        assert batches["parts"] == batches["whole"]


def test_a_seed_that_was_drawn_is_drawn_anew_without_resume(tmp_path):
    seeds = []
    for name in "ab":
        train(network(), Adam(), checkpoint=tmp_path / name, epochs=1, seed=None)
        seeds.append(load_checkpoint(tmp_path / name, network(), Adam())["training"]["seed"])
    assert seeds[0] != seeds[1]


def test_a_callback_that_lowers_the_learning_rate_is_no_other_training(tmp_path):
    def lower(optimizer):
        return [lambda model, row: setattr(optimizer, "lr", optimizer.lr / 2)]

    whole, parts = network(), network()
    rule = Adam(1e-2)
    history = train(whole, rule, callbacks=lower(rule))
    rule = Adam(1e-2)
    train(network(), rule, epochs=2, callbacks=lower(rule), checkpoint=tmp_path)
    train(parts, rule := Adam(1e-2), callbacks=lower(rule), checkpoint=tmp_path, resume=True)
    assert_same(weights(parts), weights(whole))
    assert rule.lr == 1e-2 / 16
    assert [row["lr"] for row in history.rows] == [1e-2, 5e-3, 2.5e-3, 1.25e-3]


def test_bad_steps_count_across_a_resume(backend, tmp_path):
    class Bad(SoftmaxCrossEntropy):
        def __init__(self, steps):
            super().__init__()
            self.steps, self.calls = steps, -1  # fit looks at one row before

        def forward(self, Z, target):
            value, cache = super().forward(Z, target)
            self.calls += 1
            return (value * np.nan if self.calls in self.steps else value), cache

    X, y = data()

    def go_on(**options):
        return fit(network(backend), X, y, optimizer=Adam(), batch_size=6, epochs=2, checkpoint=tmp_path, progress=False, **options)

    assert go_on(loss=Bad({2, 4}), stop=StopAfter(6), skip_nonfinite=2).skipped == 2
    with pytest.raises(CheckpointError, match="2 steps of it were not finite; resume with skip_nonfinite=2 or more"):
        go_on(loss=Bad({}), resume=True, skip_nonfinite=1)
    with pytest.raises(NonFiniteError, match=r"^step 9 ") as raised:
        go_on(loss=Bad({3}), resume=True, skip_nonfinite=2)
    assert raised.value.history.skipped == 3
    assert go_on(loss=Bad({3}), resume=True, skip_nonfinite=3).skipped == 3


STATES = [
    {"step": "7"}, {"step": 8}, {"step": True}, {"epoch": -5}, {"epoch": 10**9}, {"position": 10**9}, {"position": 3}, {"position": -6},
    {"position": 6}, {"history": 5}, {"history": [1]}, {"history": []}, {"history": [{"epoch": 1}]}, {"guard": None}, {"guard": {}},
    {"guard": {"total": "x", "rows": 0, "bad": 0}}, {"guard": {"total": 0.0, "rows": 0, "bad": "q"}},
    {"guard": {"total": 0.0, "rows": 9, "bad": 0}}, {"guard": {"total": 0.0, "rows": 0, "bad": -1}}, {"guard": {"total": 10**400, "rows": 0, "bad": 0}},
    {"stopped": "yes"}, {"seconds": "x"}, {"seconds": -1.0}, {"best": None}, {"best": float("nan")}, {"best": ...}, {"lr": []}, {"lr": ["x", 1]},
    {"lr": [6, "x"]}, {"training": {}}, {"training": []}, {"optimizer": None}, {"optimizer": []},
]  # fmt: skip


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_state_that_no_training_has_is_refused_and_nothing_changed(change, tmp_path):
    train(network(), Adam(cosine(1e-2, 40)), epochs=1, checkpoint=tmp_path)
    state = load_checkpoint(tmp_path, network(), Adam(cosine(1e-2, 40)))
    for path in checkpoints(tmp_path):
        path.unlink()
    optimizer = Adam(cosine(1e-2, 40))
    optimizer.steps = 7
    state = {name: value for name, value in {**state, **change}.items() if value is not ...}
    save_checkpoint(tmp_path, network(), optimizer, state={**state, "step": 7} if change == {"step": "7"} else state)
    if change == {"step": "7"}:  # which save_checkpoint does not write
        path = checkpoints(tmp_path)[0]
        path.write_bytes(resealed(path.read_bytes(), lambda info: info["metadata"].update(step="7")))
    model, optimizer = network(), Adam(cosine(1e-2, 40))
    before = weights(model)
    with pytest.raises(CheckpointError, match="step-"):
        train(model, optimizer, checkpoint=tmp_path, resume=True)
    assert_same(weights(model), before)
    assert optimizer.steps == 0




def test_another_model_or_optimizer_is_refused(tmp_path):
    train(network(), Adam(), epochs=1, checkpoint=tmp_path)
    for model, optimizer in ((network(sizes=(6, 9, 3)), Adam()), (network(), SGD(0.1))):
        before = weights(model)
        with pytest.raises(CheckpointError):
            train(model, optimizer, checkpoint=tmp_path, resume=True)
        assert_same(weights(model), before)


def test_a_damaged_last_checkpoint_is_passed_over_and_said(tmp_path):
    whole = network()
    train(whole, Adam())
    train(network(), Adam(), checkpoint=tmp_path, checkpoint_every=1, stop=StopAfter(10))
    newest, before = checkpoints(tmp_path)[:2]
    newest.write_bytes(newest.read_bytes()[:-9])
    model = network()
    with pytest.warns(RuntimeWarning, match=newest.name):
        train(model, Adam(), checkpoint=tmp_path, resume=True)
    assert before.name == "step-000000009.safetensors"
    assert_same(weights(model), weights(whole))


class Spoiled(SoftmaxCrossEntropy):
    """A loss that is NaN from its tenth call on."""

    calls = 0

    def forward(self, Z, target):
        value, cache = super().forward(Z, target)
        Spoiled.calls += 1
        return (value * np.nan if Spoiled.calls >= 10 else value), cache


def test_a_step_that_is_not_finite_leaves_the_last_checkpoint_intact(tmp_path):
    X, y = data()
    Spoiled.calls = 0
    model = network()
    with pytest.raises(NonFiniteError):
        fit(model, X, y, loss=Spoiled(), optimizer=Adam(), batch_size=6, checkpoint=tmp_path, checkpoint_every=1, progress=False)
    assert all(np.isfinite(p).all() for p in weights(model).values())
    state = load_checkpoint(tmp_path, network(), Adam())
    assert state["step"] == 8  # one call of the loss was fit's look at a row before training; the ninth step was bad
    assert_same(weights(load_model(checkpoints(tmp_path)[0])), weights(model))


def test_a_second_training_in_the_folder_is_refused(tmp_path):
    refusals = []

    def other(model, row):
        def attempt():
            try:
                train(network(), Adam(), checkpoint=tmp_path, resume=True)
            except BlockingIOError as error:
                refusals.append(str(error))

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        return True

    train(network(), Adam(), checkpoint=tmp_path, callbacks=[other])
    assert len(refusals) == 1
    assert str(os.getpid()) in refusals[0]
    train(network(), Adam(), checkpoint=tmp_path, resume=True)  # the lock is gone


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a victim is forked, and killed by a signal")

NURSERY = """
import os, sys
sys.path[:0] = {tests!r}
import safetensors.numpy
import test_resume as t
for _ in sys.stdin:  # a new victim for each line, whose imports are done
    pid = os.fork()
    if not pid:
        t.train(t.network(), t.OPTIMIZERS["adamw"](), checkpoint={folder!r}, checkpoint_every=1, resume=True, epochs={epochs})
        os._exit(0)
    print(pid, flush=True)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def newest_step(folder):
    return max((int(path.stem.partition("-")[2]) for path in checkpoints(folder)), default=0)


def killed_at_random(tmp_path, kills, epochs):
    """Kill -9 a training that writes a checkpoint each step, so many times; then let it end. Returns how far each got.

    One in eight dies within its start. The others are let come a few checkpoints further, and die at a random moment of
    the time that they have been seen to take for a step, so that on a slow machine, too, they die in the midst of work.
    """
    moments = random.Random(0)
    reached = []
    whole = network()
    history = train(whole, OPTIMIZERS["adamw"](), epochs=epochs)
    code = NURSERY.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=str(tmp_path), epochs=epochs)
    nursery = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for kill in range(kills):
            print(file=nursery.stdin, flush=True)
            victim = int(nursery.stdout.readline())
            if kill % 8 == 7:
                time.sleep(moments.uniform(0, 0.02))
            else:
                start = newest_step(tmp_path)
                wait_for(lambda start=start: newest_step(tmp_path) > start, victim)
                first, began = newest_step(tmp_path), time.monotonic()
                steps = moments.randrange(1, 6)
                wait_for(lambda goal=first + steps: newest_step(tmp_path) >= goal, victim)
                time.sleep(moments.uniform(0, 1.5) * (time.monotonic() - began) / steps)
            os.kill(victim, signal.SIGKILL)
            assert int(nursery.stdout.readline()) == signal.SIGKILL  # and not an end of its own
            if checkpoints(tmp_path):
                state = load_checkpoint(tmp_path, network(), OPTIMIZERS["adamw"]())  # a damaged file would warn, so fail
                reached.append(state["step"])
                for path in tmp_path.glob("*.safetensors"):  # the older ones and the best, too
                    load_model(path)
        nursery.stdin.close()
    model = network()
    last = train(model, OPTIMIZERS["adamw"](), checkpoint=tmp_path, checkpoint_every=1, resume=True, epochs=epochs)
    assert_same(weights(model), weights(whole))
    assert rows(last) == rows(history)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    return reached


def wait_for(condition, victim):
    until = time.monotonic() + 120
    while not condition():
        os.kill(victim, 0)  # raises if it is gone
        assert time.monotonic() < until, "it makes no progress"
        time.sleep(0.0005)


@needs_fork
def test_killed_at_random_moments_it_goes_on_to_the_same_bits(tmp_path):
    reached = killed_at_random(tmp_path, kills=4, epochs=10)
    assert reached == sorted(reached)
    assert reached[0] > 1


@pytest.mark.slow
@needs_fork
def test_killed_at_two_hundred_random_moments_it_goes_on_to_the_same_bits(tmp_path):
    reached = killed_at_random(tmp_path, kills=200, epochs=400)
    assert len(set(reached)) > 150  # kills while it trained, not only while it started
    assert reached == sorted(reached)


def test_the_state_in_a_checkpoint_is_plain_json(tmp_path):
    train(network(), Adam(), epochs=1, checkpoint=tmp_path)
    state = load_checkpoint(tmp_path, network(), Adam())
    assert json.loads(json.dumps(state)) == state
    assert state["epoch"] == 1
