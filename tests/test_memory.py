"""What a call allocates: on the CPU as the profiler sees it, on a GPU by the caching allocator.

Red where a call takes a copy of an operand, keeps sigma or eps for the backward, or z where the
caller has let go of it; where it keeps a reference to what it made; where it touches anything
before its memory is there; and where a number of elements is taken for one of 32 bits.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_STAND_IN
from helpers import FORMS, assert_same_bits, eager, inputs, key_of, needs_kernels
from torch import Tensor
from torch.distributions import Normal

from reparam_fused import (
    _ops,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
    noise,
)
from reparam_fused.bench.memory import peak_bytes

pytestmark = needs_kernels
SLACK = 4096  # keys, and what the allocators round up


@pytest.fixture(autouse=True)
def caching_allocator() -> Iterator[None]:
    """The stand-in does without it, and so without its count."""
    if ON_STAND_IN:
        torch.cuda.memory.caching_allocator_enable(True)
    yield
    if ON_STAND_IN:
        torch.cuda.empty_cache()
        torch.cuda.memory.caching_allocator_enable(False)


def test_forward_and_backward_take_two_tensors(device: torch.device) -> None:
    """z and grad_log_var; the eager line holds four at its peak."""
    n = 1 << (16 if device.type == "cuda" else 20)
    mu, log_var = (t.requires_grad_() for t in inputs(n, device=device))
    grad_z = torch.ones(n, device=device)

    def run(sampler: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        z = sampler(mu, log_var)
        return (z, *torch.autograd.grad(z, (mu, log_var), grad_z))

    tensor = 4 * n
    fused = peak_bytes(lambda: run(fused_reparameterize), device)
    assert 2 * tensor <= fused <= 2 * tensor + SLACK
    plain = peak_bytes(lambda: run(lambda m, v: eager(m, v, torch.randn_like(m))), device)
    assert 4 * tensor <= plain <= 4 * tensor + SLACK


def test_samples_take_no_copies(device: torch.device) -> None:
    """z, and the gradients of one sample's shape: no sigma or eps for each sample."""
    n, samples = 1 << (12 if device.type == "cuda" else 18), 16
    mu, rho = (t.requires_grad_() for t in inputs(n, device=device))
    grad_z = torch.ones(samples, n, device=device)

    def run() -> tuple[Tensor, ...]:
        z = fused_reparameterize(mu, rho=rho, sample_shape=(samples,))
        return (z, *torch.autograd.grad(z, (mu, rho), grad_z))

    peak = peak_bytes(run, device)
    assert (samples + 2) * 4 * n <= peak <= (samples + 2) * 4 * n + SLACK


def test_views_are_read_where_they_lie(device: torch.device) -> None:
    """chunk, transpose and expand cost no copy: only z is allocated."""
    n = 128 if device.type == "cuda" else 512
    base, _ = inputs(n, n, device=device)
    row, _ = inputs(n, device=device)
    for mu, log_var in (
        base.chunk(2, dim=1),
        base.chunk(2, dim=0),
        (base.t(), base.t()),
        (row.expand(n, n), base),
        (base[:, ::2], base[:, 1::2]),
    ):
        size = 4 * mu.numel()
        peak = peak_bytes(lambda a=mu, b=log_var: fused_reparameterize(a, b), device)
        assert size <= peak <= size + SLACK


