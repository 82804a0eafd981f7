"""The format of all files here: `safetensors`, sealed with a checksum, and checked before anything of it is used.

A file is checked in this order: its sizes before anything is parsed or read, then the JSON of its header, its checksum, and
whoever reads it every name, shape and dtype. What is refused is refused as `CheckpointError` with the file's name and why.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import describe
from ..arrays.words import printable

Host = np.ndarray[Any, Any]
FORMAT = 1
_KEY = "anyarray_linear"  # one entry in the file's metadata, as safetensors writes several in random order
MOMENT = "optimizer/"  # how the names of an optimizer's tensors start
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_DTYPES = {**_FLOATS, "I32": "int32", "I64": "int64", "BOOL": "bool"}  # the states of layers may be of the latter
# Parsing JSON takes many times its size. These bounds keep any header, however made, under some 120 MB and 2 s (measured;
# the test of the largest headers does it again), and let the state of a run of 50,000 epochs pass.
MAX_HEADER = 16 << 20
_MAX_PARSED = 64 << 20
_SLACK = 64 << 20  # bytes of tensors that are read in any case, to tell best what is wrong with them
_PARSED_BYTES = {b"{": 200, b"[": 80, b",": 32, b":": 96}


class CheckpointError(ValueError):
    """A file is damaged, or does not fit; the message names it and says why."""

    def __init__(self, message: str) -> None:
        # it may quote the file, which must not fill the terminal, nor send it commands; twice is as once, for pickles
        super().__init__(printable(message[:8000], keep="\n")[:8000])


class File(NamedTuple):
    """What is in a file: this library's part of its header (`None` if it is from elsewhere), and its tensors."""

    info: dict[str, Any] | None
    weights: dict[str, Host]
    moments: dict[str, Host]


def seal(path: str | os.PathLike[str], tensors: Mapping[str, Host], info: Mapping[str, Any]) -> bytes:
    """A file's bytes, with version and checksum; equal content gives equal bytes."""
    from .. import __version__

    content = {"format": FORMAT, "written_by": f"{_KEY} {__version__}", **info}
    content["sha256"] = _digest(content, tensors)
    data: bytes = _safetensors().save(dict(tensors), metadata={_KEY: dumped(content)})
    size = int.from_bytes(data[:8], "little")
    reason = excess(size, data[8 : 8 + size])
    if reason:
        raise ValueError(f"{path} is not written: {reason}; keep less in the metadata or state")
    return data


