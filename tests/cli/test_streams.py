"""The command line where streams are closed, full or left, in any encoding, and with names and files that mean harm."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

from anyarray_linear import Linear, cli, save_model
from anyarray_linear.cli._folder import FILES, SUMMARY
from anyarray_linear.training.progress import Progress

ROOT = Path(__file__).parents[2]
SMALL = ("--hidden", "none", "--epochs", 1, "--device", "cpu")
COMMANDS = ("train", "predict", "export", "devices", "verify", "explain")
posix = pytest.mark.skipif(os.name != "posix", reason="a shell and names of bytes")


def command(line, cwd, **environment):
    """A line of a shell, in which `anyarray-linear` is this package."""
    line = line.replace("anyarray-linear", f"'{sys.executable}' -m anyarray_linear")
    # buffered, as streams are where nobody asks for something else: what cannot be written is found out later
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "", **environment}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, timeout=240, check=False)


def run_in(encoding, *arguments, monkeypatch, isatty=False):
    """`(exit code, output, error output)`, as bytes, of the command with streams of that encoding, in this process."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            stream.isatty = lambda: isatty
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", ["anyarray-linear", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    for stream in streams.values():
        stream.flush()
    return end.value.code, *(stream.buffer.getvalue() for stream in streams.values())


def classes_in(path, *names):
    save_model(Linear.from_arrays(np.eye(len(names), dtype="float32")), path, metadata={"classes": list(names)})
    np.savez(path.parent / "X.npz", X=np.eye(len(names), dtype="float32"))
    return path, path.parent / "X.npz"


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@posix
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "<&- >&- 2>&-"])
def test_a_training_whose_streams_are_closed_or_full_ends_well(tmp_path, streams):
    if "full" in streams and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    done = command(f"anyarray-linear train --out run {' '.join(map(str, SMALL))} {streams}", tmp_path)
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*FILES, "checkpoints"}


@posix
@pytest.mark.parametrize("end", ["| true", "2> >(true)", "2>&1 | head -1"])
def test_a_training_whose_reader_leaves_ends_well(tmp_path, end):
    options = "--epochs 3 --hidden none --device cpu"
    done = command(f"set -o pipefail; anyarray-linear train --out run {options} {end}", tmp_path)
    assert done.returncode == 0, done
    assert (tmp_path / "run" / SUMMARY).exists()


@posix
def test_predictions_for_nobody_are_refused(tmp_path):
    classes_in(tmp_path / "m", "cat", "dog")
    done = command("anyarray-linear predict m X.npz --device cpu >&-", tmp_path)
    assert done.returncode == 2
    assert b"--out" in done.stderr
    assert command("anyarray-linear predict m X.npz --device cpu --out p.csv >&-", tmp_path).returncode == 0
    assert command("anyarray-linear predict m X.npz --device cpu >/dev/full", tmp_path).returncode == 2


class Broken:
    """A stream that fails in the given way, from the given call on."""

    def __init__(self, error, after=0, isatty=True):
        self.error, self.after, self._isatty = error, after, isatty
        self.encoding = "utf-8"

    def isatty(self):
        return self._isatty

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return len(text)

    def flush(self):
        self.write("")


class WriteOnly:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


ROW = {"epoch": 1, "loss": 0.5, "seconds": 0.1}


@pytest.mark.parametrize("isatty", [True, False])
@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(), OSError(28, "No space"), ValueError("closed"), UnicodeEncodeError("ascii", "x", 0, 1, "no"), RuntimeError()],
    ids=lambda error: type(error).__name__,
)
def test_a_display_that_fails_shows_nothing_more(error, after, isatty):
    before = sys.stdout, sys.stderr
    with Progress(3, 2, True, Broken(error, after, isatty)) as bar:
        for epoch in range(3):
            bar.step(epoch, 1)
            bar._drawn = 0.0
            bar.step(epoch, 2)
            bar.epoch({**ROW, "epoch": epoch + 1})
    assert (sys.stdout, sys.stderr) == before
    assert not bar.shown


def test_a_stream_that_can_only_be_written_to_gets_lines():
    stream = WriteOnly()
    with Progress(1, 1, True, stream) as bar:
        bar.epoch(ROW)
    assert stream.text == "epoch 1  loss 0.5000  0.10 s\n"


