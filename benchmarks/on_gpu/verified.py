"""The command `verify`, on the card."""

from __future__ import annotations

import contextlib
import io
import json
import sys

from .answering import tell


def main() -> None:
    """Tell each row of its table, and what it complains of."""
    from anyarray_linear.cli import main as command

    printed = io.StringIO()
    sys.argv = ["anyarray-linear", "verify", "--json", "--device", "cuda:0"]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command()
    print(printed.getvalue())
    report = json.loads(printed.getvalue())
    for row in report["rows"]:
        tell(**row)
    for complaint in report["complaints"]:
        tell(wrong=complaint)


if __name__ == "__main__":
    main()
