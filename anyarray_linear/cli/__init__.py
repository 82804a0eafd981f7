"""The command line: `anyarray-linear`, or `python -m anyarray_linear`. One module per command.

What it promises: an error that the user can mend is one line on standard error and exit code 2; anything else is a fault
of this package and keeps its traceback. Signals are handled here and nowhere else.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "safetensors", "matplotlib")


def main() -> None:
    """Run the command line on `sys.argv` and exit with its code."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        print(f'error: the command line needs {", ".join(missing)}; pip install "anyarray_linear[train]"', file=sys.stderr)
        sys.exit(2)
    try:
        from ._app import app
        from ._common import exit_code_of
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(exit_code_of(app))
