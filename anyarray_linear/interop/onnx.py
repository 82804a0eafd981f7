"""Models as ONNX files, which ONNX Runtime and many other programs run without this library.

A `Linear` is a `Gemm` with `transB=1`, `Z = X W^T + b`; an activation and `LayerNorm` are their formulas in ONNX's
operators, and `Dropout` is not there, as it does nothing in inference. A layer that stands at several positions has its
weights in the file once, under the names that `save_model` gives them, which are PyTorch's. The file's input is `X`
`(batch, in_features)`, with any batch size, its output `Z` `(batch, out_features)`, or `P`, the softmax of `Z`, where that
is asked for. `classes`, `features` and what else the metadata has are the file's metadata, as JSON.

Only the `onnx` package is needed, and nothing is computed: a float16 model is exported without a device that runs it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import erf
from ..activations import GELU
from ..files.architecture import architecture_of, shown
from ..files.atomic import atomic_write
from ..files.sealed import CheckpointError, as_json, read, told
from ..files.tensors import weights_of
from ..protocol import check_model, join

Host = np.ndarray[Any, Any]
Spec = Mapping[str, Any]

OPSET = 13
"""What the files are written in: old enough for nearly every reader (ONNX 1.8), and with `Softmax` as it is today."""

_Step = tuple[str, ...]  # the name of a result, the operator, and the names of its inputs
_CONSTANTS = {
    "gelu.a": GELU._a,
    "gelu.c": GELU._c,
    "gelu.half": 0.5,
    "gelu.one": 1.0,
    "gelu.root": math.sqrt(0.5),
    "erf.0": 0.0,
    "erf.small": erf.SMALL,
    "erf.middle": erf.MIDDLE,
    "erf.root": 1 / math.sqrt(math.pi),
    **{
        f"erf.{name}.{part}{i}": c
        for name, ratio in (("R1", erf.R1), ("R2", erf.R2), ("R3", erf.R3))
        for part, coefficients in zip("PQ", ratio, strict=True)
        for i, c in enumerate(coefficients)
    },
}


def _ratio(name: str, x: str) -> Iterator[_Step]:
    """The quotient `name` of two polynomials in `x`, by Horner's rule."""
    for part, coefficients in zip("PQ", getattr(erf, name), strict=True):
        value = f"erf.{name}.{part}0"
        for i in range(1, len(coefficients)):
            yield f"{name}{part}{i}x", "Mul", value, x
            value = f"{name}{part}{i}"
            yield value, "Add", f"{value}x", f"erf.{name}.{part}{i}"
    yield name, "Div", *(f"{name}{part}{len(c) - 1}" for part, c in zip("PQ", getattr(erf, name), strict=True))


_ERF: tuple[_Step, ...] = (  # E = erf(U) as in our own erf, for float64: ONNX Runtime has the operator in float32 only
    *(("Y", "Abs", "U"), ("Small", "LessOrEqual", "Y", "erf.small"), ("S", "Where", "Small", "U", "erf.0")),
    *(("SS", "Mul", "S", "S"), *_ratio("R1", "SS"), ("Near", "Mul", "S", "R1")),
    *(("Ym", "Min", "Y", "erf.middle"), *_ratio("R2", "Ym"), ("Yf", "Max", "Y", "erf.middle"), ("YY", "Mul", "Yf", "Yf")),
    *(("T", "Reciprocal", "YY"), *_ratio("R3", "T"), ("TR", "Mul", "T", "R3"), ("TRr", "Add", "TR", "erf.root")),
    *(("Outer", "Div", "TRr", "Yf"), ("IsMiddle", "LessOrEqual", "Y", "erf.middle")),
    *(("R", "Where", "IsMiddle", "R2", "Outer"), ("Y2", "Mul", "Y", "Y"), ("mY2", "Neg", "Y2"), ("exp", "Exp", "mY2")),
    *(("C", "Mul", "exp", "R"), ("C1", "Sub", "gelu.one", "C"), ("Sign", "Sign", "U"), ("Far", "Mul", "Sign", "C1")),
    ("E", "Where", "Small", "Near", "Far"),
)
_FORMULAS: dict[str, tuple[_Step, ...]] = {
    "ReLU": (("Z", "Relu", "X"),),
    "Tanh": (("Z", "Tanh", "X"),),
    "Sigmoid": (("Z", "Sigmoid", "X"),),
    "SiLU": (("S", "Sigmoid", "X"), ("Z", "Mul", "X", "S")),
    # not the operator Gelu: its definition has the constants in float32, so in float64 it is off by 1e-8
    "GELU": (
        *(("U", "Mul", "X", "gelu.root"), ("E", "Erf", "U"), ("H", "Mul", "X", "gelu.half")),
        *(("V", "Add", "E", "gelu.one"), ("Z", "Mul", "H", "V")),
    ),
    "GELU(tanh)": (
        *(("S", "Mul", "X", "X"), ("C", "Mul", "S", "gelu.c"), ("D", "Add", "C", "gelu.one")),
        *(("A", "Mul", "X", "gelu.a"), ("U", "Mul", "A", "D"), ("T", "Tanh", "U")),
        *(("H", "Mul", "X", "gelu.half"), ("V", "Add", "T", "gelu.one"), ("Z", "Mul", "H", "V")),
    ),
}
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # the operator behind a name in a step, and its attributes
    "Gemm": ("Gemm", {"transB": 1}),
    "ReduceMean": ("ReduceMean", {"keepdims": 1}),
    "ReduceMean before 18": ("ReduceMean", {"keepdims": 1, "axes": [-1]}),
    "Cast to float32": ("Cast", {"to": 1}),
    "Cast to float16": ("Cast", {"to": 10}),
}
_MOST_BYTES = 2**31 - 2**24  # protobuf's limit is 2 GiB, and names and metadata take some of it


