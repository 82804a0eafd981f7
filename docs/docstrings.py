"""Our docstrings as Markdown, for the API page: doctests become code blocks, and lines such as `X: its shape` a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^(>>> .*?)(?=\n[ \t]*\n|\Z)", re.M | re.S)
_ARGUMENT = re.compile(r"(?:^|(?<=\.)[ ])([A-Za-z_]\w*(?:, \w+)*): (?=\S)", re.M)


def markdown(text: str) -> str:
    """The text of a docstring, dedented, as Markdown."""
    first, *parts = _DOCTEST.split(text)
    prose = [_listed(part) if i % 2 else f"```pycon\n{part}\n```" for i, part in enumerate(parts)]
    return "".join([_listed(first), *prose])


def _listed(text: str) -> str:
    paragraphs = re.split(r"\n[ \t]*\n", text)
    for i, paragraph in enumerate(paragraphs):
        if found := _ARGUMENT.search(paragraph):
            before, after = paragraph[: found.start()], paragraph[found.start() :]
            paragraphs[i] = before + "\n" * bool(before) + _ARGUMENT.sub(r"\n- `\1`: ", after).lstrip()
    return "\n\n".join(paragraphs)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
