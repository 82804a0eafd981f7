"""EarlyStopping: it stops when it should, goes back to the best epoch, and goes on counting in a resumed run."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import Adam, Dropout, EarlyStopping, Linear, Sequential, SoftmaxCrossEntropy, fit, snapshot
from anyarray_linear.datasets import load_digits


def rows(*scores, name="validation_loss"):
    return [{"epoch": i, name: score} for i, score in enumerate(scores, 1)]


def stopped_at(stopping, sequence, model=None):
    model = Linear(1, 1, seed=0) if model is None else model
    for row in sequence:
        model.W = np.full((1, 1), float(row["epoch"]))
        if stopping(model, row):
            return row["epoch"], model.W.item()
    return None, model.W.item()


def test_it_stops_after_so_many_epochs_without_a_better_score_and_the_best_weights_are_back():
    stopping = EarlyStopping(2)
    assert stopped_at(stopping, rows(3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.1)) == (6, 4.0)
    assert (stopping.best, stopping.best_epoch, stopping.waited) == (1.0, 4, 2)


def test_a_score_has_to_be_better_by_min_delta_and_NaN_never_is():
    assert stopped_at(EarlyStopping(2, min_delta=0.5), rows(3.0, 2.6, 2.51)) == (3, 1.0)
    assert stopped_at(EarlyStopping(2), rows(np.nan, np.nan)) == (2, 2.0)
    assert stopped_at(EarlyStopping(2), rows(np.nan, 1.0, 0.5)) == (None, 3.0)


def test_of_accuracy_and_r2_more_is_better():
    for name in ("validation_accuracy", "validation_r2"):
        assert stopped_at(EarlyStopping(1, monitor=name), rows(0.1, 0.5, 0.4, name=name)) == (3, 2.0)


def test_weights_stay_where_they_are_if_that_is_asked_for():
    assert stopped_at(EarlyStopping(1, restore_best=False), rows(1.0, 2.0)) == (2, 2.0)


def test_a_column_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"monitor is 'validation_loss', but the rows have epoch, loss; give fit a validation="):
        EarlyStopping(1)(Linear(1, 1), {"epoch": 1, "loss": 1.0})
    for wrong in ({"patience": 0}, {"patience": 1.5}, {"patience": 1, "min_delta": -1}, {"patience": 1, "monitor": 3}):
        with pytest.raises((TypeError, ValueError), match="is"):
            EarlyStopping(**wrong)


def model():
    return Sequential(Linear(64, 32, dtype="float32", seed=0), Dropout(0.3, seed=1), Linear(32, 10, dtype="float32", seed=2))


def train(network, stopping, epochs, **options):
    X, y = load_digits()[:2]
    return fit(network, X[:300], y[:300], loss=SoftmaxCrossEntropy(), optimizer=Adam(3e-2), epochs=epochs, batch_size=50,
               validation=0.3, progress=False, callbacks=[stopping], **options)  # fmt: skip


def test_fit_leaves_the_best_weights_also_when_all_epochs_were_trained():
    kept = {}

    class Watch(EarlyStopping):
        def __call__(self, network, row):
            kept[row["epoch"]] = snapshot(network)
            return super().__call__(network, row)

    network, stopping = model(), Watch(1000)
    history = train(network, stopping, 30)
    losses = [row["validation_loss"] for row in history.rows]
    assert stopping.best_epoch == 1 + int(np.argmin(losses)) < 30
    for name, x in snapshot(network).items():
        assert np.array_equal(x, kept[stopping.best_epoch][name])


@pytest.mark.parametrize("first", [3, 9, 14])
def test_a_resumed_run_stops_where_the_whole_one_does_with_the_same_weights(tmp_path, first):
    whole, resumed = model(), model()
    history = train(whole, EarlyStopping(6), 40)
    assert 15 <= len(history.rows) < 40
    train(model(), EarlyStopping(6, restore_best=False), first, checkpoint=tmp_path)
    again = train(resumed, EarlyStopping(6), 40, checkpoint=tmp_path, resume=True)
    assert len(again.rows) == len(history.rows)
    for name, x in snapshot(whole).items():
        assert np.array_equal(x, snapshot(resumed)[name])
