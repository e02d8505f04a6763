"""The head as Triton kernels: the sample, and in the same pass the sums of what its elements add.

The bits are those of csrc and reference.py, as in triton_kernels.py, also those of the sums, whose
order is part of the contract (csrc/common/problem.h): a program adds the strides of a chunk of a
row, or of several short rows, then halves; sums of chunks are the rows of a further launch.

Operands are made dense before: so an element has a row, a column, and no strides. Its noise is
drawn a counter at a time where rows are whole counters of one key, else a counter an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._forms import FORMS, Bounds
from .triton_kernels import (
    _LOG1P,
    Plan,
    _box_muller,
    _by_scale,
    _chain,
    _checked,
    _exponent,
    _float,
    _fma,
    _half_excess,
    _half_excess_of_sigma,
    _half_excess_slope,
    _half_expm1,
    _Layout,
    _log1p,
    _log_parts,
    _log_parts_of_normal,
    _minus_inverse_of_sum,
    _normals_double,
    _normals_of_vectors,
    _numbering,
    _numbers,
    _numbers_of,
    _polynomial,
    _registers,
    _run,
    _sigma,
    _sigma_of,
    _sigma_parts,
    _within,
    _words,
)

_LOG_2 = tl.constexpr((reference.LOG_2, math.log(2)))
_LN_2_TO_152 = tl.constexpr(reference.LN_2_TO_152)
_LEAST = tl.constexpr(reference.LEAST)
_HALF_LOG_2_PI = tl.constexpr((reference.HALF_LOG_2_PI, 0.5 * math.log(2 * math.pi)))


# What an element adds, and its gradients: csrc/common/terms.h. Both scales are log_var, where that
# is what they are but for a factor (BY_LOG_VAR); else sigma.


@triton.jit
def _constant(x, values: tl.constexpr):
    """Of the two values that of x's type; a bare constant would be a float32."""
    return tl.full(x.shape, values[1] if x.dtype == tl.float64 else values[0], x.dtype)


