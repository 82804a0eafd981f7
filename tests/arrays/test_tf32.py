"""TF32 by argument: asked of a device, heeded by every product of the lanes, in every thread and graph, and told everywhere.

The stand-in has no TF32: it takes the compute type and forms the product in float32. So here it is tested that the right type
is asked for, and, with factors that the test itself rounds to 11 bits, that the bounds are those of such products. What a
card makes of it, only a card shows.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from spoiled import Spoiled
from typer.testing import CliRunner

from anyarray_linear import (
    Adam,
    Device,
    DeviceUnavailableError,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    Tanh,
    TrainingStep,
    lanes,
    linear_backward,
    linear_forward,
    select_device,
)
from anyarray_linear.arrays import cards, tf32
from anyarray_linear.cli import devices, train, verify
from anyarray_linear.step import loss_and_gradients
from anyarray_linear.testing import adjoint_check, assert_equivalent, check_step, compare, linear_error_bounds

on_cuda = pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
FULL, FAST_TF32, DOUBLE = 68, 77, 70  # CUBLAS_COMPUTE_32F, _32F_FAST_TF32 and _64F


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.fixture(autouse=True)
def as_before():
    with tf32.restored():
        yield


@pytest.fixture
def asked(backend, monkeypatch):
    """The compute types that products ask for, of this thread's handle and under capture."""
    products = pytest.importorskip("anyarray_linear.lanes.cupy.products")
    types: list[int] = []

    def noting(gemm):
        return lambda *arguments: types.append(arguments[-2]) or gemm(*arguments)

    handle = products._handle(backend.native.id)
    gemm = noting(products.cublas.gemmEx)
    monkeypatch.setattr(handle, "gemm", gemm)
    monkeypatch.setattr(products.cublas, "gemmEx", gemm)  # what a handle goes back to after a capture
    monkeypatch.setattr(products, "_gemm_by_address", noting(products._gemm_by_address))
    return types


@on_cuda
def test_it_is_off_until_it_is_asked_for_and_off_again(backend, asked):
    dZ, X, W = (backend.asarray(random(*shape)) for shape in ((50, 4), (50, 3), (4, 3)))
    device = Device.of(X)
    for on, factors in ((None, FULL), (True, FAST_TF32), (None, FAST_TF32), (False, FULL)):
        assert select_device(str(device), tf32=on) == device
        asked.clear()
        linear_forward(X, W)
        db = linear_backward(dZ, X, W).db
        assert asked == [factors, FULL, factors, factors]  # the bias gradient is a sum, and keeps all bits
        assert device.tf32 is (factors == FAST_TF32)
        assert cards.float32_products(device.index) == ("TF32" if device.tf32 else "float32")
        host = backend.to_numpy(dZ).astype(np.float64)
        assert np.all(np.abs(backend.to_numpy(db) - host.sum(axis=0)) <= 60 * 2**-24 * np.abs(host).sum(axis=0))
        asked.clear()
        linear_backward(*(backend.asarray(random(*shape), "float64") for shape in ((5, 4), (5, 3), (4, 3))))
        linear_backward(*(backend.asarray(random(*shape), "float16") for shape in ((5, 4), (5, 3), (4, 3))))
        assert asked == [DOUBLE] * 3 + [FULL] * 3


@on_cuda
def test_it_is_of_one_device_and_of_all_threads(backend):
    device = select_device(Device.of(backend.asarray(np.ones(2))), tf32=True)
    other = f"cuda:{1 - device.index}"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: select_device(str(device)).tf32).result()
    try:
        assert not select_device(other).tf32
    except DeviceUnavailableError:
        pytest.skip("there is one card")


@on_cuda
def test_nothing_that_is_kept_carries_it(backend):
    device = select_device(Device.of(backend.asarray(np.ones(2))), tf32=True)
    layer = Linear(3, 2, device=device, dtype="float32", seed=0)
    kept = pickle.dumps((device, layer))
    select_device(device, tf32=False)
    loaded, loaded_layer = pickle.loads(kept)
    assert not any(found.tf32 for found in (loaded, loaded_layer.device, copy.deepcopy(device)))
    select_device(device, tf32=True)
    assert layer.to("cpu").to(device).device.tf32
    assert not layer.to("cpu").device.tf32


