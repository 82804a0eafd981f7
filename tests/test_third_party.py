"""Agreement with PyTorch (autograd, losses, optimizers, schedules) and with JAX (tracing, `jax.grad`)."""

from __future__ import annotations

import contextlib
import importlib
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    Device,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    linear_backward,
    linear_forward,
)
from anyarray_linear.schedules import cosine, linear_warmup, step_decay


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jax.config.update("jax_enable_x64", True)
    return jax


def agree(found, theirs, scale, what):
    """To 1e-12 of `scale`, the product of absolute values, element by element."""
    theirs = theirs.detach().numpy()
    assert found.shape == theirs.shape, what
    assert np.all(np.abs(found - theirs) <= 1e-12 * scale), f"{what} is off by {np.abs(found - theirs).max()}"


@given(
    batch=st.lists(st.sampled_from([0, 1, 2, 7]), max_size=3),
    in_features=st.integers(1, 33),
    out_features=st.integers(1, 17),
    bias=st.booleans(),
    stride=st.sampled_from([1, 2, -1]),
    seed=st.integers(0, 2**32),
)
def test_the_layer_agrees_with_autograd(torch, batch, in_features, out_features, bias, stride, seed):
    rng = np.random.default_rng(seed)

    def strided(*shape):
        x = rng.standard_normal((*shape[:-1], shape[-1] * abs(stride)))
        return x[..., ::stride]

    W, b = rng.standard_normal((out_features, in_features)), rng.standard_normal((1, out_features)) if bias else None
    X, dZ = strided(*batch, in_features), strided(*batch, out_features)
    layer = Linear.from_arrays(W, b)
    Z, cache = layer.forward(X)
    dX, gradients = layer.gradients(dZ, cache)

    X_t, W_t = (torch.tensor(x.copy(), requires_grad=True) for x in (X, W))
    b_t = torch.tensor(b[0], requires_grad=True) if bias else None
    Z_t = torch.nn.functional.linear(X_t, W_t, b_t)
    Z_t.backward(torch.tensor(dZ.copy()))

    rows, dZ_rows = np.abs(X).reshape(-1, in_features), np.abs(dZ).reshape(-1, out_features)
    agree(Z, Z_t, np.abs(X) @ np.abs(W.T) + (np.abs(b[0]) if bias else 0), "Z")
    agree(dX, X_t.grad, np.abs(dZ) @ np.abs(W), "dX")
    agree(gradients["W"], W_t.grad, dZ_rows.T @ rows, "dW")
    if bias:
        agree(gradients["b"][0], b_t.grad, dZ_rows.sum(0), "db")


PAIRS = {
    ReLU: lambda torch: torch.nn.ReLU(),
    Tanh: lambda torch: torch.nn.Tanh(),
    Sigmoid: lambda torch: torch.nn.Sigmoid(),
    SiLU: lambda torch: torch.nn.SiLU(),
    GELU: lambda torch: torch.nn.GELU(),
}


@pytest.mark.parametrize("activation", PAIRS)
def test_activations_agree_with_autograd(torch, activation):
    rng = np.random.default_rng(0)
    X, dZ = np.concatenate([rng.standard_normal(200) * 4, [0.0, -0.0, 30.0, -30.0]]), rng.standard_normal(204)
    Z, cache = activation().forward(X)
    dX, _ = activation().gradients(dZ, cache)
    X_t = torch.tensor(X, requires_grad=True)
    Z_t = PAIRS[activation](torch)(X_t)
    Z_t.backward(torch.tensor(dZ))
    agree(Z, Z_t, 1 + np.abs(X), "Z")
    agree(dX, X_t.grad, np.abs(dZ) * (1 + np.abs(X)), "dX")


