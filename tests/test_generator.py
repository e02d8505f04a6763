"""Without a key: the noise comes from the generator, as torch.randn's does."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import reparam_fused
from reparam_fused import _ops, functional, fused_reparameterize
from reparam_fused._draw import draw_key

MU, LOG_VAR = inputs(64, 20)


def sample(generator: torch.Generator | None = None) -> Tensor:
    return fused_reparameterize(MU, LOG_VAR, generator=generator)


def test_two_calls_differ(both_paths: str) -> None:
    assert (sample() != sample()).float().mean() > 0.99


def test_the_op_that_draws_gives_its_key_too(both_paths: str) -> None:
    torch.manual_seed(3)
    z, key = _ops.sample(MU, LOG_VAR, None)
    assert (key.shape, key.dtype) == ((2,), torch.uint64)
    assert_same_bits(z, fused_reparameterize(MU, LOG_VAR, key=key))
    torch.manual_seed(3)
    assert_same_bits(z, sample())


def test_manual_seed_reproduces(both_paths: str) -> None:
    torch.manual_seed(5)
    first = [sample(), sample()]
    torch.manual_seed(5)
    for z in first:
        assert_same_bits(sample(), z)


def test_a_generator_of_ones_own(both_paths: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first = [sample(generator), sample(generator)]
    assert torch.equal(torch.get_rng_state(), before)
    generator.manual_seed(7)
    for z in first:
        assert_same_bits(sample(generator), z)


def test_rng_state_and_fork_rng(both_paths: str) -> None:
    state = torch.get_rng_state()
    first = sample()
    torch.set_rng_state(state)
    with torch.random.fork_rng(devices=[]):
        assert_same_bits(sample(), first)
        sample()
    assert_same_bits(sample(), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_noise_again(both_paths: str, use_reentrant: bool) -> None:
    mu, log_var = MU.clone().requires_grad_(), LOG_VAR.clone().requires_grad_()

    def run(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var).square()

    results = []
    for through_checkpoint in (False, True):
        torch.manual_seed(3)
        if through_checkpoint:
            z = checkpoint(run, mu, log_var, use_reentrant=use_reentrant, preserve_rng_state=True)
        else:
            z = run(mu, log_var)
        torch.rand(5)  # something else moves the generator before the backward
        results.append(
            (z, *torch.autograd.grad(z.sum(), (mu, log_var)))
            if not use_reentrant
            else backward(z, mu, log_var)
        )
    for plain, again in zip(*results, strict=True):
        assert_same_bits(again, plain)


def backward(z: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """.backward(), which is all that the reentrant checkpoint takes."""
    for leaf in leaves:
        leaf.grad = None
    z.sum().backward()
    return (z, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None))


def test_both_paths_and_the_fallback_draw_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(11)
    first = sample()
    state = torch.get_rng_state()
    torch.manual_seed(11)
    key = draw_key(MU.device, None, 0)
    assert key.dtype == torch.uint64
    assert key[1] == 0
    assert_same_bits(fused_reparameterize(MU, LOG_VAR, key=key), first)
    monkeypatch.setattr(functional, "plain_call", functional.no_plain_call)
    torch.manual_seed(11)
    assert_same_bits(sample(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_key_leaves_the_generator_alone(both_paths: str) -> None:
    before = torch.get_rng_state()
    fused_reparameterize(MU, LOG_VAR, key=reparam_fused.key(1))
    reparam_fused.noise(reparam_fused.key(1), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_share_the_default_generator() -> None:
    """Under its mutex: no key is drawn twice."""
    from concurrent.futures import ThreadPoolExecutor

    zero = torch.zeros(8)
    with ThreadPoolExecutor(8) as pool:
        draws = list(pool.map(lambda _: fused_reparameterize(zero, zero), range(2000)))
    assert torch.stack(draws).unique(dim=0).shape[0] == 2000