def to_onnx(
    model: Any,
    *,
    softmax: bool = False,
    labels: bool = False,
    metadata: Mapping[str, Any] | None = None,
    opset: int = OPSET,
    batch_axes: int = 1,
) -> Any:
    """The `onnx.ModelProto` of `model`: a `Linear`, or a `Sequential` of this library's layers, nested in any way.

    softmax: end with the softmax of the outputs, for a classifier whose users want probabilities.
    labels: give `label` too, the name of the likeliest class, as the metadata has it under `classes`.
    metadata: as in `save_model`, such as `{"classes": ["cat", "dog"], "features": ["ears", "tail"]}`.
    opset: the version of ONNX's operators, 13 or later, up to what the `onnx` package knows.
    batch_axes: how many axes `X` has before its features: 1 is `(batch, in_features)`, 0 a single sample.

    Raises `ImportError` without the `onnx` package, `ValueError` for a model that ONNX cannot express (a layer of another
    class, no `Linear`, layers that do not fit each other, more than 2 GiB), `TypeError` for metadata that JSON cannot hold.

    >>> from anyarray_linear import Linear, ReLU, Sequential
    >>> proto = to_onnx(Sequential(Linear(3, 4), ReLU(), Linear(4, 2)))
    >>> [node.op_type for node in proto.graph.node], [each.name for each in proto.graph.initializer]
    (['Gemm', 'Relu', 'Gemm'], ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    check_model(model)
    kept = as_json("metadata", {} if metadata is None else metadata)
    return _proto(architecture_of(model), weights_of(model), softmax, labels, kept, opset, batch_axes)


def export_onnx(model: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Write `to_onnx(model, **options)` to the file `path`, atomically. Raises as `to_onnx`, and `OSError`."""
    atomic_write(path, to_onnx(model, **options).SerializeToString())


def file_to_onnx(
    path: str | os.PathLike[str], *, softmax: bool = False, labels: bool = False, opset: int = OPSET, batch_axes: int = 1
) -> Any:
    """The `onnx.ModelProto` of the model in a file of `save_model` or `save_checkpoint`, with the metadata it has there.

    softmax, labels, opset, batch_axes: as in `to_onnx`.

    Raises `CheckpointError` for a file that is damaged, or whose model ONNX cannot express.
    """
    _check_options(_onnx(), opset, batch_axes)
    file = read(path)
    if file.info is None:
        raise CheckpointError(
            f"{path} holds no architecture, as it is not a file of this library; "
            "build the model, fill it with load_model(path, into=model), and use export_onnx"
        )
    try:
        metadata = {} if "optimizer" in file.info else file.info["metadata"]  # a checkpoint's is the state of the run
        return _proto(file.info["architecture"], file.weights, softmax, labels, metadata, opset, batch_axes)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {told(error)}") from error