@given(
    leading=st.sampled_from([(), (1,), (6,), (2, 3), (2, 2, 3)]),
    classes=st.integers(1, 9),
    kind=st.sampled_from(["ids", "one-hot", "probabilities", "sums to 2.5"]),
    spread=st.sampled_from([1.0, 30.0, 1e3]),
    seed=st.integers(0, 2**32),
)
def test_cross_entropy_agrees_with_torch(torch, leading, classes, kind, spread, seed):
    rng = np.random.default_rng(seed)
    Z, target = rng.standard_normal((*leading, classes)) * spread, rng.integers(0, classes, leading)
    if kind != "ids":
        target = np.eye(classes)[target]
    if kind in ("probabilities", "sums to 2.5"):
        target = rng.random(target.shape)
        target *= (1 if kind == "probabilities" else 2.5) / target.sum(-1, keepdims=True)
    loss, cache = SoftmaxCrossEntropy().forward(Z, target)
    dZ = SoftmaxCrossEntropy().backward(cache)

    Z_t = torch.tensor(Z, requires_grad=True)
    of_rows = torch.tensor(target.reshape(-1, classes) if kind != "ids" else target.reshape(-1))  # torch wants classes second
    loss_t = torch.nn.functional.cross_entropy(Z_t.reshape(-1, classes), of_rows)
    loss_t.backward()
    agree(loss, loss_t, 1 + 2.5 * 4 * spread, "loss")
    agree(dZ, Z_t.grad, 2.5 * (1 + spread) / max(1, int(np.prod(leading))), "dZ")


def test_cross_entropy_of_impossible_classes_agrees_with_torch(torch):
    Z = np.asarray([[-np.inf, 0.0, 1.0], [2.0, -np.inf, -np.inf]])
    for ids in ([1, 0], [2, 0], [0, 0]):
        loss, cache = SoftmaxCrossEntropy().forward(Z, np.asarray(ids))
        Z_t = torch.tensor(Z, requires_grad=True)
        loss_t = torch.nn.functional.cross_entropy(Z_t, torch.tensor(ids))
        loss_t.backward()
        assert loss == loss_t.item() or abs(loss - loss_t.item()) < 1e-12
        agree(SoftmaxCrossEntropy().backward(cache), Z_t.grad, 1, "dZ")


@given(shape=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 2**32))
def test_squared_error_agrees_with_torch(torch, shape, seed):
    rng = np.random.default_rng(seed)
    Z, target = rng.standard_normal(shape), rng.standard_normal(shape)
    Z, target = np.asarray(Z), np.asarray(target)
    loss, cache = MeanSquaredError().forward(Z, target)
    Z_t = torch.tensor(Z, requires_grad=True)
    loss_t = torch.nn.functional.mse_loss(Z_t, torch.tensor(target))
    loss_t.backward()
    agree(loss, loss_t, loss_t.item(), "loss")
    agree(MeanSquaredError().backward(cache), Z_t.grad, (np.abs(Z) + np.abs(target)) / max(1, Z.size) * 2, "dZ")


OPTIMIZERS = {
    "SGD": (lambda **k: SGD(0.1, **k), lambda o, p: o.SGD(p, 0.1)),
    "SGD, decay": (lambda **k: SGD(0.1, weight_decay=0.01, **k), lambda o, p: o.SGD(p, 0.1, weight_decay=0.01)),
    "SGD, momentum": (lambda **k: SGD(0.05, momentum=0.9, **k), lambda o, p: o.SGD(p, 0.05, momentum=0.9)),
    "SGD, Nesterov, decay": (
        lambda **k: SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.01, **k),
        lambda o, p: o.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "Adam": (lambda **k: Adam(0.01, **k), lambda o, p: o.Adam(p, 0.01)),
    "Adam, decay": (
        lambda **k: Adam(0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, **k),
        lambda o, p: o.Adam(p, 0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    ),
    "AdamW": (lambda **k: AdamW(0.01, **k), lambda o, p: o.AdamW(p, 0.01)),
    "AdamW, decay": (lambda **k: AdamW(0.01, weight_decay=0.5, **k), lambda o, p: o.AdamW(p, 0.01, weight_decay=0.5)),
}


def twins(torch, dtype="float64"):
    """Our model and PyTorch's with the same parameters."""
    ours = Sequential(Linear(6, 16, seed=0, dtype=dtype), Tanh(), Linear(16, 16, bias=False, seed=1, dtype=dtype),
                      SiLU(), Linear(16, 3, seed=2, dtype=dtype))  # fmt: skip
    theirs = torch.nn.Sequential(
        *(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16, bias=False), torch.nn.SiLU(), torch.nn.Linear(16, 3))
    ).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, layer in ours.leaves():
            for p, value in layer.parameters().items():
                getattr(theirs[int(name)], {"W": "weight", "b": "bias"}[p]).copy_(torch.tensor(value.reshape(-1) if p == "b" else value))
    return ours, theirs


