"""The instructions that move, convert, load, store, branch and synchronise."""

from __future__ import annotations

import numpy as np

from . import conversions
from .arithmetic import DTYPES, Array
from .decode import ANY_INT, BITS, ROUND, SCALAR, Choices, Operation, alu, form
from .scratch import WINDOWS

# Moves and conversions


@form("mov", f"type=pred|b128|{BITS}|{ANY_INT}|f32|f64", "ss s2 s4 2s 4s")
def _mov(name: str, m: Choices, shape: str) -> Operation | None:
    if shape == "ss":
        return alu(lambda a: a, m["type"], m["type"])
    count, bits = int(max(shape, key=str.isdigit)), 8 * DTYPES[m["type"]].itemsize
    if m["type"][0] != "b" or bits // count < 8:
        return None
    part, dtype = f"b{bits // count}", DTYPES[f"b{bits // count}"]
    if shape[0] == "s":

        def pack(*parts: Array) -> Array:
            columns = np.stack(np.broadcast_arrays(*parts), axis=-1)
            return columns.view(DTYPES[m["type"]])[..., 0]

        return Operation("alu", (m["type"],), (part,) * count, pack)

    def unpack(whole: Array) -> tuple[Array, ...]:
        columns = np.ascontiguousarray(whole).view(dtype).reshape(-1, count)
        return tuple(columns[:, column].copy() for column in range(count))

    return Operation("alu", (part,) * count, (m["type"],), unpack)


_ALL_TYPES = "u8|s8|u16|s16|u32|s32|u64|s64|f16|bf16|f32|f64"


@form("cvt", f"round={ROUND}|rni|rzi|rmi|rpi? ftz? sat? to={_ALL_TYPES} from={_ALL_TYPES}", "ss")
def _cvt(name: str, m: Choices, shape: str) -> Operation | None:
    function = conversions.conversion(
        m["to"], m["from"], m.get("round", ""), "ftz" in m, "sat" in m
    )
    needs = 80 if "bf16" in (m["from"], m["to"]) else 0
    if function is None:
        return None
    return Operation("alu", (m["to"],), (m["from"],), function, wider_registers=True, needs=needs)


@form("cvt", "round=rn|rz to=f16x2|bf16x2 from=f32", "sss")
def _cvt_pair(name: str, m: Choices, shape: str) -> Operation:
    return alu(conversions.to_pair(m["to"], m["round"]), "b32", "f32", "f32", needs=80)


@form("cvta", "to? space=global|shared|local|const|param type=u64", "ss")
def _cvta(name: str, m: Choices, shape: str) -> Operation:
    window = np.uint64(WINDOWS.get(m["space"], 0))
    return alu((lambda a: a - window) if "to" in m else (lambda a: a + window), "u64", "u64")


# Memory

_HINTS = (
    "L1=L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate? "
    "L2=L2::evict_normal|L2::evict_first|L2::evict_last? "
    "hint=L2::cache_hint? fetch=L2::64B|L2::128B|L2::256B?"
)
_SCOPE = "cta|cluster|gpu|sys"
_VECTOR = f"vec=v2|v4|v8? type={SCALAR}|b128"
_SPACES = "space=global|local|shared|shared::cta"


def _memory(kind: str, m: Choices, shape: str, space: str) -> Operation | None:
    count = int(m.get("vec", "v1")[1:])
    lanes = shape[0] if kind == "ld" else shape[1]
    # A vector of one may stand in braces; several always do.
    if (lanes if lanes != "s" else "1") != str(count):
        return None
    width = count * DTYPES[m["type"]].itemsize
    if width > 16 and (space != "global" or width != 32 or m["type"][1:] not in ("32", "64")):
        return None
    if ("L2" in m and width != 32) or ("fetch" in m and kind == "st"):
        return None
    types = (m["type"],) * count
    extra = ("b64",) if "hint" in m else ()
    if ("hint" in m) != (len(shape) == 3):
        return None
    if space != "global" and any(hint in m for hint in ("L1", "L2", "hint", "fetch")):
        return None
    if ("scope" in m) != (m.get("order") in ("relaxed", "acquire", "release")):
        return None
    return Operation(
        kind,
        destinations=types if kind == "ld" else (),
        sources=extra if kind == "ld" else types + extra,
        space=space,
        width=width,
        wider_registers=True,
        needs=100 if width > 16 else 0,
    )


