"""A training in progress: its steps and epochs, and the state from which it goes on exactly."""

from __future__ import annotations

import math
import numbers
import re
import time
from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property, partial
from typing import Any

import numpy as np

from ..arrays.place import Array, computing_on, dtype_name
from ..distributed.agreement import adopt, adopt_states, digest, sendable, sendable_states, settings
from ..distributed.group import Group
from ..dropout import Dropout
from ..guard import Guard
from ..protocol import leaves, parameters, states
from ..scaling import LossScale
from ..step import TrainingStep, loss_and_gradients
from .batches import Batches
from .data import Data, epoch_order
from .evaluation import scores_of
from .history import History, NonFiniteError, Row
from .parts import divided, in_parts

_VALIDATED = 1 << 20  # numbers in the inputs and outputs of all layers, in validation; a few MB


class Run:
    """A training in progress: everything that has to be kept to go on with it exactly."""

    def __init__(
        self,
        model: Any,
        data: Data | Batches,
        rows: np.ndarray[Any, Any] | None,
        held: Data | Batches | None,
        loss: Any,
        optimizer: Any,
        batch_size: int,
        seed: Any,
        skip_nonfinite: int,
        microbatches: int,
        group: Group,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.model, self.data, self.rows, self.held = model, data, rows, held
        self.loss, self.optimizer, self.batch_size, self.seed = loss, optimizer, batch_size, seed
        self.microbatches, self.group = microbatches, group
        self.count: int | None  # what `position` counts in an epoch: rows, or batches that the caller makes
        if isinstance(data, Batches):
            self.count = self.steps_per_epoch = data.length
        else:
            self.count = len(data) if rows is None else len(rows)
            self.steps_per_epoch = -(-self.count // batch_size)
        self.guard = Guard(data.device, data.dtype, skip_nonfinite)
        self.given = shown(optimizer)  # a callback may change it
        self.history = History()
        self.epoch = self.step = self.position = 0
        self.stopped = False
        self.closing = False  # an epoch: its books are not in order
        # groups and parts have gradients of their own; a plain step is one that lanes know
        self.is_plain = group.size == 1 and microbatches == 1
        gradients = loss_and_gradients if self.is_plain else self._gradients
        self.operation = TrainingStep(
            model, loss, optimizer, guard=self.guard, gradients=gradients, loss_scale=loss_scale
        )
        self._asked = self._told = False  # whether this rank wants to stop, and whether any does
        self.seconds = 0.0
        self.best = math.inf  # the best score of an epoch, and whether it is that of these weights and not saved yet
        self.is_best = False

    @property
    def whole(self) -> bool:
        """Whether all of this agrees with the weights and with the optimizer, so that it can be saved."""
        return self.operation.whole and not self.closing and self.operation.number == self.step

    def order(self) -> np.ndarray[Any, Any]:
        """The rows of this epoch, in its order."""
        assert self.count is not None
        order = epoch_order(self.seed, self.epoch, self.count)
        return order if self.rows is None else self.rows[order]

    def join(self, epochs: int) -> None:
        """Make sure that all ranks train the same, and start from the state of rank 0."""
        if self.group.size == 1:
            return
        assert isinstance(self.data, Data)
        assert self.steps_per_epoch is not None
        total = epochs * self.steps_per_epoch
        is_scheduled = total > 0 and callable(getattr(self.optimizer, "lr", None))
        steps = sorted({min(i, total - 1) for i in (0, 1, 10, 100, 1000)}) if is_scheduled else []
        self.group.agree(
            {
                "rows": len(self.data),
                "validation rows": 0 if self.held is None else len(self.held),  # type: ignore[arg-type]
                "X of shape": tuple(self.data.X.shape[1:]),
                "epochs": epochs,
                "batch_size": self.batch_size,
                "microbatches": self.microbatches,
                "skip_nonfinite": self.guard.allowed,
                "loss": settings(self.loss),
                "optimizer": repr(self.optimizer),
                "loss_scale": repr(self.operation.loss_scale),
                # machines differ in the last bits of a cosine
                **{f"in step {i + 1} the learning rate": f"{self.optimizer.learning_rate(i):.9g}" for i in steps},
                "model": re.sub(r"cuda:\d+", "cuda", shown(self.model)),
                "parameters": {name: (tuple(W.shape), dtype_name(W.dtype)) for name, W in parameters(self.model).items()},
                "device": self.data.device.kind,
                **self.digests(),
            }
        )
        self.group.claim(self.data.device)
        for _, layer in leaves(self.model):
            if isinstance(layer, Dropout):  # ranks have other rows, so they drop other elements
                layer.stream = self.group.rank
        first = self.group.rank == 0
        own = (sendable(self.model, self.optimizer), {**self.state(), "history": self.history.rows}) if first else None
        sent = self.group.exchange(own)[0]
        if not first:
            adopt(self.model, self.optimizer, sent[0])
            self.restore(sent[1])

    def digests(self) -> dict[str, str]:
        """Of the data as training sees it, to be compared between ranks."""
        found: dict[str, str] = {}
        for what, data in (("", self.data), ("the validation ", self.held)):
            if isinstance(data, Data) and (data is self.data or data.X is not self.data.X):  # type: ignore[union-attr]
                found |= {f"{what}{name} with the SHA-256": sha for name, sha in data.fingerprints().items()}
        return found

    def settle(self, stop: bool) -> None:
        """Whether training stops after this epoch, and whether all ranks are still the same."""
        if self.group.size > 1:
            if states(self.model):  # ranks have seen other rows; rank 0's are what a checkpoint has, and all go on from
                sent = self.group.exchange(sendable_states(self.model) if not self.group.rank else None)[0]
                adopt_states(self.model, sent)
            more = self.seed.entropy, self.seed.spawn_key, self.epoch, self.step, self.scale()
            state = digest(self.model, self.optimizer, *more)
            self.group.check(state, f"after epoch {self.epoch}")
        self.stopped = any(self.group.exchange(stop))

    def steps(self, wants_stop: Callable[[], bool]) -> Iterator[None]:
        """Take the rest of this epoch's steps, one per iteration; `history.interrupted` says that any rank wants to stop."""
        began = time.perf_counter() - self.seconds
        for counted, rows, take in self._batches():
            self.operation.number, self.operation.rows = self.step, rows
            self._asked = self.group.size > 1 and wants_stop()
            take()
            self.step = self.operation.number
            self.position += counted
            self.seconds = time.perf_counter() - began
            self.history.interrupted = self._told if self.group.size > 1 else wants_stop()
            yield

    def _batches(self) -> Iterator[tuple[int, int, Callable[[], object]]]:
        """The rest of this epoch's steps: what each counts in `position`, its rows, and a function that takes it."""
        if isinstance(self.data, Batches):
            for X, y, weights in self.data.batches(self.position):
                yield 1, X.shape[0], partial(self.operation, X, y, weights)
            if not self.position:
                raise ValueError(f"{self.data.name} gave no batch in epoch {self.epoch + 1}; iter() must start a new pass")
            return
        order = self.order()
        assert self.count is not None
        if self.is_plain and self.data.is_in_place:
            there = self.data.device.asarray(order)
            for start in range(self.position, self.count, self.batch_size):
                stop, data = min(start + self.batch_size, self.count), self.data
                take = partial(self.operation.on_rows, data.X, data.y, there, start, stop, data.weights)
                yield stop - start, stop - start, take
        else:
            for X, y, weights in self.data.batches(order, self.batch_size, self.position, self.group):
                rows = min(self.batch_size, self.count - self.position)
                yield rows, rows, partial(self.operation, X, y, weights)

    def scale(self) -> dict[str, Any] | None:
        """The state of the loss scale, read from the device, and its constants; `None` where there is none."""
        scale = self.operation.loss_scale
        return None if scale is None else {**scale.state_dict(), "of": shown(scale)}

    def _gradients(
        self, model: Any, loss: Any, X: Array, y: Array, weights: Array | None, scale: LossScale | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Loss and gradients of a batch of which `X` and `y` are this rank's share, worked through part by part."""
        assert self.operation.rows is not None
        value, gradients = in_parts(model, loss, X, y, weights, self.microbatches, self.operation.rows, scale)
        value, gradients, self._told = self.group.average(value, gradients, self._asked)
        return divided(value, gradients)

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
            scores = scores_of(self.model, self.held, self.loss, self.scored_rows(), self.operation)
            row.update({f"validation_{name}": score for name, score in scores.items()})
        if scale := self.scale():
            row["loss_scale"] = scale["scale"]
        row["seconds"] = self.seconds + time.perf_counter() - began
        score: float = row["validation_loss" if "validation_loss" in row else "loss"]
        self.closing = True
        if score < self.best:  # and not where it is NaN
            self.best, self.is_best = score, True
        self.history.rows.append(row)
        self.epoch, self.position, self.seconds = self.epoch + 1, 0, 0.0
        self.guard.start_epoch()
        self.closing = False
        return row

    def scored_rows(self) -> int:
        """How many rows are validated at once: 1024, or as many as have a million numbers in all layers, or a batch."""
        outputs: int = sum(W.shape[0] for W in parameters(self.model).values() if W.ndim > 1)
        data = self.held if isinstance(self.held, Data) else self.data
        per_row: int = (math.prod(data.X.shape[1:]) if isinstance(data, Data) else 0) + outputs
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
        if isinstance(self.data, Batches):  # which may give others the second time
            raise NonFiniteError(
                f"step {fatal} (epoch {self.epoch + 1}) gave a loss or gradients that are not finite; the weights are as "
                "they were before that step. Lower the learning rate, clip the gradients (clip_norm=1.0), or scale the data",
                fatal,
                self.history,
            )
        assert self.count is not None
        assert self.steps_per_epoch is not None
        batch = (fatal - 1) % self.steps_per_epoch
        start = batch * self.batch_size
        X, y, weights = next(self.data.batches(self.order(), self.batch_size, start, self.group))
        self.operation.rows, self._asked = min(self.batch_size, self.count - start), False
        scale = self.operation.loss_scale
        # gradients that overflowed for good did so at the floor
        scaled = () if scale is None else (LossScale(scale.floor, floor=scale.floor),)
        value, gradients = self.operation.gradients(self.model, self.loss, X, y, weights, *scaled)
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
        """What a checkpoint keeps beside weights, optimizer and the rows of the history, as JSON."""
        total, rows, bad, _ = self.guard.read()
        last = max(0, self.optimizer.steps - 1)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "seconds": self.seconds,
            "training": self.training,
            "optimizer": [self.given, shown(self.optimizer)],
            "lr": [last, self.optimizer.learning_rate(last)],
            "guard": {"total": total, "rows": rows, "bad": bad},
            "best": self.best,
            "stopped": self.stopped,
            "loss_scale": self.scale(),
        }

    @cached_property
    def training(self) -> dict[str, Any]:
        """What makes it this training, as JSON: another result would come of any of it being otherwise."""
        held = self.held
        return {
            "seed": {"entropy": _as_json(self.seed.entropy), "spawn_key": _as_json(self.seed.spawn_key)},
            "rows": len(self.data) if isinstance(self.data, Data) else None,
            "training rows": self.count,
            "batch_size": self.batch_size,
            "accumulate": self.microbatches,  # the word of the first files
            "loss": shown(self.loss),
            # of some rows: at resume, the data may be on a card
            "data": self.data.fingerprints(0) if isinstance(self.data, Data) else "batches",
            "validation": None if held is None else held.fingerprints(0) if isinstance(held, Data) else "batches",
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise `ValueError` if `state` was saved by another training, or is none that a training can have."""
        other = "the checkpoint is of another training: its {} is {}, here it is {}; resume with the same {}"
        for name, mine in self.training.items():
            theirs = state["training"].get(name)
            if theirs != mine:
                same = "data, loss, batch_size, microbatches, validation and seed"
                raise ValueError(other.format(name, theirs, mine, same))
        given, now = state["optimizer"]
        if self.given not in (given, now):
            raise ValueError(other.format("optimizer", given, self.given, "optimizer"))
        last, rate = state["lr"]
        if type(last) is not int or last < 0 or type(rate) is not float:  # a schedule, which is the user's, would be asked
            raise ValueError(f"its learning rate is {rate!r:.60} in step {last!r:.60}, which no training can have")
        if callable(getattr(self.optimizer, "lr", None)):
            here = self.optimizer.learning_rate(last)
            if not math.isclose(rate, here, rel_tol=1e-9):  # machines differ in the last bits of a cosine
                raise ValueError(other.format(f"learning rate in step {last + 1}", rate, here, "schedule"))
        if self.operation.loss_scale is not None and (scale := state.get("loss_scale")):
            copy(self.operation.loss_scale).load_state_dict(scale)
            if scale.get("of") != (mine := shown(self.operation.loss_scale)):
                raise ValueError(other.format("loss_scale", scale.get("of"), mine, "loss_scale"))
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
        if isinstance(self.data, Batches):
            fits = self.count is None or (position <= self.count and step == epoch * self.count + position)
        else:
            assert self.count is not None
            assert self.steps_per_epoch is not None
            fits = (
                position in (batches * self.batch_size, self.count)
                and guard["rows"] <= position <= self.count
                and step == epoch * self.steps_per_epoch + batches
            )
        return (
            fits
            and 0 <= state["seconds"] < math.inf
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
        if self.operation.loss_scale is not None and (scale := state.get("loss_scale")):  # older checkpoints have none
            self.operation.loss_scale.load_state_dict(scale)


def _as_json(entropy: Any) -> Any:
    """What a seed was made of, in lists of ints; `TypeError` for a text, as in a file that somebody has changed."""
    if isinstance(entropy, str):
        raise TypeError(f"{entropy!r:.60} is no integer")
    return int(entropy) if isinstance(entropy, numbers.Integral) else [_as_json(part) for part in entropy]


def shown(x: Any) -> str:
    """Its `repr`, without where in memory it is."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x))
