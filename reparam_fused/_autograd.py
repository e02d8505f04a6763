"""The derivatives of the ops, written by hand once for every row of the table of forms.

Forward and Backward are the one home of a gradient. A plain eager call applies them itself;
any other goes to the op, and torch's dispatcher comes to them from there: for the engine,
for torch.func and for what torch.compile traces. eps is drawn again from the key, not stored.

A gradient is returned as it comes: the engine sums it to the shape of its input, and casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

# The part of torch.autograd.Function that takes part in one level of differentiation: the
# levels of torch.func reach it through the dispatcher. Function's own way to them, with
# setup_context, costs 11 us a call where this one costs 3.
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling

from . import _ops
from ._forms import FORMS, Bounds, Call


def _options(call: Call, key: Tensor | None) -> tuple[Any, ...]:
    """What an op takes after its operands: no more than differs from what it takes by itself."""
    if key is None:
        return (call.form.name,) if call.bounds is None else (call.form.name, call.bounds)
    if call.bounds is None:
        return (key, call.form.name, *(call.block or ()))
    return (key, call.form.name, *(call.block or (None, None)), call.bounds)


def dense(grad: Tensor) -> Tensor:
    """What comes in may be sparse: the eager line takes it, and the kernels do not."""
    return grad if grad.layout == torch.strided else grad.to_dense()


def gradient_of_scale(call: Call, grad: Tensor, scale: Tensor | None, key: Tensor | None) -> Tensor:
    """The gradient of the scale, differentiable again."""
    if not is_compiling():
        result = call.plain_backward(grad, scale, key)
        if type(result) is tuple:
            return _apply_backward(call, result, grad, scale)
        if result is not None:
            return result  # type: ignore[no-any-return]
    op = _ops.sample_backward if call.draws else _ops.kl_divergence_backward
    return op(dense(grad), scale, *_options(call, key))


def gradients_of_samples(
    call: Call, grad: Tensor, scale: Tensor | None, key: Tensor, by_scale: bool = True
) -> tuple[Tensor, Tensor]:
    """Those of mu and of the scale from that of samples, differentiable again.

    If that of mu alone is asked for, the other is of sigma, and needs no scale.
    """
    if not by_scale:
        call, scale = call._replace(form=FORMS["std"], bounds=None), None
    result = None if is_compiling() else call.plain_backward(grad, scale, key)
    if result is None:
        result = _ops.samples_backward(dense(grad), scale, *_options(call, key))
    return result


def samples_of_sigma(call: Call, mu: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    """The samples of a call with this mu and this sigma, differentiable again."""
    block = call.block or (None, None)
    return _ops.sample_from_key(mu, sigma, key, "std", *block, None, call.samples)


class Forward(_SingleLevelFunction):
    """f(x, scale) of any form, for ``Forward.apply(call, (f, key), x, scale)``.

    It has been computed by then: what a Function computes itself, torch.func's other levels
    would not see. In a tuple, for torch would take a tensor for an operand.
    """

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any, call: Call, result: tuple[Tensor, Tensor | None], x: Tensor, scale: Tensor
    ) -> Tensor:
        _, _, by_x, by_scale = ctx.needs_input_grad
        tangents = forward_ad._current_level >= 0
        # Of what the derivatives need, no more than those that are asked for.
        _save(
            ctx,
            call,
            x if not call.draws and (by_x or tangents) else None,
            scale if call.backward_reads() and (by_scale or tangents) else None,
            result[1] if by_scale or tangents or call.samples is not None else None,
            result[0],
        )
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        by_x = by_scale = None
        if grad is not None:
            call: Call = ctx.call
            x, scale, key = ctx.saved_tensors
            _, _, needs_x, needs_scale = ctx.needs_input_grad
            if call.samples is not None:
                by_x, by_scale = gradients_of_samples(call, grad, scale, key, needs_scale)
                if not needs_scale:
                    by_scale = None
            else:
                if needs_x:
                    by_x = call.by_x(grad, x)
                if needs_scale:
                    by_scale = gradient_of_scale(call, grad, scale, key)
        return None, None, by_x, by_scale

    @staticmethod
    def jvp(ctx: Any, _c: None, _r: None, x_t: Tensor | None, scale_t: Tensor | None) -> Any:
        call: Call = ctx.call
        by_x, by_scale = x_t, None
        with _tangents(ctx) as (x, scale, key):
            if call.samples is not None:
                if scale_t is None:
                    return _total(ctx, x_t)
                sigma_t = scale_t if scale is None else scale_t * call.slope(scale)
                mu_t = torch.zeros_like(sigma_t) if x_t is None else x_t
                shape = ctx.shape[1:]
                return _total(
                    ctx, samples_of_sigma(call, mu_t.expand(shape), sigma_t.expand(shape), key)
                )
            if x_t is not None:
                by_x = call.by_x(x_t, x)
            if scale_t is not None:
                by_scale = gradient_of_scale(call, scale_t.expand(ctx.shape), scale, key)
            return _total(ctx, by_x, by_scale)


class Backward(_SingleLevelFunction):
    """The gradient of the scale, of any form: linear in the gradient that comes in.

    By the scale its derivative is made of itself, as the table says: gradients of every
    order are this one op.
    """

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        result: tuple[Tensor, Tensor | None],
        grad: Tensor,
        scale: Tensor | None,
    ) -> Tensor:
        # Without a scale it is linear in grad, which is then not needed again.
        _save(ctx, call, None if scale is None else grad, scale, result[1], result[0])
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        by_grad = by_scale = None
        if grad_out is not None:
            grad, scale, key = ctx.saved_tensors
            if ctx.needs_input_grad[2]:
                by_grad = gradient_of_scale(ctx.call, grad_out, scale, key)
            if ctx.needs_input_grad[3]:
                by_scale = _second(ctx.call, grad_out * grad, scale, key)
        return None, None, by_grad, by_scale

    @staticmethod
    def jvp(ctx: Any, _c: None, _r: None, grad_t: Tensor | None, scale_t: Tensor | None) -> Any:
        by_grad = by_scale = None
        with _tangents(ctx) as (grad, scale, key):
            if grad_t is not None:
                by_grad = gradient_of_scale(ctx.call, grad_t.expand(ctx.shape), scale, key)
            if scale_t is not None:
                by_scale = _second(ctx.call, grad * scale_t, scale, key)
            return _total(ctx, by_grad, by_scale)


class FusedReparameterizeSamplesBackward(_SingleLevelFunction):
    """The gradients of mu and of the scale, summed over samples: linear in those that come in.

    Their derivative by what comes in are samples again, of the products with those that are
    summed; by the scale it is made of itself, as in Backward.
    """

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        result: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        grad_mu, grad_scale, key = result
        ctx.dtype_of_grad = grad.dtype
        _save(ctx, call, None if scale is None else grad, scale, key, grad_scale)
        return grad_mu, grad_scale

    @staticmethod
    def backward(
        ctx: Any, by_mu: Tensor | None, by_scale: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, scale, key = ctx.saved_tensors
        of_grad = of_scale = None
        call: Call = ctx.call
        if ctx.needs_input_grad[2] and not (by_mu is None and by_scale is None):
            zero = key.new_zeros((), dtype=ctx.dtype_of_grad)
            sigma = zero if by_scale is None else by_scale
            if scale is not None:
                sigma = sigma * call.slope(scale)
            of_grad = samples_of_sigma(call, zero if by_mu is None else by_mu, sigma, key)
        if ctx.needs_input_grad[3] and by_scale is not None:
            of_scale = _second_of_samples(call, by_scale, grad, scale, key)
        return None, None, of_grad, of_scale

    @staticmethod
    def jvp(ctx: Any, _c: None, _r: None, grad_t: Tensor | None, scale_t: Tensor | None) -> Any:
        by_mu = by_grad = by_scale = None
        with _tangents(ctx) as (grad, scale, key):
            if grad_t is not None:
                by_mu, by_grad = gradients_of_samples(ctx.call, grad_t, scale, key)
            if scale_t is not None:
                by_scale = _second_of_samples(ctx.call, scale_t, grad, scale, key)
            return _total(ctx, by_mu), _total(ctx, by_grad, by_scale)


# By whose names autograd's nodes go, with Backward behind: in grad_fn, in anomaly mode, in profiles


class FusedReparameterize(Forward):
    """Of samples."""


class FusedKLDivergence(Forward):
    """Of divergences."""


class FusedReparameterizeBackward(Backward):
    """Of samples."""


class FusedKLDivergenceBackward(Backward):
    """Of divergences."""


def recorded(call: Call, result: tuple[Tensor, Tensor | None], x: Tensor, scale: Tensor) -> Tensor:
    """The result of a call, with its derivatives."""
    function: Any = FusedReparameterize if call.draws else FusedKLDivergence
    return function.apply(call, result, x, scale)  # type: ignore[no-any-return]


def _apply_backward(
    call: Call, result: tuple[Tensor, Tensor | None], grad: Tensor, scale: Tensor | None
) -> Tensor:
    function: Any = FusedReparameterizeBackward if call.draws else FusedKLDivergenceBackward
    return function.apply(call, result, grad, scale)  # type: ignore[no-any-return]


def _second(call: Call, product: Tensor, scale: Tensor, key: Tensor | None) -> Tensor:
    """The derivative of the backward by the scale, times what comes in."""
    return call.second(gradient_of_scale(call, product, scale, key), product, scale)


def _second_of_samples(
    call: Call, by_scale: Tensor, grad: Tensor, scale: Tensor, key: Tensor
) -> Tensor:
    first = by_scale * gradients_of_samples(call, grad, scale, key)[1]
    return call.second(first, by_scale, scale)


def _save(
    ctx: Any, call: Call, x: Tensor | None, scale: Tensor | None, key: Tensor | None, out: Tensor
) -> None:
    ctx.call = call
    ctx.set_materialize_grads(False)
    kept = (x, scale, key)
    ctx.save_for_backward(*kept)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*kept)
        ctx.shape, ctx.dtype = out.shape, out.dtype


@contextmanager
def _tangents(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """What was kept, without its tangents, while those of torch.func's other levels are on.

    torch turns all of them off for a jvp: a derivative of it would be zero, and nobody told.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(
            None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors
        )


