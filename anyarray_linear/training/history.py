"""What a training leaves to be read: its history, and the error that ends one whose numbers are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

Row = dict[str, Any]
Callback = Callable[[Any, Row], bool | None]


class StopFlag(Protocol):
    """Anything with `is_set()`, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether training should stop after the step at hand."""
        ...


class NonFiniteError(FloatingPointError):
    """Training ended because a loss or gradient was NaN or infinite; the weights are those from before that step.

    Or because the parameters themselves were, at the end of an epoch: a step with a finite gradient had overflowed. Then
    they are lost, unless there is a checkpoint.

    step: the step, counted from 1 over the whole training. history: the `History` up to there.
    """

    # what has a default is restored from a pickle, or a copy, as the attribute that it is
    def __init__(self, message: str, step: int = 0, history: History | None = None) -> None:
        super().__init__(message)
        self.step, self.history = step, History() if history is None else history


@dataclass
class History:
    """What happened in training.

    rows: a dict per epoch: `epoch` (from 1), `steps` so far, `loss` (mean over the epoch's samples, while training), `lr`,
    `seconds`, with validation `validation_loss` and, for classes, `validation_accuracy`, and for a float16 model
    `loss_scale`.
    interrupted: whether Ctrl-C or a stop flag ended it. skipped: the number of steps that `skip_nonfinite` passed over.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    skipped: int = 0
