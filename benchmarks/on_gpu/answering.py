"""How the process of a part tells what it finds: a line of JSON at once, to a file that the run reads."""

from __future__ import annotations

import json
import os
from typing import Any

IS_STAND_IN = bool(os.environ.get("ON_GPU_STAND_IN"))
"""Whether this is the CPU stand-in for CUDA: then there are counts instead of times."""
SECONDS = float(os.environ.get("ON_GPU_SECONDS", "inf"))
"""How long this process may take."""
LEFT = float(os.environ.get("ON_GPU_LEFT", "inf"))
"""How long all that is still to run may take together."""
SCRATCH = os.environ.get("ON_GPU_SCRATCH", ".")


def tell(**found: Any) -> None:
    """Add a line to what this part has found; `wrong` in it says that something is not as it should be."""
    path = os.environ.get("ON_GPU_ANSWERS")
    line = json.dumps(found)
    if path is None:
        print(line)
        return
    with open(path, "a") as file:
        file.write(line + "\n")
