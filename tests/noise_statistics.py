"""Is the noise standard normal, and does one value of it say nothing of another?

    python tests/noise_statistics.py                          2^26 float32 values, and other streams
    python tests/noise_statistics.py --log2 32 --json FILE    2^32 of them, with the rows in a file
    python tests/noise_statistics.py --page                   writes docs/explanation/statistics.md

A test here is a class: `add` takes a stream piece by piece, `results` gives p-values. All of them
are two-sided, so that a stream which is too even shows as one that is uneven does. They look at the
values alone, and so may be fed a stream that is broken on purpose: test_statistics.py does, and
runs a short form of what is run here.

What a float can hold is discrete, and a test must not take that for a fault. Bins are by the upper
16 bits of a value, and their edges lie half way between neighbouring values, so each has the
probability of the reals that round into it: in the half types every value is a bin of its own. No
edge lies within NARROWEST of zero: there the radii that u near 1 can give, which are 2^-24 apart in
u, lie further apart than the values.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import integrate, linalg, special, stats
from torch import Tensor

from reparam_fused import fold_in, noise

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "statistics.md"
ROWS = PAGE.with_suffix(".json")
DIEHARDER = [PAGE.with_name(f"dieharder{again}.txt") for again in ("", "-again")]

#: Values of a piece of a stream, and of the segments of it of which lags do not cross the end
PIECE = 1 << 20
SEGMENT = 1 << 16
#: A p-value below is one that no good stream has: chance would show some 300 of them one in
#: 3000 times. Seeds are fixed, so that what a run gives, it gives every time.
THRESHOLD = 1e-6
#: Bins are joined until so many values are expected in one
LEAST = 100
NARROWEST = 2.0**-10
TAILS = (3.0, 4.0, 5.0, 6.0)
#: Within a block, to the one after, and at the strides of registers, loops and pieces of work
PAIR_LAGS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 256, 1024, 4096)
CLASSES = 32
#: Blocks that are kept to be compared with each other
KEPT = 1 << 24


class Result(NamedTuple):
    test: str
    p: float
    seen: float
    expected: float

    @property
    def is_bad(self) -> bool:
        return not self.p >= THRESHOLD  # a NaN is bad


class Test(Protocol):
    def add(self, eps: Tensor) -> None: ...
    def results(self) -> Iterator[Result]: ...


def two_sided(below: float, above: float) -> float:
    return min(2.0 * min(float(below), float(above)), 1.0)  # in this order NaN stays NaN


def of_normal(z: float) -> float:
    return float(2.0 * stats.norm.sf(abs(z)))


def of_chi2(test: str, chi2: float, freedom: int) -> Result:
    p = two_sided(stats.chi2.cdf(chi2, freedom), stats.chi2.sf(chi2, freedom))
    return Result(test, p, float(chi2), freedom)


def lanes_of(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float64 else 4


def upper_bits(eps: Tensor) -> Tensor:
    """The upper 16 bits of each value: from 0 those of negative ones, then those of others."""
    step = eps.element_size() // 2
    return eps.view(torch.int16)[step - 1 :: step].to(torch.int32) + 32768


@cache
def edges(dtype: torch.dtype) -> NDArray[np.float64]:
    """The lower edges of the bins of positive values, half way to the largest value below."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    lowest = torch.arange(1, 32768) << (8 * dtype.itemsize - 16)
    values = [bits.to(integers).view(dtype).double().numpy() for bits in (lowest - 1, lowest)]
    with np.errstate(invalid="ignore"):  # of infinity and NaN
        middle = values[0] + (values[1] - values[0]) / 2
    return np.concatenate([[0.0], np.where(np.isfinite(values[1]), middle, np.inf)])


@cache
def probabilities(dtype: torch.dtype) -> NDArray[np.float64]:
    """Of each upper_bits, of a standard normal that is rounded to dtype."""
    above = special.ndtr(-np.append(edges(dtype), np.inf))
    return np.tile(above[:-1] - above[1:], 2)


