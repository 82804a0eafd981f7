"""What training shows while it runs: a rich progress bar in a terminal, else a plain line per epoch."""

from __future__ import annotations

import math
import sys
import time
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
        if self.shown and self.file.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            columns = TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()
            text = TextColumn("{task.description}")
            self._bar = Bar(*columns, text, console=Console(file=self.file), auto_refresh=False)
            self._task = self._bar.add_task("", total=self.epochs)
            self._bar.start()
        return self

    def step(self, epoch: int, step: int) -> None:
        """Move the bar, at most ten times a second."""
        if self._bar is not None and (now := time.monotonic()) > self._drawn + 0.1:
            self._drawn = now
            self._bar.update(self._task, completed=epoch + step / (self.steps_per_epoch or math.inf), refresh=True)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the epoch's row."""
        if self._bar is not None:
            self._bar.update(self._task, completed=row["epoch"], description=_line(row).partition("  ")[2], refresh=True)
        elif self.shown:
            print(_line(row), file=self.file, flush=True)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
