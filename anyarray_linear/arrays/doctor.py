"""Does CUDA really work here? The steps that prove it, and what each failure means.

A driver that counts a card proves nothing: the toolkit may be missing, the card too old for it, the kernel cache not
writable. So a device counts as working only after CuPy has compiled and run a kernel on it and multiplied two matrices
whose product is known. Each step that fails gives its own sentence and its own cure.

The steps run once per process and device, at first use and never at import; what they found is kept.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """One step of the examination.

    name: what was tried. found: what it found, or the sentence that says what failed. seconds: how long it took.
    cure: what to do about a failure, a sentence; empty when the step succeeded. error: the exception behind the failure.
    """

    name: str
    found: str
    seconds: float
    cure: str = ""
    error: BaseException | None = None

    @property
    def ok(self) -> bool:
        """Whether the step succeeded."""
        return not self.cure


class _Failure(Exception):
    """A failure that a step has recognised itself: `_Failure(sentence, cure)`."""


_lock = threading.RLock()
_known: dict[Any, Any] = {}  # what was found in this process: the steps all devices share, and each device's own


def examine(index: int | None = None) -> list[Step]:
    """The steps up to the first failure, or to the proof that the CUDA device works; `None` is the current device.

    Safe in several threads at once. A failure for want of memory passes, so it is the only one that is not kept.
    """
    shared: list[Step] = _once("shared", _examine_installation)
    if not shared[-1].ok:
        return shared
    if index is None:
        index = current()
    own: list[Step] = _once(index, lambda: _examine_device(index))
    if _is_out_of_memory(own[-1].error):
        _known.pop(index, None)
    return shared + own


def _examine_installation() -> list[Step]:
    return _run(("packages", _packages), ("import", _import), ("driver", _driver), ("devices", _count))


def _examine_device(index: int) -> list[Step]:
    return _run(
        ("device", lambda: _device(index)), ("kernel", lambda: _kernel(index)), ("product", lambda: _product(index))
    )


def _once(key: object, find_out: Callable[[], Any]) -> Any:
    """What `find_out` finds, once per process; other threads that want it meanwhile wait for it."""
    known = _known.get(key)
    if known is None:
        with _lock:
            known = _known.get(key)
            if known is None:
                known = _known[key] = find_out()
    return known


def current() -> int:
    """The number of the current CUDA device of this thread."""
    return int(load_cupy().cuda.runtime.getDevice())


def count() -> int:
    """How many CUDA devices can be seen; 0 where CuPy cannot be asked."""
    shared = _once("shared", _examine_installation)
    return int(load_cupy().cuda.runtime.getDeviceCount()) if shared[-1].ok else 0


def roomiest() -> tuple[int | None, str]:
    """The working CUDA device with most free memory, or `None`, and a sentence with the reason.

    Chosen once per process. With several cards this opens a context on each, to ask for its memory; to spare them that,
    name one: `CUDA_VISIBLE_DEVICES`, `ANYARRAY_DEVICE`, or `select_device("cuda:1")`.
    """
    found: tuple[int | None, str] = _once("roomiest", _roomiest)
    return found


def _roomiest() -> tuple[int | None, str]:
    if not count():
        return None, f"CUDA cannot be used: {examine()[-1].found}"
    by_room = sorted(range(count()), key=_free_memory, reverse=True)
    for index in by_room:
        last = examine(index)[-1]
        if last.ok:
            if len(by_room) == 1:
                return index, f"cuda:{index} works and is the only CUDA device"
            return index, f"cuda:{index} works and had the most free memory of {len(by_room)} CUDA devices"
    return None, f"CUDA cannot be used: {last.found}"


def _free_memory(index: int) -> int:
    cuda = load_cupy().cuda
    try:
        with cuda.Device(index):
            return int(cuda.runtime.memGetInfo()[0])
    except cuda.runtime.CUDARuntimeError:  # what is wrong with this card its own steps will say
        return -1


def _run(*checks: tuple[str, Callable[[], str]]) -> list[Step]:
    """The steps of these checks, up to the first that fails."""
    steps: list[Step] = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            found, cure, error = check(), "", None
        except _Failure as failure:
            (found, cure), error = failure.args, failure.__cause__
        except Exception as raised:  # noqa: BLE001  (whatever a driver or an import raises is a finding here)
            (found, cure), error = explain(raised), raised
        steps.append(Step(name, found, time.perf_counter() - start, cure, error))
        if cure:
            break
    return steps


# The steps, in their order ------------------------------------------------------------------------------------------


def _packages() -> str:
    names = _distributions()
    if len(names) > 1:
        one = _extra(_driver_version())
        raise _Failure(
            f"{len(names)} CuPy packages are installed at once ({', '.join(names)}), which overwrite each other's files",
            f'Remove them all, then install one: pip uninstall -y {" ".join(names)} && pip install "{one}".',
        )
    if not names and util.find_spec("cupy") is None:
        raise _Failure("CuPy is not installed", _how_to_install())
    return names[0] + " " + _metadata().version(names[0]) if names else "cupy, not installed by a package manager"


def _import() -> str:
    return f"cupy {load_cupy().__version__}"


def _driver() -> str:
    runtime = load_cupy().cuda.runtime
    driver, toolkit = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise _Failure("there is no NVIDIA driver", _how_to_get_a_driver())
    if driver // 1000 < toolkit // 1000:
        older = f'pip uninstall -y {" ".join(_distributions())} && pip install "anyarray_linear[cuda12]"'
        raise _Failure(
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)} and this CuPy needs {toolkit // 1000}.0",
            _NEWER_DRIVER + (f" Or install the CuPy that fits it: {older}." if driver >= 12000 else ""),
        )
    return f"supports CUDA {_version(driver)}"


def _count() -> str:
    runtime = load_cupy().cuda.runtime
    try:
        found = runtime.getDeviceCount()
        cause = None
    except runtime.CUDARuntimeError as error:
        if "NoDevice" not in str(error):
            raise
        found, cause = 0, error
    if found:
        return f"{found} visible"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        raise _Failure(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which leaves no CUDA device visible",
            "Unset it, or name a device in it that nvidia-smi -L lists, before Python starts; if it lists none, no card is "
            "visible to this machine or container.",
        ) from cause
    sentence = "there is an NVIDIA driver, but no CUDA device is visible to it"
    raise _Failure(sentence, _CONTAINER if _in_container() else "See whether nvidia-smi -L lists a card.") from cause


def _device(index: int) -> str:
    runtime = load_cupy().cuda.runtime
    if index >= count():
        names = ", ".join(f"cuda:{i} ({device_name(i)})" for i in range(count()))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" CUDA_VISIBLE_DEVICES={visible} hides others, and numbers these from 0."
        raise _Failure(f"there is no cuda:{index}, only {names}", f"Ask for one of these.{hidden}")
    properties = runtime.getDeviceProperties(index)
    return f"{device_name(index)}, compute capability {properties['major']}.{properties['minor']}"


def _kernel(index: int) -> str:
    cupy = load_cupy()
    with cupy.cuda.Device(index):
        kernel = cupy.ElementwiseKernel("float32 x", "float32 y", "y = 2 * x + 1", "anyarray_linear_probe")
        _compare(kernel(cupy.arange(4, dtype=np.float32)), np.asarray([1, 3, 5, 7]), "an elementwise kernel", index)
    return "compiled and ran"


def _product(index: int) -> str:
    cupy = load_cupy()
    # small integers: every order of summation, and TF32 too, gives the same bits
    A, B = np.arange(48.0).reshape(6, 8) % 7, np.arange(40.0).reshape(8, 5) % 5
    with cupy.cuda.Device(index):
        product = cupy.asarray(A, dtype=np.float32) @ cupy.asarray(B, dtype=np.float32)
        _compare(product, A @ B, "a matrix product", index)
    return "right"


def _compare(result: Any, expected: Any, what: str, index: int) -> None:
    if not np.array_equal(result.get(), expected):
        raise _Failure(
            f"cuda:{index} gives a wrong result for {what}",
            "Look at nvidia-smi -q -d ECC and the system log for errors of this card, restart, and until it is right "
            "compute elsewhere (ANYARRAY_DEVICE=cpu).",
        )


# What failures mean -------------------------------------------------------------------------------------------------

_NEWER_DRIVER = "Update it from nvidia.com/drivers, or with the packages of your system."
_CONTAINER = (
    "In a container, start it with the cards: docker run --gpus all ..., or podman run --device nvidia.com/gpu=all ...; "
    "the host needs the NVIDIA driver and the NVIDIA Container Toolkit, made known once by "
    "nvidia-ctk runtime configure --runtime=docker, or for Podman by nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml."
)


def explain(error: BaseException) -> tuple[str, str]:
    """What an exception of CuPy's means, and what to do about it: two sentences."""
    text = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    names = " ".join(_distributions()) or "cupy-cuda13x"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC):
        return (
            f"CuPy cannot write its kernel cache ({text})",
            "Set CUPY_CACHE_DIR to a folder that this user may write to, before Python starts.",
        )
    if _is_out_of_memory(error):
        return (
            f"the card has too little free memory ({text})",
            "Free some (nvidia-smi lists who uses it), lift CUPY_GPU_MEMORY_LIMIT if it is set, or choose another card.",
        )
    if re.search("failure finding|failed to load|cannot open (shared object|source)|CUDA headers", text, re.IGNORECASE):
        library = re.search(r"\w*(nvrtc|cublas|cudart|nvjitlink)[\w.-]*", text, re.IGNORECASE)
        return (
            f"a part of the CUDA toolkit is missing: {library[0] if library else text}",
            f'Install it beside CuPy: pip install "{names}[ctk]".',
        )
    if re.search("NoKernelImage|NO_BINARY_FOR_GPU|gpu-architecture|ARCH_MISMATCH|INVALID_PTX|InvalidPtx", text):
        return (
            f"this CuPy has no code for this card ({text})",
            "For a card older than compute capability 7.5 take CuPy for CUDA 12: "
            f'pip uninstall -y {names} && pip install "anyarray_linear[cuda12]"; for a newer card, update CuPy.',
        )
    if re.search("InsufficientDriver|UNSUPPORTED_PTX|UnsupportedPtx", text):
        return f"the NVIDIA driver is too old for this CuPy ({text})", _NEWER_DRIVER
    if isinstance(error, ImportError):
        return f"importing CuPy fails ({text})", f'Install it again: pip install --force-reinstall "{names}[ctk]".'
    return (
        f"CuPy fails ({text})",
        'See whether nvidia-smi works, and what python -c "import cupy; cupy.show_config()" says.',
    )


