"""What layers have besides parameters: through files, checkpoints, snapshots, devices; and whole runs that go on exactly."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from anyarray_linear import (
    Adam,
    CheckpointError,
    Dropout,
    LayerNorm,
    Linear,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    fit,
    load_checkpoint,
    load_model,
    predict,
    restore,
    save_checkpoint,
    save_model,
    snapshot,
)
from anyarray_linear.arrays.place import computing_on
from anyarray_linear.datasets import load_digits
from anyarray_linear.protocol import states


class Centred:
    """A layer of a user's own: takes the mean of the batch away in training, and a running one in inference."""

    def __init__(self, features, momentum=0.1):
        self.momentum = momentum
        self.running_mean = np.zeros(features)
        self.batches = 0

    def forward(self, X):
        with computing_on(X) as xp:
            mean = xp.mean(X, axis=0)
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.batches += 1
        return X - mean, None

    def gradients(self, dZ, cache, *, needs_dX=True):
        with computing_on(dZ) as xp:
            return (dZ - xp.mean(dZ, axis=0) if needs_dX else None), {}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        return self.gradients(dZ, cache, needs_dX=needs_dX)[0]

    def parameters(self):
        return {}

    def to(self, device=None, dtype=None):
        from anyarray_linear import Device, select_device

        place = Device.of(self.running_mean) if device is None else select_device(device)
        other = Centred(self.running_mean.shape[0], self.momentum)
        other.running_mean, other.batches = place.asarray(self.running_mean, dtype=dtype), self.batches
        return other

    def __call__(self, X):
        return X - self.running_mean


class Kept(Centred):
    def state(self):
        return {"running_mean": self.running_mean, "batches": self.batches}

    def config(self):
        return {"features": self.running_mean.shape[0], "momentum": self.momentum}

    def to(self, device=None, dtype=None):
        other = super().to(device, dtype)
        other.__class__ = Kept
        return other


def model_on(device="cpu", dtype="float32", seed=0):
    options = {"device": device, "dtype": dtype}
    return Sequential(
        Linear(64, 32, seed=seed, **options), LayerNorm(32, **options), ReLU(), Dropout(0.2, seed=seed + 1),
        Kept(32).to(device, dtype), Linear(32, 10, seed=seed + 2, **options),
    )  # fmt: skip


def digits():
    X, y = load_digits()[:2]
    return X[:500].astype("float32"), y[:500]


def trained(model, epochs=2, **options):
    X, y = digits()
    settings = {"loss": SoftmaxCrossEntropy(), "batch_size": 50, "progress": False, "seed": 3}
    return fit(model, X, y, optimizer=Adam(1e-3), epochs=epochs, **{**settings, **options})


def bits(backend, model):
    return {name: backend.to_numpy(x).tobytes() if hasattr(x, "dtype") else x for name, x in snapshot(model).items()}


def test_a_model_with_state_comes_back_from_its_file(tmp_path, backend):
    model = model_on(backend.device)
    trained(model, 1)
    assert states(model)["3.step"] == 10
    assert states(model)["4.batches"] == 10
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", device=backend.device, classes=[Kept])
    assert bits(backend, loaded) == bits(backend, model)
    filled = model_on(backend.device, seed=7)
    assert load_model(tmp_path / "m", into=filled) is filled
    assert bits(backend, filled) == bits(backend, model)
    X = digits()[0]
    assert np.array_equal(predict(loaded, X), predict(model, X))


def test_states_that_are_arrays_are_tensors_under_their_names_and_numbers_are_not(tmp_path):
    model = model_on()
    trained(model, 1)
    save_model(model, tmp_path / "m")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "m")
    names = "0.weight", "0.bias", "1.weight", "1.bias", "4.running_mean", "5.weight", "5.bias"
    assert set(tensors) == {*names}
    assert np.array_equal(tensors["4.running_mean"], model[4].running_mean)


