"""The training loop: `fit`.

What it is careful about:

- Arrays move to the model's device batch by batch; those that are there already are used as they are.
- No step turns a device array into a Python number. The loss is summed on the device and read once per epoch, and whether
  a step may be applied (loss and gradients finite) is decided on the device too.
- The order of epoch `e` is a function of the seed and `e` alone. So a run can stop after any step and go on elsewhere.
- Ctrl-C, or the stop flag, takes effect between two steps. A second Ctrl-C may cut a step in half, which is then not saved.
- With a `group`, all ranks take the same steps, and all leave together; what they say to each other is in `distributed`.
"""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..arrays.checks import check_array
from ..arrays.numbers import whole
from ..arrays.place import Array, is_array
from ..distributed.group import Group
from ..initializers import layer_seed
from ..losses import Loss
from ..protocol import Layer, Optimizer
from ..scaling import LossScale
from .batches import Batches
from .checking import check_batches, check_data, check_parts, check_rows
from .data import Data, count_of_held, memory_advice, model_place, split_rows, takes_ids
from .history import Callback, History, StopFlag
from .interrupts import deferred_interrupts
from .progress import Progress
from .run import Run
from .saving import Saver, stored_seed


def fit(
    model: Layer,
    X: Array | Iterable[Any],
    y: Array | None = None,
    *,
    loss: Loss,
    optimizer: Optimizer,
    epochs: int = 20,
    batch_size: int = 64,
    validation: tuple[Array, Array] | float | Iterable[Any] | None = None,
    seed: Any = 0,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    skip_nonfinite: int = 0,
    stop: StopFlag | None = None,
    group: Group | None = None,
    sample_weight: Array | None = None,
    microbatches: int = 1,
    loss_scale: LossScale | None = None,
    accumulate: int | None = None,
) -> History:
    """Train `model` on `X` and `y` in shuffled mini-batches.

    X: `(N, ...)`, on any device and of any namespace; moved to the model's device batch by batch, in the model's dtype, or
    once before training, where a GPU has plenty of room for all. Or, without `y`, batches that the caller makes: a list of
    `(X, y)` or `(X, y, weights)`, a torch `DataLoader`, any object whose `iter()` starts a new pass. They come in the order
    and size that they have; see `resume`.
    y: `(N,)` class ids, or what else the loss takes; a float `y` is cast too.
    loss, optimizer: such as `SoftmaxCrossEntropy()` and `Adam(lr=1e-3)`.
    validation: `(X, y)`, the fraction of the rows to hold out, or batches like those of `X`.
    seed: of the order of the batches and of the validation rows: an int, a NumPy `SeedSequence` or `Generator`, or `None`,
    which draws one, and at `resume` is the one that was drawn.
    callbacks: functions `f(model, row) -> bool | None`, called after each epoch; `True` stops.
    checkpoint: a folder that receives the state after each epoch, or after every `checkpoint_every` steps, and at the end.
    The rows of the history are in its `epochs.jsonl`, each as it was when its epoch was first saved.
    resume: go on from the folder's newest good checkpoint, to exactly the result of a run that never stopped. Data, loss,
    optimizer and all that has to do with the steps must be as they were; only `epochs`, the device and `group` may change.
    With batches of the caller's own, a pass that was cut short is begun anew and its first batches are left out: the result
    is exact if every pass has the same batches in the same order, or if training had stopped at the end of an epoch.
    skip_nonfinite: pass over up to this many steps whose loss or gradients are not finite.
    stop: a `threading.Event` or the like; once set, training stops after the step at hand, as at Ctrl-C.
    group: `distributed.mpi()` or `nccl()`, to train as one of several processes that call `fit` alike, each on its share of
    every batch. Weights, optimizer and seed are then rank 0's, which alone shows progress and reads and writes checkpoints.
    Callbacks run on all ranks, since all must change alike; if one says stop, all stop, and so with `stop` and Ctrl-C.
    sample_weight: `(N,)`, how much each row counts: the loss of a batch is the mean weighted by them.
    microbatches: work on each batch in so many parts, one after the other, whose gradients are summed before the step; then
    only the activations of a part need memory. Its old name is `accumulate`.
    loss_scale: how the gradients of a float16 model are scaled, a new `LossScale()` by default; the rows of the history tell
    it. A step whose scaled gradients overflow is called off, and no bad one as long as the scale can be halved.

    Returns the `History`; `interrupted` is true when Ctrl-C or the stop flag ended training. A second Ctrl-C does not wait
    for the step at hand: where it cuts a step in half, `model` and `optimizer` are left so, and no checkpoint is written.

    Raises, before anything is trained, `TypeError` or `ValueError` for arguments that do not fit, NaN or infinite data and
    class ids out of range. Raises `NonFiniteError` at the end of the epoch in which a loss or gradient was NaN or infinite,
    or when training is stopped in it; that step and all after it were not applied. So it does where a parameter is. With a
    group, raises `distributed.RankError` on every rank when another one fails, falls silent or differs.

    >>> import numpy as np
    >>> from anyarray_linear import SGD, Linear, MeanSquaredError
    >>> X = np.linspace(-1, 1, 64).reshape(-1, 1)
    >>> layer = Linear(1, 1, seed=0)
    >>> history = fit(layer, X, 3 * X + 1, loss=MeanSquaredError(), optimizer=SGD(0.5), batch_size=16, progress=False)
    >>> round(float(layer.W[0, 0]), 3), round(float(layer.b[0, 0]), 3)
    (3.0, 1.0)
    """
    group = Group() if group is None else group
    if not isinstance(group, Group):
        raise TypeError(f"group is {group!r:.80}; give the group itself: group=distributed.mpi()")
    with group.running():
        epochs, batch_size = whole("epochs", epochs, 0), whole("batch_size", batch_size)
        skip_nonfinite = whole("skip_nonfinite", skip_nonfinite, 0)
        if accumulate is not None:
            warnings.warn("accumulate is now called microbatches; it still works", DeprecationWarning, stacklevel=2)
            microbatches = accumulate
        microbatches = whole("microbatches", microbatches)
        if checkpoint_every is not None:
            checkpoint_every = whole("checkpoint_every", checkpoint_every)
        if checkpoint is None and (resume or checkpoint_every):
            raise ValueError("resume and checkpoint_every need a folder: give checkpoint=folder")
        check_parts(model, loss, optimizer, callbacks)
        device, dtype = model_place(model, X)
        ids = takes_ids(model)
        data: Data | Batches
        if y is None and not is_array(X):
            data = Batches(X, device, dtype, takes_ids=ids)
            _check_options_of_batches(batch_size, validation, sample_weight, group)
        else:
            if y is None:
                raise TypeError("y is missing: give fit(model, X, y, ...), or batches (X, y) in place of X")
            check_rows(X, y)
            if sample_weight is not None:
                check_array("sample_weight", sample_weight)
            data = Data(X, y, device, dtype, weights=sample_weight, takes_ids=ids)
        held, held_count = _held(validation, data, model)
        rows = None
        with memory_advice(device, batch_size):
            for each, names in ((held, ("the validation X", "the validation y")), (data, ("X", "y"))):
                if isinstance(each, Batches):
                    check_batches(model, loss, each)
                elif each is not None:
                    check_data(model, loss, each, names)
            if group.size == 1 and isinstance(data, Data):
                data.move()
        stored = stored_seed(checkpoint, model) if seed is None and resume and checkpoint and not group.rank else None
        root = group.exchange(stored or layer_seed(seed))[0]  # only now: a Generator spawns a child each time
        if held_count and isinstance(data, Data):
            rows, held_rows = split_rows(held_count, len(data), root)
            held = Data(data.X, data.y, device, dtype, held_rows, takes_ids=ids)
        how = batch_size, root, skip_nonfinite, microbatches, group, loss_scale
        run = Run(model, data, rows, held, loss, optimizer, *how)
        with Saver(checkpoint if group.rank == 0 else None, checkpoint_every, resume, run) as saver:
            if saver.folder is not None and run.history.rows:
                for callback in callbacks:
                    if hasattr(callback, "resume"):
                        callback.resume(model, run.history.rows, saver.folder)
            run.join(epochs)
            with (
                deferred_interrupts() as interrupted,
                Progress(epochs, run.steps_per_epoch, progress and group.rank == 0) as bar,
                np.errstate(all="ignore"),  # judged by the guard, not warned about
                run.operation.place.without_graph(),  # a parameter of torch's own may have one
                device,  # current for layers, losses and callbacks of the user's own
                memory_advice(device, batch_size),
            ):
                _go_on(run, saver, bar, epochs, callbacks, lambda: interrupted() or (stop is not None and stop.is_set()))
    return run.history


