"""Models as files: whole, and readable elsewhere.

The weights have PyTorch's names and shapes, so `torch.nn.Sequential.load_state_dict(strict=True)` takes them. The header
says in JSON which layers there are and which of them are one, and what the caller wants kept. Nothing in a file is code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..arrays.memory import explained_memory
from ..arrays.selection import select_device
from ..protocol import check_model
from .architecture import architecture_of, built, described_size, warn_of_what_is_not_kept
from .atomic import atomic_write
from .foreign import in_dtypes, renamed
from .sealed import CheckpointError, as_json, read, seal, told
from .tensors import CURE, assign, in_dtype, match, match_numbers, memory_advice, numbers_of, placed_all, size_of, weights_of


def save_model(
    model: Any,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    repeat_shared: bool = True,
    dtype: str | None = None,
) -> None:
    """Write the weights and the architecture of `model` to the `safetensors` file `path`, atomically.

    model: a layer or container. Layers of the caller's own classes are saved too; such a file is read with `into=`.
    metadata: what else to keep, for `read_metadata`: anything JSON can hold, such as `{"classes": ["cat", "dog"]}`.
    repeat_shared: whether the tensors of a layer that stands at several positions are there under each of them, which
    `load_state_dict(load_file(path))` of PyTorch needs, or only under the first, which `safetensors.torch.load_model` needs.
    dtype: "float16", "float32" or "float64": what floats are written in; by default, in their own. A float16 model, say, is
    read on a CPU if it was written as float32, and a file of float16 is half as large.

    Raises `TypeError` for metadata that JSON cannot hold, `ValueError` for weights that are too large for `dtype`, and
    `OSError` where the file cannot be written; a file that was there is intact then.

    >>> import os, tempfile
    >>> from anyarray_linear import Linear, ReLU, Sequential
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save_model(Sequential(Linear(3, 2, dtype="float32"), ReLU()), path, metadata={"classes": ["cat", "dog"]})
    >>> load_model(path)
    Sequential(Linear(3, 2, dtype=float32, device=cpu), ReLU())
    >>> read_metadata(path)
    {'classes': ['cat', 'dog']}
    """
    check_model(model)
    kept = as_json("metadata", {} if metadata is None else metadata)
    warn_of_what_is_not_kept(model)
    info = {"architecture": architecture_of(model), "metadata": kept, **numbers_of(model)}
    atomic_write(path, seal(path, in_dtype(weights_of(model, repeat_shared=repeat_shared), dtype), info))


def load_model(
    path: str | os.PathLike[str],
    *,
    device: Any = None,
    into: Any = None,
    names: Mapping[str, str] | None = None,
    cast: bool = False,
    classes: Sequence[type] = (),
) -> Any:
    """The model in a file of `save_model` or `save_checkpoint`, or `into` filled from any file with PyTorch's names.

    device: where the model shall be, a `Device` or what `select_device` takes; by default NumPy on the CPU.
    into: a model that gets the weights, where it is; its parameters must have the names and shapes of the file. So files of
    `safetensors.torch.save_file(module.state_dict(), path)` are read, and layers of the caller's own classes filled. The
    numbered layers of a `torch.nn.Sequential` count in their order: modules without parameters shift nothing. A dtype that
    holds every value of the file's is taken as well, so bfloat16 and float16 in float32.
    names: how the file's layers or tensors are called in `into`, such as `{"fc1": "0", "fc2": "2"}`.
    cast: whether the weights may be rounded to a narrower dtype of `into`.
    classes: the caller's own classes of layers with a `config()`, which are built with it.

    Returns the new model, or `into`.

    Raises `CheckpointError` for a file that is damaged or does not fit `into`, which is as it was then.
    """
    if into is not None:
        check_model(into, "into")
        if device is not None:
            raise ValueError("into has its device already; leave device out, or move the model with into.to(device)")
        file = read(path, lambda info: size_of(into))
        weights = renamed(path, file.weights, names, into)
        matching, numbers = match(path, in_dtypes(path, weights, into, cast), into), match_numbers(path, file.info, into)
        with memory_advice(into):
            assign([*placed_all(matching), *numbers])
        return into
    if names is not None or cast:
        raise ValueError("names and cast are about a model that is there; give it: load_model(path, into=model, ...)")

    def described(info: dict[str, Any] | None) -> float:
        if info is None:
            raise CheckpointError(
                f"{path} holds no architecture, as it is not a file of this library; "
                "build the model and fill it: load_model(path, into=model)"
            )
        return described_size(info["architecture"], "", {})

    place = select_device("cpu" if device is None else device)
    file = read(path, described)
    assert file.info is not None
    try:
        with explained_memory(place, CURE):
            model = built(file.info["architecture"], "", file.weights, place, {}, {kind.__name__: kind for kind in classes})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its model cannot be built on {place}: {told(error)}") from error
    match(path, file.weights, model)  # that nothing is left over, and that what is shared agrees
    assign(match_numbers(path, file.info, model))
    return model


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was given to `save_model` as `metadata`, or to `save_checkpoint` as `state`; `{}` for a file from elsewhere.

    Raises `CheckpointError` for a damaged file.
    """
    info = read(path).info
    return {} if info is None else dict(info["metadata"])


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a checkpoint, whose weights are for training to go on, and not a model of `save_model`.

    Raises `CheckpointError` for a damaged file.
    """
    info = read(path).info
    return info is not None and "optimizer" in info
