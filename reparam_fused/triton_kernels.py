"""The ops as Triton kernels: GPUs of NVIDIA, AMD and Intel that the CUDA kernels do not serve.

The bits are those of csrc and reference.py in float32 and the half types: every product that is
added is a tl.fma, and the kernels are compiled without contraction. float64 goes through the
device's own log, cos, sin and exp, within a few ULP.

Two kernels: `whole` for contiguous tensors under one key, whose body moves 16 bytes at a time
and whose tail has a path of its own, since a mask would cut every access of the body into
elements; and `elements` for anything else, one counter a lane. For several samples of each
element there are the same two: a program keeps what its elements have in common, and draws one
sample after the other.
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
from ._forms import FORMS
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
_LOG_TERM = tl.constexpr(reference.LOG_TERM)
_LN2_IN_PLACE = tl.constexpr(reference.LN2_IN_PLACE)
_LN_2_TO_24 = tl.constexpr(reference.LN_2_TO_24)
_LOG1P = tl.constexpr(reference.LOG1P)
_RECIPROCAL = tl.constexpr(reference.RECIPROCAL)
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
def _exponent(x):
    """e of x = 2^e (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)), where it is in the word"""
    return (_bits(x) - 0x3F3504F3) & 0xFF800000


@triton.jit
def _split(x):
    """2^23 e and f of x = 2^e (1 + f), with 1 + f in [sqrt(1/2), sqrt(2))"""
    exponent = _exponent(x)
    return _signed_to_float(exponent), _float(_bits(x) - exponent) - 1.0


@triton.jit
def _box_muller(w0, w1, NEWTON: tl.constexpr):
    exponent, f = _split(_fma(w0.to(tl.float32), 2.0**-32, 2.0**-33))
    scaled = _fma(exponent, _MINUS_2_LN2, 2.0**-60)
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
def _sigma_parts(log_var, factor: tl.constexpr, unit: tl.constexpr = 1.0):
    """p and root of _sigma = p root^2, of which root is finite where sigma is not"""
    if log_var.dtype == tl.float64:
        p = tl.full(log_var.shape, factor, tl.float64)
        root = tl.exp(log_var * (0.25 * unit))
    else:
        limit: tl.constexpr = 300.0 / unit
        x = tl.clamp(log_var, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        magic = tl.full(x.shape, _MAGIC, tl.float32)
        high = tl.full(x.shape, _HALF_LOG2E[0] * unit, tl.float32)
        low = tl.full(x.shape, _HALF_LOG2E[1] * unit, tl.float32)
        shifted = tl.fma(x, high, magic)
        t = tl.fma(x, low, tl.fma(x, high, magic - shifted))
        p = _polynomial(t, _EXP, 8, factor)
        root = _float(_bits(shifted) << 23)
    return p, root


@triton.jit
def _sigma(log_var, factor: tl.constexpr, unit: tl.constexpr = 1.0):
    """factor exp(unit log_var / 2)"""
    if log_var.dtype == tl.float64:
        sigma = tl.exp(log_var * (0.5 * unit)) * factor
    else:
        p, root = _sigma_parts(log_var, factor, unit)
        sigma = p * root * root
    return sigma


@triton.jit
def _log1p(t):
    """ln(1 + t) in float64"""
    # The logarithm of a sum of which t may have lost its end, and that end put right
    sum = t + 1.0
    return tl.where(sum == 1.0, t, tl.log(sum) * (t / (sum - 1.0)))


@triton.jit
def _softplus(rho):
    """ln(1 + e^rho)"""
    t = _sigma(-tl.abs(rho), 1.0, 2.0)
    if rho.dtype == tl.float64:
        softplus = _log1p(t) + tl.maximum(rho, 0.0)
    else:
        softplus = tl.fma(t, _polynomial(t, _LOG1P, 10, 1.0), tl.maximum(rho, 0.0))
    return softplus


@triton.jit
def _minus_inverse_of_sum(t):
    """-1 / (1 + t) of t in [0, 1]"""
    if t.dtype == tl.float64:
        inverse = -1.0 / (t + 1.0)
    else:
        r = _polynomial(t, _RECIPROCAL, 6, 1.0)
        inverse = tl.fma(tl.fma(t, r, r + 1.0), r, r)
    return inverse


@triton.jit
def _sigmoid(rho):
    """1 / (1 + e^-rho)"""
    t = _sigma(-tl.abs(rho), 1.0, 2.0)
    of_sign = tl.where(rho >= 0.0, 1.0, t)
    return tl.abs(of_sign * _minus_inverse_of_sum(t))


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
def _log_parts(s):
    """f, r and rest of ln s = rest + f - f^2 r, in float32"""
    small = s <= 2.0**-126
    shift = tl.where(small, tl.where(s == 0.0, float("-inf"), -_LN_2_TO_24), 0.0)
    return _log_parts_of_normal(tl.where(small, s * 16777216.0, s), shift)


@triton.jit
def _log_parts_of_normal(s, shift):
    """The same of a normal s, with shift added to the logarithm"""
    exponent, f = _split(s)
    return f, _polynomial(f, _LOG_TERM, 9, 1.0), _fma_by(exponent, _LN2_IN_PLACE, shift)


@triton.jit
def _half_excess_of_sigma(s):
    """(s^2 - 1 - ln s^2) / 2"""
    std = tl.abs(s)
    a = std - 1.0
    if s.dtype == tl.float64:
        log_var = tl.log(std) * 2.0
        finite = tl.where(log_var == float("inf"), 0.0, log_var)
        far = a * 0.5 * a + (a - finite * 0.5)
        excess = tl.where(tl.abs(log_var) < 1.0, log_var * log_var * _taylor(log_var) * 0.5, far)
    else:
        f, r, log_rest = _log_parts(std)
        excess = tl.fma(a * 0.5, a, tl.fma(f * f, r, a - f - log_rest))
    return excess


@triton.jit
def _half_excess_slope(s):
    """s - 1 / s"""
    sign = tl.where(s < 0.0, -1.0, 1.0)
    one = tl.full(s.shape, 1.0, s.dtype)
    inverse = one / s if s.dtype == tl.float64 else tl.div_rn(one, s)
    return (tl.abs(s) - 1.0) * (sign + inverse)


@triton.jit
def _of_form(scale, FORM: tl.constexpr):
    """sigma of the scale, and the factor by which a gradient of sigma is one of the scale."""
    if FORM == "log_var":
        sigma, factor = _sigma(scale, 1.0), _sigma(scale, 0.5)
    elif FORM == "log_std":
        sigma = _sigma(scale, 1.0, 2.0)
        factor = sigma
    elif FORM == "rho":
        sigma, factor = _softplus(scale), _sigmoid(scale)
    else:
        sigma, factor = scale, 1.0
    return sigma, factor


@triton.jit
def _numbers(low, high, min_std, BOUNDED: tl.constexpr, dtype: tl.constexpr):
    """The first so many of the bounds, which come as their bits: of a float Triton makes a
    float32."""
    bits: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    number: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    low = low.to(bits).to(number, bitcast=True)
    high = high.to(bits).to(number, bitcast=True)
    min_std = min_std.to(bits).to(number, bitcast=True)
    if BOUNDED == 0:
        numbers = ()
    elif BOUNDED == 2:
        numbers = (low, high)
    else:
        numbers = (low, high, min_std)
    return numbers


@triton.jit
def _within(scale, bounds):
    """The scale, clamped if it is bounded; NaN passes."""
    if len(bounds) > 0:
        scale = tl.clamp(scale, bounds[0], bounds[1], propagate_nan=tl.PropagateNan.ALL)
    return scale


@triton.jit
def _sigma_of(scale, bounds, FORM: tl.constexpr):
    sigma, _ = _of_form(_within(scale, bounds), FORM)
    if len(bounds) == 3:
        sigma += bounds[2]
    return sigma


@triton.jit
def _by_scale(grad, scale, bounds):
    """The gradient of the scale from that of the clamped one: 0 outside of the clamp, and for NaN,
    whatever comes in."""
    if len(bounds) > 0:
        grad = tl.where(scale == _within(scale, bounds), grad, 0.0)
    return grad


@triton.jit
def _chain(grad_sigma, scale, bounds, FORM: tl.constexpr):
    """The gradient of the scale from that of sigma."""
    _, factor = _of_form(_within(scale, bounds), FORM)
    return _by_scale(grad_sigma * factor, scale, bounds)


@triton.jit
def _unit(bounds, FORM: tl.constexpr):
    """How much of ln sigma^2 a unit of the scale is, where sigma is nothing but a power of e;
    else 0."""
    power: tl.constexpr = 1.0 if FORM == "log_var" else 2.0 if FORM == "log_std" else 0.0
    return 0.0 if len(bounds) == 3 else power


@triton.jit
def _excess(scale, bounds, FORM: tl.constexpr):
    """(sigma^2 - 1 - ln sigma^2) / 2"""
    unit: tl.constexpr = _unit(bounds, FORM)
    if unit == 0.0:
        excess = _half_excess_of_sigma(_sigma_of(scale, bounds, FORM))
    else:
        excess = _half_excess(_within(scale, bounds) * unit)
    return excess


@triton.jit
def _excess_backward(grad, scale, bounds, FORM: tl.constexpr):
    """The gradient of the scale from that of the excess."""
    unit: tl.constexpr = _unit(bounds, FORM)
    if unit == 0.0:
        slope = _half_excess_slope(_sigma_of(scale, bounds, FORM))
        result = _chain(grad * slope, scale, bounds, FORM)
    else:
        slope = _half_expm1(_within(scale, bounds) * unit) * unit
        result = _by_scale(grad * slope, scale, bounds)
    return result


@triton.jit
def _registers(x):
    """In the type of the arithmetic."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _apply(x, scale, eps, bounds, OP: tl.constexpr, FORM: tl.constexpr):
    """z or the divergence of mu, or the scale's gradient of the incoming one."""
    x, scale = _registers(x), _registers(scale)
    if OP == "kl_divergence":
        out = tl.fma(x * 0.5, x, _excess(scale, bounds, FORM))
    elif OP == "kl_divergence_backward":
        out = _excess_backward(x, scale, bounds, FORM)
    elif OP == "sample_backward":
        out = _chain(x * eps, scale, bounds, FORM)
    else:
        out = tl.fma(_sigma_of(scale, bounds, FORM), eps, x)
    return out


