"""Training a run that is prepared, and writing what came of it; the model is that of the best epoch."""

from __future__ import annotations

import math
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, distributed
from ..distributed.launching import EXPECTED
from ..files.models import load_model, read_metadata
from ..training import EarlyStopping, History, evaluate, fit, predict
from ._common import StopSignals, warn
from ._folder import BEST, CHECKPOINTS
from ._norms import Norms
from ._report import report
from ._results import show, write_json, write_results
from ._resuming import stored_options
from ._run import Run
from ._scores import scores_of
from ._streams import if_heard, tell

_SCORED_ROWS = 10_000  # training accuracy is measured after each epoch, on this many samples at most


def train_run(
    run: Run, options: Any, folder: Path | None, stop: StopSignals, group: distributed.Group
) -> tuple[History, float]:
    """The history, and the seconds that the whole training took; a folder has only rank 0."""
    if folder is not None:
        write_json(folder / "config.json", _config(run, options))
        counts = ", ".join(f"{len(y)} {name}" for name, (_, y) in run.parts.items())
        if options.processes is not None:
            tell(str(group))
        tell(f"{options.data or 'digits'}: {counts} samples; {run.device}: {run.device.reason}")
        if options.data is not None:
            tell(_decision(run, options))
        for line in run.reading.suspicious:
            warn(line)
    began = time.perf_counter()
    history, count_before = _fit(run, options, folder, stop, group)
    return history, time.perf_counter() - began + sum(row["seconds"] for row in history.rows[:count_before])


def _config(run: Run, options: Any) -> dict[str, Any]:
    return {"options": stored_options(options), "device": str(run.device), "model": repr(run.model), "version": __version__}


def _decision(run: Run, options: Any) -> str:
    """What the target was taken for, and how to have it otherwise."""
    _, target, told, instead, _ = run.reading
    return f"{target}: {told}" + (f"; to change that: --task {instead}" if instead and options.task is None else "")


def _fit(
    run: Run, options: Any, folder: Path | None, stop: StopSignals, group: distributed.Group
) -> tuple[History, int]:
    """The history, and how many of its epochs are from before this run was resumed."""
    X, y = run.scaled("train")
    rows_now, norms = [], Norms(run, X, y)

    def score(model: Any, row: dict[str, Any]) -> None:
        rows_now.append(row)
        row.update(norms(model))
        if run.classes is not None:
            row["accuracy"] = evaluate(model, X[:_SCORED_ROWS], y[:_SCORED_ROWS], loss=run.loss)["accuracy"]

    stopping = [] if options.early_stopping is None else [EarlyStopping(options.early_stopping, restore_best=False)]
    history = fit(
        run.model,
        X,
        y,
        loss=run.loss,
        optimizer=run.optimizer,
        epochs=options.epochs,
        batch_size=options.batch_size,
        validation=run.scaled("validation") if "validation" in run.parts else None,
        seed=options.seed,
        callbacks=[score, *stopping],
        checkpoint=None if folder is None else folder / CHECKPOINTS,
        checkpoint_every=None if folder is None else options.checkpoint_every,
        resume=options.resume and folder is not None,
        stop=stop,
        group=group,
    )
    return history, len(history.rows) - len(rows_now)


def write_run(run: Run, options: Any, folder: Path, group: distributed.Group, history: History, seconds: float) -> None:
    """Write the results, and show them."""
    epoch = len(history.rows)
    if options.keep == "best" and "validation" in run.parts:
        epoch = _take_the_best(run, folder, history)
    model = run.for_raw_data()
    with np.errstate(over="ignore", invalid="ignore"):  # told below; of what is saved, on raw data
        outputs = {name: run.device.to_numpy(predict(model, X)) for name, (X, _) in run.parts.items()}
        y_train = run.parts["train"][1]
        scores = {name: scores_of(outputs[name], y, y_train, run.classes) for name, (_, y) in run.parts.items()}
    wrong = [name for name, score in scores.items() if not math.isfinite(score["loss"])]
    if "train" in wrong:
        raise ValueError(
            f"the loss of the trained model is not finite on {', '.join(wrong)}: its outputs overflow {options.dtype}; "
            "no model is written. Give a smaller --lr, or --clip-norm 1, or scale the data"
        )
    for name in wrong:
        warnings.warn(f"the loss on {name} is not finite: for some of its samples the model overflows", stacklevel=2)
    summary = {
        "device": str(run.device),
        "seconds": round(seconds, 3),
        "epochs": len(history.rows),
        "model_epoch": epoch,
        **scores,
    }
    if run.device.tf32 and options.dtype == "float32":
        summary["products"] = "TF32"
    if group.size > 1:
        summary["ranks"] = group.size
    if history.interrupted:
        summary["interrupted"] = True
    elif len(history.rows) < options.epochs:
        summary["stopped_early"] = True
    metadata = {"classes": run.classes, "features": run.features}
    page = report(run, outputs, folder, _config(run, options), history.rows, summary)
    write_results(folder, model, metadata, history.rows, summary, page)
    with if_heard():
        show(folder, summary, options.processes, EXPECTED in os.environ)


def _take_the_best(run: Run, folder: Path, history: History) -> int:
    """Give the model the weights of the epoch with the best loss on validation; which epoch it has now."""
    losses = [row["validation_loss"] for row in history.rows]
    if not losses or losses[best := int(np.argmin(losses))] == losses[-1]:
        return len(losses)
    path = folder / BEST
    with suppress(OSError, ValueError):
        if read_metadata(path).get("epoch") == best + 1:
            load_model(path, into=run.model)
            return best + 1
    warn(f"{path} has not the weights of epoch {best + 1}, the best one, any more; the model is that of epoch {len(losses)}")
    return len(losses)
