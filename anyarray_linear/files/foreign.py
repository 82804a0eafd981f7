"""Weights that another program has written: under other names, at other positions, in another dtype."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.place import dtype_name
from ..protocol import join
from .sealed import CheckpointError, Host, some
from .tensors import places_of, shapes_of

Weights = Mapping[str, Host]
_Group = dict[str, tuple[int, ...]]  # the tensors of a layer: their names within it, and their shapes


def renamed(path: str | os.PathLike[str], weights: Weights, names: Mapping[str, str] | None, model: Any) -> Weights:
    """The file's tensors under the names that `model` has for them.

    names: from a tensor's name in the file, or that of its layer, to what stands for it in the model. Without it, names that
    are positions only, as in a `torch.nn.Sequential`, count in their order: a `Dropout` or `Flatten` there shifts nothing.

    Raises `CheckpointError` for names that are not in the file or the model, and then says which ones go by their shapes.
    """
    expected = shapes_of(model)
    if names is not None:
        weights = _by_table(path, weights, names)
    elif weights.keys() != expected.keys():
        weights = _by_position(weights, expected)
    if strange := [name for name in weights if name not in expected]:
        raise CheckpointError(
            f"{path} has {some(strange)}, but the model has {some(list(expected)) or 'no parameters'}"
            f"{_suggestion(weights, expected) if names is None else ''}"
        )
    return weights


def in_dtypes(path: str | os.PathLike[str], weights: Weights, model: Any, cast: bool) -> Weights:
    """The tensors in the model's dtypes: those that hold every value are taken at once, narrower ones if `cast` says so.

    Raises `CheckpointError` for a narrower dtype without `cast`, and for a value that is infinite in it.
    """
    places, result = places_of(model), {}
    for name, x in weights.items():
        layer, p = places[name]
        dtype = np.dtype(dtype_name(getattr(layer, p).dtype))
        if not np.can_cast(x.dtype, dtype) and not cast:
            raise CheckpointError(
                f"{path}: {name} is {x.dtype.name} in the file, but the model is {dtype.name}, which would round it; "
                "if that is meant: load_model(path, into=model, cast=True)"
            )
        with np.errstate(over="ignore"):
            result[name] = x.astype(dtype, copy=False)
        if x.dtype != dtype and np.isinf(result[name]).sum() != np.isinf(x).sum():
            raise CheckpointError(f"{path}: {name} has values up to {np.abs(x).max():.3g}, which {dtype.name} does not hold")
    return result


def _by_table(path: str | os.PathLike[str], weights: Weights, names: Mapping[str, str]) -> Weights:
    unused, result = set(names), {}
    for name, x in weights.items():
        matching = [old for old in names if old in ("", name) or name.startswith(f"{old}.")]
        if matching:
            old = max(matching, key=len)
            unused.discard(old)
            name = join(names[old], name[len(old) :].removeprefix("."))
        if name in result:
            raise CheckpointError(f"{path}: by names, two tensors of the file are {name}")
        result[name] = x
    if unused:
        raise CheckpointError(f"{path} has no {some(sorted(unused))}, which names has, only {some(list(weights))}")
    return result


def _by_position(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> Weights:
    """The tensors at the model's positions, if all are of numbered layers that in their order have the model's shapes."""
    theirs, ours = _groups({name: x.shape for name, x in weights.items()}), _groups(expected)
    numbered = all(part.isdecimal() for name in (*theirs, *ours) for part in name.split("."))
    if not numbered or [*theirs.values()] != [*ours.values()]:
        return weights
    return {join(new, p): weights[join(old, p)] for old, new in zip(theirs, ours, strict=True) for p in theirs[old]}


def _suggestion(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> str:
    """The argument `names` that fits by shapes, layers of equal shapes in their order; `""` where nothing does."""
    theirs, ours = _groups({name: x.shape for name, x in weights.items()}), _groups(expected)
    found: dict[str, str] = {}
    for old, group in theirs.items():
        new = next((new for new in ours if ours[new] == group and new not in found.values()), None)
        if new is None:
            return ""
        found[old] = new
    if len(found) < len(ours):
        return ""
    return f"; by their shapes it could be load_model(path, into=model, names={found})"


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Group]:
    """The tensors by layer, in the order of their names, where `layer10` comes after `layer9`."""
    groups: dict[str, _Group] = {}
    for name in sorted(shapes, key=_natural):
        layer, _, p = name.rpartition(".")
        groups.setdefault(layer, {})[p] = tuple(shapes[name])
    return groups


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)|\.", name) if part]
