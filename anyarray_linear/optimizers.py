"""Optimizers: SGD, Adam and AdamW, with PyTorch's definitions.

A rule is a few lines of Array API code that turn a parameter, its gradient and its moments into the new ones. Around the
rules there is one `step` for all of them: check, clip, update, and only then assign, so that nothing is half done when
something is wrong. Hyper-parameters are Python floats: a NumPy scalar would turn float32 arrays into float64 ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .arrays.checks import check_alike, check_array, check_place, check_shape, describe, surely_alike
from .arrays.device import Device
from .arrays.pickling import pin, unpin
from .arrays.place import Array, Namespace, computing_on, dtype_name
from .lanes import lane
from .protocol import join, leaves, stored_gradients
from .schedules import _real

Moments = dict[str, Array]
Places = Mapping[str, tuple[Any, str]]
"""Where each parameter lives: by its full name, its layer and attribute."""


class _Last:
    """What an optimizer's last step found and left: a model that is still as it was need not be checked again."""

    def __init__(self, model: Any, leaves: list[tuple[str, Any]], places: Places) -> None:
        self.model, self.leaves, self.places = model, leaves, places
        self.parameters: list[Array] = []

    def now(self) -> list[Array]:
        """The parameters, as the layers have them."""
        return [getattr(layer, p) for layer, p in self.places.values()]

    def surely_fits(self, model: Any, gradients: Any) -> bool:
        """Whether a glance tells that nothing was assigned since, and that these are the gradients."""
        if model is not self.model or type(gradients) is not dict or len(gradients) != len(self.places):
            return False
        if leaves(model) != self.leaves:
            return False
        for name, W, W_now in zip(self.places, self.parameters, self.now(), strict=True):
            dW: Array = gradients.get(name)
            if W is not W_now or not surely_alike(dW, W) or dW.shape != W.shape:
                return False
        return True


