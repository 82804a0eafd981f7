"""Models and checkpoints as files: whole, checked, and readable elsewhere.

All are `safetensors` files, and nothing in them is code. What this module answers:

- *Readable elsewhere.* Weights have PyTorch's names and shapes, so `torch.nn.Sequential.load_state_dict(strict=True)` takes
  them: `0.weight` is the `W` of layer 0, `0.bias` its `b` as `(out,)`. A shared layer's are there under every position.
- *Complete.* The header says in JSON which layers there are and which of them are one, and what the caller wants kept; a
  checkpoint holds the optimizer's moments and the state of the run too. So one file is all that resuming needs, and a
  checkpoint is a model file as well.
- *Whole or not there.* Files are written beside their place, flushed, read back and then moved (`_files.atomic_write`).
- *Nothing wrong gets in.* A file is checked before it is used: its sizes before anything is parsed or read, its checksum,
  then every name, shape and dtype against the model; only then is the model touched. What is refused is refused as
  `CheckpointError` with the file's name and the reason.
"""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ..arrays.checks import describe
from ..arrays.device import Device
from ..arrays.memory import explained_memory
from ..arrays.place import Array, dtype_name
from ..arrays.selection import select_device
from ..linear import Linear
from ..protocol import join, leaves, parameters
from ..sequential import Sequential
from .atomic import atomic_write

Host = np.ndarray[Any, Any]

FORMAT = 1
_KEY = "anyarray_linear"  # one entry in the file's metadata, as safetensors writes several in random order
_MOMENT = "optimizer/"  # how the names of an optimizer's tensors start
_STEP = re.compile(r"step-([0-9]+)\.safetensors")
_CURE = "free some first, or use another device"
_ACTIVATIONS = {kind.__name__: kind for kind in (ReLU, Tanh, Sigmoid, SiLU, GELU)}
_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64"}

# Parsing JSON takes many times its size. These bounds keep any header, however made, under some 120 MB and 2 s (measured;
# the test of the largest headers does it again), and let the state of a run of 50,000 epochs pass.
_MAX_HEADER = 16 << 20
_MAX_PARSED = 64 << 20
_SLACK = 64 << 20  # bytes of tensors that are read in any case, to tell best what is wrong with them
_PARSED_BYTES = {b"{": 200, b"[": 80, b",": 32, b":": 96}


