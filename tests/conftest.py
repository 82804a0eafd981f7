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
import time
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

# what a command prints is compared as on a terminal that says nothing of itself: no width, no colours asked for or refused
for name in ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)
# where the compiled lane keeps its code, so that tests leave nothing in the user's own cache
os.environ.setdefault("ANYARRAY_CACHE_DIR", os.path.join(tempfile.gettempdir(), "anyarray_linear-tests"))
# SciPy reads it when it is imported; without it, scikit-learn does not dispatch on arrays
os.environ.setdefault("SCIPY_ARRAY_API", "1")
# OpenBLAS's threads wait for the next product for 26 ms, each on a core; tests of many processes have better uses for these
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

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


def missing(name: str) -> str | None:
    """Why the backend called `name` cannot be tested here, found out without importing any but CuPy; `None` if it can."""
    if name.startswith("cupy"):
        try:
            _, devices = _cuda()
        except Unavailable as why:
            return str(why)
        index = int(name.removeprefix("cupy:"))
        return None if index < len(devices) else f"there is no CUDA device {index}"
    package = _package(name)
    return None if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def _package(name: str) -> str:
    return next(package for start, package in _PACKAGES.items() if name.startswith(start))


def _described(name: str) -> str:
    """The version and device of a backend that is here, importing none but CuPy."""
    if name.startswith("cupy"):
        cupy, devices = _cuda()
        return f"cupy {cupy.__version__} on {devices[int(name.removeprefix('cupy:'))]}"
    device = "device1" if name == "strict-device1" else "cpu"
    return f"{_package(name)} {version(_package(name))} on {device}"


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
    chosen, require_cuda = config.getoption("--backends"), config.getoption("--require-cuda")
    if require_cuda and _cuda_state()[0] != "real":
        pytest.exit(f"--require-cuda: {_cuda_state()[1]}", returncode=1)
    names = list(_MAKERS) if chosen is None else chosen.split(",")
    unknown = [name for name in names if name not in _MAKERS]
    if unknown:
        raise pytest.UsageError(f"--backends: no backend {', '.join(unknown)}; there are {', '.join(_MAKERS)}")
    absent = {name: why for name in names if (why := missing(name)) is not None}
    if chosen is not None and absent:  # who asks for one by name is not answered by silence
        raise pytest.UsageError(f"--backends: {'; '.join(f'{name}: {why}' for name, why in absent.items())}")
    backends = _Backends([name for name in names if name not in absent], absent, require_cuda)
    config.pluginmanager.register(backends, "anyarray_linear_backends")


class _Backends:
    """Parametrises tests by the backends that are here, leaves out what needs another, and counts what ran on each.

    What was left out is said once, at the end. `("print", line)` properties of tests are printed there too.
    """

    def __init__(self, here: list[str], absent: dict[str, str], require_cuda: bool) -> None:
        self.here, self.absent, self.require_cuda = here, absent, require_cuda
        self.count: Counter[tuple[str, str]] = Counter()
        self.skipped: Counter[str] = Counter()
        self.printed: list[str] = []
        self.started = time.monotonic()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        own = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
        if "backend" in metafunc.fixturenames and not own:  # a test may name its own backends: indirect=["backend"]
            metafunc.parametrize("backend", self.here, indirect=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left_out = [], []
        for item in items:
            (kept if self._can_run(item) else left_out).append(item)
            if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(3600))
        items[:] = kept
        if left_out:
            config.hook.pytest_deselected(items=left_out)

    def _can_run(self, item: pytest.Item) -> bool:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if isinstance(backend, str) and backend in _MAKERS and backend not in self.here:
            return False
        return item.get_closest_marker("stand_in") is None or _cuda_state()[0] == "stand-in"

    def pytest_report_header(self) -> list[str]:
        lines = [f"backend {name}: {_described(name)}" for name in self.here]
        return [*lines, *(f"left out, {name}: {why}" for name, why in self.absent.items()), _cuda_state()[1]]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # a test counts as passed when its call passed, and as failed when any phase of it failed
        if (report.when == "call" and report.passed) or report.failed:
            backend = dict(report.user_properties).get("backend", "none")
            self.count[backend, report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        if report.when == "call":
            self.printed += [line for name, line in report.user_properties if name == "print"]

    def ran(self, backend: str) -> int:
        return self.count[backend, "passed"] + self.count[backend, "failed"]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        on_controller = not hasattr(session.config, "workerinput")
        if self.require_cuda and on_controller and session.exitstatus == 0 and not any(map(self.ran, self._cuda_names)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        yield  # pytest's own summary, up to its last line
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and on_controller and not session.config.option.collectonly:
            for line in self.in_words(session.exitstatus):
                terminal.write_line(line)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("tests run per backend")
        for name in [*self.here, "none"]:
            passed, failed = self.count[name, "passed"], self.count[name, "failed"]
            what = "tests that need no particular one" if name == "none" else _described(name)
            terminalreporter.write_line(f"backend {name}: {passed} passed, {failed} failed ({what})")
        terminalreporter.write_line(_cuda_state()[1])
        for line in self.printed:
            terminalreporter.write_line(line)
        if self.require_cuda and not any(map(self.ran, self._cuda_names)):
            terminalreporter.write_line("--require-cuda: no test ran on a CUDA device", red=True)

    def in_words(self, exit_status: int) -> Iterator[str]:
        """The last lines, for somebody who runs these tests for the first time."""
        passed, failed = (sum(n for (_, what), n in self.count.items() if what == kind) for kind in ("passed", "failed"))
        took = f"in {time.monotonic() - self.started:.0f} seconds"
        if failed:
            yield f"\n{failed} of {passed + failed} tests FAILED {took}; what each expected and got is above."
        elif exit_status == 0 and passed:
            yield f"\nAll {passed} tests passed {took}: this works on your machine."
        else:
            yield f"\nThe run did not come to its end, or found nothing to run; {passed} tests had passed."
        used = dict.fromkeys(_described(name) for name in self.here if self.ran(name))
        if used:
            yield f"They computed with {', '.join(used)}."
        if any(map(self.ran, self._cuda_names)):
            yield _cuda_state()[1]
        reasons = dict.fromkeys(self.absent.values())
        if reasons or self.skipped:
            yield "Left out, which is no fault: what is optional is not here, or a backend has not what the test is about."
        for why in reasons:
            yield f"- tests on {', '.join(name for name, each in self.absent.items() if each == why)}: {why}"
        most = self.skipped.most_common(8)
        for why, n in most:
            yield f"- {n} test{'s' * (n > 1)}: {why}"
        if len(self.skipped) > len(most):
            yield f"- {self.skipped.total() - sum(n for _, n in most)} more; -rs lists them all"

    @property
    def _cuda_names(self) -> list[str]:
        return [name for name in self.here if name.startswith("cupy")]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The array library and device that this run of the test is for."""
    request.node.user_properties.append(("backend", request.param))
    backend = make_backend(request.param)
    with backend.around():
        yield backend
