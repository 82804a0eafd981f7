"""What layers and optimizers are, and the names of parameters: all that training, files and containers know of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from .arrays.checks import check_alike, check_array, check_object, check_shape, describe
from .arrays.device import Device
from .arrays.place import Array, Namespace, computing_on, dtype_name, is_array


@runtime_checkable
class Layer(Protocol):
    """What every layer and container offers; write a class with these methods and it works everywhere here.

    State for backward travels in the cache that `forward` returns, never on the layer. A parameter called `p` is the
    attribute `p`, and its stored gradient the attribute `dp`; what is `None` is in neither `parameters` nor `gradients`.

    What a layer may have besides:

    - `state()`: what is not trained but changes, as `{"running_mean": array, "step": 3}`, arrays and Python ints. A state
      called `s` is the attribute `s`. It goes into files and checkpoints, so that training goes on exactly as it would have.
    - `trainable = False`: its parameters get no gradient and no update, and stay in files.
    - `takes = "ids"`: its input is integers, which training does not cast.
    - `config()`: what its constructor needs, as JSON can hold it; then `load_model(path, classes=[...])` can build it.
    """

    def forward(self, X: Array, /) -> tuple[Array, Any]:
        """`(Z, cache)`: the output, and what `gradients` will need."""
        ...

    def gradients(self, dZ: Array, cache: Any, /, *, needs_dX: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """`(dX, {"W": dW, ...})`, storing nothing; `dX` is `None` where it was not asked for."""
        ...

    def backward(self, dZ: Array, cache: Any, /, *, accumulate: bool = False, needs_dX: bool = True) -> Array | None:
        """`dX`; the parameters' gradients are stored on the layer, or added to what is stored there."""
        ...

    def parameters(self) -> dict[str, Array]:
        """The parameters by name."""
        ...

    def to(self, device: Any = None, dtype: Any = None) -> Layer:
        """The layer on another device or in another dtype."""
        ...

    def __call__(self, X: Array, /) -> Array:
        """`Z`, for inference: no cache."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """What every optimizer offers; write a class with these methods and `fit` trains with it.

    The methods for checkpoints and groups are only called where there is one. For float16 models, `step` also takes `scale`,
    a 0-d float32 array, by which the gradients are too large.
    """

    steps: int
    """How many steps were taken."""

    def step(self, model: Any, grads: Mapping[str, Array] | None = None, /, *, where: Array | None = None) -> None:
        """Update every parameter of `model` once, by its gradients; nothing where `where`, a 0-d bool array, is false."""
        ...

    def learning_rate(self, step: int | None = None, /) -> float:
        """The learning rate of `step`, counted from 0; by default of the step that comes next."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """`{"rule", "steps", "hyperparameters", "moments"}`, the moments by parameter name and then by their own."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from what `state_dict` gave."""
        ...


def leaves(model: Any) -> list[tuple[str, Any]]:
    """The layers of `model` that are no containers, each distinct object once, by name; a bare layer's name is `""`."""
    return list(model.leaves()) if hasattr(model, "leaves") else [("", model)]


def outputs(xp: Namespace, model: Any, X: Array, rows: float, step: Any = None) -> Array:
    """What `model` gives for a batch in inference, `model(X)`, as an operation that a lane may replace.

    rows: how many there are in all, of which `X` has some. step: the `TrainingStep` that is validated, if one is.
    """
    return model(X)


def join(*names: str) -> str:
    """The name of something inside something: `join("0", "W")` is `"0.W"`, `join("", "W")` is `"W"`.

    >>> join("1", "0", "W"), join("", "W")
    ('1.0.W', 'W')
    """
    return ".".join(filter(None, names))


def check_model(model: Any, name: str = "model") -> None:
    """Raise `TypeError` for what is no layer and no container, such as its class, or a model of another library."""
    check_object(name, model, ("forward", "gradients", "parameters", "__call__"), "Sequential(Linear(4, 3), ReLU())")


def check_loss(loss: Any) -> None:
    """Raise `TypeError` for what is no loss."""
    check_object("loss", loss, ("forward", "backward"), "SoftmaxCrossEntropy()")


def check_optimizer(optimizer: Any) -> None:
    """Raise `TypeError` for what is no optimizer."""
    check_object("optimizer", optimizer, ("step", "learning_rate"), "Adam(lr=1e-3)")


def parameters(model: Any) -> dict[str, Array]:
    """Every parameter of `model` once, by its full name."""
    return {join(name, p): value for name, layer in leaves(model) for p, value in layer.parameters().items()}


