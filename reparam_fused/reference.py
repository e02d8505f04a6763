"""The noise contract in plain torch operations: slow, readable, any device.

This is the oracle of the tests and the fallback where nothing is compiled. It
shares no code with csrc, and gives the same bits in float32 and in the rounded
half types; float64 goes through torch's own log, cos, sin and exp, and agrees
within a few ULP.

The stream is that of ``torch.func._random.normal``: Philox-4x32-10 (Salmon et
al., SC11), four normals a counter (two in float64), by Box-Muller. A key is
``(seed, offset)``; element ``i`` takes counter ``offset + i // 4``, lane ``i % 4``.

Examples:
    >>> import torch, reparam_fused
    >>> reparam_fused.reference.noise(reparam_fused.key(42), [3], torch.float32)
    tensor([-0.9702,  0.1940, -1.2356])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _forms

if TYPE_CHECKING:
    from ._forms import Bounds

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

_LOW_WORD = 0xFFFFFFFF


def _coefficients(text: str) -> tuple[float, ...]:
    return tuple(map(float.fromhex, text.split()))


# The float32 polynomials, highest power first, with coefficients that float32 holds.
LOG = _coefficients(
    "-0x1.5d8646p-3 0x1.243c02p-2 -0x1.32bcb8p-2 0x1.53846ep-2 -0x1.98b290p-2 0x1.00038cp-1 "
    "-0x1.555796p-1 0x1.fffffep-1 -0x1p+1"
)
SIN = _coefficients("0x1.3e1420p-4 -0x1.32531ep-1 0x1.4668f0p+1 -0x1.4abbc4p+2 0x1.921fb6p+1")
COS = _coefficients(
    "-0x1.937d98p-6 0x1.e16eacp-3 -0x1.55d24ap+0 0x1.03c1eep+2 -0x1.3bd3ccp+2 0x1p+0"
)
EXP = _coefficients(
    "0x1.02e730p-16 0x1.47eb04p-13 0x1.5d81fap-10 0x1.3b20eep-7 0x1.c6b094p-5 0x1.ebfbf4p-3 "
    "0x1.62e430p-1 0x1p+0"
)
# -2 ln 2, for an exponent that stays in its place; and log2(e) / 2 in two parts
MINUS_2_LN2 = float.fromhex("-0x1.62e430p-23")
HALF_LOG2E = _coefficients("0x1.715476p-1 0x1.4ae0c0p-27")
# (e^f - 1 - f) / f^2; log2(e), and ln 2 in two parts
EXPM1 = _coefficients(
    "0x1.a401b0p-16 0x1.a4fcc0p-13 0x1.6c1300p-10 0x1.110c5ep-7 0x1.555558p-5 0x1.55555ap-3 0x1p-1"
)
LOG2E = float.fromhex("0x1.715476p+0")
LN2 = _coefficients("0x1.62e430p-1 -0x1.05c610p-29")
# (f - ln(1 + f)) / f^2; ln 2 for an exponent that stays in its place, and that of 2^24
LOG_TERM = _coefficients(
    "0x1.3a4ff6p-4 -0x1.048f72p-3 0x1.0cda32p-3 -0x1.22ea5ap-3 0x1.548382p-3 -0x1.99a012p-3 "
    "0x1.00020cp-2 -0x1.555554p-2 0x1.fffffep-2"
)
LN2_IN_PLACE = -MINUS_2_LN2 / 2
LN_2_TO_24 = float.fromhex("0x1.0a2b24p+4")
LN_2_TO_152 = float.fromhex("0x1.a56ef8p+6")
# The least positive numbers of float32 and float64
LEAST = (2.0**-149, 2.0**-1074)
# ln(1 + t) / t; and about -1 / (1 + t)
LOG1P = _coefficients(
    "-0x1.24b298p-8 0x1.9d455ap-6 -0x1.11708cp-4 0x1.d992bcp-4 -0x1.448ee2p-3 0x1.969cb2p-3 "
    "-0x1.ffb95cp-3 0x1.55540cp-2 -0x1.fffffep-2 0x1p+0"
)
RECIPROCAL = _coefficients(
    "0x1.abf7e8p-4 -0x1.abf7e8p-2 0x1.8a8888p-1 -0x1.e826c4p-1 0x1.fe17dap-1 -0x1.fff950p-1"
)
# A sum with it ends in steps of 2
MAGIC = 1.5 * 2.0**24 + 254.0


def philox(counter: Words, seed: Tensor) -> Words:
    """Ten rounds of Philox-4x32 on 32-bit words held in int64; seed is int64, all 64 bits."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW_WORD, (seed >> 32) & _LOW_WORD
    for _ in range(10):
        # int64 products wrap, which leaves the same 64 bits as unsigned ones.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW_WORD) ^ c1 ^ key0,
            product1 & _LOW_WORD,
            ((product0 >> 32) & _LOW_WORD) ^ c3 ^ key1,
            product0 & _LOW_WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _LOW_WORD, (key1 + 0xBB67AE85) & _LOW_WORD
    return c0, c1, c2, c3


