"""The documentation: its Python runs, it builds, and what it says can be looked up.

Red when a call, an argument or a printed result changes that a page shows; when a link, a figure,
a command or a file that a page names is gone; when a page states a time of a GPU without a source.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("sybil", reason="pip install reparam_fused[docs]")
pytest.importorskip("mkdocs", reason="pip install reparam_fused[docs]")

from installing import run
from markdown.extensions.toc import slugify
from pages import DOCS, OF_LIBRARIES, PAGES, ROOT, run_python, text_of

import reparam_fused
from reparam_fused.__main__ import COMMANDS

FIGURES = DOCS / "figures"
GPU = re.compile(r"\b(?:A100|H100|H200|B200|B300|RTX|GH200|L40|MI\d00|sm_\d+)\b")
FIGURE_OF_TIME = re.compile(
    r"\d ?(?:ns|us|ms|%|GB/s|TB/s|times|x)(?!\w)"  # with its unit
    r"|\d+(?:\.\d+)? of (?:the|its) "  # 0.9 of the time
    r"|\|\s*\d+(?:\.\d+)?\s*[|;(]"  # a cell of a table
)
SOURCED = re.compile(r"\bmodelled\b|gpu[-_]report", re.IGNORECASE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():  # of a page that failed half way
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if "```python" in p.read_text() and p not in OF_LIBRARIES],
    ids=name_of,
)
def test_python_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(page) > 0


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, with no way out to any server."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"
    built = run(
        sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder),
        cwd=ROOT, HTTP_PROXY=nowhere, HTTPS_PROXY=nowhere, NO_MKDOCS_2_WARNING="1",
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|img|iframe|source)[^>]* src=[\"']?(?:https?:)?//[^>]+"
            r"|<link[^>]* href=[\"']?(?:https?:)?//[^>]+"
            r"|url\([\"']?(?:https?:)?//",
            page.read_text(),
        )
        assert not fetched, f"{page.relative_to(site)}: {fetched}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_the_reference_has_every_name(site: Path) -> None:
    """Each is rendered from its docstring, with no markup left that a browser does not know."""
    html = "".join(page.read_text() for page in sorted((site / "reference").glob("*.html")))
    anchors = set(re.findall(r'id="reparam_fused\.([\w.]+)"', html))
    names = {"nn.Reparameterize" if name == "nn" else name for name in reparam_fused.__all__}
    assert names <= anchors, names - anchors
    left = re.findall(r":(?:func|meth|class|math|attr):|\.\. \w+::|Examples?::|Raises:\s", html)
    assert not left


def links(text: str) -> list[str]:
    """The targets of links and pictures that are not in code."""
    prose = re.sub(r"^```[\s\S]*?^```|`[^`\n]*`", "", text, flags=re.M)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors_of(page: Path) -> set[str]:
    prose = re.sub(r"^```[\s\S]*?^```", "", text_of(page), flags=re.M)
    return {slugify(title.strip(), "-") for title in re.findall(r"^#+ (.*)$", prose, re.M)}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} of {name_of(page)}"
        if anchor:
            assert anchor in anchors_of(target), f"{link} of {name_of(page)}"


def test_figures_have_a_source() -> None:
    """Each is used, is small, and its row in docs/figures/README.md names what wrote it."""
    used = set()
    for page in PAGES:
        for path in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", page.read_text()):
            used.add((page.parent / path).resolve())
    assert used == {f for f in FIGURES.iterdir() if f.name != "README.md"}
    table = (FIGURES / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\S+\.png) \| (.+) \|$", table, re.M))
    assert set(rows) == {figure.name for figure in used}
    for figure in used:
        assert figure.stat().st_size < 150_000, figure
        assert re.search(r"`python (?:-m \w+|[\w/]+\.py)|the same command", rows[figure.name])


@each_page
def test_nothing_is_left_to_do(page: Path) -> None:
    assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", text_of(page))


def statements(text: str) -> Iterator[tuple[str, str]]:
    """Each paragraph, item of a list and row of a table, and what introduces it: the paragraph
    before a list or a table, and a table's first row."""
    before = ""
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith("|"):
            header, *rows = block.strip().splitlines()
            yield from ((row, before + header) for row in rows)
        else:
            first, *items = re.split(r"^ *(?:[-*]|\d+\.) ", block, flags=re.M)
            if first.strip() and not first.lstrip().startswith("<!--"):
                yield first, ""
                before = first
            yield from ((item, before) for item in items)


