"""PyTorch at both ends: its weights and tensors here, ours there, and one training step that both take."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import (
    SGD,
    Adam,
    Device,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    load_model,
    save_model,
)

torch = pytest.importorskip("torch")

from running_error import Rounded  # noqa: E402

DTYPES = ["float16", "float32", "float64"]


def network(dtype="float32"):
    """A nested network of PyTorch's with a layer that is shared and one without a bias."""
    torch.manual_seed(0)
    shared = torch.nn.Linear(6, 6)
    inner = torch.nn.Sequential(torch.nn.Linear(6, 9, bias=False), torch.nn.ReLU())
    return torch.nn.Sequential(shared, torch.nn.ReLU(), inner, torch.nn.Linear(9, 6), shared).to(getattr(torch, dtype))


def wrapped(module, shared):
    """That network as one of ours, around the same tensors."""
    if isinstance(module, torch.nn.Sequential):
        return Sequential(*(wrapped(inner, shared) for inner in module))
    if isinstance(module, torch.nn.ReLU):
        return ReLU()
    if module not in shared:
        shared[module] = Linear.from_arrays(module.weight.detach(), None if module.bias is None else module.bias.detach())
    return shared[module]


# ---------------------------------------------------------------------------------------------------------------------
# Weights, by way of files


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_of_pytorch_is_loaded_and_saved_back_bit_for_bit(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    theirs = network(dtype)
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    save_file(before, tmp_path / "theirs")

    zeros = network(dtype)
    for x in zeros.parameters():
        x.data.zero_()
    ours = load_model(tmp_path / "theirs", into=wrapped(zeros, {}))
    save_model(ours, tmp_path / "ours")

    back = load_file(tmp_path / "ours")
    assert back.keys() == before.keys()
    for name, x in before.items():
        assert back[name].dtype == x.dtype
        assert torch.equal(back[name], x), name
        assert x.abs().sum() > 0
    again = network(dtype)
    again.load_state_dict(back, strict=True)
    assert load_model(tmp_path / "ours", device=Device.of(torch.zeros(1)))[0].W.equal(before["0.weight"])
    assert all(x.abs().sum() == 0 for x in zeros.parameters()), "the arrays of the caller were written to"


def stored(folder, module):
    """A file of the module's weights as users of PyTorch write it."""
    from safetensors.torch import save_file

    save_file({name: x.clone() for name, x in module.state_dict().items()}, folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_half_precision_is_exact_in_a_wider_model(tmp_path, narrow, wide):
    theirs = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)).to(getattr(torch, narrow))
    special = torch.tensor([torch.inf, -torch.inf, -0.0, torch.finfo(getattr(torch, narrow)).smallest_normal / 2], dtype=theirs[0].weight.dtype)
    theirs[0].weight.data[0, :4] = special
    ours = load_model(stored(tmp_path, theirs), into=Sequential(Linear(40, 30, dtype=wide), ReLU(), Linear(30, 5, dtype=wide)))
    for i in (0, 2):
        assert ours[i].W.dtype == wide
        expected = theirs[i].weight.detach().to(getattr(torch, wide)).numpy()
        assert ours[i].W.tobytes() == expected.tobytes()
        assert ours[i].b.tobytes() == theirs[i].bias.detach().to(getattr(torch, wide)).numpy().tobytes()


def test_weights_are_rounded_only_if_that_is_asked_for(tmp_path):
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    ours = Sequential(Linear(4, 3, dtype="float32", seed=1))
    before = ours[0].W.copy()
    path = stored(tmp_path, theirs)
    with pytest.raises(ValueError, match=r"0.bias is float64 in the file, but the model is float32, which would round it; .*cast=True"):
        load_model(path, into=ours)
    np.testing.assert_array_equal(ours[0].W, before)
    load_model(path, into=ours, cast=True)
    np.testing.assert_array_equal(ours[0].W, theirs[0].weight.detach().float().numpy())
    theirs[0].weight.data[1, 2] = -1e300
    with pytest.raises(ValueError, match=r"0.weight has values up to 1e\+300, which float32 does not hold"):
        load_model(stored(tmp_path, theirs), into=ours, cast=True)


