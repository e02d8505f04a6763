"""The derivatives of the ops, written by hand. eps is drawn again from the key, not stored.

Under vmap the noise is batched if and only if the key is: an element's noise is that of its
index within its own example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _ops

Ints: TypeAlias = Sequence[int] | None
# Of form, global_shape and global_offset
_NO_GRADIENTS = (None, None, None)


def rank_of(t: Tensor | None, dim: int | None) -> int:
    """The dimensions of an example of t, which is batched along dim."""
    return 0 if t is None else t.dim() - (dim is not None)


def batch_first(t: Tensor, dim: int | None, rank: int) -> Tensor:
    """The batch, then ones where an example has less than so many dimensions, then those."""
    t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    return t.reshape(t.shape[0], *[1] * (rank - t.dim() + 1), *t.shape[1:])


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of two parts of a tangent, of which None is zero and costs nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _vmap(
    op: Callable[..., Tensor],
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    scale: Tensor | None,
    key: Tensor,
    form: str = "log_var",
    global_shape: Ints = None,
    global_offset: Ints = None,
) -> tuple[Tensor, int]:
    """The op over a batch, as one call with a key for each example."""
    x_dim, scale_dim, key_dim, *_ = in_dims
    rank = max(rank_of(x, x_dim), rank_of(scale, scale_dim))
    key = key.unsqueeze(0) if key_dim is None else key.movedim(key_dim, 0)
    key = key.expand(info.batch_size, *key.shape[1:])
    x = batch_first(x, x_dim, rank)
    # One of them has the size of the batch, though it may be the key alone.
    x = x.expand(info.batch_size, *x.shape[1:])
    if scale is not None:
        scale = batch_first(scale, scale_dim, rank)
    if global_shape is not None and global_offset is not None:
        global_shape, global_offset = (info.batch_size, *global_shape), (0, *global_offset)
    return op(x, scale, key, form, global_shape, global_offset), 0


class FusedSampleBackward(torch.autograd.Function):
    """grad_log_var = grad_z eps sigma / 2, and grad_std = grad_z eps.

    The first depends on log_var by a factor exp(log_var / 2), so its derivative by log_var
    is itself, halved; the second does not depend on std, and takes None for it. Gradients
    of every order are this one op.
    """

    @staticmethod
    def forward(
        grad_z: Tensor,
        scale: Tensor | None,
        key: Tensor,
        form: str,
        global_shape: Ints,
        global_offset: Ints,
    ) -> Tensor:
        return _ops.sample_backward(grad_z, scale, key, form, global_shape, global_offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_z, scale, key, *ctx.options = inputs
        # A std's gradient is linear in grad_z, which is then not needed again.
        saved = (key,) if scale is None else (key, grad_z, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.shape, ctx.dtype = grad_z.shape, grad_z.dtype

    @staticmethod
    def jvp(ctx: Any, grad_z_t: Tensor | None, scale_t: Tensor | None, *_: None) -> Tensor | None:
        key, grad_z, scale = (*ctx.saved_tensors, None, None)[:3]
        by_grad_z = by_scale = None
        if grad_z_t is not None:
            by_grad_z = FusedSampleBackward.apply(grad_z_t, scale, key, *ctx.options)
        if scale_t is not None:
            by_scale = FusedSampleBackward.apply(grad_z * scale_t, scale, key, *ctx.options) * 0.5
        return total(by_grad_z, by_scale)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap(FusedSampleBackward.apply, info, in_dims, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_grad_z = grad_scale = None
        if grad is None:
            return grad_grad_z, grad_scale, None, *_NO_GRADIENTS
        key, grad_z, scale = (*ctx.saved_tensors, None, None)[:3]
        if ctx.needs_input_grad[0]:
            by_grad_z = FusedSampleBackward.apply(grad, scale, key, *ctx.options)
            grad_grad_z = by_grad_z.sum_to_size(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            by_scale = FusedSampleBackward.apply(grad * grad_z, scale, key, *ctx.options) * 0.5
            grad_scale = by_scale.sum_to_size(scale.shape).to(scale.dtype)
        return grad_grad_z, grad_scale, None, *_NO_GRADIENTS


class TracedSample(torch.autograd.Function):
    """z = mu + sigma eps. Keeps the 16-byte key, and log_var; grad_mu is grad_z itself.

    What a compiler traces: it takes no Function that has a jvp.
    """

    @staticmethod
    def forward(
        mu: Tensor,
        scale: Tensor,
        key: Tensor,
        form: str,
        global_shape: Ints,
        global_offset: Ints,
    ) -> Tensor:
        return _ops.sample_from_key(mu, scale, key, form, global_shape, global_offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mu, scale, key, form, *block = inputs
        ctx.mu_shape, ctx.mu_dtype = mu.shape, mu.dtype
        ctx.scale_shape, ctx.scale_dtype = scale.shape, scale.dtype
        ctx.options = (form, *block)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(*((key, scale) if form == "log_var" else (key,)))

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_mu = grad_scale = None
        if grad_z is None:
            return grad_mu, grad_scale, None, *_NO_GRADIENTS
        if ctx.needs_input_grad[0]:
            grad_mu = grad_z.sum_to_size(ctx.mu_shape).to(ctx.mu_dtype)
        if ctx.needs_input_grad[1]:
            key, scale = (*ctx.saved_tensors, None)[:2]
            by_scale = FusedSampleBackward.apply(grad_z, scale, key, *ctx.options)
            grad_scale = by_scale.sum_to_size(ctx.scale_shape).to(ctx.scale_dtype)
        return grad_mu, grad_scale, None, *_NO_GRADIENTS


class FusedSample(TracedSample):
    """TracedSample, with forward-mode derivatives and vmap."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        TracedSample.setup_context(ctx, inputs, output)
        # Or each backward would fill one for the key that FusedDraw returns.
        ctx.set_materialize_grads(False)
        _, scale, key, form, *_ = inputs
        ctx.save_for_forward(*((key, scale) if form == "log_var" else (key,)))
        ctx.shape, ctx.dtype = output.shape, output.dtype

    @staticmethod
    def jvp(ctx: Any, mu_t: Tensor | None, scale_t: Tensor | None, *_: None) -> Tensor | None:
        key, scale = (*ctx.saved_tensors, None)[:2]
        by_scale = None
        if scale_t is not None:
            scale_t = scale_t.expand(ctx.shape)
            by_scale = FusedSampleBackward.apply(scale_t, scale, key, *ctx.options)
        tangent = total(mu_t, by_scale)
        return None if tangent is None else tangent.expand(ctx.shape).to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap(FusedSample.apply, info, in_dims, *args)


