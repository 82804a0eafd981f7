"""Files: PyTorch's names and shapes, whole or not there, and refused when anything is wrong with them."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tampered import header_of, resealed, with_header

import anyarray_linear
from anyarray_linear import GELU, SGD, Adam, AdamW, Linear, ReLU, Sequential, Sigmoid, SiLU, Tanh
from anyarray_linear.files import CheckpointError, load_checkpoint, load_model, locks, save_checkpoint, save_model, sealed
from anyarray_linear.files import atomic as files
from anyarray_linear.files.atomic import atomic_write
from anyarray_linear.files.checkpoints import checkpoints
from anyarray_linear.files.locks import locked
from anyarray_linear.files.models import read_metadata
from anyarray_linear.schedules import cosine

pytest.importorskip("safetensors")

Damage = Callable[[bytes], bytes]


def shared_model(**options: Any) -> Sequential:
    """Nested, with a layer that stands at two depths, and one without a bias."""
    shared = Linear(3, 3, seed=1, **options)
    with shared.device:
        shared.b = shared.b + 0.5  # no zeros, which any mistake could make too
    inner = Sequential(Linear(3, 4, seed=2, bias=False, **options), GELU())
    return Sequential(shared, ReLU(), inner, Linear(4, 3, seed=3, **options), shared)


def small_model(**options: Any) -> Sequential:
    return Sequential(Linear(2, 3, seed=1, **options), Tanh(), Linear(3, 1, seed=2, **options))


def gradients_of(model: Any, seed: int) -> dict[str, Any]:
    """Some gradients, the same for equal seeds on all backends."""
    rng = np.random.default_rng(seed)
    place = next(iter(model.leaves()))[1].device
    return {
        name: place.asarray(rng.normal(size=tuple(x.shape)), dtype=x.dtype) for name, x in model.parameters().items()
    }


def to_bytes(model: Any, backend: Any = None) -> dict[str, bytes]:
    """The parameters' bytes by name."""
    host = np.asarray if backend is None else backend.to_numpy
    return {name: host(x).tobytes() for name, x in model.parameters().items()}


def snapshot(model: Any, optimizer: Any) -> Any:
    """All that a failed load must not have changed."""
    rule = optimizer.state_dict()
    moments = {name: {m: x.tobytes() for m, x in own.items()} for name, own in rule.pop("moments").items()}
    return rule, moments, to_bytes(model), {name: id(x) for name, x in model.parameters().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Names, shapes, and other libraries


def test_tensors_have_pytorchs_names_and_shapes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save_model(shared_model(), tmp_path / "nested")
    save_model(Linear(3, 2, seed=0), tmp_path / "bare")
    shapes = {name: x.shape for name, x in load_file(tmp_path / "nested").items()}
    assert shapes == {
        "0.weight": (3, 3), "0.bias": (3,), "2.0.weight": (4, 3), "3.weight": (3, 4), "3.bias": (3,),
        "4.weight": (3, 3), "4.bias": (3,),
    }  # fmt: skip
    assert {name: x.shape for name, x in load_file(tmp_path / "bare").items()} == {"weight": (2, 3), "bias": (2,)}


def torch_twin(dtype: str) -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    shared = torch.nn.Linear(3, 3)
    inner = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.GELU())
    return torch.nn.Sequential(shared, torch.nn.ReLU(), inner, torch.nn.Linear(4, 3), shared).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pytorch_loads_our_files_strictly_and_computes_the_same(tmp_path: Path, dtype: str) -> None:
    twin = torch_twin(dtype)
    import torch
    from safetensors.torch import load_file

    from anyarray_linear import Device

    model = shared_model(dtype=dtype, device=Device.of(torch.zeros(1)))
    save_model(model, tmp_path / "model")
    twin.load_state_dict(load_file(tmp_path / "model"), strict=True)
    X = torch.linspace(-1, 1, 12, dtype=getattr(torch, dtype)).reshape(4, 3)
    for name, value in load_file(tmp_path / "model").items():
        assert torch.equal(twin.state_dict()[name], value)
    half = {"rtol": 0.01, "atol": 0.01} if dtype == "float16" else {}  # five roundings to 11 bits
    torch.testing.assert_close(twin(X).detach(), model(X), **half)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_of_pytorch_fills_a_model(tmp_path: Path, dtype: str) -> None:
    twin = torch_twin(dtype)
    import torch
    from safetensors.torch import save_file
    from safetensors.torch import save_model as save_torch_model

    save_file({name: x.clone() for name, x in twin.state_dict().items()}, tmp_path / "repeated")
    save_torch_model(twin, str(tmp_path / "once"))  # which writes a shared tensor under one name only
    X = np.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3)
    expected = twin(torch.from_numpy(X)).detach().numpy()
    for name in ("repeated", "once"):
        model = shared_model(dtype=dtype)
        assert load_model(tmp_path / name, into=model) is model
        np.testing.assert_allclose(model(X), expected, *((1e-5, 1e-6) if dtype == "float32" else (1e-12, 1e-14)))


def test_a_file_without_an_architecture_says_that_it_needs_into(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.ones((2, 3))}, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m holds no architecture.*load_model\(path, into=model\)"):
        load_model(tmp_path / "m")
    assert load_model(tmp_path / "m", into=Linear(3, 2, bias=False)).W.sum() == 6
    assert read_metadata(tmp_path / "m") == {}


def test_a_dtype_that_no_layer_has_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(with_header({"weight": {**TENSOR, "dtype": "I16", "data_offsets": [0, 2]}}, bytes(2)))
    with pytest.raises(CheckpointError, match="m holds weight as I16; a model's tensors are BF16, F16, F32, F64"):
        load_model(tmp_path / "m", into=Linear(1, 1, bias=False))


