"""The PTX interpreter: its instructions to exact oracles, and that each of its checks can fail."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptx import Machine, Memory, Module, PTXError, Stats

Array = np.ndarray[Any, np.dtype[Any]]
HEADER = ".version 8.8\n.target sm_100\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<16>; .reg .f32 %f<16>;"
)
BLOCK = 128


def source(body: str, pointers: Sequence[str] = (), directives: str = "", module: str = "") -> str:
    """A module with kernel k: its parameters are pointers, %d0, %d1, ... hold them, %r0 the tid."""
    parameters = ", ".join(f".param .u64 {name}" for name in pointers)
    loads = "".join(f"ld.param.u64 %d{index}, [{name}];\n" for index, name in enumerate(pointers))
    return (
        f"{HEADER}{module}\n.visible .entry k({parameters}) {directives} {{\n{REGISTERS}\n{loads}"
        f"mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def address(value: int) -> bytes:
    return value.to_bytes(8, "little")


def launch(text: str, *, threads: int = 32, grid: int = 1, **machine: Any) -> Stats:
    """Run a kernel that takes no parameters."""
    kernel = Module.parse(text).kernels["k"]
    return Machine(kernel, Memory(), **machine).launch((grid, 1, 1), (threads, 1, 1), [])


def fails(message: str, body: str, **options: Any) -> None:
    """A launch of this body raises, and names the kernel, a line and the reason."""
    with pytest.raises(PTXError, match=rf"^kernel k, line \d+: `.*{message}") as caught:
        launch(source(body), **options)
    assert "`" in str(caught.value)


def evaluate(code: str, output: str, *inputs: Array, **machine: Any) -> Array:
    """What `code` leaves in %z from %a, %b, %c: one element a thread."""
    names = "abcd"[: len(inputs)]
    registers, loads = f".reg .{'pred' if output == 'p' else output} %z;\n", ""
    pointers = [*names, "z"]
    for index, (name, values) in enumerate(zip(names, inputs, strict=True)):
        bits = f"b{8 * values.itemsize}"
        registers += f".reg .{bits} %{name};\n"
        loads += f"mad.wide.u32 %d8, %r2, {values.itemsize}, %d{index};\n"
        loads += f"ld.global.{bits} %{name}, [%d8];\n"
    size = int(output[1:]) // 8
    body = (
        f"{registers}mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %r2, %r1, {BLOCK}, %r0;\n{loads}{code}\n"
        f"mad.wide.u32 %d8, %r2, {size}, %d{len(inputs)};\nst.global.{output} [%d8], %z;"
    )
    count = -(-max(len(values) for values in inputs) // BLOCK) * BLOCK
    memory = Memory()
    addresses = [
        memory.allocate(name, np.resize(values, count))
        for name, values in zip(names, inputs, strict=True)
    ]
    result = np.zeros(count, f"u{size}")
    addresses.append(memory.allocate("z", result, writable=True))
    kernel = Module.parse(source(body, pointers)).kernels["k"]
    Machine(kernel, memory, **machine).launch(
        (count // BLOCK, 1, 1), (BLOCK, 1, 1), [address(value) for value in addresses]
    )
    memory.check_written_once("z")
    return result[: max(len(values) for values in inputs)]


def equal_bits(found: Array, expected: Array) -> None:
    expected = np.ascontiguousarray(expected).view(found.dtype)
    wrong = np.flatnonzero(found != expected)
    assert not wrong.size, (wrong[:5], found[wrong[:5]], expected[wrong[:5]])


def random_bits(rng: np.random.Generator, count: int, dtype: Any) -> Array:
    """Every sign, exponent and NaN."""
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 1 << (8 * size), count, f"u{size}", endpoint=False).view(dtype)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


# Arithmetic


def rounded(exact: Fraction, dtype: Any, mode: str = "rn") -> Any:
    """The nearest float, ties to even; or the one below (rm), above (rp), toward zero (rz)."""
    information = np.finfo(dtype)
    sign = -1 if exact < 0 else 1
    magnitude = abs(exact)
    if magnitude == 0:
        return dtype(0)
    exponent = max(
        magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1,
        int(information.minexp),
    )
    if exponent < information.maxexp and magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - information.nmant)
    units, rest = divmod(magnitude, unit)
    up = {
        "rn": rest > unit / 2 or (rest == unit / 2 and units % 2 == 1),
        "rz": False,
        "rm": sign < 0 and rest > 0,
        "rp": sign > 0 and rest > 0,
    }[mode]
    magnitude = (units + up) * unit
    largest = Fraction(float(information.max))
    if magnitude > largest:
        to_largest = mode == "rz" or ((mode == "rm") == (sign > 0) and mode != "rn")
        return dtype(sign * (float(largest) if to_largest else np.inf))
    return dtype(sign * float(magnitude))


def fma_cases(rng: np.random.Generator, dtype: Any) -> tuple[Array, Array, Array]:
    """Finite operands: all exponents, sums that nearly cancel, ties, subnormal results."""
    information = np.finfo(dtype)
    a, b, c = (random_bits(rng, 1500, dtype) for _ in range(3))
    for values in (a, b, c):
        values[~np.isfinite(values)] = 1
    mantissas = [rng.uniform(1, 2, 1500).astype(dtype) for _ in range(2)]
    with np.errstate(all="ignore"):
        cancelling = -(mantissas[0] * mantissas[1])
        half_units = np.ldexp(
            rng.integers(1, 4, 1500).astype(dtype),
            rng.integers(-3 * information.nmant, 3, 1500),
        )
        ties = np.ldexp(dtype(1), rng.integers(-information.nmant - 3, 1, 1500)).astype(dtype)
    tiny = (mantissas[0] * information.tiny * 4).astype(dtype)
    return (
        np.concatenate([a, mantissas[0], mantissas[0], tiny]),
        np.concatenate([b, mantissas[1], ties, half_units]),
        np.concatenate([c, cancelling, np.ones(1500, dtype), tiny[::-1]]),
    )


def exact_fma(a: Array, b: Array, c: Array, mode: str) -> Array:
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    return np.array([rounded(value, a.dtype.type, mode) for value in exact])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma32(rng: np.random.Generator, mode: str) -> None:
    a, b, c = fma_cases(rng, np.float32)
    found = evaluate(f"fma.{mode}.f32 %z, %a, %b, %c;", "b32", a, b, c).view(np.float32)
    expected = exact_fma(a, b, c, mode)
    nonzero = expected != 0  # the sign of a zero is tested below
    equal_bits(found[nonzero].view(np.uint32), expected[nonzero])
    assert (found[~nonzero] == 0).all()


def test_fma32_is_not_rounded_twice() -> None:
    # The product is 1 + 2^-24 + 2^-78 or so: a tie once rounded to float64.
    a, b, c = np.float32([1 + 2**-12, 1, 1]), np.float32([1 - 2**-12, 1, 1]), np.float32([0, 0, 0])
    b[1], c[1] = 2**-24, 1
    a[2], b[2], c[2] = 2**-60, 2**-60, 1
    found = evaluate("fma.rn.f32 %z, %a, %b, %c;", "b32", a, b, c)
    equal_bits(found, exact_fma(a, b, c, "rn"))


def test_fma64(rng: np.random.Generator) -> None:
    a, b, c = fma_cases(rng, np.float64)
    found = evaluate("fma.rn.f64 %z, %a, %b, %c;", "b64", a, b, c).view(np.float64)
    expected = exact_fma(a, b, c, "rn")
    nonzero = expected != 0
    equal_bits(found[nonzero].view(np.uint64), expected[nonzero])
    assert (found[~nonzero] == 0).all()


@pytest.mark.parametrize("bits", [32, 64])
def test_fma_of_zeros_infinities_and_nan(bits: int) -> None:
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40]
    dtype = np.dtype(f"f{bits // 8}")
    a, b, c = (np.array(axis, dtype).ravel() for axis in np.meshgrid(special, special, special))
    found = evaluate(f"fma.rn.f{bits} %z, %a, %b, %c;", f"b{bits}", a, b, c).view(dtype)
    with np.errstate(all="ignore"):
        expected = (a.astype(np.longdouble) * b + c).astype(dtype)
    nan = np.isnan(expected)
    equal_bits(found[~nan].view(f"u{bits // 8}"), expected[~nan])
    assert np.isnan(found[nan]).all()
    if bits == 32:
        assert (found[nan].view(np.uint32) == 0x7FFFFFFF).all()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn", "sqrt.rn"])
@pytest.mark.parametrize("bits", [32, 64])
def test_rounded_float_operations(rng: np.random.Generator, name: str, bits: int) -> None:
    dtype = np.dtype(f"f{bits // 8}")
    a, b = random_bits(rng, 2000, dtype), random_bits(rng, 2000, dtype)
    function = getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply"}.get(name, "sqrt"))
    with np.errstate(all="ignore"):
        expected = a / b if name == "div.rn" else function(*((a, b)[: function.nin]))
    arguments = "%a" if name == "sqrt.rn" else "%a, %b"
    found = evaluate(f"{name}.f{bits} %z, {arguments};", f"b{bits}", a, b).view(dtype)
    nan = np.isnan(expected)
    assert np.isnan(found[nan]).all()
    assert bits == 64 or (found[nan].view(np.uint32) == 0x7FFFFFFF).all()
    equal_bits(found[~nan].view(f"u{bits // 8}"), expected[~nan])


def test_flush_to_zero() -> None:
    a = np.float32([1e-40, -1e-40, 2.0**-126, -(2.0**-126), 0.5, 2.0**-126])
    b = np.float32([1, 1, 0.5, 0.5, 1, 1])
    found = evaluate("mul.ftz.f32 %z, %a, %b;", "b32", a, b)
    equal_bits(found, np.float32([0, -0.0, 0, -0.0, 0.5, 2.0**-126]))
    equal_bits(evaluate("mul.f32 %z, %a, %b;", "b32", a, b), a * b)
    assert evaluate("setp.eq.ftz.f32 %p0, %a, 0f00000000; selp.b32 %z, 1, 0, %p0;", "b32", a)[0]
    assert not evaluate("setp.eq.f32 %p0, %a, 0f00000000; selp.b32 %z, 1, 0, %p0;", "b32", a)[0]


def test_saturation() -> None:
    a = np.float32([np.nan, -1, -0.0, 0.25, 2, np.inf])
    found = evaluate("add.sat.f32 %z, %a, 0f80000000;", "b32", a)
    equal_bits(found, np.float32([0, 0, 0, 0.25, 1, 1]))


@pytest.mark.parametrize(
    ("name", "nan_left", "xorsign"),
    [
        ("min", False, False),
        ("max", False, False),
        ("min.NaN", True, False),
        ("max.NaN", True, False),
        ("min.xorsign.abs", False, True),
        ("min.NaN.xorsign.abs", True, True),
        ("max.NaN.xorsign.abs", True, True),
    ],
)
def test_min_and_max(name: str, nan_left: bool, xorsign: bool) -> None:
    special = np.float32([0.0, -0.0, 1, -1, 2, -3, np.inf, -np.inf, np.nan])
    a, b = (axis.ravel() for axis in np.meshgrid(special, special))
    found = evaluate(f"{name}.f32 %z, %a, %b;", "b32", a, b)
    for x, y, bits in zip(a, b, found, strict=True):
        sign = np.signbit(x) ^ np.signbit(y)
        x, y = (abs(x), abs(y)) if xorsign else (x, y)
        # -0 < +0
        ordered = sorted((x, y), key=lambda v: (v, not np.signbit(v)))
        expected = ordered[0] if name.startswith("min") else ordered[1]
        if np.isnan(x) or np.isnan(y):
            expected = y if np.isnan(x) else x
            if nan_left or np.isnan(expected):
                assert bits == 0x7FFFFFFF or (xorsign and not nan_left)
                continue
        if xorsign:
            expected = np.copysign(expected, -1.0 if sign else 1.0)
        assert bits == np.float32(expected).view(np.uint32), (x, y)


def test_packed_float32(rng: np.random.Generator) -> None:
    pairs = [rng.normal(size=400).astype(np.float32) for _ in range(3)]
    a, b, c = (values.view(np.uint64) for values in pairs)
    equal_bits(evaluate("add.rn.f32x2 %z, %a, %b;", "b64", a, b), pairs[0] + pairs[1])
    equal_bits(evaluate("mul.rn.f32x2 %z, %a, %b;", "b64", a, b), pairs[0] * pairs[1])
    found = evaluate("fma.rn.f32x2 %z, %a, %b, %c;", "b64", a, b, c)
    equal_bits(found, exact_fma(*pairs, "rn"))


def test_half_types(rng: np.random.Generator) -> None:
    """Pairs in a word, and sums with a float32; of bfloat16 by the float32 that it begins."""
    a, b = (random_bits(rng, 600, np.uint32) for _ in range(2))
    b[:50] = a[:50]
    equal_bits(evaluate("abs.f16x2 %z, %a;", "b32", a), a & np.uint32(0x7FFF7FFF))
    equal_bits(evaluate("neg.bf16x2 %z, %a;", "b32", a), a ^ np.uint32(0x80008000))
    less = "%p0|%p1, %a, %b; selp.b32 %r4, 1, 0, %p0; selp.b32 %r5, 2, 0, %p1;"
    halves = [x.view(np.float16).reshape(-1, 2) for x in (a, b)]
    wide = [np.stack([x << np.uint32(16), x & np.uint32(0xFFFF0000)], -1).view(np.float32)
            for x in (a, b)]  # fmt: skip
    for kind, (x, y) in (("f16x2", halves), ("bf16x2", wide)):
        found = evaluate(f"setp.le.{kind} {less} or.b32 %z, %r4, %r5;", "b32", a, b)
        equal_bits(found, ((x <= y) * np.uint32([1, 2])).sum(-1).astype(np.uint32))
    half, single = rng.normal(size=400).astype(np.float16), rng.normal(size=400).astype(np.float32)
    for name, function in (("add", np.add), ("sub", np.subtract)):
        found = evaluate(f"{name}.rn.f32.f16 %z, %a, %b;", "b32", half.view(np.uint16), single)
        equal_bits(found, function(half.astype(np.float32), single))


APPROXIMATE: dict[str, tuple[Callable[..., Any], str, float]] = {
    "rcp": (lambda x: 1 / x, "rel", 2**-23),
    "sqrt": (np.sqrt, "rel", 2**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), "rel", 2**-22.9),
    "ex2": (np.exp2, "rel", 2**-22),
    "lg2": (np.log2, "rel", 2**-22),
    "sin": (np.sin, "abs", 2**-20.5),
    "cos": (np.cos, "abs", 2**-20.5),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_stay_within_their_bounds(rng: np.random.Generator, name: str) -> None:
    function, kind, bound = APPROXIMATE[name]
    x = rng.uniform(2.1 if name == "lg2" else 0.01, 6, 3000).astype(np.float32)
    exact = function(x.astype(np.float64))
    code = f"{name}.approx.ftz.f32 %z, %a;"
    nearest = evaluate(code, "b32", x).view(np.float32)
    equal_bits(nearest.view(np.uint32), exact.astype(np.float32))
    allowed = bound * (np.abs(exact) if kind == "rel" else 1)
    error: Any
    for error, sign in ((1.0, 1), (-1.0, -1), (np.random.default_rng(3), 0)):
        moved = evaluate(code, "b32", x, approx_error=error).view(np.float32)
        assert (np.abs(moved - exact) <= allowed).all()
        assert (moved != nearest).mean() > 0.3
        if sign:
            assert ((moved - exact) * sign >= -(np.abs(exact) * 2.0**-24)).all()


def test_approximations_of_special_values() -> None:
    x = np.float32([0, -0.0, np.inf, -np.inf, np.nan, -1, 1e-40])
    with np.errstate(all="ignore"):
        found = evaluate("rsqrt.approx.f32 %z, %a;", "b32", x).view(np.float32)
        np.testing.assert_array_equal(found[:6], [np.inf, -np.inf, 0, np.nan, np.nan, np.nan])
        assert found[6] == np.float32(1 / np.sqrt(np.float64(x[6])))
        ftz = evaluate("rsqrt.approx.ftz.f32 %z, %a;", "b32", x).view(np.float32)
    assert ftz[6] == np.inf


def test_upper_word_approximations(rng: np.random.Generator) -> None:
    x = rng.uniform(0.5, 2, 500)
    for name, exact in (("rcp", 1 / x), ("rsqrt", 1 / np.sqrt(x))):
        found = evaluate(f"{name}.approx.ftz.f64 %z, %a;", "b64", x)
        assert (found & np.uint64(0xFFFFFFFF) == 0).all()
        assert (np.abs(found.view(np.float64) / exact - 1) < 2**-19).all()


INTEGER_ORACLES: dict[str, Callable[[int, int, int], int]] = {
    "add.s32": lambda a, b, c: a + b,
    "sub.u32": lambda a, b, c: a - b,
    "mul.lo.u32": lambda a, b, c: a * b,
    "mul.hi.u32": lambda a, b, c: a * b >> 32,
    "mul.hi.s32": lambda a, b, c: a * b >> 32,
    "mul.hi.u64": lambda a, b, c: a * b >> 64,
    "mul.hi.s64": lambda a, b, c: a * b >> 64,
    "mul.wide.u32": lambda a, b, c: a * b,
    "mul.wide.s32": lambda a, b, c: a * b,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.hi.u32": lambda a, b, c: (a * b >> 32) + c,
    "div.s32": lambda a, b, c: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "div.u64": lambda a, b, c: a // b,
    "rem.s64": lambda a, b, c: abs(a) % abs(b) * (-1 if a < 0 else 1),
    "rem.u32": lambda a, b, c: a % b,
    "min.s32": lambda a, b, c: min(a, b),
    "max.u64": lambda a, b, c: max(a, b),
    "and.b32": lambda a, b, c: a & b,
    "xor.b64": lambda a, b, c: a ^ b,
    "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "not.b32": lambda a, b, c: ~a,
    "neg.s64": lambda a, b, c: -a,
    "abs.s32": lambda a, b, c: abs(a),
    "popc.b32": lambda a, b, c: a.bit_count(),
    "popc.b64": lambda a, b, c: a.bit_count(),
    "clz.b32": lambda a, b, c: 32 - a.bit_length(),
    "clz.b64": lambda a, b, c: 64 - a.bit_length(),
    "brev.b32": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "brev.b64": lambda a, b, c: int(f"{a:064b}"[::-1], 2),
}
ONE_OPERAND = {"not", "neg", "abs", "popc", "clz", "brev"}


@pytest.mark.parametrize("opcode", INTEGER_ORACLES)
def test_integers(rng: np.random.Generator, opcode: str) -> None:
    name, kind = opcode.split(".")[0], opcode.rsplit(".", 1)[1]
    dtype = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{kind[1:]}")
    a, b, c = (random_bits(rng, 600, dtype) for _ in range(3))
    a[:4], b[:4] = np.iinfo(dtype).min, (1, 2, 3, np.iinfo(dtype).max)
    c[:40] = np.arange(40)
    a[40:60] >>= dtype.type(dtype.itemsize * 6)  # small ones
    b[b == 0] = 1
    output = {"popc": "b32", "clz": "b32"}.get(name, f"b{kind[1:]}")
    output = "b64" if ".wide" in opcode else output
    count = 1 if name in ONE_OPERAND else 3 if name in ("mad", "shf") else 2
    code = f"{opcode} %z, {', '.join(('%a', '%b', '%c')[:count])};"
    found = evaluate(code, output, a, b, c)
    mask = (1 << int(output[1:])) - 1
    oracle = INTEGER_ORACLES[opcode]
    expected = [oracle(*(int(v) for v in x)) & mask for x in zip(a, b, c, strict=True)]
    equal_bits(found, np.array(expected, found.dtype))


@pytest.mark.parametrize(
    "opcode",
    ["shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.u32", "shr.b64", "shr.s32", "shr.s64"],
)
def test_shifts(rng: np.random.Generator, opcode: str) -> None:
    name, kind = opcode.split(".")
    bits = int(kind[1:])
    dtype = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{bits}")
    a = random_bits(rng, 400, dtype)
    count = rng.integers(0, 2 * bits, 400).astype(np.uint32)
    count[:3] = (bits - 1, bits, 2**32 - 1)
    found = evaluate(f"{opcode} %z, %a, %b;", f"b{bits}", a, count)
    shift = (lambda x, n: x << min(n, bits)) if name == "shl" else (lambda x, n: x >> min(n, 64))
    expected = [shift(int(x), int(n)) & (1 << bits) - 1 for x, n in zip(a, count, strict=True)]
    equal_bits(found, np.array(expected, found.dtype))


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x1B, 0x00, 0xFF, 0xF0, 0x01])
def test_lop3(rng: np.random.Generator, table: int) -> None:
    a, b, c = (random_bits(rng, 128, np.uint32) for _ in range(3))
    found = evaluate(f"lop3.b32 %z, %a, %b, %c, {table};", "b32", a, b, c)
    expected = np.zeros(128, np.uint32)
    for bit in range(32):
        index = sum((x >> bit & 1) << place for x, place in ((a, 2), (b, 1), (c, 0)))
        expected |= (table >> index.astype(np.uint32) & 1).astype(np.uint32) << np.uint32(bit)
    equal_bits(found, expected)


def test_prmt(rng: np.random.Generator) -> None:
    a, b, c = (random_bits(rng, 1000, np.uint32) for _ in range(3))
    found = evaluate("prmt.b32 %z, %a, %b, %c;", "b32", a, b, c)
    for x, y, selector, bits in zip(a, b, c, found, strict=True):
        data = struct.pack("<II", x, y)
        nibbles = [int(selector) >> 4 * i & 15 for i in range(4)]
        chosen = [data[n & 7] if n < 8 else 255 * (data[n & 7] >> 7) for n in nibbles]
        assert bits == int.from_bytes(bytes(chosen), "little")


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(rng: np.random.Generator, kind: str) -> None:
    bits = int(kind[1:])
    a, b = (random_bits(rng, 600, f"u{bits // 8}") for _ in range(2))
    position, length = (rng.integers(0, bits + 8, 600).astype(np.uint32) for _ in range(2))
    length[:5] = 0
    found = evaluate(f"bfe.{kind} %z, %a, %b, %c;", f"b{bits}", a, position, length)
    inserted = evaluate(f"bfi.b{bits} %z, %a, %b, %c, %d;", f"b{bits}", a, b, position, length)
    for i in range(600):
        x, y, p, n = int(a[i]), int(b[i]), int(position[i]), int(length[i])
        sign = x >> min(p + n - 1, bits - 1) & 1 if kind[0] == "s" and n else 0
        field = [x >> (p + k) & 1 if k < n and p + k < bits else sign for k in range(bits)]
        assert int(found[i]) == sum(bit << k for k, bit in enumerate(field))
        for k in range(n):
            if p + k < bits:
                y = y & ~(1 << p + k) | (x >> k & 1) << p + k
        assert int(inserted[i]) == y


def test_carry_chain(rng: np.random.Generator) -> None:
    a, b = (random_bits(rng, 500, np.uint64) for _ in range(2))
    a[:3], b[:3] = 2**64 - 1, (1, 0, 2**64 - 1)
    split = "mov.b64 {%r4, %r5}, %a; mov.b64 {%r6, %r7}, %b;"
    join = "mov.b64 %z, {%r8, %r9};"
    add = "add.cc.u32 %r8, %r4, %r6; addc.u32 %r9, %r5, %r7;"
    equal_bits(evaluate(split + add + join, "b64", a, b), a + b)
    sub = "sub.cc.u32 %r8, %r4, %r6; subc.u32 %r9, %r5, %r7;"
    equal_bits(evaluate(split + sub + join, "b64", a, b), a - b)
    product = (
        "mul.lo.u32 %r8, %r4, %r6; mul.hi.u32 %r9, %r4, %r6;"
        "mad.lo.cc.u32 %r8, %r4, 7, %r8; madc.hi.u32 %r9, %r4, 7, %r9;"
    )
    low_a, low_b = a & np.uint64(2**32 - 1), b & np.uint64(2**32 - 1)
    equal_bits(evaluate(split + product + join, "b64", a, b), low_a * low_b + low_a * np.uint64(7))


COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"]


@pytest.mark.parametrize("test", [*COMPARISONS, "num", "nan"])
def test_float_comparisons(test: str) -> None:
    special = np.float32([0, -0.0, 1, np.inf, np.nan])
    a, b = (axis.ravel() for axis in np.meshgrid(special, special))
    found = evaluate(f"setp.{test}.f32 %p0, %a, %b; selp.u32 %z, 1, 0, %p0;", "b32", a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if test in ("num", "nan"):
        expected = unordered == (test == "nan")
    else:
        operator = getattr(
            np,
            {"eq": "equal", "ne": "not_equal"}.get(test[:2], "")
            or ({"l": "less", "g": "greater"}[test[0]] + ("_equal" if test[1] == "e" else "")),
        )
        expected = operator(a, b)
        expected = expected | unordered if test.endswith("u") else expected & ~unordered
    equal_bits(found, expected.astype(np.uint32))


def test_comparisons_that_combine_and_pairs() -> None:
    a, b = (axis.ravel().astype(np.int32) for axis in np.meshgrid([-2, 0, 3], [-2, 0, 3]))
    code = "setp.ne.s32 %p2, %a, 0; setp.lt.and.s32 %p0|%p1, %a, %b, !%p2;"
    code += "selp.b32 %r4, 1, 0, %p0; selp.b32 %r5, 2, 0, %p1; or.b32 %z, %r4, %r5;"
    expected = ((a < b) & (a == 0)) + 2 * (~(a < b) & (a == 0))
    equal_bits(evaluate(code, "b32", a, b), expected.astype(np.uint32))
    found = evaluate("setp.lo.u32 %p0, %a, %b; selp.b32 %z, 1, 0, %p0;", "b32", a, b)
    equal_bits(found, (a.view(np.uint32) < b.view(np.uint32)).astype(np.uint32))


def torch_cast(values: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_conversions(rng: np.random.Generator, name: str, dtype: torch.dtype) -> None:
    x = np.concatenate(
        [
            random_bits(rng, 3000, np.float32),
            rng.uniform(-7e4, 7e4, 500).astype(np.float32),
            rng.uniform(-1e-7, 1e-7, 500).astype(np.float32),
            np.float32([65519.99, 65520, np.inf, -np.inf, 0, -0.0, 2.0**-25]),
            (np.arange(0, 500, dtype=np.uint32) << 15 | 0x3F800000).view(np.float32),  # ties
        ]
    )
    nan = np.isnan(x)
    found = evaluate(f"cvt.rn.{name}.f32 %z, %a;", "b16", x)
    equal_bits(found[~nan], torch_cast(x, dtype)[~nan])
    assert (found[nan] == 0x7FFF).all()
    pair = evaluate(f"cvt.rn.{name}x2.f32 %z, %a, %b;", "b32", x, x[::-1].copy())
    equal_bits(pair, found.astype(np.uint32) << 16 | found[::-1])

    halves = np.arange(1 << 16, dtype=np.uint16)
    back = evaluate(f"cvt.f32.{name} %z, %a;", "b32", halves).view(np.float32)
    expected = torch.from_numpy(halves).view(dtype).float().numpy()
    nan = np.isnan(expected)
    equal_bits(back[~nan].view(np.uint32), expected[~nan])
    assert np.isnan(back[nan]).all()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_double_to_float(rng: np.random.Generator, mode: str) -> None:
    x = np.concatenate(
        [np.ldexp(rng.uniform(-2, 2, 900), rng.integers(-155, 135, 900)), rng.normal(size=900)]
    )
    found = evaluate(f"cvt.{mode}.f32.f64 %z, %a;", "b32", x)
    expected = np.array([rounded(Fraction(v), np.float32, mode) for v in x])
    nonzero = expected != 0
    equal_bits(found[nonzero], expected[nonzero])


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("source_type", ["f32", "f64"])
def test_float_to_integer(rng: np.random.Generator, to: str, source_type: str) -> None:
    dtype = np.dtype(f"f{int(source_type[1:]) // 8}")
    bits = int(to[1:])
    low, high = (0, 2**bits - 1) if to[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    x = np.concatenate(
        [
            rng.uniform(-300, 300, 300),
            np.arange(-5, 5, 0.5),
            [-np.inf, np.inf, low, high, 1e30, -1e30, np.nan],
            np.ldexp(rng.uniform(-1, 1, 300), rng.integers(10, 70, 300)),
        ]
    ).astype(dtype)
    width = max(bits, 16)
    rounders = {
        "rni": round,
        "rzi": int,
        "rmi": lambda v: v.__floor__(),
        "rpi": lambda v: v.__ceil__(),
    }
    for mode, rounder in rounders.items():
        found = evaluate(f"cvt.{mode}.{to}.{source_type} %z, %a;", f"b{width}", x)
        for value, result in zip(x, found, strict=True):
            if np.isnan(value):
                expected = 1 << (bits - 1) if source_type == "f64" or bits == 64 else 0
            elif np.isinf(value):
                expected = high if value > 0 else low
            else:
                expected = min(max(rounder(Fraction(float(value))), low), high)
            assert int(result) == expected & (1 << width) - 1, (mode, value)


def test_integer_conversions(rng: np.random.Generator) -> None:
    x = random_bits(rng, 1000, np.int64)
    x[:300] >>= np.int64(40)
    equal_bits(evaluate("cvt.rn.f32.s64 %z, %a;", "b32", x), x.astype(np.float32))
    equal_bits(evaluate("cvt.rn.f64.u64 %z, %a;", "b64", x), x.view(np.uint64).astype(np.float64))
    equal_bits(evaluate("cvt.u32.u64 %z, %a;", "b32", x), x.astype(np.uint32))
    equal_bits(evaluate("cvt.s8.s64 %z, %a;", "b32", x), x.astype(np.int8).astype(np.int32))
    equal_bits(evaluate("cvt.u16.s64 %z, %a;", "b32", x), x.astype(np.uint16).astype(np.uint32))
    equal_bits(
        evaluate("cvt.sat.s16.s64 %z, %a;", "b16", x), np.clip(x, -32768, 32767).astype("i2")
    )
    small = x.astype(np.int32)
    equal_bits(evaluate("cvt.s64.s32 %z, %a;", "b64", small), small.astype(np.int64))
    expected = [rounded(Fraction(int(v)), np.float32, "rz") for v in small]
    equal_bits(evaluate("cvt.rz.f32.s32 %z, %a;", "b32", small), np.array(expected))
    values = rng.uniform(-9, 9, 300).astype(np.float32)
    equal_bits(evaluate("cvt.rmi.f32.f32 %z, %a;", "b32", values), np.floor(values))


def test_packing_moves(rng: np.random.Generator) -> None:
    a, b = (random_bits(rng, 200, np.uint64) for _ in range(2))
    code = "mov.b64 {%r4, %r5}, %a; mov.b32 {%h0, %h1}, %r4; mov.b32 %r6, {%h1, %h0};"
    found = evaluate(code + "mov.b64 %z, {%r5, %r6};", "b64", a)
    halves = a.view(np.uint16).reshape(-1, 4)
    equal_bits(found, np.ascontiguousarray(halves[:, [2, 3, 1, 0]]).view(np.uint64)[:, 0])
    wide = ".reg .b128 %q; mov.b128 %q, {%a, %b}; mov.b128 {_, %z}, %q;"
    equal_bits(evaluate(wide, "b64", a, b), b)


# Control flow

COLLATZ = """
    mov.u32 %r4, 0;
