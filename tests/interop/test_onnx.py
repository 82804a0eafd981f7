"""ONNX files: what ONNX Runtime computes from them, what they say of themselves, and what is refused."""

from __future__ import annotations

import doctest
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from running_error import Rounded

from anyarray_linear import (
    GELU,
    Dropout,
    LayerNorm,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Tanh,
    __version__,
    load_model,
    save_checkpoint,
    save_model,
)
from anyarray_linear.files import CheckpointError
from anyarray_linear.testing import linear_error_bounds, linear_reference

onnx = pytest.importorskip("onnx")

from anyarray_linear.interop import onnx as module  # noqa: E402
from anyarray_linear.interop.onnx import export_onnx, file_to_onnx, to_onnx  # noqa: E402

DTYPES = ["float16", "float32", "float64"]


def layer(n_in, n_out, *, bias=True, dtype="float32", seed=0):
    """A layer in any dtype, float16 too, which only torch and CuPy compute in."""
    rng = np.random.default_rng([seed, n_in, n_out])
    made = Linear(n_in, n_out, bias=bias)
    made.W = (rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(dtype)
    made.b = rng.standard_normal((1, n_out)).astype(dtype) if bias else None
    return made


def run(proto, X):
    """The output of ONNX Runtime, on the CPU."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (Z,) = session.run(None, {session.get_inputs()[0].name: X})
    assert Z.dtype == X.dtype
    return Z


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {  # the activations as float64 functions, and the largest size of their derivatives
    Tanh: (np.tanh, 1.0),
    Sigmoid: (sigmoid, 0.25),
    SiLU: (lambda x: x * sigmoid(x), 1.1),
    GELU: (np.vectorize(lambda x: x / 2 * math.erfc(-x / math.sqrt(2))), 1.13),
    "tanh": (lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), 1.13),
}


def expected(model, X, dtype):
    """What `model` gives for `X`, and how far an implementation may be from it."""
    Z = Rounded(X, dtype=dtype)
    for _, leaf in model.positions() if isinstance(model, Sequential) else [("", model)]:
        if isinstance(leaf, Linear):
            Z = Z @ Rounded(leaf.W.T, dtype=dtype)
            Z = Z if leaf.b is None else Z + Rounded(leaf.b, dtype=dtype)
        else:
            Z = Z.relu() if isinstance(leaf, ReLU) else Z.smooth(*FUNCTIONS["tanh" if getattr(leaf, "approximate", "") == "tanh" else type(leaf)])
    return Z


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_onnx_runtime_is_within_the_error_bound(dtype, bias):
    model = layer(100, 30, bias=bias, dtype=dtype)
    X = np.random.default_rng(1).standard_normal((64, 100)).astype(dtype)
    Z = run(to_onnx(model), X)
    error = np.abs(Z.astype(np.float64) - linear_reference(X, model.W, model.b)["Z"])
    assert (error <= linear_error_bounds(X, model.W, model.b)["Z"]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [ReLU, Tanh, Sigmoid, SiLU, GELU, partial(GELU, "tanh")])
def test_a_network_in_onnx_runtime_is_within_the_error_bound(activation, dtype):
    model = Sequential(
        layer(20, 32, dtype=dtype), activation(), Sequential(layer(32, 32, bias=False, dtype=dtype), activation()),
        layer(32, 5, dtype=dtype),
    )  # fmt: skip
    proto = to_onnx(model)
    for count in (1, 3, 50):  # any batch size
        X = (3 * np.random.default_rng(count).standard_normal((count, 20))).astype(dtype)
        bound = expected(model, X, dtype)
        assert bound.share(run(proto, X)) <= 1
        if dtype != "float16":
            assert bound.share(model(X)) <= 1


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layernorm_and_dropout_in_onnx_runtime(dtype, opset):
    norm = LayerNorm(16, eps=1e-3)
    norm.W, norm.b = (np.random.default_rng(i).standard_normal(16).astype(dtype) for i in (1, 2))
    model = Sequential(layer(8, 16, dtype=dtype), norm, Dropout(0.5, seed=0), Tanh(), layer(16, 3, dtype=dtype), Dropout(0.1))
    X = np.random.default_rng(0).standard_normal((20, 8)).astype(dtype)
    Z = run(to_onnx(model, opset=opset), X).astype(np.float64)
    hidden = X.astype(np.float64) @ model[0].W.T.astype(np.float64) + model[0].b
    D = hidden - hidden.mean(1, keepdims=True)
    H = D / np.sqrt((D * D).mean(1, keepdims=True) + 1e-3)
    expected = np.tanh(H * norm.W + norm.b) @ model[4].W.T.astype(np.float64) + model[4].b
    # rows of variance near 1 of 16 numbers up to 5: some hundred roundings of numbers of size 1 to 10, through slopes of at most 1
    assert np.abs(Z - expected).max() < 400 * np.finfo(dtype).eps
    operators = {node.op_type for node in to_onnx(model, opset=opset).graph.node}
    assert "Dropout" not in operators


def test_the_bound_notices_a_wrong_activation():
    model, X = Sequential(layer(20, 32), GELU("tanh"), layer(32, 5)), np.random.default_rng(0).standard_normal((9, 20))
    proto = to_onnx(model)
    (a,) = (x for x in proto.graph.initializer if x.name == "gelu.c")
    a.CopyFrom(onnx.numpy_helper.from_array(np.asarray(0.0442, "float32"), "gelu.c"))
    assert expected(model, X, "float32").share(run(proto, X.astype("float32"))) > 1


@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (2, 1, 3, 20), (0, 3, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_rank(shape, bias):
    shared = layer(32, 32, bias=bias)
    model = Sequential(layer(20, 32), ReLU(), shared, ReLU(), shared, layer(32, 5))
    proto = to_onnx(model, batch_axes=len(shape) - 1)
    assert [x.name for x in proto.graph.initializer if x.name.startswith("2.")] == ["2.weight", "2.bias"][: 1 + bias]
    X = np.random.default_rng(0).standard_normal(shape).astype("float32")
    Z = run(proto, X)
    assert Z.shape == (*shape[:-1], 5)
    if Z.size:
        assert expected(model, X.reshape(-1, 20), "float32").share(Z.reshape(-1, 5)) <= 1
    P = run(to_onnx(model, batch_axes=len(shape) - 1, softmax=True), X)
    np.testing.assert_allclose(P.sum(axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20, 21])
def test_every_version_of_the_operators_computes_the_same(opset):
    model = Sequential(layer(20, 32), Tanh(), layer(32, 32), GELU(), layer(32, 5))
    X = np.random.default_rng(0).standard_normal((7, 20)).astype("float32")
    proto = to_onnx(model, opset=opset, softmax=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    np.testing.assert_array_equal(run(proto, X), run(to_onnx(model, softmax=True), X))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_gives_probabilities(dtype):
    model = Sequential(layer(6, 4, dtype=dtype))
    X = np.random.default_rng(0).standard_normal((7, 6)).astype(dtype)
    proto = to_onnx(model, softmax=True)
    P, Z = run(proto, X).astype(np.float64), expected(model, X, dtype)
    E = np.exp(Z.value - Z.value.max(axis=1, keepdims=True))
    # each probability moves by a factor of at most exp(2 e) when every output moves by at most e
    slack = np.expm1(2 * Z.error.max(axis=1, keepdims=True)) + 32 * Z.u
    assert (np.abs(P - E / E.sum(axis=1, keepdims=True)) < slack).all()
    assert proto.graph.output[0].name == "P"


@pytest.mark.parametrize("classes", [["cat", "\u732b", "no"], [7, -3, 40], [7, "x", 0.5]])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_labels_are_the_names_of_the_likeliest_classes(classes, axes):
    runtime = pytest.importorskip("onnxruntime")
    model = layer(6, 3)
    X = np.random.default_rng(0).standard_normal((*(4, 5)[:axes], 6)).astype("float32")
    proto = to_onnx(model, softmax=True, labels=True, metadata={"classes": classes}, batch_axes=axes)
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [end.name for end in session.get_outputs()] == ["P", "label"]
    P, label = session.run(None, {"X": X})
    names = np.asarray(classes if isinstance(classes[1], int) else list(map(str, classes)))
    assert np.asarray(label).shape == X.shape[:-1]
    np.testing.assert_array_equal(label, names[model(X).argmax(axis=-1)])
    np.testing.assert_array_equal(P.argmax(axis=-1), model(X).argmax(axis=-1))


def test_labels_without_names_are_refused():
    with pytest.raises(ValueError, match=r'labels need the names of the classes: metadata=\{"classes"'):
        to_onnx(layer(2, 3), labels=True)


def test_a_shared_layer_is_in_the_file_once():
    shared = layer(8, 8)
    model = Sequential(shared, Tanh(), Sequential(shared, Sequential(Tanh(), shared)))
    proto = to_onnx(model)
    assert [x.name for x in proto.graph.initializer] == ["0.weight", "0.bias"]
    assert [list(node.input[1:]) for node in proto.graph.node if node.op_type == "Gemm"] == [["0.weight", "0.bias"]] * 3
    X = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")
    assert expected(model, X, "float32").share(run(proto, X)) <= 1


def test_weights_are_bit_for_bit_those_of_the_model():
    model = Sequential(layer(5, 3), ReLU(), layer(3, 2, bias=False))
    model[0].W = np.asfortranarray(model[0].W)
    for x, name in zip(to_onnx(model).graph.initializer, ("0.weight", "0.bias", "2.weight"), strict=True):
        assert x.name == name
        value = {"0.weight": model[0].W, "0.bias": model[0].b[0], "2.weight": model[2].W}[name]
        assert onnx.numpy_helper.to_array(x).tobytes() == value.tobytes()


def test_arrays_of_every_backend_are_exported(backend):
    model = Sequential(Linear(3, 2, seed=0, device=backend.device, dtype="float32"), ReLU())
    (W, _) = to_onnx(model).graph.initializer
    assert onnx.numpy_helper.to_array(W).tobytes() == backend.to_numpy(model[0].W).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# What it says


def test_the_graph_is_gemms_and_activations_with_a_free_batch_axis():
    model = Sequential(layer(4, 3), SiLU(), Sequential(layer(3, 2, bias=False), GELU("tanh"), GELU()))
    proto = to_onnx(model)
    operators = [node.op_type for node in proto.graph.node]
    assert operators == [
        "Gemm", "Sigmoid", "Mul", "Gemm", "Mul", "Mul", "Add", "Mul", "Mul", "Tanh", "Mul", "Add", "Mul",
        "Mul", "Erf", "Mul", "Add", "Mul",
    ]  # fmt: skip
    gemm = proto.graph.node[0]
    assert [(a.name, a.i) for a in gemm.attribute] == [("transB", 1)]
    ends = {}
    for end in (*proto.graph.input, *proto.graph.output):
        ends[end.name] = [d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim]
    assert ends == {"X": ["batch", 4], "Z": ["batch", 2]}
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 13)]
    assert (proto.producer_name, proto.producer_version) == ("anyarray_linear", __version__)


def test_the_metadata_is_json():
    metadata = {"classes": ["cat", "\u732b", "\u00e9"], "features": None, "scale": [0.5, 1e300]}
    proto = to_onnx(layer(2, 3), metadata=metadata)
    assert {p.key: json.loads(p.value) for p in proto.metadata_props} == {
        "classes": metadata["classes"], "scale": metadata["scale"],
    }  # fmt: skip


def test_a_file_is_exported_as_the_model_in_it(tmp_path):
    model = Sequential(layer(4, 3), Tanh(), layer(3, 2))
    save_model(model, tmp_path / "m", metadata={"classes": ["a", "b"]})
    assert file_to_onnx(tmp_path / "m", softmax=True) == to_onnx(model, softmax=True, metadata={"classes": ["a", "b"]})
    export_onnx(model, tmp_path / "x.onnx", metadata={"classes": ["a", "b"]})
    assert onnx.load(str(tmp_path / "x.onnx")) == file_to_onnx(tmp_path / "m")


def test_a_float16_file_is_exported_where_no_layer_computes_in_float16(tmp_path):
    model = layer(4, 3, dtype="float16")
    save_model(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="float16"):
        load_model(tmp_path / "m")
    assert file_to_onnx(tmp_path / "m") == to_onnx(model)


def test_a_checkpoint_is_exported_without_the_state_of_its_run(tmp_path):
    from anyarray_linear import SGD

    model = Sequential(layer(4, 3))
    path = save_checkpoint(tmp_path, model, SGD(0.1), state={"history": [1, 2, 3]})
    assert file_to_onnx(path) == to_onnx(model)


def test_the_doctests():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


class Doubled(Linear):
    """A layer of a user's own, which computes something else."""

    def __call__(self, X):
        return 2 * super().__call__(X)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Sequential(Linear(2, 3), Doubled(3, 2)), r"layer 1 is Doubled\(\), which has no operator in ONNX"),
        (Sequential(ReLU()), "the model has no Linear layer"),
        (Sequential(), "the model has no Linear layer"),
        (Sequential(Linear(2, 3), ReLU(), Linear(4, 2)), "layer 2 takes 4 features, but the one before it gives 3"),
        (Sequential(layer(2, 3), layer(3, 2, dtype="float64")), "the layers are of more than one dtype: 0.weight is float32, 1.weight is float64"),
    ],
)
def test_what_onnx_cannot_express_is_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=f"m: {message}"):
        file_to_onnx(tmp_path / "m")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^model is a str; give an object such as"):
        export_onnx("model.onnx", Linear(1, 1))


