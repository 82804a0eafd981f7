"""What can be said about the images without building them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("cuda", ["cuda12", "cuda13"])
def test_every_requirement_is_pinned_to_a_version_that_it_allows(cuda: str) -> None:
    lines = (ROOT / "docker" / f"constraints-{cuda}.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        pin.name: next(iter(pin.specifier)).version
        for pin in map(Requirement, lines)
        if pin.marker is None or pin.marker.evaluate()
    }
    requirements = runpy.run_path(str(ROOT / "docker" / "requirements.py"))["requirements"]
    stated = [Requirement(line) for group in ("build", "core", "train", "test", cuda) for line in requirements(group)]
    assert len(stated) > 5
    for requirement in stated:
        assert pins[requirement.name] in requirement.specifier, "docker/README.md says how to pin anew"


def test_without_a_card_the_gpu_run_is_red_and_starts_with_what_is_wrong_and_the_cure() -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "docker/gpu_tests.py", "--require-cuda", "tests/test_docker.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stdout + run.stderr
    verdict, _, tests = run.stdout.partition("\nTo cure it: ")
    assert all(line.startswith("CUDA: ") for line in verdict.splitlines())
    assert "--require-cuda: CUDA: absent" in tests + run.stderr
