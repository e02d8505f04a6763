"""What only a GPU can show: graphs, streams, its generator, memory."""

from __future__ import annotations

import gc
import itertools

import torch
from torch import Tensor

from .. import _extensions, _ops, fused_reparameterize, reference
from . import bits
from .parts import DTYPES, Skip, assert_same_bits, inputs, key_of, need_kernels, require


def _operands(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    mu, log_var = (t.requires_grad_() for t in inputs(1 << 16, device=device))
    return mu, log_var, key_of(11, 0, device)


def _step(mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    """z without a key, z with one, gradients, z of the op that draws a key, z of that key."""
    z = [fused_reparameterize(mu, log_var, key=k) for k in (None, key)]
    gradients = torch.autograd.grad(z, (mu, log_var), [mu.detach(), log_var.detach()])
    drawn, its_key = _ops.sample(mu, log_var)
    return torch.stack([*z, *gradients, drawn, _ops.sample_from_key(mu, log_var, its_key)]).detach()


def graph(device: torch.device, warm_ups: int) -> str:
    """A captured step draws in each replay what an eager one draws from the same state."""
    if not warm_ups and not _extensions.serves_cuda(device):
        raise Skip("Triton compiles at its first call, which has to come before a capture")
    operands = _operands(device)
    # A stream of this device: torch.cuda.graph's own is that of its first caller.
    whole, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            _step(*operands)
    with torch.cuda.graph(whole, stream=stream):
        captured = _step(*operands)
    # torch writes the graph's place in the generator's stream there, and for a replay again on
    # the stream of that: on a shared H200 the first once came last.
    torch.cuda.synchronize(device)
    torch.manual_seed(5)
    replays = []
    for _ in range(3):
        whole.replay()
        replays.append(captured.clone())
    torch.manual_seed(5)
    for i, replay in enumerate(replays):
        assert_same_bits(replay, _step(*operands), f"replay {i} against an eager step")
        assert_same_bits(replay[-1], replay[-2], f"replay {i} and the key it drew")
        require(not torch.equal(replay[0], replays[i - 1][0]), "two replays with the same noise")
    return "3 replays: fresh noise, that of eager calls; with a key the same"


def streams(device: torch.device) -> str:
    """On another stream: its order, and a host that does not wait for the GPU."""
    mu, log_var, key = _operands(device)
    late_mu, late_log_var = (torch.zeros_like(mu).requires_grad_() for _ in "ab")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        _step(mu, log_var, key)  # leaves its memory to the next, which might wait for its own
        torch.manual_seed(5)
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        slept = stream.record_event()
        # The inputs come late: a kernel on another stream would read the zeros.
        late_mu.detach().copy_(mu)
        late_log_var.detach().copy_(log_var)
        result = _step(late_mu, late_log_var, key)
    torch.cuda.current_stream(device).synchronize()  # what is on it by mistake runs before
    require(not slept.query(), "the host waited for the work that was queued before")
    stream.synchronize()
    torch.manual_seed(5)
    assert_same_bits(result, _step(mu, log_var, key), "against the current stream")
    return "after the work that was queued before; the host does not wait"


def generator_offset(device: torch.device) -> str:
    """The key is (seed, 2**63 + offset / 4), which none made of a seed is; 4 for each counter."""
    own = torch.Generator(device).manual_seed(2**64 - 59)
    for dtype, n in itertools.product(DTYPES, (1, 2, 4, 5, 1021, 65539)):
        offset = own.get_offset() + 4000
        own.set_offset(offset)
        mu, log_var = inputs(n, dtype=dtype, device=device)
        z = fused_reparameterize(mu, log_var, generator=own)
        moved, counters = own.get_offset() - offset, -(-n // (2 if dtype == torch.float64 else 4))
        require(moved == 4 * counters, f"{n} of {dtype}: moved by {moved}, not {4 * counters}")
        key = key_of(own.initial_seed(), 2**63 + offset // 4, device)
        assert_same_bits(z, fused_reparameterize(mu, log_var, key=key), f"{n} of {dtype}")
    return "4 for each counter; the key is (seed, 2**63 + offset / 4)"


def peak_memory(device: torch.device) -> str:
    """Forward and backward take z and grad_log_var; what is kept between them is log_var."""
    need_kernels(device)
    mu, log_var = (torch.ones(1 << 20, device=device, requires_grad=True) for _ in "ab")
    for _ in range(2):  # the first loads what stays
        gc.collect()  # or what others have left would be freed within
        torch.cuda.synchronize(device)  # and what is queued still
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        z = fused_reparameterize(mu + 1, log_var)  # a mu that is gone unless it is kept
        gradients = torch.autograd.grad(z, (mu, log_var), mu.detach())
        peak = (torch.cuda.max_memory_allocated(device) - before) / z.nbytes
        del z, gradients
    if peak == 0:
        raise Skip("torch counts no memory: its caching allocator is off")
    # The caching allocator may leave up to 1 MiB, of these 4, in a block that it hands out.
    require(2 <= peak <= 2.5, f"{peak:.2f} tensors, expected 2")
    return f"{peak:.2f} tensors"


def triton(device: torch.device) -> str:
    """The Triton kernels, where the CUDA kernels are what the other rows have checked."""
    if not _extensions.has_triton or not _extensions.serves_cuda(device):
        raise Skip("there are no kernels but those that the other rows have checked")
    from .. import triton_kernels

    few = [case for dtype in DTYPES for case in [*bits.cases(dtype)][::5]]  # each is compiled
    results = [t for case in few for t in bits.compare(case, device, triton_kernels)]
    return f"{sum(t.numel() for t in results)} elements of {len(few)} calls"


def more_than_2_31_elements(device: torch.device, n: int = 2**31 + 2**20) -> str:
    """64-bit indices: rows that repeat and, where memory allows, one long dimension."""
    need_kernels(device, free_bytes=3 * n)  # a bfloat16 tensor and a little; below, two of them
    layouts = (False, True) if torch.cuda.mem_get_info(device)[0] >= 5 * n else (False,)
    key, row = key_of(17, 2**64 - 2**28), inputs(65539, dtype=torch.bfloat16)[0]
    n = (repeats := -(-n // len(row))) * len(row)
    for op, dense in itertools.product(("sample_from_key", "sample_backward"), layouts):
        rows = row.to(device).repeat(repeats) if dense else row.to(device).expand(repeats, -1)
        flat = getattr(_ops, op)(rows, rows, key.to(device)).flatten()
        # About what 30 and 31 bits count, and the end
        for start in (0, min(2**30 - 2048, n // 2), min(2**31 - 2048, n - 4099), n - 4099):
            x = row[torch.arange(start, start + 4099) % len(row)]
            expected = getattr(reference, op)(x, x, key, "log_var", (n,), (start,))
            what = f"{op} of {tuple(rows.shape)} from {start}"
            assert_same_bits(flat[start : start + 4099], expected, what)
        del rows, flat
    return f"{n} elements in windows: {'rows and one dimension' if layouts[1:] else 'rows'}"
