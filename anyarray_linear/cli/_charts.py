"""The drawings of a run, made once by matplotlib: as SVG in the page, whose colours they follow, and as a picture."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple, TypeVar

from ._html import note

Point = tuple[float, float]
T = TypeVar("T")

COLOURS = ("#0b62c4", "#c2500a", "#17805c", "#8a3ab9", "#8a6a00", "#b0205e")
"""Of the series; a seventh one has the first one's colour again, dashed. The page's dark mode has others in their place."""
TEXT, GRID, PAPER = "#59636e", "#d9dde2", "#ffffff"
MARKED, MAX_POINTS = 40, 400
_SIZE = (5.0, 3.3)  # inches of 72 units: one is about a pixel on a phone, so the text can be read there
_VARIABLES = {TEXT: "var(--soft)", GRID: "var(--rule)", **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}}


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: Sequence[Point]


Draw = Callable[[Any], None]
"""Draws onto matplotlib's axes."""


class Chart(NamedTuple):
    """A drawing and what is said about it."""

    title: str
    draw: Draw | None
    """`None`: there is nothing to draw."""
    told: str
    """In words, for who cannot see it."""
    series: Sequence[str] = ()
    """What the colours stand for, if there are several."""
    note: str = ""


def thinned(items: Sequence[T], most: int) -> Sequence[T]:
    """Every k-th item and the last, so that there are about `most` of them.

    >>> thinned(range(10), 3)
    range(1, 10, 4)
    """
    step = math.ceil(len(items) / most)
    return items if step <= 1 else items[(len(items) - 1) % step :: step]


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def by_epoch(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    chosen: int | None = None,
    note: str = "",
) -> Chart:
    """Values by epoch; with `log`, on a logarithmic axis, which has no place for 0. `chosen`: the model's epoch."""
    kept = [
        Series(name, [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]) for name, points in series
    ]
    kept = [each for each in kept if each.points]
    if not kept:
        return Chart(title, None, title)

    def draw(axes: Any) -> None:
        if chosen is not None:
            axes.axvline(chosen, color=TEXT, linewidth=1, linestyle=":")
        for i, (_, points) in enumerate(kept):
            x, y = zip(*thinned(points, MAX_POINTS), strict=True)
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}
            axes.plot(x, y, marker="." if len(x) < MARKED else None, markersize=5, clip_on=False, **style)
        heights = [y for each in kept for _, y in each.points]
        _epochs(axes, [x for each in kept for x, _ in each.points])
        _heights(axes, heights, log=log, percent=percent, from_zero=from_zero)

    told = "; ".join(f"{each.name} from {each.points[0][1]:.4g} to {each.points[-1][1]:.4g}" for each in kept)
    where = "" if chosen is None else f"; the model is that of epoch {chosen}"
    names = [each.name for each in kept] if len(kept) > 1 else []
    return Chart(title, draw, f"{title} by epoch: {told}{where}", names, note)


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str, *, line: str, note: str = "") -> Chart:
    """Points, and a line to see them against: `"equal"`, where both are, or `"zero"`."""
    if not points:
        return Chart(title, None, title)

    def draw(axes: Any) -> None:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, ".", color=COLOURS[0], markersize=8, markeredgewidth=0, alpha=0.55)
        if line == "zero":
            axes.axhline(0, color=COLOURS[1], linewidth=1.5)
        else:
            axes.axline((x[0], x[0]), slope=1, color=COLOURS[1], linewidth=1.5)
        axes.set(xlabel=x_label, ylabel=y_label)

    what = "where the two are equal" if line == "equal" else "of no error"
    return Chart(title, draw, f"{title}: {len(points)} points, and the line {what}", (), note)


