"""A plugin of pytest: the suite spread so that the first minutes cover every module, and a second run has the rest.

First comes one test of every module, on the card where the module has such; then, one module after the other again and
again, the next of what runs on the card: of each function one case before the second of any. What needs no card comes
last. When the time is up, the run ends; collecting the tests is not of that time.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .answering import LEFT, SCRATCH, SECONDS, append, tell

_done = Path(SCRATCH) / "tests_done"  # one line for each test that has run
_began = time.monotonic()
_end = float("inf")
_WAITS = "no time was left"


def _module(item: Any) -> str:
    return str(item.nodeid.partition("::")[0])


def _is_on_card(item: Any) -> bool:
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    return str(backend).startswith("cupy")


def _has_many_examples(item: Any) -> bool:
    return hasattr(getattr(item, "obj", None), "hypothesis")


def spread(items: list[Any]) -> list[Any]:
    """The tests in the order of their worth on a card: a module's first, then what runs on the card, then all else."""
    cases: Counter[tuple[str, bool]] = Counter()
    keyed = []
    for i, item in enumerate(items):
        function, elsewhere = item.nodeid.partition("[")[0], not _is_on_card(item)
        keyed.append((elsewhere, cases[function, elsewhere], _has_many_examples(item), i, item))
        cases[function, elsewhere] += 1
    before: Counter[tuple[str, bool]] = Counter()
    rounds = []
    for elsewhere, _, _, i, item in sorted(keyed, key=lambda key: key[:4]):
        module = _module(item)
        is_first = not before[module, True] + before[module, False]
        rounds.append((not is_first, elsewhere, before[module, elsewhere], i, item))
        before[module, elsewhere] += 1
    return [item for *_, item in sorted(rounds, key=lambda key: key[:4])]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put the tests in order, less those that the first run had; their time begins."""
    global _end
    before = set(_done.read_text().splitlines()) if _done.exists() else set()
    items[:] = [item for item in spread(items) if item.nodeid not in before]
    now = time.monotonic()
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":  # the others collect the same
        about = {"collected": len(items), "modules": len(set(map(_module, items))), "before": len(before)}
        tell(**about, collecting=round(now - _began, 1))
    limit = min(now + SECONDS, _began + LEFT) - now
    _end = now + limit - min(8, limit / 4)  # the test that is running then, and the summary


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """End the run when there is no time left."""
    if time.monotonic() > _end:
        tell(stopped="its time was up")
        item.session.shouldstop = "its time is up"
        pytest.skip(_WAITS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    """Tell of each test how it ended, and note for the second run that it has run."""
    report = yield
    if report.skipped and _WAITS in report.longreprtext:
        return report
    if report.when == "call" or report.outcome != "passed":
        found = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            found["wrong"] = report.longreprtext[-1500:]
        tell(**found)
        append(_done, report.nodeid)
    return report
