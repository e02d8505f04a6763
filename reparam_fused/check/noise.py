"""The noise is standard normal."""

from __future__ import annotations

import math

import torch

from reparam_fused import noise

from .result import Result, key_of

N = 1 << 22
# Normals lie beyond this once in 3e7 figures; the key is fixed, so it is once and for all.
STANDARD_ERRORS = 5.5
# Where the tail 2 exp(-2 x^2) of Kolmogorov's distribution is as small
KOLMOGOROV = 3.0
# A largest |eps| of N normals below this is as rare; sqrt(-2 ln u) ends at u = 2^-33, 2^-65.
LEAST_MAXIMUM = 4.6
LARGEST = {torch.float32: math.sqrt(66 * math.log(2)), torch.float64: math.sqrt(130 * math.log(2))}


def statistics(device: torch.device, dtype: torch.dtype) -> Result:
    """Moments, distribution, tail and the correlation of neighbours of N normals."""
    eps = noise(key_of(12345, 0, device), N, dtype=dtype).double()
    root = math.sqrt(N)
    mean = eps.mean()
    centred = eps - mean
    variance = centred.square().mean()
    scaled = centred / variance.sqrt()
    in_standard_errors = {
        "mean": mean * root,
        "variance": (variance - 1) * root / math.sqrt(2),
        "skewness": (scaled**3).mean() * root / math.sqrt(6),
        "kurtosis": ((scaled**4).mean() - 3) * root / math.sqrt(24),
        "neighbours": (eps[1:] * eps[:-1]).mean() * root,
        # The lanes of a Philox block: Box-Muller makes 0 and 1, and 2 and 3, of the same words.
        "lanes of a pair": (eps[::2] * eps[1::2]).mean() * root / math.sqrt(2),
        "pairs of a block": (eps[::4] * eps[2::4]).mean() * root / 2,
    }
    cdf = torch.special.ndtr(eps.sort().values)
    steps = torch.arange(N + 1, dtype=torch.float64, device=device) / N
    distance = torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    figures = {name: float(value) for name, value in in_standard_errors.items()}
    kolmogorov, largest = float(distance) * root, float(eps.abs().max())
    # not (a < b), so that NaN counts as wrong
    wrong = [name for name, value in figures.items() if not abs(value) < STANDARD_ERRORS]
    wrong += [] if kolmogorov < KOLMOGOROV else ["kolmogorov"]
    # a rounded log or sqrt may exceed the limit by its last bits
    wrong += [] if LEAST_MAXIMUM < largest < LARGEST[dtype] * (1 + 1e-6) else ["largest"]
    worst = max(figures, key=lambda name: abs(figures[name]))
    detail = (
        f"at most {abs(figures[worst]):.1f} standard errors ({worst}), "
        f"Kolmogorov-Smirnov {kolmogorov:.2f}, largest {largest:.2f}"
    )
    return Result(
        "fail" if wrong else "pass",
        f"{', '.join(wrong)} out of bounds: {detail}" if wrong else detail,
        {**figures, "kolmogorov": kolmogorov, "largest": largest, "n": N},
    )
