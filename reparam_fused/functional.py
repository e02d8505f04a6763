"""The drop-in call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from . import _ops, _validate, reference
from .autograd import FusedDraw, FusedSample, TracedSample

# Takes plain eager calls of tensors that have a compiled kernel, and gives None for any other.
_plain_call: Callable[..., Tensor | None] | None = getattr(_ops.extension, "reparameterize", None)


def _levels(transform: TransformType) -> int:
    """How many levels of a torch.func transform this call is under."""
    return sum(level.key() == transform for level in get_interpreter_stack() or ())


def fused_reparameterize(
    mu: Tensor,
    log_var: Tensor,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw :math:`z = \mu + \exp(\tfrac{1}{2}\,\mathrm{log\_var}) \cdot \epsilon`,
    :math:`\epsilon \sim N(0, 1)`, in one pass.

    A drop-in for ``mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)`` (Kingma and
    Welling, Auto-Encoding Variational Bayes, 2013), with gradients of every order. The
    backward draws eps again: it keeps ``log_var`` and a 16-byte key, and the gradient of
    ``mu`` is that of ``z`` itself.

    With a key, the result is a pure function of the arguments, with the same bits on
    every backend in float32, float16 and bfloat16 (float64: within a few ULP). Without
    one, a key is drawn from the generator, so that ``torch.manual_seed``,
    ``fork_rng``, checkpointing and ``torch.Generator`` work as with ``torch.randn``.

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor): log of the variance, :math:`2 \ln \sigma`; broadcasts with ``mu``.
        key (Tensor, optional): uint64 key from :func:`reparam_fused.key`, of shape ``(2,)``,
            or ``(*batch, 2)`` to give each slice of the leading dimensions its own stream.
        generator (torch.Generator, optional): where the key is drawn when none is given.
            Default: the default generator of the device.

    Returns:
        Tensor: z, of the broadcast shape, with ``torch.result_type(mu, log_var)`` and the
        memory format that ``mu + log_var`` has. Half types are computed in float32 and
        rounded once.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype.
        RuntimeError: shapes that do not broadcast, or different devices.
        ValueError: both a key and a generator.

    NaN and infinity are data: they follow IEEE 754 and stay in their own element.

    Example::

        >>> import torch, reparam_fused
        >>> mu, log_var = torch.zeros(3), torch.zeros(3)
        >>> reparam_fused.fused_reparameterize(mu, log_var, key=reparam_fused.key(42))
        tensor([-0.9702,  0.1940, -1.2356])
    """
    if _plain_call is not None and not torch.compiler.is_compiling():
        z = _plain_call(mu, log_var, key, generator)
        if z is not None:
            return z
    if has_torch_function((mu, log_var)):
        return handle_torch_function(
            fused_reparameterize, (mu, log_var), mu, log_var, key=key, generator=generator
        )
    _validate.check_reparameterize(mu, log_var, key, generator)
    compiling = torch.compiler.is_compiling()
    # In both cases torch would give a tangent of zero, and not say so.
    if compiling and forward_ad._current_level >= 0:
        raise NotImplementedError(
            "fused_reparameterize(): forward-mode differentiation within torch.compile is not "
            "supported; it works outside of it"
        )
    if not compiling and _levels(TransformType.Jvp) > 1:
        raise NotImplementedError(
            "fused_reparameterize(): forward-mode differentiation of a forward-mode derivative is "
            "not supported; make one of the two reverse-mode, as torch.func.hessian does"
        )
    if key is None and (compiling or _levels(TransformType.Vmap) > 0):
        key = reference.traced_key(mu.device, generator)
    if key is None:
        return FusedDraw.apply(mu, log_var, generator)[0]  # type: ignore[no-any-return]
    function = TracedSample if compiling else FusedSample
    return function.apply(mu, log_var, key)  # type: ignore[no-any-return]