def _total(ctx: Any, *parts: Tensor | None) -> Tensor | None:
    """A tangent as the result has it, of parts of which None is zero and costs nothing."""
    given = [t for t in parts if t is not None]
    if not given:
        return None
    return sum(given[1:], start=given[0]).expand(ctx.shape).to(ctx.dtype)


# From the dispatcher to the Functions


def _below(op: Any, keyset: Any, *arguments: Any) -> Any:
    """The op as the dispatcher goes on with it, below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _recorded(x: Tensor, scale: Tensor | None) -> bool:
    """Whether autograd is to see what is done with these."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (
        x.requires_grad or (scale is not None and scale.requires_grad)
    )


def _apply(function: Any, *arguments: Any) -> Tensor:
    """function.apply, also within torch.func, of which the dispatcher has entered a level."""
    allowed = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    try:
        return function.apply(*arguments)  # type: ignore[no-any-return]
    finally:
        _functorch.set_single_level_autograd_function_allowed(allowed)


def _differentiated_sample(name: str, function: Any) -> None:
    """Register the derivatives of a pure op of samples: of their backward, if it has one output."""
    op = getattr(_ops, name)

    def kernel(
        keyset: Any,
        x: Tensor,
        scale: Tensor | None,
        key: Tensor,
        form: str = "log_var",
        global_shape: Sequence[int] | None = None,
        global_offset: Sequence[int] | None = None,
        bounds: Bounds | None = None,
        *samples: int | None,
    ) -> Any:
        options = (key, form, global_shape, global_offset, bounds, *samples)
        result = _below(op, keyset, x, scale, *options)
        if not _recorded(x, scale):
            return result
        block = None if global_shape is None else (global_shape, global_offset)
        call = Call(FORMS[form], True, bounds, block, *samples)
        if function is FusedReparameterizeSamplesBackward:
            call = call._replace(samples=x.shape[0])
            return _apply(function, call, (*result, key), x, scale)
        return _apply(function, call, (result, key), x, scale)

    _ops.library.impl(name, kernel, "Autograd", with_keyset=True)


