"""What a call does on a GPU: launches, streams, devices, generators, graphs, faults.

On the stand-in GPU, where all of it is counted and where an order that nothing ensures is not kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from gpu.stand_in import Events, StandIn
from helpers import assert_same_bits, inputs, key_of
from torch import Tensor

import reparam_fused
from reparam_fused import (
    _ops,
    fused_kl_divergence,
    fused_reparameterize,
    noise,
    reference,
)

N = 2560


def on_gpu(*tensors: Tensor, device: str = "cuda", grad: bool = False) -> list[Tensor]:
    return [t.to(device).requires_grad_(grad and t.is_floating_point()) for t in tensors]


def assert_quiet(events: Events, launches: int) -> None:
    """So many launches, and nothing else that a GPU or its driver would feel."""
    assert len(events.launches) == launches, events.launches
    assert events.synchronisations == []
    assert events.copies == []


def warm(call: Callable[[], object]) -> None:
    """Loads modules and compiles, which a first call does."""
    call()
    torch.cuda.synchronize()


# 1. The program that failed


@pytest.mark.parametrize("shape", [(8,), (128, 20), (0,), ()])
@pytest.mark.parametrize("own", [False, True], ids=["default generator", "generator"])
def test_a_call_without_a_key_has_gradients(
    cuda: torch.device, shape: tuple[int, ...], own: bool
) -> None:
    mu, log_var = on_gpu(*inputs(*shape), grad=True)
    generator = torch.Generator(cuda).manual_seed(3) if own else None
    torch.cuda.manual_seed(3)
    z = fused_reparameterize(mu, log_var, generator=generator)
    z.backward(torch.full_like(z, 2.0))
    assert mu.grad is not None
    assert log_var.grad is not None
    assert torch.equal(mu.grad.cpu(), torch.full(shape, 2.0))
    # 2 dz/dlog_var = sigma eps, and z = mu + sigma eps
    expected = (z - mu).detach().double().cpu()
    torch.testing.assert_close(log_var.grad.double().cpu(), expected, rtol=0, atol=2e-6)


def test_training_a_vae_head_gives_the_bits_of_the_cpu(cuda: torch.device) -> None:
    """Our ops alone are in the path: mu and log_var are the parameters of a Gaussian posterior."""

    def train(device: torch.device) -> list[Tensor]:
        mu, log_var = (t.to(device).requires_grad_() for t in inputs(16, 20))
        target = inputs(16, 20, seed=1)[0].to(device)
        key, losses = reparam_fused.key(7, device=device), []
        for step in range(4):
            z = fused_reparameterize(mu, log_var, key=reparam_fused.fold_in(key, step))
            kl = fused_kl_divergence(mu, log_var)
            # one multiply and one subtraction an element, which round alike everywhere
            grads = torch.autograd.grad((z, kl), (mu, log_var), (z.detach() - target, kl.detach()))
            with torch.no_grad():
                for parameter, gradient in zip((mu, log_var), grads, strict=True):
                    parameter -= gradient * 0.0625
            losses += [z.detach(), kl.detach(), *grads]
        return [*losses, mu.detach(), log_var.detach()]

    for actual, expected in zip(train(cuda), train(torch.device("cpu")), strict=True):
        assert_same_bits(actual, expected)


# 2. Counts


def strided(*shape: int) -> tuple[Tensor, Tensor]:
    mu, log_var = inputs(shape[0], 2 * shape[1])
    first, second = mu.cuda().chunk(2, dim=1), log_var.cuda().chunk(2, dim=1)
    return first[0].requires_grad_(), second[1].requires_grad_()


CASES: dict[str, Callable[[], tuple[tuple[Tensor, Tensor], dict[str, object]]]] = {
    "key": lambda: (tuple(on_gpu(*inputs(N), grad=True)), {"key": key_of(1, device="cuda")}),
    "no key": lambda: (tuple(on_gpu(*inputs(N), grad=True)), {}),
    "generator": lambda: (
        tuple(on_gpu(*inputs(N), grad=True)),
        {"generator": torch.Generator("cuda").manual_seed(1)},
    ),
    "strided": lambda: (strided(64, 40), {"key": key_of(1, device="cuda")}),
    "strided, no key": lambda: (strided(64, 40), {}),
    "bfloat16": lambda: (
        tuple(on_gpu(*inputs(N, dtype=torch.bfloat16), grad=True)),
        {"key": key_of(1, device="cuda")},
    ),
    "bfloat16, no key": lambda: (tuple(on_gpu(*inputs(N, dtype=torch.bfloat16), grad=True)), {}),
    "a key for each row": lambda: (
        tuple(on_gpu(*inputs(64, 40), grad=True)),
        {"key": reparam_fused.split(key_of(1), 64).cuda()},
    ),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("form", ["log_var", "std"])
@pytest.mark.parametrize("case", CASES)
def test_one_launch_forward_and_one_backward(
    stand_in: StandIn, both_paths: str, case: str, form: str
) -> None:
    (mu, scale), options = CASES[case]()
    grad_z = torch.ones_like(mu, memory_format=torch.contiguous_format)

    def forward() -> Tensor:
        return fused_reparameterize(mu, **{form: scale}, **options)  # type: ignore[arg-type]

    warm(lambda: torch.autograd.grad(forward(), (mu, scale), grad_z))
    with stand_in.events() as events:
        z = forward()
    assert_quiet(events, 1)
    with stand_in.events() as events:
        grads = torch.autograd.grad(z, (mu, scale), grad_z)
    assert_quiet(events, 1)
    assert grads[0].data_ptr() == grad_z.data_ptr()
    with stand_in.events() as events, torch.no_grad():
        forward()
    assert_quiet(events, 1)


def test_launches_of_the_divergence(stand_in: StandIn, both_paths: str) -> None:
    # The gradient of mu is a product of torch's, that of log_var is ours.
    mu, log_var = on_gpu(*inputs(N))
    log_var.requires_grad_()
    grad = torch.ones_like(mu)
    warm(lambda: torch.autograd.grad(fused_kl_divergence(mu, log_var), (log_var,), grad))
    with stand_in.events() as events:
        kl = fused_kl_divergence(mu, log_var)
    assert_quiet(events, 1)
    with stand_in.events() as events:
        torch.autograd.grad(kl, (log_var,), grad)
    assert_quiet(events, 1)


def test_keys_from_keys_are_one_launch(stand_in: StandIn) -> None:
    """As many as torch's own take. Of integers of 64 bits, one for each of many keys."""
    key, numbers = key_of(3, 5), torch.arange(40)
    moved, on_device = key.cuda(), numbers.cuda()
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda key, _: reparam_fused.split(key, 70),
        lambda key, _: reparam_fused.fold_in(key, -3),
        lambda key, numbers: reparam_fused.fold_in(key, numbers),
    ]
    for call in calls:
        warm(lambda call=call: call(moved, on_device))
        with stand_in.events() as events:
            derived = call(moved, on_device)
        assert_quiet(events, 1)
        assert torch.equal(derived.cpu(), call(key, numbers))


