"""The folder of a run: who may write into it, and what of it goes when a run fails or begins anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..files.atomic import sweep
from ..files.checkpoints import checkpoints, files_of
from ..files.locks import locked
from ._common import bad

SUMMARY = "summary.json"
FILES = (SUMMARY, "config.json", "model.safetensors", "history.jsonl", "curves.png", "report.html")
"""In the order in which they are removed; the summary is the first to go, and the last to come."""
CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best.safetensors"


@contextmanager
def kept_folder(folder: Path, options: Any) -> Iterator[None]:
    """The folder, locked; after a failure without anything to go on with, it is as it was."""
    is_new = not folder.exists()
    with locked(folder / CHECKPOINTS):
        sweep(folder)
        (folder / SUMMARY).unlink(missing_ok=True)  # first: it says that the others are whole, and of one run
        if options.overwrite:
            _clear(folder)
        try:
            yield
        except BaseException:
            if not options.resume and not checkpoints(folder / CHECKPOINTS):
                _clear(folder)
                _remove_empty(folder, is_new)
            raise


def fresh_folder() -> Path:
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    tries = (Path("runs", name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in tries if not folder.exists())


def refuse_a_used(folder: Path, options: Any) -> None:
    if folder.exists() and not folder.is_dir():
        raise bad("out", f"{folder} is a file; give a folder")
    used = next((name for name in FILES if (folder / name).exists()), None)
    if used is None and checkpoints(folder / CHECKPOINTS):
        used = CHECKPOINTS
    if used and not (options.overwrite or options.resume):
        raise bad(
            "out",
            f"{folder} holds a run already ({used}); give another folder, go on with that run by --resume, "
            "or replace it by --overwrite",
        )


def _clear(folder: Path) -> None:
    """Remove the files that this command writes, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for path in files_of(folder / CHECKPOINTS):
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path, is_new: bool) -> None:
    with suppress(OSError):  # something of somebody else's is in it
        (folder / CHECKPOINTS / ".lock").unlink(missing_ok=True)
        (folder / CHECKPOINTS).rmdir()
        if is_new:
            folder.rmdir()
