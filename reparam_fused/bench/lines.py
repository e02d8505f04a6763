"""What is measured: a call of this library beside the lines of torch that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import reparam_fused
from reparam_fused import (
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)

from .timer import Call

Results: TypeAlias = Tensor | tuple[Tensor, ...]
Line: TypeAlias = Callable[..., Results]
PASSES = ("forward", "forward + backward")


class Pair(NamedTuple):
    """Two lines of the same operands."""

    fused: Line
    eager: Line


class Form(NamedTuple):
    """A scale as users hold it.

    sigma is the function that the eager line writes, clamp and min_std included, and unit the scale
    for which it is 1.
    """

    keyword: str
    sigma: Callable[[Tensor], Tensor]
    unit: float
    clamp: tuple[float, float] | None = None
    min_std: float = 0.0

    def sample(self, **options: object) -> Pair:
        """z, as one call and as the eager line."""
        sigma, keyword, own = self.sigma, self.keyword, dict(options)
        if self.clamp is not None:
            own["clamp"] = self.clamp
        if self.min_std:
            own["min_std"] = self.min_std

        def fused(mu: Tensor, scale: Tensor) -> Tensor:
            return fused_reparameterize(mu, **{keyword: scale}, **own)  # type: ignore

        def eager(mu: Tensor, scale: Tensor) -> Tensor:
            return mu + sigma(scale) * torch.randn_like(mu)

        return Pair(fused, eager)

    def samples(self, number: int) -> Pair:
        """So many of each element."""
        fused = self.sample(sample_shape=(number,)).fused

        def eager(mu: Tensor, scale: Tensor) -> Tensor:
            eps = torch.randn(number, *mu.shape, dtype=mu.dtype, device=mu.device)
            return mu + self.sigma(scale) * eps

        return Pair(fused, eager)


LOW, HIGH = -1.0, 1.0
FORMS = {
    "log_var": Form("log_var", lambda s: torch.exp(0.5 * s), 0.0),
    "log_std": Form("log_std", torch.exp, 0.0),
    "std": Form("std", lambda s: s, 1.0),
    "rho": Form("rho", F.softplus, math.log(math.e - 1)),
    "log_var, clamp": Form(
        "log_var", lambda s: torch.exp(0.5 * s.clamp(LOW, HIGH)), 0.0, clamp=(LOW, HIGH)
    ),
    "rho, min_std": Form(
        "rho", lambda s: F.softplus(s) + 0.1, math.log(math.e**0.9 - 1), min_std=0.1
    ),
}

LOG_VAR = FORMS["log_var"].sample()


@lru_cache(maxsize=1)
def compiled(line: Line, shape: tuple[int, ...], dtype: torch.dtype) -> Line:
    """The line as torch.compile makes it for one shape and dtype, which it is at its best with.

    One at a time, for torch keeps few graphs of a function, and calls it as it is beyond them.
    """
    del shape, dtype
    torch.compiler.reset()
    return torch.compile(line, dynamic=False)


def keyed_random(sigma: Callable[[Tensor], Tensor], key: Tensor) -> Line:
    """The line over torch's own generator that takes keys."""
    from torch.func import _random  # torch 2.14 and later

    def line(mu: Tensor, scale: Tensor) -> Tensor:
        return mu + sigma(scale) * _random.normal(key, *mu.shape, dtype=mu.dtype)

    return line


def _normal(mu: Tensor, sigma: Tensor) -> Normal:
    return Normal(mu, sigma, validate_args=False)


def _own_normal(mu: Tensor, log_var: Tensor) -> Normal:
    return reparam_fused.Normal(mu, log_var=log_var, validate_args=False)


def eager_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """The divergence from N(0, 1) as most write it."""
    return -0.5 * (1 + log_var - mu.square() - log_var.exp())


def _fused_kl_sum(mu: Tensor, log_var: Tensor) -> Results:
    return fused_kl_divergence(mu, log_var, dim=-1)