class Named(torch.nn.Module):
    """A network as people write them."""

    def __init__(self):
        super().__init__()
        self.drop, self.fc1, self.fc2, self.fc10 = torch.nn.Dropout(), torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.head = torch.nn.ModuleDict({"out": torch.nn.Linear(6, 2)})

    def forward(self, X):
        for layer in (self.fc1, self.fc2, self.fc10):
            X = torch.relu(layer(X))
        return self.head["out"](X)


def test_names_say_what_is_what_and_are_suggested_by_the_shapes(tmp_path):
    theirs = Named()
    path = stored(tmp_path, theirs)
    ours = Sequential(Linear(4, 6), ReLU(), Linear(6, 6), ReLU(), Linear(6, 6), ReLU(), Linear(6, 2)).to(dtype="float32")
    with pytest.raises(ValueError, match="by their shapes it could be") as error:
        load_model(path, into=ours)
    names = {"fc1": "0", "fc2": "2", "fc10": "4", "head.out": "6"}
    assert str(names) in str(error.value)
    load_model(path, into=ours, names=names)
    X = torch.randn(5, 4)
    torch.testing.assert_close(torch.from_numpy(ours(X.numpy())), theirs(X).detach())
    with pytest.raises(ValueError, match=r"has no fc3, which names has, only fc1\.bias"):
        load_model(path, into=ours, names={**names, "fc3": "8"})
    with pytest.raises(ValueError, match=r"by names, two tensors of the file are 0\.bias"):
        load_model(path, into=ours, names={**names, "fc2": "0"})
    with pytest.raises(ValueError, match=r"but the model has 0\.weight, 0\.bias$"):  # and nothing is suggested
        load_model(path, into=Sequential(Linear(4, 6, dtype="float32")))
    with pytest.raises(ValueError, match="names and cast are about a model that is there"):
        load_model(path, names=names)


def test_a_single_layer_has_names_too(tmp_path):
    theirs = torch.nn.Linear(3, 2)
    ours = Sequential(Linear(3, 2, dtype="float32"))
    load_model(stored(tmp_path, theirs), into=ours, names={"": "0"})
    np.testing.assert_array_equal(ours[0].W, theirs.weight.detach().numpy())
    bare = Linear(3, 2, dtype="float32")
    load_model(stored(tmp_path, torch.nn.Sequential(theirs)), into=bare, names={"0": ""})
    load_model(stored(tmp_path, torch.nn.Sequential(theirs)), into=bare, names={"0.weight": "weight", "0.bias": "bias"})
    np.testing.assert_array_equal(bare.b[0], theirs.bias.detach().numpy())