def _differentiated_divergence(name: str, function: Any) -> None:
    """Register the derivatives of an op of the divergence."""
    op = getattr(_ops, name)

    def kernel(
        keyset: Any, x: Tensor, scale: Tensor, form: str = "log_var", bounds: Bounds | None = None
    ) -> Tensor:
        result: Tensor = _below(op, keyset, x, scale, form, bounds)
        if not _recorded(x, scale):
            return result
        call = Call(FORMS[form], False, bounds)
        return _apply(function, call, (result, None), x, scale)

    _ops.library.impl(name, kernel, "Autograd", with_keyset=True)


def _differentiated_draw(name: str) -> None:
    """The same of an op that draws its key, which it returns beside the sample."""
    op = getattr(_ops, name)

    def kernel(
        keyset: Any,
        mu: Tensor,
        scale: Tensor,
        source: Any = None,
        form: str = "log_var",
        bounds: Bounds | None = None,
        samples: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _below(op, keyset, mu, scale, source, form, bounds, samples)
        if not _recorded(mu, scale):
            return result
        call = Call(FORMS[form], True, bounds, None, samples)
        return _apply(FusedReparameterize, call, result, mu, scale), result[1]

    _ops.library.impl(name, kernel, "Autograd", with_keyset=True)


# Under vmap the noise is batched if and only if the key is: an element's noise is that of its
# index within its own example.

_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _level() -> int:
    """The level of torch.vmap that asks."""
    level = _functorch.maybe_current_level()
    if level is None:
        raise RuntimeError(
            "reparam_fused: a tensor that torch.vmap has batched was used outside of it; return it "
            "from the function that vmap calls"
        )
    return level


def _batch_first(t: Tensor, dim: int | None, rank: int) -> Tensor:
    """The batch, then ones where an example has less than so many dimensions, then those."""
    if dim != 0:
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    missing = rank - t.dim() + 1
    return t if missing <= 0 else t.reshape(t.shape[0], *[1] * missing, *t.shape[1:])


def _over_batch(
    call: Callable[..., Any],
    operands: Sequence[Tensor | None],
    key: Tensor | None = None,
    block: Sequence[Any] = (None, None),
    samples: Sequence[bool] = (),
) -> Any:
    """call(operands, key, block), which is said of one example, as one call for all of them.

    The first dimension of what `samples` says, of the operands and then of the result, of the
    key and of the block, is one of samples, which the batch comes after.
    """
    level = _level()
    size, rank, pairs = None, 0, []
    for t in (*operands, key):
        pair = (None, None) if t is None else _functorch._unwrap_batched(t, level)
        pairs.append(pair)
        if pair[1] is not None:
            size = pair[0].shape[pair[1]]
    *examples, (key, key_dim) = pairs
    of_samples = samples or [False] * (len(operands) + 1)
    if size is not None:
        for (t, dim), sampled in zip(examples, of_samples, strict=False):
            if t is not None:
                rank = max(rank, t.dim() - (dim is not None) - sampled)
        batched: list[Tensor | None] = []
        for (t, dim), sampled in zip(examples, of_samples, strict=False):
            if t is not None:
                t = _batch_first(t, dim, rank + sampled)
                t = t.movedim(0, 1) if sampled else t
            batched.append(t)
        operands = batched
        if key is not None:
            key = _batch_first(key, key_dim, 0)
            if key_dim is None:
                key = key.expand(size, *key.shape[1:])
            if samples:
                # One key for all samples has no dimension of them.
                key = key.unsqueeze(0) if key.dim() == 2 else key.movedim(0, 1)
            x = operands[0]
            at = int(of_samples[0])
            if x is not None and x.shape[at] != size:  # the batch may be of the key alone
                operands[0] = x.expand(*x.shape[:at], size, *x.shape[at + 1 :])
        if None not in block:
            at = 1 if samples else 0
            block = [
                (*sizes[:at], n, *sizes[at:]) for n, sizes in zip((size, 0), block, strict=True)
            ]
    with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
        result = call(operands, key, block)
    if size is None:  # of tensors that are batched at other levels alone, it is none of this one
        return result
    if isinstance(result, tuple):
        return tuple(_functorch._add_batch_dim(t, 0, level) for t in result)
    return _functorch._add_batch_dim(result, int(of_samples[-1]), level)


def _batched_sample(op: Any) -> Callable[..., Any]:
    def rule(
        x: Tensor,
        scale: Tensor | None,
        key: Tensor,
        form: str = "log_var",
        global_shape: Sequence[int] | None = None,
        global_offset: Sequence[int] | None = None,
        bounds: Bounds | None = None,
        *samples: int | None,
    ) -> Any:
        def call(operands: Sequence[Tensor], key: Tensor, block: Sequence[Any]) -> Any:
            return op(*operands, key, form, *block, bounds, *samples)

        sampled: Sequence[bool] = ()
        if op is _ops.samples_backward:
            sampled = (True, False, False)
        elif samples and samples[0] is not None:
            sampled = (False, False, True)
        return _over_batch(call, (x, scale), key, (global_shape, global_offset), sampled)

    return rule


def _batched_divergence(op: Any) -> Callable[..., Tensor]:
    def rule(x: Tensor, scale: Tensor, *options: Any) -> Tensor:
        return _over_batch(lambda operands, *_: op(*operands, *options), (x, scale))  # type: ignore[no-any-return]

    return rule


def _batched_noise(
    key: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor:
    def call(operands: Sequence[Tensor], key: Tensor, block: Sequence[Any]) -> Tensor:
        return _ops.noise(key, operands[0].shape, dtype, *block)

    # An operand of the noise's shape, which only the key batches
    example = torch.empty(size, device="meta")
    eps: Tensor = _over_batch(call, (example,), key, (global_shape, global_offset))
    return eps


def _batched_derive(keys: Tensor, data: Tensor | None, first: int, num: int) -> Tensor:
    """The rows of all examples as rows of one call: each example has m keys and n numbers."""
    level = _level()
    keys, keys_dim = _functorch._unwrap_batched(keys, level)
    data_dim = None
    if data is not None:
        data, data_dim = _functorch._unwrap_batched(data, level)
    with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
        if keys_dim is None and data_dim is None:
            return _ops.derive(keys, data, first, num)
        keys = _batch_first(keys, keys_dim, 2)
        size, m = keys.shape[:2]
        n = m
        if data is not None:
            data = _batch_first(data, data_dim, 1)
            size = max(size, data.shape[0])
            n = max(m, data.shape[1])
            data = data.expand(size, n).reshape(-1)
            keys = keys.expand(size, n, 2)
        derived = _ops.derive(keys.reshape(-1, 2).contiguous(), data, first, num)
    return _functorch._add_batch_dim(derived.view(num, size, n, 2), 1, level)


_function: Any
for _name, _function in (
    ("sample_from_key", FusedReparameterize),
    ("sample_backward", FusedReparameterizeBackward),
    ("samples_backward", FusedReparameterizeSamplesBackward),
):
    _differentiated_sample(_name, _function)
    _ops.library.impl(_name, _batched_sample(getattr(_ops, _name)), "FuncTorchBatched")
for _name, _function in (
    ("kl_divergence", FusedKLDivergence),
    ("kl_divergence_backward", FusedKLDivergenceBackward),
):
    _differentiated_divergence(_name, _function)
    _ops.library.impl(_name, _batched_divergence(getattr(_ops, _name)), "FuncTorchBatched")
for _name in ("sample", "sample_fresh"):
    _differentiated_draw(_name)
_ops.library.impl("noise", _batched_noise, "FuncTorchBatched")
_ops.library.impl("derive", _batched_derive, "FuncTorchBatched")
