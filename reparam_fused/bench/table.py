"""The rows of a run as tables for a reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from .rows import Row

TITLES = {
    "sizes": "The sample, over sizes",
    "forms": "Forms of the scale, and sums beside the sample",
    "views": "Rows, columns and other views",
    "calls": "Every way to make a small call, of one thread",
    "workloads": "Whole training steps",
}
RIVALS = ("eager", "torch.compile", "func._random")


def by_case(rows: Iterable[Row]) -> Iterator[dict[str, Row]]:
    """The rows of each case, by the name of the call."""

    def case(row: Row) -> tuple[str, ...]:
        return (
            row.device, row.group, row.case, row.dtype, row.shape, row.passes, row.cache,
        )  # fmt: skip

    for _, found in groupby(rows, case):
        yield {row.call: row for row in found}


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def spread(row: Row | None) -> str:
    """How many times as long as ours, and the quartiles."""
    if row is None:
        return ""
    digits = 1 if row.ratio >= 10 else 2
    low, middle, high = (f"{x:.{digits}f}" for x in (row.ratio_low, row.ratio, row.ratio_high))
    return f"{middle} [{low}, {high}]"


def times(row: Row | None) -> str:
    """The same, and the error below."""
    return spread(row) + (f"\n{row.error}" if row is not None and row.error else "")


def cells(case: dict[str, Row]) -> dict[str, str]:
    """One line of a table, by the titles of its columns."""
    ours, at = case["fused"], case.get("floor")
    large = ours.group in ("sizes", "forms", "views")
    made = {
        "case": f"{ours.case}, {ours.shape}" if ours.group == "forms" else ours.case,
        "dtype": ours.dtype,
        "pass": ours.passes,
        "cache": ours.cache,
        "fused": duration(ours.seconds) + (f"\n{ours.error}" if ours.error else ""),
        "ns/element": f"{ours.seconds / ours.numel * 1e9:.3g}" if large else "",
        "GB/s": f"{ours.moved / ours.seconds * 1e-9:.1f}" if ours.moved else "",
        "of the floor": f"{at.ratio:.0%}" if at else "",
    }
    made |= {name: times(case.get(name)) for name in RIVALS}
    if ours.peak:
        tensor = ours.numel * 4
        made["peak"] = f"{ours.peak / tensor:.1f} / {case['eager'].peak / tensor:.1f}"
    return made


def show(rows: list[Row]) -> None:
    """Print a table for each device and group: only columns in which something stands."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 160
    for (device, group), found in groupby(rows, lambda row: (row.device, row.group)):
        lines = [cells(case) for case in by_case(found)]
        shown = [c for c in dict.fromkeys(c for line in lines for c in line)
                 if any(line.get(c) for line in lines)]  # fmt: skip
        made = Table(title=f"{TITLES[group]} ({device})", title_justify="left", box=None)
        for name in shown:
            made.add_column(name, justify="left" if name in ("case", "dtype") else "right")
        for line in lines:
            made.add_row(*(line.get(name, "") for name in shown))
        console.print(made)
        console.print()
    console.print(LEGEND, highlight=False)


LEGEND = """\
Under a rival's name stands how many times as long as "fused" it takes: the median over rounds in
which all take turns, and the quartiles. Below stand whether "fused" has the bits of
reference.py, and the largest error, in units in the last place of the larger of mu and sigma eps
(of a sum: of the sum). "of the floor" is the time of torch.add on as many bytes as a share of that
of "fused", and "peak" the most memory held, ours / eager's, in tensors of the sample's size."""
