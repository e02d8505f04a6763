"""What several test files use; inputs and comparisons are those of the acceptance run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reparam_fused import _extensions, _forms, _heads, _ops, _patch
from reparam_fused.check.parts import DTYPES as DTYPES
from reparam_fused.check.parts import assert_same_bits as assert_same_bits
from reparam_fused.check.parts import extremes as extremes
from reparam_fused.check.parts import inputs as inputs
from reparam_fused.check.parts import key_of as key_of

# Ops of two operands, a key, a form, a block and bounds, for any device. Those without noise make
# no use of the key, and noise looks at the first operand's shape and dtype alone.
OPS: dict[str, Callable[..., Tensor]] = {
    "sample": _ops.sample_from_key,
    "sample_backward": _ops.sample_backward,
    "noise": lambda x, scale, key, form="log_var", *block: _ops.noise(
        key, x.shape, x.dtype, *block[:2]
    ),
    "kl_divergence": lambda mu, scale, key=None, form="log_var", *block: _ops.kl_divergence(
        mu, scale, form, *block[2:]
    ),
    "kl_divergence_backward": lambda grad, scale, key=None, form="log_var", *block: (
        _ops.kl_divergence_backward(grad, scale, form, *block[2:])
    ),
}
# With a key, of which the first two have a scale; with operands
SCALED_OPS = ("sample", "sample_backward")
NOISY_OPS = (*SCALED_OPS, "noise")
READING_OPS = (*SCALED_OPS, "kl_divergence", "kl_divergence_backward")
FORMS = tuple(_forms.FORMS)

needs_kernels = pytest.mark.skipif(
    _extensions.library is None, reason="the C++ library is not built: reference.py is what runs"
)
# Older releases do not convert their tensors for a module of the stable ABI.
CALLS_CAN_BE_PLAIN = _extensions.module is not None and torch.__version__ >= "2.14"
# Of a build without CUDA even fake tensors on a GPU end the process.
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is a build without CUDA"
)


def patience(seconds: float) -> float:
    """How long to wait for what takes a small part of these seconds on an idle machine.

    It is there to end what hangs, and no measure of speed: on a busy machine it is longer, and the
    others may come after it has begun.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return seconds * max(4.0, 2 * load / (os.cpu_count() or 1))


def leaves(
    *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """inputs, for which gradients are wanted."""
    mu, log_var = inputs(*shape, dtype=dtype, device=device)
    return mu.requires_grad_(), log_var.requires_grad_()


def assert_as_on_cpu(actual: Tensor, expected: Tensor) -> None:
    """The CPU's bits, or in float64 on a GPU, for which ULPs are promised, within some of them."""
    assert not expected.is_cuda
    if actual.is_cuda and actual.dtype == torch.float64:
        torch.testing.assert_close(
            actual.cpu(), expected, rtol=1e-13, atol=1e-14, equal_nan=True, check_stride=False
        )
    else:
        assert_same_bits(actual, expected)


def by_the_ops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is a plain one: every one goes through the dispatcher."""
    for name in ("plain", "plain_backward", "plain_draw"):
        monkeypatch.setattr(_forms.Call, name, lambda *_: None)
    for name in ("plain", "plain_backward"):
        monkeypatch.setattr(_heads.Head, name, lambda *_: None)


def count_patched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that gets the mean of each fused call that a patched method makes."""
    means: list[Tensor] = []
    general, plain = _patch.fused_reparameterize, _patch._plain_call
    recorded = _patch._recorded_call

    def count_general(mean: Tensor, *args: Tensor, **options: Any) -> Tensor:
        means.append(mean)
        return general(mean, *args, **options)

    def count_plain(call: Any, mean: Tensor, *rest: Any) -> Tensor | None:
        # a test may take the devices away
        z = plain(call, mean, *rest) if _patch._DEVICES else None
        if z is not None:
            means.append(mean)
        return z

    def count_recorded(source: Any, call: Any, mean: Tensor, *rest: Any) -> Tensor:
        means.append(mean)
        return recorded(source, call, mean, *rest)

    monkeypatch.setattr(_patch, "_recorded_call", count_recorded)
    monkeypatch.setattr(_patch, "fused_reparameterize", count_general)
    monkeypatch.setattr(_patch, "_plain_call", count_plain)
    return means


def eager(mu: Tensor, log_var: Tensor, eps: Tensor) -> Tensor:
    """The line that the library replaces, with given noise."""
    return mu + torch.exp(0.5 * log_var) * eps
