"""A sample and the sums of its terms: the ops head and head_backward, in the engine and without.

What differentiates a head more than once, forward or under torch.func takes it apart into the
differentiable ops that there are: no second derivative is written by hand for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling

from . import _extensions, _ops
from ._autograd import _apply, _below, dense, gradient_of_scale, gradients_of_samples
from ._forms import FORMS, KL_DIVERGENCE, SAMPLE, Call, over_exp


class Head(NamedTuple):
    """What a call of the op asks for beside its tensors."""

    #: The sample: its form, bounds, block and samples
    call: Call
    term: str
    summed: int
    #: The form and the bounds of the prior's scale
    prior: Call = SAMPLE["std"]

    # The kernels without the dispatcher, as in _forms.py

    def plain(
        self, mu: Any, scale: Any, key: Any, loc: Any, prior: Any, generator: Any = False
    ) -> Any:
        """(z, sum), and the key for autograd to record; None for what is the op's. With a
        generator, of which None is torch's own, the key is drawn."""
        if _module is None or self.call.block is not None:
            return None
        return _module.head(*self._numbers(), mu, scale, key, loc, prior, generator)

    def plain_backward(
        self, mu: Any, scale: Any, key: Any, loc: Any, prior: Any, grad_z: Any, grad_total: Any
    ) -> Any:
        """The gradients of mu, scale, loc and prior."""
        if _module is None or self.call.block is not None:
            return None
        return _module.head_backward(
            *self._numbers(), mu, scale, key, loc, prior, grad_z, grad_total
        )

    def _numbers(self) -> tuple[Any, ...]:
        call, prior = self.call, self.prior
        return (
            _TERM_IDS[self.term], self.summed, call.form.id, call.bounds, call.samples,
            prior.form.id, prior.bounds,
        )  # fmt: skip

    def options(self) -> tuple[Any, ...]:
        """What the op takes after its tensors."""
        call, prior = self.call, self.prior
        block = call.block or (None, None)
        options = (
            call.form.name, prior.form.name, *block, call.bounds, prior.bounds, call.samples
        )  # fmt: skip
        last = len(options)
        while last > 0 and options[last - 1] == _DEFAULTS[last - 1]:
            last -= 1
        return (self.term, self.summed, *options[:last])


_module = _extensions.module
_TERM_IDS = {term: i for i, term in enumerate(_ops.TERMS)}
_DEFAULTS = ("log_var", "std", None, None, None, None, None)


def _head(
    term: str,
    summed: int,
    form: str = "log_var",
    prior_form: str = "std",
    global_shape: Any = None,
    global_offset: Any = None,
    bounds: Any = None,
    prior_bounds: Any = None,
    samples: int | None = None,
) -> Head:
    """From the options of the op."""
    block = None if global_shape is None else (global_shape, global_offset)
    call = Call(FORMS[form], True, bounds, block, samples)
    return Head(call, term, summed, Call(FORMS[prior_form], True, prior_bounds))


def _in_units(head: Head, x: Tensor, prior: Tensor) -> Tensor:
    """x / sigma of the prior, of 0 also where that is 0 to rounding."""
    log_var = head.prior.log_var(prior)
    return x / head.prior.std(prior) if log_var is None else over_exp(x, 0.5 * log_var)


def _from_prior(
    head: Head, mu: Tensor, scale: Tensor, loc: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor, str, Tensor | float]:
    """The mean, the scale and its form of what is as far from N(0, 1), but for an addend where that
    scale would be lost."""
    distance = _in_units(head, mu - loc, prior)
    log_var, of_prior = head.call.log_var(scale), head.prior.log_var(prior)
    if log_var is not None and of_prior is not None:
        return distance, log_var - of_prior, "log_var", 0.0
    std, of = head.call.std(scale).abs(), head.prior.std(prior).abs()
    ratio = std / of
    far = ratio < torch.finfo(ratio.dtype).tiny
    # Neither branch of a where may have a gradient that is no number.
    log = torch.where(far, std, 1.0).log() - torch.where(far, of, 1.0).log()
    return distance, torch.where(far, 1.0, ratio), "std", -log - 0.5 * far