class CheckpointError(ValueError):
    """A file is damaged, or does not fit; the message names it and says why."""

    def __init__(self, message: str) -> None:
        # it may quote the file, which must not fill the terminal, nor send it commands
        super().__init__("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message[:8000]))


# ---------------------------------------------------------------------------------------------------------------------
# The public functions


def save_model(model: Any, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights and the architecture of `model` to the `safetensors` file `path`, atomically.

    model: a layer or container. Layers of the caller's own classes are saved too; such a file is read with `into=`.
    metadata: what else to keep, for `read_metadata`: anything JSON can hold, such as `{"classes": ["cat", "dog"]}`.

    Raises `TypeError` for metadata that JSON cannot hold, and `OSError` where the file cannot be written; a file that was
    there is intact then.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save_model(Sequential(Linear(3, 2, dtype="float32"), ReLU()), path, metadata={"classes": ["cat", "dog"]})
    >>> load_model(path)
    Sequential(Linear(3, 2, dtype=float32, device=cpu), ReLU())
    >>> read_metadata(path)
    {'classes': ['cat', 'dog']}
    """
    info = {"architecture": _architecture(model), "metadata": _json("metadata", {} if metadata is None else metadata)}
    atomic_write(path, _sealed(path, _weights(model), info))


def load_model(path: str | os.PathLike[str], *, device: Any = None, into: Any = None) -> Any:
    """The model in a file of `save_model` or `save_checkpoint`, or `into` filled from any file with PyTorch's names.

    device: where the model shall be, a `Device` or what `select_device` takes; by default NumPy on the CPU.
    into: a model that gets the weights, where it is; its parameters must have the names, shapes and dtypes of the file. So
    files of `safetensors.torch.save_file(model.state_dict(), path)` are read, and layers of the caller's own classes filled.

    Returns the new model, or `into`.

    Raises `CheckpointError` for a file that is damaged or does not fit `into`, which is as it was then.
    """
    if into is not None:
        if device is not None:
            raise ValueError("into has its device already; leave device out, or move the model with into.to(device)")
        matched = _matched(path, _read(path, lambda info: _size(into)).weights, into)
        with _memory_advice(into):
            _assign(_arrays(matched))
        return into

    def described(info: dict[str, Any] | None) -> float:
        if info is None:
            raise CheckpointError(
                f"{path} holds no architecture, as it is not a file of this library; "
                "build the model and fill it: load_model(path, into=model)"
            )
        return _described_size(info["architecture"], "", {})

    place = select_device("cpu" if device is None else device)
    file = _read(path, described)
    assert file.info is not None
    try:
        with explained_memory(place, _CURE):
            model = _built(file.info["architecture"], "", file.weights, place, {})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its model cannot be built on {place}: {_told(error)}") from error
    _matched(path, file.weights, model)  # that nothing is left over, and that what is shared agrees
    return model


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was given to `save_model` as `metadata`, or to `save_checkpoint` as `state`; `{}` for a file from elsewhere.

    Raises `CheckpointError` for a damaged file.
    """
    info = _read(path).info
    return {} if info is None else dict(info["metadata"])


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    optimizer: Any,
    *,
    state: Mapping[str, Any],
    keep: int = 3,
    best: bool = False,
) -> Path:
    """Write all that resuming needs to `folder/step-000000123.safetensors`, atomically, and remove older checkpoints.

    state: what else the run needs, as JSON holds it: epoch, position, history, host random state; NaN, infinities and ints
    of any size come back. `state["step"]` numbers the file; without it, the optimizer's steps do.
    keep: how many checkpoints stay, the newest ones. best: whether to write `folder/best.safetensors` as well.

    Returns the path of the checkpoint. The folder is made if need be. An old one that cannot be removed is warned of.

    Raises `TypeError` for a state that JSON cannot hold, and `OSError` where the file cannot be written; what was in the
    folder is intact then.
    """
    kept = _json("state", state)
    step = kept.get("step", optimizer.steps)
    if not isinstance(step, int) or step < 0:
        raise ValueError(f'state["step"] is {step!r}; it must be an int >= 0')
    if keep < 1:
        raise ValueError(f"keep is {keep}; it must be at least 1")
    rule = optimizer.state_dict()
    moments = {f"{_MOMENT}{name}/{m}": _host(x) for name, own in rule.pop("moments").items() for m, x in own.items()}
    info = {"architecture": _architecture(model), "optimizer": rule, "metadata": kept}
    path = Path(folder) / f"step-{step:09}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _sealed(path, _weights(model) | moments, info)
    if best:  # first: whoever dies between the two comes back to before both, and writes both again
        atomic_write(path.with_name("best.safetensors"), data)
    atomic_write(path, data)
    past = [old for old in checkpoints(folder) if _step(old) <= step]
    for old in past[keep:]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:  # the new one is safe, which is what matters
            warnings.warn(f"an old checkpoint cannot be removed: {error}", RuntimeWarning, stacklevel=2)
    return path


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    optimizer: Any,
    *,
    check: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Fill `model` and `optimizer` from the newest good checkpoint in `folder`, and return the state saved with it.

    model, optimizer: built as they were for the run, on any device; a schedule as `lr` is code, and not in the file.
    check: called with the state, once all else fits and before anything is changed; it may refuse it with a `ValueError`.
    A damaged checkpoint is passed over for the one before it, with a `RuntimeWarning` that names it and says why.

    Raises `CheckpointError` if no checkpoint is good, or if the newest good one is of another architecture, dtype or
    optimizer, or is refused by `check`; `model` and `optimizer` are as they were then.
    """
    damaged = []
    for path in checkpoints(folder):
        try:
            file = _read(path, lambda info: _size(model))
            if file.info is None or "optimizer" not in file.info:
                raise CheckpointError(f"{path} holds no state of an optimizer, so it is no checkpoint")
        except (CheckpointError, OSError) as error:
            warnings.warn(f"skipping a checkpoint: {error}", RuntimeWarning, stacklevel=2)
            damaged.append(str(error))
            continue
        with _memory_advice(model):
            _resume(path, file, file.info, model, optimizer, check)
        return dict(file.info["metadata"])
    raise CheckpointError(f"{folder} holds no good checkpoint" + "".join(f"\n  {why}" for why in damaged))


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, the newest first, `best` not among them; none where there is no such folder."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _resume(
    path: Path,
    file: _File,
    info: Mapping[str, Any],
    model: Any,
    optimizer: Any,
    check: Callable[[dict[str, Any]], object] | None,
) -> None:
    """Check everything, and only then change the optimizer and the model."""
    try:
        difference = _difference(info["architecture"], _architecture(model), "")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} describes no model: {_told(error)}") from error
    if difference:
        raise CheckpointError(f"{path} is of another model: {difference}")
    weights = _matched(path, file.weights, model)
    parameters = {join(name, p): getattr(layer, p) for name, layer in leaves(model) for p in layer.parameters()}
    moments: dict[str, dict[str, Array]] = {}
    for name, x in file.moments.items():
        name, _, m = name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{path} has the optimizer's {m} of {name}, which the model does not have")
        like = parameters[name]
        _check(path, f"the optimizer's {m} of {name}", x, like, tuple(like.shape))
        moments.setdefault(name, {})[m] = _placed(x, like)
    if moments and set(moments) != set(parameters):
        lacking = ", ".join(sorted(set(parameters) - set(moments)))
        raise CheckpointError(f"{path} has nothing of the optimizer's for {lacking}")
    rule = {**info["optimizer"], "moments": moments}
    try:
        copy(optimizer).load_state_dict(rule)
        if check is not None:
            check(dict(info["metadata"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit: {_told(error)}") from error
    new = _arrays(weights)
    optimizer.load_state_dict(rule)
    _assign(new)


# ---------------------------------------------------------------------------------------------------------------------
# A model as names and tensors


def _places(model: Any) -> dict[str, tuple[Any, str]]:
    """The layer and attribute behind every tensor of a file, by PyTorch's names; a shared layer's at every position."""
    positions = model._positions() if isinstance(model, Sequential) else leaves(model)
    return {join(path, _file_name(layer, p)): (layer, p) for path, layer in positions for p in layer.parameters()}


def _file_name(layer: Any, p: str) -> str:
    return {"W": "weight", "b": "bias"}[p] if isinstance(layer, Linear) else p


def _file_shape(layer: Any, p: str) -> tuple[int, ...]:
    shape = tuple(getattr(layer, p).shape)
    return shape[1:] if isinstance(layer, Linear) and p == "b" else shape


def _host(x: Array) -> Host:
    """`x` on the host and C-contiguous: safetensors' NumPy writer takes any other array's memory in the wrong order."""
    return np.asarray(Device.of(x).to_numpy(x), order="C")


def _weights(model: Any) -> dict[str, Host]:
    return {name: _host(getattr(layer, p)).reshape(_file_shape(layer, p)) for name, (layer, p) in _places(model).items()}


def _size(model: Any) -> int:
    """The bytes of the model's tensors in a file."""
    tensors = (getattr(layer, p) for layer, p in _places(model).values())
    return sum(math.prod(W.shape) * np.dtype(dtype_name(W.dtype)).itemsize for W in tensors)


def _described_size(spec: Mapping[str, Any], path: str, sizes: dict[str, float]) -> float:
    """The most bytes that the tensors of an architecture have; infinite where only the caller's code knows.

    sizes: those of the layers so far by their position.
    """
    if "same_as" in spec:
        return sizes[spec["same_as"]]
    if spec["type"] == "Sequential":
        inner = enumerate(spec["layers"])
        return math.fsum(_described_size(each, join(path, str(i)), sizes) for i, each in inner)
    sizes[path] = math.inf if spec.get("custom") else 0
    if spec["type"] == "Linear":
        sizes[path] = 8 * (spec["in_features"] + 1) * float(spec["out_features"])
    return sizes[path]


def _matched(path: str | os.PathLike[str], weights: Mapping[str, Host], model: Any) -> list[tuple[Any, str, Host]]:
    """`(layer, attribute, tensor)` for every parameter of `model`; raises if any tensor is missing, unknown or unlike it."""
    places = _places(model)
    unknown = [name for name in weights if name not in places]
    if unknown:
        raise CheckpointError(f"{path} has {_some(unknown)}, but the model has {_some(list(places)) or 'no parameters'}")
    names: dict[tuple[int, str], list[str]] = {}
    for name, (layer, p) in places.items():
        names.setdefault((id(layer), p), []).append(name)
    # torch writes a shared tensor once, under whichever of its names
    present = {name: [name for name in (name, *more) if name in weights] for name, *more in names.values()}
    missing = [name for name, found in present.items() if not found]
    if missing:
        raise CheckpointError(f"{path} lacks {_some(missing)} of the model")
    matched = []
    for first, *copies in present.values():
        layer, p = places[first]
        _check(path, first, weights[first], getattr(layer, p), _file_shape(layer, p))
        for other in copies:
            if weights[other].tobytes() != weights[first].tobytes():
                raise CheckpointError(f"{path}: {first} and {other} are one tensor in the model, but differ in the file")
        matched.append((layer, p, weights[first]))
    return matched


def _check(path: str | os.PathLike[str], name: str, x: Host, like: Array, shape: tuple[int, ...]) -> None:
    dtype = dtype_name(like.dtype)
    if x.shape != shape or x.dtype.name != dtype:
        raise CheckpointError(
            f"{path}: {name} is {x.dtype.name} of shape {x.shape} in the file, but the model needs {dtype} of shape {shape}"
        )


def _placed(x: Host, like: Array) -> Array:
    """`x` in the shape of `like` and where that is."""
    return Device.of(like).asarray(x.reshape(tuple(like.shape)))


def _arrays(matched: list[tuple[Any, str, Host]]) -> list[tuple[Any, str, Array]]:
    """The tensors as arrays, all of them before any is assigned, as memory may run out."""
    return [(layer, p, _placed(x, getattr(layer, p))) for layer, p, x in matched]


def _assign(new: list[tuple[Any, str, Array]]) -> None:
    for layer, p, x in new:
        setattr(layer, p, x)


def _memory_advice(model: Any) -> AbstractContextManager[None]:
    """A context in which running out of memory says what to change, where the model's parameters are."""
    first = next(iter(parameters(model).values()), np.empty(0))
    return explained_memory(Device.of(first), _CURE)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---------------------------------------------------------------------------------------------------------------------
# An architecture as JSON


def _architecture(model: Any) -> dict[str, Any]:
    """What `_built` builds the model from; a layer that stands at several positions is `same_as` at all but the first."""
    first: dict[int, str] = {}

    def described(layer: Any, path: str) -> dict[str, Any]:
        if type(layer) is Sequential:
            return {"type": "Sequential", "layers": [described(inner, join(path, str(i))) for i, inner in enumerate(layer)]}
        if first.setdefault(id(layer), path) != path:
            return {"same_as": first[id(layer)]}
        kind = type(layer).__name__
        if type(layer) is Linear:
            sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
            return {"type": kind, **sizes, "bias": layer.b is not None}
        return {"type": kind, **vars(layer)} if _ACTIVATIONS.get(kind) is type(layer) else {"type": kind, "custom": True}

    return described(model, "")


def _built(spec: Mapping[str, Any], path: str, weights: Mapping[str, Host], place: Device, made: dict[str, Any]) -> Any:
    """The model of a file on `place`; `made` has the layers so far by their position."""
    if "same_as" in spec:
        return made[spec["same_as"]]
    kind = spec["type"]
    layer: Any
    if kind == "Sequential":
        inner = enumerate(spec["layers"])
        return Sequential(*(_built(each, join(path, str(i)), weights, place, made) for i, each in inner))
    if kind == "Linear":
        sizes, W = (spec["out_features"], spec["in_features"]), weights[join(path, "weight")]
        if W.shape != sizes:
            raise CheckpointError(f"{join(path, 'weight')} has shape {W.shape}, but the layer is {_shown(spec)}")
        dtype = place.dtype(W.dtype.name)
        arrays = [W, weights[join(path, "bias")]] if spec["bias"] else [W]
        layer = Linear.from_arrays(*(place.asarray(x, dtype) for x in arrays))
    elif kind in _ACTIVATIONS and not spec.get("custom"):
        layer = _ACTIVATIONS[kind](**{name: value for name, value in spec.items() if name != "type"})
    else:
        raise CheckpointError(
            f"layer {path or 'of the file'} is {_shown(spec)}, which only the code that defines it can build; "
            "build the model and fill it: load_model(path, into=model)"
        )
    made[path] = layer
    return layer


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str) -> str:
    """Where two architectures differ first, in words, or `""`."""
    if theirs.get("type") == ours.get("type") == "Sequential" and len(theirs["layers"]) == len(ours["layers"]):
        inner = enumerate(zip(theirs["layers"], ours["layers"], strict=True))
        return next(filter(None, (_difference(a, b, join(path, str(i))) for i, (a, b) in inner)), "")
    if theirs == ours:
        return ""
    return f"{f'layer {path}' if path else 'it'} is {_shown(theirs)} in the file and {_shown(ours)} here"


