"""What an import costs: what it loads, and what the modules of the mathematics never name."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anyarray_linear

PACKAGE = Path(anyarray_linear.__file__).parent
MATHEMATICS = (
    *("linear", "activations", "dropout", "erf", "sequential", "losses", "optimizers", "schedules", "protocol"),
    *("normalization", "binding", "guard", "step", "binary", "averages", "scaling", "clipping"),
)
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


def imports(source, package=()):
    """What a module of `package` imports anywhere in it, as names from the top, and what nobody can know before it runs.

    Inside functions too, and by string: `import_module` and `__import__`, relative or absolute, under whatever name, and any
    string that is the full name of a module of ours. What is only for type checkers is left out.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    by_string = {"import_module", "__import__"}
    by_string |= {
        alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        if alias.name in by_string and alias.asname
    }  # fmt: skip
    found, unknown = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(from_the_top("." * node.level + (node.module or ""), package))
            # `from . import x`: x may be a module, or a name in one
            found |= {f"{base}.{alias.name}" for alias in node.names} if node.level and not node.module else {base}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in by_string:
            name = node.args[0]
            if isinstance(name, ast.Constant):
                found.add(".".join(from_the_top(name.value, package)))
            else:
                unknown.add(ast.unparse(name))
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{PACKAGE.name}(\.\w+)+", str(node.value)):
            found.add(node.value)
    return found, unknown


def from_the_top(name, package):
    """The parts of a module's name, which may be relative to `package`."""
    level = len(name) - len(name.lstrip("."))
    above = (PACKAGE.name, *package)[: len(package) + 2 - level] if level else ()
    return (*above, *filter(None, name.lstrip(".").split(".")))


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_names_no_array_library(module):
    libraries = {"numpy", "cupy", "cupyx", "torch", "jax", "array_api_strict"}
    imported, unknown = imports((PACKAGE / f"{module}.py").read_text())
    assert not unknown
    assert not {name.partition(".")[0] for name in imported} & libraries
    assert not {name for name in imported if name.startswith("array_api_compat.")}


NUMBERS = {  # of sizes, a flag of the user's, and in `check_ids`, the one place that may look at values
    *("int(self.W.shape[0])", "int(self.W.shape[1])", "bool(nesterov)", "int(xp.min(target))", "int(xp.max(target))"),
    *("float(xp.min(target))", "float(xp.max(target))"),
}


def numbers_made_of_arrays(source):
    """The calls that may copy an array to the host: `.item()`, `.tolist()`, `.get()`, `float()` and so on."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute) and (
        call.func.attr in ("item", "tolist", "numpy", "asnumpy") or (call.func.attr == "get" and not call.args))]  # fmt: skip
    casts = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("float", "int", "bool", "complex")]
    return [text for text in map(ast.unparse, [*methods, *casts]) if text not in NUMBERS]


@pytest.mark.parametrize("module", ["linear", "activations", "losses", "binary", "averages", "optimizers", "protocol", "sequential"])
def test_the_mathematics_makes_no_Python_numbers_of_arrays(module):
    assert numbers_made_of_arrays((PACKAGE / f"{module}.py").read_text()) == []


@pytest.mark.parametrize("call", ["x.item()", "x.get()", "x.tolist()", "xp.asnumpy(x)", "float(loss)", "int(x[0])", "bool(where)"])
def test_a_Python_number_made_of_an_array_would_be_found(call):
    assert numbers_made_of_arrays(f"def f(x):\n    return {call}") == [call]


# The rooms of the contract from the bottom to the top: a module may import what is in its own room, or in one further down.
# Those on one line do not know of each other. `mathematics` is every module at the top of the package but `__main__`.
ROOMS = """
arrays
datasets mathematics
lanes
files distributed
training
interop
cli
"""
RANK = {name: i for i, line in enumerate(ROOMS.split("\n")) for name in line.split()}
# what is looked up when it runs: the library of an array, by its namespace; the lanes of a place, by their table
LOOKED_UP = {
    "arrays.device": {"self.namespace_name"},
    "lanes": {"f'.{name}'"},
    "cli.verify": {"name", "library"},
}


def room(module):
    """The room of a module, given by its full name."""
    parts = module.split(".")[1:]
    if not parts or parts[0].startswith("__"):  # the public names, and what runs the command
        return None
    return parts[0] if parts[0] in RANK else "mathematics"


def arrows(module, source, is_package=False):
    """Pairs of rooms: where `module` stands, and where something is that it imports; and imports that nobody can know."""
    package = tuple(module.split(".")) if is_package else tuple(module.split(".")[:-1])
    found, unknown = imports(source, tuple(filter(None, package)))
    here = room(f"{PACKAGE.name}.{module}")
    public = PACKAGE.name
    there = {(here, room(name), name) for name in found if name.split(".")[0] == public}
    return {each for each in there if each[1] != here}, unknown


def modules():
    """Each module of the package as `arrows` takes it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if name not in ("", "__main__"):
            yield name, path.read_text(), is_package


def test_imports_point_downwards_only():
    seen = set()
    for name, source, is_package in modules():
        pointing, unknown = arrows(name, source, is_package)
        assert unknown <= LOOKED_UP.get(name, set()), name
        for here, there, what in pointing:
            if there is not None:
                seen.add((here, there))
                assert RANK[there] < RANK[here], f"{name} imports {what}"
            elif what not in (f"{PACKAGE.name}.__version__", f"{PACKAGE.name}.distributed"):
                assert RANK[here] >= RANK["interop"], f"{name} imports the public names, which know of all rooms"
    assert {("training", "files"), ("lanes", "mathematics"), ("mathematics", "arrays"), ("cli", "training")} <= seen


@pytest.mark.parametrize(
    "line",
    [
        "from ..cli import train",
        "from anyarray_linear.cli.train import train",
        "import anyarray_linear.cli",
        "import_module('..cli', __package__)",
        "importlib.import_module('anyarray_linear.cli.train')",
        "__import__('anyarray_linear.cli')",
        "import_module(TABLE['x'], 'anyarray_linear.cli')",
        "load('..cli.train', __package__)",
    ],
)
@pytest.mark.parametrize("where", ["{}", "def f():\n    {}", "class C:\n    x = lambda: 1\n    def f(self):\n        if x: {}"])
def test_an_arrow_that_points_up_would_be_seen(line, where):
    source = "from importlib import import_module as load\n" + where.format(line)
    pointing, unknown = arrows("arrays.device", source)
    assert unknown or {(here, there) for here, there, _ in pointing} == {("arrays", "cli")}


def test_a_module_is_one_idea_and_not_long():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}
