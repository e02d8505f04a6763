"""What cvt computes, and the approximate instructions with their documented errors."""

from __future__ import annotations

import numpy as np

from .arithmetic import DTYPES, Array, Function, canonical, flush, saturate

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "f32", "f64")
_WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}

# Relative ("rel") or absolute ("abs") bounds of the PTX ISA; "lg2" is absolute near 1 only.
_BOUNDS = {
    "rcp": ("rel", 2.0**-23),
    "sqrt": ("rel", 2.0**-23),
    "rsqrt": ("rel", 2.0**-22.9),
    "ex2": ("rel", 2.0**-22),
    "lg2": ("lg2", 2.0**-22),
    "sin": ("abs", 2.0**-20.5),
    "cos": ("abs", 2.0**-20.5),
    "div": ("rel", 2.0**-22),
    "div.full": ("rel", 2.0**-22),
}
_EXACT: dict[str, Function] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.where(x == 0, np.copysign(np.inf, x), 1 / np.sqrt(x)),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "div": np.divide,
    "div.full": np.divide,
}
_UPPER_WORD = np.uint64(0xFFFFFFFF00000000)


def bf16_to_f32(value: Array) -> Array:
    return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array, rounding: str = "rn") -> Array:
    bits = value.view(np.uint32)
    if rounding == "rn":  # to nearest, ties to even; no carry out of 32 bits unless NaN
        bits = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    return np.where(np.isnan(value), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def _narrow(value: Array, to: str, rounding: str) -> Array:
    """A float32, float64 or integer of at most 53 bits to a float, rounded once."""
    if to == "bf16":
        return f32_to_bf16(value, rounding)
    dtype = DTYPES[to]
    result = value.astype(dtype)
    if rounding != "rn":
        exact, rounded = value.astype(np.float64), result.astype(np.float64)
        if rounding == "rz":
            wrong, limit = np.abs(rounded) > np.abs(exact), dtype.type(0)
        elif rounding == "rm":
            wrong, limit = rounded > exact, dtype.type(-np.inf)
        else:
            wrong, limit = rounded < exact, dtype.type(np.inf)
        result = np.where(wrong, np.nextafter(result, limit), result)
    if to == "f16":
        return np.where(np.isnan(result), np.uint16(0x7FFF), result.view(np.uint16))
    return canonical(result)


def _clamp_to_integer(value: Array, to: str, from_double: bool) -> Array:
    """An integral float64 to an integer, out of range to its ends; NaN as PTX documents it."""
    dtype = DTYPES[to]
    info = np.iinfo(dtype)
    inside = (value >= float(info.min)) & (value < float(info.max + 1))
    result = np.where(inside, value, 0.0).astype(dtype)
    result = np.where(value >= float(info.max + 1), dtype.type(info.max), result)
    result = np.where(value < float(info.min), dtype.type(info.min), result)
    wide = from_double or info.bits == 64
    nan = np.array([1 << (info.bits - 1) if wide else 0], f"uint{info.bits}").view(dtype)
    return np.where(np.isnan(value), nan, result)


def conversion(to: str, source: str, rounding: str, ftz: bool, sat: bool) -> Function | None:
    """The function of cvt.rounding.ftz.sat.to.source, or None where PTX has no such conversion."""
    to_float, from_float = to in _FLOATS, source in _FLOATS
    integral = rounding in _TO_INTEGER
    if ftz and "f32" not in (to, source):
        return None
    if not from_float and not to_float:
        from_limits, to_limits = np.iinfo(DTYPES[source]), np.iinfo(DTYPES[to])
        narrower = to_limits.min > from_limits.min or to_limits.max < from_limits.max
        return None if rounding or (sat and not narrower) else _integer_conversion(to, sat)
    if not from_float:
        return (
            _from_integer(to, source, rounding) if rounding and not integral and not sat else None
        )

    narrows = to_float and _WIDTH[to] < _WIDTH[source]
    if to_float and to != source and (integral or narrows != bool(rounding)):
        return None
    if not to_float and not integral:
        return None
    if to == source and rounding and not integral:
        return None
    if "bf16" in (to, source) and ("f32" not in (to, source) or sat or rounding in ("rm", "rp")):
        return None  # sm_90 has more of them; nothing here needs them

    def compute(value: Array) -> Array:
        if source == "f32" and ftz:
            value = flush(value)
        if not to_float:
            exact = bf16_to_f32(value) if source == "bf16" else value
            return _clamp_to_integer(
                _TO_INTEGER[rounding](exact.astype(np.float64)), to, source == "f64"
            )
        if source == "bf16":
            result = bf16_to_f32(value)
        elif to == source:
            result = canonical(_TO_INTEGER[rounding](value) if integral else value)
        elif sat and to in ("f16", "bf16"):
            return _narrow(saturate(value), to, rounding)
        else:
            result = _narrow(value, to, rounding or "rn")
        if to == "f32" and ftz:
            result = flush(result)
        return saturate(result) if sat else result

    return compute


def _integer_conversion(to: str, sat: bool) -> Function:
    dtype = DTYPES[to]
    info = np.iinfo(dtype)

    def compute(value: Array) -> Array:
        if sat:
            limits = np.iinfo(value.dtype)
            value = np.clip(value, max(info.min, limits.min), min(info.max, limits.max))
        return value.astype(dtype)

    return compute


def _from_integer(to: str, source: str, rounding: str) -> Function | None:
    # float64 would round a 64-bit integer first.
    if to == "bf16" or (source in ("s64", "u64") and (rounding != "rn" or to == "f16")):
        return None
    return lambda value: _narrow(value, to, rounding)


def to_pair(to: str, rounding: str) -> Function:
    """cvt to f16x2 or bf16x2: the first source becomes the upper half."""

    def compute(high: Array, low: Array) -> Array:
        upper, lower = (_narrow(x, to[:-2], rounding).astype(np.uint32) for x in (high, low))
        return upper << np.uint32(16) | lower

    return compute


def approximate(name: str, ftz: bool) -> Function:
    """An .approx instruction of float32: `compute(error, *values)`.

    `error` in [-1, 1], or an array of such, is the part of the documented bound by which the
    correctly rounded result is off. Moved results are rounded toward the exact one, so that they
    stay within the bound (a subnormal one may be off by one unit in its last place).
    """
    kind, bound = _BOUNDS[name]

    def compute(error: float | Array, *values: Array) -> Array:
        if ftz:
            values = tuple(flush(value) for value in values)
        doubles = [value.astype(np.float64) for value in values]
        exact = np.asarray(_EXACT[name](*doubles))
        if name == "div":  # the reciprocal of such a divisor is flushed
            huge = (np.abs(doubles[1]) > 2.0**126) & np.isfinite(doubles[1])
            exact = np.where(huge, doubles[0] * 0.0, exact)
        result = exact.astype(np.float32)
        if np.any(error):
            x = doubles[0]
            if kind == "rel":
                allowed = np.abs(exact) * bound
            elif kind == "lg2":
                allowed = np.where((x > 0.5) & (x < 2), 1.0, np.abs(exact)) * bound
            else:  # the quadrants further out have a looser bound
                allowed = np.where(np.abs(x) <= 2 * np.pi, bound, 2.0**-14.7)
            moved = (exact + error * allowed).astype(np.float32)
            outside = np.abs(moved - exact) > allowed
            moved = np.where(outside, np.nextafter(moved, result), moved)
            result = np.where(np.isfinite(exact) & (exact != 0) | (kind == "abs"), moved, result)
        result = canonical(result)
        return flush(result) if ftz else result

    return compute


def approximate_upper_word(name: str) -> Function:
    """rcp and rsqrt .approx.ftz.f64: only the upper words of source and result count."""

    def compute(error: float | Array, value: Array) -> Array:
        value = (flush(value).view(np.uint64) & _UPPER_WORD).view(np.float64)
        exact = _EXACT[name](value)
        moved = np.where(np.isfinite(exact), exact * (1 + error * 2.0**-20), exact)
        half = np.uint64(0x80000000)  # rounds to the upper word; infinities have a zero lower one
        bits = (moved.view(np.uint64) + half) & _UPPER_WORD
        nan = np.uint64(0x7FFFFFFF00000000)
        return flush(np.where(np.isnan(exact), nan, bits).view(np.float64))

    return compute