def train_both(torch, ours, theirs, optimizer, optimizer_t, steps=100, clip_norm=None, scheduler=None):
    """The same steps on both; after each, every parameter must agree."""
    rng, loss = np.random.default_rng(0), SoftmaxCrossEntropy()
    for step in range(steps):
        X, ids = rng.standard_normal((8, 6)), rng.integers(0, 3, 8)
        Z, caches = ours.forward(X)
        value, cache = loss.forward(Z, ids)
        ours.backward(loss.backward(cache), caches, needs_dX=False)
        if scheduler is not None:
            assert optimizer.learning_rate() == pytest.approx(optimizer_t.param_groups[0]["lr"], rel=1e-12, abs=1e-15), step
        optimizer.step(ours)

        optimizer_t.zero_grad()
        value_t = torch.nn.functional.cross_entropy(theirs(torch.tensor(X)), torch.tensor(ids))
        value_t.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        optimizer_t.step()
        if scheduler is not None:
            scheduler.step()

        assert value == pytest.approx(value_t.item(), rel=1e-10), step
        for name, layer in ours.leaves():
            for p, found in layer.parameters().items():
                expected = getattr(theirs[int(name)], {"W": "weight", "b": "bias"}[p]).detach().numpy().reshape(found.shape)
                assert np.allclose(found, expected, rtol=1e-10, atol=1e-11), f"{name}.{p} after step {step}"


@pytest.mark.parametrize(
    ("rule", "clip_norm"),
    [*((rule, None) for rule in OPTIMIZERS), ("SGD, Nesterov, decay", 0.3), ("Adam, decay", 0.3), ("AdamW", 0.3)],
)
def test_a_hundred_steps_agree_with_torch(torch, rule, clip_norm):
    ours, theirs = twins(torch)
    make, make_t = OPTIMIZERS[rule]
    train_both(torch, ours, theirs, make(clip_norm=clip_norm), make_t(torch.optim, theirs.parameters()), clip_norm=clip_norm)