LOOP:
    setp.eq.u32 %p0, %a, 1;
    @%p0 bra DONE;
    and.b32 %r5, %a, 1;
    setp.eq.u32 %p1, %r5, 0;
    @%p1 bra EVEN;
    mad.lo.u32 %a, %a, 3, 1;
    bra.uni NEXT;
EVEN:
    shr.u32 %a, %a, 1;
NEXT:
    add.u32 %r4, %r4, 1;
    bra LOOP;
DONE:
    mov.u32 %z, %r4;
"""


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = n // 2 if n % 2 == 0 else 3 * n + 1, steps + 1
    return steps


def test_divergence() -> None:
    start = np.arange(1, 513, dtype=np.uint32)
    found = evaluate(COLLATZ, "b32", start)
    equal_bits(found, np.array([collatz(int(n)) for n in start], np.uint32))


def test_guards_and_early_exits() -> None:
    out = np.full(64, 7, np.uint32)
    body = """
    mad.wide.u32 %d1, %r0, 4, %d0;
    setp.ge.u32 %p0, %r0, 50;
    @%p0 exit;
    mov.u32 %r1, 1;
    setp.lt.u32 %p1, %r0, 20;
    @!%p1 mov.u32 %r1, 2;
    st.global.u32 [%d1], %r1;
    """
    memory = Memory()
    pointer = memory.allocate("z", out, writable=True)
    kernel = Module.parse(source(body, ["z"])).kernels["k"]
    stats = Machine(kernel, memory).launch((1, 1, 1), (64, 1, 1), [address(pointer)])
    np.testing.assert_array_equal(out, [1] * 20 + [2] * 30 + [7] * 14)
    memory.check_written_once("z", range(200))
    assert stats.executed[:10] == [64, 64, 64, 64, 14, 50, 50, 30, 50, 50]
    assert stats.instructions == 5 * 64 + 5 * 50


def test_axes_of_the_grid() -> None:
    out = np.zeros(2 * 3 * 2 * 24, np.uint32)
    body = """
    mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
    mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
    mov.u32 %r6, %ctaid.x; mov.u32 %r7, %ctaid.y; mov.u32 %r8, %ctaid.z;
    mov.u32 %r9, %nctaid.x; mov.u32 %r10, %nctaid.y;
    mad.lo.u32 %r11, %r8, %r10, %r7; mad.lo.u32 %r11, %r11, %r9, %r6;
    mad.lo.u32 %r12, %r11, 24, %r5; mad.wide.u32 %d1, %r12, 4, %d0;
    mov.u32 %r13, %laneid; mad.lo.u32 %r13, %r11, 1000, %r13; st.global.u32 [%d1], %r13;
    """
    memory = Memory()
    pointer = memory.allocate("z", out, writable=True)
    kernel = Module.parse(source(body, ["z"])).kernels["k"]
    Machine(kernel, memory).launch((2, 3, 2), (4, 3, 2), [address(pointer)])
    memory.check_written_once("z")
    np.testing.assert_array_equal(
        out.reshape(12, 24), np.arange(12)[:, None] * 1000 + np.arange(24)
    )


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode: str, width: int) -> None:
    values = np.arange(100, 228, dtype=np.uint32)
    clamp = ((32 - width) << 8) | (0 if mode == "up" else 31)
    code = f"shfl.sync.{mode}.b32 %r4|%p0, %a, 3, {clamp}, -1;"
    code += "selp.b32 %r5, 1000, 0, %p0; add.u32 %z, %r4, %r5;"
    found = evaluate(code, "b32", values)
    for lane in range(32):
        first = lane // width * width
        from_lane = {"up": lane - 3, "down": lane + 3, "bfly": lane ^ 3, "idx": first + 3}[mode]
        inside = first <= from_lane < first + width
        expected = 100 + (from_lane if inside else lane) + 1000 * inside
        assert found[lane] == expected
        assert found[96 + lane] == expected + 96


def test_votes() -> None:
    values = np.arange(128, dtype=np.uint32)
    ballot = "setp.gt.u32 %p0, %a, 40; vote.sync.ballot.b32 %z, %p0, -1;"
    expected = np.repeat([0, 0xFFFFFE00, 0xFFFFFFFF, 0xFFFFFFFF], 32)
    equal_bits(evaluate(ballot, "b32", values), expected.astype(np.uint32))
    for mode, result in {"any": [0, 1, 1, 1], "all": [0, 0, 1, 1], "uni": [1, 0, 1, 1]}.items():
        code = f"setp.gt.u32 %p0, %a, 40; vote.sync.{mode}.pred %p1, %p0, -1;"
        found = evaluate(code + "selp.b32 %z, 1, 0, %p1;", "b32", values)
        equal_bits(found, np.repeat(np.array(result, np.uint32), 32))


# Memory


def copy_kernel(width: int, stride: int = 1) -> str:
    """Thread i copies one vector of `width` bytes, number i * stride."""
    vector, registers = {4: ("", "%r4"), 16: (".v4", "{%r4, %r5, %r6, %r7}")}[width]
    return source(
        f"""
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r8, %r0;
    cvt.u64.u32 %d2, %r1; mul.lo.u64 %d2, %d2, {BLOCK}; cvt.u64.u32 %d3, %r8;
    add.u64 %d2, %d2, %d3; mul.lo.u64 %d2, %d2, {width * stride};
    add.u64 %d4, %d0, %d2; add.u64 %d5, %d1, %d2;
    ld.global{vector}.b32 {registers}, [%d4]; st.global{vector}.b32 [%d5], {registers};""",
        ["a", "z"],
    )


def copy(
    text: str, a: Array, z: Array, *, grid: int = 1, writable: bool = True, **options: Any
) -> tuple[Stats, Memory]:
    blocks = options.pop("blocks", None)
    memory = Memory()
    pointers = [
        memory.allocate("a", a, **options),
        memory.allocate("z", z, writable=writable, **options),
    ]
    kernel = Module.parse(text).kernels["k"]
    stats = Machine(kernel, memory).launch(
        (grid, 1, 1), (BLOCK, 1, 1), [address(pointer) for pointer in pointers], blocks
    )
    return stats, memory


@pytest.mark.parametrize("width", [4, 16])
def test_a_coalesced_copy(width: int) -> None:
    a = np.arange(2 * BLOCK * width // 4, dtype=np.uint32)
    z = np.zeros_like(a)
    stats, memory = copy(copy_kernel(width), a, z, grid=2)
    np.testing.assert_array_equal(a, z)
    memory.check_written_once("z")
    assert stats.read_bytes == {"a": a.nbytes}
    assert stats.written_bytes == {"z": a.nbytes}
    assert stats.sectors == {"a": a.nbytes // 32, "z": a.nbytes // 32}
    count = Counter({width: 2 * BLOCK})
    assert stats.widths == {("a", "ld"): count, ("z", "st"): count}


def test_a_strided_and_a_misaligned_copy() -> None:
    a = np.arange(8 * BLOCK, dtype=np.uint32)
    stats, _ = copy(copy_kernel(4, stride=8), a, np.zeros_like(a))
    assert stats.sectors == {"a": BLOCK, "z": BLOCK}
    assert stats.read_bytes == {"a": 4 * BLOCK}
    # 32 lanes of 4 bytes from 4 bytes past a sector's start touch 5 sectors.
    stats, memory = copy(copy_kernel(4), a[:BLOCK], z := np.zeros(BLOCK, np.uint32), misalign=4)
    assert stats.sectors == {"a": 5 * BLOCK // 32, "z": 5 * BLOCK // 32}
    memory.check_written_once("z")
    np.testing.assert_array_equal(z, a[:BLOCK])


def test_a_window_of_a_huge_tensor() -> None:
    start = 2**35
    first = start // (4 * BLOCK)
    a = np.arange(3 * BLOCK, dtype=np.uint32)
    z = np.zeros_like(a)
    windows = range(first, first + 3)
    _, memory = copy(copy_kernel(4), a, z, grid=2**31 - 1, blocks=windows, start=start)
    memory.check_written_once("z")
    np.testing.assert_array_equal(a, z)
    for outside, byte in ((first - 1, start - 4 * BLOCK), (first + 3, start + 12 * BLOCK)):
        with pytest.raises(PTXError, match=rf"out of bounds: 4 bytes at byte {byte} of a"):
            copy(copy_kernel(4), a, z, grid=2**31 - 1, blocks=[outside], start=start)


def test_out_of_bounds() -> None:
    a, z = np.zeros(BLOCK, np.uint32), np.zeros(BLOCK, np.uint32)
    with pytest.raises(
        PTXError, match=r"kernel k, line \d+: `ld.global.*thread \(127, 0, 0\).* byte 508 of a"
    ):
        copy(copy_kernel(4), a[:-1], z)
    with pytest.raises(PTXError, match=r"`st.global.*out of bounds: 4 bytes at byte 508 of z"):
        copy(copy_kernel(4), a, z[:-1])
    below = copy_kernel(4).replace("[%d4]", "[%d4+-4]")
    with pytest.raises(PTXError, match=r"out of bounds: 4 bytes at byte -4 of a"):
        copy(below, a, z)
    with pytest.raises(PTXError, match="in no buffer"):
        copy(copy_kernel(4).replace("[%d4]", "[%d2]"), a, z)


def test_misaligned_access() -> None:
    a, z = np.zeros(4 * BLOCK, np.uint32), np.zeros(4 * BLOCK, np.uint32)
    copy(copy_kernel(16), a, z, misalign=16)
    with pytest.raises(PTXError, match="misaligned 16-byte access: byte 0 of a"):
        copy(copy_kernel(16), a, z, misalign=4)
    with pytest.raises(PTXError, match="misaligned 4-byte access"):
        copy(copy_kernel(4), a, z, misalign=2)


def test_write_to_a_read_only_buffer() -> None:
    a, z = np.zeros(BLOCK, np.uint32), np.zeros(BLOCK, np.uint32)
    with pytest.raises(PTXError, match="writes to z, which is read-only"):
        copy(copy_kernel(4), a, z, writable=False)


def test_write_counts() -> None:
    a, z = np.zeros(2 * BLOCK, np.uint32), np.zeros(2 * BLOCK, np.uint32)
    _, memory = copy(copy_kernel(4), a, z)
    with pytest.raises(PTXError, match="z: byte 512 was written 0 times"):
        memory.check_written_once("z")
    memory.check_written_once("z", range(512))
    with pytest.raises(PTXError, match="z: byte 508 was written 1 times instead of 0"):
        memory.check_written_once("z", range(508))
    # Two instructions, and two lanes of one.
    twice = copy_kernel(4).replace("ret;", "st.global.b32 [%d5], %r4; ret;")
    _, memory = copy(twice, a, z, grid=2)
    with pytest.raises(PTXError, match="z: byte 0 was written 2 times"):
        memory.check_written_once("z")
    _, memory = copy(copy_kernel(4).replace("mov.u32 %r8, %r0", "shr.u32 %r8, %r0, 1"), a, z)
    with pytest.raises(PTXError, match="z: byte 0 was written 2 times"):
        memory.check_written_once("z")


def test_struct_parameters() -> None:
    text = (
        f"{HEADER}.visible .entry k(.param .u32 n, .param .align 8 .b8 p[24]) {{ {REGISTERS}"
        "ld.param.u64 %d0, [p]; ld.param.v2.u32 {%r1, %r2}, [p+8]; ld.param.f32 %f0, [p+16];"
        "ld.param.u32 %r3, [n]; st.global.v4.b32 [%d0], {%r1, %r2, %r3, %f0}; ret; }"
    )
    kernel = Module.parse(text).kernels["k"]
    memory, z = Memory(), np.zeros(4, np.uint32)
    pointer = memory.allocate("z", z, writable=True)
    params = [struct.pack("<I", 9), struct.pack("<QIIf4x", pointer, 5, 6, 1.5)]
    Machine(kernel, memory).launch((1, 1, 1), (1, 1, 1), params)
    np.testing.assert_array_equal(z, [5, 6, 9, np.float32(1.5).view(np.uint32)])
    with pytest.raises(PTXError, match=r"parameters of \[4, 23\] bytes instead of \[4, 24\]"):
        Machine(kernel, memory).launch((1, 1, 1), (1, 1, 1), [params[0], params[1][:-1]])
    with pytest.raises(PTXError, match=r"parameters of \[4\] bytes"):
        Machine(kernel, memory).launch((1, 1, 1), (1, 1, 1), params[:1])


def test_initialised_variables_and_generic_addresses() -> None:
    module = ".global .align 4 .u32 table[4] = {10, 20, 30};\n.const .align 4 .s32 c[2] = {-5, 6};"
    text = source(
        """
    .local .align 4 .b32 local[2]; .shared .align 4 .b32 shared[128];
    and.b32 %r1, %r0, 3; mul.wide.u32 %d2, %r1, 4; mov.u64 %d3, table; add.u64 %d3, %d3, %d2;
    ld.global.u32 %r2, [%d3]; ld.const.s32 %r3, [c+4];
    mov.u64 %d4, local; cvta.local.u64 %d4, %d4; st.u32 [%d4+4], %r2; ld.local.u32 %r4, [local+4];
    mov.u64 %d5, shared; mul.wide.u32 %d6, %r0, 4; add.u64 %d5, %d5, %d6; cvta.shared.u64 %d5, %d5;
    st.u32 [%d5], %r3; cvta.to.shared.u64 %d5, %d5; ld.shared.u32 %r5, [%d5];
    add.u32 %r6, %r4, %r5; mad.wide.u32 %d7, %r0, 4, %d0; st.u32 [%d7], %r6;""",
        ["z"],
        module=module,
    )
    memory, z = Memory(), np.zeros(BLOCK, np.uint32)
    pointer = memory.allocate("z", z, writable=True)
    for _ in range(2):  # the second machine finds the variables in the memory
        machine = Machine(Module.parse(text).kernels["k"], memory)
        machine.launch((1, 1, 1), (BLOCK, 1, 1), [address(pointer)])
    np.testing.assert_array_equal(z, np.resize([16, 26, 36, 6], BLOCK))


def test_atomics() -> None:
    body = "atom.global.add.u32 %r1, [%d0], 3; red.global.add.f32 [%d0+4], 0f3F800000;"
    body += "mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1+8], %r1;"
    memory, z = Memory(), np.zeros(BLOCK + 2, np.uint32)
    pointer = memory.allocate("z", z, writable=True)
    kernel = Module.parse(source(body, ["z"])).kernels["k"]
    Machine(kernel, memory).launch((1, 1, 1), (BLOCK, 1, 1), [address(pointer)])
    assert z[0] == 3 * BLOCK
    assert z[1:2].view(np.float32)[0] == BLOCK
    np.testing.assert_array_equal(np.sort(z[2:]), np.arange(BLOCK) * 3)


# Checks

SHARED = (
    ".shared .align 4 .b32 s[64]; mul.lo.u32 %r1, %r0, 4; mov.u32 %r2, s; add.u32 %r1, %r1, %r2;"
)


def test_shared_memory_between_barriers() -> None:
    neighbour = "ld.shared.u32 %r4, [%r3];"
    exchange = SHARED + "st.shared.u32 [%r1], %r0; {} xor.b32 %r3, %r1, 4;" + neighbour
    launch(source(exchange.format("bar.sync 0;")), threads=64)
    launch(source(exchange.format("bar.warp.sync -1;")), threads=64)
    fails("race: shared memory written by .* is read", exchange.format(""), threads=64)
    far = exchange.format("bar.warp.sync -1;").replace(
        "%r1, 4;" + neighbour, "%r1, 128;" + neighbour
    )
    fails("race", far, threads=64)
    # Written again after it was read, and without a barrier between.
    again = exchange.format("bar.sync 0;") + "{} st.shared.u32 [%r1], %r4;"
    launch(source(again.format("barrier.sync 0;")), threads=64)
    fails("race: shared memory read by .* is written", again.format(""), threads=64)


def test_two_threads_write_a_shared_word() -> None:
    fails("race: two threads write", SHARED + "st.shared.u32 [s], %r0;")
    fails("race: two threads write", SHARED + "st.shared.u32 [s], 1;", threads=64)
    launch(source(SHARED + "st.shared.u32 [s], 1;"))  # a warp, one value
    fails(
        "race: shared memory written by",
        SHARED + "st.shared.u32 [%r1], 1; xor.b32 %r3, %r1, 4; st.shared.u32 [%r3], 2;",
    )


def test_shared_and_local_bounds() -> None:
    fails("out of bounds: 4 bytes at 256 of 256", SHARED + "st.shared.u32 [%r1+4], 1;", threads=64)
    fails("out of bounds: 4 bytes at -4", SHARED + "st.shared.u32 [%r1+-4], 1;")
    fails("misaligned: 4 bytes at 2", SHARED + "st.shared.u32 [%r1+2], 1;")
    fails("shared memory that nobody wrote", SHARED + "ld.shared.u32 %r3, [%r1];")
    fails("local memory that nobody wrote", ".local .b32 l[2]; ld.local.u32 %r3, [l];")
    fails("out of bounds", ".local .b32 l[2]; st.local.u32 [l+8], 1;")


def test_dynamic_shared_memory() -> None:
    module = ".extern .shared .align 16 .b8 dynamic[];"
    body = "mov.u32 %r2, dynamic; mad.lo.u32 %r1, %r0, 4, %r2; st.shared.u32 [%r1], %r0;"
    machine = Machine(Module.parse(source(body, module=module)).kernels["k"], Memory())
    machine.launch((1, 1, 1), (32, 1, 1), [], shared_bytes=128)
    with pytest.raises(PTXError, match="out of bounds"):
        machine.launch((1, 1, 1), (32, 1, 1), [], shared_bytes=124)


def test_uninitialised_registers() -> None:
    fails("reads %r5, which is not initialised", "add.u32 %r4, %r5, 1;")
    fails("reads %p3", "@%p3 mov.u32 %r4, 1;")
    fails("reads the carry", "addc.u32 %r4, %r0, 1;")
    partly = "setp.lt.u32 %p0, %r0, 9; @%p0 mov.u32 %r5, 1; {} add.u32 %r4, %r5, 1;"
    fails(r"thread \(9, 0, 0\): reads %r5", partly.format(""))
    launch(source(partly.format("@%p0")))
    launch(source(partly.format("@!%p0 mov.u32 %r5, 2;")))


def test_divergent_barriers() -> None:
    skip = "setp.lt.u32 %p0, %r0, 40; @%p0 bra SKIP; bar.sync 0; SKIP:"
    fails(r"divergent barrier: only 24 of the block's 64 threads", skip, threads=64)
    fails("divergent barrier", "setp.lt.u32 %p0, %r0, 40; @%p0 bar.sync 0;", threads=64)
    fails("divergent barrier", "setp.lt.u32 %p0, %r0, 40; @%p0 exit; bar.sync 0;", threads=64)
    launch(source("bar.sync 0; barrier.sync.aligned 0; bar.sync 0, 64;"), threads=64)
    fails("not supported", "bar.sync 0, 32;", threads=64)


def test_shuffle_masks() -> None:
    half = "setp.lt.u32 %p0, %r0, 16; @%p0 shfl.sync.bfly.b32 %r1, %r0, {}, 31, {};"
    launch(source(half.format(1, 65535)))
    fails("the mask 0xffffffff is not that of the active lanes, 0x0000ffff", half.format(1, -1))
    fails("reads lane 16, which is not active", half.format(16, 65535))
    vote = "setp.lt.u32 %p0, %r0, 16; vote.sync.ballot.b32 %r1, %p0, {};"
    launch(source(vote.format(-1)))
    fails("the mask 0x00000003", vote.format(3))
    fails("mask", "bar.warp.sync 1;")


def test_step_limit() -> None:
    fails("more than 1000 steps: an endless loop", "LOOP: bra LOOP;", step_limit=1000)
    fails(
        "more than 1000 steps",
        "setp.lt.u32 %p0, %r0, 3; LOOP: @%p0 bra LOOP;",
        step_limit=1000,
    )


def test_constant_predicates() -> None:
    launch(source("mov.pred %p0, 0; @%p0 trap; mov.pred %p1, -1; @!%p1 trap;"))
    fails("reached", "mov.pred %p0, -1; @%p0 trap;")
    with pytest.raises(PTXError, match=r"2 cannot stand for a \.pred"):
        Module.parse(source("mov.pred %p0, 2;"))


def test_trap() -> None:
    fails(r"thread \(31, 0, 0\): reached", "setp.gt.u32 %p0, %r0, 30; @%p0 trap;")


def test_a_call_is_an_error_where_it_is_reached() -> None:
    call = """
    setp.lt.u32 %p0, %r0, {}; @%p0 bra PAST;
    {{ .param .b64 given; .param .b64 result; st.param.b64 [given], %d0;
    call.uni (result), function, (given); ld.param.b64 %d0, [result]; }}
    PAST: bar.sync 0;
    """
    launch(source(call.format(32)))
    fails(r"call\.uni .*thread \(31, 0, 0\): reached", call.format(31))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.u32 %r1, %r0;", "unknown opcode frobnicate"),
        ("call foo;", "unknown opcode call"),
        ("add.fast.u32 %r1, %r0, 1;", "unknown modifier .fast of add"),
        ("add.rn.ftz.rn.f32 %f1, %f0, %f0;", "unknown modifier .rn of add"),
        ("ld.global.L3::keep.u32 %r1, [%d0];", "unknown modifier .L3::keep of ld"),
        ("add.u128 %r1, %r0, 1;", "unknown type or modifier .u128 of add"),
        ("add.u32.u32 %r1, %r0, 1;", "unknown type or modifier .u32 of add"),
        ("add %r1, %r0, 1;", "lacks a modifier or its type"),
        ("fma.f32 %f1, %f0, %f0, %f0;", "no form with such"),
        ("cvt.f32.f64 %f0, %d0;", "no form with such"),
        ("cvt.rn.s32.f32 %r1, %f0;", "no form with such"),
        ("add.u32 %r1, %r0;", "no form with such"),
        ("add.u32 %r1, %r0, 1, 2;", "no form with such"),
        ("ld.global.v2.u32 %r1, [%d0];", "no form with such"),
        ("ld.shared.v8.b32 {%r1,%r2,%r3,%r4,%r5,%r6,%r7,%r8}, [%r0];", "no form with such"),
        ("mov.u32 %r1, %clock;", "unknown special register %clock"),
        ("mov.u32 %r1, %tid.w;", "unknown special register %tid.w"),
        ("mov.u32 %r1, %r99;", "unknown register %r99"),
        ("mov.u32 %r1, nowhere;", "nowhere is not declared"),
        ("mov.u32 %tid.x, 1;", "%tid.x cannot be written"),
        ("add.u32 %r1, %d0, 1;", "%d0 is a .b64, not a .u32"),
        ("selp.u32 %r1, 1, 2, %r0;", "%r0 is a .b32, not a .pred"),
        ("lop3.b32 %r1, %r0, %r0, %r0, %r0;", "must be a literal"),
        ("add.u32 %r1, %r0, 4294967296;", "does not fit"),
        ("add.f32 %f1, %f0, 0d3FF0000000000000;", "cannot stand for a .f32"),
        ("bra NOWHERE;", "there is no label NOWHERE"),
        (".reg .u128x %r77;", "unknown type .u128x"),
        (".unheard 3;", "unknown directive .unheard"),
        ("add.u32 %r1 %r0, 1;", "expected ','"),
    ],
)
def test_what_is_unknown_is_an_error_when_it_is_parsed(body: str, message: str) -> None:
    with pytest.raises(PTXError) as caught:
        Module.parse(source(body))
    line = source(body).split(body)[0].count("\n") + 1
    start = f"kernel k, line {line}: `{body.split(';')[0]}`"
    assert str(caught.value).startswith(start), str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (source("").replace(".visible", ".mystery 3\n.visible"), ".mystery: unknown directive"),
        (source("", directives=".maxmagic 3"), "unknown directive .maxmagic"),
        (source("").replace("sm_100", "compute_100"), "unknown target"),
        (source("").replace("size 64", "size 32"), "64-bit addresses"),
        (source("add.rn.f32x2 %d1, %d0, %d0;").replace("sm_100", "sm_90"), "needs sm_100"),
        (source("")[:-3], "ends too early"),
        (source("?"), "cannot read"),
    ],
)
def test_unknown_directives(text: str, message: str) -> None:
    with pytest.raises(PTXError, match=message):
        Module.parse(text)


def test_launch_limits() -> None:
    launch(source("", directives=".maxntid 64, 1, 1 .minnctapersm 2"), threads=64)
    with pytest.raises(PTXError, match="96 threads in a block are too many"):
        launch(source("", directives=".maxntid 64"), threads=96)
    with pytest.raises(PTXError, match="must be"):
        launch(source("", directives=".reqntid 64"), threads=32)
    with pytest.raises(PTXError, match="cannot launch"):
        launch(source(""), threads=1025)
    with pytest.raises(PTXError, match="cannot launch"):
        launch(source(""), grid=2**31)


def test_scopes_comments_and_functions() -> None:
    module = '.file 1 "a.cu"\n.func helper(.param .u32 x) { ret; }\n.extern .func g(.param .b64 f);'
    body = """
    .pragma "nounroll"; .loc 1 4 0 // a comment with ; and {
    mov.u32 %r1, 5; /* another
    one */ { .reg .b32 %r1; mov.u32 %r1, 6; bra L; L: { .reg .b32 %r1; mov.u32 %r1, 7; } }
    { bra L; trap; L: } setp.ne.u32 %p0, %r1, 5; @%p0 trap;
    """
    launch(source(body, module=module))
    section = "\n.section .debug_str { $L: .b8 1, 2\n.b8 3 }\n"
    Module.parse(source(body, module=module) + section)


def test_parsing_is_cached() -> None:
    assert Module.parse(source("")) is Module.parse(source(""))


# Compilers

CUDA = """
#include <cuda_bf16.h>
struct Arguments { const float* x; __nv_bfloat16* z; long n; };
extern "C" __global__ void k(Arguments p) {
    __shared__ float s[128];
    long i = (long)blockIdx.x * 128 + threadIdx.x;
    s[threadIdx.x] = i < p.n ? p.x[i] : 0.0f;
    __syncthreads();
    float left = threadIdx.x ? s[threadIdx.x - 1] : 0.0f;
    float v = left + __shfl_xor_sync(0xffffffffu, s[threadIdx.x], 1);
    for (int j = 0; j < (int)(threadIdx.x % 3); ++j) v = fmaf(v, 1.25f, sqrtf(fabsf(v)));
    if (i < p.n) p.z[i] = __float2bfloat16(v / 3.0f);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there")
@pytest.mark.parametrize("capability", [80, 100])
def test_a_kernel_that_nvcc_compiled(
    tmp_path: Path, rng: np.random.Generator, capability: int
) -> None:
    (tmp_path / "k.cu").write_text(CUDA)
    command = ["nvcc", "-ptx", f"-arch=compute_{capability}", "k.cu", "-o", "k.ptx"]
    subprocess.run(command, cwd=tmp_path, check=True)
    kernel = Module.parse((tmp_path / "k.ptx").read_text()).kernels["k"]
    n = 1000
    x, z = rng.normal(size=n).astype(np.float32), np.zeros(n, np.uint16)
    memory = Memory()
    pointers = memory.allocate("x", x), memory.allocate("z", z, writable=True)
    Machine(kernel, memory).launch((8, 1, 1), (128, 1, 1), [struct.pack("<QQq", *pointers, n)])
    memory.check_written_once("z")

    blocks = np.resize(np.append(x, np.zeros(24, np.float32)), (8, 128))
    left = np.concatenate([np.zeros((8, 1), np.float32), blocks[:, :-1]], axis=1)
    v = (left + blocks[:, np.arange(128) ^ 1]).ravel()[:n]
    repeats = np.arange(n) % 128 % 3
    for j in range(2):
        more = exact_fma(v, np.full_like(v, 1.25), np.sqrt(np.abs(v)), "rn")
        v = np.where(j < repeats, more, v)
    expected = torch.from_numpy(v / np.float32(3)).bfloat16().view(torch.uint16).numpy()
    equal_bits(z, expected)
