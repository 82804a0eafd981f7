"""Compiled code: made by numba once per machine, kept on disk as an object file, and loaded without numba.

Importing numba takes longer than many trainings. So what it compiles is kept as machine code, in a folder of the user's, and
loading that needs llvmlite only, some 50 ms. What is kept is used only by the same source, the same numba and llvmlite, and
the same kind of processor.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

_lock = threading.Lock()
LIBRARY = {"memset", "memcpy", "memmove", "log", "logf", "log1p", "log1pf", "sqrt", "sqrtf", "exp", "expf"}
"""The functions of the C library that compiled code may call."""


class Declined(Exception):
    """Why something is not compiled here; the text is for `TrainingStep.how`."""


class Code(NamedTuple):
    """The addresses of compiled functions."""

    run: int
    """`void run(int64 control, int64 pool, int64 others)`"""
    worker: int
    """`void* worker(void* pool)`"""
    name: str


@functools.cache
def code_for(name: str) -> Code:
    """The compiled functions for `"float32"` or `"float64"`, with `"-whole"` for all layers. Raises `Declined`."""
    with _lock:
        try:
            return _code_for(name)
        except Declined:
            raise
        except Exception as error:  # whatever goes wrong in there, training goes on without it
            raise Declined(f"compiling failed: {type(error).__name__}: {error}"[:200]) from error


def is_at_hand(name: str) -> bool:
    """Whether the compiled functions are loaded, or are kept on disk, so that they need not be compiled."""
    if name in _loaded:
        return True
    if not _is_installed():
        return False
    import llvmlite.binding as llvm

    return _path(llvm, name).exists()


_loaded: set[str] = set()


def _is_installed() -> bool:
    return all(PathFinder.find_spec(name) for name in ("numba", "llvmlite"))


def _path(llvm: Any, name: str) -> Path:
    return _folder() / f"step-{name}-{_key(llvm)}.o"


def _code_for(name: str) -> Code:
    if not _is_installed():
        raise Declined('numba is not installed (pip install "anyarray_linear[fast]")')
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    path = _path(llvm, name)
    machine_code = _read(path)
    if machine_code is None:
        machine_code = _compiled(llvm, name)
        _write(path, machine_code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))  # at its end, the process may still have threads in there
    _loaded.add(name)
    return Code(engine.get_function_address("anyarray_run"), engine.get_function_address("anyarray_worker"), name)


def _target(llvm: Any) -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(llvm), opt=3, jit=True
    )


def _features(llvm: Any) -> str:
    with suppress(RuntimeError):  # not known of every processor
        return str(llvm.get_host_cpu_features().flatten())
    return ""


def _key(llvm: Any) -> str:
    """What the code was made of, and for what."""
    here, found = Path(__file__).parent, hashlib.sha256()
    found.update(_DOORS.encode())
    for path in (here / "layout.py", *sorted((here / "source").glob("*.py")), here.parents[1] / "dropout.py"):
        found.update(path.read_bytes())
    for name in ("numba", "llvmlite"):
        spec = PathFinder.find_spec(name)
        origin = Path(spec.origin if spec and spec.origin else "")
        found.update(repr((name, sorted(p.name for p in origin.parent.parent.glob(f"{name}-*.dist-info")))).encode())
    found.update(repr((sys.version, llvm.get_process_triple(), llvm.get_host_cpu_name(), _features(llvm))).encode())
    return found.hexdigest()[:24]


def _folder() -> Path:
    """Where compiled code is kept: with numba's own, or in the user's cache."""
    for variable in ("ANYARRAY_CACHE_DIR", "NUMBA_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "anyarray_linear"


def _read(path: Path) -> bytes | None:
    """The machine code there; `None` if there is none, or it is not whole."""
    try:
        digest, machine_code = path.read_bytes()[:32], path.read_bytes()[32:]
    except OSError:
        return None
    return machine_code if hashlib.sha256(machine_code).digest() == digest else None


def _write(path: Path, machine_code: bytes) -> None:
    """Keep it, if that can be: a folder that cannot be written to costs some seconds at each start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(machine_code).digest() + machine_code)
        os.replace(name, path)
    except OSError as error:
        _say(f"the compiled step is not kept for next time, since {path.parent} cannot be written to ({error.strerror}); "
             "set ANYARRAY_CACHE_DIR to a folder that can")