@triton.jit
def _quotient(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _log_var_of(scale, bounds, FORM: tl.constexpr):
    return _within(scale, bounds) * (1.0 if FORM == "log_var" else 2.0)


@triton.jit
def _spread_of(scale, bounds, FORM: tl.constexpr, BY_LOG_VAR: tl.constexpr):
    """log_var or sigma of the scale."""
    return _log_var_of(scale, bounds, FORM) if BY_LOG_VAR else _sigma_of(scale, bounds, FORM)


@triton.jit
def _by_spread(grad, scale, bounds, FORM: tl.constexpr, BY_LOG_VAR: tl.constexpr):
    """The gradient of the scale from that of log_var or sigma."""
    if BY_LOG_VAR:
        result = _by_scale(grad * (1.0 if FORM == "log_var" else 2.0), scale, bounds)
    else:
        result = _chain(grad, scale, bounds, FORM)
    return result


@triton.jit
def _log_sigma(spread, BY_LOG_VAR: tl.constexpr):
    if BY_LOG_VAR:
        log = spread * 0.5
    elif spread.dtype == tl.float64:
        log = tl.log(tl.abs(spread))
    else:
        f, r, rest = _log_parts(tl.abs(spread))
        # NaN and infinity have no exponent.
        log = tl.where(spread * 0.0 == 0.0, tl.fma(f * -f, r, f) + rest, tl.abs(spread))
    return log


@triton.jit
def _over_one(s, t):
    """s / t - 1 of two stds, of an infinite t too"""
    apart = s - t
    return tl.where(apart == float("-inf"), -1.0, _quotient(apart, t))


@triton.jit
def _half_excess_of_ratio(s, t, over):
    """(x^2 - 1 - ln x^2) / 2 of x = s / t, two stds, and over = x - 1"""
    if s.dtype == tl.float64:
        near = _half_excess(_log1p(over) * 2.0)
        x = s / t
        small = (x < 1e-300) & (s > 0.0) & (t < float("inf"))
        log = tl.where(small, tl.log(s) - tl.log(t), tl.log(x))
        far = over * 0.5 * over + (over - tl.where(x == float("inf"), 0.0, log))
        excess = tl.where(tl.abs(over) < 0.25, near, far)
    else:
        # Where x may be no normal number, it is one in other units of both.
        down = _fma(t, 2.0**-76, 2.0**-149)
        far = s + down == down
        x = tl.div_rn(tl.where(far, s * 2.0**76, s), tl.where(far, down, t))
        shift = tl.where(x == 0.0, float("-inf"), tl.where(far, -_LN_2_TO_152, 0.0))
        f, r, rest = _log_parts_of_normal(x, shift)
        power = _float(0x3F800000 - _exponent(x))
        f = tl.where((over >= -0.5) & (over <= 2.0), tl.fma(power, over, power - 1.0), f)
        excess = tl.fma(over * 0.5, over, tl.fma(f * f, r, over - rest - f))
    return excess


@triton.jit
def _distance(mu, loc, t):
    """In units of the prior's std t, and that unit: of equal means 0 even where t is 0."""
    unit = tl.maximum(t, _constant(t, _LEAST), propagate_nan=tl.PropagateNan.ALL)
    return _quotient(mu - loc, unit), unit


@triton.jit
def _divergence(mu, spread, loc, prior, BY_LOG_VAR: tl.constexpr):
    """That from a prior, or without one from N(0, 1)."""
    if loc is None:
        distance = mu
        excess = _half_excess(spread) if BY_LOG_VAR else _half_excess_of_sigma(spread)
    elif BY_LOG_VAR:
        p, root = _sigma_parts(0.0 - prior, 1.0)
        distance = (mu - loc) * root * p * root
        excess = _half_excess(spread - prior)
    else:
        s, t = tl.abs(spread), tl.abs(prior)
        distance, _ = _distance(mu, loc, t)
        excess = _half_excess_of_ratio(s, t, _over_one(s, t))
    return tl.fma(distance * 0.5, distance, excess)


@triton.jit
def _divergence_backward(grad, by_z, mu, spread, loc, prior, BY_LOG_VAR: tl.constexpr):
    """The gradients of mu and of both scales: without a prior with that of the sample, by_z, added
    to that of mu, and of the prior's scale any."""
    if loc is None:
        by_mu = tl.fma(grad, mu, by_z)
        by_spread = grad * (_half_expm1(spread) if BY_LOG_VAR else _half_excess_slope(spread))
        by_prior = grad
    elif BY_LOG_VAR:
        p, root = _sigma_parts(0.0 - prior, 1.0)
        distance, slope = (mu - loc) * root * p * root, _half_expm1(spread - prior)
        by_mu = grad * distance * root * p * root
        by_spread = grad * slope
        by_prior = grad * (distance * -0.5 * distance - slope)
    else:
        t = tl.abs(prior)
        distance, unit = _distance(mu, loc, t)
        over = _over_one(tl.abs(spread), t)
        square = over * (over + 2.0)  # sigma^2 / prior^2 - 1
        by_mu = _quotient(grad * distance, unit)
        by_spread = _quotient(grad * square, spread)
        by_prior = _quotient(grad * (0.0 - tl.fma(distance, distance, square)), prior)
    return by_mu, by_spread, by_prior


@triton.jit
def _log_prob(eps, spread, BY_LOG_VAR: tl.constexpr):
    rest = -_constant(eps, _HALF_LOG_2_PI) - _log_sigma(spread, BY_LOG_VAR)
    return tl.fma(eps * -0.5, eps, rest)


@triton.jit
def _tanh_parts(z):
    """t = e^-2|z|, -1 / (1 + t) and tanh z"""
    x = tl.abs(z) * -2.0
    t = _sigma(x, 1.0, 2.0)
    inverse = _minus_inverse_of_sum(t)
    half = _half_expm1(x) * inverse
    tanh = tl.abs(half + half)
    return t, inverse, tl.where(z >= 0.0, tanh, -tanh)


@triton.jit
def _tanh(z, log_prob):
    """tanh z and its log-density, from that of z."""
    t, _, tanh = _tanh_parts(z)
    near = _constant(z, _LOG_2) - tl.abs(z)
    if z.dtype == tl.float64:
        log = near - _log1p(t)
    else:
        log = tl.fma(-t, _polynomial(t, _LOG1P, 10, 1.0), near)
    return tanh, tl.fma(log, tl.full(z.shape, -2.0, z.dtype), log_prob)


@triton.jit
def _tanh_backward(grad, z, grad_log_prob):
    """The gradient of z from those of tanh z and of its log-density."""
    t, inverse, tanh = _tanh_parts(z)
    return tl.fma(grad, t * 4.0 * inverse * inverse, (tanh + tanh) * grad_log_prob)


# Where the elements of a program are, and their noise


@triton.jit
def _place(
    lane, stride, chunks, PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """The rows and columns of lanes in one of the strides of the program's chunk."""
    program = tl.program_id(0).to(INDEX)
    group = program // chunks
    chunk = program - group * chunks
    row = group if BLOCK == PADDED else group * (BLOCK // PADDED) + lane // PADDED
    return row, (chunk * 4 + stride) * PADDED + lane % PADDED


@triton.jit
def _one_key(key_ptr, WIDTH: tl.constexpr):
    """That of all vectors, if noise comes by vectors."""
    return (tl.load(key_ptr), tl.load(key_ptr + 1)) if WIDTH > 0 else (0, 0)


@triton.jit
def _noise(
    stride, key_ptr, seed, offset, n, chunks, first_index, sizes, index_strides, key_strides,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    NEWTON: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The normals of the elements, by vectors of so many, if any."""
    per_counter: tl.constexpr = 2 if dtype == tl.float64 else 4
    if WIDTH > 0:
        lane = WIDTH * tl.arange(0, BLOCK // WIDTH)
        row, column = _place(lane, stride, chunks, PADDED, BLOCK, INDEX)
        counter = (first_index + row * n + column) // per_counter
        eps = _normals_of_vectors(offset + counter.to(tl.uint64), seed, WIDTH, NEWTON)
    else:
        row, column = _place(tl.arange(0, BLOCK), stride, chunks, PADDED, BLOCK, INDEX)
        rest = row * n + column
        index = tl.full(rest.shape, first_index, tl.int64)
        key = tl.zeros(rest.shape, tl.int64)
        for d in tl.static_range(len(sizes)):  # innermost first; beyond the last one is another
            along = (rest % sizes[d]).to(tl.int64)
            rest = rest // sizes[d]
            index += along * index_strides[d]
            key += along * key_strides[d]
        seed = tl.load(key_ptr + key)
        counter = tl.load(key_ptr + key + 1) + (index // per_counter).to(tl.uint64)
        if dtype == tl.float64:
            n0, n1 = _normals_double(counter, seed)
        else:
            w0, w1, w2, w3 = _words(counter, seed)
            second = index % 4 >= 2
            n0, n1 = _box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), NEWTON)
        eps = tl.where(index % 2 == 0, n0, n1)
    return eps


# Sums


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _halved_twice(x):
    """Two of the steps below with one exchange between warps. In whatever order Triton adds up
    four: there are two that are not 0."""
    x = x.reshape(x.shape[0], 4, x.shape[1] // 4)
    odd = (tl.arange(0, 4) % 2 == 1)[None, :, None]
    even, odd = tl.reduce((tl.where(odd, 0.0, x), tl.where(odd, x, 0.0)), 1, _add_pairs)
    return even + odd


@triton.jit
def _halves(x, TWICE: tl.constexpr, ONCE: tl.constexpr = 0):
    """Of (m, n) the sums (m, 1): v[i] = v[i] + v[i + half], until one is left of up to 32; two
    steps at a time if TWICE, but at this length."""
    for _ in tl.static_range(5):
        if TWICE and x.shape[1] >= 4 and x.shape[1] != ONCE:
            x = _halved_twice(x)
        elif x.shape[1] > 1:
            x = tl.sum(x.reshape(x.shape[0], 2, x.shape[1] // 2), axis=1)
    return x


@triton.jit
def _halves_in_registers(x):
    """The same of up to 4 that are moved there first."""
    if x.shape[1] == 4:
        low, high = tl.split(x.reshape(x.shape[0], 2, 2).permute(0, 2, 1))
        x = low + high
    if x.shape[1] == 2:
        low, high = tl.split(x)
        x = (low + high).reshape(x.shape[0], 1)
    return x


@triton.jit
def _store_sums(
    total_ptr, acc, rows, chunks, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What the lanes of rows, or of their chunks, add up to: by halves over the elements of a
    vector, over 32 vectors, over 4 of those.

    ALIGNED: that is over the elements of a thread, over a warp, over warps. Else an element of a
    thread is 128 after the one before, and it is warps that the 32 begin with, those of the half
    types after a first step.
    """
    ROWS: tl.constexpr = BLOCK // PADDED
    ELEMENTS: tl.constexpr = VECTOR if VECTOR < PADDED else PADDED
    VECTORS: tl.constexpr = 32 if 32 * ELEMENTS < PADDED else PADDED // ELEMENTS
    x = _halves(acc.reshape(BLOCK // ELEMENTS, ELEMENTS), False)
    x = x.reshape(BLOCK // ELEMENTS // VECTORS, VECTORS)
    x = _halves(x, not ALIGNED, 32 if VECTOR == 8 else 0)
    x = x.reshape(ROWS, PADDED // ELEMENTS // VECTORS)
    x = _halves_in_registers(x) if ALIGNED else _halves(x, True)
    # Stored by one of the lanes that have it, so that nothing more moves between warps.
    sums = tl.broadcast_to(x, ROWS, PADDED).reshape(BLOCK)
    lane = tl.arange(0, BLOCK)
    row, column = _place(lane, 0, chunks, PADDED, BLOCK, INDEX)
    first = (row < rows) & (lane % PADDED == 0)
    tl.store(total_ptr + row * chunks + column // (4 * PADDED), sums, mask=first)


@triton.jit(do_not_specialize=["rows", "n", "chunks"])
def sums_kernel(
    terms_ptr, total_ptr, rows, n, chunks,
    STRIDES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sums of rows of n, or of their chunks."""
    acc = tl.zeros((BLOCK,), total_ptr.dtype.element_ty)
    for stride in tl.static_range(STRIDES):
        row, column = _place(tl.arange(0, BLOCK), stride, chunks, PADDED, BLOCK, INDEX)
        inside = (row < rows) & (column < n)
        acc += tl.load(terms_ptr + row * n + column, mask=inside, other=0.0)
    vector: tl.constexpr = 128 // terms_ptr.dtype.element_ty.primitive_bitwidth
    _store_sums(total_ptr, acc, rows, chunks, vector, False, PADDED, BLOCK, INDEX)


_NOT_SPECIALIZED = [
    "rows", "rows_of_one", "units", "chunks", "first_index", "sizes", "index_strides",
    "key_strides", "low", "high", "min_std", "prior_low", "prior_high", "prior_min_std",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def head_kernel(
    mu_ptr, scale_ptr, loc_ptr, prior_ptr, key_ptr, z_ptr, total_ptr,
    rows, rows_of_one, units, chunks, first_index: tl.int64, sizes, index_strides, key_strides,
    low: tl.int64, high: tl.int64, min_std: tl.int64,
    prior_low: tl.int64, prior_high: tl.int64, prior_min_std: tl.int64,
    BOUNDED: tl.constexpr, PRIOR_BOUNDED: tl.constexpr, TERM: tl.constexpr,
    FORM: tl.constexpr, PRIOR_FORM: tl.constexpr, BY_LOG_VAR: tl.constexpr,
    SAMPLES: tl.constexpr, EACH: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    STRIDES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    NEWTON: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = mu_ptr.dtype.element_ty
    bounds = _numbers(low, high, min_std, BOUNDED, dtype)
    prior_bounds = _numbers(prior_low, prior_high, prior_min_std, PRIOR_BOUNDED, dtype)
    n = units * UNIT  # of a product Triton sees that rows begin with vectors of their own
    acc = tl.zeros((BLOCK,), total_ptr.dtype.element_ty)
    seed, offset = _one_key(key_ptr, WIDTH)
    for stride in tl.static_range(STRIDES):
        row, column = _place(tl.arange(0, BLOCK), stride, chunks, PADDED, BLOCK, INDEX)
        inside = (row < rows) & (column < n)
        i = row * n + column
        of_one = row % rows_of_one * n + column if SAMPLES else i
        mu = _registers(tl.load(mu_ptr + of_one, mask=inside))
        scale = _registers(tl.load(scale_ptr + of_one, mask=inside))
        spread = _spread_of(scale, bounds, FORM, BY_LOG_VAR)
        if key_ptr is not None:
            eps = _noise(
                stride, key_ptr, seed, offset, n, chunks,
                first_index, sizes, index_strides, key_strides,
                WIDTH, PADDED, BLOCK, INDEX, NEWTON, dtype,
            )  # fmt: skip
            z = tl.fma(_sigma_of(scale, bounds, FORM), eps, mu)
        if TERM != "kl_divergence":
            terms = _log_prob(eps, spread, BY_LOG_VAR)
        elif loc_ptr is None:
            terms = _divergence(mu, spread, None, None, BY_LOG_VAR)
        else:
            loc = _registers(tl.load(loc_ptr + i, mask=inside))
            prior = _registers(tl.load(prior_ptr + i, mask=inside))
            prior = _spread_of(prior, prior_bounds, PRIOR_FORM, BY_LOG_VAR)
            terms = _divergence(mu, spread, loc, prior, BY_LOG_VAR)
        if TERM == "tanh_log_prob":
            z, terms = _tanh(z, terms)
        if key_ptr is not None:
            tl.store(z_ptr + i, z.to(dtype), mask=inside)
        if EACH:
            tl.store(total_ptr + i, acc + terms, mask=inside)  # which makes +0 of -0
        else:
            acc += tl.where(inside, terms, 0.0)
    if not EACH:
        vector: tl.constexpr = 128 // dtype.primitive_bitwidth
        aligned: tl.constexpr = vector == UNIT
        _store_sums(total_ptr, acc, rows, chunks, vector, aligned, PADDED, BLOCK, INDEX)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def head_backward_kernel(
    mu_ptr, scale_ptr, loc_ptr, prior_ptr, key_ptr, grad_z_ptr, grad_total_ptr,
    by_mu_ptr, by_scale_ptr, by_loc_ptr, by_prior_ptr,
    rows, rows_of_one, units, chunks, first_index: tl.int64, sizes, index_strides, key_strides,
    low: tl.int64, high: tl.int64, min_std: tl.int64,
    prior_low: tl.int64, prior_high: tl.int64, prior_min_std: tl.int64,
    BOUNDED: tl.constexpr, PRIOR_BOUNDED: tl.constexpr, TERM: tl.constexpr,
    FORM: tl.constexpr, PRIOR_FORM: tl.constexpr, BY_LOG_VAR: tl.constexpr,
    SAMPLES: tl.constexpr, EACH: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    STRIDES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    NEWTON: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    bounds = _numbers(low, high, min_std, BOUNDED, dtype)
    prior_bounds = _numbers(prior_low, prior_high, prior_min_std, PRIOR_BOUNDED, dtype)
    n = units * UNIT
    seed, offset = _one_key(key_ptr, WIDTH)
    for stride in tl.static_range(STRIDES):
        row, column = _place(tl.arange(0, BLOCK), stride, chunks, PADDED, BLOCK, INDEX)
        inside = (row < rows) & (column < n)
        i = row * n + column
        of_one = row % rows_of_one * n + column if SAMPLES else i
        if EACH:
            grad = tl.load(grad_total_ptr + i, mask=inside)
        else:
            grad = tl.load(grad_total_ptr + row, mask=row < rows)
        scale = _registers(tl.load(scale_ptr + of_one, mask=inside))
        spread = _spread_of(scale, bounds, FORM, BY_LOG_VAR)
        if TERM != "log_prob":
            mu = _registers(tl.load(mu_ptr + of_one, mask=inside))
        if key_ptr is not None:
            eps = _noise(
                stride, key_ptr, seed, offset, n, chunks,
                first_index, sizes, index_strides, key_strides,
                WIDTH, PADDED, BLOCK, INDEX, NEWTON, dtype,
            )  # fmt: skip
            by_z = _registers(tl.load(grad_z_ptr + i, mask=inside))
        if TERM == "kl_divergence":
            if loc_ptr is None:
                if key_ptr is None:
                    by_z = tl.zeros_like(mu)
                by_mu, by_spread, _ = _divergence_backward(
                    grad, by_z, mu, spread, None, None, BY_LOG_VAR
                )  # fmt: skip
            else:
                loc = _registers(tl.load(loc_ptr + i, mask=inside))
                prior = _registers(tl.load(prior_ptr + i, mask=inside))
                of_prior = _spread_of(prior, prior_bounds, PRIOR_FORM, BY_LOG_VAR)
                by_mu, by_spread, by_prior = _divergence_backward(
                    grad, mu, mu, spread, loc, of_prior, BY_LOG_VAR
                )
                by_prior = _by_spread(by_prior, prior, prior_bounds, PRIOR_FORM, BY_LOG_VAR)
                tl.store(by_loc_ptr + i, (0.0 - by_mu).to(dtype), mask=inside)
                tl.store(by_prior_ptr + i, by_prior.to(dtype), mask=inside)
                if key_ptr is not None:
                    by_mu = by_z + by_mu
        else:
            minus = 0.0 - grad
            by_spread = minus * 0.5 if BY_LOG_VAR else _quotient(minus, spread)
            if TERM == "tanh_log_prob":
                z = tl.fma(_sigma_of(scale, bounds, FORM), eps, mu)
                by_z = _tanh_backward(by_z, z, grad)
                by_mu = by_z
        by_scale = _by_spread(by_spread, scale, bounds, FORM, BY_LOG_VAR)
        if key_ptr is not None:
            by_scale = _chain(by_z * eps, scale, bounds, FORM) + by_scale
        tl.store(by_scale_ptr + i, by_scale.to(dtype), mask=inside)
        if TERM != "log_prob":
            tl.store(by_mu_ptr + i, by_mu.to(dtype), mask=inside)


# Of csrc/common/problem.h: how many vectors a stride has, and strides a chunk
_STRIDE, _STRIDES = 128, 4
# From so many elements on, a thread has 16 of short rows.
_MANY = 2**18


class _Chunks(NamedTuple):
    """How rows of n are cut into chunks and those into strides, and what a program has of them."""

    chunks: int
    programs: int
    constants: dict[str, Any]

    @staticmethod
    def of(rows: int, n: int, dtype: torch.dtype, width: int = 0) -> _Chunks:
        stride = _STRIDE * 16 // dtype.itemsize
        # What is missing is 0: a row may be as short as the next power of two.
        padded = min(max(triton.next_power_of_2(n), width), stride)
        strides = min(-(-n // stride), _STRIDES)
        chunks = -(-n // (_STRIDES * stride))
        many = strides == 1 and rows * padded >= _MANY
        block = max(stride, 2048) if many else stride
        small = rows * n < 2**31 - 4 * _STRIDES * stride
        constants = {
            "STRIDES": strides, "PADDED": padded, "BLOCK": block,
            "INDEX": tl.int32 if small else tl.int64,
        }  # fmt: skip
        return _Chunks(chunks, -(-rows * padded // block) * chunks, constants)


def _merged(
    shape: Sequence[int], index_strides: Sequence[int], key_strides: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The same, innermost first, without the dimensions that another has in it."""
    sizes, indices, keys = [1], [0], [0]
    for n, index, key in zip(shape[::-1], index_strides[::-1], key_strides[::-1], strict=True):
        if n == 1:
            continue
        if sizes[-1] == 1:
            sizes[-1], indices[-1], keys[-1] = n, index, key
        elif (index, key) == (indices[-1] * sizes[-1], keys[-1] * sizes[-1]):
            sizes[-1] *= n
        else:
            sizes.append(n)
            indices.append(index)
            keys.append(key)
    return tuple(sizes), tuple(indices), tuple(keys)


class _Call:
    """A call as the kernels take it: dense operands of one dtype, rows, noise, constants."""

    def __init__(
        self,
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
    ) -> None:
        self.layout, self.device = _Layout.of(mu, scale, samples), mu.device
        shape, dtype = torch.Size(self.layout.shape), self.layout.dtype
        self.rows_shape = shape[: len(shape) - summed]
        one = shape if samples is None else shape[1:]
        if key is not None:
            key = _checked(key, self.device)
            key = key if key.stride(-1) == 1 else key.contiguous()
        self.operands = (*(self.dense(t, one) for t in (mu, scale, loc, prior)), key)
        rows, n = math.prod(self.rows_shape), math.prod(shape[len(shape) - summed :])
        copies = 1 if samples is None else samples
        each = n == 1  # is its own sum: so rows may be as long as memory allows
        if each:
            rows, n = copies, math.prod(one)
        self.empty = rows * n == 0
        if self.empty:
            return
        vector, per_counter = 16 // dtype.itemsize, 2 if dtype == torch.float64 else 4
        whole = [u for u in (vector, per_counter) if n % u == 0]
        # Half a vector a thread has a use where a warp has whole rows (_store_sums).
        unit = next((u for u in whole if u == vector or n <= 32 * u), 1)
        width, noise = 0, (0, (1,), (0,), (0,))
        if key is not None:
            *strides, first = _numbering(
                key, shape, global_shape, global_offset, samples is not None
            )
            noise = (first, *_merged(shape, *strides))
            if noise[2:] == ((1,), (0,)) and first % per_counter == 0:
                width = vector if rows == 1 else max(whole, default=0)
        numbers, bounded = _numbers_of(bounds, dtype, "sample", form)
        prior_numbers, prior_bounded = _numbers_of(prior_bounds, dtype, "sample", prior_form)
        self.split = _Chunks.of(rows, n, dtype, width)
        self.arguments = (
            rows, rows // copies, n // unit, self.split.chunks, *noise, *numbers, *prior_numbers
        )  # fmt: skip
        given = [(form, bounds)] + ([] if prior is None else [(prior_form, prior_bounds)])
        self.constants = {
            "BOUNDED": bounded, "PRIOR_BOUNDED": prior_bounded, "TERM": term,
            "FORM": form, "PRIOR_FORM": prior_form,
            "BY_LOG_VAR": all(FORMS[f].log_var and not (b and b[2]) for f, b in given),
            "SAMPLES": samples is not None, "EACH": each, "UNIT": unit, "WIDTH": width,
            "NEWTON": mu.is_cuda and torch.version.hip is None,
            **self.split.constants,
        }  # fmt: skip

    def dense(self, t: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """In a memory of its own if it is not where vectors of 16 bytes may be."""
        if t is None:
            return None
        t = t.to(self.layout.dtype).expand(shape).contiguous()
        return t if t.data_ptr() % 16 == 0 else t.clone()

    def result(self) -> Tensor:
        return self.layout._replace(strides=None).tensor(self.device)

    def or_empty(self, result: Tensor | None) -> Tensor:
        if result is None:
            return torch.empty(0, dtype=self.layout.dtype, device=self.device)
        return result

    def run(self, kernel: Any, *tensors: Tensor | None) -> None:
        arguments = (*self.operands, *tensors, *self.arguments)
        _run(Plan(kernel, self.split.programs, arguments, self.constants), self.device)


def _add_up(terms: Tensor, total: Tensor) -> None:
    """The sums over the second dimension, which is not empty."""
    rows, n = terms.shape
    chunks, programs, constants = _Chunks.of(rows, n, total.dtype)
    sums = total if chunks == 1 else total.new_empty(rows, chunks)
    _run(Plan(sums_kernel, programs, (terms, sums, rows, n, chunks), constants), total.device)
    if chunks > 1:
        _add_up(sums, total)


def head(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    loc: Tensor | None,
    prior: Tensor | None,
    term: str,
    summed: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The sample and the sums of its terms over the last `summed` dimensions."""
    call = _Call(mu, scale, key, loc, prior, term, summed, *options)
    z = None if key is None else call.result()
    dtype = torch.float64 if call.layout.dtype == torch.float64 else torch.float32
    total = torch.empty(call.rows_shape, dtype=dtype, device=call.device)
    if call.empty:
        return call.or_empty(z), total.zero_()
    chunks = 1 if call.constants["EACH"] else call.split.chunks
    sums = total if chunks == 1 else total.new_empty(total.numel(), chunks)
    call.run(head_kernel, z, sums)
    if chunks > 1:
        _add_up(sums, total)
    return call.or_empty(z), total


def head_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of mu, scale, loc and prior, each of the shape of the sample; empty where
    there is none."""
    call = _Call(mu, scale, key, loc, prior, term, summed, *options)
    by_mu = None if term == "log_prob" else call.result()
    by_scale = call.result()
    by_loc, by_prior = (None if t is None else call.result() for t in (loc, prior))
    if not call.empty:
        call.run(
            head_backward_kernel, call.dense(grad_z, call.layout.shape), grad_total.contiguous(),
            by_mu, by_scale, by_loc, by_prior,
        )  # fmt: skip
    by_mu, by_scale, by_loc, by_prior = map(call.or_empty, (by_mu, by_scale, by_loc, by_prior))
    return by_mu, by_scale, by_loc, by_prior
