"""Rivals called in turn, and a table of ratios at the end.

Other work shares the machines, so a time says little: what is compared is the
median of many rounds, in each of which every rival ran once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

Call = Callable[[], Any]
ROWS: list[tuple[str, str, str, str, str]] = []


class Turns:
    """Times each rival once before every round of the benchmark."""

    def __init__(self, rivals: dict[str, Call]) -> None:
        self.rivals = rivals
        self.seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def __call__(self) -> None:
        for name, call in self.rivals.items():
            start = time.perf_counter()
            call()
            self.seconds[name].append(time.perf_counter() - start)


def spread(values: list[float]) -> str:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


@pytest.fixture
def in_turn(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """in_turn(ours, rivals, targets, rounds): run, record ratios, and hold them to targets.

    A ratio is rival / ours, the speed-up; for a rival named "floor" it is ours / floor.
    """

    def run(ours: Call, rivals: dict[str, Call], targets: dict[str, float], rounds: int) -> None:
        for call in (ours, *rivals.values()):
            call()
            call()
        turns = Turns(rivals)
        benchmark.pedantic(ours, setup=turns, rounds=rounds)
        mine = benchmark.stats.stats.data
        for name, seconds in turns.seconds.items():
            pairs = zip(mine, seconds, strict=True)
            floor = name == "floor"
            ratios = [m / s if floor else s / m for m, s in pairs]
            middle = statistics.median(ratios)
            target = targets.get(name)
            met = "" if target is None else "met" if (middle <= target) == floor else "MISSED"
            bound = "" if target is None else f"{'<=' if floor else '>='} {target}"
            benchmark.extra_info[name] = {"ratio": middle, "target": target}
            what = "ours / floor" if floor else f"{name} / ours"
            ROWS.append((request.node.name, what, spread(ratios), bound, met))

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    header = ("case", "ratio", "median [quartiles]", "target", "")
    widths = [max(len(row[i]) for row in [header, *ROWS]) for i in range(5)]
    terminalreporter.section("ratios, rivals called in turn")
    for row in (header, *ROWS):
        terminalreporter.write_line("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)))
