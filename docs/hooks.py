"""Equations as MathML, made when the site is built: browsers draw it themselves, so no script and no network is needed."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each equation that arithmatex has marked."""

    def mathml(match: re.Match[str]) -> str:
        kind, latex = match[1], html.unescape(match[2]).strip()
        math = convert(latex, display="block" if kind == "div" else "inline")
        return f'<{kind} class="equation">{math}</{kind}>' if kind == "div" else math

    content = _EQUATION.sub(mathml, content)
    if "arithmatex" in content:
        raise ValueError("an equation was left as LaTeX")
    return content
