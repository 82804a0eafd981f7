"""Small charts as SVG. Their colours are the page's style sheet's, so that they follow the reader's dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple, TypeVar

Point = tuple[float, float]
T = TypeVar("T")

COLOURS = 6
"""The classes `c0` to `c5`; a seventh series has the first one's colour again, dashed."""
MARKED, MAX_POINTS = 40, 400
_WIDTH, _HEIGHT = 360, 236  # one unit is about a pixel on a phone, so the text can be read there
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: Sequence[Point]


class _Axis(NamedTuple):
    """From values to positions, and where the ticks are."""

    low: float
    high: float
    log: bool
    start: float
    end: float
    ticks: list[float]

    def __call__(self, value: float) -> float:
        low, high, value = (map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _axis(values: Sequence[float], start: float, end: float, *, log: bool = False, integer: bool = False) -> _Axis:
    """An axis for these values, finite and with `log` positive; integers are epochs."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if log:
        low, high = (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        fine = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        decades = [10.0**e for e in exponents if low <= 10.0**e <= high]
        ticks = fine if len(fine) < 7 else decades[:: math.ceil(len(decades) / 6)]
        if len(ticks) < 3:
            ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        return _Axis(low, high, True, start, end, ticks)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = 0.5 if integer else abs(high) / 2 or 1.0
        low, high = low - room, high + room
    ticks = [float(tick) for tick in MaxNLocator(5, integer=integer).tick_values(low, high)]
    if integer:
        ticks = [tick for tick in ticks if tick.is_integer()]
    else:
        low, high = ticks[0], ticks[-1]
    return _Axis(low, high, False, start, end, [tick for tick in ticks if low <= tick <= high])


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str, percent: bool) -> list[str]:
    """Grid, numbers and labels."""
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y.ticks:
        at, text = y(tick), f"{tick:.4g}" if not percent else f"{100 * tick:.4g}%"
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in x.ticks:
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:.5g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text x="11" y="{(_TOP + bottom) / 2}" text-anchor="middle" class="turned">{escape(y_label)}</text>')
    return parts


def _figure(title: str, told: str, parts: list[str], legend: str, note: str) -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>{legend}{note}</figure>'
    )


def thinned(items: Sequence[T], most: int) -> Sequence[T]:
    """Every k-th item and the last, so that there are about `most` of them.

    >>> thinned(range(10), 3)
    range(1, 10, 4)
    """
    step = math.ceil(len(items) / most)
    return items if step <= 1 else items[(len(items) - 1) % step :: step]


def lines(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> str:
    """Values by epoch; with `log`, on a logarithmic axis, which has no place for 0."""
    kept = [
        Series(name, [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]) for name, points in series
    ]
    kept = [each for each in kept if each.points]
    if not kept:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="note">There is nothing to draw.</p></figure>'
    x = _axis([x for each in kept for x, _ in each.points], _LEFT, _WIDTH - _RIGHT, integer=True)
    heights = [y for each in kept for _, y in each.points] + [0.0] * from_zero
    y = _axis(heights, _HEIGHT - _BOTTOM, _TOP, log=log)
    parts, entries = _frame(x, y, "epoch", "", percent), []
    for i, (name, points) in enumerate(kept):
        style = f"c{i % COLOURS}{' dashed' if i >= COLOURS else ''}"
        at = [(x(a), y(b)) for a, b in thinned(points, MAX_POINTS)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in at)
        parts.append(f'<path class="line {style}" d="M{path}"/>')
        if len(at) < MARKED:
            parts += [f'<circle class="dot {style}" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in at]
        entries.append(f'<li><svg viewBox="0 0 20 8" aria-hidden="true"><path class="line {style}" d="M0 4H20"/></svg>'
                       f"{escape(name)}</li>")  # fmt: skip
    told = "; ".join(f"{each.name} from {each.points[0][1]:.4g} to {each.points[-1][1]:.4g}" for each in kept)
    legend = f'<ul class="legend">{"".join(entries)}</ul>' if len(kept) > 1 else ""
    return _figure(title, f"{title} by epoch: {told}", parts, legend, note)


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str, note: str = "") -> str:
    """Points with the diagonal where the two are equal."""
    both = [value for point in points for value in point]
    x, y = _axis(both, _LEFT + 14, _WIDTH - _RIGHT), _axis(both, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x, y, x_label, y_label, False)
    parts.append(f'<path class="line c1" d="M{x(x.low):.1f} {y(x.low):.1f}L{x(x.high):.1f} {y(x.high):.1f}"/>')
    parts += [f'<circle class="dot c0 faint" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.2"/>' for a, b in points]
    return _figure(title, f"{title}: {len(points)} points; on the line the two are equal", parts, "", note)
