"""The table of forms: what the scale may be given as, a row for each.

A row is all that Python knows of a form. _autograd.py differentiates any row, _ops.py computes
one where nothing is compiled; a form is added here, in csrc/common and in triton_kernels.py, and
nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _extensions, reference

#: What is done with the scale before sigma is made of it, and then with sigma: the low and the
#: high end of a clamp, and what is added. None: nothing.
Bounds: TypeAlias = tuple[float, float, float]
#: global_shape and global_offset
Block: TypeAlias = tuple[Sequence[int] | None, Sequence[int] | None]


@dataclass(eq=False)
class Form:
    """sigma of a scale, and the chain rule back to it."""

    name: str
    #: By reference.py, bit for bit: sigma, and the gradient of the scale from that of sigma.
    sigma: Callable[[Tensor], Tensor]
    chain: Callable[[Tensor, Tensor], Tensor]
    #: In torch's own differentiable operations: sigma, its derivative, and the factor that makes
    #: of the derivative the second one. No factor: the derivative does not depend on the scale.
    std: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    ratio: Callable[[Tensor], Tensor | float] | None
    #: How much of log_var, ln sigma^2, a unit of the scale is; 0: it is another function.
    log_var: float
    #: The number that csrc has for it
    id: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if _kernels is not None:
            self.id = _kernels["forms"][self.name]


_module = _extensions.module
_kernels = _module.kernels() if _module is not None else None

#: What the scale is given as
FORMS = {
    form.name: form
    for form in (
        Form(
            "log_var",
            sigma=lambda log_var: reference.sigma(log_var),
            chain=lambda grad_sigma, log_var: grad_sigma * reference.sigma(log_var, 0.5),
            std=lambda log_var: torch.exp(0.5 * log_var),
            slope=lambda log_var: 0.5 * torch.exp(0.5 * log_var),
            ratio=lambda _: 0.5,
            log_var=1.0,
        ),
        Form(
            "std",
            sigma=lambda std: std,
            chain=lambda grad_sigma, _: grad_sigma,
            std=lambda std: std,
            slope=torch.ones_like,
            ratio=None,
            log_var=0.0,
        ),
        Form(
            "log_std",
            sigma=lambda log_std: reference.sigma(log_std, 1.0, 2.0),
            chain=lambda grad_sigma, log_std: grad_sigma * reference.sigma(log_std, 1.0, 2.0),
            std=torch.exp,
            slope=torch.exp,
            ratio=lambda _: 1.0,
            log_var=2.0,
        ),
        # Blundell et al., Weight Uncertainty in Neural Networks, 2015
        Form(
            "rho",
            sigma=lambda rho: reference.softplus(rho),
            chain=lambda grad_sigma, rho: grad_sigma * reference.sigmoid(rho),
            # Above the threshold torch takes rho itself, which in float64 is right from here on.
            std=lambda rho: torch.nn.functional.softplus(rho, threshold=37.0),
            slope=torch.sigmoid,
            ratio=lambda rho: torch.sigmoid(-rho),
            log_var=0.0,
        ),
    )
}  # fmt: skip


def over_exp(x: Tensor, log: Tensor) -> Tensor:
    """x / exp(log), also where that is 0 or infinite: of an x of 0 it is 0.

    By the root of the factor, twice, which has twice the range.
    """
    most = 0.99 * math.log(torch.finfo(log.dtype).max)  # to stay finite when rounded
    root = torch.exp((-0.5 * log).clamp(max=most))
    return x * root * root


def _clamped(bounds: Bounds | None, scale: Tensor) -> Tensor:
    """The scale within bounds, whose gradient is that of the kernels at an end itself: 1, as
    torch.clamp had it before 2.14."""
    if bounds is None:
        return scale
    clamped = scale.clamp(*bounds[:2])
    return torch.where(clamped == scale, scale, clamped)


class Call(NamedTuple):
    """What a call of an op asks for beside its tensors: one function of them, and its derivatives.

    Of a form of the scale it is the sample, mu + sigma eps, of one element or of `samples` of
    each; or the divergence, (mu^2 + sigma^2 - 1 - ln sigma^2) / 2.
    """

    form: Form
    draws: bool = True
    bounds: Bounds | None = None
    block: Block | None = None
    samples: int | None = None

    def backward_reads(self) -> bool:
        """Whether the gradient of the scale depends on the scale."""
        return not self.draws or self.form.ratio is not None or self.bounds is not None

    def by_x(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x from that of the function of one element."""
        return grad if self.draws else grad * x

    # In torch's own differentiable operations

    def std(self, scale: Tensor) -> Tensor:
        """sigma"""
        std = self.form.std(_clamped(self.bounds, scale))
        return std if self.bounds is None else std + self.bounds[2]

    def slope(self, scale: Tensor) -> Tensor:
        """The derivative of sigma by the scale."""
        clamped = _clamped(self.bounds, scale)
        slope = self.form.slope(clamped)
        return slope if self.bounds is None else torch.where(clamped == scale, slope, 0)

    def log_var(self, scale: Tensor) -> Tensor | None:
        """ln sigma^2 where the form has it without a logarithm."""
        if not self.form.log_var or (self.bounds is not None and self.bounds[2] != 0):
            return None
        return self.form.log_var * _clamped(self.bounds, scale)

    def log_sigma(self, scale: Tensor) -> Tensor:
        """ln |sigma|"""
        log_var = self.log_var(scale)
        return self.std(scale).abs().log() if log_var is None else 0.5 * log_var

    def from_log_sigma(self, grad: Tensor, scale: Tensor) -> Tensor:
        """The gradient of the scale from that of ln |sigma|, right where a sigma of log_var or
        log_std is 0 or infinite."""
        if self.log_var(scale) is None:
            return grad * self.slope(scale) / self.std(scale)
        within = _clamped(self.bounds, scale) == scale
        return grad * torch.where(within, 0.5 * self.form.log_var, 0)

    def line(self, mu: Tensor, scale: Tensor) -> Tensor:
        """The line that is replaced, for programs that run without this package."""
        if not self.draws and (log_var := self.log_var(scale)) is not None:
            return 0.5 * (mu.square() + torch.exp(log_var) - 1 - log_var)
        std = self.std(scale)
        if not self.draws:
            return 0.5 * (mu.square() + std.square() - 1) - std.abs().log()
        std = std.expand(torch.broadcast_shapes(mu.shape, std.shape))
        mu = mu.expand_as(std)
        one = mu if self.samples is None else mu.expand(self.samples, *mu.shape)
        return one + std * torch.randn_like(one)

    def second(self, first: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """The derivative of the scale's gradient by the scale, where `first` is that gradient
        for the incoming one `grad`."""
        clamped, ratio = _clamped(self.bounds, scale), self.form.ratio
        if self.draws:
            assert ratio is not None or self.bounds is not None
            return torch.zeros_like(first) if ratio is None else first * ratio(clamped)
        if (unit := self.form.log_var) and self.bounds is None:
            return unit * first + 0.5 * unit**2 * grad
        std, slope = self.std(scale), self.slope(scale)
        by_slope = (1 + std**-2) * slope.square()
        if ratio is not None:
            by_slope = by_slope + (std - 1 / std) * slope * ratio(clamped)
        return grad * by_slope

    # The kernels without the dispatcher, of plain tensors on the CPU (csrc/python): they give the
    # result, or (result, key) for autograd to record, or None for a call that is not plain: that
    # is the op's.

    def plain(self, x: Any, scale: Any, key: Any) -> Any:
        """The function, under this key if it draws."""
        if _kernels is None or self.block is not None:
            return None
        op = _SAMPLE if self.draws else _KL
        return _launch(op, self.form.id, x, scale, key, self.bounds, self.samples)

    def plain_backward(self, grad: Any, scale: Any, key: Any) -> Any:
        """The gradient of the scale; of samples (that of mu, that of the scale), and no key."""
        if _kernels is None or self.block is not None:
            return None
        op = _KL_BACKWARD
        if self.draws:
            op = _SAMPLE_BACKWARD if self.samples is None else _SAMPLES_BACKWARD
        return _launch(op, self.form.id, grad, scale, key, self.bounds, None)

    def plain_draw(self, mu: Any, scale: Any, generator: Any) -> Any:
        """The sample, under a key that is drawn."""
        if _kernels is None or self.block is not None:
            return None
        return _draw(self.form.id, mu, scale, generator, self.bounds, self.samples)


if _module is not None and _kernels is not None:
    _launch, _draw, _ops = _module.launch, _module.draw, _kernels["ops"]
    _SAMPLE, _KL = _ops["sample_from_key"], _ops["kl_divergence"]
    _SAMPLE_BACKWARD, _KL_BACKWARD = _ops["sample_backward"], _ops["kl_divergence_backward"]
    _SAMPLES_BACKWARD = _ops["samples_backward"]

#: The calls that are most, made once: of each form the sample and the divergence.
SAMPLE = {name: Call(form) for name, form in FORMS.items()}
KL_DIVERGENCE = {name: Call(form, draws=False) for name, form in FORMS.items()}
