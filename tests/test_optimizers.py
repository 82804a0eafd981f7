"""Optimizers: the rules on paper, clipping, whose arrays they write to, and going on exactly where they stopped."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle

import numpy as np
import pytest
from conftest import make_backend
from hypothesis import given
from hypothesis import strategies as st

from anyarray_linear import SGD, Adam, AdamW, Linear, ReLU, Sequential, SoftmaxCrossEntropy, lanes, restore, snapshot
from anyarray_linear.schedules import cosine

RULES = {
    "SGD": lambda **options: SGD(0.1, **options),
    "momentum": lambda **options: SGD(0.1, momentum=0.9, **options),
    "nesterov": lambda **options: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **options),
    "Adam": lambda **options: Adam(0.01, **options),
    "Adam with decay": lambda **options: Adam(0.01, weight_decay=0.1, **options),
    "AdamW": lambda **options: AdamW(0.01, weight_decay=0.1, **options),
}


def model_of(backend, dtype="float32", seed=0):
    layers = [
        Linear(i, o, init="pytorch", bias=bias, dtype=dtype, device=backend.device, seed=seed + n)
        for n, (i, o, bias) in enumerate([(3, 5, True), (5, 4, False), (4, 2, True)])
    ]
    return Sequential(layers[0], ReLU(), Sequential(layers[1], ReLU()), layers[2])


def gradients_of(backend, model, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: backend.asarray(scale * rng.standard_normal(tuple(W.shape)), str(W.dtype).rpartition(".")[2])
        for name, W in model.parameters().items()
    }


def host(backend, arrays):
    return {name: backend.to_numpy(x).copy() for name, x in arrays.items()}


def equal(x, y):
    return x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)


def by_hand(rule, W, gradients, lr=0.1):
    """The rules as their papers state them, one scalar at a time, in Python floats; `lr`, `momentum` and so on as PyTorch's."""
    M = V = 0.0
    path = []
    for t, dW in enumerate(gradients, start=1):
        if rule == "SGD":
            W -= 0.1 * dW
        elif rule == "momentum":
            V = 0.9 * V + dW
            W -= 0.1 * V
        elif rule == "nesterov":
            dW += 0.01 * W
            V = 0.9 * V + dW
            W -= 0.1 * (dW + 0.9 * V)
        else:
            if rule == "Adam with decay":
                dW += 0.1 * W
            elif rule == "AdamW":
                W -= 0.01 * 0.1 * W
            M = 0.9 * M + 0.1 * dW
            V = 0.999 * V + 0.001 * dW**2
            W -= 0.01 * (M / (1 - 0.9**t)) / (math.sqrt(V / (1 - 0.999**t)) + 1e-8)
        path.append(W)
    return path