@pytest.mark.parametrize("form", ["log_var", "std"])
def test_a_scale_of_one_number(stand_in: StandIn, both_paths: str, form: str) -> None:
    """A number, or a tensor of the CPU, which gets its gradient: nothing waits for a copy."""
    mu, _ = on_gpu(*inputs(N))
    key = key_of(1)
    expected = fused_reparameterize(mu.cpu(), **{form: 0.5}, key=key)
    moved, scale = key.cuda(), torch.tensor(0.5, requires_grad=True)
    for given in (0.5, scale):
        warm(lambda given=given: fused_reparameterize(mu, **{form: given}, key=moved))
        with stand_in.events() as events:
            z = fused_reparameterize(mu, **{form: given}, key=moved)
        assert not events.copies
        assert not events.synchronisations
        assert_same_bits(z.detach(), expected)
    z.sum().backward()
    on_cpu = torch.tensor(0.5, requires_grad=True)
    fused_reparameterize(mu.cpu(), **{form: on_cpu}, key=key).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, on_cpu.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_is_one_launch(stand_in: StandIn, dtype: torch.dtype) -> None:
    key = key_of(3, device="cuda")
    keys = reparam_fused.split(key_of(3), 5).cuda()
    warm(lambda: (noise(key, 1000, dtype=dtype), noise(keys, 5, 33, dtype=dtype)))
    with stand_in.events() as events:
        eps = noise(key, 1000, dtype=dtype)
    assert_quiet(events, 1)
    assert events.allocations == [1000 * dtype.itemsize]
    with stand_in.events() as events:
        noise(keys, 5, 33, dtype=dtype)
    assert_quiet(events, 1)
    if dtype != torch.float64:
        assert_same_bits(eps, noise(key.cpu(), 1000, dtype=dtype))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_nothing_is_launched_for_nothing(stand_in: StandIn, shape: tuple[int, ...]) -> None:
    mu, log_var = on_gpu(*inputs(*shape), grad=True)
    key, offset = key_of(1, device="cuda"), torch.cuda.default_generators[0].get_offset()
    with stand_in.events() as events:
        z = fused_reparameterize(mu, log_var, key=key)
        torch.autograd.grad(z, (mu, log_var), z.detach())
        # mu's gradient is a product of torch's own. A Function in Python is told what requires
        # grad, not what the engine was asked for, and would make it here too.
        kl = fused_kl_divergence(mu.detach(), log_var)
        torch.autograd.grad(kl, (log_var,), kl.detach())
        noise(key, *shape)
    assert_quiet(events, 0)
    fused_reparameterize(mu, log_var)
    assert torch.cuda.default_generators[0].get_offset() == offset


