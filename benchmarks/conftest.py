"""The table of `python -m reparam_fused bench` at the end of a run of pytest."""

from __future__ import annotations

from typing import Any

import pytest

from reparam_fused.bench import table
from reparam_fused.bench.rows import Row

ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
AIMS: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[AIMS] = [], []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("rivals, called in turn")
        table.show(config.stash[ROWS])
    if config.stash[AIMS]:
        terminalreporter.section("aims")
        terminalreporter.write_line("\n".join(config.stash[AIMS]))
