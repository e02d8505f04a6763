"""Every way in which a small call may be made, next to the line that it replaces.

    make bench ARGS=benchmarks/test_calls.py

128 x 20 elements on one thread, where what surrounds the kernel is most of the time. A figure
is a time over the rival's in the same round: the eager line's, or for the functions on keys
that of the same function in torch.func._random. None is to be above 1.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ROWS, spread
from torch import Tensor
from torch.func import _random

import reparam_fused
from reparam_fused import fused_kl_divergence, fused_reparameterize

Call = Callable[[], Any]
ROUNDS, CALLS = 41, 200
SHAPE = (128, 20)
KEY = reparam_fused.key(3)
ROW_KEYS = reparam_fused.split(KEY, SHAPE[0])
GENERATOR = torch.Generator().manual_seed(5)


@pytest.fixture(autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(threads)


def times(
    calls: dict[str, Call], rounds: int = ROUNDS, count: int = CALLS
) -> dict[str, list[float]]:
    """Microseconds a call, of calls that take turns in every round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(count):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken[name].append((time.perf_counter() - start) / count * 1e6)
    return taken


def record(case: str, ours: list[float], rival: list[float], most: float) -> None:
    ratios = [a / b for a, b in zip(ours, rival, strict=True)]
    met = "met" if statistics.median(ratios) <= most else "MISSED"
    us = f"{statistics.median(ours):.1f} us / {statistics.median(rival):.1f} us"
    ROWS.append((case, us, spread(ratios), f"<= {most}", met))


def eager(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def eager_std(mu: Tensor, std: Tensor) -> Tensor:
    return mu + std * torch.randn_like(mu)


def eager_generator(mu: Tensor, log_var: Tensor) -> Tensor:
    noise = torch.randn(mu.shape, generator=GENERATOR)
    return mu + torch.exp(0.5 * log_var) * noise


def eager_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mu.square() + log_var.exp() - 1.0 - log_var)


def by_std(mu: Tensor, std: Tensor) -> Tensor:
    return fused_reparameterize(mu, std=std)


def by_key(mu: Tensor, log_var: Tensor) -> Tensor:
    return fused_reparameterize(mu, log_var, key=KEY)


def by_row_keys(mu: Tensor, log_var: Tensor) -> Tensor:
    return fused_reparameterize(mu, log_var, key=ROW_KEYS)


def by_generator(mu: Tensor, log_var: Tensor) -> Tensor:
    return fused_reparameterize(mu, log_var, generator=GENERATOR)


# Operands as shapes, but for "chunk": halves of one tensor, as torch.chunk leaves them.
WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Any]] = {
    "one shape": (fused_reparameterize, eager, (SHAPE, SHAPE)),
    "std": (by_std, eager_std, (SHAPE, SHAPE)),
    "key": (by_key, eager, (SHAPE, SHAPE)),
    "key for each row": (by_row_keys, eager, (SHAPE, SHAPE)),
    "generator": (by_generator, eager_generator, (SHAPE, SHAPE)),
    "log_var of a column": (fused_reparameterize, eager, (SHAPE, (128, 1))),
    "log_var of a row": (fused_reparameterize, eager, (SHAPE, (20,))),
    "std of a column": (by_std, eager_std, (SHAPE, (128, 1))),
    "one std": (by_std, eager_std, (SHAPE, ())),
    "bfloat16 mean": (fused_reparameterize, eager, "bfloat16"),
    "chunk": (fused_reparameterize, eager, "chunk"),
    "divergence": (fused_kl_divergence, eager_kl, (SHAPE, SHAPE)),
    "divergence of a column": (fused_kl_divergence, eager_kl, (SHAPE, (128, 1))),
}
MOST = {"one shape": (0.35, 0.65)}


def operands(kind: Any) -> tuple[Tensor, Tensor]:
    if kind == "chunk":
        mu, scale = torch.randn(SHAPE[0], 2 * SHAPE[1]).chunk(2, -1)
    elif kind == "bfloat16":
        mu, scale = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE)
    else:
        mu, scale = (torch.randn(shape) for shape in kind)
    return mu.requires_grad_(), scale.requires_grad_()