# By name: the call, the most tensors of n elements that it makes, and the most of a call and its
# backward, where the results stay: with the gradients of mu, of the scale and of a prior, where
# that of mu is not the one that came in
Sampler = Callable[..., Any]
CALLS: dict[str, tuple[Sampler, dict[str, Any], int, int]] = {
    "sample": (fused_reparameterize, {}, 1, 2),
    "samples": (fused_reparameterize, {"sample_shape": (3,)}, 3, 5),
    "divergence": (fused_kl_divergence, {}, 1, 3),
    "sum of it": (fused_kl_divergence, {"dim": -1}, 0, 2),
    "and the sample": (fused_reparameterize_kl, {"dim": -1}, 1, 3),
    "from a prior": (fused_reparameterize_kl, {"dim": -1, "prior": True}, 1, 5),
    "density": (fused_reparameterize_log_prob, {"dim": -1}, 1, 2),
    "density of tanh": (fused_reparameterize_log_prob, {"dim": -1, "tanh": True}, 1, 3),
}


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "of a key"])
@pytest.mark.parametrize("name", CALLS)
def test_peak_of_every_call(name: str, form: str, drawn: bool) -> None:
    """No sigma, no eps, no copy of an operand."""
    rows, row = 1024, 64
    call, options, most_forward, most = CALLS[name]
    mu, scale, loc, prior = (
        t.abs().add(0.25).requires_grad_() for t in (*inputs(rows, row), *inputs(rows, row, seed=1))
    )
    given = [mu, scale]
    options = {**options, form: scale}
    if "prior" in options:
        options["prior"] = Normal(loc, prior, validate_args=False)
        given += [loc, prior]
    if call is not fused_kl_divergence:
        options["key"] = None if drawn else key_of(1)

    def forward() -> tuple[Tensor, ...]:
        made = call(mu, **options)
        return made if isinstance(made, tuple) else (made,)

    grads = [torch.ones_like(t) for t in forward()]

    def both() -> tuple[Tensor, ...]:
        made = forward()
        return (*made, *torch.autograd.grad(made, given, grads))

    def let_go() -> tuple[Tensor, ...]:
        """What the backward needs is not what the forward gave."""
        nodes = [torch.autograd.graph.get_gradient_edge(t) for t in forward()]
        return torch.autograd.grad(nodes, given, grads)

    tensor, sums = mu.nbytes, 2 * 4 * rows
    device = torch.device("cpu")
    assert peak_bytes(forward, device) <= most_forward * tensor + sums + SLACK
    assert peak_bytes(both, device) <= most * tensor + 2 * sums + SLACK
    held = peak_bytes(let_go, device)
    assert held <= max(most - most_forward, most_forward) * tensor + 2 * sums + SLACK


def run_alone(program: str, *arguments: object) -> str:
    """In a process of its own, as this one has memory of all the tests before."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parent,  # in the root Python would import the source tree
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


FAILING = """
import resource, torch
from reparam_fused import _forms, _heads, fused_kl_divergence, fused_reparameterize, key
from reparam_fused import fused_reparameterize_kl, fused_reparameterize_log_prob
import sys
if sys.argv[1] == "op":
    for kind, names in ((_forms.Call, ("plain", "plain_backward", "plain_draw")),
                        (_heads.Head, ("plain", "plain_backward"))):
        for name in names:
            setattr(kind, name, lambda *_: None)
torch.set_num_threads(1)
x = torch.full((1, 1 << 16), 0.5).requires_grad_()
scale = torch.full((1, 1 << 16), 0.25).requires_grad_()
large = [t.expand(1 << 14, 1 << 16) for t in (x, scale)]  # 4 GiB where a result is
calls = {
    "sample": lambda mu, s, **k: fused_reparameterize(mu, s, **k),
    "samples": lambda mu, s, **k: fused_reparameterize(mu, std=s, sample_shape=(3,), **k),
    "kl": lambda mu, s, **k: fused_reparameterize_kl(mu, rho=s, dim=-1, **k),
    "log_prob": lambda mu, s, **k: fused_reparameterize_log_prob(mu, s, dim=-1, **k),
    "tanh": lambda mu, s, **k: fused_reparameterize_log_prob(mu, std=s, dim=-1, tanh=True, **k),
    "divergence": lambda mu, s, **k: fused_kl_divergence(mu, s),
}
generator = torch.Generator().manual_seed(1)
given = [{}, {"generator": generator}, {"key": key(1)}]
for call in calls.values():
    for options in given:
        call(x, scale, **options)  # what is made once is
resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
used = 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
for name, call in calls.items():
    for options in given:
        states = [g.get_state() for g in (torch.default_generator, generator)]
        before = [t.detach().clone() for t in (x, scale)]
        versions = [t._version for t in (x, scale)]
        try:
            call(*large, **options)
        except RuntimeError as error:
            assert "memory" in str(error), error
        else:
            raise AssertionError(f"{name} found the memory")
        assert all(torch.equal(g.get_state(), s) for g, s in
                   zip((torch.default_generator, generator), states)), (name, options)
        assert all(torch.equal(t, b) for t, b in zip((x, scale), before))
        assert [t._version for t in (x, scale)] == versions
        call(x, scale, **options)
