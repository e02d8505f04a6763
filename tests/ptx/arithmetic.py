"""What the arithmetic instructions compute: pure functions of NumPy arrays.

Every function broadcasts, so that a value of shape (1,) stays one. Floats round as IEEE 754 says;
subnormals are kept unless `ftz` says otherwise, and a float32 NaN that comes out of arithmetic is
NVIDIA's canonical one.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Any]

DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(np.uint8) for name in ("b8", "u8")},
    **{name: np.dtype(np.uint16) for name in ("b16", "u16", "bf16")},
    **{name: np.dtype(np.uint32) for name in ("b32", "u32", "bf16x2", "f16x2")},
    **{name: np.dtype(np.uint64) for name in ("b64", "u64", "f32x2")},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "b128": np.dtype("V16"),
    "pred": np.dtype(np.bool_),
}
_SMALLEST_NORMAL = {4: np.float32(2.0**-126), 8: np.float64(2.0**-1022)}
_CANONICAL_NAN = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]


def canonical(value: Array) -> Array:
    """Replace every float32 NaN by NVIDIA's; float64 keeps its payload."""
    # x.x is NaN exactly where an element of x is, and costs one pass.
    if value.dtype == np.float32 and np.isnan(np.dot(flat := value.ravel(), flat)):
        return np.where(np.isnan(value), _CANONICAL_NAN, value)
    return value


def flush(value: Array) -> Array:
    """Subnormals to zeros of their sign."""
    small = np.abs(value) < _SMALLEST_NORMAL[value.dtype.itemsize]
    if small.any():
        return np.where(small, np.copysign(value.dtype.type(0), value), value)
    return value


def saturate(value: Array) -> Array:
    """Clamp to [0, 1]; NaN and -0 become +0."""
    one, zero = value.dtype.type(1), value.dtype.type(0)
    return np.where(value > zero, np.minimum(value, one), zero)


def floating(function: Function, ftz: bool = False, sat: bool = False) -> Function:
    """`function` with the modifiers .ftz and .sat, and with canonical NaNs."""

    def compute(*values: Array) -> Array:
        if ftz:
            values = tuple(flush(value) for value in values)
        result = canonical(function(*values))
        if ftz:
            result = flush(result)
        return saturate(result) if sat else result

    return compute


