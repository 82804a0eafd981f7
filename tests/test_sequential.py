"""The container: composition, names, sharing at any depth, and what it promises not to touch."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyarray_linear import Layer, Linear, ReLU, Sequential, Tanh
from anyarray_linear.testing import gamma, unit_roundoff


def linear(backend, in_features, out_features, seed, *, bias=True, dtype="float32"):
    """A layer of small integers, so that sums and products of them are exact in any order."""
    rng = np.random.default_rng(seed)
    W, b = rng.integers(-3, 4, (out_features, in_features)), rng.integers(-3, 4, (1, out_features))
    return Linear.from_arrays(backend.asarray(W, dtype), backend.asarray(b, dtype) if bias else None)


def integers(backend, *shape, seed=0, dtype="float32"):
    return backend.asarray(np.random.default_rng(seed).integers(-3, 4, shape), dtype)


def same(backend, x, y):
    return np.array_equal(backend.to_numpy(x), backend.to_numpy(y))


def small(backend):
    """A model of three layers, an X and a dZ."""
    model = Sequential(linear(backend, 3, 4, 1), ReLU(), linear(backend, 4, 2, 2))
    return model, integers(backend, 5, 3, seed=3), integers(backend, 5, 2, seed=4)


class Scale:
    """A layer that a user might write: no base class of ours, a parameter `s` and its gradient `ds`."""

    def __init__(self, s):
        self.s, self.ds = s, None

    def forward(self, X):
        return X * self.s, X

    def gradients(self, dZ, cache, *, needs_dX=True):
        return (dZ * self.s if needs_dX else None), {"s": (dZ * cache).sum(axis=0, keepdims=True)}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        dX, gradients = self.gradients(dZ, cache, needs_dX=needs_dX)
        self.ds = gradients["s"] + self.ds if accumulate and self.ds is not None else gradients["s"]
        return dX

    def parameters(self):
        return {"s": self.s}

    def to(self, device=None, dtype=None):
        return Scale(self.s if dtype is None else self.s.astype(dtype))

    def __call__(self, X):
        return self.forward(X)[0]


class Residual:
    """A container that a user might write: `X + inner(X)`, known by its `leaves`."""

    def __init__(self, inner):
        self.inner = inner

    def leaves(self):
        return [(f"inner.{name}", leaf) for name, leaf in self.inner.leaves()]

    def forward(self, X):
        Z, cache = self.inner.forward(X)
        return X + Z, cache

    def gradients(self, dZ, cache, *, needs_dX=True):
        dX, gradients = self.inner.gradients(dZ, cache, needs_dX=needs_dX)
        return (dX + dZ if needs_dX else None), {f"inner.{name}": gradient for name, gradient in gradients.items()}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        raise NotImplementedError

    def parameters(self):
        return {f"inner.{name}": value for name, value in self.inner.parameters().items()}

    def to(self, device=None, dtype=None):
        return Residual(self.inner.to(device, dtype))

    def __call__(self, X):
        return self.forward(X)[0]


def test_a_layer_that_leaves_out_a_gradient_is_told_and_nothing_is_stored(backend):
    class Forgetful(Linear):
        def gradients(self, dZ, cache, *, needs_dX=True):
            dX, gradients = super().gradients(dZ, cache, needs_dX=needs_dX)
            return dX, {"b": gradients["b"]}

    place = {"dtype": "float32", "device": backend.device, "seed": 0}
    model = Sequential(Linear(3, 4, **place), Forgetful(4, 2, **place))
    Z, caches = model.forward(backend.asarray(np.ones((5, 3)), "float32"))
    with pytest.raises(ValueError, match=r"gradients has no 1\.W, only 0\.W, 0\.b, 1\.b"):
        model.backward(Z, caches)
    assert model[0].dW is None


def test_it_is_the_composition_of_its_layers_forth_and_back(backend):
    model, X, dZ = small(backend)
    first, relu, second = model
    Z, caches = model.forward(X)
    H, cache_0 = first.forward(X)
    A, cache_1 = relu.forward(H)
    expected, cache_2 = second.forward(A)
    assert isinstance(caches, list)
    assert len(caches) == 3
    assert caches[0]["X"] is X
    assert same(backend, Z, expected)
    assert same(backend, model(X), expected)

    dX, gradients = model.gradients(dZ, caches)
    dA, of_second = second.gradients(dZ, cache_2)
    dH, _ = relu.gradients(dA, cache_1)
    expected_dX, of_first = first.gradients(dH, cache_0)
    assert same(backend, dX, expected_dX)
    assert list(gradients) == list(model.parameters()) == ["0.W", "0.b", "2.W", "2.b"]
    for name, expected in (("0.W", of_first["W"]), ("0.b", of_first["b"]), ("2.W", of_second["W"]), ("2.b", of_second["b"])):
        assert same(backend, gradients[name], expected), name
        assert backend.owns(gradients[name]), name


def test_gradients_store_nothing_and_backward_stores_on_the_layers(backend):
    model, X, dZ = small(backend)
    _, caches = model.forward(X)
    dX, gradients = model.gradients(dZ, caches)
    assert all(getattr(model[i], name) is None for i in (0, 2) for name in ("dW", "db"))
    assert same(backend, model.backward(dZ, caches), dX)
    assert same(backend, model[0].dW, gradients["0.W"])
    assert same(backend, model[2].db, gradients["2.b"])
    stored = model[2].dW
    model.backward(dZ, caches, accumulate=True)
    assert np.array_equal(backend.to_numpy(model[2].dW), 2 * backend.to_numpy(gradients["2.W"]))
    assert same(backend, stored, gradients["2.W"]), "the old gradient changed under its holder"
    model.backward(dZ, caches)
    assert same(backend, model[0].dW, gradients["0.W"]), "backward must replace"


def test_a_shared_layer_has_the_summed_gradient_under_its_first_position(backend):
    shared, other = linear(backend, 3, 3, 1), linear(backend, 3, 3, 2)
    model = Sequential(shared, Tanh(), other, shared, shared)
    apart = Sequential(*(layer.to() for layer in model))  # equal layers, each an object of its own
    apart.layers[3].W, apart.layers[4].W = model[0].W, model[0].W
    X, dZ = integers(backend, 4, 3, seed=5), integers(backend, 4, 3, seed=6)
    Z, caches = model.forward(X)
    dX, gradients = model.gradients(dZ, caches)
    Z_apart, caches_apart = apart.forward(X)
    dX_apart, each = apart.gradients(dZ, caches_apart)
    assert same(backend, Z, Z_apart)
    assert same(backend, dX, dX_apart)
    assert list(gradients) == list(model.parameters()) == ["0.W", "0.b", "2.W", "2.b"]
    assert [name for name, _ in model.leaves()] == ["0", "1", "2"]
    for p in ("W", "b"):
        terms = [backend.to_numpy(each[f"{i}.{p}"]).astype(np.float64) for i in (0, 3, 4)]
        rounding = 3 * 2.0**-24 * sum(map(np.abs, terms))
        assert np.all(np.abs(backend.to_numpy(gradients[f"0.{p}"]) - sum(terms)) <= rounding)
        assert same(backend, gradients[f"2.{p}"], each[f"2.{p}"])
    model.backward(dZ, caches)
    assert same(backend, shared.dW, gradients["0.W"])
    model.backward(dZ, caches, accumulate=True)
    assert np.allclose(backend.to_numpy(shared.dW), 2 * backend.to_numpy(gradients["0.W"]), rtol=1e-6)


def test_sharing_is_seen_at_any_depth(backend):
    a, b = linear(backend, 2, 2, 1), linear(backend, 2, 2, 2, bias=False)
    block = Sequential(b, a)
    model = Sequential(block, Sequential(Sequential(a), ReLU(), block), b)
    assert model.leaves() == [("0.0", b), ("0.1", a), ("1.1", model[1][1])]
    assert list(model.parameters()) == ["0.0.W", "0.1.W", "0.1.b"]
    X, dZ = integers(backend, 3, 2, seed=3), integers(backend, 3, 2, seed=4)

    Z, caches = model.forward(X)
    dX, gradients = model.gradients(dZ, caches)

    flat = [b, a, a, ReLU(), b, a, b]  # the same, written out
    H, flat_caches = X, []
    for layer in flat:
        H, cache = layer.forward(H)
        flat_caches.append(cache)
    assert same(backend, Z, H)
    total, dH = {"0.0.W": 0, "0.1.W": 0, "0.1.b": 0}, dZ
    for layer, cache in zip(reversed(flat), reversed(flat_caches), strict=True):
        dH, own = layer.gradients(dH, cache)
        for p, gradient in own.items():
            total["0.0." * (layer is b) + "0.1." * (layer is a) + p] += backend.to_numpy(gradient)
    assert same(backend, dX, dH)
    assert list(gradients) == list(total)
    for name, expected in total.items():  # integers: exact
        assert np.array_equal(backend.to_numpy(gradients[name]), expected), name
    model.backward(dZ, caches)
    assert np.array_equal(backend.to_numpy(a.dW), total["0.1.W"])
    assert np.array_equal(backend.to_numpy(b.dW), total["0.0.W"])


def test_names_of_nested_layers_are_joined_by_dots(backend):
    model = Sequential(ReLU(), Sequential(linear(backend, 3, 4, 1), Sequential(linear(backend, 4, 2, 2, bias=False))))
    assert list(model.parameters()) == ["1.0.W", "1.0.b", "1.1.0.W"]
    assert [name for name, _ in model.leaves()] == ["0", "1.0", "1.1.0"]
    Z, caches = model.forward(integers(backend, 5, 3))
    assert list(model.gradients(Z, caches)[1]) == ["1.0.W", "1.0.b", "1.1.0.W"]
    assert model.parameters()["1.1.0.W"] is model[1][1][0].W


class NoBackward(ReLU):
    """A layer that must not be asked for gradients."""

    def gradients(self, dZ, cache, *, needs_dX=True):
        raise AssertionError("nobody needs the gradient of this layer")


def test_without_needs_dX_nothing_is_done_below_the_first_layer_with_parameters(backend):
    asked = []

    class Spy(Linear):
        def gradients(self, dZ, cache, *, needs_dX=True):
            asked.append(needs_dX)
            return super().gradients(dZ, cache, needs_dX=needs_dX)

    first = Spy.from_arrays(*linear(backend, 3, 4, 1).parameters().values())
    model = Sequential(NoBackward(), Sequential(NoBackward(), first), ReLU(), linear(backend, 4, 2, 2))
    X, dZ = integers(backend, 5, 3, seed=3), integers(backend, 5, 2, seed=4)
    _, caches = model.forward(X)
    dX, gradients = model.gradients(dZ, caches, needs_dX=False)
    assert dX is None
    assert asked == [False]
    assert list(gradients) == list(model.parameters())
    plain = Sequential(ReLU(), Sequential(ReLU(), first), ReLU(), model[3])
    _, expected = plain.gradients(dZ, caches)
    assert asked == [False, True]
    assert all(same(backend, gradients[f"{name}"], expected[name]) for name in expected)
    assert model.backward(dZ, caches, needs_dX=False) is None
    assert same(backend, first.dW, expected["1.1.W"])


def test_without_needs_dX_a_shared_first_layer_still_gets_the_gradients_of_all_positions(backend):
    shared = linear(backend, 3, 3, 1)
    model = Sequential(shared, ReLU(), shared)
    X, dZ = integers(backend, 5, 3, seed=3), integers(backend, 5, 3, seed=4)
    _, caches = model.forward(X)
    lean, full = model.gradients(dZ, caches, needs_dX=False)[1], model.gradients(dZ, caches)[1]
    assert lean.keys() == full.keys() == {"0.W", "0.b"}
    assert same(backend, lean["0.W"], full["0.W"])
    assert same(backend, lean["0.b"], full["0.b"])


def test_a_model_without_parameters_or_layers_works(backend):
    X = integers(backend, 2, 3)
    for model in (Sequential(), Sequential(ReLU()), Sequential(Sequential(), ReLU())):
        Z, caches = model.forward(X)
        assert model.parameters() == {}
        dX, gradients = model.gradients(Z, caches)
        assert gradients == {}
        assert tuple(dX.shape) == (2, 3)
        assert model.backward(Z, caches, needs_dX=False) is None
        assert len(model.collapse()) == len(model.leaves())


def test_a_mistake_in_the_middle_stores_nothing_anywhere(backend):
    model, X, dZ = small(backend)
    _, caches = model.forward(X)
    model.backward(dZ, caches)
    before = [(layer, dict(vars(layer))) for layer in (model[0], model[2])]
    _, of_other_batch = model.forward(integers(backend, 7, 3))
    for wrong_dZ, wrong_caches in (
        (integers(backend, 5, 3), caches),
        (integers(backend, 5, 2, dtype="float64"), caches),
        (dZ, [of_other_batch[0], *caches[1:]]),
        (dZ, [{}, *caches[1:]]),
    ):
        with pytest.raises((ValueError, TypeError)):
            model.backward(wrong_dZ, wrong_caches, accumulate=True)
        for layer, attributes in before:
            assert all(attributes[name] is value for name, value in vars(layer).items())


def test_caches_of_another_model_are_refused(backend):
    model, X, dZ = small(backend)
    _, caches = model.forward(X)
    for wrong, words in ((caches[:2], "caches is 2 for 3 layers"), ([], "caches is 0"), ({"X": X}, "dict"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"^{words}|^caches is {words}.*second result of"):
            model.gradients(dZ, wrong)
        with pytest.raises(ValueError, match="second result of this model's forward"):
            model.backward(dZ, wrong)
    assert model[0].dW is None


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (([ReLU()],), "layer 0 is a list"),
        ((ReLU(), None), "layer 1 is a NoneType"),
        ((ReLU(), Linear), "layer 1 is the class Linear"),
        ((ReLU(), len), "layer 1 is a builtin_function_or_method"),
        ((np.ones(3),), "layer 0 is a numpy array on cpu"),
        ((np.random.default_rng(0),), "layer 0 is a numpy Generator"),  # whose it is: torch has a Linear too
    ],
)
def test_what_is_no_layer_is_refused_by_position(layers, words):
    with pytest.raises(TypeError, match=f"^{words}, not a layer"):
        Sequential(*layers)


def test_indexing_slicing_and_iterating(backend):
    model, X, _ = small(backend)
    a, relu, b = model
    assert isinstance(model, Layer)
    assert len(model) == 3
    assert model[0] is a
    assert model[-1] is b
    assert isinstance(model[:2], Sequential)
    assert list(model[:2]) == [a, relu]
    assert list(model[::-1]) == [b, relu, a]
    assert len(model[3:]) == 0
    assert same(backend, model[2:](model[:2](X)), model(X))
    with pytest.raises(IndexError):
        model[3]
    assert repr(model) == f"Sequential({a!r}, ReLU(), {b!r})"


@pytest.mark.parametrize("moved", ["to", "deepcopy", "pickle"])
def test_what_is_shared_stays_shared_where_it_goes(backend, moved):
    if moved != "to" and backend.name.startswith("strict"):
        pytest.skip("array-api-strict's arrays can be neither copied nor pickled")
    shared = linear(backend, 3, 3, 1)
    model = Sequential(shared, ReLU(), Sequential(shared, ReLU()))
    twin = {
        "to": lambda: model.to(backend.device, "float32"),
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
    }[moved]()
    assert twin[0] is twin[2][0]
    assert twin[0] is not shared
    assert backend.owns(twin[0].W)
    assert list(twin.parameters()) == list(model.parameters())
    X = integers(backend, 4, 3)
    assert same(backend, twin(X), model(X))
    assert model.to(dtype="float64")[2][0].W.dtype == backend.xp.float64
    assert shared.W.dtype == backend.xp.float32


def test_layers_and_containers_of_a_user_fit_in():
    shared = Linear(3, 3, seed=1)
    model = Sequential(Scale(np.ones((1, 3))), Residual(Sequential(shared, Tanh())), shared, Scale(np.full((1, 3), 2.0)))
    assert list(model.parameters()) == ["0.s", "1.inner.0.W", "1.inner.0.b", "3.s"]
    X = np.random.default_rng(0).standard_normal((4, 3))
    _, caches = model.forward(X)
    dX, gradients = model.gradients(np.ones((4, 3)), caches)
    assert list(gradients) == list(model.parameters())
    # the sum of outputs, moved along one direction in all parameters and X at once, by a central difference
    rng, h = np.random.default_rng(1), 1e-6
    directions = {name: rng.standard_normal(value.shape) for name, value in model.parameters().items()}
    V = rng.standard_normal(X.shape)

    def loss(step):
        values = {name: value + step * directions[name] for name, value in model.parameters().items()}
        moved = Linear.from_arrays(values["1.inner.0.W"], values["1.inner.0.b"])
        rebuilt = Sequential(Scale(values["0.s"]), Residual(Sequential(moved, Tanh())), moved, Scale(values["3.s"]))
        return rebuilt(X + step * V).sum()

    slope = sum((gradients[name] * directions[name]).sum() for name in gradients) + (dX * V).sum()
    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(slope, rel=1e-7)
    model.backward(np.ones((4, 3)), caches)
    assert np.array_equal(model[0].ds, gradients["0.s"])
    assert np.array_equal(shared.dW, gradients["1.inner.0.W"])


class Shift(Scale):
    """`Z = X + s`, `ds = dZ` itself: nothing that this layer hands out is its own to write to."""

    def forward(self, X):
        return X + self.s, X

    def gradients(self, dZ, cache, *, needs_dX=True):
        return dZ, {"s": dZ}


def test_summing_writes_to_no_gradient_that_a_layer_handed_out():
    shared = Shift(np.ones((2, 3)))
    model = Sequential(shared, shared, shared)
    dZ = np.full((2, 3), 5.0)
    _, caches = model.forward(np.zeros((2, 3)))
    dX, gradients = model.gradients(dZ, caches)
    assert np.all(gradients["0.s"] == 15)
    assert np.all(dX == 5)
    assert np.all(dZ == 5), "the caller's dZ was written to"


# ---------------------------------------------------------------------------------------------------------------------
# a stack of linear layers is one linear layer


@given(
    sizes=st.lists(st.sampled_from([1, 2, 5]), min_size=2, max_size=5),
    biases=st.lists(st.booleans(), min_size=4, max_size=4),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32),
)
def test_a_stack_of_linear_layers_is_one_linear_layer_to_rounding(backend, sizes, biases, dtype, seed):
    rng = np.random.default_rng(seed)
    parameters = [
        (rng.standard_normal((o, i)).astype(dtype), rng.standard_normal((1, o)).astype(dtype) if has_bias else None)
        for i, o, has_bias in zip(sizes, sizes[1:], biases, strict=False)
    ]
    x = rng.standard_normal((3, sizes[0])).astype(dtype)
    layers = [
        Linear.from_arrays(backend.asarray(W), None if b is None else backend.asarray(b)) for W, b in parameters
    ]
    model = Sequential(*layers)
    one = model.collapse()
    assert len(one) == 1
    assert type(one[0]) is Linear
    assert (one[0].in_features, one[0].out_features) == (sizes[0], sizes[-1])
    assert (one[0].b is None) == all(b is None for _, b in parameters)

    X = backend.asarray(x)
    Z, S = x.astype(np.longdouble), np.abs(x).astype(np.longdouble)
    for W, b in parameters:
        Z, S = Z @ W.T.astype(np.longdouble), S @ np.abs(W.T).astype(np.longdouble)
        if b is not None:
            Z, S = Z + b, S + np.abs(b)
    # in either order of the products, each term meets at most in + 1 roundings per layer (Higham 2002, section 3.5)
    bound = gamma(sum(size + 1 for size in sizes[:-1]), unit_roundoff(dtype)) * S
    for stack in (model, one):
        assert np.all(np.abs(backend.to_numpy(stack(X)) - Z) <= bound)


def test_collapse_stops_at_activations_opens_containers_and_leaves_the_model_alone(backend):
    a, b, c, d, e = (linear(backend, 3, 3, seed) for seed in range(5))
    relu = ReLU()
    model = Sequential(Sequential(a, b), c, relu, Sequential(d), Tanh(), Sequential(Tanh(), e))
    X = integers(backend, 4, 3)
    before = [(layer, dict(vars(layer))) for layer in (a, b, c, d, e)]
    expected = backend.to_numpy(model(X)).copy()
    short = model.collapse()
    assert [type(layer) for layer in short] == [Linear, ReLU, Linear, Tanh, Tanh, Linear]
    assert np.allclose(backend.to_numpy(short(X)), expected, rtol=1e-5, atol=1e-6)
    assert len(model) == 6
    for layer, attributes in before:
        assert all(attributes[name] is value for name, value in vars(layer).items())
    assert short[2] is not d
    assert short[5] is not e


def test_collapse_keeps_sharing_where_nothing_was_merged(backend):
    shared = linear(backend, 3, 3, 1)
    short = Sequential(shared, ReLU(), shared, ReLU(), shared, shared).collapse()
    assert short[0] is short[2]
    assert short[0] is not shared
    assert short[4] is not short[0]
    assert len(short) == 5
    X = integers(backend, 2, 3)
    assert same(backend, short(X), Sequential(shared, ReLU(), shared, ReLU(), shared, shared)(X))  # integers: exact


def test_collapse_does_not_merge_what_only_derives_from_linear():
    class Gated(Linear):
        def __call__(self, X):
            return super().__call__(X) * 2

    model = Sequential(Linear(2, 2, seed=0), Gated(2, 2, seed=1), Linear(2, 2, seed=2))
    assert len(model.collapse()) == 3
    X = np.ones((1, 2))
    assert np.allclose(model.collapse()(X), model(X), rtol=1e-14)


def test_collapse_refuses_layers_of_two_dtypes(backend):
    with pytest.raises(TypeError, match=r"second layer's W is float64 .*first layer's W is float32"):
        Sequential(linear(backend, 3, 3, 1), linear(backend, 3, 3, 2, dtype="float64")).collapse()
