"""The compiled functions themselves: `run` works through a program, and `worker` is what a thread of the pool does."""

from __future__ import annotations

from numba import njit

from .. import layout as at
from . import activations, dropout, layers, losses, normalization, updates
from .machine import (
    INT64,
    PLAIN,
    atomic_add,
    atomic_load,
    atomic_store,
    call,
    flush_denormals,
    pointer,
    rarely,
    relax,
    restore_denormals,
)

SPINS = 1000  # a wait within a step is a few microseconds; after so many looks, others may have the core


@njit(**PLAIN)
def tile_of(op, c, tile, like):
    """Compute one tile."""
    code = op[at.CODE]
    if code == at.FORWARD:
        layers.forward(op, c, tile, like)
    elif code == at.WEIGHT_GRADIENT:
        layers.weight_gradient(op, c, tile, like)
    elif code == at.INPUT_GRADIENT:
        layers.input_gradient(op, c, tile, like)
    elif code == at.UPDATE:
        updates.update(op, c, tile, like)
    elif code == at.LOSS:
        losses.loss(op, c, tile, like)
    elif code == at.JUDGE:
        updates.judge(op, c, like)
    elif code == at.LOOK:
        updates.look(op, tile, like)
    elif code == at.ACTIVATION:
        activations.activation(op, c, tile, like)
    elif code == at.ACTIVATION_GRADIENT:
        activations.activation_gradient(op, tile, like)
    elif code == at.TAKE:
        layers.take(op, c, tile, like)
    else:
        rarer_tile_of(op, c, tile, like)


@rarely
def rarer_tile_of(op, c, tile, like):
    code = op[at.CODE]
    if code == at.NORMALIZE:
        normalization.normalize(op, c, tile, like)
    elif code == at.NORMALIZE_WEIGHT_GRADIENT:
        normalization.weight_gradient(op, tile, like)
    elif code == at.NORMALIZE_INPUT_GRADIENT:
        normalization.input_gradient(op, tile, like)
    elif code == at.DROP:
        dropout.drop(op, c, tile, like)


@njit(**PLAIN)
def work(control, like):
    """Draw tickets and compute their tiles until there are none."""
    before = flush_denormals()
    c = pointer(control, INT64)
    total, address, mine = c[at.TOTAL], c[at.OPERATIONS], 0
    if c[at.LOCAL]:  # MKL: one thread for a product, in this thread
        mine = call(c[at.LOCAL], 1, 0)
    op = pointer(address, INT64)
    while True:
        ticket = atomic_add(control + 8 * at.NEXT, 1)
        if ticket >= total:
            break
        while ticket >= op[at.FIRST] + op[at.TILES]:
            address += 8 * at.FIELDS
            op = pointer(address, INT64)
        spins = 0
        while atomic_load(control + 8 * at.DONE) < op[at.AFTER]:
            relax()
            spins += 1
            if spins > SPINS and c[at.YIELD]:
                call(c[at.YIELD], 0, 0)
        tile_of(op, c, ticket - op[at.FIRST], like)
        atomic_add(control + 8 * at.DONE, 1)
    if c[at.LOCAL]:
        call(c[at.LOCAL], mine, 0)
    restore_denormals(before)


@njit(**PLAIN)
def run(control, pool, others, like):
    """Run a program, with up to so many `others` of the pool, if there is one."""
    c = pointer(control, INT64)
    for i in (at.X, at.Y, at.ORDER, at.WEIGHTS):
        if c[i]:
            c[i] = pointer(c[i] + c[at.DATA], INT64)[0]
    c[at.FLAGS] = 0
    atomic_store(control + 8 * at.DONE, 0)
    atomic_store(control + 8 * at.NEXT, 0)
    if pool == 0:
        work(control, like)
        return
    p = pointer(pool, INT64)
    atomic_store(pool + 8 * at.PLACES, others)
    atomic_store(pool + 8 * at.JOB, control)
    atomic_add(pool + 8 * at.GENERATION, 1)
    if atomic_load(pool + 8 * at.SLEEPING) > 0:
        call(p[at.LOCK], pool + 8 * at.MUTEX, 0)
        call(p[at.WAKE], pool + 8 * at.CONDITION, 0)
        call(p[at.UNLOCK], pool + 8 * at.MUTEX, 0)
    work(control, like)
    spins = 0
    while atomic_load(control + 8 * at.DONE) < c[at.TOTAL]:
        relax()
        spins += 1
        if spins > SPINS:
            call(c[at.YIELD], 0, 0)
    atomic_store(pool + 8 * at.JOB, 0)
    while atomic_load(pool + 8 * at.INSIDE) > 0:  # nobody still looks at this program
        relax()
        spins += 1
        if spins > SPINS:
            call(c[at.YIELD], 0, 0)


@njit(**PLAIN)
def worker(pool, like):
    """Wait for a program, help with it, and wait again: first watching, since the next step is mostly near, then asleep."""
    p = pointer(pool, INT64)
    seen = 0
    while True:
        spins = 0
        while atomic_load(pool + 8 * at.GENERATION) == seen:
            relax()
            spins += 1
            if spins > p[at.PATIENCE]:
                call(p[at.LOCK], pool + 8 * at.MUTEX, 0)
                atomic_add(pool + 8 * at.SLEEPING, 1)
                while atomic_load(pool + 8 * at.GENERATION) == seen:
                    call(p[at.WAIT], pool + 8 * at.CONDITION, pool + 8 * at.MUTEX)
                atomic_add(pool + 8 * at.SLEEPING, -1)
                call(p[at.UNLOCK], pool + 8 * at.MUTEX, 0)
        seen = atomic_load(pool + 8 * at.GENERATION)
        atomic_add(pool + 8 * at.INSIDE, 1)
        job = atomic_load(pool + 8 * at.JOB)
        if job != 0 and atomic_add(pool + 8 * at.PLACES, -1) > 0:
            work(job, like)
        atomic_add(pool + 8 * at.INSIDE, -1)


@njit(**PLAIN)
def enter(control, pool, others, like):
    """`run`, or without a program `worker`: one door, so that all is compiled once."""
    if control:
        run(control, pool, others, like)
    else:
        worker(pool, like)
