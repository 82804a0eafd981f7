"""Every kernel of the library, compiled by NVRTC for every card from Turing to Blackwell: no driver, no card, no stand-in.

    pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime        or the same for CUDA 12, with -cu12 at their ends
    pytest -m slow tests/lanes/test_kernels.py -s                               prints the table of registers and spills

The first tests, which need CuPy but not its compiler, see to it that no kernel is left out.
"""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nvrtc
import pytest

import anyarray_linear
from anyarray_linear.arrays import doctor
from anyarray_linear.arrays.cores import usable_cores

PACKAGE = Path(anyarray_linear.__file__).parent
SPILL = 64
"""Bytes per thread, stored and loaded, that are let pass: the assembler trades a register or two for more threads at once."""
MAKERS = {"RawKernel", "RawModule", "ElementwiseKernel", "ReductionKernel", "fuse", "rawkernel"}
PLACES = {("lanes/cupy/kernels.py", "RawKernel"), ("arrays/doctor.py", "ElementwiseKernel")}
"""Where the library makes kernels; what is made there, `lanes/cupy/programs.py` and `nvrtc.py` list."""

needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy, not a card")


def test_kernels_are_made_only_where_they_are_listed():
    made = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            if isinstance(node, (ast.Attribute, ast.Name)) and name in MAKERS:
                made.add((path.relative_to(PACKAGE).as_posix(), name))
    assert made == PLACES


@needs_cupy
def test_every_kernel_that_is_written_is_listed():
    listed = {kernel.name for _, _, kernel in nvrtc.lane().raw()}
    from anyarray_linear.lanes import cupy as lane

    written = set()
    for info in pkgutil.iter_modules(lane.__path__, f"{lane.__name__}."):
        for text in vars(importlib.import_module(info.name)).values():
            if isinstance(text, str):
                written |= set(re.findall(r"^KERNEL (\w+)\(", text, re.MULTILINE))
    assert listed == written


LAUNCHED = """
import cupy
made, RawKernel = set(), cupy.RawKernel
def recorded(code, name, options=()):
    made.add((code, name, options))
    return RawKernel(code, name, options)
cupy.RawKernel = recorded

import numpy as np
from anyarray_linear import *
rng = np.random.default_rng(0)
X, ids = rng.standard_normal((40, 6)).astype("f"), rng.integers(5, size=40)
for optimizer in (SGD(0.1, momentum=0.9), Adam(), AdamW(clip_norm=1.0)):
    for loss, y in (
        (SoftmaxCrossEntropy(), ids), (SoftmaxCrossEntropy(), ids.astype("uint8")),
        (SoftmaxCrossEntropy(), np.eye(5, dtype="f")[ids]), (MeanSquaredError(), np.eye(5, dtype="f")[ids]),
    ):
        layers = [layer for f in (ReLU, Tanh, Sigmoid, SiLU, GELU) for layer in (Linear(6, 6, dtype="float32", device="cuda", seed=1), f())]
        model = Sequential(*layers, Linear(6, 5, dtype="float32", device="cuda", seed=1))
        fit(model, X, y, loss=loss, optimizer=type(optimizer)(**{k: v for k, v in vars(optimizer).items() if k in ("lr", "momentum", "clip_norm")}),
            epochs=1, batch_size=16, progress=False)
large = Device.of(model[0].W).asarray(rng.standard_normal((3000, 5)).astype("f"))
MeanSquaredError().forward(large, large)
for layer in (Dropout(0.5, seed=0), LayerNorm(5, dtype="float32", device="cuda")):
    layer.backward(*layer.forward(large))
ReLU().forward(large)

from anyarray_linear.lanes.cupy import programs
seen = len(made)
unlisted = {name for code, name, options in made - {(k.code, k.name, k.options) for *_, k in programs.raw()}}
print(seen, *sorted(unlisted))
"""


@needs_cupy
def test_what_training_launches_is_listed():
    if not doctor.count():
        pytest.skip("needs a CUDA device, or the stand-in for one")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seen, *unlisted = subprocess.check_output([sys.executable, "-c", LAUNCHED], text=True, env=environment, timeout=300).split()
    assert int(seen) > 20
    assert unlisted == []


@pytest.fixture(scope="module")
def results():
    """Each program, compiled for each card; and to PTX for the first of them."""
    if reason := nvrtc.missing():
        pytest.skip(f"NVRTC is not here: {reason}")
    programs, cards = nvrtc.programs(), nvrtc.capabilities()
    jobs = [(program, card, False) for card in cards for program in programs]
    jobs += [(program, cards[0], True) for program in programs]
    with ProcessPoolExecutor(len(usable_cores()), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(nvrtc.compiled, jobs, chunksize=8))
    print(f"\nNVRTC {nvrtc.version()}: {len(programs)} programs for compute capability {', '.join(cards)}")
    print(f"{'program: function':70}{'registers':>10}{'spilled':>9}{'shared':>8}   the most on any card")
    rows = {}
    for one in found:
        for function, *numbers in nvrtc.resources(one.log):
            key = f"{one.label}: {function}"
            rows[key] = [max(pair) for pair in zip(rows.get(key, numbers), numbers, strict=True)]
    for key, (registers, spilled, shared) in sorted(rows.items()):
        print(f"{key:70}{registers:10}{spilled:9}{shared:8}")
    return found


def told(pairs):
    """Of what was found, what a reader wants: each complaint once, with the programs that it is about."""
    complaints = {}
    for one, complaint in pairs:
        complaints.setdefault(complaint, []).append(f"{one.label} on {one.capability}")
    return [f"{complaint} ({len(where)} times, as in {where[0]})" for complaint, where in complaints.items()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_for_every_card(results):
    assert told((one, one.error) for one in results if one.error) == []
    assert len({one.capability for one in results}) >= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_compiler_warns_of_nothing(results):
    assert told((one, line) for one in results for line in nvrtc.warnings(one.log)) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_kernel_keeps_what_it_computes_with_in_memory(results):
    resources = [(one, *numbers) for one in results for numbers in nvrtc.resources(one.log)]
    assert {one.label for one, *_ in resources} == {one.label for one in results}  # the figures are there
    assert told((one, f"{function} spills {spilled} bytes") for one, function, _, spilled, _ in resources if spilled > SPILL) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_of_float16_and_float32_do_not_compute_in_float64(results):
    # the guard's sum of losses is one on purpose
    ptx = [one for one in results if one.code and one.dtype in ("e", "f") and not one.label.startswith("judge")]
    assert len(ptx) > 50
    assert told((one, " ".join(wide)) for one in ptx if (wide := nvrtc.float64_arithmetic(one.code))) == []
    assert any(nvrtc.float64_arithmetic(one.code) for one in results if one.code and one.dtype == "d")


SPOILED = {"compiles": "undeclared += 1;", "warns": "int unused = 0;", "float64": "y = float(double(x) * 1.1);"}


@pytest.mark.parametrize("what", SPOILED)
def test_a_fault_would_be_found(what):
    if reason := nvrtc.missing():
        pytest.skip(f"NVRTC is not here: {reason}")
    head, tail = 'extern "C" __global__ void spoiled(const float* X, float* Y) { float x = X[0], y = x; ', " Y[0] = y; }"
    source = head + SPOILED[what] + tail
    one = nvrtc.compiled((nvrtc.Program("spoiled", "f", source, ()), nvrtc.capabilities()[0], True))
    found = {"compiles": one.error, "warns": nvrtc.warnings(one.log), "float64": nvrtc.float64_arithmetic(one.code)}
    assert [name for name, complaint in found.items() if complaint] == [what]