@pytest.mark.parametrize("stream", [None, "closed", "object"])
def test_fit_trains_without_standard_error(monkeypatch, stream):
    from anyarray_linear import SGD, MeanSquaredError, fit

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {None: None, "closed": closed, "object": object()}[stream])
    X = np.ones((4, 1))
    history = fit(Linear(1, 1, seed=0), X, X, loss=MeanSquaredError(), optimizer=SGD(0.1), epochs=2, progress=True)
    assert len(history.rows) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp932", "latin-1", "cp1252", "koi8-r", "utf-16", "utf-8"])
@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)])
def test_help_works_on_every_code_page(monkeypatch, encoding, arguments):
    code, out, err = run_in(encoding, *arguments, "--help", monkeypatch=monkeypatch)
    assert code == 0
    assert b"Traceback" not in err
    assert "Usage" in out.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1"])
def test_what_is_printed_works_on_every_code_page(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    for arguments in (("train", "--out", "Zürich, 東京", *SMALL), ("explain",), ("devices",)):
        code, _, err = run_in(encoding, *arguments, monkeypatch=monkeypatch)
        assert code == 0, err


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "café"), ("latin-1", "東京"), ("cp932", "café")])
def test_a_class_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, encoding, name):
    paths = classes_in(tmp_path / "m", "dog", name)
    code, out, err = run_in(encoding, "predict", *paths, "--device", "cpu", monkeypatch=monkeypatch)
    assert (code, out) == (2, b"")
    assert err.count(b"\n") == 1
    assert b"PYTHONIOENCODING=utf-8" in err
    assert run_in(encoding, "predict", *paths, "--out", tmp_path / "p", monkeypatch=monkeypatch)[0] == 0
    assert name in (tmp_path / "p").read_text(encoding="utf-8")


@posix
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_names_that_are_not_UTF_8(tmp_path, locale):
    folder = os.fsencode(tmp_path)
    try:
        with open(folder + b"/caf\xe9.csv", "w") as file:
            file.write("a,b,kind\n" + "".join(f"{i},{i % 3},{'xyz'[i % 3]}\n" for i in range(60)))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    options = " ".join(map(str, SMALL))
    done = command(f"anyarray-linear train --data $'caf\\xe9.csv' --out $'r\\xe9sultat' {options}", tmp_path, LC_ALL=locale)
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9.csv" in done.stdout
    assert {os.fsdecode(name) for name in os.listdir(folder + b"/r\xe9sultat")} == {*FILES, "checkpoints"}
    line = "anyarray-linear train --out $'r\\xe9sultat' --resume --epochs 2"
    assert command(line, tmp_path, LC_ALL=locale).returncode == 0
    line = "anyarray-linear predict $'r\\xe9sultat' $'caf\\xe9.csv' --out $'\\xe9.csv' --device cpu"
    assert command(line, tmp_path, LC_ALL=locale).returncode == 0
    done = command("anyarray-linear predict $'r\\xe9sultat' $'\\xff' --device cpu", tmp_path, LC_ALL=locale)
    assert done.returncode == 2
    assert b"\\udcff" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Text that means harm

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\nerror: \x9b31m\u202e"


def harmless(output):
    return not any(c in output for c in (b"\x1b]0", b"\x1b[2J", b"\x07", b"\x9b3", "\u202e".encode(), b"\r", b"\nerror: \xc2"))


