"""Checkpoints: a run's model, optimizer and state in one file, of which a folder has the last few.

A checkpoint is all that resuming needs, and a model file as well. Nothing wrong gets in: a file is checked against the model
and the optimizer, and only when all of it fits is either of them touched.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

from ..arrays.place import Array, dtype_name
from ..binding import MASTER
from ..protocol import check_model, join, leaves, trained
from ..scaling import is_half
from .architecture import architecture_of, first_difference, warn_of_what_is_not_kept
from .atomic import atomic_write
from .journal import NAME as JOURNAL
from .journal import rows_of
from .sealed import MOMENT, CheckpointError, File, as_json, read, seal, told
from .tensors import (
    assign,
    check_tensor,
    match,
    match_numbers,
    memory_advice,
    numbers_of,
    on_host,
    placed,
    placed_all,
    size_of,
    weights_of,
)

_BEST = "best.safetensors"
_STEP = re.compile(r"step-([0-9]+)\.safetensors")


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    optimizer: Any,
    *,
    state: Mapping[str, Any],
    keep: int = 3,
    best: bool = False,
    history: Mapping[str, Any] | None = None,
) -> Path:
    """Write all that resuming needs to `folder/step-000000123.safetensors`, atomically, and remove older checkpoints.

    state: what else the run needs, as JSON holds it: epoch, position, history, host random state; NaN, infinities and ints
    of any size come back. `state["step"]` numbers the file; without it, the optimizer's steps do.
    keep: how many checkpoints stay, the newest ones. best: whether to write `folder/best.safetensors` as well.
    history: what `Journal(folder).keep(rows)` returned. The rows, in their own file, then come back as `state["history"]`,
    and the checkpoints do not grow with them.

    Returns the path of the checkpoint. The folder is made if need be. An old one that cannot be removed is warned of.

    Raises `TypeError` for a state that JSON cannot hold, and `OSError` where the file cannot be written; what was in the
    folder is intact then.
    """
    check_model(model)
    kept = as_json("state", state)
    step = kept.get("step", optimizer.steps)
    if not isinstance(step, int) or step < 0:
        raise ValueError(f'state["step"] is {step!r}; it must be an int >= 0')
    if keep < 1:
        raise ValueError(f"keep is {keep}; it must be at least 1")
    rule = optimizer.state_dict()
    moments = {f"{MOMENT}{name}/{m}": on_host(x) for name, own in rule.pop("moments").items() for m, x in own.items()}
    info = {"architecture": architecture_of(model), "optimizer": rule, "metadata": kept, **numbers_of(model)}
    warn_of_what_is_not_kept(model)
    if history is not None:
        info["history"] = dict(history)
    path = Path(folder) / f"step-{step:09}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = seal(path, weights_of(model) | moments, info)
    if best:  # first: whoever dies between the two comes back to before both, and writes both again
        atomic_write(path.with_name(_BEST), data, follow=False)
    atomic_write(path, data, follow=False)
    past = [old for old in checkpoints(folder) if _step(old) <= step]
    for old in past[keep:]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:  # the new one is safe, which is what matters
            warnings.warn(f"an old checkpoint cannot be removed: {error}", RuntimeWarning, stacklevel=2)
    return path


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    optimizer: Any,
    *,
    check: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Fill `model` and `optimizer` from the newest good checkpoint in `folder`, and return the state saved with it.

    model, optimizer: built as they were for the run, on any device; a schedule as `lr` is code, and not in the file.
    check: called with the state, once all else fits and before anything is changed; it may refuse it with a `ValueError`.
    A damaged checkpoint is passed over for the one before it, with a `RuntimeWarning` that names it and says why.

    Raises `CheckpointError` if no checkpoint is good, or if the newest good one is of another architecture, dtype or
    optimizer, or is refused by `check`; `model` and `optimizer` are as they were then.
    """
    damaged = []
    for path in checkpoints(folder):
        try:
            file = read(path, lambda info: size_of(model))
            if file.info is None or "optimizer" not in file.info:
                raise CheckpointError(f"{path} holds no state of an optimizer, so it is no checkpoint")
            state = dict(file.info["metadata"])
            if "history" in file.info:
                state["history"] = _rows(path, file.info["history"])
        except (CheckpointError, OSError) as error:
            warnings.warn(f"skipping a checkpoint: {error}", RuntimeWarning, stacklevel=2)
            damaged.append(str(error))
            continue
        with memory_advice(model):
            _resume(path, file, file.info, model, optimizer, state, check)
        return state
    raise CheckpointError(f"{folder} holds no good checkpoint" + "".join(f"\n  {why}" for why in damaged))


