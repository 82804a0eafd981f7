"""The `explain` command: the derivation of the layer, worked with numbers for the sizes that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..files.atomic import atomic_write
from ..linear import Linear
from ..testing import gradcheck
from ._common import bad
from ._streams import tell
from .worked_example import Gemm, Projection, WorkedExample, candidates, gemms, projection, worked_example

Host = np.ndarray[Any, Any]

SHOWN = 6
"""Sizes up to this one are shown with their numbers."""
COMPUTED = 2**24
"""Matrices of more elements than this are not made."""


def explain(
    in_features: Annotated[int, typer.Option("--in", metavar="SIZE", min=1, help="Features of a sample.")] = 3,
    out_features: Annotated[int, typer.Option("--out", metavar="SIZE", min=1, help="Outputs of the layer.")] = 2,
    batch: Annotated[int, typer.Option("--batch", metavar="SIZE", min=1, help="Samples in the batch.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the numbers.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw what the layer does to a plane, as a picture.")
    ] = None,
) -> None:
    """Derive a linear layer's forward and backward pass, with numbers, for the sizes that you name.

    Each formula stands above its shapes. Each number is computed by the layer and checked by finite differences: moving
    the element and looking at the loss. Then come the matrix products that the layer becomes, with their operations and
    bytes. Sizes up to 6 are shown with all numbers; of larger layers you see the shapes.

    --plot draws the layer as a projection screen: a turn, a stretch, a turn and a shift, by the singular value
    decomposition.

    **Examples**

    - `anyarray-linear explain`
    - `anyarray-linear explain --in 2 --out 2 --batch 3 --seed 1 --plot layer.png`
    - `anyarray-linear explain --in 784 --out 128 --batch 64`
    """
    sizes = in_features, out_features, batch
    small = max(sizes) <= SHOWN
    fits = max(in_features * out_features, batch * in_features, batch * out_features) <= COMPUTED
    if plot is not None and plot.suffix.lower() != ".png":
        raise bad("plot", f"{plot} is no name of a PNG file; let it end in .png")
    if plot is not None and not fits:
        raise bad("plot", "matrices of these sizes are too large to be made; use smaller --in, --out or --batch")
    example = worked_example(*sizes, seed=seed) if fits else None
    screen = projection(example.W, example.b) if example is not None and (small or plot is not None) else None
    if plot is not None and screen is not None:
        atomic_write(plot, lambda file: _picture(screen, *sizes[:2]).savefig(file, format="png"))
    for title, lines in _sections(*sizes, example, screen, small):
        typer.secho(f"\n{title}", bold=True)
        print("\n".join(f"  {line}".rstrip() for line in lines))
    if plot is not None:
        tell("")
        tell(f"{plot} shows it.")


def _sections(
    n_in: int, n_out: int, N: int, example: WorkedExample | None, screen: Projection | None, small: bool
) -> list[tuple[str, list[str]]]:
    """Titles, and the lines under each."""
    numbers = example if small else None
    return [
        (f"A linear layer: {n_in} features in, {n_out} out, for a batch of {N}", _forward(n_in, n_out, N, numbers)),
        ("The loss, seen from here", _loss(n_out, N, numbers)),
        ("dW: W_jk multiplies feature k of every sample i and lands in output j", _dW(n_in, n_out, N, numbers)),
        ("db: b_j is added to output j of every sample i", _db(n_out, N, numbers)),
        ("dX: X_ik multiplies W_jk in every output j of its own sample i", _dX(n_in, n_out, N, numbers)),
        ("Remember it by the mirror", [
            "In a product, the gradient of a factor is dZ times the other factor, transposed, which stays on its side:",
            "  Z = X W^T    X   is on the left, so   d(X)   = dZ (W^T)^T = dZ W",
            "               W^T is on the right, so  d(W^T) = X^T dZ,  and transposed  dW = dZ^T X",
        ]),
        *([("Checked as a whole", _checked(example))] if example is not None and not small else []),
        ("As matrix products", _products(gemms(n_in, n_out, N))),
        *([("As a projection screen", _screen(screen, n_in, n_out))] if screen is not None else []),
    ]  # fmt: skip


def _forward(n_in: int, n_out: int, N: int, example: WorkedExample | None) -> list[str]:
    lines = _aligned([("Z", (N, n_out)), "=", ("X", (N, n_in)), ("W^T", (n_in, n_out)), "+", ("b", (1, n_out))])
    lines += ["", "Z_ij = sum_k X_ik W_jk + b_j"]
    if example is not None:
        terms = [f"({x:.1f})({w:.1f})" for x, w in zip(example.X[0], example.W[0], strict=True)]
        lines += ["", *_beside(("X", example.X), ("W", example.W), ("b", example.b), ("Z", example.Z)), ""]
        lines += [f"Z_11 = {' + '.join(terms)} + ({example.b[0, 0]:.1f}) = {_number(example.Z[0, 0])}"]
    return lines


def _loss(n_out: int, N: int, example: WorkedExample | None) -> list[str]:
    lines = [
        f"Whatever comes after the layer makes a number L of Z. Backward is handed dZ {(N, n_out)}, dZ_ij = dL/dZ_ij.",
        "Near this Z, any L changes as the sum of dZ_ij Z_ij does, so that sum stands for L here.",
    ]
    if example is not None:
        loss = float(np.sum(example.dZ * example.Z))
        lines += ["", *_beside(("dZ", example.dZ)), "", f"L = sum of dZ_ij Z_ij = {_number(loss, 3)}"]
    return lines


def _dW(n_in: int, n_out: int, N: int, example: WorkedExample | None) -> list[str]:
    lines = ["dZ_ij/dW_jk = X_ik, so  dW_jk = sum_i dZ_ij X_ik", ""]
    lines += _aligned([("dW", (n_out, n_in)), "=", ("dZ^T", (n_out, N)), ("X", (N, n_in))])
    if example is not None:
        lines += ["", _sum("dW_11", example.dZ[:, 0], example.X[:, 0], example.dW[0, 0])]
    return lines + _matched("dW", (n_out, n_in), ("dZ", (N, n_out)), ("X", (N, n_in))) + _moved("W", "dW", example)


def _db(n_out: int, N: int, example: WorkedExample | None) -> list[str]:
    lines = ["dZ_ij/db_j = 1, so  db_j = sum_i dZ_ij: one b serves the whole batch, and its gradient pools what all say", ""]
    lines += _aligned([("db", (1, n_out)), "=", ("1^T", (1, N)), ("dZ", (N, n_out))])
    if example is not None:
        terms = " + ".join(f"({value:.1f})" for value in example.dZ[:, 0])
        lines += ["", f"db_1 = {terms} = {_number(example.db[0, 0])}"]
    return lines + _moved("b", "db", example)


def _dX(n_in: int, n_out: int, N: int, example: WorkedExample | None) -> list[str]:
    lines = ["dZ_ij/dX_ik = W_jk, so  dX_ik = sum_j dZ_ij W_jk", ""]
    lines += _aligned([("dX", (N, n_in)), "=", ("dZ", (N, n_out)), ("W", (n_out, n_in))])
    if example is not None:
        lines += ["", _sum("dX_11", example.dZ[0], example.W[:, 0], example.dX[0, 0])]
    return lines + _matched("dX", (N, n_in), ("dZ", (N, n_out)), ("W", (n_out, n_in))) + _moved("X", "dX", example)


def _sum(name: str, one: Host, other: Host, total: float) -> str:
    terms = " + ".join(f"({a:.1f})({b:.1f})" for a, b in zip(one, other, strict=True))
    return f"{name} = {terms} = {_number(total)}"


def _matched(name: str, shape: tuple[int, int], one: Any, other: Any) -> list[str]:
    """The rule of matching dimensions at work: which products there are, and which has the right shape."""
    found = candidates(one, other)
    lines = ["", f"By the dimensions: {name} is {shape}. What {one[0]} {one[1]} and {other[0]} {other[1]} can form:", ""]
    for formula, (A, B), result in found:
        verdict = f"is {result}" if result else f"is nothing, {A[1]} and {B[0]} differ"
        mark = "  <- fits" if result == shape else ""
        lines.append(f"  {formula:<8}  {A!s:>{_width(found)}} {B!s:<{_width(found)}}  {verdict}{mark}")
    fitting = sum(result == shape for _, _, result in found)
    if fitting > 1:
        lines += ["", f"{fitting} of them fit, as sizes are equal: shapes alone do not decide here. Try three sizes."]
    return lines


def _width(found: list[Any]) -> int:
    return max(len(str(shape)) for candidate in found for shape in candidate.shapes)


def _moved(name: str, gradient: str, example: WorkedExample | None) -> list[str]:
    """Each element of the gradient beside its finite difference."""
    if example is None:
        return []
    computed, measured = getattr(example, gradient), example.slopes(name)
    off = float(np.abs(computed - measured).max())
    if not off <= 1e-12 * (1 + float(np.sum(np.abs(example.dZ)) * (1 + np.abs(example.Z).max()))):
        raise AssertionError(f"{gradient} by the formula is {computed}, but moving {name} gives {measured}")
    return [
        "",
        f"Moving each element of {name} by 1 up and down, and halving the difference of L (exact, for L is linear in it):",
        "",
        *_beside((f"{gradient} by the formula", computed), (f"{gradient} by moving {name}", measured)),
        "",
        f"The largest difference is {off:.1g}: the rounding of float64." if off else "There is no difference.",
    ]


def _checked(example: WorkedExample) -> list[str]:
    errors = gradcheck(Linear.from_arrays(example.W, example.b), example.X, example.dZ)
    return [
        "Too many numbers to show; each gradient along one random direction, against finite differences in float64:",
        "",
        *(f"d{name}: the relative error is {error:.1g}" for name, error in errors.items()),
    ]


def _products(found: list[Gemm]) -> list[str]:
    rows = [("", "product", "(rows, columns, inner)", "FLOPs", "bytes in float32", "FLOPs per byte")]
    rows += [
        (gemm.output, gemm.formula, str((gemm.rows, gemm.columns, gemm.inner)), f"{gemm.flops:,}", f"{gemm.bytes(4):,}",
         f"{gemm.flops / gemm.bytes(4):.2f}")
        for gemm in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
             for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    total = sum(gemm.flops for gemm in found[1:])
    return [
        *lines,
        "",
        "A product of inner size k takes 2k FLOPs per element: k multiplications, k additions. The bytes are what must be",
        "read and written at the least. Few FLOPs per byte: memory is the limit; many: arithmetic is.",
        f"Backward takes {total:,} FLOPs, {total / found[0].flops:.3g} times as many as forward; without dX, "
        f"as in a network's first layer, {total - found[1].flops:,}.",
    ]


def _screen(screen: Projection, n_in: int, n_out: int) -> list[str]:
    first, second = screen.turns
    stretch = " and ".join(f"{value:.3g}" for value in screen.s[: min(2, n_in, n_out)])
    shift = ", ".join(f"{value:.2f}" for value in screen.shift[: min(2, n_out)])
    lines = [
        "W is a turn, a stretch along the axes, and a turn (its singular value decomposition, W = U S V^T); b is a shift:",
        "",
        f"V^T  turns by {first:.0f} degrees",
        f"S    stretches by {stretch}",
        f"U    {'mirrors, and ' if screen.mirrors else ''}turns by {second:.0f} degrees",
        f"b    shifts by ({shift})",
    ]
    if n_in > 2 or n_out > 2:
        lines += ["", "seen in the plane of inputs that it stretches most, and in the plane where that one lands."]
    if screen.lost:
        go, are = ("go", "they are") if screen.lost > 1 else ("goes", "it is")
        lines += ["", f"{screen.lost} of {n_in} directions of the input {go} to 0: like the depth of an object before a "
                  f"screen, {are} not seen."]  # fmt: skip
    return lines


def _number(value: float, decimals: int = 2) -> str:
    return f"{value + 0.0:.{decimals}f}" if abs(value) >= 0.5 * 10.0**-decimals else f"{0:.{decimals}f}"


def _aligned(terms: list[Any]) -> list[str]:
    """A formula with the shape of each matrix under its symbol."""
    cells = [(term, "") if isinstance(term, str) else (term[0], str(term[1])) for term in terms]
    widths = [max(map(len, cell)) for cell in cells]
    return [
        "  ".join(f"{cell[row]:^{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip() for row in (0, 1)
    ]


def _beside(*matrices: tuple[str, Host]) -> list[str]:
    """Matrices next to each other, under their names and shapes."""
    blocks = []
    for name, x in matrices:
        decimals = 1 if name in ("X", "W", "b", "dZ") else 2
        cells = [[_number(value, decimals) for value in row] for row in x]
        width = max(len(cell) for row in cells for cell in row)
        rows = [f"[{' '.join(f'{cell:>{width}}' for cell in row)}]" for row in cells]
        blocks.append([f"{name} {x.shape}", *rows])
    height = max(map(len, blocks))
    widths = [max(map(len, block)) for block in blocks]
    padded = [block + [""] * (height - len(block)) for block in blocks]
    return ["   ".join(f"{block[i]:<{width}}" for block, width in zip(padded, widths, strict=True)) for i in range(height)]


def _picture(screen: Projection, n_in: int, n_out: int) -> Any:
    """A matplotlib figure: a grid, a circle and an F, before the layer and after each of its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, second = screen.turns
    stretch = " and ".join(f"{value:.2f}" for value in screen.s)
    titles = [
        "the input",
        f"turned by {first:.0f}°  ($V^T$)",
        f"stretched by {stretch}  ($S$)",
        f"{'mirrored, ' if screen.mirrors else ''}turned by {second:.0f}°  ($U$)",
        f"shifted by ({screen.shift[0]:.2f}, {screen.shift[1]:.2f})  ($b$): the output",
    ]
    ticks, fine = np.arange(-2, 3), np.linspace(-2, 2, 9)
    across = [np.stack([np.full_like(fine, tick), fine]) for tick in ticks]
    along = [np.stack([fine, np.full_like(fine, tick)]) for tick in ticks]
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    letter = np.asarray([[1, 1, 8, 8, 3, 3, 6.5, 6.5, 3, 3], [1, 13, 13, 11, 11, 8, 8, 6, 6, 1]]) / 10
    reach = max(np.abs(step).max() for step in screen.steps(np.asarray([[-2, -2, 2, 2], [-2, 2, -2, 2]]) * 1.0)) * 1.08

    figure = Figure(figsize=(11, 7.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).ravel()
    for i, (axes, title) in enumerate(zip(panels, titles, strict=False)):
        for shape, color, width in [*((x, "#5b8fd6", 1.0) for x in across), *((x, "#e08a4f", 1.0) for x in along),
                                    (circle, "#444444", 1.6)]:  # fmt: skip
            axes.plot(*screen.steps(shape)[i], color=color, linewidth=width)
        axes.fill(*screen.steps(letter)[i], color="#2a9d74", alpha=0.8)
        for j, color in enumerate(("#b3261e", "#7a3fb0")):  # what is stretched most and least
            start, end = (screen.steps(x)[i][:, 0] for x in (np.zeros((2, 1)), screen.V[:, j : j + 1]))
            axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2})
        axes.set_title(title, fontsize=11)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_aspect("equal")
        axes.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
        axes.axvline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    panels[0].set_xlabel("feature 1" if n_in <= 2 else "the plane of inputs that is stretched most")
    panels[4].set_xlabel("output 1" if n_out <= 2 else "the plane of outputs where it lands")
    if n_in == 2:
        panels[0].set_ylabel("feature 2")
    if n_out == 2:
        panels[4].set_ylabel("output 2")
    panels[5].axis("off")
    panels[5].text(0, 0.95, _caption(screen, n_in, n_out), va="top", fontsize=11, linespacing=1.6)
    return figure


def _caption(screen: Projection, n_in: int, n_out: int) -> str:
    lines = [
        f"A linear layer, {n_in} to {n_out}:  $Z = X W^T + b$,  $W = U S V^T$",
        "",
        "Lines stay lines, parallels stay parallel.",
        "The circle becomes an ellipse, whose half axes",
        "are the arrows: red is stretched most, violet least.",
        *(["The F comes out mirrored."] if screen.mirrors else []),
    ]
    if screen.lost:
        lines += ["", f"{screen.lost} of {n_in} directions of the input {'go' if screen.lost > 1 else 'goes'} to 0:",
                  "the screen does not show the depth."]  # fmt: skip
    return "\n".join(lines)