@posix
def test_escapes_in_names_files_and_configurations_do_not_reach_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = ESCAPES.replace("/", "")
    (tmp_path / f"{name}.csv").write_text("a,kind\n" + "".join(f"{i},{'xy'[i % 2]}\n" for i in range(40)))
    paths = classes_in(tmp_path / "m", "dog", f"cat{ESCAPES}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"options": {"epochs\\u001b[2J": 1, "lr": "\\u001b]0;owned\\u0007"}}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"options": {"lr": "\\u001b]0;owned\\u0007", "seed": "\\u001b[2J"}}')
    for arguments in (
        ("train", "--data", f"{name}.csv", "--out", f"out{name}", *SMALL),
        ("train", "--out", f"no{name}", "--resume"),
        ("train", "--out", f"out{name}"),
        ("train", "--data", f"none{name}"),
        ("train", "--activation", ESCAPES),
        ("train", "--out", "bad", "--resume"),
        ("train", "--out", "odd", "--resume"),
        ("train", "--out", "odd", "--resume", "--seed", "3"),
        ("predict", *paths, "--device", "cpu"),
        ("predict", f"none{name}", paths[1]),
        ("export", f"none{name}"),
        (f"command{ESCAPES}",),
    ):
        code, out, err = run_in("utf-8", *arguments, monkeypatch=monkeypatch, isatty=arguments[0] == "predict")
        assert code in (0, 2), (arguments, err)
        assert harmless(out), (arguments, out)
        assert harmless(err), (arguments, err)
        assert out or err
    code, out, _ = run_in("utf-8", "predict", *paths, "--device", "cpu", monkeypatch=monkeypatch)
    assert ESCAPES.encode().replace(b"\n", os.linesep.encode()) in out  # a program that reads it gets what it is


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1+1"])
def test_a_class_that_a_spreadsheet_would_compute_can_be_written_as_text(tmp_path, monkeypatch, name):
    import csv

    paths = classes_in(tmp_path / "m", "-1", name)
    for option, shown in (("--no-formulas", f"'{name}"), ("--probabilities", name)):
        out = tmp_path / "p.csv"
        assert run_in("utf-8", "predict", *paths, "--out", out, option, monkeypatch=monkeypatch)[0] == 0
        with open(out, newline="", encoding="utf-8") as file:
            assert [row[0] for row in list(csv.reader(file))[1:]] == ["-1", shown]


# ---------------------------------------------------------------------------------------------------------------------
# The order of files, and interrupts


def content(folder):
    return {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in FILES}


@pytest.mark.parametrize("again", [("--resume", "--epochs", 2), ("--overwrite", "--seed", 1, *SMALL)])
def test_where_there_is_a_summary_the_other_files_are_of_the_same_run(tmp_path, monkeypatch, again):
    """Whoever kills it kills it between two of these calls; 13 of the moments left a summary beside other files."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    assert run_in("utf-8", "train", "--out", "run", *SMALL, monkeypatch=monkeypatch)[0] == 0
    states = [content(folder)]
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            call = getattr(os, name)

            def watched(*arguments, call=call, **options):
                call(*arguments, **options)
                states.append(content(folder))

            patch.setattr(os, name, watched)
        assert run_in("utf-8", "train", "--out", "run", *again, monkeypatch=monkeypatch)[0] == 0
    states.append(content(folder))
    assert states[0] != states[-1]
    assert len(states) > 8
    assert all(state in (states[0], states[-1]) for state in states if state[SUMMARY] is not None)
    assert any(state[SUMMARY] is None for state in states)


@posix
def test_results_are_not_written_through_links_that_came_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").write_text("three years of work")
    assert run_in("utf-8", "train", "--out", "run", *SMALL, monkeypatch=monkeypatch)[0] == 0
    for name in FILES:
        if name != "config.json":
            (tmp_path / "run" / name).unlink()
            (tmp_path / "run" / name).symlink_to(tmp_path / "thesis")
    assert run_in("utf-8", "train", "--out", "run", "--resume", "--epochs", 2, monkeypatch=monkeypatch)[0] == 0
    assert (tmp_path / "thesis").read_text() == "three years of work"


@pytest.mark.parametrize("module", ["_app", "_common"])
def test_an_interrupt_while_it_starts_shows_no_traceback(monkeypatch, module):
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == f"anyarray_linear.cli.{module}":
                raise KeyboardInterrupt

    for name in [name for name in sys.modules if name.startswith("anyarray_linear.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    monkeypatch.delattr(cli, module, raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130


def test_an_interrupt_of_a_command_shows_no_traceback(tmp_path, monkeypatch):
    from anyarray_linear.cli import predict

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "load_model", interrupt)
    code, out, err = run_in("utf-8", "predict", "m", "X", "--device", "cpu", monkeypatch=monkeypatch)
    assert code == 130
    assert b"Traceback" not in out + err