print("well")
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
@pytest.mark.parametrize("path", ["module", "op"])
def test_a_call_without_memory_leaves_all_as_it_was(path: str) -> None:
    """Inputs, their versions and the generators; and the next call works."""
    assert run_alone(FAILING, path) == "well\n"


GROWING = """
import sys, torch
from reparam_fused import fused_kl_divergence, fused_reparameterize, fused_reparameterize_kl, key
from reparam_fused import split
torch.set_num_threads(1)
mu, log_var = torch.zeros(4, 20), torch.zeros(4, 20)
leaves = [t.clone().requires_grad_() for t in (mu, log_var)]
of, generator = key(1), torch.Generator()
def train():
    z, kl = fused_reparameterize_kl(*leaves, dim=-1)
    (z.sum() + kl.sum()).backward()
    for leaf in leaves:
        leaf.grad = None
calls = [
    (lambda: fused_reparameterize(mu, log_var), 10),
    (lambda: fused_reparameterize(mu, log_var, key=of), 10),
    (lambda: fused_reparameterize(mu, std=log_var, generator=generator), 4),
    (lambda: fused_kl_divergence(mu, log_var), 10),
    (lambda: split(of), 5),
    (train, 1),
]
def rss():
    return 1024 * int(
        next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]
    )
def run(times):
    for call, share in calls:
        for _ in range(times * share // 40):
            call()
total = int(sys.argv[1])
run(total // 10)
before = rss()
run(total)
print(rss() - before)
"""


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_million_small_calls_do_not_grow() -> None:
    """Of 16 bytes each they would keep 16 MB."""
    grown = int(run_alone(GROWING, 1_000_000))
    print(f"{grown} bytes")
    assert grown < 1 << 20


def blocks_of(n: int) -> list[tuple[int, int]]:
    """Of so many elements the first, those about 2^31 and 2^32, and the last, as (start, size)."""
    size = 5000
    about = [0, 2**31 - size // 2, 2**32 - size // 2, n - size]
    return [(start, min(size, n - start)) for start in about if 0 <= start < n]


# 2^32 and some: 8.6 GB where a result is, of numbers that take none
@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("n", [2**31 + 4099, 2**32 + 4099])
def test_more_elements_than_32_bits_count(n: int) -> None:
    """In bfloat16: noise, a sample, its gradient, and the sums of rows beside a sample."""
    need = 2 * n + (2 << 30)
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = 1024 * int(lines["MemAvailable"].split()[0])
    if free < need:
        pytest.skip(f"{free >> 30} GiB free, {need >> 30} needed")
    key, dtype = key_of(11, 2**32 - 5), torch.bfloat16
    mu, std, grad = (torch.full((1,), x, dtype=dtype) for x in (0.5, 0.75, 1.5))

    def compare(whole: Tensor, block: Callable[[int, int], Tensor]) -> None:
        assert whole.shape == (n,)
        for start, size in blocks_of(n):
            assert_same_bits(whole[start : start + size].clone(), block(start, size))

    def eps(start: int, size: int) -> Tensor:
        return noise(key, size, dtype=dtype, global_shape=(n,), global_offset=(start,))

    compare(noise(key, n, dtype=dtype), eps)
    compare(
        fused_reparameterize(mu.expand(n), std=std, key=key),
        lambda start, size: fused_reparameterize(
            mu.expand(size), std=std, key=key, global_shape=(n,), global_offset=(start,)
        ),
    )
    compare(
        _ops.sample_backward(grad.expand(n), None, key, "std"),
        lambda start, size: _ops.sample_backward(
            grad.expand(size), None, key, "std", (n,), (start,)
        ),
    )
    compare(
        _ops.kl_divergence(mu.expand(n), std, "std"),
        lambda start, size: _ops.kl_divergence(mu.expand(size), std, "std"),
    )
