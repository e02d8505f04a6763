"""The way of every call of a public function: what is done before the op, once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import _draw, _ops, _validate
from ._autograd import Forward
from ._forms import KL_DIVERGENCE, SAMPLE, Form

_LOG_VAR, _STD = SAMPLE["log_var"], SAMPLE["std"]


def _levels(transform: TransformType) -> int:
    """How many levels of a torch.func transform this call is under."""
    return sum(level.key() == transform for level in get_interpreter_stack() or ())


def is_dtensor(t: object) -> bool:
    """Without the import of their module, which is the first to make one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def _check_forward_mode(function: str) -> None:
    """Refuse what torch would give a tangent of zero for, and not say so."""
    if is_compiling() and forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{function}(): forward-mode differentiation within torch.compile is not "
            "supported; it works outside of it"
        )


def _exported() -> bool:
    """Whether the call becomes part of a program that runs without this package."""
    if is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._get_tracing_state() is not None


# torch.compiler.assume_constant_result, without the import of dynamo: which takes it that
# nothing it traces goes to ONNX, where torch.onnx.export does trace by it.
_exported._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _as_tensor(scale: Tensor | float, mu: Tensor) -> Tensor:
    """A number as a tensor of mu's dtype, and a 0-dim one of the CPU beside mu's on its device."""
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=mu.dtype, device=mu.device)
    if scale.device != mu.device:
        # By a kernel that is given the number: a copy would wait for the device.
        return torch.ones((), dtype=scale.dtype, device=mu.device) * scale
    return scale


def _autocast_exp(mu: Tensor, log_var: Tensor) -> Tensor:
    """log_var as autocast has it for exp, which it computes in float32 on all but CPUs."""
    if mu.is_cpu or mu.is_meta or not torch.is_autocast_enabled(mu.device.type):
        return log_var
    return log_var if log_var.dtype == torch.float64 else log_var.float()


def plain(form: Form, mu: Any, scale: Any, key: Any = None, generator: Any = None) -> Tensor | None:
    """A plain eager call, by the shortest way; None for any other, errors included."""
    if key is None and form.name:
        result = form.plain_draw(mu, scale, generator)
    else:
        result = form.plain(mu, scale, key)
    if type(result) is tuple:
        result = Forward.apply(form, result, mu, scale, None)  # type: ignore[attr-defined]
    return result  # type: ignore[no-any-return]


def reparameterize(
    function: Callable[..., Tensor],
    mu: Tensor,
    log_var: Tensor | float | None,
    std: Tensor | float | None,
    key: Tensor | None,
    generator: torch.Generator | None,
    global_shape: Sequence[int] | None,
    global_offset: Sequence[int] | None,
) -> Tensor:
    """A call of fused_reparameterize, which is `function`."""
    form, scale = (_LOG_VAR, log_var) if std is None else (_STD, std)
    if (
        global_shape is None
        and global_offset is None
        and (std is None or log_var is None)
        and (key is None or generator is None)
        and not is_compiling()
    ):
        z = plain(form, mu, scale, key, generator)
        if z is not None:
            return z
    tensors = [t for t in (mu, scale, key) if t is not None]
    if has_torch_function(tensors):
        return handle_torch_function(
            function,
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
    assert scale is not None
    if is_dtensor(mu) or is_dtensor(scale):
        from . import _dtensor

        if global_shape is not None:
            raise ValueError(
                "fused_reparameterize(): global_shape is for plain tensors; a DTensor knows its own"
            )
        return _dtensor.reparameterize(function, mu, form.name, scale, key, generator)
    _check_forward_mode("fused_reparameterize")
    scale = _as_tensor(scale, mu)
    if form is _LOG_VAR:
        scale = _autocast_exp(mu, scale)
    if _exported():
        if key is not None or generator is not None:
            given = "generator" if key is None else "key"
            raise NotImplementedError(
                f"fused_reparameterize(): a {given} cannot go into torch.jit.trace or "
                "torch.onnx.export, whose programs run without this package and draw noise of "
                "their own; call it without one there, or save the model by torch.export"
            )
        return form.line(*torch.broadcast_tensors(mu, scale))
    if key is None:
        if is_compiling() and generator is None and not _are_functorch_transforms_active():
            return _ops.traced_sample(mu, scale, form.name)
        if not is_compiling() and _levels(TransformType.Vmap) == 0:
            return _ops.sample(mu, scale, generator, form.name)[0]
        key = _draw.mapped_key(mu.device, generator)
    return _ops.sample_from_key(mu, scale, key, form.name, global_shape, global_offset)


def kl_divergence(function: Callable[..., Tensor], mu: Tensor, log_var: Tensor | float) -> Tensor:
    """A call of fused_kl_divergence, which is `function`."""
    if not is_compiling():
        kl = plain(KL_DIVERGENCE, mu, log_var)
        if kl is not None:
            return kl
    if has_torch_function((mu, log_var)):
        return handle_torch_function(function, (mu, log_var), mu, log_var)
    name = "fused_kl_divergence"
    _validate.check_pair(name, mu, "log_var", log_var)
    if is_dtensor(mu) or is_dtensor(log_var):
        from . import _dtensor

        return _dtensor.elementwise(name, function, mu, log_var)
    _check_forward_mode(name)
    log_var = _as_tensor(log_var, mu)
    if _exported():
        return KL_DIVERGENCE.line(*torch.broadcast_tensors(mu, log_var))
    return _ops.kl_divergence(mu, _autocast_exp(mu, log_var))
