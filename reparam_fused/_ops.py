"""The ops, declared once: schemas, fake kernels, and who computes them where.

    sample_from_key(mu, scale, key, ...) -> z
    sample_backward(grad_z, scale, key, ...) -> grad_scale
    samples_backward(grad_z, scale, key, ...) -> (grad_mu, grad_scale)
    noise(key, size, dtype, ...) -> eps
    kl_divergence(mu, scale, ...) -> kl
    kl_divergence_backward(grad, scale, ...) -> grad_scale
    head(mu, scale, key, loc, prior, ...) -> (z, total)
    head_backward(mu, scale, key, loc, prior, grad_z, grad_total, ...) -> gradients
    derive(keys, data, first, num) -> keys
    draw_key(mu, scale, fresh=None, generator=None, ...) -> key
    sample(mu, scale, generator=None, ...) -> (z, key)
    sample_fresh(mu, scale, fresh, ...) -> (z, key)
    sample_at(mu, scale, seed, offset, ...) -> (z, key)
    traced_sample(mu, scale, ...) -> z

The first nine are pure functions: randomness enters only through the key. `sample` draws a
key, on a GPU in the kernel that uses it: at the place of a generator that `sample_at` is
told. `sample_fresh` is `sample` in a graph, where an empty tensor of its own keeps two calls
from being merged into one; `traced_sample` gives it that tensor.

`form` says what the scale is, a row of _forms.py; `bounds` are the low and the high end of a
clamp of it, and what is added to sigma. A backward that does not depend on the scale takes
None. (global_shape, global_offset) is the block's place in a larger tensor, of whose noise it
takes its part. `samples` of each element are a dimension of z before the others, over which
`samples_backward` sums. A key is a uint64 or int64 tensor, of the same 128 bits.

`head` gives beside the sample the sums of a `term` over the last `summed` dimensions, float32 for
the half types: of kl_divergence, from N(0, 1) or from a prior of mean loc, whose scale has a form
and bounds of its own, without a key also without a sample; of log_prob, that of the sample; or of
tanh_log_prob, of which z is the tanh of the sample. Of its backward, gradients that there are not
are empty, as is in a log_prob that of mu, which is grad_z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _draw, _extensions, _forms, reference
from ._forms import Bounds
from ._validate import DTYPES, KEY_DTYPES, broadcast, layout_of

library = torch.library.Library("reparam_fused", "DEF")
_FORM = "str form='log_var'"
_BLOCK = "SymInt[]? global_shape=None, SymInt[]? global_offset=None"
_BOUNDS = "float[]? bounds=None"
_SAMPLES = f"{_BOUNDS}, SymInt? samples=None"
_OF_HEAD = "Tensor mu, Tensor scale, Tensor? key, Tensor? loc, Tensor? prior"
_OPTIONS_OF_HEAD = (
    f"{_FORM}, str prior_form='std', {_BLOCK}, {_BOUNDS}, float[]? prior_bounds=None, "
    "SymInt? samples=None"
)
_PURE = {
    "sample_from_key": f"(Tensor mu, Tensor scale, Tensor key, {_FORM}, {_BLOCK}, {_SAMPLES})"
    " -> Tensor",
    "sample_backward": f"(Tensor grad_z, Tensor? scale, Tensor key, {_FORM}, {_BLOCK}, {_BOUNDS})"
    " -> Tensor",
    "samples_backward": f"(Tensor grad_z, Tensor? scale, Tensor key, {_FORM}, {_BLOCK}, {_BOUNDS})"
    " -> (Tensor grad_mu, Tensor grad_scale)",
    "noise": f"(Tensor key, SymInt[] size, ScalarType dtype, {_BLOCK}) -> Tensor",
    "kl_divergence": f"(Tensor mu, Tensor scale, {_FORM}, {_BOUNDS}) -> Tensor",
    "kl_divergence_backward": f"(Tensor grad, Tensor scale, {_FORM}, {_BOUNDS}) -> Tensor",
    "head": f"({_OF_HEAD}, str term, int summed, {_OPTIONS_OF_HEAD}) -> (Tensor z, Tensor total)",
    "head_backward": f"({_OF_HEAD}, Tensor? grad_z, Tensor grad_total, str term, int summed, "
    f"{_OPTIONS_OF_HEAD}) -> (Tensor grad_mu, Tensor grad_scale, Tensor grad_loc, "
    "Tensor grad_prior)",
    "derive": "(Tensor keys, Tensor? data, SymInt first, SymInt num) -> Tensor",
}
_DRAWING = {
    "draw_key": "(Tensor mu, Tensor scale, Tensor? fresh=None, Generator? generator=None, "
    "SymInt? samples=None) -> Tensor",
    "sample": f"(Tensor mu, Tensor scale, Generator? generator=None, {_FORM}, {_SAMPLES})"
    " -> (Tensor z, Tensor key)",
    "sample_at": "(Tensor mu, Tensor scale, int seed, int offset, Tensor? captured_seed=None, "
    f"Tensor? captured_offset=None, {_FORM}, {_SAMPLES}) -> (Tensor z, Tensor key)",
    "sample_fresh": f"(Tensor mu, Tensor scale, Tensor fresh, {_FORM}, {_SAMPLES})"
    " -> (Tensor z, Tensor key)",
    "traced_sample": f"(Tensor mu, Tensor scale, {_FORM}, {_SAMPLES}) -> Tensor",
}
#: What head adds up
TERMS = ("kl_divergence", "log_prob", "tanh_log_prob")
_SCHEMAS = _PURE | _DRAWING
_TAGS = {op: [torch.Tag.pt2_compliant_tag] for op in _SCHEMAS}
for _op in _DRAWING:
    _TAGS[_op].append(torch.Tag.nondeterministic_seeded)
for _op, _schema in _SCHEMAS.items():
    library.define(_op + _schema, tags=_TAGS[_op])


# What csrc/call.h checks of a direct call, for the kernels in Python


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"reparam_fused: {message}")


def _check_dtypes(*dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        _require(dtype in DTYPES, f"expected float32, float64, float16 or bfloat16, got {dtype}")


def _check_operands(*tensors: Tensor) -> None:
    """Dense ones of numbers, on one device."""
    _check_there(*tensors)
    for t in tensors:
        _check_dtypes(t.dtype)
        layout = layout_of(t)
        _require(not layout, f"expected a dense tensor (torch.strided), got {layout}")
    _check_devices(*tensors)


def _check_there(*tensors: object) -> None:
    """What the schema calls a Tensor may be None."""
    for t in tensors:
        _require(isinstance(t, Tensor), "expected a tensor, got None")


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """All that there are on one. Fake kernels ask as well: one of meta calls them for all."""
    _check_there(x)
    device = x.device
    for t in others:
        _require(t is None or t.device == device, "expected tensors on one device, got two")


def _check_samples_of(samples: int | None) -> None:
    _require(samples is None or samples >= 0, f"expected samples not to be negative, got {samples}")


def _check_form(form: str, bounds: Sequence[float] | None = None) -> None:
    _require(
        form in _forms.FORMS,
        f"expected form to be {' or '.join(_forms.FORMS)}, got {form}",
    )
    _require(
        bounds is None or len(bounds) == 3,
        f"expected bounds of 3 numbers, got {len(bounds or ())}",
    )


def _check_place(
    shape: Sequence[int],
    key: Tensor,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> None:
    """A key for each slice of an output of this shape, and a block within the whole."""
    expected = f"expected a uint64 key of shape (2,) or (*batch, 2) for {tuple(shape)}"
    _require(isinstance(key, Tensor), f"{expected}, got None")
    _require(not layout_of(key), f"{expected}, got one of {layout_of(key)}")
    batch = key.shape[:-1]
    _require(
        key.dtype in KEY_DTYPES
        and tuple(key.shape[-1:]) == (2,)
        and len(batch) <= len(shape)
        and all(k in (1, n) for k, n in zip(batch, shape, strict=False)),
        f"{expected}, got {key.dtype} {tuple(key.shape)}",
    )
    _require(
        (global_shape is None) == (global_offset is None),
        "expected global_shape and global_offset, or neither",
    )
    if global_shape is None or global_offset is None:
        return
    _require(
        len(global_shape) == len(global_offset) == len(shape),
        f"expected global_shape and global_offset to have the {len(shape)} dimensions of the "
        "output",
    )
    for d, (n, first, whole) in enumerate(zip(shape, global_offset, global_shape, strict=True)):
        _require(
            0 <= first <= whole - n,
            f"dimension {d} of the output, {n} from {first}, is not within {whole}",
        )
    _require(
        math.prod(global_shape) < 2**63,
        f"expected global_shape to have less than 2^63 elements, got {tuple(global_shape)}",
    )


def _check_sample(
    mu: Tensor,
    scale: Tensor,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
    samples: int | None = None,
) -> None:
    _check_operands(mu, scale)
    _check_form(form, bounds)
    _check_samples_of(samples)
    shape: Sequence[int] = broadcast(mu.shape, scale.shape)
    if samples is not None:
        shape = (samples, *shape)
    _check_place(shape, key, global_shape, global_offset)
    _check_devices(mu, key)


def _check_backward(
    grad: Tensor,
    scale: Tensor | None,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
) -> None:
    _check_operands(grad, *([] if scale is None else [scale]))
    _check_form(form, bounds)
    takes_scale = _forms.SAMPLE[form].backward_reads() or bounds is not None
    _require(
        (scale is not None) == takes_scale,
        f"sample_backward takes {'a' if takes_scale else 'no'} scale in the form {form}"
        + (" within bounds" if bounds is not None else ""),
    )
    shape = grad.shape if scale is None else broadcast(grad.shape, scale.shape)
    _check_place(shape, key, global_shape, global_offset)
    _check_devices(grad, key)


def _check_samples(grad: Tensor, *arguments: Any) -> None:
    _check_operands(grad)
    _require(grad.dim() > 0, "expected a dimension of samples, got ()")
    _check_backward(grad, *arguments)


def _check_draw(mu: Tensor, scale: Tensor, samples: int | None) -> None:
    _check_operands(mu, scale)
    _check_samples_of(samples)


def _check_divergence(
    mu: Tensor, scale: Tensor, form: str = "log_var", bounds: Sequence[float] | None = None
) -> None:
    _check_operands(mu, scale)
    _check_form(form, bounds)


def _check_head(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    term: str,
    summed: int,
    form: str = "log_var",
    prior_form: str = "std",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
    prior_bounds: Sequence[float] | None = None,
    samples: int | None = None,
) -> None:
    _check_operands(mu, scale, *(t for t in (loc, prior) if t is not None))
    _check_form(form, bounds)
    _check_form(prior_form, prior_bounds)
    _check_samples_of(samples)
    _require(term in TERMS, f"expected term to be {' or '.join(TERMS)}, got {term}")
    shape: Sequence[int] = broadcast(mu.shape, scale.shape)
    divergence = term == "kl_divergence"
    _require(
        0 <= summed <= len(shape),
        f"expected summed to be 0 to {len(shape)}, got {summed}",
    )
    _require(
        (loc is None) == (prior is None) and (prior is None or divergence),
        "expected loc and prior, of a kl_divergence, or neither",
    )
    _require(
        divergence or key is not None,
        f"expected a key for {term}",
    )
    _require(samples is None or not divergence, "kl_divergence takes no samples")
    if samples is not None:
        shape = (samples, *shape)
    dtype = torch.result_type(mu, scale)
    for t in (loc, prior):
        _require(
            t is None or (t.dtype == dtype and broadcast(t.shape, torch.Size(shape)) == shape),
            f"expected loc and prior of {dtype} that broadcast to {tuple(shape)}",
        )
    if key is not None:
        _check_place(shape, key, global_shape, global_offset)
        _check_devices(mu, key)


def _check_head_backward(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    grad_z: Tensor | None,
    grad_total: Tensor,
    term: str,
    summed: int,
    *options: Any,
) -> None:
    _check_head(mu, scale, key, loc, prior, term, summed, *options)
    _check_operands(mu, grad_total, *([] if grad_z is None else [grad_z]))
    _require((grad_z is None) == (key is None), "expected a key and grad_z, or neither")
    x, *others = (None if t is None else t.to("meta") for t in (mu, scale, key, loc, prior))
    fake: tuple[Tensor, Tensor] = _fake_head(x, *others, term, summed, *options)  # type: ignore[arg-type, call-arg]
    for name, t, like in (("grad_z", grad_z, fake[0]), ("grad_total", grad_total, fake[1])):
        _require(
            t is None or (t.dtype == like.dtype and t.shape == like.shape),
            f"expected {name} of {like.dtype} {tuple(like.shape)}",
        )


def _check_noise(key: Tensor, size: Sequence[int], dtype: torch.dtype, *block: Any) -> None:
    _check_dtypes(dtype)
    _check_place(size, key, *block)


def _check_derive(keys: Tensor, data: Tensor | None, first: int, num: int) -> None:
    expected = "expected contiguous keys (m, 2) and numbers (n) of 64 bits on one device"
    for t in (keys,) if data is None else (keys, data):
        _require(isinstance(t, Tensor) and not layout_of(t), f"{expected}, dense ones")
        holds = t.dtype in KEY_DTYPES and t.is_contiguous() and t.device == keys.device
        _require(holds, f"{expected}, got {t.dtype} {tuple(t.shape)}")
    m = keys.numel() // 2
    n = m if data is None else data.numel()
    _require(
        keys.shape == (m, 2)
        and (num >= 0 if data is None else num == 1)
        and (m == n or 1 in (m, n)),
        f"{expected}, got {keys.dtype} {tuple(keys.shape)}, of each {num}",
    )


def _check_alignment(*arguments: Any) -> None:
    """A GPU faults on such an access, and its context is of no use then."""
    for t in arguments:
        if isinstance(t, Tensor) and t.data_ptr() % t.element_size() != 0:
            raise RuntimeError(
                "reparam_fused: expected a tensor on a GPU to be aligned to its elements, got "
                f"{t.dtype} at {t.data_ptr():#x}"
            )


def _unchecked(*_: Any) -> None:
    pass


_CHECKS: dict[str, Callable[..., None]] = {
    "sample_from_key": _check_sample,
    "sample_backward": _check_backward,
    "samples_backward": _check_samples,
    "noise": _check_noise,
    "kl_divergence": _check_divergence,
    "kl_divergence_backward": _check_divergence,
    "head": _check_head,
    "head_backward": _check_head_backward,
    "derive": _check_derive,
}


def _from_reference(op: str, check: Callable[..., None]) -> Callable[..., Any]:
    """The op in plain torch operations."""
    compute = getattr(reference, op)

    def kernel(x: Tensor, *arguments: Any) -> Any:
        check(x, *arguments)
        _extensions.warn_reference(x.device.type)
        return compute(x, *arguments)

    return kernel


def _from_triton(op: str, check: Callable[..., None]) -> Callable[..., Any]:
    """The op in Triton, which is imported with the first tensor on a GPU."""

    def kernel(x: Tensor, *arguments: Any) -> Any:
        from . import triton_kernels

        check(x, *arguments)
        _check_alignment(x, *arguments)
        return getattr(triton_kernels, op)(x, *arguments)

    return kernel


def _sample(
    mu: Tensor,
    scale: Tensor,
    generator: torch.Generator | None = None,
    form: str = "log_var",
    bounds: Bounds | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    _check_draw(mu, scale, samples)
    _check_form(form, bounds)
    key = _draw.draw_key(mu.device, generator, _draw.blocks(mu, scale, samples))
    return sample_from_key(mu, scale, key, form, None, None, bounds, samples), key


def _sample_on_cuda(
    mu: Tensor,
    scale: Tensor,
    generator: torch.Generator | None = None,
    form: str = "log_var",
    bounds: Bounds | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    _check_there(mu, scale)
    _check_dtypes(mu.dtype, scale.dtype)
    _check_samples_of(samples)
    _check_form(form, bounds)
    with _draw.drawn(mu.device, generator, _draw.blocks(mu, scale, samples)) as position:
        captured = position.captured or (None, None)
        return sample_at(
            mu, scale, position.seed, position.offset, *captured, form, bounds, samples
        )


def _sample_at(
    mu: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    captured_seed: Tensor | None = None,
    captured_offset: Tensor | None = None,
    form: str = "log_var",
    bounds: Bounds | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    given = [t for t in (captured_seed, captured_offset) if t is not None]
    _check_draw(mu, scale, samples)
    _require(
        len(given) in (0, 2)
        and all(
            t.dtype == torch.int64
            and not layout_of(t)
            and t.shape == (1,)
            and t.device == mu.device
            for t in given
        ),
        "expected captured_seed and captured_offset, of one int64 each, or neither",
    )
    position = _draw.Position.of(seed, offset, captured_seed, captured_offset)
    key = _draw.key_at(position, mu.device)
    return sample_from_key(mu, scale, key, form, None, None, bounds, samples), key


def _sample_fresh(mu: Tensor, scale: Tensor, fresh: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return sample(mu, scale, None, *options)


def _traced_sample(mu: Tensor, scale: Tensor, *options: Any) -> Tensor:
    from ._partitioner import drawn_once

    _check_devices(mu, scale)
    with drawn_once():
        fresh = torch.empty((), dtype=torch.int64, device=mu.device)
        return sample_fresh(mu, scale, fresh, *options)[0]


def _draw_key(
    mu: Tensor,
    scale: Tensor,
    fresh: Tensor | None = None,
    generator: torch.Generator | None = None,
    samples: int | None = None,
) -> Tensor:
    _check_there(mu, scale)
    _check_samples_of(samples)
    return _draw.draw_key(mu.device, generator, _draw.blocks(mu, scale, samples))


def _draw_key_on_cuda(
    mu: Tensor,
    scale: Tensor,
    fresh: Tensor | None = None,
    generator: torch.Generator | None = None,
    samples: int | None = None,
) -> Tensor:
    _check_there(mu, scale)
    _check_samples_of(samples)
    blocks = _draw.blocks(mu, scale, samples)
    if blocks == 0:
        return _draw.draw_key(mu.device, generator, 0)
    # By the kernel that draws one element: torch's own operations would take two.
    with _draw.drawn(mu.device, generator, blocks) as position:
        captured = position.captured or (None, None)
        one = mu.as_strided((1,), (1,))
        return sample_at(one, one, position.seed, position.offset, *captured, "std")[1]


def traced_key(mu: Tensor, scale: Tensor, samples: int | None) -> Tensor:
    """A key that is drawn by the graph of torch.compile whenever that is run."""
    fresh = torch.empty((), dtype=torch.int64, device=mu.device)
    return draw_key(mu, scale, fresh, None, samples)


library.impl("draw_key", _draw_key, "CompositeExplicitAutograd")
library.impl("draw_key", _draw_key_on_cuda, "CUDA")

# Composite: dynamo leaves it to what traces the joint graph, which sees the draw itself.
library.impl("traced_sample", _traced_sample, "CompositeImplicitAutograd")
library.impl("sample_fresh", _sample_fresh, "CompositeExplicitAutograd")
library.impl("sample", _sample, "CompositeExplicitAutograd")
library.impl("sample", _sample_on_cuda, "CUDA")

# The compiled library has kernels for CPU and CUDA, which go before those in Python. Where it
# cannot serve a GPU, it leaves a call to the op's overload "python", which is one of those.
for _op, _check in {**_CHECKS, "sample_at": _unchecked}.items():
    _left = f"{_op}.python"
    library.define(_left + _SCHEMAS[_op], tags=_TAGS[_op])
    library.impl(_left, torch.library.fallthrough_kernel, "Autograd")
    _plain = _sample_at if _op == "sample_at" else _from_reference(_op, _check)
    for _name in (_op, _left):
        library.impl(_name, _plain, "CompositeExplicitAutograd")
        if _extensions.has_triton:
            library.impl(_name, _from_triton(_op, _check), "XPU")
            if _name == _left or _extensions.library is None:
                # A ROCm build of torch calls its GPUs cuda too.
                library.impl(_name, _from_triton(_op, _check), "CUDA")


def _fake(x: Tensor, scale: Tensor | None, key: Any = None, *_: Any) -> Tensor:
    # That of a divergence has its form in place of a key.
    _check_devices(x, scale, key if isinstance(key, Tensor) else None)
    return torch.add(x, x if scale is None else scale)  # the same dtype, shape and strides


def _fake_samples(mu: Tensor, scale: Tensor, samples: int | None) -> Tensor:
    _check_devices(mu, scale)
    one = torch.add(mu, scale)
    return one if samples is None else reference.output_of_samples(one, samples)


def _fake_sample_from_key(
    mu: Tensor,
    scale: Tensor,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Bounds | None = None,
    samples: int | None = None,
) -> Tensor:
    _check_devices(mu, key)
    return _fake_samples(mu, scale, samples)


def _fake_samples_backward(
    grad_z: Tensor, scale: Tensor | None, key: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    _check_devices(grad_z, scale, key)
    one = grad_z.new_empty_strided(grad_z.shape[1:], grad_z.stride()[1:])
    return _fake(one, scale), _fake(one, scale)


def _fake_head(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    term: str,
    summed: int,
    form: str = "log_var",
    prior_form: str = "std",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Bounds | None = None,
    prior_bounds: Bounds | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    _check_devices(mu, scale, key, loc, prior)
    one = torch.broadcast_shapes(mu.shape, scale.shape)
    shape = one if samples is None else torch.Size((samples, *one))
    z = mu.new_empty(shape, dtype=torch.add(mu, scale).dtype)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    total = z.new_empty(z.shape[: z.dim() - summed], dtype=dtype)
    return z if key is not None else z.new_empty(0), total


def _fake_head_backward(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    grad_z: Tensor | None,
    grad_total: Tensor,
    term: str,
    summed: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    _check_devices(mu, scale, key, loc, prior, grad_z, grad_total)
    fake = torch.add(mu, scale)
    shape = fake.shape if len(options) < 7 or options[6] is None else (options[6], *fake.shape)
    grad = fake.new_empty(shape)
    none = grad.new_empty(0)
    return (
        none if term == "log_prob" else grad,
        torch.empty_like(grad),
        none.clone() if prior is None else torch.empty_like(grad),
        none.clone() if prior is None else torch.empty_like(grad),
    )


def _fake_draw_key(mu: Tensor, scale: Tensor, fresh: Tensor | None = None, *_: Any) -> Tensor:
    _check_devices(mu, scale, fresh)
    return mu.new_empty((2,), dtype=torch.uint64)


def _fake_noise(key: Tensor, size: Sequence[int], dtype: torch.dtype, *_: Any) -> Tensor:
    return key.new_empty(size, dtype=dtype)


def _fake_sample(
    mu: Tensor,
    scale: Tensor,
    source: object = None,
    form: str = "log_var",
    bounds: Bounds | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Of a generator, or of the tensor that a draw in a graph is given."""
    _check_devices(mu, source if isinstance(source, Tensor) else None)
    return _fake_samples(mu, scale, samples), mu.new_empty((2,), dtype=torch.uint64)


