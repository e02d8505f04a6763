"""Reading tokens one by one, and what module and function scope both declare."""

from __future__ import annotations

import numpy as np

from .arithmetic import DTYPES, Array
from .errors import PTXError
from .lexer import Token
from .model import Variable


def parse_number(text: str) -> int:
    """An integer literal, or the bits of 0f and 0d ones."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    digits = text.rstrip("U")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return int(digits, 8 if octal else 0)


class Reader:
    """A cursor over tokens, shared by the parsers."""

    def __init__(self, text: str, stream: list[Token]) -> None:
        self.text, self.stream, self.position = text, stream, 0

    def peek(self, ahead: int = 0) -> Token:
        return self.stream[min(self.position + ahead, len(self.stream) - 1)]

    def next(self) -> Token:
        token = self.peek()
        if token.kind == "end":
            raise PTXError("the file ends too early")
        self.position += 1
        return token

    def expect(self, text: str) -> Token:
        token = self.next()
        if token.text != text:
            raise PTXError(f"expected {text!r} instead of {token.text!r}")
        return token

    def skip_line(self, token: Token) -> None:
        while self.peek().kind != "end" and self.peek().line == token.line:
            self.next()

    def skip_braces(self) -> None:
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.next().text, 0)

    def integer(self) -> int:
        negative = self.peek().text == "-"
        if negative:
            self.next()
        token = self.next()
        if token.kind != "number" or "." in token.text:
            raise PTXError(f"expected an integer instead of {token.text!r}")
        return -parse_number(token.text) if negative else parse_number(token.text)

    def integers(self) -> list[int]:
        values = [self.integer()]
        while self.peek().text == ",":
            self.next()
            values.append(self.integer())
        return values

    def array_length(self) -> int | None:
        """The elements of [n][m]..., or None of []."""
        length: int | None = 1
        while self.peek().text == "[":
            self.next()
            length = None if self.peek().text == "]" else (length or 1) * self.integer()
            self.expect("]")
        return length

    def variable(self, space: str, extern: bool = False) -> Variable:
        """What follows .global, .const, .shared or .local, up to its semicolon."""
        align, element = 0, ""
        while (word := self.next().text).startswith("."):
            if word == ".align":
                align = self.integer()
            elif word[1:] in DTYPES:
                element = word[1:]
            else:
                raise PTXError(f"unknown directive or type {word}")
        if not element:
            raise PTXError(f"{word} has no type")
        length = self.array_length()
        size = (length or 0) * DTYPES[element].itemsize
        data = None
        if self.peek().text == "=":
            self.next()
            data = self._initial_values(element)
            length = data.size if length is None else length
        self.expect(";")
        if extern != (length is None) or (data is not None and space in ("shared", "local")):
            raise PTXError(f"{word}: cannot be declared like this")
        if space in ("global", "const"):
            contents = np.zeros(length or 0, DTYPES[element])
            if data is not None:
                contents[: data.size] = data
            data, size = contents, contents.nbytes
        return Variable(word, space, align or DTYPES[element].itemsize, size, data)

    def _initial_values(self, element: str) -> Array:
        if self.peek().text != "{":
            values = [self.integer()]
        else:
            self.next()
            values = self.integers()
            self.expect("}")
        dtype = DTYPES[element]
        unsigned = np.dtype(f"u{dtype.itemsize}")
        bits = [value & (1 << 8 * dtype.itemsize) - 1 for value in values]
        return np.array(bits, unsigned).view(dtype)
