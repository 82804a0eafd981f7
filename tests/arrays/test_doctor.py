"""The doctor: each failure has its own sentence and its own cure, by real conditions where a machine can make them.

Real conditions run in a process of their own, because what is found is kept for a process. Those that this environment
cannot make are skipped here and made by substituting the one call that fails, on an imitation of CuPy's few functions
that the doctor uses, which computes with NumPy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anyarray_linear import DeviceUnavailableError, select_device
from anyarray_linear.arrays import cards, doctor, remedies

HAS_CUPY = importlib.util.find_spec("cupy") is not None


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test examines anew, and the environment chooses nothing."""
    monkeypatch.setattr(doctor, "_known", {})
    monkeypatch.delenv("ANYARRAY_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class _Array(np.ndarray):
    def get(self) -> np.ndarray:
        return np.asarray(self)


class Imitation:
    """The functions of CuPy that the doctor uses, for cards with these amounts of free memory."""

    __version__ = "14.2.0"

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, *free: int) -> None:
        self.current, self.kernels_run = 0, 0
        self.runtime = SimpleNamespace(
            CUDARuntimeError=self.CUDARuntimeError,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13020,
            getDeviceCount=lambda: len(free),
            getDevice=lambda: self.current,
            setDevice=lambda index: setattr(self, "current", index),
            getDeviceProperties=lambda index: {"name": b"Imitation", "major": 9, "minor": 0},
            memGetInfo=lambda: (free[self.current], 100),
            deviceGetAttribute=lambda attribute, index: 2,
        )
        self.cuda = SimpleNamespace(runtime=self.runtime, Device=self.computing_on)
        self.fault: Callable[[int], Any] = lambda index: None  # called with the card's number before its kernel runs

    @contextlib.contextmanager
    def computing_on(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def ElementwiseKernel(self, *signature: str) -> Callable[[np.ndarray], np.ndarray]:
        self.kernels_run += 1
        self.fault(self.current)
        return lambda x: 2 * x + 1

    def asarray(self, x: np.ndarray, dtype: Any) -> np.ndarray:
        return x.astype(dtype).view(_Array)

    def arange(self, stop: int, dtype: Any) -> np.ndarray:
        return np.arange(stop, dtype=dtype).view(_Array)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Imitation]:
    """Installs an imitation of CuPy with cards of these amounts of free memory: `imitated(10, 20)`."""

    def install(*free: int) -> Imitation:
        imitation = Imitation(*free)
        monkeypatch.setattr(cards, "load_cupy", lambda: imitation)
        monkeypatch.setattr(doctor, "_packages", lambda: "cupy-cuda13x 14.2.0")
        monkeypatch.setattr(remedies, "installed", lambda: ["cupy-cuda13x"])
        return imitation

    return install


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object) -> Any:
        raise error

    return fail


def refusal(spec: str = "cuda") -> DeviceUnavailableError:
    """The error that an explicit request for this device raises."""
    with pytest.raises(DeviceUnavailableError) as caught:
        select_device(spec)
    return caught.value


