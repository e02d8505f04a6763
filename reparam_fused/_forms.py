"""The table of forms: what tells one fused function from another, a row for each.

A row is all that Python knows of a form of the scale. _autograd.py differentiates any row,
_ops.py computes one where nothing is compiled; a form is added here, in csrc/common and in
triton_kernels.py, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _extensions, reference


def not_plain(*_: object) -> None:
    """What a plain call is where the compiled module is missing."""
    return


@dataclass(eq=False)
class Form:
    """A function f(x, scale) of each element, and what its derivatives need."""

    #: The ops, and how they are told the form. Nothing: an op of one form, without noise.
    forward: str
    backward: str
    name: str
    #: The line that is replaced, of x and a scale of one shape, for programs that run without
    #: this package.
    line: Callable[[Tensor, Tensor], Tensor]
    #: By reference.py, bit for bit: sigma of the scale, and the chain rule from a gradient of
    #: sigma back to the scale. None for an op without noise.
    sigma: Callable[[Tensor], Tensor] | None = None
    chain: Callable[[Tensor, Tensor], Tensor] | None = None
    #: The gradient of x from that of f. None: it is that of f.
    by_x: Callable[[Tensor, Tensor], Tensor] | None = None
    #: The derivative of the backward by the scale, from (backward(g), g), where g is the
    #: product of what comes in with the backward's own gradient. None: the backward does
    #: not depend on the scale, which is then neither kept nor given to it.
    second: Callable[[Tensor, Tensor], Tensor] | None = None

    #: The kernels without the dispatcher, of plain tensors on the CPU (csrc/python):
    #: f(x, scale, key), its backward(grad, scale, key), and f(x, scale, generator) with a key
    #: that is drawn. They give the result, or (result, key) for autograd to record, or None
    #: for a call that is not plain: that is the op's.
    plain: Callable[..., Any] = field(default=not_plain, init=False)
    plain_backward: Callable[..., Any] = field(default=not_plain, init=False)
    plain_draw: Callable[..., Any] = field(default=not_plain, init=False)

    def __post_init__(self) -> None:
        if (module := _extensions.module) is None:
            return
        ops, forms = module.kernels()["ops"], module.kernels()["forms"]
        form = forms[self.name] if self.name else 0
        self.plain = partial(module.launch, ops[self.forward], form)
        self.plain_backward = partial(module.launch, ops[self.backward], form)
        if self.name:
            self.plain_draw = partial(module.draw, form)


#: z = mu + sigma eps, by what the scale is given as.
SAMPLE = {
    form.name: form
    for form in (
        # sigma = exp(log_var / 2), and its derivative is itself, halved, again and again.
        Form(
            "sample_from_key", "sample_backward", "log_var",
            line=lambda mu, log_var: mu + torch.exp(0.5 * log_var) * torch.randn_like(mu),
            sigma=lambda log_var: reference.sigma(log_var),
            chain=lambda grad_sigma, log_var: grad_sigma * reference.sigma(log_var, 0.5),
            second=lambda first, _: first * 0.5,
        ),
        Form(
            "sample_from_key", "sample_backward", "std",
            line=lambda mu, std: mu + std * torch.randn_like(mu),
            sigma=lambda std: std,
            chain=lambda grad_sigma, _: grad_sigma,
        ),
    )
}  # fmt: skip

#: (mu^2 + e^log_var - 1 - log_var) / 2, whose backward by log_var is g (e^log_var - 1) / 2:
#: the derivative of that is itself and g / 2 more.
KL_DIVERGENCE = Form(
    "kl_divergence", "kl_divergence_backward", "",
    line=lambda mu, log_var: 0.5 * (mu.square() + torch.exp(log_var) - 1 - log_var),
    by_x=lambda grad, mu: grad * mu,
    second=lambda first, g: first + 0.5 * g,
)  # fmt: skip

FORMS = (*SAMPLE.values(), KL_DIVERGENCE)
