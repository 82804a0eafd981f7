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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays.numbers import whole
from ..arrays.place import Array
from ..distributed.group import Group
from ..initializers import layer_seed
from .checking import check_data, check_parts, check_rows
from .data import Data, count_of_held, memory_advice, model_place, split_rows
from .history import Callback, History, StopFlag
from .interrupts import deferred_interrupts
from .progress import Progress
from .run import Run
from .saving import Saver, stored_seed


def fit(
    model: Any,
    X: Array,
    y: Array,
    *,
    loss: Any,
    optimizer: Any,
    epochs: int = 20,
    batch_size: int = 64,
    validation: tuple[Array, Array] | float | None = None,
    seed: Any = 0,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    skip_nonfinite: int = 0,
    stop: StopFlag | None = None,
    accumulate: int = 1,
    group: Group | None = None,
) -> History:
    """Train `model` on `X` and `y` in shuffled mini-batches.

    X: `(N, ...)`, on any device and of any namespace; moved to the model's device batch by batch, in the model's dtype, or
    once before training, where a GPU has plenty of room for all.
    y: `(N,)` class ids, or what else the loss takes; a float `y` is cast too.
    loss, optimizer: such as `SoftmaxCrossEntropy()` and `Adam(lr=1e-3)`.
    validation: `(X, y)`, or the fraction of the rows to hold out.
    seed: of the order of the batches and of the validation rows: an int, a NumPy `SeedSequence` or `Generator`, or `None`,
    which draws one, and at `resume` is the one that was drawn.
    callbacks: functions `f(model, row) -> bool | None`, called after each epoch; `True` stops.
    checkpoint: a folder that receives the state after each epoch, or after every `checkpoint_every` steps, and at the end.
    The rows of the history are in its `epochs.jsonl`, each as it was when its epoch was first saved.
    resume: go on from the folder's newest good checkpoint, to exactly the result of a run that never stopped. Data, loss,
    optimizer and all that has to do with the steps must be as they were; only `epochs`, the device and `group` may change.
    skip_nonfinite: pass over up to this many steps whose loss or gradients are not finite.
    stop: a `threading.Event` or the like; once set, training stops after the step at hand, as at Ctrl-C.
    accumulate: work on each batch in so many parts, one after the other, whose gradients are summed before the step; then
    only the activations of a part need memory.
    group: `distributed.mpi()` or `nccl()`, to train as one of several processes that call `fit` alike, each on its share of
    every batch. Weights, optimizer and seed are then rank 0's, which alone shows progress and reads and writes checkpoints.
    Callbacks run on all ranks, since all must change alike; if one says stop, all stop, and so with `stop` and Ctrl-C.

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
        accumulate = whole("accumulate", accumulate)
        if checkpoint_every is not None:
            checkpoint_every = whole("checkpoint_every", checkpoint_every)
        if checkpoint is None and (resume or checkpoint_every):
            raise ValueError("resume and checkpoint_every need a folder: give checkpoint=folder")
        check_parts(model, loss, optimizer, callbacks)
        check_rows(X, y)
        device, dtype = model_place(model, X)
        data, rows, held, held_count = Data(X, y, device, dtype), None, None, 0
        if isinstance(validation, (int, float, numbers.Real)):  # a NumPy scalar is a Real
            held_count = count_of_held(float(validation), len(data))
        elif validation is not None:
            try:
                held_X, held_y = validation
            except (TypeError, ValueError):
                raise TypeError("validation is neither (X, y) nor a fraction of the rows") from None
            check_rows(held_X, held_y, ("the validation X", "the validation y"))
            held = Data(held_X, held_y, device, dtype)
        with memory_advice(device, batch_size):
            if held is not None:
                check_data(model, loss, held, ("the validation X", "the validation y"))
            check_data(model, loss, data, ("X", "y"))
            if group.size == 1:
                data.move()
        stored = stored_seed(checkpoint, model) if seed is None and resume and checkpoint and not group.rank else None
        root = group.exchange(stored or layer_seed(seed))[0]  # only now: a Generator spawns a child each time
        if held_count:
            rows, held_rows = split_rows(held_count, len(data), root)
            held = Data(data.X, data.y, device, dtype, held_rows)
        run = Run(model, data, rows, held, loss, optimizer, batch_size, root, skip_nonfinite, accumulate, group)
        with Saver(checkpoint if group.rank == 0 else None, checkpoint_every, resume, run) as saver:
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
    except KeyboardInterrupt:  # raised by a callback, or where Ctrl-C could not be deferred
        if run.group.size > 1:  # the others are elsewhere
            raise
        run.history.interrupted = True
    if run.history.interrupted:
        run.judge()
        if run.whole:
            saver.save()