def _shown(spec: Mapping[str, Any]) -> str:
    if "same_as" in spec:
        return f"the layer at {spec['same_as']} again"
    if "layers" in spec:
        return f"a Sequential of {len(spec['layers'])}"
    return f"{spec.get('type')}({', '.join(f'{k}={v}' for k, v in spec.items() if k not in ('type', 'custom'))})"


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


class _File(NamedTuple):
    """What is in a file: this library's part of its header (`None` if it is from elsewhere), and its tensors."""

    info: dict[str, Any] | None
    weights: dict[str, Host]
    moments: dict[str, Host]


def _sealed(path: str | os.PathLike[str], tensors: Mapping[str, Host], info: Mapping[str, Any]) -> bytes:
    """A file's bytes, with version and checksum; equal content gives equal bytes."""
    from .. import __version__

    content = {"format": FORMAT, "written_by": f"{_KEY} {__version__}", **info}
    content["sha256"] = _digest(content, tensors)
    data: bytes = _safetensors().save(dict(tensors), metadata={_KEY: _dumped(content)})
    size = int.from_bytes(data[:8], "little")
    reason = _excess(size, data[8 : 8 + size])
    if reason:
        raise ValueError(f"{path} is not written: {reason}; keep less in the metadata or state")
    return data


def _read(
    path: str | os.PathLike[str], needed: Callable[[dict[str, Any] | None], float] = lambda info: math.inf
) -> _File:
    """The file's content, checked. Raises `CheckpointError` if damaged.

    needed: from the file's description, how many bytes of weights there should be. What has more than four times as many, as
    a checkpoint of any rule here does not, is refused unread; so time and memory are bounded by what is needed.
    """
    library = _safetensors()
    import json

    from safetensors import SafetensorError

    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{path} is no regular file")
    with open(path, "rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > status.st_size - 8:
            raise CheckpointError(f"{path} is damaged: it is cut short, or no safetensors file")
        header = file.read(min(size, _MAX_HEADER))
        reason = _excess(size, header)
        if reason:
            raise CheckpointError(f"{path} is refused: {reason}")
        try:
            entries = json.loads(header, object_pairs_hook=_unique)
            text = (entries.pop("__metadata__", None) or {}).get(_KEY)
            odd = [f"{name} as {entry['dtype']}" for name, entry in entries.items() if entry["dtype"] not in _DTYPES]
            if odd:
                raise CheckpointError(f"{path} holds {_some(odd)}; a model's tensors are {', '.join(_DTYPES)}")
            if text is None and _KEY.encode() in header:  # not from elsewhere: `written_by` is there
                raise CheckpointError(f"{path} is damaged: its description is not where it should be")
            info = None if text is None else json.loads(text)
            most, held = needed(info), status.st_size - 8 - size
            if held > max(_SLACK, 4 * most):
                raise CheckpointError(f"{path} holds {held:,} bytes of tensors, where {most:,.0f} are needed, or some more")
            file.seek(0)
            data = file.read()  # all of it again, as joining two parts would take as much memory once more
            if not data.startswith(start + header):
                raise CheckpointError(f"{path} is damaged: it has changed while it was read")
            tensors = dict(sorted(library.load(data).items()))  # its own order is random
            del data
            if info is not None:
                _check_info(path, info, tensors)
        except CheckpointError:
            raise
        except MemoryError as error:
            raise CheckpointError(f"{path} does not fit in memory: it has {status.st_size:,} bytes") from error
        # a header that is not what it should be fails in as many ways as Python has of taking it apart
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {_told(error)}") from error
    moments = {name.removeprefix(_MOMENT): x for name, x in tensors.items() if name.startswith(_MOMENT)}
    return _File(info, {name: x for name, x in tensors.items() if not name.startswith(_MOMENT)}, moments)


def _check_info(path: str | os.PathLike[str], info: dict[str, Any], tensors: Mapping[str, Host]) -> None:
    if info["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has the format {info['format']!r:.20}, but this version of anyarray_linear reads {FORMAT}; "
            "get a newer one with pip install --upgrade anyarray_linear"
        )
    if info.pop("sha256") != _digest(info, tensors):
        raise ValueError("its content does not have the checksum that it was written with")
    for name in ("architecture", "metadata", *({"optimizer"} & info.keys())):
        if not isinstance(info[name], dict):
            raise ValueError(f"its {name} is no JSON object")


def _excess(size: int, header: bytes) -> str:
    """Why a header of `size` bytes is too large to be parsed, or `""`."""
    if size > _MAX_HEADER:
        return f"its header has {size:,} bytes, and the most is {_MAX_HEADER:,}"
    if sum(cost * header.count(mark) for mark, cost in _PARSED_BYTES.items()) > _MAX_PARSED:
        return f"its header, of {size:,} bytes, has too many entries"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; safetensors takes the same key twice, and then readers disagree about what a file says."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header has a key twice")
    return result


