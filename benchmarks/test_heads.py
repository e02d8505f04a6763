"""A sample and the sum beside it, next to the lines that they replace.

    make bench ARGS=benchmarks/test_heads.py

Forward and backward in one call each, on two threads: large, against eager and the memory that a
pass each way moves, 12 and 20 bytes an element (torch.add of as many); and small, where what
surrounds the kernel is most of the time, with the mean of the sums in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_forms import pair
from test_forms import two_threads as two_threads
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

import reparam_fused
from reparam_fused import (
    fused_kl_divergence,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)

Results = tuple[Tensor, ...]
Line = Callable[..., Results]
Case = tuple[Line, Line, Sequence[Tensor], dict[str, float], int]


def normal(mu: Tensor, std: Tensor) -> Normal:
    return Normal(mu, std, validate_args=False)


def prior(loc: Tensor, log_var: Tensor) -> reparam_fused.Normal:
    return reparam_fused.Normal(loc, log_var=log_var, validate_args=False)


def eager_kl(mu: Tensor, log_var: Tensor) -> Results:
    z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
    return z, -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(-1)


def fused_kl(mu: Tensor, log_var: Tensor) -> Results:
    return fused_reparameterize_kl(mu, log_var, dim=-1)


def eager_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    p, q = normal(mu, torch.exp(0.5 * log_var)), normal(loc, torch.exp(0.5 * other))
    return (kl_divergence(p, q).sum(-1),)


def fused_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    return (fused_kl_divergence(mu, log_var, dim=-1, prior=prior(loc, other)),)


def eager_of_two_stds(mu: Tensor, std: Tensor, loc: Tensor, other: Tensor) -> Results:
    return (kl_divergence(normal(mu, std), normal(loc, other)).sum(-1),)


def fused_of_two_stds(mu: Tensor, std: Tensor, loc: Tensor, other: Tensor) -> Results:
    return (fused_kl_divergence(mu, std=std, dim=-1, prior=normal(loc, other)),)


def eager_sample_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    p = normal(mu, torch.exp(0.5 * log_var))
    return p.rsample(), kl_divergence(p, normal(loc, torch.exp(0.5 * other))).sum(-1)


def fused_sample_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    return fused_reparameterize_kl(mu, log_var, dim=-1, prior=prior(loc, other))


def eager_log_prob(mu: Tensor, log_std: Tensor) -> Results:
    q = normal(mu, torch.exp(log_std))
    z = q.rsample()
    return z, q.log_prob(z).sum(-1)


def fused_log_prob(mu: Tensor, log_std: Tensor) -> Results:
    return fused_reparameterize_log_prob(mu, log_std=log_std, dim=-1)


def eager_squashed(mu: Tensor, log_std: Tensor) -> Results:
    q = normal(mu, torch.exp(log_std.clamp(-20, 2)))
    z = q.rsample()
    correction = 2 * (math.log(2) - z - softplus(-2 * z))
    return torch.tanh(z), (q.log_prob(z) - correction).sum(-1)


def fused_squashed(mu: Tensor, log_std: Tensor) -> Results:
    return fused_reparameterize_log_prob(mu, log_std=log_std, dim=-1, tanh=True, clamp=(-20, 2))


def four(*shape: int) -> Sequence[Tensor]:
    return (*pair(*shape), *pair(*shape))


def stds(*shape: int) -> Sequence[Tensor]:
    mu, loc = pair(*shape)
    return mu, torch.rand(shape) + 0.25, loc, torch.rand(shape) + 0.25


# What each pass reads and writes an element, in bytes, is the floor's size.
LARGE: dict[str, Callable[[], Case]] = {
    "z and KL": lambda: (
        fused_kl, eager_kl, pair(1024, 4096), {"eager": 12, "floor": 2.0}, 32,
    ),
    "KL of two, log_var": lambda: (
        fused_of_two, eager_of_two, four(1024, 4096), {"eager": 8}, 48,
    ),
    "KL of two, std": lambda: (
        fused_of_two_stds, eager_of_two_stds, stds(1024, 4096), {"eager": 8}, 48,
    ),
    "z and KL of two": lambda: (
        fused_sample_of_two, eager_sample_of_two, four(1024, 4096), {"eager": 8}, 56,
    ),
    "z and log q": lambda: (
        fused_log_prob, eager_log_prob, pair(1024, 4096), {"eager": 8}, 24,
    ),
    "tanh z and log q": lambda: (
        fused_squashed, eager_squashed, pair(1024, 4096), {"eager": 8}, 32,
    ),
}  # fmt: skip


def step(line: Line, operands: Sequence[Tensor], mean: bool) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in operands]
    grads = [torch.randn_like(t) for t in line(*leaves)]

    def run() -> Any:
        *samples, total = line(*leaves)
        results = (*samples, total.mean() if mean else total)
        incoming = (*grads[:-1], torch.ones(()) if mean else grads[-1])
        return torch.autograd.grad(results, leaves, incoming)

    return run


@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, in_turn: Any) -> None:
    ours, theirs, operands, targets, size = LARGE[name]()
    a, b = torch.randn(2, operands[0].numel() * size // 12)
    rivals = {"eager": step(theirs, operands, False), "floor": lambda: torch.add(a, b)}
    in_turn(step(ours, operands, False), rivals, targets, 15)


SMALL: dict[str, tuple[Line, Line, tuple[int, int], float]] = {
    "z, KL, mean, 128 x 20": (fused_kl, eager_kl, (128, 20), 2.5),
    "z, log q, mean, 256 x 6": (fused_log_prob, eager_log_prob, (256, 6), 1.0),
    "tanh z, log q, mean, 256 x 6": (fused_squashed, eager_squashed, (256, 6), 4.0),
    "KL of two, mean, 128 x 20": (fused_of_two, eager_of_two, (128, 20), 1.0),
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, in_turn: Any) -> None:
    ours, theirs, shape, target = SMALL[name]
    operands = four(*shape) if "two" in name else pair(*shape)
    in_turn(step(ours, operands, True), {"eager": step(theirs, operands, True)},
            {"eager": target}, 2001)  # fmt: skip
