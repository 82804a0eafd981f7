"""Files of ours as somebody with bad intentions, or a bad disk, has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from anyarray_linear.files import sealed

Header = dict[str, Any]


def header_of(data: bytes) -> tuple[Header, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Header | bytes, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def resealed(
    data: bytes,
    change: Callable[[dict[str, Any]], object] = lambda info: None,
    change_tensors: Callable[[dict[str, Any]], object] = lambda tensors: None,
) -> bytes:
    """The file with other content and the checksum that belongs to it, as somebody with bad intentions has it."""
    from safetensors.numpy import load, save

    header, _ = header_of(data)
    info, tensors = json.loads(header["__metadata__"]["anyarray_linear"]), load(data)
    del info["sha256"]
    change(info)
    change_tensors(tensors)
    info["sha256"] = sealed._digest(info, tensors)
    return save(tensors, metadata={"anyarray_linear": json.dumps(info)})
