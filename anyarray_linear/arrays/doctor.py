"""Does CUDA really work here? The steps that prove it; what their failures mean is in `remedies`.

A driver that counts a card proves nothing: the toolkit may be missing, the card too old for it, the kernel cache not
writable. So a device counts as working only after CuPy has compiled and run a kernel on it and multiplied two matrices
whose product is known. Each step that fails gives its own sentence and its own cure.

The steps run once per process and device, at first use and never at import; what they found is kept.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from . import cards, remedies
from .memory import is_out_of_memory


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


PROBE = "float32 x", "float32 y", "y = 2 * x + 1", "anyarray_linear_probe"
"""The kernel that a card has to run."""

_lock = threading.RLock()
_known: dict[Any, Any] = {}  # what was found in this process: the steps all devices share, and each device's own


def _forget() -> None:
    global _lock
    _known.clear()
    _lock = threading.RLock()  # a thread that held it is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # what was found is true of a context that a forked child does not have


def examine(index: int | None = None) -> list[Step]:
    """The steps up to the first failure, or to the proof that the CUDA device works; `None` is the current device.

    Safe in several threads at once. A failure for want of memory passes, so it is the only one that is not kept.
    """
    shared: list[Step] = once("shared", _examine_installation)
    if not shared[-1].ok:
        return shared
    if index is None:
        index = cards.current()
    own: list[Step] = once(index, lambda: _examine_device(index))
    if is_out_of_memory(own[-1].error):
        _known.pop(index, None)
    return shared + own


def _examine_installation() -> list[Step]:
    return _run(("packages", _packages), ("import", _import), ("driver", _driver), ("devices", _count))


def _examine_device(index: int) -> list[Step]:
    return _run(
        ("device", lambda: _device(index)), ("kernel", lambda: _kernel(index)), ("product", lambda: _product(index))
    )


def once(key: object, find_out: Callable[[], Any]) -> Any:
    """What `find_out` finds, once per process; other threads that want it meanwhile wait for it."""
    known = _known.get(key)
    if known is None:
        with _lock:
            known = _known.get(key)
            if known is None:
                known = _known[key] = find_out()
    return known


def count() -> int:
    """How many CUDA devices can be seen; 0 where CuPy cannot be asked."""
    shared = once("shared", _examine_installation)
    return int(cards.load_cupy().cuda.runtime.getDeviceCount()) if shared[-1].ok else 0


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
            (found, cure), error = remedies.explain(raised), raised
        steps.append(Step(name, found, time.perf_counter() - start, cure, error))
        if cure:
            break
    return steps


# The steps, in their order ------------------------------------------------------------------------------------------


def _packages() -> str:
    names = remedies.installed()
    if len(names) > 1:
        one = remedies.extra_for(remedies.driver_version())
        raise _Failure(
            f"{len(names)} CuPy packages are installed at once ({', '.join(names)}), which overwrite each other's files",
            f'Remove them all, then install one: pip uninstall -y {" ".join(names)} && pip install "{one}".',
        )
    if not names and util.find_spec("cupy") is None:
        raise _Failure("CuPy is not installed", remedies.how_to_install())
    return names[0] + " " + remedies.metadata().version(names[0]) if names else "cupy, not installed by a package manager"


def _import() -> str:
    return f"cupy {cards.load_cupy().__version__}"


def _driver() -> str:
    runtime = cards.load_cupy().cuda.runtime
    driver, toolkit = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise _Failure("there is no NVIDIA driver", remedies.how_to_get_a_driver())
    if driver // 1000 < toolkit // 1000:
        older = f'pip uninstall -y {" ".join(remedies.installed())} && pip install "anyarray_linear[cuda12]"'
        raise _Failure(
            f"the NVIDIA driver is too old: it supports CUDA {cards.cuda_version(driver)} "
            f"and this CuPy needs {toolkit // 1000}.0",
            remedies.NEWER_DRIVER + (f" Or install the CuPy that fits it: {older}." if driver >= 12000 else ""),
        )
    return f"supports CUDA {cards.cuda_version(driver)}"


def _count() -> str:
    runtime = cards.load_cupy().cuda.runtime
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
    cure = remedies.CONTAINER if remedies.in_container() else "See whether nvidia-smi -L lists a card."
    raise _Failure(sentence, cure) from cause


def _device(index: int) -> str:
    runtime = cards.load_cupy().cuda.runtime
    if index >= count():
        names = ", ".join(f"cuda:{i} ({cards.device_name(i)})" for i in range(count()))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" CUDA_VISIBLE_DEVICES={visible} hides others, and numbers these from 0."
        raise _Failure(f"there is no cuda:{index}, only {names}", f"Ask for one of these.{hidden}")
    properties = runtime.getDeviceProperties(index)
    return f"{cards.device_name(index)}, compute capability {properties['major']}.{properties['minor']}"


def _kernel(index: int) -> str:
    cupy = cards.load_cupy()
    _say_if_all_is_compiled_anew()
    with cupy.cuda.Device(index):
        kernel = cupy.ElementwiseKernel(*PROBE)
        _compare(kernel(cupy.arange(4, dtype=np.float32)), np.asarray([1, 3, 5, 7]), "an elementwise kernel", index)
    return "compiled and ran"


def _say_if_all_is_compiled_anew() -> None:
    """The first start waits for the compiler, and would do so in silence."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    with contextlib.suppress(OSError):  # that it cannot be read, CuPy itself will say
        if not folder.exists() or not any(folder.iterdir()):
            import logging

            logging.getLogger(__name__).warning(
                "kernels are compiled for this card, since none are kept in %s yet; that takes a while, once", folder
            )


def _product(index: int) -> str:
    cupy = cards.load_cupy()
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
