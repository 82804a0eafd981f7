"""The command `verify`, on the card: with products in float32, and in TF32 where the card has it."""

from __future__ import annotations

import contextlib
import io
import json
import sys

from .answering import IS_STAND_IN, tell


def main() -> None:
    """Tell each row of its table, and what it complains of."""
    from anyarray_linear.cli import main as command

    for tf32 in [False] if IS_STAND_IN else [False, True]:
        printed = io.StringIO()
        sys.argv = ["anyarray-linear", "verify", "--json", "--device", "cuda:0", *["--tf32"] * tf32]
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            command()
        print(printed.getvalue())
        report = json.loads(printed.getvalue())
        for row in report["rows"]:
            tell(**row, tf32=tf32)
        for complaint in report["complaints"]:
            tell(wrong=complaint, tf32=tf32)


if __name__ == "__main__":
    main()
