"""The cases of `python -m reparam_fused bench`, under pytest-benchmark.

    make bench                                   # all of them
    make bench ARGS='-k "calls and patch"'       # those whose names say so
    make bench ARGS="--benchmark-autosave"       # any option of pytest-benchmark

What pytest-benchmark times is a block of our calls, between those of the rivals: the ratios in the
table at the end are of the same rounds. An aim that is missed is printed and fails nothing, as the
machines are shared; README.md beside this file says what stands in its way.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aims import missed
from conftest import AIMS, ROWS

from reparam_fused.bench import SECONDS
from reparam_fused.bench.cases import Case, cases
from reparam_fused.bench.rows import rows_of
from reparam_fused.bench.timer import Turns, quiet, threads

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case: Case, benchmark: Any, pytestconfig: pytest.Config) -> None:
    with threads(case.threads), case.context():
        turns = Turns(case.make(CPU), CPU)
        rivals = [name for name in turns.calls if name != "fused"]

        def others() -> None:
            for name in rivals:
                turns.take(name)

        with quiet():
            rounds = turns.rounds(SECONDS)
            benchmark.pedantic(turns.take, args=("fused",), setup=others, rounds=rounds)
        rows = list(rows_of(case, CPU, turns))
    benchmark.extra_info |= {"calls in a block": turns.block}
    benchmark.extra_info |= {f"{row.call} / fused": row.ratio for row in rows}
    pytestconfig.stash[ROWS] += rows
    pytestconfig.stash[AIMS] += missed(rows)


def test_import_time(pytestconfig: pytest.Config) -> None:
    """What `import reparam_fused` adds to `import torch`, in fresh processes: at most 50 ms."""
    program = """
import time, torch
start = time.perf_counter()
import reparam_fused
print((time.perf_counter() - start) * 1e3)
"""

    def milliseconds() -> float:
        # From this folder: in the root Python would find the source tree before what is installed.
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parent,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return float(result.stdout)

    taken = statistics.median(milliseconds() for _ in range(7))
    met = "met" if taken <= 50 else "MISSED"
    pytestconfig.stash[AIMS].append(f"import: {taken:.1f} ms, aim 50: {met}")
