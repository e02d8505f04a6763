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


def _arguments(form: Form, key: Tensor | None, block: Block) -> tuple[Any, ...]:
    """What an op of this form takes after x and the scale."""
    if form.name is None:
        return ()
    return (key, form.name) if block is None else (key, form.name, *block)


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
    shape, dtype = ctx.result
    return sum(given[1:], start=given[0]).expand(shape).to(dtype)


def _save(
    ctx: Any,
    form: Form,
    block: Block,
    result: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    key: Tensor | None,
) -> None:
    ctx.form, ctx.block = form, block
    ctx.set_materialize_grads(False)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(x, scale, key)
        ctx.result = result.shape, result.dtype
    ctx.save_for_backward(x, scale, key)


def backward(form: Form, grad: Tensor, scale: Tensor | None, key: Tensor | None, block: Block) -> Tensor:
    """The gradient of the scale, differentiable again."""
    if block is None and not is_compiling():
        result = form.plain_backward(grad, scale, key)
        if result is NotImplemented:
            result = Backward.apply(form, form.plain_backward, grad, scale, key, None)
        if result is not None:
            return result  # type: ignore[no-any-return]
    op = getattr(_ops, form.backward)
    return op(grad, scale, *_arguments(form, key, block))


class Forward(_SingleLevelFunction):
    """f(x, scale), of any form: ``Forward.apply(form, call, x, scale, key, block)``.

    ``call(x, scale, key)`` computes it. Without a key it draws one, and gives (f, key).
    """

    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        call: Callable[..., Any],
        x: Tensor,
        scale: Tensor,
        key: Tensor | None,
        block: Block,
    ) -> Tensor:
        result = call(x, scale, key)
        if key is None and form.name is not None:
            result, key = result
        # Of what the derivatives need, no more than the gradients that are asked for.
        _, _, by_x, by_scale, *_ = ctx.needs_input_grad
        forward = forward_ad._current_level >= 0
        _save(
            ctx,
            form,
            block,
            result,
            x if form.by_x is not None and (by_x or forward) else None,
            scale if form.second is not None and (by_scale or forward) else None,
            key if by_scale or forward else None,
        )
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        by_x = by_scale = None
        if grad is not None:
            x, scale, key = ctx.saved_tensors
            form = ctx.form
            if ctx.needs_input_grad[2]:
                by_x = grad if form.by_x is None else form.by_x(grad, x)
            if ctx.needs_input_grad[3]:
                by_scale = backward(form, grad, scale, key, ctx.block)
        return None, None, by_x, by_scale, None, None

    @staticmethod
    def jvp(
        ctx: Any, _f: None, _c: None, x_t: Tensor | None, scale_t: Tensor | None, *_: None
    ) -> Tensor | None:
        form: Form = ctx.form
        by_x, by_scale = x_t, None
        with _tangents(ctx) as (x, scale, key):
            if x_t is not None and form.by_x is not None:
                by_x = form.by_x(x_t, x)
            if scale_t is not None:
                scale_t = scale_t.expand(ctx.result[0])
                by_scale = backward(form, scale_t, scale, key, ctx.block)
            return _total(ctx, by_x, by_scale)


class Backward(_SingleLevelFunction):
    """The gradient of the scale, of any form: linear in the gradient that comes in.

    By the scale its derivative is made of itself, as the table says: gradients of every
    order are this one op.
    """

    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        call: Callable[..., Tensor],
        grad: Tensor,
        scale: Tensor | None,
        key: Tensor | None,
        block: Block,
    ) -> Tensor:
        result = call(grad, scale, key)
        # Without a scale it is linear in grad, which is then not needed again.
        _save(ctx, form, block, result, None if scale is None else grad, scale, key)
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        by_grad = by_scale = None
        if grad_out is not None:
            grad, scale, key = ctx.saved_tensors
            if ctx.needs_input_grad[2]:
                by_grad = backward(ctx.form, grad_out, scale, key, ctx.block)
            if ctx.needs_input_grad[3]:
                by_scale = _second(ctx, grad_out * grad, scale, key)
        return None, None, by_grad, by_scale, None, None

    @staticmethod
    def jvp(
        ctx: Any, _f: None, _c: None, grad_t: Tensor | None, scale_t: Tensor | None, *_: None
    ) -> Tensor | None:
        by_grad = by_scale = None
        with _tangents(ctx) as (grad, scale, key):
            if grad_t is not None:
                grad_t = grad_t.expand(ctx.result[0])
                by_grad = backward(ctx.form, grad_t, scale, key, ctx.block)
            if scale_t is not None:
                by_scale = _second(ctx, grad * scale_t, scale, key)
            return _total(ctx, by_grad, by_scale)


