"""The CUDA devices as CuPy knows them: their names, what they can do, and what to know before comparing results."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import tf32


def load_cupy() -> Any:
    """The module `cupy`, imported when it is first needed."""
    return import_module("cupy")


def current() -> int:
    """The number of the current CUDA device of this thread."""
    return int(load_cupy().cuda.runtime.getDevice())


def pools() -> list[Any]:
    """CuPy's memory pools that new arrays may come from: its own, and the one that the user has chosen instead, if any."""
    cupy = load_cupy()
    default = cupy.get_default_memory_pool()
    chosen = getattr(cupy.cuda.get_allocator(), "__self__", default)  # `pool.malloc`; what is no pool's own is not ours
    return [default] if chosen is default or not hasattr(chosen, "free_all_blocks") else [default, chosen]


def device_name(index: int) -> str:
    """What a CUDA device calls itself."""
    name: bytes = load_cupy().cuda.runtime.getDeviceProperties(index)["name"]
    return name.decode()


def has_nccl() -> bool:
    """Whether CuPy finds NCCL, which sums over several cards."""
    try:
        return bool(import_module("cupy.cuda.nccl").available)
    except ImportError:
        return False


def cuda_version(number: int) -> str:
    """A version of CUDA as CUDA itself numbers them, in the usual way: `"13.2"` for 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"


def float32_products(index: int) -> str:
    """In what products of float32 arrays are formed on this card: `"float32"` or `"TF32"`.

    TF32 (`select_device("cuda", tf32=True)` or `CUPY_TF32=1`, on cards since compute capability 8.0) rounds each factor to
    11 significant bits instead of 24 before it multiplies: faster, with a relative error of about 5e-4 per factor instead
    of 6e-8. By default it is off.
    """
    return "TF32" if tf32.products_are_in_tf32(index) else "float32"


def cautions(index: int) -> list[str]:
    """What to know about a working card before its results or timings are compared, a sentence each; mostly nothing."""
    found = []
    if float32_products(index) == "TF32":
        found.append(
            f"cuda:{index} multiplies float32 matrices in TF32 ({tf32.why(index)}), which keeps 11 of 24 significant bits: "
            "faster, with relative errors near 5e-4; for float32 unset CUPY_TF32 before Python starts, or ask for tf32=False"
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
        "driver_cuda": cuda_version(runtime.driverGetVersion()),
        "cupy": load_cupy().__version__,
        "float32_products": float32_products(index),
    }
