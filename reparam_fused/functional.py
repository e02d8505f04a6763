"""The public functions on tensors: what they promise. _call.py is how they keep it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from . import _call, _validate
from ._validate import Clamp


@overload
def fused_reparameterize(
    mu: Tensor,
    log_var: Tensor | float,
    *,
    clamp: Clamp | None = None,
    min_std: float = 0,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def fused_reparameterize(
    mu: Tensor,
    *,
    log_std: Tensor | float,
    clamp: Clamp | None = None,
    min_std: float = 0,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def fused_reparameterize(
    mu: Tensor,
    *,
    std: Tensor | float,
    clamp: Clamp | None = None,
    min_std: float = 0,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def fused_reparameterize(
    mu: Tensor,
    *,
    rho: Tensor | float,
    clamp: Clamp | None = None,
    min_std: float = 0,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor: ...
def fused_reparameterize(
    mu: Tensor,
    log_var: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    clamp: Clamp | None = None,
    min_std: float = 0,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor:
    r"""Draw ``z = mu + sigma * eps`` with ``eps ~ N(0, 1)``, in one pass.

    A drop-in for ``mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)`` (Kingma and
    Welling, Auto-Encoding Variational Bayes, 2013), with gradients of every order. The
    scale is given in exactly one form:

    - ``log_var``: ``sigma = exp(log_var / 2)``
    - ``log_std``: ``sigma = exp(log_std)``
    - ``std``: sigma itself, used as it is, negative values too
    - ``rho``: ``sigma = softplus(rho) = ln(1 + exp(rho))``, exact over its whole range
      (Blundell et al., Weight Uncertainty in Neural Networks, 2015)

    The gradient of ``mu`` is that of ``z`` itself; that of the scale is
    ``grad_z * eps * dsigma/dscale``, for which the backward draws eps again: it keeps the
    scale and a 16-byte key (of a std the key alone).

    With a key, the result is a pure function of the arguments, with the same bits on
    every backend in float32, float16 and bfloat16 (float64: within a few ULP). Without
    one, a key is drawn from the generator, so that ``torch.manual_seed``,
    ``fork_rng``, checkpointing and ``torch.Generator`` work as with ``torch.randn``.

    ``DTensor`` arguments give a ``DTensor``, with the noise and the gradients of the whole
    tensor on any mesh; without a key, the first rank of the mesh draws one for all.

    NaN and infinity are data: they follow IEEE 754 and stay in their own element.

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor or float, optional): log of the variance, ``2 * ln(sigma)``;
            broadcasts with ``mu``. A number counts as a tensor of the dtype of ``mu``; a tensor
            without dimensions may be on the CPU beside a ``mu`` elsewhere. The same holds for
            every form of the scale.
        log_std (Tensor or float, optional): log of the standard deviation.
        std (Tensor or float, optional): the standard deviation.
        rho (Tensor or float, optional): what softplus makes a standard deviation of.
        clamp ((float or None, float or None), optional): low and high end of a clamp of the scale
            as it was given, before sigma is made of it, as ``torch.clamp``: beyond an end its
            gradient is 0, and NaN stays NaN. At an end it is 1, as torch's was before 2.14; since
            then that is 0. Default: no clamp.
        min_std (float): what is added to sigma; at least 0. Default: 0.
        sample_shape (sequence of ints): so many samples of each element, as in
            ``torch.distributions``: the result has this shape before that of one sample, and the
            noise of a tensor of that whole shape. The backward sums over the samples in
            registers, from the first on: neither it nor the forward holds copies.
            Default: ``()``, one sample.
        key (Tensor, optional): uint64 key from :func:`reparam_fused.key`, or the same bits as
            int64, of shape ``(2,)``, or ``(*batch, 2)`` to give each slice of the leading
            dimensions of the result its own stream. Sizes of 1 in place of ``sample_shape``
            give the samples of a slice one stream, in which they are numbered one after the
            other; its own sizes tell the samples apart. Default: drawn from the generator.
        generator (torch.Generator, optional): where the key is drawn when none is given.
            Default: the default generator of the device. ``torch.utils.checkpoint`` restores the
            default generators alone: what is drawn from another one, or with
            ``preserve_rng_state=False``, is drawn anew when it computes again, and the gradient is
            that of other noise, as it is of ``torch.randn``. Give a key there.
        global_shape (sequence of ints, optional): the shape of the larger tensor of which
            ``z`` is a block: each element has the noise of its place there. Needs a key;
            dimensions that a batched key tells apart do not count (of size 1 at the end of
            its batch, they do). Default: that of ``z``.
        global_offset (sequence of ints, optional): where in it the block begins.

    Returns:
        Tensor: z, of the broadcast shape after ``sample_shape``, with ``torch.result_type(mu,
            scale)`` and the memory format that ``mu + scale`` has. Half types are computed in
            float32 and rounded once. Under ``torch.autocast`` the dtype is that of the line it
            replaces.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype, or not what it is
            said to be above.
        RuntimeError: shapes that do not broadcast, different devices, a block that is
            not within global_shape, or a key that tells some dimensions of sample_shape apart and
            not others.
        ValueError: no scale or more than one; a clamp whose low end is above the high one; a
            negative min_std; both of key and generator; one of global_shape and global_offset
            alone, or without a key.
        NotImplementedError: a key or a generator under ``torch.onnx.export`` or
            ``torch.jit.trace``, which get the eager line; forward-mode differentiation within
            ``torch.compile``.

    Examples:
        >>> import torch, reparam_fused
        >>> mu, log_var = torch.zeros(4), torch.zeros(4)
        >>> k = reparam_fused.key(42)
        >>> reparam_fused.fused_reparameterize(mu, log_var, key=k)
        tensor([-0.9702,  0.1940, -1.2356,  1.9239])
        >>> reparam_fused.fused_reparameterize(mu, rho=mu, clamp=(-5, 5), min_std=0.1, key=k)
        tensor([-0.7695,  0.1539, -0.9800,  1.5260])
        >>> reparam_fused.fused_reparameterize(mu[:2], log_var[:2], sample_shape=(2,), key=k)
        tensor([[-0.9702,  0.1940],
                [-1.2356,  1.9239]])
        >>> reparam_fused.fused_reparameterize(
        ...     mu[2:], std=torch.ones(2), key=k, global_shape=(4,), global_offset=(2,)
        ... )
        tensor([-1.2356,  1.9239])
    """
    return _call.reparameterize(
        fused_reparameterize,
        mu,
        log_var,
        log_std,
        std,
        rho,
        clamp,
        min_std,
        sample_shape,
        key,
        generator,
        global_shape,
        global_offset,
    )


@overload
def fused_kl_divergence(
    mu: Tensor,
    log_var: Tensor | float,
    *,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None = (),
    prior: torch.distributions.Normal | None = None,
) -> Tensor: ...
@overload
def fused_kl_divergence(
    mu: Tensor,
    *,
    log_std: Tensor | float,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None = (),
    prior: torch.distributions.Normal | None = None,
) -> Tensor: ...
@overload
def fused_kl_divergence(
    mu: Tensor,
    *,
    std: Tensor | float,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None = (),
    prior: torch.distributions.Normal | None = None,
) -> Tensor: ...
@overload
def fused_kl_divergence(
    mu: Tensor,
    *,
    rho: Tensor | float,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None = (),
    prior: torch.distributions.Normal | None = None,
) -> Tensor: ...
def fused_kl_divergence(
    mu: Tensor,
    log_var: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None = (),
    prior: torch.distributions.Normal | None = None,
) -> Tensor:
    r"""The Kullback-Leibler divergence of ``N(mu, sigma)`` from ``N(0, 1)``, or from a prior
    ``N(m, s)``, in one pass: of each element, or summed over dimensions.

        KL = 0.5 * ((mu - m)**2 / s**2 + sigma**2 / s**2 - 1 - ln(sigma**2 / s**2))

    The regulariser of a VAE (Kingma and Welling, Auto-Encoding Variational Bayes, 2013,
    appendix B), as ``torch.distributions.kl_divergence(Normal(mu, sigma), Normal(0, 1))``, with
    gradients of every order. The scale is given as to :func:`fused_reparameterize`.

    Near sigma = 1 the terms of the formula cancel, and what is left of them in float32 is mostly
    rounding; here the result keeps its relative accuracy down to the smallest divergence, as
    does the gradient (of a rho and with a min_std, relative to the sigma that they give). Same
    bits on every backend in float32, float16 and bfloat16 (float64: within a few ULP).

    NaN stays NaN in its own element; any infinity gives infinity, as does a sigma of 0. Where one
    of the two scales is a logarithm and the other is none, the gradient of a logarithm whose
    sigma is below the normal numbers of its dtype (in float32 a log_var below -174) may be
    infinite or NaN, as that of the formula in torch's own operations is.

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor or float, optional): log of the variance; broadcasts with ``mu``.
        log_std (Tensor or float, optional): log of the standard deviation.
        std (Tensor or float, optional): the standard deviation, of which the sign does not count.
        rho (Tensor or float, optional): what softplus makes a standard deviation of.
        clamp ((float or None, float or None), optional): low and high end of a clamp of the scale
            as it was given. Default: no clamp.
        min_std (float): what is added to sigma; at least 0. Default: 0.
        dim (int, sequence of ints or None, optional): the dimensions to sum over, as in
            ``torch.sum``; None: all. Default: ``()``, none.
        prior (torch.distributions.Normal, optional): the distribution from which the divergence
            is taken, with parameters that broadcast to the shape of ``mu`` and the scale;
            gradients reach them too. A :class:`reparam_fused.Normal` is taken in the form of its
            scale: near equality of the two the divergence keeps its digits, where both forms are
            ``log_var`` or ``log_std``, of these; else of the sigmas. Default: N(0, 1).

    Returns:
        Tensor: at least 0, of the broadcast shape without the dimensions ``dim``. A sum is
            float32, for float64 arguments float64: the same bits for any number of threads, any
            batch and any backend. The divergence of each element has ``torch.result_type(mu,
            scale)`` and, from N(0, 1), the memory format of ``mu + scale``; half types are
            computed in float32 and rounded once. Under ``torch.autocast`` the dtype is that of
            the formula in torch's own operations. ``DTensor`` arguments give a ``DTensor``.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype, or not what it is
            said to be above.
        RuntimeError: shapes that do not broadcast, different devices, or a dim named twice.
        IndexError: a dim that the broadcast shape does not have.
        ValueError: no scale or more than one; a clamp whose low end is above the high one; a
            negative min_std.

    Examples:
        >>> import torch, reparam_fused
        >>> mu, log_var = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1e-3])
        >>> reparam_fused.fused_kl_divergence(mu, log_var)
        tensor([0.0000e+00, 5.0000e-01, 2.5008e-07])
        >>> reparam_fused.fused_kl_divergence(mu, log_std=0.5 * log_var)
        tensor([0.0000e+00, 5.0000e-01, 2.5008e-07])
        >>> fused_kl = reparam_fused.fused_kl_divergence
        >>> fused_kl(mu, log_var, dim=-1, prior=torch.distributions.Normal(1.0, 2.0))
        tensor(1.2041)
    """
    return _call.kl_divergence(
        fused_kl_divergence, mu, log_var, log_std, std, rho, clamp, min_std, dim, prior
    )


def fused_reparameterize_kl(
    mu: Tensor,
    log_var: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None,
    prior: torch.distributions.Normal | None = None,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The sample of :func:`fused_reparameterize` and the divergence of its distribution from
    ``N(0, 1)``, or from a prior, summed over dimensions: in one pass, and one backward pass.

        z = mu + sigma * eps
        kl = sum over dim of 0.5 * (mu**2 + sigma**2 - 1 - ln(sigma**2))

    The head of a VAE (Kingma and Welling, Auto-Encoding Variational Bayes, 2013): the lines
    ``z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)`` and ``kl = 0.5 * (mu**2 +
    log_var.exp() - 1 - log_var).sum(dim)``. The samples are those of
    :func:`fused_reparameterize`, the divergence is that of :func:`fused_kl_divergence`, and the
    gradients are those of both.

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor or float, optional): log of the variance; broadcasts with ``mu``.
            Exactly one form of the scale is given, as to :func:`fused_reparameterize`.
        log_std (Tensor or float, optional): log of the standard deviation.
        std (Tensor or float, optional): the standard deviation.
        rho (Tensor or float, optional): what softplus makes a standard deviation of.
        clamp ((float or None, float or None), optional): low and high end of a clamp of the scale
            as it was given. Default: no clamp.
        min_std (float): what is added to sigma; at least 0. Default: 0.
        dim (int, sequence of ints or None): the dimensions to sum over, of one sample, as in
            ``torch.sum``; None: all. It has no default.
        prior (torch.distributions.Normal, optional): as :func:`fused_kl_divergence` takes it.
            Default: N(0, 1).
        sample_shape (sequence of ints): so many samples of each element. The divergence does not
            depend on them, and has no such dimensions. Default: ``()``, one sample.
        key (Tensor, optional): as :func:`fused_reparameterize` takes it. Default: drawn from the
            generator.
        generator (torch.Generator, optional): where the key is drawn when none is given.
            Default: the default generator of the device.
        global_shape (sequence of ints, optional): the shape of the larger tensor of which ``z``
            is a block. Default: that of ``z``.
        global_offset (sequence of ints, optional): where in it the block begins.

    Returns:
        (Tensor, Tensor): z, of ``torch.result_type(mu, scale)``, in row-major order; and the
            divergence, of the broadcast shape without the dimensions ``dim``: float32, for float64
            arguments float64. It has the same bits for any number of threads, any batch and any
            backend, and so have z and, in float32 and the half types, the gradients.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype, or not what it is
            said to be above, or a prior that is not normal.
        RuntimeError: shapes that do not broadcast, different devices, a dim named twice, or a
            block that is not within global_shape.
        IndexError: a dim that one sample does not have.
        ValueError: no scale or more than one; a clamp whose low end is above the high one; a
            negative min_std; both of key and generator; one of global_shape and global_offset
            alone, or without a key.
        NotImplementedError: where :func:`fused_reparameterize` raises it.

    Examples:
        >>> import torch, reparam_fused
        >>> mu, log_var = torch.zeros(2, 3), torch.full((2, 3), -1.0)
        >>> k = reparam_fused.key(42)
        >>> z, kl = reparam_fused.fused_reparameterize_kl(mu, log_var, dim=-1, key=k)
        >>> z.shape, kl
        (torch.Size([2, 3]), tensor([0.5518, 0.5518]))
    """
    # The divergence of samples is that of one, which the kernel does not have beside them.
    one = isinstance(sample_shape, tuple) and len(sample_shape) == 0
    if global_shape is None and global_offset is None and one:
        result = _call.plain_head(
            "kl_divergence",
            mu,
            log_var,
            log_std,
            std,
            rho,
            clamp,
            min_std,
            dim,
            prior,
            (),
            key,
            generator,
        )
        if result is not None:
            return result
    options = {
        "clamp": clamp,
        "min_std": min_std,
        "dim": dim,
        "prior": prior,
        "sample_shape": sample_shape,
        "key": key,
        "generator": generator,
        "global_shape": global_shape,
        "global_offset": global_offset,
    }
    return _call.head(
        fused_reparameterize_kl, "kl_divergence", mu, log_var, log_std, std, rho, options
    )