def _second(ctx: Any, product: Tensor, scale: Tensor, key: Tensor | None) -> Tensor:
    """The derivative of the backward by the scale, times what comes in."""
    second: Callable[[Tensor, Tensor], Tensor] = ctx.form.second
    return second(backward(ctx.form, product, scale, key, ctx.block), product)


# From the dispatcher to the Functions


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd is to see what is done with these."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _below(op: Any, keyset: Any) -> Callable[..., Any]:
    """The op as the dispatcher goes on with it, below autograd."""

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return call


def _apply(function: Any, call: Callable[..., Any], form: Form, *arguments: Any) -> Tensor:
    """function.apply, also within torch.func, of which the dispatcher has entered a level.

    A Function turns both modes of differentiation off for its forward; the next level of
    torch.func is computed there, with those of here.
    """
    grad, forward_grad = torch.is_grad_enabled(), forward_ad._is_fwd_grad_enabled()

    def next_level(*arguments: Any) -> Any:
        with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(forward_grad):
            return call(*arguments)

    allowed = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    try:
        return function.apply(form, next_level, *arguments)  # type: ignore[no-any-return]
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
        below = _below(op, keyset)
        rest = () if key is None else (form, global_shape, global_offset)
        if not _recorded(x, scale):
            keys = () if key is None else (key,)
            return below(x, scale, *keys, *rest)  # type: ignore[no-any-return]

        def call(x: Tensor, scale: Tensor | None, key: Tensor | None) -> Tensor:
            keys = () if key is None else (key,)
            return below(x, scale, *keys, *rest)  # type: ignore[no-any-return]

        row = KL_DIVERGENCE if key is None else SAMPLE.get(form, SAMPLE["log_var"])
        block = None if global_shape is None else (global_shape, global_offset)
        return _apply(function, call, row, x, scale, key, block)

    _ops.library.impl(name, kernel, "Autograd", with_keyset=True)


def _differentiated_draw(name: str) -> None:
    """The same of an op that draws its key, which it returns beside the sample."""
    op = getattr(_ops, name)

    def kernel(
        keyset: Any, mu: Tensor, scale: Tensor, source: Any = None, form: str = "log_var"
    ) -> tuple[Tensor, Tensor]:
        below = _below(op, keyset)
        if not _recorded(mu, scale):
            return below(mu, scale, source, form)  # type: ignore[no-any-return]
        drawn: list[Tensor] = []

        def call(mu: Tensor, scale: Tensor, _: None) -> tuple[Tensor, Tensor]:
            z, key = below(mu, scale, source, form)
            drawn.append(key)
            return z, key

        row = SAMPLE.get(form, SAMPLE["log_var"])
        return _apply(Forward, call, row, mu, scale, None, None), drawn[0]

    _ops.library.impl(name, kernel, "Autograd", with_keyset=True)


# Under vmap the noise is batched if and only if the key is: an element's noise is that of its
# index within its own example.

_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _batch_first(t: Tensor, dim: int | None, rank: int) -> Tensor:
    """The batch, then ones where an example has less than so many dimensions, then those."""
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
    level = _functorch.maybe_current_level()
    *examples, (key, key_dim) = (
        (None, None) if t is None else _functorch._unwrap_batched(t, level)
        for t in (*operands, key)
    )
    size = next(
        (t.shape[d] for t, d in (*examples, (key, key_dim)) if t is not None and d is not None),
        None,
    )
    if size is not None:
        rank = max(t.dim() - (d is not None) for t, d in examples if t is not None)
        operands = [None if t is None else _batch_first(t, d, rank) for t, d in examples]
        if key is not None:
            key = key.unsqueeze(0) if key_dim is None else key.movedim(key_dim, 0)
            key = key.expand(size, *key.shape[1:])
            # The batch may be of the key alone.
            operands[:1] = [t.expand(size, *t.shape[1:]) for t in operands[:1] if t is not None]
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


for _form, _rule in ((SAMPLE["log_var"], _batched_sample), (KL_DIVERGENCE, _batched_divergence)):
    for _name, _function in ((_form.forward, Forward), (_form.backward, Backward)):
        _differentiated(_name, _function)  # of every form: they share their ops
        _ops.library.impl(_name, _rule(getattr(_ops, _name)), "FuncTorchBatched")
for _name in ("sample", "sample_fresh"):
    _differentiated_draw(_name)
_ops.library.impl("noise", _batched_noise, "FuncTorchBatched")
