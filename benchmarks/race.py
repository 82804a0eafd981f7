"""All contestants together, case by case: checked against ours, timed in turns, in several runs with new processes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from .cases import DIGITS, work
from .processes import Failed, Worker

OURS = ("ours", "hand")
PEERS = ("numpy", "torch", "jax", "thinc", "sklearn")
"""What this package is compared with: the modules that it takes."""
LABELS = {
    "ours": "ours",
    "hand": "ours by hand",
    "numpy": "NumPy",
    "torch": "PyTorch",
    "jax": "JAX",
    "thinc": "thinc",
    "sklearn": "scikit-learn",
    "limit": "the limit",
}
TOLERANCE = 0.05
"""How far a peer's results may be from ours, by the norm of the difference over that of ours. It tells other work from
rounding, and from eps inside or outside of Adam's bias correction; `anyarray-linear verify` is the command for exactness."""


class Different(Exception):
    """A contestant that computes something else than ours."""


def missing(names: list[str]) -> dict[str, str]:
    """The peers that are not installed, and that they are not."""
    return {name: f"{name} is not installed" for name in names if util.find_spec(name) is None}


class Race:
    """The contestants on one device, and in `report` what was found out about them."""

    def __init__(self, peers: list[str], device: str, report: dict[str, Any], rounds: int, burst: float) -> None:
        self.names = (*OURS, *peers, "limit")
        self.device, self.report, self.rounds, self.burst = device, report, rounds, burst

    def run(self, cases: dict[str, dict[str, Any]], digits: bool, quick: bool = False) -> None:
        """Every case once, with processes of its own: adds rounds to the report."""
        kinds = {case["kind"] for case in cases.values()} | ({"digits"} if digits else set())
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            workers: dict[str, Worker] = {}
            for name in self.names:
                try:
                    worker = stack.enter_context(Worker(name, self.device, Path(folder, f"{name}.log")))
                except Failed as failed:
                    if name not in PEERS:
                        raise
                    self.report["not_here"][name] = str(failed)
                    continue
                if kinds & {*worker.kinds}:
                    workers[name] = worker
                    self.report["versions"][name] = worker.version
            if "limit" in workers and self.report["roofs"] is None:
                self.report["roofs"] = workers["limit"].ask("roofs", quick=quick)
            for name, case in cases.items():
                found = self.report["cases"].setdefault(name, {**case, **work(case), "how": {}, "left_out": {}, "times": {}})
                able = {who: worker for who, worker in workers.items() if case["kind"] in worker.kinds}
                self._add(found["times"], self._timed(able, name, found, Path(folder)))
            if digits:
                found = self.report["digits"] = self.report["digits"] or {**DIGITS, "times": {}, "accuracies": {}}
                able = {who: worker for who, worker in workers.items() if "digits" in worker.kinds}
                answers = self._digits(able)
                for what, key in (("times", "seconds"), ("accuracies", "accuracy")):
                    self._add(found[what], {who: [each[key] for each in each_] for who, each_ in answers.items()})

    def count(self, cases: dict[str, dict[str, Any]], names: tuple[str, ...] = OURS) -> None:
        """What our sides of the cases ask of the device, for the CPU stand-in."""
        with tempfile.TemporaryDirectory() as folder:
            for who in names:
                with Worker(who, self.device, Path(folder, f"{who}.log")) as worker:
                    self.report["versions"][who] = worker.version
                    for name, case in cases.items():
                        if case["kind"] not in worker.kinds:
                            continue
                        found = self.report["cases"].setdefault(name, {**case, "counts": {}})
                        try:
                            worker.ask("prepare", case=case, results=None, burst=None)
                            found["counts"][who] = worker.ask("count")
                        except Failed as failed:
                            self.report["complaints"].append(f"{name}: {LABELS[who]}: {failed}")

    def _timed(self, workers: dict[str, Worker], name: str, found: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The seconds of each round of those who can do the case and do the same work."""
        case = {key: found[key] for key in ("kind", "batch", "sizes")}
        able: dict[str, Worker] = {}
        expected: dict[str, Any] | None = None
        for who, worker in workers.items():
            path = folder / f"{who}.npz"
            try:
                worker.ask("prepare", case=case, results=None if who == "limit" else str(path), burst=self.burst)
                if who != "limit":
                    expected = _loaded(path) if expected is None else expected  # of ours, who come first
                    check(LABELS[who], _loaded(path), expected)
                able[who] = worker
                found["left_out"].pop(who, None)
            except (Different, Failed) as why:
                found["left_out"][who] = str(why)
                if who not in PEERS or isinstance(why, Different):
                    self.report["complaints"].append(f"{name}: {LABELS[who]}: {why}")
        answers = interleaved(able, self.rounds)
        for who, worker in able.items():
            if how := worker.ask("how")["how"]:
                found["how"][who] = how
        return {who: [answer["seconds"] for answer in each] for who, each in answers.items()}

    def _digits(self, workers: dict[str, Worker]) -> dict[str, list[dict[str, Any]]]:
        """Whole trainings, a seed each round; the first warms up."""
        for worker in workers.values():
            worker.ask("digits", seed=0)
        return interleaved(workers, self.rounds, "digits", seed=True)

    def _add(self, times: dict[str, list[float]], more: dict[str, list[float]]) -> None:
        for who, each in more.items():
            times.setdefault(who, []).extend(each)


def summarise(report: dict[str, Any]) -> None:
    """Medians, quartiles, ratios and limits, of all rounds that are in the report."""
    for case in report["cases"].values():
        results = case["results"] = {who: summary(each) for who, each in case.pop("times").items()}
        case["ratios"] = {base: ratios(results, base) for base in OURS if base in results}
        limit = results.pop("limit")
        moved = case["bytes_besides"] / report["roofs"]["bytes_per_second"]
        case["limit"] = {"of": limit, "seconds_of_bytes": moved, "seconds": limit["median"] + moved}
        case["limit"]["reached"] = {who: case["limit"]["seconds"] / each["median"] for who, each in results.items()}
    if (digits := report["digits"]) is not None:
        digits["results"] = {who: summary(each) for who, each in digits.pop("times").items()}
        digits["ratios"] = ratios(digits["results"], "ours")
        for who, each in digits.pop("accuracies").items():
            digits["results"][who]["accuracy"] = summary(each)


def check(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise `Different` unless `theirs` are `ours` but for rounding, result by result."""
    for what, expected in ours.items():
        got = theirs.get(what)
        if got is None:
            raise Different(f"{name} gives no {what}")
        if got.size != expected.size:
            raise Different(f"{name} gives a {what} of shape {got.shape}, and ours has {expected.shape}")
        distance = float(np.linalg.norm(got.reshape(expected.shape) - expected))
        if not distance <= TOLERANCE * float(np.linalg.norm(expected)):
            raise Different(f"{name} computes something else: {what} is {distance:.3g} from ours, by the norm")


def _loaded(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def interleaved(
    workers: dict[str, Worker], rounds: int, do: str = "burst", *, seed: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Every worker's answer in each round, asked in an order that rotates."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    names = list(workers)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            answers[name].append(workers[name].ask(do, **({"seed": i} if seed else {})))
    return answers


def summary(values: list[float]) -> dict[str, Any]:
    """The median, the quartiles and the least of `values`, and these."""
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "least": min(values), "rounds": values}


def ratios(results: dict[str, Any], base: str) -> dict[str, float]:
    """Theirs / ours, of medians."""
    return {who: each["median"] / results[base]["median"] for who, each in results.items() if who not in (base, "limit")}
