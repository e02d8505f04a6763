"""The derivatives of the ops, written by hand once for every row of the table of forms.

Forward and Backward are the one home of a gradient. A plain eager call applies them itself;
any other goes to the op, and torch's dispatcher comes to them from there: for the engine,
for torch.func and for what torch.compile traces. eps is drawn again from the key, not stored.

A gradient is returned as it comes: the engine sums it to the shape of its input, and casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

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
from ._forms import KL_DIVERGENCE, SAMPLE, Form

Block: TypeAlias = tuple[Sequence[int] | None, Sequence[int] | None] | None


def gradient_of_scale(
    form: Form, grad: Tensor, scale: Tensor | None, key: Tensor | None, block: Block
) -> Tensor:
    """The gradient of the scale, differentiable again."""
    if block is None and not is_compiling():
        result = form.plain_backward(grad, scale, key)
        if type(result) is tuple:
            return _apply_backward(form, result, grad, scale, None)
        if result is not None:
            return result  # type: ignore[no-any-return]
    arguments: tuple[Any, ...] = ()
    if form.name:
        arguments = (key, form.name) if block is None else (key, form.name, *block)
    return getattr(_ops, form.backward)(grad, scale, *arguments)  # type: ignore[no-any-return]


class Forward(_SingleLevelFunction):
    """f(x, scale) of any form, for ``Forward.apply(form, (f, key), x, scale, block)``.

    It has been computed by then: what a Function computes itself, torch.func's other levels
    would not see. In a tuple, for torch would take a tensor for an operand.
    """

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        result: tuple[Tensor, Tensor | None],
        x: Tensor,
        scale: Tensor,
        block: Block,
    ) -> Tensor:
        _, _, by_x, by_scale, _ = ctx.needs_input_grad
        tangents = forward_ad._current_level >= 0
        # Of what the derivatives need, no more than those that are asked for.
        _save(
            ctx,
            form,
            block,
            result,
            x if form.by_x is not None and (by_x or tangents) else None,
            scale if form.second is not None and (by_scale or tangents) else None,
            by_scale or tangents,
        )
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        by_x = by_scale = None
        if grad is not None:
            form = ctx.form
            x, scale, key = ctx.saved_tensors
            _, _, needs_x, needs_scale, _ = ctx.needs_input_grad
            if needs_x:
                by_x = grad if form.by_x is None else form.by_x(grad, x)
            if needs_scale:
                by_scale = gradient_of_scale(form, grad, scale, key, ctx.block)
        return None, None, by_x, by_scale, None

    @staticmethod
    def jvp(
        ctx: Any, _f: None, _r: None, x_t: Tensor | None, scale_t: Tensor | None, _b: None
    ) -> Tensor | None:
        form: Form = ctx.form
        by_x, by_scale = x_t, None
        with _tangents(ctx) as (x, scale, key):
            if x_t is not None and form.by_x is not None:
                by_x = form.by_x(x_t, x)
            if scale_t is not None:
                scale_t = scale_t.expand(ctx.shape)
                by_scale = gradient_of_scale(form, scale_t, scale, key, ctx.block)
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
        form: Form,
        result: tuple[Tensor, Tensor | None],
        grad: Tensor,
        scale: Tensor | None,
        block: Block,
    ) -> Tensor:
        # Without a scale it is linear in grad, which is then not needed again.
        _save(ctx, form, block, result, None if scale is None else grad, scale, True)
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        by_grad = by_scale = None
        if grad_out is not None:
            grad, scale, key = ctx.saved_tensors
            if ctx.needs_input_grad[2]:
                by_grad = gradient_of_scale(ctx.form, grad_out, scale, key, ctx.block)
            if ctx.needs_input_grad[3]:
                by_scale = _second(ctx, grad_out * grad, scale, key)
        return None, None, by_grad, by_scale, None

    @staticmethod
    def jvp(
        ctx: Any, _f: None, _r: None, grad_t: Tensor | None, scale_t: Tensor | None, _b: None
    ) -> Tensor | None:
        by_grad = by_scale = None
        with _tangents(ctx) as (grad, scale, key):
            if grad_t is not None:
                grad_t = grad_t.expand(ctx.shape)
                by_grad = gradient_of_scale(ctx.form, grad_t, scale, key, ctx.block)
            if scale_t is not None:
                by_scale = _second(ctx, grad * scale_t, scale, key)
            return _total(ctx, by_grad, by_scale)


_apply_backward: Callable[..., Tensor] = Backward.apply  # type: ignore[attr-defined]


def _second(ctx: Any, product: Tensor, scale: Tensor, key: Tensor | None) -> Tensor:
    """The derivative of the backward by the scale, times what comes in."""
    second: Callable[[Tensor, Tensor], Tensor] = ctx.form.second
    return second(gradient_of_scale(ctx.form, product, scale, key, ctx.block), product)


def _save(
    ctx: Any,
    form: Form,
    block: Block,
    result: tuple[Tensor, Tensor | None],
    x: Tensor | None,
    scale: Tensor | None,
    with_key: bool,
) -> None:
    out, key = result
    ctx.form, ctx.block = form, block
    ctx.set_materialize_grads(False)
    kept = (x, scale, key if with_key else None)
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


def _differentiated(name: str, function: Any) -> None:
    """Register the derivatives of one of the ops that a table's row names."""
    op = getattr(_ops, name)

    def kernel(
        keyset: Any,
        x: Tensor,
        scale: Tensor | None,
        key: Tensor | None = None,
        form: str = "log_var",
        global_shape: Sequence[int] | None = None,
        global_offset: Sequence[int] | None = None,
    ) -> Tensor:
        rest = () if key is None else (key, form, global_shape, global_offset)
        result: Tensor = _below(op, keyset, x, scale, *rest)
        if not _recorded(x, scale):
            return result
        row = KL_DIVERGENCE if key is None else SAMPLE[form]
        block = None if global_shape is None else (global_shape, global_offset)
        return _apply(function, row, (result, key), x, scale, block)

    _ops.library.impl(name, kernel, "Autograd", with_keyset=True)