def test_the_numpy_writer_of_safetensors_stores_memory_and_we_store_values(tmp_path: Path) -> None:
    from safetensors.numpy import load, load_file, save

    W = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    if tuple(map(int, version("safetensors").split(".")[:2])) >= (0, 8):  # with which it began
        assert load(save({"W": W}))["W"].tolist() == W.T.reshape(2, 3).tolist() != W.tolist(), (
            "safetensors has been repaired: its NumPy writer now takes any strides"
        )
    for i, strided in enumerate((W, np.arange(12.0).reshape(2, 6)[:, ::2], np.arange(6.0).reshape(2, 3)[::-1, ::-1])):
        save_model(Linear.from_arrays(strided, strided[:, 0]), tmp_path / str(i))
        assert load_file(tmp_path / str(i))["weight"].tolist() == strided.tolist()
        assert load_file(tmp_path / str(i))["bias"].tolist() == strided[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_a_model_comes_back_bit_for_bit_where_it_is_asked_for(backend: Any, tmp_path: Path) -> None:
    for dtype in backend.dtypes:
        model = shared_model(dtype=dtype, device=backend.device)
        save_model(model, tmp_path / "m")
        again = load_model(tmp_path / "m", device=backend.device)
        assert repr(again) == repr(model)
        assert to_bytes(again, backend) == to_bytes(model, backend)
        assert all(backend.owns(x) for x in again.parameters().values())
        assert again[0] is again[4]
        other = shared_model(dtype=dtype, device=backend.device)
        other[2][0].W = backend.asarray(np.zeros((4, 3)), dtype)
        load_model(tmp_path / "m", into=other)
        assert to_bytes(other, backend) == to_bytes(model, backend)
        assert all(backend.owns(x) for x in other.parameters().values())


def test_strided_parameters_are_saved_as_they_read(backend: Any, tmp_path: Path) -> None:
    W = backend.asarray(np.arange(6.0).reshape(3, 2)).T
    save_model(Linear.from_arrays(W), tmp_path / "m")
    assert load_model(tmp_path / "m").W.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]


def test_every_layer_of_the_library_comes_back(tmp_path: Path) -> None:
    empty = Sequential()
    for i, model in enumerate(
        (Linear(2, 3), Linear(2, 3, bias=False), ReLU(), empty, Sequential(ReLU(), Tanh(), Sigmoid(), SiLU(), GELU(), GELU("tanh"), empty))
    ):
        save_model(model, tmp_path / str(i))
        assert repr(load_model(tmp_path / str(i))) == repr(model)


def test_the_header_says_in_json_what_the_model_is(tmp_path: Path) -> None:
    save_model(shared_model(), tmp_path / "m", metadata={"a": 1})
    header, _ = header_of((tmp_path / "m").read_bytes())
    info = json.loads(header["__metadata__"]["anyarray_linear"])
    inner = [{"type": "Linear", "in_features": 3, "out_features": 4, "bias": False}, {"type": "GELU", "approximate": "none"}]
    assert info.pop("architecture") == {
        "type": "Sequential",
        "layers": [
            {"type": "Linear", "in_features": 3, "out_features": 3, "bias": True},
            {"type": "ReLU"},
            {"type": "Sequential", "layers": inner},
            {"type": "Linear", "in_features": 4, "out_features": 3, "bias": True},
            {"same_as": "0"},
        ],
    }
    assert re.fullmatch("[0-9a-f]{64}", info.pop("sha256"))
    assert info == {"format": 1, "written_by": f"anyarray_linear {anyarray_linear.__version__}", "metadata": {"a": 1}}


def test_a_loaded_model_owns_its_memory(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    model = load_model(tmp_path / "m")
    (x, *_), before = model.parameters().values(), (tmp_path / "m").read_bytes()
    x += 1.0
    assert (tmp_path / "m").read_bytes() == before


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    files = []
    for i in range(8):  # in any number of keys above one, safetensors' order is random
        save_model(shared_model(), tmp_path / str(i), metadata={"a": 1, "b": 2})
        files.append((tmp_path / str(i)).read_bytes())
    assert len(set(files)) == 1


def test_float16_is_refused_where_layers_do_not_compute_in_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_model(Linear.from_arrays(torch.ones(2, 3, dtype=torch.float16)), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m: its model cannot be built on cpu: dtype is float16"):
        load_model(tmp_path / "m")


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {"classes": ["cat", 'd"og\\', "\u732b"], "scale": [0.1, -0.0, 1e300], "n": 3**600, "none": None}
    save_model(small_model(), tmp_path / "m", metadata=metadata)
    assert read_metadata(tmp_path / "m") == metadata
    assert math.copysign(1, read_metadata(tmp_path / "m")["scale"][1]) == -1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": [1, {"b": np.float32(1)}]}, r"metadata\['a'\]\[1\]\['b'\] is a numpy array.*convert it with float"),
        ({"a": {1: 2}}, r"metadata\['a'\] has the key 1, and JSON has only str keys; use '1'"),
        ({"a": b"x"}, r"metadata\['a'\] is a bytes, which JSON cannot hold"),
        (["a"], r"metadata is a list; it must be a dict"),
    ],
)
def test_metadata_that_json_would_change_is_refused(tmp_path: Path, metadata: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_model(small_model(), tmp_path / "m", metadata=metadata)
    assert not list(tmp_path.iterdir())


class Scale:
    """A layer of a user's: one number, of no dimension."""

    def __init__(self, s: float) -> None:
        self.s, self.ds = np.asarray(s), None

    def forward(self, X: Any) -> Any:
        return X * self.s, X

    def gradients(self, dZ: Any, cache: Any, *, needs_dX: bool = True) -> Any:
        return dZ * self.s, {"s": (dZ * cache).sum()}

    def backward(self, dZ: Any, cache: Any, *, accumulate: bool = False, needs_dX: bool = True) -> Any:
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        return {"s": self.s}

    def to(self, device: Any = None, dtype: Any = None) -> Any:
        return self

    def __call__(self, X: Any) -> Any:
        return X * self.s


def test_layers_of_the_users_own_are_saved_and_filled_and_never_built(tmp_path: Path) -> None:
    save_model(Sequential(Linear(2, 2, seed=0), Scale(3.0)), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m: layer 1 is Scale\(\), which only the code.*into=model"):
        load_model(tmp_path / "m")
    model = Sequential(Linear(2, 2, seed=1), Scale(0.0))
    load_model(tmp_path / "m", into=model)
    assert model[1].s.shape == ()
    assert model[1].s == 3.0
    assert (model[0].W == Linear(2, 2, seed=0).W).all()
    bare = Scale(0.0)
    save_model(Scale(4.0), tmp_path / "bare")
    assert load_model(tmp_path / "bare", into=bare).s == 4.0


def other_models() -> dict[str, tuple[Sequential, str]]:
    shared = Linear(2, 2)
    return {
        "fewer": (Sequential(Linear(2, 3), Tanh()), r"has 2\.bias, 2\.weight, but the model has 0\.weight, 0\.bias$"),
        "more": (Sequential(*small_model(), Linear(1, 1)), r"lacks 3\.weight, 3\.bias of the model"),
        "shape": (Sequential(Linear(2, 3), Tanh(), Linear(3, 2)), r"2\.weight is float64 of shape \(1, 3\).*\(2, 3\)"),
        "dtype": (small_model(dtype="float32"), r"0\.bias is float64 in the file, but the model is float32, which would round it; .*cast=True"),
        "bias": (Sequential(Linear(2, 3, bias=False), Tanh(), Linear(3, 1)), r"has 0\.bias, but the model has 0\.weight"),
        "shared": (Sequential(shared, Tanh(), shared), "0.weight and 2.weight are one tensor in the model, but differ"),
    }


@pytest.mark.parametrize("which", list(other_models()))
def test_into_takes_all_or_nothing(tmp_path: Path, which: str) -> None:
    model, message = other_models()[which]
    saved = Sequential(Linear(2, 2, seed=1), Tanh(), Linear(2, 2, seed=2)) if which == "shared" else small_model()
    save_model(saved, tmp_path / "m")
    before = {name: id(x) for name, x in model.parameters().items()}
    with pytest.raises(CheckpointError, match=f"m:? {message}"):
        load_model(tmp_path / "m", into=model)
    assert {name: id(x) for name, x in model.parameters().items()} == before


def test_into_with_a_device_is_a_contradiction(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    with pytest.raises(ValueError, match="into has its device already"):
        load_model(tmp_path / "m", into=small_model(), device="cpu")


def test_without_safetensors_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda: save_model(small_model(), tmp_path / "m"), lambda: load_model(tmp_path / "m")):
        with pytest.raises(ImportError, match=r'pip install "anyarray_linear\[train\]"'):
            call()


def test_importing_the_package_loads_no_safetensors() -> None:
    code = "import sys, anyarray_linear.files.checkpoints; print(*{'safetensors', 'hashlib', 'json'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "f"
    atomic_write(path, b"old")
    atomic_write(path, lambda file: file.write(b"new" * 1_000_000))
    assert path.read_bytes() == b"new" * 1_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_a_file_has_the_usual_permissions_and_links_stay_links(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "f", b"old")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to("f")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_others_may_not_read_is_replaced_by_one_that_they_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o600)
    modes, fsync = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: modes.append(os.fstat(descriptor).st_mode) or fsync(descriptor))
    atomic_write(tmp_path / "f", b"new")
    assert stat.S_IMODE(modes[0]) == stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert (tmp_path / "f").read_bytes() == b"new"