@on_cuda
def test_a_captured_step_is_not_replayed_under_the_other_setting(backend, asked):
    device = Device.of(backend.asarray(np.ones(2)))
    model = Sequential(Linear(8, 16, seed=0), ReLU(), Linear(16, 4, seed=1)).to(device, "float32")
    step = TrainingStep(model, MeanSquaredError(), Adam())
    X, y = backend.asarray(random(32, 8)), backend.asarray(random(32, 4))

    def ran(*how):
        for expected in how:
            asked.clear()
            step(X, y)
            assert step.how.endswith("; products in TF32") is expected.endswith("TF32"), step.how
            assert step.how.startswith(expected.split()[0]), step.how
            yield [kind for kind in asked if kind == FAST_TF32], len(asked)

    assert list(ran("portable", "captured", "captured"))[2] == ([], 0)  # a replay asks for nothing
    select_device(device, tf32=True)
    (fast, count), replayed = ran("captured TF32", "captured TF32")
    # eagerly, in the rehearsal and in the capture; five products each, and two sums
    assert (len(fast), count) == (3 * 5, 3 * 7)
    assert replayed == ([], 0)
    select_device(device, tf32=False)
    (fast, count), replayed = ran("captured", "captured")
    assert (fast, count) == ([], 3 * 7)
    assert replayed == ([], 0)


@on_cuda
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_captured_step_in_another_dtype_is_none_of_its_business(backend, dtype):
    device = Device.of(backend.asarray(np.ones(2)))
    model = Linear(8, 4, seed=0).to(device, dtype)
    step = TrainingStep(model, MeanSquaredError(), Adam())
    X, y = backend.asarray(random(32, 8), dtype), backend.asarray(random(32, 4), dtype)
    for on in (False, False, True, True):
        select_device(device, tf32=on)
        step(X, y)
    assert step.how == "captured"
    assert step.kept["graphs"] == 1