def _proto(
    architecture: Spec,
    weights: Mapping[str, Host],
    softmax: bool,
    labels: bool,
    metadata: Mapping[str, Any],
    opset: int,
    batch_axes: int,
) -> Any:
    onnx = _onnx()
    _check_options(onnx, opset, batch_axes)
    positions = list(_positions(architecture, "", {}))
    _check(positions, weights)
    linear = [spec for _, _, spec in positions if spec["type"] == "Linear"]
    in_features, out_features = linear[0]["in_features"], linear[-1]["out_features"]
    classes = metadata.get("classes")
    if isinstance(classes, (list, tuple)) and len(classes) != out_features:
        raise ValueError(f"metadata names {len(classes)} classes, but the model has {out_features} outputs")

    nodes: list[Any] = []
    X, dtype = "X", next(iter(weights.values())).dtype
    for position, first, spec in positions:
        for Z, operator, *inputs in _steps(position, first, spec, X, dtype.name, batch_axes, opset):
            kind, options = _OPTIONS.get(operator, (operator, {}))
            nodes.append(onnx.helper.make_node(kind, inputs, [Z], name=f"{Z}:{kind}", **options))
            X = Z
    nodes[-1].output[0] = "Z"
    if softmax:
        nodes.append(onnx.helper.make_node("Softmax", ["Z"], ["P"], name="P:Softmax", axis=-1))
    if labels:
        nodes.append(onnx.helper.make_node("ArgMax", ["Z"], ["id"], name="id:ArgMax", axis=-1, keepdims=0))
        nodes.append(onnx.helper.make_node("Gather", ["classes", "id"], ["label"], name="label:Gather"))
    values = {**weights, **{name: np.asarray(value, dtype=dtype) for name, value in _CONSTANTS.items()}}
    values["norm.axis"] = np.asarray([-1])
    for _, first, spec in positions:
        if spec["type"] == "LayerNorm":
            values[join(first, "eps")] = np.asarray(spec["eps"], dtype="float32" if dtype == "float16" else dtype)
    used = dict.fromkeys(name for node in nodes for name in node.input if name in values)  # each once, in order
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    batch = ["batch"] if batch_axes == 1 else [f"batch_{i}" for i in range(batch_axes)]
    describe = onnx.helper.make_tensor_value_info
    outputs = [describe("P" if softmax else "Z", kind, [*batch, out_features])]
    names = [_names(onnx, classes)] if labels else []
    outputs += [describe("label", each.data_type, batch) for each in names]
    graph = onnx.helper.make_graph(
        nodes,
        "anyarray_linear",
        [describe("X", kind, [*batch, in_features])],
        outputs,
        [*(onnx.numpy_helper.from_array(values[name], name) for name in used), *names],
    )
    from .. import __version__

    opsets = [onnx.helper.make_opsetid("", opset)]
    proto = onnx.helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=onnx.helper.find_min_ir_version_for(opsets),
        producer_name="anyarray_linear",
        producer_version=__version__,
    )
    known = {name: json.dumps(value) for name, value in metadata.items() if value is not None}
    onnx.helper.set_model_props(proto, known)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _names(onnx: Any, classes: Any) -> Any:
    """The tensor `classes`: of integers if all are, else of text."""
    if not isinstance(classes, (list, tuple)):
        raise ValueError('labels need the names of the classes: metadata={"classes": ["cat", "dog"]}')
    if all(type(name) is int for name in classes):
        return onnx.helper.make_tensor("classes", onnx.TensorProto.INT64, [len(classes)], classes)
    texts = [str(name).encode() for name in classes]
    return onnx.helper.make_tensor("classes", onnx.TensorProto.STRING, [len(texts)], texts)


def _positions(spec: Spec, path: str, made: dict[str, Spec]) -> Iterator[tuple[str, str, Spec]]:
    """`(position, first position, description)` of every layer that is no container, in the order in which they run."""
    if "same_as" in spec:
        yield path, spec["same_as"], made[spec["same_as"]]
    elif spec["type"] == "Sequential":
        for i, inner in enumerate(spec["layers"]):
            yield from _positions(inner, join(path, str(i)), made)
    else:
        made[path] = spec
        yield path, path, spec