def test_an_old_checkpoint_that_cannot_be_removed_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "step-000000001.safetensors").mkdir()
    save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 2}, keep=2)
    with pytest.warns(RuntimeWarning, match=r"an old checkpoint cannot be removed: .*step-000000001\.safetensors"):
        path = save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 3}, keep=2)
    assert checkpoints(tmp_path)[0] == path
    assert load_checkpoint(tmp_path, small_model(), Adam()) == {"step": 3}


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"no file to be replaced.*folder"):
        atomic_write(tmp_path / "folder", b"")
    if hasattr(os, "mkfifo"):  # not /dev/null, which a mistake here, made by root, would take from everybody
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match=r"no file to be replaced.*pipe"):
            atomic_write(tmp_path / "pipe", b"")
        assert (tmp_path / "pipe").is_fifo()


@pytest.fixture
def full_or_not(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own, 128 KiB large."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file systems are mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(full_or_not: Path) -> None:
    model, optimizer = Sequential(Linear(64, 64, seed=0), Linear(64, 64, seed=1)), Adam()
    save_checkpoint(full_or_not, model, optimizer, state={"step": 1})
    before = to_bytes(model)
    with pytest.raises(OSError, match=r"No space left on device; this file was not written.*step-000000002") as caught:
        save_checkpoint(full_or_not, model, optimizer, state={"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in full_or_not.iterdir()] == ["step-000000001.safetensors"]
    fresh = Sequential(Linear(64, 64), Linear(64, 64))
    assert load_checkpoint(full_or_not, fresh, Adam()) == {"step": 1}
    assert to_bytes(fresh) == before


def test_a_folder_that_turns_read_only_leaves_the_last_checkpoint(full_or_not: Path) -> None:
    save_checkpoint(full_or_not, small_model(), Adam(), state={"step": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(full_or_not)], check=True)
    with pytest.raises(OSError, match=r"Read-only file system; this file was not written.*step-000000002"):
        save_checkpoint(full_or_not, small_model(), Adam(), state={"step": 2})
    assert load_checkpoint(full_or_not, small_model(), Adam()) == {"step": 1}
    with pytest.raises(OSError, match="Read-only"), locked(full_or_not):
        pass


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_permission(*_: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "another name")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class FullDisk(io.FileIO):
    """A file that takes some bytes and then no more."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[:10])
        no_space()
        return 0


@pytest.mark.parametrize(
    ("call", "fault", "expected"),
    [
        ("os.fsync", no_space, OSError),
        ("os.replace", no_permission, PermissionError),
        ("open", FullDisk, OSError),
        ("open", no_permission, PermissionError),
        ("os.fsync", interrupt, KeyboardInterrupt),
        ("os.replace", interrupt, KeyboardInterrupt),
    ],
)
def test_a_fault_at_any_stage_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: Any, expected: type[BaseException]
) -> None:
    save_model(small_model(), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"anyarray_linear.files.atomic.{call}", fault, raising=False)
        with pytest.raises(expected) as caught:
            save_model(shared_model(), tmp_path / "m")
    if expected is not KeyboardInterrupt:
        assert "this file was not written, and what was there is unchanged" in str(caught.value)
        assert str(tmp_path / "m") in str(caught.value)
    assert (tmp_path / "m").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "f", b"old")

    def flip(descriptor: int) -> None:
        os.pwrite(descriptor, b"X", 1)

    monkeypatch.setattr(files.os, "fsync", flip)
    with pytest.raises(OSError, match="what was read back is not what was written"):
        atomic_write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"


def test_the_file_is_flushed_before_it_is_moved_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def move(*names: Any) -> None:
        calls.append("move")
        replace(*names)

    monkeypatch.setattr(files.os, "fsync", flush)
    monkeypatch.setattr(files.os, "replace", move)
    atomic_write(tmp_path / "f", b"12345")
    assert calls == ["5 bytes", "move", "folder"]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD(0.1),
    "momentum": lambda: SGD(cosine(0.1, 10), momentum=0.9, nesterov=True, clip_norm=0.5),
    "Adam": lambda: Adam(cosine(0.1, 10, warmup=2), weight_decay=0.1, clip_norm=0.5),
    "AdamW": lambda: AdamW(0.1),
}


def trained(model: Any, optimizer: Any, start: int, end: int) -> None:
    for step in range(start, end):
        optimizer.step(model, gradients_of(model, step))


@pytest.mark.parametrize("rule", list(OPTIMIZERS))
def test_going_on_from_a_checkpoint_is_bit_identical_to_never_having_stopped(
    backend: Any, tmp_path: Path, rule: str
) -> None:
    dtype = backend.dtypes[-2]  # float32
    whole, optimizer = shared_model(dtype=dtype, device=backend.device), OPTIMIZERS[rule]()
    trained(whole, optimizer, 0, 3)
    save_checkpoint(tmp_path, whole, optimizer, state={})
    trained(whole, optimizer, 3, 6)
    resumed, again = shared_model(dtype=dtype, device=backend.device), OPTIMIZERS[rule]()
    trained(resumed, again, 0, 1)  # what it holds already must not matter
    load_checkpoint(tmp_path, resumed, again)
    assert again.steps == 3
    trained(resumed, again, 3, 6)
    assert to_bytes(resumed, backend) == to_bytes(whole, backend)
    assert all(backend.owns(x) for x in resumed.parameters().values())


def test_a_checkpoint_of_any_backend_goes_on_with_numpy_and_the_reverse(backend: Any, tmp_path: Path) -> None:
    here, there = shared_model(device=backend.device, dtype="float64"), shared_model(dtype="float64")
    for source, target in ((here, there), (there, here)):
        first, second = Adam(), Adam()
        trained(source, first, 0, 2)
        save_checkpoint(tmp_path, source, first, state={})
        load_checkpoint(tmp_path, target, second)
        trained(target, second, 2, 3)  # the moments came along to where the model is
        trained(source, first, 2, 3)
        for name, x in here.parameters().items():
            np.testing.assert_allclose(backend.to_numpy(x), there.parameters()[name], rtol=1e-14)


def test_the_state_comes_back_whatever_numbers_are_in_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rng.random(3)
    history = [{"loss": math.nan, "lr": 0.1, "best": -math.inf}, {"loss": 1e-320, "lr": -0.0, "best": math.inf}]
    state = {"step": 7, "random": rng.bit_generator.state, "big": 3**2000, "history": history, "config": {"x": None}}
    save_checkpoint(tmp_path, small_model(), Adam(), state=state)
    loaded = load_checkpoint(tmp_path, small_model(), Adam())
    assert repr(loaded) == repr(state)  # repr, as NaN is not equal to itself
    again = np.random.default_rng()
    again.bit_generator.state = loaded["random"]
    assert again.random() == rng.random()


def test_a_state_that_json_cannot_hold_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['rng'\]\['key'\] is a numpy array on cpu"):
        save_checkpoint(tmp_path / "f", small_model(), Adam(), state={"rng": {"key": np.zeros(2)}})
    for state in ({"step": -1}, {"step": 1.5}, {"step": "1"}):
        with pytest.raises(ValueError, match=r'state\["step"\] is .*; it must be an int >= 0'):
            save_checkpoint(tmp_path / "f", small_model(), Adam(), state=state)
    assert not (tmp_path / "f").exists()


def test_the_newest_few_are_kept_and_the_best_apart(tmp_path: Path) -> None:
    model, optimizer = small_model(), Adam()
    for step in range(8, 13):  # 10 comes after 9, also where names are sorted
        trained(model, optimizer, step, step + 1)
        path = save_checkpoint(tmp_path, model, optimizer, state={"step": step}, keep=2, best=step == 9)
        if step == 9:
            best = to_bytes(model)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000012.safetensors", "step-000000011.safetensors"]
    assert {*tmp_path.iterdir()} == {tmp_path / "best.safetensors", *checkpoints(tmp_path)}
    assert path == checkpoints(tmp_path)[0]
    os.utime(checkpoints(tmp_path)[1])  # the newest by its number, not by its time
    assert load_checkpoint(tmp_path, model, optimizer) == {"step": 12}
    assert to_bytes(load_model(tmp_path / "best.safetensors")) == best
    assert read_metadata(tmp_path / "best.safetensors") == {"step": 9}


def test_a_checkpoint_of_a_later_step_is_not_removed_by_an_earlier_one(tmp_path: Path) -> None:
    for step in (100, 1, 2, 3):
        save_checkpoint(tmp_path, small_model(), Adam(), state={"step": step}, keep=2)
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path)] == [100, 3, 2]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


DAMAGE: dict[str, Damage] = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:100],
    "cut in the tensors": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "a flipped bit in a tensor": lambda data: flipped(data, len(data) - 3),
    "a flipped bit in the state": lambda data: flipped(data, data.index(b"mark") + 1),
    "zeros": lambda data: bytes(len(data)),
    "something else": lambda data: b"PK\3\4" + data,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    model, optimizer = small_model(), Adam()
    for step in (1, 2):
        trained(model, optimizer, step - 1, step)
        if step == 1:
            good = to_bytes(model)
        save_checkpoint(tmp_path, model, optimizer, state={"step": step, "mark": "x"})
    newest, older = checkpoints(tmp_path)
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"{newest.name} is (damaged|refused): "):
        assert load_checkpoint(tmp_path, model, optimizer) == {"step": 1, "mark": "x"}
    assert to_bytes(model) == good
    assert optimizer.steps == 1
    older.write_bytes(DAMAGE[damage](older.read_bytes()))
    before = snapshot(model, optimizer)
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, model, optimizer)
    assert str(newest) in str(caught.value)
    assert str(older) in str(caught.value)
    assert snapshot(model, optimizer) == before


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="holds no good checkpoint"):
            load_checkpoint(folder, small_model(), Adam())


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path, model = tmp_path / "m", Linear(1, 1, seed=3)
    save_model(model, path, metadata={"a": 1.5})
    data, refused = path.read_bytes(), 0
    for at in range(len(data)):
        path.write_bytes(flipped(data, at, at % 8))
        try:
            again, metadata = load_model(path), read_metadata(path)
        except CheckpointError:
            refused += 1
            continue
        assert (to_bytes(again), metadata) == (to_bytes(model), {"a": 1.5}), f"byte {at}"
    assert refused > 0.9 * len(data)  # all but what JSON means the same by


def test_a_shape_changed_in_the_header_is_noticed(tmp_path: Path) -> None:
    save_model(Linear(2, 3, bias=False), tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(data.replace(b"[3,2]", b"[2,3]"))
    with pytest.raises(CheckpointError, match="checksum"):
        load_model(tmp_path / "m", into=Linear(3, 2, bias=False))


def mismatches() -> dict[str, tuple[Any, Any, str]]:
    activation = Sequential(Linear(2, 3), ReLU(), Linear(3, 1))
    deeper = Sequential(Linear(2, 3), Sequential(Tanh()), Linear(3, 1))
    return {
        "activation": (activation, Adam(), r"layer 1 is Tanh\(\) in the file and ReLU\(\) here"),
        "size": (Sequential(Linear(2, 5), Tanh(), Linear(5, 1)), Adam(), r"layer 0 is .*=3, bias=True. in.*=5, bias"),
        "nesting": (deeper, Adam(), r"layer 1 is Tanh\(\) in the file and a Sequential of 1 here"),
        "number": (Sequential(Linear(2, 3)), Adam(), "it is a Sequential of 3 in the file and a Sequential of 1 here"),
        "dtype": (small_model(dtype="float32"), Adam(), "0.weight is float64 of shape .* needs float32"),
        "rule": (small_model(), AdamW(), "does not fit: state is of Adam, but this optimizer is AdamW"),
    }


@pytest.mark.parametrize("which", list(mismatches()))
def test_a_checkpoint_of_something_else_is_an_error_and_changes_nothing(tmp_path: Path, which: str) -> None:
    model, optimizer = small_model(), Adam()
    trained(model, optimizer, 0, 1)
    path = save_checkpoint(tmp_path, model, optimizer, state={})
    model, optimizer, message = mismatches()[which]
    trained(model, optimizer, 0, 2)
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path, model, optimizer)
    assert str(path) in str(caught.value)
    assert snapshot(model, optimizer) == before


def test_a_state_that_the_caller_refuses_changes_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(), Adam(), state={"epoch": 3})
    model, optimizer = small_model(), Adam()
    before = snapshot(model, optimizer)

    def check(state: dict[str, Any]) -> None:
        assert state == {"epoch": 3}
        raise ValueError("of another run")

    with pytest.raises(CheckpointError, match=r"step-0.* does not fit: of another run"):
        load_checkpoint(tmp_path, model, optimizer, check=check)
    assert snapshot(model, optimizer) == before


def test_a_model_file_among_the_checkpoints_is_passed_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 1})
    save_model(small_model(), tmp_path / "step-000000002.safetensors")
    with pytest.warns(RuntimeWarning, match="no state of an optimizer"):
        assert load_checkpoint(tmp_path, small_model(), Adam()) == {"step": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files

TENSOR = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
NESTED = b'{"__metadata__":{"anyarray_linear":"' + b"[" * 50_000 + b"]" * 50_000 + b'"}}'
HOSTILE = {
    "a huge header length": (2**63).to_bytes(8, "little") + b"{}",
    "a header of gigabytes": (2**34).to_bytes(8, "little") + b"{}",
    "no object": with_header(b"[]"),
    "not JSON": with_header(b"{nonsense"),
    "not UTF-8": with_header(b'{"\xff":1}'),
    "nested too deep": with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata nested too deep": with_header(NESTED),
    "metadata no object": with_header({"__metadata__": ["anyarray_linear"]}),
    "metadata no text": with_header({"__metadata__": {"anyarray_linear": 5}}),
    "metadata null": with_header({"__metadata__": {"anyarray_linear": "null"}, "weight": TENSOR}, bytes(3)),
    "an int of a million digits": with_header({"__metadata__": {"anyarray_linear": '{"format":' + "9" * 10**6 + "}"}}),
    "a tensor twice": with_header(
        b'{"weight":%b,"weight":%b}' % ((json.dumps(TENSOR).encode(),) * 2), bytes(4)
    ),
    "metadata twice": with_header(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}'),
    "a huge shape": with_header({"weight": {**TENSOR, "shape": [2**40, 2**40]}}, bytes(4)),
    "a huge empty shape": with_header({"weight": {**TENSOR, "shape": [2**62, 0], "data_offsets": [0, 0]}}),
    "a negative shape": with_header({"weight": {**TENSOR, "shape": [-1, -1]}}, bytes(4)),
    "offsets beyond the end": with_header({"weight": {**TENSOR, "shape": [2**30, 1], "data_offsets": [0, 2**32]}}, bytes(4)),
    "tensors that overlap": with_header({"weight": TENSOR, "bias": TENSOR}, bytes(4)),
    "a hole between tensors": with_header({"weight": {**TENSOR, "data_offsets": [4, 8]}}, bytes(8)),
    "an entry that is no tensor": with_header({"weight": 5}),
    "a dtype of integers": with_header({"weight": {**TENSOR, "dtype": "I32"}}, bytes(4)),
    "a dtype nobody knows": with_header({"weight": {**TENSOR, "dtype": "Q7"}}, bytes(4)),
    "a name that is a path": with_header({"../../../etc/passwd": TENSOR}, bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("which", list(HOSTILE))
def test_a_hostile_file_is_refused_by_name_at_once(tmp_path: Path, which: str) -> None:
    path = tmp_path / "step-000000001.safetensors"
    path.write_bytes(HOSTILE[which])
    start = time.process_time()
    model = Linear(1, 1, bias=False, dtype="float32")
    before = to_bytes(model)
    with pytest.raises(CheckpointError, match=r"step-000000001\.safetensors"):
        load_model(path, into=model)
    with pytest.raises(CheckpointError, match=r"step-000000001\.safetensors"):
        load_model(path)
    with pytest.warns(RuntimeWarning, match=r"step-000000001\.safetensors"), pytest.raises(CheckpointError):
        load_checkpoint(tmp_path, model, Adam())
    assert to_bytes(model) == before
    assert time.process_time() - start < 2
    assert list(tmp_path.iterdir()) == [path]


def sparse(path: Path, gigabytes: int, **description: str) -> None:
    """A file whose header is right, and whose tensor of so many GB takes no place on the disk."""
    shape = [gigabytes << 20, 256]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, gigabytes << 30]}
    path.write_bytes(with_header({"0.weight": entry, **({"__metadata__": description} if description else {})}))
    os.truncate(path, path.stat().st_size + (gigabytes << 30))


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files")
def test_a_file_larger_than_the_model_is_refused_unread_and_the_one_before_is_used(tmp_path: Path) -> None:
    import tracemalloc

    architecture = {"format": 1, "architecture": {"type": "Sequential", "layers": [{"type": "ReLU"}, {**ONE_BY_ONE, "bias": True}]}}
    save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 1})
    path = tmp_path / "step-000000002.safetensors"
    tracemalloc.start()
    try:
        for description in ({}, {"anyarray_linear": json.dumps(architecture)}):
            sparse(path, 4000, **description)
            with pytest.raises(CheckpointError, match=r"step-000000002.* holds 4,294,967,296,000 bytes of tensors, where 104 are"):
                load_model(path, into=small_model())
            with pytest.raises(CheckpointError, match="no architecture" if not description else "where 16 are needed"):
                load_model(path)
            with pytest.warns(RuntimeWarning, match="step-000000002"):
                assert load_checkpoint(tmp_path, small_model(), Adam()) == {"step": 1}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_model_that_shares_a_large_layer_often_is_read(tmp_path: Path) -> None:
    layer = Linear(600, 600, seed=0)  # 2.9 MB, which the file has under each of 40 names
    save_model(Sequential(*[layer] * 40), tmp_path / "m")
    assert (tmp_path / "m").stat().st_size > sealed._SLACK
    assert to_bytes(load_model(tmp_path / "m")) == to_bytes(load_model(tmp_path / "m", into=Sequential(*[Linear(600, 600)] * 40)))


def test_a_file_that_memory_does_not_hold_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    load = safetensors.deserialize

    def small(data: bytes) -> Any:
        if b"large" in data:
            raise MemoryError
        return load(data)

    monkeypatch.setattr(safetensors, "deserialize", small)
    save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 1})
    path = save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 2, "size": "large"})
    with pytest.raises(CheckpointError, match=f"{path.name} does not fit in memory: it has"):
        load_model(path)
    with pytest.warns(RuntimeWarning, match=f"{path.name} does not fit in memory"):
        assert load_checkpoint(tmp_path, small_model(), Adam()) == {"step": 1}


def deep() -> dict[str, Any]:
    spec: dict[str, Any] = {"type": "ReLU"}
    for _ in range(400):
        spec = {"type": "Sequential", "layers": [spec]}
    return spec


ONE_BY_ONE = {"type": "Linear", "in_features": 1, "out_features": 1}
LIES = {
    "no type": {},
    "a type that is no name": {"type": ["Linear"]},
    "a class of Python": {"type": "os.system"},
    "a class of NumPy": {"type": "ndarray", "shape": [2**40]},
    "a layer of billions": {"type": "Linear", "in_features": 2**40, "out_features": 2**40, "bias": True},
    "an attribute that is a method": {"type": "ReLU", "forward": 1},
    "another GELU": {"type": "GELU", "approximate": "erf"},
    "the same as nothing": {"type": "Sequential", "layers": [{"same_as": "7"}]},
    "the same as itself": {"same_as": ""},
    "the same as a list": {"same_as": []},
    "layers that are text": {"type": "Sequential", "layers": "ReLU"},
    "layers that are a number": {"type": "Sequential", "layers": 5},
    "a weight that is not there": {"type": "Sequential", "layers": [{**ONE_BY_ONE, "bias": False}]},
    "other sizes": {**ONE_BY_ONE, "in_features": 2, "bias": False},
    "a bias that is not there": {**ONE_BY_ONE, "bias": True},
    "a weight left over": {"type": "ReLU"},
    "deep": deep(),
}  # fmt: skip


@pytest.mark.parametrize("which", list(LIES))
def test_an_architecture_that_lies_with_a_right_checksum_is_refused(tmp_path: Path, which: str) -> None:
    path = save_checkpoint(tmp_path, Linear(1, 1, bias=False), Adam(), state={})
    path.write_bytes(resealed(path.read_bytes(), lambda info: info.update(architecture=LIES[which])))
    with pytest.raises(CheckpointError, match=path.name):
        load_model(path)
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(tmp_path, Linear(1, 1, bias=False), Adam())


@pytest.mark.parametrize(
    "change",
    [{"steps": -1}, {"steps": 1.5}, {"rule": "SGD"}, {"hyperparameters": [1]}, {"hyperparameters": None}],
    ids=str,
)
def test_an_optimizer_that_lies_with_a_right_checksum_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path, Linear(1, 1), Adam(), state={})
    path.write_bytes(resealed(path.read_bytes(), lambda info: info["optimizer"].update(change)))
    model, optimizer = Linear(1, 1), Adam()
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(tmp_path, model, optimizer)
    assert snapshot(model, optimizer) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("optimizer/b/M"),
        lambda tensors: [tensors.pop(f"optimizer/b/{m}") for m in "MV"],
        lambda tensors: tensors.update({"optimizer/b/X": np.zeros((1, 1))}),
        lambda tensors: tensors.update({"optimizer/c/M": np.zeros((1, 1))}),
        lambda tensors: tensors.update({"optimizer/": np.zeros((1, 1))}),
        lambda tensors: tensors.update({"optimizer/b/M": np.zeros((1, 2))}),
        lambda tensors: tensors.update({"optimizer/b/M": np.zeros(1)}),
        lambda tensors: tensors.update({"optimizer/b/M": np.zeros((1, 1), dtype=np.float32)}),
    ],
)
def test_moments_that_do_not_fit_are_refused_with_a_right_checksum(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    model, optimizer = Linear(1, 1), Adam()
    optimizer.step(model, {"W": np.ones((1, 1)), "b": np.ones((1, 1))})
    path = save_checkpoint(tmp_path, model, optimizer, state={})
    path.write_bytes(resealed(path.read_bytes(), change_tensors=change))
    model, optimizer = Linear(1, 1), Adam()
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(tmp_path, model, optimizer)
    assert snapshot(model, optimizer) == before


def test_what_a_message_quotes_from_a_file_cannot_command_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(with_header({"\x1b[2J" + "x" * 10**6: TENSOR}, bytes(4)))
    with pytest.raises(CheckpointError, match=r"m has \\x1b\[2Jxxx") as caught:
        load_model(tmp_path / "m", into=Linear(1, 1, dtype="float32"))
    assert len(str(caught.value)) < 10_000


def test_a_file_of_a_later_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    (tmp_path / "m").write_bytes(resealed((tmp_path / "m").read_bytes(), lambda info: info.update(format=2)))
    with pytest.raises(CheckpointError, match=r"m has the format 2, but .* reads 1; get a newer one"):
        load_model(tmp_path / "m")


def test_what_is_no_model_is_refused_by_its_argument(tmp_path: Path) -> None:
    save_model(Linear(2, 1), tmp_path / "m")
    with pytest.raises(TypeError, match=r"^into is the class Linear; give an object such as Sequential\("):
        load_model(tmp_path / "m", into=Linear)
    for wrong in (tmp_path, np.random.default_rng(0)):
        with pytest.raises(TypeError, match=r"^model is a (pathlib|numpy) "):
            save_model(wrong, tmp_path / "m")
        with pytest.raises(TypeError, match=r"^model is a (pathlib|numpy) "):
            save_checkpoint(tmp_path / "c", wrong, SGD(0.1), state={})
    with pytest.raises(CheckpointError, match="no regular file, but a folder; give the file in it, such as"):
        load_model(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(CheckpointError, match="m is no regular file"):
        load_model(tmp_path / "m")


def test_names_in_a_folder_that_only_look_like_checkpoints_are_left_alone(tmp_path: Path) -> None:
    others = ["step-", "xstep-1", "step--1", "step-1\n", "step-\u0661", "step-1.safetensors"]
    others = [f"{name}.safetensors" for name in others] + ["step-1.safetensors.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, small_model(), Adam(), state={"step": 3}, keep=1)
    assert all((tmp_path / name).exists() for name in others)


MEASURE = """
import resource, sys, time, warnings
from pathlib import Path
from anyarray_linear.files import CheckpointError, load_model, sealed
import safetensors.numpy, hashlib, json
if "/proc" and Path("/proc/self/clear_refs").exists():
    Path("/proc/self/clear_refs").write_text("5")
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
start = time.process_time()
try:
    load_model(sys.argv[1])
except CheckpointError as error:
    took = time.process_time() - start
    megabytes, start = peak() - before, time.process_time()
    json.loads(b"[" + b"1e5," * (sealed.MAX_HEADER // 4) + b"1]")
    print(megabytes, took / (time.process_time() - start))
"""


def bombs() -> Iterator[tuple[str, bytes]]:
    """The densest JSON of each kind, in headers as large as they may be."""
    size = sealed.MAX_HEADER
    for name, unit in (("lists", b"[],"), ("objects", b"{},"), ("floats", b"1e5,"), ("pairs", b'{"":0},'), ("text", b"aaa")):
        parsed = sum(cost * unit.count(mark) for mark, cost in sealed._PARSED_BYTES.items())
        for inside in (False, True):
            unit_here = json.dumps(unit.decode())[1:-1].encode() if inside else unit
            count = min((size - 200) // len(unit_here), (sealed._MAX_PARSED - 5000) // parsed if parsed else size)
            many = unit_here * count
            if name == "text":
                yield f"{name}, {inside}", with_header(b'{"__metadata__":{"anyarray_linear":"%b"}}' % many)
            elif inside:
                yield f"{name}, {inside}", with_header(b'{"__metadata__":{"anyarray_linear":"[%b1]"}}' % many)
            else:
                yield f"{name}, {inside}", with_header(b'{"a":[%b1]}' % many)
    keys = b",".join(b'"%x":1' % i for i in range(sealed._MAX_PARSED // 129))
    yield "keys, False", with_header(b'{"a":{%b}}' % keys)
    yield "keys, True", with_header(b'{"__metadata__":{"anyarray_linear":"{%b}"}}' % keys.replace(b'"', b'\\"'))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured by what Linux counts")
def test_no_header_takes_more_than_200_megabytes_or_4_times_as_long_as_one_of_numbers(tmp_path: Path) -> None:
    for name, data in bombs():
        (tmp_path / "bomb").write_bytes(data)
        said = subprocess.check_output([sys.executable, "-c", MEASURE, str(tmp_path / "bomb")], text=True)
        megabytes, times = map(float, said.split())
        assert (megabytes < 200, times < 4) == (True, True), f"{name}: {megabytes:.0f} MB, {times:.1f} times as long"


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"m is not written: its header, of .* bytes, has too many entries; keep less"):
        save_model(small_model(), tmp_path / "m", metadata={"a": [[]] * 1_000_000})
    with pytest.raises(ValueError, match=r"m is not written: its header has 17,.* bytes, and the most is 16,777,216"):
        save_model(small_model(), tmp_path / "m", metadata={"a": "x" * 17_000_000})
    assert not list(tmp_path.iterdir())


def test_a_history_of_many_epochs_fits(tmp_path: Path) -> None:
    row = {"epoch": 12345, "loss": 0.123456789012345, "accuracy": 0.98765432109876, "validation_loss": 0.123456789012345,
           "validation_accuracy": 0.98765432109876, "lr": 0.000123456789012, "seconds": 1.2345678901234}  # fmt: skip
    save_checkpoint(tmp_path, small_model(), Adam(), state={"history": [row] * 50_000})
    assert load_checkpoint(tmp_path, small_model(), Adam())["history"] == [row] * 50_000


# ---------------------------------------------------------------------------------------------------------------------
# Processes

HOLD = """
import sys, time
from anyarray_linear.files.locks import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"in\n"
            who = rf"process {first.pid} is writing into this folder.*run"
            with pytest.raises(BlockingIOError, match=who), locked(tmp_path / "run"):
                pass
        finally:
            first.kill()
    # it died without letting go, and blocks nobody
    part = tmp_path / "run" / f".{'0' * 12}.part"
    part.write_bytes(b"half")
    with locked(tmp_path / "run"):
        assert not part.exists()
        said = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True)
        assert f"process {os.getpid()} is writing" in said.stderr
    with locked(tmp_path / "run"):
        pass


def test_a_second_thread_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    said: list[str] = []

    def enter() -> None:
        try:
            with locked(tmp_path):
                said.append("in")
        except BlockingIOError as error:
            said.append(str(error))

    def thread() -> None:
        worker = threading.Thread(target=enter)
        worker.start()
        worker.join()

    with locked(tmp_path):
        enter()
        thread()
    thread()
    assert said[0] == said[2] == "in"
    assert f"another thread of this process, {os.getpid()}, is writing" in said[1]


def outsider(folder: Path) -> str:
    """What another process is told that wants to write into the folder; nothing if it gets in."""
    code = "import sys\nfrom anyarray_linear.files.locks import locked\nwith locked(sys.argv[1]): pass"
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True).stderr


def test_who_copies_the_folder_does_not_let_others_in(tmp_path: Path) -> None:
    import shutil

    with locked(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert f"process {os.getpid()} is writing into this folder" in outsider(tmp_path / "run")
    assert outsider(tmp_path / "run") == ""


@pytest.mark.parametrize("what", [".lock", "the folder"])
def test_a_lock_of_a_file_that_is_no_longer_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Who had the folder removes its lock, or the folder, after another process has opened the file."""
    folder, lock, calls = tmp_path / "run", locks._lock, []

    def late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (folder / ".lock").unlink()
            if what == "the folder":
                folder.rmdir()
        lock(descriptor)

    monkeypatch.setattr(locks, "_lock", late)
    with locked(folder):
        assert len(calls) == 2
        assert "is writing into this folder" in outsider(folder)
    assert outsider(folder) == ""


FORKS = """
import os, sys
from anyarray_linear.files.locks import locked
until, parent_ends = os.pipe()  # of the child's own: it must not read what is meant for its parent
with locked(sys.argv[1]):
    child = os.fork()
    if child:
        print("forked", flush=True)
        sys.stdin.readline()
if not child:  # it has left the block too
    os.close(parent_ends)
    os.read(until, 1)
    os._exit(0)
print("left", flush=True)
sys.stdin.read()
os.close(parent_ends)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_forked_process_has_no_lock_and_does_not_keep_its_parents(tmp_path: Path) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS, str(tmp_path / "run")], **pipes) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "forked\n"
        assert f"process {parent.pid} is writing" in outsider(tmp_path / "run")
        print(file=parent.stdin, flush=True)
        assert parent.stdout.readline() == "left\n"
        assert outsider(tmp_path / "run") == ""  # though the child still lives
        parent.stdin.close()
        assert parent.wait(60) == 0


def test_an_error_inside_lets_go_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path):
        pass


WRITER = """
import sys
import numpy as np
from anyarray_linear import Adam, Linear, Sequential
from anyarray_linear.files.locks import locked
from anyarray_linear.files.checkpoints import checkpoints, load_checkpoint, save_checkpoint
folder, steps = sys.argv[1], int(sys.argv[2])
model, optimizer, step = Sequential(Linear(40, 50, seed=0), Linear(50, 3, seed=1)), Adam(), 0
with locked(folder):
    if checkpoints(folder):
        step = load_checkpoint(folder, model, optimizer)["step"]
    print(step, flush=True)
    while step < steps:
        rng = np.random.default_rng(step)
        optimizer.step(model, {name: rng.normal(size=x.shape) for name, x in model.parameters().items()})
        step += 1
        save_checkpoint(folder, model, optimizer, state={"step": step}, best=step % 3 == 0)
"""


def writer(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    """A process that writes checkpoints into `folder` until it is at `steps`; a warning ends it."""
    command = [sys.executable, "-W", "error", "-c", WRITER, str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def killed_while_writing(folder: Path, kills: int) -> None:
    """Kill a process that writes checkpoints, again and again, at random moments; nothing it leaves is damaged."""
    chance, reached = random.Random(1), 0

    def newest() -> int:
        return max((int(path.stem[5:]) for path in checkpoints(folder)), default=0)

    for kill in range(kills):
        with writer(folder, 10**9) as process:
            assert process.stdout is not None
            start = int(process.stdout.readline())
            assert start >= reached
            reached, began = start, time.monotonic()
            if kill % 8 != 7:  # in the midst of writing, however fast the disk is; else at once
                while newest() == start:
                    assert process.poll() is None
                    assert time.monotonic() - began < 120, "it makes no progress"
                    time.sleep(0.0005)
                time.sleep(chance.random() * (time.monotonic() - began))
            process.send_signal(signal.SIGKILL)
        for path in folder.glob("*.safetensors"):
            load_model(path)
    assert reached > kills / 2
    last = read_metadata(checkpoints(folder)[0])["step"] + 1
    unbroken = folder.with_name("unbroken")
    for run in (folder, unbroken):
        with writer(run, last) as process:
            assert process.wait() == 0
    assert not list(folder.glob(".*.part"))
    assert checkpoints(folder)[0].read_bytes() == checkpoints(unbroken)[0].read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 of POSIX")
def test_killing_the_writer_damages_nothing(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "run", 4)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 of POSIX")
def test_killing_the_writer_200_times_damages_nothing(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "run", 200)