def elsewhere(code: str, *launcher: str, **environment: str) -> str:
    """What this code prints in a process of its own, in an environment with these variables."""
    code = "from anyarray_linear import *\nfrom anyarray_linear.arrays import cards, doctor\n" + textwrap.dedent(code)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("ANYARRAY_", "CUDA_"))}
    paths = [str(Path(doctor.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", code],
        env=variables | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REFUSED = """
    try:
        print(select_device("cuda"))
    except DeviceUnavailableError as error:
        print(error, "<-", type(error.__cause__).__name__)
"""


@pytest.fixture(scope="module")
def stand_in() -> None:
    """Skips where CuPy is not the CPU stand-in, whose switches make the conditions."""
    if "cupy-cpu-emulated" not in remedies.installed():
        pytest.skip("needs the switches of the CuPy CPU stand-in")


# CuPy is not installed ----------------------------------------------------------------------------------------------


def test_without_cupy_an_explicit_request_says_so_and_how_to_install_it() -> None:
    if HAS_CUPY:
        pytest.skip("CuPy is installed here")
    error = refusal()
    assert str(error).startswith("cuda cannot be used: CuPy is not installed.")
    assert 'pip install "anyarray_linear[cuda' in str(error)
    assert select_device("auto").reason == "CUDA cannot be used: CuPy is not installed"


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (13020, 'supports CUDA 13.2: pip install "anyarray_linear[cuda13]".'),
        (14000, 'supports CUDA 14.0: pip install "anyarray_linear[cuda13]".'),
        (12040, 'supports CUDA 12.4: pip install "anyarray_linear[cuda12]".'),
        (11040, "supports CUDA 11.4, and CuPy needs 12. Update it"),
        (0, "There is no NVIDIA driver either. Install the one for the card from nvidia.com/drivers."),
    ],
)
def test_the_extra_to_install_follows_from_the_driver(
    driver: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remedies, "installed", list)
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    monkeypatch.setattr(remedies, "driver_version", lambda: driver)
    monkeypatch.setattr(remedies, "in_container", lambda: False)
    message = str(refusal())
    assert "CuPy is not installed" in message
    assert expected in message


# Several at once ----------------------------------------------------------------------------------------------------


def test_several_cupy_packages_are_named_with_the_command_that_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("cupy_cuda12x", "cupy_cuda13x"):
        folder = tmp_path / f"{package}-14.2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 14.2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(remedies, "driver_version", lambda: 12080)
    message = str(refusal())
    names = [name for name in ("cupy-cpu-emulated", "cupy-cuda12x", "cupy-cuda13x") if name in remedies.installed()]
    assert f"{len(names)} CuPy packages are installed at once ({', '.join(names)})" in message
    assert f'pip uninstall -y {" ".join(names)} && pip install "anyarray_linear[cuda12]".' in message
    assert [step.name for step in doctor.examine()] == ["packages"]  # a mixture is not even imported


def test_a_package_that_only_sounds_like_cupy_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = remedies.installed()
    folder = tmp_path / "cupy_plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-plugin\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert remedies.installed() == before


# The kernel cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [False, True], ids=["at import", "at the first kernel"])
def test_a_read_only_kernel_cache_is_named_with_its_variable(is_there: bool, tmp_path: Path, stand_in: None) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    cache = tmp_path / "locked" / ("" if is_there else "cache")
    launcher: list[str] = []
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that right up
        if shutil.which("setpriv") is None:
            pytest.skip("root cannot be kept from writing without setpriv")
        launcher = ["setpriv", "--bounding-set=-dac_override"]
    message = elsewhere(REFUSED, *launcher, CUPY_CACHE_DIR=str(cache))
    assert "cuda cannot be used: CuPy cannot write its kernel cache (PermissionError:" in message
    assert "Set CUPY_CACHE_DIR to a folder that this user may write to" in message
    assert message.endswith("<- PermissionError\n")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/c"), OSError(30, "Read-only file system", "/c")]
)
def test_an_unwritable_cache_of_any_kind_is_recognised(error: OSError, imitated: Callable[..., Imitation]) -> None:
    imitated(10).fault = raising(error)
    message = refusal()
    assert "CUPY_CACHE_DIR" in str(message)
    assert message.__cause__ is error


# The driver ---------------------------------------------------------------------------------------------------------


def test_a_real_cupy_without_a_driver_says_that_there_is_none() -> None:
    if not HAS_CUPY or "cupy-cpu-emulated" in remedies.installed() or remedies.driver_version():
        pytest.skip("needs a CuPy wheel for CUDA on a machine without a driver")
    if len(remedies.installed()) > 1:
        pytest.skip("needs one CuPy package")
    message = elsewhere(REFUSED)
    assert message.startswith("cuda cannot be used: there is no NVIDIA driver. ")
    assert "nvidia.com/drivers" in message or "--gpus all" in message