def _check_options_of_batches(batch_size: int, validation: Any, sample_weight: Any, group: Group) -> None:
    """Raise `ValueError` for what has no meaning where the caller makes the batches."""
    if batch_size != 64:
        raise ValueError(f"batch_size is {batch_size}, but X gives batches, which have a size already; leave it out")
    if isinstance(validation, numbers.Real):
        raise ValueError(f"validation is {validation}, a fraction, but X gives batches; give (X, y), or batches for it")
    if sample_weight is not None:
        raise ValueError("sample_weight is for arrays; give batches (X, y, weights) instead")
    if group.size > 1:
        raise ValueError("with a group, X and y must be arrays, of which each rank takes its share")


def _held(validation: Any, data: Data | Batches, model: Any) -> tuple[Data | Batches | None, int]:
    """What to validate with, or how many rows to hold out for it."""
    if validation is None:
        return None, 0
    if isinstance(validation, numbers.Real):  # a NumPy scalar is one
        assert isinstance(data, Data)
        return None, count_of_held(float(validation), len(data))
    names = "the validation X", "the validation y"
    pair: Any = validation
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and (is_array(pair[0]) or not isinstance(pair[0], (tuple, list))):
        X, y = pair
        check_rows(X, y, names)
        return Data(X, y, data.device, data.dtype, takes_ids=data.takes_ids), 0
    try:
        return Batches(validation, data.device, data.dtype, takes_ids=data.takes_ids, name="validation"), 0
    except TypeError as error:
        raise TypeError(f"validation is neither (X, y) nor a fraction of the rows, nor batches: {error}") from None


def _go_on(
    run: Run, saver: Saver, bar: Progress, epochs: int, callbacks: Sequence[Callback], wants_stop: Callable[[], bool]
) -> None:
    """Train from where `run` is to the end of the epochs, or until somebody wants it to stop."""
    try:
        while run.epoch < epochs and not run.stopped:
            for _ in run.steps(wants_stop):
                bar.step(run.epoch, run.position // run.batch_size)
                if run.history.interrupted:
                    break
                saver.after_step()
            if run.history.interrupted:
                break
            row = run.finish_epoch()
            bar.epoch(row)
            answers = [callback(run.model, row) for callback in callbacks]  # all, also when the first says stop
            run.settle(any(answers))
            saver.save()
        if not run.history.interrupted:  # it may have come in the last epoch's validation or callbacks
            run.history.interrupted = any(run.group.exchange(wants_stop()))
        if not run.history.interrupted:
            for callback in callbacks:
                if hasattr(callback, "finish"):
                    callback.finish(run.model)
    except KeyboardInterrupt:  # raised by a callback, or where Ctrl-C could not be deferred
        if run.group.size > 1:  # the others are elsewhere
            raise
        run.history.interrupted = True
    if run.history.interrupted:
        run.judge()
        if run.whole:
            saver.save()