@pytest.mark.parametrize("rule", RULES)
@given(start=st.floats(-2, 2), gradients=st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=6))
def test_each_rule_is_what_its_paper_says(backend, rule, start, gradients):
    gradients = [0.0 if abs(dW) < 1e-6 else dW for dW in gradients]  # Adam divides by them: ill-conditioned at 1e-8
    layer, optimizer = Linear.from_arrays(backend.asarray([[start]])), RULES[rule]()
    for dW, expected in zip(gradients, by_hand(rule, start, gradients), strict=True):
        optimizer.step(layer, {"W": backend.asarray([[dW]])})
        assert float(backend.to_numpy(layer.W)[0, 0]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_keeps_place_shape_and_dtype(backend, rule):
    for dtype in backend.dtypes:
        model, optimizer = model_of(backend, dtype), RULES[rule](clip_norm=1.0)
        before = model.parameters()
        for i in range(2):
            optimizer.step(model, gradients_of(backend, model, i))
        for name, W in model.parameters().items():
            assert backend.owns(W), name
            assert tuple(W.shape) == tuple(before[name].shape), name
            assert W.dtype == before[name].dtype, name
            assert np.all(np.isfinite(backend.to_numpy(W))), name


@pytest.mark.parametrize("rule", RULES)
def test_the_arrays_of_the_caller_are_never_written(backend, rule):
    rng = np.random.default_rng(0)
    mine = {"0.W": rng.standard_normal((4, 3)), "0.b": rng.standard_normal(4), "1.W": rng.standard_normal((2, 4))}
    arrays = {name: backend.asarray(x) for name, x in mine.items()}
    model = Sequential(Linear.from_arrays(arrays["0.W"], arrays["0.b"]), Linear.from_arrays(arrays["1.W"]))
    optimizer = RULES[rule](clip_norm=0.5)
    given_ = gradients_of(backend, model)
    of_given = host(backend, given_)
    for _ in range(3):
        optimizer.step(model, given_)
    assert equal(host(backend, arrays), mine), "the caller's parameters were written to"
    assert equal(host(backend, given_), of_given), "the caller's gradients were written to"
    assert not np.array_equal(backend.to_numpy(model[0].W), mine["0.W"]), "nothing was learned"

    again = {name: backend.asarray(x) for name, x in mine.items()}  # assigned in the middle of it
    model[0].W, model[1].W = again["0.W"], again["1.W"]
    optimizer.step(model, given_)
    assert np.array_equal(backend.to_numpy(again["0.W"]), mine["0.W"]), "an assigned array was written to"
    assert np.array_equal(backend.to_numpy(again["1.W"]), mine["1.W"]), "an assigned array was written to"


class HalfWay(SGD):
    """A rule that fails at its second parameter."""

    def update(self, xp, W, dW, moments, by):
        if W.shape[0] == 1:
            raise RuntimeError("on purpose")
        return super().update(xp, W, dW, moments, by)


def some_model(backend):
    model = Linear(3, 2, dtype="float32", device=backend.device, seed=0)
    return model, {name: backend.asarray(np.ones(p.shape), "float32") for name, p in model.parameters().items()}


def test_a_step_that_fails_in_the_middle_changes_nothing(backend):
    model, gradients = some_model(backend)
    before, optimizer = dict(model.parameters()), HalfWay(0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.step(model, gradients)
    assert optimizer.steps == 0
    assert all(model.parameters()[name] is p for name, p in before.items())
    assert optimizer.state_dict()["moments"] == {}
    other, gradients = some_model(backend)
    other.b = None  # it belongs to no model yet
    optimizer.step(other, {"W": gradients["W"]})


@pytest.mark.parametrize("lanes_off", [False, True])
@pytest.mark.parametrize("make", [lambda: SGD(0.1, momentum=0.9), Adam])
def test_a_wrong_where_changes_nothing(backend, make, lanes_off):
    model, gradients = some_model(backend)
    optimizer = make()
    wrong = [
        (backend.asarray([True, False]), ValueError, r"where is bool of shape \(2,\)"),
        (backend.asarray(1), ValueError, r"where is int64 of shape \(\)"),
        (True, TypeError, "where is a bool, not an array"),
        (make_backend("strict-device1" if backend.name.startswith("strict") else "strict").asarray(True), (TypeError, ValueError),
         "^where is a .* but the model is a .*Device.of"),
    ]  # fmt: skip
    with lanes.off() if lanes_off else contextlib.nullcontext():
        for steps in range(2):  # at the first step, and later
            before = {name: backend.to_numpy(p).copy() for name, p in model.parameters().items()}
            for where, error, words in wrong:
                if backend.name == "strict-device1" and error is not ValueError and where is not True:
                    continue
                with pytest.raises(error, match=words):
                    optimizer.step(model, gradients, where=where)
            assert optimizer.steps == steps
            for name, p in model.parameters().items():
                np.testing.assert_array_equal(backend.to_numpy(p), before[name])
            optimizer.step(model, gradients, where=backend.asarray(True))


@pytest.mark.parametrize("betas", [{0.9, 0.999}, {"a": 0.9, "b": 0.999}, 0.9, (0.9,), None])
def test_betas_that_are_no_two_numbers_are_refused(betas):
    with pytest.raises(ValueError, match="it must be two numbers"):
        Adam(betas=betas)


@pytest.mark.parametrize("state", [None, [], 3])
def test_a_state_that_is_no_mapping_is_refused(state):
    with pytest.raises(ValueError, match=r"^state is a .*; pass what state_dict gave"):
        SGD(0.1).load_state_dict(state)


def test_gradients_that_the_user_can_see_never_change(backend):
    model, optimizer = model_of(backend), Adam()
    X, ids = backend.asarray(np.ones((4, 3)), "float32"), backend.asarray([0, 1, 0, 1])
    kept = []
    for _ in range(3):
        Z, caches = model.forward(X)
        _, cache = SoftmaxCrossEntropy().forward(Z, ids)
        model.backward(SoftmaxCrossEntropy().backward(cache), caches)
        kept.append((model[0].dW, backend.to_numpy(model[0].dW).copy()))
        optimizer.step(model)
    assert all(np.array_equal(backend.to_numpy(x), values) for x, values in kept)


@pytest.mark.parametrize("rule", RULES)
def test_copies_and_collapsed_models_do_not_learn_with_the_original(backend, rule):
    model, optimizer = model_of(backend), RULES[rule]()
    optimizer.step(model, gradients_of(backend, model))
    twins = [model.to(), model.to(backend.device, "float32"), model.collapse(), Sequential(model[0].to())]
    if not backend.name.startswith("strict"):
        twins += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = [host(backend, twin.parameters()) for twin in twins]
    optimizer.step(model, gradients_of(backend, model, 1))
    for i, twin in enumerate(twins):
        assert equal(host(backend, twin.parameters()), before[i]), f"twin {i} changed with the original"


@pytest.mark.parametrize("rule", RULES)
def test_an_assigned_parameter_is_what_the_next_step_starts_from(backend, rule):
    model, optimizer = model_of(backend), RULES[rule]()
    for i in range(2):
        optimizer.step(model, gradients_of(backend, model, i))
    new_W = np.random.default_rng(5).standard_normal((5, 3)).astype("float32")
    model[0].W = backend.asarray(new_W)
    # an optimizer that has never seen another W, with the same moments
    fresh, other = model.to(), RULES[rule]()
    other.load_state_dict(optimizer.state_dict())
    for i in range(2, 4):
        gradients = gradients_of(backend, model, i)
        optimizer.step(model, gradients)
        other.step(fresh, gradients)
    assert equal(host(backend, model.parameters()), host(backend, fresh.parameters()))
    assert not np.array_equal(backend.to_numpy(model[0].W), new_W)


def test_parameters_that_change_places_are_kept_apart(backend):
    a, b = (Linear(3, 3, bias=False, dtype="float32", device=backend.device, seed=seed) for seed in (1, 2))
    model, optimizer = Sequential(a, b), SGD(1.0)
    zero = {name: backend.asarray(np.zeros((3, 3)), "float32") for name in ("0.W", "1.W")}
    optimizer.step(model, zero)
    W_a, W_b = backend.to_numpy(a.W).copy(), backend.to_numpy(b.W).copy()
    a.W, b.W = b.W, a.W
    optimizer.step(model, zero)
    assert np.array_equal(backend.to_numpy(a.W), W_b)
    assert np.array_equal(backend.to_numpy(b.W), W_a)


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_a_parameter_assigned_in_another_shape_or_dtype_is_never_bent_into_the_old_one(backend, rule):
    for new in (backend.asarray([[1.0, 2.0, 3.0]], "float32"), backend.asarray(np.ones((5, 3)), "float64")):
        layer = Linear(3, 5, bias=False, dtype="float32", device=backend.device, seed=0)
        optimizer = RULES[rule]()
        optimizer.step(layer, {"W": layer.W})
        layer.W = new
        dW = backend.asarray(np.ones(tuple(new.shape)), str(new.dtype).rpartition(".")[2])
        if rule == "Adam":  # its moments are of the old shape and dtype
            with pytest.raises((ValueError, TypeError), match="W"):
                optimizer.step(layer, {"W": dW})
            assert layer.W is new
            assert optimizer.steps == 1
        else:
            optimizer.step(layer, {"W": dW})
            assert layer.W.dtype == new.dtype
            assert np.allclose(backend.to_numpy(layer.W), backend.to_numpy(new) - 0.1)


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_from_before_a_parameter_got_another_shape_is_refused_and_nothing_changes(backend, rule, steps_before):
    for shape in ((1, 3), (5, 1), (5, 4), (3, 5)):  # the first two would broadcast, the last has as many elements
        layer = Linear(3, 5, bias=False, dtype="float32", device=backend.device, seed=0)
        optimizer, old = RULES[rule](), backend.asarray(np.ones((5, 3)), "float32")
        for _ in range(steps_before):
            optimizer.step(layer, {"W": old})
        layer.W = new = backend.asarray(np.ones(shape), "float32")
        before = host(backend, {name: m for own in optimizer.moments().values() for name, m in own.items()})
        with pytest.raises(ValueError, match="W"):
            optimizer.step(layer, {"W": old})
        assert layer.W is new
        assert (backend.to_numpy(new) == 1).all()
        assert optimizer.steps == steps_before
        assert equal(before, host(backend, {name: m for own in optimizer.moments().values() for name, m in own.items()}))


@pytest.mark.parametrize("which", [("0.W", "M"), ("0.W", "V"), ("3.b", "M"), ("3.b", "V")], ids=".".join)
def test_a_single_moment_that_was_replaced_is_what_the_next_step_starts_from(backend, which):
    """Replaced on one optimizer, and put into the state of another: the two go on to the same bits."""
    name, m = which
    twins = [(model_of(backend), Adam(0.01)) for _ in range(2)]
    for model, optimizer in twins:
        optimizer.step(model, gradients_of(backend, model))
    (model, optimizer), (other, other_optimizer) = twins
    value = np.full(tuple(optimizer.moments()[name][m].shape), 0.25)
    optimizer.moments()[name][m] = backend.asarray(value, "float32")
    state = other_optimizer.state_dict()
    state["moments"][name][m] = backend.asarray(value, "float32")
    other_optimizer.load_state_dict(state)
    for seed in (1, 2):
        optimizer.step(model, gradients_of(backend, model, seed))
        other_optimizer.step(other, gradients_of(backend, other, seed))
    assert equal(host(backend, model.parameters()), host(backend, other.parameters()))
    for parameter, own in optimizer.moments().items():
        assert equal(host(backend, own), host(backend, other_optimizer.moments()[parameter])), parameter


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_that_comes_or_goes_is_told_apart_from_a_mistake(backend, rule):
    layer = Linear(3, 2, bias=False, dtype="float32", device=backend.device, seed=0)
    optimizer = RULES[rule]()
    optimizer.step(layer, gradients_of(backend, layer))
    layer.b = backend.asarray([[1.0, 2.0]], "float32")
    W, steps = layer.W, optimizer.steps
    before = backend.to_numpy(W).copy()
    with pytest.raises(ValueError, match=r"\bb\b.*new optimizer"):
        optimizer.step(layer, gradients_of(backend, layer))
    assert layer.W is W
    assert np.array_equal(backend.to_numpy(W), before)
    assert optimizer.steps == steps


# ---------------------------------------------------------------------------------------------------------------------
# clipping, calling a step off, dtypes of hyper-parameters


@given(clip_norm=st.floats(0.01, 100), scale=st.sampled_from([1e-4, 1.0, 1e4]), seed=st.integers(0, 2**32))
def test_clipping_scales_all_gradients_alike_to_the_global_norm(backend, clip_norm, scale, seed):
    model = model_of(backend, "float64")
    start, gradients = host(backend, model.parameters()), gradients_of(backend, model, seed, scale)
    SGD(1.0, clip_norm=clip_norm).step(model, gradients)
    norm = math.sqrt(sum((dW**2).sum() for dW in host(backend, gradients).values()))
    factor = min(1.0, clip_norm / (norm + 1e-6))
    for name, W in host(backend, model.parameters()).items():
        step = factor * backend.to_numpy(gradients[name])
        assert np.allclose(start[name] - W, step, rtol=1e-12, atol=1e-15 * (1 + np.abs(start[name]).max())), name


def test_clipping_float16_gradients_does_not_overflow_on_the_way(backend):
    if "float16" not in backend.dtypes:
        pytest.skip("layers do not compute in float16 here")
    layer = Linear.from_arrays(backend.asarray(np.zeros((64, 64)), "float16"))
    gradients = {"W": backend.asarray(np.full((64, 64), 300.0), "float16")}  # 300^2 is beyond float16, the norm is 19,200
    SGD(1.0, clip_norm=64.0).step(layer, gradients)
    assert layer.W.dtype == gradients["W"].dtype
    assert np.allclose(backend.to_numpy(layer.W).astype("float32"), -1.0, rtol=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_called_off_on_the_device_changes_nothing_but_the_count(backend, rule):
    called_off, reference = model_of(backend), model_of(backend)
    ours, theirs = RULES[rule](clip_norm=1.0), RULES[rule](clip_norm=1.0)
    bad = {name: backend.asarray(np.full(tuple(W.shape), np.nan), "float32") for name, W in called_off.parameters().items()}
    yes, no = backend.asarray(True), backend.asarray(False)
    ours.step(called_off, bad, where=no)  # before anything else, too
    assert ours.steps == 1
    assert equal(host(backend, called_off.parameters()), host(backend, reference.parameters()))
    theirs.steps = 1
    for i in range(2):
        gradients = gradients_of(backend, reference, i)
        ours.step(called_off, gradients, where=yes)
        theirs.step(reference, gradients)
        before = host(backend, called_off.parameters())
        moments = {name: host(backend, m) for name, m in ours.state_dict()["moments"].items()}
        ours.step(called_off, bad, where=no)
        theirs.steps += 1
        assert equal(host(backend, called_off.parameters()), before)
        assert all(equal(host(backend, m), moments[name]) for name, m in ours.state_dict()["moments"].items())
        assert ours.steps == theirs.steps
    assert equal(host(backend, called_off.parameters()), host(backend, reference.parameters()))


def test_hyperparameters_given_as_NumPy_scalars_do_not_widen_float32(backend):
    f = np.float64
    for optimizer in (
        SGD(f(0.1), momentum=f(0.9), nesterov=np.True_, weight_decay=f(0.1), clip_norm=f(1.0)),
        Adam(f(0.1), betas=(f(0.9), f(0.99)), eps=f(1e-8), weight_decay=f(0.1), clip_norm=f(1.0)),
        AdamW(f(0.1), betas=np.asarray([0.9, 0.99]), weight_decay=f(0.1)),
        SGD(lambda step: f(0.1)),
        Adam(cosine(f(0.1), np.int64(10), warmup=2, final=f(0.01))),
    ):
        layer = Linear(3, 2, dtype="float32", device=backend.device, seed=0)
        for i in range(2):
            optimizer.step(layer, gradients_of(backend, layer, i))
        assert layer.W.dtype == layer.b.dtype == backend.xp.float32
        for moments in optimizer.state_dict()["moments"].values():
            assert all(moment.dtype == backend.xp.float32 for moment in moments.values())
        json.dumps(optimizer.state_dict()["hyperparameters"])  # plain Python numbers, all of them


# ---------------------------------------------------------------------------------------------------------------------
# what is refused, with nothing changed


def test_an_optimizer_belongs_to_the_first_model_it_steps(backend):
    model, other, optimizer = model_of(backend), model_of(backend), Adam()
    optimizer.step(model, gradients_of(backend, model))
    before = host(backend, other.parameters())
    for stranger in (other, model[:], model[0]):
        with pytest.raises(ValueError, match="belongs to the model it stepped first; make a new optimizer"):
            optimizer.step(stranger, gradients_of(backend, stranger))
    assert equal(host(backend, other.parameters()), before)
    assert optimizer.steps == 1
    optimizer.step(model, gradients_of(backend, model))


def test_gradients_that_do_not_fit_are_refused_and_nothing_changes(backend):
    model, optimizer = model_of(backend), Adam(clip_norm=1.0)
    good = gradients_of(backend, model)
    optimizer.step(model, good)
    arrays, before = model.parameters(), host(backend, model.parameters())
    moments = {name: host(backend, m) for name, m in optimizer.state_dict()["moments"].items()}
    foreign = np.zeros((5, 3), "float32")
    if backend.name.startswith("numpy"):
        foreign = pytest.importorskip("array_api_strict").asarray(foreign)
    cases = [
        ({**good, "3.W": backend.asarray(np.ones((4, 2)), "float32")}, ValueError, r"gradient of 3\.W has shape"),
        ({**good, "3.b": backend.asarray(np.ones(2), "float32")}, ValueError, r"gradient of 3\.b has shape"),
        ({**good, "3.W": backend.asarray(np.ones((2, 4)), "float64")}, TypeError, r"gradient of 3\.W is float64"),
        ({**good, "0.W": foreign}, TypeError, r"gradient of 0\.W is a"),
        ({**good, "3.W": [[1.0] * 4] * 2}, TypeError, r"gradient of 3\.W is a list"),
        ({name: good[name] for name in list(good)[:-1]}, ValueError, r"no gradient for 3\.b"),
        ({**good, "3.b": None}, ValueError, r"no gradient for 3\.b"),
        ({**good, "9.W": good["0.W"]}, ValueError, r"9\.W"),
        (list(good.values()), TypeError, "grads is a list"),
        (good["0.W"], TypeError, "grads is a"),
    ]
    for grads, error, words in cases:
        with pytest.raises(error, match=words):
            optimizer.step(model, grads)
        assert all(model.parameters()[name] is W for name, W in arrays.items())
        assert equal(host(backend, model.parameters()), before)
        assert optimizer.steps == 1
        assert all(equal(host(backend, m), moments[name]) for name, m in optimizer.state_dict()["moments"].items())


def test_parameters_of_two_dtypes_are_refused_by_name(backend):
    layers = [Linear(2, 2, bias=False, dtype=dtype, device=backend.device, seed=0) for dtype in ("float32", "float64")]
    model, arrays = Sequential(*layers), [layer.W for layer in layers]
    with pytest.raises(TypeError, match=r"^1\.W is float64 but 0\.W is float32"):
        SGD(0.1).step(model, model.parameters())
    assert all(layer.W is W for layer, W in zip(layers, arrays, strict=True))


def test_a_step_without_gradients_says_what_to_call(backend):
    model, optimizer = model_of(backend), SGD(0.1)
    with pytest.raises(ValueError, match=r"no gradient for 0\.W, .*call model\.backward first"):
        optimizer.step(model)
    for empty in (ReLU(), Sequential(), Sequential(ReLU())):
        with pytest.raises(ValueError, match="no parameters"):
            SGD(0.1).step(empty)


def test_stored_gradients_are_used_when_none_are_given(backend):
    model, twin = model_of(backend), model_of(backend)
    gradients = gradients_of(backend, model)
    for name, layer in model.leaves():
        for p in layer.parameters():
            setattr(layer, f"d{p}", gradients[f"{name}.{p}"])
    SGD(0.1).step(model)
    SGD(0.1).step(twin, gradients)
    assert equal(host(backend, model.parameters()), host(backend, twin.parameters()))


def test_a_shared_layer_steps_once(backend):
    shared = Linear.from_arrays(backend.asarray([[1.0]]))
    model = Sequential(shared, ReLU(), Sequential(shared))
    SGD(0.5).step(model, {"0.W": backend.asarray([[1.0]])})
    assert backend.to_numpy(shared.W)[0, 0] == 0.5
    assert model[2][0].W is shared.W


HYPER = [
    (lambda x: SGD(x), "lr"),
    (lambda x: Adam(x), "lr"),
    (lambda x: SGD(0.1, momentum=x), "momentum"),
    (lambda x: SGD(0.1, weight_decay=x), "weight_decay"),
    (lambda x: AdamW(weight_decay=x), "weight_decay"),
    (lambda x: Adam(eps=x), "eps"),
    (lambda x: Adam(betas=(x, 0.9)), r"betas\[0\]"),
    (lambda x: Adam(betas=(0.9, x)), r"betas\[1\]"),
    (lambda x: SGD(0.1, clip_norm=x), "clip_norm"),
]


@pytest.mark.parametrize(("make", "name"), HYPER, ids=[name for _, name in HYPER])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("0.1", TypeError), (True, TypeError)]
    + [(x, TypeError) for x in ([0.1], np.asarray([0.1, 0.2]), 0.1j)],
    ids=repr,
)
def test_a_hyperparameter_that_is_none_is_refused_by_name(make, name, value, error):
    with pytest.raises(error, match=f"^{name} is "):
        make(value)


def test_hyperparameters_at_the_edge_of_their_range():
    SGD(0), SGD(0.1, momentum=0), Adam(eps=0), Adam(betas=(0, 0))
    for betas in ((1.0, 0.9), (0.9, 1.0)):
        with pytest.raises(ValueError, match="betas"):
            Adam(betas=betas)
    for betas in ((0.9,), (0.9, 0.99, 0.999)):
        with pytest.raises(ValueError, match="betas"):
            Adam(betas=betas)
    with pytest.raises((TypeError, ValueError), match="betas"):
        Adam(betas=0.9)
    with pytest.raises(ValueError, match="clip_norm"):
        SGD(0.1, clip_norm=0)
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        SGD(0.1, nesterov=True)


# ---------------------------------------------------------------------------------------------------------------------
# stopping and going on


@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_state_goes_on_exactly(backend, rule):
    straight, optimizer = model_of(backend), RULES[rule](clip_norm=1.0)
    for i in range(3):
        optimizer.step(straight, gradients_of(backend, straight, i))
    state, at_three = optimizer.state_dict(), host(backend, straight.parameters())
    in_state = {name: host(backend, m) for name, m in state["moments"].items()}
    for i in range(3, 6):
        optimizer.step(straight, gradients_of(backend, straight, i))
    expected = host(backend, straight.parameters())
    assert all(equal(host(backend, m), in_state[name]) for name, m in state["moments"].items()), "the state went along"

    for _ in range(2):  # twice from the same state: loading must not tie it to the optimizer
        resumed, other = model_of(backend, seed=99), RULES[rule]()
        for name, layer in resumed.leaves():
            for p in layer.parameters():
                setattr(layer, p, backend.asarray(at_three[f"{name}.{p}"]))
        other.load_state_dict(state)
        assert other.steps == 3
        assert other.clip_norm == 1.0
        for i in range(3, 6):
            other.step(resumed, gradients_of(backend, resumed, i))
        assert equal(host(backend, resumed.parameters()), expected)
    optimizer.load_state_dict(state)  # and back into the optimizer it came from, on its own model
    for name, layer in straight.leaves():
        for p in layer.parameters():
            setattr(layer, p, backend.asarray(at_three[f"{name}.{p}"]))
    for i in range(3, 6):
        optimizer.step(straight, gradients_of(backend, straight, i))
    assert equal(host(backend, straight.parameters()), expected)


@pytest.mark.parametrize("steps_without", [0, 1])
def test_a_state_after_momentum_was_switched_off_goes_on_exactly(backend, steps_without):
    model, optimizer = model_of(backend), SGD(0.1, momentum=0.9)
    optimizer.step(model, gradients_of(backend, model))
    optimizer.momentum = 0.0
    for seed in range(steps_without):
        optimizer.step(model, gradients_of(backend, model, seed))
    other, other_optimizer = model_of(backend), SGD(0.1)
    restore(other, snapshot(model))
    other_optimizer.load_state_dict(optimizer.state_dict())
    for each, its in ((model, optimizer), (other, other_optimizer)):
        its.step(each, gradients_of(backend, model, 7))
    assert equal(host(backend, model.parameters()), host(backend, other.parameters()))
    assert other_optimizer.steps == optimizer.steps


@pytest.mark.parametrize("rule", ["nesterov", "AdamW"])
def test_a_state_from_the_host_goes_on_on_another_backend(backend, rule):
    class Host:  # what `model_of` and `gradients_of` need of a backend
        device, to_numpy, asarray = "cpu", np.asarray, lambda x, dtype=None: np.array(x, dtype=dtype)

    on_host, optimizer = model_of(Host, "float64"), RULES[rule]()
    for i in range(2):
        optimizer.step(on_host, gradients_of(Host, on_host, i))
    moved, other = on_host.to(backend.device), RULES[rule]()
    other.load_state_dict(optimizer.state_dict())
    for i in range(2, 4):
        optimizer.step(on_host, gradients_of(Host, on_host, i))
        other.step(moved, gradients_of(backend, moved, i))
    for name, W in moved.parameters().items():
        assert backend.owns(W), name
        assert np.allclose(backend.to_numpy(W), on_host.parameters()[name], rtol=1e-13, atol=1e-14), name
    for moments in other.state_dict()["moments"].values():
        assert all(backend.owns(moment) for moment in moments.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_a_copied_pair_of_model_and_optimizer_goes_on_alone_on_its_device(backend, copied, rule):
    if backend.name.startswith("strict"):
        pytest.skip("array-api-strict's arrays can be neither copied nor pickled")
    model, optimizer = model_of(backend), RULES[rule]()
    optimizer.step(model, gradients_of(backend, model))
    twin, other = copied((model, optimizer))
    before = host(backend, twin.parameters())
    optimizer.step(model, gradients_of(backend, model, 1))
    assert equal(host(backend, twin.parameters()), before)
    other.step(twin, gradients_of(backend, twin, 1))
    assert all(backend.owns(W) for W in twin.parameters().values())
    assert equal(host(backend, twin.parameters()), host(backend, model.parameters()))


def test_a_schedule_is_code_and_stays_when_a_state_is_loaded(backend):
    model = model_of(backend)
    scheduled = SGD(lambda step: 0.5**step, momentum=0.9)
    scheduled.step(model, gradients_of(backend, model))
    assert "lr" not in scheduled.state_dict()["hyperparameters"]
    other = SGD(lambda step: 0.25**step, momentum=0.1)
    other.load_state_dict(scheduled.state_dict())
    assert other.learning_rate() == 0.25
    assert other.momentum == 0.9
    constant = SGD(0.125, momentum=0.9)
    other.load_state_dict({**constant.state_dict(), "steps": 3, "moments": scheduled.state_dict()["moments"]})
    assert other.learning_rate() == 0.25**3
    later = constant.state_dict()
    later["hyperparameters"]["of_a_later_version"] = 1
    other.load_state_dict(later)
    assert not hasattr(other, "of_a_later_version")


def test_after_loading_an_optimizer_may_take_up_another_model_in_another_dtype(backend):
    model, optimizer = model_of(backend, "float64"), Adam()
    for i in range(2):
        optimizer.step(model, gradients_of(backend, model, i))
    optimizer.load_state_dict(optimizer.state_dict())
    other = model.to(dtype="float32")
    gradients = gradients_of(backend, other, 2)
    optimizer.step(other, gradients)
    assert all(W.dtype == backend.xp.float32 for W in other.parameters().values())
    for moments in optimizer.state_dict()["moments"].values():
        assert all(moment.dtype == backend.xp.float32 for moment in moments.values())

    reference = Adam()
    reference.load_state_dict({**optimizer.state_dict(), "steps": 0, "moments": {}})
    twin = model_of(backend, "float64")
    for i in range(2):
        reference.step(twin, gradients_of(backend, twin, i))
    reference.step(twin, {name: backend.asarray(backend.to_numpy(dW), "float64") for name, dW in gradients.items()})
    for name, W in other.parameters().items():
        assert np.allclose(backend.to_numpy(W), backend.to_numpy(twin.parameters()[name]), rtol=1e-5, atol=1e-6), name


def test_a_state_that_is_none_is_refused_and_nothing_changes(backend):
    layer = Linear(2, 2, dtype="float32", device=backend.device, seed=0)
    optimizer = Adam(0.5)
    optimizer.step(layer, gradients_of(backend, layer))
    good = optimizer.state_dict()
    wrong = [
        {},
        None,
        [],
        SGD(0.1).state_dict(),
        AdamW().state_dict(),
        {name: value for name, value in good.items() if name != "moments"},
        {**good, "steps": -1},
        {**good, "steps": 1.5},
        {**good, "steps": None},
        {**good, "moments": {"W": {"M": layer.W}, "b": good["moments"]["b"]}},
        {**good, "moments": {"W": {**good["moments"]["W"], "X": layer.W}, "b": good["moments"]["b"]}},
    ]
    other = Adam(0.25)
    for state in wrong:
        with pytest.raises(ValueError, match=r"^state "):
            other.load_state_dict(state)
        assert other.steps == 0
        assert other.lr == 0.25
        assert other.state_dict()["moments"] == {}


def test_a_state_of_another_model_is_refused_at_the_first_step(backend):
    layer = Linear(2, 3, dtype="float32", device=backend.device, seed=0)
    optimizer = Adam()
    optimizer.step(layer, gradients_of(backend, layer))
    for stranger, words in (
        (Linear(2, 4, dtype="float32", device=backend.device), "loaded M of W has shape"),
        (Linear(2, 3, bias=False, dtype="float32", device=backend.device), "loaded state is for W, b, but the model has W"),
        (model_of(backend), "loaded state is for W, b"),
    ):
        other = Adam()
        other.load_state_dict(optimizer.state_dict())
        before = host(backend, stranger.parameters())
        with pytest.raises(ValueError, match=words):
            other.step(stranger, gradients_of(backend, stranger))
        assert equal(host(backend, stranger.parameters()), before)
        assert other.steps == 1


def test_an_optimizer_says_what_it_is():
    assert repr(SGD(0.1)) == "SGD(lr=0.1, weight_decay=0.0, clip_norm=None, momentum=0.0, nesterov=False)"
    assert repr(SGD(lambda step: 0.1)).startswith("SGD(lr=<schedule>, ")
