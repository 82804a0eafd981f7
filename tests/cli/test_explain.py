"""`explain`: that what it prints is true, read back from what it prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_cli import Outcome, assert_refused, run

from anyarray_linear import Linear
from anyarray_linear.cli.worked_example import WorkedExample, candidates, gemms, projection, worked_example

__all__ = ["run"]  # the fixture

SIZES = [(3, 2, 4), (1, 1, 1), (1, 5, 2), (6, 1, 6), (4, 4, 4)]


def matrices(text: str) -> dict[str, np.ndarray]:
    """The matrices in a text, each from its first appearance, by the words above it: `"X"`, `"dW by moving W"`."""
    found: dict[str, np.ndarray] = {}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        heads = [(match.start(), match[1].strip(), eval(match[2])) for match in re.finditer(r"(\w[\w ]*?) (\(\d+, \d+\))(?=   |$)", line)]
        if not heads or i + 1 >= len(lines) or "[" not in lines[i + 1]:
            continue
        ends = [start for start, _, _ in heads[1:]] + [None]
        for (start, name, shape), end in zip(heads, ends, strict=True):
            rows = [lines[i + 1 + j][start:end].strip(" []").split() for j in range(shape[0])]
            found.setdefault(name, np.array(rows, dtype=float).reshape(shape))
    return found


@pytest.mark.parametrize(("n_in", "n_out", "N"), SIZES)
def test_printed_numbers_satisfy_the_equations(run: Callable[..., Outcome], n_in: int, n_out: int, N: int) -> None:
    outcome = run("explain", "--in", n_in, "--out", n_out, "--batch", N, "--seed", 3)
    assert outcome.code == 0
    m = matrices(outcome.out)
    X, W, b, dZ = m["X"], m["W"], m["b"], m["dZ"]
    np.testing.assert_allclose(m["Z"], np.einsum("ik,jk->ij", X, W) + b, atol=1e-9)
    expected = {"dW": np.einsum("ij,ik->jk", dZ, X), "db": dZ.sum(axis=0, keepdims=True), "dX": np.einsum("ij,jk->ik", dZ, W)}
    for name, gradient in expected.items():
        for how in (f"{name} by the formula", f"{name} by moving {name[1]}"):
            np.testing.assert_allclose(m[how], gradient, atol=1e-9, err_msg=how)
    assert all(float(text) < 1e-12 for text in re.findall(r"largest difference is (\S+):", outcome.out))


@pytest.mark.parametrize(("n_in", "n_out", "N"), SIZES)
def test_printed_sums_are_what_they_say(run: Callable[..., Outcome], n_in: int, n_out: int, N: int) -> None:
    out = run("explain", "--in", n_in, "--out", n_out, "--batch", N).out
    sums = re.findall(r"(?:Z_11|dW_11|db_1|dX_11) = ([()\d. +-]+) = (-?[\d.]+)$", out, re.M)
    assert len(sums) == 4
    for terms, total in sums:
        assert eval(terms.replace(")(", ")*(")) == pytest.approx(float(total), abs=1e-9)


def test_shapes_stand_under_their_symbols(run: Callable[..., Outcome]) -> None:
    lines = run("explain", "--in", 784, "--out", 10, "--batch", 64).out.splitlines()
    (i,) = (i for i, line in enumerate(lines) if line.split() == ["dW", "=", "dZ^T", "X"])
    for symbol, shape in (("dW", "(10, 784)"), ("dZ^T", "(10, 64)"), ("X", "(64, 784)")):
        at = lines[i + 1].index(shape)
        assert at <= lines[i].index(symbol) < at + len(shape)


def test_only_one_product_has_the_right_shape_where_sizes_differ() -> None:
    shapes = {"dZ": (4, 2), "X": (4, 3), "W": (2, 3)}
    for other, wanted, expected in (("X", (2, 3), "dZ^T X"), ("W", (4, 3), "dZ W")):
        found = candidates(("dZ", shapes["dZ"]), (other, shapes[other]))
        assert len({candidate.formula for candidate in found}) == 8
        for candidate in found:
            A, B = (np.zeros(shapes[name[: -2 * name.endswith("^T")] if name.endswith("^T") else name]) for name in candidate.formula.split())
            A, B = (x.T if name.endswith("^T") else x for x, name in zip((A, B), candidate.formula.split(), strict=True))
            assert candidate.shapes == (A.shape, B.shape)
            assert candidate.result == ((A @ B).shape if A.shape[1] == B.shape[0] else None)
        assert [candidate.formula for candidate in found if candidate.result == wanted] == [expected]


def test_where_shapes_do_not_decide_it_says_so(run: Callable[..., Outcome]) -> None:
    assert "shapes alone do not decide here" in run("explain", "--in", 3, "--out", 3, "--batch", 3).out
    assert "shapes alone do not decide" not in run("explain").out


def test_products_are_counted_as_a_loop_counts_them() -> None:
    n_in, n_out, N = 3, 2, 4
    flops = {"Z": 0, "dX": 0, "dW": 0, "db": 0}
    for _ in range(N):
        for _ in range(n_out):
            for _ in range(n_in):
                for name in ("Z", "dX", "dW"):
                    flops[name] += 2
            flops["db"] += 2
    found = gemms(n_in, n_out, N)
    assert {gemm.output: gemm.flops for gemm in found} == flops
    example = worked_example(n_in, n_out, N)
    moved = {
        "Z": (example.X, example.W, example.Z), "dX": (example.dZ, example.W, example.dX),
        "dW": (example.dZ, example.X, example.dW), "db": (np.ones((1, N)), example.dZ, example.db),
    }  # fmt: skip
    assert {gemm.output: gemm.bytes(8) for gemm in found} == {name: sum(x.nbytes for x in xs) for name, xs in moved.items()}


def test_slopes_see_a_wrong_gradient(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.gradients
    monkeypatch.setattr(Linear, "gradients", lambda *args, **options: (real(*args, **options)[0], {
        name: 1.001 * value for name, value in real(*args, **options)[1].items()
    }))  # fmt: skip
    example = worked_example(3, 2, 4)
    assert np.abs(example.dW - example.slopes("W")).max() > 1e-4
    with pytest.raises(AssertionError, match="dW by the formula"):
        run("explain")


def test_example_has_one_decimal_and_is_a_function_of_its_seed() -> None:
    a, b, c = (worked_example(3, 2, 4, seed=seed) for seed in (1, 1, 2))
    assert isinstance(a, WorkedExample)
    for name in ("X", "W", "b", "dZ"):
        np.testing.assert_allclose(getattr(a, name) * 10, np.round(getattr(a, name) * 10), atol=1e-12)
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(a.X, c.X)


def test_large_layers_show_shapes_and_a_check_and_few_numbers(run: Callable[..., Outcome]) -> None:
    out = run("explain", "--in", 784, "--out", 128, "--batch", 64).out
    assert "[" not in out
    assert len(out) < 5000
    errors = re.findall(r"relative error is (\S+)", out)
    assert len(errors) == 3
    assert all(float(error) < 1e-12 for error in errors)
    assert "12,845,056" in out
    assert "relative error" not in run("explain", "--batch", 10**12).out  # nothing is computed


# ---------------------------------------------------------------------------------------------------------------------
# The projection screen


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2), (5, 7), (1, 4), (4, 1), (1, 1)])
def test_turn_stretch_turn_and_shift_are_what_the_layer_does_to_the_plane(shape: tuple[int, int]) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        W, b = rng.normal(size=shape), rng.normal(size=(1, shape[0]))
        found = projection(W, b)
        x = rng.normal(size=(2, 9))
        start, _, _, _, seen = found.steps(x)
        np.testing.assert_array_equal(start, x)
        Z = Linear.from_arrays(W, b)((found.P @ x).T)  # the layer's own answer for points of that plane
        np.testing.assert_allclose(seen, found.Q.T @ Z.T, atol=1e-12)
        np.testing.assert_allclose(found.V.T @ found.V, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(found.U.T @ found.U, np.eye(2), atol=1e-12)
        assert np.linalg.det(found.V) == pytest.approx(1)
        assert abs(found.turns[0]) <= 90
        np.testing.assert_allclose(found.s[0], np.linalg.norm(W, 2))
        assert found.lost == shape[1] - min(shape)


def test_with_two_features_and_outputs_the_plane_is_all_there_is() -> None:
    W = np.array([[0.0, 2.0], [1.0, 0.0]])
    found = projection(W, np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(found.P, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(found.Q, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(found.U @ np.diag(found.s) @ found.V.T, W, atol=1e-12)
    np.testing.assert_allclose(found.shift, [3, 4])
    assert found.mirrors
    turned = projection(np.array([[0.0, -2.0], [2.0, 0.0]]), np.zeros((1, 2)))
    assert not turned.mirrors
    assert sum(turned.turns) % 360 == pytest.approx(90)


def test_plot_is_a_picture(run: Callable[..., Outcome]) -> None:
    for i, sizes in enumerate([(3, 2), (2, 2), (1, 3), (3, 1), (50, 40)]):
        outcome = run("explain", "--in", sizes[0], "--out", sizes[1], "--plot", f"{i}.png")
        assert outcome.code == 0
        assert f"{i}.png" in outcome.out
        assert Path(f"{i}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--in", "0"), ("--in", "1")),
        (("--out", "-2"), ("--out",)),
        (("--batch", "many"), ("--batch",)),
        (("--seed", "-1"), ("--seed",)),
        (("--plot", "a.jpg"), ("--plot", ".png")),
        (("--plot", "no/a.png"), ("a.png",)),
        (("--plot", "a.png", "--batch", str(10**12)), ("--plot", "--batch")),
    ],
)
def test_bad_values_are_one_line_before_anything_is_printed(
    run: Callable[..., Outcome], options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = run("explain", *options)
    assert_refused(outcome, *words)
    assert outcome.out == ""
    assert list(Path().iterdir()) == []
