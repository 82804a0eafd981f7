"""Running out of memory: recognised in all its names, with advice, and with the pools of CuPy emptied."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import select_device
from anyarray_linear.arrays.memory import explained_memory, is_out_of_memory


class OutOfMemoryError(RuntimeError):
    """As torch's, which is no `MemoryError`."""


NAMES = [
    MemoryError("Out of memory allocating 512 bytes"),
    OutOfMemoryError("Tried to allocate 2.00 GiB"),
    RuntimeError("cudaErrorMemoryAllocation: out of memory"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", NAMES, ids=str)
def test_memory_that_ran_out_is_told_by_any_name(error):
    assert is_out_of_memory(error)
    with pytest.raises(MemoryError) as raised, explained_memory(select_device("cpu"), "make it smaller"):
        raise error
    message = str(raised.value)
    assert str(error) in message
    assert "memory" in message or "alloc" in message
    assert "cpu had " in message
    assert message.endswith("; make it smaller")


@pytest.mark.parametrize("error", [None, RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), ValueError("a shape")], ids=str)
def test_other_errors_are_left_alone(error):
    assert not is_out_of_memory(error)
    if error is not None:
        with pytest.raises(type(error)) as raised, explained_memory(select_device("cpu"), "make it smaller"):
            raise error
        assert raised.value is error


def test_the_names_are_those_of_cupy():
    cupy = pytest.importorskip("cupy", reason="needs CuPy, not a card", exc_type=ImportError)
    assert is_out_of_memory(cupy.cuda.runtime.CUDARuntimeError(2))
    assert is_out_of_memory(cupy.cuda.memory.OutOfMemoryError(1, 1, 1))
    try:
        from cupy_backends.cuda.libs.cublas import CUBLASError
    except ImportError:
        return
    assert [is_out_of_memory(CUBLASError(status)) for status in (1, 3, 13)] == [True, True, False]


@pytest.fixture
def pool(backend):
    """A pool of the user's own, and what CuPy's own is, on the device of the backend."""
    if not backend.name.startswith("cupy"):
        pytest.skip("only CuPy has pools")
    import cupy

    own = cupy.cuda.MemoryPool()
    with backend.device, cupy.cuda.using_allocator(own.malloc):
        yield own
    own.free_all_blocks()


def test_a_pool_of_the_users_own_is_emptied_too(backend, pool):
    import cupy

    device = select_device(str(backend.name.replace("cupy", "cuda")))

    def fail():
        taken = cupy.zeros(1 << 20, np.float32)  # what had been taken when it failed
        raise MemoryError(f"{taken.nbytes} bytes are too large")

    with pytest.raises(MemoryError, match=r"are too large\); cuda:\d had .*; make it smaller"), explained_memory(device, "make it smaller"):
        fail()
    assert pool.total_bytes() == 0
    taken = cupy.zeros(1 << 20, np.float32)
    del taken
    assert pool.free_bytes() > 0
    device.empty_cache()
    assert pool.total_bytes() == 0


def test_the_limit_of_a_pool_of_the_users_own_counts(backend, pool):
    pool.set_limit(size=3 << 20)
    device = select_device(str(backend.name.replace("cupy", "cuda")))
    with pytest.raises(MemoryError, match=r"had 3 MiB free of"), explained_memory(device, "make it smaller"):
        raise MemoryError("too large")


def test_an_allocator_that_is_no_pool_is_let_be(backend):
    if not backend.name.startswith("cupy"):
        pytest.skip("only CuPy has allocators")
    import cupy

    device = select_device(str(backend.name.replace("cupy", "cuda")))
    with backend.device, cupy.cuda.using_allocator(cupy.cuda.alloc):
        with pytest.raises(MemoryError, match="make it smaller"), explained_memory(device, "make it smaller"):
            raise MemoryError("too large")
        device.empty_cache()
