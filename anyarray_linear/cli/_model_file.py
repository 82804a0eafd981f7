"""The file of a model that `predict` and `export` are given, or what to give them instead."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..files.checkpoints import checkpoints
from ..files.models import is_checkpoint
from ..files.sealed import CheckpointError
from ._folder import CHECKPOINTS

_MODEL = "model.safetensors"


def model_file(given: Path) -> Path:
    """The file itself, or that of a run's folder; `CheckpointError` for a checkpoint.

    The weights of a run's checkpoints are those of training: for scaled features, and without the names of the classes.
    """
    if not given.is_dir():
        if given.suffix.lower() in (".csv", ".tsv", ".gz", ".npz", ".npy"):
            raise CheckpointError(f"{given} is data, and no model; MODEL, a {_MODEL} or the folder of a run, comes first")
        if given.is_file() and is_checkpoint(given):
            raise CheckpointError(f"{given} is a checkpoint to go on training from, and no model; {_instead(given.parent)}")
        return given
    if (given / _MODEL).exists():
        return given / _MODEL
    if checkpoints(given):
        raise CheckpointError(f"{given} holds checkpoints to go on training from, and no model; {_instead(given)}")
    if checkpoints(given / CHECKPOINTS):
        raise CheckpointError(f"{given} holds a run that has no model yet; {_written_by(given)}")
    runs = sorted(given.glob(f"*/{_MODEL}"), key=os.path.getmtime)
    such = f", such as {runs[-1].parent}, the newest in it" if runs else ""
    raise CheckpointError(f"{given} holds no {_MODEL}; give the folder of a run{such}")


def _instead(folder: Path) -> str:
    """What to give in the place of the checkpoints in `folder`."""
    run = folder.parent
    if folder.name != CHECKPOINTS or not (run / "config.json").exists():
        return "take the file of save_model, or fill a model from this one in Python: load_model(path, into=model)"
    return f"take {run / _MODEL}" if (run / _MODEL).exists() else _written_by(run)


def _written_by(run: Path) -> str:
    return f"it is written by: anyarray-linear train --out {shlex.quote(str(run))} --resume"
