"""The way of every call of a public function: what is done before the op, once."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import _draw, _ops, _validate
from ._autograd import recorded
from ._forms import KL_DIVERGENCE, SAMPLE, Bounds, Call
from ._heads import Head, decomposed, heads_of
from ._validate import Clamp


def _levels(transform: TransformType) -> int:
    """How many levels of a torch.func transform this call is under."""
    return sum(level.key() == transform for level in get_interpreter_stack() or ())


def _is_mapped() -> bool:
    """Whether this call is under torch.vmap."""
    return _levels(TransformType.Vmap) > 0


# Of a graph the transforms are a part: torch.compile enters them as it traces.
_is_mapped._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def _check_exported(function: str, key: Tensor | None, generator: torch.Generator | None) -> None:
    if key is not None or generator is not None:
        given = "generator" if key is None else "key"
        raise NotImplementedError(
            f"{function}(): a {given} cannot go into torch.jit.trace or "
            "torch.onnx.export, whose programs run without this package and draw noise of "
            "their own; call it without one there, or save the model by torch.export"
        )


def _as_tensor(scale: Tensor | float, mu: Tensor) -> Tensor:
    """A number as a tensor of mu's dtype, and a 0-dim one of the CPU beside mu's on its device."""
    if not isinstance(scale, Tensor):
        most = 2**63 - 1 if isinstance(scale, int) else torch.finfo(mu.dtype).max
        if is_compiling() or -most <= scale <= most:
            return torch.full((), scale, dtype=mu.dtype, device=mu.device)
        # Which torch.full refuses: beyond the dtype it is infinite, as in torch's arithmetic.
        return torch.full((), float(scale), dtype=torch.float64, device=mu.device).to(mu.dtype)
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
        result = recorded(call, result, mu, scale)
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
    try:
        usual = not (clamp is not None or min_std != 0 or sample_shape != ())
    except Exception:  # an array: what is wrong with it is said below
        usual = False
    if not usual:
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
        name, mu, form, scale, sample_shape, key, generator, global_shape, global_offset
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
        _check_exported(name, key, generator)
        return as_sampled(call.line(mu, scale), sample_shape)
    if key is None:
        if is_compiling() and generator is None and not _are_functorch_transforms_active():
            return as_sampled(_ops.traced_sample(mu, scale, *_options(call)), sample_shape)
        if not is_compiling() and not _is_mapped():
            z, _ = _ops.sample(mu, scale, generator, *_options(call))
            return as_sampled(z, sample_shape)
        with _putting_back(mu, generator):
            key = _fresh_key(mu, scale, generator, call.samples)
            return _under_key(call, mu, scale, sample_shape, key, None, None)
    return _under_key(call, mu, scale, sample_shape, key, global_shape, global_offset)


def _under_key(
    call: Call,
    mu: Tensor,
    scale: Tensor,
    sample_shape: Sequence[int],
    key: Tensor,
    global_shape: Sequence[int] | None,
    global_offset: Sequence[int] | None,
) -> Tensor:
    if call.samples is not None:
        key, global_shape, global_offset = _flat_samples(
            sample_shape, key, global_shape, global_offset
        )
    form, *rest = _options(call)
    z = _ops.sample_from_key(mu, scale, key, form, global_shape, global_offset, *rest)
    return as_sampled(z, sample_shape)


def _putting_back(
    mu: Tensor, generator: torch.Generator | None
) -> AbstractContextManager[None, bool | None]:
    """For a call that draws its key before it has the memory for its results."""
    return nullcontext() if is_compiling() else _draw.put_back(mu.device, generator)


def _result_type(mu: Tensor, scale: Tensor) -> torch.dtype:
    """torch.result_type, which torch.compile cannot follow: of two floating-point types, one
    without dimensions does not count."""
    if (mu.dim() > 0) == (scale.dim() > 0):
        return torch.promote_types(mu.dtype, scale.dtype)
    return mu.dtype if mu.dim() > 0 else scale.dtype


def mean(mu: Tensor, form: str, scale: Tensor | float, sample_shape: Sequence[int]) -> Tensor:
    """mu, in the shape and the dtype that samples with this scale have."""
    shape = _validate.check_pair("fused_reparameterize", mu, form, scale)
    dtype = mu.dtype
    if isinstance(scale, Tensor):
        if form != "std":
            scale = _autocast_exp(mu, scale)
        dtype = _result_type(mu, scale)
    return mu.to(dtype).expand((*sample_shape, *shape))


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


def head(
    function: Callable[..., Any],
    term: str,
    mu: Tensor,
    log_var: Tensor | float | None,
    log_std: Tensor | float | None,
    std: Tensor | float | None,
    rho: Tensor | float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A call of a function that gives a sample and a sum, or of fused_kl_divergence the sum."""
    name = function.__name__
    form, scale = _validate.form_of(name, log_var, log_std, std, rho)
    key, generator = options.get("key"), options.get("generator")
    tensors = [t for t in (mu, scale, key) if t is not None]
    if has_torch_function(tensors):
        return handle_torch_function(  # type: ignore[no-any-return]
            function, tensors, mu, log_var, log_std=log_std, std=std, rho=rho, **options
        )
    draws = name != "fused_kl_divergence"
    sample_shape = _validate.check_sizes(name, "sample_shape", options.get("sample_shape", ()))
    bounds = _validate.bounds_of(name, options["clamp"], options["min_std"])
    global_shape, global_offset = options.get("global_shape"), options.get("global_offset")
    shape = _validate.check_reparameterize(
        name, mu, form, scale, sample_shape, key, generator, global_shape, global_offset
    )
    dims = _validate.check_dims(name, options["dim"], shape)
    prior = None
    if options.get("prior") is not None:
        prior = _validate.prior_of(name, options["prior"])
        _validate.check_prior(name, prior, mu, shape)
    if is_dtensor(mu) or is_dtensor(scale):
        from . import _dtensor

        return _dtensor.head(function, mu, form, scale, dims, options)
    _check_forward_mode(name)
    scale = _as_tensor(scale, mu)
    if form != "std":
        scale = _autocast_exp(mu, scale)
    # The divergence of samples is that of one.
    alone = draws and term == "kl_divergence" and len(sample_shape) > 0
    samples = math.prod(sample_shape) if len(sample_shape) > 0 else None
    call = SAMPLE[form]._replace(bounds=bounds, samples=None if alone else samples)
    dtype = wider = _result_type(mu, scale)
    loc = of_prior = None
    if prior is not None:
        loc, of_prior = (_as_tensor(t, mu) for t in (prior.loc, prior.scale))
        if prior.form != "std":
            of_prior = _autocast_exp(mu, of_prior)
        for t in (loc, of_prior):
            wider = torch.promote_types(wider, t.dtype) if t.dim() > 0 else wider
        alone = alone or (draws and wider != dtype)
        loc, of_prior = loc.to(wider), of_prior.to(wider)
    z = None
    with _putting_back(mu, generator) if draws and key is None else nullcontext():
        if alone:
            given: dict[str, Tensor] = {form: scale}
            z = reparameterize(
                function,
                mu,
                given.get("log_var"),
                given.get("log_std"),
                given.get("std"),
                given.get("rho"),
                options["clamp"],
                options["min_std"],
                sample_shape,
                key,
                generator,
                global_shape,
                global_offset,
            ).contiguous()
            draws = False
            call = call._replace(samples=None)
        if wider != dtype:
            mu, scale = mu.to(wider), scale.to(wider)
        n = len(shape)
        # Other dimensions than the last are summed of the terms.
        trailing = dims == tuple(range(n - len(dims), n))
        what = Head(
            call,
            term,
            len(dims) if trailing else 0,
            SAMPLE["std"] if prior is None else SAMPLE[prior.form]._replace(bounds=prior.bounds),
        )
        if _exported():
            _check_exported(name, key, generator)
            z_or_none, total = decomposed(what, mu, scale, None, loc, of_prior, exported=True)
            z = z_or_none if z is None else z
        elif not draws:
            _, total = _ops.head(mu, scale, None, loc, of_prior, *what.options())
        else:
            if key is None:
                key = _fresh_key(mu, scale, generator, samples)
            elif samples is not None:
                key, global_shape, global_offset = _flat_samples(
                    sample_shape, key, global_shape, global_offset
                )
            if global_shape is not None and global_offset is not None:
                what = what._replace(call=call._replace(block=(global_shape, global_offset)))
            z, total = _ops.head(mu, scale, key, loc, of_prior, *what.options())
            z, total = as_sampled(z, sample_shape), as_sampled(total, sample_shape)
    if not trailing:
        total = total.sum([d - n for d in dims])
    if name == "fused_kl_divergence":
        return total if len(dims) > 0 else total.to(wider)  # type: ignore[return-value]
    assert z is not None
    return z, total