def _check(positions: list[tuple[str, str, Spec]], weights: Mapping[str, Host]) -> None:
    """Raise `ValueError` unless ONNX can express the layers, and they fit each other and their weights."""
    width: int | None = None
    dtypes: dict[str, str] = {}
    expected = set()
    for position, _, spec in positions:
        kind = spec["type"]
        if spec.get("custom") or kind not in ("Linear", "LayerNorm", "Dropout", *_FORMULAS):
            raise ValueError(
                f"layer {position or 'of the model'} is {shown(spec)}, which has no operator in ONNX; "
                "export a model of this library's own layers"
            )
        if kind not in ("Linear", "LayerNorm"):
            continue
        takes = spec["features" if kind == "LayerNorm" else "in_features"]
        if width not in (None, takes):
            raise ValueError(f"layer {position} takes {takes} features, but the one before it gives {width}")
        width = takes if kind == "LayerNorm" else spec["out_features"]
        shapes = {"weight": (width, takes) if kind == "Linear" else (width,)}
        shapes |= {"bias": (width,)} if spec.get("bias", True) else {}
        for p, shape in shapes.items():
            name = join(position, p)
            if weights[name].shape != shape:
                raise ValueError(f"{name} has shape {weights[name].shape}, but the layer is {shown(spec)}")
            expected.add(name)
            dtypes.setdefault(weights[name].dtype.name, name)
    if not any(spec["type"] == "Linear" for _, _, spec in positions):
        raise ValueError("the model has no Linear layer, so nothing says how many features and which dtype it takes")
    if unknown := sorted(weights.keys() - expected):
        raise ValueError(f"there is {unknown[0]}, which belongs to no layer")
    if len(dtypes) > 1:
        raise ValueError("the layers are of more than one dtype: " + ", ".join(f"{n} is {d}" for d, n in dtypes.items()))
    if (size := sum(x.nbytes for x in weights.values())) > _MOST_BYTES:
        raise ValueError(f"the weights have {size:,} bytes, but an ONNX file holds less than 2 GiB")


def _check_options(onnx: Any, opset: Any, batch_axes: Any) -> None:
    newest = onnx.defs.onnx_opset_version()
    for name, value, low, high in (("opset", opset, OPSET, newest), ("batch_axes", batch_axes, 0, math.inf)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; give an int")
        if not low <= value <= high:
            at_most = f" to {high}, the newest that onnx {onnx.__version__} knows" if high == newest else " or more"
            raise ValueError(f"{name} is {value}; give {low}{at_most}")


def _steps(position: str, first: str, spec: Spec, X: str, dtype: str, batch_axes: int, opset: int) -> Iterator[_Step]:
    """The operations of one layer, in order, with the input named `X`; its weights are those of its `first` position."""
    if spec["type"] == "Linear":
        weights = [join(first, p) for p in ("weight", "bias") if p == "weight" or spec["bias"]]
        if batch_axes == 1:
            yield join(position, "Z"), "Gemm", X, *weights
            return
        W, *b = weights
        yield join(position, "W^T"), "Transpose", W
        yield join(position, "XW^T" if b else "Z"), "MatMul", X, join(position, "W^T")
        if b:
            yield join(position, "Z"), "Add", join(position, "XW^T"), *b
        return
    if spec["type"] == "Dropout":  # nothing is dropped in inference
        return
    if spec["type"] == "LayerNorm":
        yield from _normalization(position, first, X, dtype, opset)
        return
    kind = "GELU(tanh)" if spec.get("approximate") == "tanh" else spec["type"]
    formula = _FORMULAS[kind]
    if kind == "GELU" and dtype == "float64":
        formula = (formula[0], *_ERF, *formula[2:])
    for Z, operator, *inputs in formula:
        yield (
            join(position, Z), operator,
            *(X if name == "X" else name if name in _CONSTANTS else join(position, name) for name in inputs),
        )  # fmt: skip


def _normalization(position: str, first: str, X: str, dtype: str, opset: int) -> Iterator[_Step]:
    """`H * W + b`, spelled out: the operator LayerNormalization forms means in float32, whatever the dtype."""

    def inner(name: str) -> str:
        return join(position, name)

    mean = ("ReduceMean", "norm.axis") if opset >= 18 else ("ReduceMean before 18",)
    if dtype == "float16":
        yield inner("X"), "Cast to float32", X
        X = inner("X")
    yield inner("M"), mean[0], X, *mean[1:]
    yield inner("D"), "Sub", X, inner("M")
    yield inner("DD"), "Mul", inner("D"), inner("D")
    yield inner("V"), mean[0], inner("DD"), *mean[1:]
    yield inner("Ve"), "Add", inner("V"), join(first, "eps")
    yield inner("S"), "Sqrt", inner("Ve")
    yield inner("H"), "Div", inner("D"), inner("S")
    H = inner("H")
    if dtype == "float16":
        yield inner("Hn"), "Cast to float16", H
        H = inner("Hn")
    yield inner("HW"), "Mul", H, join(first, "weight")
    yield inner("Z"), "Add", inner("HW"), join(first, "bias")


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.defs
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError('exporting needs the onnx package; pip install "anyarray_linear[onnx]"') from error
    return onnx
