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


NUMBERS = {  # of sizes, a flag of the user's, and in `check_ids`, the one place that may look at values
    *("int(self.W.shape[0])", "int(self.W.shape[1])", "bool(nesterov)", "int(xp.min(target))", "int(xp.max(target))"),
}


def numbers_made_of_arrays(source):
    """The calls that may copy an array to the host: `.item()`, `.tolist()`, `.get()`, `float()` and so on."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute) and (
        call.func.attr in ("item", "tolist", "numpy", "asnumpy") or (call.func.attr == "get" and not call.args))]  # fmt: skip
    casts = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("float", "int", "bool", "complex")]
    return [text for text in map(ast.unparse, [*methods, *casts]) if text not in NUMBERS]


@pytest.mark.parametrize("module", ["linear", "activations", "losses", "optimizers", "protocol", "sequential"])
def test_the_mathematics_makes_no_Python_numbers_of_arrays(module):
    assert numbers_made_of_arrays((PACKAGE / f"{module}.py").read_text()) == []


@pytest.mark.parametrize("call", ["x.item()", "x.get()", "x.tolist()", "xp.asnumpy(x)", "float(loss)", "int(x[0])", "bool(where)"])
def test_a_Python_number_made_of_an_array_would_be_found(call):
    assert numbers_made_of_arrays(f"def f(x):\n    return {call}") == [call]


# from the bottom to the top; a module may import what is on its own line or on one above it, anywhere in it
ROOMS = """
arrays
datasets
lanes
linear erf activations dropout normalization losses optimizers schedules initializers protocol sequential guard testing
lanes.flat lanes.numpy lanes.cupy
files distributed
training
interop
cli
"""


def room(parts):
    """The name of a module as `ROOMS` has it: packages other than `lanes` are one room."""
    return ".".join(parts[:2] if parts[0] == "lanes" else parts[:1])


def test_imports_point_downwards_only():
    rank = {name: i for i, line in enumerate(ROOMS.split("\n")) for name in line.split()}
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        package = parts[:-1]
        parts = package if parts[-1] == "__init__" else parts
        if not package and parts in ((), ("__main__",)):  # the public names, and the command
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1]
            targets = [(*base, *node.module.split("."))] if node.module else [(*base, alias.name) for alias in node.names]
            for target in targets:
                here, there = room(parts), room(target)
                if target == ("__version__",) or here == there:
                    continue
                if not base and not node.module and there not in rank:  # `from .. import Linear`: the public names
                    there = "training"
                seen.add((here, there))
                assert rank[there] <= rank[here], f"{'.'.join(parts)} imports {'.'.join(target)}"
    assert {("training", "files"), ("lanes.numpy", "optimizers"), ("testing", "linear")} <= seen  # also in functions
