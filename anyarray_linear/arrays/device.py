"""Devices: where arrays live, how they get there, and how to compute there.

A `Device` is a namespace (NumPy, CuPy, torch, ...) and a place in it. `Device.of` is the one an array is on, and
`select_device` (in `selection`) finds the one a user asks for. Importing this loads no array library but NumPy itself:
`Device.xp` is resolved when it is first used.
"""

from __future__ import annotations

import platform
import threading
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from . import cards, dtypes, transfer
from .checks import check_array, describe
from .place import FLOAT_DTYPES, Array, Namespace, device_of, is_array, namespace, peculiar

_NAMESPACES = {
    "cpu": "array_api_compat.numpy",
    "cuda": "array_api_compat.cupy",
    "torch": "array_api_compat.torch",
    "jax": "jax.numpy",
}


class Device:
    """A place where arrays live: the CPU (NumPy), a CUDA device (CuPy), or a device of another namespace.

    Made by `select_device` and `Device.of`. Devices are equal when their arrays may be combined; `str()` is the spec
    that `select_device` takes. A CPU or CUDA device pickles as its spec. `with device:` makes a CUDA device the current
    one and restores the one before, in this thread; for others it does nothing, as they compute where their arguments
    are.

    Attributes:
        kind: `"cpu"`, `"cuda"`, or the namespace's name: `"torch"`, `"jax"`, `"array_api_strict"`.
        index: number of the CUDA device, else `None`.
        native: what the namespace's own functions take as `device=`.
        reason: one sentence that says why this device was chosen.
        namespace_name: of the module that `xp` is: `"array_api_compat.numpy"`, `"dask.array"`.

    >>> from anyarray_linear import select_device
    >>> device = select_device("cpu")
    >>> device, device.asarray([1.0, 2.0], dtype="float32").dtype
    (Device('cpu'), dtype('float32'))
    """

    def __init__(
        self, kind: str, index: int = 0, native: Any = None, reason: str = "", namespace: str | None = None
    ) -> None:
        self.namespace_name = _NAMESPACES.get(kind, kind) if namespace is None else namespace
        self.kind, self.index, self.reason = kind, index if kind == "cuda" else None, reason
        self._native = "cpu" if kind == "cpu" else native

    @staticmethod
    def of(x: Array) -> Device:
        """The device that the array `x` is on. Raises `TypeError` when `x` is no array."""
        if isinstance(x, (np.ndarray, np.generic)):
            return cpu_device("an array was there")
        if not is_array(x):
            raise TypeError(f"x is {describe(x)}, which is on no device; pass an array")
        name: str = namespace(x).__name__
        library = name.removeprefix("array_api_compat.").partition(".")[0]
        if library == "cupy":
            return cuda_device(x.device.id, "an array was there")
        return Device(library, native=device_of(x), reason="an array was there", namespace=name)

    @cached_property
    def xp(self) -> Namespace:
        """The Array API namespace of this device's arrays."""
        return import_module(self.namespace_name)

    @property
    def native(self) -> Any:
        """The namespace's own device object, which its creation functions take as `device=`."""
        if self.kind == "cuda":
            return cards.load_cupy().cuda.Device(self.index)
        return self._native

    @property
    def name(self) -> str:
        """What the device calls itself: `"NVIDIA H100 80GB HBM3"`, `"x86_64"`."""
        if self.index is not None:
            return cards.device_name(self.index)
        return platform.machine() if self.kind == "cpu" else str(self)

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        """`x` as an array on this device.

        Args:
            x: an array of any namespace and device, an object with `__dlpack__`, or nested lists and scalars.
            dtype: the name of a dtype, or a dtype of any namespace. `None` keeps the dtype of `x`, and gives lists of
                floats the device's default; 64-bit integers become int32 where the namespace has none and they fit.

        Returns:
            `x` itself when it is here already and has that dtype, else an array of this device's namespace. It may share
            the memory of `x` where both can: on the host (NumPy, torch), or on one CUDA device (torch and CuPy).

        Raises:
            TypeError: this device has no such dtype (as JAX has no float64 until it is enabled).
        """
        if type(x) is np.ndarray and self.kind == "cpu" and (dtype is None or x.dtype is dtype) and x.dtype.isnative:
            return x  # the usual case in training, and a tenth of the time of what follows
        if isinstance(x, np.generic) or not is_array(x):
            x, dtype = self._as_array(x, dtype)
        here = Device.of(x)
        if here.kind == "torch" and x.requires_grad:
            x = x.detach()  # foreign graphs do not come in
        if here == self and (dtype is None or x.dtype is dtype) and getattr(x.dtype, "isnative", True):
            return x  # the usual case in training: half the time of going by names, as the routes do
        return transfer.route(x, here, self)(x, here, self, dtype)

    def _as_array(self, x: Any, dtype: Any) -> tuple[Array, Any]:
        """What is no array yet, as one where it is; and the dtype to give it: for lists of floats the device's default."""
        if isinstance(x, np.generic):
            return np.asarray(x), dtype
        if peculiar(x):
            check_array("x", x)  # which raises
        if hasattr(x, "__dlpack_device__"):
            kind, index = transfer.dlpack_place(x)
            return (cuda_device(index) if kind == transfer.CUDA else cpu_device()).from_dlpack(x), dtype
        x = np.asarray(x)
        return x, self.default_float if dtype is None and x.dtype.kind == "f" else dtype

    def from_dlpack(self, x: Any) -> Array:
        """`x` as an array of this device over the same memory: nothing is copied, and whoever writes to one changes both.

        The other way needs no function of this library: its arrays are NumPy's, CuPy's, torch's ..., which all that speaks
        DLPack takes, as in `torch.from_dlpack(layer.W)`.

        Args:
            x: an object with `__dlpack__` that is on this device, of any library. JAX counts on nobody writing to it.

        Raises:
            TypeError: `x` has no `__dlpack__`.
            ValueError: `x` is on another device, or the two libraries cannot share it (JAX takes no strides and no
                read-only arrays of NumPy, torch gives no tensors that require grad); `asarray` moves or copies it.

        >>> import numpy as np
        >>> from anyarray_linear import select_device
        >>> x = np.zeros(2)
        >>> np.shares_memory(select_device("cpu").from_dlpack(x), x)
        True
        """
        if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
            raise TypeError(f"x is a {type(x).__name__}, which does not speak DLPack; copy it with Device.asarray(x)")
        cure = f"asarray moves it, as in Device.asarray(x) of {self}"
        if transfer.dlpack_place(x) != self.dlpack_place:
            where = "" if is_array(x) else f" on DLPack's device {transfer.dlpack_place(x)}"
            raise ValueError(f"x is {describe(x)}{where}, which is not in the memory of {self}; {cure}")
        # by default JAX copies what is not aligned as it likes
        options = {"copy": False} if self.kind == "jax" else {}
        try:
            with self:
                shared = self.xp.from_dlpack(x, **options)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"x is {describe(x)}, and {self} cannot share its memory: {error}; {cure}") from error
        if Device.of(shared) != self:  # such as array_api_strict's second device, whose memory is the host's
            raise ValueError(f"x is {describe(x)}, and DLPack cannot tell {self} from {Device.of(shared)}; {cure}")
        return shared

    @cached_property
    def dlpack_place(self) -> tuple[int, int]:
        """The device as DLPack numbers it: kind and index."""
        if self.kind == "cuda":
            return transfer.CUDA, int(self.index or 0)
        return (transfer.CPU, 0) if self.kind == "cpu" else transfer.dlpack_place(self.xp.empty(0, device=self.native))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """The array `x`, wherever it is, as a NumPy array on the host; without a copy where memory can be shared."""
        if isinstance(x, np.ndarray):
            return x
        return transfer.to_host(x, Device.of(x))

    @property
    def default_float(self) -> Any:
        """The namespace's default real floating dtype on this device, as the standard defines it."""
        info = self.xp.__array_namespace_info__()
        device = None if self.kind in ("cpu", "cuda") else self.native
        return info.default_dtypes(device=device)["real floating"]

    def dtype(self, spec: Any = None) -> Any:
        """The dtype object of this device's namespace for a name or a dtype of any namespace; `None`: its default.

        Raises:
            TypeError: layers do not compute in it: it is none of float32, float64 and, on CuPy and torch, float16.
        """
        if spec is None:
            return self.default_float
        name = dtypes.name_of(spec)
        known = (*FLOAT_DTYPES, "float16") if self.kind in ("cuda", "torch") else FLOAT_DTYPES
        if name not in known:
            why = " (float16 is for CuPy and torch, which accumulate it in float32)" if name == "float16" else ""
            if name == "bfloat16" and "float16" in known:
                why = "; tensor cores take float16, too, and float32 with select_device(..., tf32=True)"
            raise TypeError(f"dtype is {name}, but layers on {self} compute in {' or '.join(known)}{why}")
        return dtypes.named(self, name)

    @property
    def tf32(self) -> bool:
        """Whether products of float32 arrays are formed in TF32 here, with 11 bits of each factor: of CuPy's arrays as
        `select_device` or `CUPY_TF32` says, of torch's on CUDA as `torch.backends.cuda.matmul.allow_tf32` does, of JAX's on
        a GPU unless `jax_default_matmul_precision` is "highest": there it is so without asking."""
        if self.kind == "torch":
            return self.native.type == "cuda" and bool(import_module("torch").backends.cuda.matmul.allow_tf32)
        if self.kind == "jax":
            exact = import_module("jax").config.jax_default_matmul_precision in ("highest", "float32")
            return self.native.platform in ("gpu", "cuda") and not exact
        return self.index is not None and cards.float32_products(self.index) == "TF32"

    def synchronize(self) -> None:
        """Wait until everything that was started on this device is done."""
        if self.kind == "cuda":
            self.native.synchronize()
        elif self.kind == "torch" and self.native.type != "cpu":
            import_module("torch").accelerator.synchronize(self.native)
        elif self.kind == "jax":
            for array in import_module("jax").live_arrays():
                array.block_until_ready()

    def memory(self) -> tuple[int, int]:
        """Free and total memory in bytes, of the card or, for the CPU, of the machine.

        What CuPy's pools keep for reuse counts as used, as the driver sees it; `empty_cache` gives it back.

        Raises:
            NotImplementedError: for devices of other namespaces, and on systems without `/proc/meminfo`.
        """
        if self.kind == "cuda":
            with self:
                free, total = cards.load_cupy().cuda.runtime.memGetInfo()
            return free, total
        if self.kind == "cpu" and (meminfo := Path("/proc/meminfo")).exists():
            kib = {line.split()[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
            return 1024 * kib["MemAvailable:"], 1024 * kib["MemTotal:"]
        raise NotImplementedError(f"the memory of {self} cannot be read here")

    def empty_cache(self) -> None:
        """Give the memory that CuPy's pools keep for reuse back to the card, for other programs; arrays in use stay."""
        if self.kind == "cuda":
            with self:
                for pool in cards.pools():
                    pool.free_all_blocks()

    def __enter__(self) -> Device:
        if self.kind == "cuda":
            runtime = cards.load_cupy().cuda.runtime
            _entered().append(runtime.getDevice())
            runtime.setDevice(self.index)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.kind == "cuda":
            cards.load_cupy().cuda.runtime.setDevice(_entered().pop())

    def __str__(self) -> str:
        if self.kind == "cpu":
            return "cpu"
        return f"{self.kind}:{self.index if self.kind == 'cuda' else self.native}"

    def __repr__(self) -> str:
        return f"Device({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, int | None, Any]:
        return self.kind, self.index, self._native

    def __deepcopy__(self, memo: object) -> Device:
        return self


@lru_cache
def cpu_device(reason: str = "it was asked for") -> Device:
    return Device("cpu", reason=reason)


_thread = threading.local()


def _entered() -> list[int]:
    """The CUDA devices that were current when this thread entered its `with device:` blocks."""
    stack: list[int] = _thread.__dict__.setdefault("entered", [])
    return stack


@lru_cache
def cuda_device(index: int, reason: str = "it was asked for") -> Device:
    return Device("cuda", index, reason=reason)