@pytest.mark.parametrize(("is_container", "cure"), [(False, "nvidia.com/drivers"), (True, "docker run --gpus all")])
def test_no_driver_has_the_cure_of_its_place(
    is_container: bool, cure: str, imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch
) -> None:
    imitated(10).runtime.driverGetVersion = lambda: 0
    monkeypatch.setattr(remedies, "in_container", lambda: is_container)
    message = str(refusal())
    assert "there is no NVIDIA driver. " in message
    assert cure in message


@pytest.mark.parametrize(("driver", "has_older"), [(12080, True), (11040, False)])
def test_a_driver_too_old_is_told_from_none(driver: int, has_older: bool, imitated: Callable[..., Imitation]) -> None:
    imitated(10).runtime.driverGetVersion = lambda: driver
    message = str(refusal())
    assert f"too old: it supports CUDA {driver // 1000}.{driver % 1000 // 10} and this CuPy needs 13.0" in message
    assert "Update it" in message
    assert ('pip uninstall -y cupy-cuda13x && pip install "anyarray_linear[cuda12]"' in message) == has_older


def test_an_older_driver_of_the_same_major_version_will_do(imitated: Callable[..., Imitation]) -> None:
    assert (imitated(10).runtime.driverGetVersion(), imitated(10).runtime.runtimeGetVersion()) == (13000, 13020)
    assert select_device("cuda").kind == "cuda"


# The devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_devices_are_blamed_on_the_variable(value: str, stand_in: None) -> None:
    message = elsewhere(REFUSED, CUDA_VISIBLE_DEVICES=value)
    assert f"CUDA_VISIBLE_DEVICES is {value!r}, which leaves no CUDA device visible" in message
    assert "Unset it, or name a device in it" in message
    assert "if it lists none, no card is visible" in message


def test_no_device_at_all_is_told_from_hidden_ones(stand_in: None) -> None:
    message = elsewhere(REFUSED, CUPY_CPU_DEVICES="0")
    assert "there is an NVIDIA driver, but no CUDA device is visible to it" in message
    assert message.endswith("<- CUDARuntimeError\n")


@pytest.mark.parametrize(
    ("is_container", "cure"),
    [(True, "docker run --gpus all ..., or podman run --device nvidia.com/gpu=all"), (False, "nvidia-smi -L")],
)
def test_a_container_without_cards_gets_the_flag(
    is_container: bool, cure: str, imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch
) -> None:
    imitation = imitated()
    error = imitation.CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    imitation.runtime.getDeviceCount = raising(error)
    monkeypatch.setattr(remedies, "in_container", lambda: is_container)
    refused = refusal()
    assert cure in str(refused)
    assert refused.__cause__ is error


def test_an_index_out_of_range_lists_what_is_there(stand_in: None) -> None:
    message = elsewhere(REFUSED.replace('"cuda"', '"cuda:2"'))
    assert "there is no cuda:2, only cuda:0 (CuPy CPU emulated device), cuda:1 (CuPy CPU emulated device)." in message
    message = elsewhere(REFUSED.replace('"cuda"', '"cuda:1"'), CUDA_VISIBLE_DEVICES="1")
    assert "there is no cuda:1, only cuda:0 (CuPy CPU emulated device). Ask for one of these." in message
    assert "CUDA_VISIBLE_DEVICES=1 hides others" in message


def test_an_index_out_of_range_lists_what_is_there_on_the_imitation(imitated: Callable[..., Imitation]) -> None:
    imitated(10)
    assert "there is no cuda:1, only cuda:0 (Imitation). Ask for one of these." in str(refusal("cuda:1"))


# The toolkit and the card -------------------------------------------------------------------------------------------


