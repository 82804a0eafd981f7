"""Thousands of damaged files: each is refused by name, or says what it said before; in bounded time and memory."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tampered import header_of, resealed

from anyarray_linear import SGD, Adam, Linear, NonFiniteError, Sequential, SoftmaxCrossEntropy, Tanh, fit
from anyarray_linear.files import CheckpointError, load_checkpoint, load_model, save_checkpoint, sealed
from anyarray_linear.files.models import read_metadata

pytest.importorskip("safetensors")

TOKENS = [b"null", b"-1", b"1e999", b"NaN", b"9" * 400, b"[]", b"{}", b'""', b"true", b"[" * 200, b'"\\ud800"', b"\0", b"\xff"]
TOKENS += [b"F16", b"F64", b"BF16", b"0.weight", b"optimizer/", b"__metadata__", b"shape", b"anyarray_linear", b"\\u0000"]
VALUES = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "", "0.weight", "ReLU", "Sequential", "../x", [], [[]], {}]


def model() -> Sequential:
    shared = Linear(2, 2, seed=1)
    return Sequential(shared, Tanh(), Sequential(Linear(2, 2, seed=2)), shared)


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 10))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def extend(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.randrange(1, 100))


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 50)]


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(1, 200)]


def overwrite(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.randrange(1, 50)
    data[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def lengthen(data: bytearray, rng: random.Random) -> None:
    size = int.from_bytes(data[:8], "little")
    new = rng.choice((size + rng.randrange(-20, 20), rng.randrange(2**64), 2 ** rng.randrange(64), 0))
    data[:8] = (new % 2**64).to_bytes(8, "little")


def put_token(data: bytearray, rng: random.Random) -> None:
    """Another token in the header, whose length is put right."""
    size = int.from_bytes(data[:8], "little")
    at, token = rng.randrange(8, 8 + size), rng.choice(TOKENS)
    replaced = rng.randrange(min(len(token), 8 + size - at) + 1)
    data[at : at + replaced] = token
    data[:8] = (size + len(token) - replaced).to_bytes(8, "little")


def reseal(data: bytearray, rng: random.Random) -> None:
    """Another value somewhere in the description, and the checksum that belongs to it."""
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    info = json.loads(header["__metadata__"]["anyarray_linear"])
    del info["sha256"]
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(info)
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice([*VALUES, rng.choice(places)[0]])
    try:
        info["sha256"] = sealed._digest(info, load(bytes(data)))
        header["__metadata__"]["anyarray_linear"] = json.dumps(info)
    except ValueError:  # a node within itself
        return
    text = json.dumps(header).encode()
    data[:] = len(text).to_bytes(8, "little") + text + body


HARM: list[Callable[[bytearray, random.Random], None]] = [
    flip, cut, extend, remove, repeat, overwrite, lengthen, put_token, reseal, reseal,
]  # fmt: skip


def bytes_of(model: Any) -> list[bytes]:
    return [x.tobytes() for x in model.parameters().values()]


def peak_megabytes(*, reset: bool = False) -> float:
    """The most memory this process has had, on Linux, since it was reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def fuzz(folder: Path, count: int) -> None:
    rng, original = random.Random(0), model()
    optimizer = Adam(0.1)
    optimizer.step(original, {name: np.ones(x.shape) for name, x in original.parameters().items()})
    state = {"step": 1, "history": [{"loss": 0.5, "epoch": 1}], "random": {"state": 2**127 + 1}, "names": ["a", "b"]}
    path = save_checkpoint(folder, original, optimizer, state=state)
    good, expected = path.read_bytes(), (bytes_of(original), state)
    refused = 0
    before = peak_megabytes(reset=True)
    for i in range(count):
        data, harm = bytearray(good), rng.choice(HARM)
        harm(data, rng)
        path.write_bytes(data)
        context = f"file {i}, {harm.__name__}"
        into, fresh, other = model(), model(), rng.choice((Adam(0.1), Adam(0.1), SGD(0.1)))
        untouched = bytes_of(into), other.state_dict()

        def resume(fresh: Any = fresh, other: Any = other) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return fresh, load_checkpoint(folder, fresh, other)

        def fill(into: Any = into) -> Any:
            return load_model(path, into=into), read_metadata(path)

        for read in (resume, fill, lambda: (load_model(path), read_metadata(path))):
            error = None
            try:
                found, metadata = read()
            except CheckpointError as caught:
                error = caught
            if error is None:
                assert harm is reseal or (bytes_of(found), metadata) == expected, context
                continue
            refused += 1
            assert path.name in str(error), context
            if read is resume:
                assert (bytes_of(fresh), other.state_dict()) == untouched, context
            if read is fill:
                assert bytes_of(into) == untouched[0], context
    assert peak_megabytes() - before < 200
    assert refused > count  # of three readings of each