@form(
    "ld",
    f"order=weak|volatile|relaxed|acquire? scope={_SCOPE}? {_SPACES}|param|const? "
    f"cache=ca|cg|cs|lu|cv? nc? {_HINTS} {_VECTOR}",
    "sa 1a 2a 4a 8a sas 1as 2as 4as 8as",
)
def _load(name: str, m: Choices, shape: str) -> Operation | None:
    space = m.get("space", "generic")
    if "nc" in m and space != "global":
        return None
    return _memory("ld", m, shape, space.removesuffix("::cta"))


@form(
    "st",
    f"order=weak|volatile|relaxed|release? scope={_SCOPE}? {_SPACES}? "
    f"cache=wb|cg|cs|wt? {_HINTS} {_VECTOR}",
    "as a1 a2 a4 a8 ass a1s a2s a4s a8s",
)
def _store(name: str, m: Choices, shape: str) -> Operation | None:
    return _memory("st", m, shape, m.get("space", "generic").removesuffix("::cta"))


@form(
    "atom red",
    f"order=relaxed|acquire|release|acq_rel? scope={_SCOPE}? global add type=u32|s32|u64|f32|f64",
    "sas as",
)
def _atomic(name: str, m: Choices, shape: str) -> Operation | None:
    if (name == "atom") != (shape == "sas"):
        return None
    if name == "red" and m.get("order") in ("acquire", "acq_rel"):
        return None
    destinations = (m["type"],) if name == "atom" else ()
    width = DTYPES[m["type"]].itemsize
    return Operation("atom", destinations, (m["type"],), space="global", width=width)


@form("createpolicy", "fractional L2=L2::evict_first|L2::evict_last|L2::evict_unchanged b64", "ss")
def _createpolicy(name: str, m: Choices, shape: str) -> Operation:
    return alu(lambda fraction: np.zeros(1, np.uint64), "b64", "f32")


@form("membar", "level=cta|gl|sys", "")
@form("fence", f"order=sc|acq_rel? scope={_SCOPE}", "")
def _fence(name: str, m: Choices, shape: str) -> Operation:
    return Operation("nothing")


# Control and warps


@form("bra", "uni?", "s")
def _bra(name: str, m: Choices, shape: str) -> Operation:
    return Operation("bra", sources=("label",))


@form("ret", "uni?", "")
@form("exit trap", "", "")
def _end(name: str, m: Choices, shape: str) -> Operation:
    return Operation("trap" if name == "trap" else "exit")


@form("bar barrier", "sync aligned?", "s ss")
@form("bar barrier", "cta sync aligned?", "s ss")
def _bar(name: str, m: Choices, shape: str) -> Operation:
    return Operation("bar", sources=("imm",) * len(shape))


@form("bar", "warp sync", "s")
def _bar_warp(name: str, m: Choices, shape: str) -> Operation:
    return Operation("warpsync", sources=("b32",))


@form("shfl", "sync mode=up|down|bfly|idx b32", "sssss |ssss")
def _shfl(name: str, m: Choices, shape: str) -> Operation:
    destinations = ("b32", "pred") if shape[0] == "|" else ("b32",)
    return Operation("shfl", destinations, ("b32", "u32", "u32", "b32"), mode=m["mode"])


@form("vote", "sync mode=all|any|uni pred", "sss")
@form("vote", "sync mode=ballot b32", "sss")
def _vote(name: str, m: Choices, shape: str) -> Operation:
    result = "b32" if m["mode"] == "ballot" else "pred"
    return Operation("vote", (result,), ("pred", "b32"), mode=m["mode"])


@form("activemask", "b32", "s")
def _activemask(name: str, m: Choices, shape: str) -> Operation:
    return Operation("activemask", ("b32",))