def _is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or bool(
        re.search(r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED", str(error))
    )


def _how_to_install() -> str:
    driver = _driver_version()
    install = f'pip install "{_extra(driver)}"'
    if driver == 0:
        return f"There is no NVIDIA driver either. {_how_to_get_a_driver()} Then: {install}."
    if driver < 12000:
        return f"The NVIDIA driver supports CUDA {_version(driver)}, and CuPy needs 12. {_NEWER_DRIVER} Then: {install}."
    return f"The NVIDIA driver supports CUDA {_version(driver)}: {install}."


def _how_to_get_a_driver() -> str:
    return _CONTAINER if _in_container() else "Install the one for the card from nvidia.com/drivers."


def _extra(driver: int) -> str:
    return "anyarray_linear[cuda12]" if 12000 <= driver < 13000 else "anyarray_linear[cuda13]"


# Looking around -----------------------------------------------------------------------------------------------------


def load_cupy() -> Any:
    """The module `cupy`, imported when it is first needed."""
    return import_module("cupy")


def _distributions() -> list[str]:
    """The installed packages that bring a `cupy`."""
    names = {name.lower().replace("_", "-") for d in _metadata().distributions() if (name := d.metadata["Name"])}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\d+x?|-rocm[\w-]*|-cpu-emulated)?", name))