def _differentiated_draw(name: str) -> None:
    """The same of an op that draws its key, which it returns beside the sample."""
    op = getattr(_ops, name)

    def kernel(
        keyset: Any, mu: Tensor, scale: Tensor, source: Any = None, form: str = "log_var"
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _below(op, keyset, mu, scale, source, form)
        if not _recorded(mu, scale):
            return result
        return _apply(Forward, SAMPLE[form], result, mu, scale, None), result[1]

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
    call: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    key: Tensor | None = None,
    block: Sequence[Any] = (None, None),
) -> Tensor:
    """call(operands, key, block), which is said of one example, as one call for all of them."""
    level = _level()
    size, rank, pairs = None, 0, []
    for t in (*operands, key):
        pair = (None, None) if t is None else _functorch._unwrap_batched(t, level)
        pairs.append(pair)
        if pair[1] is not None:
            size = pair[0].shape[pair[1]]
    *examples, (key, key_dim) = pairs
    if size is not None:
        for t, dim in examples:
            if t is not None:
                rank = max(rank, t.dim() - (dim is not None))
        operands = [None if t is None else _batch_first(t, dim, rank) for t, dim in examples]
        if key is not None:
            key = _batch_first(key, key_dim, 0)
            if key_dim is None:
                key = key.expand(size, *key.shape[1:])
            x = operands[0]
            if x is not None and x.shape[0] != size:  # the batch may be of the key alone
                operands[0] = x.expand(size, *x.shape[1:])
        if None not in block:
            block = [(n, *sizes) for n, sizes in zip((size, 0), block, strict=True)]
    with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
        result = call(operands, key, block)
    # Of tensors that are batched at other levels alone, it is none of this one.
    return result if size is None else _functorch._add_batch_dim(result, 0, level)


def _batched_sample(op: Any) -> Callable[..., Tensor]:
    def rule(
        x: Tensor,
        scale: Tensor | None,
        key: Tensor,
        form: str = "log_var",
        global_shape: Sequence[int] | None = None,
        global_offset: Sequence[int] | None = None,
    ) -> Tensor:
        def call(operands: Sequence[Tensor], key: Tensor, block: Sequence[Any]) -> Tensor:
            return op(*operands, key, form, *block)  # type: ignore[no-any-return]

        return _over_batch(call, (x, scale), key, (global_shape, global_offset))

    return rule


def _batched_divergence(op: Any) -> Callable[..., Tensor]:
    return lambda x, log_var: _over_batch(lambda operands, *_: op(*operands), (x, log_var))


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
    return _over_batch(call, (example,), key, (global_shape, global_offset))


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


for _form, _rule in ((SAMPLE["log_var"], _batched_sample), (KL_DIVERGENCE, _batched_divergence)):
    for _name, _function in ((_form.forward, Forward), (_form.backward, Backward)):
        _differentiated(_name, _function)  # of every form: they share their ops
        _ops.library.impl(_name, _rule(getattr(_ops, _name)), "FuncTorchBatched")
for _name in ("sample", "sample_fresh"):
    _differentiated_draw(_name)
_ops.library.impl("noise", _batched_noise, "FuncTorchBatched")
_ops.library.impl("derive", _batched_derive, "FuncTorchBatched")
