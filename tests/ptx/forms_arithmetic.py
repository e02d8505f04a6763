"""The instructions that compute: floats, integers, bits, comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arithmetic as exact
from . import conversions
from .arithmetic import Array, Function, floating
from .decode import ANY_INT, BITS, ROUND, Choices, Operation, alu, form

# Floating point


@form("add sub mul fma mad", f"round={ROUND}? ftz? sat? type=f32", "sss ssss")
def _float32(name: str, m: Choices, shape: str) -> Operation | None:
    name = "fma" if name == "mad" else name
    count = 3 if name == "fma" else 2
    rounding = m.get("round", "rn" if count == 2 else "")
    if len(shape) != count + 1 or not rounding:
        return None
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": exact.fma32}
    function: Function = functions[name]
    if rounding != "rn":
        function = exact.directed(rounding, exact.EXACT_TERMS[name])
    return alu(floating(function, "ftz" in m, "sat" in m), "f32", *["f32"] * count)


@form("add sub mul fma mad", "round=rn? type=f64", "sss ssss")
def _float64(name: str, m: Choices, shape: str) -> Operation | None:
    count = 3 if name in ("fma", "mad") else 2
    if len(shape) != count + 1 or (count == 3 and "round" not in m):
        return None
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    return alu(functions.get(name, exact.fma64), "f64", *["f64"] * count)


@form("add sub mul fma", "round=rn? ftz? type=f32x2", "sss ssss")
def _float32_pair(name: str, m: Choices, shape: str) -> Operation | None:
    count = 3 if name == "fma" else 2
    if len(shape) != count + 1 or (count == 3 and "round" not in m):
        return None
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": exact.fma32}
    function = exact.packed(floating(functions[name], "ftz" in m))
    return alu(function, "b64", *["b64"] * count, needs=100)


@form("neg abs", "ftz? type=f32|f64", "ss")
def _sign(name: str, m: Choices, shape: str) -> Operation | None:
    if "ftz" in m and m["type"] == "f64":
        return None
    function = np.negative if name == "neg" else np.abs
    if "ftz" in m:
        return alu(lambda a: function(exact.flush(a)), m["type"], m["type"])
    return alu(function, m["type"], m["type"])


_HALVES = "type=f16|bf16|f16x2|bf16x2"


def _widened(dtype: str) -> Function:
    """Half values, or pairs of them in words of 32 bits, to float32: which holds them all."""
    widen = conversions.conversion("f32", dtype.removesuffix("x2"), "", ftz=False, sat=False)
    assert widen is not None

    def compute(words: Array) -> Array:
        if not dtype.endswith("x2"):
            return widen(words)
        halves = np.ascontiguousarray(words).view(exact.DTYPES[dtype[:-2]])
        return widen(halves).reshape(*words.shape, 2)

    return compute


@form("add sub fma", "round=rn? sat? f32 type=f16|bf16", "sss ssss")
def _mixed(name: str, m: Choices, shape: str) -> Operation | None:
    """Of half values and, last, a float32."""
    count = 3 if name == "fma" else 2
    if len(shape) != count + 1 or (count == 3 and "round" not in m):
        return None
    functions = {"add": np.add, "sub": np.subtract, "fma": exact.fma32}
    function, widen = floating(functions[name], sat="sat" in m), _widened(m["type"])

    def compute(*values: Array) -> Array:
        return function(*(widen(v) for v in values[:-1]), values[-1])

    return alu(compute, "f32", *[m["type"]] * (count - 1), "f32", needs=100)


@form("neg abs", _HALVES, "ss")
def _half_sign(name: str, m: Choices, shape: str) -> Operation:
    pair = m["type"].endswith("x2")
    word = np.uint32 if pair else np.uint16
    sign = word(0x80008000 if pair else 0x8000)

    def compute(a: Array) -> Array:
        bits = a.view(word)
        return bits ^ sign if name == "neg" else bits & ~sign

    return alu(compute, "b32" if pair else "b16", "b32" if pair else "b16", needs=90)


@form("copysign", "type=f32|f64", "sss")
def _copysign(name: str, m: Choices, shape: str) -> Operation:
    return alu(exact.copy_sign, m["type"], m["type"], m["type"])


@form("min max", "ftz? NaN? xorsign? abs? type=f32", "sss")
@form("min max", "type=f64", "sss")
def _float_extremum(name: str, m: Choices, shape: str) -> Operation | None:
    if ("xorsign" in m) != ("abs" in m):
        return None
    function = exact.extremum(name == "max", "NaN" in m, "xorsign" in m, "ftz" in m)
    return alu(function, m["type"], m["type"], m["type"])


@form("min max", "NaN? type=f16|bf16", "sss")
def _half_extremum(name: str, m: Choices, shape: str) -> Operation:
    """Through float32, which holds every value of both."""
    function, dtype = exact.extremum(name == "max", "NaN" in m), m["type"]
    widen = conversions.conversion("f32", dtype, "", ftz=False, sat=False)
    narrow = conversions.conversion(dtype, "f32", "rn", ftz=False, sat=False)
    assert widen is not None
    assert narrow is not None
    return alu(lambda a, b: narrow(function(widen(a), widen(b))), dtype, dtype, dtype)


@form("rcp sqrt div", "rn ftz? type=f32|f64", "ss sss")
def _rounded(name: str, m: Choices, shape: str) -> Operation | None:
    count = 2 if name == "div" else 1
    if len(shape) != count + 1 or ("ftz" in m and m["type"] == "f64"):
        return None
    functions = {"div": np.divide, "sqrt": np.sqrt, "rcp": np.reciprocal}
    return alu(floating(functions[name], "ftz" in m), m["type"], *[m["type"]] * count)


@form("rcp sqrt rsqrt ex2 lg2 sin cos", "approx ftz? type=f32", "ss")
@form("div", "accuracy=approx|full ftz? type=f32", "sss")
def _approximate(name: str, m: Choices, shape: str) -> Operation:
    full = m.get("accuracy") == "full"
    function = conversions.approximate("div.full" if full else name, "ftz" in m)
    return Operation("approx", ("f32",), ("f32",) * (len(shape) - 1), function)


@form("rcp rsqrt", "approx ftz? type=f64", "ss")
def _approximate64(name: str, m: Choices, shape: str) -> Operation | None:
    if name == "rcp" and "ftz" not in m:
        return None
    return Operation("approx", ("f64",), ("f64",), conversions.approximate_upper_word(name))


@form("testp", "test=finite|infinite|number|notanumber|normal|subnormal type=f32|f64", "ss")
def _test_property(name: str, m: Choices, shape: str) -> Operation:
    def subnormal(a: Array) -> Array:
        return (exact.flush(a) == 0) & (a != 0)

    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (exact.flush(a) != 0),
        "subnormal": subnormal,
    }
    return alu(tests[m["test"]], "pred", m["type"])


# Integers


@form("add sub", f"type={ANY_INT}", "sss")
@form("add sub", "sat type=s32", "sss")
def _int_sum(name: str, m: Choices, shape: str) -> Operation:
    function: Function = np.add if name == "add" else np.subtract
    if "sat" in m:

        def saturating(a: Array, b: Array) -> Array:
            wide = function(a.astype(np.int64), b.astype(np.int64))
            return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32)

        return alu(saturating, "s32", "s32", "s32")
    return alu(function, m["type"], m["type"], m["type"])


@form("add sub", "cc type=u32|s32|u64|s64", "sss")
@form("addc subc", "cc? type=u32|s32|u64|s64", "sss")
def _carry_sum(name: str, m: Choices, shape: str) -> Operation:
    function = exact.add_with_carry if name[:3] == "add" else exact.subtract_with_borrow
    unsigned = "u" + m["type"][1:]
    sources = (unsigned, unsigned, "carry") if name[3:] else (unsigned, unsigned)
    if "cc" in m:
        return Operation("alu", (unsigned, "carry"), sources, function)
    return Operation("alu", (unsigned,), sources, lambda *args: function(*args)[0])


@form("mul", f"part=lo|hi|wide type={ANY_INT}", "sss")
@form("mad", f"part=lo|hi|wide type={ANY_INT}", "ssss")
@form("mad", "part=lo|hi cc type=u32|s32|u64|s64", "ssss")
@form("madc", "part=lo|hi cc? type=u32|s32|u64|s64", "ssss")
def _product(name: str, m: Choices, shape: str) -> Operation | None:
    kind, bits = m["type"][0], int(m["type"][1:])
    if m["part"] == "wide" and bits == 64:
        return None
    functions = {"lo": np.multiply, "hi": exact.multiply_high, "wide": exact.multiply_wide}
    multiply = functions[m["part"]]
    result = f"{kind}{2 * bits}" if m["part"] == "wide" else m["type"]
    if name == "mul":
        return alu(multiply, result, m["type"], m["type"])
    if name == "mad" and "cc" not in m:
        return alu(lambda a, b, c: multiply(a, b) + c, result, m["type"], m["type"], result)

    unsigned = np.dtype(f"uint{bits}")

    def with_carry(a: Array, b: Array, c: Array, *carry: Array) -> tuple[Array, Array]:
        product = np.asarray(multiply(a, b)).view(unsigned)
        return exact.add_with_carry(product, c.view(unsigned), *carry)

    sources = (*[m["type"]] * 3, *(["carry"] if name == "madc" else []))
    if "cc" in m:
        return Operation("alu", (f"u{bits}", "carry"), sources, with_carry)
    return Operation("alu", (f"u{bits}",), sources, lambda *args: with_carry(*args)[0])


@form("div rem", f"type={ANY_INT}", "sss")
def _quotient(name: str, m: Choices, shape: str) -> Operation:
    part = 0 if name == "div" else 1
    return alu(lambda a, b: exact.divide(a, b)[part], m["type"], m["type"], m["type"])


@form("neg abs", "type=s16|s32|s64", "ss")
def _int_sign(name: str, m: Choices, shape: str) -> Operation:
    return alu(np.negative if name == "neg" else np.abs, m["type"], m["type"])


@form("min max", f"type={ANY_INT}", "sss")
def _int_extremum(name: str, m: Choices, shape: str) -> Operation:
    return alu(np.minimum if name == "min" else np.maximum, m["type"], m["type"], m["type"])


# Bits


@form("and or xor", f"type=pred|{BITS}", "sss")
def _logic(name: str, m: Choices, shape: str) -> Operation:
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return alu(functions[name], m["type"], m["type"], m["type"])


@form("not", f"type=pred|{BITS}", "ss")
def _not(name: str, m: Choices, shape: str) -> Operation:
    return alu(np.invert, m["type"], m["type"])


@form("shl", f"type={BITS}", "sss")
@form("shr", f"type={BITS}|{ANY_INT}", "sss")
def _shift(name: str, m: Choices, shape: str) -> Operation:
    function = exact.shift_left if name == "shl" else exact.shift_right
    return alu(function, m["type"], m["type"], "u32")


@form("shf", "side=l|r mode=wrap|clamp type=b32", "ssss")
def _funnel(name: str, m: Choices, shape: str) -> Operation:
    function = exact.funnel_shift(m["side"] == "l", m["mode"] == "wrap")
    return alu(function, "b32", "b32", "b32", "u32")


@form("lop3", "type=b32", "sssss")
def _lop3(name: str, m: Choices, shape: str) -> Operation:
    return alu(exact.lop3, "b32", "b32", "b32", "b32", "imm")


@form("prmt", "type=b32", "ssss")
def _prmt(name: str, m: Choices, shape: str) -> Operation:
    return alu(exact.permute, "b32", "b32", "b32", "b32")


@form("bfe", "type=u32|s32|u64|s64", "ssss")
def _bfe(name: str, m: Choices, shape: str) -> Operation:
    return alu(exact.extract_field, m["type"], m["type"], "u32", "u32")


@form("bfi", "type=b32|b64", "sssss")
def _bfi(name: str, m: Choices, shape: str) -> Operation:
    return alu(exact.insert_field, m["type"], m["type"], m["type"], "u32", "u32")


@form("brev clz popc", "type=b32|b64", "ss")
def _bit_count(name: str, m: Choices, shape: str) -> Operation:
    functions = {"clz": exact.leading_zeros, "popc": exact.population_count}
    if name == "brev":
        return alu(exact.reverse_bits, m["type"], m["type"])
    return alu(functions[name], "u32", m["type"])


# Comparison and selection

_COMPARE = {
    **dict.fromkeys(("eq",), np.equal),
    **dict.fromkeys(("ne",), np.not_equal),
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_FLOAT_TESTS = "cmp=eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"


def _float_comparison(test: str, ftz: bool) -> Function:
    def compute(a: Array, b: Array) -> Array:
        if ftz:
            a, b = exact.flush(a), exact.flush(b)
        unordered = np.isnan(a) | np.isnan(b)
        if test in ("num", "nan"):
            return unordered if test == "nan" else ~unordered
        if test.endswith("u"):
            return _COMPARE[test[:-1]](a, b) | unordered
        return _COMPARE[test](a, b) & ~unordered

    return compute


@form("setp", f"{_FLOAT_TESTS} bool=and|or|xor? ftz? type=f32|f64", "sss |ss ssss |sss")
@form("setp", "cmp=eq|ne|lt|le|gt|ge bool=and|or|xor? type=s16|s32|s64", "sss |ss ssss |sss")
@form(
    "setp",
    "cmp=eq|ne|lt|le|gt|ge|lo|ls|hi|hs bool=and|or|xor? type=u16|u32|u64",
    "sss |ss ssss |sss",
)
@form("setp", "cmp=eq|ne bool=and|or|xor? type=b16|b32|b64", "sss |ss ssss |sss")
def _setp(name: str, m: Choices, shape: str) -> Operation | None:
    if (len(shape) == 4) != ("bool" in m) or ("ftz" in m and m["type"] == "f64"):
        return None
    compare: Function = _COMPARE.get(m["cmp"], np.equal)
    if m["type"] in ("f32", "f64"):
        compare = _float_comparison(m["cmp"], "ftz" in m)
    sources: tuple[str, ...] = (m["type"], m["type"])
    both = compare
    if "bool" in m:
        combine = _COMBINE[m["bool"]]
        sources += ("pred",)

        def both(a: Array, b: Array, p: Array) -> Array:
            return combine(compare(a, b), p)

    if shape[0] != "|":
        return Operation("alu", ("pred",), sources, both)

    def pair(a: Array, b: Array, *p: Array) -> tuple[Array, Array]:
        first = compare(a, b)
        return (combine(first, *p), combine(~first, *p)) if p else (first, ~first)

    return Operation("alu", ("pred", "pred"), sources, pair)


@form("setp", f"{_FLOAT_TESTS} {_HALVES}", "sss |ss")
def _half_setp(name: str, m: Choices, shape: str) -> Operation | None:
    """Of a pair each half has a predicate."""
    if (shape[0] == "|") != m["type"].endswith("x2"):
        return None
    widen, compare = _widened(m["type"]), _float_comparison(m["cmp"], ftz=False)

    def both(a: Array, b: Array) -> Any:
        result = compare(widen(a), widen(b))
        return (result[..., 0], result[..., 1]) if shape[0] == "|" else result

    results = ("pred", "pred") if shape[0] == "|" else ("pred",)
    return Operation("alu", results, (m["type"], m["type"]), both)


@form("selp", f"type={BITS}|{ANY_INT}|f32|f64", "ssss")
def _selp(name: str, m: Choices, shape: str) -> Operation:
    return alu(lambda a, b, p: np.where(p, a, b), m["type"], m["type"], m["type"], "pred")
