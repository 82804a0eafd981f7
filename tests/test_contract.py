"""What users' code relies on: every public callable with its parameters, their order and kind, and their default values."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import anyarray_linear
from anyarray_linear import schedules, testing

# As the documentation has them. A parameter may be added by keyword and with a default; what is here stays.
CONTRACT = """
Linear(in_features, out_features, *, bias=True, init="he_normal", dtype=None, device=None, seed=None)
Linear.from_arrays(W, b=None)
Linear.gradients(self, dZ, cache, *, needs_dX=True)
Linear.backward(self, dZ, cache, *, accumulate=False, needs_dX=True)
Linear.to(self, device=None, dtype=None)
linear_forward(X, W, b=None)
linear_backward(dZ, X, W, *, bias=True, needs_dX=True)
GELU(approximate="none")
Dropout(rate, seed=None)
Dropout.gradients(self, dZ, cache, *, needs_dX=True)
Dropout.backward(self, dZ, cache, *, accumulate=False, needs_dX=True)
Dropout.to(self, device=None, dtype=None)
LayerNorm(features, eps=1e-5, *, dtype=None, device=None)
LayerNorm.gradients(self, dZ, cache, *, needs_dX=True)
LayerNorm.backward(self, dZ, cache, *, accumulate=False, needs_dX=True)
LayerNorm.to(self, device=None, dtype=None)
Sequential.gradients(self, dZ, caches, *, needs_dX=True)
Sequential.backward(self, dZ, caches, *, accumulate=False, needs_dX=True)
Sequential.to(self, device=None, dtype=None)
SGD(lr, momentum=0, nesterov=False, weight_decay=0, *, clip_norm=None)
Adam(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, *, clip_norm=None)
AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, clip_norm=None)
Adam.step(self, model, grads=None, *, where=None)
Device.asarray(self, x, dtype=None)
select_device(spec="auto")
TrainingStep(model, loss, optimizer)
TrainingStep.__call__(self, X, y, weights=None)
evaluate(model, X, y, *, loss, batch_size=1024)
predict(model, X, *, batch_size=1024)
save_model(model, path, *, metadata=None)
load_model(path, *, device=None, into=None)
save_checkpoint(folder, model, optimizer, *, state, keep=3, best=False)
load_checkpoint(folder, model, optimizer, *, check=None)
snapshot(model)
restore(model, weights)
softmax(Z)
schedules.linear_warmup(lr, steps)
schedules.cosine(lr, steps, *, warmup=0, final=0.0)
schedules.step_decay(lr, every, factor)
testing.adjoint_check(layer, X, *, sharp=False, seed=0)
testing.assert_equivalent(layer, X, dZ, devices=None, *, sharp=False)
testing.compare(layer, X, dZ, device=None, *, sharp=False)
testing.gradcheck(layer, X, dZ=None, *, rtol=None, seed=0)
testing.linear_error_bounds(X, W, b=None, dZ=None, *, sharp=False, tf32=False)
testing.linear_reference(X, W, b=None, dZ=None)
testing.usable_devices(dtype="float32")
"""
FIT = {
    "epochs": 20, "batch_size": 64, "validation": None, "seed": 0, "progress": True, "callbacks": (), "checkpoint": None,
    "checkpoint_every": None, "resume": False, "skip_nonfinite": 0, "stop": None, "group": None,
}  # fmt: skip


def signature_of(name):
    found = anyarray_linear
    for part in name.split("."):
        found = {"schedules": schedules, "testing": testing}.get(part) or getattr(found, part)
    return inspect.signature(found)


@pytest.mark.parametrize("line", CONTRACT.split("\n")[1:-1], ids=lambda line: line.partition("(")[0])
def test_signatures_and_default_values_are_those_that_are_documented(line):
    name, _, parameters = line.partition("(")
    namespace: dict = {}
    exec(f"def stated({parameters}: pass", namespace)
    stated, actual = inspect.signature(namespace["stated"]).parameters, signature_of(name).parameters
    assert [p for p in actual if p in stated] == list(stated)
    for p in actual.values():
        if p.name not in stated:
            assert (p.kind, p.default is p.empty) == (p.KEYWORD_ONLY, False), f"{p.name} may only be given by its name"
            continue
        as_stated = stated[p.name]
        assert (p.kind, type(p.default), p.default) == (as_stated.kind, type(as_stated.default), as_stated.default), p.name


def test_fits_default_values_are_those_that_are_documented():
    parameters = signature_of("fit").parameters
    assert list(parameters)[:3] == ["model", "X", "y"]
    assert {name: parameters[name].default for name in FIT} == FIT
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in (*FIT, "loss", "optimizer"))


def test_default_values_are_what_runs():
    """A default that is stated in the signature but replaced inside would pass the tests above."""
    rows = np.linspace(-1, 1, 12).reshape(6, 2)
    layers = [anyarray_linear.Linear(2, 3, seed=0, **options) for options in ({}, {"init": "he_normal", "bias": True})]
    assert (layers[0].W == layers[1].W).all()
    assert (layers[0].b == 0).all()
    Z = [anyarray_linear.GELU(**options)(rows) for options in ({}, {"approximate": "none"})]
    assert (Z[0] == Z[1]).all()
    norms = [anyarray_linear.LayerNorm(2, **options)(1e-3 * rows) for options in ({}, {"eps": 1e-5})]
    assert (norms[0] == norms[1]).all()