@triton.jit
def _value(x, scale, mask, eps, bounds, OP: tl.constexpr, FORM: tl.constexpr):
    """What an op makes of eps and of the operands at these places, which noise does not read."""
    if OP == "noise":
        value = eps
    else:
        x, scale = tl.load(x, mask=mask), tl.load(scale, mask=mask)
        value = _apply(x, scale, eps, bounds, OP, FORM)
    return value


@triton.jit
def _normals_of_vectors(counter, seed, WIDTH: tl.constexpr, NEWTON: tl.constexpr):
    """The normals of vectors of so many elements, 2 of them float64, in the order of the elements,
    from the first counter of each."""
    if WIDTH == 2:
        n0, n1 = _normals_double(counter, seed)
        vectors = tl.join(n0, n1)
    elif WIDTH == 4:
        n0, n1, n2, n3 = _normals(counter, seed, NEWTON)
        vectors = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    else:
        n0, n1, n2, n3 = _normals(counter, seed, NEWTON)
        m0, m1, m2, m3 = _normals(counter + 1, seed, NEWTON)
        vectors = tl.join(
            tl.join(tl.join(n0, m0), tl.join(n2, m2)), tl.join(tl.join(n1, m1), tl.join(n3, m3))
        )
    return vectors.reshape(WIDTH * counter.shape[0])


