"""The result lies in memory as torch's own would, and has the right values, for any operands."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import DTYPES, assert_same_bits, key_of, needs_kernels
from torch import Tensor

from reparam_fused import fused_kl_divergence, fused_reparameterize, reference

pytestmark = needs_kernels
KEY = key_of(0x9E3779B97F4A7C15, 2**32 - 3)


def operand(rng: random.Random, shape: list[int]) -> Tensor:
    """A tensor that broadcasts to the shape, of any dtype, and strided as views can be."""
    if rng.random() < 0.3:
        shape = shape[rng.randint(0, len(shape)) :]
    if rng.random() < 0.4:
        shape = [n if rng.random() < 0.6 else 1 for n in shape]
    order = list(range(len(shape)))  # of the dimensions in memory
    if rng.random() < 0.6:
        rng.shuffle(order)
    base, part = [], []
    for d in order:
        first, step = rng.randint(0, 2), rng.randint(1, 3)
        size, of_it = rng.choice(
            [
                (shape[d], slice(None)),
                (shape[d], slice(None)),
                (1, slice(None)),  # expanded
                (first + step * shape[d], slice(first, None, step)),
            ]
        )
        base.append(size)
        part.append(of_it)
    values = torch.randn(base).to(rng.choice(DTYPES))[tuple(part)]
    return strided_at_ones(
        rng,
        values.expand([shape[d] for d in order]).permute(
            [order.index(d) for d in range(len(order))]
        ),
    )


def strided_at_ones(rng: random.Random, t: Tensor) -> Tensor:
    """The same elements: the stride of a dimension of size 1 says nothing of where they are."""
    if t.numel() == 0 or rng.random() < 0.7:
        return t
    strides = [
        step if n != 1 else rng.choice([1, 5, step])
        for n, step in zip(t.shape, t.stride(), strict=True)
    ]
    return t.as_strided(t.shape, strides)


def pair(rng: random.Random) -> tuple[Tensor, Tensor]:
    """Operands that broadcast; now and then of one dtype, of the same strides, channels last."""
    sizes = (0, 1, 1, 2, 3, 4, 5) if rng.random() < 0.3 else (1, 1, 2, 3, 4, 5)
    shape = [rng.choice(sizes) for _ in range(rng.choice([0, 1, 2, 3, 4, 4, 4, 5, 6]))]
    x, y = operand(rng, shape), operand(rng, shape)
    alike = rng.random()
    if alike < 0.6:
        y = y.to(x.dtype)
    if alike < 0.2:
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        overlaps = any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))
        y = x if overlaps else y.copy_(torch.randn(x.shape))
    elif alike < 0.4 and x.dim() == 4:
        y = torch.randn(x.shape).to(x.dtype)
        x, y = (strided_at_ones(rng, t.to(memory_format=torch.channels_last)) for t in (x, y))
    return x, y


def assert_as_in_torch(result: Tensor, values: Tensor, x: Tensor, y: Tensor) -> None:
    def layout(t: Tensor) -> tuple[object, ...]:
        return t.dtype, tuple(t.shape), t.stride()

    assert layout(result) == layout(torch.add(x, y)), f"of {layout(x)} and {layout(y)}"
    if result.dtype == torch.float64:  # where the reference goes through libm
        torch.testing.assert_close(result, values, rtol=1e-13, atol=1e-14, check_stride=False)
    else:
        assert_same_bits(result, values)


@pytest.mark.parametrize("seed", range(4))
def test_random_layouts(both_paths: str, seed: int) -> None:
    """Dtype, shape and strides of torch.add, and the reference's bits."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(500):
        x, y = pair(rng)
        z = fused_reparameterize(x, y, key=KEY)
        assert_as_in_torch(z, reference.sample_from_key(x, y, KEY), x, y)
        kl = fused_kl_divergence(x, y)
        assert_as_in_torch(kl, reference.kl_divergence(x, y), x, y)
