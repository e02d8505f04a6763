"""AutoencoderKL of diffusers: encode, sample, decode and back, with the fused sample."""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: make integrations")

from clients import autoencoder, images
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers import assert_same_bits

from reparam_fused import patch

ORIGINAL = DiagonalGaussianDistribution.sample


def test_gradients_are_those_of_the_same_noise_by_hand(calls: list[Any]) -> None:
    model, batch = autoencoder().double(), images(2, 3, 16, 16, dtype=torch.float64)
    parameters = list(model.parameters())

    with patch():
        posterior = model.encode(batch).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(7))
        kl = posterior.kl()
    assert len(calls) == 1
    assert z.shape == (2, 4, 8, 8)
    loss = (model.decode(z).sample - batch).square().sum() + kl.sum()
    fused = torch.autograd.grad(loss, parameters)

    eps = ((z - posterior.mean) / posterior.std).detach()
    assert eps.std() == pytest.approx(1, abs=5 / (2 * eps.numel()) ** 0.5)
    posterior = model.encode(batch).latent_dist
    z = posterior.mean + posterior.std * eps
    loss = (model.decode(z).sample - batch).square().sum() + posterior.kl().sum()
    by_hand = torch.autograd.grad(loss, parameters)

    for a, b in zip(fused, by_hand, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl(dtype: torch.dtype) -> None:
    """Of each example; nearer to the exact one than the original's where the latents are."""
    parameters = images(2, 8, 16, 16).mul(1e-2).to(dtype).requires_grad_()
    posterior = DiagonalGaussianDistribution(parameters)
    mean, log_var = (t.double() for t in (posterior.mean, posterior.logvar))
    exact = 0.5 * (mean**2 + torch.expm1(log_var) - log_var).sum([1, 2, 3])
    original = posterior.kl()
    with patch("diffusers"):
        kl = posterior.kl()
        other = DiagonalGaussianDistribution(parameters.detach() + 1)
        from_other = posterior.kl(other)
    assert (kl.shape, kl.dtype) == (original.shape, dtype)
    assert ((kl - exact).abs() < (original - exact).abs()).all()
    torch.testing.assert_close(kl, exact.to(dtype))
    assert_same_bits(from_other.detach(), posterior.kl(other).detach())
    (grad,) = torch.autograd.grad(kl.sum(), parameters, retain_graph=True)
    (exact_grad,) = torch.autograd.grad(exact.sum(), parameters)
    torch.testing.assert_close(grad, exact_grad)


def test_the_models_own_forward(calls: list[Any]) -> None:
    """Which passes its generator on by name, and takes the mode where it is not to sample."""
    model, batch = autoencoder(), images(2, 3, 16, 16)
    with patch("diffusers"), torch.no_grad():
        first, second = (
            model(batch, sample_posterior=True, generator=torch.Generator().manual_seed(7)).sample
            for _ in range(2)
        )
        assert len(calls) == 2
        model(batch)
        assert len(calls) == 2
    assert_same_bits(first, second)
    assert DiagonalGaussianDistribution.sample is ORIGINAL


@pytest.mark.parametrize("oobleck", [False, True])
def test_a_list_of_generators(oobleck: bool, calls: list[Any]) -> None:
    """Equal where randn_tensor's are: a list of one and that one, a row and the row alone."""
    cls: Any = DiagonalGaussianDistribution
    if oobleck:
        module = "diffusers.models.autoencoders.autoencoder_oobleck"
        cls = import_module(module).OobleckDiagonalGaussianDistribution
    parameters = images(2, 8, 100) if oobleck else images(2, 8, 4, 4)

    def seeds(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for context in (contextlib.nullcontext, lambda: patch(cls)):
        with context():
            one = cls(parameters).sample(seeds(7)[0])
            assert_same_bits(cls(parameters).sample(seeds(7)), one)
            rows = cls(parameters).sample(seeds(7, 8))
            for i, generator in enumerate(seeds(7, 8)):
                row = slice(i, i + 1)
                assert_same_bits(rows[row], cls(parameters[row]).sample(generator))
    assert len(calls) == 5


def test_a_deterministic_distribution_is_its_mean(calls: list[Any]) -> None:
    posterior = DiagonalGaussianDistribution(images(2, 8, 4, 4), deterministic=True)
    with patch("diffusers"):
        assert_same_bits(posterior.sample(), posterior.mean)
    assert not calls


def test_half_precision(calls: list[Any]) -> None:
    model, batch = autoencoder().bfloat16(), images(2, 3, 16, 16).bfloat16()
    with patch("diffusers"):
        z = model.encode(batch).latent_dist.sample()
    assert z.dtype == torch.bfloat16
    model.decode(z).sample.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(calls) == 1


def test_the_class_by_itself(calls: list[Any]) -> None:
    """Is the target of its name."""
    posterior = DiagonalGaussianDistribution(images(2, 8, 16, 16))
    drawn = []
    for target in ("diffusers", DiagonalGaussianDistribution):
        with patch(target):
            drawn.append(posterior.sample(torch.Generator().manual_seed(7)))
    assert_same_bits(*drawn)
    assert len(calls) == 2
    assert DiagonalGaussianDistribution.sample is ORIGINAL


def test_oobleck(calls: list[Any]) -> None:
    """The audio autoencoder's, whose standard deviation is a softplus."""
    module = "diffusers.models.autoencoders.autoencoder_oobleck"
    cls = import_module(module).OobleckDiagonalGaussianDistribution
    parameters = images(2, 8, 100, dtype=torch.float64).requires_grad_()
    posterior = cls(parameters)
    with patch(cls):
        z = posterior.sample(torch.Generator().manual_seed(7))
        assert_same_bits(posterior.sample(generator=torch.Generator().manual_seed(7)), z)
        kl = posterior.kl()
    assert len(calls) == 2
    assert_same_bits(kl, posterior.kl())
    eps = ((z - posterior.mean) / posterior.std).detach()
    assert eps.std() == pytest.approx(1, abs=5 / (2 * eps.numel()) ** 0.5)
    gradients = (
        torch.autograd.grad(t.square().sum(), parameters, retain_graph=True)
        for t in (z, posterior.mean + posterior.std * eps)
    )
    torch.testing.assert_close(*gradients)