@pytest.mark.parametrize("way", WAYS)
def test_a_small_call(way: str) -> None:
    ours, rival, kind = WAYS[way]
    mu, scale = operands(kind)
    grad = torch.randn(SHAPE, dtype=torch.result_type(mu, scale))

    def forward(call: Callable[..., Tensor]) -> Call:
        def run() -> None:
            with torch.no_grad():
                call(mu, scale)

        return run

    def both(call: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(call(mu, scale), (mu, scale), grad)

    most = MOST.get(way, (1.0, 1.0))
    for name, mode, bound in (("forward", forward, most[0]), ("both", both, most[1])):
        taken = times({"ours": mode(ours), "rival": mode(rival)})
        record(f"{way}, {name}", taken["ours"], taken["rival"], bound)


@pytest.mark.parametrize(
    ("batch_shape", "sample_shape"), [(SHAPE, ()), ((8,), (16,)), ((8,), (4, 4)), (SHAPE, (5,))]
)
def test_a_patched_normal(batch_shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    """Next to torch's own rsample."""
    loc, scale = (torch.rand(batch_shape, requires_grad=True) for _ in range(2))
    normal = torch.distributions.Normal(loc, scale, validate_args=False)
    grad = torch.randn(*sample_shape, *batch_shape)
    original = torch.distributions.Normal.rsample

    def forward(rsample: Callable[..., Tensor]) -> Call:
        def run() -> None:
            with torch.no_grad():
                rsample(normal, sample_shape)

        return run

    def both(rsample: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(rsample(normal, sample_shape), (loc, scale), grad)

    with reparam_fused.patch("normal"):
        patched = torch.distributions.Normal.rsample
        for name, mode in (("forward", forward), ("both", both)):
            taken = times({"ours": mode(patched), "rival": mode(original)})
            case = f"patched normal, {sample_shape} of {batch_shape}, {name}"
            record(case, taken["ours"], taken["rival"], 1.0)


@pytest.mark.parametrize("sample_shape", [(), (16,)])
def test_a_distribution(sample_shape: tuple[int, ...]) -> None:
    """Made of log_var, and drawn from, next to torch's."""
    loc, log_var = operands((SHAPE, SHAPE))
    grad = torch.randn(*sample_shape, *SHAPE)

    def ours() -> Tensor:
        return reparam_fused.Normal(loc, None, False, log_var=log_var).rsample(sample_shape)

    def rival() -> Tensor:
        std = torch.exp(0.5 * log_var)
        return torch.distributions.Normal(loc, std, False).rsample(sample_shape)

    def both(call: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(call(), (loc, log_var), grad)

    taken = times({"ours": both(ours), "rival": both(rival)})
    record(f"Normal, {sample_shape} of {SHAPE}, both", taken["ours"], taken["rival"], 1.0)


class Posterior:
    """What LDM's class does of each half of its parameters."""

    def __init__(self, parameters: Tensor) -> None:
        self.mean, log_var = parameters.chunk(2, 1)
        self.logvar = log_var.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self) -> Tensor:
        return self.mean + self.std * torch.randn(self.mean.shape)


class Patched(Posterior):
    pass


def test_a_patched_class() -> None:
    """Made, drawn from and differentiated: latents of 32 x 32 pixels by a factor of 8."""
    parameters = torch.randn(8, 8, 4, 4, requires_grad=True)
    grad = torch.randn(8, 4, 4, 4)

    def both(cls: type[Posterior]) -> Call:
        return lambda: torch.autograd.grad(cls(parameters).sample(), parameters, grad)

    with reparam_fused.patch(Patched):
        taken = times({"ours": both(Patched), "rival": both(Posterior)})
    record("patched class, both", taken["ours"], taken["rival"], 1.0)


@pytest.mark.parametrize("function", ["split", "fold_in", "noise"])
def test_functions_on_keys(function: str) -> None:
    ours, rival = (
        getattr(reparam_fused, function),
        getattr(_random, {"noise": "normal"}.get(function, function)),
    )
    argument = {"split": 2, "fold_in": 3, "noise": SHAPE}[function]
    taken = times({"ours": lambda: ours(KEY, argument), "rival": lambda: rival(KEY, argument)})
    record(function, taken["ours"], taken["rival"], 1.0)


def test_one_more_call_in_a_graph() -> None:
    """Forward and backward: a chain of 41 calls less a chain of one."""
    mu, _ = operands((SHAPE, SHAPE))
    log_vars = [operands((SHAPE, SHAPE))[1] for _ in range(41)]
    grad = torch.randn(SHAPE)

    def chain(call: Callable[..., Tensor], length: int) -> float:
        start = time.perf_counter()
        z = mu
        for log_var in log_vars[:length]:
            z = call(z, log_var)
        torch.autograd.grad(z, [mu, *log_vars[:length]], grad)
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {"ours": [], "rival": []}
    for _ in range(150):
        for name, call in (("ours", fused_reparameterize), ("rival", eager)):
            taken[name].append((chain(call, 41) - chain(call, 1)) / 40 * 1e6)
    record("one more in a graph", taken["ours"], taken["rival"], 0.50)


def test_vmap_of_grad() -> None:
    """64 examples of 20, each with its own noise."""
    mu, log_var = torch.randn(64, 20), torch.randn(64, 20)

    def gradients(call: Callable[..., Tensor]) -> Call:
        def loss(mu: Tensor, log_var: Tensor) -> Tensor:
            return call(mu, log_var).square().sum()

        per_example = torch.func.vmap(torch.func.grad(loss, (0, 1)), randomness="different")
        return lambda: per_example(mu, log_var)

    taken = times({"ours": gradients(fused_reparameterize), "rival": gradients(eager)}, count=20)
    record("vmap of grad", taken["ours"], taken["rival"], 1.5)


def test_a_compiled_call() -> None:
    """Forward and backward, in microseconds above a compiled multiplication."""
    mu, log_var = operands((SHAPE, SHAPE))
    grad = torch.randn(SHAPE)

    def both(call: Callable[..., Tensor]) -> Call:
        compiled = torch.compile(call, fullgraph=True)
        return lambda: torch.autograd.grad(compiled(mu, log_var), (mu, log_var), grad)

    calls = {"fused": both(fused_reparameterize), "eager": both(eager), "multiply": both(torch.mul)}
    taken = times(calls)
    for name in ("fused", "eager"):
        above = [a - b for a, b in zip(taken[name], taken["multiply"], strict=True)]
        target = "<= 40" if name == "fused" else ""
        met = "" if not target else "met" if statistics.median(above) <= 40 else "MISSED"
        ROWS.append(("compiled", f"{name} above a multiplication, us", spread(above), target, met))
