"""Whole training steps, in which the call is one line among many."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reparam_fused import fused_reparameterize_kl

from .lines import FORMS, HEADS, Line, Pair
from .timer import Call

BATCH = 128


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _step(parameters: Any, loss: Callable[[], Tensor]) -> Call:
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()

    return step


def _both(pair: Pair, make: Callable[[Line], Call]) -> dict[str, Call]:
    return {"fused": make(pair.fused), "eager": make(pair.eager)}


def vae(device: torch.device) -> dict[str, Call]:
    """A VAE of 28 x 28 pixels, with the layers and the latents of the paper's figures."""
    images = torch.rand(BATCH, 784, device=device)

    def make(line: Line) -> Call:
        encoder, decoder = mlp(784, 400, 2 * 20).to(device), mlp(20, 400, 784).to(device)

        def loss() -> Tensor:
            z, kl = line(*encoder(images).chunk(2, -1))
            pixels = F.binary_cross_entropy_with_logits(decoder(z), images, reduction="sum")
            return pixels + kl.sum()

        return _step([*encoder.parameters(), *decoder.parameters()], loss)

    return _both(HEADS["z, KL"].pair, make)


def _fused_weight(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    return fused_reparameterize_kl(mu, rho=rho, dim=None)


def _eager_weight(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    sigma = F.softplus(rho)
    kl = 0.5 * (mu.square() + sigma.square() - 1) - sigma.log()
    return mu + sigma * torch.randn_like(mu), kl.sum()


def bayesian_mlp(device: torch.device) -> dict[str, Call]:
    """Bayes by backprop: 5.8M weights, each drawn anew in every step."""
    hidden = 2370
    shapes = [(hidden, 64), (hidden, hidden), (10, hidden)]
    images = torch.rand(BATCH, 64, device=device)
    labels = torch.randint(10, (BATCH,), device=device)

    def make(line: Line) -> Call:
        means = [(torch.randn(s, device=device) / math.sqrt(s[1])).requires_grad_() for s in shapes]
        rhos = [torch.full(s, -4.0, device=device, requires_grad=True) for s in shapes]

        def loss() -> Tensor:
            x, total = images, torch.zeros((), device=device)
            for i, (mu, rho) in enumerate(zip(means, rhos, strict=True)):
                weight, kl = line(mu, rho)
                x, total = F.linear(x if i == 0 else F.relu(x), weight), total + kl
            return F.cross_entropy(x, labels) + total / 60_000

        return _step([*means, *rhos], loss)

    return _both(Pair(_fused_weight, _eager_weight), make)


def iwae(device: torch.device) -> dict[str, Call]:
    """An importance-weighted autoencoder: 64 samples of 50 latents of each image."""
    images, samples = torch.rand(BATCH, 64, device=device), 64

    def log_normal(z: Tensor, mu: Tensor | float, log_var: Tensor | float) -> Tensor:
        scale = torch.as_tensor(log_var, device=device)
        return -0.5 * (scale + (z - mu).square() * torch.exp(-scale))

    def make(line: Line) -> Call:
        encoder, decoder = mlp(64, 256, 2 * 50).to(device), mlp(50, 256, 64).to(device)

        def loss() -> Tensor:
            mu, log_var = encoder(images).chunk(2, -1)
            z: Any = line(mu, log_var)
            pixels = F.binary_cross_entropy_with_logits(
                decoder(z), images.expand(samples, *images.shape), reduction="none"
            )
            weights = (log_normal(z, 0.0, 0.0) - log_normal(z, mu, log_var)).sum(-1)
            return -(weights - pixels.sum(-1)).logsumexp(0).mean()

        return _step([*encoder.parameters(), *decoder.parameters()], loss)

    return _both(FORMS["log_var"].samples(samples), make)


def sac(device: torch.device) -> dict[str, Call]:
    """The update of soft actor-critic's policy: 256 states, actions of 6, two critics."""
    states, actions = torch.randn(256, 17, device=device), 6
    critics = [mlp(17 + actions, 256, 256, 1).to(device) for _ in range(2)]

    def make(line: Line) -> Call:
        policy = mlp(17, 256, 256, 2 * actions).to(device)

        def loss() -> Tensor:
            action, log_prob = line(*policy(states).chunk(2, -1))
            given = torch.cat([states, action], -1)
            value = torch.minimum(*(critic(given) for critic in critics)).squeeze(-1)
            return (0.2 * log_prob - value).mean()

        return _step(policy.parameters(), loss)

    return _both(HEADS["tanh z, log q"].pair, make)


#: By name, the two steps, and whether a quick run has them
WORKLOADS: dict[str, tuple[Callable[[torch.device], dict[str, Call]], bool]] = {
    "VAE, 128 x 784 pixels, 20 latents": (vae, True),
    "Bayesian MLP, 5.8M weights drawn": (bayesian_mlp, False),
    "IWAE, 64 samples of 128 x 50": (iwae, False),
    "SAC, policy of 256 states": (sac, True),
}