class _Optimizer:
    """What all rules share: the learning rate, clipping, the moments, and the step."""

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The names of the running means that each parameter has."""
        return ()

    def __init__(self, lr: float | Callable[[int], float], weight_decay: float, clip_norm: float | None) -> None:
        self.lr = lr if callable(lr) else _real("lr", lr)
        self.weight_decay = _real("weight_decay", weight_decay)
        self.clip_norm = None if clip_norm is None else _real("clip_norm", clip_norm)
        if self.clip_norm == 0:
            raise ValueError("clip_norm is 0, which would stop all training; give a norm greater than 0, or None")
        self.steps = 0
        self._model: Any = None
        self._moments: dict[str, Moments] = {}
        self._last: _Last | None = None

    def _update(
        self, xp: Namespace, W: Array, dW: Array, moments: Moments, lr: float, t: int
    ) -> tuple[Array, Moments]:
        """The new parameter and moments at step `t`, counted from 1; writes to none of its arguments."""
        raise NotImplementedError

    def learning_rate(self, step: int | None = None) -> float:
        """The learning rate of `step`, counted from 0; by default of the step that comes next."""
        lr = self.lr(self.steps if step is None else step) if callable(self.lr) else self.lr
        return _real("lr", lr)

    def step(self, model: Any, grads: Mapping[str, Array] | None = None, *, where: Array | None = None) -> None:
        """Update every parameter of `model` once.

        model: a layer or container; an optimizer belongs to the first one it steps.
        grads: the gradients by parameter name, as `gradients` returns them; by default those that `backward` stored.
        where: a 0-d bool array on the model's device; where it is false, parameters and moments stay as they are (the
        step counts all the same). It lets a step be called off without the host having to look.

        Raises `ValueError` or `TypeError`, before anything is changed, for another model than the first one, and for a
        gradient that is missing, unknown, or of another shape, dtype or device than its parameter, and for a wrong `where`.
        """
        gradients = stored_gradients(model) if grads is None else grads
        last, moments, lr = self._last, self._moments, self.learning_rate()
        if last is None or not last.surely_fits(model, gradients):
            places = self._places(model)
            parameters = {name: getattr(layer, p) for name, (layer, p) in places.items()}
            self._check(parameters, gradients)
            moments = self._checked_moments(parameters)
            last = _Last(model, leaves(model), places)
        if where is not None:
            check_array("where", where)
            check_place("the model", next(iter(gradients.values())), "where", where)
            if where.shape != () or dtype_name(where.dtype) != "bool":
                raise ValueError(f"where is {dtype_name(where.dtype)} of shape {tuple(where.shape)}; it must be a 0-d bool")
        before = self._moments, self.steps
        self._moments, self.steps = moments, self.steps + 1
        try:
            with computing_on(next(iter(gradients.values()))) as xp:
                lane(_apply, xp)(xp, self, last.places, gradients, lr, where)
        except Exception:
            self._moments, self.steps = before
            raise
        self._model, self._last = model, last
        last.parameters = last.now()

    def _places(self, model: Any) -> Places:
        """Where each parameter lives: its layer and attribute."""
        if self._model is not None and model is not self._model:
            raise ValueError(
                f"this {type(self).__name__} belongs to the model it stepped first; make a new optimizer for another model"
            )
        places = {join(name, p): (layer, p) for name, layer in leaves(model) for p in layer.parameters()}
        if not places:
            raise ValueError(f"model is {model!r:.80}, which has no parameters to update")
        return places

    @staticmethod
    def _check(parameters: Mapping[str, Array], gradients: Mapping[str, Array | None]) -> None:
        if not isinstance(gradients, Mapping):
            raise TypeError(f"grads is a {type(gradients).__name__}; pass the second result of model.gradients")
        missing = [name for name in parameters if gradients.get(name) is None]
        if missing:
            raise ValueError(
                f"no gradient for {', '.join(missing)}; call model.backward first, or pass model.gradients' result"
            )
        if len(gradients) != len(parameters):
            unknown = [name for name in gradients if name not in parameters]
            raise ValueError(f"grads has {', '.join(unknown)}, but the parameters are {', '.join(parameters)}")
        first = next(iter(parameters))
        for name, W in parameters.items():
            dW = gradients[name]
            check_alike(first, parameters[first], name, W)
            if not surely_alike(dW, W):
                check_alike(f"the parameter {name}", W, f"the gradient of {name}", dW)
            if dW.shape != W.shape:
                check_shape(f"the gradient of {name}", dW, tuple(W.shape), "the shape of its parameter")

    def _checked_moments(self, parameters: Mapping[str, Array]) -> dict[str, Moments]:
        """The moments, zero at first; those of a loaded state where the parameters are."""
        if not self._moments:
            return {name: self._zeros(W) for name, W in parameters.items()}
        if self._model is not None:
            self._check_unchanged(parameters)
            return self._moments
        if set(self._moments) != set(parameters):
            raise ValueError(
                f"the loaded state is for {', '.join(self._moments)}, but the model has {', '.join(parameters)}"
            )
        loaded: dict[str, Moments] = {}
        for name, W in parameters.items():
            place = Device.of(W)
            loaded[name] = {m: place.asarray(moment, dtype=W.dtype) for m, moment in self._moments[name].items()}
            for m, moment in loaded[name].items():
                check_shape(f"the loaded {m} of {name}", moment, tuple(W.shape), "the shape of its parameter")
        return loaded

    def _check_unchanged(self, parameters: Mapping[str, Array]) -> None:
        if self._moments.keys() != parameters.keys():
            were, are = ", ".join(self._moments), ", ".join(parameters)
            raise ValueError(f"the model's parameters were {were} and now are {are}; make a new optimizer")
        for name, W in parameters.items():
            for moment in self._moments[name].values():
                if moment.shape != W.shape or moment.dtype != W.dtype or type(moment) is not type(W):
                    was, now = (f"{describe(x)}, {dtype_name(x.dtype)} of shape {tuple(x.shape)}" for x in (moment, W))
                    raise ValueError(f"{name} was {was}, and now is {now}; make a new optimizer")

    def _zeros(self, W: Array) -> Moments:
        with computing_on(W) as xp:
            return {m: xp.zeros_like(W) for m in self.moment_names}

    # pickle and deepcopy keep the moments on their device, which CuPy's own pickling does not
    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_last": None}
        state.pop("_flat", None)  # a lane's buffers: made anew
        state["_moments"] = {name: {m: pin(x) for m, x in moments.items()} for name, moments in self._moments.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._moments = {name: {m: unpin(x) for m, x in moments.items()} for name, moments in self._moments.items()}

    def _hyperparameters(self) -> dict[str, Any]:
        """The hyper-parameters as a JSON-able dict; an `lr` that is a schedule is not part of it."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "steps"}
        return {name: value for name, value in own.items() if not callable(value)}

    def state_dict(self) -> dict[str, Any]:
        """`{"rule", "steps", "hyperparameters", "moments"}`; the moments are copies, by parameter name, on their device."""
        copies: dict[str, Moments] = {}
        for name, moments in self._moments.items():
            copies[name] = {}
            for m, moment in moments.items():
                with computing_on(moment) as xp:
                    copies[name][m] = xp.asarray(moment, copy=True)
        return {
            "rule": type(self).__name__,
            "steps": self.steps,
            "hyperparameters": self._hyperparameters(),
            "moments": copies,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, here or elsewhere; the moments are moved to the model at the next step.

        Hyper-parameters come with it; a schedule is code and stays as it is. Raises `ValueError` for a state of another
        rule or one that is damaged, and leaves this optimizer as it was.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state is a {type(state).__name__}; pass what state_dict gave")
        own = self._hyperparameters()
        try:
            rule, steps, hyper, moments = (state[k] for k in ("rule", "steps", "hyperparameters", "moments"))
        except KeyError as error:
            raise ValueError(f"state has no {error}; pass what state_dict gave") from error
        if rule != type(self).__name__:
            raise ValueError(f"state is of {rule}, but this optimizer is {type(self).__name__}")
        if not isinstance(steps, int) or not 0 <= steps < 2**63:
            raise ValueError(f"state has steps = {steps!r:.80}; it must be an int >= 0")
        if not isinstance(hyper, Mapping) or not own.keys() - {"lr"} <= hyper.keys():
            raise ValueError(f"state has hyperparameters = {hyper!r:.80}; it needs {', '.join(own)}")
        lr = self.lr if callable(self.lr) else hyper.get("lr", self.lr)
        hyper = {"lr": lr, **{name: hyper[name] for name in own if name != "lr"}}  # what a later version adds is left out
        try:
            loaded = type(self)(**hyper)
        except (TypeError, ValueError) as error:
            raise ValueError(f"state has a wrong hyperparameter: {error}") from error
        if not isinstance(moments, Mapping) or not all(isinstance(moment, Mapping) for moment in moments.values()):
            raise ValueError(f"state has moments = {moments!r:.80}; pass what state_dict gave")
        wrong = [name for name, moment in moments.items() if set(moment) != set(loaded.moment_names)]
        if wrong:
            names = ", ".join(loaded.moment_names) or "none"
            raise ValueError(f"state has the wrong moments for {', '.join(wrong)}; they are {names}")
        vars(self).update(vars(loaded))
        self.steps = steps
        self._moments = {name: dict(moment) for name, moment in moments.items()}
        self._model = self._last = None

    def __repr__(self) -> str:
        lr = "" if not callable(self.lr) else "lr=<schedule>, "
        return f"{type(self).__name__}({lr}{', '.join(f'{k}={v}' for k, v in self._hyperparameters().items())})"


def _apply(
    xp: Namespace,
    optimizer: _Optimizer,
    places: Places,
    gradients: Mapping[str, Array],
    lr: float,
    where: Array | None,
) -> None:
    """Clip, update every parameter and its moments, and assign them."""
    if optimizer.clip_norm is not None:
        gradients = clipped(gradients, optimizer.clip_norm)
    new = {}
    for name, (layer, p) in places.items():
        W, moments = getattr(layer, p), optimizer._moments[name]
        new_W, new_moments = optimizer._update(xp, W, gradients[name], moments, lr, optimizer.steps)
        if where is not None:
            new_W = xp.where(where, new_W, W)
            new_moments = {m: xp.where(where, new_moments[m], moments[m]) for m in moments}
        new[name] = new_W, new_moments
    for name, (layer, p) in places.items():  # only now, when nothing can go wrong any more
        W, optimizer._moments[name] = new[name]
        setattr(layer, p, W)


def clipped(gradients: Mapping[str, Array], clip_norm: float) -> dict[str, Array]:
    """The gradients, scaled so that the norm over all of them together is at most `clip_norm`.

    As `torch.nn.utils.clip_grad_norm_`, its 1e-6 included; the norm stays on the device (Pascanu et al., 2013).

    >>> import numpy as np
    >>> clipped({"W": np.asarray([3.0, 4.0])}, 1.0)["W"].round(3)
    array([0.6, 0.8])
    """
    with computing_on(next(iter(gradients.values()))) as xp:
        norm = xp.sqrt(sum(_sum_of_squares(xp, dW) for dW in gradients.values()))
        scale = xp.minimum(clip_norm / (norm + 1e-6), 1.0)
        return {name: dW * xp.astype(scale, dW.dtype, copy=False) for name, dW in gradients.items()}


def _sum_of_squares(xp: Namespace, dW: Array) -> Array:
    if dtype_name(dW.dtype) == "float16":  # which overflows at a norm of 256
        dW = xp.astype(dW, xp.float32)
    return xp.sum(dW * dW)


class SGD(_Optimizer):
    """Stochastic gradient descent: `V = momentum V + dW`, `W -= lr V`; with `nesterov`, `W -= lr (dW + momentum V)`.

    lr: a float or a schedule, `step -> float`. momentum: at least 0. weight_decay: adds `weight_decay W` to the gradient.
    clip_norm: `None`, or the largest global norm of the gradients. PyTorch's `SGD`, to rounding (Sutskever et al., 2013).

    Raises `TypeError` or `ValueError` for a hyper-parameter out of range.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> layer = Linear.from_arrays(np.asarray([[1.0]]))
    >>> SGD(lr=0.5).step(layer, {"W": np.asarray([[1.0]])})
    >>> layer.W
    array([[0.5]])
    """

    def __init__(
        self,
        lr: float | Callable[[int], float],
        momentum: float = 0,
        nesterov: bool = False,
        weight_decay: float = 0,
        *,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, clip_norm)
        self.momentum = _real("momentum", momentum)
        self.nesterov = bool(nesterov)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum; give momentum=0.9, say")

    @property
    def moment_names(self) -> tuple[str, ...]:
        """`V`, the velocity, with momentum."""
        return ("V",) if self.momentum else ()

    def _update(
        self, xp: Namespace, W: Array, dW: Array, moments: Moments, lr: float, t: int
    ) -> tuple[Array, Moments]:
        if self.weight_decay:
            dW = dW + self.weight_decay * W
        if not self.momentum:
            return W - lr * dW, {}
        V = self.momentum * moments["V"] + dW
        return W - lr * (dW + self.momentum * V if self.nesterov else V), {"V": V}


class Adam(_Optimizer):
    """Adam: running means `M` of the gradient and `V` of its square, corrected for starting at 0 (Kingma and Ba, 2014).

    lr: a float or a schedule, `step -> float`. betas: the two means' memories, each in [0, 1). eps: added to the root.
    weight_decay: adds `weight_decay W` to the gradient (for the decoupled kind see `AdamW`).
    clip_norm: `None`, or the largest global norm of the gradients. PyTorch's `Adam`, to rounding. As there, float16 is not
    for it: squares of gradients below 2e-4 and the default eps are 0 in float16; keep the parameters in float32.

    Raises `TypeError` or `ValueError` for a hyper-parameter out of range.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> layer = Linear.from_arrays(np.asarray([[1.0]]))
    >>> Adam(lr=0.5, eps=0.0).step(layer, {"W": np.asarray([[3.0]])})
    >>> layer.W
    array([[0.5]])
    """

    @property
    def moment_names(self) -> tuple[str, ...]:
        """`M` and `V`, the means of the gradient and of its square."""
        return "M", "V"

    def __init__(
        self,
        lr: float | Callable[[int], float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, clip_norm)
        if isinstance(betas, (str, Mapping)) or not hasattr(betas, "__getitem__") or len(betas) != 2:
            raise ValueError(f"betas is {betas!r}; it must be two numbers, such as (0.9, 0.999)")
        self.betas = _real("betas[0]", betas[0], 0.0, 1.0), _real("betas[1]", betas[1], 0.0, 1.0)
        self.eps = _real("eps", eps)

    def _update(
        self, xp: Namespace, W: Array, dW: Array, moments: Moments, lr: float, t: int
    ) -> tuple[Array, Moments]:
        beta1, beta2 = self.betas
        if self.weight_decay:
            W, dW = self._decayed(W, dW, lr)
        M = beta1 * moments["M"] + (1 - beta1) * dW
        V = beta2 * moments["V"] + (1 - beta2) * (dW * dW)
        # lr (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps), corrections gathered as in their section 2
        root = math.sqrt(1 - beta2**t)
        return W - (lr * root / (1 - beta1**t)) * (M / (xp.sqrt(V) + self.eps * root)), {"M": M, "V": V}

    def _decayed(self, W: Array, dW: Array, lr: float) -> tuple[Array, Array]:
        return W, dW + self.weight_decay * W


class AdamW(Adam):
    """Adam with decoupled weight decay, `W -= lr weight_decay W` beside the step (Loshchilov and Hutter, 2017).

    Arguments as `Adam`, with `weight_decay=1e-2`. PyTorch's `AdamW`, to rounding.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> layer = Linear.from_arrays(np.asarray([[1.0]]))
    >>> AdamW(lr=0.5, weight_decay=1.0).step(layer, {"W": np.asarray([[0.0]])})
    >>> layer.W
    array([[0.5]])
    """

    def __init__(
        self,
        lr: float | Callable[[int], float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, clip_norm=clip_norm)

    def _decayed(self, W: Array, dW: Array, lr: float) -> tuple[Array, Array]:
        return W * (1 - lr * self.weight_decay), dW
