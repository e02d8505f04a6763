"""The divergence of a normal from the standard one, with derivatives written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _ops, _validate, functional
from .autograd import batch_first, rank_of, total

# As functional.plain_call
plain_call: Callable[..., Tensor | None] = getattr(
    _ops.extension, "kl_divergence", functional.no_plain_call
)


def _vmap(
    op: Callable[..., Tensor], info: Any, in_dims: tuple[int | None, int | None], *args: Tensor
) -> tuple[Tensor, int]:
    """The op over a batch: every element is on its own."""
    rank = max(map(rank_of, args, in_dims))
    return op(*(batch_first(t, dim, rank) for t, dim in zip(args, in_dims, strict=True))), 0


class KlDivergenceBackward(torch.autograd.Function):
    """grad_log_var = grad (e^log_var - 1) / 2.

    Its derivative by log_var is itself and half of grad more: gradients of every order are
    this one op.
    """

    @staticmethod
    def forward(grad: Tensor, log_var: Tensor) -> Tensor:
        return _ops.kl_divergence_backward(grad, log_var)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, log_var_t: Tensor | None) -> Tensor | None:
        grad, log_var = ctx.saved_tensors
        by_grad = by_log_var = None
        if grad_t is not None:
            by_grad = KlDivergenceBackward.apply(grad_t, log_var)
        if log_var_t is not None:
            by_log_var = _by_log_var(grad * log_var_t, log_var)
        tangent = total(by_grad, by_log_var)
        return None if tangent is None else tangent.to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _vmap(KlDivergenceBackward.apply, info, in_dims, *args)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        grad_grad = grad_log_var = None
        if grad_out is None:
            return grad_grad, grad_log_var
        grad, log_var = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            by_grad = KlDivergenceBackward.apply(grad_out, log_var)
            grad_grad = by_grad.sum_to_size(grad.shape).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            by_log_var = _by_log_var(grad_out * grad, log_var)
            grad_log_var = by_log_var.sum_to_size(log_var.shape).to(log_var.dtype)
        return grad_grad, grad_log_var


def _by_log_var(grad: Tensor, log_var: Tensor) -> Tensor:
    """grad e^log_var / 2, the derivative of the backward."""
    by_log_var: Tensor = KlDivergenceBackward.apply(grad, log_var)
    return by_log_var + 0.5 * grad


class TracedKlDivergence(torch.autograd.Function):
    """(mu^2 + e^log_var - 1 - log_var) / 2. Keeps its inputs, and nothing of their size more.

    What a compiler traces: it takes no Function that has a jvp.
    """

    @staticmethod
    def forward(mu: Tensor, log_var: Tensor) -> Tensor:
        return _ops.kl_divergence(mu, log_var)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        kept = (t if ctx.needs_input_grad[i] else None for i, t in enumerate(inputs))
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        grad_mu = grad_log_var = None
        if grad is None:
            return grad_mu, grad_log_var
        mu, log_var = ctx.saved_tensors
        if mu is not None:
            grad_mu = (grad * mu).sum_to_size(mu.shape).to(mu.dtype)
        if log_var is not None:
            by_log_var = KlDivergenceBackward.apply(grad, log_var)
            grad_log_var = by_log_var.sum_to_size(log_var.shape).to(log_var.dtype)
        return grad_mu, grad_log_var


class KlDivergence(TracedKlDivergence):
    """TracedKlDivergence, with forward-mode derivatives and vmap."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        TracedKlDivergence.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs)
        ctx.shape, ctx.dtype = output.shape, output.dtype

    @staticmethod
    def jvp(ctx: Any, mu_t: Tensor | None, log_var_t: Tensor | None) -> Tensor | None:
        mu, log_var = ctx.saved_tensors
        by_mu = by_log_var = None
        if mu_t is not None:
            by_mu = mu * mu_t
        if log_var_t is not None:
            by_log_var = KlDivergenceBackward.apply(log_var_t, log_var)
        tangent = total(by_mu, by_log_var)
        return None if tangent is None else tangent.expand(ctx.shape).to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _vmap(KlDivergence.apply, info, in_dims, *args)


def _register(op: str, call: Callable[..., Tensor], function: Any) -> None:
    """For those who call the ops themselves, compilers among them."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _vmap(call, info, in_dims, *args)

    name = f"reparam_fused::{op}"
    torch.library.register_vmap(name, rule, lib=_ops.library)
    torch.library.register_autograd(
        name, function.backward, setup_context=function.setup_context, lib=_ops.library
    )


_register("kl_divergence", _ops.kl_divergence, TracedKlDivergence)
_register("kl_divergence_backward", _ops.kl_divergence_backward, KlDivergenceBackward)


def fused_kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    r"""The Kullback-Leibler divergence of :math:`N(\mu, \exp(\mathrm{log\_var}))` from
    :math:`N(0, 1)`, element by element and in one pass:
    :math:`\tfrac{1}{2}\,(\mu^2 + \exp(\mathrm{log\_var}) - 1 - \mathrm{log\_var})`.

    The regulariser of a VAE (Kingma and Welling, Auto-Encoding Variational Bayes, 2013,
    appendix B), as ``torch.distributions.kl_divergence(Normal(mu, (0.5 * log_var).exp()),
    Normal(0, 1))``, with gradients of every order. Sum it over the dimensions of an example.

    Near 0 the terms of the formula cancel, and what is left of them in float32 is mostly
    rounding; here the result keeps its relative accuracy down to the smallest divergence, as
    does the gradient. Same bits on every backend in float32, float16 and bfloat16 (float64:
    within a few ULP).

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor): log of the variance; broadcasts with ``mu``.

    Returns:
        Tensor: at least 0, of the broadcast shape, with ``torch.result_type(mu, log_var)`` and
        the memory format that ``mu + log_var`` has. Half types are computed in float32 and
        rounded once. Under ``torch.autocast`` the dtype is that of the formula in torch's own
        operations. ``DTensor`` arguments give a ``DTensor``.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype.
        RuntimeError: shapes that do not broadcast, or different devices.

    NaN stays NaN in its own element; any infinity gives infinity.

    Example::

        >>> import torch, reparam_fused
        >>> mu, log_var = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1e-3])
        >>> reparam_fused.fused_kl_divergence(mu, log_var)
        tensor([0.0000e+00, 5.0000e-01, 2.5008e-07])
    """
    function = "fused_kl_divergence"
    compiling = torch.compiler.is_compiling()
    if not compiling:
        kl = plain_call(mu, log_var)
        if kl is not None:
            return kl
    if has_torch_function((mu, log_var)):
        return handle_torch_function(fused_kl_divergence, (mu, log_var), mu, log_var)
    _validate.check_pair(function, mu, "log_var", log_var)
    if functional.is_dtensor(mu) or functional.is_dtensor(log_var):
        from . import _dtensor

        return _dtensor.elementwise(function, fused_kl_divergence, mu, log_var)
    functional.check_forward_mode(function)
    log_var = functional.autocast_exp(mu, log_var)
    if not compiling:
        return KlDivergence.apply(mu, log_var)  # type: ignore[no-any-return]
    if log_var is mu:
        log_var = log_var.view_as(log_var)  # dynamo refuses a Function one tensor twice
    return TracedKlDivergence.apply(mu, log_var)  # type: ignore[no-any-return]
