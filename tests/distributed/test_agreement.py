"""What rank 0 sends to the others: with it they are the same, states of layers included, and their digests say so."""

from __future__ import annotations

import pickle

import numpy as np

from anyarray_linear import Adam, Dropout, Linear, MeanSquaredError, ReLU, Sequential, TrainingStep
from anyarray_linear.distributed.agreement import adopt, digest, sendable
from anyarray_linear.protocol import states


class OnHost:
    asarray = staticmethod(np.asarray)


def trained(backend, seed, steps):
    """A model with a state, its optimizer, and how to take a step of them."""
    layers = Linear(3, 4, dtype="float32", seed=seed), ReLU(), Dropout(0.5, seed=seed), Linear(4, 2, dtype="float32", seed=seed)
    model, optimizer = Sequential(*layers), Adam(1e-2)
    for name in ("W", "b"):
        for layer in (model[0], model[3]):
            setattr(layer, name, backend.asarray(getattr(layer, name)))
    rng = np.random.default_rng(0)
    X, Y = (backend.asarray(rng.standard_normal((5, width)).astype("float32")) for width in (3, 2))
    step = TrainingStep(model, MeanSquaredError(), optimizer)
    for _ in range(steps):
        step(X, Y)
    return model, optimizer, lambda: step(X, Y)


def test_who_takes_over_what_was_sent_goes_on_with_the_same_bits(backend):
    mine, my_optimizer, my_step = trained(backend, 0, 3)
    theirs, their_optimizer, their_step = trained(backend, 0, 1)
    assert digest(mine, my_optimizer) != digest(theirs, their_optimizer)
    adopt(theirs, their_optimizer, pickle.loads(pickle.dumps(sendable(mine, my_optimizer))))  # as it travels
    assert states(mine)
    for _ in range(2):
        assert digest(mine, my_optimizer) == digest(theirs, their_optimizer)
        assert states(mine) == states(theirs)
        my_step()
        their_step()
    assert backend.owns(theirs[0].W)


def test_what_is_sent_is_on_the_host(backend):
    sent = sendable(*trained(backend, 0, 2)[:2])
    arrays = [x for name, x in sent["weights"].items() if name.endswith((".W", ".b"))]
    arrays += [x for own in sent["optimizer"]["moments"].values() for x in own.values()]
    assert len(arrays) == 12
    assert {type(x) for x in arrays} == {np.ndarray}


def test_a_state_that_differs_is_told_by_the_digest():
    mine, my_optimizer, _ = trained(OnHost, 0, 2)
    theirs, their_optimizer, _ = trained(OnHost, 0, 2)
    assert digest(mine, my_optimizer) == digest(theirs, their_optimizer)
    theirs[2].step += 1
    assert digest(mine, my_optimizer) != digest(theirs, their_optimizer)
    theirs[2].step -= 1
    mine[1].state, theirs[1].state = (lambda: {"mean": np.zeros(3)}), (lambda: {"mean": np.asarray([0.0, 0.0, 1e-300])})
    assert digest(mine, my_optimizer) != digest(theirs, their_optimizer)
