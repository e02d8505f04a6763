"""Calls from many threads and processes, and at their ends: no draw twice, no bit moved, no hang.

Red where a key is drawn outside of the generator's lock; where a kernel keeps something of a call
in a static or a member; where the GIL is kept while torch's threads, which may need it, are waited
for; where it is taken again from an interpreter that ends (WithoutGil in csrc/python).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from helpers import CALLS_CAN_BE_PLAIN, assert_same_bits, inputs, key_of, needs_kernels
from torch import Tensor

import reparam_fused
from reparam_fused import (
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)

KEY = key_of(17, 2**32 - 3)
THREADS, SECONDS = 8, 300  # a limit for what hangs, on a busy machine too
SMALL, LARGE = 60, 50_000  # of one thread of torch's, and of several
T = TypeVar("T")


def in_threads(call: Callable[[int], T], count: int = THREADS) -> list[T]:
    """call(0), call(1), ... all at a time, once every thread is there."""
    made: dict[int, T] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(count, timeout=SECONDS)

    def run(i: int) -> None:
        try:
            start.wait()
            made[i] = call(i)
        except BaseException as error:
            errors.append(error)

    # Daemons, so that a hang fails this test and not the end of the process
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "threads hang"
    assert not errors, errors
    return [made[i] for i in range(count)]


def run_program(program: str, *arguments: object, **environment: str) -> str:
    """A Python of its own, which has to end well and say nothing to stderr."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parent,  # in the root Python would import the source tree
        env={**os.environ, **environment},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw_one(generator: torch.Generator | None, n: int) -> Tensor:
    zero = torch.zeros(n, dtype=torch.float64)
    return fused_reparameterize(zero, std=torch.ones_like(zero), generator=generator)


def draw_kl(generator: torch.Generator | None, n: int) -> Tensor:
    """The draw of a head, which takes another way through the module."""
    zero = torch.zeros(n, dtype=torch.float64)
    return fused_reparameterize_kl(zero, std=torch.ones_like(zero), dim=-1, generator=generator)[0]


DRAWS = {"sample": draw_one, "head": draw_kl}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@each_draw
@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("default", [True, False], ids=["default", "own"])
def test_threads_share_a_generator(
    both_paths: str, default: bool, n: int, draw: Callable[..., Tensor]
) -> None:
    """All threads together draw what one would, each draw once, and so no value twice."""
    generator = torch.default_generator if default else torch.Generator()
    given = None if default else generator
    times = 100 if n == SMALL else 4
    generator.manual_seed(3)
    expected = torch.stack([draw(given, n) for _ in range(THREADS * times)])
    generator.manual_seed(3)
    draws = in_threads(lambda _: [draw(given, n) for _ in range(times)])
    actual = torch.stack([z for of_one in draws for z in of_one])
    assert torch.equal(actual[actual[:, 0].argsort()], expected[expected[:, 0].argsort()])
    assert actual.unique().numel() == actual.numel()


