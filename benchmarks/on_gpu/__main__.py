"""The parts, one after the other. Only the standard library is needed here: a part may fail, this must not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .report import folded, markdown

ROOT = Path(__file__).parents[2]
CONTESTANTS = {
    "float32": ("step", "torch_graph", "hand", "torch", "jax", "lanes_off"),
    "TF32": ("step", "torch_graph", "hand", "torch", "jax"),
    "float16": ("step", "torch_graph", "hand", "torch"),
}
"""In float16 ours keep float32 masters and scale the loss, which the others here do not."""


class Part(NamedTuple):
    """A part: how many of 480 seconds it may take, and its processes, each with what it needs in its environment."""

    name: str
    seconds: float
    jobs: Callable[[Run], Iterator[tuple[list[str], dict[str, str]]]]


class Run:
    """A run into a folder; `found` is what is in `results.json`."""

    def __init__(self, folder: Path, seconds: float, wheels: Path | None) -> None:
        self.folder, self.seconds, self.began = folder, seconds, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="on_gpu_"))
        self.log = (folder / "log.txt").open("w")
        self.site = self.scratch / "site"
        self.found: dict[str, Any] = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "carried": self._unpacked(wheels) if wheels else [],
            "card": {},
            "parts": {},
        }

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _unpacked(self, wheels: Path) -> list[str]:
        """The wheels in the folder `wheels` whose packages are not here, unpacked."""
        taken = []
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                tops = {name.partition("/")[0].removesuffix(".py") for name in archive.namelist()}
                packages = [name for name in tops if "." not in name]
                if packages and not any(find_spec(name) for name in packages):
                    archive.extractall(self.site)
                    taken.append(wheel.name)
        return taken

    @property
    def left(self) -> float:
        """Seconds left of all."""
        return self.seconds - (time.monotonic() - self.began)

    @property
    def is_stand_in(self) -> bool:
        return bool(self.found["card"].get("stand_in"))

    def write(self) -> None:
        """Everything found so far, whole at any time."""
        parts = {name: part | {"lines": folded(part["lines"])} for name, part in self.found["parts"].items()}
        kept = json.dumps(self.found | {"parts": parts}, indent=1)
        for name, text in (("results.json", kept), ("report.md", markdown(self.found))):
            fresh = self.folder / f".{name}"
            fresh.write_text(text + "\n")
            fresh.replace(self.folder / name)

    def part(self, part: Part) -> None:
        """Run a part for its time, or for what is left."""
        limit = min(part.seconds * self.seconds / 480, self.left)
        mine: dict[str, Any] = {"limit": round(limit), "lines": [], "trouble": []}
        self.found["parts"][part.name] = mine
        began = time.monotonic()
        for command, variables in part.jobs(self):
            rest = limit - (time.monotonic() - began)
            if rest < 1:
                mine["trouble"].append(f"no time was left for {' '.join(command)}")
                continue
            if trouble := self._job(part.name, command, variables, rest, mine["lines"]):
                mine["trouble"].append(trouble)
        mine["seconds"] = round(time.monotonic() - began, 1)
        self.write()
        print(f"{part.name:12} {mine['seconds']:6.1f} s  {'; '.join(mine['trouble'])[:100] or 'done'}", flush=True)

    def _job(self, name: str, command: list[str], variables: dict[str, str], limit: float, lines: list[Any]) -> str:
        """Run a process, whose results are appended to `lines` as they come; what went wrong."""
        answers, left = self.scratch / "answers", self.left
        answers.write_text("")
        paths = [str(ROOT), str(ROOT / "tests"), str(self.site), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "ON_GPU_ANSWERS": str(answers), "ON_GPU_SECONDS": str(limit - 2),
            "ON_GPU_LEFT": str(left - 2), "ON_GPU_SCRATCH": str(self.scratch),
            "ON_GPU_STAND_IN": "1" if self.is_stand_in else "",
        }  # fmt: skip
        print(f"\n==== {name}: {' '.join(command)}", file=self.log, flush=True)
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        read, trouble = 0, ""
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                text = answers.read_text()
                whole = text[read : text.rfind("\n") + 1]
                if whole:
                    read += len(whole)
                    fresh = list(map(json.loads, whole.splitlines()))
                    limit = min(limit + sum(line.get("collecting", 0) for line in fresh), left)
                    lines += fresh
                    self._take(lines)
                    self.write()
                if process.returncode is not None:
                    break
                if time.monotonic() - began > limit + 1:
                    trouble = f"{' '.join(command[1:4])} was stopped after its {limit:.0f} s"
                    break
        finally:
            self._end(process)
        stopped = process.returncode == 2 and any("stopped" in line for line in lines)  # by pytest
        if process.returncode and not trouble and not stopped:
            trouble = f"{' '.join(command[1:])} ended with code {process.returncode}; see log.txt"
        return trouble

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
                if number == signal.SIGTERM:
                    time.sleep(0.1)

    def _take(self, lines: list[Any]) -> None:
        """What is about the card goes to the top, whatever part says it."""
        for line in lines:
            self.found["card"] |= line.pop("about_card", {})
        lines[:] = [line for line in lines if line]


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _card(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    yield _python("benchmarks.on_gpu.card"), {}


def _suite(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    # pytest-benchmark, where it is installed, warns of several workers, which ends the run
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "benchmarks.on_gpu.spread"]
    options = ["-q", *plugins, "--backends", "cupy:0", "tests"]
    if not run.is_stand_in:
        options.append("--require-cuda")
    if find_spec("xdist") and (workers := len(os.sched_getaffinity(0)) - 2) > 1:  # compiling kernels is what takes its time
        options += ["-n", str(min(workers, 14))]
    # the tests compute with JAX on the CPU; by itself it would take most of the card's memory
    yield _python("pytest", *options), {"JAX_PLATFORMS": "cpu"}


def _verify(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    yield _python("benchmarks.on_gpu.verified"), {}


def _steps(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    for precision, contestants in CONTESTANTS.items():
        if run.is_stand_in and precision == "TF32":
            continue  # it has none
        for name in contestants:
            variables = {}
            if name == "lanes_off":  # whose products are CuPy's own
                variables = {"ANYARRAY_LANES": "0", "CUPY_TF32": str(int(precision == "TF32"))}
            variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
            yield _python("benchmarks.on_gpu.steps", name, precision), variables


def _kernels(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    yield _python("benchmarks.on_gpu.kernels"), {}


def _training(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    yield _python("benchmarks.on_gpu.training"), {}


def _sanitizer(run: Run) -> Iterator[tuple[list[str], dict[str, str]]]:
    yield _python("benchmarks.on_gpu.sanitized"), {}


PARTS = (
    Part("card", 40, _card),
    Part("suite", 110, _suite),
    Part("verify", 30, _verify),
    Part("steps", 170, _steps),
    Part("kernels", 30, _kernels),
    Part("training", 30, _training),
    Part("sanitizer", 40, _sanitizer),
    Part("suite, rest", 480, _suite),
)
"""In the order of their worth. What one part leaves of its time the last one has."""


def failures(parts: dict[str, Any]) -> list[Any]:
    """What went wrong. A slice of the suite ends where its time does, in the midst of a test if need be: that is no failure
    where some tests ran."""
    found: list[Any] = []
    for name, part in parts.items():
        is_cut = name.startswith("suite") and any("test" in line for line in part["lines"])
        found += [trouble for trouble in part["trouble"] if not (is_cut and "was stopped after" in trouble)]
        found += [line for line in part["lines"] if line.get("wrong")]
    return found


def main() -> int:
    """Run them; 0 where all parts came to their end and found nothing wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__import__(__package__).__doc__)
    parser.add_argument("folder", type=Path, help="where results.json, report.md and log.txt go")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of what may be missing here")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together; their shares stay")
    parser.add_argument("--only", help=f"parts, of: {', '.join(part.name for part in PARTS)}")
    given = parser.parse_args()
    chosen = {name.strip() for name in given.only.split(",")} | {"card"} if given.only else None
    with Run(given.folder, given.seconds, given.wheels) as run:
        run.write()
        for part in PARTS:
            if chosen is None or part.name in chosen:
                run.part(part)
            if part.name == "card" and not run.found["card"].get("works"):
                print(f"no card works here: {run.found['card'].get('doctor', ['see log.txt'])[-1]}", file=sys.stderr)
                return 2
    print((given.folder / "report.md").read_text())
    return 1 if failures(run.found["parts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
