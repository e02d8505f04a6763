"""The body of a kernel: scopes, labels, and instructions with their operands bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import DTYPES, Array
from .decode import Operation, check_opcode, decode
from .errors import PTXError
from .lexer import Token
from .model import Destination, Instruction, Kernel, Source, Variable
from .reader import Reader, parse_number

_SPECIAL = {f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
_SPECIAL |= {"laneid", "warpid"}
Scalars = Iterator[tuple[Token, bool]]
DYNAMIC_SHARED = "dynamic shared memory"
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def register_dtype(type_name: str) -> np.dtype[Any]:
    """How the bits of a register are held."""
    dtype = DTYPES[type_name]
    return dtype if dtype.kind in "bV" else _UNSIGNED[dtype.itemsize]


@dataclass
class _Operand:
    """Tokens of an operand: scalars (one, or a vector's), or an address with its offset."""

    shape: str
    scalars: list[tuple[Token, bool]]  # and whether a minus or an exclamation mark precedes
    offset: int = 0


class Body:
    """Reads up to the closing brace of a kernel, and fills the kernel in."""

    def __init__(self, reader: Reader, kernel: Kernel, module: dict[str, Variable]) -> None:
        self.reader, self.kernel, self.module = reader, kernel, module
        # Names of a scope: registers (their type, or slot and type once used), labels, variables.
        self.scopes: list[dict[str, str | tuple[int, str]]] = [{}]
        self.labels: list[dict[str, int]] = [{}]
        self.branches: list[tuple[Instruction, Token, list[dict[str, int]]]] = []
        self.carry = self._new_slot("the carry")
        self._places: dict[tuple[str, str], int] = {}

    def parse(self) -> None:
        while self.scopes:
            token = self.reader.next()
            start = self.reader.position
            try:
                self._statement(token)
            except PTXError as error:
                self.reader.position = start
                text = self._statement_text(token)
                raise PTXError(
                    f"kernel {self.kernel.name}, line {token.line}: `{text}`: {error}"
                ) from None
        self._resolve_branches()

    def _statement_text(self, token: Token) -> str:
        return self.reader.text[token.start :].split("\n", 1)[0].split(";")[0].strip()

    def _statement(self, token: Token) -> None:
        reader = self.reader
        if token.text == "{":
            self.scopes.append({})
            self.labels.append({})
        elif token.text == "}":
            self.scopes.pop()
            self.labels.pop() if self.scopes else None
        elif token.text == ";":
            pass
        elif token.text.startswith("."):
            self._directive(token)
        elif reader.peek().text == ":":
            reader.next()
            if token.text in self.labels[-1]:
                raise PTXError(f"{token.text} is defined twice")
            self.labels[-1][token.text] = len(self.kernel.instructions)
        else:
            self._instruction(token)

    def _directive(self, token: Token) -> None:
        match token.text:
            case ".reg":
                self._registers()
            case ".shared" | ".local":
                variable = self.reader.variable(token.text[1:])
                self.kernel.variables[variable.name] = variable
            case ".loc" | ".file":
                self.reader.skip_line(token)
            case ".pragma":
                self.reader.next()
                self.reader.expect(";")
            case ".param" if len(self.scopes) > 1:
                self._call(token)
            case _:
                raise PTXError(f"unknown directive {token.text}")

    def _call(self, first: Token) -> None:
        """The braces around a call, which no thread may reach: a function is not followed."""
        self.reader.skip_braces()
        self.scopes.pop()
        self.labels.pop()
        text = " ".join(self.reader.text[first.start : self.reader.peek(-1).start].split())
        self.kernel.instructions.append(Instruction(first.line, text, Operation("trap")))

    def _registers(self) -> None:
        type_name = self.reader.next().text[1:]
        if type_name not in DTYPES:
            raise PTXError(f"unknown type .{type_name}")
        while True:
            name = self.reader.next().text
            names = [name]
            if self.reader.peek().text == "<":
                self.reader.next()
                names = [f"{name}{index}" for index in range(self.reader.integer())]
                self.reader.expect(">")
            self.scopes[-1].update(dict.fromkeys(names, type_name))
            if self.reader.next().text == ";":
                return

    def _instruction(self, token: Token) -> None:
        reader, line, start = self.reader, token.line, token.start
        guard, inverted = -1, False
        if token.text == "@":
            inverted = reader.peek().text == "!"
            if inverted:
                reader.next()
            guard = self._register(reader.next(), "pred")[0]
            token = reader.next()
        check_opcode(token.text)
        operands: list[_Operand] = []
        while reader.peek().text != ";":
            if operands and not (operands[-1].shape == "|" and len(operands[-1].scalars) < 2):
                reader.expect(",")
            operands.append(self._operand())
        reader.next()
        text = " ".join(reader.text[start : reader.peek(-1).start].split())
        operation = decode(token.text, "".join(operand.shape for operand in operands))
        if operation.needs > self.kernel.target:
            raise PTXError(f"needs sm_{operation.needs}; the target is sm_{self.kernel.target}")
        instruction = Instruction(line, text, operation, guard, inverted)
        self._bind(instruction, operands)
        self.kernel.instructions.append(instruction)

    def _operand(self) -> _Operand:
        reader = self.reader
        mark = reader.peek().text
        if mark == "{":
            reader.next()
            scalars = [self._scalar()]
            while reader.next().text == ",":
                scalars.append(self._scalar())
            self._previous("}")
            return _Operand(str(len(scalars)), scalars)
        if mark == "[":
            reader.next()
            base, offset = self._scalar(), 0
            if reader.peek().text == "+":
                reader.next()
                offset = reader.integer()
            reader.expect("]")
            return _Operand("a", [base], offset)
        scalar = self._scalar()
        if reader.peek().text == "|":
            reader.next()
            return _Operand("|", [scalar, self._scalar()])
        return _Operand("s", [scalar])

    def _previous(self, text: str) -> None:
        if self.reader.peek(-1).text != text:
            raise PTXError(f"expected {text!r} instead of {self.reader.peek(-1).text!r}")

    def _scalar(self) -> tuple[Token, bool]:
        marked = self.reader.peek().text in ("-", "!")
        if marked:
            self.reader.next()
        return self.reader.next(), marked

    def _bind(self, instruction: Instruction, operands: list[_Operand]) -> None:
        operation = instruction.operation
        scalars = []
        for operand in operands:
            if operand.shape == "a":
                instruction.base = self._address(operand)
                instruction.offset = operand.offset
            else:
                scalars += operand.scalars
        if operation.kind == "bra":
            self.branches.append((instruction, scalars[0][0], list(self.labels)))
            return
        rest = iter(scalars)
        instruction.destinations = tuple(
            self._destination(name, rest, operation) for name in operation.destinations
        )
        instruction.sources = tuple(
            self._source(name, rest, operation) for name in operation.sources
        )
        if next(rest, None) is not None:
            raise PTXError("too many operands")

    def _address(self, operand: _Operand) -> Source:
        (token, marked) = operand.scalars[0]
        found = self._find(token.text)
        narrow = found is not None and found[1] in ("b32", "u32", "s32")
        return self._value(token, marked, "u32" if narrow else "u64", False)

    def _destination(self, name: str, rest: Scalars, operation: Operation) -> Destination | None:
        if name == "carry":
            return Destination(self.carry, register_dtype("u32"))
        token, marked = next(rest)
        if token.text == "_":
            return None
        slot, declared = self._register(token, name, operation.wider_registers)
        if marked or slot in self.kernel.presets.values():
            raise PTXError(f"{token.text} cannot be written")
        return Destination(slot, register_dtype(declared))

    def _source(self, name: str, rest: Scalars, operation: Operation) -> Source:
        if name == "carry":
            return Source(self.carry, DTYPES["u32"])
        token, marked = next(rest)
        if name == "imm":
            if token.kind != "number":
                raise PTXError(f"{token.text} must be a literal")
            name = "u32"
        return self._value(token, marked, name, operation.wider_registers)

    def _value(self, token: Token, marked: bool, name: str, wider: bool) -> Source:
        """A source operand: register, literal, or the address of a variable or parameter."""
        dtype = DTYPES[name]
        if token.kind == "number":
            return Source(-1, dtype, self._literal(token.text, marked, name))
        found = self._find(token.text)
        if found is None:
            return self._symbol(token, name)
        slot, declared = self._register(token, name, wider)
        if marked and name != "pred":
            raise PTXError(f"{token.text} cannot be negated in place")
        narrow = None
        if DTYPES[declared].itemsize > dtype.itemsize:
            narrow = register_dtype(name)
        return Source(slot, dtype, narrow=narrow, inverted=marked)

    def _literal(self, text: str, negative: bool, name: str) -> Array:
        dtype = DTYPES[name]
        bits = 8 * dtype.itemsize
        if name == "pred" and text in ("0", "1"):  # -1 is true
            return np.array([text == "1"])
        if name == "pred" or dtype.kind == "V":
            raise PTXError(f"{text} cannot stand for a .{name}")
        if "." in text or (dtype.kind == "f" and text[:2] not in ("0f", "0F", "0d", "0D")):
            if dtype.kind != "f":
                raise PTXError(f"{text} cannot stand for a .{name}")
            return np.array([-float(text) if negative else float(text)], dtype)
        value = -parse_number(text) if negative else parse_number(text)
        is_float = text[:2] in ("0f", "0F", "0d", "0D")
        if is_float and (negative or bits != (32 if text[1] in "fF" else 64)):
            raise PTXError(f"{text} cannot stand for a .{name}")
        if not -(1 << bits - 1) <= value < 1 << bits:
            raise PTXError(f"{text} does not fit a .{name}")
        return np.array([value & (1 << bits) - 1], _UNSIGNED[dtype.itemsize]).view(dtype)

    def _symbol(self, token: Token, name: str) -> Source:
        kernel, dtype = self.kernel, DTYPES[name]
        for parameter in kernel.parameters:
            if parameter.name == token.text:
                return Source(-1, dtype, np.array([parameter.offset]).astype(dtype))
        if token.text == "WARP_SZ":
            return Source(-1, dtype, np.array([32]).astype(dtype))
        variable = kernel.variables.get(token.text) or self.module.get(token.text)
        if variable is None:
            raise PTXError(f"{token.text} is not declared")
        if dtype.itemsize < 4:
            raise PTXError(f"{token.text} does not fit a .{name}")
        kernel.variables.setdefault(variable.name, variable)
        if variable.space in ("global", "const"):
            return Source(self._preset(variable.name), dtype)
        if variable.size == 0:  # .extern: after what is declared with a size
            narrow = dtype if dtype.itemsize < 8 else None
            return Source(self._preset(DYNAMIC_SHARED), dtype, narrow=narrow)
        return Source(-1, dtype, np.array([self._place(variable)]).astype(dtype))

    def _place(self, variable: Variable) -> int:
        """The offset of a variable in the kernel's shared or local memory."""
        key = (variable.space, variable.name)
        if key not in self._places:
            attribute = f"{variable.space}_bytes"
            end = getattr(self.kernel, attribute)
            self._places[key] = -(-end // variable.align) * variable.align
            setattr(self.kernel, attribute, self._places[key] + variable.size)
        return self._places[key]

    def _new_slot(self, name: str) -> int:
        self.kernel.register_names.append(name)
        return len(self.kernel.register_names) - 1

    def _preset(self, name: str) -> int:
        if name not in self.kernel.presets:
            self.kernel.presets[name] = self._new_slot(name)
        return self.kernel.presets[name]

    def _find(self, name: str) -> tuple[int, str] | None:
        """The slot and the type of a register; it gets its slot when it is first used."""
        for scope in reversed(self.scopes):
            if name in scope:
                entry = scope[name]
                if isinstance(entry, str):
                    entry = scope[name] = (self._new_slot(name), entry)
                return entry
        if name[1:] in _SPECIAL:
            return self._preset(name[1:]), "u32"
        if name.startswith("%"):
            known = "." in name or name[1:].isalpha()
            raise PTXError(f"unknown {'special ' if known else ''}register {name}")
        return None

    def _register(self, token: Token, name: str, wider: bool = False) -> tuple[int, str]:
        found = self._find(token.text)
        if found is None:
            raise PTXError(f"{token.text} is not a register")
        declared = found[1]
        have, want = DTYPES[declared].itemsize, DTYPES[name].itemsize
        special = found[0] in self.kernel.presets.values() and want in (2, 4)
        fits = have == want or (wider and have > want) or special
        if (declared == "pred") != (name == "pred") or not fits:
            raise PTXError(f"{token.text} is a .{declared}, not a .{name}")
        return found

    def _resolve_branches(self) -> None:
        for instruction, token, scopes in self.branches:
            for labels in reversed(scopes):
                if token.text in labels:
                    instruction.target = labels[token.text]
                    break
            else:
                raise PTXError(
                    f"kernel {self.kernel.name}, line {instruction.line}: `{instruction.text}`: "
                    f"there is no label {token.text}"
                )
