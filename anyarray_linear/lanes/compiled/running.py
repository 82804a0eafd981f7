"""Runs a table of operations: by which code, with products by which BLAS, on how many threads."""

from __future__ import annotations

from struct import Struct
from typing import Any, cast

import numpy as np

from ...arrays.cores import usable_cores
from . import layout as at
from .blas import alone, blas
from .building import caller, code_for
from .table import DATA, Table
from .threads import pool_for, yielding

IN_ONE = 1 << 17
"""OpenBLAS forms products of fewer multiplications in one thread anyway."""
_LONG = 1 << 22
"""Multiplications in a table from which on other Python threads may run beside it."""

_put_adam, _put_sgd = (cast(Any, Struct(form)).pack_into for form in ("8d", "5d"))


def put_rule(numbers: Any, by: Any) -> None:
    """Tell compiled code the scalars of a rule, of `Rule.scalars`."""
    if hasattr(by, "beta1"):
        _put_adam(numbers, 8 * at.RULE, *by)
    else:
        own, velocity = (1.0, by.momentum) if by.nesterov else (0.0, 1.0)
        _put_sgd(numbers, 8 * at.RULE, by.lr, by.momentum, own, by.decay, velocity)


def name_of(dtype: Any, whole: bool) -> str:
    """What the code is called that takes arrays of that dtype, of all layers or of `Linear` and `ReLU` only."""
    return f"{dtype.name}-whole" if whole else str(dtype.name)


class Runner:
    """The code for one dtype, and all that it needs. Raises `Declined` where there is none.

    whole: whether it is for layers beyond `Linear` and `ReLU`, whose code takes longer to compile.
    """

    def __init__(self, dtype: Any, *, whole: bool = False) -> None:
        self.code, self.blas = code_for(name_of(dtype, whole)), blas()
        self.gemm = self.blas.single if dtype == np.float32 else self.blas.double
        self.yielding = yielding()
        self.holding, self.letting_go = (caller(self.code.run, holding=holding) for holding in (True, False))
        self.pool = pool_for(self.code)
        self.threads = max(1, min(alone.cores(self.blas), len(usable_cores()), 64))
        self.told = [
            f"compiled: products by {self.blas.name}, {n} thread{'s' if n > 1 else ''}" for n in range(1, self.threads + 1)
        ]

    def prepare(self, table: Table) -> None:
        """Tell it, once, what does not change."""
        c = table.control
        c[at.GEMM], c[at.WIDE], c[at.LOCAL] = self.gemm, int(self.blas.wide), self.blas.local
        c[at.YIELD], c[at.DATA] = self.yielding, DATA

    def run(self, program: Table) -> int:
        """Run it; by how many threads beside this one."""
        run = self.holding if program.work < _LONG else self.letting_go
        if not program.parallel or not self.pool.lock.acquire(blocking=False):
            if program.largest <= IN_ONE:
                run(program.address, 0, 0)
                return 0
            alone.enter(self.blas)
            try:
                run(program.address, 0, 0)
            finally:
                alone.leave(self.blas)
            return 0
        try:
            wanted = min(alone.cores(self.blas), len(usable_cores()), program.threads) - 1
            others = self.pool.grow(wanted) if wanted > 0 else 0
            alone.enter(self.blas)
            try:
                run(program.address, self.pool.address if others else 0, others)
            finally:
                alone.leave(self.blas)
            return others
        finally:
            self.pool.lock.release()
