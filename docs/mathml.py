"""Equations as MathML, made when the site is built: browsers draw it themselves, so no script and no network is needed."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def mathml(match: re.Match[str]) -> str:
    """An equation that arithmatex has marked."""
    kind, latex = match[1], html.unescape(match[2]).strip()
    math = convert(latex, display="block" if kind == "div" else "inline")
    return f'<{kind} class="equation">{math}</{kind}>' if kind == "div" else math


class Equations(Postprocessor):
    """Runs once the page is text."""

    def run(self, text: str) -> str:
        text = _EQUATION.sub(mathml, text)
        if "arithmatex" in text:
            raise ValueError("an equation was left as LaTeX")
        return text


class MathML(Extension):
    """Named in zensical.toml."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(Equations(md), "mathml", -100)


def makeExtension(**options: Any) -> MathML:
    """What Python-Markdown calls."""
    return MathML(**options)
