"""The backends that the suite runs on, as one fixture: a test that takes `backend` runs once on each of them.

    pytest --backends numpy,strict      only these
    pytest --require-cuda               fail unless tests ran on a real CUDA device

The conversions here are written with each library's own functions, not with `anyarray_linear.arrays.device`, so that a fault
there cannot hide itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import hypothesis
import numpy as np
import pytest
from array_api_compat import array_namespace
from array_api_compat import device as device_of

# where the compiled lane keeps its code, so that tests leave nothing in the user's own cache
os.environ.setdefault("ANYARRAY_CACHE_DIR", os.path.join(tempfile.gettempdir(), "anyarray_linear-tests"))
# SciPy reads it when it is imported; without it, scikit-learn does not dispatch on arrays
os.environ.setdefault("SCIPY_ARRAY_API", "1")

STAND_IN = b"CuPy CPU emulated"  # how the name of an emulated device starts


class Unavailable(Exception):
    """Why a backend cannot be tested here."""


class Backend:
    """One array library on one device.

    name: as in `--backends`. xp: its Array API namespace. native: its device, as `xp`'s creation functions take it.
    dtypes: the names of the floating dtypes that layers take here. computing: a context for array code of the test's
    own, which CuPy runs on the current device; the library must not need it. around: a context for each test.
    """

    def __init__(
        self,
        name: str,
        from_host: Callable[[np.ndarray], Any],
        to_host: Callable[[Any], Any] = np.asarray,
        *,
        dtypes: tuple[str, ...] = ("float32", "float64"),
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        computing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.name, self.dtypes, self.around, self.computing = name, dtypes, around, computing
        self._from_host, self._to_host = from_host, to_host
        x = self.asarray([0.0])
        self.xp, self.native = array_namespace(x), device_of(x)

    def __repr__(self) -> str:
        return self.name

    @property
    def device(self) -> Any:
        """The `Device` of this backend, for the `device=` of a layer."""
        from anyarray_linear import Device

        return Device.of(self.asarray([0.0]))

    def asarray(self, x: Any, dtype: str | None = None) -> Any:
        """A NumPy array, list or number as an array of this backend on its device; always a copy."""
        return self._from_host(np.array(x, dtype=dtype))

    def to_numpy(self, x: Any) -> np.ndarray:
        """An array of this backend as a NumPy array."""
        return np.asarray(self._to_host(x))

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of this backend, on its device."""
        return array_namespace(x) is self.xp and device_of(x) == self.native