SCHEDULES = {
    "cosine": (cosine(0.1, 60, final=0.001), lambda s, o: s.CosineAnnealingLR(o, T_max=60, eta_min=0.001), 61),
    "step decay": (step_decay(0.1, 7, 0.5), lambda s, o: s.StepLR(o, step_size=7, gamma=0.5), 60),
    "warm-up": (linear_warmup(0.1, 10), lambda s, o: s.LinearLR(o, start_factor=0.1, total_iters=9), 40),
    "warm-up and cosine": (
        cosine(0.1, 50, warmup=10, final=0.001),
        lambda s, o: s.SequentialLR(
            o,
            [s.LinearLR(o, start_factor=0.1, total_iters=9), s.CosineAnnealingLR(o, T_max=40, eta_min=0.001)],
            milestones=[10],
        ),
        51,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_with_a_schedule_agree_with_torch(torch, name):
    schedule, make, steps = SCHEDULES[name]
    ours, theirs = twins(torch)
    optimizer_t = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of a deprecated argument
        scheduler = make(torch.optim.lr_scheduler, optimizer_t)
        train_both(torch, ours, theirs, SGD(schedule, momentum=0.9), optimizer_t, steps=steps, scheduler=scheduler)


@given(norm=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_clipping_agrees_with_torch(torch, norm, seed, scale):
    rng = np.random.default_rng(seed)
    gradients = [scale * rng.standard_normal(shape) for shape in ((4, 3), (1, 4), (2, 4))]
    parameters = [torch.nn.Parameter(torch.zeros(dW.shape, dtype=torch.float64)) for dW in gradients]
    for parameter, dW in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(dW)
    torch.nn.utils.clip_grad_norm_(parameters, norm)
    model = Sequential(Linear(3, 4, init="zeros"), Linear(4, 2, bias=False, init="zeros"))
    SGD(1.0, clip_norm=norm).step(model, dict(zip(model.parameters(), gradients, strict=True)))
    for W, parameter in zip(model.parameters().values(), parameters, strict=True):
        assert np.allclose(-W, parameter.grad.numpy(), rtol=1e-12, atol=0)


def test_pytorchs_initialisation_has_the_bounds_of_torch(torch):
    torch.manual_seed(0)
    theirs, ours = torch.nn.Linear(10, 10_000), Linear(10, 10_000, init="pytorch", seed=0)
    for x, y in ((theirs.weight, ours.W), (theirs.bias, ours.b)):
        x = x.detach().numpy()
        assert np.abs(x).max() == pytest.approx(np.abs(y).max(), rel=2e-2)
        assert x.std() == pytest.approx(y.std(), rel=2e-2)


def test_torch_arrays_take_part_in_autograd_when_the_user_wants_it(torch):
    X = torch.ones((2, 3), dtype=torch.float64, requires_grad=True)
    layer = Linear.from_arrays(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    layer(X).sum().backward()
    assert np.array_equal(X.grad.numpy(), [[1, 2, 3]] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# JAX


def jax_arrays(jax, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jax.numpy.asarray(rng.standard_normal(shape)) for shape in shapes]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_forward_and_backward_trace_under_jit(jax, batch):
    X, W, b, dZ = jax_arrays(jax, (*batch, 4), (3, 4), (1, 3), (*batch, 3))
    assert np.allclose(jax.jit(linear_forward)(X, W, b), linear_forward(X, W, b), rtol=1e-13, atol=1e-14)
    for options in ({}, {"bias": False}, {"needs_dX": False}):
        traced = jax.jit(lambda dZ, X, W, options=options: linear_backward(dZ, X, W, **options))(dZ, X, W)
        for name, x, y in zip(traced._fields, traced, linear_backward(dZ, X, W, **options), strict=True):
            assert (x is None) == (y is None), name
            assert x is None or np.allclose(x, y, rtol=1e-13, atol=1e-14), name


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_gradients_agree_with_jax_grad_with_and_without_jit(jax, batch):
    X, W, b, dZ = jax_arrays(jax, (*batch, 4), (3, 4), (1, 3), (*batch, 3), seed=1)
    ours = linear_backward(dZ, X, W)
    for wrapped in (jax.grad, lambda f, argnums: jax.jit(jax.grad(f, argnums))):
        theirs = wrapped(lambda X, W, b: (linear_forward(X, W, b) * dZ).sum(), (0, 1, 2))(X, W, b)
        for name, x, y in zip(ours._fields, ours, theirs, strict=True):
            assert x.shape == y.shape, name
            assert np.allclose(x, y, rtol=1e-12, atol=1e-13), name


def test_a_mistake_is_told_while_tracing_too(jax):
    X, W, wrong = jax_arrays(jax, (5, 4), (3, 4), (5, 3))
    with pytest.raises(ValueError, match=r"^X has shape \(5, 3\).*in_features = 4"):
        jax.jit(linear_forward)(wrong, W)
    with pytest.raises(TypeError, match=r"^X is float32 but W is float64"):
        jax.jit(linear_forward)(X.astype("float32"), W)
    with pytest.raises(TypeError, match=r"^X is a numpy array .* but W is a jax array being traced"):
        jax.jit(lambda W: linear_forward(np.ones((5, 4)), W))(W)


def products(jax, function, *arrays):
    """The shapes of the operands of every matrix product in the traced function."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append([tuple(v.aval.shape) for v in equation.invars])
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    walk(value.jaxpr)

    walk(jax.make_jaxpr(function)(*arrays).jaxpr)
    return found


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_number_of_batch_axes_is_one_product_of_two_matrices(jax, batch):
    n = int(np.prod(batch))
    X, W, b, dZ = jax_arrays(jax, (*batch, 4), (3, 4), (1, 3), (*batch, 3))
    assert products(jax, linear_forward, X, W, b) == [[(n, 4), (4, 3)]]
    backward = products(jax, linear_backward, dZ, X, W)
    assert sorted(backward) == sorted([[(n, 3), (3, 4)], [(3, n), (n, 4)], [(1, n), (n, 3)]])
    lean = products(jax, lambda dZ, X, W: linear_backward(dZ, X, W, bias=False, needs_dX=False), dZ, X, W)
    assert lean == [[(3, n), (n, 4)]], "what is not asked for must cost nothing"


def test_a_dtype_that_jax_would_silently_narrow_is_refused(jax):
    device = Device.of(jax.numpy.ones(1))
    with narrow(jax):
        with pytest.raises(TypeError, match=r"has no float64.*jax_enable_x64"):
            Linear(3, 4, dtype="float64", device=device)
        layer = Linear(3, 4, device=device)
        assert layer.W.dtype == np.float32
        with pytest.raises(TypeError, match="float64"):
            layer.to(dtype="float64")
    assert Linear(3, 4, device=device).W.dtype == np.float64


def narrow(jax) -> contextlib.AbstractContextManager[None]:
    """JAX as it is by default: without 64-bit types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(jax, "enable_x64"):
            return jax.enable_x64(False)
        return importlib.import_module("jax.experimental").disable_x64()
