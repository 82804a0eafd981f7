"""What pyproject.toml requires, one a line: `python docker/requirements.py core train`.

The groups are `core`, `build` (what builds the wheel) and the extras. The image installs them from here, before the source
is there, so that a change of the source installs no dependency again.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

pyproject = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
project, builder = pyproject["project"], pyproject["build-system"]
groups = {"core": project["dependencies"], "build": builder["requires"], **project["optional-dependencies"]}


def requirements(group: str) -> Iterator[str]:
    """The requirements of a group, and of the extras of this project that it names."""
    for requirement in groups[group]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        if own is None:
            yield requirement
        else:
            for extra in own[1].split(","):
                yield from requirements(extra)


if __name__ == "__main__":
    print(*dict.fromkeys(requirement for group in sys.argv[1:] for requirement in requirements(group)), sep="\n")
