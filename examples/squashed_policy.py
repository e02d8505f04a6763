"""Train a squashed Gaussian policy: an action tanh z, and its log-density for the entropy bonus.

    python examples/squashed_policy.py               # reward and entropy, a picture in out/policy
    python examples/squashed_policy.py --compare     # and the time of head and step by eager lines
    python examples/squashed_policy.py --alpha 0.5   # more entropy for less reward

The policy sees a scan of a digit and takes an action in (-1, 1)^6. The reward is highest at one
action for each digit, of which it is not told which; what is maximised is the reward plus alpha
times the entropy, the objective of the actor in Soft Actor-Critic (Haarnoja et al., 2018), with
the reward itself in the critic's place. The data are scikit-learn's digits.
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
from torch.distributions import Normal
from torch.optim import Optimizer
from tqdm import tqdm  # type: ignore[import-untyped]
from train_vae import SIDE, integer_from, load_data, mlp, picture

from reparam_fused import fused_reparameterize_log_prob

# Of mu and log_std: the action, and its log-density
Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

ACTIONS = 6
BATCH = 256
CLAMP = (-20.0, 2.0)  # of log_std, as implementations of SAC have it


def fused(mu: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    return fused_reparameterize_log_prob(mu, log_std=log_std, clamp=CLAMP, dim=-1, tanh=True)


def eager(mu: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    normal = Normal(mu, torch.exp(log_std.clamp(*CLAMP)))
    z = normal.rsample()
    log_slope = 2 * (math.log(2) - z - F.softplus(-2 * z))
    return torch.tanh(z), (normal.log_prob(z) - log_slope).sum(dim=-1)


class Policy(nn.Module):
    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = mlp(SIDE * SIDE, hidden, 2 * ACTIONS)

    def forward(self, images: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        mu, log_std = self.layers(images).chunk(2, dim=-1)
        return head(mu, log_std)


def reward_of(actions: Tensor, labels: Tensor) -> Tensor:
    """At most 0, where the action is the digit's own."""
    generator = torch.Generator().manual_seed(0)
    best = torch.empty(10, ACTIONS).uniform_(-0.8, 0.8, generator=generator)
    return -4 * (actions - best[labels]).square().sum(dim=-1)


def step(
    policy: Policy, optimizer: Optimizer, images: Tensor, labels: Tensor, alpha: float, head: Head
) -> Tensor:
    """One step on the objective; the mean reward and entropy that it saw."""
    actions, log_prob = policy(images, head)
    reward, entropy = reward_of(actions, labels).mean(), -log_prob.mean()
    optimizer.zero_grad()
    torch.autograd.backward(-(reward + alpha * entropy))
    optimizer.step()
    return torch.stack([reward, entropy]).detach()


def train(
    policy: Policy, images: Tensor, labels: Tensor, alpha: float, epochs: int
) -> list[list[float]]:
    """Train in place; return the mean reward and entropy of each epoch."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    curve = []
    for _ in (bar := tqdm(range(epochs), "training", unit="epoch")):
        seen = [
            step(policy, optimizer, images[batch], labels[batch], alpha, fused)
            for batch in torch.randperm(len(images)).split(BATCH)
        ]
        curve.append(torch.stack(seen).mean(dim=0).tolist())
        bar.set_postfix_str("reward {:.2f}, entropy {:.2f}".format(*curve[-1]))
    return curve


def compare(images: Tensor, labels: Tensor, alpha: float, rounds: int = 300) -> None:
    """Print what the head costs, and a whole step, by the fused call and the eager lines."""
    mu, log_std = (torch.randn(len(images), ACTIONS, requires_grad=True) for _ in range(2))
    incoming = [torch.randn(len(images), ACTIONS), torch.randn(len(images))]
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters())
    times: dict[str, list[list[float]]] = {"fused": [], "eager": []}
    for _ in range(rounds):
        for name, head in (("fused", fused), ("eager", eager)):
            start = time.perf_counter()
            torch.autograd.grad(head(mu, log_std), (mu, log_std), incoming)
            middle = time.perf_counter()
            step(policy, optimizer, images, labels, alpha, head)
            end = time.perf_counter()
            times[name].append([1e6 * (middle - start), 1e6 * (end - middle)])
    ours, theirs = (torch.tensor(times[name]).T for name in ("fused", "eager"))
    print(f"\n{len(images)} actions of {ACTIONS} dimensions, forward and backward, median:")
    for part, a, b in zip(("head", "step"), ours, theirs, strict=True):
        print(f"{part}: fused {a.median():.0f} us, eager {b.median():.0f} us:", end=" ")
        print(f"{(b / a).median():.2f} times")
    z = torch.tensor(20.0)
    two_steps = -torch.log(1 - torch.tanh(z).square() + 1e-6)
    exact = -2 * (math.log(2) - z - F.softplus(-2 * z))
    print(f"at z = 20 the density of tanh z is e^{exact:.1f} times that of z;", end=" ")
    print(f"log(1 - tanh(z)^2 + 1e-6), which many use, makes it e^{two_steps:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a squashed Gaussian policy on scans of digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--alpha", type=float, default=0.1, help="weight of the entropy")
    add("--epochs", type=integer_from(1), default=60, help="passes over the training set")
    add("--seed", type=integer_from(0), default=0, help="seed of weights, noise and batches")
    add("--out", type=Path, default=Path("out/policy"), help="folder for the picture")
    add("--compare", action="store_true", help="time head and step by the eager lines")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    images, test_images, labels, test_labels = load_data()
    policy = Policy()
    curve = train(policy, images, labels, arguments.alpha, arguments.epochs)
    with torch.no_grad():
        actions, log_prob = policy(test_images, fused)
    reward, entropy = reward_of(actions, test_labels).mean(), -log_prob.mean()
    print(f"held-out digits: reward {reward:.2f}, entropy {entropy:.2f} nats")
    with picture(arguments.out / "policy.png", 4.5) as axes:
        axes.plot([reward for reward, _ in curve], label="reward")
        axes.plot([entropy for _, entropy in curve], label="entropy, nats")
        axes.set(title=f"Training, alpha = {arguments.alpha}", xlabel="epoch")
        axes.legend()
        axes.grid(alpha=0.3)
    if arguments.compare:
        compare(images[:BATCH], labels[:BATCH], arguments.alpha)
    print(f"picture: policy.png in {arguments.out}")


if __name__ == "__main__":
    main()
