"""What only a GPU can show: its generator, graphs, streams, memory and other GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reparam_fused import _ops, backends, fused_reparameterize, reference

from .result import (
    Result,
    gpu_kernels_missing,
    inputs,
    key_of,
    passed,
    poisoned_memory,
    require,
    require_same_bits,
    skipped,
)

N = 1 << 18
Step = Callable[[], tuple[Tensor, Tensor]]


def generator_offset(device: torch.device) -> Result:
    """A call's key is (seed, offset / 4 + 2^63), and it moves on by 4 for each Philox block."""
    own = torch.Generator(device).manual_seed(2**64 - 59)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for n in (1, 2, 4, 5, 1021, 2**20 + 3):
            mu, log_var = (t.to(device) for t in inputs(n, dtype))
            torch.randn(1000, device=device, generator=own)
            offset = own.get_offset()
            z = fused_reparameterize(mu, log_var, generator=own)
            moved = own.get_offset() - offset
            blocks = -(-n // (2 if dtype == torch.float64 else 4))
            require(moved == 4 * blocks, f"{n} of {dtype}: moved by {moved}, not {4 * blocks}")
            key = key_of(own.initial_seed(), offset // 4 + 2**63, device)
            expected = fused_reparameterize(mu, log_var, key=key)
            require_same_bits(f"{n} of {dtype}, offset {offset}", z, expected)
            # The offset alone counts, not what was drawn on the way to it.
            other = torch.Generator(device).manual_seed(own.initial_seed())
            other.set_offset(offset)
            again = fused_reparameterize(mu, log_var, generator=other)
            require_same_bits(f"{n} of {dtype}, after set_offset", again, expected)
    return passed("4 for each Philox block; the key is (seed, offset / 4 + 2^63)")


def triton_agrees(device: torch.device) -> Result:
    """The Triton kernels give the bits of the CUDA extension, where both are there."""
    if not _ops.has_triton:
        return skipped(f"triton: {backends()['triton']}")
    if _ops.cuda_extension is None:
        return skipped("the Triton kernels are what the other rows have checked")
    from reparam_fused import triton_kernels

    pairs = (
        (triton_kernels.sample_from_key, _ops.sample_from_key),
        (triton_kernels.sample_backward, _ops.sample_backward),
    )
    count = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for n in (1, 6, 17, 4096, 65539, 2**20 + 3):
            x, log_var = (t.to(device) for t in inputs(n, dtype))
            wide = x[: n // 12 * 12].view(-1, 3, 4)
            for a, b in (
                (x, log_var),
                (x[1:], log_var[1:]),
                (wide.mT, wide.flip(0).mT),
            ):
                key = key_of(7, 2**32 - 9, device)
                for ours, expected in pairs:
                    got, want = ours(a, b, key), expected(a, b, key)
                    if dtype == torch.float64:
                        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
                    else:
                        require_same_bits(f"{tuple(a.shape)} of {dtype}", got, want)
                    count += got.numel()
    return passed(f"{count} elements equal", elements=count)


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that a call allocates at one time, its results included."""
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call()
    peak = torch.cuda.max_memory_allocated(device) - before
    del results
    return peak


def peak_memory(device: torch.device) -> Result:
    """Forward and backward take z and grad_log_var, and no third tensor."""
    if missing := gpu_kernels_missing():
        return skipped(missing)
    mu, log_var = (t.to(device).requires_grad_() for t in inputs(1 << 22, torch.float32))
    grad_z = torch.ones_like(mu)

    def run(sampler: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            z = sampler(mu, log_var)
            return z, torch.autograd.grad(z, (mu, log_var), grad_z)

        return call

    tensor = mu.numel() * mu.element_size()
    fused = _peak_bytes(run(fused_reparameterize), device) / tensor
    eager = _peak_bytes(
        run(lambda m, v: m + torch.exp(0.5 * v) * torch.randn_like(m)), device
    ) / tensor  # fmt: skip
    # The caching allocator may leave up to 1 MiB in a block that it hands out.
    require(fused <= 2.25, f"{fused:.2f} tensors, expected 2")
    return passed(f"{fused:.2f} tensors at the peak (eager {eager:.2f})", fused=fused, eager=eager)


def _captured(step: Step, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A graph of one step, and the tensors that a replay writes."""
    # A stream of this device: torch.cuda.graph's own is that of its first caller.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        first, second = step()
    return graph, first, second


def _replays(graph: torch.cuda.CUDAGraph, *results: Tensor) -> list[tuple[Tensor, ...]]:
    """What three replays after one seed write."""
    torch.cuda.manual_seed(5)
    rows = []
    for _ in range(3):
        graph.replay()
        rows.append(tuple(t.clone() for t in results))
    torch.cuda.synchronize()
    return rows


def graph_replay(device: torch.device) -> Result:
    """A call without a key and its backward, captured: fresh noise, the same in both."""
    mu, log_var = (t.to(device).requires_grad_() for t in inputs(N, torch.float32))
    ones = torch.ones_like(mu)

    def step() -> tuple[Tensor, Tensor]:
        z = fused_reparameterize(mu, log_var)
        (grad_log_var,) = torch.autograd.grad(z, (log_var,), ones)
        return z.detach(), grad_log_var

    graph, *static = _captured(step, device)
    rows = _replays(graph, *static)
    exact_mu, sigma = mu.detach().double(), (log_var.detach().double() / 2).exp()
    for i, (z, grad_log_var) in enumerate(rows):
        for j in range(i):
            require(not torch.equal(z, rows[j][0]), f"replays {j} and {i} have the same noise")
        error = (grad_log_var.double() - (z.double() - exact_mu) / 2).abs()
        bound = 4 * torch.finfo(torch.float32).eps * (exact_mu.abs() + z.double().abs())
        same_noise = bool((error <= bound).all())
        require(same_noise, f"replay {i}: forward and backward differ in their noise")
        eps = (z.double() - exact_mu) / sigma
        mean, square = eps.mean().item(), eps.square().mean().item()
        require(
            abs(mean) < 5.5 / math.sqrt(N) and abs(square - 1) < 5.5 * math.sqrt(2 / N),
            f"replay {i}: mean {mean}, mean square {square}",
        )
    for i, (row, again) in enumerate(zip(rows, _replays(graph, *static), strict=True)):
        require_same_bits(f"replay {i} after the seed again", again[0], row[0])
    # torch promises that a graph draws what eager calls from the same state would draw.
    torch.cuda.manual_seed(5)
    for i, row in enumerate(rows):
        for what, eager, replayed in zip(("z", "grad_log_var"), step(), row, strict=True):
            require_same_bits(f"{what} of replay {i} against eager", replayed, eager)
    return passed("3 replays: fresh noise, reproducible, consistent, as in eager calls")


def graph_key(device: torch.device) -> Result:
    """The key that a captured op writes is the one that its noise came from."""
    mu, log_var = (t.to(device) for t in inputs(N, torch.float32))
    rows = _replays(*_captured(lambda: _ops.sample(mu, log_var, None), device))
    for i, (z, key) in enumerate(rows):
        expected = _ops.sample_from_key(mu, log_var, key)
        require_same_bits(f"replay {i}, key {key.tolist()}", z, expected)
    keys = [tuple(key.tolist()) for _, key in rows]
    require(len(set(keys)) == 3, f"keys of three replays: {keys}")
    return passed("each replay's z is that of the key it wrote")


def side_stream(device: torch.device) -> Result:
    """On another stream: the same bits, in that stream's order."""
    mu, log_var = (t.to(device).requires_grad_() for t in inputs(N, torch.float32))
    grad_z = torch.ones_like(mu)
    key = key_of(11, 0, device)

    def step(mu: Tensor, log_var: Tensor) -> tuple[Tensor, ...]:
        z = fused_reparameterize(mu, log_var, key=key)
        return z.detach(), *torch.autograd.grad(z, (mu, log_var), grad_z)

    expected = step(mu, log_var)
    late_mu, late_log_var = (torch.zeros_like(mu).requires_grad_() for _ in range(2))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # The inputs come late: a kernel on another stream would read the zeros.
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            late_mu.copy_(mu)
            late_log_var.copy_(log_var)
        results = step(late_mu, late_log_var)
    torch.cuda.current_stream(device).wait_stream(stream)
    for name, result, wanted in zip(
        ("z", "grad_mu", "grad_log_var"), results, expected, strict=True
    ):
        require_same_bits(name, result, wanted)
    torch.cuda.synchronize(device)  # before the allocator takes the tensors of either stream back
    return passed("the same bits, after the work that was queued before")


def no_synchronisation(device: torch.device) -> Result:
    """Neither forward nor backward makes the host wait for the GPU."""
    mu, log_var = (t.to(device).requires_grad_() for t in inputs(N, torch.float32))
    grad_z = torch.ones_like(mu)
    key = key_of(1, 0, device)

    def step() -> None:
        for k in (None, key):
            z = fused_reparameterize(mu, log_var, key=k)
            torch.autograd.grad(z, (mu, log_var), grad_z)

    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return passed("set_sync_debug_mode('error') had nothing to say")


def every_gpu(device: torch.device) -> Result:
    """The same bits on each GPU, whichever is the current one."""
    count = torch.cuda.device_count()
    if count < 2:
        return skipped("one GPU")
    x, log_var = inputs(65539, torch.float32)
    for i in range(count):
        # The caller made `device` current, which is another one than most of these.
        args = [t.to(f"cuda:{i}") for t in (x, log_var, key_of(13))]
        for name in ("sample_from_key", "sample_backward"):
            expected = getattr(reference, name)(x, log_var, key_of(13))
            with poisoned_memory():
                actual = getattr(_ops, name)(*args)
            require(actual.device == args[0].device, f"{name}: result on {actual.device}")
            require_same_bits(f"{name} on cuda:{i} while {device} is current", actual, expected)
        z = fused_reparameterize(args[0], args[1])
        require(z.device == args[0].device, f"without a key: result on {z.device}")
    return passed(f"{count} GPUs, called while {device} is current", gpus=count)


def _require_windows(z: Tensor, op: Callable[..., Tensor], row: Tensor, key: Tensor) -> None:
    """z is that of a long x = log_var of equal rows, in windows where it may well be wrong.

    Each begins at a Philox block, and so as the stream of another key does.
    """
    flat, n = z.flatten(), z.numel()
    seed, offset = key.tolist()
    for start in (0, n // 8 * 4, min(2**31 - 2048, n // 4 * 4), (n - 4096) // 4 * 4):
        window = flat[start : start + 4099]
        x = row[(torch.arange(window.numel()) + start) % row.numel()]
        expected = op(x, x, key_of(seed, offset + start // 4))
        require_same_bits(f"{op.__name__}, {n} elements from {start}", window, expected)


def more_than_2_31_elements(device: torch.device, n: int = 2**31 + 2**20 + 3) -> Result:
    """64-bit indices: one long dimension, and rows that repeat."""
    if missing := gpu_kernels_missing():
        return skipped(missing)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    needed = 5 * n  # two bfloat16 tensors and a little
    if free < needed:
        return skipped(f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed")
    key = key_of(17, 2**64 - 2**28)
    ops = (
        (_ops.sample_from_key, reference.sample_from_key),
        (_ops.sample_backward, reference.sample_backward),
    )
    one = torch.ones(1, dtype=torch.bfloat16)
    row = inputs(65539, torch.bfloat16)[0]
    for op, expected in ops:
        contiguous = one.to(device).expand(n).contiguous()
        _require_windows(op(contiguous, contiguous, key.to(device)), expected, one, key)
        del contiguous
        repeated = row.to(device).expand(-(-n // row.numel()), row.numel())
        _require_windows(op(repeated, repeated, key.to(device)), expected, row, key)
    torch.cuda.empty_cache()
    return passed(f"{n} elements of bfloat16, forward and backward, in windows", n=n)
