"""How the process of a part tells what it finds: a line of JSON at once, to a file that the run reads."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

IS_STAND_IN = bool(os.environ.get("ON_GPU_STAND_IN"))
"""Whether this is the CPU stand-in for CUDA: then there are counts instead of times."""
SECONDS = float(os.environ.get("ON_GPU_SECONDS", "inf"))
"""How long this process may take."""
LEFT = float(os.environ.get("ON_GPU_LEFT", "inf"))
"""How long all that is still to run may take together."""
SCRATCH = os.environ.get("ON_GPU_SCRATCH", tempfile.gettempdir())


_open, _write, _close = os.open, os.write, os.close  # a test may take them away for a while


def append(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file."""
    file = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    _write(file, f"{line}\n".encode())
    _close(file)


def tell(**found: Any) -> None:
    """Add a line to what this part has found; `wrong` in it says that something is not as it should be."""
    path, line = os.environ.get("ON_GPU_ANSWERS"), json.dumps(found)
    if path is None:
        print(line)
    else:
        append(path, line)
