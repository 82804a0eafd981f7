"""The parts that the report's page is put together from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple


class Name(NamedTuple):
    """A name out of the data: it may be code, or of a script that is written from right to left."""

    text: str


class Number(NamedTuple):
    """A table's cell that is a share from 0 to 1, to be seen as a bar too."""

    text: str
    share: float


def text(value: Any) -> str:
    """A value as HTML; a name apart from the text around it, whatever its direction."""
    return f"<bdi>{escape(value.text)}</bdi>" if isinstance(value, Name) else escape(str(value))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], label: str) -> str:
    """A table that scrolls sideways where it is too wide, which its shaded edges show."""
    columns = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return wide(f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>", label)


def _cell(value: Any) -> str:
    if isinstance(value, Number):
        return f'<td class="bar" style="--share:{100 * value.share:.0f}%">{escape(value.text)}</td>'
    return f"<td>{text(value)}</td>"


def wide(html: str, label: str) -> str:
    """What may be wider than the page."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{html}</div>'


HINT = '<p class="note hint">The table is wider than the page: scroll it sideways.</p>'
"""Shown where the page is narrow."""


def folded(title: str, html: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def note(words: str) -> str:
    """A remark, if there is one."""
    return f'<p class="note">{escape(words)}</p>' if words else ""


def facts(pairs: Iterable[tuple[str, Any]], kind: str) -> str:
    """Names and values; `kind` is how they look: `tiles` or `facts`."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">{listed}</dl>'
