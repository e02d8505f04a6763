"""The noise is standard normal, to the tails, and one value says nothing of the next.

noise_statistics.py has the tests, which are run here in short. The keys are fixed, so nothing is
left to chance: a run gives what it gave before. A kernel that clamps a tail, uses a word or a
counter twice, or a seed like its neighbour turns them red, and so does each of the broken streams
below.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import noise_statistics as ns
import numpy as np
import pytest
import torch
from helpers import key_of, needs_kernels
from scipy import stats
from test_csrc import COMPILER
from torch import Tensor

from reparam_fused import fold_in, noise, reference


def bad(results: list[ns.Result]) -> dict[str, float]:
    return {result.test: result.p for result in results if result.is_bad}


@needs_kernels
@pytest.mark.parametrize("name", ns.STREAMS)
def test_streams_are_normal(name: str) -> None:
    stream = ns.STREAMS[name]
    results = ns.results(map(stream.piece, range(4)), ns.tests_of(stream.dtype, 4 * ns.PIECE))
    assert len(results) >= 33
    assert bad(results) == {}


@needs_kernels
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_bins_and_tails_of_more_values(name: str) -> None:
    """Of 2^26, 38 lie beyond 5: if none did, p would be 1e-16."""
    stream = ns.STREAMS[name]
    tests = [ns.Bins(stream.dtype, ns.lanes_of(stream.dtype)), ns.Largest()]
    assert bad(ns.results(map(stream.piece, range(64)), tests)) == {}


# Blocks with one of the least words that there are, of the seed 0; found among 2^33
FAR = [(3230741590, 2, 6.72270), (5145262111, 1, -6.75518), (4447901920, 2, -6.44651)]


@pytest.mark.parametrize(("offset", "lane", "value"), FAR)
def test_the_farthest_values(offset: int, lane: int, value: float, device: torch.device) -> None:
    """Red where u is clamped, or has fewer bits: by those of 24 bits no value lies beyond 5.8."""
    eps = noise(key_of(0, offset, device=device), 4)
    assert eps[lane].item() == pytest.approx(value, abs=1e-5)
    half = noise(key_of(0, offset, device=device), 4, dtype=torch.float16)
    assert half[lane].item() == pytest.approx(value, abs=2**-9)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", ns.STREAMS)
def test_streams_are_normal_at_length(name: str) -> None:
    """2^32 float32 values, 2^28 of other streams: ten minutes on one core."""
    rows = ns.measure(name, ns.pieces_of(name, 32))
    assert bad([ns.Result(**row) for row in rows["results"]]) == {}


def good(i: int, dtype: torch.dtype = torch.float32, n: int = ns.PIECE) -> Tensor:
    return noise(key_of(9, i << 32), n, dtype=dtype)


def of_bins() -> ns.Test:
    return ns.Bins(torch.float32, 4)


def of_pairs() -> ns.Test:
    return ns.Pairs(torch.float32)


def of_rotated() -> ns.Test:
    return ns.Rotated(torch.float32)


def of_repeats() -> ns.Test:
    return ns.Repeats(ns.PIECE, torch.float32)


def of_words(change: Callable[[list[Tensor]], list[Tensor]], i: int) -> Tensor:
    """Normals of Philox words that are not those of the contract."""
    blocks = torch.arange(ns.PIECE // 4) + i * ns.PIECE
    w = change(list(reference.words(key_of(10), blocks)))
    lanes = reference._box_muller(w[0], w[1]) + reference._box_muller(w[2], w[3])
    return torch.stack(lanes, -1).view(-1)


def cosine_twice(i: int) -> Tensor:
    eps = good(i)
    eps[1::2] = eps[::2]
    return eps


def every_counter_twice(i: int) -> Tensor:
    return good(i).view(-1, 4)[: ns.PIECE // 8].repeat_interleave(2, 0).view(-1)


def counter_without_high_word(i: int) -> Tensor:
    return good(i % 2)


def neighbouring_seed_repeats(i: int) -> Tensor:
    seeds = torch.arange(ns.PIECE // 4) + i * ns.PIECE
    return noise(ns.keys_of(seeds >> 1, 0), ns.PIECE // 4, 4).view(-1)


def children_of_few_bits(i: int) -> Tensor:
    """Of what fold_in gives 16 bits are used."""
    children = fold_in(key_of(11), torch.arange(ns.PIECE // 4) + i * ns.PIECE)
    seeds = children.view(torch.int64)[:, 0] & 0xFFFF
    return noise(ns.keys_of(seeds, 0), ns.PIECE // 4, 4).view(-1)


def too_even(i: int) -> Tensor:
    """Each 2^-20 of the probability once, in a random order."""
    order = torch.randperm(ns.PIECE, generator=torch.Generator().manual_seed(i))
    return torch.special.ndtri((order.double() + 0.5) / ns.PIECE).float()


def truncated(i: int) -> Tensor:
    bits = good(i).view(torch.int32) & -0x10000
    return bits.view(torch.float32).bfloat16()


def one_nan(i: int) -> Tensor:
    eps = good(i)
    eps[12345] = math.nan
    return eps


def echo(i: int) -> Tensor:
    eps = good(i)
    return eps + 0.01 * eps.roll(20_000)


def loud_and_quiet(i: int) -> Tensor:
    """A block is scaled as a whole: nothing is correlated but the squares."""
    loud = 1 + 0.1 * good(i + 64, n=ns.PIECE // 4).sign()
    return (good(i).view(-1, 4) * loud[:, None]).view(-1)


def signs_of_three(i: int) -> Tensor:
    """Any three values of a block are independent; the fourth has the sign of their product."""
    eps = good(i).view(-1, 4)
    eps[:, 3] = eps[:, 3].abs() * eps[:, :3].prod(-1).sign()
    return eps.view(-1)


def without_tail(i: int) -> Tensor:
    eps = good(i)
    return torch.where(eps.abs() >= 5, 0.5 * eps, eps)


def of(change: Callable[..., list[Tensor]]) -> Callable[[int], Tensor]:
    return lambda i: of_words(lambda w: change(*w), i)


Broken = tuple[Callable[[int], Tensor], Callable[[], ns.Test], str]

# What is wrong: a stream, the test that looks at it, what has to be red
SHORT_LAGS = "values, lags 1 to 64"
BROKEN: dict[str, Broken] = {
    "a word in two lanes": (of(lambda a, b, c, d: [a, b, a, b]), ns.Lags, SHORT_LAGS),
    "an angle of two pairs": (of(lambda a, b, c, d: [a, b, c, b]), ns.Lags, SHORT_LAGS),
    "a radius of two pairs": (
        of(lambda a, b, c, d: [a, b, a, d]),
        ns.Lags,
        "squares, lags 1 to 64",
    ),
    "an angle, then a radius": (of(lambda a, b, c, d: [a, b, b, d]), of_pairs, "pairs at lag 2"),
    "radius and angle of a word": (of(lambda a, b, c, d: [a, a, c, d]), of_bins, "chi-square"),
    "a cosine twice": (cosine_twice, ns.Lags, SHORT_LAGS),
    "signs of three": (signs_of_three, of_rotated, "16 values rotated, chi-square"),
    "a counter twice": (every_counter_twice, of_pairs, "pairs at lag 4"),
    "a block twice": (every_counter_twice, of_repeats, "repeated blocks"),
    "no high word": (counter_without_high_word, of_repeats, "repeated blocks"),
    "a seed as its neighbour": (neighbouring_seed_repeats, ns.Lags, "values, largest at any lag"),
    "children of few bits": (children_of_few_bits, of_repeats, "repeated blocks"),
    "clamped at 5": (lambda i: good(i).clamp(-5, 5), ns.Largest, "largest value"),
    "nothing beyond 5": (without_tail, of_bins, "beyond 5"),
    "an echo": (echo, ns.Lags, "values, largest at any lag"),
    "loud and quiet": (loud_and_quiet, ns.Lags, "squares, lags 1 to 64"),
    "too even in bins": (too_even, of_bins, "chi-square"),
    "too even to an edge": (too_even, of_bins, "Kolmogorov-Smirnov"),
    "too even everywhere": (too_even, of_bins, "Anderson-Darling"),
    "a mean": (lambda i: good(i) + 0.01, ns.Moments, "moment 1"),
    "too wide": (lambda i: good(i) * 1.01, ns.Moments, "moment 2"),
    "skewed": (lambda i: good(i) + 0.01 * good(i) ** 2, ns.Moments, "moment 3"),
    "a NaN in no bin": (one_nan, of_bins, "chi-square"),
    "a NaN in a moment": (one_nan, ns.Moments, "moment 8"),
    "a NaN at a lag": (one_nan, ns.Lags, "squares, lags 1 to 64"),
    "a NaN as the largest": (one_nan, ns.Largest, "largest value"),
    "bfloat16 truncated": (truncated, lambda: ns.Bins(torch.bfloat16, 4), "chi-square"),
}
PIECES = {"no high word": 4, "clamped at 5": 32, "nothing beyond 5": 32}  # of others 1


@needs_kernels
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_is_noticed(name: str) -> None:
    stream, test, expected = BROKEN[name]
    found = bad(ns.results(map(stream, range(PIECES.get(name, 1))), [test()]))
    assert expected in found, found


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that gives them to other batteries of tests."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    binary = tmp_path_factory.mktemp("cpp") / "words"
    source = Path(__file__).parent / "cpp" / "words.cpp"
    subprocess.run(
        [COMPILER, "-O2", "-std=c++17", "-march=native", source, "-o", binary], check=True
    )
    return binary


@pytest.mark.parametrize("of", ["counters", "seeds"])
def test_the_words_of_other_batteries(of: str, words: Path) -> None:
    """They are the contract's, in its order, beyond 2^32 too."""
    first, n = 2**32 - 5000, 10_000
    arguments = ["7", str(first)] if of == "counters" else [str(first), "7"]
    with subprocess.Popen([words, of, *arguments], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        got = torch.frombuffer(bytearray(program.stdout.read(16 * n)), dtype=torch.int32)
    counted = first + torch.arange(n)
    if of == "counters":
        expected = reference.words(key_of(7), counted)
    else:
        blocks = torch.full((1,), 7)
        expected = reference.words(ns.keys_of(counted, 0), blocks)
    stacked = torch.stack([w.flatten() for w in expected], -1).to(torch.int32)
    assert torch.equal(got.view(-1, 4), stacked)


def test_the_page_has_the_figures_of_its_rows() -> None:
    """`python tests/noise_statistics.py --page` writes them; none of them is bad."""
    page = ns.PAGE.read_text()
    assert ns.with_tables(page) == page
    rows = json.loads(ns.ROWS.read_text())
    assert {name: rows[name]["values"] for name in rows} == {
        name: ns.pieces_of(name, 32) * ns.PIECE for name in ns.STREAMS
    }
    for name in ns.STREAMS:
        assert bad([ns.Result(**row) for row in rows[name]["results"]]) == {}


def test_the_largest_value_is_that_of_the_smallest_u() -> None:
    """u = 2^-33 has the radius 6.76, and 2^-65 in fp64 has 9.49: nothing is clamped."""
    words = torch.tensor([0])
    largest, _ = reference._box_muller(words, words)
    assert largest.item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    largest, _ = reference._box_muller_double((words, words, words, words))
    assert largest.item() == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-14)


