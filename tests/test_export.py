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

from reparam_fused import fused_reparameterize

KEY = key_of(19)
MU, LOG_VAR = inputs(6, 8)


class Sampler(torch.nn.Module):
    def forward(self, mu: Tensor, log_var: Tensor, key: Tensor | None = None) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key)


def assert_draws(call: Callable[..., Tensor]) -> None:
    """Fresh noise at every call, from the generator."""
    torch.manual_seed(4)
    first, second = call(MU, LOG_VAR), call(MU, LOG_VAR)
    assert (first != second).all()
    torch.manual_seed(4)
    assert_same_bits(call(MU, LOG_VAR), first)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_key(strict: bool) -> None:
    """For any batch, and for a key that it was not traced with."""
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        Sampler(), (MU, LOG_VAR, key_of(1)), dynamic_shapes=(batch, batch, None), strict=strict
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for again in (program, torch.export.load(buffer), program.run_decompositions()):
        for n in (6, 11):
            mu, log_var = inputs(n, 8)
            z = again.module()(mu, log_var, KEY)
            assert_same_bits(z, fused_reparameterize(mu, log_var, key=KEY))


@pytest.mark.parametrize("strict", [True, False])
def test_export_without_a_key(strict: bool) -> None:
    program = torch.export.export(Sampler(), (MU, LOG_VAR), strict=strict)
    assert_draws(program.module())
    assert_draws(program.run_decompositions().module())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    def sample(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var)

    def gradient(mu: Tensor, log_var: Tensor) -> Tensor:
        loss = lambda v: fused_reparameterize(mu, v).square().sum()  # noqa: E731
        result: Tensor = torch.func.grad(loss)(log_var)
        return result

    for call in (sample, gradient):
        assert_draws(make_fx(call, tracing_mode=mode)(MU, LOG_VAR))


def test_jit_trace() -> None:
    """Deprecated, and still right, with its gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = torch.jit.trace(fused_reparameterize, (MU, LOG_VAR), check_trace=False)
        fixed = torch.jit.trace(
            lambda mu, log_var, key: fused_reparameterize(mu, log_var, key=key),
            (MU, LOG_VAR, key_of(1)),
        )
    assert_draws(drawn)
    log_var = LOG_VAR.clone().requires_grad_()
    z = fixed(MU, log_var, KEY)
    assert_same_bits(z, fused_reparameterize(MU, LOG_VAR, key=KEY))
    (grad,) = torch.autograd.grad(z.sum(), log_var)
    torch.testing.assert_close(grad, 0.5 * (z - MU))
