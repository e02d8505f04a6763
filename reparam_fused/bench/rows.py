"""From a case to raw rows: what was measured, on which machine, of which commit."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch

from ..check import environment
from . import accuracy, memory
from .cases import Case
from .timer import Cache, Turns, threads


@dataclass(frozen=True)
class Row:
    """One rival in one case. Seconds are of one call; a ratio is its time over ours."""

    device: str
    group: str
    case: str
    dtype: str
    shape: str
    numel: int
    passes: str
    #: Where a GPU found the operands; of the host's time, and on the CPU, empty
    cache: str
    threads: int
    call: str
    rounds: int
    seconds: float
    seconds_low: float
    seconds_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    #: What the call reads and writes at least; 0: not counted
    moved: int
    #: The most that it holds at one time; 0: not measured
    peak: int
    #: "same bits", "x ULP" or nothing
    error: str


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower one, the median and the upper one."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rows_of(case: Case, device: torch.device, turns: Turns, errors: bool = True) -> Iterator[Row]:
    """What the turns of a case came to."""
    ours = turns.seconds["fused"]
    found = accuracy.of(case.line, case.dtype, device) if errors else {}
    for name, taken in turns.seconds.items():
        low, middle, high = quartiles(taken)
        ratios = [theirs / mine for theirs, mine in zip(taken, ours, strict=True)]
        ratio_low, ratio, ratio_high = quartiles(ratios)
        measured = case.group == "forms" and name in ("fused", "eager")
        yield Row(
            device=str(device),
            group=case.group,
            case=case.name,
            dtype=str(case.dtype).removeprefix("torch."),
            shape=" x ".join(map(str, case.shape)),
            numel=case.numel,
            passes=case.passes,
            cache=turns.cache or "",
            threads=torch.get_num_threads(),
            call=name,
            rounds=len(taken),
            seconds=middle,
            seconds_low=low,
            seconds_high=high,
            ratio=ratio,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            moved=case.moved or 0,
            peak=memory.peak_bytes(turns.calls[name], device) if measured else 0,
            error=found.get(name, ""),
        )


def measure(case: Case, device: torch.device, seconds: float) -> list[Row]:
    """All rows of a case: on a GPU twice, with a cold and with a warm cache."""
    caches: tuple[Cache | None, ...] = (None,)
    if device.type == "cuda" and not case.host:
        caches = ("cold", "warm")
    with threads(case.threads), case.context():
        rivals = case.make(device)
        found: list[Row] = []
        for cache in caches:
            turns = Turns(rivals, device, cache)
            turns.run(seconds)
            found += rows_of(case, device, turns)
    return found


def commit() -> str:
    """Of the checkout that Python was started in, or nothing."""
    with suppress(OSError, subprocess.CalledProcessError):
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return result.stdout.strip()
    return ""


def about() -> dict[str, str | None]:
    """The machine, the versions and the commit."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "when": now,
        "commit": commit(),
        "threads": str(torch.get_num_threads()),
    } | environment()


def _short(row: Row) -> dict[str, Any]:
    """With as many digits as a time has."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in asdict(row).items()
    }


def write_json(rows: Iterable[Row], facts: dict[str, str | None], file: TextIO) -> None:
    """All rows under what they were measured on."""
    text = ",\n".join(json.dumps(_short(row)) for row in rows)
    file.write(f'{{"environment": {json.dumps(facts, indent=1)},\n"rows": [\n{text}\n]}}\n')


def read_json(path: Path) -> tuple[dict[str, str], list[Row]]:
    """What write_json wrote."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content["environment"], [Row(**row) for row in content["rows"]]


def write_csv(rows: Iterable[Row], facts: dict[str, str | None], file: TextIO) -> None:
    """A line for each row; machine, versions and commit stand in each."""
    names = [field.name for field in fields(Row)]
    shared = {
        k: facts.get(k) for k in ("when", "commit", "reparam_fused", "torch", "python", "cpu")
    }
    writer = csv.DictWriter(file, [*shared, "gpu", *names])
    writer.writeheader()
    for row in rows:
        writer.writerow(shared | {"gpu": facts.get(row.device)} | asdict(row))