def _eager_kl_sum(mu: Tensor, log_var: Tensor) -> Results:
    return eager_kl(mu, log_var).sum(-1)


def _fused_sample_kl(mu: Tensor, log_var: Tensor) -> Results:
    return fused_reparameterize_kl(mu, log_var, dim=-1)


def _eager_sample_kl(mu: Tensor, log_var: Tensor) -> Results:
    z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
    return z, eager_kl(mu, log_var).sum(-1)


def _fused_kl_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    return fused_kl_divergence(mu, log_var, dim=-1, prior=_own_normal(loc, other))


def _eager_kl_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    p, q = _normal(mu, torch.exp(0.5 * log_var)), _normal(loc, torch.exp(0.5 * other))
    return kl_divergence(p, q).sum(-1)


def _fused_sample_kl_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    return fused_reparameterize_kl(mu, log_var, dim=-1, prior=_own_normal(loc, other))


def _eager_sample_kl_of_two(mu: Tensor, log_var: Tensor, loc: Tensor, other: Tensor) -> Results:
    p = _normal(mu, torch.exp(0.5 * log_var))
    return p.rsample(), kl_divergence(p, _normal(loc, torch.exp(0.5 * other))).sum(-1)


def _fused_log_prob(mu: Tensor, log_std: Tensor) -> Results:
    return fused_reparameterize_log_prob(mu, log_std=log_std, dim=-1)


def _eager_log_prob(mu: Tensor, log_std: Tensor) -> Results:
    q = _normal(mu, torch.exp(log_std))
    z = q.rsample()
    return z, q.log_prob(z).sum(-1)


def _fused_squashed(mu: Tensor, log_std: Tensor) -> Results:
    return fused_reparameterize_log_prob(mu, log_std=log_std, dim=-1, tanh=True, clamp=(-20, 2))


def _eager_squashed(mu: Tensor, log_std: Tensor) -> Results:
    q = _normal(mu, torch.exp(log_std.clamp(-20, 2)))
    z = q.rsample()
    correction = 2 * (math.log(2) - z - F.softplus(-2 * z))
    return torch.tanh(z), (q.log_prob(z) - correction).sum(-1)


class Head(NamedTuple):
    """Beside or in place of the sample, a sum over the last dimension."""

    pair: Pair
    operands: int
    #: What a forward and a backward pass read and write at least, in tensors of the operands' size
    moved: int


HEADS = {
    "KL": Head(Pair(_fused_kl_sum, _eager_kl_sum), 2, 6),
    "z, KL": Head(Pair(_fused_sample_kl, _eager_sample_kl), 2, 8),
    "KL of two": Head(Pair(_fused_kl_of_two, _eager_kl_of_two), 4, 12),
    "z, KL of two": Head(Pair(_fused_sample_kl_of_two, _eager_sample_kl_of_two), 4, 14),
    "z, log q": Head(Pair(_fused_log_prob, _eager_log_prob), 2, 6),
    "tanh z, log q": Head(Pair(_fused_squashed, _eager_squashed), 2, 8),
}


def step(line: Line, operands: Sequence[Tensor], passes: str) -> Call:
    """The line as a call without arguments: alone and without a graph, or with its backward."""
    if passes == "forward":

        def forward() -> None:
            with torch.no_grad():
                line(*operands)

        return forward
    leaves = [t.detach().requires_grad_() for t in operands]
    results = line(*leaves)
    outputs = (results,) if isinstance(results, Tensor) else results
    # As a loss has them: each in the layout of what it is the gradient of
    grads = [torch.empty_strided(t.shape, t.stride()).to(t).normal_() for t in outputs]

    def both() -> None:
        results = line(*leaves)
        torch.autograd.grad((results,) if isinstance(results, Tensor) else results, leaves, grads)

    return both


def operands(*shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Normal numbers; every second one is a scale, that is positive and near 1."""
    made = []
    for i, shape in enumerate(shapes):
        t = torch.randn(shape, device=device)
        made.append((t if i % 2 == 0 else 0.5 + t.sigmoid()).to(dtype))
    return made
