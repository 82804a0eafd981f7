"""Standard output and error, which may be closed, full or without a reader, and are of any encoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from ..arrays.words import printable


def prepare() -> None:
    """Make both streams take any text: what their encoding lacks is written as an escape. Where one is closed, nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, _nowhere())
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def leads_nowhere() -> bool:
    """Whether standard output was closed from the start."""
    return getattr(sys.stdout, "name", "") == os.devnull


@contextmanager
def if_heard(name: str = "stdout") -> Iterator[None]:
    """A context for saying what the command's work does not depend on: who cannot be told is not told."""
    try:
        yield
        getattr(sys, name).flush()
    except OSError:
        give_up(name)


def give_up(name: str) -> None:
    """Write to that stream no more: its reader has left, or its disk is full. Nor at the end, when Python flushes it."""
    stream = getattr(sys, name)
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    setattr(sys, name, _nowhere())


class Terminal(Console):
    """Rich's console, which alone would end the program when the reader has left."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def tell(text: str) -> None:
    """Print a line of what is good to know."""
    with if_heard():
        print(printable(text))


def complain(*lines: str) -> None:
    """Print to standard error."""
    with if_heard("stderr"):
        print(*(printable(line) for line in lines), sep="\n", file=sys.stderr)
