"""torch.compile: one graph, fresh noise, the bits of eager, gradients of what was returned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compilers import compilers, on_devices
from helpers import assert_same_bits, inputs, key_of, leaves
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import reparam_fused
from reparam_fused import _partitioner, fused_reparameterize, fused_reparameterize_kl

KEY = key_of(8)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compilers("eager", "aot_eager", "inductor")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_calls_draw_fresh_noise(backend: str, device: torch.device, needs_grad: bool) -> None:
    """The traps of CSE, which merges equal calls, and of a seed baked into the graph."""

    @torch.compile(backend=backend, fullgraph=True)
    def four(mu: Tensor, log_var: Tensor) -> list[Tensor]:
        return [fused_reparameterize(mu, log_var) for _ in range(4)]

    mu, log_var = (leaves if needs_grad else inputs)(6, 8, device=device)
    torch.manual_seed(2)
    samples = four(mu, log_var) + four(mu, log_var)
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert (a != b).all()
    torch.manual_seed(2)
    for z, again in zip(samples, four(mu, log_var) + four(mu, log_var), strict=True):
        assert_same_bits(again, z)
    if needs_grad:
        for z in samples:
            _, grad_log_var = torch.autograd.grad(z.sum(), (mu, log_var), retain_graph=True)
            torch.testing.assert_close(grad_log_var, 0.5 * (z - mu))


@compilers("eager", "aot_eager", "inductor")
def test_calls_with_a_key_equal_eager_ones(backend: str, device: torch.device) -> None:
    """Forward and backward, as bits, in one graph; eager runs on the CPU."""

    def cases_on(device: torch.device | str) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (*leaves(6, 20, dtype=dtype, device=device), key.to(device))
            for dtype in (torch.float32, torch.bfloat16)
            for key in (KEY, reparam_fused.split(KEY, 6))
        ]

    def run(cases: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [fused_reparameterize(mu, log_var, key=key) for mu, log_var, key in cases]

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    results = []
    for call, place in ((run, "cpu"), (compiled, device)):
        cases = cases_on(place)
        wanted = [t for mu, log_var, _ in cases for t in (mu, log_var)]
        z = call(cases)
        weights = [inputs(*t.shape, dtype=t.dtype, seed=4, device=place)[0] for t in z]
        results.append([*z, *torch.autograd.grad(z, wanted, weights)])
        with torch.no_grad():
            results[-1] += call(cases)
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_same_bits(ours, theirs)


@compilers("aot_eager", "inductor")
@pytest.mark.parametrize("marked", [True, False])
def test_one_graph_for_all_sizes(backend: str, device: torch.device, marked: bool) -> None:
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True, dynamic=None if marked else True)
    def call(mu: Tensor, log_var: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        drawn = fused_reparameterize(mu, log_var)
        return drawn, fused_reparameterize(mu, log_var, key=keys)

    for n in (7, 8, 64, 101):
        mu, log_var = leaves(n, 5, dtype=torch.float32, device=device)
        keys = reparam_fused.split(KEY.to(device), n)
        if marked:  # an error where the graph holds for one size alone
            for t in (mu, log_var, keys):
                torch._dynamo.mark_dynamic(t, 0)
        drawn, fixed = call(mu, log_var, keys)
        expected = fused_reparameterize(mu.cpu(), log_var.cpu(), key=keys.cpu()).to(device)
        assert_same_bits(fixed, expected)
        (ours,) = torch.autograd.grad((drawn + fixed).sum(), log_var)
        torch.testing.assert_close(ours, 0.5 * (drawn - mu + expected - mu), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@compilers("eager", "aot_eager", "inductor")
def test_keys_of_a_graph(backend: str, device: torch.device) -> None:
    """Made, split and folded in it."""

    def three(mu: Tensor, log_var: Tensor, key: Tensor) -> list[Tensor]:
        made = reparam_fused.key(3, device=mu.device)
        keys = made, reparam_fused.fold_in(key, 5), reparam_fused.split(key)[1]
        return [fused_reparameterize(mu, log_var, key=k) for k in keys]

    arguments = [t.to(device) for t in (*inputs(6, 8), KEY)]
    compiled = torch.compile(three, backend=backend, fullgraph=True)
    for z, expected in zip(compiled(*arguments), three(*arguments), strict=True):
        assert_same_bits(z, expected)


def test_mu_is_log_var(device: torch.device) -> None:
    """dynamo refuses a Function that is given one tensor twice."""
    x, _ = leaves(6, device=device)
    compiled = torch.compile(fused_reparameterize, backend="aot_eager", fullgraph=True)
    results = []
    for call in (fused_reparameterize, compiled):
        z = call(x, x, key=KEY.to(device))
        results.append((z, *torch.autograd.grad(z.sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def layers(
    mu: Tensor, log_var: Tensor, weights: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Three samples between products, each of the one before; and what each was drawn of."""
    drawn = []
    for weight in weights.unbind():
        m, v = torch.tanh(mu @ weight), torch.tanh(log_var @ weight)
        z = fused_reparameterize(m, v)
        drawn.append((m, v, z))
        mu = torch.relu(z @ weight)
    return mu, drawn