def packed(function: Function) -> Function:
    """`function` of float32 for operands that hold two of them in 64 bits."""

    def compute(*values: Array) -> Array:
        pairs = [np.ascontiguousarray(value).view(np.float32).reshape(-1, 2) for value in values]
        return np.ascontiguousarray(function(*pairs)).reshape(-1).view(np.uint64)

    return compute


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(s, e) with s = fl(a + b) and s + e = a + b exactly, unless s overflows."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b, rounded to odd: an inexact sum gets the neighbour whose last bit is set.

    Rounding that again to a format shorter by two bits or more is as rounding a + b once.
    """
    s, error = two_sum(a, b)
    bits = s.view(np.int64)
    move = (error != 0) & np.isfinite(s) & (bits & 1 == 0)
    return (bits + np.where(move, np.where((error > 0) == (s > 0), 1, -1), 0)).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    product = a.astype(np.float64) * b  # exact: 48 bits, no exponent out of range
    s = np.asarray(product + c)
    # The second rounding can only go wrong from a tie between two float32, subnormal or not: the
    # last 28 bits of such an s are zero.
    tie = s.view(np.int64) & 0xFFFFFFF == 0
    if tie.any():
        s = np.where(tie, sum_to_odd(product, c.astype(np.float64)), s)
    return s.astype(np.float32)


def directed(rounding: str, function: Function) -> Function:
    """fma, add or mul of float32 that rounds toward zero (rz), down (rm) or up (rp).

    `function` gives the two float64 whose sum is the exact result.
    """

    def compute(*values: Array) -> Array:
        x, y = function(*(value.astype(np.float64) for value in values))
        exact = sum_to_odd(x, y)  # on the same side of every float32 as the exact result
        result = exact.astype(np.float32)
        if rounding == "rz":
            wrong, limit = np.abs(result) > np.abs(exact), np.float32(0)
        elif rounding == "rm":
            wrong, limit = result > exact, np.float32(-np.inf)
        else:
            wrong, limit = result < exact, np.float32(np.inf)
        result = np.where(wrong, np.nextafter(result, limit), result)
        if rounding == "rm":  # a sum that cancels is -0 then
            cancels = (exact == 0) & (np.signbit(x) | np.signbit(y))
            result = np.where(cancels, np.float32(-0.0), result)
        return result

    return compute


# A product has no second term: a zero of its sign leaves it alone.
EXACT_TERMS: dict[str, Function] = {
    "add": lambda a, b: (a, b),
    "sub": lambda a, b: (a, -b),
    "mul": lambda a, b: (a * b, np.copysign(0.0, a * b)),
    "fma": lambda a, b, c: (a * b, c),
}


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """(p, e) with p = fl(a * b) and p + e = a * b exactly (Dekker; no over- or underflow)."""

    def split(x: Array) -> tuple[Array, Array]:
        t = x * 134217729.0  # 2^27 + 1
        high = t - (t - x)
        return high, x - high

    p = a * b
    (a1, a0), (b1, b0) = split(a), split(b)
    return p, ((a1 * b1 - p) + a1 * b0 + a0 * b1) + a0 * b0


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once, for all inputs.

    Boldo and Melquiond's algorithm where |a| and |b| are in [2^-450, 2^450] and |c| is 0 or in
    [2^-900, 2^900]: no error term under- or overflows there. Elsewhere rationals, one by one.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    t, t_error = two_sum(c, low)
    v, v_error = two_sum(high, t)
    result = v + sum_to_odd(t_error, v_error)

    def within(x: Array, limit: float) -> Array:
        return (np.abs(x) >= 1 / limit) & (np.abs(x) <= limit)

    fast = within(a, 2.0**450) & within(b, 2.0**450) & (within(c, 2.0**900) | (c == 0))
    if fast.all():
        return result
    # With an infinity, a NaN or a zero product the naive formula is exact, signs of zero included.
    naive = (a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c)
    result = np.where(fast, result, a * b + c)
    for lane in np.flatnonzero(~fast & ~naive):
        result[lane] = _fma_rational(float(a[lane]), float(b[lane]), float(c[lane]))
    return result


def _fma_rational(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return 0.0
    try:
        magnitude = float(abs(exact))  # correctly rounded, subnormals included
    except OverflowError:
        magnitude = np.inf
    return magnitude if exact > 0 else -magnitude


def extremum(
    largest: bool, propagate_nan: bool = False, xorsign: bool = False, ftz: bool = False
) -> Function:
    """min and max of float32 and float64, with -0 < +0; of one NaN the other operand is left."""

    def compute(a: Array, b: Array) -> Array:
        if ftz:
            a, b = flush(a), flush(b)
        unsigned = np.uint32 if a.dtype.itemsize == 4 else np.uint64
        if xorsign:
            sign_bit = unsigned(1 << (8 * a.dtype.itemsize - 1))
            sign = (a.view(unsigned) ^ b.view(unsigned)) & sign_bit
            a, b = np.abs(a), np.abs(b)
        # Equal values differ at most in the sign of a zero.
        x, y = a.view(unsigned), b.view(unsigned)
        equal = (x & y if largest else x | y).view(a.dtype)
        result = np.where(a > b, a if largest else b, np.where(a < b, b if largest else a, equal))
        nan_a, nan_b = np.isnan(a), np.isnan(b)
        if not propagate_nan:
            result = np.where(nan_a, b, np.where(nan_b, a, result))
        if xorsign:
            result = (result.view(unsigned) | sign).view(a.dtype)
        nan = nan_a | nan_b if propagate_nan else nan_a & nan_b
        return canonical(np.where(nan, a.dtype.type(np.nan), result))

    return compute


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of two integers of 16, 32 or 64 bits."""
    dtype, bits = a.dtype, 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{'int' if dtype.kind == 'i' else 'uint'}{2 * bits}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    cross = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    middle = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (middle >> half)
    if dtype.kind == "i":  # a negative a stands for a + 2^64
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(dtype)


