"""The `train` command: from data to a folder with a model and everything that says how it came about."""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import typer

from .. import __version__, distributed
from ..files.atomic import sweep
from ..files.checkpoints import checkpoints, files_of
from ..files.locks import locked
from ..losses import MeanSquaredError
from ..training import History, evaluate, fit
from ._common import BAD_INPUT, StopSignals, bad, one_line, warn
from ._report import Norms, report
from ._results import FILES, SUMMARY, show, write_json, write_results
from ._run import LR, Run, prepare
from ._streams import if_heard, tell

_CHECKPOINTS = "checkpoints"
_SCORED_ROWS = 10_000  # training accuracy is measured after each epoch, on this many samples at most
_CHANGEABLE = ("device", "epochs", "checkpoint_every")  # by --resume
_GROUPS: dict[str | None, Callable[[], distributed.Group]] = {
    None: distributed.Group,
    "mpi": distributed.mpi,
    "nccl": distributed.nccl,
}


def _option(text: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        _option("A .npz (X, y), .csv or .tsv (its last column is the target), .gz too. Without it: the digits.", "Data"),
    ] = None,
    target: Annotated[
        str | None, _option("The target's column in a .csv, or array in a .npz.", "Data", metavar="NAME")
    ] = None,
    task: Annotated[
        Literal["classification", "regression"] | None,
        _option("What the target is; by default, texts and few different whole numbers are classes.", "Data"),
    ] = None,
    features: Annotated[
        str | None, _option("Columns to learn from, such as a,b; by default, all but the target.", "Data", metavar="NAMES")
    ] = None,
    drop: Annotated[
        str | None, _option("Columns to leave out, such as id,name.", "Data", metavar="NAMES")
    ] = None,
    standardize: Annotated[
        bool, _option("Scale features, and a regression's target, to mean 0 and variance 1 while training.", "Data")
    ] = True,
    test: Annotated[float, _option("Fraction of the samples kept for the test at the end.", "Data")] = 0.2,
    validation: Annotated[float, _option("Fraction of the others that is watched while training.", "Data")] = 0.1,
    hidden: Annotated[
        str, _option('Sizes of the hidden layers, such as 128,64; "none" for a linear model.', "Model", metavar="SIZES")
    ] = "128",
    activation: Annotated[
        Literal["relu", "silu", "gelu", "tanh", "sigmoid"], _option("What stands between the layers.", "Model")
    ] = "relu",
    dtype: Annotated[
        Literal["float32", "float64", "float16"], _option("What is computed in; float16 is for CUDA.", "Model")
    ] = "float32",
    device: Annotated[
        str, _option('"auto", the best one that works; or "cpu", "cuda", "cuda:1".', "Training", metavar="SPEC")
    ] = "auto",
    epochs: Annotated[int, _option("How often the model sees every sample.", "Training", min=1)] = 30,
    batch_size: Annotated[int, _option("Samples per step.", "Training", min=1)] = 32,
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw"], _option("The update rule; sgd has a momentum of 0.9.", "Training")
    ] = "adam",
    lr: Annotated[
        float | None, _option("Learning rate; by default 0.05 for sgd, else 0.002.", "Training", metavar="RATE")
    ] = None,
    schedule: Annotated[
        Literal["constant", "cosine", "step", "warmup"],
        _option("cosine: down to 0; step: to a tenth after each third; warmup: up during epoch 1.", "Training"),
    ] = "constant",
    weight_decay: Annotated[
        float | None, _option("By default 0.01 for adamw, else 0.", "Training", metavar="DECAY")
    ] = None,
    clip_norm: Annotated[
        float | None, _option("Largest norm of all gradients together.", "Training", metavar="NORM")
    ] = None,
    processes: Annotated[
        Literal["mpi", "nccl"] | None,
        _option("Train with all processes of mpiexec, which share the batches; nccl for CUDA.", "Training", "--distributed"),
    ] = None,
    seed: Annotated[int, _option("Of the split, the weights and the order of the batches.", "Training", min=0)] = 0,
    out: Annotated[
        Path | None, _option("The run's folder; by default a new one in runs/.", "Output", metavar="FOLDER")
    ] = None,
    overwrite: Annotated[bool, _option("Replace the run that is in the folder.", "Output", "--overwrite")] = False,
    resume: Annotated[bool, _option("Go on with the run in the folder, with its options.", "Output", "--resume")] = False,
    checkpoint_every: Annotated[
        int | None, _option("Save after so many steps too, not only after epochs.", "Output", metavar="STEPS", min=1)
    ] = None,
) -> None:
    """Train a network of linear layers, and write a folder with the model and how it came about.

    Without options it learns the handwritten digits that come with the package, in seconds. With `--data` it learns from
    your file: classes or numbers, whichever its target has.

    The folder gets `model.safetensors` (PyTorch reads it too), `summary.json` (loss and accuracy on training, validation
    and test samples), `report.html` (a page to look at), `history.jsonl` (a line per epoch), `curves.png`, `config.json`,
    and `checkpoints` to resume from.
    Features are scaled while training only: the saved model contains the scaling, and takes your data as it is. Ctrl-C
    ends training after the step at hand; all files are written then too.

    **Examples**

    - `anyarray-linear train`
    - `anyarray-linear train --data wine.csv --hidden 64,32 --epochs 50 --out wine`
    - `anyarray-linear train --data people.csv --target income --drop id,name`
    - `anyarray-linear train --out wine --resume`
    - `mpiexec -n 4 anyarray-linear train --data wine.csv --distributed mpi`
    - `anyarray-linear predict wine new_wines.csv`
    """
    options = SimpleNamespace(**{name: value for name, value in locals().items() if name != "context"})
    group = context.obj or _GROUPS[processes]()  # it is there in a command line that was made from a config.json
    size, rank = distributed.launched()
    if processes is None and size > 1 and rank == 0:
        warnings.warn(f"each of these {size} processes trains alone; for one training give --distributed mpi", stacklevel=2)
    try:
        if resume and context.obj is None:
            given = {name for name in vars(options) if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
            with group.running():
                arguments = group.exchange(_restored(options, given) if group.rank == 0 else None)[0]
            command = context.command
            with command.make_context("train", arguments, parent=context.parent, obj=group) as restored:
                command.invoke(restored)
            return
        exit_code = _started(options, group)
    except Exception as error:
        if group.echoes and one_line(error) is not None:  # rank 0 says it
            raise typer.Exit(BAD_INPUT) from error
        raise
    if exit_code:
        raise typer.Exit(exit_code)


def _started(options: Any, group: distributed.Group) -> int:
    """Train in a folder that nobody else writes into meanwhile, on rank 0; the exit code."""
    with ExitStack() as kept:
        with group.running():
            if options.resume and options.overwrite:
                raise bad("overwrite", "it starts anew, and --resume goes on; give one of them")
            options.lr = LR[options.optimizer] if options.lr is None else options.lr
            run = prepare(options, group)  # what is wrong with the options shows here, before there is a folder
            group.agree(_data_of(run))
            # machines differ in the last bits of a mean
            run.x_scaling, run.y_scaling, run.loss = group.exchange((run.x_scaling, run.y_scaling, run.loss))[0]
            folder = None if group.rank else options.out or _fresh_folder()
            if folder is not None:
                _refuse_a_used(folder, options)
            stop = kept.enter_context(StopSignals())
            if folder is not None:
                kept.enter_context(_kept(folder, options))
            trained = _train(run, options, folder, stop, group)
            exit_code: int = max(group.exchange(stop.exit_code))
        if folder is not None:  # the others have left: they wait for no files
            _write(run, options, folder, group, *trained)
    return exit_code or stop.exit_code


def _data_of(run: Run) -> dict[str, Any]:
    """What the files of all ranks must have alike beside the numbers that `fit` compares."""
    scalings = {"the scaling of X": run.x_scaling, "the scaling of y": run.y_scaling}
    numbers = {name: None if s is None else " and ".join(map(str, s)) for name, s in scalings.items()}
    return {"classes": run.classes, "features": run.features, **numbers}


@contextmanager
def _kept(folder: Path, options: Any) -> Iterator[None]:
    """The folder, locked; after a failure without anything to go on with, it is as it was."""
    is_new = not folder.exists()
    with locked(folder / _CHECKPOINTS):
        sweep(folder)
        (folder / SUMMARY).unlink(missing_ok=True)  # first: it says that the others are whole, and of one run
        if options.overwrite:
            _clear(folder)
        try:
            yield
        except BaseException:
            if not options.resume and not checkpoints(folder / _CHECKPOINTS):
                _clear(folder)
                _remove_empty(folder, is_new)
            raise


def _fresh_folder() -> Path:
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    tries = (Path("runs", name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in tries if not folder.exists())


def _refuse_a_used(folder: Path, options: Any) -> None:
    if folder.exists() and not folder.is_dir():
        raise bad("out", f"{folder} is a file; give a folder")
    used = next((name for name in FILES if (folder / name).exists()), None)
    if used is None and checkpoints(folder / _CHECKPOINTS):
        used = _CHECKPOINTS
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
    for path in files_of(folder / _CHECKPOINTS):
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path, is_new: bool) -> None:
    with suppress(OSError):  # something of somebody else's is in it
        (folder / _CHECKPOINTS / ".lock").unlink(missing_ok=True)
        (folder / _CHECKPOINTS).rmdir()
        if is_new:
            folder.rmdir()


def _restored(options: Any, given: set[str]) -> list[str]:
    """The command line that goes on with the run in the folder; options `given` again must be what they were."""
    if options.out is None:
        raise bad("resume", "it needs the folder of the run: --out FOLDER")
    path = options.out / "config.json"
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is no regular file; start anew with --overwrite")
    try:
        with path.open(encoding="utf-8") as file:
            stored = dict(json.loads(file.read(1 << 20))["options"])
    except FileNotFoundError:
        raise bad("resume", f"{options.out} holds no run (no config.json); leave out --resume to start one") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start anew with --overwrite") from error
    now = _stored(options)
    unknown = sorted(stored.keys() - now.keys())
    if unknown:  # such as "out", which would send all that is written elsewhere
        raise ValueError(f"{path} has the option {unknown[0]!r:.60}, which no run is stored with; remove it from that file")
    for name in given & now.keys():
        fixed = name not in _CHANGEABLE or (name == "epochs" and stored.get("schedule") != "constant")
        if fixed and now[name] != stored.get(name):
            raise bad(name, f"it is {now[name]}, but the run in {options.out} has {stored.get(name)}; leave it out")
    stored |= {name: now[name] for name in given & now.keys()}
    arguments = []
    for name, value in stored.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and isinstance(now[name], bool):
            arguments.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    arguments += ["--overwrite"] * options.overwrite
    arguments += [] if options.processes is None else [f"--distributed={options.processes}"]
    return [*arguments, f"--out={options.out}", "--resume"]  # the last word has who typed it


def _stored(options: Any) -> dict[str, Any]:
    """The options that config.json keeps, as JSON; where the files are as seen from anywhere."""
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "resume", "overwrite", "processes")}
    return kept | {"data": None if options.data is None else str(options.data.resolve())}