def read(path: str | os.PathLike[str], needed: Callable[[dict[str, Any] | None], float] = lambda info: math.inf) -> File:
    """The file's content, checked. Raises `CheckpointError` if damaged.

    needed: from the file's description, how many bytes of weights there should be. What has more than four times as many, as
    a checkpoint of any rule here does not, is refused unread; so time and memory are bounded by what is needed.
    """
    _safetensors()
    import json

    from safetensors import SafetensorError

    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        inside = f", but a folder; give the file in it, such as {os.path.join(path, 'model.safetensors')}"
        raise CheckpointError(f"{path} is no regular file{inside if stat.S_ISDIR(status.st_mode) else ''}")
    with open(path, "rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > status.st_size - 8:
            if told_of_pytorch := _of_pytorch(path, start + file.read(1024)):
                raise CheckpointError(told_of_pytorch)
            raise CheckpointError(f"{path} is damaged: it is cut short, or no safetensors file")
        header = file.read(min(size, MAX_HEADER))
        reason = excess(size, header)
        if reason:
            raise CheckpointError(f"{path} is refused: {reason}")
        try:
            entries = json.loads(header, object_pairs_hook=_unique)
            text = (entries.pop("__metadata__", None) or {}).get(_KEY)
            odd = [f"{name} as {entry['dtype']}" for name, entry in entries.items() if entry["dtype"] not in _DTYPES]
            if odd:
                raise CheckpointError(f"{path} holds {some(odd)}; a model's tensors are {', '.join(_DTYPES)}")
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
            tensors = {name: _tensor(entry) for name, entry in sorted(_entries(data))}  # its own order is random
            del data
            if info is not None:
                _check_info(path, info, tensors)
        except CheckpointError:
            raise
        except MemoryError as error:
            raise CheckpointError(f"{path} does not fit in memory: it has {status.st_size:,} bytes") from error
        # a header that is not what it should be fails in as many ways as Python has of taking it apart
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {told(error)}") from error
    moments = {name.removeprefix(MOMENT): x for name, x in tensors.items() if name.startswith(MOMENT)}
    return File(info, {name: x for name, x in tensors.items() if not name.startswith(MOMENT)}, moments)


def _entries(data: bytes) -> Any:
    """Pairs of a tensor's name, and its dtype, shape and bytes; not yet arrays, since NumPy has none for bfloat16."""
    import safetensors

    return safetensors.deserialize(data)  # type: ignore[no-untyped-call]


def _tensor(entry: Mapping[str, Any]) -> Host:
    """A tensor of a file; bfloat16, which NumPy does not have, in float32, of which it is the upper half."""
    dtype = _DTYPES[entry["dtype"]]
    x: Host = np.frombuffer(entry["data"], "uint16" if dtype == "bfloat16" else dtype).reshape(entry["shape"])
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x


def _check_info(path: str | os.PathLike[str], info: dict[str, Any], tensors: Mapping[str, Host]) -> None:
    if info["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has the format {info['format']!r:.20}, but this version of anyarray_linear reads {FORMAT}; "
            "get a newer one with pip install --upgrade anyarray_linear"
        )
    import json

    if not is_text(json.dumps(info, ensure_ascii=False)):
        raise ValueError("a text in it has halves of characters")
    if info.pop("sha256") != _digest(info, tensors):
        raise ValueError("its content does not have the checksum that it was written with")
    for name in ("architecture", "metadata", *sorted({"optimizer", "history", "state"} & info.keys())):
        if not isinstance(info[name], dict):
            raise ValueError(f"its {name} is no JSON object")


def _of_pytorch(path: str | os.PathLike[str], start: bytes) -> str:
    """What a file is, if by its first bytes it is one of `torch.save`, and the lines that convert it; else `""`."""
    zipped = start.startswith(b"PK\x03\x04") and b"/data.pkl" in start  # its first member; no list of millions is read
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if not zipped and not pickled:
        return ""
    target = os.path.splitext(os.fspath(path))[0] + ".safetensors"
    what = "a file of torch.save" if zipped else "a pickle"
    return (
        f"{path} is {what}, which is code and is not read here. If you trust it, convert it where PyTorch is:\n"
        f"  weights = torch.load({os.fspath(path)!r}, map_location='cpu', weights_only=True)\n"
        f"  safetensors.torch.save_file({{name: W.clone() for name, W in weights.items()}}, {target!r})"
    )


def excess(size: int, header: bytes) -> str:
    """Why a header of `size` bytes is too large to be parsed, or `""`."""
    if size > MAX_HEADER:
        return f"its header has {size:,} bytes, and the most is {MAX_HEADER:,}"
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

    digest = hashlib.sha256(dumped(info).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype.name} {x.shape}\n".encode())
        digest.update(x.data)
    return digest.hexdigest()


def dumped(info: Mapping[str, Any]) -> str:
    import json

    return json.dumps(info, separators=(",", ":"))


def as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, once it is sure that JSON gives it back (tuples as lists)."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {describe(value)}; it must be a dict")
    for flaw in _flaws(value):
        raise TypeError(f"{name}{flaw}")
    return dict(value)


def _flaws(value: Any) -> Iterator[str]:
    """Where `value` is more than JSON can hold, and how to change that."""
    if isinstance(value, str) and not is_text(value):
        cure = ".encode('utf-8', 'backslashreplace').decode()"
        yield f" is {value!r}, which has halves of characters; write them out with {cure}"
    if value is None or isinstance(value, (str, int, float)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from (f" has a key that{flaw}" for flaw in _flaws(key))
            else:
                yield f" has the key {key!r}, and JSON has only str keys; use {str(key)!r}"
            yield from (f"[{key!r}]{flaw}" for flaw in _flaws(item))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from (f"[{i}]{flaw}" for flaw in _flaws(item))
    else:
        yield f" is {describe(value)}, which JSON cannot hold; convert it with float(), int() or .tolist()"


def is_text(text: str) -> bool:
    """Whether all of it is characters: Python's surrogates, for a name that is not UTF-8, cannot be written anywhere."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def told(error: BaseException) -> str:
    """What an error says, for a reader who has not seen the code that raised it."""
    if isinstance(error, KeyError):
        return f"there is no {error} where there should be one"
    return str(error)[:200] or type(error).__name__


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('models are files of safetensors; install it with pip install "anyarray_linear[train]"') from error
    return safetensors.numpy
