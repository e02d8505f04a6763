"""The gradients of the ops, written by hand. eps is drawn again from the key, not stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops


class FusedSampleBackward(torch.autograd.Function):
    """grad_log_var = grad_z eps sigma / 2.

    It depends on log_var by a factor exp(log_var / 2), so its derivative by log_var
    is itself, halved: gradients of every order are this one op.
    """

    @staticmethod
    def forward(grad_z: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
        return _ops.sample_backward(grad_z, log_var, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_z, log_var, key = ctx.saved_tensors
        grad_grad_z = grad_log_var = None
        if ctx.needs_input_grad[0]:
            by_grad_z = FusedSampleBackward.apply(grad, log_var, key)
            grad_grad_z = by_grad_z.sum_to_size(grad_z.shape).to(grad_z.dtype)
        if ctx.needs_input_grad[1]:
            by_log_var = FusedSampleBackward.apply(grad * grad_z, log_var, key) * 0.5
            grad_log_var = by_log_var.sum_to_size(log_var.shape).to(log_var.dtype)
        return grad_grad_z, grad_log_var, None


class FusedSample(torch.autograd.Function):
    """z = mu + sigma eps. Keeps log_var and the 16-byte key; grad_mu is grad_z itself."""

    @staticmethod
    def forward(mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
        return _ops.sample_from_key(mu, log_var, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        mu, log_var, key = inputs
        ctx.mu_shape, ctx.mu_dtype = mu.shape, mu.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(log_var, key)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_mu = grad_log_var = None
        if ctx.needs_input_grad[0]:
            grad_mu = grad_z.sum_to_size(ctx.mu_shape).to(ctx.mu_dtype)
        if ctx.needs_input_grad[1]:
            log_var, key = ctx.saved_tensors
            by_log_var = FusedSampleBackward.apply(grad_z, log_var, key)
            grad_log_var = by_log_var.sum_to_size(log_var.shape).to(log_var.dtype)
        return grad_mu, grad_log_var, None


class FusedDraw(torch.autograd.Function):
    """FusedSample with a key that the op draws, and returns beside z."""

    @staticmethod
    def forward(
        mu: Tensor, log_var: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        return _ops.sample(mu, log_var, generator)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, torch.Generator | None],
        output: tuple[Tensor, Tensor],
    ) -> None:
        mu, log_var, _ = inputs
        _, key = output
        ctx.mark_non_differentiable(key)
        FusedSample.setup_context(ctx, (mu, log_var, key), output[0])

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        return FusedSample.backward(ctx, grad_z)


for _op, _function in (
    ("sample", FusedDraw),
    ("sample_from_key", FusedSample),
    ("sample_backward", FusedSampleBackward),
):
    torch.library.register_autograd(
        f"reparam_fused::{_op}",
        _function.backward,
        setup_context=_function.setup_context,
        lib=_ops.library,
    )
