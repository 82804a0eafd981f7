"""Devices: what is moved arrives as it was, where it should, and only if it must."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import _MAKERS, Backend, Unavailable, make_backend

from anyarray_linear import Device, Linear, select_device
from anyarray_linear.arrays import selection

CPU = select_device("cpu")


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


HOST_ARRAYS: dict[str, Callable[[], np.ndarray]] = {
    "C order": lambda: np.arange(6.0).reshape(2, 3),
    "Fortran order": lambda: np.arange(6.0).reshape(3, 2).T,
    "negative strides": lambda: np.arange(6.0).reshape(2, 3)[::-1, ::-1],
    "every second": lambda: np.arange(12.0).reshape(2, 6)[:, ::2],
    "broadcast": lambda: np.broadcast_to(np.arange(3.0), (2, 3)),
    "read-only": lambda: read_only(np.arange(6.0)),
    "other byte order": lambda: np.arange(6.0).astype(">f8"),
    "empty": lambda: np.empty((0, 3)),
    "0-d": lambda: np.asarray(2.5),
    "integers": lambda: np.arange(6),
    "bytes": lambda: np.arange(6, dtype=np.uint8),
    "booleans": lambda: np.asarray([True, False]),
}


@pytest.fixture(params=list(_MAKERS))
def other(request: pytest.FixtureRequest) -> Backend:
    """A second backend, to come from."""
    try:
        return make_backend(request.param)
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("kind", HOST_ARRAYS)
def test_host_arrays_of_any_layout_arrive(kind: str, backend: Backend) -> None:
    host = HOST_ARRAYS[kind]()
    x = backend.device.asarray(host)
    assert backend.owns(x)
    np.testing.assert_array_equal(backend.to_numpy(x), host)
    assert backend.to_numpy(x).dtype == host.dtype.newbyteorder("=")
    assert backend.to_numpy(x).dtype.isnative


def test_arrays_of_any_backend_arrive(other: Backend, backend: Backend) -> None:
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = backend.device.asarray(other.asarray(host))
    assert backend.owns(x)
    np.testing.assert_array_equal(backend.to_numpy(x), host, strict=True)


def test_a_cast_on_the_way_is_the_cast_of_numpy(other: Backend, backend: Backend) -> None:
    host = np.asarray([0.1, 1e-3, 7.0])
    for source, wanted in (("float64", "float32"), ("float32", "float64")):
        x = backend.device.asarray(other.asarray(host, source), dtype=wanted)
        assert backend.owns(x)
        np.testing.assert_array_equal(backend.to_numpy(x), host.astype(source).astype(wanted), strict=True)


def test_what_is_in_place_is_returned_itself(backend: Backend) -> None:
    x = backend.asarray([1.0, 2.0], "float32")
    assert backend.device.asarray(x) is x
    assert backend.device.asarray(x, dtype="float32") is x
    assert backend.device.asarray(x, dtype=x.dtype) is x
    assert backend.device.asarray(x, dtype="float64") is not x


@pytest.mark.parametrize("kind", HOST_ARRAYS)
def test_to_numpy_brings_back_what_was_sent(kind: str, backend: Backend) -> None:
    host = HOST_ARRAYS[kind]().copy()
    host = host.astype(host.dtype.newbyteorder("="))
    back = CPU.to_numpy(backend.asarray(host))
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, host, strict=True)


def test_a_view_moves_as_what_it_shows(other: Backend, backend: Backend) -> None:
    with other.computing():
        view = other.asarray(np.arange(6.0).reshape(2, 3)).T
    x = backend.device.asarray(view)
    np.testing.assert_array_equal(backend.to_numpy(x), np.arange(6.0).reshape(2, 3).T)


def test_lists_of_numbers_get_the_default_dtype(backend: Backend) -> None:
    x = backend.device.asarray([[1.0, 2.0]])
    assert backend.owns(x)
    assert x.dtype == backend.device.default_float
    assert tuple(x.shape) == (1, 2)
    np.testing.assert_array_equal(backend.to_numpy(backend.device.asarray([3, 4])), [3, 4])
    assert backend.to_numpy(backend.device.asarray(np.float32(0.5))).dtype == np.float32  # this one has a dtype


def test_the_default_dtype_is_what_the_namespace_makes_of_a_float(backend: Backend) -> None:
    with backend.computing():
        assert backend.device.dtype() == backend.xp.asarray(1.0).dtype


def test_the_default_dtype_of_torch_is_the_one_set_in_torch() -> None:
    torch = pytest.importorskip("torch")
    device = Device.of(torch.ones(1))
    torch.set_default_dtype(torch.float64)
    try:
        assert device.dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert device.dtype() == torch.float32


def test_dtypes_may_be_named_in_any_library(other: Backend, backend: Backend) -> None:
    x = backend.asarray([1.0], "float32")
    for spec in ("float32", np.float32, np.dtype("float32"), other.xp.float32, other.asarray([1.0], "float32").dtype):
        assert backend.device.dtype(spec) == x.dtype
        assert backend.device.asarray(x, dtype=spec) is x


@pytest.mark.parametrize("spec", ["int32", "complex64", "bfloat16", "float", np.int64, bool])
def test_a_dtype_that_layers_do_not_compute_in_is_refused_by_name(spec: Any, backend: Backend) -> None:
    name = spec if isinstance(spec, str) else np.dtype(spec).name
    with pytest.raises(TypeError, match=f"dtype is {name}, but layers on .* compute in float32 or float64"):
        backend.device.dtype(spec)


def test_float16_is_for_those_that_accumulate_it_in_float32(backend: Backend) -> None:
    if "float16" in backend.dtypes:
        assert backend.device.dtype("float16") == backend.asarray([1.0], "float16").dtype
    else:
        with pytest.raises(TypeError, match=r"float16.*CuPy and torch"):
            backend.device.dtype("float16")


def test_jax_without_float64_refuses_it_and_says_how_to_enable_it() -> None:
    code = """
        import numpy as np, jax.numpy as jnp
        from anyarray_linear import Device
        device = Device.of(jnp.ones(1))
        assert device.dtype() == jnp.float32
        for ask in (lambda: device.asarray(np.ones(2)), lambda: device.dtype("float64"),
                    lambda: device.asarray(np.ones(2, np.float32), dtype="float64"), lambda: device.asarray([2**40])):
            try:
                ask()
            except TypeError as error:
                print(error)
        print(device.asarray(np.arange(3)).dtype, device.asarray(np.ones(2), dtype="float32").dtype)
    """
    pytest.importorskip("jax")
    lines = in_a_new_process(code).splitlines()
    assert len(lines) == 5
    for line in lines[:3]:
        assert 'has no float64; enable it with jax.config.update("jax_enable_x64", True)' in line
    assert "beyond int32" in lines[3]
    assert lines[4] == "int32 float32"


def test_the_values_of_a_jax_array_do_not_change_with_the_host_array_it_came_from() -> None:
    jnp = pytest.importorskip("jax.numpy")
    device = Device.of(jnp.ones(1))
    memory = np.ones(10**6 + 64, dtype=np.float32)
    for start in range(64):  # whether JAX shares memory or copies it later, in another thread, depends on the alignment
        host = memory[start : start + 10**6]
        host[:] = 1
        x = device.asarray(host)
        host[:] = 2
        assert float(x.max()) == 1


def test_strict_devices_without_float64_get_float32() -> None:
    strict = pytest.importorskip("array_api_strict")
    small = Device.of(strict.ones(1, dtype=strict.float32, device=strict.Device("no_float64")))
    assert small.dtype() == strict.float32
    x = strict.ones(3, dtype=strict.float64)
    with pytest.raises(TypeError, match="has no float64"):
        small.asarray(x)
    assert Device.of(small.asarray(x, dtype="float32")) == small


# What a device is ---------------------------------------------------------------------------------------------------


def test_devices_are_equal_where_arrays_may_meet(other: Backend, backend: Backend) -> None:
    here, there = backend.device, other.device
    may_meet = backend.xp is other.xp and backend.native == other.native
    assert (here == there) == may_meet
    assert not may_meet or hash(here) == hash(there)
    assert here != str(here)


def test_the_native_device_is_what_the_namespace_takes(backend: Backend) -> None:
    device = backend.device
    assert device.xp is backend.xp
    assert device.native == backend.native
    if device.kind != "cuda":  # CuPy's functions take no device= in the compat layer that ours would need
        assert backend.owns(device.xp.ones(2, device=device.native))
    with device:
        assert backend.owns(device.xp.ones(2, device=device.native))


def test_a_device_is_copied_as_itself_and_pickled_by_its_name(backend: Backend) -> None:
    device = backend.device
    assert copy.deepcopy(device) is device
    if device.kind != "jax":  # whose device objects cannot be pickled
        assert pickle.loads(pickle.dumps(device)) == device


def test_names_and_specs() -> None:
    assert (str(CPU), repr(CPU), CPU.kind, CPU.index, CPU.native) == ("cpu", "Device('cpu')", "cpu", None, "cpu")
    assert select_device(CPU) is CPU
    assert Device.of(np.ones(1)) == Device.of(np.float64(1)) == CPU
    for spec in ("gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", None, 0):
        with pytest.raises(ValueError, match=r"expected \"auto\", \"cpu\", \"cuda\""):
            select_device(spec)
    with pytest.raises(ValueError, match=r"device is 'float32'; expected .* by its name: dtype=\"float32\"$"):
        Linear(2, 2).to("float32")
    for spec in (np.ones(3), np.ones(1)):
        with pytest.raises(ValueError, match=r"device is a numpy array on cpu; expected .* give Device\.of\(the array\)"):
            select_device(spec)
    for peculiar in (np.ones((1, 1)).view(np.matrix), np.ma.MaskedArray([1.0])):
        with pytest.raises(TypeError, match=f"x is a numpy {type(peculiar).__name__}, which computes otherwise"):
            CPU.asarray(peculiar)
    with pytest.raises(TypeError, match="x is a list, which is on no device"):
        Device.of([1.0])


def test_memory_of_the_machine() -> None:
    if not Path("/proc/meminfo").exists():
        with pytest.raises(NotImplementedError):
            CPU.memory()
        return
    free, total = CPU.memory()
    assert 0 < free < total


def test_the_cpu_needs_no_context_and_no_waiting() -> None:
    with CPU as device:
        assert device is CPU
    CPU.synchronize()
    CPU.empty_cache()


# CUDA ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy() -> Any:
    """CuPy with two working devices, which may be emulated; device 0 is current before and after."""
    try:
        make_backend("cupy:1")
    except Unavailable as why:
        pytest.skip(str(why))
    import cupy

    assert cupy.cuda.runtime.getDevice() == 0
    yield cupy
    assert cupy.cuda.runtime.getDevice() == 0


def test_a_block_makes_its_device_current_and_restores_the_one_before(cupy: Any) -> None:
    zero, one, current = select_device("cuda:0"), select_device("cuda:1"), cupy.cuda.runtime.getDevice
    with one:
        assert current() == 1
        with zero, one, one:  # re-entrant
            assert current() == 1
        assert current() == 1
        with zero:
            assert current() == 0
        assert current() == 1
    assert current() == 0
    with pytest.raises(KeyError), one:
        raise KeyError
    assert current() == 0


def test_blocks_in_two_threads_do_not_meet(cupy: Any) -> None:
    device, both, seen = select_device("cuda:1"), threading.Barrier(2, timeout=240), []

    def nest(outer: int) -> None:
        cupy.cuda.runtime.setDevice(outer)
        both.wait()
        with device:  # the same object in both threads
            both.wait()
            seen.append(cupy.cuda.runtime.getDevice())
            both.wait()
        both.wait()
        seen.append((outer, cupy.cuda.runtime.getDevice()))

    threads = [threading.Thread(target=nest, args=(outer,)) for outer in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, seen)) == ["(0, 0)", "(1, 1)", "1", "1"]


def test_memory_and_synchronize_speak_of_their_own_device(cupy: Any) -> None:
    device = select_device("cuda:1")
    with device:
        block = cupy.ones(2**18, dtype="float32")
    used = 1 - device.memory()[0] / device.memory()[1]
    assert used > 1 - select_device("cuda:0").memory()[0] / select_device("cuda:0").memory()[1]
    free = device.memory()[0]
    del block
    assert device.memory()[0] == free  # the pool keeps it
    device.empty_cache()
    assert device.memory()[0] >= free + 2**20
    device.synchronize()


def test_cuda_is_the_current_device_and_is_kept_by_what_is_built_with_it(cupy: Any) -> None:
    assert str(select_device("cuda")) == "cuda:0"
    with cupy.cuda.Device(1):
        device = select_device("cuda")
    assert str(device) == "cuda:1"
    assert device.asarray([1.0]).device.id == 1


def test_pickled_cuda_devices_come_back_as_themselves(cupy: Any) -> None:
    device = select_device("cuda:1")
    with select_device("cuda:0"):
        assert pickle.loads(pickle.dumps(device)) == device


# Cost ---------------------------------------------------------------------------------------------------------------


def in_a_new_process(code: str) -> str:
    import os
    import textwrap

    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_array_library_and_asks_no_driver() -> None:
    heavy = "('cupy', 'torch', 'jax', 'array_api_strict', 'array_api_compat.numpy', 'numpy.random', 'typer', 'rich')"
    code = f"import sys, anyarray_linear; print([name for name in {heavy} if name in sys.modules])"
    assert in_a_new_process(code) == "[]\n"


@pytest.mark.parametrize("spec", ["cpu", "auto"])
def test_selecting_a_device_again_asks_no_driver(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYARRAY_DEVICE", raising=False)
    first = select_device(spec)
    for asks in (selection.count, selection.examine, selection._roomiest, selection._free_memory):
        monkeypatch.setattr(selection, asks.__name__, None)  # calling it would raise
    assert str(select_device(spec)) == str(first)
    assert select_device(spec).reason == first.reason
