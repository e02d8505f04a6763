"""The way of every call of a public function: what is done before the op, once."""

from __future__ import annotations

import functools
import math
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
from ._forms import KL_DIVERGENCE, SAMPLE, Bounds, Call
from ._validate import Clamp


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


def _autocast_exp(mu: Tensor, scale: Tensor) -> Tensor:
    """The scale as autocast has it for exp and softplus, which it computes in float32 on all but
    CPUs."""
    if mu.is_cpu or mu.is_meta or not torch.is_autocast_enabled(mu.device.type):
        return scale
    return scale if scale.dtype == torch.float64 else scale.float()


def _with(call: Call, bounds: Bounds | None, samples: int | None = None) -> Call:
    """The call within bounds, of so many samples."""
    return call._replace(bounds=bounds, samples=samples)


# Nearly every program has a few of them.
_known_with = functools.lru_cache(maxsize=64)(_with)


def plain(call: Call, mu: Any, scale: Any, key: Any = None, generator: Any = None) -> Tensor | None:
    """A plain eager call, by the shortest way; None for any other, errors included."""
    if key is None and call.draws:
        result = call.plain_draw(mu, scale, generator)
    else:
        result = call.plain(mu, scale, key)
    if type(result) is tuple:
        result = Forward.apply(call, result, mu, scale)  # type: ignore[attr-defined]
    return result  # type: ignore[no-any-return]


def _options(call: Call) -> tuple[Any, ...]:
    """What an op that draws takes at the end: in a graph no more than differs."""
    if call.bounds is None and call.samples is None:
        return (call.form.name,)
    return call.form.name, call.bounds, call.samples


def as_sampled(z: Tensor, sample_shape: Sequence[int]) -> Tensor:
    """z with its dimension of samples in this shape."""
    return z if len(sample_shape) < 2 else z.view(*sample_shape, *z.shape[1:])


def reparameterize(
    function: Callable[..., Tensor],
    mu: Tensor,
    log_var: Tensor | float | None,
    log_std: Tensor | float | None,
    std: Tensor | float | None,
    rho: Tensor | float | None,
    clamp: Clamp | None,
    min_std: float,
    sample_shape: Sequence[int],
    key: Tensor | None,
    generator: torch.Generator | None,
    global_shape: Sequence[int] | None,
    global_offset: Sequence[int] | None,
) -> Tensor:
    """A call of fused_reparameterize, which is `function`."""
    name = "fused_reparameterize"
    form, scale = _validate.form_of(name, log_var, log_std, std, rho)
    call = SAMPLE[form]
    if clamp is not None or min_std != 0 or sample_shape != ():
        sample_shape = _validate.check_sizes(name, "sample_shape", sample_shape)
        bounds = _validate.bounds_of(name, clamp, min_std)
        samples = math.prod(sample_shape) if len(sample_shape) > 0 else None
        call = (_with if is_compiling() else _known_with)(call, bounds, samples)
    if (
        global_shape is None
        and global_offset is None
        and (key is None or (generator is None and len(sample_shape) < 2))
        and not is_compiling()
    ):
        z = plain(call, mu, scale, key, generator)
        if z is not None:
            return as_sampled(z, sample_shape)
    tensors = [t for t in (mu, scale, key) if t is not None]
    if has_torch_function(tensors):
        return handle_torch_function(
            function,
            tensors,
            mu,
            log_var,
            log_std=log_std,
            std=std,
            rho=rho,
            clamp=clamp,
            min_std=min_std,
            sample_shape=sample_shape,
            key=key,
            generator=generator,
            global_shape=global_shape,
            global_offset=global_offset,
        )
    _validate.check_reparameterize(
        mu, form, scale, sample_shape, key, generator, global_shape, global_offset
    )
    if is_dtensor(mu) or is_dtensor(scale):
        from . import _dtensor

        if global_shape is not None:
            raise ValueError(
                f"{name}(): global_shape is for plain tensors; a DTensor knows its own"
            )
        options = {"clamp": clamp, "min_std": min_std, "sample_shape": sample_shape}
        return _dtensor.reparameterize(function, mu, form, scale, key, generator, options)
    _check_forward_mode(name)
    scale = _as_tensor(scale, mu)
    if form != "std":
        scale = _autocast_exp(mu, scale)
    if _exported():
        if key is not None or generator is not None:
            given = "generator" if key is None else "key"
            raise NotImplementedError(
                f"{name}(): a {given} cannot go into torch.jit.trace or "
                "torch.onnx.export, whose programs run without this package and draw noise of "
                "their own; call it without one there, or save the model by torch.export"
            )
        return as_sampled(call.line(mu, scale), sample_shape)
    if key is None:
        if is_compiling() and generator is None and not _are_functorch_transforms_active():
            return as_sampled(_ops.traced_sample(mu, scale, *_options(call)), sample_shape)
        if not is_compiling() and _levels(TransformType.Vmap) == 0:
            z, _ = _ops.sample(mu, scale, generator, *_options(call))
            return as_sampled(z, sample_shape)
        key = _draw.mapped_key(mu.device, generator)
    if call.samples is not None:
        key, global_shape, global_offset = _flat_samples(
            sample_shape, key, global_shape, global_offset
        )
    form, *rest = _options(call)
    z = _ops.sample_from_key(mu, scale, key, form, global_shape, global_offset, *rest)
    return as_sampled(z, sample_shape)


