"""The `train` command: from data to a folder with a model and everything that says how it came about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from .. import distributed
from ..arrays import tf32 as tf32_setting
from ._common import BAD_INPUT, StopSignals, bad, one_line
from ._folder import fresh_folder, kept_folder, refuse_a_used
from ._ranks import check_size, start
from ._resuming import nothing_to_do, restored
from ._run import LR, Run, prepare
from ._streams import tell
from ._training import train_run, write_run

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
    init: Annotated[
        Literal["he_normal", "he_uniform", "xavier_normal", "xavier_uniform", "lecun_normal", "pytorch", "zeros"],
        _option("How the first weights are drawn.", "Model"),
    ] = "pytorch",
    dtype: Annotated[
        Literal["float32", "float64", "float16"], _option("What is computed in; float16 is for CUDA.", "Model")
    ] = "float32",
    device: Annotated[
        str, _option('"auto", the best one that works; or "cpu", "cuda", "cuda:1".', "Training", metavar="SPEC")
    ] = "auto",
    tf32: Annotated[
        bool, _option("Form float32 products in TF32 on the CUDA device: faster, with factors of 11 bits.", "Training")
    ] = False,
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
    ranks: Annotated[
        int | None,
        _option("Start so many processes on this machine, which share the batches.", "Training", "--processes", min=1),
    ] = None,
    processes: Annotated[
        Literal["mpi", "nccl"] | None,
        _option("Train with all processes of mpiexec, which share the batches; nccl for CUDA.", "Training", "--distributed"),
    ] = None,
    seed: Annotated[int, _option("Of the split, the weights and the order of the batches.", "Training", min=0)] = 0,
    early_stopping: Annotated[
        int | None,
        _option("Stop when the loss on validation has not improved so long.", "Training", metavar="EPOCHS", min=1),
    ] = None,
    keep: Annotated[
        Literal["best", "last"],
        _option("The epoch whose weights the model gets: of the best loss on validation, or the last.", "Training"),
    ] = "best",
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
    - `anyarray-linear train --data wine.csv --processes 4`
    - `mpiexec -n 4 anyarray-linear train --data wine.csv --distributed mpi`
    - `anyarray-linear predict wine new_wines.csv`
    """
    options = SimpleNamespace(**{name: value for name, value in locals().items() if name != "context"})
    if ranks is not None and context.obj is None:
        start(ranks, processes, device)
    group = context.obj or _GROUPS[processes]()  # it is there in a command line that was made from a config.json
    check_size(group)
    size, rank = distributed.launched()
    if processes is None and size > 1 and rank == 0:
        warnings.warn(f"each of these {size} processes trains alone; for one training give --distributed mpi", stacklevel=2)
    try:
        if resume and context.obj is None:
            given = {name for name in vars(options) if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
            with group.running():
                arguments = group.exchange(restored(options, given) if group.rank == 0 else None)[0]
            command = context.command
            with command.make_context("train", arguments, parent=context.parent, obj=group) as again:
                command.invoke(again)
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
        kept.enter_context(tf32_setting.restored())
        with group.running():
            if options.resume and options.overwrite:
                raise bad("overwrite", "it starts anew, and --resume goes on; give one of them")
            options.lr = LR[options.optimizer] if options.lr is None else options.lr
            run = prepare(options, group)  # what is wrong with the options shows here, before there is a folder
            group.agree(_data_of(run))
            # machines differ in the last bits of a mean
            run.x_scaling, run.y_scaling, run.loss = group.exchange((run.x_scaling, run.y_scaling, run.loss))[0]
            folder = None if group.rank else options.out or fresh_folder()
            if folder is not None:
                refuse_a_used(folder, options)
            stop = kept.enter_context(StopSignals())
            if folder is not None:
                kept.enter_context(kept_folder(folder, options))
            if folder is not None and options.resume and (told := nothing_to_do(folder, options)):
                tell(told)
            trained = train_run(run, options, folder, stop, group)
            exit_code: int = max(group.exchange(stop.exit_code))
        if folder is not None:  # the others have left: they wait for no files
            write_run(run, options, folder, group, *trained)
    return exit_code or stop.exit_code


def _data_of(run: Run) -> dict[str, Any]:
    """What the files of all ranks must have alike beside the numbers that `fit` compares."""
    scalings = {"the scaling of X": run.x_scaling, "the scaling of y": run.y_scaling}
    numbers = {name: None if s is None else " and ".join(map(str, s)) for name, s in scalings.items()}
    return {"classes": run.classes, "features": run.features, **numbers}
