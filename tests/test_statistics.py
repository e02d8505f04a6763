"""The noise is standard normal, to the tails, and one value says nothing of the next.

The keys are fixed, so nothing here is left to chance: the bounds hold or they do not.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import key_of, needs_kernels
from scipy import stats

import reparam_fused

CHUNK = 1 << 24
BINS = 1024
TAILS = (3.0, 4.0, 5.0, 5.5, 6.0)
# Within 4 sigma of what is expected, by a two-sided p of 6e-5 for each figure.
SIGMAS = 4.0


def check(key: torch.Tensor, chunks: int, dtype: torch.dtype) -> None:
    """Counts in equally likely bins, counts beyond the tails, moments and correlations."""
    bins = torch.zeros(BINS, dtype=torch.float64)
    beyond = torch.zeros(len(TAILS), dtype=torch.float64)
    moments = torch.zeros(4, dtype=torch.float64)
    products = torch.zeros(4, dtype=torch.float64)
    counters = CHUNK // (2 if dtype == torch.float64 else 4)
    seed, offset = key.tolist()
    for chunk in range(chunks):
        eps = reparam_fused.noise(key_of(seed, offset + chunk * counters), CHUNK, dtype=dtype)
        eps = eps.double()
        bins += torch.histc(torch.special.ndtr(eps), BINS, 0, 1)
        beyond += torch.tensor([(eps.abs() > t).sum().item() for t in TAILS])
        moments += torch.stack([(eps**k).sum() for k in (1, 2, 3, 4)])
        products += torch.stack([(eps[k:] * eps[:-k]).sum() for k in (1, 2, 3, 4)])
    n = chunks * CHUNK

    chi2 = ((bins - n / BINS) ** 2 / (n / BINS)).sum().item()
    p = stats.chi2.sf(chi2, BINS - 1)
    assert 1e-4 < p < 1 - 1e-4
    for tail, count in zip(TAILS, beyond.tolist(), strict=True):
        expected = n * math.erfc(tail / math.sqrt(2))
        assert abs(count - expected) <= SIGMAS * math.sqrt(expected) + 1, f"beyond {tail}"
    # mean and standard deviation of eps^k: moments of the normal distribution
    for k, (mean, square) in enumerate([(0, 1), (1, 3), (0, 15), (3, 105)]):
        deviation = (moments[k].item() / n - mean) / math.sqrt((square - mean**2) / n)
        assert abs(deviation) < SIGMAS, f"moment {k + 1}"
    for lag, total in enumerate(products.tolist(), start=1):
        assert abs(total / math.sqrt(n)) < SIGMAS, f"correlation at lag {lag}"


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_noise_is_standard_normal(seed: int) -> None:
    check(key_of(seed), 1, torch.float32)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "chunks"), [(torch.float32, 128), (torch.float64, 32)])
def test_noise_is_standard_normal_at_length(dtype: torch.dtype, chunks: int) -> None:
    """2^31 float32 and 2^29 float64 values, from counters that cross 2^32: some minutes."""
    check(key_of(12345, 2**32 - 2**26), chunks, dtype)


def test_the_largest_value_is_that_of_the_smallest_u() -> None:
    """u = 2^-33 has the radius 6.76, and 2^-65 in fp64 has 9.49: nothing is clamped."""
    words = torch.tensor([0])
    largest, _ = reparam_fused.reference._box_muller(words, words)
    assert largest.item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    largest, _ = reparam_fused.reference._box_muller_double((words, words, words, words))
    assert largest.item() == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-14)
