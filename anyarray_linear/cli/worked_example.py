"""One layer worked through with numbers: its products, its gradients measured by moving, and what it does to a plane.

`anyarray-linear explain` prints this. Everything is on the host in float64; the gradients are those of `Linear` itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ..linear import Linear

Host = np.ndarray[Any, Any]
Shape = tuple[int, int]


class Gemm(NamedTuple):
    """A matrix product of `(rows, inner)` and `(inner, columns)`."""

    output: str
    formula: str
    rows: int
    columns: int
    inner: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each of `inner` terms of each element."""
        return 2 * self.rows * self.columns * self.inner

    def bytes(self, itemsize: int) -> int:
        """What must be moved at the least: each factor read once, the result written once."""
        return itemsize * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)


def gemms(in_features: int, out_features: int, batch: int) -> list[Gemm]:
    """The products of one forward and one backward pass.

    >>> [gemm.flops for gemm in gemms(3, 2, 4)]
    [48, 48, 48, 16]
    """
    return [
        Gemm("Z", "X W^T", batch, out_features, in_features),
        Gemm("dX", "dZ W", batch, in_features, out_features),
        Gemm("dW", "dZ^T X", out_features, in_features, batch),
        Gemm("db", "1^T dZ", 1, out_features, batch),
    ]


class Candidate(NamedTuple):
    """A product of two matrices, each as it is or transposed."""

    formula: str
    shapes: tuple[Shape, Shape]
    result: Shape | None
    """`None` where the inner sizes differ, so that there is no such product."""


def candidates(one: tuple[str, Shape], other: tuple[str, Shape]) -> list[Candidate]:
    """All eight products that two matrices, given as name and shape, can form in either order.

    >>> [c.formula for c in candidates(("dZ", (4, 2)), ("X", (4, 3))) if c.result == (2, 3)]
    ['dZ^T X']
    """
    found = []
    for (left, right), turn_left, turn_right in product(((one, other), (other, one)), (False, True), (False, True)):
        a, b = (name + "^T" * turned for (name, _), turned in ((left, turn_left), (right, turn_right)))
        A, B = (shape[::-1] if turned else shape for (_, shape), turned in ((left, turn_left), (right, turn_right)))
        found.append(Candidate(f"{a} {b}", (A, B), (A[0], B[1]) if A[1] == B[0] else None))
    return found


@dataclass(frozen=True)
class WorkedExample:
    """A layer, a batch and an incoming gradient; what the layer makes of them; the loss is the number `<dZ, Z>`."""

    X: Host
    W: Host
    b: Host
    dZ: Host
    Z: Host
    dX: Host
    dW: Host
    db: Host

    def slopes(self, name: str) -> Host:
        """`(L(p + 1) - L(p - 1)) / 2` for each element `p` of `"X"`, `"W"` or `"b"`: its central difference.

        The loss is linear in every single element, so a step of 1 is as good as a small one, and loses no digits.
        """
        arrays = {"X": self.X, "W": self.W, "b": self.b}
        slopes = np.empty(arrays[name].shape)
        for at in np.ndindex(slopes.shape):
            losses = []
            for step in (1.0, -1.0):
                moved = arrays[name].copy()
                moved[at] += step
                X, W, b = ({**arrays, name: moved}[each] for each in ("X", "W", "b"))
                losses.append(float(np.sum(self.dZ * Linear.from_arrays(W, b)(X))))
            slopes[at] = (losses[0] - losses[1]) / 2
        return slopes