@on_cuda
def test_without_lanes_cupy_does_as_it_does_and_that_is_said(backend):
    device = Device.of(backend.asarray(np.ones(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lanes.off():  # nothing was asked for
            pass
        select_device(device, tf32=False)
        with lanes.off():  # and this CuPy does
            assert not device.tf32
    select_device(device, tf32=True)
    with contextlib.ExitStack() as without:
        with pytest.warns(RuntimeWarning, match=rf"float32 products on {device} are CuPy's own, .* in float32, though TF32"):
            without.enter_context(lanes.off())
        assert not device.tf32  # which is what the bounds go by
        layer = Linear(9, 4, device=device, dtype="float32", seed=0)
        assert_equivalent(layer, backend.asarray(random(5, 9)), backend.asarray(random(5, 4)), [device], sharp=True)
        with pytest.warns(RuntimeWarning, match="set it to 1"):
            select_device(device, tf32=True)
    assert device.tf32


def test_where_there_is_none_it_is_refused():
    with pytest.raises(DeviceUnavailableError, match="TF32 is of CUDA devices, and cpu is none"):
        select_device("cpu", tf32=True)
    assert select_device("cpu", tf32=False).tf32 is False
    with pytest.raises(TypeError, match="tf32 is 'yes'"):
        select_device("cpu", tf32="yes")


@on_cuda
def test_a_card_that_is_too_old_for_it_refuses(backend, monkeypatch):
    monkeypatch.setattr(tf32, "CAPABLE", 99)
    device = Device.of(backend.asarray(np.ones(2)))
    with pytest.raises(DeviceUnavailableError, match=r"has no TF32: cards have it from compute capability 99\.0 on"):
        select_device(device, tf32=True)
    assert not device.tf32


def test_torch_has_its_own_switch_which_the_bounds_know_of():
    torch = pytest.importorskip("torch")
    cuda, cpu = (Device("torch", native=torch.device(name), namespace="array_api_compat.torch") for name in ("cuda:0", "cpu"))
    with pytest.raises(ValueError, match=r"torch\.backends\.cuda\.matmul\.allow_tf32 = True"):
        select_device(cuda, tf32=True)
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    try:
        for switch.allow_tf32 in (True, False):
            assert cuda.tf32 is switch.allow_tf32
            assert cpu.tf32 is False
    finally:
        switch.allow_tf32 = before


def test_jax_rounds_on_a_gpu_unless_it_is_told_not_to(monkeypatch):
    jax = pytest.importorskip("jax")
    cpu = Device.of(jax.numpy.zeros(1))
    gpu = Device("jax", native=SimpleNamespace(platform="gpu"), namespace="jax.numpy")
    assert not cpu.tf32
    for precision, rounds in ((None, True), ("highest", False), ("float32", False), ("tensorfloat32", True)):
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            assert (gpu.tf32, cpu.tf32) == (rounds, False)
    with pytest.raises(ValueError, match=r'are JAX\'s, which has its own switch: .*"highest"'):
        select_device(cpu, tf32=False)


def rounded_to_11_bits(x):
    return (np.round(np.ldexp(np.frexp(x)[0], 11)) * np.exp2(np.frexp(x)[1] - 11)).astype(np.float32)


@pytest.fixture
def rounding(backend, monkeypatch):
    """The lane's products round their factors to 11 bits if told so, as TF32 does."""
    products = pytest.importorskip("anyarray_linear.lanes.cupy.products")
    gemm, does = products.gemm, [True]

    def rounds(A, B, *, exact=False, **options):
        if does[0] and A.dtype == np.float32 and not exact:
            A, B = (backend.asarray(rounded_to_11_bits(backend.to_numpy(M))) for M in (A, B))
        return gemm(A, B, exact=exact, **options)

    monkeypatch.setattr(products, "gemm", rounds)
    return does


@on_cuda
def test_the_bounds_are_those_of_factors_of_11_bits_where_it_is_on_and_only_there(backend, rounding, monkeypatch):
    device = Device.of(backend.asarray(np.ones(2)))
    layer = Linear(300, 40, init="pytorch", device=device, dtype="float32", seed=0)
    X, dZ = backend.asarray(random(64, 300)), backend.asarray(random(64, 40))
    # the step on a layer is captured, where the test cannot round
    lane = pytest.importorskip("anyarray_linear.lanes.cupy.captured")
    monkeypatch.setattr(lane, "ON", False)

    select_device(device, tf32=True)
    found = {agreement.output: agreement.sharp_share for agreement in assert_equivalent(layer, X, dZ, [device], sharp=True)}
    assert min(found[name] for name in ("Z", "dX", "dW")) > 0.02
    assert adjoint_check(layer, X, sharp=True)
    assert not check_step(device).complaint

    select_device(device, tf32=False)  # now they are found out
    wrong = {agreement.output for agreement in compare(layer, X, dZ, device, sharp=True) if agreement.complaint}
    assert wrong == {"Z", "dX", "dW"}
    assert check_step(device).complaint
    rounding[0] = False
    assert not any(agreement.complaint for agreement in compare(layer, X, dZ, device, sharp=True))


@on_cuda
def test_what_a_graph_is_held_to_allows_factors_of_11_bits_where_it_is_on_and_only_there(backend, rounding):
    errors_of = pytest.importorskip("anyarray_linear.lanes.cupy.rounding").gradient_errors
    device = Device.of(backend.asarray(np.ones(2)))
    exact_model = Sequential(Linear(64, 48, seed=0), Tanh(), Linear(48, 8, seed=1)).to("cpu", "float32").to("cpu", "float64")
    model = exact_model.to(device, "float32")
    X, y = random(64, 64), random(64, 8)
    _, exact = loss_and_gradients(exact_model, MeanSquaredError(), X.astype(np.float64), y.astype(np.float64), None)
    _, found = loss_and_gradients(model, MeanSquaredError(), backend.asarray(X), backend.asarray(y), None)
    for on in (True, False):
        select_device(device, tf32=on)
        errors = errors_of(model, MeanSquaredError(), X, y, device.index)
        within = {name: np.all(np.abs(backend.to_numpy(dW) - exact[name]) <= errors[name]) for name, dW in found.items()}
        assert all(within.values()) is on, within


@on_cuda
@pytest.mark.parametrize("output", ["Z", "db"])
def test_an_error_that_tf32_hides_is_hidden_where_tf32_is_and_nowhere_else(backend, output):
    device = Device.of(backend.asarray(np.ones(2)))
    X, W, dZ = (random(*shape) for shape in ((64, 512), (7, 512), (64, 7)))
    exact = linear_error_bounds(X, W, dZ=dZ, sharp=True)[output]
    spoiled = Spoiled.from_arrays(W, np.zeros((1, 7), np.float32)).to(device)
    spoiled.spoil = (output, (0, 0), 3 * exact[0, 0])
    for on in (False, True):
        select_device(device, tf32=on)
        complaints = [a.complaint for a in compare(spoiled, X, dZ, device, sharp=True) if a.complaint]
        assert len(complaints) == (output == "db" or not on)


app = typer.Typer()
for command in (train.train, verify.verify, devices.devices):
    app.command()(command)

# The commands ---------------------------------------------------------------------------------------------------------


@on_cuda
def test_verify_says_it_and_is_as_before_when_it_is_done(backend):
    device = Device.of(backend.asarray(np.ones(2)))
    for option, products in (("--tf32", "TF32"), ("--json", "float32")):
        result = CliRunner().invoke(app, ["verify", "--device", str(device), "--device", "cpu", "--json", option])
        report = json.loads(result.output)
        assert (result.exit_code, report["ok"]) == (0, True)
        assert report["cuda"][str(device)]["float32_products"] == products
        told = {(row["device"], row["dtype"]): row["products"] for row in report["rows"]}
        assert told["cpu", "float32"] == "float32"
        assert told[str(device), "float32"] == products
        assert (told[str(device), "float16"], told[str(device), "float64"]) == ("float16", "float64")
        ways = {row["step_by"] for row in report["rows"] if row["device"] == str(device) and row["dtype"] == "float32"}
        assert ways == {"captured; products in TF32" if products == "TF32" else "captured"}
    result = CliRunner().invoke(app, ["verify", "--device", str(device), "--tf32"])
    assert "TF32    32x512 -> 64" in result.output
    assert "TF32: float32 products with factors of 11 bits" in result.output
    assert not device.tf32


def test_verify_without_a_cuda_device_has_no_tf32():
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--tf32"])
    assert result.exit_code == 2
    assert "none is verified" in result.output


@on_cuda
def test_train_takes_it_says_it_and_goes_on_with_it(backend, tmp_path, asked):
    device = str(Device.of(backend.asarray(np.ones(2))))
    options = ["train", "--device", device, "--hidden", "8", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*options, "--epochs", "1", "--tf32"])
    assert result.exit_code == 0, result.output
    assert f"{device} in TF32" in result.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["products"] == "TF32"
    assert asked.count(FAST_TF32) > 10
    assert not select_device(device).tf32  # it was this run's

    again = ["train", "--out", str(tmp_path / "run"), "--resume", "--epochs"]
    for more, expected in ((["2"], True), (["3", "--no-tf32"], False)):
        asked.clear()
        result = CliRunner().invoke(app, [*again, *more])
        assert result.exit_code == 0, result.output
        assert (asked.count(FAST_TF32) > 10) is expected


def test_train_refuses_it_where_it_cannot_be(tmp_path):
    for options, said in ((["--device", "cpu"], "leave tf32 out"), (["--dtype", "float64", "--device", "cpu"], "float64")):
        result = CliRunner().invoke(app, ["train", "--tf32", "--out", str(tmp_path / "run"), *options])
        assert result.exit_code != 0
        assert said in f"{result.output} {result.exception}"
        assert not (tmp_path / "run").exists()


@on_cuda
def test_the_doctor_says_whether_the_card_rounds(backend, rounding):
    for rounds, said in ((True, "rounds factors to 11 bits; off unless asked for"), (False, "products were those of float32")):
        if not (rounds or Device.of(backend.asarray(np.ones(2))).name.startswith("CuPy CPU emulated")):
            continue  # a card does what it does
        rounding[0] = rounds
        report = json.loads(CliRunner().invoke(app, ["devices", "--doctor", "--json"]).output)
        last = report["examinations"][str(Device.of(backend.asarray(np.ones(2))))][-1]
        assert (last["step"], last["ok"]) == ("TF32", True)
        assert said in last["found"]