def _config(run: Run, options: Any) -> dict[str, Any]:
    return {"options": _stored(options), "device": str(run.device), "model": repr(run.model), "version": __version__}


def _train(
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


def _decision(run: Run, options: Any) -> str:
    """What the target was taken for, and how to have it otherwise."""
    _, target, told, instead, _ = run.reading
    return f"{target}: {told}" + (f"; to change that: --task {instead}" if instead and options.task is None else "")


def _write(run: Run, options: Any, folder: Path, group: distributed.Group, history: History, seconds: float) -> None:
    """Write the results, and show them."""
    model = run.for_raw_data()
    loss = run.loss if run.classes is not None else MeanSquaredError()
    with np.errstate(over="ignore", invalid="ignore"):  # told below; of what is saved, on raw data
        scores = {name: evaluate(model, X, y, loss=loss) for name, (X, y) in run.parts.items()}
    wrong = [name for name, score in scores.items() if not math.isfinite(score["loss"])]
    if "train" in wrong:
        raise ValueError(
            f"the loss of the trained model is not finite on {', '.join(wrong)}: its outputs overflow {options.dtype}; "
            "no model is written. Give a smaller --lr, or --clip-norm 1, or scale the data"
        )
    for name in wrong:
        warnings.warn(f"the loss on {name} is not finite: for some of its samples the model overflows", stacklevel=2)
    summary = {"device": str(run.device), "seconds": round(seconds, 3), **scores}
    if group.size > 1:
        summary["ranks"] = group.size
    if history.interrupted:
        summary |= {"interrupted": True, "epochs": len(history.rows)}
    metadata = {"classes": run.classes, "features": run.features}
    page = report(run, model, folder, _config(run, options), history.rows, summary)
    write_results(folder, model, metadata, history.rows, summary, page)
    with if_heard():
        show(folder, summary, options.processes)


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
        callbacks=[score],
        checkpoint=None if folder is None else folder / _CHECKPOINTS,
        checkpoint_every=None if folder is None else options.checkpoint_every,
        resume=options.resume and folder is not None,
        stop=stop,
        group=group,
    )
    return history, len(history.rows) - len(rows_now)