def _digest(info: Mapping[str, Any], tensors: Mapping[str, Host]) -> str:
    """The SHA-256 of all that a file says."""
    import hashlib

    digest = hashlib.sha256(_dumped(info).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype.name} {x.shape}\n".encode())
        digest.update(x.data)
    return digest.hexdigest()


def _dumped(info: Mapping[str, Any]) -> str:
    import json

    return json.dumps(info, separators=(",", ":"))


def _json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, once it is sure that JSON gives it back (tuples as lists)."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {describe(value)}; it must be a dict")
    for flaw in _flaws(value):
        raise TypeError(f"{name}{flaw}")
    return dict(value)


def _flaws(value: Any) -> Iterator[str]:
    """Where `value` is more than JSON can hold, and how to change that."""
    if value is None or isinstance(value, (str, int, float)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f" has the key {key!r}, and JSON has only str keys; use {str(key)!r}"
            yield from (f"[{key!r}]{flaw}" for flaw in _flaws(item))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from (f"[{i}]{flaw}" for flaw in _flaws(item))
    else:
        yield f" is {describe(value)}, which JSON cannot hold; convert it with float(), int() or .tolist()"


def _told(error: BaseException) -> str:
    """What an error says, for a reader who has not seen the code that raised it."""
    if isinstance(error, KeyError):
        return f"there is no {error} where there should be one"
    return str(error)[:200] or type(error).__name__


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('models are files of safetensors; install it with pip install "anyarray_linear[train]"') from error
    return safetensors.numpy