def test_a_real_cupy_without_its_toolkit_names_the_missing_library() -> None:
    if not HAS_CUPY or "cupy-cpu-emulated" in remedies.installed():
        pytest.skip("needs a CuPy wheel for CUDA without the [ctk] extra")
    if len(remedies.installed()) > 1:
        pytest.skip("needs one CuPy package")
    import cupy

    for library, call in (("nvrtc", cupy.cuda.nvrtc.getVersion), ("cublas", lambda: cupy.cuda.cublas.create())):
        try:
            call()
        except Exception as error:
            sentence, cure = remedies.explain(error)
        else:
            pytest.skip("the toolkit is installed here")
        assert sentence.startswith(f"a part of the CUDA toolkit is missing: lib{library}")
        assert "[ctk]" in cure


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError('Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13'),
        RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: cannot open shared object file"),
        ImportError("libcublas.so.13: cannot open shared object file: No such file or directory"),
    ],
)
def test_a_missing_library_is_installed_with_the_ctk_extra(error: Exception, imitated: Callable[..., Imitation]) -> None:
    imitated(10).fault = raising(error)
    refused = refusal()
    assert "a part of the CUDA toolkit is missing: lib" in str(refused)
    assert 'pip install "cupy-cuda13x[ctk]"' in str(refused)
    assert refused.__cause__ is error


@pytest.mark.parametrize(
    "text",
    [
        "cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device",
        "nvrtc: error: invalid value for --gpu-architecture (-arch)",
        "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device",
        "CUBLAS_STATUS_ARCH_MISMATCH",
    ],
)
def test_a_card_that_cupy_has_no_code_for(text: str, imitated: Callable[..., Imitation]) -> None:
    imitated(10).fault = raising(RuntimeError(text))
    message = str(refusal())
    assert "this CuPy has no code for this card" in message
    assert 'pip install "anyarray_linear[cuda12]"' in message


@pytest.mark.parametrize(
    ("text", "says", "cure"),
    [
        ("cudaErrorInitializationError: initialization error", "cannot be started in this process", 'get_context("spawn")'),
        ("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable", "in use by another", "nvidia-smi -c 0"),
        ("cudaErrorSystemNotReady: system not yet initialized", "are not ready", "nvidia-fabricmanager"),
        ("cudaErrorSystemDriverMismatch: system has unsupported display driver / cuda driver combination", "are two versions", "Restart"),
        ("cudaErrorCompatNotSupportedOnDevice: forward compatibility was attempted on non supported HW", "newer libcuda", "cuda-compat"),
        ("cudaErrorUnknown: unknown error", "does not say why", "modprobe nvidia_uvm"),
        ("CUDA_ERROR_SYSTEM_NOT_READY: system not yet initialized", "are not ready", "nvidia-fabricmanager"),
    ],
)
def test_what_is_wrong_with_the_machine_has_its_cure(text: str, says: str, cure: str, imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10)
    imitation.runtime.getDeviceCount = raising(imitation.CUDARuntimeError(text))
    message = str(refusal())
    assert says in message
    assert cure in message
    assert text in message


@pytest.mark.parametrize("number", [3, 46, 802, 803, 804, 999])
def test_these_errors_are_called_so_by_cupy(number: int) -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy, not a card", exc_type=ImportError)
    if "cupy-cpu-emulated" in remedies.installed():
        pytest.skip("the stand-in has no names for them")
    sentence, _ = remedies.explain(cupy.cuda.runtime.CUDARuntimeError(number))
    assert not sentence.startswith("CuPy fails")


def test_a_forked_process_examines_anew(imitated: Callable[..., Imitation]) -> None:
    imitation, held, done = imitated(10), threading.Event(), threading.Event()
    assert select_device("cuda:0").index == 0
    lock = doctor._lock

    def hold() -> None:
        with lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # its context is its parent's, which CUDA tells it by this
        signal.alarm(60)
        try:
            imitation.runtime.getDeviceCount = raising(imitation.CUDARuntimeError("cudaErrorInitializationError: initialization error"))
            os.write(writing, str(refusal("cuda:0")).encode())
        finally:
            os._exit(0)
    os.close(writing)
    done.set()
    thread.join()
    with open(reading) as pipe:
        assert "forked from one that had used CUDA" in pipe.read()
    os.waitpid(child, 0)
    assert select_device("cuda:0").index == 0  # of the parent nothing was forgotten
    assert imitation.kernels_run == 1


