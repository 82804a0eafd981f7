"""PyTorch's own sample inputs, which it tests itself with: every case that our interface expresses agrees, gradients too.

They are in `torch.testing._internal`, which wants the package `expecttest`; the wider CI installs both.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    BinaryCrossEntropy,
    LayerNorm,
    Linear,
    MeanSquaredError,
    ReLU,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
)

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")

ACTIVATIONS = {
    "nn.functional.relu": lambda: ReLU(),
    "nn.functional.silu": lambda inplace=False: SiLU(),
    "nn.functional.gelu": lambda approximate="none": GELU(approximate),
    "sigmoid": lambda: Sigmoid(),
    "tanh": lambda: Tanh(),
}


@pytest.fixture(scope="module")
def samples():
    """A function from an operator's name to PyTorch's samples of it, in float64 and on the CPU."""
    from torch.testing._internal.common_methods_invocations import op_db

    known = {op.name: op for op in op_db if op.variant_test_name == ""}
    return lambda name: list(known[name].sample_inputs("cpu", torch.float64, requires_grad=True))


def host(x):
    return x.detach().numpy().copy()


def agree(found, theirs, what):
    """To 1e-12 of the largest value: a few hundred times what float64 rounds, far below any other definition."""
    theirs = host(theirs)
    assert found.shape == theirs.shape, what
    scale = np.abs(theirs).max(initial=1.0)
    assert np.all(np.abs(found - theirs) <= 1e-12 * scale), f"{what} is off by {np.abs(found - theirs).max()}"


def direction(Z):
    """Something to send back that no symmetry hides behind."""
    return np.random.default_rng(0).standard_normal(tuple(Z.shape))


def test_linear(samples):
    cases = samples("nn.functional.linear")
    for sample in cases:
        W, b = (*sample.args, sample.kwargs.get("bias"))[:2] if len(sample.args) < 2 else sample.args
        column = W.ndim == 1  # PyTorch takes a vector for a layer with one output, and drops that axis
        layer = Linear.from_arrays(host(W).reshape(-1, W.shape[-1]), None if b is None else host(b).reshape(-1))
        Z, cache = layer.forward(host(sample.input))
        theirs = torch.nn.functional.linear(sample.input, W, b)
        dZ = direction(theirs)
        dX, grads = layer.gradients(dZ[..., np.newaxis] if column else dZ, cache)
        wanted = [x for x in (sample.input, W, b) if x is not None]
        expected = torch.autograd.grad(theirs, wanted, torch.from_numpy(dZ))
        agree(Z[..., 0] if column else Z, theirs, "Z")
        for found, grad, what in zip((dX, grads["W"], grads.get("b")), expected, ("dX", "dW", "db"), strict=False):
            agree(found.reshape(tuple(grad.shape)), grad, what)
    assert len(cases) >= 18


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(samples, name):
    count = 0
    for sample in samples(name):
        layer = ACTIVATIONS[name](*sample.args, **sample.kwargs)
        count += 1
        Z, cache = layer.forward(host(sample.input))
        dZ = direction(Z)
        dX, _ = layer.gradients(dZ, cache)
        functions = torch.nn.functional if name.startswith("nn.") else torch
        theirs = getattr(functions, name.rpartition(".")[2])(sample.input, *sample.args, **sample.kwargs)
        (expected,) = torch.autograd.grad(theirs, sample.input, torch.from_numpy(dZ))
        agree(Z, theirs, f"{name}{tuple(Z.shape)}")
        agree(dX, expected, f"the gradient of {name}{tuple(Z.shape)}")
    assert count


def test_layer_normalization(samples):
    count = 0
    for sample in samples("nn.functional.layer_norm"):
        shape, W, b = (*sample.args, None, None)[:3]
        eps = sample.kwargs.get("eps", 1e-5)
        if len(shape) > 1 or eps <= 0:
            continue  # ours normalizes the last axis, and its eps is positive
        count += 1
        layer = LayerNorm(shape[0], eps=eps)
        if W is not None:
            layer.W = host(W)
        if b is not None:
            layer.b = host(b)
        Z, cache = layer.forward(host(sample.input))
        theirs = torch.nn.functional.layer_norm(sample.input, shape, W, b, eps)
        dZ = direction(theirs)
        dX, grads = layer.gradients(dZ, cache)
        wanted = [x for x in (sample.input, W, b) if x is not None]
        expected = torch.autograd.grad(theirs, wanted, torch.from_numpy(dZ))
        agree(Z, theirs, "Z")
        found = [dX, *(grads[p] for p, x in (("W", W), ("b", b)) if x is not None)]
        for x, grad in zip(found, expected, strict=True):
            agree(x, grad, f"a gradient for {tuple(sample.input.shape)}")
    assert count >= 2


def numbers(x):
    return None if x is None else x.detach().reshape(-1).tolist()


def cross_entropy(weight=None, ignore_index=None, label_smoothing=0.0):
    return SoftmaxCrossEntropy(numbers(weight), label_smoothing, ignore_index)


def binary_cross_entropy(pos_weight=None):
    return BinaryCrossEntropy(numbers(pos_weight))


LOSSES = {  # how ours is made, how many of the samples it expresses at least, and which argument of PyTorch's has no counterpart
    "nn.functional.cross_entropy": (cross_entropy, 15, None),
    "nn.functional.binary_cross_entropy_with_logits": (binary_cross_entropy, 9, "weight"),  # theirs is one per element
    "nn.functional.mse_loss": (MeanSquaredError, 5, None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(samples, name):
    made, least, unknown = LOSSES[name]
    count = 0
    for sample in samples(name):
        options = dict(sample.kwargs)
        for weight in {"weight", "pos_weight"} & options.keys():  # the sampled ones may be negative, which ours refuses
            options[weight] = options[weight].detach().abs()
        theirs_options = dict(options)
        reduction = options.pop("reduction", "mean")
        if unknown in options or reduction == "none":
            continue
        count += 1
        loss = made(**options)
        (target,) = sample.args
        Z, theirs_target = host(sample.input), host(target)
        if made is cross_entropy and Z.ndim > 1:  # their classes are the second axis, ours the last one
            Z = np.moveaxis(Z, 1, -1)
            theirs_target = np.moveaxis(theirs_target, 1, -1) if theirs_target.ndim == Z.ndim else theirs_target
        value, cache = loss.forward(Z, theirs_target)
        dZ = loss.backward(cache)
        if reduction == "sum":
            divisor = loss.divisor(Z, theirs_target)
            value, dZ = value * divisor, dZ * divisor
        theirs = getattr(torch.nn.functional, name.rpartition(".")[2])(sample.input, target, **theirs_options)
        (expected,) = torch.autograd.grad(theirs, sample.input)
        what = f"{name}{tuple(sample.input.shape)} {sample.kwargs}"
        agree(np.asarray(value), theirs, what)
        agree(np.moveaxis(dZ, -1, 1) if made is cross_entropy and Z.ndim > 1 else dZ, expected, f"the gradient of {what}")
    assert count >= least


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy, BinaryCrossEntropy, MeanSquaredError])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_are_refused_in_words(loss, reduction):
    with pytest.raises(ValueError, match=rf"reduction is '{reduction}', but losses here are means.* loss\.divisor\(Z, target\)"):
        loss(reduction=reduction)
    assert repr(loss(reduction="mean")) == repr(loss())