def words(key: Tensor, blocks: Tensor) -> Words:
    """The Philox words at ``offset + blocks`` of keys ``(*batch, 2)``: ``(*batch, n)``."""
    seed, offset = key.view(torch.int64).unsqueeze(-1).unbind(-2)
    position = offset + blocks
    zero = torch.zeros_like(position)
    return philox((position & _LOW_WORD, (position >> 32) & _LOW_WORD, zero, zero), seed)


def derive(keys: Tensor, data: Tensor | None, first: int, num: int) -> Tensor:
    """Children of keys ``(m, 2)``: those that data ``(n,)`` names, of which either may be one
    for all of the other, ``(1, max(m, n), 2)``; or, without data, ``num`` from the block
    ``first`` on, ``(num, m, 2)``."""
    if data is None:
        blocks = first + torch.arange(num, device=keys.device)
        w0, w1, w2, w3 = words(keys, blocks)
    else:
        w0, w1, w2, w3 = words(keys, data.view(torch.int64).unsqueeze(-1))
    children = torch.stack([w1 << 32 | w0, w3 << 32 | w2], -1).view(keys.dtype)
    return children.movedim(-2, 0).contiguous()


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32 values, rounded once.

    The product is exact in float64. The sum is not: it is rounded to odd, which
    the rounding to float32 cannot mistake for a tie.
    """
    a, b, c = (x.double() if isinstance(x, Tensor) else x for x in (a, b, c))
    product = torch.as_tensor(a * b)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    to_odd = (error != 0) & total.isfinite() & (bits & 1 == 0)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(to_odd, bits + away, bits).view(torch.float64).float()


def _polynomial(y: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, one fma a coefficient."""
    value = torch.full_like(y, coefficients[0])
    for c in coefficients[1:]:
        value = fma(value, y, c)
    return value


def _exponent(u: Tensor) -> Tensor:
    """e of u = 2^e (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)), where it is in the word."""
    return (u.view(torch.int32) - 0x3F3504F3) & -0x800000


def _split(u: Tensor) -> tuple[Tensor, Tensor]:
    """2^23 e and f of u = 2^e (1 + f), with 1 + f in [sqrt(1/2), sqrt(2))."""
    exponent = _exponent(u)
    return exponent.float(), (u.view(torch.int32) - exponent).view(torch.float32) - 1.0


def _radius(w: Tensor) -> Tensor:
    """sqrt(-2 ln u) with u = (w + 1/2) / 2^32."""
    u = fma(w.float(), 2.0**-32, 2.0**-33)
    exponent, f = _split(u)
    square = fma(f, _polynomial(f, LOG), fma(exponent, MINUS_2_LN2, 2.0**-60))
    # torch.sqrt is off by an ULP in 0.7 % of float32 inputs where it goes through
    # MKL. No float32 has a root within an ULP of float64 of a tie.
    return square.double().sqrt().float()


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two words to two float32 normals: radius times (cos, sin) of 2 pi w1 / 2^32."""
    # Modulo half a turn, as a signed number of 2^-32 half turns; pi x is the angle.
    doubled = (((w1 << 1) + 2**31) & _LOW_WORD) - 2**31
    x = doubled.float() * 2.0**-32
    y = x * x
    sin, cos = x * _polynomial(y, SIN), _polynomial(y, COS)
    odd = (w1 ^ (w1 << 1)) >> 31 & 1
    radius = _radius(w0)
    radius = torch.where(odd == 1, -radius, radius)
    return radius * cos, radius * sin


def _box_muller_double(w: Words) -> tuple[Tensor, Tensor]:
    """Four words to two float64 normals."""
    high0, low0, high1, low1 = (x.double() for x in w)
    u = (high0 * 2.0**32 + low0) * 2.0**-64 + 2.0**-65
    angle = (high1 * 2.0**32 + low1) * 2.0**-64 * (2 * math.pi)
    radius = (-2 * u.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def slice_keys(key: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """One key ``(n, 2)`` for each of the n slices that key tells apart, and a slice's first dim.

    The batch dimensions of a key stand for the leading dimensions of shape;
    trailing ones of size 1 leave their dimension within the slice.
    """
    batch = list(key.shape[:-1])
    while batch and batch[-1] == 1:
        batch.pop()
    keys = key.reshape(*batch, 2).expand(*shape[: len(batch)], 2)
    return keys.reshape(-1, 2), len(batch)


def indices(
    shape: Sequence[int], global_shape: Sequence[int], offset: Sequence[int], device: torch.device
) -> Tensor:
    """Where the elements of a block at offset are in the row-major order of a larger tensor."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for n, whole, first in zip(shape, global_shape, offset, strict=True):
        index = index.unsqueeze(-1) * whole + torch.arange(first, first + n, device=device)
    return index.flatten()


