"""A page in headless Chromium, watched: what it asks the network for, and what it says on the console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@contextmanager
def opened(
    url: str, folder: Path, size: str = "desktop", scheme: str = "light", *, site: Path | None = None
) -> Iterator[tuple[Any, list[str]]]:
    """The page at `url`, and a list of what is wrong with it so far. `folder` is for the browser's own files.

    site: a folder whose files are what https://site/ has.
    """
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra docs brings it)")
    width, height = SIZES[size]
    wrong: list[str] = []
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            folder,
            executable_path=CHROMIUM,
            args=_ARGUMENTS,
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            offline=True,
        )
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        # a page that is left before all is there is not at fault
        left = "net::ERR_ABORTED"
        page.on("requestfailed", lambda request: request.failure == left or wrong.append(f"failed: {request.url}"))
        known = ("file:", "data:", *(["https://site/", "blob:"] if site else []))
        page.on("request", lambda request: request.url.startswith(known) or wrong.append(f"asked for {request.url}"))
        if site is not None:
            files = site
            context.route("https://site/**", lambda route: route.fulfill(path=files / route.request.url.split("/", 3)[3]))
        page.goto(url)
        page.wait_for_load_state("networkidle")
        yield page, wrong
        context.close()


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))
