"""Optimizers: SGD, Adam and AdamW, with PyTorch's definitions.

A rule is a few lines of Array API code that turn a parameter, its gradient and its moments into the new ones, and the Python
floats that these lines take, worked out once per step. What binds an optimizer to a model is in `binding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .arrays.checks import check_array, check_place
from .arrays.numbers import real
from .arrays.pickling import pin, unpin
from .arrays.place import Array, Namespace, computing_on, dtype_name, place_of
from .binding import MASTER, Binding, Moments, up_to_date
from .clipping import clipped, unscaled
from .protocol import stored_gradients


class _Real:
    """A hyper-parameter that is a real number in `[0, below)`: checked, and made a Python float, when assigned."""

    def __init__(self, below: float = math.inf) -> None:
        self.below = below

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    if TYPE_CHECKING:  # it is read by its name, which costs each step less

        def __get__(self, optimizer: Any, owner: type | None = None) -> Any: ...

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer.__dict__[self.name] = self.checked(value)

    def checked(self, value: Any) -> Any:
        return real(self.name, value, below=self.below)


class _Rate(_Real):
    """A learning rate: a number, or a schedule."""

    def checked(self, value: Any) -> Any:
        return value if callable(value) else super().checked(value)


class _Norm(_Real):
    """The norm to clip at: a number above 0, or `None`."""

    def checked(self, value: Any) -> Any:
        if value is None:
            return None
        norm = super().checked(value)
        if norm == 0:
            raise ValueError("clip_norm is 0, which would stop all training; give a norm greater than 0, or None")
        return norm


class _Betas(_Real):
    """The memories of two running means."""

    def checked(self, value: Any) -> Any:
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__getitem__") or len(value) != 2:
            raise ValueError(f"betas is {value!r}; it must be two numbers, such as (0.9, 0.999)")
        return real("betas[0]", value[0], 0.0, 1.0), real("betas[1]", value[1], 0.0, 1.0)


class Rule:
    """What all rules share: the learning rate, clipping, the moments, and the step.

    A rule of one's own gives `moment_names`, `scalars` and `update`.
    """

    lr = _Rate()
    weight_decay = _Real()
    clip_norm = _Norm()

    def __init__(self, lr: float | Callable[[int], float], weight_decay: float, clip_norm: float | None) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.steps = 0
        self.bound: Binding | None = None
        self._loaded: dict[str, Moments] = {}  # moments of a state that has no model yet
        self._model: Any = None

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The names of the running means that each parameter has."""
        return ()

    def scalars(self, lr: float, t: int) -> Any:
        """What `update` takes at step `t`, counted from 1, with the learning rate `lr`: a tuple of Python numbers."""
        raise NotImplementedError

    def update(self, xp: Namespace, W: Array, dW: Array, moments: Moments, by: Any) -> tuple[Array, Moments]:
        """The new parameter and moments, with `by` of `scalars`; writes to none of its arguments."""
        raise NotImplementedError

    def learning_rate(self, step: int | None = None) -> float:
        """The learning rate of `step`, counted from 0; by default of the step that comes next."""
        lr = self.lr
        return real("lr", lr(self.steps if step is None else step)) if callable(lr) else lr

    def step(
        self,
        model: Any,
        grads: Mapping[str, Array] | None = None,
        *,
        where: Array | None = None,
        scale: Array | None = None,
    ) -> None:
        """Update every parameter of `model` once.

        Of float16 parameters, the optimizer keeps float32 *masters*: the rule runs on those, with moments in float32, and
        the layer gets their values rounded to float16. An element of a parameter that is not its master's, rounded, was
        assigned by somebody, and is the new master.

        model: a layer or container; an optimizer belongs to the first one it steps.
        grads: the gradients by parameter name, as `gradients` returns them; by default those that `backward` stored.
        where: a 0-d bool array on the model's device; where it is false, parameters and moments stay as they are (the
        step counts all the same). It lets a step be called off without the host having to look.
        scale: by how much the gradients are too large, a 0-d float32 array on the model's device, as `LossScale` has it.
        Gradients of float16 parameters may be float16 or float32.

        Raises `ValueError` or `TypeError`, before anything is changed, for another model than the first one, and for a
        gradient that is missing, unknown, or of another shape, dtype or device than its parameter, and for a wrong `where`
        or `scale`.
        """
        gradients = stored_gradients(model) if grads is None else grads
        by = self.scalars(self.learning_rate(), self.steps + 1)
        bound = self.bind(model, gradients)
        if where is not None and (place_of(where) is not bound.switch_place or where.shape != ()):
            check_array("where", where)
            check_place("the model", bound.parameters[0], "where", where)
            if where.shape != () or dtype_name(where.dtype) != "bool":
                raise ValueError(f"where is {dtype_name(where.dtype)} of shape {tuple(where.shape)}; it must be a 0-d bool")
            bound.switch_place = place_of(where)
        if scale is not None:
            check_array("scale", scale)
            check_place("the model", bound.parameters[0], "scale", scale)
            if scale.shape != () or dtype_name(scale.dtype) != "float32":
                kind = f"{dtype_name(scale.dtype)} of shape {tuple(scale.shape)}"
                raise ValueError(f"scale is {kind}; it must be a 0-d float32, as LossScale has it")
        with bound.place.without_graph():
            bound.place.run(apply_update, self, bound, gradients, by, where, scale)
        self.stepped(model, bound)

    def bind(self, model: Any, gradients: Mapping[str, Array | None] | None = None) -> Binding:
        """What binds this optimizer to `model`, as the model is now: parameters that were assigned since are in it.

        gradients: if given, checked against the parameters. Nothing is changed until the step is applied. Raises as `step`.
        """
        bound = self.bound
        if self._model is not None and model is not self._model:
            raise ValueError(
                f"this {type(self).__name__} belongs to the model it stepped first; make a new optimizer for another model"
            )
        if bound is None:
            bound = Binding.first(model, self.moment_names, self._loaded)
        elif not bound.is_as_left(self.moment_names):
            bound = bound.anew(self.moment_names)
        if gradients is not None:
            bound.check(gradients)
        return bound

    def stepped(self, model: Any, bound: Binding) -> None:
        """A step was taken: `bound`, of `bind`, is as it left parameters and moments."""
        self.bound, self._model, self._loaded = bound, model, {}
        self.steps += 1
        bound.remember()

    def moments(self) -> dict[str, Moments]:
        """The running means of each parameter, by its name; themselves, not copies. Empty before the first step.

        Of a float16 parameter, its `"master"` is among them, the weights in float32.
        """
        return self._loaded if self.bound is None else self.bound.moments

    # pickle and deepcopy keep the moments on their device, which CuPy's own pickling does not
    def __getstate__(self) -> dict[str, Any]:
        moments = {name: {m: pin(x) for m, x in own.items()} for name, own in self.moments().items()}
        return {**vars(self), "bound": None, "_loaded": moments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._loaded = {name: {m: unpin(x) for m, x in own.items()} for name, own in self._loaded.items()}

    def hyperparameters(self) -> dict[str, Any]:
        """The hyper-parameters as a JSON-able dict; an `lr` that is a schedule is not part of it."""
        own = {name: value for name, value in vars(self).items() if name not in ("steps", "bound") and name[0] != "_"}
        return {name: value for name, value in own.items() if not callable(value)}

    def state_dict(self) -> dict[str, Any]:
        """`{"rule", "steps", "hyperparameters", "moments"}`; the moments are copies, by parameter name, on their device."""
        copies: dict[str, Moments] = {}
        names = *self.moment_names, MASTER  # a momentum that was switched off has left its own
        for name, moments in self.moments().items():
            copies[name] = {}
            for m, moment in [(m, moments[m]) for m in names if m in moments]:
                with computing_on(moment) as xp:
                    copies[name][m] = xp.asarray(moment, copy=True)
        return {
            "rule": type(self).__name__,
            "steps": self.steps,
            "hyperparameters": self.hyperparameters(),
            "moments": copies,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, here or elsewhere; the moments are moved to the model at the next step.

        Hyper-parameters come with it; a schedule is code and stays as it is. Raises `ValueError` for a state of another
        rule or one that is damaged, and leaves this optimizer as it was.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state is a {type(state).__name__}; pass what state_dict gave")
        own = self.hyperparameters()
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
        wrong = [name for name, moment in moments.items() if set(moment) - {MASTER} != set(loaded.moment_names)]
        if wrong:
            names = ", ".join(loaded.moment_names) or "none"
            raise ValueError(f"state has the wrong moments for {', '.join(wrong)}; they are {names}")
        vars(self).update(vars(loaded))
        self.steps = steps
        self._loaded = {name: dict(moment) for name, moment in moments.items()}

    def __repr__(self) -> str:
        lr = "" if not callable(self.lr) else "lr=<schedule>, "
        return f"{type(self).__name__}({lr}{', '.join(f'{k}={v}' for k, v in self.hyperparameters().items())})"


def apply_update(
    xp: Namespace,
    optimizer: Rule,
    bound: Binding,
    gradients: Mapping[str, Array],
    by: Any,
    where: Array | None,
    scale: Array | None = None,
) -> None:
    """Clip, update every parameter and its moments, and assign them; float16 parameters by way of their masters."""
    if optimizer.clip_norm is not None:
        gradients = {name: unscaled(xp, dW, scale) for name, dW in gradients.items()}
        gradients, scale = clipped(gradients, optimizer.clip_norm), None
    new = {}
    for name, (layer, p) in bound.slots.items():
        W, moments = getattr(layer, p), bound.moments[name]
        exact = up_to_date(xp, moments[MASTER], W) if bound.is_half else W
        new_W, new_moments = optimizer.update(xp, exact, unscaled(xp, gradients[name], scale), moments, by)
        if where is not None:
            new_W = xp.where(where, new_W, exact)
            new_moments = {m: xp.where(where, new_moments[m], moments[m]) for m in new_moments}
        if bound.is_half:
            new_moments, new_W = {**new_moments, MASTER: new_W}, xp.astype(new_W, W.dtype)
        new[name] = new_W, new_moments
    bound.assign(new)  # only now, when nothing can go wrong any more


class SGDScalars(NamedTuple):
    """What one step of `SGD` takes."""

    lr: float
    momentum: float
    nesterov: bool
    decay: float


class SGD(Rule):
    """Stochastic gradient descent: `V = momentum V + dW`, `W -= lr V`; with `nesterov`, `W -= lr (dW + momentum V)`.

    lr: a float or a schedule, `step -> float`. momentum: at least 0. weight_decay: adds `weight_decay W` to the gradient.
    clip_norm: `None`, or the largest global norm of the gradients. PyTorch's `SGD`, to rounding (Sutskever et al., 2013).

    Raises `TypeError` or `ValueError` for a hyper-parameter out of range, also when it is assigned later.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> layer = Linear.from_arrays(np.asarray([[1.0]]))
    >>> SGD(lr=0.5).step(layer, {"W": np.asarray([[1.0]])})
    >>> layer.W
    array([[0.5]])
    """

    momentum = _Real()

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
        self.momentum = momentum
        self.nesterov = bool(nesterov)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum; give momentum=0.9, say")

    @property
    def moment_names(self) -> tuple[str, ...]:
        """`V`, the velocity, with momentum."""
        return ("V",) if self.momentum else ()

    def scalars(self, lr: float, t: int) -> SGDScalars:
        """Nothing changes from step to step but the rate."""
        return SGDScalars(lr, self.momentum, self.nesterov, self.weight_decay)

    def update(self, xp: Namespace, W: Array, dW: Array, moments: Moments, by: SGDScalars) -> tuple[Array, Moments]:
        """The rule."""
        if by.decay:
            dW = dW + by.decay * W
        if not by.momentum:
            return W - by.lr * dW, {}
        V = by.momentum * moments["V"] + dW
        return W - by.lr * (dW + by.momentum * V if by.nesterov else V), {"V": V}


class AdamScalars(NamedTuple):
    """What one step of `Adam` takes; `rest1` is `1 - beta1`, and rate and eps carry the corrections of the means."""

    rate: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    eps: float
    decay: float
    shrink: float


class Adam(Rule):
    """Adam: running means `M` of the gradient and `V` of its square, corrected for starting at 0 (Kingma and Ba, 2014).

    lr: a float or a schedule, `step -> float`. betas: the two means' memories, each in [0, 1). eps: added to the root.
    weight_decay: adds `weight_decay W` to the gradient (for the decoupled kind see `AdamW`).
    clip_norm: `None`, or the largest global norm of the gradients. PyTorch's `Adam`, to rounding.

    Raises `TypeError` or `ValueError` for a hyper-parameter out of range, also when it is assigned later.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> layer = Linear.from_arrays(np.asarray([[1.0]]))
    >>> Adam(lr=0.5, eps=0.0).step(layer, {"W": np.asarray([[3.0]])})
    >>> layer.W
    array([[0.5]])
    """

    betas = _Betas()
    eps = _Real()
    decoupled: ClassVar[bool] = False
    """Whether weight decay acts on the weights themselves and not by way of the gradient."""

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
        self.betas = betas
        self.eps = eps

    def scalars(self, lr: float, t: int) -> AdamScalars:
        """`lr (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps)`, corrections gathered as in their section 2."""
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**t)
        decay, shrink = (0.0, 1 - lr * self.weight_decay) if self.decoupled else (self.weight_decay, 1.0)
        return AdamScalars(lr * root / (1 - beta1**t), beta1, 1 - beta1, beta2, 1 - beta2, self.eps * root, decay, shrink)

    def update(self, xp: Namespace, W: Array, dW: Array, moments: Moments, by: AdamScalars) -> tuple[Array, Moments]:
        """The rule."""
        if by.shrink != 1:
            W = W * by.shrink
        if by.decay:
            dW = dW + by.decay * W
        M = by.beta1 * moments["M"] + by.rest1 * dW
        V = by.beta2 * moments["V"] + by.rest2 * (dW * dW)
        return W - by.rate * (M / (xp.sqrt(V) + by.eps)), {"M": M, "V": V}


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

    decoupled = True

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
