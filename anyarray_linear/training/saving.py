"""When a run is saved, and from where it goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..files.checkpoints import checkpoints, load_checkpoint, save_checkpoint, stored_states
from ..files.journal import Journal
from ..files.locks import locked
from .run import Run


class Saver:
    """A context that writes checkpoints of a run at the right moments; does nothing without a folder.

    Entering it locks the folder, and with `resume` loads its newest good checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, every: int | None, resume: bool, run: Run) -> None:
        # found once: a callback may go to another folder, which checkpoints must not follow
        self.folder = None if folder is None else Path(os.path.realpath(folder))
        self.every, self.resume, self.run = every, resume, run
        self._kept = ExitStack()

    def __enter__(self) -> Saver:
        if self.folder is None:
            return self
        with ExitStack() as kept:
            kept.enter_context(locked(self.folder))
            kept.enter_context(_alone_in(self.folder))
            found = checkpoints(self.folder)
            if found and not self.resume:
                raise ValueError(
                    f"{self.folder} holds checkpoints of a training already; go on with it by resume=True, "
                    "or give another folder"
                )
            if found:
                run = self.run
                state = load_checkpoint(self.folder, run.model, run.optimizer, check=run.check)
                run.restore(state)
            self._journal = Journal(self.folder, self.run.history.rows)
            self._kept = kept.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._kept.close()

    def after_step(self) -> None:
        """Save if it is this step's turn."""
        if self.every and self.run.step % self.every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, the best one apart too, unless a step that must not be kept was among the last ones."""
        if self.folder is None:
            return
        run = self.run
        if not run.guard.read()[-1] and not run.overflowed():
            history = self._journal.keep(run.history.rows)
            save_checkpoint(
                self.folder, run.model, run.optimizer, state=run.state(), best=run.is_best, history=history
            )
            run.is_best = False


_trained_into: set[tuple[int, Path]] = set()  # by the number of the process, as a fork has its parent's


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A context that raises `ValueError` inside itself: the lock does not keep out a callback, whose thread has it."""
    key = os.getpid(), folder
    if key in _trained_into:
        raise ValueError(
            f"{folder} has the checkpoints of a training that is going on, so a callback cannot train into it; "
            "give another folder"
        )
    _trained_into.add(key)
    try:
        yield
    finally:
        _trained_into.discard(key)


def stored_seed(folder: str | os.PathLike[str], model: Any) -> Any:
    """The seed of the training whose checkpoints are in the folder; `None` where none of them says it."""
    for state in stored_states(folder, model):
        with suppress(ValueError, KeyError, TypeError, ArithmeticError):  # told when it is loaded
            seed = state["training"]["seed"]
            return np.random.SeedSequence(entropy=seed["entropy"], spawn_key=seed["spawn_key"])
    return None
