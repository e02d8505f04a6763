"""The ops as Triton kernels: GPUs of NVIDIA, AMD and Intel that the CUDA kernels do not serve.

The bits are those of csrc and reference.py in float32 and the half types: every product that is
added is a tl.fma, and the kernels are compiled without contraction. float64 goes through the
device's own log, cos, sin and exp, within a few ULP.

Two kernels: `whole` for contiguous tensors under one key, whose body moves 16 bytes at a time
and whose tail has a path of its own, since a mask would cut every access of the body into
elements; and `elements` for anything else, one counter a lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._draw import DOMAIN, Position
from ._validate import KEY_DTYPES

_LOG = tl.constexpr(reference.LOG)
_SIN = tl.constexpr(reference.SIN)
_COS = tl.constexpr(reference.COS)
_EXP = tl.constexpr(reference.EXP)
_MINUS_2_LN2 = tl.constexpr(reference.MINUS_2_LN2)
_HALF_LOG2E = tl.constexpr(reference.HALF_LOG2E)
_EXPM1 = tl.constexpr(reference.EXPM1)
_LOG2E = tl.constexpr(reference.LOG2E)
_LN2 = tl.constexpr(reference.LN2)
_MAGIC = tl.constexpr(reference.MAGIC)
_DOMAIN = tl.constexpr(DOMAIN)
# 1 / n!, highest n first, down to 1 / 2!
_TAYLOR = tl.constexpr(tuple(1 / math.factorial(n) for n in range(20, 1, -1)))


@triton.jit
def _philox(c0, c1, key0, key1):
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _float(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _signed_to_float(x):
    return x.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _fma(x, y: tl.constexpr, z: tl.constexpr):
    return tl.fma(x, tl.full(x.shape, y, tl.float32), tl.full(x.shape, z, tl.float32))


@triton.jit
def _fma_by(x, y: tl.constexpr, z):
    return tl.fma(x, tl.full(x.shape, y, tl.float32), z)


@triton.jit
def _polynomial(y, coefficients: tl.constexpr, n: tl.constexpr, factor: tl.constexpr):
    p = tl.full(y.shape, coefficients[0] * factor, tl.float32)
    for i in tl.static_range(1, n):
        p = tl.fma(p, y, tl.full(y.shape, coefficients[i] * factor, tl.float32))
    return p


@triton.jit
def _sqrt(x, NEWTON: tl.constexpr):
    """csrc/cuda/root.h says why the step on NVIDIA's estimate is right, and what it saves."""
    if NEWTON:
        y = tl.rsqrt(x)
        s = x * y
        root = tl.fma(tl.fma(-s, s, x), y * 0.5, s)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def _box_muller(w0, w1, NEWTON: tl.constexpr):
    u = _bits(_fma(w0.to(tl.float32), 2.0**-32, 2.0**-33))
    exponent = (u - 0x3F3504F3) & 0xFF800000
    f = _float(u - exponent) - 1.0
    scaled = _fma(_signed_to_float(exponent), _MINUS_2_LN2, 2.0**-60)
    radius = _sqrt(tl.fma(f, _polynomial(f, _LOG, 9, 1.0), scaled), NEWTON)
    doubled = w1 << 1
    x = _signed_to_float(doubled) * (2.0**-32)
    y = x * x
    r = _float(_bits(radius) ^ ((w1 ^ doubled) & 0x80000000))
    return r * _polynomial(y, _COS, 6, 1.0), r * (x * _polynomial(y, _SIN, 5, 1.0))