def worked_example(in_features: int, out_features: int, batch: int, *, seed: int = 0) -> WorkedExample:
    """A layer of these sizes with He-initialised weights, and a random bias, batch and incoming gradient.

    All are rounded to one decimal, so that every product has two and can be checked by hand.

    >>> example = worked_example(3, 2, 4)
    >>> example.dW.shape, bool(np.allclose(example.dW, example.slopes("W"), rtol=1e-12, atol=1e-12))
    ((2, 3), True)
    """
    rng = np.random.default_rng(seed)
    W: Host = np.asarray(Linear(in_features, out_features, seed=rng).W).round(1) + 0.0  # + 0.0: no negative zero
    shapes = (1, out_features), (batch, in_features), (batch, out_features)
    b, X, dZ = (np.round(rng.standard_normal(shape), 1) + 0.0 for shape in shapes)
    layer = Linear.from_arrays(W, b)
    Z, cache = layer.forward(X)
    dX, gradients = layer.gradients(dZ, cache)
    return WorkedExample(X, W, b, dZ, Z, np.asarray(dX), gradients["W"], gradients["b"])


@dataclass(frozen=True)
class Projection:
    """What a layer does to a plane: `x -> U (s * (V^T x)) + shift`, a turn, a stretch, a turn and a shift.

    Of the inputs it is the plane that the layer stretches most, of the outputs the plane that this one lands in; where
    there are two features, that is all of them. Coordinates in a plane are by the axes nearest to the first two features.
    """

    P: Host
    """`(in_features, 2)`: the axes of the plane of inputs."""
    Q: Host
    """`(out_features, 2)`: the axes of the plane of outputs."""
    U: Host
    """`(2, 2)`: orthogonal; with determinant -1 it turns and mirrors."""
    s: Host
    """`(2,)`: the stretch, the larger one first; 0 is a direction that the layer flattens."""
    V: Host
    """`(2, 2)`: a rotation, by 90 degrees at most."""
    shift: Host
    """`(2,)`: the bias in the plane of outputs."""
    lost: int
    """How many of the directions of the inputs go to 0."""

    def steps(self, x: Host) -> list[Host]:
        """Points `(2, n)` of the plane, then what becomes of them after each of the four steps."""
        turned = self.V.T @ x
        stretched = self.s[:, None] * turned
        seen = self.U @ stretched
        return [x, turned, stretched, seen, seen + self.shift[:, None]]

    @property
    def turns(self) -> tuple[float, float]:
        """The two turns in degrees, counterclockwise; the second one after mirroring, where `mirrors`."""
        first, second = (math.degrees(math.atan2(M[1, 0], M[0, 0])) for M in (self.V.T, self.U))
        return first, second

    @property
    def mirrors(self) -> bool:
        """Whether left and right are exchanged."""
        return float(np.linalg.det(self.U)) < 0


def projection(W: Host, b: Host) -> Projection:
    """The `Projection` of a layer with `W` `(out_features, in_features)` and `b` `(1, out_features)`, by its SVD.

    A single feature, or a single output, is the first axis of a plane whose second one is 0.

    >>> found = projection(np.asarray([[0.0, -2.0], [1.0, 0.0]]), np.zeros((1, 2)))
    >>> found.s.tolist(), found.mirrors
    ([2.0, 1.0], False)
    """
    out_features, in_features = W.shape
    W = np.pad(W, ((0, max(0, 2 - out_features)), (0, max(0, 2 - in_features))))
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    rank = int(np.count_nonzero(s > s[0] * max(W.shape) * np.finfo(np.float64).eps))
    U, s, V = U[:, :2], s[:2], Vt[:2].T
    P, Q = _nearest_axes(V), _nearest_axes(U)
    U, V = Q.T @ U, P.T @ V
    # a pair of singular vectors has a sign in common; so V can be a rotation, and one by 90 degrees at most
    if np.linalg.det(V) < 0:
        U, V = U * [1, -1], V * [1, -1]
    if V[0, 0] < 0:
        U, V = -U, -V
    shift = Q[:out_features].T @ b[0]
    return Projection(P[:in_features], Q[:out_features], U, s, V, shift, in_features - rank)


def _nearest_axes(basis: Host) -> Host:
    """The orthonormal basis of the same plane that is nearest to the first two axes of space (by polar decomposition)."""
    left, _, right = np.linalg.svd(basis[:2].T)
    axes: Host = basis @ (left @ right)
    return axes