def normals(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    samples: bool = False,
) -> Tensor:
    """The standard normals of a call with this key: float64 for float64, else float32.

    Of a shape whose first dimension is one of samples, a key of size 1 there tells only the
    others apart: the samples are numbered within its slices.
    """
    shape = torch.Size(shape)
    if samples and key.dim() > 2 and key.shape[0] == 1:
        _, dim = slice_keys(key, shape)
        last = max(dim - 1, 0)  # where the samples go, behind the dimensions that are told apart

        def moved(sizes: Sequence[int] | None) -> Sequence[int] | None:
            return None if sizes is None else (*sizes[1 : last + 1], sizes[0], *sizes[last + 1 :])

        inner = torch.Size(moved(shape) or ())
        eps = normals(key[0], inner, dtype, moved(global_shape), moved(global_offset))
        return eps.movedim(last, 0)
    keys, dim = slice_keys(key, shape)
    length = math.prod(shape[dim:])
    per_block = 2 if dtype == torch.float64 else 4
    if global_shape is None or global_offset is None:
        blocks = torch.arange(-(-length // per_block), device=key.device)
    else:
        index = indices(shape[dim:], global_shape[dim:], global_offset[dim:], key.device)
        blocks = index // per_block
    w = words(keys, blocks)
    if dtype == torch.float64:
        lanes = torch.stack(_box_muller_double(w), -1)
    else:
        lanes = torch.stack(_box_muller(w[0], w[1]) + _box_muller(w[2], w[3]), -1)
    if global_shape is None:
        eps = lanes.flatten(-2)[:, :length]
    else:
        lane = (index % per_block).expand(lanes.shape[:-1]).unsqueeze(-1)
        eps = lanes.gather(-1, lane)
    return eps.reshape(shape)


def noise(key: Tensor, size: Sequence[int], dtype: torch.dtype, *block: Any) -> Tensor:
    """eps, in this dtype."""
    return normals(key, size, dtype, *block).to(dtype).contiguous()


def sigma(log_var: Tensor, factor: float = 1.0, unit: float = 1.0) -> Tensor:
    """factor * exp(unit * log_var / 2) by powers of two; the bits of the contract in float32."""
    if log_var.dtype == torch.float64:
        return torch.exp(0.5 * unit * log_var) * factor
    p, root = _sigma_parts(log_var, unit)
    return p * factor * root * root


def _sigma_parts(log_var: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """p and root of sigma = p root^2, of which root is finite where sigma is not."""
    if log_var.dtype == torch.float64:
        return torch.ones_like(log_var), torch.exp(0.25 * unit * log_var)
    # 2^(2 h + t): the sum ends in steps of 2, and its last bits are h + 127.
    x = log_var.clamp(-300.0 / unit, 300.0 / unit)
    high, low = unit * HALF_LOG2E[0], unit * HALF_LOG2E[1]
    shifted = fma(x, high, MAGIC)
    t = fma(x, low, fma(x, high, MAGIC - shifted))
    return _polynomial(t, EXP), (shifted.view(torch.int32) << 23).view(torch.float32)


def softplus(rho: Tensor) -> Tensor:
    """ln(1 + e^rho) over the whole range; the bits of csrc in float32."""
    t = sigma(-rho.abs(), unit=2.0)
    if rho.dtype == torch.float64:
        return rho.clamp(min=0.0) + torch.log1p(t)
    return fma(t, _polynomial(t, LOG1P), rho.clamp(min=0.0))


def _minus_inverse_of_sum(t: Tensor) -> Tensor:
    """-1 / (1 + t) of t in [0, 1]; the bits of csrc in float32."""
    if t.dtype == torch.float64:
        return -1.0 / (1.0 + t)
    r = _polynomial(t, RECIPROCAL)  # and a step of Newton's
    return fma(fma(t, r, r + 1.0), r, r)


def sigmoid(rho: Tensor) -> Tensor:
    """1 / (1 + e^-rho), the derivative of softplus; the bits of csrc in float32."""
    t = sigma(-rho.abs(), unit=2.0)
    return (torch.where(rho >= 0, 1.0, t) * _minus_inverse_of_sum(t)).abs()


def _as_output(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and scale in the arithmetic dtype and the shape of the result, and a tensor for it."""
    out = torch.empty_like(torch.add(x, scale))  # has add's dtype, shape and strides
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    x, scale = (t.to(out.dtype).to(dtype).expand(out.shape) for t in (x, scale))
    return x, scale, out


def _within(bounds: Bounds | None, scale: Tensor) -> Tensor:
    return scale if bounds is None else scale.clamp(*bounds[:2])


def _sigma(form: str, bounds: Bounds | None, scale: Tensor) -> Tensor:
    sigma = _forms.FORMS[form].sigma(_within(bounds, scale))
    return sigma if bounds is None else sigma + bounds[2]


def _by_scale(bounds: Bounds | None, scale: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the scale from that of the clamped scale: as torch.clamp has it."""
    return grad if bounds is None else torch.where(_within(bounds, scale) == scale, grad, 0.0)


def _chain(form: str, bounds: Bounds | None, grad_sigma: Tensor, scale: Tensor) -> Tensor:
    grad = _forms.FORMS[form].chain(grad_sigma, _within(bounds, scale))
    return _by_scale(bounds, scale, grad)


def output_of_samples(one: Tensor, samples: int) -> Tensor:
    """For so many results, each laid out as this one."""
    stride = math.prod(max(n, 1) for n in one.shape)
    return one.new_empty_strided((samples, *one.shape), (stride, *one.stride()))


def sample_from_key(
    mu: Tensor,
    scale: Tensor,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Bounds | None = None,
    samples: int | None = None,
) -> Tensor:
    """z = mu + sigma * eps."""
    mu, scale, out = _as_output(mu, scale)
    if samples is not None:
        out = output_of_samples(out, samples)
    eps = normals(key, out.shape, out.dtype, global_shape, global_offset, samples is not None)
    std = _sigma(form, bounds, scale)
    z = mu + std * eps if eps.dtype == torch.float64 else fma(std, eps, mu)
    return out.copy_(z)


def sample_backward(
    grad_z: Tensor,
    scale: Tensor | None,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Bounds | None = None,
) -> Tensor:
    """grad_scale = grad_z * eps * dsigma / dscale, shaped as grad_z."""
    grad_z, scale, out = _as_output(grad_z, grad_z if scale is None else scale)
    eps = normals(key, out.shape, out.dtype, global_shape, global_offset)
    return out.copy_(_chain(form, bounds, grad_z * eps, scale))


def samples_backward(
    grad_z: Tensor,
    scale: Tensor | None,
    key: Tensor,
    form: str = "log_var",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums over samples of grad_z and of its products with eps, one step after the other;
    the second as a gradient of the scale."""
    one = grad_z.new_empty_strided(grad_z.shape[1:], grad_z.stride()[1:])
    _, scale, grad_mu = _as_output(one, one if scale is None else scale)
    grad_scale = torch.empty_like(grad_mu)
    eps = normals(key, grad_z.shape, grad_mu.dtype, global_shape, global_offset, True)
    by_mu, by_sigma = torch.zeros_like(scale), torch.zeros_like(scale)
    double = scale.dtype == torch.float64
    for grad, noise in zip(grad_z.to(scale.dtype), eps, strict=True):
        by_mu = by_mu + grad
        by_sigma = grad * noise + by_sigma if double else fma(grad, noise, by_sigma)
    return grad_mu.copy_(by_mu), grad_scale.copy_(_chain(form, bounds, by_sigma, scale))


def _exp_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale, f, f^2 and r of e^x = 8 scale (1 + f + f^2 r), in float32."""
    clamped = x.clamp(-90.0, 90.0)
    shifted = fma(clamped, LOG2E, MAGIC)
    minus_2h = MAGIC - shifted
    f = fma(minus_2h, LN2[1], fma(minus_2h, LN2[0], clamped))
    root = (shifted.view(torch.int32) << 23).view(torch.float32)
    return root * 0.125 * root, f, f * f, _polynomial(f, EXPM1)


def _half_excess_double(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / 2; near 0, where the terms would cancel, by the Taylor series."""
    series = torch.zeros_like(x)
    for n in range(20, 1, -1):
        series = series * x + 1 / math.factorial(n)
    root = torch.exp(0.5 * x)  # e^x itself would overflow before its half
    finite = torch.where(x == math.inf, 0.0, x)  # or inf - inf would be NaN
    far = root * (0.5 * root) - 0.5 - 0.5 * finite
    return torch.where(x.abs() < 1, 0.5 * x * x * series, far)


def half_excess(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / 2; the bits of csrc in float32."""
    if x.dtype == torch.float64:
        return _half_excess_double(x)
    scale, f, square, r = _exp_parts(x)
    linear = fma(x, -0.125, fma(scale, f, scale - 0.125))
    return fma(scale, square * r, linear).abs() * 4.0


def half_expm1(x: Tensor) -> Tensor:
    """(e^x - 1) / 2; the bits of csrc in float32."""
    if x.dtype == torch.float64:
        root = torch.exp(0.5 * x)
        far = root * (0.5 * root) - 0.5
        return torch.where(x.abs() < 1, 0.5 * torch.expm1(x), far)
    scale, f, square, r = _exp_parts(x)
    return fma(scale, fma(square, r, f), scale - 0.125) * 4.0


def _log_parts(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, r and rest of ln s = rest + f - f^2 r, in float32."""
    # Denormals, whose exponent does not say where they are, are made normal first.
    small = s <= 2.0**-126
    shift = torch.where(small, torch.where(s == 0, -math.inf, -LN_2_TO_24), 0.0)
    return _log_parts_of_normal(torch.where(small, s * 2.0**24, s), shift)


def _log_parts_of_normal(s: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a normal s, with shift added to the logarithm."""
    exponent, f = _split(s)
    return f, _polynomial(f, LOG_TERM), fma(exponent, LN2_IN_PLACE, shift)


def half_excess_of_sigma(s: Tensor) -> Tensor:
    """(s^2 - 1 - ln s^2) / 2 of a std; the bits of csrc in float32."""
    std = s.abs()
    a = std - 1.0
    if s.dtype == torch.float64:
        log_var = 2.0 * std.log()
        finite = torch.where(log_var == math.inf, 0.0, log_var)
        far = 0.5 * a * a + (a - 0.5 * finite)
        return torch.where(log_var.abs() < 1, _half_excess_double(log_var), far)
    f, r, log_rest = _log_parts(std)
    return fma(a * 0.5, a, fma(f * f, r, a - f - log_rest))


def half_excess_slope(s: Tensor) -> Tensor:
    """s - 1 / s, its derivative; the bits of csrc."""
    return (s.abs() - 1.0) * (torch.where(s < 0, -1.0, 1.0) + 1.0 / s)


def _logarithmic(form: str, bounds: Bounds | None) -> float:
    """How much of ln sigma^2 a unit of the scale is, where sigma is nothing but a power of e."""
    return _forms.FORMS[form].log_var if bounds is None or bounds[2] == 0 else 0.0


def kl_divergence(
    mu: Tensor, scale: Tensor, form: str = "log_var", bounds: Bounds | None = None
) -> Tensor:
    """(mu^2 + sigma^2 - 1 - ln sigma^2) / 2, of each element."""
    mu, scale, out = _as_output(mu, scale)
    if unit := _logarithmic(form, bounds):
        excess = half_excess(_within(bounds, scale) * unit)
    else:
        excess = half_excess_of_sigma(_sigma(form, bounds, scale))
    half_mu = mu * 0.5
    double = out.dtype == torch.float64
    return out.copy_(half_mu * mu + excess if double else fma(half_mu, mu, excess))


def kl_divergence_backward(
    grad: Tensor, scale: Tensor, form: str = "log_var", bounds: Bounds | None = None
) -> Tensor:
    """grad_scale = grad (sigma - 1 / sigma) dsigma / dscale: of a log_var
    grad (sigma^2 - 1) / 2."""
    grad, scale, out = _as_output(grad, scale)
    clamped = _within(bounds, scale)
    if unit := _logarithmic(form, bounds):
        result = grad * (half_expm1(clamped * unit) * unit)
    else:
        slope = half_excess_slope(_sigma(form, bounds, scale))
        result = _forms.FORMS[form].chain(grad * slope, clamped)
    return out.copy_(_by_scale(bounds, scale, result))


# What an element adds to the sum of its row beside its sample: csrc/common/terms.h


def _fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    return fma(a, b, c) if c.dtype == torch.float32 else a * b + c


def log_sigma(sigma: Tensor) -> Tensor:
    """ln |sigma|; the bits of csrc in float32."""
    std = sigma.abs()
    if std.dtype == torch.float64:
        return std.log()
    f, r, rest = _log_parts(std)
    # NaN and infinity have no exponent.
    return torch.where(std.isfinite(), fma(f * -f, r, f) + rest, std)


def over_one(s: Tensor, t: Tensor) -> Tensor:
    """s / t - 1 of two stds, with more digits than the ratio has near 1; of an infinite t too."""
    apart = s - t
    return torch.where(apart == -math.inf, -1.0, apart / t)


def half_excess_of_ratio(s: Tensor, t: Tensor, over: Tensor) -> Tensor:
    """(x^2 - 1 - ln x^2) / 2 of x = s / t, two stds, and over = x - 1; the bits of csrc in
    float32."""
    if s.dtype == torch.float64:
        near = _half_excess_double(2.0 * torch.log1p(over))
        x = s / t
        small = (x < 1e-300) & (s > 0) & (t < math.inf)
        log = torch.where(small, s.log() - t.log(), x.log())
        log = torch.where(x == math.inf, 0.0, log)  # or inf - inf would be NaN
        far = 0.5 * over * over + (over - log)
        return torch.where(over.abs() < 0.25, near, far)
    # Where x may be no normal number, it is one in other units of both.
    down = fma(t, 2.0**-76, 2.0**-149)
    far = s + down == down
    x = torch.where(far, s * 2.0**76, s) / torch.where(far, down, t)
    shift = torch.where(x == 0, -math.inf, torch.where(far, -LN_2_TO_152, 0.0))
    f, r, rest = _log_parts_of_normal(x, shift)
    power = (0x3F800000 - _exponent(x)).view(torch.float32)
    f = torch.where((over >= -0.5) & (over <= 2.0), fma(power, over, power - 1.0), f)
    return fma(over * 0.5, over, fma(f * f, r, over - rest - f))


class TanhParts(NamedTuple):
    """t = e^-2|z|, -1 / (1 + t) and tanh z"""

    t: Tensor
    inverse: Tensor
    tanh: Tensor


def tanh_parts(z: Tensor) -> TanhParts:
    """The bits of csrc in float32."""
    x = z.abs() * -2.0
    t = sigma(x, unit=2.0)
    inverse = _minus_inverse_of_sum(t)
    half = half_expm1(x) * inverse
    of_size = half * 2.0 + 0.0  # of 0 it is +0
    return TanhParts(t, inverse, torch.where(z >= 0, of_size, -of_size))


LOG_2 = float.fromhex("0x1.62e430p-1")
HALF_LOG_2_PI = float.fromhex("0x1.d67f1cp-1")


def _tanh_log_prob(z: Tensor, log_prob: Tensor) -> Tensor:
    """The log-density of tanh z, from that of z."""
    t = tanh_parts(z).t
    if z.dtype == torch.float64:
        return log_prob - 2 * (math.log(2) - z.abs() - torch.log1p(t))
    log = fma(-t, _polynomial(t, LOG1P), LOG_2 - z.abs())
    return fma(log, -2.0, log_prob)


def _tanh_backward(grad: Tensor, z: Tensor, grad_log_prob: Tensor) -> Tensor:
    """The gradient of z from those of tanh z and of its log-density."""
    parts = tanh_parts(z)
    slope = parts.t * 4.0 * parts.inverse * parts.inverse
    return _fma(grad, slope, (parts.tanh + parts.tanh) * grad_log_prob)


def _half_log_2_pi(dtype: torch.dtype) -> float:
    return 0.5 * math.log(2 * math.pi) if dtype == torch.float64 else HALF_LOG_2_PI


class Ratio(NamedTuple):
    """How N(mu, sigma) and a prior differ, and the gradients of their divergence."""

    term: Tensor
    by_mu: Tensor
    by_scale: Tensor
    by_prior: Tensor


def _ratio_by_log_var(
    mu: Tensor, log_var: Tensor, loc: Tensor, prior: Tensor, grad: Tensor
) -> Ratio:
    p, root = _sigma_parts(0.0 - prior)  # of the inverse, which may be beyond what there is
    distance, log = (mu - loc) * root * p * root, log_var - prior
    slope = half_expm1(log)
    square = distance * -0.5 * distance - slope
    return Ratio(
        _fma(distance * 0.5, distance, half_excess(log)),
        grad * distance * root * p * root,
        grad * slope,
        grad * square,
    )


def _ratio_by_sigma(mu: Tensor, s: Tensor, loc: Tensor, prior: Tensor, grad: Tensor) -> Ratio:
    t = prior.abs()
    # Of equal means 0 even where the prior has no width
    unit = t.clamp(min=LEAST[t.dtype == torch.float64])
    distance, over = (mu - loc) / unit, over_one(s.abs(), t)
    square = over * (over + 2.0)
    return Ratio(
        _fma(distance * 0.5, distance, half_excess_of_ratio(s.abs(), t, over)),
        grad * distance / unit,
        grad * square / s,
        grad * (0.0 - _fma(distance, distance, square)) / prior,
    )


def _chunk_sums(terms: Tensor, per_vector: int) -> Tensor:
    """Of (..., n) terms the sums of their chunks, (..., chunks), in the order of the contract."""
    lanes = 128 * per_vector
    chunks = max(-(-terms.size(-1) // (4 * lanes)), 1)
    missing = chunks * 4 * lanes - terms.size(-1)
    x = torch.nn.functional.pad(terms, (0, missing)).unflatten(-1, (chunks, 4, lanes))
    acc = ((x[..., 0, :] + x[..., 1, :]) + x[..., 2, :]) + x[..., 3, :]
    # Halves over the elements of a vector, over the lanes of a warp, over warps
    parts: Tensor = acc.unflatten(-1, (4, 32, per_vector))
    for _ in range(3):
        while parts.size(-1) > 1:
            half = parts.size(-1) // 2
            parts = parts[..., :half] + parts[..., half:]
        parts = parts.squeeze(-1)
    return parts


def sum_rows(terms: Tensor, per_vector: int) -> Tensor:
    """The sums over the last dimension, in the one order that the contract has for them.

    ``per_vector`` is how many elements of the inputs 16 bytes hold. The sum of a row is that of
    the sums of its chunks of 512 vectors; a chunk is summed by strides of 128 vectors first, then
    by halves. Not even a sum of one term is -0.
    """
    while True:
        terms = _chunk_sums(terms, per_vector)
        if terms.size(-1) == 1:
            return terms.squeeze(-1) + 0.0
        per_vector = 2 if terms.dtype == torch.float64 else 4


class _Head:
    """The operands of a head in the arithmetic dtype and the shape of the sample."""

    def __init__(
        self,
        mu: Tensor,
        scale: Tensor,
        key: Tensor | None,
        loc: Tensor | None,
        prior: Tensor | None,
        summed: int,
        form: str,
        prior_form: str,
        global_shape: Sequence[int] | None,
        global_offset: Sequence[int] | None,
        bounds: Bounds | None,
        prior_bounds: Bounds | None,
        samples: int | None,
    ) -> None:
        self.form, self.prior_form = form, prior_form
        self.bounds, self.prior_bounds = bounds, prior_bounds
        self.mu, self.scale, self.out = _as_output(mu, scale)
        dtype = self.scale.dtype
        self.loc = None if loc is None else loc.to(dtype).expand(self.out.shape)
        self.prior = None if prior is None else prior.to(dtype).expand(self.out.shape)
        shape = self.out.shape if samples is None else torch.Size((samples, *self.out.shape))
        self.out = torch.empty(shape, dtype=self.out.dtype, device=mu.device)
        self.eps = self.std = None
        if key is not None:
            self.eps = normals(
                key, shape, self.out.dtype, global_shape, global_offset, samples is not None
            )
            self.std = _sigma(form, bounds, self.scale)
            self.z = _fma(self.std.expand(shape), self.eps, self.mu.expand(shape))
        self.rows = shape[: len(shape) - summed]
        self.per_vector = 16 // self.out.element_size()
        # Both scales as log_var, if that is what they are; else as sigma.
        forms = [(form, bounds)] + ([] if prior is None else [(prior_form, prior_bounds)])
        self.by_log_var = all(_logarithmic(*given) for given in forms)
        self.spread = self._spread(form, bounds, self.scale)
        if self.prior is not None:
            self.prior_spread = self._spread(prior_form, prior_bounds, self.prior)

    def _spread(self, form: str, bounds: Bounds | None, scale: Tensor) -> Tensor:
        if self.by_log_var:
            return _within(bounds, scale) * _forms.FORMS[form].log_var
        return _sigma(form, bounds, scale)

    def from_spread(self, form: str, bounds: Bounds | None, grad: Tensor, scale: Tensor) -> Tensor:
        if self.by_log_var:
            return _by_scale(bounds, scale, grad * _forms.FORMS[form].log_var)
        return _chain(form, bounds, grad, scale)

    def ratio(self, grad: Tensor) -> Ratio:
        assert self.loc is not None
        make = _ratio_by_log_var if self.by_log_var else _ratio_by_sigma
        return make(self.mu, self.spread, self.loc, self.prior_spread, grad)


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
    h = _Head(mu, scale, key, loc, prior, summed, *_all_options(*options))
    z = mu.new_empty(0, dtype=h.out.dtype)
    if term == "kl_divergence":
        if h.loc is not None:
            terms = h.ratio(torch.ones_like(h.scale)).term
        else:
            excess = half_excess(h.spread) if h.by_log_var else half_excess_of_sigma(h.spread)
            terms = _fma(h.mu * 0.5, h.mu, excess)
    else:
        assert h.eps is not None
        log = h.spread * 0.5 if h.by_log_var else log_sigma(h.spread)
        terms = _fma(h.eps * -0.5, h.eps, -_half_log_2_pi(h.eps.dtype) - log)
    if h.eps is not None:
        value = h.z
        if term == "tanh_log_prob":
            terms, value = _tanh_log_prob(value, terms), tanh_parts(value).tanh
        z = h.out.copy_(value)
    terms = terms.expand(h.out.shape).reshape(*h.rows, math.prod(h.out.shape[len(h.rows) :]))
    return z, sum_rows(terms, h.per_vector).contiguous()


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
    """The gradients of mu, scale, loc and prior, each of the shape of the sample: that of mu in a
    log_prob, which is grad_z, and those of no prior are empty."""
    h = _Head(mu, scale, key, loc, prior, summed, *_all_options(*options))
    shape = h.out.shape
    grad = grad_total.reshape((*h.rows, *[1] * summed)).expand(shape).to(h.scale.dtype)
    empty = mu.new_empty(0, dtype=h.out.dtype)
    by_mu = by_scale = by_loc = by_prior = None
    dz = None if grad_z is None else grad_z.to(h.scale.dtype).expand(shape)
    scale_, spread = h.scale.expand(shape), h.spread.expand(shape)
    if term == "kl_divergence":
        if h.loc is not None and h.prior is not None:
            ratio = h.ratio(grad)
            by_mu, by_loc, by_spread = ratio.by_mu, 0.0 - ratio.by_mu, ratio.by_scale
            by_prior = h.from_spread(h.prior_form, h.prior_bounds, ratio.by_prior, h.prior)
            if dz is not None:
                by_mu = dz + by_mu
        else:
            by_mu = _fma(grad, h.mu, torch.zeros_like(grad) if dz is None else dz)
            slope = half_expm1(h.spread) if h.by_log_var else half_excess_slope(h.spread)
            by_spread = grad * slope
    else:
        by_spread = (0.0 - grad) * 0.5 if h.by_log_var else (0.0 - grad) / spread
        if term == "tanh_log_prob":
            assert dz is not None
            dz = _tanh_backward(dz, h.z, grad)
            by_mu = dz
    by_scale = h.from_spread(h.form, h.bounds, by_spread, scale_)
    if h.eps is not None:
        assert dz is not None
        by_scale = _chain(h.form, h.bounds, dz * h.eps, scale_) + by_scale
    by_mu, by_scale, by_loc, by_prior = (
        empty.clone() if g is None else torch.empty_like(h.out).copy_(g)
        for g in (by_mu, by_scale, by_loc, by_prior)
    )
    return by_mu, by_scale, by_loc, by_prior


def _all_options(
    form: str = "log_var",
    prior_form: str = "std",
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
    bounds: Bounds | None = None,
    prior_bounds: Bounds | None = None,
    samples: int | None = None,
) -> tuple[Any, ...]:
    return form, prior_form, global_shape, global_offset, bounds, prior_bounds, samples
