"""Initial weights: their distribution by sampling theory, and that seeds mean what they say on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anyarray_linear import Linear
from anyarray_linear.initializers import INITIALIZERS

SHAPE = (300, 500)  # (out_features, in_features): unequal, so that fan-in, fan-out and their mean are told apart
OUT, IN = SHAPE
N = OUT * IN

VARIANCE = {  # from the papers that initializers.py names
    "he_normal": 2 / IN,
    "he_uniform": 2 / IN,
    "xavier_normal": 2 / (IN + OUT),
    "xavier_uniform": 2 / (IN + OUT),
    "lecun_normal": 1 / IN,
    "pytorch": 1 / (3 * IN),
}
UNIFORM = ("he_uniform", "xavier_uniform", "pytorch")


@pytest.mark.parametrize("init", VARIANCE)
def test_weights_have_the_mean_and_variance_of_their_distribution(init):
    W = Linear(IN, OUT, init=init, seed=0).W
    variance = VARIANCE[init]
    # over N draws the mean has the variance s^2/N, and the variance estimate (kurtosis - 1) s^4/N;
    # 5 standard deviations are exceeded once in 1.7 million seeds
    kurtosis = 9 / 5 if init in UNIFORM else 3
    assert abs(W.mean()) <= 5 * math.sqrt(variance / N)
    assert abs(W.var() - variance) <= 5 * variance * math.sqrt((kurtosis - 1) / N)


@pytest.mark.parametrize("init", VARIANCE)
def test_weights_have_the_shape_of_their_distribution(init):
    W = np.sort(Linear(IN, OUT, init=init, seed=1).W, axis=None) / math.sqrt(VARIANCE[init])
    if init in UNIFORM:
        bound = math.sqrt(3)
        assert -bound <= W[0]
        assert W[-1] <= bound
        cdf = (W / bound + 1) / 2
    else:
        cdf = np.asarray([math.erfc(-w / math.sqrt(2)) / 2 for w in W])
    # Dvoretzky, Kiefer and Wolfowitz, with Massart's constant: P(sup |F_N - F| > d) <= 2 exp(-2 N d^2), here 1e-6
    distance = np.abs(cdf - (np.arange(N) + 0.5) / N).max() + 0.5 / N
    assert distance <= math.sqrt(math.log(2 / 1e-6) / (2 * N))


def test_an_init_that_is_not_real_is_refused():
    for dtype in (complex, str, object):
        with pytest.raises(TypeError, match=r"init returned an array of .*; weights are real numbers"):
            Linear(2, 3, init=lambda rng, shape, dtype=dtype: np.ones(shape).astype(dtype))


def test_the_uniform_bound_of_pytorch_is_one_over_the_root_of_in_features_for_the_bias_too():
    layer = Linear(20, 100_000, init="pytorch", seed=0)
    bound = 1 / math.sqrt(20)
    for x, n in ((layer.W, 2_000_000), (layer.b, 100_000)):
        assert np.abs(x).max() <= bound
        # the largest of n draws falls below bound (1 - 20/n) with probability (1 - 20/n)^n < e^-20
        assert np.abs(x).max() >= bound * (1 - 20 / n)
        assert x.min() < 0 < x.max()


@pytest.mark.parametrize("init", INITIALIZERS)
def test_the_bias_starts_at_zero_except_pytorchs(init):
    layer = Linear(3, 4, init=init, seed=0)
    assert layer.b.shape == (1, 4)
    assert np.any(layer.b) == (init == "pytorch")
    assert np.any(layer.W) == (init != "zeros")


def test_he_normal_is_the_default():
    assert np.array_equal(Linear(3, 4, seed=0).W, Linear(3, 4, init="he_normal", seed=0).W)


def weights(**options):
    layer = Linear(3, 4, **options)
    return np.concatenate([layer.W.ravel(), layer.b.ravel()])


@pytest.mark.parametrize("init", ["he_normal", "pytorch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_seed_gives_the_same_bits_on_every_backend(backend, init, dtype):
    layer = Linear(5, 7, init=init, dtype=dtype, device=backend.device, seed=42)
    # drawn in float64 and then cast: what NumPy itself draws from children 0 and 1 of the seed
    for_W, for_b = (np.random.default_rng(child) for child in np.random.SeedSequence(42).spawn(2))
    bound = 1 / math.sqrt(5)
    W = for_W.standard_normal((7, 5)) * math.sqrt(2 / 5) if init == "he_normal" else for_W.uniform(-bound, bound, (7, 5))
    b = np.zeros((1, 7)) if init == "he_normal" else for_b.uniform(-bound, bound, (1, 7))
    if init == "he_normal":
        assert np.array_equal(backend.to_numpy(layer.W), W.astype(dtype))
    else:  # a bound is one rounding away from another way to write it
        assert np.allclose(backend.to_numpy(layer.W), W, rtol=4 * np.finfo(dtype).eps, atol=0)
    assert np.allclose(backend.to_numpy(layer.b), b, rtol=4 * np.finfo(dtype).eps, atol=0)
    on_host = Linear(5, 7, init=init, dtype="float64", seed=42)
    assert backend.to_numpy(layer.W).tobytes() == on_host.W.astype(dtype).tobytes()
    assert backend.to_numpy(layer.b).tobytes() == on_host.b.astype(dtype).tobytes()


def test_an_int_used_twice_gives_equal_weights():
    assert np.array_equal(weights(seed=5), weights(seed=5))
    assert np.array_equal(weights(seed=5), weights(seed=np.int64(5)))
    assert not np.array_equal(weights(seed=5), weights(seed=6))
    assert np.array_equal(weights(seed=0), weights(seed=0))


def test_no_seed_gives_new_weights_each_time():
    assert not np.array_equal(weights(), weights())


@pytest.mark.parametrize("source", [np.random.default_rng, np.random.SeedSequence])
def test_a_generator_or_seed_sequence_gives_each_layer_its_own_child_in_order(source):
    def three(sizes=(4, 4, 4), inits=("he_normal",) * 3, biases=(True,) * 3):
        seed = source(7)
        return [
            Linear(3, size, init=init, bias=bias, seed=seed) for size, init, bias in zip(sizes, inits, biases, strict=True)
        ]

    first, second, third = three()
    assert not np.array_equal(first.W, second.W)
    assert not np.array_equal(second.W, third.W)
    for again in (
        three(sizes=(9, 4, 4)),
        three(inits=("pytorch", "he_normal", "he_normal")),
        three(biases=(False, True, True)),
        three(inits=(lambda rng, shape: rng.uniform(size=shape), "he_normal", "he_normal")),
    ):
        assert np.array_equal(again[1].W, second.W), "another layer's weights shifted"
        assert np.array_equal(again[2].W, third.W), "another layer's weights shifted"


def test_a_generator_and_the_seed_sequence_behind_it_hand_out_the_same_children():
    assert np.array_equal(weights(seed=np.random.default_rng(7)), weights(seed=np.random.SeedSequence(7)))


def test_drawing_weights_takes_no_numbers_from_a_generator():
    rng, untouched = np.random.default_rng(7), np.random.default_rng(7)
    Linear(3, 4, seed=rng)
    assert rng.random() == untouched.random()


def test_W_and_b_have_a_stream_each():
    with_bias, without = Linear(3, 4, init="pytorch", seed=3), Linear(3, 4, init="pytorch", bias=False, seed=3)
    assert np.array_equal(with_bias.W, without.W)
    assert not np.array_equal(with_bias.W[0, :3], with_bias.b[0, :3]), "W and b are drawn from one stream"
    assert np.array_equal(with_bias.b, Linear(3, 4, init="pytorch", seed=3).b)
    # the bias does not depend on how many numbers W took, only on its own size and bound
    wider = Linear(12, 4, init="pytorch", seed=3)
    assert np.allclose(wider.b * 2, with_bias.b, rtol=1e-15, atol=0)


def test_a_refused_layer_takes_no_child():
    seed = np.random.SeedSequence(7)
    for options in ({"init": "nonsense"}, {"dtype": "int32"}, {"device": "nowhere"}):
        with pytest.raises((ValueError, TypeError)):
            Linear(3, 4, seed=seed, **options)
    with pytest.raises(ValueError, match="in_features"):
        Linear(0, 4, seed=seed)
    assert seed.n_children_spawned == 0


def test_an_initializer_may_be_a_function_of_a_generator_and_the_shape(backend):
    seen = []

    def init(rng, shape):
        seen.append((type(rng), shape))
        return rng.integers(0, 9, shape)

    layer = Linear(3, 4, init=init, seed=0, dtype="float32", device=backend.device)
    assert seen == [(np.random.Generator, (4, 3))]
    assert backend.owns(layer.W)
    assert layer.W.dtype == backend.xp.float32
    expected = np.random.default_rng(np.random.SeedSequence(0).spawn(2)[0]).integers(0, 9, (4, 3))
    assert np.array_equal(backend.to_numpy(layer.W), expected)
    assert not np.any(backend.to_numpy(layer.b))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (4, 3, 1), ()])
def test_a_function_that_returns_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"^init returned .*must have \(4, 3\)"):
        Linear(3, 4, init=lambda rng, wanted: np.ones(shape))


@pytest.mark.parametrize(("init", "error"), [("he", ValueError), ("", ValueError), (None, TypeError), (3, TypeError)])
def test_an_unknown_initializer_is_refused(init, error):
    with pytest.raises(error, match=r"^init is "):
        Linear(3, 4, init=init)


def test_the_refusal_of_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(INITIALIZERS)):
        Linear(3, 4, init="he")


@pytest.mark.parametrize(
    ("seed", "error"),
    [(-1, ValueError)]
    + [(seed, TypeError) for seed in (1.0, "1", True, np.True_, [1, 2], np.random.RandomState(0), np.random)],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_a_seed_that_is_none_is_refused(seed, error):
    with pytest.raises(error, match=r"^seed is .*give an int >= 0"):
        Linear(3, 4, seed=seed)


def test_a_generator_that_has_no_children_is_refused_in_words():
    class Fixed(np.random.bit_generator.ISeedSequence):
        def generate_state(self, n_words, dtype=np.uint32):
            return np.arange(1, n_words + 1, dtype=dtype)

    for bits in (np.random.RandomState(1)._bit_generator, np.random.PCG64(Fixed())):
        with pytest.raises(TypeError, match=r"hands out no children.*numpy\.random\.default_rng"):
            Linear(2, 3, seed=np.random.Generator(bits))