def trained(model: Any) -> list[tuple[str, Any]]:
    """The leaves of `model` whose parameters are trained: all but those with `trainable = False`."""
    return [(name, layer) for name, layer in leaves(model) if getattr(layer, "trainable", True)]


def is_trained(layer: Any) -> bool:
    """Whether a layer or container has parameters that are trained."""
    return any(leaf.parameters() for _, leaf in trained(layer))


def stored_gradients(model: Any) -> dict[str, Array | None]:
    """What `backward` stored for every trained parameter of `model`, by its full name; `None` where nothing is."""
    return {join(name, p): getattr(layer, f"d{p}") for name, layer in trained(model) for p in layer.parameters()}


def store_gradients(model: Any, gradients: Mapping[str, Array], *, accumulate: bool = False) -> None:
    """Set the attribute `dp` of every parameter `p` of `model`, or add to it; nothing is set if anything is wrong.

    Adding makes a new array: whoever holds the old gradient keeps its values.
    """
    new = []
    for name, layer in trained(model):
        for p in layer.parameters():
            gradient = gradients.get(join(name, p))
            if gradient is None:
                raise ValueError(
                    f"gradients has no {join(name, p)}, only {', '.join(gradients) or 'nothing'}; a layer's gradients "
                    "must have every name that its parameters has"
                )
            if accumulate and (stored := getattr(layer, f"d{p}", None)) is not None:
                attribute = join(name, f"d{p}")
                check_alike(f"the new {attribute}", gradient, attribute, stored)
                check_shape(attribute, stored, tuple(gradient.shape), "as its parameter")
                with computing_on(gradient):
                    gradient = stored + gradient
            new.append((layer, f"d{p}", gradient))
    for layer, attribute, gradient in new:
        setattr(layer, attribute, gradient)


def state_of(layer: Any) -> dict[str, Any]:
    """What `layer` has that is not trained but belongs to it, by name: arrays and Python ints."""
    own = getattr(layer, "state", None)
    return dict(own()) if callable(own) else {}


def states(model: Any) -> dict[str, Any]:
    """The state of every layer of `model` once, by its full name."""
    return {join(name, s): value for name, layer in leaves(model) for s, value in state_of(layer).items()}


def snapshot(model: Any) -> dict[str, Any]:
    """Copies of all parameters and states of `model`, by full name, where they are; `restore` puts them back.

    An optimizer may write to a layer's arrays, so a kept `layer.W` may change with training; what this returns does not.

    >>> from anyarray_linear import Linear
    >>> layer = Linear(2, 1, init="zeros")
    >>> kept = snapshot(layer)
    >>> layer.W += 1.0
    >>> restore(layer, kept)
    >>> layer.W
    array([[0., 0.]])
    """
    check_model(model)
    return {name: _copy(x) for name, x in {**parameters(model), **states(model)}.items()}


def restore(model: Any, weights: Mapping[str, Any]) -> None:
    """Set all parameters and states of `model` to what `snapshot` returned for it, or for another model like it.

    weights: stays as it is: copies are set, where the model is. An optimizer goes on from there with the moments it has.

    Raises `ValueError` or `TypeError` for names, shapes or dtypes that are not the model's, and changes nothing then.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is {describe(weights)}; pass what snapshot(model) returned")
    now = {**parameters(model), **states(model)}
    if weights.keys() != now.keys():
        theirs, ours = ", ".join(weights) or "nothing", ", ".join(now) or "nothing"
        raise ValueError(f"weights has {theirs}, but the model has {ours}; pass a snapshot of this model")
    new = []
    for name, layer in leaves(model):
        for p in (*layer.parameters(), *state_of(layer)):
            full = join(name, p)
            value, here = weights[full], now[full]
            if is_array(here):
                check_array(f"weights[{full!r}]", value)
                check_shape(f"weights[{full!r}]", value, tuple(here.shape), "the shape in the model")
                if dtype_name(value.dtype) != dtype_name(here.dtype):
                    was, wanted = dtype_name(value.dtype), dtype_name(here.dtype)
                    raise TypeError(f"weights[{full!r}] is {was}, but the model needs {wanted}")
                value = Device.of(here).asarray(_copy(value))
            new.append((layer, p, value))
    for layer, p, value in new:
        setattr(layer, p, value)


def restore_states(model: Any, weights: Mapping[str, Any]) -> None:
    """Set the states of `model` alone to what a `snapshot` of it has."""
    for name, layer in leaves(model):
        for s in state_of(layer):
            setattr(layer, s, _copy(weights[join(name, s)]))


def _copy(x: Any) -> Any:
    if not is_array(x):
        return x
    with computing_on(x) as xp:
        return xp.asarray(Device.of(x).asarray(x), copy=True)  # without a graph of torch's