class FusedDraw(torch.autograd.Function):
    """FusedSample with a key that the op draws, and returns beside z."""

    @staticmethod
    def forward(
        mu: Tensor, scale: Tensor, generator: torch.Generator | None, form: str
    ) -> tuple[Tensor, Tensor]:
        return _ops.sample(mu, scale, generator, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        mu, scale, _, form = inputs
        _, key = output
        ctx.mark_non_differentiable(key)
        FusedSample.setup_context(ctx, (mu, scale, key, form, None, None), output[0])

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return *FusedSample.backward(ctx, grad_z)[:2], None, None

    @staticmethod
    def jvp(
        ctx: Any, mu_t: Tensor | None, scale_t: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None]:
        return FusedSample.jvp(ctx, mu_t, scale_t), None


def _register_vmap(op: str, call: Callable[..., Tensor]) -> None:
    """For those who call the ops themselves, and for backward under is_grads_batched."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap(call, info, in_dims, *args)

    torch.library.register_vmap(f"reparam_fused::{op}", rule, lib=_ops.library)


_register_vmap("sample_from_key", _ops.sample_from_key)
_register_vmap("sample_backward", _ops.sample_backward)


def _vmap_noise(
    info: Any,
    in_dims: tuple[Any, ...],
    key: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    global_shape: Ints = None,
    global_offset: Ints = None,
) -> tuple[Tensor, int]:
    """The key is what is batched."""
    if global_shape is not None and global_offset is not None:
        global_shape, global_offset = (info.batch_size, *global_shape), (0, *global_offset)
    size = (info.batch_size, *size)
    return _ops.noise(key.movedim(in_dims[0], 0), size, dtype, global_shape, global_offset), 0


torch.library.register_vmap("reparam_fused::noise", _vmap_noise, lib=_ops.library)

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