def _say(line: str) -> None:
    with suppress(OSError, AttributeError, ValueError):  # there may be no stderr
        print(f"anyarray_linear: {line}", file=sys.stderr, flush=True)


_DOORS = """
define void @anyarray_run(i64 %control, i64 %pool, i64 %others) {{
  %result = alloca i64
  %error = alloca i64
  %status = call i32 @{name}(ptr %result, ptr %error, i64 %control, i64 %pool, i64 %others)
  ret void
}}
define ptr @anyarray_worker(ptr %pool) {{
  %result = alloca i64
  %error = alloca i64
  %address = ptrtoint ptr %pool to i64
  %status = call i32 @{name}(ptr %result, ptr %error, i64 0, i64 %address, i64 0)
  ret ptr null
}}
"""


def _compiled(llvm: Any, name: str) -> bytes:
    """The machine code, compiled now: some seconds."""
    dtype, _, whole = name.partition("-")
    layers = "" if whole else " and models of Linear and ReLU"
    _say(f"compiling the training step for {dtype}{layers}, once on this machine; it takes some seconds")
    import numpy as np
    from numba import njit

    for module in [module for module in sys.modules if module.startswith(f"{__package__}.source")]:
        del sys.modules[module]  # functions that were compiled are what they are
    from .source import machine

    vars(machine)["WHOLE"] = bool(whole)
    from .source.engine import enter

    like = np.dtype(dtype).type(1)

    def entered(control: int, pool: int, others: int) -> None:
        enter(control, pool, others, like)

    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    with _translating_only(), _without_collecting():
        compiled = njit("void(int64, int64, int64)", **options)(entered)
        (result,) = compiled.overloads.values()
        text = result.library.get_llvm_str()
    module = llvm.parse_assembly(text + _DOORS.format(name=f'"{result.fndesc.llvm_func_name}"'))
    module.verify()
    unknown = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if not LIBRARY.issuperset(unknown):  # whatever it is, it cannot be loaded without numba
        raise Declined(f"this numba's code calls {', '.join(unknown)}")
    target, tuning = _target(llvm), llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = True
    passes = llvm.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(module, passes)
    return bytes(target.emit_object(module))


@contextmanager
def _translating_only() -> Iterator[None]:
    """A context in which numba links functions into one, but neither optimises each on its way nor makes machine code of it.

    That is done once, for the whole. Nor does it tell of each pass over each function, for nobody listens. It is a third of
    the time; without it, with a numba that is made otherwise, all is as well but slower.
    """
    from unittest import mock

    from numba.core import codegen, config, cpu, event
    from numba.core.compiler_lock import global_compiler_lock

    def linked(self: Any, library: Any, *rest: Any) -> Any:
        library._ensure_finalized()
        return [].append  # what numba asks for is a built-in function, and another one each time; it is never called

    def nothing(*_: Any, **__: Any) -> None:
        pass

    with global_compiler_lock, ExitStack() as patches:
        with suppress(AttributeError):
            for place, name, new in (
                (cpu.CPUContext, "get_executable", linked),
                (codegen.JITCodeLibrary, "_finalize_specific", nothing),
                (codegen.CPUCodegen, "_add_module", nothing),
                (event, "start_event", nothing),
                (event, "end_event", nothing),
                (config, "OPT", config._OptLevel(0)),
            ):
                getattr(place, name)
                patches.enter_context(mock.patch.object(place, name, new))
        yield


@contextmanager
def _without_collecting() -> Iterator[None]:
    """A context in which Python looks for no cycles: numba makes millions of objects, and looking is a tenth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@functools.cache
def caller(address: int, *, holding: bool) -> Any:
    """`run` as a Python function; `holding` the interpreter, which what takes microseconds should not hand to others."""
    kind = ctypes.PYFUNCTYPE if holding else ctypes.CFUNCTYPE
    return kind(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)
