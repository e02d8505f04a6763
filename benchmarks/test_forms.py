"""The forms of the scale, samples and rows, next to the lines that they replace.

    make bench ARGS=benchmarks/test_forms.py

Forward and backward in one call each, on two threads but where a case says otherwise. Rows are
measured against the one-shape call of as many elements too: a scale that broadcasts reads less,
and is not to cost more than a quarter more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reparam_fused
from reparam_fused import fused_reparameterize

KEY = reparam_fused.key(3)
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step(call: Callable[..., Tensor], operands: Sequence[Tensor], backward: bool) -> Any:
    """The call, or it and its backward, of leaves."""
    leaves = [t.detach().requires_grad_(backward) for t in operands]
    if not backward:
        return lambda: call(*leaves)
    out = call(*leaves)
    # As a loss has it: in the layout of what it is the gradient of
    grad = torch.empty_strided(out.shape, out.stride()).normal_()
    return lambda: torch.autograd.grad(call(*leaves), leaves, grad)


def eager(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def eager_log_std(mu: Tensor, log_std: Tensor) -> Tensor:
    return mu + torch.exp(log_std) * torch.randn_like(mu)


def eager_std(mu: Tensor, std: Tensor) -> Tensor:
    return mu + std * torch.randn_like(mu)


def eager_rho(mu: Tensor, rho: Tensor) -> Tensor:
    return mu + F.softplus(rho) * torch.randn_like(mu)


def eager_clamped(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * log_var.clamp(-1, 1)) * torch.randn_like(mu)


def eager_samples(samples: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda mu, s: mu + torch.exp(0.5 * s) * torch.randn(samples, *mu.shape)


def samples_of(samples: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda mu, s: fused_reparameterize(mu, s, sample_shape=(samples,))


def by(form: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda mu, scale: fused_reparameterize(mu, **{form: scale}, **options)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


FORMS: dict[str, tuple[Callable[[], Case], float, int]] = {
    "rho": (lambda: (by("rho"), eager_rho, pair(1024, 4096)), 6, 15),
    "log_std": (lambda: (by("log_std"), eager_log_std, pair(1024, 4096)), 6, 15),
    "clamped log_var": (
        lambda: (by("log_var", clamp=(-1, 1)), eager_clamped, pair(1024, 4096)), 6, 15,
    ),
    "16 samples of 2^18": (lambda: (samples_of(16), eager_samples(16), pair(1 << 18)), 7, 15),
    "64 samples of 128 x 50": (
        lambda: (samples_of(64), eager_samples(64), pair(128, 50)), 6, 101,
    ),
    "log_std, 8 x 32": (lambda: (by("log_std"), eager_log_std, pair(8, 32)), 1.4, 2001),
    "rho, 8 x 32": (lambda: (by("rho"), eager_rho, pair(8, 32)), 1, 2001),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forward_and_backward(name: str, in_turn: Any) -> None:
    make, target, rounds = FORMS[name]
    ours, theirs, operands = make()
    in_turn(step(ours, operands, True), {"eager": step(theirs, operands, True)},
            {"eager": target}, rounds)  # fmt: skip


def halves(rows: int, width: int) -> Sequence[Tensor]:
    return torch.randn(rows, 2 * width).chunk(2, -1)


def keyed(rows: int) -> Callable[..., Tensor]:
    return by("log_var", key=reparam_fused.split(KEY, rows))


def channels_last() -> Sequence[Tensor]:
    shape = (16, 64, 64, 64)
    return [t.to(memory_format=torch.channels_last) for t in pair(*shape)]


# At least so many times the eager line, forward and with the backward, and at most so many times
# the one-shape call of as many elements.
ROWS: dict[str, tuple[Callable[[], Case], tuple[float, float] | None, float | None]] = {
    "log_var of a column": (
        lambda: (by("log_var"), eager, (torch.randn(65536, 64), torch.randn(65536, 1))), None, 1.25,
    ),
    "log_var of a row": (
        lambda: (by("log_var"), eager, (torch.randn(65536, 64), torch.randn(64))), None, 1.25,
    ),
    "one std": (
        lambda: (by("std"), eager_std, (torch.randn(65536, 64), torch.rand(()))), None, 1.25,
    ),
    "std of a column": (
        lambda: (by("std"), eager_std, (torch.randn(65536, 64), torch.rand(65536, 1))), None, 1.25,
    ),
    "a key a row": (lambda: (keyed(65536), eager, pair(65536, 64)), None, 1.25),
    "a key a row of 1": (lambda: (keyed(4096), eager, pair(4096, 1)), (1.5, 1.0), None),
    "a key a row of 6": (lambda: (keyed(4096), eager, pair(4096, 6)), (2.0, 1.3), None),
    "a key a row of 20": (lambda: (keyed(4096), eager, pair(4096, 20)), (3.0, 1.5), None),
    "a key a row of 3, 1.4M": (
        lambda: (keyed(1_400_000), eager, pair(1_400_000, 3)), (3.0, 1.5), None,
    ),
    "chunks of rows of 12": (lambda: (by("log_var"), eager, halves(65536, 12)), (3.5, 1.0), None),
    "transposed, 64 wide": (
        lambda: (by("log_var"), eager, [t.t() for t in pair(64, 65536)]), None, 4.0,
    ),
    "transposed": (lambda: (by("log_var"), eager, [t.t() for t in pair(2048, 2048)]), None, 4.0),
    "channels_last": (lambda: (by("log_var"), eager, channels_last()), None, 4.0),
}  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, backward: bool, in_turn: Any) -> None:
    make, of_eager, of_one_shape = ROWS[name]
    ours, theirs, operands = make()
    numel = torch.broadcast_shapes(*(t.shape for t in operands)).numel()
    rivals = {"eager": step(theirs, operands, backward)}
    targets: dict[str, float] = {}
    if of_eager is not None:
        targets["eager"] = of_eager[backward]
    if of_one_shape is not None:
        rivals["one shape"] = step(by("log_var"), pair(numel), backward)
        targets["one shape"] = 1 / of_one_shape
    in_turn(step(ours, operands, backward), rivals, targets, 15 if numel > 1 << 20 else 301)
