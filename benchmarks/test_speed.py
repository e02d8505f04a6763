"""Speed of the fused op, next to the eager line, torch.compile of it, and the memory floor.

    make bench

The floor is torch.add on the same tensors: it moves the same bytes, and computes nothing
to speak of. Targets are those of the project for 2 cores with AVX-512. A missed one is
printed, and fails nothing: the machines are shared.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, spread
from torch import Tensor

from reparam_fused import fused_kl_divergence, fused_reparameterize

Sampler = Callable[[Tensor, Tensor], Tensor]
K, M = 1 << 10, 1 << 20


def eager(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


compiled = torch.compile(eager)


def eager_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + log_var.exp() - 1.0 - log_var)


compiled_kl = torch.compile(eager_kl)


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> None:
    torch.set_num_threads(2)


def leaves(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    mu, log_var, grad_z = (torch.randn(shape).to(dtype) for _ in range(3))
    return mu.requires_grad_(), log_var.requires_grad_(), grad_z


def rounds_for(n: int) -> int:
    return max(11, min(200, 64 * M // n))


FORWARD_TARGETS: dict[tuple[int, str], dict[str, float]] = {
    (4 * M, "float32"): {"eager": 10, "compile": 25},
    (16 * M, "float32"): {"floor": 1.4},
}
BACKWARD_TARGETS: dict[tuple[int, str], dict[str, float]] = {
    (64 * K, "float32"): {"eager": 4},
    (4 * M, "float32"): {"eager": 6},
}
SIZES = pytest.mark.parametrize("n", [64 * K, M, 4 * M, 16 * M], ids=["64K", "1M", "4M", "16M"])
DTYPE_NAMES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])


@SIZES
@DTYPE_NAMES
def test_forward(in_turn: Callable[..., None], n: int, dtype: str) -> None:
    mu, log_var, _ = leaves(n, dtype=getattr(torch, dtype))

    def forward(sampler: Sampler) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                sampler(mu, log_var)

        return run

    rivals = {"eager": forward(eager), "compile": forward(compiled), "floor": forward(torch.add)}
    targets = FORWARD_TARGETS.get((n, dtype), {})
    in_turn(forward(fused_reparameterize), rivals, targets, rounds_for(n))


@SIZES
@DTYPE_NAMES
def test_forward_backward(in_turn: Callable[..., None], n: int, dtype: str) -> None:
    mu, log_var, grad_z = leaves(n, dtype=getattr(torch, dtype))

    def both(sampler: Sampler) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(sampler(mu, log_var), (mu, log_var), grad_z)

    def floor() -> None:
        with torch.no_grad():
            torch.add(mu, log_var)
            torch.add(grad_z, log_var)

    rivals = {"eager": both(eager), "compile": both(compiled), "floor": floor}
    targets = BACKWARD_TARGETS.get((n, dtype), {})
    in_turn(both(fused_reparameterize), rivals, targets, rounds_for(n))


@pytest.mark.parametrize("n", [2560, 64 * K, 4 * M], ids=["128x20", "64K", "4M"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_forward_backward(in_turn: Callable[..., None], n: int, dtype: str) -> None:
    mu, log_var, grad = leaves(n, dtype=getattr(torch, dtype))

    def both(kl: Sampler) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(kl(mu, log_var), (mu, log_var), grad)

    def floor() -> None:  # the output, and a gradient for each input
        with torch.no_grad():
            torch.add(mu, log_var)
            torch.add(grad, mu)
            torch.add(grad, log_var)

    rivals = {"eager": both(eager_kl), "compile": both(compiled_kl), "floor": floor}
    in_turn(both(fused_kl_divergence), rivals, {}, rounds_for(n))


@pytest.mark.parametrize("n", [64 * K, 4 * M, 16 * M], ids=["64K", "4M", "16M"])
def test_bfloat16_per_element(in_turn: Callable[..., None], n: int) -> None:
    """bf16 moves half the bytes, and is to be no slower than fp32."""
    mu, log_var, _ = leaves(n)
    half_mu, half_log_var, _ = leaves(n, dtype=torch.bfloat16)

    def ours() -> None:
        with torch.no_grad():
            fused_reparameterize(half_mu, half_log_var)

    def wide() -> None:
        with torch.no_grad():
            fused_reparameterize(mu, log_var)

    in_turn(ours, {"float32": wide}, {"float32": 1.0}, rounds_for(n))


def test_import_time() -> None:
    """What `import reparam_fused` adds to `import torch`, in fresh processes."""
    program = """
import time, torch
start = time.perf_counter()
import reparam_fused
print((time.perf_counter() - start) * 1e3)
"""

    def milliseconds() -> float:
        # From this folder: in the repository's root, -c would find the source tree,
        # which has no extension, before what is installed.
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(result.stdout)

    times = [milliseconds() for _ in range(7)]
    met = "met" if statistics.median(times) <= 50 else "MISSED"
    ROWS.append(("import", "ms", spread(times), "<= 50", met))