def test_a_few_hundred_damaged_files_are_refused_or_as_before(tmp_path: Path) -> None:
    fuzz(tmp_path, 400)


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_refused_or_as_before(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000)


def fuzz_resume(folder: Path, count: int) -> None:
    """Files whose checksum holds, and whose description says something else: `fit` refuses them and changes nothing, or trains."""
    rng, X, y = random.Random(0), np.linspace(-1, 1, 20).reshape(10, 2), np.arange(10) % 2

    def train(into: Any, rule: Any, **options: Any) -> Any:
        return fit(into, X, y, loss=SoftmaxCrossEntropy(), optimizer=rule, batch_size=4, checkpoint=folder, progress=False, **options)

    train(model(), Adam(0.1), epochs=2)
    for path in sorted(folder.glob("*.safetensors"))[:-1]:
        path.unlink()
    (path,) = folder.glob("*.safetensors")
    good, refused = path.read_bytes(), 0
    for i in range(count):
        for old in folder.glob("*.safetensors"):
            old.unlink()
        data = bytearray(good)
        reseal(data, rng)
        path.write_bytes(data)
        into, rule = model(), Adam(0.1)
        before = bytes_of(into)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                history = train(into, rule, resume=True, epochs=4, seed=rng.choice((0, None)))
            end = [row["epoch"] for row in history.rows]
        except (CheckpointError, NonFiniteError) as caught:
            end = caught
        if isinstance(end, CheckpointError):
            refused += 1
            assert path.name in str(end), i
            assert (bytes_of(into), rule.steps) == (before, 0), i
        elif not isinstance(end, NonFiniteError):  # an optimizer's numbers may be any that one can have
            assert end in ([1, 2, 3, 4], [1, 2]), i  # of these, the latter where it says that a callback stopped it
    assert refused > count / 2


def test_a_hundred_states_that_lie_are_refused_or_train(tmp_path: Path) -> None:
    fuzz_resume(tmp_path, 100)


@pytest.mark.slow
def test_a_thousand_states_that_lie_are_refused_or_train(tmp_path: Path) -> None:
    fuzz_resume(tmp_path, 1000)


