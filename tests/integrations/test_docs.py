"""The pages of the documentation that need other libraries: their Python runs.

Red when a call of one of these libraries that a page shows no longer works, patched or not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sybil", reason="sybil is not installed: make integrations")
pytest.importorskip("diffusers", reason="diffusers is not installed: make integrations")
pytest.importorskip("pyro", reason="Pyro is not installed: make integrations")
pytest.importorskip("scvi", reason="scvi-tools is not installed: make integrations")
pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")

from pages import OF_LIBRARIES, run_python


@pytest.mark.parametrize("page", OF_LIBRARIES, ids=lambda page: page.name)
def test_python_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # scvi-tools writes logs
    assert run_python(page) > 0
