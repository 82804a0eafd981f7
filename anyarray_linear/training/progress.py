"""What training shows while it runs: a rich progress bar in a terminal, else a plain line per epoch.

It is nice to have, so nothing of it ends a training: what cannot be shown is not shown.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, TextIO


def _line(row: dict[str, Any]) -> str:
    parts = [f"epoch {row['epoch']}", f"loss {row['loss']:.4f}"]
    parts += [
        f"{name.replace('_', ' ')} {row[name]:.4f}" for name in ("validation_loss", "validation_accuracy") if name in row
    ]
    return "  ".join([*parts, f"{row['seconds']:.2f} s"])


class Progress:
    """A context: `step` after each step, `epoch` after each epoch. Writes to standard error, and nothing if not `shown`."""

    def __init__(self, epochs: int, steps_per_epoch: int | None, shown: bool, file: TextIO | None = None) -> None:
        self.epochs, self.steps_per_epoch, self.shown = epochs, steps_per_epoch, shown
        self.file = sys.stderr if file is None else file
        self._bar: Any = None
        self._drawn = 0.0

    def __enter__(self) -> Self:
        if self.shown and self.file is not None:  # as under pythonw, and where standard error is closed
            self._try(self._start)
        else:
            self.shown = False
        return self

    def _start(self) -> None:
        isatty = getattr(self.file, "isatty", None)
        if isatty is None or not isatty():
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        class Quiet(Console):
            """Rich's own ends the program when the reader has left."""

            def on_broken_pipe(self) -> None:
                raise BrokenPipeError

        columns = TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()
        text = TextColumn("{task.description}")
        self._bar = Bar(*columns, text, console=Quiet(file=self.file), auto_refresh=False)
        self._task = self._bar.add_task("", total=self.epochs)
        self._bar.start()

    def _try(self, show: Callable[[], object]) -> None:
        """Show something; after it has failed once, in whichever of the ways that streams have, nothing any more."""
        try:
            show()
        except Exception:  # noqa: BLE001
            self.shown = False
            self._stop()

    def _stop(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(Exception):
                bar.stop()  # which also gives back sys.stdout and sys.stderr

    def step(self, epoch: int, step: int) -> None:
        """Move the bar, at most ten times a second."""
        if self._bar is not None and (now := time.monotonic()) > self._drawn + 0.1:
            self._drawn = now
            completed = epoch + step / (self.steps_per_epoch or math.inf)
            self._try(lambda: self._bar.update(self._task, completed=completed, refresh=True))

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the epoch's row."""
        if self._bar is not None:
            told = _line(row).partition("  ")[2]
            self._try(lambda: self._bar.update(self._task, completed=row["epoch"], description=told, refresh=True))
        elif self.shown:
            self._try(lambda: print(_line(row), file=self.file, flush=True))

    def __exit__(self, *exc: object) -> None:
        self._stop()
