"""What a call allocates: on the CPU as the profiler sees it, on a GPU by the caching allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ON_STAND_IN
from helpers import eager, inputs, needs_kernels
from torch import Tensor

from reparam_fused import fused_reparameterize
from reparam_fused.bench.memory import peak_bytes

pytestmark = needs_kernels
SLACK = 4096  # keys, and what the allocators round up


@pytest.fixture(autouse=True)
def caching_allocator() -> Iterator[None]:
    """The stand-in does without it, and so without its count."""
    if ON_STAND_IN:
        torch.cuda.memory.caching_allocator_enable(True)
    yield
    if ON_STAND_IN:
        torch.cuda.empty_cache()
        torch.cuda.memory.caching_allocator_enable(False)


def test_forward_and_backward_take_two_tensors(device: torch.device) -> None:
    """z and grad_log_var; the eager line holds four at its peak."""
    n = 1 << (16 if device.type == "cuda" else 20)
    mu, log_var = (t.requires_grad_() for t in inputs(n, device=device))
    grad_z = torch.ones(n, device=device)

    def run(sampler: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        z = sampler(mu, log_var)
        return (z, *torch.autograd.grad(z, (mu, log_var), grad_z))

    tensor = 4 * n
    fused = peak_bytes(lambda: run(fused_reparameterize), device)
    assert 2 * tensor <= fused <= 2 * tensor + SLACK
    plain = peak_bytes(lambda: run(lambda m, v: eager(m, v, torch.randn_like(m))), device)
    assert 4 * tensor <= plain <= 4 * tensor + SLACK


def test_samples_take_no_copies(device: torch.device) -> None:
    """z, and the gradients of one sample's shape: no sigma or eps for each sample."""
    n, samples = 1 << (12 if device.type == "cuda" else 18), 16
    mu, rho = (t.requires_grad_() for t in inputs(n, device=device))
    grad_z = torch.ones(samples, n, device=device)

    def run() -> tuple[Tensor, ...]:
        z = fused_reparameterize(mu, rho=rho, sample_shape=(samples,))
        return (z, *torch.autograd.grad(z, (mu, rho), grad_z))

    peak = peak_bytes(run, device)
    assert (samples + 2) * 4 * n <= peak <= (samples + 2) * 4 * n + SLACK


def test_views_are_read_where_they_lie(device: torch.device) -> None:
    """chunk, transpose and expand cost no copy: only z is allocated."""
    n = 128 if device.type == "cuda" else 512
    base, _ = inputs(n, n, device=device)
    row, _ = inputs(n, device=device)
    for mu, log_var in (
        base.chunk(2, dim=1),
        base.chunk(2, dim=0),
        (base.t(), base.t()),
        (row.expand(n, n), base),
        (base[:, ::2], base[:, 1::2]),
    ):
        size = 4 * mu.numel()
        peak = peak_bytes(lambda a=mu, b=log_var: fused_reparameterize(a, b), device)
        assert size <= peak <= size + SLACK
