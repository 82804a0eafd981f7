"""The documentation: its code runs, its examples say the truth, and the site can be read without network."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import browser
import numpy as np
import pytest

import anyarray_linear.testing
from anyarray_linear.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md"))


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    line: int
    language: str
    needs: str
    """The module without which it cannot run, or nothing."""
    code: str


_FENCE = re.compile(r"^(?:<!-- (needs|not run): (.+?) -->\n)?```(python|bash)\n(.*?)^```$", re.M | re.S)


def blocks(page: str) -> Iterator[Block]:
    """The blocks that are meant to be run, in order: `<!-- needs: torch -->` or `<!-- not run: why -->` may stand above."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        comment, what, language, code = match.groups()
        if comment != "not run":
            yield Block(page, text.count("\n", 0, match.start(4)) + 1, language, what or "", code)


def run_block(block: Block, names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Run Python in `names`; of shell, the commands of this package, in this process."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.code, DOCS / f"{block.page}.md", "exec"), names)
        return
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "anyarray-linear", f"{line!r} cannot be run; is <!-- not run: why --> missing?"
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0, line


NEEDS = sorted({(page, block.needs) for page in PAGES for block in blocks(page)})


@pytest.mark.parametrize(("page", "needs"), NEEDS, ids=[f"{page}-{needs or 'nothing'}" for page, needs in NEEDS])
def test_code_in_the_page_runs(page: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    monkeypatch.chdir(tmp_path)
    for table in DOCS.glob("examples/*.csv"):
        shutil.copy(table, tmp_path)
    names: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        if block.needs in ("", needs):
            run_block(block, names, monkeypatch)


def test_no_block_is_passed_over_in_silence() -> None:
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        assert len(_FENCE.findall(text)) == len(re.findall(r"^```(?:python|bash)$", text, re.M)), page
    assert len({page for page, _ in NEEDS}) >= 6


def test_code_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        run_block(Block("index", 1, "python", "", "assert 1 == 2"), {}, monkeypatch)
    with pytest.raises(AssertionError, match="not run"):
        run_block(Block("index", 1, "bash", "", "rm -rf x"), {}, monkeypatch)
    with pytest.raises(AssertionError, match="explain --in 0"):
        run_block(Block("index", 1, "bash", "", "anyarray-linear explain --in 0"), {}, monkeypatch)


def example(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example has computed, by its own names."""
    script = DOCS / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder)])
    return runpy.run_path(str(script), run_name="__main__")


def test_digits_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = example("digits_from_scratch", tmp_path, monkeypatch)
    assert found["one_layer"] > 0.93
    assert min(found["two_layers"], found["with_fit"]) > found["one_layer"]
    assert max(found["errors"].values()) < 1e-6
    assert (tmp_path / "digits_from_scratch.png").read_bytes().startswith(b"\x89PNG")


def test_co2_ends_where_the_closed_form_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = example("co2", tmp_path, monkeypatch)
    assert found["difference"] < 1e-9
    error, known = found["error"], found["known"]
    assert error(found["curved"], known) < error(found["answer"], known)
    assert error(found["answer"], ~known) > 3 * error(found["answer"], known)  # what the page says of the future
    assert (tmp_path / "co2.png").read_bytes().startswith(b"\x89PNG")


def test_any_arrays_agree_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = example("any_arrays", tmp_path, monkeypatch)
    expected = {str(device) for device in anyarray_linear.testing.usable_devices()}
    assert set(found["results"]) >= expected | ({"torch:cpu"} if importlib.util.find_spec("torch") else set())
    loss_here, accuracy_here, W_here = found["results"]["cpu"]
    assert accuracy_here > 0.9
    for last_loss, accuracy, W in found["results"].values():
        # 230 steps of Adam with a rate of 2e-3 move a weight by 0.4 at most; what rounding makes of it is far less
        assert abs(last_loss - loss_here) < 1e-3
        assert abs(accuracy - accuracy_here) < 0.01
        assert np.abs(W - W_here).max() < 1e-2


def test_every_public_name_is_on_the_api_page() -> None:
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert {f"anyarray_linear.{name}" for name in anyarray_linear.__all__} <= set(shown)
    testing = {f"anyarray_linear.testing.{name}" for name in anyarray_linear.testing.__all__}
    assert testing <= set(shown)


def test_version_is_the_same_everywhere() -> None:
    version = anyarray_linear.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("zensical", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (the extra docs brings it)")
    folder = tmp_path_factory.mktemp("docs")
    for name in ("docs", "anyarray_linear", "docker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("zensical.toml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


LEFTOVERS = {  # what pages show of Markdown that no extension has understood
    "a box": r"(?:!!!|\?\?\?\+?) \w+",
    "a snippet": r"-{1,}8<-{1,}",
    "a fence": r"(?:```|~~~)",
    "a definition of the API page": r"::: \w+",
    "an attribute list": r"\{:? ?[.#]\w+",
    "a heading": r"#{2,} \w+",
    "a table": r"\|(?: ?-+ ?\|)+",
    "a link": r"\[[^\]\n]+\]\([\w./#-]+\)",
}


def leftovers(html: str) -> list[str]:
    """The names of what the page shows of its own source, outside of code."""
    text = re.sub(r"(?s)<(pre|code|script|style|head)\b.*?</\1>", "", html)
    text = unescape(re.sub(r"<[^>]+>", "\n", text))
    return [name for name, pattern in LEFTOVERS.items() if re.search(rf"(?m)(?:^|\s){pattern}", text)]


def test_no_page_shows_its_own_source(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert leftovers(page.read_text(encoding="utf-8")) == [], page.name
    assert leftovers('<p>??? example "co2.py"</p>') == ["a box"]
    assert leftovers("<p>!!! note</p><p>--8&lt;-- </p>") == ["a box", "a snippet"]
    assert leftovers("<p>| a | b |</p>\n<p>|---|---|</p>") == ["a table"]
    assert leftovers("<p>see [this](that.md)</p>") == ["a link"]
    assert leftovers("<code>??? example</code><pre>| --- |</pre>") == []


def test_site_fetches_nothing_and_has_its_equations(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", html):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{page.name}: {tag}"
        assert "arithmatex" not in html
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name
    assert (site / "derivation.html").read_text(encoding="utf-8").count("<math") > 40


def test_api_page_has_signatures_lists_of_arguments_and_examples(site: Path) -> None:
    html = (site / "api.html").read_text(encoding="utf-8")
    for name in anyarray_linear.__all__:
        assert f'id="anyarray_linear.{name}"' in html
    text = re.sub(r"<[^>]+>", "", html)
    assert "&gt;&gt;&gt; layer = Linear(3, 4, seed=0)" in text
    assert "<code>in_features, out_features</code>" in html
    assert not re.search(r"<blockquote>\s*<blockquote>", html)  # what Markdown makes of a doctest that is no code block


def test_a_plot_shows_every_number_of_its_table(site: Path) -> None:
    html = (site / "performance.html").read_text(encoding="utf-8")
    source = (DOCS / "performance.md").read_text(encoding="utf-8")
    titles = re.findall(r"<!-- plot: (.+) -->", source)
    assert titles
    for title in titles:
        table = re.search(re.escape(title) + r".*\n\n((?:\|.*\n)+)", source)
        assert table is not None
        rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table[1].splitlines()]
        plain = [n for n in range(1, len(rows[0])) if all(re.fullmatch(r"[\d.]+(, [\d.]+)*", row[n]) for row in rows[2:])]
        numbers = sum(len(row[n].split(", ")) for n in plain for row in rows[2:])
        svg = html[: html.index(f"<figcaption>{title}<")].rpartition("<svg")[2]
        assert svg.count("<circle") == numbers + len(plain), title  # and one for each name
        ones = re.findall(r'class="one" x1="([\d.]+)"', svg)
        assert len(ones) == 1
        dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)][:numbers]
        values = [float(x) for row in rows[2:] for n in plain for x in row[n].split(", ")]
        assert all((x > float(ones[0])) == (value > 1) for x, value in zip(dots, values, strict=True) if value != 1)


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark"), ("desktop", "dark"), ("phone", "light")])
def test_browser_shows_every_page_without_complaint(site: Path, tmp_path: Path, size: str, scheme: str) -> None:
    with browser.opened("https://site/index.html", tmp_path / "profile", size, scheme, site=site) as (page, wrong):
        for name in PAGES:
            page.goto(f"https://site/{name}.html")
            page.wait_for_load_state("load")
            assert page.locator("h1").count() == 1, name
            assert browser.overflow(page) <= 0, f"{name} is wider than the {size}"
            starts = page.evaluate("[...document.querySelectorAll('figure.plot text')].map(text => text.getBBox().x)")
            assert all(x >= 0 for x in starts), f"a name in a plot of {name} is cut off"
            assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0)")), name
            signatures = page.locator(".doc-signature pre code").all() if size == "desktop" else []
            assert all(box.evaluate("box => box.scrollWidth <= box.clientWidth") for box in signatures), f"{name}: cut off"
        page.goto("https://site/derivation.html")
        equation = page.locator(".equation math").first.bounding_box()
        assert equation["height"] > 20
        assert wrong == []
