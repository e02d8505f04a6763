"""Write the figures of the README and of docs/ from the raw rows of a run.

    python -m reparam_fused bench --json benchmarks/results/cpu.json     # measure: some minutes
    python benchmarks/pages.py                                           # write the pages
    python benchmarks/pages.py --check                                   # only say what is stale

`make pages` does both. In a page, what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`
is written here; the picture says in its metadata of which rows it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from aims import BOTH, EVERY_CASE, FORWARD, aimed_at

from reparam_fused.bench import plot
from reparam_fused.bench.rows import Row, read_json
from reparam_fused.bench.table import RIVALS, by_case, duration, spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
FIGURE = ROOT / "docs" / "figures" / "time-over-size.png"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "README.md")
#: Why a small call takes more than 0.8 of the time of the line that it replaces, by how the names
#: of the cases begin. No row of the table may be above that without one.
REASONS = {
    ("std", "one std", "log_std", "rho", 'patch("normal")'): "The eager line is short, `mu + std * "
    "eps` or one function more. Most of the time of ours is what PyTorch takes for one "
    "`autograd.Function` in Python, as for all others.",
    ("patch(cls)",): "Most of the time is the class itself: its chunk, its clamp and two "
    "exponentials that it computes whether they are used or not.",
    ("split", "fold_in"): "The function of `torch.func._random` is one operation in C++, too.",
    ("vmap of grad",): "PyTorch enters each operation once for `vmap` and once for `grad`; for an "
    "operation that is registered in Python that takes longer than for its own.",
}
CELLS = dict[str, Row]


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table; all columns but the first to the right."""
    titles = list(header)
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def group(rows: list[Row], name: str) -> list[CELLS]:
    return list(by_case(row for row in rows if row.group == name))


def machine(facts: dict[str, str]) -> str:
    """On what the rows were measured."""
    return (
        f"Measured on {facts['when']} at commit `{facts['commit']}`: {facts['cpu']}, "
        f"{facts['threads']} threads, {facts['backend cpu']}, Python {facts['python']}, torch "
        f"{facts['torch']}. The raw rows are in the repository, `benchmarks/results/cpu.json`."
    )


def sizes(rows: list[Row]) -> str:
    """A table for each dtype and pass, with the errors above it."""
    parts = []
    cases = group(rows, "sizes")
    for dtype in dict.fromkeys(case["fused"].dtype for case in cases):
        errors = next(case for case in cases if case["fused"].dtype == dtype)
        accuracy = "; ".join(
            f"{name}: {errors[name].error}"
            for name in ("fused", *RIVALS)
            if name in errors and errors[name].error
        )
        parts.append(f"#### {dtype}\n\nLargest error, {accuracy}.")
        for passes in (FORWARD, BOTH):
            lines = []
            for case in cases:
                ours = case["fused"]
                if (ours.dtype, ours.passes) != (dtype, passes):
                    continue
                lines.append(
                    [
                        ours.case.replace("^", "<sup>") + "</sup>",
                        f"{ours.seconds / ours.numel * 1e9:.3g}",
                        f"{ours.moved / ours.seconds * 1e-9:.1f}",
                        f"{case['floor'].ratio:.0%}",
                        *(spread(case.get(rival)) for rival in RIVALS),
                    ]
                )
            header = [f"{passes}: elements", "ns an element", "GB/s", "of the floor", *RIVALS]
            parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def forms(rows: list[Row]) -> str:
    """Forms and heads, then views."""
    lines = [
        [
            f"{case['fused'].case}, {case['fused'].shape}",
            duration(case["fused"].seconds),
            f"{case['floor'].ratio:.0%}",
            spread(case["eager"]),
            spread(case.get("torch.compile")),
            case["fused"].error or "-",
            case["eager"].error or "-",
        ]
        for case in group(rows, "forms")
    ]
    header = ["forward + backward", "time", "of the floor", "eager", "torch.compile"]
    first = markdown([*header, "error", "error of eager"], lines)
    lines = []
    cases = group(rows, "views")
    for forward, both in zip(cases[::2], cases[1::2], strict=True):
        assert forward["fused"].case == both["fused"].case
        lines.append(
            [
                forward["fused"].case,
                f"{forward['fused'].seconds / forward['fused'].numel * 1e9:.3g}",
                spread(forward["eager"]),
                f"{both['fused'].seconds / both['fused'].numel * 1e9:.3g}",
                spread(both["eager"]),
            ]
        )
    header = ["", "forward, ns an element", "eager", "with backward, ns an element", "eager"]
    return f"{first}\n\n{markdown(header, lines)}"


def calls_table(rows: list[Row]) -> list[tuple[str, dict[str, Row]]]:
    """By the name of a way, the eager row of each pass."""
    found: dict[str, dict[str, Row]] = {}
    for case in group(rows, "calls"):
        found.setdefault(case["fused"].case, {})[case["fused"].passes] = case["eager"]
    return list(found.items())


def needs_reason(passes: dict[str, Row]) -> bool:
    return any(1 / row.ratio > 0.8 for row in passes.values())


