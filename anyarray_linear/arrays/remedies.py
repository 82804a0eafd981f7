"""What failures of CUDA mean and what to do about them, a sentence each; and how CuPy and a driver are installed here."""

from __future__ import annotations

import errno
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .cards import cuda_version
from .memory import is_out_of_memory

NEWER_DRIVER = "Update it from nvidia.com/drivers, or with the packages of your system."
CONTAINER = (
    "In a container, start it with the cards: docker run --gpus all ..., or podman run --device nvidia.com/gpu=all ...; "
    "the host needs the NVIDIA driver and the NVIDIA Container Toolkit, made known once by "
    "nvidia-ctk runtime configure --runtime=docker, or for Podman by nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml."
)


def explain(error: BaseException) -> tuple[str, str]:
    """What an exception of CuPy's means, and what to do about it: two sentences."""
    text = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    names = " ".join(installed()) or "cupy-cuda13x"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC):
        return (
            f"CuPy cannot write its kernel cache ({text})",
            "Set CUPY_CACHE_DIR to a folder that this user may write to, before Python starts.",
        )
    if is_out_of_memory(error):
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
        return f"the NVIDIA driver is too old for this CuPy ({text})", NEWER_DRIVER
    if isinstance(error, ImportError):
        return f"importing CuPy fails ({text})", f'Install it again: pip install --force-reinstall "{names}[ctk]".'
    return (
        f"CuPy fails ({text})",
        'See whether nvidia-smi works, and what python -c "import cupy; cupy.show_config()" says.',
    )


def how_to_install() -> str:
    driver = driver_version()
    install = f'pip install "{extra_for(driver)}"'
    if driver == 0:
        return f"There is no NVIDIA driver either. {how_to_get_a_driver()} Then: {install}."
    if driver < 12000:
        return f"The NVIDIA driver supports CUDA {cuda_version(driver)}, and CuPy needs 12. {NEWER_DRIVER} Then: {install}."
    return f"The NVIDIA driver supports CUDA {cuda_version(driver)}: {install}."


def how_to_get_a_driver() -> str:
    return CONTAINER if in_container() else "Install the one for the card from nvidia.com/drivers."


def extra_for(driver: int) -> str:
    return "anyarray_linear[cuda12]" if 12000 <= driver < 13000 else "anyarray_linear[cuda13]"


def installed() -> list[str]:
    """The installed packages that bring a `cupy`."""
    names = {name.lower().replace("_", "-") for d in metadata().distributions() if (name := d.metadata["Name"])}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\d+x?|-rocm[\w-]*|-cpu-emulated)?", name))


def metadata() -> Any:
    return import_module("importlib.metadata")  # 15 ms, when it is first needed


def driver_version() -> int:
    """The CUDA version that the NVIDIA driver supports, as in 13020 for 13.2; 0 when there is no driver."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def in_container() -> bool:
    return "container" in os.environ or Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