def test_pytorch_takes_the_file_of_dropout_and_layernorm_strictly(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    model = Sequential(Linear(4, 3, seed=0), LayerNorm(3), Dropout(0.5, seed=0), Linear(3, 2, seed=1))
    model[1].W = np.asarray([1.0, 2.0, 3.0])
    save_model(model, tmp_path / "m")
    twin = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
    twin.double().load_state_dict(load_file(tmp_path / "m"), strict=True)
    X = np.random.default_rng(0).standard_normal((5, 4))
    assert np.abs(twin.eval()(torch.tensor(X)).detach().numpy() - model(X)).max() < 1e-10
    torch_file = tmp_path / "t"
    from safetensors.torch import save_file

    save_file(twin.state_dict(), torch_file)
    fresh = Sequential(Linear(4, 3), LayerNorm(3), Dropout(0.5, seed=5), Linear(3, 2))
    load_model(torch_file, into=fresh)
    assert np.array_equal(fresh(X), model(X))
    assert fresh[2].state() == {"seed": 5, "step": 0}


def test_a_class_with_a_config_is_built_when_it_is_given_and_else_named(tmp_path):
    model = Sequential(Kept(4))
    save_model(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"layer 0 is Kept.*give its class: load_model\(path, classes=\[Kept\]\)"):
        load_model(tmp_path / "m")
    loaded = load_model(tmp_path / "m", classes=[Kept])
    assert (type(loaded[0]), loaded[0].momentum) == (Kept, 0.1)


@pytest.mark.parametrize("stop_after", [3, 10, 14])
def test_a_resumed_run_is_that_of_one_that_never_stopped_bit_for_bit(tmp_path, backend, stop_after):
    if backend.name in ("strict-device1", "strictest", "numpy-readonly"):
        pytest.skip("as on strict and numpy")
    whole = model_on(backend.device)
    trained(whole, 3)

    class Stop:
        count = 0

        def is_set(self):
            self.count += 1
            return self.count >= stop_after

    first = model_on(backend.device)
    assert trained(first, 3, checkpoint=tmp_path, stop=Stop()).interrupted
    assert bits(backend, first) != bits(backend, whole)
    second = model_on(backend.device)
    second[3].seed = 99  # the file says which it was
    trained(second, 3, checkpoint=tmp_path, resume=True)
    assert bits(backend, second) == bits(backend, whole)


class Watched(Dropout):
    """A dropout that writes down its masks."""

    def forward(self, X):
        Z, cache = super().forward(X)
        self.__dict__.setdefault("masks", []).append(cache["K"])
        return Z, cache


def two_moons(count=200):
    """Two half circles, each reaching into the other, with some noise."""
    angle, y = np.linspace(0, np.pi, count // 2), np.arange(count) % 2
    X = np.empty((count, 2))
    X[::2], X[1::2] = np.stack([np.cos(angle), np.sin(angle)], 1), np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)
    return X + 0.1 * np.random.default_rng(0).standard_normal(X.shape), y


@pytest.mark.parametrize(("data", "epochs"), [(digits, 2), (two_moons, 20)], ids=["digits", "two moons"])
def test_the_same_masks_and_losses_on_all_backends(backend, data, epochs):
    """In float64, where losses agree to 1e-10 after a short training: rounding errors are far below that."""
    X, y = data()
    runs = []
    for device in ("cpu", backend.device):
        options = {"dtype": "float64", "device": device}
        width, classes = X.shape[1], int(y.max()) + 1
        first, last = Linear(width, 32, seed=0, **options), Linear(32, classes, seed=2, **options)
        own = Kept(32).to(device, "float64")
        model = Sequential(first, LayerNorm(32, **options), ReLU(), Watched(0.2, seed=1), own, last)
        settings = {"loss": SoftmaxCrossEntropy(), "batch_size": 40, "progress": False, "seed": 3}
        losses = [row["loss"] for row in fit(model, X, y, optimizer=Adam(1e-2), epochs=epochs, **settings).rows]
        assert losses[-1] < 0.7 * losses[0]
        runs.append((losses, model))
    (expected, reference), (found, here) = runs
    assert np.allclose(found, expected, rtol=1e-10, atol=0)
    steps = len(reference[3].masks)
    for model in (here, reference):
        numbers = {name: value for name, value in states(model).items() if isinstance(value, int)}
        assert numbers == {"3.seed": 1, "3.step": steps, "4.batches": steps}
    for mine, theirs in zip(here[3].masks, reference[3].masks, strict=True):
        assert backend.owns(mine)
        assert np.array_equal(backend.to_numpy(mine), theirs)


def test_a_snapshot_does_not_change_and_restores(backend):
    model = model_on(backend.device)
    kept = snapshot(model)
    before = bits(backend, model)
    trained(model, 1)
    assert bits(backend, model) != before
    restore(model, kept)
    assert bits(backend, model) == before
    trained(model, 1)
    restore(model, kept)
    assert bits(backend, model) == before


def test_a_snapshot_of_another_model_changes_nothing():
    model = Sequential(Linear(3, 2, seed=0), Dropout(0.5, seed=0))
    kept, before = snapshot(model), snapshot(model)
    for wrong, error, match in (
        ({}, ValueError, "^weights has nothing, but the model has 0.W, 0.b, 1.seed, 1.step"),
        ({**kept, "0.W": np.ones((3, 2))}, ValueError, r"weights\['0.W'\] has shape"),
        ({**kept, "0.b": kept["0.b"].astype("float32")}, TypeError, r"weights\['0.b'\] is float32"),
        ([1], TypeError, "^weights is a list"),
    ):
        with pytest.raises(error, match=match):
            restore(model, wrong)
    for name, x in snapshot(model).items():
        assert np.array_equal(x, before[name])


def test_what_is_in_no_file_is_warned_of(tmp_path):
    forgetful = Sequential(Linear(2, 2, seed=0), Centred(2))
    forgetful[1].rng = np.random.default_rng(0)
    with pytest.warns(RuntimeWarning, match=r"running_mean, rng of layer 1, a Centred, will be in no file.*def state"):
        save_model(forgetful, tmp_path / "m")
    with pytest.warns(RuntimeWarning, match=r"running_mean.*resumed"):
        save_checkpoint(tmp_path / "c", forgetful, Adam(), state={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(Sequential(Linear(2, 2, seed=0), Kept(2), LayerNorm(2), Dropout(0.5)), tmp_path / "k")


def test_a_state_that_is_no_int_in_the_file_is_refused(tmp_path):
    from anyarray_linear.files.atomic import atomic_write
    from anyarray_linear.files.sealed import read, seal

    model = Sequential(Linear(2, 2, seed=0), Dropout(0.5, seed=0))
    save_model(model, tmp_path / "m")
    file = read(tmp_path / "m")
    for value in ("1", 1.0, True, None, [1]):
        info = {**file.info, "state": {"1.seed": 0, "1.step": value}}
        atomic_write(tmp_path / "x", seal(tmp_path / "x", file.weights, info))
        with pytest.raises(CheckpointError, match=r"state 1.step is .* where an int should be"):
            load_model(tmp_path / "x")
    atomic_write(tmp_path / "x", seal(tmp_path / "x", file.weights, {**file.info, "state": [1]}))
    with pytest.raises(CheckpointError, match="its state is no JSON object"):
        load_model(tmp_path / "x")


def test_a_checkpoint_fills_the_state(tmp_path):
    model, optimizer = model_on(), Adam()
    model[3].step, model[4].batches = 17, 5
    save_checkpoint(tmp_path, model, optimizer, state={})
    other = model_on(seed=5)
    load_checkpoint(tmp_path, other, Adam())
    assert states(other)["3.step"] == 17
    assert states(other)["3.seed"] == states(model)["3.seed"]
    assert states(other)["4.batches"] == 5


def test_a_step_that_is_called_off_changes_no_state(backend):
    """A batch with an overflow leaves no NaN in a running mean."""
    X, y = digits()
    X = X.copy()
    X[7] = 3e38  # finite, but its product is not
    model, clean = model_on(backend.device), model_on(backend.device)
    options = {"loss": SoftmaxCrossEntropy(), "optimizer": Adam(1e-3), "batch_size": 500, "progress": False}
    history = fit(model, X, y, epochs=1, skip_nonfinite=1, **options)
    assert history.skipped == 1
    assert np.array_equal(backend.to_numpy(model[4].running_mean), backend.to_numpy(clean[4].running_mean))