@pytest.mark.slow
def test_damaged_configurations_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """A run's config.json, damaged in 2,500 ways: `train --resume` says what is wrong in one line, or finds nothing wrong.

    Two in three have damaged bytes. The others are sound JSON of hostile options. None of them leads out of the run's folder.
    """
    import sys

    from anyarray_linear.cli import _common, train
    from anyarray_linear.cli._app import app

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["anyarray-linear", *arguments])
        return _common.exit_code_of(app)

    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert command("train", "--epochs", "1", "--out", str(out)) == 0
    monkeypatch.setattr(train, "write_run", lambda *whatever: None)
    monkeypatch.setattr(train, "train_run", lambda *whatever: ())  # what is fuzzed is all that comes before
    config = out / "config.json"
    whole, rng, refused = config.read_bytes(), random.Random(0), 0
    names = [*json.loads(whole)["options"], "out", "help", "resume", "overwrite", "processes", "distributed", "no-such", "", "\n", "=", "-"]
    values = [*VALUES, "/dev/zero", "--out=elsewhere", "--help", "1 --resume", "nan", "1" * 200, 10**30, "cuda:9", "mpi", "\ud800"]
    for i in range(2_500):
        damaged = bytearray(whole)
        if i % 3 == 2:
            config_now = json.loads(whole)
            for _ in range(rng.randint(1, 3)):
                config_now["options"][rng.choice(names)] = rng.choice(values)
            damaged = bytearray(json.dumps(config_now).encode())
        for _ in range(rng.randint(1, 4) if i % 3 < 2 else 0):
            at, kind = rng.randrange(len(damaged)), rng.randrange(4)
            if kind == 0:
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del damaged[at : at + rng.randint(1, 40)]
            elif kind == 2:
                damaged[at:at] = rng.choice([b"[" * 5000, b"null", b"-1", b"1e999", b'"', b"{}", b"\x00", b"9" * 400, b"../../"])
            else:
                damaged[at:] = b""
            damaged = damaged or bytearray(b" ")
        config.write_bytes(damaged)
        capsys.readouterr()
        code = command("train", "--resume", "--out", str(out))
        lines = capsys.readouterr().err.splitlines()
        assert code in (0, 2), damaged
        if code == 2:
            refused += 1
            assert len(lines) == 1, lines
            assert lines[0].startswith("error: ")
        assert list(tmp_path.iterdir()) == [out]
    assert refused > 1_000


ODD = [10**400, -(10**400), 1e308, math.inf, -math.inf, math.nan, -1, 0, 1, 2**63, 0.5, True, None, "1", "", [], [1], {}, {"a": 1}]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in nested dicts and lists, and each of them itself."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize("rule", ["SGD", "scheduled", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("Adam", "AdamW"))])
def test_odd_numbers_in_sealed_checkpoints_are_refused_or_trained_with(tmp_path: Path, rule: str) -> None:
    """`lr` of 10**400, step -1 and the like gave OverflowError and ZeroDivisionError, whose tracebacks blamed the library."""
    from anyarray_linear import AdamW
    from anyarray_linear.schedules import cosine

    make = {
        "SGD": lambda: SGD(0.1, momentum=0.9, weight_decay=0.1, clip_norm=1.0),
        "Adam": lambda: Adam(0.1, clip_norm=1.0),
        "AdamW": lambda: AdamW(0.1),
        "scheduled": lambda: Adam(cosine(0.1, 100)),
    }[rule]
    X, y = np.eye(4), np.arange(4)

    def train(folder: Path, epochs: int) -> Any:
        model, optimizer = Linear(4, 4, seed=0), make()
        common: Any = {"loss": SoftmaxCrossEntropy(), "optimizer": optimizer, "batch_size": 2, "progress": False}
        return fit(model, X, y, epochs=epochs, checkpoint=folder, resume=True, seed=None, **common)

    train(tmp_path / "good", 1)
    (path,) = (tmp_path / "good").glob("step-*")
    data = path.read_bytes()
    info = json.loads(header_of(data)[0]["__metadata__"]["anyarray_linear"])
    spots = [(name, *spot) for name in ("optimizer", "metadata", "history") for spot in places_in(info[name])]
    refused = 0
    for i, (spot, odd) in enumerate((spot, odd) for spot in spots for odd in ODD):
        folder = tmp_path / str(i)
        folder.mkdir()
        shutil.copy(tmp_path / "good" / "epochs.jsonl", folder)
        try:
            text = resealed(data, lambda info, spot=spot, odd=odd: put(info, spot, copy.deepcopy(odd)))
        except ValueError:  # JSON of NaN in the place of a dict, and the like, is not even sealed
            continue
        (folder / path.name).write_bytes(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                train(folder, 2)
            except (CheckpointError, NonFiniteError) as error:
                refused += isinstance(error, CheckpointError)
        shutil.rmtree(folder)
    assert refused > len(spots)