@functools.lru_cache(maxsize=64, typed=True)
def _known_head(
    term: str,
    form: str,
    n: int,
    dim: Any,
    clamp: Any,
    min_std: Any,
    sample_shape: Any,
    prior_form: str,
    prior_bounds: Bounds | None,
) -> Head | None:
    """Of what nearly every call is: with sums over the last dimensions, if any."""
    dims = _validate.check_dims("", dim, (1,) * n)
    if dims != tuple(range(n - len(dims), n)):
        return None
    call, bounds = SAMPLE[form], _validate.bounds_of("", clamp, min_std)
    if bounds is not None or len(sample_shape) > 0:
        call = _with(call, bounds, math.prod(sample_shape) if len(sample_shape) > 0 else None)
    prior = SAMPLE[prior_form]
    return Head(call, term, len(dims), prior._replace(bounds=prior_bounds))


def plain_head(
    term: str,
    mu: Any,
    log_var: Tensor | float | None,
    log_std: Tensor | float | None,
    std: Tensor | float | None,
    rho: Tensor | float | None,
    clamp: Clamp | None,
    min_std: float,
    dim: int | Sequence[int] | None,
    prior: torch.distributions.Normal | None = None,
    sample_shape: Sequence[int] = (),
    key: Tensor | None = None,
    generator: torch.Generator | Literal[False] | None = False,
) -> tuple[Tensor, Tensor] | None:
    """A plain eager call of a head, as `plain`; None for any other, errors included. Without a
    key it draws by a generator, of which None is torch's own and False is no noise."""
    if is_compiling() or (key is not None and generator is not None and generator is not False):
        return None
    loc = of_prior = None
    prior_form, prior_bounds = "std", None
    try:
        if len(sample_shape) > 1:
            return None
        form, scale = _validate.form_of("", log_var, log_std, std, rho)
        if prior is not None:
            loc, of_prior, prior_form, prior_bounds = _validate.prior_of("", prior)
        head = _known_head(
            term,
            form,
            max(mu.dim(), scale.dim()),  # type: ignore[union-attr]
            dim,
            clamp,
            min_std,
            sample_shape,
            prior_form,
            prior_bounds,
        )
    except Exception:
        return None  # the long way has the words for it
    if head is None:
        return None
    result = head.plain(mu, scale, key, loc, of_prior, False if key is not None else generator)
    if result is not None and len(result) == 3:
        result = heads_of(head, result).apply(head, result, mu, scale, loc, of_prior)
    return result  # type: ignore[no-any-return]


