"""The functions as modules.

Examples:
    >>> from reparam_fused import nn
    >>> nn.Reparameterize("rho", min_std=1e-3)
    Reparameterize(form='rho', min_std=0.001)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _call, _validate
from ._forms import FORMS
from .functional import fused_reparameterize

__all__ = ["Reparameterize"]


class Reparameterize(torch.nn.Module):
    """The sample ``z = mu + sigma * eps`` in training, and its mean in evaluation.

    :func:`fused_reparameterize` as a layer, which ``train()`` and ``eval()`` switch as they do
    dropout. It has no parameters and no state. ``mu`` and ``scale`` broadcast to ``(*)``; the
    output is ``(*sample_shape, *)``, of the dtype that the sample has,
    ``torch.result_type(mu, scale)``, in both modes.

    Args:
        form (str): what the scale is given as: ``"log_var"``, ``"log_std"``, ``"std"`` or
            ``"rho"``. Default: ``"log_var"``.
        clamp (pair of floats, optional): between which the scale is clamped; None for an end
            that is open. Default: None.
        min_std (float): added to sigma. Default: 0.
        sample_shape (sequence of ints): of the samples of each element, dimensions before those
            of the mean. Default: ``()``, one sample.

    Raises:
        ValueError: an unknown form, or numbers that bound nothing.
        TypeError: a clamp, a min_std or a sample_shape that are not numbers.

    Examples:
        >>> import torch, reparam_fused
        >>> layer = reparam_fused.nn.Reparameterize(clamp=(-30.0, 20.0))
        >>> layer
        Reparameterize(form='log_var', clamp=(-30.0, 20.0))
        >>> mu, log_var = torch.zeros(4), torch.zeros(4)
        >>> layer(mu, log_var, key=reparam_fused.key(42))
        tensor([-0.9702,  0.1940, -1.2356,  1.9239])
        >>> layer.eval()(mu, log_var)
        tensor([0., 0., 0., 0.])
    """

    def __init__(
        self,
        form: str = "log_var",
        *,
        clamp: _validate.Clamp | None = None,
        min_std: float = 0.0,
        sample_shape: Sequence[int] = (),
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(form, str) or form not in FORMS:
            raise ValueError(f"{name}(): form must be one of {', '.join(FORMS)}, got {form!r}")
        _validate.bounds_of(name, clamp, min_std)
        self.form = form
        self.clamp = None if clamp is None else (clamp[0], clamp[1])
        self.min_std = min_std
        self.sample_shape = tuple(_validate.check_sizes(name, "sample_shape", sample_shape))

    def forward(
        self,
        mu: Tensor,
        scale: Tensor | float,
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """z; in evaluation mu, of the shape and the dtype of z: itself where it has them, else a
        view or a copy.

        Args:
            mu (Tensor): the mean.
            scale (Tensor or float): the scale, in the form of this layer.
            key (Tensor, optional): as :func:`fused_reparameterize` takes it.
            generator (torch.Generator, optional): as :func:`fused_reparameterize` takes it.

        Returns:
            Tensor: of shape ``(*sample_shape, *)``.

        It raises what :func:`fused_reparameterize` raises.
        """
        if not self.training:
            return _call.mean(mu, self.form, scale, self.sample_shape)
        given: dict[str, Any] = {self.form: scale}
        return fused_reparameterize(
            mu,
            **given,
            clamp=self.clamp,
            min_std=self.min_std,
            sample_shape=self.sample_shape,
            key=key,
            generator=generator,
        )

    def extra_repr(self) -> str:
        defaults = {"clamp": None, "min_std": 0.0, "sample_shape": ()}
        given = {name: getattr(self, name) for name in defaults}
        shown = {"form": self.form}
        shown.update((name, value) for name, value in given.items() if value != defaults[name])
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
