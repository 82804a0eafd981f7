"""bfloat16 is refused in words, before anything is touched, and can be brought to a dtype that layers compute in."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    SGD,
    Device,
    Dropout,
    LayerNorm,
    Linear,
    MeanSquaredError,
    SoftmaxCrossEntropy,
    fit,
    linear_forward,
    predict,
    select_device,
    softmax,
)

HALVES = np.asarray([[1.0, -2.5], [0.125, 300.0], [0.0, 7.0]], np.float32)  # which bfloat16 has, too


@pytest.fixture(params=["numpy", "cupy", "torch", "jax"])
def brain(request):
    """`HALVES` in bfloat16."""
    library = pytest.importorskip(request.param)
    if request.param == "torch":
        return library.from_numpy(HALVES).to(library.bfloat16)
    if request.param == "jax":
        return library.numpy.asarray(HALVES, dtype=library.numpy.bfloat16)
    if request.param == "cupy":
        try:
            library.zeros(1)
        except library.cuda.runtime.CUDARuntimeError as why:
            pytest.skip(str(why))
    return library.asarray(HALVES).astype(pytest.importorskip("ml_dtypes").bfloat16)


def test_what_computes_refuses_it(brain):
    device = Device.of(brain)
    model = Linear(2, 2, device=device, dtype="float32", seed=0)
    refused = [
        lambda: Linear(2, 2, dtype="bfloat16", device=device),
        lambda: LayerNorm(2, dtype=brain.dtype, device=device),
        lambda: model.to(dtype="bfloat16"),
        lambda: Linear.from_arrays(brain),
        lambda: linear_forward(brain, brain),
        lambda: model(brain),
        lambda: GELU()(brain),
        lambda: Dropout(0.5, seed=0).forward(brain),
        lambda: softmax(brain),
        lambda: MeanSquaredError().forward(brain, brain),
        lambda: SoftmaxCrossEntropy().forward(model(device.asarray(HALVES)), brain),
    ]
    for call in refused:
        with pytest.raises(TypeError, match=r"is bfloat16,? (but|which)"):
            call()


def test_what_tensor_cores_take_is_named(brain):
    device = Device.of(brain)
    if device.kind not in ("cuda", "torch"):
        pytest.skip("layers do not compute in float16 here")
    with pytest.raises(TypeError, match=r"tensor cores take float16, too, and float32 with select_device\(\.\.\., tf32=True\)"):
        device.dtype("bfloat16")


def test_training_casts_it_or_says_how_to_before_anything_is_changed(brain):
    device = Device.of(brain)
    model = Linear(2, 2, device=device, dtype="float32", seed=0)
    before = device.to_numpy(model.W).copy()
    options = {"loss": MeanSquaredError(), "optimizer": SGD(0.0), "epochs": 1, "progress": False}
    if hasattr(device.xp, "bfloat16"):
        exact = device.to_numpy(predict(model, device.asarray(HALVES)))
        assert np.array_equal(device.to_numpy(predict(model, brain)), exact)
        assert np.isfinite(fit(model, brain, brain, **options).rows[0]["loss"])
    else:
        for call in (lambda: predict(model, brain), lambda: fit(model, brain, brain, **options)):
            with pytest.raises(TypeError, match=r"X is bfloat16, which is no dtype of .*; cast it with X\.astype\(xp\.float32\)"):
                call()
    assert np.array_equal(device.to_numpy(model.W), before)


def test_it_comes_over_as_float32_without_a_rounding(brain):
    host = select_device("cpu")
    assert np.array_equal(host.asarray(brain, dtype="float32"), HALVES)
    assert np.array_equal(Device.of(brain).asarray(brain, dtype="float32") + 0, Device.of(brain).asarray(HALVES))
    assert np.array_equal(np.asarray(Device.of(brain).to_numpy(brain), np.float32), HALVES)
    if Device.of(brain) != host:
        with pytest.raises(TypeError, match=r'cpu has no bfloat16; ask for another with dtype="float32"'):
            host.asarray(brain)


def test_it_can_be_made_where_the_namespace_has_it(brain):
    device = Device.of(brain)
    if hasattr(device.xp, "bfloat16"):
        made = device.asarray(HALVES, dtype="bfloat16")
        assert made.dtype == brain.dtype
        assert np.array_equal(select_device("cpu").asarray(made, dtype="float32"), HALVES)
    else:
        with pytest.raises(TypeError, match="has no bfloat16; ask for another"):
            device.asarray(HALVES, dtype="bfloat16")
