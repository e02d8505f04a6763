"""Modules and their directives; the bodies of kernels are in body.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from .arithmetic import DTYPES
from .body import Body
from .errors import PTXError
from .lexer import Token, tokens
from .model import Kernel, Parameter, Variable
from .reader import Reader


@dataclass
class Module:
    """The kernels of a PTX file, by name."""

    target: int = 0
    kernels: dict[str, Kernel] = field(default_factory=dict)

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Module:
        """Decode a file; parsed once for each text, so that tests can ask for it again."""
        return _ModuleParser(text).parse()


class _ModuleParser(Reader):
    def __init__(self, text: str) -> None:
        super().__init__(text, tokens(text))
        self.module = Module()
        self.variables: dict[str, Variable] = {}

    def parse(self) -> Module:
        while self.peek().kind != "end":
            token = self.next()
            try:
                self._directive(token)
            except PTXError as error:
                if str(error).startswith("kernel "):
                    raise
                raise PTXError(f"line {token.line}, {token.text}: {error}") from None
        return self.module

    def _directive(self, token: Token) -> None:
        match token.text:
            case ".version" | ".file" | ".loc":
                self.skip_line(token)
            case ".target":
                self._target(self.next())
            case ".address_size":
                if self.next().text != "64":
                    raise PTXError("only 64-bit addresses are supported")
            case ".section":
                self.next()
                self.expect("{")
                self.skip_braces()
            case ".visible" | ".weak":
                pass
            case ".extern":
                self._extern()
            case ".func":
                # Kept out: a call of it is an error where it is made.
                while self.peek().text not in ("{", ";"):
                    self.next()
                if self.next().text == "{":
                    self.skip_braces()
            case ".entry":
                kernel = self._entry()
                self.module.kernels[kernel.name] = kernel
            case ".global" | ".const" | ".shared":
                variable = self.variable(token.text[1:])
                self.variables[variable.name] = variable
            case _:
                raise PTXError("unknown directive")

    def _target(self, first: Token) -> None:
        architecture = re.fullmatch(r"sm_(\d+)[af]?", first.text)
        if architecture is None or self.peek().text == ",":
            raise PTXError(f"unknown target {first.text}")
        self.module.target = int(architecture[1])

    def _extern(self) -> None:
        match self.next().text:
            case ".shared":
                variable = self.variable("shared", extern=True)
                self.variables[variable.name] = variable
            case ".func":
                while self.next().text != ";":
                    pass
            case other:
                raise PTXError(f"unknown directive {other}")

    def _entry(self) -> Kernel:
        kernel = Kernel(self.next().text, self.module.target)
        try:
            if self.peek().text == "(":
                self._parameters(kernel)
            self._performance(kernel)
        except PTXError as error:
            line = self.peek().line
            raise PTXError(f"kernel {kernel.name}, line {line}: {error}") from None
        Body(self, kernel, self.variables).parse()
        return kernel

    def _parameters(self, kernel: Kernel) -> None:
        self.expect("(")
        end = 0
        while self.peek().text != ")":
            self.expect(".param")
            align = size = 0
            while (word := self.next().text).startswith("."):
                if word == ".ptr":  # the space and alignment of what it points to
                    if self.peek().text in (".global", ".shared", ".const", ".local"):
                        self.next()
                    if self.peek().text == ".align":
                        self.next()
                        self.integer()
                elif word == ".align":
                    align = self.integer()
                elif word[1:] in DTYPES:
                    size = DTYPES[word[1:]].itemsize
                else:
                    raise PTXError(f"unknown directive or type {word}")
            align = max(align, size)
            if self.peek().text == "[":
                size *= self.array_length() or 0
            end = -(-end // align) * align
            kernel.parameters.append(Parameter(word, size, end))
            end += size
            if self.peek().text == ",":
                self.next()
        self.expect(")")

    def _performance(self, kernel: Kernel) -> None:
        while (word := self.next().text) != "{":
            match word:
                case ".maxntid" | ".reqntid":
                    sizes = [*self.integers(), 1, 1][:3]
                    if word == ".reqntid":
                        kernel.required_block = (sizes[0], sizes[1], sizes[2])
                    kernel.max_threads = int(np.prod(sizes))
                case ".minnctapersm" | ".maxnreg":
                    self.integer()
                case ".noreturn":
                    pass
                case ".pragma":
                    self.next()
                    self.expect(";")
                case _:
                    raise PTXError(f"unknown directive {word}")