def test_modules_without_parameters_do_not_shift_what_is_found(tmp_path):
    nn = torch.nn
    inner = nn.Sequential(nn.Dropout(), nn.Linear(5, 5))
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.2), inner, nn.Identity(), nn.Linear(5, 5), nn.Softmax(-1))
    for _ in range(4):  # then the last has the number 12, which comes after 4 and not before
        theirs.insert(5, nn.Identity())
    ours = Sequential(Linear(4, 5), ReLU(), Sequential(Linear(5, 5), Linear(5, 5))).to(dtype="float32")
    load_model(stored(tmp_path, theirs), into=ours)
    linear = [module for module in theirs.modules() if isinstance(module, nn.Linear)]
    for layer, module in zip((ours[0], ours[2][0], ours[2][1]), linear, strict=True):
        np.testing.assert_array_equal(layer.W, module.weight.detach().numpy())
    with pytest.raises(ValueError, match=r"has 10.bias, 10.weight, 4.1.bias, 4.1.weight, but the model has"):
        load_model(tmp_path / "theirs", into=Sequential(Linear(4, 5), Linear(5, 7), Linear(7, 5)).to(dtype="float32"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_pytorch_is_not_read_and_the_lines_that_convert_it_work(tmp_path, legacy):
    import safetensors.torch

    theirs = network()
    torch.save(theirs.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"m.pt is a .*, which is code and is not read here") as error:
        load_model(tmp_path / "m.pt", into=wrapped(network(), {}))
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(lines) == 2
    exec("\n".join(lines), {"torch": torch, "safetensors": safetensors})
    ours = load_model(tmp_path / "m.safetensors", into=wrapped(network(), {}))
    assert ours[0].W.equal(theirs[0].weight)
    np.savez(tmp_path / "n.npz", W=np.ones(3))
    with pytest.raises(ValueError, match=r"n.npz is damaged: it is cut short, or no safetensors file"):
        load_model(tmp_path / "n.npz")


def test_a_shared_layer_is_taken_by_both_ways_that_pytorch_has_of_reading(tmp_path):
    import safetensors.torch

    ours = wrapped(network(), {})
    save_model(ours, tmp_path / "repeated")
    save_model(ours, tmp_path / "once", repeat_shared=False)
    theirs = network()
    for x in theirs.parameters():
        x.data.zero_()
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "repeated"), strict=True)
    assert theirs[4].weight.equal(ours[4].W)
    theirs[4].weight.data.zero_()
    assert safetensors.torch.load_model(theirs, tmp_path / "once") == (set(), [])
    assert theirs[4].weight.equal(ours[4].W)
    safetensors.torch.save_model(theirs, tmp_path / "theirs")
    for name in ("once", "repeated", "theirs"):
        again = load_model(tmp_path / name, into=wrapped(network(), {}))
        assert again[4] is again[0]
        assert again[0].W.equal(ours[0].W)
    built = load_model(tmp_path / "once")
    assert built[4] is built[0]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_arrays_wraps_tensors_without_a_copy_and_never_writes_to_them(dtype):
    theirs = torch.nn.Linear(3, 2, dtype=getattr(torch, dtype))
    W, b = theirs.weight.detach(), theirs.bias.detach()
    before = W.clone(), b.clone()
    layer = Linear.from_arrays(W, b)
    assert layer.W.data_ptr() == theirs.weight.data_ptr()
    assert layer.b.data_ptr() == theirs.bias.data_ptr()
    assert tuple(layer.b.shape) == (1, 2)

    X = torch.linspace(-1, 1, 12, dtype=W.dtype).reshape(4, 3)
    half = {"rtol": 0.01, "atol": 0.01} if dtype == "float16" else {}
    torch.testing.assert_close(layer(X), theirs(X).detach(), **half)
    for optimizer in (SGD(0.1), SGD(0.1, momentum=0.9), Adam(0.1, eps=1e-3)):
        trained = Linear.from_arrays(W, b)
        for _ in range(2):
            _, cache = trained.forward(X)
            trained.backward(torch.ones((4, 2), dtype=W.dtype), cache)
            optimizer.step(trained)
        assert not torch.equal(trained.W, W)
        assert torch.equal(W, before[0])
        assert torch.equal(b, before[1])


def test_tensors_of_any_strides_and_frozen_parameters_are_taken():
    W = torch.arange(6.0).reshape(3, 2).T
    assert Linear.from_arrays(W)(torch.ones(3)).tolist() == [6, 9]
    frozen = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
    assert Linear.from_arrays(frozen)(torch.ones(3)).tolist() == [3, 3]


