"""What a check gives, and what checks are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from reparam_fused import backends

Number: TypeAlias = float | int | str


@dataclass(frozen=True)
class Result:
    """How a check went; name, device and seconds are filled in by who ran it."""

    status: Literal["pass", "fail", "skip"]
    detail: str
    numbers: dict[str, Number] = field(default_factory=dict)
    name: str = ""
    device: str = ""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    traceback: str = ""

    def row(self) -> dict[str, Any]:
        """For json, which knows no NaN and no infinity."""

        def clean(value: Number) -> Number:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return asdict(self) | {"numbers": {k: clean(v) for k, v in self.numbers.items()}}


Check: TypeAlias = Callable[[torch.device], Result]


def passed(detail: str, **numbers: Number) -> Result:
    """A check that holds."""
    return Result("pass", detail, numbers)


def skipped(reason: str) -> Result:
    """A check that has nothing to say here."""
    return Result("skip", reason)


def require(condition: bool, message: str) -> None:
    """assert, also under python -O."""
    if not condition:
        raise AssertionError(message)


def gpu_kernels_missing() -> str | None:
    """Why what only the compiled GPU kernels promise cannot be checked."""
    cuda, triton = backends()["cuda"], backends()["triton"]
    compiled = cuda.startswith("C++ kernels") or triton.startswith("kernels for NVIDIA")
    return None if compiled else f"no GPU kernels, cuda: {cuda}; triton: {triton}"


def key_of(seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The key (seed, offset), modulo 2**64."""
    return torch.tensor([seed % 2**64, offset % 2**64], dtype=torch.uint64, device=device)


def inputs(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mu in [-4, 4) and log_var in [-16, 16), on the CPU, the same bits on any machine.

    Multiples of odd numbers modulo 2**32: integer and exact float64 arithmetic.
    """
    i = torch.arange(1, n + 1)
    mu = ((i * 2654435761 & 0xFFFFFFFF) - 2**31).double() * 2.0**-29
    log_var = ((i * 2246822519 & 0xFFFFFFFF) - 2**31).double() * 2.0**-27
    return mu.to(dtype), log_var.to(dtype)


def extremes(dtype: torch.dtype) -> Tensor:
    """log_var that overflows, underflows, is a denormal or is not finite."""
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 3e38, -3e38]
    values = torch.tensor([*range(-3000, 3000, 7)], dtype=torch.float64)
    return torch.cat([values, torch.tensor(special, dtype=torch.float64)]).to(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits, on the CPU, as one-dimensional integers; every NaN is the same one."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    tensor = tensor.detach().cpu().flatten()
    return torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).view(ints)


def require_same_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits; payloads of NaN do not count."""
    require(
        (actual.dtype, actual.shape) == (expected.dtype, expected.shape),
        f"{what}: {actual.dtype} {tuple(actual.shape)} "
        f"instead of {expected.dtype} {tuple(expected.shape)}",
    )
    different = (bits_of(actual) != bits_of(expected)).nonzero().flatten()
    if different.numel():
        i = int(different[0])
        got, wanted = (float(t.detach().flatten()[i]) for t in (actual, expected))
        raise AssertionError(
            f"{what}: {different.numel()} of {actual.numel()} elements differ, "
            f"first at {i}: {got!r} instead of {wanted!r}"
        )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN: an element that nobody wrote shows.

    Otherwise a caching allocator may hand out the memory of an earlier, right, result.
    (use_deterministic_algorithms does as much, but imports inductor: seconds.)
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
