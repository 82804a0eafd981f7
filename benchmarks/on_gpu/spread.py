"""A plugin of pytest: the suite spread so that the first minutes cover every module, and a second run has the rest.

In the first run, each module's tests come in the order: of each test function one case, on the card where it has one; then
the next case of each. A module that has had its share of the time left waits for the second run, after one test at least.
When all time is up, the run ends.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .answering import SCRATCH, SECONDS, tell

_first = bool(os.environ.get("ON_GPU_FIRST"))
_done = Path(SCRATCH) / "tests_done.json"
_began = time.monotonic()
_END = _began + SECONDS - 8
_ends: dict[str, float] = {}  # by module: when its share of the time ends, once it has begun
_WAITS = "no time was left"
_modules: set[str] = set()
_ran: set[str] = set()


def _module(item: Any) -> str:
    return str(item.nodeid.partition("::")[0])


def _is_of_the_card(item: Any) -> bool:
    """Whether a test is run on the card, or speaks of it."""
    names = getattr(item, "callspec", None) and str(item.callspec.params.get("backend"))
    return bool(names and names.startswith("cupy"))


def spread(items: list[Any]) -> list[Any]:
    """The tests, of every function the first case first, those on the card before others, module by module."""
    nth: Counter[tuple[str, bool]] = Counter()
    keyed = []
    for i, item in enumerate(items):
        function, on_card = item.nodeid.partition("[")[0], _is_of_the_card(item)
        keyed.append((not on_card, nth[function, on_card], i, item))
        nth[function, on_card] += 1
    by_module: dict[str, list[Any]] = defaultdict(list)
    for *_, item in sorted(keyed, key=lambda key: key[:3]):
        by_module[_module(item)].append(item)
    with_card = sorted(by_module, key=lambda name: not any(map(_is_of_the_card, by_module[name])))
    return [item for name in with_card for item in by_module[name]]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put the tests in order, less those that the first run had."""
    before = set(json.loads(_done.read_text())) if not _first and _done.exists() else set()
    items[:] = [item for item in spread(items) if item.nodeid not in before]
    _modules.update(map(_module, items))
    tell(collected=len(items), modules=len(_modules), before=len(before))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """Pass over what has no time left."""
    now, module = time.monotonic(), _module(item)
    if now > _END:
        if not item.session.shouldstop:
            tell(stopped="its time was up")
        item.session.shouldstop = "its time is up"
        pytest.skip(_WAITS)
    if _first:
        if module not in _ends:
            _ends[module] = now + (_END - now) / (len(_modules) - len(_ends))
        elif now > _ends[module]:
            pytest.skip(_WAITS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    """Tell of each test how it ended."""
    report = yield
    if report.skipped and _WAITS in report.longreprtext:
        return report
    if report.when == "call" or report.outcome != "passed":
        found = {"test": report.nodeid, "outcome": report.outcome}
        if report.failed:
            found["wrong"] = report.longreprtext[-1500:]
        tell(**found)
        _ran.add(report.nodeid)
    return report


def pytest_sessionfinish() -> None:
    """Note what has run, for the second run."""
    before = json.loads(_done.read_text()) if _done.exists() else []
    _done.write_text(json.dumps([*before, *_ran]))
