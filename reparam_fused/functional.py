"""The drop-in call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from . import _draw, _ops, _validate
from .autograd import FusedDraw, FusedSample, TracedSample


def no_plain_call(*_: object) -> None:
    return None


# Takes plain eager calls of tensors that have a compiled kernel, and gives None for any other.
plain_call: Callable[..., Tensor | None] = getattr(_ops.extension, "reparameterize", no_plain_call)


def _levels(transform: TransformType) -> int:
    """How many levels of a torch.func transform this call is under."""
    return sum(level.key() == transform for level in get_interpreter_stack() or ())


def is_dtensor(t: Tensor) -> bool:
    """Without the import of their module, which is the first to make one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def check_forward_mode(function: str) -> None:
    """Refuse the two cases in which torch would give a tangent of zero, and not say so."""
    compiling = torch.compiler.is_compiling()
    if compiling and forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{function}(): forward-mode differentiation within torch.compile is not "
            "supported; it works outside of it"
        )
    if not compiling and _levels(TransformType.Jvp) > 1:
        raise NotImplementedError(
            f"{function}(): forward-mode differentiation of a forward-mode derivative is "
            "not supported; make one of the two reverse-mode, as torch.func.hessian does"
        )


def autocast_exp(mu: Tensor, log_var: Tensor) -> Tensor:
    """log_var as autocast has it for exp, which it computes in float32 on all but CPUs."""
    device = mu.device.type
    if device in ("cpu", "meta") or not torch.is_autocast_enabled(device):
        return log_var
    return log_var if log_var.dtype == torch.float64 else log_var.float()


def fused_reparameterize(
    mu: Tensor,
    log_var: Tensor | None = None,
    *,
    std: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor:
    r"""Draw :math:`z = \mu + \exp(\tfrac{1}{2}\,\mathrm{log\_var}) \cdot \epsilon`,
    or :math:`z = \mu + \mathrm{std} \cdot \epsilon`, with :math:`\epsilon \sim N(0, 1)`, in
    one pass.

    A drop-in for ``mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)`` (Kingma and
    Welling, Auto-Encoding Variational Bayes, 2013), with gradients of every order. The
    backward draws eps again: it keeps ``log_var`` and a 16-byte key (of a std the key
    alone), and the gradient of ``mu`` is that of ``z`` itself.

    With a key, the result is a pure function of the arguments, with the same bits on
    every backend in float32, float16 and bfloat16 (float64: within a few ULP). Without
    one, a key is drawn from the generator, so that ``torch.manual_seed``,
    ``fork_rng``, checkpointing and ``torch.Generator`` work as with ``torch.randn``.

    ``DTensor`` arguments give a ``DTensor``, with the noise and the gradients of the whole
    tensor on any mesh; without a key, the first rank of the mesh draws one for all.

    Args:
        mu (Tensor): mean, of any shape; float32, float64, float16 or bfloat16.
        log_var (Tensor, optional): log of the variance, :math:`2 \ln \sigma`; broadcasts
            with ``mu``.
        std (Tensor, optional): the standard deviation :math:`\sigma` itself, in place of
            ``log_var``. It is used as it is, negative values too.
        key (Tensor, optional): uint64 key from :func:`reparam_fused.key`, of shape ``(2,)``,
            or ``(*batch, 2)`` to give each slice of the leading dimensions its own stream.
        generator (torch.Generator, optional): where the key is drawn when none is given.
            Default: the default generator of the device.
        global_shape (sequence of ints, optional): the shape of the larger tensor of which
            ``z`` is a block: each element has the noise of its place there. Needs a key;
            dimensions that a batched key tells apart do not count (of size 1 at the end of
            its batch, they do).
        global_offset (sequence of ints, optional): where in it the block begins.

    Returns:
        Tensor: z, of the broadcast shape, with ``torch.result_type(mu, log_var)`` and the
        memory format that ``mu + log_var`` has. Half types are computed in float32 and
        rounded once. Under ``torch.autocast`` the dtype is that of the line it replaces.

    Raises:
        TypeError: an argument is not a dense tensor of a supported dtype.
        RuntimeError: shapes that do not broadcast, different devices, or a block that is
            not within global_shape.
        ValueError: both of log_var and std or none; both of key and generator; one of
            global_shape and global_offset alone, or without a key.

    NaN and infinity are data: they follow IEEE 754 and stay in their own element.

    Example::

        >>> import torch, reparam_fused
        >>> mu, log_var = torch.zeros(4), torch.zeros(4)
        >>> k = reparam_fused.key(42)
        >>> reparam_fused.fused_reparameterize(mu, log_var, key=k)
        tensor([-0.9702,  0.1940, -1.2356,  1.9239])
        >>> reparam_fused.fused_reparameterize(
        ...     mu[2:], std=torch.ones(2), key=k, global_shape=(4,), global_offset=(2,)
        ... )
        tensor([-1.2356,  1.9239])
    """
    if global_shape is None and global_offset is None and not torch.compiler.is_compiling():
        z = plain_call(mu, log_var, std, key, generator)
        if z is not None:
            return z
    tensors = [t for t in (mu, log_var, std) if t is not None]
    if has_torch_function(tensors):
        return handle_torch_function(
            fused_reparameterize,
            tensors,
            mu,
            log_var,
            std=std,
            key=key,
            generator=generator,
            global_shape=global_shape,
            global_offset=global_offset,
        )
    _validate.check_reparameterize(mu, log_var, std, key, generator, global_shape, global_offset)
    form, scale = ("log_var", log_var) if log_var is not None else ("std", std)
    assert scale is not None
    if is_dtensor(mu) or is_dtensor(scale):
        from . import _dtensor

        if global_shape is not None:
            raise ValueError(
                "fused_reparameterize(): global_shape is for plain tensors; a DTensor knows its own"
            )
        return _dtensor.reparameterize(fused_reparameterize, mu, form, scale, key, generator)
    check_forward_mode("fused_reparameterize")
    if form == "log_var":
        scale = autocast_exp(mu, scale)
    compiling = torch.compiler.is_compiling()
    if key is None and compiling and generator is None and not _are_transforms_active():
        key = _ops.traced_key(mu.device)
    elif key is None and (compiling or _levels(TransformType.Vmap) > 0):
        key = _draw.key_of_words(_draw.traced_words(mu.device, generator))
    if key is None:
        return FusedDraw.apply(mu, scale, generator, form)[0]  # type: ignore[no-any-return]
    if compiling and scale is mu:
        scale = scale.view_as(scale)  # dynamo refuses a Function one tensor twice
    function = TracedSample if compiling else FusedSample
    return function.apply(  # type: ignore[no-any-return]
        mu, scale, key, form, global_shape, global_offset
    )
