"""Comparisons and inputs that several test files use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reparam_fused import _ops, _patch

needs_kernels = pytest.mark.skipif(
    _ops.extension is None, reason="the C++ extension is not built: reference.py is what runs"
)
# Of a build without CUDA even fake tensors on a GPU end the process.
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is a build without CUDA"
)

_INTS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def key_of(seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([seed % 2**64, offset % 2**64], dtype=torch.uint64, device=device)


def inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """mu and log_var, without a draw from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_var = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    return mu.to(dtype).to(device), log_var.to(dtype).to(device)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal as bits, but for the payload of a NaN; wherever the tensors are."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    ints = _INTS[actual.dtype]
    zero = torch.zeros((), dtype=actual.dtype)
    a = torch.where(nan, zero, actual).contiguous().view(ints)
    b = torch.where(nan, zero, expected).contiguous().view(ints)
    different = (a != b).flatten().nonzero().flatten()
    assert different.numel() == 0, (
        f"{different.numel()} of {a.numel()} elements differ, first at {different[:5].tolist()}: "
        f"{actual.flatten()[different[:5]].tolist()} "
        f"for {expected.flatten()[different[:5]].tolist()}"
    )


def assert_as_on_cpu(actual: Tensor, expected: Tensor) -> None:
    """The CPU's bits, or in float64 on a GPU, for which ULPs are promised, within some of them."""
    assert not expected.is_cuda
    if actual.is_cuda and actual.dtype == torch.float64:
        torch.testing.assert_close(
            actual.cpu(), expected, rtol=1e-13, atol=1e-14, equal_nan=True, check_stride=False
        )
    else:
        assert_same_bits(actual, expected)


def count_patched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that gets the mean of each fused call that a patched method makes."""
    means: list[Tensor] = []
    general, plain = _patch.fused_reparameterize, _patch._plain_call

    def count_general(mean: Tensor, *args: Tensor, **options: Any) -> Tensor:
        means.append(mean)
        return general(mean, *args, **options)

    def count_plain(mean: Tensor, std: Tensor) -> Tensor | None:
        # a test may take the devices away
        z = plain(mean, std) if _patch._DEVICES else None
        if z is not None:
            means.append(mean)
        return z

    monkeypatch.setattr(_patch, "fused_reparameterize", count_general)
    monkeypatch.setattr(_patch, "_plain_call", count_plain)
    return means


def eager(mu: Tensor, log_var: Tensor, eps: Tensor) -> Tensor:
    """The line that the library replaces, with given noise."""
    return mu + torch.exp(0.5 * log_var) * eps
