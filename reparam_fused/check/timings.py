"""Times, beside the line that the library replaces and beside a copy of as many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import fused_reparameterize
from .parts import need_kernels, require


def times(device: torch.device, dtype: torch.dtype) -> str:
    """Forward and backward, of more than a GPU caches; no slower than the line they replace."""
    n = 1 << (26 if device.type == "cuda" else 20)
    need_kernels(device, free_bytes=20 * n * dtype.itemsize)
    mu, log_var = (torch.zeros(n, dtype=dtype, device=device, requires_grad=True) for _ in "ab")
    # mu, log_var, z and grad_z, log_var, grad_log_var: as many as this copy reads and writes
    grad_z, source = (torch.ones(k * n, dtype=dtype, device=device) for k in (1, 3))

    def seconds(call: Callable[[], object]) -> float:
        """Of one in ten calls, so that the host is ahead of a GPU."""
        start = time.perf_counter()
        for _ in range(10):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / 10

    def both(sampler: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(sampler(mu, log_var), (mu, log_var), grad_z)

    line = both(lambda m, v: m + torch.exp(0.5 * v) * torch.randn_like(m))
    calls = (both(fused_reparameterize), line, source.clone)
    # They take turns, so that what else runs hits all alike; the first round warms up.
    rounds = torch.tensor([[seconds(call) for call in calls] for _ in range(4)])
    fused, eager, copy = rounds[1:].amin(0).tolist()
    detail = f"{n} elements {fused * 1e3:.3f} ms, eager {eager / fused:.1f} times as long"
    require(fused < eager, detail)
    return f"{detail}, a copy of as many bytes {copy / fused:.2f}"
