"""What checks and tests are made of: inputs, comparisons of bits, and reasons to skip."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import _extensions, backends

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def key_of(seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The key (seed, offset), modulo 2**64."""
    return torch.tensor([seed % 2**64, offset % 2**64], dtype=torch.uint64, device=device)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """By way of float32 to the half types: torch rounds once or twice, by the processor."""
    return x.to(dtype if dtype == torch.float64 else torch.float32).to(dtype)


def inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """mu in [-4, 4) and log_var in spread * [-2, 2), the same bits on any machine.

    Multiples of odd numbers modulo 2**32: exact arithmetic, and no draw from a generator.
    """
    i = torch.arange(1, math.prod(shape) + 1).reshape(shape) + seed * 7368787
    mu, log_var = (
        ((i * odd & 0xFFFFFFFF) - 2**31).double() * 2.0**-29 for odd in (2654435761, 2246822519)
    )
    return rounded(mu, dtype).to(device), rounded(log_var * (spread / 2), dtype).to(device)


def extremes(dtype: torch.dtype) -> Tensor:
    """log_var that overflows, underflows, is a denormal or is not finite."""
    steps = torch.arange(-3000, 3000, 7, dtype=torch.float64)
    # where half of e^x overflows, in float32 and in float64
    edges = [torch.linspace(x - 1, x + 1, 40, dtype=torch.float64) for x in (89.4, 710.4)]
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 3e38, -3e38]
    return rounded(torch.cat([steps, *edges, torch.tensor(special, dtype=torch.float64)]), dtype)


def require(condition: bool, message: str) -> None:
    """assert, also under python -O."""
    if not condition:
        raise AssertionError(message)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits, on the CPU, as one-dimensional integers; every NaN is the same one."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    flat = tensor.detach().cpu().flatten()
    return torch.where(flat.isnan(), torch.full_like(flat, math.nan), flat).view(ints)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """The same dtype, shape and bits; payloads of NaN do not count."""
    got, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (actual, expected))
    require(got == wanted, f"{what}: {got} instead of {wanted}")
    at = (bits_of(actual) != bits_of(expected)).nonzero().flatten().tolist()
    if at:
        got, wanted = (repr(t.detach().flatten()[at[0]].item()) for t in (actual, expected))
        count = f"{len(at)} of {actual.numel()} elements differ"
        raise AssertionError(f"{what}: {count}, first at {at[0]}: {got} instead of {wanted}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold junk, not an earlier, right, result: an element that nobody wrote shows.

    NaN, but on the CPU, in a result of the compiled kernels, every other number of a half type
    is one that is none.
    """
    before = torch.get_deterministic_debug_mode()
    # The kernels' results on the CPU come from the allocator itself, past the mode below.
    junk = ctypes.c_bool.in_dll(
        ctypes.CDLL(torch._C.__file__), "FLAGS_caffe2_cpu_allocator_do_junk_fill"
    )
    junk.value = True
    # use_deterministic_algorithms does as much, but imports inductor: seconds.
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        junk.value = False


class Skip(Exception):
    """A check has nothing to say here, and this is why."""


def need_kernels(device: torch.device, free_bytes: int = 0) -> None:
    """Skip what reference.py does not promise where that is what runs, or memory is short."""
    gpu_kernels = _extensions.has_cuda or _extensions.has_triton
    if not (gpu_kernels if device.type == "cuda" else _extensions.library):
        raise Skip(f"no kernels: {backends()[device.type]}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < free_bytes:
            raise Skip(f"{free / 2**30:.1f} GiB free, {free_bytes / 2**30:.1f} needed")
