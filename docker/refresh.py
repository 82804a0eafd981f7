"""Pin anew what the images are made of: `python docker/refresh.py`, or only some of it: `... locks base actions`.

- `locks`: every Python package with its version and hashes, in `docker/locks/`, for Python 3.11 and newer; needs `uv`.
- `base`: the digest of the base image, in `docker/Dockerfile`; asks `docker buildx imagetools`.
- `actions`: the commits of the actions, in `docker/gpu-tests.yaml`; asks GitHub by `git ls-remote`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
LOCKS = {  # what each stage of the Dockerfile installs, in groups of requirements.py
    "build": ["build"],
    "cpu": ["core", "train", "onnx", "fast"],
    "test": ["core", "test", "onnx", "fast"],
    "cuda12": ["core", "cuda12"],
    "cuda13": ["core", "cuda13"],
}


def locks() -> None:
    """One resolution for all but CUDA, so that what two stages install is one version; then a list with hashes for each."""
    every = _compiled(sorted({group for name, groups in LOCKS.items() if "cuda" not in name for group in groups}))
    together = HERE / "locks" / ".together.txt"
    together.parent.mkdir(exist_ok=True)
    together.write_text(every)
    try:
        for name, groups in LOCKS.items():
            found = _compiled(groups, "--generate-hashes", "--constraint", str(together))
            (HERE / "locks" / f"{name}.txt").write_text(f"# {' '.join(groups)}; by docker/refresh.py\n{found}")
    finally:
        together.unlink()


def _compiled(groups: list[str], *options: str) -> str:
    wanted = subprocess.check_output([sys.executable, str(HERE / "requirements.py"), *groups], text=True)
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--strip-extras", "--no-annotate"]
    return subprocess.run(
        [*command, "--no-header", "--quiet", *options, "-"], input=wanted, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def base() -> None:
    """The digest that the tag of the base image has now."""
    dockerfile = HERE / "Dockerfile"
    text = dockerfile.read_text()
    dockerfile.write_text(pinned_base(text, digest_of(*tag_of(text))))


def tag_of(dockerfile: str) -> tuple[str, str]:
    """Name and tag of the base image: `("python", "3.12-slim")`."""
    (found,) = re.findall(r"^ARG BASE=([\w/.-]+):([\w.-]+)", dockerfile, re.M)
    return found


def pinned_base(dockerfile: str, digest: str) -> str:
    """The Dockerfile with another digest of the base image."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ValueError(f"{digest!r:.80} is no digest")
    return re.sub(r"^(ARG BASE=[\w/.-]+:[\w.-]+)(@sha256:\w+)?$", rf"\g<1>@{digest}", dockerfile, flags=re.M)


def digest_of(name: str, tag: str) -> str:
    """What a tag of an official image is now, for all kinds of processors together, by Docker's own client."""
    asked = ["docker", "buildx", "imagetools", "inspect", f"{name}:{tag}", "--format", "{{.Manifest.Digest}}"]
    return subprocess.check_output(asked, text=True).strip()


def actions() -> None:
    """The commit of the newest release of each action within its major version, as the comment beside it has it."""
    workflow = HERE / "gpu-tests.yaml"
    workflow.write_text(pinned_actions(workflow.read_text(), tags_of))


def pinned_actions(workflow: str, tags: Callable[[str], dict[str, str]]) -> str:
    """The workflow with each `uses: OWNER/NAME@COMMIT # vX.Y.Z` at the newest `vX.*`; `tags(action)` is `{tag: commit}`."""

    def pinned(match: re.Match[str]) -> str:
        action, major = match[1], match[2]
        found = {tag: commit for tag, commit in tags(action).items() if re.fullmatch(rf"v{major}\.\d+\.\d+", tag)}
        newest = max(found, key=lambda tag: [int(n) for n in tag[1:].split(".")])
        return f"uses: {action}@{found[newest]} # {newest}"

    return re.sub(r"uses: ([\w-]+/[\w-]+)@[0-9a-f]{40} # v(\d+)[\d.]*", pinned, workflow)


def tags_of(action: str) -> dict[str, str]:
    """The tags of a repository on GitHub with the commits that they are at."""
    listed = subprocess.check_output(["git", "ls-remote", "--tags", f"https://github.com/{action}"], text=True)
    pairs = [line.split("\trefs/tags/") for line in listed.splitlines()]
    return {tag.removesuffix("^{}"): commit for commit, tag in pairs}  # a tag's own commit comes after the tag's object


if __name__ == "__main__":
    parts = {"locks": locks, "base": base, "actions": actions}
    if unknown := set(sys.argv[1:]) - set(parts):
        sys.exit(f"there is no {', '.join(unknown)}; give some of {', '.join(parts)}")
    for part in sys.argv[1:] or parts:
        parts[part]()
