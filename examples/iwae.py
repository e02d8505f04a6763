"""Train an importance-weighted autoencoder: K samples of one latent for each image.

    python examples/iwae.py                        # the bound over K, a picture in out/iwae
    python examples/iwae.py --compare              # and the time of a step by the eager line
    python examples/iwae.py --samples 64 --latent 50

The bound log mean_k p(x, z_k) / q(z_k | x) is tighter the more samples it has (Burda, Grosse and
Salakhutdinov, Importance Weighted Autoencoders, 2016). The data are scikit-learn's digits.
Needs ``pip install reparam_fused[demo]``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from train_vae import BATCH, SIDE, integer_from, load_data, mlp, picture

from reparam_fused import Normal, fused_reparameterize

Sampler = Callable[[Tensor, Tensor, int], Tensor]


def fused(mu: Tensor, log_var: Tensor, samples: int) -> Tensor:
    return fused_reparameterize(mu, log_var, sample_shape=(samples,))


def eager(mu: Tensor, log_var: Tensor, samples: int) -> Tensor:
    eps = torch.randn(samples, *mu.shape)
    return mu + torch.exp(0.5 * log_var) * eps


class IWAE(nn.Module):
    def __init__(self, latent: int, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = mlp(SIDE * SIDE, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, SIDE * SIDE)

    def log_weights(self, images: Tensor, samples: int, sampler: Sampler) -> Tensor:
        """log p(x, z) / q(z | x) of each sample and image."""
        mu, log_var = self.encoder(images).chunk(2, dim=-1)
        z = sampler(mu, log_var, samples)
        prior = Normal(0.0, 1.0).log_prob(z)
        posterior = Normal(mu, log_var=log_var).log_prob(z)
        grey = images.expand(samples, *images.shape)
        likelihood = -F.binary_cross_entropy_with_logits(self.decoder(z), grey, reduction="none")
        log_weights: Tensor = likelihood.sum(-1) + (prior - posterior).sum(-1)
        return log_weights

    def bound(self, images: Tensor, samples: int, sampler: Sampler) -> Tensor:
        """In nats per image."""
        weights = self.log_weights(images, samples, sampler)
        return (weights.logsumexp(0) - math.log(samples)).mean()


def train(model: IWAE, images: Tensor, samples: int, epochs: int, sampler: Sampler) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in (bar := tqdm(range(epochs), "training", unit="epoch")):
        for batch in images[torch.randperm(len(images))].split(BATCH):
            bound = model.bound(batch, samples, sampler)
            optimizer.zero_grad()
            torch.autograd.backward(-bound)
            optimizer.step()
        bar.set_postfix_str(f"bound {bound.item():.2f}")


def save_bounds(model: IWAE, images: Tensor, path: Path) -> None:
    """The bound of held-out images over the number of samples that it has."""
    counts = [2**i for i in range(10)]
    with torch.no_grad():
        bounds = [float(model.bound(images, k, fused)) for k in counts]
    for k, bound in zip(counts, bounds, strict=True):
        print(f"K = {k:3d}: {bound:.2f} nats per image")
    with picture(path, 4.5) as axes:
        axes.semilogx(counts, bounds, marker="o", base=2)
        axes.set(title="Bound on held-out digits", xlabel="samples K", ylabel="nats per image")
        axes.grid(alpha=0.3)


def compare(latent: int, samples: int, rounds: int = 30) -> None:
    """Print what sampling costs, forward and backward, by the fused call and the eager line."""
    mu, log_var = (torch.randn(BATCH, latent, requires_grad=True) for _ in range(2))
    incoming = torch.randn(samples, BATCH, latent)
    times: dict[str, list[float]] = {"fused": [], "eager": []}
    for _ in range(rounds):
        for name, sampler in (("fused", fused), ("eager", eager)):
            start = time.perf_counter()
            torch.autograd.grad(sampler(mu, log_var, samples), (mu, log_var), incoming)
            times[name].append(1e6 * (time.perf_counter() - start))
    ours, theirs = (torch.tensor(times[name]) for name in ("fused", "eager"))
    ratio = (theirs / ours).median()
    print(f"\nK = {samples} samples of {BATCH} x {latent}, forward and backward, median:")
    print(f"fused {ours.median():.0f} us, eager {theirs.median():.0f} us: {ratio:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train an importance-weighted autoencoder on scans of digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=integer_from(1), default=64, help="samples K of each latent")
    add("--latent", type=integer_from(1), default=50, help="latent dimensions")
    add("--epochs", type=integer_from(1), default=20, help="passes over the training set")
    add("--seed", type=integer_from(0), default=0, help="seed of weights, noise and batches")
    add("--out", type=Path, default=Path("out/iwae"), help="folder for the picture")
    add("--compare", action="store_true", help="time sampling against the eager line")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    train_set, test_set, *_ = load_data()
    model = IWAE(arguments.latent)
    train(model, train_set, arguments.samples, arguments.epochs, fused)
    save_bounds(model, test_set, arguments.out / "bound.png")
    if arguments.compare:
        compare(arguments.latent, arguments.samples)
    print(f"picture: bound.png in {arguments.out}")


if __name__ == "__main__":
    main()
