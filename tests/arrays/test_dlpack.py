"""DLPack: arrays of other libraries over the same memory, and a clear error where that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import Device, Linear, select_device


class Exchanged:
    """An array of a library that nobody here knows: it speaks DLPack and nothing else."""

    def __init__(self, x, place=None):
        self.x, self.place = x, place

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.place or self.x.__dlpack_device__()


def written(backend, x):
    """`x`, written to in place where the library can do that, else `None`."""
    if backend.name == "jax" or backend.name == "numpy-readonly":
        return None
    with backend.computing():
        x[0] = 7.0
    return x


def test_what_is_here_is_shared_and_not_copied(backend):
    if backend.name == "strict-device1":
        pytest.skip("DLPack has no name for array-api-strict's second device")
    x = backend.asarray([1.0, 2.0, 3.0], "float32")
    for other in (x, Exchanged(x)):
        shared = backend.device.from_dlpack(other)
        assert backend.owns(shared)
        assert shared.dtype == x.dtype
        assert backend.to_numpy(shared).tolist() == backend.to_numpy(x).tolist()
        if written(backend, x) is not None:
            assert backend.to_numpy(shared)[0] == 7


def test_an_object_that_only_speaks_dlpack_becomes_an_array_on_any_device(backend):
    there = backend.asarray(np.arange(6).reshape(2, 3), "float64")
    with backend.computing():
        strided = there[:, ::2]
    for place in (select_device("cpu"), backend.device):
        x = place.asarray(Exchanged(strided), "float32")
        assert Device.of(x) == place
        assert place.to_numpy(x).tolist() == [[0, 2], [3, 5]]
        assert place.to_numpy(x).dtype == np.float32


def test_another_device_is_named_with_the_cure(backend):
    elsewhere = Exchanged(np.zeros(2), place=(2, 5))
    with pytest.raises(ValueError, match=r"^x is a \w+ Exchanged on DLPack's device \(2, 5\), which is not in the memory of .*asarray"):
        backend.device.from_dlpack(elsewhere)
    with pytest.raises(TypeError, match=r"^x is a list, which does not speak DLPack; copy it with Device\.asarray"):
        backend.device.from_dlpack([1.0])
    if backend.name.startswith("cupy"):
        other = 1 - int(backend.name[-1])
        if pytest.importorskip("cupy").cuda.runtime.getDeviceCount() > 1:
            with pytest.raises(ValueError, match=f"^x is a cupy array on cuda:{other}, which is not in the memory of cuda:{backend.name[5:]}"):
                backend.device.from_dlpack(select_device(f"cuda:{other}").asarray(np.zeros(2)))
        with pytest.raises(ValueError, match=r"^x is a numpy array on cpu, which is not in the memory of cuda"):
            backend.device.from_dlpack(np.zeros(2))
        with pytest.raises(ValueError, match=r"^x is a cupy array on cuda:., which is not in the memory of cpu"):
            select_device("cpu").from_dlpack(backend.asarray([0.0]))


def test_what_cannot_tell_its_devices_apart_is_refused():
    strict = pytest.importorskip("array_api_strict")
    place = Device.of(strict.zeros(1, device=strict.Device("device1")))
    with pytest.raises(ValueError, match="DLPack cannot tell array_api_strict"):
        place.from_dlpack(np.zeros(2))


def test_a_layer_works_on_shared_memory(backend):
    if backend.name == "strict-device1":
        pytest.skip("DLPack has no name for array-api-strict's second device")
    W = backend.asarray([[1.0, 2.0], [3.0, 4.0]], "float32")
    layer = Linear.from_arrays(backend.device.from_dlpack(Exchanged(W)))
    Z = layer(backend.asarray([1.0, 1.0], "float32"))
    assert backend.to_numpy(Z).tolist() == [3, 7]


@pytest.mark.stand_in
@pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
def test_on_one_card_nothing_goes_by_way_of_the_host(backend):
    from cupy_backends import cpu_counters as counters

    class Foreign(Exchanged):  # an array of the standard, of another library, on the same card; torch's are such
        dtype, ndim, shape = property(lambda self: self.x.dtype), 1, (3,)
        device = property(lambda self: "its name for that card")

        def __array_namespace__(self, api_version=None):
            import types

            return types.ModuleType("foreign")

    x, place = backend.asarray([1.0, 2.0, 3.0], "float32"), backend.device
    for there in (Foreign(x), Exchanged(x)):
        with counters.count() as counted:
            here = place.asarray(there)
        assert (counted.device_to_host, counted.host_to_device, counted.launches) == (0, 0, 0)
        assert backend.owns(here)
        written(backend, x)
        assert backend.to_numpy(here)[0] == 7


def test_jax_is_not_allowed_to_copy_in_silence():
    jax = pytest.importorskip("jax")
    place = Device.of(jax.numpy.zeros(1))
    memory = np.zeros(64, dtype="float32")
    start = next(i for i in range(1, 32) if memory[i:].ctypes.data % 64)  # JAX wants 64 bytes of alignment
    with pytest.raises(ValueError, match=r"cannot share its memory: .*asarray moves it"):
        place.from_dlpack(memory[start : start + 4])
    assert np.asarray(place.asarray(memory[start : start + 4])).tolist() == [0] * 4
