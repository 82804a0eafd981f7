"""The compiled lane of NumPy arrays: a whole training step as machine code, made by numba once per machine.

`steps` says when it is taken, `forward` when a forward pass alone is. `program` makes a `table` of operations of a model,
and `source.engine` works through it: products by the BLAS of NumPy (`blas`), all else by the other modules of `source`,
on threads of its own (`threads`). `building` compiles, keeps and loads.
"""

from __future__ import annotations

from ...optimizers import apply_update
from ...protocol import outputs
from ...step import training_step, training_step_on_rows
from .forward import compiled_outputs
from .steps import compiled_step, compiled_step_on_rows
from .updates import compiled_update

OPERATIONS = {
    training_step: compiled_step,
    training_step_on_rows: compiled_step_on_rows,
    outputs: compiled_outputs,
    apply_update: compiled_update,
}
"""The portable operations, and their faster equals for NumPy arrays."""
