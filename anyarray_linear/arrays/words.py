"""Text from elsewhere, made fit for a terminal: what a file, a name or a configuration holds must not command it."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""`text` with an escape, such as `\x1b`, for each character that does not show; those in `keep` stay.

    Those are control characters, line breaks among them, what turns the direction of writing, and what stands for the bytes
    of a name that is not UTF-8.

    >>> printable("caf\udce9 \x1b[31m")
    'caf\\udce9 \\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
