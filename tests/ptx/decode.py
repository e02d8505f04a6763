"""How the table of instructions is written (in forms_*.py) and looked up.

A form lists an instruction's modifiers in their order; a name in front of `=` is how its function
looks the choice up, and `?` makes it optional. Whatever no form accepts is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from .arithmetic import Function
from .errors import PTXError


@dataclass(frozen=True)
class Operation:
    """A decoded opcode. `kind` says which part of the machine runs it.

    Sources and destinations are named by their types; "carry" is the condition code, "imm" a
    literal. `needs` is the compute capability (90 for sm_90) that it came with.
    """

    kind: str
    destinations: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    function: Function | None = None
    space: str = ""
    width: int = 0
    wider_registers: bool = False
    needs: int = 0
    mode: str = ""


Choices = dict[str, str]
Builder = Callable[[str, Choices, str], "Operation | None"]
Slot = tuple[str, frozenset[str], bool]
_FORMS: dict[str, list[tuple[list[Slot], tuple[str, ...], Builder]]] = {}

ANY_INT = "u16|s16|u32|s32|u64|s64"
BITS = "b16|b32|b64"
SCALAR = f"b8|u8|s8|{BITS}|{ANY_INT}|f32|f64"
ROUND = "rn|rz|rm|rp"


def form(opcodes: str, modifiers: str, shapes: str) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes with these modifiers and operand shapes.

    A shape has a letter for each operand: s for a scalar, | for a pair p|q, a digit for a vector
    of so many, a for an address.
    """
    slots: list[Slot] = []
    for part in modifiers.split():
        name, _, choices = part.rstrip("?").rpartition("=")
        slots.append((name or choices, frozenset(choices.split("|")), part.endswith("?")))

    def register(builder: Builder) -> Builder:
        for opcode in opcodes.split():
            _FORMS.setdefault(opcode, []).append((slots, tuple(shapes.split()) or ("",), builder))
        return builder

    return register


def _match(slots: list[Slot], modifiers: list[str]) -> tuple[Choices | None, int]:
    """The choices, or None and the number of modifiers understood."""
    choices: Choices = {}
    position = 0
    for name, allowed, optional in slots:
        if position < len(modifiers) and modifiers[position] in allowed:
            choices[name] = modifiers[position]
            position += 1
        elif not optional:
            return None, position
    return (choices if position == len(modifiers) else None), position


def check_opcode(opcode: str) -> None:
    if opcode.split(".")[0] not in _FORMS:
        raise PTXError(f"unknown opcode {opcode}")


@cache
def decode(opcode: str, shape: str) -> Operation:
    """The operation of an opcode such as "fma.rn.f32" with operands of this shape."""
    name, *modifiers = opcode.split(".")
    forms = _FORMS[name]
    understood, fits = 0, False
    for slots, shapes, build in forms:
        choices, count = _match(slots, modifiers)
        understood = max(understood, count)
        if choices is None:
            continue
        fits = True
        if shape in shapes and (operation := build(name, choices, shape)) is not None:
            return operation
    if fits:
        raise PTXError(f"{opcode} has no form with such types, modifiers or operands")
    if understood == len(modifiers):
        raise PTXError(f"{opcode} lacks a modifier or its type")
    kind = "type or modifier" if understood == len(modifiers) - 1 else "modifier"
    raise PTXError(f"unknown {kind} .{modifiers[understood]} of {name}")


def alu(function: Function, destination: str, *sources: str, needs: int = 0) -> Operation:
    return Operation("alu", (destination,), sources, function, needs=needs)