def _fake_sample_at(
    mu: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    captured_seed: Tensor | None = None,
    captured_offset: Tensor | None = None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    _check_devices(mu, captured_seed, captured_offset)
    return _fake_sample(mu, scale, None, *options)


def _fake_derive(keys: Tensor, data: Tensor | None, first: int, num: int) -> Tensor:
    _check_devices(keys, data)
    n = keys.shape[0] if data is None or data.shape[0] == 1 else data.shape[0]
    return keys.new_empty((num, n, 2))


for _op, _result in {
    "sample_from_key": _fake_sample_from_key,
    "samples_backward": _fake_samples_backward,
    **dict.fromkeys(("sample_backward", "kl_divergence", "kl_divergence_backward"), _fake),
    **dict.fromkeys(("sample", "sample_fresh"), _fake_sample),
    "sample_at": _fake_sample_at,
    "noise": _fake_noise,
    "head": _fake_head,
    "head_backward": _fake_head_backward,
    "draw_key": _fake_draw_key,
    "derive": _fake_derive,
}.items():
    torch.library.register_fake(f"reparam_fused::{_op}", _result, lib=library)  # type: ignore[arg-type]


class KeyOp(Protocol):
    def __call__(
        self,
        x: Tensor,
        scale: Any,
        key: Tensor,
        form: str = ...,
        global_shape: Sequence[int] | None = ...,
        global_offset: Sequence[int] | None = ...,
        bounds: Bounds | None = ...,
        samples: int | None = ...,
        /,
    ) -> Tensor: ...


_all: Any = torch.ops.reparam_fused
sample_from_key: KeyOp = _all.sample_from_key.default
sample_backward: KeyOp = _all.sample_backward.default
samples_backward: Callable[..., tuple[Tensor, Tensor]] = _all.samples_backward.default
noise: Callable[..., Tensor] = _all.noise.default
kl_divergence: Callable[..., Tensor] = _all.kl_divergence.default
kl_divergence_backward: Callable[..., Tensor] = _all.kl_divergence_backward.default
head: Callable[..., tuple[Tensor, Tensor]] = _all.head.default
head_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _all.head_backward.default
draw_key: Callable[..., Tensor] = _all.draw_key.default
derive: Callable[[Tensor, Tensor | None, int, int], Tensor] = _all.derive.default
sample: Callable[..., tuple[Tensor, Tensor]] = _all.sample.default
sample_at: Callable[..., tuple[Tensor, Tensor]] = _all.sample_at.default
sample_fresh: Callable[..., tuple[Tensor, Tensor]] = _all.sample_fresh.default
traced_sample: Callable[..., Tensor] = _all.traced_sample.default