def unsourced(text: str) -> list[str]:
    """Statements of a time or a ratio of a GPU that are neither "modelled" nor of a report."""
    return [
        statement
        for statement, before in statements(text)
        if GPU.search(statement)
        and FIGURE_OF_TIME.search(statement)
        and not SOURCED.search(before + statement)
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("An H100 takes 1.2 times as long.", True),
        ("On the H200 it took 0.89 of the time.", True),
        ("Times of GPUs.\n\n| GPU | us | us |\n|---|---|---|\n| A100 | 395 | 176 |", True),
        ("It is modelled.\n\nA B200 reaches 90 % of that.", True),
        ("Cases:\n\n- an H100: 2 us\n- a B200, modelled: 1 us", True),
        ("A B200 reaches, modelled, 90 % of that.", False),
        ("All is modelled:\n\n| GPU | us | us |\n|---|---|---|\n| A100 | 395 | 176 |", False),
        ("An H200 took 1.02 times as long ([report](gpu-report.md)).", False),
        ("One H200 ran it, with torch 2.11.", False),
    ],
)
def test_what_counts_as_unsourced(text: str, found: bool) -> None:
    assert bool(unsourced(text)) == found


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ("gpu-report.md", "changelog.md")], ids=name_of
)
def test_times_of_a_gpu_are_sourced(page: Path) -> None:
    """The report is itself the source."""
    assert unsourced(text_of(page)) == []


@each_page
def test_commands_and_files_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    in_code = re.findall(r"^    .*$|`[^`\n]+`", text, re.M)
    for code in in_code:
        for target in re.findall(r"\bmake ([a-z]+)\b", code):
            assert target in targets, code
        for command in re.findall(r"python -m reparam_fused (\w+)", code):
            assert command in COMMANDS, code
        for path in re.findall(
            r"(?<![\w/])(?:examples|tests|benchmarks|csrc|docs|reparam_fused)/[\w./-]*\w", code
        ):
            if "NAME" not in path:
                assert (ROOT / path).exists(), code


def test_the_roofline_is_that_of_its_script() -> None:
    """`python benchmarks/roofline.py` prints what the page has."""
    spec = importlib.util.spec_from_file_location("roofline", ROOT / "benchmarks" / "roofline.py")
    assert spec is not None
    assert spec.loader is not None
    roofline = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = roofline
    spec.loader.exec_module(roofline)
    page = (DOCS / "explanation" / "roofline.md").read_text()
    (block,) = re.findall(r"<!-- begin roofline -->(.*)<!-- end roofline -->", page, re.DOTALL)
    assert block.strip() == roofline.table()


@pytest.mark.parametrize("name", [n for n in reparam_fused.__all__ if n not in ("nn", "backends")])
def test_docstrings_are_complete(name: str) -> None:
    """What it takes, gives and raises, and an example that test_install.py runs."""
    public = getattr(reparam_fused, name)
    sections = ["Args:", "Raises:", "Examples:"] + ["Returns:"] * (not isinstance(public, type))
    for section in sections:
        assert f"    {section}\n" in public.__doc__, section
    for parameter in inspect.signature(public).parameters:
        assert re.search(rf"^ +\*?{parameter} \(", public.__doc__, re.M), parameter


def test_help_reads_from_the_top() -> None:
    """It says what the package is, and names everything that it has."""
    said = run(
        sys.executable, "-c", "import reparam_fused; help(reparam_fused)",
        cwd=ROOT, PAGER="cat", TERM="dumb", PYTHONPATH=os.pathsep.join(sys.path),
    ).stdout  # fmt: skip
    description = said[said.index("DESCRIPTION") : said.index("PACKAGE CONTENTS")]
    for name in reparam_fused.__all__:
        assert f"``{name}" in description, name
