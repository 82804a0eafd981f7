"""File systems that offer less, disks that fail, and folders that came from somebody else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from anyarray_linear import SGD, Linear, MeanSquaredError, fit, load_model, save_checkpoint, save_model
from anyarray_linear.files import locks, offered
from anyarray_linear.files.atomic import atomic_write
from anyarray_linear.files.locks import locked

pytest.importorskip("safetensors")

posix = pytest.mark.skipif(not hasattr(os, "fchmod") or not hasattr(os, "mkfifo"), reason="calls of POSIX")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(offered, "_said", set())


def failing(call, number, only=lambda *arguments: True):
    def fail(*arguments):
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return fail


def is_folder(descriptor, *rest):
    return os.path.isdir(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else False


def trained(folder):
    layer = Linear(2, 1, seed=0)
    X = np.ones((4, 2))
    fit(layer, X, X[:, :1], loss=MeanSquaredError(), optimizer=SGD(0.1), epochs=3, progress=False, checkpoint=folder)
    return layer


LACKS = [
    ("fcntl.flock", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EBADF", "EINVAL"], "no locks"),
    ("os.fchmod", ["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"], "permissions of a new one"),
    ("os.fsync", ["ENOTSUP", "ENOSYS", "EBADF", "EACCES", "EINVAL", "EPERM"], "a power cut could undo"),
    ("os.open", ["EACCES", "EPERM"], "a power cut could undo"),
]


@posix
@pytest.mark.parametrize(("call", "name", "told"), [(c, name, told) for c, names, told in LACKS for name in names])
def test_what_a_file_system_does_not_offer_is_done_without_and_said_once(tmp_path, monkeypatch, call, name, told):
    folder = tmp_path / "run"
    module, _, function = call.partition(".")
    original = getattr(__import__(module), function)
    only = {
        "os.fsync": is_folder,  # a flush of a file that fails so is something else
        "os.open": lambda path, flags, *mode: os.path.isdir(path) and flags == os.O_RDONLY,
    }.get(call, lambda *arguments: True)
    room = "locks" if call == "fcntl.flock" else "atomic"
    monkeypatch.setattr(f"anyarray_linear.files.{room}.{call}", failing(original, getattr(errno, name), only))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trained(folder)
        for _ in range(2):  # the second time there is a mode to keep
            save_model(Linear(2, 1, seed=0), tmp_path / "m")
    said = [str(each.message) for each in said if issubclass(each.category, RuntimeWarning)]
    assert said
    assert all(told in text and str(tmp_path) in text and os.strerror(getattr(errno, name)) in text for text in said)
    assert len(set(said)) == len(said)
    assert load_model(tmp_path / "m").W.shape == (1, 2)
    assert len(list(folder.glob("step-*"))) == 3


@posix
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "EROFS"])
@pytest.mark.parametrize("call", ["fcntl.flock", "os.fchmod", "os.fsync", "os.replace"])
def test_what_is_really_wrong_names_the_path(tmp_path, monkeypatch, call, name):
    room = "locks" if call == "fcntl.flock" else "atomic"
    save_model(Linear(2, 1, seed=0), tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(f"anyarray_linear.files.{room}.{call}", failing(None, getattr(errno, name)))
        with pytest.raises(OSError) as caught:  # noqa: PT011
            trained(tmp_path / "run") if call == "fcntl.flock" else save_model(Linear(2, 1, seed=1), tmp_path / "m")
    assert caught.value.errno == getattr(errno, name)
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.glob("*.part")] == []


@posix
def test_without_locks_the_other_threads_are_still_kept_out(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("anyarray_linear.files.locks.fcntl.flock", failing(None, errno.ENOSYS))

    def other():
        with locked(tmp_path):
            pass

    with pytest.warns(RuntimeWarning, match="no locks"), locked(tmp_path), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(other)
    assert "another thread" in str(answer.exception())


def test_a_full_disk_does_not_take_the_lock_away(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.os, "write", failing(os.write, errno.ENOSPC))
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_bytes() == b""


# ---------------------------------------------------------------------------------------------------------------------
# Folders from somebody else


def kinds_of_lock(folder, victim):
    yield "symbolic link", lambda path: path.symlink_to(victim)
    yield "dangling link", lambda path: path.symlink_to(folder / "new")
    yield "link to itself", lambda path: path.symlink_to(path)
    yield "hard link", lambda path: os.link(victim, path)
    yield "pipe", os.mkfifo
    yield "folder", os.mkdir
    yield "link to a pipe", lambda path: (os.mkfifo(folder / "pipe"), path.symlink_to(folder / "pipe"))
    yield "text", lambda path: path.write_text("not a number")
    yield "number too long", lambda path: path.write_text("1" * 21)


@posix
@pytest.mark.parametrize("kind", [name for name, _ in kinds_of_lock(Path(), Path())])
def test_a_lock_that_is_no_file_of_ours_is_refused_and_left_alone(tmp_path, kind):
    victim, folder = tmp_path / "thesis.txt", tmp_path / "run"
    victim.write_text("three years of work")
    folder.mkdir()
    dict(kinds_of_lock(folder, victim))[kind](folder / ".lock")
    with pytest.raises(OSError, match=r"no lock of this library; remove it.*run/\.lock"), locked(folder):
        pass
    assert victim.read_text() == "three years of work"
    assert not (folder / "new").exists()
    (folder / ".lock").rmdir() if kind == "folder" else (folder / ".lock").unlink()
    with locked(folder):
        pass
    assert victim.read_text() == "three years of work"


@posix
def test_a_socket_or_pipe_as_lock_does_not_hang_the_training(tmp_path):
    """It hung beyond SIGTERM; a process of its own so that a hang would be seen."""
    os.mkfifo(tmp_path / ".lock")
    code = "import sys\nfrom anyarray_linear.files.locks import locked\nwith locked(sys.argv[1]): pass"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=240)
    finally:
        process.send_signal(signal.SIGKILL)
    assert "no regular file" in said


@posix
@pytest.mark.parametrize("name", ["step-000000001.safetensors", "best.safetensors", "epochs.jsonl"])
def test_a_checkpoint_is_not_written_through_a_link_that_came_with_the_folder(tmp_path, name):
    victim, folder = tmp_path / "thesis.txt", tmp_path / "run"
    victim.write_text("three years of work")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    if name.startswith("step"):
        save_checkpoint(folder, Linear(2, 1, seed=0), SGD(0.1), state={"step": 1}, best=True)
    else:
        trained(folder)
    assert victim.read_text() == "three years of work"
    assert not (folder / name).is_symlink()


@posix
def test_a_link_that_the_user_names_stays_one(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_what_was_left_half_written_and_cannot_be_removed_is_in_nobodys_way(tmp_path):
    (tmp_path / ".0123456789ab.part").mkdir()
    with locked(tmp_path):
        pass
