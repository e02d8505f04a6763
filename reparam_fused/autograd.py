"""The derivatives of the ops, written by hand. eps is drawn again from the key, not stored.

Under vmap the noise is batched if and only if the key is: an element's noise is that of its
index within its own example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops


def _vmap(
    op: Callable[[Tensor, Tensor, Tensor], Tensor],
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    log_var: Tensor,
    key: Tensor,
) -> tuple[Tensor, int]:
    """The op over a batch, as one call with a key for each example."""
    x_dim, log_var_dim, key_dim = in_dims

    def batched(t: Tensor, dim: int | None, rank: int) -> Tensor:
        """The batch first, and ones where an example has less dimensions than the result."""
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        return t.reshape(t.shape[0], *[1] * (rank - t.dim() + 1), *t.shape[1:])

    rank = max(x.dim() - (x_dim is not None), log_var.dim() - (log_var_dim is not None))
    key = key.unsqueeze(0) if key_dim is None else key.movedim(key_dim, 0)
    x, log_var = batched(x, x_dim, rank), batched(log_var, log_var_dim, rank)
    # One of them has the size of the batch, though it may be the key alone.
    x = x.expand(info.batch_size, *x.shape[1:])
    return op(x, log_var, key.expand(info.batch_size, *key.shape[1:])), 0


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
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, grad_z_t: Tensor | None, log_var_t: Tensor | None, _: None) -> Tensor:
        grad_z, log_var, key = ctx.saved_tensors
        tangent = torch.zeros((), dtype=grad_z.dtype, device=grad_z.device)
        if grad_z_t is not None:
            tangent = tangent + FusedSampleBackward.apply(grad_z_t, log_var, key)
        if log_var_t is not None:
            tangent = tangent + 0.5 * FusedSampleBackward.apply(grad_z * log_var_t, log_var, key)
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return _vmap(FusedSampleBackward.apply, info, in_dims, *args)

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


class TracedSample(torch.autograd.Function):
    """z = mu + sigma eps. Keeps log_var and the 16-byte key; grad_mu is grad_z itself.

    What a compiler traces: it takes no Function that has a jvp.
    """

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


class FusedSample(TracedSample):
    """TracedSample, with forward-mode derivatives and vmap."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        TracedSample.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:])
        ctx.shape, ctx.dtype = output.shape, output.dtype

    @staticmethod
    def jvp(ctx: Any, mu_t: Tensor | None, log_var_t: Tensor | None, _: None) -> Tensor:
        log_var, key = ctx.saved_tensors
        tangent = torch.zeros((), dtype=ctx.dtype, device=log_var.device).expand(ctx.shape)
        if mu_t is not None:
            tangent = tangent + mu_t
        if log_var_t is not None:
            by_log_var = FusedSampleBackward.apply(log_var_t.expand(ctx.shape), log_var, key)
            tangent = tangent + by_log_var
        return tangent.to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return _vmap(FusedSample.apply, info, in_dims, *args)


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

    @staticmethod
    def jvp(
        ctx: Any, mu_t: Tensor | None, log_var_t: Tensor | None, _: None
    ) -> tuple[Tensor, None]:
        return FusedSample.jvp(ctx, mu_t, log_var_t, None), None


def _register_vmap(op: str, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """For those who call the ops themselves, and for backward under is_grads_batched."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return _vmap(call, info, in_dims, *args)

    torch.library.register_vmap(f"reparam_fused::{op}", rule, lib=_ops.library)


_register_vmap("sample_from_key", _ops.sample_from_key)
_register_vmap("sample_backward", _ops.sample_backward)

for _op, _function in (
    ("sample", FusedDraw),
    ("sample_from_key", TracedSample),
    ("sample_backward", FusedSampleBackward),
):
    torch.library.register_autograd(
        f"reparam_fused::{_op}",
        _function.backward,
        setup_context=_function.setup_context,
        lib=_ops.library,
    )
