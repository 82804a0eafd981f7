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

# errors of CUDA that are about the machine or the process: what they are called, what they mean, what cures them
_OF_THE_SYSTEM = (
    (  # error 3
        "cudaErrorInitializationError|CUDA_ERROR_NOT_INITIALIZED",
        "CUDA cannot be started in this process",
        'If the process was forked from one that had used CUDA (multiprocessing, os.fork), start it anew instead: '
        'multiprocessing.get_context("spawn"). If not, see whether nvidia-smi works.',
    ),
    (  # error 46
        "cudaErrorDevicesUnavailable|CUDA_ERROR_DEVICE_UNAVAILABLE",
        "the card is in use by another process that shares it with none, or is being reset",
        "See in nvidia-smi who uses it, and its compute mode: nvidia-smi -c 0 lets several processes share it; or choose "
        "another card.",
    ),
    (  # error 802
        "cudaErrorSystemNotReady|CUDA_ERROR_SYSTEM_NOT_READY",
        "the cards of this machine are not ready",
        "Machines whose cards are joined by NVSwitch (HGX, DGX) need the fabric manager, in the version of the driver: "
        "systemctl start nvidia-fabricmanager. If it has just been started, wait a minute.",
    ),
    (  # error 803
        "cudaErrorSystemDriverMismatch|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "the NVIDIA driver in the kernel and the one in the libraries are two versions",
        "Restart the machine, which loads the newer one; start a container anew after the host's driver was changed.",
    ),
    (  # error 804
        "cudaErrorCompatNotSupportedOnDevice|CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        "a newer libcuda than the driver's own was found, which only cards of data centres can use",
        "Take the cuda-compat folder out of LD_LIBRARY_PATH (or the cuda-compat package out of the image), or update the "
        "driver.",
    ),
    (  # error 999
        "cudaErrorUnknown|CUDA_ERROR_UNKNOWN",
        "the driver fails and does not say why",
        "Often the module nvidia_uvm is missing or lost in a suspend: modprobe nvidia_uvm, or rmmod nvidia_uvm && modprobe "
        "nvidia_uvm as root; in a container, restart it. Else restart the machine.",
    ),
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
    for called, what, cure in _OF_THE_SYSTEM:
        if re.search(rf"\b({called})\b", text):
            return f"{what} ({text})", cure
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
