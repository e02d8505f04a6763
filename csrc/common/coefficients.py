"""Derive the polynomial coefficients of normal.h, reparam.h, softplus.h and kl_divergence.h.

    python csrc/common/coefficients.py

prints each table as C++ hexadecimal literals, with the error that the exact
polynomial has before any rounding of its evaluation. Needs mpmath. The tables
are near-minimax (Chebyshev) fits in 60 digits, each coefficient then rounded
to the working precision; tests/test_numerics.py holds the result to its ULPs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import mpmath as mp

mp.mp.dps = 60
SQRT_HALF = mp.sqrt(mp.mpf(1) / 2)


class Fit(NamedTuple):
    """target(y) on [low, high], fitted by a polynomial in y of this degree."""

    name: str
    target: Callable[[mp.mpf], mp.mpf]
    low: mp.mpf
    high: mp.mpf
    degree: dict[str, int]  # precision -> degree


def neg2_log1p_over(f: mp.mpf) -> mp.mpf:
    """-2 ln(1 + f) / f, so that -2 ln(1 + f) keeps its relative error near 0."""
    return -2 * mp.log1p(f) / f if f else mp.mpf(-2)


def sinpi_over(y: mp.mpf) -> mp.mpf:
    """sin(pi x) / x in y = x^2."""
    x = mp.sqrt(y)
    return mp.sinpi(x) / x if y else mp.pi


def cospi_minus_1_over(y: mp.mpf) -> mp.mpf:
    """(cos(pi x) - 1) / x^2 in y = x^2, so that cos(0) is exactly 1."""
    return -2 * mp.sinpi(mp.sqrt(y) / 2) ** 2 / y if y else -(mp.pi**2) / 2


def exp2_minus_1_over(t: mp.mpf) -> mp.mpf:
    """(2^t - 1) / t, so that exp(0) is exactly 1."""
    return mp.expm1(t * mp.log(2)) / t if t else mp.log(2)


def expm1_minus_x_over(f: mp.mpf) -> mp.mpf:
    """(e^f - 1 - f) / f^2, so that e^f - 1 - f keeps its relative error near 0."""
    return (mp.expm1(f) - f) / f**2 if f else mp.mpf(1) / 2


def minus_log1p_over(f: mp.mpf) -> mp.mpf:
    """(f - ln(1 + f)) / f^2, so that f - ln(1 + f) keeps its relative error near 0."""
    return (f - mp.log1p(f)) / f**2 if f else mp.mpf(1) / 2


def log1p_minus_x_over(t: mp.mpf) -> mp.mpf:
    """(ln(1 + t) - t) / t^2, so that ln(1 + t) / t is exactly 1 at 0."""
    return -minus_log1p_over(t)


def minus_reciprocal(t: mp.mpf) -> mp.mpf:
    """-1 / (1 + t): an estimate, for both precisions."""
    return -1 / (1 + t)


FITS = [
    Fit("kLog", neg2_log1p_over, SQRT_HALF - 1, 2 * SQRT_HALF - 1, {"f32": 8, "f64": 20}),
    Fit("kSin", sinpi_over, mp.mpf(0), mp.mpf(1) / 4, {"f32": 4, "f64": 8}),
    Fit("kCos", cospi_minus_1_over, mp.mpf(0), mp.mpf(1) / 4, {"f32": 4, "f64": 8}),
    Fit("kExp2", exp2_minus_1_over, mp.mpf(-1), mp.mpf(1), {"f32": 6, "f64": 12}),
    Fit("kExpm1", expm1_minus_x_over, -mp.log(2), mp.log(2), {"f32": 6, "f64": 13}),
    Fit(
        "kLogTerm",
        minus_log1p_over,
        SQRT_HALF - 1,
        2 * SQRT_HALF - 1,
        {"f32": 8, "f64": 20},
    ),
    Fit("kLog1p", log1p_minus_x_over, mp.mpf(0), mp.mpf(1), {"f32": 8, "f64": 20}),
    Fit("kReciprocal", minus_reciprocal, mp.mpf(0), mp.mpf(1), {"f32": 5}),
]


def rounded(value: mp.mpf, precision: str) -> float:
    """value to the nearest number of the precision (double rounding is harmless here)."""
    if precision == "f64":
        return float(value)
    return struct.unpack("f", struct.pack("f", float(value)))[0]


def main() -> None:
    for fit in FITS:
        for precision, degree in fit.degree.items():
            exact = mp.chebyfit(fit.target, [fit.low, fit.high], degree + 1)
            table = [rounded(c, precision) for c in exact]
            points = [fit.low + (fit.high - fit.low) * i / 2000 for i in range(2001)]
            worst = max(abs(mp.polyval(table, y) / fit.target(y) - 1) for y in points)
            print(f"// {fit.name} {precision}, highest power first; error {mp.nstr(worst, 3)}")
            print(",\n".join(f"    {c.hex()}" for c in table) + "\n")


if __name__ == "__main__":
    main()
