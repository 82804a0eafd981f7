"""What can be said about the images without building them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


REFRESH = runpy.run_path(str(ROOT / "docker" / "refresh.py"))


@pytest.mark.parametrize("lock", REFRESH["LOCKS"])
def test_every_requirement_is_pinned_with_hashes_to_a_version_that_it_allows(lock: str) -> None:
    text = (ROOT / "docker" / "locks" / f"{lock}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("--hash=sha256:" in line for line in lines)
    pinned = [Requirement(line.partition("--hash")[0]) for line in lines]
    pins = {pin.name: next(iter(pin.specifier)).version for pin in pinned if pin.marker is None or pin.marker.evaluate()}
    requirements = runpy.run_path(str(ROOT / "docker" / "requirements.py"))["requirements"]
    stated = [Requirement(line) for group in REFRESH["LOCKS"][lock] for line in requirements(group)]
    for requirement in stated:
        assert pins[requirement.name] in requirement.specifier, "run python docker/refresh.py locks"


def test_stages_that_install_on_top_of_each_other_agree_on_every_version() -> None:
    versions: dict[tuple[str, str], str] = {}
    for lock in ("cpu", "test", "cuda12", "cuda13"):
        text = (ROOT / "docker" / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
        for name, version, marker in re.findall(r"^([\w.-]+)==(\S+)(.*?) ?\\\\?$", text, re.M):
            if name.startswith(("cuda", "cupy", "nvidia")):
                continue  # of one image or the other
            assert versions.setdefault((name, marker), version) == version, (lock, name)
    assert {name for name, _ in versions} >= {"numpy", "numba", "typer", "pytest", "onnx"}


def test_the_base_is_pinned_by_digest_and_a_refresh_replaces_it() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", dockerfile, re.M)
    name, tag = REFRESH["tag_of"](dockerfile)
    digest = "sha256:" + 64 * "0"
    for text in (dockerfile, re.sub(r"(ARG BASE=\S+)@\S+", r"\1", dockerfile)):
        assert f"ARG BASE={name}:{tag}@{digest}\n" in REFRESH["pinned_base"](text, digest)
    with pytest.raises(ValueError, match="no digest"):
        REFRESH["pinned_base"](dockerfile, "<html>")


def test_actions_are_pinned_by_commit_and_a_refresh_takes_the_newest_of_the_major_version() -> None:
    workflow = (ROOT / "docker" / "gpu-tests.yaml").read_text(encoding="utf-8")
    uses = re.findall(r"uses: (.*)", workflow)
    assert len(uses) == 2
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in uses)
    tags = {"v4": 40 * "1", "v4.9.1": 40 * "2", "v4.10.0": 40 * "3", "v5.0.0": 40 * "4"}
    fresh = REFRESH["pinned_actions"](workflow, lambda action: tags)
    assert re.findall(r"@(\S+) # (\S+)", fresh) == 2 * [(40 * "3", "v4.10.0")]
    assert "prune" not in workflow  # of images that may be others'


def test_without_a_card_the_gpu_run_is_red_and_starts_with_what_is_wrong_and_the_cure() -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "docker/gpu_tests.py", "--require-cuda", "tests/test_docker.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 1, run.stdout + run.stderr
    verdict, _, tests = run.stdout.partition("\nTo cure it: ")
    assert all(line.startswith("CUDA: ") for line in verdict.splitlines())
    assert "--require-cuda: CUDA: absent" in tests + run.stderr
