"""What a call allocates, by torch's own allocator as the profiler sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import eager, inputs, needs_kernels
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from reparam_fused import fused_reparameterize

pytestmark = needs_kernels
N = 1 << 20


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that was allocated at one time, beyond what there was before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        call()
    allocated = peak = 0
    for event in result.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def test_forward_and_backward_take_two_tensors() -> None:
    """z and grad_log_var; the eager line holds four at its peak."""
    mu, log_var = (t.requires_grad_() for t in inputs(N))
    grad_z = torch.ones(N)

    def run(sampler: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        z = sampler(mu, log_var)
        return (z, *torch.autograd.grad(z, (mu, log_var), grad_z))

    tensor = 4 * N
    fused = peak_bytes(lambda: run(fused_reparameterize))
    assert 2 * tensor <= fused <= 2 * tensor + 4096
    plain = peak_bytes(lambda: run(lambda m, v: eager(m, v, torch.randn_like(m))))
    assert plain >= 4 * tensor


def test_views_are_read_where_they_lie() -> None:
    """chunk, transpose and expand cost no copy: only z is allocated."""
    base, _ = inputs(512, 512)
    row, _ = inputs(512)
    for mu, log_var in (
        base.chunk(2, dim=1),
        base.chunk(2, dim=0),
        (base.t(), base.t()),
        (row.expand(512, 512), base),
        (base[:, ::2], base[:, 1::2]),
    ):
        size = 4 * mu.numel()
        with torch.no_grad():
            assert (
                size
                <= peak_bytes(lambda a=mu, b=log_var: fused_reparameterize(a, b))
                <= size + 4096
            )