@pytest.mark.parametrize(
    ("a2", "above"), [(1.933, 0.1), (2.492, 0.05), (3.857, 0.01), (10, 1.38e-5)]
)
def test_percentage_points_of_anderson_darling(a2: float, above: float) -> None:
    """Those of the tables, and one of the tail."""
    assert ns.of_anderson_darling(a2) == pytest.approx((1 - above, above), rel=0.04)


@needs_kernels
def test_the_streams_were_good_before() -> None:
    """The same keys, whole: what was noticed is what was broken."""
    tests = ns.tests_of(torch.float32, ns.PIECE)
    assert bad(ns.results(map(good, range(4)), tests)) == {}
    same_words = of(lambda *w: list(w))
    assert bad(ns.results([same_words(0)], ns.tests_of(torch.float32, ns.PIECE))) == {}


@needs_kernels
def test_a_zero_is_no_fault() -> None:
    """The sine of a whole turn is one: 2^32 float32 values have one or two. Red where a bin about
    zero is so narrow that its probability rounds to nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        eps = good(0, dtype)
        eps[777] = 0.0
        assert bad(ns.results([eps], ns.tests_of(dtype, ns.PIECE))) == {}


@pytest.mark.slow
def test_p_values_are_those_of_normals() -> None:
    """Of another generator, numpy's: each test has p-values that are uniform, in 200 runs."""
    generator = np.random.Generator(np.random.PCG64(0))
    of_test: dict[str, list[float]] = {}
    for _ in range(200):
        eps = torch.from_numpy(generator.standard_normal(ns.PIECE))
        for result in ns.results([eps], ns.tests_of(torch.float64, ns.PIECE)):
            of_test.setdefault(result.test, []).append(result.p)
    for test, p in of_test.items():
        # Their p-values have steps: few values lie there, or none
        if not test.startswith(("beyond 5", "beyond 6", "repeated")):
            assert stats.kstest(p, "uniform").pvalue > 1e-4, test
