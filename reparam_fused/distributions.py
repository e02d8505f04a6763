"""A torch.distributions.Normal whose scale may be given in any form that the kernels know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all
from torch.types import _Number, _size

from . import _validate
from ._forms import SAMPLE, Call, over_exp
from .functional import (
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)

_CONSTRAINTS: dict[str, dict[str, constraints.Constraint]] = {
    "scale": {"loc": constraints.real, "scale": constraints.positive},
    "log_var": {"loc": constraints.real, "log_var": constraints.real},
    "log_std": {"loc": constraints.real, "log_std": constraints.real},
    "rho": {"loc": constraints.real, "rho": constraints.real},
}


class Normal(torch.distributions.Normal):
    r"""A normal distribution that remembers in which form its scale was given, and draws from it
    in one kernel.

    A drop-in for :class:`torch.distributions.Normal`, whose arguments it takes; or with one of
    ``log_var``, ``log_std`` and ``rho`` in place of ``scale``. Then ``sigma`` is
    ``exp(log_var / 2)``, ``exp(log_std)`` or ``ln(1 + exp(rho))``, of the clamped scale, plus
    ``min_std``. No exponential is taken before it is asked for:
    :meth:`rsample` takes it in the kernel, :meth:`log_prob`, :meth:`entropy` and the divergence
    have the logarithm of sigma from the form, exact where sigma itself would be infinite or 0.

    Args:
        loc (Tensor or float): the mean. It broadcasts with the scale as in torch.
        scale (Tensor or float, optional): the standard deviation, positive.
        validate_args (bool, optional): as in torch.
        log_var (Tensor or float, optional): the log of the variance (Kingma and Welling,
            Auto-Encoding Variational Bayes, 2013).
        log_std (Tensor or float, optional): the log of the standard deviation.
        rho (Tensor or float, optional): of which the softplus is the standard deviation
            (Blundell et al., Weight Uncertainty in Neural Networks, 2015).
        clamp (pair of floats, optional): between which the given scale is clamped; None for an
            end that is open. Default: None.
        min_std (float): added to the standard deviation. Default: 0.

    Raises:
        ValueError: not one of the four scales; numbers that bound nothing; arguments that are
            no tensors or numbers, or, with validate_args, of no normal distribution.
        TypeError: a clamp or a min_std that are not numbers.

    Examples:
        >>> import torch, reparam_fused
        >>> posterior = reparam_fused.Normal(torch.zeros(3), log_var=torch.zeros(3))
        >>> posterior.rsample((2,), key=reparam_fused.key(42)).shape
        torch.Size([2, 3])
        >>> reparam_fused.Normal(0.0, log_var=-300.0).entropy()
        tensor(-148.5811)
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> torch.distributions.kl_divergence(posterior, prior)
        tensor([0., 0., 0.])
    """

    #: The name of the argument that gave the scale, and of the attribute that holds it
    form: str

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float | None = None,
        validate_args: bool | None = None,
        *,
        log_var: Tensor | float | None = None,
        log_std: Tensor | float | None = None,
        rho: Tensor | float | None = None,
        clamp: _validate.Clamp | None = None,
        min_std: float = 0.0,
    ) -> None:
        self.form, given = _validate.one_of(
            "Normal", {"scale": scale, "log_var": log_var, "log_std": log_std, "rho": rho}
        )
        self._bounds = _validate.bounds_of("Normal", clamp, min_std)
        self.arg_constraints = _CONSTRAINTS[self.form]
        self.loc, self.__dict__[self.form] = broadcast_all(loc, given)
        numbers = isinstance(loc, _Number) and isinstance(given, _Number)
        # Past torch's Normal, which would set the scale.
        super(torch.distributions.Normal, self).__init__(
            torch.Size() if numbers else self.loc.size(), validate_args=validate_args
        )

    @property
    def _given(self) -> Tensor:
        """The scale as it was given."""
        return self.__dict__[self.form]  # type: ignore[no-any-return]

    @property
    def _call(self) -> Call:
        """The row of the table of forms, and the bounds."""
        return SAMPLE["std" if self.form == "scale" else self.form]._replace(bounds=self._bounds)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The standard deviation, made of the form each time that it is asked for."""
        return self._call.std(self._given)

    def _parameters_of_kernels(
        self,
    ) -> tuple[Tensor, Tensor, str, tuple[float, float, float] | None]:
        """loc, the scale as it was given, its form and its bounds."""
        return self.loc, self._given, self._call.form.name, self._bounds

    @property
    def _options(self) -> dict[str, Any]:
        """The scale and its bounds, as the functions of this package take them."""
        options: dict[str, Any] = {self._call.form.name: self._given}
        if self._bounds is not None:
            options.update(clamp=self._bounds[:2], min_std=self._bounds[2])
        return options

    @property
    def _log_scale(self) -> Tensor | None:
        """ln sigma where the form has it without a logarithm."""
        log_var = self._call.log_var(self._given)
        return None if log_var is None else 0.5 * log_var

    def expand(self, batch_shape: _size, _instance: Any = None) -> Normal:
        """The distribution with this batch shape, of the same form; as in torch, a view."""
        new: Normal = self._get_checked_instance(Normal, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.form, new._bounds, new.arg_constraints = self.form, self._bounds, self.arg_constraints
        new.loc = self.loc.expand(batch_shape)
        new.__dict__[self.form] = self._given.expand(batch_shape)
        super(torch.distributions.Normal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: _size = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples ``loc + sigma * eps``, with the gradients of the parameters, by
        :func:`fused_reparameterize`.

        Args:
            sample_shape (sequence of ints): so many samples of each element. Default: ``()``.
            key (Tensor, optional): names the noise. Default: drawn from the generator.
            generator (torch.Generator, optional): where the key is drawn when none is given.
                Default: the default generator of the device.

        Returns:
            Tensor: of shape ``(*sample_shape, *batch_shape)`` and the dtype of the parameters.

        It raises what :func:`fused_reparameterize` raises.

        Examples:
            >>> import torch, reparam_fused
            >>> normal = reparam_fused.Normal(torch.zeros(2), log_std=torch.zeros(2))
            >>> normal.rsample(key=reparam_fused.key(42))
            tensor([-0.9702,  0.1940])
        """
        return fused_reparameterize(
            self.loc, sample_shape=sample_shape, key=key, generator=generator, **self._options
        )

    def sample(
        self,
        sample_shape: _size = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As :meth:`rsample`, with the same numbers, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, key=key, generator=generator)

    def rsample_and_log_prob(
        self,
        sample_shape: _size = (),
        *,
        dim: int | Sequence[int] | None = (),
        tanh: bool = False,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Samples and the log of their density in one pass, and one backward pass, by
        :func:`fused_reparameterize_log_prob`.

            z = loc + sigma * eps
            log_q = sum over dim of -0.5 * eps**2 - ln(sigma) - 0.5 * ln(2 * pi)

        Args:
            sample_shape (sequence of ints): as :meth:`rsample` takes it.
            dim (int, sequence of ints or None, optional): the dimensions of ``batch_shape`` to
                sum the log-density over, as :class:`torch.distributions.Independent` would;
                None: all. Default: ``()``, none.
            tanh (bool): whether both are those of the tanh of the sample. Default: False.
            key (Tensor, optional): as :meth:`rsample` takes it.
            generator (torch.Generator, optional): as :meth:`rsample` takes it.

        Returns:
            (Tensor, Tensor): the samples that :meth:`rsample` gives, or their tanh, of shape
                ``(*sample_shape, *batch_shape)``; and the log-density, of that shape without the
                dimensions ``dim``: float32, for float64 parameters float64.

        It raises what :func:`fused_reparameterize_log_prob` raises.

        Examples:
            >>> import torch, reparam_fused
            >>> policy = reparam_fused.Normal(torch.zeros(2, 3), log_std=torch.zeros(3))
            >>> action, log_prob = policy.rsample_and_log_prob(
            ...     dim=-1, tanh=True, key=reparam_fused.key(42)
            ... )
            >>> action.shape, log_prob.shape
            (torch.Size([2, 3]), torch.Size([2]))
        """
        return fused_reparameterize_log_prob(
            self.loc,
            dim=dim,
            tanh=tanh,
            sample_shape=sample_shape,
            key=key,
            generator=generator,
            **self._options,
        )

    def rsample_and_kl(
        self,
        prior: torch.distributions.Normal | None = None,
        sample_shape: _size = (),
        *,
        dim: int | Sequence[int] | None = (),
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Samples and the divergence of this distribution from a prior in one pass, and one
        backward pass, by :func:`fused_reparameterize_kl`.

            z = loc + sigma * eps
            kl = sum over dim of KL(N(loc, sigma) || prior)

        Args:
            prior (torch.distributions.Normal, optional): of parameters that broadcast to
                ``batch_shape``. Default: N(0, 1).
            sample_shape (sequence of ints): as :meth:`rsample` takes it.
            dim (int, sequence of ints or None, optional): the dimensions of ``batch_shape`` to
                sum the divergence over; None: all. Default: ``()``, none.
            key (Tensor, optional): as :meth:`rsample` takes it.
            generator (torch.Generator, optional): as :meth:`rsample` takes it.

        Returns:
            (Tensor, Tensor): the samples that :meth:`rsample` gives, of shape
                ``(*sample_shape, *batch_shape)``; and the divergence, which does not depend on
                them, of ``batch_shape`` without the dimensions ``dim``: float32, for float64
                parameters float64.

        It raises what :func:`fused_reparameterize_kl` raises.

        Examples:
            >>> import torch, reparam_fused
            >>> posterior = reparam_fused.Normal(torch.zeros(2, 3), log_var=torch.full((3,), -1.0))
            >>> prior = torch.distributions.Normal(0.0, 1.0)
            >>> z, kl = posterior.rsample_and_kl(prior, dim=-1, key=reparam_fused.key(42))
            >>> z.shape, kl
            (torch.Size([2, 3]), tensor([0.5518, 0.5518]))
        """
        return fused_reparameterize_kl(
            self.loc,
            dim=dim,
            prior=prior,
            sample_shape=sample_shape,
            key=key,
            generator=generator,
            **self._options,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """The log of the density at ``value``, element by element.

            -0.5 * ((value - loc) / sigma)**2 - ln(sigma) - 0.5 * ln(2 * pi)

        Args:
            value (Tensor): of a shape that broadcasts with ``batch_shape``.

        Returns:
            Tensor: of the broadcast shape; ``ln(sigma)`` is taken from the form, where it has one.

        Raises:
            ValueError: with validate_args, a value that is not a real number.

        Examples:
            >>> import torch, reparam_fused
            >>> normal = reparam_fused.Normal(torch.zeros(1), log_var=torch.full((1,), -300.0))
            >>> normal.log_prob(torch.zeros(1))  # of exp(-150) nothing is left in float32
            tensor([149.0811])
        """
        if self._validate_args:
            self._validate_sample(value)
        log_scale = self._log_scale
        if log_scale is None:
            scale = self.scale
            log_scale, distance = scale.log(), (value - self.loc) / scale
        else:
            distance = over_exp(value - self.loc, log_scale)
        return -0.5 * distance.square() - log_scale - 0.5 * math.log(2 * math.pi)

    def entropy(self) -> Tensor:
        """The entropy ``0.5 + 0.5 * ln(2 * pi) + ln(sigma)`` in nats, of shape ``batch_shape``."""
        log_scale = self._log_scale
        if log_scale is None:
            log_scale = self.scale.log()
        return 0.5 + 0.5 * math.log(2 * math.pi) + log_scale


def _is_prior_of(q: torch.distributions.Normal, p: torch.distributions.Normal) -> bool:
    """Whether the kernel takes q as the prior of p, with the shape and the dtype that p / q has."""
    if torch.broadcast_shapes(p.batch_shape, q.batch_shape) != p.batch_shape:
        return False
    # Where all are without dimensions that of the prior would count as well.
    return p.loc.dim() > 0 or len({t.dtype for d in (p, q) for t in (d.loc, d.scale)}) == 1


def _kl(p: torch.distributions.Normal, q: torch.distributions.Normal) -> Tensor:
    """That of N((mu_p - mu_q) / sigma_q, sigma_p / sigma_q) from N(0, 1), which is the same.

    And keeps its accuracy where p and q are nearly one. Of two sigmas, and of two logarithms, the
    kernel does it in one pass. Where one of the two has a logarithm and the other none it is done
    here: the kernel would take sigma of that, and with it lose the digits and the range that the
    logarithm has.
    """
    of_p, of_q = (d._log_scale if isinstance(d, Normal) else None for d in (p, q))
    if (of_p is None) == (of_q is None) and _is_prior_of(q, p):
        options = p._options if isinstance(p, Normal) else {"std": p.scale}
        return fused_kl_divergence(p.loc, prior=q, **options)
    difference = p.loc - q.loc
    if of_p is None and of_q is None:
        return fused_kl_divergence(difference / q.scale, std=p.scale / q.scale)
    log_p = p.scale.log() if of_p is None else of_p
    if of_q is None:
        return fused_kl_divergence(difference / q.scale, log_std=log_p - q.scale.log())
    return fused_kl_divergence(over_exp(difference, of_q), log_std=log_p - of_q)


register_kl(Normal, Normal)(_kl)
register_kl(Normal, torch.distributions.Normal)(_kl)
register_kl(torch.distributions.Normal, Normal)(_kl)
