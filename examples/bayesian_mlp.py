"""Train a classifier whose every weight is drawn anew in each step: Bayes by backprop.

    python examples/bayesian_mlp.py                   # digits, a picture in out/bayesian_mlp
    python examples/bayesian_mlp.py --compare         # and the time of a step by the eager line
    python examples/bayesian_mlp.py --compare --hidden 2370 --epochs 1    # of 5.8M weights

A weight is N(mu, softplus(rho)^2), its prior N(0, prior^2) (Blundell et al., Weight Uncertainty in
Neural Networks, 2015). The data are scikit-learn's digits.
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
from train_vae import BATCH, SIDE, integer_from, load_data, picture

from reparam_fused import fused_kl_divergence, fused_reparameterize

PRIOR = 0.5
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fused(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in units of its prior's width, and its divergence from N(0, 1) there."""
    return fused_reparameterize(mu, rho=rho), fused_kl_divergence(mu, rho=rho)


def eager(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    sigma = F.softplus(rho)
    kl = 0.5 * (mu.square() + sigma.square() - 1) - sigma.log()
    return mu + sigma * torch.randn_like(mu), kl


class BayesianLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.randn(outputs, inputs + 1) / math.sqrt(inputs) / PRIOR)
        self.rho = nn.Parameter(torch.full((outputs, inputs + 1), -4.0))

    def forward(self, x: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        weight, kl = draw(self.mu, self.rho)
        weight = PRIOR * weight
        return F.linear(x, weight[:, :-1], weight[:, -1]), kl.sum()


class BayesianMLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        sizes = [SIDE * SIDE, hidden, hidden, 10]
        self.layers = nn.ModuleList(map(BayesianLinear, sizes[:-1], sizes[1:]))

    def forward(self, x: Tensor, draw: Draw = fused) -> tuple[Tensor, Tensor]:
        """Logits under one draw of all weights, and the divergence of the weights."""
        kls = []
        for i, layer in enumerate(self.layers):
            x, kl = layer(x if i == 0 else F.relu(x), draw)
            kls.append(kl)
        return x, torch.stack(kls).sum()


def step(
    model: BayesianMLP,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    size: int,
    draw: Draw,
) -> Tensor:
    """One step on the negative bound, in nats per image of a training set of this size."""
    logits, kl = model(images, draw)
    loss: Tensor = F.cross_entropy(logits, labels) + kl / size
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def predict(model: BayesianMLP, images: Tensor, draws: int = 50) -> Tensor:
    """Class probabilities, a mean over draws of the weights."""
    return torch.stack([model(images)[0].softmax(-1) for _ in range(draws)]).mean(0)


def save_entropies(model: BayesianMLP, images: Tensor, path: Path) -> None:
    """How unsure the model is of digits, and of noise that it has never seen."""
    with picture(path, 4.5) as axes:
        for label, given in (("held-out digits", images), ("noise", torch.rand_like(images))):
            p = predict(model, given)
            entropy = -(p * p.clamp_min(1e-12).log()).sum(-1)
            axes.hist(entropy.numpy(), bins=40, range=(0, math.log(10)), alpha=0.6, label=label)
        axes.set(title="Entropy of the prediction", xlabel="nats", ylabel="images")
        axes.legend(frameon=False)


def compare(hidden: int, images: Tensor, labels: Tensor, rounds: int = 20) -> None:
    """Print what a training step costs with the fused calls and with the eager lines."""
    model = BayesianMLP(hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    weights = sum(p.numel() for p in model.parameters()) // 2
    times: dict[str, list[float]] = {"fused": [], "eager": []}
    for _ in range(rounds):
        for name, draw in (("fused", fused), ("eager", eager)):
            start = time.perf_counter()
            step(model, optimizer, images, labels, len(images), draw)
            times[name].append(1e3 * (time.perf_counter() - start))
    ours, theirs = (torch.tensor(times[name]) for name in ("fused", "eager"))
    ratio = (theirs / ours).median()
    print(f"\na step with {weights} sampled weights and {len(images)} images, median:")
    print(f"fused {ours.median():.2f} ms, eager {theirs.median():.2f} ms: {ratio:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a Bayesian classifier on scans of digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--hidden", type=integer_from(1), default=128, help="width of the two hidden layers")
    add("--epochs", type=integer_from(1), default=200, help="passes over the training set")
    add("--seed", type=integer_from(0), default=0, help="seed of weights, noise and batches")
    add("--out", type=Path, default=Path("out/bayesian_mlp"), help="folder for the picture")
    add("--compare", action="store_true", help="time a step against the eager lines")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    train_set, test_set, train_labels, test_labels = load_data()
    model = BayesianMLP(arguments.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in (bar := tqdm(range(arguments.epochs), "training", unit="epoch")):
        order = torch.randperm(len(train_set))
        for batch in order.split(BATCH):
            given = train_set[batch], train_labels[batch]
            loss = step(model, optimizer, *given, len(train_set), fused)
        bar.set_postfix_str(f"loss {loss:.3f}")
    accuracy = (predict(model, test_set).argmax(-1) == test_labels).float().mean()
    print(f"held-out digits: {accuracy:.1%} right, by the mean of 50 draws")
    save_entropies(model, test_set, arguments.out / "entropy.png")
    if arguments.compare:
        compare(arguments.hidden, train_set[:BATCH], train_labels[:BATCH])
    print(f"picture: entropy.png in {arguments.out}")


if __name__ == "__main__":
    main()