@pytest.mark.parametrize("is_there", [True, False])
def test_that_all_kernels_are_compiled_anew_is_said(
    is_there: bool, imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    if is_there:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "1234.cubin").touch()
    imitated(10)
    select_device("cuda:0")
    said = [record.getMessage() for record in caplog.records]
    assert [f"none are kept in {tmp_path / 'cache'} yet" in line for line in said] == [True] * (not is_there)


@pytest.mark.parametrize("name", ["CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "cudaErrorMemoryAllocation: out of memory"])
def test_a_full_card_is_recognised_by_any_name_and_not_kept(name: str, imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10)
    imitation.fault = raising(RuntimeError(name))
    assert f"the card has too little free memory (RuntimeError: {name})" in str(refusal())
    imitation.fault = lambda index: None
    assert select_device("cuda:0").index == 0


def test_too_little_memory_says_so_and_is_not_kept(imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10)
    imitation.fault = raising(MemoryError("Out of memory allocating 512 bytes"))
    message = str(refusal())
    assert "the card has too little free memory (MemoryError: Out of memory allocating 512 bytes)" in message
    assert "nvidia-smi" in message
    imitation.fault = lambda index: None
    assert select_device("cuda:0").index == 0


@pytest.mark.parametrize("limits", [{"CUPY_CPU_MEMORY": "1K"}, {"CUPY_GPU_MEMORY_LIMIT": "100"}])
def test_too_little_memory_on_the_stand_in(limits: dict[str, str], stand_in: None) -> None:
    message = elsewhere(REFUSED, **limits)
    assert "the card has too little free memory (OutOfMemoryError:" in message
    assert message.endswith("<- OutOfMemoryError\n")


@pytest.mark.parametrize("what", ["an elementwise kernel", "a matrix product"])
def test_a_wrong_result_is_not_accepted(
    what: str, imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch
) -> None:
    imitation = imitated(10)
    if "kernel" in what:
        monkeypatch.setattr(imitation, "ElementwiseKernel", lambda *signature: lambda x: 2 * x)
    else:
        monkeypatch.setattr(imitation, "asarray", lambda x, dtype: (x + 1).astype(dtype).view(_Array))
    message = str(refusal())
    assert f"cuda:0 gives a wrong result for {what}" in message
    assert "ECC" in message


def test_an_unknown_failure_keeps_its_own_words(imitated: Callable[..., Imitation]) -> None:
    error = RuntimeError("cudaErrorLaunchFailure: unspecified launch failure")
    imitated(10).fault = raising(error)
    refused = refusal()
    assert "CuPy fails (RuntimeError: cudaErrorLaunchFailure: unspecified launch failure)" in str(refused)
    assert refused.__cause__ is error


def test_a_broken_import_says_so(imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch) -> None:
    imitated(10)
    monkeypatch.setattr(cards, "load_cupy", raising(ImportError("numpy.core.multiarray failed to import")))
    message = str(refusal())
    assert "importing CuPy fails (ImportError: numpy.core.multiarray failed to import)" in message
    assert 'pip install --force-reinstall "cupy-cuda13x[ctk]"' in message


# Choosing -----------------------------------------------------------------------------------------------------------


def test_auto_takes_the_roomiest_card_and_keeps_it(imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10, 30, 20)
    device = select_device()
    assert (str(device), device.reason) == ("cuda:1", "cuda:1 works and had the most free memory of 3 CUDA devices")
    imitation.runtime.memGetInfo = lambda: (100 - imitation.current, 100)  # now card 0 is the roomiest
    assert select_device() == device
    assert imitation.kernels_run == 1  # neither card 0 nor card 2 was bothered


def test_auto_passes_over_a_card_that_does_not_work(imitated: Callable[..., Imitation]) -> None:
    def broken(index: int) -> None:
        if index == 1:
            raise RuntimeError("cudaErrorECCUncorrectable")

    imitated(10, 30, 20).fault = broken
    assert str(select_device()) == "cuda:2"
    assert "cudaErrorECCUncorrectable" in str(refusal("cuda:1"))


def test_auto_without_a_working_card_is_the_cpu_and_says_why(imitated: Callable[..., Imitation]) -> None:
    imitated(10, 30).fault = raising(RuntimeError("cudaErrorECCUncorrectable"))
    device = select_device()
    assert device.kind == "cpu"
    assert device.reason == "CUDA cannot be used: CuPy fails (RuntimeError: cudaErrorECCUncorrectable)"


def test_cuda_is_the_current_device(imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10, 30)
    assert str(select_device("cuda")) == "cuda:0"
    with imitation.computing_on(1):
        assert str(select_device("cuda")) == "cuda:1"


def test_the_variable_is_as_explicit_as_an_argument(
    imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch
) -> None:
    imitated(10, 30)
    monkeypatch.setenv("ANYARRAY_DEVICE", "cuda:0")
    assert (str(select_device()), select_device().reason) == ("cuda:0", "ANYARRAY_DEVICE is cuda:0")
    assert str(select_device("cuda:1")) == "cuda:1"
    monkeypatch.setenv("ANYARRAY_DEVICE", "cuda:9")
    assert str(refusal("auto")).startswith("cuda:9 (ANYARRAY_DEVICE) cannot be used: there is no cuda:9")
    monkeypatch.setenv("ANYARRAY_DEVICE", "gpu")
    with pytest.raises(ValueError, match="ANYARRAY_DEVICE is 'gpu'; expected"):
        select_device()
    for value in ("auto", ""):
        monkeypatch.setenv("ANYARRAY_DEVICE", value)
        assert str(select_device()) == "cuda:1"


def test_the_variable_cpu_spares_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_packages", raising(AssertionError("examined")))
    monkeypatch.setenv("ANYARRAY_DEVICE", "cpu")
    assert select_device().kind == "cpu"
    assert not doctor._known


def test_many_threads_examine_a_card_once(imitated: Callable[..., Imitation]) -> None:
    imitation, start, chosen = imitated(10), threading.Barrier(8), []
    imitation.fault = lambda index: time.sleep(0.05)  # long enough for all of them to come in between

    def ask() -> None:
        start.wait()
        chosen.append(str(select_device("cuda:0")))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["cuda:0"] * 8
    assert imitation.kernels_run == 1


def test_a_failure_is_kept_too(imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10)
    imitation.fault = raising(RuntimeError("first"))
    assert "first" in str(refusal())
    imitation.fault = raising(RuntimeError("second"))
    assert "first" in str(refusal())  # the reason stays the one that was found first
    assert imitation.kernels_run == 1


def test_steps_end_with_the_first_failure(imitated: Callable[..., Imitation]) -> None:
    imitated(10).fault = raising(RuntimeError("broken"))
    steps = doctor.examine()
    assert [step.name for step in steps] == ["packages", "import", "driver", "devices", "device", "kernel"]
    assert [step.ok for step in steps] == [True] * 5 + [False]
    assert all(step.seconds >= 0 for step in steps)


# What else it reports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "expected"), [("0", "float32"), ("1", "TF32")])
def test_tf32_is_reported_as_cupy_has_it(setting: str, expected: str, stand_in: None) -> None:
    code = 'select_device("cuda:1"); print(cards.float32_products(1), *cards.cautions(1))'
    found = elsewhere(code, CUPY_TF32=setting)
    assert found.startswith(expected)
    assert ("cuda:1 multiplies float32 matrices in TF32 (CUPY_TF32 is set)" in found) == (expected == "TF32")


@pytest.mark.parametrize(("ratio", "warns"), [(1, False), (2, False), (32, True), (64, True)])
def test_a_slow_float64_is_warned_of(
    ratio: int, warns: bool, imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch
) -> None:
    imitated(10).runtime.deviceGetAttribute = lambda attribute, index: {87: ratio}[attribute]
    monkeypatch.setattr(cards, "float32_products", lambda index: "float32")
    expected = f"cuda:0 (Imitation) computes float64 at 1/{ratio} of its float32 rate"
    assert [caution.split(";")[0] for caution in cards.cautions(0)] == [expected] * warns


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `devices` with these arguments; the result has `.exit_code`, `.stdout` and `.stderr`."""
    typer = pytest.importorskip("typer", reason="the command line needs typer")
    pytest.importorskip("rich", reason="the command line needs rich")
    from typer.testing import CliRunner

    from anyarray_linear.cli.devices import devices

    app = typer.Typer()
    app.command()(devices)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cards, "float32_products", lambda index: "float32")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_devices_lists_what_works(command: Callable[..., Any], imitated: Callable[..., Imitation]) -> None:
    imitation = imitated(10 * 2**30, 30 * 2**30)
    imitation.runtime.memGetInfo = lambda: (3 * 2**30, 8 * 2**30)

    def broken(index: int) -> None:
        if index == 0:
            raise RuntimeError("cudaErrorECCUncorrectable")

    imitation.fault = broken
    result = command()
    assert result.exit_code == 0
    assert "cuda:1" in result.stdout
    assert "cuda:0" not in result.stdout


def test_devices_as_json(command: Callable[..., Any], imitated: Callable[..., Imitation]) -> None:
    imitated(10, 30).runtime.deviceGetAttribute = lambda attribute, index: 64
    report = json.loads(command("--json").stdout)
    assert [row["device"] for row in report["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    expected = {"name": "Imitation", "compute_capability": "9.0", "memory_free": 30, "memory_total": 100}
    assert report["devices"][2].items() >= (expected | {"driver_cuda": "13.0", "cupy": "14.2.0"}).items()
    assert report["chosen"] == "cuda:1"
    assert len(report["warnings"]) == 2
    assert [step["ok"] for step in report["examinations"]["cuda:0"]] == [True] * 7


@pytest.mark.parametrize(
    "arguments", [("--device", "cuda"), ("--doctor", "--device", "cuda"), ("--json", "--device", "cuda:0")]
)
def test_devices_exits_with_1_when_cuda_is_asked_for_and_unusable(
    arguments: tuple[str, ...], command: Callable[..., Any], imitated: Callable[..., Imitation]
) -> None:
    imitated(10).fault = raising(RuntimeError('Failure finding "libnvrtc.so.13"'))
    assert command(*arguments).exit_code == 1


def test_the_doctor_shows_each_step_and_the_cure(command: Callable[..., Any], imitated: Callable[..., Imitation]) -> None:
    imitated(10).fault = raising(RuntimeError('Failure finding "libnvrtc.so.13"'))
    result = command("--doctor")
    assert result.exit_code == 0  # CUDA was not asked for
    for step in ("packages", "import", "driver", "devices", "device", "kernel"):
        assert step in result.stdout
    assert result.stdout.count("fails") == 1
    assert 'To cure it: Install it beside CuPy: pip install "cupy-cuda13x[ctk]".' in result.stdout
    assert "Chosen: cpu, because CUDA cannot be used: a part of the CUDA toolkit is missing" in result.stdout


def test_the_doctor_heeds_the_variable(
    command: Callable[..., Any], imitated: Callable[..., Imitation], monkeypatch: pytest.MonkeyPatch
) -> None:
    imitated().runtime.driverGetVersion = lambda: 0
    monkeypatch.setenv("ANYARRAY_DEVICE", "cuda")
    assert command("--doctor").exit_code == 1


def test_an_unknown_device_is_a_usage_error(command: Callable[..., Any]) -> None:
    result = command("--device", "tpu")
    assert result.exit_code == 2
    assert "tpu" in result.stderr
