"""Times, beside a copy of the same bytes and beside what the op replaces. No check fails here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from reparam_fused import _ops, fused_reparameterize

from .result import Number, Result, inputs, key_of, passed, skipped

# More than the last cache of any GPU
FLUSH_BYTES = 1 << 28
Call = Callable[[], object]
Sampler = Callable[[Tensor, Tensor], Tensor]


def eager(mu: Tensor, log_var: Tensor) -> Tensor:
    """The line that the library replaces."""
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def _forward(sampler: Sampler, mu: Tensor, log_var: Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return sampler(mu, log_var)

    return call


def _both(sampler: Sampler, mu: Tensor, log_var: Tensor, grad_z: Tensor) -> Call:
    """Forward and backward."""

    def call() -> object:
        return torch.autograd.grad(sampler(mu, log_var), (mu, log_var), grad_z)

    return call


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Call, flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()  # the inputs are in no cache
    # The host is done queueing before the GPU starts, or it would be timed instead.
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _medians(
    rivals: dict[str, Call], seconds: Callable[[Call], float], rounds: int
) -> dict[str, float]:
    """The median for each; the rivals take turns, so that what else runs hits all alike."""
    for call in rivals.values():
        call()
        call()
    rows = [{name: seconds(call) for name, call in rivals.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in rows) for name in rivals}


def cpu_time(device: torch.device) -> Result:
    """Forward and backward of 2**20 float32; two torch.add move as many bytes."""
    n = 1 << 20
    mu, log_var = (t.requires_grad_() for t in inputs(n, torch.float32))
    grad_z = torch.ones(n)
    rivals = {
        "fused": _both(fused_reparameterize, mu, log_var, grad_z),
        "eager": _both(eager, mu, log_var, grad_z),
        "torch.add": _forward(torch.add, mu, log_var),
    }
    # Fewer rounds where reference.py is what runs: a second each
    rounds = 15 if _ops.extension is not None else 1
    median = _medians(rivals, _cpu_seconds, rounds)
    fused = median["fused"]
    return passed(
        f"forward + backward of 2**20 float32: {fused * 1e3:.2f} ms, "
        f"eager {median['eager'] / fused:.1f} times as long, two torch.add "
        f"{2 * median['torch.add'] / fused:.2f}",
        **{f"{name} seconds": value for name, value in median.items()},
    )


def _compiled(*warm_ups: Callable[[Sampler], Call]) -> tuple[Sampler | None, str]:
    """torch.compile of the eager line, or None and why there is none."""
    torch.compiler.reset()  # or earlier shapes would count against its recompile limit
    try:
        sampler: Sampler = torch.compile(eager, dynamic=False)
        for warm_up in warm_ups:
            warm_up(sampler)()
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return sampler, ""


def gpu_bandwidth(device: torch.device, dtype: torch.dtype, n: int) -> Result:
    """GB/s of what the op must move, beside a device-to-device copy that moves as much."""
    tensor_bytes = n * dtype.itemsize
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    needed = 20 * tensor_bytes + 2**30
    if free < needed:
        return skipped(f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed")
    mu, log_var = (torch.zeros(n, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    grad_z = torch.ones_like(mu)
    key = key_of(1, 0, device)
    source = torch.zeros(3 * n, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device)

    samplers: dict[str, Sampler] = {"fused": fused_reparameterize, "eager": eager}
    compiled, why_not = _compiled(
        lambda s: _forward(s, mu, log_var), lambda s: _both(s, mu, log_var, grad_z)
    )
    if compiled is not None:
        samplers["compile"] = compiled
    # Tensors that each must read and write: mu, log_var and z; grad_z, log_var, grad_log_var
    cases: dict[str, tuple[int, dict[str, Call]]] = {
        "forward": (3, {k: _forward(s, mu, log_var) for k, s in samplers.items()}),
        "backward": (3, {"fused": lambda: _ops.sample_backward(grad_z, log_var.detach(), key)}),
        "both": (6, {k: _both(s, mu, log_var, grad_z) for k, s in samplers.items()}),
    }
    numbers: dict[str, Number] = {"compile missing": why_not} if why_not else {}
    parts = []
    for case, (tensors, rivals) in cases.items():
        # A copy reads and writes, so half as many elements move as many bytes.
        half = tensors * n // 2

        def copy(half: int = half) -> object:
            return target[:half].copy_(source[:half])

        median = _medians(rivals | {"copy": copy}, lambda c: _gpu_seconds(c, flush), rounds=20)
        fused = median["fused"]
        rate = tensors * tensor_bytes / fused / 1e9
        numbers |= {f"{case} {name} seconds": value for name, value in median.items()}
        numbers[f"{case} GB/s"] = rate
        slower = [f"{k} {median[k] / fused:.1f}x" for k in ("eager", "compile") if k in median]
        beside = ", ".join([f"{median['copy'] / fused:.2f} of a copy", *slower])
        parts.append(f"{case} {rate:.0f} GB/s ({beside})")
    return Result("pass", ", ".join(parts), numbers)
