"""Plots of the tables of the pages: `<!-- plot: what the numbers are -->` above a table draws it, so the two cannot differ.

Every cell that holds nothing but numbers is drawn, each number as a dot, on a logarithmic axis with a line at 1.
"""

from __future__ import annotations

import html
import math
import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

_MARK = re.compile(r"<!-- plot: (.+?) -->")
_NUMBERS = re.compile(r"[\d.]+(?:, [\d.]+)*")
_COLOURS = ("#3b76c4", "#d9730d", "#3f9a4b", "#b0459b", "#8a7a1f")  # on white and on black
_WIDTH, _RIGHT, _ROW, _TOP = 540, 16, 28, 34
_CHARACTER = 7.4  # the width of one in a name, at most and on average


def cells(line: str) -> list[str]:
    """What is in a line of a table."""
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def drawn(title: str, table: list[str]) -> str:
    """The SVG of a table: a row each, and a colour for each column of numbers."""
    header, rows = cells(table[0]), [cells(line) for line in table[2:]]
    columns = [i for i in range(1, len(header)) if all(_NUMBERS.fullmatch(row[i]) for row in rows)]
    values = {i: [[float(number) for number in row[i].split(", ")] for row in rows] for i in columns}
    every = [1.0, *(x for column in values.values() for row in column for x in row)]
    low, high = math.log(min(every) / 1.1), math.log(max(every) * 1.1)
    names = 28 + _CHARACTER * max(len(row[0]) for row in rows)

    def x(value: float) -> float:
        return names + (math.log(value) - low) / (high - low) * (_WIDTH - names - _RIGHT)

    height = _TOP + _ROW * len(rows) + 30
    label = html.escape(f"{title}; the numbers are in the table")
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">']
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20) if low <= math.log(tick) <= high]
    for tick in ticks:
        kind = "one" if tick == 1 else "tick"
        parts.append(f'<line class="{kind}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP - 8}" y2="{height - 26}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{tick:g}</text>')
    for n, row in enumerate(rows):
        y = _TOP + _ROW * (n + 0.5)
        parts.append(f'<text x="{names - 14:.1f}" y="{y + 4}" text-anchor="end">{html.escape(row[0])}</text>')
        for colour, i in zip(_COLOURS, columns, strict=False):
            parts += [f'<circle cx="{x(value):.1f}" cy="{y}" r="5" fill="{colour}"/>' for value in values[i][n]]
    for n, (colour, i) in enumerate(zip(_COLOURS, columns, strict=False)):
        left = 60 + n * (_WIDTH - 60) / len(columns)
        parts.append(f'<circle cx="{left + 6:.1f}" cy="12" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{left + 17:.1f}" y="16">{html.escape(header[i])}</text>')
    return f'<figure class="plot">{"".join(parts)}</svg><figcaption>{html.escape(title)}</figcaption></figure>'


class Plots(Preprocessor):
    """Runs before Markdown sees the tables."""

    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        for i, line in enumerate(lines):
            mark = _MARK.fullmatch(line)
            if mark is None:
                result.append(line)
                continue
            table = []
            for following in lines[i + 1 :]:
                if following.startswith("|"):
                    table.append(following)
                elif table:
                    break
            result += [drawn(mark[1], table), ""]
        return result


class PlotsExtension(Extension):
    """Named in zensical.toml."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(Plots(md), "plots", 25)


def makeExtension(**options: Any) -> PlotsExtension:
    """What Python-Markdown calls."""
    return PlotsExtension(**options)