def assert_gradients_are_of_what_was_returned(
    call: Callable[..., Any], device: torch.device
) -> None:
    """The eager lines, with the noise that was used, give the same gradients."""
    torch.manual_seed(0)
    mu, log_var = leaves(8, 16, device=device)
    weights = inputs(3, 16, 16, dtype=torch.float64, seed=3, device=device)[0].requires_grad_()
    last, drawn = call(mu, log_var, weights)
    torch.rand(3, device=device)  # a draw in the backward would find the generator elsewhere
    ours = torch.autograd.grad(last.square().sum(), (mu, log_var, weights))
    h = mu
    for weight, (m, v, z) in zip(weights.unbind(), drawn, strict=True):
        eps = ((z - m) / torch.exp(0.5 * v)).detach()
        z_again = torch.tanh(h @ weight) + torch.exp(0.5 * torch.tanh(log_var @ weight)) * eps
        h = torch.relu(z_again @ weight)
    theirs = torch.autograd.grad(h.square().sum(), (mu, log_var, weights))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("backend", "budget", "device"),
    on_devices(
        *(("aot_eager_decomp_partition", budget) for budget in (0.0, 0.3, 0.5, 0.9, 1.0)),
        # the same partitioner, and seconds for each
        *(("inductor", budget) for budget in (0.0, 0.5)),
    ),
    indirect=["device"],
)
def test_memory_budgets_do_not_draw_again(
    backend: str, budget: float, device: torch.device
) -> None:
    """Below 1 the partitioner draws torch.randn again, and gives wrong gradients."""
    with config.patch(activation_memory_budget=budget):
        compiled = torch.compile(layers, backend=backend, fullgraph=True)
        assert_gradients_are_of_what_was_returned(compiled, device)


def test_graphs_without_a_backward_take_any_budget(device: torch.device) -> None:
    """torch refuses a draw that is marked for the partitioner where there is none."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var).detach()

    for budget in (0.0, 1.0):
        with config.patch(activation_memory_budget=budget):
            for mu, log_var in (inputs(6, 8, device=device), leaves(6, 8, device=device)):
                assert (call(mu, log_var) != call(mu, log_var)).all()
        torch._dynamo.reset()


def test_the_mark_is_of_the_draw_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows it has the mark of its checkpoint, if that gave it one."""
    graph = torch.fx.Graph()
    graph.placeholder("tangents_1")
    mode = SimpleNamespace(tracer=SimpleNamespace(graph=graph))
    meta: dict[str, Any] = {}
    monkeypatch.setattr(_partitioner, "get_proxy_mode", lambda: mode)
    monkeypatch.setattr(_partitioner, "traceback", SimpleNamespace(get_current_meta=lambda: meta))
    for outer in ({}, {"recompute": CheckpointPolicy.MUST_SAVE, "other": 1}):
        meta.clear()
        meta.update(outer)
        with config.patch(activation_memory_budget=0.5), _partitioner.drawn_once():
            assert meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE
        assert meta == outer
        # A call that torch refuses while it traces leaves no mark behind.
        with (
            config.patch(activation_memory_budget=0.5),
            pytest.raises(ZeroDivisionError),
            _partitioner.drawn_once(),
        ):
            _ = 1 / 0
        assert meta == outer


def test_log_var_and_a_key_go_to_the_backward(device: torch.device) -> None:
    """The one kernel there, and the state of no generator."""
    graphs: list[list[torch.fx.Node]] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(list(graph.graph.nodes))
        return graph

    backend = aot_autograd(
        fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition
    )
    mu, log_var = leaves(6, 8, device=device)
    torch.compile(fused_reparameterize, backend=backend)(mu, log_var).sum().backward()
    _, backward = graphs
    kept = [node.meta["val"] for node in backward if node.op == "placeholder"]
    expected = [((2,), torch.uint64), ((6, 8), torch.float64), ((6, 8), torch.float64)]
    assert sorted(((t.shape, t.dtype) for t in kept), key=str) == sorted(expected, key=str)
    called = [str(node.target) for node in backward if node.op == "call_function"]
    assert called == ["reparam_fused.sample_backward.default"]