def _operands(
    mu: Tensor, scale: Tensor, loc: Tensor | None, prior: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """In one shape, and in the dtype of the sums."""
    dtype = torch.result_type(mu, scale)
    up = torch.float64 if dtype == torch.float64 else torch.float32
    mu, scale = torch.broadcast_tensors(mu.to(dtype).to(up), scale.to(dtype).to(up))
    if loc is None or prior is None:
        return mu, scale, None, None
    return mu, scale, loc.to(up), prior.to(up)


def _eps(head: Head, mu: Tensor, key: Tensor) -> Tensor:
    block = head.call.block or (None, None)
    one = mu.new_ones(())
    return _ops.sample_from_key(
        torch.zeros_like(mu), one, key, "std", *block, None, head.call.samples
    )


def decomposed(
    head: Head,
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    exported: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """The head by differentiable ops; exported, by those of torch alone, with noise of its own."""
    call = head.call
    dtype = torch.result_type(mu, scale)
    mu, scale, loc, prior = _operands(mu, scale, loc, prior)
    z = eps = None
    if exported:
        shape = mu.shape if call.samples is None else (call.samples, *mu.shape)
        eps = torch.randn_like(mu.expand(shape))
        z = mu + call.std(scale) * eps
    elif key is not None:
        block = call.block or (None, None)
        z = _ops.sample_from_key(mu, scale, key, call.form.name, *block, call.bounds, call.samples)
        if head.term != "kl_divergence":
            eps = _eps(head, mu, key)
    if head.term == "kl_divergence":
        form = call.form.name
        bounds, addend = call.bounds, None
        if loc is not None and prior is not None:
            mu, scale, form, addend = _from_prior(head, mu, scale, loc, prior)
            bounds = None
        if exported:
            terms = KL_DIVERGENCE[form]._replace(bounds=bounds).line(mu, scale)
        else:
            terms = _ops.kl_divergence(mu, scale, form, bounds)
        if addend is not None:
            terms = terms + addend
    else:
        assert z is not None
        assert eps is not None
        terms = -0.5 * eps.square() - 0.5 * math.log(2 * math.pi) - call.log_sigma(scale)
        if head.term == "tanh_log_prob":
            size = z.abs()
            terms = terms - 2 * (math.log(2) - size - torch.nn.functional.softplus(-2 * size))
            z = torch.tanh(z)
    dims = [*range(-head.summed, 0)]
    return None if z is None else z.to(dtype), terms.sum(dims) if dims else terms


def _needs_parts() -> bool:
    """Whether a derivative is asked for that the Function has none for."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


class Heads(_SingleLevelFunction):
    """``Heads.apply(head, (z, total, key), mu, scale, loc, prior)``, as _autograd.Forward."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        result: tuple[Tensor, Tensor, Tensor | None],
        mu: Tensor,
        scale: Tensor,
        loc: Tensor | None,
        prior: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        z, total, key = result
        ctx.head = head
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, scale, key, loc, prior)
        if key is None and z is not None:
            ctx.mark_non_differentiable(z)
        return z, total

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mu, scale, key, loc, prior = ctx.saved_tensors
        gradients = _gradients(
            ctx.head, mu, scale, key, loc, prior, grad_z, grad_total, ctx.needs_input_grad[2:]
        )
        return (None, None, *gradients)


# The names of their nodes, as in _autograd.py


class FusedKLDivergence(Heads):
    """A sum alone."""


class FusedReparameterizeKL(Heads):
    """A sample and its divergence."""


class FusedReparameterizeLogProb(Heads):
    """A sample, or its tanh, and its log-density."""


def heads_of(head: Head, result: tuple[Tensor | None, ...]) -> Any:
    """Of which Function this is a result."""
    if head.term != "kl_divergence":
        return FusedReparameterizeLogProb
    return FusedKLDivergence if result[2] is None else FusedReparameterizeKL


def _gradients(
    head: Head,
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    grad_z: Tensor | None,
    grad_total: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Those of mu, scale, loc and prior."""
    call = head.call
    if grad_total is None and grad_z is None:
        return None, None, None, None
    if grad_z is not None:
        grad_z = dense(grad_z)
    if grad_total is not None:
        grad_total = dense(grad_total)
    if grad_total is None and head.term != "tanh_log_prob":
        # The sample alone
        assert grad_z is not None
        assert key is not None
        kept = scale if call.backward_reads() else None
        if call.samples is not None:
            return *gradients_of_samples(call, grad_z, kept, key), None, None
        by_scale = gradient_of_scale(call, grad_z, kept, key) if needed[1] else None
        return grad_z, by_scale, None, None
    if grad_z is None and head.term == "kl_divergence":
        key = None  # the noise makes no difference
    if grad_total is None or (grad_z is None and key is not None):
        shape = torch.broadcast_shapes(mu.shape, scale.shape)
        if call.samples is not None:
            shape = torch.Size((call.samples, *shape))
        if grad_total is None:
            assert grad_z is not None
            up = torch.float64 if grad_z.dtype == torch.float64 else torch.float32
            grad_total = grad_z.new_zeros(shape[: len(shape) - head.summed], dtype=up)
        if grad_z is None:
            zero = grad_total.new_zeros((), dtype=torch.result_type(mu, scale))
            grad_z = zero.expand(shape)
    assert grad_total is not None
    if torch.is_grad_enabled() or _are_functorch_transforms_active():
        return _composed(head, mu, scale, key, loc, prior, grad_z, grad_total)
    if key is None:
        grad_z = None
    gradients = None
    if not is_compiling():
        gradients = head.plain_backward(mu, scale, key, loc, prior, grad_z, grad_total)
    if gradients is None:
        gradients = _ops.head_backward(
            mu, scale, key, loc, prior, grad_z, grad_total, *head.options()
        )
    by_mu = grad_z if head.term == "log_prob" else gradients[0]
    if prior is None:
        return by_mu, gradients[1], None, None
    return by_mu, gradients[1], gradients[2], gradients[3]


def _composed(
    head: Head,
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    grad_z: Tensor | None,
    grad_total: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients by differentiable ops, for those that are differentiated again."""
    call = head.call
    mu, scale, loc, prior = _operands(mu, scale, loc, prior)
    std, slope = call.std(scale), call.slope(scale)
    grad = grad_total[(..., *[None] * head.summed)]
    by_mu, by_scale, by_prior = None, None, None
    if key is not None and grad_z is not None:
        eps, by_mu = _eps(head, mu, key), grad_z.to(mu.dtype)
        if head.term == "tanh_log_prob":
            z = mu + std * eps
            # 1 - tanh^2, which does not cancel
            slope_of_tanh = 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)
            by_mu = by_mu * slope_of_tanh + 2 * torch.tanh(z) * grad
        by_scale = by_mu * eps * slope
    if head.term != "kl_divergence":
        assert by_scale is not None
        return by_mu, by_scale - call.from_log_sigma(grad, scale), None, None
    if loc is not None and prior is not None:
        distance = _in_units(head, mu - loc, prior)
        by_term_mu = _in_units(head, grad * distance, prior)
        log_var, of_prior = call.log_var(scale), head.prior.log_var(prior)
        # sigma^2 / prior^2 - 1
        if log_var is not None and of_prior is not None:
            square = torch.expm1(log_var - of_prior)
        else:
            square = (std / head.prior.std(prior)).square() - 1
        by_term = call.from_log_sigma(grad * square, scale)
        by_prior = head.prior.from_log_sigma(-grad * (square + distance.square()), prior)
    else:
        by_term_mu = grad * mu
        by_term = _ops.kl_divergence_backward(
            grad.expand_as(scale), scale, call.form.name, call.bounds
        )
    by_loc = None if by_prior is None else -by_term_mu
    by_mu = by_term_mu if by_mu is None else by_mu + by_term_mu
    by_scale = by_term if by_scale is None else by_scale + by_term
    return by_mu, by_scale, by_loc, by_prior


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _differentiated(
    keyset: Any,
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    if _needs_parts():
        return _apart(mu, scale, key, loc, prior, *options)
    z, total = _below(_ops.head, keyset, mu, scale, key, loc, prior, *options)
    if not _recorded(mu, scale, loc, prior):
        return z, total
    head, result = _head(*options), (z, total, key)
    return _apply(heads_of(head, result), head, result, mu, scale, loc, prior)  # type: ignore[return-value]


def _apart(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    z, total = decomposed(_head(*options), mu, scale, key, loc, prior)
    return total.new_empty(0) if z is None else z, total


def _backward_apart(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    grad_z: Tensor | None,
    grad_total: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    gradients = _composed(_head(*options), mu, scale, key, loc, prior, grad_z, grad_total)
    dtype, none = torch.result_type(mu, scale), grad_total.new_empty(0)
    return tuple(none if g is None else g.to(dtype) for g in gradients)


_ops.library.impl("head", _differentiated, "Autograd", with_keyset=True)
_ops.library.impl("head", _apart, "FuncTorchBatched")
_ops.library.impl("head_backward", _backward_apart, "FuncTorchBatched")
