"""reference.py is the oracle of the other tests: it is held to what others published."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, eager, inputs, key_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reparam_fused
from reparam_fused import reference

DATA = Path(__file__).parent / "data"
try:
    import torch.func._random as torch_random
except ImportError:
    torch_random = None
needs_torch_random = pytest.mark.skipif(
    torch_random is None or torch.__version__ < (2, 14),
    reason="torch.func._random runs on the CPU from torch 2.14 on",
)
offsets = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(-40, 40).map(lambda d: (2**32 + d) % 2**64),
    st.integers(-40, 40).map(lambda d: d % 2**64),
)
seeds = st.integers(0, 2**64 - 1)


def data_rows(name: str) -> list[list[int]]:
    lines = (DATA / name).read_text().splitlines()
    return [[int(w, 16) for w in line.split()] for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("row", data_rows("philox4x32_10.txt"))
def test_philox_known_answers(row: list[int]) -> None:
    counter = tuple(torch.tensor([w]) for w in row[:4])
    seed = key_of(row[4] | row[5] << 32).view(torch.int64)[:1]
    assert [int(w) for w in reference.philox(counter, seed)] == row[6:]


@pytest.mark.parametrize("row", data_rows("noise.txt"))
def test_noise_known_answers(row: list[int]) -> None:
    seed, offset, *bits = row
    eps = reference.normals(key_of(seed, offset), torch.Size([8]), torch.float32)
    assert [b & 0xFFFFFFFF for b in eps.view(torch.int32).tolist()] == bits


def test_first_normals_as_published_in_the_contract() -> None:
    expected = torch.tensor([-0.970190, 0.194019, -1.235621, 1.923927, -0.073182])
    eps = reference.normals(key_of(42), torch.Size([5]), torch.float32)
    assert (eps - expected).abs().max() < 1e-6


@needs_torch_random
@settings(max_examples=60, deadline=None)
@given(seed=seeds, offset=offsets)
def test_z_is_that_of_torch_func_random(seed: int, offset: int) -> None:
    """All dtypes, through the public call; the bound is relative to sigma."""
    key = key_of(seed, offset)
    n = 1003
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        mu, log_var = inputs(n, dtype=dtype, seed=seed % 2**32)
        z = reparam_fused.fused_reparameterize(mu, log_var, key=key)
        eps = torch_random.normal(key, (n,), dtype=dtype)
        exact = eager(mu.double(), log_var.double(), eps.double())
        sigma = torch.exp(0.5 * log_var.double())
        # z itself is rounded to its dtype, which is not an error of the noise.
        rounding = exact.abs() * torch.finfo(dtype).eps
        assert ((z.double() - exact).abs() <= bound * sigma + rounding).all()
    for dtype in (torch.float16, torch.bfloat16):
        mu, log_var = inputs(n, dtype=dtype, seed=seed % 2**32)
        z = reparam_fused.fused_reparameterize(mu, log_var, key=key)
        eps = torch_random.normal(key, (n,), dtype=torch.float32)
        exact = eager(mu.double(), log_var.double(), eps.double())
        sigma = torch.exp(0.5 * log_var.double())
        rounding = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
        assert ((z.double() - exact).abs() <= 1e-5 * sigma + rounding).all()


@needs_torch_random
@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ((3, 1), (3, 20)),
        ((3, 4, 1), (3, 4, 7)),
        ((3, 1, 1), (3, 4, 7)),
        ((1, 4, 1), (3, 4, 7)),
        ((3, 4), (3, 4)),
        ((1, 1), (3, 5)),
    ],
)
def test_batched_keys_are_those_of_torch(batch: tuple[int, ...], shape: tuple[int, ...]) -> None:
    count = torch.Size(batch).numel()
    keys = torch_random.split(key_of(5, 2**32 - 1), count).reshape(*batch, 2)
    expected = torch_random.normal(keys, shape, dtype=torch.float64)
    assert (reparam_fused.noise(keys, shape, dtype=torch.float64) - expected).abs().max() < 1e-12
    # torch wants the batch padded with ones to the rank of the output: here they may go.
    while keys.dim() > 1 and keys.shape[-2] == 1:
        keys = keys.squeeze(-2)
        assert (
            reparam_fused.noise(keys, shape, dtype=torch.float64) - expected
        ).abs().max() < 1e-12


@needs_torch_random
@given(seed=seeds, offset=offsets, num=st.integers(1, 9), data=st.integers(-(2**63), 2**64 - 1))
def test_derived_keys_are_those_of_torch(seed: int, offset: int, num: int, data: int) -> None:
    key = key_of(seed, offset)
    keys = reparam_fused.split(key, num)
    assert torch.equal(keys, torch_random.split(key, num))
    assert torch.equal(reparam_fused.split(keys, 3), torch_random.split(keys, 3))
    assert torch.equal(reparam_fused.fold_in(keys, data), torch_random.fold_in(keys, data))
    assert torch.equal(reparam_fused.key(seed), torch_random.key(seed))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(st.floats(width=32), st.floats(width=32), st.floats(width=32))
def test_fma_is_rounded_once(a: float, b: float, c: float) -> None:
    """Against exact rational arithmetic, rounded by fractions and numpy's float32."""
    got = reference.fma(torch.tensor(a), torch.tensor(b), torch.tensor(c)).item()
    values = np.array([a, b, c])
    if not np.isfinite(values).all():
        expected = a * b + c
        assert got == expected or (np.isnan(got) and np.isnan(expected))
        return
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if not np.isfinite(got):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    error = abs(Fraction(got) - exact)
    for direction in (-np.inf, np.inf):
        neighbour = np.nextafter(np.float32(got), np.float32(direction))
        if np.isfinite(neighbour):
            other = abs(Fraction(float(neighbour)) - exact)
            even = int(np.float32(got).view(np.uint32)) % 2 == 0
            assert error < other or (error == other and even)


def test_fma_where_float64_rounds_onto_a_tie() -> None:
    """1 + 2^-23 + (2^-24 - 2^-70): float64 drops the last term, and the tie goes up."""
    a, b, c = 1 - 2.0**-23, (1 + 2.0**-23) * 2.0**-24, 1 + 2.0**-23
    assert torch.tensor(a * b + c, dtype=torch.float64).float().item() == 1 + 2.0**-22
    assert reference.fma(torch.tensor(a), b, c).item() == 1 + 2.0**-23


def test_reference_gives_the_formula(dtype: torch.dtype) -> None:
    mu, log_var = inputs(257, dtype=dtype)
    key = key_of(3, 2**64 - 5)
    eps = reference.normals(key, mu.shape, dtype).double()
    z = reference.sample_from_key(mu, log_var, key).double()
    exact = eager(mu.double(), log_var.double(), eps)
    bound = 4 * torch.finfo(dtype).eps * (mu.double().abs() + (exact - mu.double()).abs())
    assert ((z - exact).abs() <= bound).all()
    grad = reference.sample_backward(mu, log_var, key).double()
    exact_grad = mu.double() * eps * torch.exp(0.5 * log_var.double()) / 2
    assert ((grad - exact_grad).abs() <= 8 * torch.finfo(dtype).eps * exact_grad.abs() + 1e-7).all()


def test_the_fallback_of_noise(dtype: torch.dtype) -> None:
    """Its slices are cut from whole counters, and are contiguous all the same."""
    keys = reparam_fused.split(key_of(3), 3)
    eps = reference.noise(keys, (3, 5), dtype)
    assert eps.is_contiguous()
    expected = reference.normals(keys, torch.Size([3, 5]), dtype).to(dtype)
    assert_same_bits(eps, expected)