@triton.jit
def _words(counter, seed):
    """The four words of each counter's block."""
    return _philox(
        counter.to(tl.uint32), (counter >> 32).to(tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def _normals(counter, seed, NEWTON: tl.constexpr):
    """The four float32 normals of each counter."""
    w0, w1, w2, w3 = _words(counter, seed)
    n0, n1 = _box_muller(w0, w1, NEWTON)
    n2, n3 = _box_muller(w2, w3, NEWTON)
    return n0, n1, n2, n3


@triton.jit
def _double(high, low):
    """(2^32 high + low) 2^-64"""
    return (high.to(tl.float64) * 4294967296.0 + low.to(tl.float64)) * 5.421010862427522e-20


@triton.jit
def _normals_double(counter, seed):
    """The two float64 normals of each counter."""
    w0, w1, w2, w3 = _words(counter, seed)
    radius = tl.sqrt(-2.0 * tl.log(_double(w0, w1) + 2.710505431213761e-20))
    # A bare constant would be a float32.
    angle = _double(w2, w3) * tl.full(w2.shape, 6.283185307179586, tl.float64)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _sigma(log_var, factor: tl.constexpr):
    """factor exp(log_var / 2)"""
    if log_var.dtype == tl.float64:
        sigma = tl.exp(log_var * 0.5) * factor
    else:
        x = tl.clamp(log_var, -256.0, 256.0, propagate_nan=tl.PropagateNan.ALL)
        magic = tl.full(x.shape, _MAGIC, tl.float32)
        high = tl.full(x.shape, _HALF_LOG2E[0], tl.float32)
        low = tl.full(x.shape, _HALF_LOG2E[1], tl.float32)
        shifted = tl.fma(x, high, magic)
        t = tl.fma(x, low, tl.fma(x, high, magic - shifted))
        scale = _float(_bits(shifted) << 23)
        sigma = _polynomial(t, _EXP, 8, factor) * scale * scale
    return sigma


@triton.jit
def _exp_parts(x):
    """scale, f, f^2 and r of e^x = 8 scale (1 + f + f^2 r)"""
    clamped = tl.clamp(x, -90.0, 90.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = _fma(clamped, _LOG2E, _MAGIC)
    minus_2h = tl.full(x.shape, _MAGIC, tl.float32) - shifted
    high = tl.full(x.shape, _LN2[0], tl.float32)
    low = tl.full(x.shape, _LN2[1], tl.float32)
    f = tl.fma(minus_2h, low, tl.fma(minus_2h, high, clamped))
    root = _float(_bits(shifted) << 23)
    return root * 0.125 * root, f, f * f, _polynomial(f, _EXPM1, 7, 1.0)


@triton.jit
def _taylor(x):
    """(e^x - 1 - x) / x^2 for x in [-1, 1], in float64"""
    p = tl.full(x.shape, _TAYLOR[0], tl.float64)
    for i in tl.static_range(1, 19):
        p = p * x + tl.full(x.shape, _TAYLOR[i], tl.float64)
    return p


@triton.jit
def _half_exp(x):
    """e^x / 2 in float64, where e^x itself would overflow before"""
    root = tl.exp(x * 0.5)
    return root * (root * 0.5)


@triton.jit
def _half_excess(x):
    """(e^x - 1 - x) / 2"""
    if x.dtype == tl.float64:
        finite = tl.where(x == float("inf"), 0.0, x)
        far = _half_exp(x) - 0.5 - finite * 0.5
        excess = tl.where(tl.abs(x) < 1.0, x * x * _taylor(x) * 0.5, far)
    else:
        scale, f, square, r = _exp_parts(x)
        linear = tl.fma(scale, f, scale - 0.125)
        sum = tl.fma(scale, square * r, _fma_by(x, -0.125, linear))
        excess = tl.abs(sum) * 4.0
    return excess


@triton.jit
def _half_expm1(x):
    """(e^x - 1) / 2"""
    if x.dtype == tl.float64:
        near = (x + x * x * _taylor(x)) * 0.5
        expm1 = tl.where(tl.abs(x) < 1.0, near, _half_exp(x) - 0.5)
    else:
        scale, f, square, r = _exp_parts(x)
        expm1 = tl.fma(scale, tl.fma(square, r, f), scale - 0.125) * 4.0
    return expm1


@triton.jit
def _of_form(scale, FORM: tl.constexpr):
    """sigma of the scale, and the factor by which a gradient of sigma is one of the scale."""
    if FORM == "log_var":
        sigma, factor = _sigma(scale, 1.0), _sigma(scale, 0.5)
    else:
        sigma, factor = scale, 1.0
    return sigma, factor


@triton.jit
def _apply(x, scale, eps, OP: tl.constexpr, FORM: tl.constexpr):
    """z or the divergence of mu, or the scale's gradient of the incoming one."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
        scale = scale.to(tl.float32)
    if OP == "kl_divergence":
        out = tl.fma(x * 0.5, x, _half_excess(scale))
    elif OP == "kl_divergence_backward":
        out = x * _half_expm1(scale)
    elif OP == "sample_backward":
        _, factor = _of_form(scale, FORM)
        out = x * eps * factor
    else:
        sigma, _ = _of_form(scale, FORM)
        out = tl.fma(sigma, eps, x)
    return out


@triton.jit
def _value(x, scale, mask, eps, OP: tl.constexpr, FORM: tl.constexpr):
    """What an op makes of eps and of the operands at these places, which noise does not read."""
    if OP == "noise":
        value = eps
    else:
        value = _apply(tl.load(x, mask=mask), tl.load(scale, mask=mask), eps, OP, FORM)
    return value


@triton.jit
def _run_of_normals(first, seed, BLOCK: tl.constexpr, dtype: tl.constexpr, NEWTON: tl.constexpr):
    """The normals of BLOCK elements from a counter's first on, in the order of the elements.

    A lane computes what it stores 16 bytes of, so that nothing moves between threads.
    """
    if dtype == tl.float64:
        n0, n1 = _normals_double(first + tl.arange(0, BLOCK // 2), seed)
        run = tl.join(n0, n1)
    elif dtype == tl.float32:
        n0, n1, n2, n3 = _normals(first + tl.arange(0, BLOCK // 4), seed, NEWTON)
        run = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    else:
        even = first + 2 * tl.arange(0, BLOCK // 8)
        n0, n1, n2, n3 = _normals(even, seed, NEWTON)
        m0, m1, m2, m3 = _normals(even + 1, seed, NEWTON)
        run = tl.join(
            tl.join(tl.join(n0, m0), tl.join(n2, m2)), tl.join(tl.join(n1, m1), tl.join(n3, m3))
        )
    return run.reshape(BLOCK)


@triton.jit
def _draw(key_ptr, seed, offset, seed_ptr, offset_ptr):
    """The key of this position of a generator (_draw.py), which the first program writes down."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        offset += tl.load(offset_ptr)
    seed = seed.to(tl.uint64)
    offset = (offset.to(tl.uint64) >> 2) ^ _DOMAIN
    if tl.program_id(0) == 0:
        tl.store(key_ptr, seed)
        tl.store(key_ptr + 1, offset)
    return seed, offset


# Types that are written down do not change with a value, which would compile once more.
@triton.jit(do_not_specialize=["numel", "full_blocks", "first_counter", "seed", "offset"])
def whole_kernel(
    x_ptr, scale_ptr, out_ptr, key_ptr, numel, full_blocks, first_counter,
    seed: tl.int64, offset: tl.int64, seed_ptr, offset_ptr,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if key_ptr is None:  # an op without noise
        eps = 0.0
    else:
        if DRAWN:
            seed, offset = _draw(key_ptr, seed, offset, seed_ptr, offset_ptr)
        else:
            seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
        counter = offset + (first // per_counter + first_counter).to(tl.uint64)
        eps = _run_of_normals(counter, seed, BLOCK, dtype, NEWTON)
    i = first + tl.arange(0, BLOCK)
    if tl.program_id(0) < full_blocks:
        value = _value(x_ptr + i, scale_ptr + i, None, eps, OP, FORM)
        tl.store(out_ptr + i, value.to(dtype))
    else:
        inside = i < numel
        value = _value(x_ptr + i, scale_ptr + i, inside, eps, OP, FORM)
        tl.store(out_ptr + i, value.to(dtype), mask=inside)


@triton.jit(
    do_not_specialize=[
        "counters", "segment_numel", "segment_counters", "first_index", "sizes",
        "x_strides", "scale_strides", "out_strides", "index_strides", "key_strides",
        "seed", "offset",
    ]
)  # fmt: skip
def elements_kernel(
    x_ptr, scale_ptr, out_ptr, keys_ptr, counters, segment_numel, segment_counters, first_index,
    sizes, x_strides, scale_strides, out_strides, index_strides, key_strides,
    seed: tl.int64, offset: tl.int64, seed_ptr, offset_ptr,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    c = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = c < counters
    segment = c // segment_counters
    in_segment = c - segment * segment_counters
    # The noise index and the key of the segment's first element
    rest = segment * segment_numel
    index = tl.full(c.shape, first_index, tl.int64)
    key = tl.zeros(c.shape, tl.int64)
    for d in tl.static_range(len(sizes)):  # innermost first
        along = (rest % sizes[d]).to(tl.int64)
        rest = rest // sizes[d]
        index += along * index_strides[d]
        key += along * key_strides[d]
    # A segment may begin within a counter.
    lane_0 = in_segment * per_counter - (index % per_counter).to(INDEX)
    if keys_ptr is None:  # an op without noise
        normals = (0.0, 0.0, 0.0, 0.0)
    else:
        if DRAWN:
            seed, offset = _draw(keys_ptr, seed, offset, seed_ptr, offset_ptr)
        else:
            seed = tl.load(keys_ptr + key, mask=inside)
            offset = tl.load(keys_ptr + key + 1, mask=inside)
        counter = offset + (index // per_counter + in_segment).to(tl.uint64)
        if dtype == tl.float64:
            normals = _normals_double(counter, seed)
        else:
            normals = _normals(counter, seed, NEWTON)
    for j in tl.static_range(per_counter):
        position = lane_0 + j
        mask = inside & (position >= 0) & (position < segment_numel)
        rest = segment * segment_numel + position
        x, scale, out = x_ptr, scale_ptr, out_ptr
        for d in tl.static_range(len(sizes)):
            along = (rest % sizes[d]).to(tl.int64)
            rest = rest // sizes[d]
            x += along * x_strides[d]
            scale += along * scale_strides[d]
            out += along * out_strides[d]
        value = _value(x, scale, mask, normals[j], OP, FORM)
        tl.store(out, value.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n", "total", "key_stride", "data_stride", "first"])
def keys_kernel(
    keys_ptr, data_ptr, out_ptr, n, total, key_stride, data_stride, first: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys derived from n keys, one a lane: of each in turn, by one number or by its own.

    A number is that of the round, from `first` on, plus that in the memory of data, if any.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    child = i // n
    k = i - child * n
    counter = tl.load(keys_ptr + k * key_stride + 1, mask=inside).to(tl.uint64)
    counter += (first + child).to(tl.uint64)
    if data_ptr is not None:
        counter += tl.load(data_ptr + k * data_stride, mask=inside).to(tl.uint64)
    seed = tl.load(keys_ptr + k * key_stride, mask=inside).to(tl.uint64)
    w0, w1, w2, w3 = _words(counter, seed)
    tl.store(out_ptr + 2 * i, (w1.to(tl.uint64) << 32) | w0, mask=inside)
    tl.store(out_ptr + 2 * i + 1, (w3.to(tl.uint64) << 32) | w2, mask=inside)


class Plan(NamedTuple):
    """A launch: of which kernel, over how many programs, with which arguments."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


WARPS = 4
# 16 bytes for each thread four times, as in csrc/cuda/kernels.cuh
_BLOCK_BYTES = 4 * 16 * 32 * WARPS
_BLOCK_COUNTERS = 32 * WARPS


def plan(
    x: Tensor,
    scale: Tensor,
    key: Tensor | None,
    out: Tensor,
    *,
    op: str,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    position: Position | None = None,
) -> Plan:
    """How to compute an op of tensors of one dtype and shape, which is not empty.

    Without a key the op is one without noise; with the position of a generator, the key is
    written and not read. What noise is given as operands is not read.
    """
    if key is None:
        # No element has an index of its own: dimensions go in the order of memory.
        order = sorted(range(out.dim()), key=out.stride, reverse=True)
        x, scale, out = (t.permute(order) for t in (x, scale, out))
    elif key.stride(-1) != 1:
        key = key.contiguous()
    per_counter = 2 if out.dtype == torch.float64 else 4
    numel = out.numel()
    tensors = (x, scale, out)
    constants: dict[str, Any] = {
        "OP": op,
        "FORM": form,
        "NEWTON": out.device.type == "cuda" and torch.version.hip is None,
        "DRAWN": position is not None,
    }
    seed, offset, captured = position or Position(0, 0)
    state = (seed, offset, *(captured or (None, None)))
    index_strides, key_strides, first_index = _numbering(key, out, global_shape, global_offset)
    dims = [d for d in reversed(range(out.dim())) if out.size(d) != 1]
    segment_numel = 1
    for d in dims:
        if index_strides[d] != segment_numel:
            break
        segment_numel *= out.size(d)
    if (
        segment_numel == numel
        and first_index % per_counter == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
    ):
        block = _BLOCK_BYTES // out.element_size()
        programs, full = -(-numel // block), numel // block
        constants["BLOCK"] = block
        return Plan(
            whole_kernel, programs,
            (*tensors, key, numel, full, first_index // per_counter, *state), constants,
        )  # fmt: skip
    # A segment that begins within a counter may end within another.
    segment_counters = (segment_numel + 2 * per_counter - 2) // per_counter
    counters = numel // segment_numel * segment_counters
    constants["BLOCK"] = _BLOCK_COUNTERS
    constants["INDEX"] = tl.int32 if numel < 2**31 - per_counter * _BLOCK_COUNTERS else tl.int64
    # The kernel needs a dimension to make a block of its pointers: one element has one of size 1.
    layout = tuple(tuple(t.stride(d) for d in dims) or (0,) for t in tensors)
    layout += tuple(
        tuple(strides[d] for d in dims) or (0,) for strides in (index_strides, key_strides)
    )
    sizes = tuple(out.size(d) for d in dims) or (1,)
    return Plan(
        elements_kernel,
        -(-counters // _BLOCK_COUNTERS),
        (
            *tensors,
            key,
            counters,
            segment_numel,
            segment_counters,
            first_index,
            sizes,
            *layout,
            *state,
        ),
        constants,
    )


def _numbering(
    key: Tensor | None,
    out: Tensor,
    global_shape: Sequence[int] | None,
    global_offset: Sequence[int] | None,
) -> tuple[list[int], list[int], int]:
    """Each dimension's stride in the noise and in the keys, and the first element's index."""
    batch = 0 if key is None else reference.slice_keys(key, out.shape)[1]
    shape = out.shape if global_shape is None else global_shape
    offset = [0] * out.dim() if global_offset is None else global_offset
    index_strides, key_strides = [0] * out.dim(), [0] * out.dim()
    stride = 1
    for d in reversed(range(batch, out.dim())):
        index_strides[d] = stride
        stride *= shape[d]
    for d in range(batch):
        assert key is not None
        key_strides[d] = key.stride(d) if key.size(d) > 1 else 0
    first = sum(o * s for o, s in zip(offset, index_strides, strict=True))
    return index_strides, key_strides, first


def _output(x: Tensor, scale: Tensor) -> Tensor:
    """For the result, with the dtype, shape and strides of a sum."""
    if x.device != scale.device:
        raise RuntimeError(
            f"reparam_fused: expected tensors on one device, got {x.device} and {scale.device}"
        )
    if x.shape == scale.shape and x.is_contiguous() and scale.is_contiguous():
        # Without asking torch, which on an H200's host took 200 us to answer
        return torch.empty(x.shape, dtype=torch.result_type(x, scale), device=x.device)
    fake = torch.add(x.to("meta"), scale.to("meta"))
    return torch.empty_like(fake, device=x.device)


def _launch(
    op: str,
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    key: Tensor | None = None,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    position: Position | None = None,
) -> Tensor:
    if key is not None:
        if key.dtype not in KEY_DTYPES or key.device != x.device:
            raise RuntimeError(
                f"reparam_fused: expected a uint64 key on {x.device}, "
                f"got {key.dtype} on {key.device}"
            )
        key = key.view(torch.uint64)
    if out.numel() == 0:
        return out
    x, scale = (t.to(out.dtype).expand(out.shape) for t in (x, scale))
    _run(
        plan(
            x, scale, key, out, op=op, form=form,
            global_shape=global_shape, global_offset=global_offset, position=position,
        ),
        out.device,
    )  # fmt: skip
    return out


def _run(plan: Plan, device: torch.device) -> None:
    kernel, programs, arguments, constants = plan
    # Only Triton's own interpreter takes tensors of the CPU.
    on_cpu = device.type == "cpu"
    with nullcontext() if on_cpu else torch.get_device_module(device).device(device):
        kernel[(programs,)](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)


def sample_from_key(mu: Tensor, scale: Tensor, key: Tensor, *options: Any) -> Tensor:
    """z = mu + sigma * eps."""
    return _launch("sample", mu, scale, _output(mu, scale), key, *options)


def sample_at(
    mu: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    captured_seed: Tensor | None = None,
    captured_offset: Tensor | None = None,
    form: str = "log_var",
) -> tuple[Tensor, Tensor]:
    """z and its key, drawn in the kernel at the place of a CUDA generator."""
    z = _output(mu, scale)
    key = torch.empty(2, dtype=torch.uint64, device=mu.device)
    position = Position.of(seed, offset, captured_seed, captured_offset)
    return _launch("sample", mu, scale, z, key, form, position=position), key


def sample_backward(grad_z: Tensor, scale: Tensor | None, key: Tensor, *options: Any) -> Tensor:
    """grad_std = grad_z * eps, or grad_log_var = grad_z * eps * sigma / 2."""
    scale = grad_z if scale is None else scale
    return _launch("sample_backward", grad_z, scale, _output(grad_z, scale), key, *options)


def noise(
    key: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor:
    """eps"""
    out = torch.empty(size, dtype=dtype, device=key.device)
    return _launch("noise", out, out, out, key, "log_var", global_shape, global_offset)


def kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """(mu^2 + e^log_var - 1 - log_var) / 2, of each element."""
    return _launch("kl_divergence", mu, log_var, _output(mu, log_var))


def kl_divergence_backward(grad: Tensor, log_var: Tensor) -> Tensor:
    """grad_log_var = grad (e^log_var - 1) / 2."""
    return _launch("kl_divergence_backward", grad, log_var, _output(grad, log_var))


def keys_plan(
    keys: Tensor, data: Tensor | None, out: Tensor, key_stride: int, data_stride: int, first: int
) -> Plan:
    """How to fill `out`, (count, n, 2), with keys derived from n keys; it is not empty."""
    total = out.numel() // 2
    return Plan(
        keys_kernel,
        -(-total // _BLOCK_COUNTERS),
        (keys, data, out, out.size(1), total, key_stride, data_stride, first),
        {"BLOCK": _BLOCK_COUNTERS},
    )


def derive(keys: Tensor, data: Tensor | None, first: int, num: int) -> Tensor:
    """Children of contiguous keys (m, 2): those of data (n,), or num from `first` on."""
    m = keys.size(0)
    n = m if data is None or data.size(0) == 1 else data.size(0)
    out = torch.empty(num, n, 2, dtype=keys.dtype, device=keys.device)
    if out.numel() > 0:
        strides = 0 if m == 1 else 2, 0 if data is None or data.size(0) == 1 else 1
        _run(keys_plan(keys, data, out, *strides, first), keys.device)
    return out
