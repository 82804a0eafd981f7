"""Tensors that require grad: torch's graph does not come in, and grows nowhere."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from anyarray_linear import (  # noqa: E402
    Adam,
    Device,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    evaluate,
    fit,
    load_model,
    predict,
    save_model,
    select_device,
    snapshot,
)
from anyarray_linear.protocol import parameters  # noqa: E402

CPU = Device.of(torch.zeros(1))


def model(device=CPU):
    layers = [Linear(3, 4, dtype="float32", device=device, seed=0), ReLU(), Linear(4, 2, dtype="float32", device=device, seed=1)]
    return Sequential(*layers)


@pytest.fixture
def X():
    return torch.arange(48, dtype=torch.float32).reshape(16, 3).div(48).requires_grad_()


def weights(model):
    return [np.asarray(Device.of(W).to_numpy(W)) for W in parameters(model).values()]


def has_no_graph(model):
    return not any(W.requires_grad or W.grad_fn is not None for W in parameters(model).values())


def test_a_training_on_tensors_that_require_grad_is_the_one_on_those_that_do_not(X):
    y, options = torch.arange(16) % 2, {"loss": SoftmaxCrossEntropy(), "epochs": 2, "batch_size": 8, "progress": False}
    a, b = model(), model()
    fit(a, X, y, optimizer=Adam(), validation=(X, y), **options)
    fit(b, X.detach(), y, optimizer=Adam(), **options)
    assert has_no_graph(a)
    assert all(np.array_equal(*pair) for pair in zip(weights(a), weights(b), strict=True))
    assert not predict(a, X).requires_grad
    assert evaluate(a, X, y, loss=SoftmaxCrossEntropy())["loss"] > 0
    fit(model(None), X, y, optimizer=Adam(), **options)  # and where the model is NumPy's
    assert predict(model(None), X).shape == (16, 2)


def test_targets_may_require_grad(X):
    layer = Linear(3, 1, dtype="float32", device=CPU, seed=0)
    y = X.sum(dim=1, keepdim=True)
    fit(layer, X, y, loss=MeanSquaredError(), optimizer=Adam(), epochs=1, batch_size=8, progress=False)
    assert has_no_graph(layer)


def test_a_tensor_is_detached_on_its_way(X):
    for dtype in (None, "float32", "float64"):
        assert not CPU.asarray(X, dtype=dtype).requires_grad
    assert np.array_equal(select_device("cpu").asarray(X), X.detach().numpy())
    assert np.array_equal(CPU.to_numpy(X), X.detach().numpy())
    assert CPU.asarray(X.detach()).data_ptr() == X.data_ptr()  # nothing is copied
    plain = X.detach()
    assert CPU.asarray(plain) is plain


@pytest.mark.filterwarnings("ignore:torch.asarray. unspecified requires_grad")  # the loss of the first step, for nobody
@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda W: W.requires_grad_()])
def test_an_assigned_parameter_grows_no_graph_and_can_be_saved(tmp_path, kind):
    """The graph grew with every step."""
    net, plain, optimizer, other = model(), model(), Adam(), Adam()
    net[0].W = kind(net[0].W.clone())
    X, y, loss = torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), SoftmaxCrossEntropy()
    save_model(net, tmp_path / "m")
    assert not snapshot(net)["0.W"].requires_grad
    assert torch.equal(load_model(tmp_path / "m", device=CPU)[0].W, plain[0].W)
    for step in range(3):
        for each, rule in ((net, optimizer), (plain, other)):
            Z, caches = each.forward(X)
            _, cache = loss.forward(Z, y)
            each.backward(loss.backward(cache), caches)
            rule.step(each)
        assert has_no_graph(net), step
        assert torch.equal(net[0].W, plain[0].W)


def test_a_model_with_an_assigned_parameter_is_trained(X):
    net, plain, y = model(), model(), torch.arange(16) % 2
    net[0].W = torch.nn.Parameter(net[0].W)
    for each in (net, plain):
        fit(each, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=2, batch_size=8, progress=False)
    assert has_no_graph(net)
    assert torch.equal(net[0].W, plain[0].W)
    net[0].W = torch.nn.Parameter(net[0].W)
    fit(net, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=0, progress=False)
    assert predict(net, X).grad_fn is None
    assert torch.is_grad_enabled()


def test_fields_of_records_reach_torch_by_a_copy():
    records = np.zeros(5, dtype=[("a", "i1"), ("b", "f4"), ("c", "f8")])
    records["b"], records["c"] = np.arange(5), -np.arange(5)
    for name in ("b", "c"):
        x = CPU.asarray(records[name])
        assert x.tolist() == records[name].tolist()
    X = np.stack([np.arange(6.0)] * 2).astype([("a", "i1"), ("x", "f4")])["x"].T
    net = Linear(2, 1, dtype="float32", device=CPU)
    fit(net, X, X[:, :1], loss=MeanSquaredError(), optimizer=Adam(), epochs=1, progress=False)
