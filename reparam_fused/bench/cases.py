"""The one list of what is measured, for the command, for benchmarks/ and for two commits.

A case is a call as a user makes it, beside the lines that it replaces (lines.py) and beside the
floor: torch.add of tensors so large that it reads and writes as many bytes as the call must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

import reparam_fused

from . import calls, workloads
from .lines import (
    FORMS,
    HEADS,
    LOG_VAR,
    PASSES,
    Line,
    Pair,
    compiled,
    keyed_random,
    operands,
    step,
)
from .timer import Call

#: Of each case by name; ours is first, and the others are compared with it.
Rivals: TypeAlias = dict[str, Call]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = [2**i for i in range(8, 27, 2)]
FEW_SIZES = [2**i for i in (8, 14, 20, 24)]
QUICK_SIZES = [2**i for i in (10, 16, 22)]
LARGE = (1024, 4096)
ROWS = (65536, 64)


@dataclass(frozen=True)
class Case:
    """What is measured, and how its operands and rivals are made."""

    group: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    passes: str
    make: Callable[[torch.device], Rivals]
    #: Bytes that the call reads and writes at least
    moved: int | None = None
    #: What its errors are measured of: a form or a head, by name
    line: str | None = None
    #: Whether it is among the few that take less than a minute together
    quick: bool = False
    #: Of the CPU: None leaves it to torch
    threads: int | None = None
    #: Whether the host is timed on a GPU too
    host: bool = False
    #: What holds while it is measured
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def numel(self) -> int:
        """Elements of the result."""
        return prod(self.shape)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.group}: {self.name}, {dtype}, {self.passes}"


def floor(moved: int, dtype: torch.dtype, device: torch.device) -> Call:
    """torch.add that reads and writes as many bytes."""
    numel = moved // (3 * dtype.itemsize)
    a, b = (torch.ones(numel, dtype=dtype, device=device) for _ in range(2))
    return lambda: torch.add(a, b)


def _rivals(
    pair: Pair,
    given: Sequence[Tensor],
    passes: str,
    moved: int | None = None,
    more: dict[str, Line] | None = None,
) -> Rivals:
    lines = {"fused": pair.fused, "eager": pair.eager} | (more or {})
    made = {name: step(line, given, passes) for name, line in lines.items()}
    if moved is not None:
        made["floor"] = floor(moved, given[0].dtype, given[0].device)
    return made


def _sizes() -> Iterator[Case]:
    """The sample in its first form, over sizes and dtypes."""
    pair, sigma = LOG_VAR, FORMS["log_var"].sigma
    for dtype in DTYPES:
        for n in SIZES if dtype in DTYPES[:2] else FEW_SIZES:
            for passes in PASSES:
                moved = (3 if passes == "forward" else 6) * n * dtype.itemsize

                def make(
                    device: torch.device,
                    n: int = n,
                    dtype: torch.dtype = dtype,
                    passes: str = passes,
                    moved: int = moved,
                ) -> Rivals:
                    given = operands((n,), (n,), dtype=dtype, device=device)
                    more = {"torch.compile": compiled(pair.eager, (n,), dtype)}
                    with suppress(ImportError, NotImplementedError):
                        keyed = keyed_random(sigma, reparam_fused.key(1, device=device))
                        keyed(*(t[:4] for t in given))
                        more["func._random"] = keyed
                    return _rivals(pair, given, passes, moved, more)

                quick = n in QUICK_SIZES and dtype == torch.float32
                yield Case(
                    "sizes", f"2^{n.bit_length() - 1}", dtype, (n,), passes, make, moved,
                    "log_var", quick,
                )  # fmt: skip


def _forms() -> Iterator[Case]:
    """Every form of the scale, and of the sums beside the sample: forward and backward."""
    n, passes = prod(LARGE), PASSES[1]

    def case(
        name: str,
        pair: Pair,
        shape: tuple[int, ...],
        count: int,
        moved: int,
        shown: tuple[int, ...] | None = None,
        quick: bool = False,
    ) -> Case:
        def make(device: torch.device) -> Rivals:
            given = operands(*[shape] * count, dtype=torch.float32, device=device)
            more = {"torch.compile": compiled(pair.eager, shape, torch.float32)}
            return _rivals(pair, given, passes, moved, more)

        line = name if name in FORMS or name in HEADS else None
        return Case("forms", name, torch.float32, shown or shape, passes, make, moved, line, quick)

    for name, form in FORMS.items():
        moved = (5 if name == "std" else 6) * n * 4
        yield case(name, form.sample(), LARGE, 2, moved, quick=name == "rho")
    for name, head in HEADS.items():
        quick = name == "z, KL"
        yield case(name, head.pair, LARGE, head.operands, head.moved * n * 4, quick=quick)
    for k, shape in ((16, (2**18,)), (64, (128, 50))):
        pair, moved = FORMS["log_var"].samples(k), (2 + k + k + 3) * prod(shape) * 4
        yield case(f"{k} samples", pair, shape, 2, moved, (k, *shape))


def _views() -> Iterator[Case]:
    """Rows, columns and other views of as many elements as the one-shape call beside them."""
    rows, width = ROWS
    image = (16, 64, 64, 64)
    std = FORMS["std"].sample()

    def shapes(*given: tuple[int, ...]) -> Callable[[torch.device], list[Tensor]]:
        return lambda device: operands(*given, dtype=torch.float32, device=device)

    def transposed(device: torch.device) -> list[Tensor]:
        return [t.t() for t in shapes((width, rows), (width, rows))(device)]

    def halves(width: int) -> Callable[[torch.device], list[Tensor]]:
        return lambda device: list(torch.randn(rows, 2 * width, device=device).chunk(2, -1))

    def channels_last(device: torch.device) -> list[Tensor]:
        return [t.to(memory_format=torch.channels_last) for t in shapes(image, image)(device)]

    table: dict[str, tuple[Pair, Callable[[torch.device], list[Tensor]], tuple[int, ...]]] = {
        "one shape": (LOG_VAR, shapes(ROWS, ROWS), ROWS),
        "log_var of a column": (LOG_VAR, shapes(ROWS, (rows, 1)), ROWS),
        "log_var of a row": (LOG_VAR, shapes(ROWS, (width,)), ROWS),
        "std of a column": (std, shapes(ROWS, (rows, 1)), ROWS),
        "one std": (std, shapes(ROWS, ()), ROWS),
        "halves, as chunk leaves them": (LOG_VAR, halves(width), ROWS),
        "halves of rows of 12": (LOG_VAR, halves(12), (rows, 12)),
        "transposed": (LOG_VAR, transposed, ROWS),
        "channels_last": (LOG_VAR, channels_last, image),
    }
    for name, (pair, given, shape) in table.items():
        for passes in PASSES:

            def make(
                device: torch.device,
                pair: Pair = pair,
                passes: str = passes,
                given: Callable[[torch.device], list[Tensor]] = given,
            ) -> Rivals:
                return _rivals(pair, given(device), passes)

            yield Case("views", name, torch.float32, shape, passes, make)


def _keyed_rows() -> Iterator[Case]:
    """A key for each row: of the rows above, and of rows as short as actions and latents."""
    for rows, width in (ROWS, (4096, 1), (4096, 6), (4096, 20), (1_400_000, 3)):
        for passes in PASSES:

            def make(
                device: torch.device,
                shape: tuple[int, int] = (rows, width),
                passes: str = passes,
            ) -> Rivals:
                keys = reparam_fused.split(reparam_fused.key(3, device=device), shape[0])
                fused = FORMS["log_var"].sample(key=keys).fused
                given = operands(shape, shape, dtype=torch.float32, device=device)
                return _rivals(Pair(fused, LOG_VAR.eager), given, passes)

            name = f"a key for each row of {width}, {rows} rows"
            yield Case("views", name, torch.float32, (rows, width), passes, make)


def _calls() -> Iterator[Case]:
    """Every way to make a small call: what the host takes, of one thread."""
    for name, way in calls.WAYS.items():
        for passes in way.passes:
            yield Case(
                "calls", name, torch.float32, way.shape, passes, partial(way.make, passes=passes),
                quick=passes == way.passes[-1], threads=1, host=True, context=way.context,
            )  # fmt: skip


def _workloads() -> Iterator[Case]:
    for name, (make, quick) in workloads.WORKLOADS.items():
        yield Case("workloads", name, torch.float32, (), "step", make, quick=quick, host=True)


def cases() -> list[Case]:
    """All of them, the largest last: they change how memory is handed out afterwards."""
    return [*_workloads(), *_calls(), *_forms(), *_views(), *_keyed_rows(), *_sizes()]
