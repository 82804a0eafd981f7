"""What card this is, whether it works, and the versions of everything that matters to a figure."""

from __future__ import annotations

import platform
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from anyarray_linear import select_device
from anyarray_linear.arrays import cards, doctor
from anyarray_linear.arrays.cores import usable_cores

from .answering import tell

PACKAGES = (
    *("numpy", "array-api-compat", "cupy-cuda12x", "cupy-cuda13x", "cupy-cpu-emulated", "torch", "jax", "jaxlib", "numba"),
    *("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "pytest"),
)
ASKED = "driver_version", "memory.total", "clocks.max.sm", "power.limit", "compute_mode", "mig.mode.current"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _smi() -> dict[str, str]:
    """What nvidia-smi tells of the first card."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return dict(zip(ASKED, map(str.strip, done.stdout.split(",")), strict=False)) if done.returncode == 0 else {}


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def main() -> None:
    """Tell it."""
    steps = doctor.examine()
    told = [f"{step.name}: {step.found} ({step.seconds:.2f} s)" + (f" {step.cure}" if step.cure else "") for step in steps]
    for line in told:
        print(line)
    about: dict[str, Any] = {"works": steps[-1].ok, "doctor": told, "versions": _versions(), "commit": _commit()}
    about |= {"machine": platform.platform(), "cores": len(usable_cores())}
    if steps[-1].ok:
        device = select_device("cuda:0")
        about |= {"name": device.name, "stand_in": device.name.startswith("CuPy CPU emulated")}
        about |= {**cards.facts(0), "cautions": cards.cautions(0), "memory": device.memory()}
        about["runtime"] = cards.cuda_version(cards.load_cupy().cuda.runtime.runtimeGetVersion())
        about["smi"] = _smi()
    tell(about_card=about)


if __name__ == "__main__":
    main()