@each_draw
def test_threads_with_generators_of_their_own(both_paths: str, draw: Callable[..., Tensor]) -> None:
    def stream(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([draw(generator, SMALL) for _ in range(100)])

    actual = torch.stack(in_threads(stream))
    assert torch.equal(actual, torch.stack([stream(seed) for seed in range(THREADS)]))
    assert actual.unique().numel() == actual.numel()


def everything(key: Tensor, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Of a key: samples, a sum beside them, divergences, and the gradients."""
    mu, scale = (t.requires_grad_() for t in inputs(n // 10, 10, dtype=dtype))
    z = fused_reparameterize(mu, scale, key=key)
    samples = fused_reparameterize(mu, rho=scale, key=key, sample_shape=(3,))
    of_kl = fused_reparameterize_kl(mu, scale, key=key, dim=-1)
    of_density = fused_reparameterize_log_prob(mu, rho=scale, key=key, tanh=True, dim=-1)
    made = [z, samples, *of_kl, *of_density, fused_kl_divergence(mu, scale)]
    grads = torch.autograd.grad([t.sum() for t in made], (mu, scale))
    return [*(t.detach() for t in made), *grads, *reparam_fused.split(key, 5)]


def same_bits(key: Tensor, n: int, dtype: torch.dtype) -> Callable[[int], None]:
    """Of any thread or call the bits that this one has."""
    expected = everything(key, n, dtype)

    def compare(_: int) -> None:
        for _ in range(20 if n == SMALL else 3):
            for got, wanted in zip(everything(key, n, dtype), expected, strict=True):
                if got.is_floating_point():
                    assert_same_bits(got, wanted)
                else:
                    assert torch.equal(got, wanted)

    return compare


@needs_kernels
@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_threads_share_a_key(both_paths: str, dtype: torch.dtype, n: int) -> None:
    in_threads(same_bits(KEY, n, dtype))


@needs_kernels
def test_the_number_of_threads_changes_midway(thread_count: None) -> None:
    compare, done = same_bits(KEY, LARGE, torch.float32), threading.Event()

    def run(i: int) -> None:
        if i > 0:
            compare(i)
            done.set()
        while i == 0 and not done.is_set():
            for count in (1, 3, 2, 5):
                torch.set_num_threads(count)

    in_threads(run, 2)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        compare(count)


@needs_kernels
def test_a_graph_that_threads_share() -> None:
    """Each takes the gradients, and so draws the noise again, while others do."""
    mu, log_var = (t.requires_grad_() for t in inputs(LARGE))
    z = fused_reparameterize(mu, log_var, key=KEY)
    grad_z = torch.ones_like(z)
    expected = torch.autograd.grad(z, (mu, log_var), grad_z, retain_graph=True)

    def take(_: int) -> None:
        got = torch.autograd.grad(z, (mu, log_var), grad_z, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)

    in_threads(take)


@needs_kernels
def test_calls_within_a_backward() -> None:
    """From a hook, where autograd holds what it holds."""
    compare, called = same_bits(KEY, LARGE, torch.float32), []
    mu, log_var = (t.requires_grad_() for t in inputs(SMALL))
    z = fused_reparameterize(mu, log_var, key=KEY)

    def hook(grad: Tensor) -> None:
        with torch.enable_grad():
            called.append(compare(0))

    z.register_hook(hook)
    z.sum().backward()
    assert len(called) == 1


def in_parallel_region(call: Callable[[int], None], count: int) -> None:
    """call(0), call(1), ... by torch's own threads, each in a share of at::parallel_for."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    of_share = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    errors: list[BaseException] = []

    def run(begin: int, end: int, _: Any) -> None:
        try:
            for i in range(begin, end):
                call(i)
        except BaseException as error:
            errors.append(error)

    parallel_for = library.torch_parallel_for
    parallel_for.argtypes = [ctypes.c_int64] * 3 + [of_share, ctypes.c_void_p]
    assert parallel_for(0, count, 1, of_share(run), None) == 0
    assert not errors, errors


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="the name of torch's library is Linux's")
def test_calls_within_a_parallel_region(thread_count: None) -> None:
    """Of torch's: a call in it takes one thread, and waits for none that is busy."""
    torch.set_num_threads(3)
    compare = same_bits(KEY, LARGE, torch.float32)
    threads: list[int] = []

    def call(i: int) -> None:
        threads.append(threading.get_ident())
        compare(i)

    in_threads(lambda _: in_parallel_region(call, 6), 1)
    assert len(threads) == 6
    assert len(set(threads)) > 1, "one thread did it all: there was no region"


@needs_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calls_of_scripted_forks() -> None:
    """On the threads of torch's interpreter, which have no Python."""

    class One(torch.nn.Module):
        def forward(self, mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
            return torch.ops.reparam_fused.sample_from_key(mu, log_var, key)

    class Many(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = One()

        def forward(self, mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
            forks = [torch.jit.fork(self.one, mu, log_var, key) for _ in range(4)]
            return torch.stack([torch.jit.wait(fork) for fork in forks])

    mu, log_var = inputs(LARGE)
    expected = One()(mu, log_var, KEY)
    made = torch.jit.trace(Many(), (mu, log_var, KEY), check_trace=False)(mu, log_var, KEY)
    for one in made:
        assert_same_bits(one, expected)


FORKED = """
import os, sys, torch, reparam_fused
from reparam_fused import fused_reparameterize, noise, key
n, start = int(sys.argv[1]), sys.argv[2]
x = torch.zeros(n)
assert fused_reparameterize(x, x).shape == x.shape  # with torch's threads, where there are any
def work(seed, threads=1):
    torch.set_num_threads(threads)
    mu = torch.zeros(n, requires_grad=True)
    z = fused_reparameterize(mu, x, key=key(seed))
    z.sum().backward()
    assert torch.equal(z.detach(), noise(key(seed), n))
    fresh = fused_reparameterize(x, x)
    return z.detach().double().sum().item(), fresh.double().sum().item()
if __name__ == "__main__":
    import multiprocessing
    expected = [work(seed)[0] for seed in range(4)]
    with multiprocessing.get_context(start).Pool(2) as pool:
        found = pool.map_async(work, range(4)).get(200)
    assert [of_key for of_key, _ in found] == expected, (found, expected)
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(start: str, tmp_path: Path) -> None:
    """After the parent has used torch's threads, of which a fork has none: a worker asks for one,
    as those of torch.utils.data do."""
    program = tmp_path / "program.py"  # spawn wants a file
    program.write_text(FORKED)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(LARGE), start],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")


class Samples(torch.utils.data.Dataset[Tensor]):
    """Drawn in the worker, as an augmentation would be."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        return draw_one(None, LARGE)


def test_workers_of_a_data_loader_draw_apart() -> None:
    """torch seeds each: what they draw is all different, and the same for the same seed."""
    fused_reparameterize(*inputs(LARGE))

    def load() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        loader = torch.utils.data.DataLoader(
            Samples(), batch_size=2, num_workers=2, generator=generator, timeout=SECONDS
        )
        return torch.cat(list(loader))

    drawn = load()
    assert drawn.shape == (12, LARGE)
    assert drawn.unique().numel() == drawn.numel()
    assert torch.equal(drawn, load())


# Calls that take tens of milliseconds of the kernel, without the GIL, and next to none of the rest:
# torch's own functions abort the process when their thread comes back to an interpreter that ends
# ("terminate called without an active exception", of Python before 3.14; torch.add in a loop does).
SHUTDOWN = """
import threading, time, torch, reparam_fused
from reparam_fused import _forms
torch.set_num_threads(1)
x, key = torch.zeros(1), reparam_fused.key(1)
launch, large = _forms.SAMPLE["std"].plain, x.expand(1 << 24)
started = threading.Event()
def work():
    launch(large, x, key)
    started.set()
    while True:
        launch(large, x, key)
threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(0.01)  # until it is in the kernel again
"""


@pytest.mark.skipif(not CALLS_CAN_BE_PLAIN, reason="no call is the module's")
def test_the_interpreter_ends_while_a_thread_calls() -> None:
    """A daemon in the middle of a call, which finds no interpreter when it comes back."""
    assert run_program(SHUTDOWN) == ""


FINALIZER = """
import torch, reparam_fused

class Last:
    mu, key = torch.zeros(2**20), reparam_fused.key(1)
    def __del__(self, call=reparam_fused.fused_reparameterize):
        print(*call(self.mu, self.mu, key=self.key).shape, flush=True)

last = Last()
"""


def test_a_call_of_the_thread_that_ends_the_interpreter() -> None:
    """Red, by the time limit, where that thread waits for the end as the others do."""
    assert run_program(FINALIZER) == f"{2**20}\n"