def mean(mu: Tensor, form: str, scale: Tensor | float, sample_shape: Sequence[int]) -> Tensor:
    """mu, in the shape and the dtype that samples with this scale have."""
    shape = _validate.check_pair("fused_reparameterize", mu, form, scale)
    dtype = mu.dtype
    if isinstance(scale, Tensor):
        if form != "std":
            scale = _autocast_exp(mu, scale)
        # torch.result_type, which torch.compile cannot follow: of two floating-point types, one
        # without dimensions does not count.
        if (mu.dim() > 0) == (scale.dim() > 0):
            dtype = torch.promote_types(dtype, scale.dtype)
        elif scale.dim() > 0:
            dtype = scale.dtype
    return mu.to(dtype).expand(*sample_shape, *shape)


def _flat_samples(
    sample_shape: Sequence[int],
    key: Tensor,
    global_shape: Sequence[int] | None,
    global_offset: Sequence[int] | None,
) -> tuple[Tensor, Sequence[int] | None, Sequence[int] | None]:
    """A key and a block with one dimension for all of sample_shape."""
    n = len(sample_shape)
    if n == 1:
        return key, global_shape, global_offset
    batch = key.shape[:-1]
    if len(batch) > 0:
        first = math.prod(batch[:n])
        key = key.reshape(first, *batch[n:], 2)
    if global_shape is not None and global_offset is not None:
        inner = math.prod(global_shape[1:n])
        global_shape = (global_shape[0] * inner, *global_shape[n:])
        global_offset = (global_offset[0] * inner, *global_offset[n:])
    return key, global_shape, global_offset


def kl_divergence(
    function: Callable[..., Tensor],
    mu: Tensor,
    log_var: Tensor | float | None,
    log_std: Tensor | float | None,
    std: Tensor | float | None,
    rho: Tensor | float | None,
    clamp: Clamp | None,
    min_std: float,
) -> Tensor:
    """A call of fused_kl_divergence, which is `function`."""
    name = "fused_kl_divergence"
    form, scale = _validate.form_of(name, log_var, log_std, std, rho)
    call = KL_DIVERGENCE[form]
    if clamp is not None or min_std != 0:
        call = _with(call, _validate.bounds_of(name, clamp, min_std))
    if not is_compiling():
        kl = plain(call, mu, scale)
        if kl is not None:
            return kl
    if has_torch_function((mu, scale)):
        return handle_torch_function(
            function,
            (mu, scale),
            mu,
            log_var,
            log_std=log_std,
            std=std,
            rho=rho,
            clamp=clamp,
            min_std=min_std,
        )
    _validate.check_pair(name, mu, form, scale)
    if is_dtensor(mu) or is_dtensor(scale):
        from . import _dtensor

        options = {"clamp": clamp, "min_std": min_std}
        return _dtensor.elementwise(name, function, mu, form, scale, options)
    _check_forward_mode(name)
    scale = _as_tensor(scale, mu)
    if _exported():
        return call.line(*torch.broadcast_tensors(mu, scale))
    if form != "std":
        scale = _autocast_exp(mu, scale)
    if call.bounds is None:
        return _ops.kl_divergence(mu, scale, form)
    return _ops.kl_divergence(mu, scale, form, call.bounds)
