"""Faults that a linear layer could have, put into the source of `linear.py` one by one: each is caught, by the test named.

A substitution that no longer matches the source fails here, so the list cannot go stale unnoticed.
"""

from __future__ import annotations

import inspect
import sys
from types import FunctionType, ModuleType

import pytest
import test_equivalence as suite

from anyarray_linear import lanes, linear

# parts of linear.py that more than one fault is put into
SUM = "xp.ones((1, dZ.shape[0]), dtype=W.dtype, device=device_of(W)) @ dZ if"
ROWS = "xp.reshape(X, (math.prod(X.shape[:-1]), X.shape[-1]))"


@pytest.fixture
def mutate(monkeypatch):
    """A function that replaces parts of the layer's source, each of which must occur once, until the test ends."""

    def mutate(*changes: tuple[str, str]) -> None:
        source = inspect.getsource(linear)
        for old, new in changes:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in linear.py"
            source = source.replace(old, new)
        mutant = ModuleType("anyarray_linear.mutant")
        mutant.__package__ = linear.__package__
        monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
        exec(compile(source, "mutant of linear.py", "exec"), mutant.__dict__)
        for name in ("linear_forward", "linear_backward"):
            monkeypatch.setattr(linear, name, getattr(mutant, name))
        for name, value in vars(mutant.Linear).items():
            if isinstance(value, FunctionType):
                monkeypatch.setattr(linear.Linear, name, value)

    with lanes.off():  # the faults are in the portable definition
        yield mutate


def of_rank_3(backend):
    suite.test_any_number_of_batch_axes_gives_the_right_outputs(backend, (2, 3))


def of_no_rows(backend):
    suite.test_any_number_of_batch_axes_gives_the_right_outputs(backend, (2, 0, 3))


of_cache = suite.test_every_cache_serves_its_own_forward
of_differences = suite.test_gradients_are_those_of_the_forward_pass
of_adjoint = suite.test_backward_is_the_adjoint_of_forward
of_inputs = suite.test_no_argument_is_ever_written_to
of_float16 = suite.test_float16_bias_gradient_of_many_equal_terms_does_not_stall
of_dtypes = suite.test_mixing_dtypes_raises_at_the_door_naming_the_argument

# the fault, the test that catches it, and the substitutions that put it there
EVERYWHERE = [
    ("Z without the transpose", of_rank_3, ("X @ W.T", "X @ W")),
    ("dX with a transpose too many", of_rank_3, ("dZ @ W if", "dZ @ W.T if")),
    ("dW transposed", of_rank_3, ("dZ.T @ X\n", "X.T @ dZ\n")),
    ("dW averaged", of_rank_3, ("dZ.T @ X\n", "dZ.T @ X / max(1, X.shape[0])\n")),
    ("dW averaged", of_differences, ("dZ.T @ X\n", "dZ.T @ X / X.shape[0]\n")),
    ("db averaged", of_rank_3, (SUM, SUM.replace("if", "/ max(1, dZ.shape[0]) if"))),
    ("db averaged", of_adjoint, (SUM, SUM.replace("if", "/ dZ.shape[0] if"))),
    ("db of the first row only", of_rank_3, (SUM, "dZ[:1, :] if")),
    ("bias forgotten", of_rank_3, ("Z += b", "pass")),
    ("bias added twice", of_differences, ("Z += b", "Z += b + b")),
    ("another call's cache used", of_cache,
     ("        return linear_forward(X, self.W, self.b), {",
      "        self.last = X\n        return linear_forward(X, self.W, self.b), {"),
     ('_gradients(dZ, cache["X"], self.W, self', "_gradients(dZ, self.last, self.W, self")),
    ("N-D axes mixed up", of_rank_3, (ROWS, "xp.reshape(X, (X.shape[-1], math.prod(X.shape[:-1]))).T")),
    ("N-D features taken for rows", of_rank_3, (ROWS, "xp.reshape(X, (X.shape[0], math.prod(X.shape[1:])))")),
    ("empty batches reshaped by a guess", of_no_rows, (ROWS, "xp.reshape(X, (X.shape[0], -1))")),
    ("dtypes not compared", of_dtypes, ('    check_alike("W", W, "X", X)\n', "")),
]  # fmt: skip
THERE, RUN = "    with place.entered() as xp:\n        ", "place.run(affine"
HERE = "    with __import__('contextlib').nullcontext(place.xp) as xp:\n        "
ON_SOME = [
    ("strict-device1", "an array created on the default device", of_rank_3, (", device=device_of(W))", ")")),
    ("cupy:1", "Z computed on the current device", of_rank_3, (THERE + "Z", HERE + "Z"), (f"{RUN}, _rows(xp, X)", "affine(xp, _rows(xp, X)")),
    ("cupy:1", "gradients computed on the current device", of_rank_3, (THERE + "dX", HERE + "dX"), (f"{RUN}_gradients, _rows(xp, dZ)", "affine_gradients(xp, _rows(xp, dZ)")),
    ("numpy-readonly", "an input written to", of_inputs, ("    dW = dZ.T", "    dZ *= 1.0\n    dW = dZ.T")),
    ("torch", "db as a running sum in float16", of_float16, (SUM, "sum(dZ[i : i + 1, :] for i in range(len(dZ))) if")),
    ("cupy:0", "db as a running sum in float16", of_float16, (SUM, "sum(dZ[i : i + 1, :] for i in range(len(dZ))) if")),
]  # fmt: skip


CAUGHT = (Exception, pytest.fail.Exception)  # by a wrong number, by shapes that do not fit, by an error that is missing


@pytest.mark.parametrize(
    ("test", "changes"),
    [pytest.param(test, changes, id=f"{fault}, by {test.__name__}") for fault, test, *changes in EVERYWHERE],
)
def test_fault_is_caught_on_every_backend(backend, mutate, test, changes):
    test(backend)
    mutate(*changes)
    with pytest.raises(CAUGHT):
        test(backend)


@pytest.mark.parametrize(
    ("backend", "test", "changes"),
    [pytest.param(name, test, changes, id=f"{name}-{fault}, by {test.__name__}") for name, fault, test, *changes in ON_SOME],
    indirect=["backend"],
)
def test_fault_is_caught_where_it_shows(backend, mutate, test, changes):
    test(backend)
    mutate(*changes)
    with pytest.raises(CAUGHT):
        test(backend)