def test_what_a_call_allocates(stand_in: StandIn) -> None:
    """z, and the 16 bytes of a key that is drawn; backward, one gradient."""
    mu, log_var = on_gpu(*inputs(N), grad=True)
    grad_z = torch.ones_like(mu)
    warm(lambda: fused_reparameterize(mu, log_var))
    with stand_in.events() as events:
        z = fused_reparameterize(mu, log_var)
    assert sorted(events.allocations) == [16, 4 * N]
    with stand_in.events() as events:
        torch.autograd.grad(z, (mu, log_var), grad_z)
    assert events.allocations == [4 * N]


# Streams and devices


def everything(mu: Tensor, log_var: Tensor, key: Tensor | None) -> list[Tensor]:
    """Each op of the library, one after the other."""
    mu, log_var = mu.detach().requires_grad_(), log_var.detach().requires_grad_()
    if key is None:
        z, key = _ops.sample(mu.detach(), log_var.detach(), None)
        again = _ops.sample_from_key(mu.detach(), log_var.detach(), key)
        return [z, again]
    z = fused_reparameterize(mu, log_var, key=key)
    kl = fused_kl_divergence(mu, log_var)
    ones = torch.ones_like(z)
    grads = torch.autograd.grad((z, kl), (mu, log_var), (ones, ones))
    # autograd makes the device of a tensor current; who calls an op may have another one
    direct = [
        _ops.sample_backward(mu.detach(), log_var.detach(), key),
        _ops.kl_divergence_backward(mu.detach(), log_var.detach()),
    ]
    return [z.detach(), kl.detach(), *grads, *direct, noise(key, 100)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drawn", [False, True], ids=["key", "no key"])
@pytest.mark.parametrize("index", range(2))
def test_work_goes_to_the_current_stream(
    cuda: torch.device, index: int, seed: int, drawn: bool
) -> None:
    """Of the device. Its inputs are written late on it, its results are read there."""
    if torch.cuda.device_count() <= index:
        pytest.skip("one GPU")
    device = torch.device("cuda", index)
    mu, log_var = inputs(500)
    key = key_of(seed)
    late_mu, late_log_var, late_key = (torch.zeros_like(t).to(device) for t in (mu, log_var, key))
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for late, tensor in ((late_mu, mu), (late_log_var, log_var), (late_key, key)):
            late.copy_(tensor.pin_memory(), non_blocking=True)
        results = everything(late_mu, late_log_var, None if drawn else late_key)
        stream.synchronize()
        if drawn:
            assert_same_bits(results[0], results[1])
        else:
            for actual, expected in zip(results, everything(mu, log_var, key), strict=True):
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("drawn", [False, True], ids=["key", "no key"])
def test_work_goes_to_the_device_of_its_tensors(cuda: torch.device, drawn: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    mu, log_var = inputs(500)
    key = key_of(5)
    assert torch.cuda.current_device() == 0
    theirs = on_gpu(mu, log_var, key, device="cuda:1")
    torch.cuda.synchronize(1)
    results = everything(theirs[0], theirs[1], None if drawn else theirs[2])
    assert {t.device.index for t in results} == {1}
    assert torch.cuda.current_device() == 0
    if drawn:
        assert_same_bits(results[0], results[1])
    else:
        for actual, expected in zip(results, everything(mu, log_var, key), strict=True):
            assert_same_bits(actual, expected)


def test_the_generator_is_that_of_the_device(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first, second = torch.cuda.default_generators[:2]
    before = first.get_offset(), second.get_offset()
    fused_reparameterize(*on_gpu(*inputs(100), device="cuda:1"))
    assert (first.get_offset(), second.get_offset()) == (before[0], before[1] + 100)


def test_operands_of_two_devices_are_refused(cuda: torch.device) -> None:
    """Also by the ops, for whoever calls them: a kernel would read another GPU's memory."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    mu, log_var = inputs(8)
    here, there = (on_gpu(mu, log_var, key_of(1), device=f"cuda:{i}") for i in range(2))
    for call in (
        lambda: _ops.sample_from_key(here[0], there[1], here[2]),
        lambda: _ops.sample_from_key(here[0], here[1], there[2]),
        lambda: _ops.sample_from_key(here[0], log_var, here[2]),
        lambda: _ops.sample_from_key(here[0], here[1], key_of(1)),
        lambda: _ops.sample_backward(here[0], there[1], here[2]),
        lambda: _ops.sample(here[0], there[1], None),
        lambda: _ops.kl_divergence(here[0], there[1]),
        lambda: _ops.kl_divergence_backward(here[0], there[1]),
        lambda: _ops.derive(here[2].view(1, 2), there[2].view(torch.int64), 0, 1),
    ):
        with pytest.raises(
            RuntimeError, match=r"on one device|on the same device|on cuda:0"
        ) as error:
            call()
        assert not isinstance(error.value, torch.AcceleratorError)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)


# Generators


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 1021])
def test_a_draw_is_the_key_of_the_generators_position(
    cuda: torch.device, n: int, dtype: torch.dtype
) -> None:
    """(seed, offset / 4 + 2^63), and 4 more for each Philox block."""
    generator = torch.Generator(cuda).manual_seed(2**64 - 59)
    generator.set_offset(4 * (2**32 - 3))
    mu, log_var = on_gpu(*inputs(n, dtype=dtype))
    for i in range(3):
        before = generator.get_offset()
        z, key = _ops.sample(mu, log_var, generator)
        blocks = -(-n // (2 if dtype == torch.float64 else 4))
        assert generator.get_offset() == before + 4 * blocks
        named = key_of(2**64 - 59, before // 4 + 2**63)
        assert torch.equal(key.cpu(), named), i
        assert_same_bits(z, fused_reparameterize(mu, log_var, key=named.to(cuda)))


@pytest.mark.parametrize(
    ("mu_shape", "scale_shape"),
    [((1,), (1000,)), ((1000,), (1,)), ((40, 1), (1, 25)), ((), (1000,))],
)
def test_a_draw_counts_the_blocks_of_its_output(
    cuda: torch.device, mu_shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    generator = torch.Generator(cuda).manual_seed(1)
    mu, log_var = inputs(*mu_shape)[0].cuda(), inputs(*scale_shape)[1].cuda()
    fused_reparameterize(mu, log_var, generator=generator)
    assert generator.get_offset() == 1000


def test_seeds_and_keys_name_different_streams(cuda: torch.device) -> None:
    torch.cuda.manual_seed(42)
    mu, log_var = torch.zeros(64, device=cuda), torch.zeros(64, device=cuda)
    drawn = fused_reparameterize(mu, log_var)
    named = fused_reparameterize(mu, log_var, key=key_of(42, device=cuda))
    assert (drawn != named).float().mean() > 0.9


def test_threads_share_a_generator(stand_in: StandIn) -> None:
    """No two draws have one key, and the generator moves on by the blocks of all."""
    mu, log_var = on_gpu(*inputs(8))
    generator = torch.Generator("cuda").manual_seed(1)
    warm(lambda: fused_reparameterize(mu, log_var, generator=generator))
    generator.manual_seed(1)
    stand_in.pause(300)
    draws: list[Tensor] = []

    def draw() -> None:
        with torch.no_grad():
            draws.extend(fused_reparameterize(mu, log_var, generator=generator) for _ in range(25))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stand_in.pause(0)
    assert generator.get_offset() == 100 * 8
    assert torch.stack(draws).cpu().unique(dim=0).shape[0] == 100


# Graphs


@pytest.mark.parametrize("warmed", [True, False], ids=["warmed", "first of all"])
@pytest.mark.parametrize("given", [False, True], ids=["no key", "key"])
@pytest.mark.parametrize("side", [False, True], ids=["one stream", "side stream"])
def test_capture_and_replay(cuda: torch.device, warmed: bool, given: bool, side: bool) -> None:
    """Three replays are three eager calls from the same state; with a key they are one."""
    mu, log_var = on_gpu(*inputs(33), grad=True)
    grad_z = torch.ones_like(mu)
    key = key_of(3, device=cuda) if given else None

    def step() -> tuple[Tensor, Tensor]:
        z = fused_reparameterize(mu, log_var, key=key)
        (grad_log_var,) = torch.autograd.grad(z, (log_var,), grad_z)
        return z.detach(), grad_log_var

    if warmed:
        step()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    other = torch.cuda.Stream()
    with torch.cuda.graph(graph):
        if side:
            main = torch.cuda.current_stream()
            other.wait_stream(main)
            with torch.cuda.stream(other):
                results = step()
            main.wait_stream(other)
        else:
            results = step()
    torch.cuda.synchronize()  # torch writes the graph's state on the stream of the capture
    torch.cuda.manual_seed(5)
    rows = []
    for _ in range(3):
        graph.replay()
        rows.append([t.clone() for t in results])
    after = torch.cuda.default_generators[0].get_offset()
    torch.cuda.manual_seed(5)
    for row in rows:
        for actual, expected in zip(row, step(), strict=True):
            assert_same_bits(actual, expected)
    if given:
        assert_same_bits(rows[0][0], rows[1][0])
    else:
        assert torch.cuda.default_generators[0].get_offset() == after
        for i in range(3):
            assert (rows[i][0] != rows[i - 1][0]).float().mean() > 0.9


def test_two_draws_of_one_graph(cuda: torch.device) -> None:
    """The second begins where the first ends, and a replay where the one before ended."""
    mu, log_var = on_gpu(*inputs(33))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (first, first_key), (second, second_key) = (
            _ops.sample(mu, log_var, None) for _ in range(2)
        )
    torch.cuda.synchronize()
    torch.cuda.manual_seed(5)
    keys = []
    for _ in range(2):
        graph.replay()
        for z, key in ((first, first_key), (second, second_key)):
            assert_same_bits(z, _ops.sample_from_key(mu, log_var, key))
            keys.append(key.tolist())
    blocks = -(-33 // 4)
    assert [seed for seed, _ in keys] == [5] * 4
    assert [offset for _, offset in keys] == [2**63 + i * blocks for i in range(4)]


# Faults


def test_out_of_memory_draws_nothing(stand_in: StandIn) -> None:
    """At the first allocation of a call, and at the second."""
    mu, log_var = on_gpu(*inputs(N))
    generator = torch.cuda.default_generators[0]
    warm(lambda: fused_reparameterize(mu, log_var))
    before = generator.get_offset(), mu.clone(), log_var.clone()
    for allowed in (0, 1):
        stand_in.fail("cudaMalloc", 2, after=allowed)
        with pytest.raises(RuntimeError, match="out of memory"):
            fused_reparameterize(mu, log_var)
        assert generator.get_offset() == before[0]
    assert torch.equal(mu, before[1])
    assert torch.equal(log_var, before[2])


def test_a_failed_launch_is_an_error_and_draws_nothing(stand_in: StandIn) -> None:
    mu, log_var = on_gpu(*inputs(N))
    key = key_of(1, device="cuda")
    generator = torch.cuda.default_generators[0]
    calls: list[Callable[[], object]] = [
        lambda: fused_reparameterize(mu, log_var),
        lambda: fused_reparameterize(mu, log_var, key=key),
        lambda: _ops.sample_backward(mu, log_var, key),
        lambda: fused_kl_divergence(mu, log_var),
        lambda: _ops.kl_divergence_backward(mu, log_var),
        lambda: noise(key, 100),
    ]
    for call in calls:
        warm(call)
        offset, used = generator.get_offset(), stand_in.bytes_in_use()
        stand_in.fail("cuLaunchKernel", 719)
        with pytest.raises(RuntimeError, match="launch failure"):
            call()
        assert generator.get_offset() == offset
        assert stand_in.bytes_in_use() == used
        call()  # and the next one works
        torch.cuda.synchronize()


def test_an_earlier_kernels_fault_keeps_its_name(stand_in: StandIn) -> None:
    """It is not blamed on a missing binary, and not cleared."""
    mu, log_var = on_gpu(*inputs(8), device="cuda:1")
    torch.cuda.synchronize(1)
    stand_in.fail("cuLaunchKernel", 700, lasting=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            fused_reparameterize(mu, log_var)


# Shapes and keys that the binding makes into a problem for a kernel


def many_dims() -> tuple[Tensor, Tensor]:
    """More dimensions than a kernel takes, which no two neighbours of can be joined."""
    mu, log_var = inputs(2**18)
    order = [d for pair in zip(range(9), range(9, 18), strict=True) for d in pair]
    return mu.view([2] * 18).permute(order)[..., :1], log_var.view([2] * 18)[..., :1]


VIEWS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "one": lambda: inputs(1),
    "a row and a column": lambda: (inputs(5, 1)[0], inputs(33)[1]),
    "scalars": lambda: (inputs()[0], inputs(40)[1]),
    "transposed": lambda: (inputs(33, 5)[0].t(), inputs(33, 5)[1].t()),
    "one transposed": lambda: (inputs(33, 5)[0].t(), inputs(5, 33)[1]),
    "halves": lambda: (inputs(9, 32)[0].chunk(2, 1)[0], inputs(9, 32)[1].chunk(2, 1)[1]),
    "not aligned": lambda: (inputs(101)[0][1:], inputs(100)[1]),
    "half precision, not aligned": lambda: (
        inputs(103, dtype=torch.float16)[0][3:],
        inputs(100, dtype=torch.float16)[1],
    ),
    "every other": lambda: (inputs(64, 20)[0][:, ::2], inputs(64, 10)[1]),
    "channels last": lambda: (
        inputs(2, 8, 3, 3)[0].to(memory_format=torch.channels_last),
        inputs(2, 8, 3, 3)[1],
    ),
    "repeated": lambda: (inputs(1, 7)[0].expand(30, 7), inputs(30, 7)[1]),
    "two dtypes": lambda: (inputs(50, dtype=torch.bfloat16)[0], inputs(50)[1]),
    "many dimensions": many_dims,
}


def in_place(tensor: Tensor) -> Tensor:
    """On the GPU, laid out as it is here."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize("view", VIEWS)
def test_views_have_the_bits_and_strides_of_the_cpu(cuda: torch.device, view: str) -> None:
    mu, log_var = VIEWS[view]()
    key = key_of(7, 2**32 - 3)
    theirs = in_place(mu), in_place(log_var)
    assert [t.stride() for t in theirs] == [mu.stride(), log_var.stride()]
    results, expected = everything(*theirs, key.cuda()), everything(mu, log_var, key)
    for actual, wanted in zip(results[:2], expected[:2], strict=True):
        assert actual.stride() == wanted.stride()
        assert_same_bits(actual, wanted)
    grad = _ops.sample_backward(theirs[0], theirs[1], key.cuda())
    assert_same_bits(grad, _ops.sample_backward(mu, log_var, key))
    drawn, key = _ops.sample(*theirs, None)
    assert_same_bits(drawn, _ops.sample_from_key(mu, log_var, key.cpu()))


@pytest.mark.parametrize(
    ("batch", "shape"),
    [((5,), (5, 33)), ((3, 1), (3, 4, 8)), ((1, 4), (3, 4, 8)), ((3, 4, 1), (3, 4, 8))],
)
def test_keys_of_slices_lie_anywhere(
    cuda: torch.device, batch: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Each slice has the noise of its own key: of rows, and of views of other tensors."""
    mu, log_var = inputs(*shape)
    keys = reparam_fused.split(key_of(9, 2**64 - 1), 24)[: torch.Size(batch).numel()]
    keys = keys.reshape(*batch, 2)
    # not the CPU's kernels, whose numbering is the same code
    expected = reference.sample_from_key(mu, log_var, keys)
    eps = reference.normals(keys, torch.Size(shape), torch.float32)
    wide = torch.stack([keys, keys.flip(0)], -1).cuda()  # words that are not neighbours
    for theirs in (keys.cuda(), wide[..., 0], keys.flip(0).cuda().flip(0)):
        assert_same_bits(_ops.sample_from_key(mu.cuda(), log_var.cuda(), theirs), expected)
        assert_same_bits(noise(theirs, *shape), eps)


def test_blocks_of_a_larger_tensor(cuda: torch.device) -> None:
    whole, key = noise(key_of(4), 9, 40), key_of(4, device=cuda)
    for offset, shape in (((2, 8), (3, 16)), ((1, 3), (5, 17)), ((8, 39), (1, 1))):
        block = noise(key, *shape, global_shape=(9, 40), global_offset=offset)
        rows, columns = (slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        assert_same_bits(block, whole[rows, columns])


def test_a_block_of_many_dimensions(cuda: torch.device) -> None:
    """More than a kernel takes, and none of them joined."""
    block = ([2] * 18, [3] * 18, [0, 1] * 9)
    actual = noise(key_of(1, device=cuda), *block[0], global_shape=block[1], global_offset=block[2])
    shape, whole, offset = block
    expected = noise(key_of(1), *shape, global_shape=whole, global_offset=offset)
    assert_same_bits(actual, expected)


def test_keys_of_slices_in_many_dimensions(cuda: torch.device) -> None:
    mu, log_var = many_dims()
    keys = reparam_fused.split(key_of(5), 2**17).view(*[2] * 17, 1, 2).flip(0, 3)
    expected = fused_reparameterize(mu, log_var, key=keys)
    assert_same_bits(
        fused_reparameterize(*on_gpu(mu, log_var, keys)[:2], key=keys.to(cuda)), expected
    )


def test_a_draw_in_many_dimensions(cuda: torch.device) -> None:
    """Of which each slice is a launch: the key is that of the whole."""
    mu, log_var = on_gpu(*many_dims())
    z, key = _ops.sample(mu, log_var)
    assert_same_bits(z, _ops.sample_from_key(mu, log_var, key).cpu())


# Indices beyond 32 bits


@pytest.mark.parametrize("layout", ["rows", "elements"])
def test_more_than_2_31_elements(stand_in: StandIn, layout: str) -> None:
    """Some blocks of a grid run, and what they write is looked at; nobody touches the rest."""
    row = inputs(64 if layout == "rows" else 63, dtype=torch.bfloat16)[0]
    count = (2**31 + 2**20) // row.numel()
    key = key_of(17, 2**64 - 2**28)
    grids: list[list[int]] = []

    def some(grid: int) -> list[int]:
        grids.append([0, 1, grid // 3, grid // 2, grid - 2, grid - 1])
        return grids[-1]

    stand_in.blocks = some
    mu = row.cuda().expand(count, row.numel())
    z = fused_reparameterize(mu, mu, key=key.cuda())
    torch.cuda.synchronize()
    # The CUDA kernels take what 31 bits count, Triton's take all.
    most = (2**31 - 16) // row.numel() * row.numel()
    parts = [range(most), range(most, z.numel())] if len(grids) == 2 else [range(z.numel())]
    at = torch.from_numpy(stand_in.written(z)).view(-1, 2)
    seen = 0
    for part, block in [(p, b) for p, blocks in zip(parts, grids, strict=True) for b in blocks]:
        elements = len(part) // (grids[parts.index(part)][-1] + 1) // 4 * 4
        first = part.start + min(block * elements, len(part) - 256)
        start = (first - 1024) // 4 * 4
        start = max(0, min(start, z.numel() - 4096))
        window = slice(start, start + 4096)
        written = at[window].bool().all(1)
        seen += int(written.sum())
        host = torch.from_numpy(stand_in.bytes_of(z)).view(torch.bfloat16)[window]
        x = row[(torch.arange(4096) + start) % row.numel()]
        seed, offset = key.tolist()
        expected = _ops.sample_from_key(x, x, key_of(seed, offset + start // 4))
        assert_same_bits(host[written], expected[written])
    assert seen >= 6 * 100 * len(parts)