def shares(title: str, points: Sequence[Point], x_label: str, y_label: str, note: str = "") -> Chart:
    """Shares against shares, both from 0 to 100 %, and the line where they are equal."""

    def draw(axes: Any) -> None:
        axes.plot((0, 1), (0, 1), color=TEXT, linewidth=1, linestyle="--")
        axes.plot(*zip(*points, strict=True), marker=".", markersize=8, color=COLOURS[0], clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=x_label, ylabel=y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")

    told = ", ".join(f"{y:.0%} at {x:.0%}" for x, y in points)
    return Chart(title, draw if points else None, f"{title}: {y_label}, {told}", (), note)


def _epochs(axes: Any, epochs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    low, high = min(epochs), max(epochs)
    axes.set_xlim(*((low, high) if high > low else (low - 0.5, high + 0.5)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _heights(axes: Any, heights: Sequence[float], *, log: bool, percent: bool, from_zero: bool) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    low, high = min(heights), max(heights)
    if percent:  # up to all of them, and down to a full tenth, so that nothing is above 100 %
        low = math.floor(10 * min(low, 0.9)) / 10
        axes.set_ylim(low, 1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif log:
        axes.set_yscale("log")
        low, high = (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)
        axes.set_ylim(low, high)
        ratio = high / low
        if ratio < 10:
            ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
            axes.yaxis.set_major_locator(FixedLocator(ticks))
        else:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 300 else (1.0,), numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    elif from_zero:
        axes.set_ylim(bottom=0)


# ---------------------------------------------------------------------------------------------------------------------
# Onto what


def figure(chart: Chart) -> str:
    """The chart as a part of the page."""
    head = f"<figure><figcaption>{escape(chart.title)}</figcaption>"
    if chart.draw is None:
        return f"{head}{note('There is nothing to draw.')}</figure>"
    return f"{head}{_svg(chart)}{_legend(chart.series)}{note(chart.note)}</figure>"


def picture(charts: Sequence[Chart]) -> bytes:
    """Charts side by side, as a PNG."""
    file = io.BytesIO()
    drawn = _figure(len(charts))
    for axes, chart in zip(drawn.axes, charts, strict=True):
        axes.set_title(chart.title)
        if chart.draw is None:
            axes.text(0.5, 0.5, "no epoch was finished", ha="center", color=TEXT, transform=axes.transAxes)
            continue
        chart.draw(axes)
        lines = [line for line in axes.get_lines() if line.get_color() in COLOURS]
        if chart.series:
            axes.legend(lines, chart.series, frameon=False)
    drawn.savefig(file, format="png", dpi=150, facecolor=PAPER)
    return file.getvalue()


def _figure(count: int) -> Any:
    """A figure with `count` axes side by side, without pyplot, so that it needs no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10.5, "axes.edgecolor": GRID, "axes.labelcolor": TEXT, "grid.color": GRID}):
        drawn = Figure(figsize=(_SIZE[0] * count, _SIZE[1]))
        FigureCanvasAgg(drawn)
        for i in range(count):  # with room for numbers of seven digits
            axes = drawn.add_axes(((0.16 + i) / count, 0.16, 0.8 / count, 0.75 if count > 1 else 0.8))
            axes.set(facecolor="none", axisbelow=True)
            axes.grid(color=GRID, linewidth=0.8)
            axes.tick_params(length=0, pad=6, labelcolor=TEXT)
            axes.spines[:].set_visible(False)
    return drawn


def _svg(chart: Chart) -> str:
    """The drawing as SVG for inside a page: small, and its colours the page's."""
    from matplotlib import rc_context

    assert chart.draw is not None
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):  # the same bytes again, and another chart's ids
        drawn = _figure(1)
        chart.draw(drawn.axes[0])
        unsaid: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.savefig(file, format="svg", transparent=True, metadata=unsaid)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("\n", " ")
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1)  # it would be the whole page's
    svg = re.sub(r"font-family:[^;\"]*;? *|<g id=\"[^\"]*\"/>", "", svg)
    used = set(re.findall(r"#([\w]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    svg = re.sub(r"\s+(?=[<\"/])|(?<=>)\s+", " ", svg)
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        lambda found: f'<svg {found[1]} role="img" aria-label="{escape(chart.told)}">',
        svg.strip(),
        count=1,
    )


def _legend(names: Sequence[str]) -> str:
    entries = "".join(
        f'<li><svg viewBox="0 0 20 8" aria-hidden="true"><path style="stroke:var(--c{i % len(COLOURS)});stroke-width:2'
        f'{";stroke-dasharray:5 3" if i >= len(COLOURS) else ""}" d="M0 4H20"/></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>' if names else ""