def in_order(of_bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """From the order of upper_bits to that of values, in the last dimension."""
    negative, positive = np.split(of_bits, 2, axis=-1)
    return np.concatenate([negative[..., ::-1], positive], axis=-1)


def joined(dtype: torch.dtype, n: int) -> NDArray[np.int64]:
    """Where groups of bins begin, in the order of values, that each expect enough of n values."""
    lower = np.concatenate([[-np.inf], -edges(dtype)[1:][::-1], edges(dtype)])
    expected = n * in_order(probabilities(dtype))
    starts, have = [0], 0.0
    for i, more in enumerate(expected.tolist()):
        if have >= LEAST and abs(lower[i]) >= NARROWEST:
            starts.append(i)
            have = 0.0
        have += more
    if have < LEAST and len(starts) > 1:
        starts.pop()
    return np.array(starts)


def of_anderson_darling(a2: float) -> tuple[float, float]:
    """How probable less is, and more, by the series of Anderson and Darling (1952). Of a sum of
    chi-squares with the weights 1/2, 1/6, 1/12, ... the first has the upper tail: within 4 %."""
    if not a2 < 8:
        above = math.sqrt(3) * float(stats.chi2.sf(2 * a2, 1))
        return 1 - above, above
    below = 0.0
    for j in range(10):
        c = (4 * j + 1) ** 2 * math.pi**2 / (8 * a2)

        def integrand(w: float, c: float = c) -> float:
            return math.exp(a2 / (8 * (w * w + 1)) - c * (1 + w * w))

        below += special.binom(-0.5, j) * (4 * j + 1) * integrate.quad(integrand, 0, np.inf)[0]
    below *= math.sqrt(2 * math.pi) / a2
    return below, 1 - below


class Bins:
    """Counts in bins, lane by lane, and beyond the tails."""

    def __init__(self, dtype: torch.dtype, lanes: int, name: str = "") -> None:
        self.dtype, self.lanes, self.name = dtype, lanes, name
        self.counts = torch.zeros(lanes << 16, dtype=torch.int64)

    def add(self, eps: Tensor) -> None:
        bits = upper_bits(eps).view(-1, self.lanes)
        bits = bits + (torch.arange(self.lanes, dtype=torch.int32) << 16)
        self.counts += torch.bincount(bits.view(-1), minlength=len(self.counts))

    def results(self) -> Iterator[Result]:
        by_bits = self.counts.view(self.lanes, -1).double().numpy()
        counts, p = in_order(by_bits), in_order(probabilities(self.dtype))
        n = counts[0].sum()
        starts = joined(self.dtype, int(n))
        counts, p = np.add.reduceat(counts, starts, axis=1), np.add.reduceat(p, starts)
        chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
        infinite_or_nan = by_bits[:, np.tile(np.isinf(edges(self.dtype)), 2)].sum()
        chi2 = math.inf if infinite_or_nan else chi2
        yield of_chi2(f"{self.name}chi-square", chi2, self.lanes * (len(starts) - 1))
        if self.name:
            return

        counts, n = counts.sum(0), self.lanes * n
        below = np.cumsum(p)[:-1]
        off = np.cumsum(counts)[:-1] / n - below
        d = math.sqrt(n) * np.abs(off).max()
        p_of_d = two_sided(stats.kstwobign.cdf(d), stats.kstwobign.sf(d))
        yield Result("Kolmogorov-Smirnov", p_of_d, d, 0.8687)
        # The integral of the definition as a sum over bins
        above = np.cumsum(p[::-1])[::-1][1:]
        weight = (p[:-1] + p[1:]) / 2
        a2 = float(n * (off**2 * weight / (below * above)).sum())
        yield Result("Anderson-Darling", two_sided(*of_anderson_darling(a2)), a2, 1.0)

        for tail in TAILS:
            first = int(torch.tensor([tail], dtype=self.dtype).view(torch.int16)[-1])
            beyond = by_bits.reshape(-1, 2, 32768)[..., first:].sum()
            one = 2.0 * special.ndtr(-edges(self.dtype)[first])
            yield of_binomial(f"beyond {tail:g}", beyond, n, one)

    def near_zero(self) -> float:
        """How many values have an absolute value below 2^-30."""
        end = int(torch.tensor([2.0**-30], dtype=self.dtype).view(torch.int16)[-1])
        return float(self.counts.view(-1, 2, 32768)[..., :end].sum())


def of_binomial(test: str, seen: float, n: float, one: float) -> Result:
    p = two_sided(stats.binom.cdf(seen, n, one), stats.binom.sf(seen - 1, n, one))
    return Result(test, p, seen, n * one)


class Moments:
    """The means of the powers to the 8th."""

    def __init__(self) -> None:
        self.n = 0
        self.sums = torch.zeros(9, dtype=torch.float64)

    def add(self, eps: Tensor) -> None:
        x = eps.double()
        x2 = x * x
        x3, x4 = x2 * x, x2 * x2
        self.n += len(x)
        self.sums[1] += x.sum()
        pairs = ((x, x), (x2, x), (x2, x2), (x3, x2), (x3, x3), (x4, x3), (x4, x4))
        self.sums[2:] += torch.stack([torch.dot(a, b) for a, b in pairs])

    def results(self) -> Iterator[Result]:
        def moment(k: int) -> float:
            return float(special.factorial2(k - 1)) if k % 2 == 0 else 0.0

        for k in range(1, 9):
            mean = self.sums[k].item() / self.n
            deviation = math.sqrt((moment(2 * k) - moment(k) ** 2) / self.n)
            yield Result(f"moment {k}", of_normal((mean - moment(k)) / deviation), mean, moment(k))


class Largest:
    """The largest absolute value."""

    def __init__(self) -> None:
        self.n, self.seen = 0, 0.0

    def add(self, eps: Tensor) -> None:
        self.n += len(eps)
        self.seen = float(np.maximum(self.seen, eps.abs().amax().item()))  # NaN stays NaN

    def results(self) -> Iterator[Result]:
        yield of_maximum("largest value", self.seen, self.n)


def of_maximum(test: str, seen: float, n: int) -> Result:
    """Of the largest absolute value of n normals; its median is what is expected."""
    none_above = n * math.log1p(-of_normal(seen))
    median = stats.norm.isf(-math.expm1(math.log(0.5) / n) / 2)
    return Result(test, two_sided(math.exp(none_above), -math.expm1(none_above)), seen, median)


class Lags:
    """Correlations of values, and of their squares, at every lag to half a segment."""

    def __init__(self) -> None:
        self.n = 0
        self.spectra = torch.zeros(2, SEGMENT // 2 + 1, dtype=torch.float64)

    def add(self, eps: Tensor) -> None:
        x = eps.double()
        self.n += len(x)
        for spectrum, of in zip(self.spectra, (x, x * x - 1.0), strict=True):
            segments = torch.fft.rfft(of.view(-1, SEGMENT))
            spectrum += torch.view_as_real(segments).square_().sum((0, -1))

    def results(self) -> Iterator[Result]:
        for name, spectrum in zip(("values", "squares"), self.spectra, strict=True):
            lags = torch.fft.irfft(spectrum)
            # Over the variance that was seen: else all lags would share its deviation
            z = (lags[1 : SEGMENT // 2] / lags[0] * math.sqrt(self.n)).numpy()
            yield of_chi2(f"{name}, lags 1 to 64", (z[:64] ** 2).sum(), 64)
            yield of_chi2(f"{name}, lags to 2^15", (z**2).sum(), len(z))
            yield of_maximum(f"{name}, largest at any lag", float(np.abs(z).max()), len(z))


class Pairs:
    """Two values at a lag in a table of classes, one table a lane."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.lanes = lanes_of(dtype)
        p = probabilities(dtype)
        middle = in_order(np.cumsum(in_order(p)) - in_order(p) / 2)  # its own inverse on negatives
        self.class_of = torch.from_numpy((CLASSES * middle).clip(0, CLASSES - 1).astype(np.int32))
        size = self.lanes * CLASSES * CLASSES
        self.tables = torch.zeros(len(PAIR_LAGS), size, dtype=torch.int64)

    def add(self, eps: Tensor) -> None:
        second = self.class_of[upper_bits(eps)]
        lane = torch.arange(self.lanes, dtype=torch.int32)
        first = ((second.view(-1, self.lanes) + CLASSES * lane) * CLASSES).view(-1)
        for table, lag in zip(self.tables, PAIR_LAGS, strict=True):
            table += torch.bincount(first[:-lag] + second[lag:], minlength=len(table))

    def results(self) -> Iterator[Result]:
        for lag, tables in zip(PAIR_LAGS, self.tables, strict=True):
            chi2 = freedom = 0
            for table in tables.view(self.lanes, CLASSES, CLASSES).numpy():
                # Given the margins, which the tables of two lanes share
                table = table[table.any(1)][:, table.any(0)]
                of_table = stats.chi2_contingency(table, correction=False)
                chi2, freedom = chi2 + of_table.statistic, freedom + of_table.dof
            yield of_chi2(f"pairs at lag {lag}", chi2, freedom)


class Rotated:
    """16 values turned by a Hadamard matrix are 16 independent normals again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.matrix = torch.from_numpy(linalg.hadamard(16)).to(dtype) / 4
        self.bins = Bins(dtype, 1, "16 values rotated, ")

    def add(self, eps: Tensor) -> None:
        self.bins.add((eps.view(-1, 16) @ self.matrix).view(-1))

    def results(self) -> Iterator[Result]:
        return self.bins.results()


class Repeats:
    """Blocks that come twice, of a part of all blocks that is chosen by their value."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.blocks = n // lanes_of(dtype)
        self.below = 2**63 - 1 if self.blocks <= KEPT else 2**63 // self.blocks * KEPT
        self.kept: list[Tensor] = []

    def add(self, eps: Tensor) -> None:
        low, high = eps.view(torch.int64).view(-1, 2).unbind(-1)
        mixed = low * 0x1E3779B97F4A7C15 + high * 0x27D4EB2F165667C5
        mixed = (mixed ^ mixed >> 29) * 0x165667B19E3779F9  # the upper bits are of all of them
        self.kept.append(mixed[(mixed & 2**63 - 1) < self.below])

    def results(self) -> Iterator[Result]:
        kept = torch.cat(self.kept).sort().values
        seen = int((kept[1:] == kept[:-1]).sum())
        expected = len(kept) * self.blocks / 2**65
        yield Result("repeated blocks", float(stats.poisson.sf(seen - 1, expected)), seen, expected)


def tests_of(dtype: torch.dtype, n: int) -> list[Test]:
    """The battery for n values."""
    tests: list[Test] = [Bins(dtype, lanes_of(dtype)), Moments(), Lags(), Pairs(dtype)]
    if dtype.itemsize > 2:  # sums of rounded values lie on a grid, and a rounded block may repeat
        tests += [Largest(), Rotated(dtype), Repeats(n, dtype)]
    return tests


def results(pieces: Iterable[Tensor], tests: Iterable[Test]) -> list[Result]:
    tests = list(tests)
    for eps in pieces:
        for test in tests:
            test.add(eps)
    return [result for test in tests for result in test.results()]


class Stream(NamedTuple):
    """piece(i) has its values from i * PIECE on."""

    what: str
    piece: Callable[[int], Tensor]
    dtype: torch.dtype = torch.float32


def keys_of(seeds: Tensor | int, offsets: Tensor | int) -> Tensor:
    words = torch.broadcast_tensors(torch.as_tensor(seeds), torch.as_tensor(offsets))
    return torch.stack(words, -1).view(torch.uint64)


def of_one_key(seed: int, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """From 2^21 counters before 2^32 on, so that the carry into the high word is within."""
    first, step = 2**32 - 2**21, PIECE // lanes_of(dtype)
    return lambda i: noise(keys_of(seed, first + i * step), PIECE, dtype=dtype)


def of_many_keys(keys: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
    """The first block of each of the keys with these numbers."""
    n = PIECE // 4
    return lambda i: noise(keys(torch.arange(i * n, (i + 1) * n)), n, 4).view(-1)


STREAMS = {
    "float32": Stream("one key, counter by counter", of_one_key(20261128, torch.float32)),
    "float64": Stream("another key", of_one_key(1, torch.float64), torch.float64),
    "bfloat16": Stream("another key", of_one_key(2**40, torch.bfloat16), torch.bfloat16),
    "float16": Stream("another key", of_one_key(2**63 - 1, torch.float16), torch.float16),
    "seeds": Stream(
        "the first block of each of the seeds from 2^32 - 2^19 on, one after the other",
        of_many_keys(lambda i: keys_of(i + 2**32 - 2**19, 0)),
    ),
    "offsets": Stream(
        "the block at each multiple of 2^32: the high word of the counter counts",
        of_many_keys(lambda i: keys_of(3, i << 32)),
    ),
    "split": Stream(
        "the first block of each child of one key",
        of_many_keys(lambda i: fold_in(keys_of(4, 0), i)),
    ),
    "fold_in": Stream(
        "the first block of child 7 of each seed from 0 on",
        of_many_keys(lambda i: fold_in(keys_of(i, 0), 7)),
    ),
    "layers": Stream(
        "the first block of four layers' keys in each step: grandchildren of one key",
        of_many_keys(lambda i: fold_in(fold_in(keys_of(5, 0), i // 4), i % 4)),
    ),
}


def pieces_of(name: str, log2: int) -> int:
    """Of 2^log2 float32 values, and a sixteenth of that of any other stream."""
    return 1 << max(0, (log2 if name == "float32" else log2 - 4) - 20)


def measure(name: str, pieces: int) -> dict[str, Any]:
    """The rows of a stream."""
    stream, start = STREAMS[name], time.monotonic()
    bins, *others = tests_of(stream.dtype, pieces * PIECE)
    assert isinstance(bins, Bins)
    found = results(map(stream.piece, range(pieces)), [bins, *others])
    least, seconds = min(found, key=lambda r: r.p), time.monotonic() - start
    print(f"{name}: {pieces} x 2^20 values, {seconds:.1f} s, least p {least.p:.2g}, {least.test}")
    return {
        "values": pieces * PIECE,
        "near zero": bins.near_zero(),
        "results": [result._asdict() for result in found],
    }


def table(header: list[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(p: float) -> str:
    return f"{p:.2f}" if p >= 0.01 else f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}"


def power_of_two(n: int) -> str:
    assert n & (n - 1) == 0
    return f"2^{n.bit_length() - 1}"


def tables(rows: dict[str, Any]) -> dict[str, str]:
    """What the page has between its markers."""
    of_stream = {
        name: {row["test"]: Result(**row) for row in rows[name]["results"]} for name in STREAMS
    }
    # Whether a block repeats is a count that is 0 or not, and no p-value to speak of
    judged = {
        name: {test: r for test, r in found.items() if test != "repeated blocks"}
        for name, found in of_stream.items()
    }
    every = [(r.p, r.test, name) for name, found in judged.items() for r in found.values()]
    least, test, where = min(every)
    by_chance = min(1.0, least * len(every))
    uniform = stats.kstest([p for p, *_ in every], "uniform").pvalue
    bad = sum(p < THRESHOLD for p, *_ in every)
    repeats = sum(r["repeated blocks"].seen for r in of_stream.values() if "repeated blocks" in r)
    summary = (
        f"There are {len(every)} p-values, and {bad or 'none'} of them below {THRESHOLD:g}. The "
        f"least is {shown(least)} ({test} of `{where}`); among so many, one as small is had by "
        f"chance with a probability of at most {by_chance:.2f} (Bonferroni's correction). A "
        f"Kolmogorov-Smirnov test of whether they are spread evenly from 0 to 1, as if all were "
        f"independent, has p = {shown(uniform)}. {int(repeats) or 'No'} blocks came twice."
    )
    streams = table(
        ["stream", "values", "what", "p-values", "least"],
        (
            [
                f"`{name}`",
                power_of_two(rows[name]["values"]),
                stream.what,
                str(len(judged[name])),
                shown(min(r.p for r in judged[name].values())),
            ]
            for name, stream in STREAMS.items()
        ),
    )
    names = list(dict.fromkeys(test for found in of_stream.values() for test in found))
    p_values = table(
        ["p-value of", *(f"`{name}`" for name in STREAMS)],
        (
            [test, *(shown(f[test].p) if test in f else "" for f in judged.values())]
            for test in names
            if test != "repeated blocks"
        ),
    )
    tails = table(
        ["absolute value beyond", "float32, expected", "seen", "float64, expected", "seen"],
        (
            [
                f"{tail:g}",
                *(
                    f"{figure:,.1f}" if figure % 1 else f"{figure:,.0f}"
                    for name in ("float32", "float64")
                    for figure in (
                        of_stream[name][f"beyond {tail:g}"].expected,
                        of_stream[name][f"beyond {tail:g}"].seen,
                    )
                ),
            ]
            for tail in TAILS
        ),
    )
    zero = (
        f"Of the {power_of_two(rows['float32']['values'])} float32 values "
        f"{rows['float32']['near zero']:.0f} had an absolute value below 2^-30."
    )
    return {
        "summary": summary,
        "streams": streams,
        "p-values": p_values,
        "tails": tails,
        "zero": zero,
        **of_dieharder(*(DieharderRow.all_of(file.read_text()) for file in DIEHARDER)),
    }


class DieharderRow(NamedTuple):
    test: str
    ntuple: str
    p: float
    said: str

    @staticmethod
    def all_of(text: str) -> list[DieharderRow]:
        """What dieharder printed."""
        line = re.compile(r"^ *(\w+)\| *(\d+)\| *\d+\| *\d+\|([\d.]+)\| +(\w+) *$", re.M)
        return [DieharderRow(name, n, float(p), said) for name, n, p, said in line.findall(text)]


def of_dieharder(first: list[DieharderRow], again: list[DieharderRow]) -> dict[str, str]:
    """Its tests, and those of its p-values that were weak beside those of another key."""
    groups = {row.test: [other for other in first if other.test == row.test] for row in first}
    lines = []
    for name, rows in {**groups, "**all**": first}.items():
        said = [row.said for row in rows]
        counts = [str(said.count(word)) for word in ("PASSED", "WEAK", "FAILED")]
        ends = [f"{end(row.p for row in rows):.4f}" for end in (min, max)]
        lines.append([name, str(len(rows)), *counts, *ends])
    of_other_key = {
        (row.test, row.ntuple): ", ".join(
            f"{other.p:.4f}" for other in again if other[:2] == row[:2]
        )
        for row in first
    }
    return {
        "dieharder": table(
            ["test", "p-values", "passed", "weak", "failed", "least", "largest"], lines
        ),
        "dieharder again": table(
            ["weak", "n-tuple", "p-value", "of another key"],
            (
                [row.test, row.ntuple, f"{row.p:.4f}", of_other_key[row[:2]]]
                for row in first
                if row.said != "PASSED"
            ),
        ),
    }


def with_tables(page: str) -> str:
    for name, text in tables(json.loads(ROWS.read_text())).items():
        begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        _, marker, after = rest.partition(end)
        assert marker, f"no place for {name}"
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streams", nargs="*", metavar="STREAM", help=f"of {', '.join(STREAMS)}")
    parser.add_argument("--log2", type=int, default=26, help="2^LOG2 float32 values. Default: 26")
    parser.add_argument("--json", type=Path, help="a file whose rows of these streams are replaced")
    parser.add_argument("--page", action="store_true", help="only write the page from its rows")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(with_tables(PAGE.read_text()))
        return 0
    torch.set_num_threads(1)
    bad = 0
    for name in arguments.streams or STREAMS:
        rows = measure(name, pieces_of(name, arguments.log2))
        bad += sum(Result(**row).is_bad for row in rows["results"])
        if arguments.json:
            known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
            arguments.json.write_text(json.dumps({**known, name: rows}, indent=1) + "\n")
    return bad


if __name__ == "__main__":
    sys.exit(main())
