"""What parsing makes of a module: instructions with decoded operations and bound operands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arithmetic import Array
from .decode import Operation


@dataclass(slots=True)
class Source:
    """An operand that is read: a register as `dtype`, or a constant."""

    slot: int
    dtype: np.dtype[Any]
    constant: Array | None = None
    narrow: np.dtype[Any] | None = None  # unsigned, where the register is wider than the type
    inverted: bool = False


@dataclass(slots=True)
class Destination:
    """A register that is written; `dtype` holds its bits."""

    slot: int
    dtype: np.dtype[Any]


@dataclass(slots=True)
class Instruction:
    """`guard` is the predicate's slot, or -1; `offset` and `base` make the address."""

    line: int
    text: str
    operation: Operation
    guard: int = -1
    guard_inverted: bool = False
    destinations: tuple[Destination | None, ...] = ()
    sources: tuple[Source, ...] = ()
    base: Source | None = None
    offset: int = 0
    target: int = -1


@dataclass(slots=True)
class Parameter:
    name: str
    size: int
    offset: int


@dataclass(slots=True)
class Variable:
    """A .global, .const, .shared or .local variable; of size 0: dynamic shared memory."""

    name: str
    space: str
    align: int
    size: int
    data: Array | None = None


@dataclass
class Kernel:
    """One .entry. Presets are registers that are set before the first instruction."""

    name: str
    target: int
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    register_names: list[str] = field(default_factory=list)
    presets: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    shared_bytes: int = 0
    local_bytes: int = 0
    max_threads: int | None = None
    required_block: tuple[int, int, int] | None = None

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)
