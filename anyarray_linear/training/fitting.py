"""The training loop: `fit`, `evaluate`, `predict`.

What it is careful about:

- Arrays move to the model's device batch by batch; those that are there already are used as they are.
- No step turns a device array into a Python number. The loss is summed on the device and read once per epoch, and whether
  a step may be applied (loss and gradients finite) is decided on the device too.
- The order of epoch `e` is a function of the seed and `e` alone. So a run can stop after any step and go on elsewhere.
- Ctrl-C, or the stop flag, takes effect between two steps. A second Ctrl-C may cut a step in half, which is then not saved.
- With a `group`, all ranks take the same steps, and all leave together; what they say to each other is in `distributed`.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..arrays.checks import check_array
from ..arrays.device import Device
from ..arrays.memory import explained_memory
from ..arrays.place import Array, computing_on, dtype_name, namespace, reading_is_free
from ..distributed.agreement import adopt, digest, digest_of_rows, settings, snapshot
from ..distributed.group import Group
from ..initializers import layer_seed
from ..lanes import lane
from ..protocol import parameters
from .progress import Progress

Row = dict[str, Any]
Callback = Callable[[Any, Row], bool | None]

_ORDERS = int.from_bytes(b"fit")  # the child of the seed whose children give the orders; a layer of that seed has others
_LOOKED_AT = 16  # rows that are compared at resume
_VALIDATED = 1 << 20  # numbers in the inputs and outputs of all layers, in validation; a few MB
_CHUNK = 1 << 22  # elements read at once when values are checked, so that a memory-mapped file needs little memory


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

    def __init__(self, message: str, step: int, history: History) -> None:
        super().__init__(message)
        self.step, self.history = step, history


@dataclass
class History:
    """What happened in training.

    rows: a dict per epoch: `epoch` (from 1), `steps` so far, `loss` (mean over the epoch's samples, while training), `lr`,
    `seconds`, and with validation `validation_loss` and, for classes, `validation_accuracy`.
    interrupted: whether Ctrl-C or a stop flag ended it. skipped: the number of steps that `skip_nonfinite` passed over.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    skipped: int = 0


@dataclass
class _Data:
    """`X` and `y` wherever they are, or the given `rows` of them, and where batches should go."""

    X: Array
    y: Array
    device: Device
    dtype: Any
    rows: np.ndarray[Any, Any] | None = None

    def __post_init__(self) -> None:
        self.X, self.y = _signed(self.X, self.dtype), _signed(self.y, "int64")

    def __len__(self) -> int:
        return int(self.X.shape[0]) if self.rows is None else len(self.rows)

    def batches(
        self, order: np.ndarray[Any, Any] | None, batch_size: int, start: int = 0, group: Group | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Batches from row `start` on, in `order` (host indices) or as the rows come; the last may be smaller.

        group: if given, this rank's share of each batch, which may be empty.
        """
        order = self.rows if order is None else order
        takes = [_taker(x, order) for x in (self.X, self.y)]
        count = len(self) if order is None else len(order)
        y_dtype = self.dtype if _is_float(self.y) else None
        for i in range(start, count, batch_size):
            rows = i, min(i + batch_size, count)
            X, y = (take(*(rows if group is None else group.share(*rows))) for take in takes)
            yield self.device.asarray(X, dtype=self.dtype), self.device.asarray(y, dtype=y_dtype)


    def fingerprint(self) -> str:
        """The shapes, and some rows spread over all as training sees them: the same on any device, in any dtype."""
        import hashlib

        found = hashlib.sha256()
        floating = dtype_name(self.dtype)
        for x, dtype in ((self.X, floating), (self.y, floating if _is_float(self.y) else "int64")):
            found.update(repr((len(self), *x.shape[1:])).encode())
            for i in np.linspace(0, len(self) - 1, _LOOKED_AT).astype(int):
                row = int(i if self.rows is None else self.rows[i])
                found.update(Device.of(x).to_numpy(x[row : row + 1, ...]).astype(dtype).tobytes())
        return found.hexdigest()[:16]


def _is_float(x: Array) -> bool:
    return bool(namespace(x).isdtype(x.dtype, "real floating"))


def _signed(x: Array, dtype: Any) -> Array:
    """`x`, but a torch tensor of wide unsigned integers in `dtype`: torch can neither take rows of it nor compare it."""
    if dtype_name(x.dtype) in ("uint16", "uint32", "uint64") and Device.of(x).kind == "torch":
        return Device.of(x).asarray(x, dtype=dtype)
    return x


def _taker(x: Array, order: np.ndarray[Any, Any] | None) -> Callable[[int, int], Array]:
    """`(start, stop) -> rows`, where `x` is. The order is transferred once, not once per batch."""
    if order is None:
        return lambda start, stop: x[start:stop, ...]
    if isinstance(x, np.ndarray):
        return lambda start, stop: x[order[start:stop]]
    index = Device.of(x).asarray(order)

    def take(start: int, stop: int) -> Array:
        with computing_on(x) as xp:
            return xp.take(x, index[start:stop], axis=0)

    return take


def _model_place(model: Any, X: Array) -> tuple[Device, Any]:
    """Where the model computes and in what dtype: where its parameters are, or for want of any, where `X` is."""
    first = next(iter(parameters(model).values()), X)
    return Device.of(first), first.dtype


def _check_rows(X: Array, y: Array | None, names: tuple[str, str] = ("X", "y")) -> None:
    for name, x in zip(names, (X, y), strict=True):
        if x is None and name == names[1]:
            continue
        check_array(name, x)
        if not namespace(x).isdtype(x.dtype, ("bool", "integral", "real floating")):
            raise TypeError(f"{name} is {dtype_name(x.dtype)}; give real numbers, or for y class ids, as integers")
    if X.ndim == 0:
        raise ValueError(f"{names[0]} is a single number; its first axis must be the samples")
    if X.shape[0] == 0:
        raise ValueError(f"{names[0]} has no rows (shape {tuple(X.shape)}); give at least one sample")
    if y is not None and (y.ndim == 0 or y.shape[0] != X.shape[0]):
        raise ValueError(
            f"{names[0]} has {X.shape[0]} rows but {names[1]} has shape {tuple(y.shape)}; they must have as many rows"
        )


def _check_object(name: str, value: Any, methods: tuple[str, ...], example: str) -> None:
    """Raise `TypeError` unless `value` is an object with these methods, and no class."""
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {what}; give an object such as {example}")


def _check_model(model: Any) -> None:
    _check_object("model", model, ("forward", "gradients", "parameters", "__call__"), "Sequential(Linear(4, 3), ReLU())")


def _check_loss(loss: Any) -> None:
    _check_object("loss", loss, ("forward", "backward"), "SoftmaxCrossEntropy()")


def _check_parts(model: Any, loss: Any, optimizer: Any, callbacks: Any) -> None:
    """What has to do with training is what it should be, and not its class."""
    _check_model(model)
    _check_loss(loss)
    _check_object("optimizer", optimizer, ("step", "learning_rate"), "Adam(lr=1e-3)")
    if not parameters(model):
        raise ValueError(f"model is {model!r:.80}, which has no parameters to train")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks is {callbacks!r:.80}; give a list of functions f(model, row): callbacks=[f]")


def _check_finite(name: str, x: Array, dtype: Any) -> None:
    """Raise `ValueError` naming the first row with NaN or infinity, also where only the cast to `dtype` makes it."""
    if not _is_float(x):
        return
    rows = max(1, _CHUNK // max(1, math.prod(x.shape[1:])))
    for start in range(0, x.shape[0], rows):
        part = x[start : min(start + rows, x.shape[0]), ...]
        with computing_on(part) as xp, np.errstate(over="ignore"):
            part = xp.astype(part, getattr(xp, dtype_name(dtype)))
            if bool(xp.all(xp.isfinite(part))):
                continue
        host = np.isfinite(Device.of(part).to_numpy(part)).reshape(part.shape[0], -1)
        row = int(np.flatnonzero(~host.all(axis=1))[0])
        raise ValueError(
            f"{name} has a value in row {start + row} (rows counted from 0) that is NaN or infinite in {dtype_name(dtype)}; "
            f"remove the row, replace the value or scale the data"
        )


def _check_data(model: Any, loss: Any, data: _Data, names: tuple[str, str]) -> None:
    """Everything that can be known before training: shapes by running one row, and values by reading them once."""
    for name, x in zip(names, (data.X, data.y), strict=True):
        _check_finite(name, x, data.dtype)
    X, y = next(data.batches(np.arange(1), 1))
    with np.errstate(all="ignore"), data.device:
        Z = model(X)
        loss.forward(Z, y)
    if hasattr(loss, "check_ids") and not _is_float(data.y) and data.y.ndim == Z.ndim - 1:
        loss.check_ids(data.y, Z.shape[-1])


def _positive_int(name: str, value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an int >= {low}")
    if value < low:
        raise ValueError(f"{name} is {value}; it must be an int >= {low}")
    return int(value)


def _held(fraction: float, count: int) -> int:
    """How many of `count` rows the fraction for validation is."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation is {fraction}; give (X, y), or a fraction between 0 and 1")
    held = round(float(fraction) * count)
    if not 0 < held < count:
        raise ValueError(f"validation is {fraction} of {count} rows, which leaves nothing on one side")
    return held


def _split(held: int, count: int, seed: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Row numbers for training and validation, drawn from a stream of their own."""
    order = _epoch_order(seed, -1, count)
    return np.sort(order[held:]), np.sort(order[:held])


def _epoch_order(seed: Any, epoch: int, count: int) -> np.ndarray[Any, Any]:
    """The permutation of epoch `epoch`, from its own child of the seed: no state to carry from epoch to epoch."""
    child = type(seed)(entropy=seed.entropy, spawn_key=(*seed.spawn_key, _ORDERS, epoch + 1))
    return np.random.default_rng(child).permutation(count)


def _as_json(entropy: Any) -> Any:
    """What a seed was made of, in lists of ints."""
    return int(entropy) if isinstance(entropy, numbers.Integral) else [_as_json(part) for part in entropy]


def _stored_seed(folder: str | os.PathLike[str], model: Any) -> Any:
    """The seed of the training whose checkpoints are in the folder; `None` where none of them says it."""
    from ..files.checkpoints import _read, _size, checkpoints

    for path in checkpoints(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):  # told when it is loaded
            seed = (_read(path, lambda info: _size(model)).info or {})["metadata"]["training"]["seed"]
            return np.random.SeedSequence(entropy=seed["entropy"], spawn_key=seed["spawn_key"])
    return None


def _shown(x: Any) -> str:
    """Its `repr`, without where in memory it is."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x))


class _Guard:
    """Decides on the device which steps are applied, and remembers which one ended training.

    A step whose loss or gradients are not finite is called off. After more than `allowed` such steps, so is every later one;
    `fatal` is then that last straw's number, which the host reads once per epoch.
    """

    def __init__(self, device: Device, loss_dtype: Any, allowed: int, bad: int = 0) -> None:
        self.allowed, self.device = allowed, device
        self.total: Any = 0.0  # sum of loss times rows over the applied steps of this epoch, and the rows
        self.rows: Any = 0
        self.bad: Any = bad
        self.fatal: Any = 0
        self.last_bad: Any = None  # a lane's: the last step that was not finite
        self.accumulator = None
        if device.kind not in ("cpu",):
            info = device.xp.__array_namespace_info__().dtypes(device=None if device.kind == "cuda" else device.native)
            self.accumulator = info.get("float64", info["float32"])

    def start_epoch(self, total: float = 0.0, rows: int = 0) -> None:
        self.total, self.rows = total, rows

    def judge(self, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array | None:
        """What `optimizer.step` takes as `where`; also adds the loss to the epoch's sum. Steps count from 1."""
        if reading_is_free(value):
            return self._judge_now(step, value, gradients, rows)
        with computing_on(value) as xp:
            if isinstance(self.bad, int):  # the first step: from here on, the counts live on the device
                place = {"device": self.device.native}
                integer = xp.__array_namespace_info__().default_dtypes(**place)["integral"]
                self.bad, self.fatal = (xp.asarray(n, dtype=integer, **place) for n in (self.bad, self.fatal))
            return lane(_judged, xp)(xp, self, step, value, gradients, rows)

    def _judge_now(self, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array | None:
        value = float(value)
        with computing_on(next(iter(gradients))) as xp:
            finite = math.isfinite(value) and all(lane(_all_finite, xp)(xp, gradient) for gradient in gradients)
            if finite and not self.fatal:
                self.total += value * rows
                self.rows += rows
                return None
            if not self.fatal:
                self.bad += 1
                self.fatal = step if self.bad > self.allowed else 0
            return xp.asarray(False, device=self.device.native)

    def read(self) -> tuple[float, int, int, int]:
        """`(total, rows, bad, fatal)` as Python numbers: the one wait for the device in an epoch."""
        if isinstance(self.total, float) and isinstance(self.bad, int):
            return self.total, self.rows, self.bad, self.fatal
        total, rows, bad, fatal = (float(self.device.to_numpy(self._array(x))) for x in
                                   (self.total, self.rows, self.bad, self.fatal))
        return total, int(rows), int(bad), int(fatal)

    def _array(self, x: Any) -> Array:
        return x if hasattr(x, "dtype") else self.device.asarray(np.asarray(float(x), dtype=np.float32))


def _all_finite(xp: Any, x: Array) -> bool:
    """Whether no element is NaN or infinite."""
    # a sum is one pass and nearly always enough to know; it may overflow, though, where no element is infinite
    return math.isfinite(float(xp.sum(x))) or bool(xp.all(xp.isfinite(x)))


def _judged(xp: Any, guard: _Guard, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array:
    """Whether this step may be applied, a 0-d bool; brings the guard's sums and counts up to date, all on the device."""
    finite = xp.isfinite(value)
    for gradient in gradients:
        finite = finite & xp.all(xp.isfinite(gradient))
    going = guard.fatal == 0
    guard.bad = guard.bad + xp.astype(going & ~finite, guard.bad.dtype)
    guard.fatal = xp.where(going & (guard.bad > guard.allowed), step, guard.fatal)
    apply = finite & (guard.fatal == 0)
    value = xp.astype(value, guard.accumulator) * float(rows)
    guard.total = guard.total + xp.where(apply, value, 0.0)
    guard.rows = guard.rows + xp.astype(apply, guard.bad.dtype) * rows
    return apply


def _memory_advice(device: Device, batch_size: int) -> AbstractContextManager[None]:
    """A context in which running out of memory says what to change."""
    advice = f"use a smaller batch_size than {batch_size}, a smaller dtype (float32, not float64) or another device"
    return explained_memory(device, advice)


@contextmanager
def _deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Python's own Ctrl-C becomes a flag, so that no step is cut in half; a second one interrupts at once.

    Only in the main thread, and only where nobody has installed another handler.
    """
    pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


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

    X: `(N, ...)`, on any device and of any namespace; moved to the model's device batch by batch, in the model's dtype.
    y: `(N,)` class ids, or what else the loss takes; a float `y` is cast too.
    loss, optimizer: such as `SoftmaxCrossEntropy()` and `Adam(lr=1e-3)`.
    validation: `(X, y)`, or the fraction of the rows to hold out.
    seed: of the order of the batches and of the validation rows: an int, a NumPy `SeedSequence` or `Generator`, or `None`,
    which draws one, and at `resume` is the one that was drawn.
    callbacks: functions `f(model, row) -> bool | None`, called after each epoch; `True` stops.
    checkpoint: a folder that receives the state after each epoch, or after every `checkpoint_every` steps, and at the end.
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
        epochs, batch_size = _positive_int("epochs", epochs, 0), _positive_int("batch_size", batch_size)
        skip_nonfinite = _positive_int("skip_nonfinite", skip_nonfinite, 0)
        accumulate = _positive_int("accumulate", accumulate)
        if checkpoint_every is not None:
            checkpoint_every = _positive_int("checkpoint_every", checkpoint_every)
        if checkpoint is None and (resume or checkpoint_every):
            raise ValueError("resume and checkpoint_every need a folder: give checkpoint=folder")
        _check_parts(model, loss, optimizer, callbacks)
        _check_rows(X, y)
        device, dtype = _model_place(model, X)
        data, rows, held, held_count = _Data(X, y, device, dtype), None, None, 0
        if isinstance(validation, (int, float, numbers.Real)):  # a NumPy scalar is a Real
            held_count = _held(float(validation), len(data))
        elif validation is not None:
            try:
                held_X, held_y = validation
            except (TypeError, ValueError):
                raise TypeError("validation is neither (X, y) nor a fraction of the rows") from None
            _check_rows(held_X, held_y, ("the validation X", "the validation y"))
            held = _Data(held_X, held_y, device, dtype)
        with _memory_advice(device, batch_size):
            if held is not None:
                _check_data(model, loss, held, ("the validation X", "the validation y"))
            _check_data(model, loss, data, ("X", "y"))
        stored = _stored_seed(checkpoint, model) if seed is None and resume and checkpoint and not group.rank else None
        root = group.exchange(stored or layer_seed(seed))[0]  # only now: a Generator spawns a child each time
        if held_count:
            rows, held_rows = _split(held_count, len(data), root)
            held = _Data(data.X, data.y, device, dtype, held_rows)
        run = _Run(model, data, rows, held, loss, optimizer, batch_size, root, skip_nonfinite, accumulate, group)
        saver = _Saver(checkpoint if group.rank == 0 else None, checkpoint_every, run)
        if saver.folder is not None:
            saver.begin(resume)
        run.join(epochs)
        with (
            _deferred_interrupts() as interrupted,
            Progress(epochs, run.steps_per_epoch, progress and group.rank == 0) as bar,
            np.errstate(over="ignore", invalid="ignore", divide="ignore"),  # judged by the guard, not warned about
            device,  # current for layers, losses and callbacks of the user's own
            saver,
            _memory_advice(device, batch_size),
        ):
            try:
                while run.epoch < epochs and not run.stopped:
                    for _ in run.steps(lambda: interrupted() or (stop is not None and stop.is_set())):
                        bar.step(run.epoch, run.position // batch_size)
                        if run.history.interrupted:
                            break
                        saver.after_step()
                    if run.history.interrupted:
                        break
                    row = run.finish_epoch()
                    bar.epoch(row)
                    answers = [callback(model, row) for callback in callbacks]  # all, also when the first says stop
                    run.settle(any(answers))
                    saver.save()
                if not run.history.interrupted:  # it may have come in the last epoch's validation or callbacks
                    run.history.interrupted = any(group.exchange(interrupted() or (stop is not None and stop.is_set())))
            except KeyboardInterrupt:  # raised by a callback, or where Ctrl-C could not be deferred
                if group.size > 1:  # the others are elsewhere
                    raise
                run.history.interrupted = True
            if run.history.interrupted:
                run.judge()
                if run.whole:
                    saver.save()
    return run.history


class _Run:
    """A training in progress: everything that has to be kept to go on with it exactly."""

    def __init__(
        self,
        model: Any,
        data: _Data,
        rows: np.ndarray[Any, Any] | None,
        held: _Data | None,
        loss: Any,
        optimizer: Any,
        batch_size: int,
        seed: Any,
        skip_nonfinite: int,
        accumulate: int,
        group: Group,
    ) -> None:
        self.model, self.data, self.rows, self.held = model, data, rows, held
        self.loss, self.optimizer, self.batch_size, self.seed = loss, optimizer, batch_size, seed
        self.accumulate, self.group = accumulate, group
        self.count = len(data) if rows is None else len(rows)
        self.steps_per_epoch = -(-self.count // batch_size)
        self.guard = _Guard(data.device, data.dtype, skip_nonfinite)
        self.given = _shown(optimizer)  # a callback may change it
        self.history = History()
        self.epoch = self.step = self.position = 0
        self.stopped = False
        self.whole = True  # between two steps, all of this agrees with the weights and with the optimizer
        self.seconds = 0.0
        self.best = math.inf  # the best score of an epoch, and whether it is that of these weights and not saved yet
        self.is_best = False

    def order(self) -> np.ndarray[Any, Any]:
        """The rows of this epoch, in its order."""
        order = _epoch_order(self.seed, self.epoch, self.count)
        return order if self.rows is None else self.rows[order]

    def join(self, epochs: int) -> None:
        """Make sure that all ranks train the same, and start from the state of rank 0."""
        if self.group.size == 1:
            return
        total = epochs * self.steps_per_epoch
        is_scheduled = total > 0 and callable(getattr(self.optimizer, "lr", None))
        steps = sorted({min(i, total - 1) for i in (0, 1, 10, 100, 1000)}) if is_scheduled else []
        self.group.agree(
            {
                "rows": len(self.data),
                "validation rows": 0 if self.held is None else len(self.held),
                "X of shape": tuple(self.data.X.shape[1:]),
                "epochs": epochs,
                "batch_size": self.batch_size,
                "accumulate": self.accumulate,
                "skip_nonfinite": self.guard.allowed,
                "loss": settings(self.loss),
                "optimizer": repr(self.optimizer),
                # machines differ in the last bits of a cosine
                **{f"in step {i + 1} the learning rate": f"{self.optimizer.learning_rate(i):.9g}" for i in steps},
                "model": re.sub(r"cuda:\d+", "cuda", _shown(self.model)),
                "parameters": {name: (tuple(W.shape), dtype_name(W.dtype)) for name, W in parameters(self.model).items()},
                "device": self.data.device.kind,
                **self.digests(),
            }
        )
        self.group.claim(self.data.device)
        first = self.group.rank == 0
        sent = self.group.exchange((snapshot(self.model, self.optimizer), self.state()) if first else None)[0]
        if not first:
            adopt(self.model, self.optimizer, sent[0])
            self.restore(sent[1])

    def digests(self) -> dict[str, str]:
        """Of the data as training sees it, to be compared between ranks."""
        found = {}
        for what, data in (("", self.data), ("the validation ", self.held)):
            if data is not None and (data is self.data or data.X is not self.data.X):
                for name, x in (("X", data.X), ("y", data.y)):
                    dtype = dtype_name(data.dtype) if _is_float(x) or name == "X" else "int64"
                    found[f"{what}{name} with the SHA-256"] = digest_of_rows(x, dtype)[:16]
        return found

    def settle(self, stop: bool) -> None:
        """Whether training stops after this epoch, and whether all ranks are still the same."""
        if self.group.size > 1:
            state = digest(self.model, self.optimizer, self.seed.entropy, self.seed.spawn_key, self.epoch, self.step)
            self.group.check(state, f"after epoch {self.epoch}")
        self.stopped = any(self.group.exchange(stop))

    def steps(self, wants_stop: Callable[[], bool]) -> Iterator[None]:
        """Take the rest of this epoch's steps, one per iteration; `history.interrupted` says that any rank wants to stop."""
        began = time.perf_counter() - self.seconds
        for X, y in self.data.batches(self.order(), self.batch_size, self.position, self.group):
            rows = min(self.batch_size, self.count - self.position)
            value, gradients, told = self.gradients(X, y, rows, self.group.size > 1 and wants_stop())
            self.whole = False
            where = self.guard.judge(self.step + 1, value, gradients.values(), rows)
            self.optimizer.step(self.model, gradients, where=where)
            del value, gradients, where
            self.step += 1
            self.position += rows
            self.whole = True
            self.seconds = time.perf_counter() - began
            self.history.interrupted = told if self.group.size > 1 else wants_stop()
            yield

    def gradients(self, X: Array, y: Array, rows: int, wants_stop: bool = False) -> tuple[Array, dict[str, Array], bool]:
        """Loss and gradients of the batch of `rows` that `X` and `y` are this rank's share of; whether any wants to stop."""
        size = max(1, -(-X.shape[0] // self.accumulate))
        value, gradients = None, {}
        for i in range(0, X.shape[0], size):
            part = (X, y) if size == X.shape[0] else (X[i : i + size, ...], y[i : i + size, ...])
            more, more_gradients = self._part(*part, part[0].shape[0] / rows)
            if value is None:
                value, gradients = more, more_gradients
                continue
            with computing_on(value):
                value = value + more
                gradients = {name: dW + more_gradients[name] for name, dW in gradients.items()}
        if value is None:  # an empty share; the mean over no rows would be NaN
            W = next(iter(parameters(self.model).values()))
            with computing_on(W) as xp:
                value = xp.zeros((), dtype=W.dtype, device=self.data.device.native)
                gradients = {name: xp.zeros_like(W) for name, W in parameters(self.model).items()}
        return self.group.average(value, gradients, wants_stop)

    def _part(self, X: Array, y: Array, weight: float) -> tuple[Array, dict[str, Array]]:
        """Loss and gradients of some rows, times `weight`. Gradients are linear in `dZ`, and that is small."""
        Z, caches = self.model.forward(X)
        value, cache = self.loss.forward(Z, y)
        dZ = self.loss.backward(cache)
        if weight != 1:
            with computing_on(dZ):
                value, dZ = value * weight, dZ * weight
        _, gradients = self.model.gradients(dZ, caches, needs_dX=False)
        return value, gradients

    def finish_epoch(self) -> Row:
        """Read what the device summed, validate, and close the epoch's row."""
        began = time.perf_counter()
        total, rows = self.judge()
        row: Row = {
            "epoch": self.epoch + 1,
            "steps": self.step,
            "loss": total / rows if rows else math.nan,
            "lr": self.optimizer.learning_rate(self.optimizer.steps - 1),
        }
        if self.held is not None:
            scores = _evaluate(self.model, self.held, self.loss, self.scored_rows())
            row.update({f"validation_{name}": score for name, score in scores.items()})
        row["seconds"] = self.seconds + time.perf_counter() - began
        score: float = row["validation_loss" if "validation_loss" in row else "loss"]
        self.whole = False
        if score < self.best:  # and not where it is NaN
            self.best, self.is_best = score, True
        self.history.rows.append(row)
        self.epoch, self.position, self.seconds = self.epoch + 1, 0, 0.0
        self.guard.start_epoch()
        self.whole = True
        return row

    def scored_rows(self) -> int:
        """How many rows are validated at once: 1024, or as many as have a million numbers in all layers, or a batch."""
        outputs: int = sum(W.shape[0] for W in parameters(self.model).values() if W.ndim > 1)
        per_row: int = math.prod(self.data.X.shape[1:]) + outputs
        return max(self.batch_size, min(1024, _VALIDATED // max(1, per_row)))

    def judge(self) -> tuple[float, int]:
        """Read what the device summed, the loss and its rows; raise `NonFiniteError` if something was not finite."""
        total, rows, bad, fatal = self.guard.read()
        self.history.skipped = bad
        if fatal:
            self._raise(fatal)
        if wrong := self.overflowed():
            raise NonFiniteError(
                f"after step {self.step} (epoch {self.epoch + 1}) {', '.join(wrong)} are not finite, though loss and "
                "gradients were: the update itself overflowed. The weights are lost, but not a checkpoint from before. "
                f"Lower the learning rate, which was {self.optimizer.learning_rate(max(0, self.optimizer.steps - 1))}",
                self.step,
                self.history,
            )
        return total, rows

    def overflowed(self) -> list[str]:
        """The names of the parameters that are not finite; read from the device all at once."""
        found = parameters(self.model)
        with computing_on(next(iter(found.values()))) as xp:
            finite = xp.stack([xp.all(xp.isfinite(W)) for W in found.values()])
        return [name for name, good in zip(found, self.data.device.to_numpy(finite), strict=True) if not good]

    def _raise(self, fatal: int) -> None:
        """Name what was wrong in step `fatal`: the weights are as they were before it, so it can be looked at again."""
        batch = (fatal - 1) % self.steps_per_epoch
        start = batch * self.batch_size
        X, y = next(self.data.batches(self.order(), self.batch_size, start, self.group))
        value, gradients, _ = self.gradients(X, y, min(self.batch_size, self.count - start))
        wrong = [name for name, g in gradients.items() if not np.isfinite(self.data.device.to_numpy(g)).all()]
        raise NonFiniteError(
            f"step {fatal} (epoch {self.epoch + 1}, batch {batch + 1} of {self.steps_per_epoch}) gave a loss of "
            f"{float(self.data.device.to_numpy(value))} and gradients that are not finite for "
            f"{', '.join(wrong) or 'no parameter'}; the weights are as they were before that step"
            f"{', which found them not finite itself: the update before it overflowed' if self.overflowed() else ''}. "
            "Lower the learning rate, clip the gradients (clip_norm=1.0), or scale the data",
            fatal,
            self.history,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimizer, as JSON."""
        total, rows, bad, _ = self.guard.read()
        last = max(0, self.optimizer.steps - 1)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "seconds": self.seconds,
            "training": self.training,
            "optimizer": [self.given, _shown(self.optimizer)],
            "lr": [last, self.optimizer.learning_rate(last)],
            "guard": {"total": total, "rows": rows, "bad": bad},
            "history": self.history.rows,
            "best": self.best,
            "stopped": self.stopped,
        }

    @cached_property
    def training(self) -> dict[str, Any]:
        """What makes it this training, as JSON: another result would come of any of it being otherwise."""
        held = self.held
        return {
            "seed": {"entropy": _as_json(self.seed.entropy), "spawn_key": _as_json(self.seed.spawn_key)},
            "rows": len(self.data),
            "training rows": self.count,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "loss": _shown(self.loss),
            "data": self.data.fingerprint(),
            "validation": None if held is None else held.fingerprint(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise `ValueError` if `state` was saved by another training, or is none that a training can have."""
        other = "the checkpoint is of another training: its {} is {}, here it is {}; resume with the same {}"
        for name, mine in self.training.items():
            theirs = state["training"].get(name)
            if theirs != mine:
                raise ValueError(other.format(name, theirs, mine, "data, loss, batch_size, accumulate, validation and seed"))
        given, now = state["optimizer"]
        if self.given not in (given, now):
            raise ValueError(other.format("optimizer", given, self.given, "optimizer"))
        last, rate = state["lr"]
        if callable(getattr(self.optimizer, "lr", None)):
            here = self.optimizer.learning_rate(last)
            if not math.isclose(rate, here, rel_tol=1e-9):  # machines differ in the last bits of a cosine
                raise ValueError(other.format(f"learning rate in step {last + 1}", rate, here, "schedule"))
        if not self._can_have(state):
            raise ValueError("its state is none that a training can have")
        if (bad := state["guard"]["bad"]) > self.guard.allowed:
            raise ValueError(f"{bad} steps of it were not finite; resume with skip_nonfinite={bad} or more")

    def _can_have(self, state: dict[str, Any]) -> bool:
        """Whether this training can be in `state`."""
        step, epoch, position, guard = state["step"], state["epoch"], state["position"], state["guard"]
        counts = step, epoch, position, guard["rows"], guard["bad"]
        reals = state["seconds"], guard["total"], state["best"]
        if not all(type(n) is int and n >= 0 for n in counts) or not all(type(x) is float and x == x for x in reals):
            return False
        batches = -(-position // self.batch_size)
        return (
            0 <= state["seconds"] < math.inf
            and position in (batches * self.batch_size, self.count)
            and guard["rows"] <= position <= self.count
            and step == epoch * self.steps_per_epoch + batches
            and type(state["stopped"]) is bool
            and [row["epoch"] for row in state["history"]] == list(range(1, len(state["history"]) + 1))
            and len(state["history"]) == epoch
            and all(type(row[name]) is float for row in state["history"] for name in ("loss", "lr", "seconds"))
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Be where `state` was saved."""
        self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
        self.seconds, self.stopped, self.best = state["seconds"], state["stopped"], state["best"]
        self.history.rows[:] = state["history"]
        guard = state["guard"]
        self.history.skipped = self.guard.bad = guard["bad"]
        self.guard.start_epoch(guard["total"], guard["rows"])


class _Saver:
    """Writes checkpoints of a run at the right moments; does nothing without a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, every: int | None, run: _Run) -> None:
        self.folder, self.every, self.run = folder, every, run
        self._lock: Any = None

    def begin(self, resume: bool) -> None:
        """Lock the folder, and load its newest good checkpoint if asked to."""
        from ..files import checkpoints as files
        from ..files.atomic import locked

        assert self.folder is not None
        self._lock = locked(self.folder)
        self._lock.__enter__()
        try:
            found = files.checkpoints(self.folder)
            if found and not resume:
                raise ValueError(
                    f"{os.fspath(self.folder)} holds checkpoints of a training already; go on with it by resume=True, "
                    "or give another folder"
                )
            if found:
                run = self.run
                state = files.load_checkpoint(self.folder, run.model, run.optimizer, check=run.check)
                run.restore(state)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Saver:
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
        from ..files.checkpoints import save_checkpoint

        run = self.run
        if not run.guard.read()[-1] and not run.overflowed():
            save_checkpoint(self.folder, run.model, run.optimizer, state=run.state(), best=run.is_best)
            run.is_best = False


def _evaluate(model: Any, data: _Data, loss: Any, batch_size: int) -> dict[str, float]:
    """Mean loss and, where the targets are class ids, the share that the largest output gets right."""
    losses, right, weights = [], [], []
    for X, y in data.batches(None, batch_size):
        with data.device:
            Z = model(X)
            value, _ = loss.forward(Z, y)
        with computing_on(Z) as xp:
            losses.append(xp.astype(value, xp.float32) if dtype_name(value.dtype) == "float16" else value)
            weights.append(X.shape[0])
            if not _is_float(y) and y.ndim == Z.ndim - 1:
                found = xp.argmax(Z, axis=-1)
                # of a row with NaN that is the NaN's position, which would be right by chance
                hits = (found == xp.astype(y, found.dtype)) & ~xp.isnan(xp.max(Z, axis=-1))
                right.append(xp.count_nonzero(hits))
    with computing_on(losses[0]) as xp:
        host = data.device.to_numpy(xp.stack(losses)).astype(np.float64)
        scores = {"loss": math.fsum(host * weights) / len(data)}
        if right:
            per_row = math.prod(data.y.shape[1:])
            scores["accuracy"] = int(data.device.to_numpy(xp.sum(xp.stack(right)))) / (len(data) * per_row)
    return scores


def evaluate(model: Any, X: Array, y: Array, *, loss: Any, batch_size: int = 1024) -> dict[str, float]:
    """`{"loss": mean, "accuracy": fraction}` of `model` on `X` `(N, ...)` and `y`; accuracy where `y` are class ids.

    Arrays move as in `fit`; the values are read once, at the end.

    Raises `TypeError` or `ValueError` for arrays that do not fit.

    >>> import numpy as np
    >>> from anyarray_linear import Linear, SoftmaxCrossEntropy
    >>> evaluate(Linear.from_arrays(np.eye(2)), np.eye(2), np.asarray([0, 0]), loss=SoftmaxCrossEntropy())["accuracy"]
    0.5
    """
    _check_model(model)
    _check_loss(loss)
    _check_rows(X, y)
    data = _Data(X, y, *_model_place(model, X))
    batch_size = _positive_int("batch_size", batch_size)
    with _memory_advice(data.device, batch_size):
        return _evaluate(model, data, loss, batch_size)


def predict(model: Any, X: Array, *, batch_size: int = 1024) -> Array:
    """The raw outputs `Z` `(N, ...)` of `model` for `X` `(N, ...)`, where `X` lives and in the model's dtype.

    Raises `TypeError` or `ValueError` for an `X` that does not fit.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> predict(Linear.from_arrays(np.eye(2)), np.eye(2))
    array([[1., 0.],
           [0., 1.]])
    """
    _check_model(model)
    _check_rows(X, None)
    data = _Data(X, X, *_model_place(model, X))
    batch_size = _positive_int("batch_size", batch_size)
    with _memory_advice(data.device, batch_size):
        return _predict(model, data, batch_size)


def _predict(model: Any, data: _Data, batch_size: int) -> Array:
    home, take, parts = Device.of(data.X), _taker(data.X, None), []
    for i in range(0, len(data), batch_size):
        X = data.device.asarray(take(i, min(i + batch_size, len(data))), dtype=data.dtype)
        with data.device:
            parts.append(home.asarray(model(X)))
    with computing_on(parts[0]) as xp:
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