def reason(name: str) -> str | None:
    """The one that fits."""
    return next((text for starts, text in REASONS.items() if name.startswith(starts)), None)


def calls(rows: list[Row]) -> str:
    """Our time over the eager line's, and why where it is more than 0.8 of it."""
    ours = {
        (case["fused"].case, case["fused"].passes): case["fused"] for case in group(rows, "calls")
    }
    lines: list[list[str]] = []
    notes: list[str] = []
    for name, passes in calls_table(rows):
        mark = ""
        if needs_reason(passes):
            text = str(reason(name))
            if text not in notes:
                notes.append(text)
            mark = f" ({notes.index(text) + 1})"
        cells = []
        for kind in (FORWARD, BOTH):
            row = passes.get(kind)
            if row is None:
                cells += ["-", "-"]
                continue
            low, middle, high = (1 / x for x in (row.ratio_high, row.ratio, row.ratio_low))
            cells += [
                duration(ours[name, kind].seconds), f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            ]  # fmt: skip
        lines.append([name + mark, *cells])
    header = ["", "forward", "fused / eager", "with backward", "fused / eager"]
    return (
        markdown(header, lines)
        + "\n\n"
        + "\n".join(f"{i}. {text}" for i, text in enumerate(notes, 1))
    )


def memory(rows: list[Row]) -> str:
    """The most that is held, in tensors of the sample's size."""
    lines = []
    for case in group(rows, "forms"):
        held = [case[name].peak / (4 * case["fused"].numel) for name in ("fused", "eager")]
        lines.append([f"{case['fused'].case}, {case['fused'].shape}", *(f"{x:.1f}" for x in held)])
    return markdown(["forward + backward", "fused", "eager"], lines)


def workloads(rows: list[Row]) -> str:
    """Steps by both."""
    lines = [
        [case["fused"].case, *(duration(case[n].seconds) for n in ("fused", "eager")),
         spread(case["eager"])]
        for case in group(rows, "workloads")
    ]  # fmt: skip
    return markdown(["a training step", "fused", "eager", "eager / fused"], lines)


def aims(rows: list[Row]) -> str:
    """Each aim, and every case that is slower than the line that it replaces."""
    lines = [
        [
            f"{row.group}: {row.case}, {row.dtype}, {row.passes}",
            row.call,
            f"{bound:.2f}",
            spread(row),
            "met" if row.ratio >= bound else "missed",
        ]
        for row, bound in aimed_at(rows)
        if bound != EVERY_CASE["eager"] or row.ratio < bound
    ]
    header = ["", "rival", "rival / fused, at least", "measured", ""]
    return markdown(header, lines)


def summary(rows: list[Row]) -> str:
    """One sentence for the README, of a large call and a small one."""

    def ratio(name: str, case: str, passes: str) -> str:
        found = next(
            c["eager"] for c in group(rows, name)
            if (c["eager"].case, c["eager"].passes, c["eager"].dtype) == (case, passes, "float32")
        )  # fmt: skip
        return f"{found.ratio:.1f}"

    large, small = "2^22", "one shape"
    return (
        f"Of 4M elements the eager line takes {ratio('sizes', large, FORWARD)} times as long "
        f"forward and {ratio('sizes', large, BOTH)} with the backward; of 128 x 20, on one thread, "
        f"{ratio('calls', small, FORWARD)} and {ratio('calls', small, BOTH)} times."
    )


def blocks(rows: list[Row], facts: dict[str, str]) -> dict[str, str]:
    """What stands in the pages, by name."""
    made = {f.__name__: f(rows) for f in (sizes, forms, calls, memory, workloads, summary, aims)}
    return made | {"machine": machine(facts)}


def filled(text: str, made: dict[str, str]) -> str:
    """The text with each of its blocks as it is made now."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            return match[0]
        return f"<!-- begin {name} -->\n\n{made[name]}\n\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", replace, text, flags=re.DOTALL)


def digest() -> str:
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


def rows_of_figure(path: Path) -> str | None:
    """The digest of the rows that a figure was made of."""
    match = re.search(rb"tEXtSource\x00rows ([0-9a-f]{64})", path.read_bytes())
    return match[1].decode() if match else None


def stale() -> list[str]:
    """The files that do not show the rows that there are."""
    facts, rows = read_json(RESULTS)
    made = blocks(rows, facts)
    old = [page for page in PAGES if filled(page.read_text(), made) != page.read_text()]
    if not FIGURE.exists() or rows_of_figure(FIGURE) != digest():
        old.append(FIGURE)
    return [str(path.relative_to(ROOT)) for path in old]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    if parser.parse_args().check:
        found = stale()
        print(*(f"{name} is stale: python benchmarks/pages.py" for name in found), sep="\n")
        return 1 if found else 0
    facts, rows = read_json(RESULTS)
    made = blocks(rows, facts)
    for page in PAGES:
        page.write_text(filled(page.read_text(), made))
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    plot.save(rows, FIGURE, {"Source": f"rows {digest()}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
