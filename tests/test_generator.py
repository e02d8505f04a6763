"""Without a key: the noise comes from the generator, as torch.randn's does."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, by_the_ops_alone, inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import reparam_fused
from reparam_fused import _ops, fused_reparameterize
from reparam_fused._draw import blocks, draw_key

MU, LOG_VAR = inputs(64, 20)


def sample(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    return fused_reparameterize(MU.to(device), LOG_VAR.to(device), generator=generator)


def default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[0] if device.type == "cuda" else torch.default_generator


def test_two_calls_differ(both_paths: str, device: torch.device) -> None:
    assert (sample(device) != sample(device)).float().mean() > 0.99


def test_the_op_that_draws_gives_its_key_too(both_paths: str, device: torch.device) -> None:
    torch.manual_seed(3)
    z, key = _ops.sample(MU.to(device), LOG_VAR.to(device), None)
    assert (key.shape, key.dtype, key.device) == ((2,), torch.uint64, z.device)
    assert_same_bits(z, fused_reparameterize(MU, LOG_VAR, key=key.cpu()))
    torch.manual_seed(3)
    assert_same_bits(z, sample(device))


def test_manual_seed_reproduces(both_paths: str, device: torch.device) -> None:
    torch.manual_seed(5)
    first = [sample(device), sample(device)]
    torch.manual_seed(5)
    for z in first:
        assert_same_bits(sample(device), z)


def test_a_generator_of_ones_own(both_paths: str, device: torch.device) -> None:
    torch.manual_seed(5)
    before = default_generator(device).get_state()
    generator = torch.Generator(device).manual_seed(7)
    first = [sample(device, generator), sample(device, generator)]
    assert torch.equal(default_generator(device).get_state(), before)
    generator.manual_seed(7)
    for z in first:
        assert_same_bits(sample(device, generator), z)


def test_rng_state_and_fork_rng(both_paths: str, device: torch.device) -> None:
    generator = default_generator(device)
    state = generator.get_state()
    first = sample(device)
    generator.set_state(state)
    with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []):
        assert_same_bits(sample(device), first)
        sample(device)
    assert_same_bits(sample(device), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_noise_again(
    both_paths: str, use_reentrant: bool, device: torch.device
) -> None:
    mu, log_var = (t.clone().to(device).requires_grad_() for t in (MU, LOG_VAR))

    def run(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var).square()

    results = []
    for through_checkpoint in (False, True):
        torch.manual_seed(3)
        if through_checkpoint:
            z = checkpoint(run, mu, log_var, use_reentrant=use_reentrant, preserve_rng_state=True)
        else:
            z = run(mu, log_var)
        torch.rand(5, device=device)  # something else moves the generator before the backward
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


def test_both_paths_and_the_fallback_draw_the_same_keys(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Of a GPU's generator its position, in a domain of its own; else 64 random bits."""
    torch.manual_seed(11)
    drawn = [sample(device), sample(device)]
    state = default_generator(device).get_state()
    torch.manual_seed(11)
    for i, z in enumerate(drawn):
        key = draw_key(device, None, blocks(MU, LOG_VAR))
        assert (key.dtype, key.device) == (torch.uint64, z.device)
        if device.type == "cuda":
            assert key.tolist() == [11, 2**63 + i * 320]
        else:
            assert key[1] == 0
        assert_same_bits(z, fused_reparameterize(MU, LOG_VAR, key=key.cpu()))
    assert torch.equal(default_generator(device).get_state(), state)
    by_the_ops_alone(monkeypatch)
    torch.manual_seed(11)
    for z in drawn:
        assert_same_bits(sample(device), z)
    assert torch.equal(default_generator(device).get_state(), state)


def test_nothing_is_drawn_for_nothing(device: torch.device) -> None:
    before = default_generator(device).get_state()
    draw_key(device, None, 0)
    assert torch.equal(default_generator(device).get_state(), before)


def test_a_key_leaves_the_generator_alone(both_paths: str, device: torch.device) -> None:
    before = default_generator(device).get_state()
    key = reparam_fused.key(1, device=device)
    fused_reparameterize(MU.to(device), LOG_VAR.to(device), key=key)
    reparam_fused.noise(key, 10)
    assert torch.equal(default_generator(device).get_state(), before)


def test_threads_share_the_default_generator(device: torch.device) -> None:
    """Under its mutex: no key is drawn twice."""
    from concurrent.futures import ThreadPoolExecutor

    zero = torch.zeros(8, device=device)
    n = 200 if device.type == "cuda" else 2000
    with ThreadPoolExecutor(8) as pool:
        draws = list(pool.map(lambda _: fused_reparameterize(zero, zero), range(n)))
    assert torch.stack(draws).cpu().unique(dim=0).shape[0] == n
