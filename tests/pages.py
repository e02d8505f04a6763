"""The pages of the documentation, and how their Python is run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Those that need other libraries: integrations/test_docs.py runs them.
OF_LIBRARIES = [DOCS / "how-to" / "patch-libraries.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def text_of(page: Path) -> str:
    """With the files that it includes."""
    return re.sub(
        r'^--8<-- "(.*)"$', lambda m: (ROOT / m[1]).read_text(), page.read_text(), flags=re.M
    )


def run_python(page: Path) -> int:
    """Every block, one after the other, with the names of those before; how many there were.

    A block is run as it stands, or as a doctest where it has prompts. Raises if one fails.
    """
    parsed = Document.parse(str(page), PythonCodeBlockParser(doctest_optionflags=OPTIONS))
    examples = list(parsed)
    for example in examples:
        example.evaluate()
    found = {example.line for example in examples}
    for fence in re.finditer(r"^[ \t]*```python.*\n([\s\S]*?)^[ \t]*```", page.read_text(), re.M):
        first = page.read_text()[: fence.start()].count("\n") + 1
        lines = range(first, first + fence[0].count("\n") + 1)
        assert found & set(lines), f"{page}, line {first}: no example was made of this block"
    return len(examples)