def _imported(module: str) -> Any:
    """The module, whatever it warns of while it is imported."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


@contextlib.contextmanager
def _fewest_options() -> Iterator[None]:
    """array-api-strict with everything off that the standard leaves optional."""
    import array_api_strict

    array_api_strict.set_array_api_strict_flags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )
    try:
        yield
    finally:
        array_api_strict.reset_array_api_strict_flags()


def _strict(name: str) -> Backend:
    strict = _imported("array_api_strict")
    home = strict.Device("CPU_DEVICE")
    device = strict.Device("device1") if name == "strict-device1" else home
    return Backend(
        name,
        lambda x: strict.asarray(x, device=device),
        lambda x: x.to_device(home),
        around=_fewest_options if name == "strictest" else contextlib.nullcontext,
    )


def _torch(name: str) -> Backend:
    torch = _imported("torch")
    torch.set_num_threads(1)  # for the small arrays of tests, more threads only wait for each other
    return Backend(name, torch.from_numpy, lambda x: x.detach().numpy(), dtypes=("float16", "float32", "float64"))


def _jax(name: str) -> Backend:
    jax = _imported("jax")
    jax.config.update("jax_enable_x64", True)
    cpu = jax.devices("cpu")[0]
    return Backend(name, lambda x: jax.device_put(x, cpu))


def _cupy(name: str) -> Backend:
    cupy, devices = _cuda()
    index = int(name.removeprefix("cupy:"))
    if index >= len(devices):
        raise Unavailable(f"there is no CUDA device {index}, only {len(devices)}")

    def from_host(x: np.ndarray) -> Any:
        with cupy.cuda.Device(index):
            return cupy.asarray(x)

    return Backend(
        name,
        from_host,
        cupy.asnumpy,
        dtypes=("float16", "float32", "float64"),
        around=_current_device_stays,
        computing=lambda: cupy.cuda.Device(index),
    )


@contextlib.contextmanager
def _current_device_stays() -> Iterator[None]:
    import cupy

    before = cupy.cuda.Device().id
    yield
    after = cupy.cuda.Device().id
    cupy.cuda.Device(before).use()
    assert after == before, f"the current device was {before} before the test and is {after} after it"


@functools.cache
def _cuda() -> tuple[Any, list[str]]:
    """CuPy and the names of its devices, each of which has compiled and run a kernel and a product."""
    try:
        cupy = _imported("cupy")
        names = []
        for index in range(cupy.cuda.runtime.getDeviceCount()):
            with cupy.cuda.Device(index):
                x = cupy.ones((2, 2), dtype=cupy.float32) + 1
                assert float((x @ x)[0, 0]) == 8
            names.append(cupy.cuda.runtime.getDeviceProperties(index)["name"].decode())
    except Unavailable:
        raise
    except Exception as error:  # a broken driver has many classes of error
        raise Unavailable(f"CuPy has no working device: {type(error).__name__}: {error}") from error
    if not names:
        raise Unavailable("CuPy sees no device")
    return cupy, names


def _cuda_state() -> tuple[str, str]:
    """`"real"`, `"stand-in"` or `"absent"`, and a sentence that says so."""
    try:
        _, names = _cuda()
    except Unavailable as why:
        return "absent", f"CUDA: absent ({why}); nothing here runs on a GPU"
    if any(name.encode().startswith(STAND_IN) for name in names):
        return "stand-in", f"CUDA: the CPU stand-in ({len(names)} emulated devices); nothing here runs on a GPU"
    return "real", f"CUDA: real ({', '.join(names)})"


_MAKERS: dict[str, Callable[[str], Backend]] = {
    "numpy": lambda name: Backend(name, lambda x: x),
    "numpy-readonly": lambda name: Backend(name, _read_only),  # catches inputs that are written to
    "strict": _strict,
    "strict-device1": _strict,
    "strictest": _strict,
    "cupy:0": _cupy,
    "cupy:1": _cupy,  # a second device: the current one stays 0
    "torch": _torch,
    "jax": _jax,
}
_PACKAGES = {"strict": "array_api_strict", "numpy": "numpy", "torch": "torch", "jax": "jax"}


@functools.cache
def make_backend(name: str) -> Backend:
    """The backend called `name`; raises `Unavailable` with the reason."""
    return _MAKERS[name](name)


def _described(name: str) -> str:
    """The version and device of a backend, importing none but CuPy."""
    if name.startswith("cupy"):
        try:
            cupy, devices = _cuda()
        except Unavailable as why:
            return f"not here: {why}"
        index = int(name.removeprefix("cupy:"))
        return f"cupy {cupy.__version__} on {devices[index]}" if index < len(devices) else "not here: no such device"
    package = next(package for start, package in _PACKAGES.items() if name.startswith(start))
    if importlib.util.find_spec(package) is None:
        return f"not here: {package} is not installed"
    device = "device1" if name == "strict-device1" else "cpu"
    return f"{package} {version(package)} on {device}"


# ---------------------------------------------------------------------------------------------------------------------
# pytest

# `backend` holds nothing that one example could leave to the next, so hypothesis may call a test many times with it.
hypothesis.settings.register_profile(
    "anyarray_linear",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("anyarray_linear")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anyarray_linear")
    group.addoption("--backends", metavar="A,B", help=f"run on these backends only, of {', '.join(_MAKERS)}")
    group.addoption("--require-cuda", action="store_true", help="fail unless tests ran on a real CUDA device")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--backends")
    names = list(_MAKERS) if chosen is None else chosen.split(",")
    unknown = [name for name in names if name not in _MAKERS]
    if unknown:
        raise pytest.UsageError(f"--backends: no backend {', '.join(unknown)}; there are {', '.join(_MAKERS)}")
    config.pluginmanager.register(_Backends(names, config.getoption("--require-cuda")), "anyarray_linear_backends")


class _Backends:
    """Parametrises tests by backend, counts what ran on each, and prints the `("print", line)` properties of tests."""

    def __init__(self, names: list[str], require_cuda: bool) -> None:
        self.names, self.require_cuda = names, require_cuda
        self.count: Counter[tuple[str, str]] = Counter()
        self.printed: list[str] = []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        own = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
        if "backend" in metafunc.fixturenames and not own:  # a test may name its own backends: indirect=["backend"]
            metafunc.parametrize("backend", self.names, indirect=True)

    def pytest_report_header(self) -> list[str]:
        return [*(f"backend {name}: {_described(name)}" for name in self.names), _cuda_state()[1]]

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.require_cuda and _cuda_state()[0] != "real":
            pytest.exit(f"--require-cuda: {_cuda_state()[1]}", returncode=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # a test counts as passed when its call passed, and as failed when any phase of it failed
        if (report.when == "call" and report.passed) or report.failed:
            backend = dict(report.user_properties).get("backend", "none")
            self.count[backend, report.outcome] += 1
        if report.when == "call":
            self.printed += [line for name, line in report.user_properties if name == "print"]

    def ran(self, backend: str) -> int:
        return self.count[backend, "passed"] + self.count[backend, "failed"]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        on_controller = not hasattr(session.config, "workerinput")
        if self.require_cuda and on_controller and session.exitstatus == 0 and not any(map(self.ran, self._cuda_names)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("tests run per backend")
        for name in [*self.names, "none"]:
            passed, failed = self.count[name, "passed"], self.count[name, "failed"]
            what = "tests that need no particular one" if name == "none" else _described(name)
            terminalreporter.write_line(f"backend {name}: {passed} passed, {failed} failed ({what})")
        terminalreporter.write_line(_cuda_state()[1])
        for line in self.printed:
            terminalreporter.write_line(line)
        if self.require_cuda and not any(map(self.ran, self._cuda_names)):
            terminalreporter.write_line("--require-cuda: no test ran on a CUDA device", red=True)

    @property
    def _cuda_names(self) -> list[str]:
        return [name for name in self.names if name.startswith("cupy")]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The array library and device that this run of the test is for."""
    if request.param not in request.config.pluginmanager.get_plugin("anyarray_linear_backends").names:
        pytest.skip(f"{request.param} is not among --backends")
    request.node.user_properties.append(("backend", request.param))
    try:
        backend = make_backend(request.param)
    except Unavailable as why:
        pytest.skip(str(why))
    with backend.around():
        yield backend
