"""What an import costs: what it loads, and what the modules of the mathematics never name."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import anyarray_linear

PACKAGE = Path(anyarray_linear.__file__).parent
MATHEMATICS = ("linear", "activations", "sequential", "losses", "optimizers", "schedules", "protocol")
HEAVY = (
    *("cupy", "cupyx", "cupy_backends", "torch", "jax", "array_api_strict", "pandas", "scipy", "sklearn"),
    *("typer", "click", "rich", "safetensors", "matplotlib", "onnx", "mpi4py", "hypothesis", "pytest"),
    *("array_api_compat.numpy", "array_api_compat.cupy", "array_api_compat.torch", "numpy.random"),
    *("concurrent.futures.process", "multiprocessing", "sqlite3", "ssl"),
)
AT_FIRST_USE = ("importlib.metadata", "ctypes", "hashlib", "socket", "logging", "json", "zipfile")  # some milliseconds each


def python(code):
    """What a fresh interpreter prints for `code`, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded(modules, names=HEAVY):
    return [name for name in names if any(m == name or m.startswith(f"{name}.") for m in modules)]


def test_import_loads_nothing_that_is_not_needed_yet():
    bare = set(python("import json, sys, numpy; print(json.dumps(list(sys.modules)))"))
    ours = set(python("import json, sys, anyarray_linear; print(json.dumps(list(sys.modules)))"))
    assert loaded(ours - bare, HEAVY + AT_FIRST_USE) == []
    third_party = {m.partition(".")[0] for m in ours - bare} - set(sys.stdlib_module_names)
    assert third_party == {"anyarray_linear", "array_api_compat"}


def test_every_public_name_is_there_after_a_bare_import():
    names = python(
        "import json, anyarray_linear as a; print(json.dumps([n for n in a.__all__ if getattr(a, n, None) is None]))"
    )
    assert names == []
    assert {*anyarray_linear.__all__} >= {
        *("Linear", "linear_forward", "linear_backward", "LinearGradients", "ReLU", "Tanh", "Sigmoid", "SiLU", "GELU"),
        *("Sequential", "SoftmaxCrossEntropy", "MeanSquaredError", "SGD", "Adam", "AdamW", "Device"),
        *("DeviceUnavailableError", "select_device", "fit", "evaluate", "predict", "History"),
    }


def test_training_on_numpy_loads_no_other_array_library():
    modules = python(
        """
import json, sys
import numpy as np
from anyarray_linear import Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy
model, loss, optimizer = Sequential(Linear(3, 4), ReLU(), Linear(4, 2)), SoftmaxCrossEntropy(), Adam()
Z, caches = model.forward(np.ones((5, 3)))
_, cache = loss.forward(Z, np.zeros(5, dtype=int))
model.backward(loss.backward(cache), caches)
optimizer.step(model)
print(json.dumps(list(sys.modules)))
"""
    )
    not_needed = [name for name in HEAVY if name not in ("array_api_compat.numpy", "numpy.random")]
    assert loaded(modules, not_needed) == []


def imported_by(path):
    """The modules that a file imports anywhere, inside functions too; what is only for type checkers is left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_names_no_array_library(module):
    libraries = {"numpy", "cupy", "cupyx", "torch", "jax", "array_api_strict"}
    imported = imported_by(PACKAGE / f"{module}.py")
    assert not {name.partition(".")[0] for name in imported} & libraries
    assert not {name for name in imported if name.startswith("array_api_compat.")}


@pytest.mark.parametrize("module", ["linear", "activations", "losses", "optimizers", "protocol"])
def test_the_mathematics_makes_no_Python_numbers_of_arrays(module):
    """`.item()`, `.tolist()` and `.get()` copy to the host; `check_ids` is the one place that may look at values."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert [ast.unparse(call) for call in calls if call.func.attr in ("item", "tolist", "numpy", "asnumpy")] == []


def test_imports_point_downwards_only():
    order = ["_arrays", "device", "initializers", "protocol", "linear", "sequential", "losses", "optimizers", "training", "cli"]
    rank = {name: i for i, name in enumerate(order)}
    for path in PACKAGE.glob("*.py"):
        if path.stem not in rank:
            continue
        for node in ast.parse(path.read_text()).body:  # at import time
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert rank.get(name.partition(".")[0], -1) < rank[path.stem], f"{path.stem} imports {name}"