def _fresh_key(
    mu: Tensor, scale: Tensor, generator: torch.Generator | None, samples: int | None
) -> Tensor:
    if _is_mapped():
        return _draw.mapped_key(mu.device, generator)
    if is_compiling() and generator is None:
        return _ops.traced_key(mu, scale, samples)
    return _ops.draw_key(mu, scale, None, generator, samples)


def kl_divergence(
    function: Callable[..., Tensor],
    mu: Tensor,
    log_var: Tensor | float | None,
    log_std: Tensor | float | None,
    std: Tensor | float | None,
    rho: Tensor | float | None,
    clamp: Clamp | None,
    min_std: float,
    dim: int | Sequence[int] | None,
    prior: torch.distributions.Normal | None,
) -> Tensor:
    """A call of fused_kl_divergence, which is `function`."""
    name = "fused_kl_divergence"
    each = isinstance(dim, tuple) and len(dim) == 0
    if not each or prior is not None:
        result = plain_head(
            "kl_divergence", mu, log_var, log_std, std, rho, clamp, min_std, dim, prior
        )
        if result is not None:
            if not each:
                return result[1]
            # That of each element is of the dtype of a sample.
            _, scale = _validate.form_of(name, log_var, log_std, std, rho)
            return result[1].to(_result_type(mu, scale))  # type: ignore[arg-type]
        options = {"clamp": clamp, "min_std": min_std, "dim": dim, "prior": prior}
        return head(function, "kl_divergence", mu, log_var, log_std, std, rho, options)  # type: ignore[return-value]
    form, scale = _validate.form_of(name, log_var, log_std, std, rho)
    call = KL_DIVERGENCE[form]
    try:
        usual = not (clamp is not None or min_std != 0)
    except Exception:
        usual = False
    if not usual:
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
