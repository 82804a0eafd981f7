"""The matrix products of compiled code: MKL where the `mkl` package is installed, else the BLAS that NumPy computes with.

A function is called by its address. Asking NumPy's own extension module for the symbol searches what it is linked with, so
it is the very library that NumPy has loaded, wherever it is and whatever the wheel or distribution calls it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .building import Declined

# (function, whether its integers have 64 bits); numpy's wheels, other 64-bit builds, the usual 32-bit ones
_NAMES = (
    ("scipy_cblas_{}gemm64_", True), ("cblas_{}gemm64_", True), ("cblas_{}gemm_64", True), ("scipy_cblas_{}gemm", False),
    ("cblas_{}gemm", False),
)  # fmt: skip
_THREADS = (
    "scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads",
)  # fmt: skip


class Blas(NamedTuple):
    """Where the products are, and how the threads that the library takes for one are counted."""

    name: str
    single: int
    double: int
    wide: bool
    """Whether its integers have 64 bits."""
    local: int
    """MKL: the address of `int set_num_threads_local(int)`, which counts for one thread of ours alone; else 0."""
    threads: Callable[[], int]
    set_threads: Callable[[int], None] | None
    """`None` where the library takes as many as it likes."""

    @property
    def shares_its_number(self) -> bool:
        """Whether how many threads it takes is one number for the whole process, which can be set."""
        return self.set_threads is not None and not self.local


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _mkl() -> Blas | None:
    """MKL, if the package `mkl` is installed for this Python: in its environment, for its user, or where that looks too."""
    folder, pattern = ("Library/bin", "mkl_rt*.dll") if sys.platform == "win32" else ("lib", "libmkl_rt.so*")
    prefixes = [sysconfig.get_path("data"), *site.PREFIXES, site.USER_BASE if site.ENABLE_USER_SITE else None]
    for prefix in filter(None, prefixes):
        for path in sorted((Path(prefix) / folder).glob(pattern), reverse=True):
            try:
                library = ctypes.CDLL(os.fspath(path))
                single, double = _address(library.cblas_sgemm_64), _address(library.cblas_dgemm_64)
                local, get, put = library.MKL_Set_Num_Threads_Local, library.MKL_Get_Max_Threads, library.MKL_Set_Num_Threads
            except (OSError, AttributeError):
                continue
            put.restype = None
            return Blas("MKL", single, double, True, _address(local), get, put)
    return None


def _own() -> Blas:
    """NumPy's."""
    library = ctypes.CDLL(import_module("numpy._core._multiarray_umath").__file__)
    for name, wide in _NAMES:
        try:
            single, double = (_address(getattr(library, name.format(letter))) for letter in "sd")
        except AttributeError:
            continue
        for threads in _THREADS:
            get, put = (getattr(library, threads.format(word), None) for word in ("get", "set"))
            if get is not None and put is not None:
                put.restype = None
                return Blas("NumPy's OpenBLAS", single, double, wide, 0, get, put)
        return Blas("NumPy's BLAS", single, double, wide, 0, lambda: 1, None)
    raise Declined("NumPy's BLAS has no cblas_sgemm that can be called from here")


@functools.cache
def blas() -> Blas:
    """The library that products are taken from. Raises `Declined`."""
    return _mkl() or numpys()


@functools.cache
def numpys() -> Blas:
    """The library that NumPy computes with. Raises `Declined`."""
    return _own()


class _Alone:
    """A context in which OpenBLAS forms a product in the thread that asks for it.

    Its own threads would spin for some 26 ms after each product, on the cores that ours compute on. The number of threads is
    one for the whole process, so steps in several threads count who is inside, and the last one out puts it back.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, 1
        self.library: Blas | None = None

    def cores(self, library: Blas) -> int:
        """How many threads the user lets the library have."""
        return self.before if self.inside and library.shares_its_number else library.threads()

    def enter(self, library: Blas) -> None:
        if library.set_threads is None or not library.shares_its_number:
            return
        with self.lock:
            if not self.inside:
                self.library, self.before = library, library.threads()
                library.set_threads(1)
            self.inside += 1

    def leave(self, library: Blas) -> None:
        if library.set_threads is None or not library.shares_its_number:
            return
        with self.lock:
            self.inside -= 1
            if not self.inside:
                library.set_threads(self.before)

    def forked(self) -> None:
        """In a child, nobody is inside any more."""
        if self.inside and self.library is not None and self.library.set_threads is not None:
            self.library.set_threads(self.before)
        self.lock, self.inside = threading.Lock(), 0


alone = _Alone()


@contextmanager
def numpy_alone() -> Iterator[None]:
    """A context in which NumPy, too, forms products in the thread that asks for them, where its BLAS lets that be said."""
    try:
        library = numpys()
    except Declined:
        yield
        return
    alone.enter(library)
    try:
        yield
    finally:
        alone.leave(library)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=alone.forked)
