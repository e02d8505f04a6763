"""Graphs that outlive the call: torch.export, make_fx, torch.jit.trace. No seed is baked in."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import assert_same_bits, inputs, key_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from reparam_fused import fused_kl_divergence, fused_reparameterize

KEY = key_of(19)


class Sampler(torch.nn.Module):
    def forward(self, mu: Tensor, log_var: Tensor, key: Tensor | None = None) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key)


def assert_draws(call: Callable[..., Tensor], device: torch.device) -> None:
    """Fresh noise at every call, from the generator."""
    mu, log_var = inputs(6, 8, device=device)
    torch.manual_seed(4)
    first, second = call(mu, log_var), call(mu, log_var)
    assert (first != second).all()
    torch.manual_seed(4)
    assert_same_bits(call(mu, log_var), first)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_key(strict: bool, device: torch.device) -> None:
    """For any batch, and for a key that it was not traced with."""
    batch = {0: torch.export.Dim("batch")}
    example = (*inputs(6, 8, device=device), key_of(1, device=device))
    program = torch.export.export(
        Sampler(), example, dynamic_shapes=(batch, batch, None), strict=strict
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for again in (program, torch.export.load(buffer), program.run_decompositions()):
        for n in (6, 11):
            operands = (*inputs(n, 8), KEY)
            z = again.module()(*(t.to(device) for t in operands))
            assert_same_bits(z, Sampler()(*operands))


@pytest.mark.parametrize("strict", [True, False])
def test_export_without_a_key(strict: bool, device: torch.device) -> None:
    program = torch.export.export(Sampler(), inputs(6, 8, device=device), strict=strict)
    assert_draws(program.module(), device)
    assert_draws(program.run_decompositions().module(), device)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str, device: torch.device) -> None:
    def sample(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var)

    def gradient(mu: Tensor, log_var: Tensor) -> Tensor:
        loss = lambda v: fused_reparameterize(mu, v).square().sum()  # noqa: E731
        result: Tensor = torch.func.grad(loss)(log_var)
        return result

    for call in (sample, gradient):
        assert_draws(make_fx(call, tracing_mode=mode)(*inputs(6, 8, device=device)), device)


def test_jit_trace() -> None:
    """Deprecated, and still right, with its gradient; the program is one of torch's own ops."""
    mu, log_var = inputs(6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = torch.jit.trace(fused_reparameterize, (mu, log_var), check_trace=False)
        divergence = torch.jit.trace(fused_kl_divergence, (mu, log_var))
        with pytest.raises(NotImplementedError, match=r"a key cannot go into torch\.jit\.trace"):
            torch.jit.trace(
                lambda mu, log_var, key: fused_reparameterize(mu, log_var, key=key),
                (mu, log_var, key_of(1)),
            )
        of_std = torch.jit.trace(
            lambda mu, std: fused_reparameterize(mu, std=std), (mu, log_var), check_trace=False
        )
    torch.manual_seed(5)
    z = of_std(mu, log_var)
    torch.manual_seed(5)
    torch.testing.assert_close(z, mu + log_var * torch.randn_like(mu))
    for program in (drawn, divergence):
        kinds = [node.kind() for node in program.inlined_graph.nodes()]
        assert not [kind for kind in kinds if kind.startswith("reparam_fused")]
    assert_draws(drawn, torch.device("cpu"))
    z = drawn(mu, log_var.requires_grad_())
    (grad,) = torch.autograd.grad(z.sum(), log_var)
    torch.testing.assert_close(grad, 0.5 * (z - mu))
    torch.testing.assert_close(divergence(mu, log_var), fused_kl_divergence(mu, log_var))