@triton.jit
def _run_of_normals(first, seed, BLOCK: tl.constexpr, dtype: tl.constexpr, NEWTON: tl.constexpr):
    """The normals of BLOCK elements from a counter's first on.

    A lane computes what it stores 16 bytes of, so that nothing moves between threads.
    """
    width: tl.constexpr = 128 // dtype.primitive_bitwidth
    vector = tl.arange(0, BLOCK // width)
    return _normals_of_vectors(first + vector * ((width + 3) // 4), seed, width, NEWTON)


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
@triton.jit(
    do_not_specialize=[
        "numel",
        "full_blocks",
        "first_counter",
        "seed",
        "offset",
        "low",
        "high",
        "min_std",
    ]
)
def whole_kernel(
    x_ptr, scale_ptr, out_ptr, key_ptr, numel, full_blocks, first_counter,
    seed: tl.int64, offset: tl.int64, seed_ptr, offset_ptr,
    low: tl.int64, high: tl.int64, min_std: tl.int64, BOUNDED: tl.constexpr,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    bounds = _numbers(low, high, min_std, BOUNDED, dtype)
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
        value = _value(x_ptr + i, scale_ptr + i, None, eps, bounds, OP, FORM)
        tl.store(out_ptr + i, value.to(dtype))
    else:
        inside = i < numel
        value = _value(x_ptr + i, scale_ptr + i, inside, eps, bounds, OP, FORM)
        tl.store(out_ptr + i, value.to(dtype), mask=inside)


@triton.jit
def _segment_of(c, segment_numel, segment_counters, first_index, sizes, index_strides, key_strides):
    """The segment of a counter, its place there, and where the segment's first element has its
    noise index and its key."""
    segment = c // segment_counters
    in_segment = c - segment * segment_counters
    rest = segment * segment_numel
    index = tl.full(c.shape, first_index, tl.int64)
    key = tl.zeros(c.shape, tl.int64)
    for d in tl.static_range(len(sizes)):  # innermost first
        along = (rest % sizes[d]).to(tl.int64)
        rest = rest // sizes[d]
        index += along * index_strides[d]
        key += along * key_strides[d]
    return segment, in_segment, index, key


@triton.jit
def _step(element, sizes, x, scale, out, x_strides, scale_strides, out_strides):
    """From where the first element of the operands and of the output is, to another."""
    for d in tl.static_range(len(sizes)):
        along = (element % sizes[d]).to(tl.int64)
        element = element // sizes[d]
        x += along * x_strides[d]
        scale += along * scale_strides[d]
        out += along * out_strides[d]
    return x, scale, out


@triton.jit(
    do_not_specialize=[
        "counters", "segment_numel", "segment_counters", "first_index", "sizes",
        "x_strides", "scale_strides", "out_strides", "index_strides", "key_strides",
        "seed", "offset", "low", "high", "min_std",
    ]
)  # fmt: skip
def elements_kernel(
    x_ptr, scale_ptr, out_ptr, keys_ptr, counters, segment_numel, segment_counters, first_index,
    sizes, x_strides, scale_strides, out_strides, index_strides, key_strides,
    seed: tl.int64, offset: tl.int64, seed_ptr, offset_ptr,
    low: tl.int64, high: tl.int64, min_std: tl.int64, BOUNDED: tl.constexpr,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    bounds = _numbers(low, high, min_std, BOUNDED, dtype)
    c = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = c < counters
    segment, in_segment, index, key = _segment_of(
        c, segment_numel, segment_counters, first_index, sizes, index_strides, key_strides
    )
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
        x, scale, out = _step(
            segment * segment_numel + position, sizes,
            x_ptr, scale_ptr, out_ptr, x_strides, scale_strides, out_strides,
        )  # fmt: skip
        value = _value(x, scale, mask, normals[j], bounds, OP, FORM)
        tl.store(out, value.to(dtype), mask=mask)


@triton.jit
def _normals_from(counter, skipped, seed, NEWTON: tl.constexpr, dtype: tl.constexpr):
    """As many normals as a counter has, from one of its lanes on: the last are the next one's."""
    if dtype == tl.float64:
        n0, n1 = _normals_double(counter, seed)
        n2, _ = _normals_double(counter + 1, seed)
        one = skipped == 1
        normals = (tl.where(one, n1, n0), tl.where(one, n2, n1))
    else:
        n0, n1, n2, n3 = _normals(counter, seed, NEWTON)
        n4, n5, n6, _ = _normals(counter + 1, seed, NEWTON)
        two, one = skipped >= 2, skipped % 2 == 1
        n0, n1, n2 = tl.where(two, n2, n0), tl.where(two, n3, n1), tl.where(two, n4, n2)
        n3, n4 = tl.where(two, n5, n3), tl.where(two, n6, n4)
        n0, n1 = tl.where(one, n1, n0), tl.where(one, n2, n1)
        n2, n3 = tl.where(one, n3, n2), tl.where(one, n4, n3)
        normals = (n0, n1, n2, n3)
    return normals


@triton.jit
def _draw_samples(
    x, scale, out, by_x, masks, keys, counter, seed, offset,
    samples, sample_stride, sample_index_stride, sample_key_stride, bounds,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """All samples of the elements at these places, one after the other; or the sums over them of
    what came in for each, which are kept for the end.

    The places are those of each lane of a counter, or those of a whole block.
    """
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    scales, mus, sigmas = (), (), ()
    for j in tl.static_range(len(x)):
        scales += (_registers(tl.load(scale[j], mask=masks[j])),)
        if OP == "sample":
            mus += (_registers(tl.load(x[j], mask=masks[j])),)
            sigmas += (_sigma_of(scales[j], bounds, FORM),)
        else:
            mus += (tl.zeros_like(scales[j]),)
            sigmas += (tl.zeros_like(scales[j]),)
    for k in range(samples):
        sample = tl.cast(k, tl.int64)
        index = sample * sample_index_stride
        if DRAWN:
            word, first = seed, offset
        else:
            key = keys + sample * sample_key_stride
            word, first = tl.load(key), tl.load(key + 1)
        first += counter + (index // per_counter).to(tl.uint64)
        if WHOLE:
            eps = (_run_of_normals(first, word, BLOCK, dtype, NEWTON),)
        elif not ALIGNED:
            eps = _normals_from(first, index % per_counter, word, NEWTON, dtype)
        elif dtype == tl.float64:
            eps = _normals_double(first, word)
        else:
            eps = _normals(first, word, NEWTON)
        if OP == "sample":
            for j in tl.static_range(len(x)):
                z = tl.fma(sigmas[j], eps[j], mus[j])
                tl.store(out[j] + sample * sample_stride, z.to(dtype), mask=masks[j])
        else:
            by_mu, by_sigma = (), ()
            for j in tl.static_range(len(x)):
                grad = _registers(tl.load(x[j] + sample * sample_stride, mask=masks[j]))
                by_mu += (mus[j] + grad,)
                by_sigma += (tl.fma(grad, eps[j], sigmas[j]),)
            mus, sigmas = by_mu, by_sigma
    if OP != "sample":
        for j in tl.static_range(len(x)):
            grad_scale = _chain(sigmas[j], scales[j], bounds, FORM)
            tl.store(out[j], grad_scale.to(dtype), mask=masks[j])
            tl.store(by_x[j], mus[j].to(dtype), mask=masks[j])


@triton.jit(
    do_not_specialize=[
        "counters", "segment_numel", "segment_counters", "first_index", "sizes",
        "x_strides", "scale_strides", "out_strides", "index_strides", "key_strides",
        "samples", "sample_stride", "sample_index_stride", "sample_key_stride",
        "seed", "offset", "low", "high", "min_std",
    ]
)  # fmt: skip
def samples_kernel(
    x_ptr, scale_ptr, out_ptr, keys_ptr, by_x_ptr,
    counters, segment_numel, segment_counters, first_index,
    sizes, x_strides, scale_strides, out_strides, index_strides, key_strides,
    samples: tl.int32, sample_stride: tl.int64, sample_index_stride: tl.int64,
    sample_key_stride: tl.int64, seed: tl.int64, offset: tl.int64, seed_ptr, offset_ptr,
    low: tl.int64, high: tl.int64, min_std: tl.int64, BOUNDED: tl.constexpr,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    ALIGNED: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    bounds = _numbers(low, high, min_std, BOUNDED, dtype)
    # The counters of the first sample
    c = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    segment, in_segment, index, key = _segment_of(
        c, segment_numel, segment_counters, first_index, sizes, index_strides, key_strides
    )
    lane_0 = in_segment * per_counter - (index % per_counter).to(INDEX)
    x, scale, out, by_x, masks = (), (), (), (), ()
    for j in tl.static_range(per_counter):
        position = lane_0 + j
        masks += ((c < counters) & (position >= 0) & (position < segment_numel),)
        zero = tl.zeros(c.shape, tl.int64)
        to_x, to_scale, to_out = _step(
            segment * segment_numel + position, sizes,
            zero, zero, zero, x_strides, scale_strides, out_strides,
        )  # fmt: skip
        x += (x_ptr + to_x,)
        scale += (scale_ptr + to_scale,)
        out += (out_ptr + to_out,)
        by_x += (by_x_ptr + to_out,)
    if DRAWN:
        seed, offset = _draw(keys_ptr, seed, offset, seed_ptr, offset_ptr)
    # A counter beyond the last one has the key of some other.
    _draw_samples(
        x, scale, out, by_x, masks, keys_ptr + key,
        (index // per_counter + in_segment).to(tl.uint64), seed, offset,
        samples, sample_stride, sample_index_stride, sample_key_stride, bounds,
        OP, FORM, NEWTON, DRAWN, False, ALIGNED, BLOCK, dtype,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "numel", "full_blocks", "first_counter",
        "samples", "sample_vectors", "sample_index_stride",
        "seed", "offset", "low", "high", "min_std",
    ]
)  # fmt: skip
def whole_samples_kernel(
    x_ptr, scale_ptr, out_ptr, key_ptr, by_x_ptr, numel, full_blocks, first_counter,
    samples: tl.int32, sample_vectors: tl.int64, sample_index_stride: tl.int64,
    seed: tl.int64, offset: tl.int64, seed_ptr, offset_ptr,
    low: tl.int64, high: tl.int64, min_std: tl.int64, BOUNDED: tl.constexpr,
    OP: tl.constexpr, FORM: tl.constexpr, NEWTON: tl.constexpr, DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    bounds = _numbers(low, high, min_std, BOUNDED, dtype)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    counter = (first // per_counter + first_counter).to(tl.uint64)
    if DRAWN:
        seed, offset = _draw(key_ptr, seed, offset, seed_ptr, offset_ptr)
    i = first + tl.arange(0, BLOCK)
    # Of a product Triton sees that each sample begins with 16 bytes of its own.
    stride = sample_vectors * (128 // dtype.primitive_bitwidth)
    if tl.program_id(0) < full_blocks:
        _draw_samples(
            (x_ptr + i,), (scale_ptr + i,), (out_ptr + i,), (by_x_ptr + i,), (None,),
            key_ptr, counter, seed, offset, samples, stride, sample_index_stride, 0, bounds,
            OP, FORM, NEWTON, DRAWN, True, True, BLOCK, dtype,
        )  # fmt: skip
    else:
        _draw_samples(
            (x_ptr + i,), (scale_ptr + i,), (out_ptr + i,), (by_x_ptr + i,), (i < numel,),
            key_ptr, counter, seed, offset, samples, stride, sample_index_stride, 0, bounds,
            OP, FORM, NEWTON, DRAWN, True, True, BLOCK, dtype,
        )  # fmt: skip


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


class _Places(NamedTuple):
    """Of the elements of a call, how they lie and how they are numbered, innermost first."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of each tensor, in the noise, and in the keys
    # In a segment elements share a key and have noise indices in a row.
    segment_numel: int
    first_index: int

    @staticmethod
    def of(
        tensors: Sequence[Tensor],
        index_strides: Sequence[int],
        key_strides: Sequence[int],
        first_index: int,
    ) -> _Places:
        shape = tensors[0].shape
        dims = [d for d in reversed(range(len(shape))) if shape[d] != 1]
        segment_numel = 1
        for d in dims:
            if index_strides[d] != segment_numel:
                break
            segment_numel *= shape[d]
        # The kernel needs a dimension to make a block of its pointers: one element has one of
        # size 1.
        strides = (*(t.stride() for t in tensors), index_strides, key_strides)
        return _Places(
            tuple(shape[d] for d in dims) or (1,),
            tuple(tuple(of[d] for d in dims) or (0,) for of in strides),
            segment_numel,
            first_index,
        )

    def are_whole(self, tensors: Sequence[Tensor], per_counter: int) -> bool:
        """Whether they are one segment of whole counters, and lie alike in 16 bytes."""
        return (
            self.segment_numel == tensors[0].numel()
            and self.first_index % per_counter == 0
            and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        )

    def by_counters(self, numel: int, per_counter: int) -> tuple[int, tuple[Any, ...], Any]:
        """The counters, the arguments that say what is theirs, and the type for indices."""
        # A segment that begins within a counter may end within another.
        segment_counters = (self.segment_numel + 2 * per_counter - 2) // per_counter
        counters = numel // self.segment_numel * segment_counters
        arguments = (counters, self.segment_numel, segment_counters, self.first_index)
        small = numel < 2**31 - per_counter * _BLOCK_COUNTERS
        return counters, (*arguments, self.sizes, *self.strides), tl.int32 if small else tl.int64


def _constants(op: str, form: str, device: torch.device, position: Position | None) -> Any:
    return {
        "OP": op,
        "FORM": form,
        "NEWTON": device.type == "cuda" and torch.version.hip is None,
        "DRAWN": position is not None,
    }


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
    bounds: Sequence[float] | None = None,
    position: Position | None = None,
    samples: bool = False,
) -> Plan:
    """How to compute an op of tensors of one dtype and shape, which is not empty; of samples whose
    dimension is one like others.

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
    constants = _constants(op, form, out.device, position)
    numbers, constants["BOUNDED"] = _numbers_of(bounds, out.dtype, op, form)
    state = (*_state(position), *numbers)
    numbering = _numbering(key, out.shape, global_shape, global_offset, samples)
    places = _Places.of(tensors, *numbering)
    if places.are_whole(tensors, per_counter):
        block = _BLOCK_BYTES // out.element_size()
        programs, full = -(-numel // block), numel // block
        constants["BLOCK"] = block
        return Plan(
            whole_kernel, programs,
            (*tensors, key, numel, full, places.first_index // per_counter, *state), constants,
        )  # fmt: skip
    counters, arguments, constants["INDEX"] = places.by_counters(numel, per_counter)
    constants["BLOCK"] = _BLOCK_COUNTERS
    return Plan(
        elements_kernel, -(-counters // _BLOCK_COUNTERS),
        (*tensors, key, *arguments, *state), constants,
    )  # fmt: skip


def samples_plan(
    x: Tensor,
    scale: Tensor,
    key: Tensor,
    out: Tensor,
    by_x: Tensor | None = None,
    *,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
    position: Position | None = None,
) -> Plan:
    """As plan, of several samples of each element, a dimension before the others: of out or, with
    a second result, the sum of what comes in, of x."""
    if key.stride(-1) != 1:
        key = key.contiguous()
    drawn = out if by_x is None else x
    (index_stride, *index_strides), (key_stride, *key_strides), first_index = _numbering(
        key, drawn.shape, global_shape, global_offset, samples=True
    )
    # As arguments they are those of all samples, to be looked at those of one.
    pointers = (x, scale, out, key, out if by_x is None else by_x)
    numel = scale.numel()
    one = drawn[0] if drawn.size(0) > 0 else scale
    tensors = (x, scale, one) if by_x is None else (one, scale, out)
    places = _Places.of(tensors, index_strides, key_strides, first_index)
    per_counter = 2 if out.dtype == torch.float64 else 4
    aligned = index_stride % per_counter == 0
    op = "sample" if by_x is None else "sample_backward"
    constants = _constants(op, form, out.device, position)
    numbers, constants["BOUNDED"] = _numbers_of(bounds, out.dtype, op, form)
    state = (*_state(position), *numbers)
    count, stride, per_vector = drawn.size(0), drawn.stride(0), 16 // out.element_size()
    whole = places.are_whole(tensors, per_counter) and stride % per_vector == 0
    if whole and aligned and key_stride == 0:
        block = _BLOCK_BYTES // 4 // out.element_size()
        programs, full = -(-numel // block), numel // block
        constants["BLOCK"] = block
        return Plan(
            whole_samples_kernel, programs,
            (
                *pointers, numel, full, first_index // per_counter,
                count, stride // per_vector, index_stride, *state,
            ),
            constants,
        )  # fmt: skip
    counters, arguments, constants["INDEX"] = places.by_counters(numel, per_counter)
    constants["ALIGNED"] = aligned
    constants["BLOCK"] = _BLOCK_COUNTERS
    return Plan(
        samples_kernel, -(-counters // _BLOCK_COUNTERS),
        (*pointers, *arguments, count, stride, index_stride, key_stride, *state), constants,
    )  # fmt: skip


def _state(position: Position | None) -> tuple[Any, ...]:
    """Of a generator, as arguments of a kernel."""
    seed, offset, captured = position or Position(0, 0)
    return (seed, offset, *(captured or (None, None)))


def _numbers_of(
    bounds: Sequence[float] | None, dtype: torch.dtype, op: str, form: str
) -> tuple[list[int], int]:
    """The bits of the bounds, and how many of them count: what is added to sigma does not where
    there is no need of sigma, in divergences of a power of e."""
    if bounds is None:
        return [0, 0, 0], 0
    double = dtype == torch.float64
    kind, bits = (torch.float64, torch.int64) if double else (torch.float32, torch.int32)
    numbers = torch.tensor(bounds, dtype=kind, device="cpu").view(bits).tolist()
    needs_sigma = op in ("sample", "sample_backward") or FORMS[form].log_var == 0 or bounds[2] != 0
    return numbers, 3 if needs_sigma else 2


def _numbering(
    key: Tensor | None,
    shape: torch.Size,
    global_shape: Sequence[int] | None,
    global_offset: Sequence[int] | None,
    samples: bool = False,
) -> tuple[list[int], list[int], int]:
    """Each dimension's stride in the noise and in the keys, and the first element's index.

    One key for all samples does not tell them apart: they are numbered within the slices of the
    others.
    """
    batch = 0 if key is None else reference.slice_keys(key, shape)[1]
    whole = shape if global_shape is None else global_shape
    offset = [0] * len(shape) if global_offset is None else global_offset
    index_strides, key_strides = [0] * len(shape), [0] * len(shape)
    stride = 1
    for d in reversed(range(len(shape))):
        if d >= batch or (d == 0 and samples and key is not None and key.size(0) == 1):
            index_strides[d] = stride
            stride *= whole[d]
    for d in range(batch):
        assert key is not None
        key_strides[d] = key.stride(d) if key.size(d) > 1 else 0
    first = sum(o * s for o, s in zip(offset, index_strides, strict=True))
    return index_strides, key_strides, first


class _Layout(NamedTuple):
    """Of a result; without strides it is contiguous."""

    shape: Sequence[int]
    strides: Sequence[int] | None
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, scale: Tensor, samples: int | None = None) -> _Layout:
        """That of a sum, or of so many samples of it."""
        if x.device != scale.device:
            raise RuntimeError(
                f"reparam_fused: expected tensors on one device, got {x.device} and {scale.device}"
            )
        if x.shape == scale.shape and x.is_contiguous() and scale.is_contiguous():
            # Without asking torch, which on an H200's host took 200 us to answer
            shape = x.shape if samples is None else (samples, *x.shape)
            return _Layout(shape, None, torch.result_type(x, scale))
        fake = torch.add(x.to("meta"), scale.to("meta"))
        if samples is not None:
            fake = reference.output_of_samples(fake, samples)
        return _Layout(fake.shape, None if fake.is_contiguous() else fake.stride(), fake.dtype)

    def tensor(self, device: torch.device) -> Tensor:
        if self.strides is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


def _output(x: Tensor, scale: Tensor, samples: int | None = None) -> Tensor:
    """For the result, with the dtype, shape and strides of a sum; of so many samples of it."""
    return _Layout.of(x, scale, samples).tensor(x.device)


def _checked(key: Tensor, device: torch.device) -> Tensor:
    if key.dtype not in KEY_DTYPES or key.device != device:
        raise RuntimeError(
            f"reparam_fused: expected a uint64 key on {device}, got {key.dtype} on {key.device}"
        )
    return key.view(torch.uint64)


def _launch(
    op: str,
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    key: Tensor | None = None,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
    samples: int | None = None,
    *,
    position: Position | None = None,
) -> Tensor:
    key = None if key is None else _checked(key, x.device)
    if out.numel() == 0:
        return out
    # As csrc/layout.h says: of few elements a GPU takes many samples faster side by side.
    in_turn = samples is not None and (samples <= 16 or out.numel() // samples >= 2**16)
    shape = out.shape[1:] if in_turn else out.shape
    x, scale = (t.to(out.dtype).expand(shape) for t in (x, scale))
    options: dict[str, Any] = {
        "form": form, "global_shape": global_shape, "global_offset": global_offset,
        "bounds": bounds, "position": position,
    }  # fmt: skip
    if in_turn:
        assert key is not None
        launch = samples_plan(x, scale, key, out, **options)
    else:
        launch = plan(x, scale, key, out, op=op, samples=samples is not None, **options)
    _run(launch, out.device)
    return out


def _run(plan: Plan, device: torch.device) -> None:
    kernel, programs, arguments, constants = plan
    # Only Triton's own interpreter takes tensors of the CPU.
    on_cpu = device.type == "cpu"
    with nullcontext() if on_cpu else torch.get_device_module(device).device(device):
        kernel[(programs,)](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)


def sample_from_key(
    mu: Tensor,
    scale: Tensor,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
    samples: int | None = None,
) -> Tensor:
    """z = mu + sigma * eps."""
    z = _output(mu, scale, samples)
    return _launch("sample", mu, scale, z, key, form, global_shape, global_offset, bounds, samples)


def sample_at(
    mu: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    captured_seed: Tensor | None = None,
    captured_offset: Tensor | None = None,
    form: str = "log_var",
    bounds: Sequence[float] | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    """z and its key, drawn in the kernel at the place of a CUDA generator."""
    z = _output(mu, scale, samples)
    key = torch.empty(2, dtype=torch.uint64, device=mu.device)
    position = Position.of(seed, offset, captured_seed, captured_offset)
    _launch("sample", mu, scale, z, key, form, None, None, bounds, samples, position=position)
    return z, key


def sample_backward(grad_z: Tensor, scale: Tensor | None, key: Tensor, *options: Any) -> Tensor:
    """grad_scale = grad_z * eps * dsigma / dscale."""
    scale = grad_z if scale is None else scale
    return _launch("sample_backward", grad_z, scale, _output(grad_z, scale), key, *options)


def samples_backward(
    grad_z: Tensor,
    scale: Tensor | None,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums over samples of grad_z, and of its products with eps as a gradient of the scale."""
    one = grad_z[0] if grad_z.size(0) > 0 else grad_z.new_empty(grad_z.shape[1:])
    scale = one if scale is None else scale
    grad_mu, grad_scale = _output(one, scale), _output(one, scale)
    key = _checked(key, grad_z.device)
    if grad_mu.numel() > 0:
        shape = grad_mu.shape
        grad_z = grad_z.to(grad_mu.dtype).expand(grad_z.size(0), *shape)
        launch = samples_plan(
            grad_z, scale.to(grad_mu.dtype).expand(shape), key, grad_scale, grad_mu, form=form,
            global_shape=global_shape, global_offset=global_offset, bounds=bounds,
        )  # fmt: skip
        _run(launch, grad_z.device)
    return grad_mu, grad_scale


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


def kl_divergence(
    mu: Tensor, scale: Tensor, form: str = "log_var", bounds: Sequence[float] | None = None
) -> Tensor:
    """(mu^2 + sigma^2 - 1 - ln sigma^2) / 2, of each element."""
    out = _output(mu, scale)
    return _launch("kl_divergence", mu, scale, out, form=form, bounds=bounds)


def kl_divergence_backward(
    grad: Tensor, scale: Tensor, form: str = "log_var", bounds: Sequence[float] | None = None
) -> Tensor:
    """grad_scale = grad (sigma - 1 / sigma) dsigma / dscale."""
    out = _output(grad, scale)
    return _launch("kl_divergence_backward", grad, scale, out, form=form, bounds=bounds)


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


# What has a file of its own, which takes from this one


def head(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The sample and the sums of its terms."""
    from . import triton_head

    return triton_head.head(*arguments)


def head_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of mu, scale, loc and prior."""
    from . import triton_head

    return triton_head.head_backward(*arguments)
