"""The update of a large model by a loop of one's own: what `optimizer.step` does, in one pass over memory on all cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ...arrays.place import Array, Namespace
from ...binding import Binding, flat_of
from ...clipping import clipped
from ...optimizers import apply_update
from .. import numpy as numpy_lane
from . import layout as at
from .building import Declined
from .program import rule_of
from .running import Runner, put_rule
from .table import CHUNK, Table

LARGE = 1 << 18
"""Parameters from which on an update takes longer than what is around it."""
AFTER = 2
"""Updates by the definition before code is compiled or loaded."""
_tables: WeakKeyDictionary[Binding, UpdateTable | None] = WeakKeyDictionary()
_otherwise: Any = numpy_lane.OPERATIONS[apply_update]


class UpdateTable(Table):
    """The operations of an update: one for each parameter, whose gradient is wherever it is."""

    def __init__(self, optimizer: Any, flat: Any) -> None:
        self.runner = Runner(flat.W.dtype)
        super().__init__(flat.W.dtype, self.runner.threads)
        self.flat, self.rule = flat, rule_of(optimizer)
        moments = [*(moment.ctypes.data for moment in flat.moments), 0, 0][:2]
        for part in flat.slices.values():
            tiles, chunk = self.chunks(part.stop - part.start, CHUNK)
            W, M, V = (x and x + part.start * self.dtype.itemsize for x in (flat.W.ctypes.data, *moments))
            self.add(at.UPDATE, tiles, W, 0, M, V, part.stop - part.start, self.rule, chunk)
        self.seal()
        self.work = flat.W.size
        self.runner.prepare(self)
        self.numbers[at.APPLY] = self.numbers[at.SCALE] = 1.0

    def apply(self, gradients: Mapping[str, Array], by: Any) -> None:
        """Update in place."""
        self.table[:, 5] = [gradients[name].ctypes.data for name in self.flat.slices]
        put_rule(self.numbers, by)
        self.runner.run(self)


def _fit(gradients: Mapping[str, Array]) -> bool:
    return all(type(dW) is np.ndarray and dW.flags.c_contiguous for dW in gradients.values())


def compiled_update(
    xp: Namespace,
    optimizer: Any,
    bound: Binding,
    gradients: Mapping[str, Array],
    by: Any,
    where: Array | None,
    scale: Array | None = None,
) -> None:
    """`apply_update`, compiled, for a large model."""
    size = sum(W.size for W in bound.parameters) if bound.flat is None else bound.flat.W.size
    if size < LARGE or optimizer.steps < AFTER or scale is not None or not _fit(gradients):
        _otherwise(xp, optimizer, bound, gradients, by, where, scale)
        return
    flat = flat_of(xp, bound)
    table = _tables.get(bound)
    if bound not in _tables or (table is not None and (table.flat is not flat or table.rule != rule_of(optimizer))):
        try:
            table = UpdateTable(optimizer, flat)
        except Declined:
            table = None
        _tables[bound] = table
    if table is None:
        _otherwise(xp, optimizer, bound, gradients, by, where)
    elif where is None or where:
        table.apply(gradients if optimizer.clip_norm is None else clipped(gradients, optimizer.clip_norm), by)