def multiply_wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{'int' if a.dtype.kind == 'i' else 'uint'}{16 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def add_with_carry(a: Array, b: Array, carry: Array | None = None) -> tuple[Array, Array]:
    """(a + b + carry, its carry) of unsigned integers."""
    total = a + b
    out = total < a
    if carry is not None:
        total = total + carry.astype(a.dtype)
        out = out | (total < carry)
    return total, out.astype(np.uint32)


def subtract_with_borrow(a: Array, b: Array, borrow: Array | None = None) -> tuple[Array, Array]:
    """(a - b - borrow, its borrow) of unsigned integers."""
    out = a < b
    total = a - b
    if borrow is not None:
        out = out | (total < borrow)
        total = total - borrow.astype(a.dtype)
    return total, out.astype(np.uint32)


def divide(a: Array, b: Array) -> tuple[Array, Array]:
    """(quotient, remainder) of integers; by zero: all ones and a (PTX: unspecified)."""
    unsigned = np.dtype(f"uint{8 * a.dtype.itemsize}")
    zero = b == 0
    x, y = (np.where(v < 0, -v, v).view(unsigned) for v in (a, b))
    y = np.where(zero, unsigned.type(1), y)
    quotient, remainder = x // y, x % y
    quotient = np.where((a < 0) != (b < 0), -quotient, quotient)
    remainder = np.where(a < 0, -remainder, remainder)
    quotient = np.where(zero, ~unsigned.type(0), quotient).view(a.dtype)
    return quotient, np.where(zero, a, remainder.view(a.dtype))


def shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << (count % np.uint32(bits)).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(count, np.uint32(bits - 1)).astype(a.dtype)
    return np.where(count < bits, a >> (count % np.uint32(bits)).astype(a.dtype), a.dtype.type(0))


def funnel_shift(left: bool, wrap: bool) -> Function:
    def compute(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(
            np.uint64
        )
        if left:
            return ((both << count) >> np.uint64(32)).astype(np.uint32)
        return (both >> count).astype(np.uint32)

    return compute


@cache
def _monomials(table: int) -> list[int]:
    """A look-up table as XOR of ANDs: each number is a set of the inputs, as bits."""
    terms = [table >> index & 1 for index in range(8)]
    for bit in (1, 2, 4):
        for index in range(8):
            if index & bit:
                terms[index] ^= terms[index ^ bit]
    return [index for index in range(8) if terms[index]]


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits: bit 4a + 2b + c of the table."""
    result = np.zeros(1, np.uint32)
    for monomial in _monomials(int(table[0])):
        inputs = [x for x, bit in ((a, 4), (b, 2), (c, 1)) if monomial & bit]
        term = inputs[0] if inputs else np.full(1, 0xFFFFFFFF, np.uint32)
        for x in inputs[1:]:
            term = term & x
        result = result ^ term
    return result


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each result byte is one of the eight of (b, a), or its sign repeated."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros(1, np.uint32)
    for position in range(4):
        nibble = selector >> np.uint32(4 * position)
        byte = both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
        byte = (byte & np.uint64(0xFF)).astype(np.uint32)
        sign = (byte >> np.uint32(7)) * np.uint32(0xFF)
        byte = np.where(nibble & np.uint32(8) != 0, sign, byte)
        result = result | byte << np.uint32(8 * position)
    return result


def _low_ones(count: Array, dtype: np.dtype[Any]) -> Array:
    return ~shift_left(np.full(1, ~dtype.type(0)), count)


def extract_field(a: Array, position: Array, length: Array) -> Array:
    """bfe: bits [position, position + length) of a, extended by its sign if it has one."""
    unsigned, bits = np.dtype(f"uint{8 * a.dtype.itemsize}"), 8 * a.dtype.itemsize
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    here = np.minimum(length, np.where(position < bits, np.uint32(bits) - position, np.uint32(0)))
    field = _low_ones(here, unsigned)
    result = shift_right(a.view(unsigned), position) & field
    if a.dtype.kind == "u":
        return result
    top = np.minimum(position + length - np.uint32(1), np.uint32(bits - 1))
    sign = (shift_right(a.view(unsigned), top) & unsigned.type(1)) * (length != 0)
    return np.where(sign != 0, result | ~field, result).view(a.dtype)


def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: b with the low bits of a at [position, position + length)."""
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    mask = shift_left(_low_ones(length, a.dtype), position)
    return (b & ~mask) | (shift_left(a, position) & mask)


def population_count(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def leading_zeros(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    for shift in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        a = a | a >> a.dtype.type(shift)
    return np.uint32(bits) - population_count(a)


def reverse_bits(a: Array) -> Array:
    a = a.byteswap()
    ones = (1 << 8 * a.dtype.itemsize) - 1
    for shift, pattern in ((4, 0x0F), (2, 0x33), (1, 0x55)):
        mask, count = a.dtype.type(ones // 0xFF * pattern), a.dtype.type(shift)
        a = (a & mask) << count | a >> count & mask
    return a


def copy_sign(a: Array, b: Array) -> Array:
    return np.copysign(b, a)