def save_products(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    save = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def save_samples(_: object, op: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    save = op.namespace == "reparam_fused"
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def save_nothing(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


@pytest.mark.parametrize(
    ("backend", "policy", "device"),
    on_devices(
        *product(
            [None, "aot_eager", "aot_eager_decomp_partition"],
            [None, save_products, save_samples, save_nothing],
        ),
        ("inductor", save_nothing),
    ),
    indirect=["device"],
)
def test_checkpoint_uses_the_noise_of_the_forward(
    backend: str | None,
    policy: Callable[..., CheckpointPolicy] | None,
    device: torch.device,
) -> None:
    """Whole or selective; the trap of an op without a tag, whose recomputation draws anew."""
    selective = {}
    if policy is not None:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        selective = {"context_fn": contexts}

    def call(*args: Tensor) -> Any:
        return checkpoint(layers, *args, use_reentrant=False, **selective)

    if backend is not None:
        call = torch.compile(call, backend=backend, fullgraph=True)
    assert_gradients_are_of_what_was_returned(call, device)


@compilers("eager", "aot_eager", "inductor")
def test_func_grad_within_a_graph(backend: str, device: torch.device) -> None:
    mu, log_var = inputs(6, device=device)
    key = KEY.to(device)

    def gradient(mu: Tensor, log_var: Tensor) -> Tensor:
        loss = lambda v: fused_reparameterize(mu, v, key=key).square().sum()  # noqa: E731
        result: Tensor = torch.func.grad(loss)(log_var)
        return result

    compiled = torch.compile(gradient, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(mu, log_var), gradient(mu, log_var))


@pytest.mark.parametrize("compiled_forward", [False, True])
@pytest.mark.parametrize("form", ["log_var", "std"])
def test_compiled_autograd(form: str, compiled_forward: bool, device: torch.device) -> None:
    """The engine's own graph is traced, and the backward with it."""
    mu, scale = leaves(6, 8, device=device)
    key = KEY.to(device)

    def loss(mu: Tensor, scale: Tensor) -> Tensor:
        return fused_reparameterize(mu, **{form: scale}, key=key).square().sum()

    expected = torch.autograd.grad(loss(mu, scale), (mu, scale))
    call = torch.compile(loss, backend="aot_eager") if compiled_forward else loss
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        gradients = torch.autograd.grad(call(mu, scale), (mu, scale))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


@compilers("eager", "aot_eager", "inductor")
@pytest.mark.parametrize("head", [False, True])
def test_a_generator_draws_the_same_compiled_or_not(
    backend: str, head: bool, device: torch.device
) -> None:
    """Red where a compiled call draws its key from a generator otherwise than an eager one."""

    def twice(mu: Tensor, log_var: Tensor, generator: torch.Generator) -> Tensor:
        if head:
            return torch.stack(
                [
                    fused_reparameterize_kl(mu, log_var, dim=-1, generator=generator)[0]
                    for _ in range(2)
                ]
            )
        return torch.stack([fused_reparameterize(mu, log_var, generator=generator) for _ in "12"])

    mu, log_var = inputs(6, 3, device=device)
    generator = torch.Generator(device).manual_seed(3)
    expected = twice(mu, log_var, generator)
    state = generator.get_state()
    # No fullgraph: torch does not trace a generator.
    compiled = torch.compile(twice, backend=backend)
    assert_same_bits(compiled(mu, log_var, generator.manual_seed(3)), expected)
    assert torch.equal(generator.get_state(), state)


@compilers("eager", "aot_eager", "inductor")
def test_one_seed_within_grad_compiled_or_not(backend: str, device: torch.device) -> None:
    """Twice, with noise of their own. Red where what is within torch.func.grad of a graph draws
    as what is within vmap does."""

    def loss(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.stack([fused_reparameterize(mu, log_var), fused_reparameterize(mu, log_var)])
        return z.square().sum(), z

    def grad(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.grad(loss, has_aux=True)(mu, log_var)

    mu, log_var = inputs(6, 3, device=device)
    torch.manual_seed(3)
    gradient, z = grad(mu, log_var)
    torch.manual_seed(3)
    compiled_gradient, compiled_z = torch.compile(grad, backend=backend, fullgraph=True)(
        mu, log_var
    )
    assert_same_bits(compiled_z, z)
    torch.testing.assert_close(compiled_gradient, gradient)
    assert z.unique().numel() == z.numel()
