"""The history of a training has a file of its own: checkpoints do not grow with it, and nothing of it is taken on trust."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from contextlib import suppress

import numpy as np
import pytest

from anyarray_linear import SGD, CheckpointError, Linear, MeanSquaredError, fit, load_checkpoint, save_checkpoint
from anyarray_linear.files import atomic, journal
from anyarray_linear.files.checkpoints import checkpoints
from anyarray_linear.files.journal import NAME, Journal, rows_of

pytest.importorskip("safetensors")

X = np.linspace(-1, 1, 8).reshape(8, 1)


def parts():
    return Linear(1, 1, seed=0), SGD(0.1)


def train(folder, epochs, parts_=None, **options):
    layer, optimizer = parts_ or parts()
    common = {"loss": MeanSquaredError(), "optimizer": optimizer, "batch_size": 4, "progress": False}
    return layer, fit(layer, X, 2 * X, epochs=epochs, checkpoint=folder, **common, **options)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_checkpoint_does_not_grow_with_the_epochs_and_neither_does_what_is_written_for_it(tmp_path, monkeypatch):
    """The whole history was in each, so the last one of 50,000 epochs had 5 MB, and all of them together hundreds of GB."""
    sizes = []
    for name in ("atomic_write", "flush"):
        original = getattr(atomic, name)

        def counted(*arguments, original=original, **options):
            sizes.append(max(len(x) for x in arguments if isinstance(x, bytes)) if isinstance(arguments[1], bytes) else 0)
            return original(*arguments, **options)

        for module in ("checkpoints", "journal"):
            monkeypatch.setattr(f"anyarray_linear.files.{module}.{name}", counted, raising=False)
    written = {}

    def note(model, row):
        written[row["epoch"]] = max((path.stat().st_size for path in tmp_path.glob("step-*")), default=0)

    train(tmp_path, 150, callbacks=[note])
    assert written[150] - written[10] <= 100  # some numbers in it are longer
    assert max(sizes) <= written[150] + 100
    assert (tmp_path / NAME).stat().st_size > 10_000


def test_eighty_thousand_rows_are_kept_and_come_back(tmp_path):
    """At some 70,000, saving was refused in the middle of the training."""
    row = {"epoch": 1, "steps": 10, "loss": 0.25, "lr": 1e-3, "seconds": 0.5, "validation_loss": math.inf}
    rows = [{**row, "epoch": i} for i in range(80_000)]
    kept = Journal(tmp_path)
    layer, optimizer = parts()
    save_checkpoint(tmp_path, layer, optimizer, state={"step": 3}, history=kept.keep(rows))
    assert load_checkpoint(tmp_path, layer, optimizer) == {"step": 3, "history": rows}


def test_a_resumed_training_has_the_whole_history_and_goes_on_in_the_same_file(tmp_path):
    _, whole = train(tmp_path / "one", 6)
    train(tmp_path / "two", 2)
    train(tmp_path / "two", 4, resume=True)
    _, history = train(tmp_path / "two", 6, resume=True)
    assert without_seconds(history.rows) == without_seconds(whole.rows)
    assert [row["epoch"] for row in map(json.loads, (tmp_path / "two" / NAME).read_text().splitlines())] == [1, 2, 3, 4, 5, 6]
    for path in checkpoints(tmp_path / "two"):  # each of the last ones has its own part
        only = tmp_path / "only"
        shutil.rmtree(only, ignore_errors=True)
        only.mkdir()
        shutil.copy(path, only)
        shutil.copy(tmp_path / "two" / NAME, only)
        state = load_checkpoint(only, *parts())
        assert [row["epoch"] for row in state["history"]] == list(range(1, state["epoch"] + 1))


def test_what_a_callback_added_to_the_row_of_its_epoch_is_kept(tmp_path):
    train(tmp_path, 3, callbacks=[lambda model, row: row.update(note=[row["epoch"], {"x": None}])])
    assert [row["note"] for row in load_checkpoint(tmp_path, *parts())["history"]] == [[i, {"x": None}] for i in (1, 2, 3)]


def damages():
    yield "one byte of the first row", lambda data: data.replace(b'"epoch":1,', b'"epoch":2,', 1)
    yield "one byte of the last row", lambda data: data[:-3] + (b"8" if data[-3:-2] == b"9" else b"9") + data[-2:]
    yield "cut short", lambda data: data[:-1]
    yield "empty", lambda data: b""
    yield "a row twice", lambda data: data.splitlines(keepends=True)[0] + data
    yield "rows swapped", lambda data: b"".join(reversed(data.splitlines(keepends=True)))
    yield "zeros", lambda data: bytes(len(data))


@pytest.mark.parametrize("damage", [damage for _, damage in damages()], ids=[name for name, _ in damages()])
def test_a_damaged_history_is_no_history(tmp_path, damage):
    train(tmp_path, 1)
    train(tmp_path, 4, resume=True)
    (tmp_path / NAME).write_bytes(damage((tmp_path / NAME).read_bytes()))
    layer, optimizer = parts()
    before = layer.W
    with warnings.catch_warnings(record=True) as said, suppress(CheckpointError):
        warnings.simplefilter("always")
        state = load_checkpoint(tmp_path, layer, optimizer)
        # an older checkpoint, whose rows are not touched
        assert [row["epoch"] for row in state["history"]] == list(range(1, state["epoch"] + 1))
        assert state["epoch"] < 4
    assert said
    assert all(NAME in str(each.message) for each in said)
    assert (layer.W is before) == (len(said) == 3)


def test_what_follows_the_rows_of_the_checkpoint_is_not_kept(tmp_path):
    """An epoch that was written there and whose checkpoint was not; longer than what comes next."""
    train(tmp_path, 4)
    with open(tmp_path / NAME, "ab") as file:
        file.write(b'{"epoch":5,"note":"' + b"x" * 10_000)
    _, history = train(tmp_path, 6, resume=True)
    assert [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()] == history.rows


def test_after_damage_at_the_end_training_goes_on_from_the_checkpoint_before_it(tmp_path):
    _, whole = train(tmp_path / "whole", 6)
    train(tmp_path / "run", 4)
    data = (tmp_path / "run" / NAME).read_bytes()
    (tmp_path / "run" / NAME).write_bytes(data[:-5])
    with pytest.warns(RuntimeWarning, match="cut short"):
        _, history = train(tmp_path / "run", 6, resume=True)
    assert without_seconds(history.rows) == without_seconds(whole.rows)
    assert len(load_checkpoint(tmp_path / "run", *parts())["history"]) == 6


@pytest.mark.parametrize("what", ["no file", "a pipe", "a folder"])
def test_a_history_that_is_no_file_is_told_of(tmp_path, what):
    train(tmp_path, 2)
    (tmp_path / NAME).unlink()
    if what == "a pipe":
        pytest.importorskip("fcntl")
        os.mkfifo(tmp_path / NAME)
    elif what == "a folder":
        (tmp_path / NAME).mkdir()
    with pytest.warns(RuntimeWarning, match=NAME), pytest.raises(CheckpointError, match=r"is not there|no regular file"):
        load_checkpoint(tmp_path, *parts())


@pytest.mark.parametrize(
    "said",
    [{}, {"bytes": -1}, {"bytes": 10**30}, {"bytes": True}, {"bytes": "1"}, {"bytes": 0, "sha256": None}, {"bytes": 1.0}],
)
def test_what_a_crafted_checkpoint_says_of_the_rows_is_refused(tmp_path, said):
    Journal(tmp_path).keep([{"epoch": 1}])
    with pytest.raises(CheckpointError, match=NAME):
        rows_of(tmp_path, said)


@pytest.mark.parametrize("line", [b"[]\n", b"1\n", b"nothing\n", b"[" * 100_000 + b"\n", b'{"a":[' + b"[]," * 900_000 + b"1]}\n"])
def test_crafted_rows_with_the_right_checksum_are_refused(tmp_path, line):
    import hashlib

    (tmp_path / NAME).write_bytes(line)
    with pytest.raises(CheckpointError, match=NAME):
        rows_of(tmp_path, {"rows": 1, "bytes": len(line), "sha256": hashlib.sha256(line).hexdigest()})


def test_who_is_interrupted_while_a_row_is_written_writes_it_again(tmp_path, monkeypatch):
    kept = Journal(tmp_path)
    kept.keep([{"epoch": 1}])

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, "flush", interrupt)
        with pytest.raises(KeyboardInterrupt):
            kept.keep([{"epoch": 1}, {"epoch": 2}])
    said = kept.keep([{"epoch": 1}, {"epoch": 2}])
    assert rows_of(tmp_path, said) == [{"epoch": 1}, {"epoch": 2}]


def test_a_history_that_somebody_removes_while_training_is_written_again(tmp_path):
    def remove(model, row):
        if row["epoch"] == 3:
            (tmp_path / NAME).unlink()

    train(tmp_path, 4, callbacks=[remove])
    assert len(load_checkpoint(tmp_path, *parts())["history"]) == 4


@pytest.mark.skipif(not hasattr(os, "link"), reason="no hard links")
def test_a_file_that_came_as_a_hard_link_is_not_written_to(tmp_path):
    (tmp_path / "thesis").write_text("three years of work")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "thesis", tmp_path / "run" / NAME)
    train(tmp_path / "run", 2)
    assert (tmp_path / "thesis").read_text() == "three years of work"


def test_a_checkpoint_from_before_rows_had_a_file_is_resumed(tmp_path):
    _, whole = train(tmp_path / "whole", 4)
    train(tmp_path / "old", 2)
    layer, optimizer = parts()
    state = load_checkpoint(tmp_path / "old", layer, optimizer)
    shutil.rmtree(tmp_path / "old")
    save_checkpoint(tmp_path / "old", layer, optimizer, state=state)  # with the rows in it
    _, history = train(tmp_path / "old", 4, resume=True)
    assert without_seconds(history.rows) == without_seconds(whole.rows)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_a_callback_that_changes_the_folder_does_not_move_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    train("run", 4, callbacks=[lambda model, row: os.chdir(tmp_path / "elsewhere")])
    assert len(checkpoints(tmp_path / "run")) == 3
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_callback_that_trains_into_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for again in ("run", tmp_path / "run", "./x/../run"):
        with pytest.raises(ValueError, match="so a callback cannot train into it"):
            train("run", 2, callbacks=[lambda model, row, again=again: train(again, 1, resume=True)])
        shutil.rmtree("run")
    train("run", 1, callbacks=[lambda model, row: train("other", 1)])
    train("run", 2, resume=True)  # and the folder is free again


def test_a_training_that_fails_at_its_start_leaves_the_folder_free(tmp_path):
    train(tmp_path, 1)
    with pytest.raises(ValueError, match="holds checkpoints"):
        train(tmp_path, 1)
    train(tmp_path, 2, resume=True)
