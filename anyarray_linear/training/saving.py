"""When a run is saved, and from where it goes on."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import numpy as np

from ..files.checkpoints import checkpoints, load_checkpoint, save_checkpoint, stored_states
from ..files.locks import locked
from .run import Run


class Saver:
    """Writes checkpoints of a run at the right moments; does nothing without a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, every: int | None, run: Run) -> None:
        self.folder, self.every, self.run = folder, every, run
        self._lock: Any = None

    def begin(self, resume: bool) -> None:
        """Lock the folder, and load its newest good checkpoint if asked to."""
        assert self.folder is not None
        self._lock = locked(self.folder)
        self._lock.__enter__()
        try:
            found = checkpoints(self.folder)
            if found and not resume:
                raise ValueError(
                    f"{os.fspath(self.folder)} holds checkpoints of a training already; go on with it by resume=True, "
                    "or give another folder"
                )
            if found:
                run = self.run
                state = load_checkpoint(self.folder, run.model, run.optimizer, check=run.check)
                run.restore(state)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

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
            save_checkpoint(self.folder, run.model, run.optimizer, state=run.state(), best=run.is_best)
            run.is_best = False


def stored_seed(folder: str | os.PathLike[str], model: Any) -> Any:
    """The seed of the training whose checkpoints are in the folder; `None` where none of them says it."""
    for state in stored_states(folder, model):
        with suppress(ValueError, KeyError, TypeError):  # told when it is loaded
            seed = state["training"]["seed"]
            return np.random.SeedSequence(entropy=seed["entropy"], spawn_key=seed["spawn_key"])
    return None