def _has_no_masters(file: File, parameters: Mapping[str, Array]) -> bool:
    """Whether it is a file of a float16 model from before optimizers kept masters."""
    return any(map(is_half, parameters.values())) and not any(name.endswith(f"/{MASTER}") for name in file.moments)


def _rows(path: Path, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return rows_of(path.parent, said)
    except CheckpointError as error:
        raise CheckpointError(f"{path} has lost its history: {error}") from error


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, the newest first, `best` not among them; none where there is no such folder."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def files_of(folder: str | os.PathLike[str]) -> list[Path]:
    """All that a training has written to `folder` and that is there, but the lock; for whoever starts anew."""
    others = (Path(folder) / name for name in (_BEST, JOURNAL))
    return [*checkpoints(folder), *(path for path in others if path.is_symlink() or path.exists())]


def stored_states(folder: str | os.PathLike[str], model: Any) -> Iterator[dict[str, Any]]:
    """The states, without the history, of the checkpoints in `folder` that can be read, the newest first.

    model: like theirs.
    """
    for path in checkpoints(folder):
        with suppress(CheckpointError, OSError):
            yield dict((read(path, lambda info: size_of(model)).info or {"metadata": {}})["metadata"])


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _resume(
    path: Path,
    file: File,
    info: Mapping[str, Any],
    model: Any,
    optimizer: Any,
    state: Mapping[str, Any],
    check: Callable[[dict[str, Any]], object] | None,
) -> None:
    """Check everything, and only then change the optimizer and the model."""
    try:
        difference = first_difference(info["architecture"], architecture_of(model), "")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} describes no model: {told(error)}") from error
    if difference:
        raise CheckpointError(f"{path} is of another model: {difference}")
    weights, numbers = match(path, file.weights, model), match_numbers(path, info, model)
    parameters = {join(name, p): getattr(layer, p) for name, layer in leaves(model) for p in layer.parameters()}
    moments: dict[str, dict[str, Array]] = {}
    old = _has_no_masters(file, parameters)
    for name, x in file.moments.items():
        name, _, m = name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{path} has the optimizer's {m} of {name}, which the model does not have")
        like = parameters[name]
        kept_in = "float32" if is_half(like) and not old else dtype_name(like.dtype)
        check_tensor(path, f"the optimizer's {m} of {name}", x, kept_in, tuple(like.shape))
        moments.setdefault(name, {})[m] = placed(x, like)
    needed = {join(name, p) for name, layer in trained(model) for p in layer.parameters()}  # of frozen layers it has none
    if moments and not needed <= set(moments):
        lacking = ", ".join(sorted(needed - set(moments)))
        raise CheckpointError(f"{path} has nothing of the optimizer's for {lacking}")
    rule = {**info["optimizer"], "moments": moments}
    try:
        copy(optimizer).load_state_dict(rule)
        if check is not None:
            check(dict(state))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} does not fit: {told(error)}") from error
    if old:
        warnings.warn(
            f"{path} is from before float16 models had float32 master weights, so it has none; training goes on from the "
            "float16 weights, with other results than before",
            RuntimeWarning,
            stacklevel=4,
        )
    new = placed_all(weights)
    optimizer.load_state_dict(rule)
    assign([*new, *numbers])