def test_tensors_that_do_not_belong_together_are_refused_by_name():
    W = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^W is a torch tensor that requires grad.*pass W\.detach\(\)"):
        Linear.from_arrays(torch.nn.Linear(3, 2).weight)
    with pytest.raises(ValueError, match=r"^b is a torch tensor that requires grad.*pass b\.detach\(\)"):
        Linear.from_arrays(W, torch.nn.Linear(3, 2).bias)
    with pytest.raises(TypeError, match=r"^W is bfloat16, but layers compute in float32 or float64"):
        Linear.from_arrays(W.to(torch.bfloat16))
    with pytest.raises(TypeError, match=r"^b is float64 but W is float32"):
        Linear.from_arrays(W, torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^b is a numpy array on cpu but W is a torch array on cpu"):
        Linear.from_arrays(W, np.ones(2, dtype="float32"))
    with pytest.raises(ValueError, match=r"^b is a torch array on meta but W is a torch array on cpu"):
        Linear.from_arrays(W, torch.ones(2, device="meta"))


# ---------------------------------------------------------------------------------------------------------------------
# DLPack


def test_numpy_and_torch_share_memory_both_ways():
    x, t = np.zeros(3, dtype="float32"), torch.zeros(3)
    here = Device.of(t).from_dlpack(x)
    there = Device.of(x).from_dlpack(t)
    x[0], t[0] = 1, 2
    assert isinstance(here, torch.Tensor)
    assert here[0] == 1
    assert isinstance(there, np.ndarray)
    assert there[0] == 2


@pytest.mark.parametrize("kind", ["numpy", "jax", "torch"])
def test_weights_go_to_torch_without_a_copy(kind):
    if kind == "jax":
        jax = pytest.importorskip("jax")
        place = Device.of(jax.numpy.zeros(1))
    else:
        place = Device.of(np.zeros(1) if kind == "numpy" else torch.zeros(1))
    layer = Linear(3, 2, seed=0, dtype="float32", device=place)
    W = torch.from_dlpack(layer.W)
    back = place.from_dlpack(W)
    assert type(back) is type(layer.W)
    address = {"numpy": lambda x: x.ctypes.data, "torch": lambda x: x.data_ptr(), "jax": lambda x: x.unsafe_buffer_pointer()}
    assert address[kind](layer.W) == W.data_ptr() == address[kind](back)
    assert W.tolist() == layer.W.tolist()


def test_what_torch_does_not_give_is_told_with_the_cure():
    place = Device.of(np.zeros(1))
    with pytest.raises(ValueError, match=r"^x is a torch array on cpu, and cpu cannot share its memory: .*grad.*asarray moves it"):
        place.from_dlpack(torch.ones(2, requires_grad=True))


# ---------------------------------------------------------------------------------------------------------------------
# One training step


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_one_training_step_is_that_of_pytorch_within_the_rounding_bound(dtype, arrays):
    """Forward, loss, backward and SGD: both are within the bound of the exact step on the same numbers."""
    rng, lr, decay = np.random.default_rng(0), 0.5, 0.125
    X, target = (rng.standard_normal((32, n)).astype(dtype) for n in (20, 4))
    theirs = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.ReLU(), torch.nn.Linear(40, 4)).to(getattr(torch, dtype))
    start = {name: x.detach().clone() for name, x in theirs.state_dict().items()}
    convert = (lambda x: x) if arrays == "torch" else (lambda x: x.numpy())
    ours = Sequential(
        Linear.from_arrays(convert(start["0.weight"]), convert(start["0.bias"])), ReLU(),
        Linear.from_arrays(convert(start["2.weight"]), convert(start["2.bias"])),
    )  # fmt: skip

    optimizer = torch.optim.SGD(theirs.parameters(), lr=lr, weight_decay=decay)
    torch.nn.functional.mse_loss(theirs(torch.from_numpy(X)), torch.from_numpy(target)).backward()
    optimizer.step()

    loss = MeanSquaredError()
    Z, caches = ours.forward(convert(torch.from_numpy(X)))
    _, cache = loss.forward(Z, convert(torch.from_numpy(target)))
    ours.backward(loss.backward(cache), caches, needs_dX=False)
    SGD(lr, weight_decay=decay).step(ours)

    exact = step(X, target, {name: x.numpy() for name, x in start.items()}, lr, decay, dtype)
    for name, bound in exact.items():
        layer = ours[int(name[0])]
        mine = np.asarray(layer.W) if name.endswith("weight") else np.asarray(layer.b)[0]
        assert bound.share(mine) <= 1, name
        assert bound.share(theirs.state_dict()[name].numpy()) <= 1, name
        # the bound is of use: a gradient that is wrong by a thousandth is outside
        moved = start[name].numpy() + (mine - start[name].numpy()) * 1.001
        assert bound.share(moved) > 1, name


def step(X, target, start, lr, decay, dtype):
    """The weights after the step, with what an implementation may differ by."""

    def exactly(x):
        return Rounded(x, dtype=dtype)

    W1, b1, W2, b2 = (exactly(start[name]) for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    X, target, ones = exactly(X), exactly(target), exactly(np.ones((1, len(X))))
    Z1 = X @ W1.T + b1
    assert (np.abs(Z1.value) > Z1.error).all(), "the bound holds where rounding cannot move a value across the kink"
    A = Z1.relu()
    D = A @ W2.T + b2 - target
    dZ2 = D * exactly(np.full(D.value.shape, 2 / D.value.size))
    dZ1 = dZ2 @ W2 * exactly((Z1.value > 0).astype(float))
    gradients = {"0.weight": dZ1.T @ X, "0.bias": ones @ dZ1, "2.weight": dZ2.T @ A, "2.bias": ones @ dZ2}
    new = {}
    for name, gradient in gradients.items():
        W = exactly(start[name].reshape(gradient.value.shape))
        new[name] = W - (gradient + W * exactly(np.full(W.value.shape, decay))) * exactly(np.full(W.value.shape, lr))
        new[name] = Rounded(new[name].value.reshape(start[name].shape), new[name].error.reshape(start[name].shape), dtype)
    return new