def fused_reparameterize_log_prob(
    mu: Tensor,
    log_var: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    clamp: Clamp | None = None,
    min_std: float = 0,
    dim: int | Sequence[int] | None,
    tanh: bool = False,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The sample of :func:`fused_reparameterize` and its log-density, summed over dimensions: in
    one pass, and one backward pass.

        z = mu + sigma * eps
        log_q = sum over dim of -0.5 * eps**2 - ln(sigma) - 0.5 * ln(2 * pi)

    As ``z = Normal(mu, sigma).rsample()`` and ``Normal(mu, sigma).log_prob(z).sum(dim)``, with the
    gradient that autograd gives of both.

    With ``tanh`` it is the head of a squashed Gaussian policy (Haarnoja et al., Soft Actor-Critic,
    2018, appendix C): the action ``a = tanh(z)`` and its log-density, from which
    ``ln(1 - a**2) = 2 * (ln(2) - z - softplus(-2 * z))`` is taken off. Both, and their gradients,
    stay finite and right where a rounds to 1 or -1.

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor or float, optional): log of the variance; broadcasts with ``mu``.
            Exactly one form of the scale is given, as to :func:`fused_reparameterize`.
        log_std (Tensor or float, optional): log of the standard deviation.
        std (Tensor or float, optional): the standard deviation.
        rho (Tensor or float, optional): what softplus makes a standard deviation of.
        clamp ((float or None, float or None), optional): low and high end of a clamp of the scale
            as it was given. Default: no clamp.
        min_std (float): what is added to sigma; at least 0. Default: 0.
        dim (int, sequence of ints or None): the dimensions to sum over, of one sample, as in
            ``torch.sum``; None: all. It has no default.
        tanh (bool): whether tanh is applied to the sample. Default: False.
        sample_shape (sequence of ints): so many samples of each element, each with its own
            log-density. Default: ``()``, one sample.
        key (Tensor, optional): as :func:`fused_reparameterize` takes it. Default: drawn from the
            generator.
        generator (torch.Generator, optional): where the key is drawn when none is given.
            Default: the default generator of the device.
        global_shape (sequence of ints, optional): the shape of the larger tensor of which ``z``
            is a block. Default: that of ``z``.
        global_offset (sequence of ints, optional): where in it the block begins.

    Returns:
        (Tensor, Tensor): z or a, of ``torch.result_type(mu, scale)``, in row-major order; and the
            log-density, of ``sample_shape`` and the broadcast shape without the dimensions
            ``dim``: float32, for float64 arguments float64. It has the same bits for any number of
            threads, any batch and any backend, and so have z and, in float32 and the half types,
            the gradients; those of several samples are added up by torch, within rounding.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype, or not what it is
            said to be above.
        RuntimeError: shapes that do not broadcast, different devices, a dim named twice, or a
            block that is not within global_shape.
        IndexError: a dim that one sample does not have.
        ValueError: no scale or more than one; a clamp whose low end is above the high one; a
            negative min_std; both of key and generator; one of global_shape and global_offset
            alone, or without a key.
        NotImplementedError: where :func:`fused_reparameterize` raises it.

    Examples:
        >>> import torch, reparam_fused
        >>> mu, log_std = torch.zeros(2, 3), torch.full((2, 3), 3.0)
        >>> k = reparam_fused.key(42)
        >>> a, log_prob = reparam_fused.fused_reparameterize_log_prob(
        ...     mu, log_std=log_std, dim=-1, tanh=True, key=k
        ... )
        >>> a.shape, log_prob
        (torch.Size([2, 3]), tensor([79.2360, 68.1470]))
    """
    if tanh is not True and tanh is not False:
        _validate.check_bool("fused_reparameterize_log_prob", "tanh", tanh)
    term = "tanh_log_prob" if tanh else "log_prob"
    if global_shape is None and global_offset is None:
        result = _call.plain_head(
            term,
            mu,
            log_var,
            log_std,
            std,
            rho,
            clamp,
            min_std,
            dim,
            None,
            sample_shape,
            key,
            generator,
        )
        if result is not None:
            return result
    options = {
        "clamp": clamp,
        "min_std": min_std,
        "dim": dim,
        "tanh": tanh,
        "sample_shape": sample_shape,
        "key": key,
        "generator": generator,
        "global_shape": global_shape,
        "global_offset": global_offset,
    }
    return _call.head(fused_reparameterize_log_prob, term, mu, log_var, log_std, std, rho, options)