def _metadata() -> Any:
    return import_module("importlib.metadata")  # 15 ms, when it is first needed


def _driver_version() -> int:
    """The CUDA version that the NVIDIA driver supports, as in 13020 for 13.2; 0 when there is no driver."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _in_container() -> bool:
    return "container" in os.environ or Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def device_name(index: int) -> str:
    """What a CUDA device calls itself."""
    name: bytes = load_cupy().cuda.runtime.getDeviceProperties(index)["name"]
    return name.decode()


def float32_products(index: int) -> str:
    """What CuPy makes of matrix products of float32 on this card: `"float32"` or `"TF32"`.

    TF32 (`CUPY_TF32=1` on cards since compute capability 8.0) rounds each factor to 11 significant bits instead of 24
    before it multiplies: faster, with a relative error of about 5e-4 per factor instead of 6e-8. CuPy reads the variable
    once per process, so it is not this library's to set; its default is off.
    """
    linalg = import_module("cupy._core._routines_linalg")
    with load_cupy().cuda.Device(index):
        is_tf32 = linalg.get_compute_type(np.dtype("float32")) == linalg.COMPUTE_TYPE_TF32
    capable = load_cupy().cuda.runtime.getDeviceProperties(index)["major"] >= 8
    return "TF32" if is_tf32 and capable else "float32"


def cautions(index: int) -> list[str]:
    """What to know about a working card before its results or timings are compared, a sentence each; mostly nothing."""
    found = []
    if float32_products(index) == "TF32":
        found.append(
            f"cuda:{index} multiplies float32 matrices in TF32 (CUPY_TF32 is set), which keeps 11 of 24 significant bits: "
            "faster, with relative errors near 5e-4; unset CUPY_TF32 before Python starts for float32"
        )
    single_to_double = 87  # cudaDevAttrSingleToDoublePrecisionPerfRatio
    ratio = int(load_cupy().cuda.runtime.deviceGetAttribute(single_to_double, index))
    if ratio >= 8:  # cards for displays, 32 or 64; those for computing have 2
        found.append(
            f"cuda:{index} ({device_name(index)}) computes float64 at 1/{ratio} of its float32 rate; "
            'use dtype="float32" where its precision is enough'
        )
    return found


def facts(index: int) -> dict[str, str]:
    """What the `devices` command says about a working card besides its name and memory."""
    runtime = load_cupy().cuda.runtime
    properties = runtime.getDeviceProperties(index)
    return {
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "driver_cuda": _version(runtime.driverGetVersion()),
        "cupy": load_cupy().__version__,
        "float32_products": float32_products(index),
    }
