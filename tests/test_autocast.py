"""torch.autocast: the dtype that the eager line has under it, and training with scaled losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from conftest import DTYPES
from helpers import assert_same_bits, eager, inputs, key_of, needs_cuda_build
from torch._subclasses import FakeTensorMode

from reparam_fused import fused_reparameterize

KEY = key_of(17)
HALVES = [torch.float16, torch.bfloat16]


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
@pytest.mark.parametrize("low", HALVES, ids=str)
def test_the_dtype_is_that_of_the_eager_line(kind: str, low: torch.dtype) -> None:
    """On CUDA the exponential is one of autocast's float32 ops, and on the CPU it is not."""
    for mu_dtype, log_var_dtype in product(DTYPES, DTYPES):
        for mu_shape, log_var_shape in product([(4,), ()], [(4,), ()]):
            with FakeTensorMode(), autocast(kind, low):
                mu = torch.empty(mu_shape, dtype=mu_dtype, device=kind, requires_grad=True)
                log_var = torch.empty(log_var_shape, dtype=log_var_dtype, device=kind)
                expected = eager(mu, log_var, torch.randn_like(mu))
                case = f"mu {mu_dtype} {mu_shape}, log_var {log_var_dtype} {log_var_shape}"
                z = fused_reparameterize(mu, log_var)
                assert (z.dtype, z.shape) == (expected.dtype, expected.shape), case
                of_std = mu + log_var * torch.randn_like(mu)
                assert fused_reparameterize(mu, std=log_var).dtype == of_std.dtype, case
                of_rho = mu + torch.nn.functional.softplus(log_var) * torch.randn_like(mu)
                assert fused_reparameterize(mu, rho=log_var).dtype == of_rho.dtype, case
                z_of_log_std = fused_reparameterize(mu, log_std=log_var, sample_shape=(3,))
                assert z_of_log_std.dtype == (mu + log_var.exp() * torch.randn_like(mu)).dtype
                if kind == "cuda":
                    continue  # autograd asks the GPU itself
                (grad_mu,) = torch.autograd.grad(z.sum(), mu)
                assert (grad_mu.dtype, grad_mu.shape) == (mu_dtype, mu.shape), case


@pytest.mark.parametrize("low", HALVES, ids=str)
def test_bits_are_those_of_the_cpu(both_paths: str, low: torch.dtype, device: torch.device) -> None:
    """Of a call with the float32 log_var that autocast gives exp on a GPU."""
    mu, log_var = (t.requires_grad_() for t in inputs(8, 40, dtype=low, device=device))
    with torch.autocast(device.type, dtype=low):
        z = fused_reparameterize(mu, log_var, key=KEY.to(device))
    grads = torch.autograd.grad(z.sum(), (mu, log_var))
    assert [g.dtype for g in grads] == [low, low]
    leaves = [t.detach().cpu().requires_grad_() for t in (mu, log_var)]
    given = leaves[1].float() if device.type == "cuda" else leaves[1]
    expected = fused_reparameterize(leaves[0], given, key=KEY)
    assert_same_bits(z, expected)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("low", HALVES, ids=str)
def test_a_step_with_a_scaled_loss(both_paths: str, low: torch.dtype, device: torch.device) -> None:
    """The scale changes the step by no more than what the half type rounds."""
    x, _ = inputs(8, 4, device=device)
    steps = []
    for scale in (1.0, 2.0**6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = torch.nn.Linear(4, 6).to(device)
        before = linear.weight.detach().clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        with torch.autocast(device.type, dtype=low):
            mu, log_var = linear(x).chunk(2, -1)
            z = fused_reparameterize(mu, log_var, key=KEY.to(device))
            # exp is one of the float32 ops there
            assert z.dtype == (torch.float32 if device.type == "cuda" else low)
            loss = z.float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(linear.weight.detach() - before)
    assert steps[0].any()
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-2, atol=1e-4)


def test_an_infinite_gradient_skips_the_step(both_paths: str, device: torch.device) -> None:
    """float16: the scaler sees what overflowed in the backward, and halves its scale."""
    mu = torch.zeros(8, dtype=torch.float16, device=device)
    log_var = torch.zeros(8, requires_grad=True, device=device)
    optimizer = torch.optim.SGD([log_var], lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    z = fused_reparameterize(mu, log_var.half() + 8, key=KEY.to(device))
    scaler.scale(z.float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not log_var.any()
    assert scaler.get_scale() == 2.0**15
