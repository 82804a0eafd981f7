"""The kernels of the library, compiled by NVIDIA's own compiler for cards that need not be there: NVRTC wants no driver.

They go through CuPy's own front end (its headers, its options), so what is compiled here is what CuPy compiles there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

CAPABILITIES = "75", "80", "86", "89", "90", "100", "103", "120"
"""The compute capabilities of cards from Turing to Blackwell, by which NVRTC knows them."""
LAYOUTS = {  # of an elementwise kernel's arrays: axes, whether contiguous, whether 32 bits count its elements
    "contiguous": (1, True, True),
    "contiguous, 64-bit": (1, True, False),
    "strided": (2, False, True),
    "strided, 64-bit": (2, False, False),
    "0-d": (0, True, True),
}


class Program(NamedTuple):
    """What CuPy hands to NVRTC; `dtype` is the character of what it computes for, `""` if it is for one dtype only."""

    label: str
    dtype: str
    source: str
    options: tuple[str, ...]


class Compiled(NamedTuple):
    """What became of a program for one card; `code` is its PTX, where that was asked for."""

    label: str
    dtype: str
    capability: str
    error: str
    log: str
    code: str


def missing() -> str:
    """Why the real compiler is not here; `""` if it is."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"its place is taken by cupy-cpu-emulated {importlib.metadata.version('cupy-cpu-emulated')}"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def capabilities() -> list[str]:
    """Those that this NVRTC knows."""
    from cupy_backends.cuda.libs import nvrtc

    known = {str(number) for number in nvrtc.getSupportedArchs()}
    return [name for name in CAPABILITIES if name in known]


def lane() -> Any:
    """The list of the lane's kernels. They need no cuBLAS, which is half a gigabyte, but the lane as a whole does."""
    try:
        import cupy_backends.cuda.libs.cublas  # noqa: F401
    except ImportError:
        import cupy_backends.cuda.libs as libraries

        libraries.cublas = sys.modules["cupy_backends.cuda.libs.cublas"] = mock.MagicMock(__file__="")
    return importlib.import_module("anyarray_linear.lanes.cupy.programs")


def programs() -> list[Program]:
    """Every program that the library may ask of the compiler."""
    found = {}
    for what, dtype, kernel in lane().raw():
        found.setdefault((kernel.code, kernel.options), (f"{what}, {dtype}", dtype, False))
    for what, dtype, source, options in _elementwise():
        found.setdefault((source, options), (f"{what}, {dtype}".rstrip(", "), dtype, True))
    return [
        Program(label, dtype, *_front_end(source, options, headers))
        for (source, options), (label, dtype, headers) in found.items()
    ]


def _elementwise() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    import cupy
    from cupy._core import _kernel as make

    from anyarray_linear.arrays import doctor

    array, indexer, scalar = 1, 2, 3  # the kinds of arguments in cupy/_core/_kernel.pxd
    for what, kernel, numbers in (("the doctor's probe", cupy.ElementwiseKernel(*doctor.PROBE), ()),):
        is_generic = any(p.ctype == "T" for p in kernel.in_params)
        for dtype in "efd" if is_generic else [""]:
            for layout, (ndim, contiguous, small) in LAYOUTS.items():
                given = [np.dtype(dtype) if p.ctype == "T" else None if p.name in numbers else p.dtype for p in kernel.in_params]
                inputs, outputs, types = kernel._decide_params_type(tuple(given), ())
                arguments = [
                    make._ArgInfo(scalar, object, np.dtype(t), 0, True, True)
                    if p.name in numbers
                    else make._ArgInfo(array, cupy.ndarray, np.dtype(t), ndim, contiguous, small)
                    for p, t in zip(kernel.in_params, inputs, strict=True)
                ]
                arguments += [make._ArgInfo(array, cupy.ndarray, np.dtype(t), ndim, contiguous, small) for t in outputs]
                arguments.append(make._ArgInfo(indexer, object, None, ndim, True, small))
                source = make._get_elementwise_kernel_code(
                    tuple(arguments), types, kernel.params, kernel.operation, kernel.name, kernel.preamble, **kernel.kwargs
                )
                yield f"{what}, {layout}", dtype, source, kernel.kwargs.get("options", ())


def _front_end(source: str, options: tuple[str, ...], headers: bool) -> tuple[str, tuple[str, ...]]:
    """The whole source and the options that CuPy hands to NVRTC, less the card's."""
    from cupy._core import core
    from cupy.cuda import compiler

    handed: list[Any] = []

    def stop_here(source: str, options: tuple[str, ...] = (), **more: Any) -> None:
        handed.extend((source, options))
        raise StopIteration

    kept, compiler._compile_module_with_cache = compiler._compile_module_with_cache, stop_here
    try:
        with contextlib.suppress(StopIteration):
            core.compile_with_cache(source, options, arch="80", prepend_cupy_headers=headers)
    finally:
        compiler._compile_module_with_cache = kept
    source, options = handed
    return source, (*options, "-ftz=true", "--device-as-default-execution-space")  # as that function adds


def compiled(job: tuple[Program, str, bool]) -> Compiled:
    """Compile a program for a compute capability; to PTX if asked, else to the machine's code, with the assembler's figures."""
    from cupy.cuda import compiler

    program, capability, to_ptx = job
    more = (f"-arch=compute_{capability}",) if to_ptx else (f"-arch=sm_{capability}", "--ptxas-options=-v")
    log, code, error = io.StringIO(), b"", ""
    try:
        unit = compiler._NVRTCProgram(program.source, "kernel.cu", method="ptx" if to_ptx else "cubin")
        code, _ = unit.compile((*program.options, *more), log)
    except compiler.CompileException as failed:
        error = str(failed)
    ptx = code.decode().rstrip("\0") if to_ptx else ""
    return Compiled(program.label, program.dtype, capability, error, log.getvalue(), ptx)


def warnings(log: str) -> list[str]:
    """The lines of the compiler's log that warn, without where they stand."""
    lines = (re.sub(r"^kernel\.cu\(\d+\): ", "", line) for line in log.splitlines())
    return [line for line in lines if re.search(r"\b(warning|error)\b", line, re.IGNORECASE) and "ptxas info" not in line]


def resources(log: str) -> list[tuple[str, int, int, int]]:
    """By function: its name, registers, bytes spilled to memory and back, and shared memory, from what the assembler tells."""
    found = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", log):
        if name := re.search(r"Compiling entry function '(\w+)'", part):
            numbers = [
                int((re.search(pattern, part) or ["", "0"])[1])
                for pattern in (
                    r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"(\d+) bytes smem",
                )
            ]  # fmt: skip
            found.append((name[1], numbers[0], numbers[1] + numbers[2], numbers[3]))
    return found


def float64_arithmetic(ptx: str) -> list[str]:
    """The instructions that compute in float64. To convert an argument that came as one is none."""
    return sorted(set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rsqrt|rcp|neg|abs|min|max|setp)\.[\w.]*f64\b", ptx)))