def test_more_classes_than_outputs_are_refused():
    with pytest.raises(ValueError, match="metadata names 2 classes, but the model has 3 outputs"):
        to_onnx(layer(2, 3), metadata={"classes": ["a", "b"]})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 12}, ValueError, "opset is 12; give 13 to "),
        ({"opset": 1000}, ValueError, "opset is 1000; give 13 to [0-9]+, the newest that onnx "),
        ({"opset": "13"}, TypeError, "opset is '13', a str; give an int"),
        ({"batch_axes": -1}, ValueError, "batch_axes is -1; give 0 or more"),
        ({"batch_axes": None}, TypeError, "batch_axes is None, a NoneType; give an int"),
    ],
)
def test_options_that_make_no_sense_are_named(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        to_onnx(layer(2, 3), **options)
    save_model(layer(2, 3), tmp_path / "m")
    with pytest.raises(error, match=f"^{message}"):
        file_to_onnx(tmp_path / "m", **options)


def test_a_model_beyond_the_limit_of_the_format_is_refused_before_it_is_copied(monkeypatch):
    big = Linear(2, 3)
    big.W = np.broadcast_to(np.float32(0), (30_000, 20_000))
    monkeypatch.setattr(module, "weights_of", lambda model: {"weight": model.W, "bias": np.zeros(30_000, "float32")})
    with pytest.raises(ValueError, match="the weights have 2,400,120,000 bytes, but an ONNX file holds less than 2 GiB"):
        to_onnx(big)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "anyarray_linear", "export", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, check=False,
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """A folder with a classifier, and a regression."""
    (tmp_path / "run").mkdir()
    model = Sequential(layer(4, 3), ReLU(), layer(3, 2))
    save_model(model, tmp_path / "run" / "model.safetensors", metadata={"classes": ["a", "b"], "features": list("wxyz")})
    save_model(layer(2, 1), tmp_path / "numbers.safetensors", metadata={"classes": None})
    return tmp_path


def test_the_command_writes_the_file_and_says_so(saved):
    done = command("run", "--softmax", cwd=saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run/model.onnx: X (batch, 4) -> P (batch, 2), opset 13\n"
    proto = onnx.load(str(saved / "run" / "model.onnx"))
    assert {p.key: json.loads(p.value) for p in proto.metadata_props} == {"classes": ["a", "b"], "features": list("wxyz")}
    assert run(proto, np.ones((2, 4), "float32")).sum(axis=1) == pytest.approx([1, 1])
    assert command("run/model.safetensors", "other.onnx", cwd=saved).stdout.startswith("other.onnx: X (batch, 4) -> Z")
    assert "new.onnx: X (batch, 4) -> Z (batch, 2)" in command("run", "new.onnx", "--labels", cwd=saved).stdout
    assert [end.name for end in onnx.load(str(saved / "new.onnx")).graph.output] == ["Z", "label"]
    assert command("run", "new.onnx", "--opset", "18", cwd=saved).stdout.endswith("opset 18\n")
    assert [o.version for o in onnx.load(str(saved / "new.onnx")).opset_import] == [18]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: nothing: No such file or directory"),
        (["junk"], "error: junk is damaged: it is cut short, or no safetensors file"),
        (["run", "run/model.safetensors"], "OUT.onnx: it is the file that is read; give another one"),
        (["run", "nowhere/x.onnx"], "No such file or directory"),
        (["run", "run"], "this is no file to be replaced, but a folder; give the name of a file"),
        (["numbers.safetensors", "--labels"], "--labels: numbers.safetensors has no classes, it predicts numbers"),
        (["numbers.safetensors", "--softmax"], "--softmax: numbers.safetensors has no classes, it predicts numbers"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(saved, arguments, message):
    (saved / "junk").write_bytes(b"no model")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    done = command(*arguments, cwd=saved)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_without_the_package_the_command_says_what_to_install(saved):
    code = "import sys; sys.modules['onnx'] = None; sys.argv = ['x', 'export', 'run']; from anyarray_linear.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=saved, check=False)
    assert done.returncode == 2
    assert done.stderr == 'error: exporting needs the onnx package; pip install "anyarray_linear[onnx]"\n'
