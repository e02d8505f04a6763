"""Train a VAE on scans of handwritten digits, then time its sampler against its rivals.

    python examples/train_vae.py                     # the fused op, pictures in out/vae
    python examples/train_vae.py --sampler eager     # the same model with the plain line
    python examples/train_vae.py --latent 16 --epochs 200 --out out/vae16

The data are scikit-learn's 1797 8x8 digits, which come with it: nothing is downloaded.
Needs ``pip install reparam_fused[demo]``.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm  # type: ignore[import-untyped]

from reparam_fused import fused_kl_divergence, fused_reparameterize_kl

# Of mu and log_var: a sample, and the divergence of each image from N(0, 1)
Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

SIDE = 8
TILE = SIDE + 2  # an image and its gap
BATCH = 128
WARM_UP = 20
ROUNDS = 500
QUARTILES = torch.tensor([0.25, 0.5, 0.75])


def fused(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    return fused_reparameterize_kl(mu, log_var, dim=-1)


def eager(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
    return z, 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(dim=-1)


SAMPLERS: dict[str, Sampler] = {
    "fused": fused,
    "eager": eager,
    # Static shapes make the fastest code, and there are only two here: a batch and the test set.
    "compile": torch.compile(eager, dynamic=False),
}


class VAE(nn.Module):
    def __init__(self, latent: int, hidden: int = 256) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = mlp(SIDE * SIDE, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, SIDE * SIDE)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.encoder(images).chunk(2, dim=-1)
        return mu, log_var

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(z))

    def elbo(self, images: Tensor, sampler: Sampler) -> Tensor:
        """Mean evidence lower bound, in nats per image."""
        mu, log_var = self.encode(images)
        z, kl = sampler(mu, log_var)
        logits = self.decoder(z)
        # Grey levels are no coin flips: this is the usual Bernoulli term, not a true density.
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, images, reduction="none")
        return (log_likelihood.sum(dim=-1) - kl).mean()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, outputs),
    )


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train with and to test; the split is the same for every seed."""
    scans, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(scans / 16, dtype=torch.float32), torch.tensor(digits)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=digits, random_state=0
    )
    return train, test, train_labels, test_labels


def train_step(model: VAE, optimizer: Optimizer, images: Tensor, sampler: Sampler) -> Tensor:
    elbo = model.elbo(images, sampler)
    optimizer.zero_grad()
    torch.autograd.backward(-elbo)
    optimizer.step()
    return elbo.detach()


def train(
    model: VAE, train_set: Tensor, test_set: Tensor, sampler: Sampler, epochs: int, seed: int
) -> float:
    """Train in place; return the last test ELBO."""
    steps = len(train_set) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    # A generator of its own: every sampler sees the same batches, however it draws its noise.
    shuffler = torch.Generator().manual_seed(seed)
    tqdm.write("epoch  train ELBO  test ELBO  (nats per image)")
    for epoch in (bar := tqdm(range(1, epochs + 1), "training", unit="epoch", leave=False)):
        order = torch.randperm(len(train_set), generator=shuffler)[: steps * BATCH]
        batches = train_set[order.view(steps, BATCH)]
        elbos = [train_step(model, optimizer, images, sampler) for images in batches]
        train_elbo = torch.stack(elbos).mean()
        schedule.step()
        with torch.no_grad():
            test_elbo = model.elbo(test_set, sampler)
        bar.set_postfix_str(f"ELBO {train_elbo:.2f}, test {test_elbo:.2f}")
        if epoch % max(1, epochs // 10) == 0 or epoch in (1, epochs):
            tqdm.write(f"{epoch:5d}  {train_elbo:10.2f}  {test_elbo:9.2f}")
    return float(test_elbo)


@contextmanager
def picture(path: Path, height: float) -> Iterator[Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    yield figure.subplots()
    figure.savefig(path, dpi=150)


def show_tiles(axes: Axes, images: Tensor, columns: int) -> None:
    padded = F.pad(images.reshape(-1, columns, SIDE, SIDE), (1, 1, 1, 1), value=0.15)
    tiled = padded.transpose(1, 2).reshape(-1, columns * TILE)
    axes.imshow(tiled, cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def save_reconstructions(model: VAE, images: Tensor, labels: Tensor, path: Path) -> None:
    """Two scans of each digit; what is decoded is the posterior mean."""
    chosen = torch.cat([(labels == digit).nonzero()[:2, 0] for digit in range(10)])
    scans = images[chosen]
    decoded = model.decode(model.encode(scans)[0])
    with picture(path, 3.7) as axes:
        show_tiles(axes, torch.stack([scans[::2], decoded[::2], scans[1::2], decoded[1::2]]), 10)
        axes.set_title("Reconstructions of held-out digits")
        middles = [(row + 0.5) * TILE - 0.5 for row in range(4)]
        axes.set_yticks(middles, ["scan", "VAE"] * 2, fontsize=12)
        axes.tick_params(length=0)


def save_prior(model: VAE, path: Path, side: int = 16) -> None:
    with picture(path, 8.3) as axes:
        if model.latent == 2:
            # Equal steps of probability: the grid covers the plane as draws from N(0, 1) would.
            line = torch.special.ndtri((torch.arange(side) + 0.5) / side)
            z = torch.cartesian_prod(-line, line).flip(-1)
            axes.set(xlabel="z[0]", ylabel="z[1]")
            axes.set_title("Decoded latent plane, at the quantiles of N(0, 1)")
        else:
            z = torch.randn(side * side, model.latent)
            axes.set_title("Prior samples: decoded draws from N(0, 1)")
        show_tiles(axes, model.decode(z), side)


def save_latent_space(model: VAE, images: Tensor, labels: Tensor, path: Path) -> None:
    """The two means with the largest KL to the prior; of one dimension, its mean and log_var."""
    mu, log_var = model.encode(images)
    kl = fused_kl_divergence(mu, log_var)
    top = sorted(kl.mean(dim=0).argsort(descending=True)[:2].tolist())
    points = torch.cat([mu[:, top], log_var[:, :1]], dim=1)[:, :2]
    x_label, y_label = [*(f"mu[{i}]" for i in top), "log_var[0]"][:2]
    with picture(path, 6.5) as axes:
        for digit in range(10):
            x, y = points[labels == digit].T
            axes.scatter(x, y, s=16, color=f"C{digit}", label=str(digit))
        axes.set(title="Held-out digits in latent space", xlabel=x_label, ylabel=y_label)
        axes.legend(title="digit", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def why_not(sampler: Sampler) -> str | None:
    """Why the sampler does not run here, such as torch.compile without a C++ compiler."""
    try:
        sampler(*VAE(2).encode(torch.zeros(BATCH, SIDE * SIDE)))
    except RuntimeError as error:
        return str(error).partition("\n")[0] or repr(error)
    return None


def timed_step(model: VAE, optimizer: Optimizer, images: Tensor, sampler: Sampler) -> list[float]:
    """Microseconds of one training step: all of it, and what the sampler took of that."""
    marks: list[float] = []

    def mark(_: object = None) -> None:
        marks.append(1e6 * time.perf_counter())

    def marked(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        mark()
        z, kl = sampler(mu, log_var)
        mark()
        # The sampler's backward runs from when z and kl have their gradients until mu and log_var
        # have theirs.
        for tensor in (z, kl, mu, log_var):
            tensor.register_hook(mark)
        return z, kl

    mark()
    train_step(model, optimizer, images, marked)
    mark()
    start, forward, forward_end, backward, _, _, backward_end, end = marks
    return [end - start, forward_end - forward + backward_end - backward]


def compare(model: VAE, images: Tensor) -> None:
    """Print what a training step costs with each sampler: same model, same batch."""
    optimizer = torch.optim.Adam(model.parameters())
    broken = {name: why_not(sampler) for name, sampler in SAMPLERS.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in SAMPLERS if not broken[name]}
    for _ in range(WARM_UP + ROUNDS):
        # In turn and in no fixed order: neither a busy machine nor a neighbour favours anyone.
        for name in random.sample(list(times), len(times)):
            times[name].append(timed_step(model, optimizer, images, SAMPLERS[name]))

    print(f"\nmedian (quartiles) of {ROUNDS} training steps, {len(images)} images each, in us")
    print(f"{'sampler':8} {'whole step':>18} {'sampling':>15} {'share':>6}")
    for name, reason in broken.items():
        if reason:
            print(f"{name:8} does not run here: {reason}")
            continue
        quartiles = torch.tensor(times[name][WARM_UP:]).quantile(QUARTILES, dim=0).T
        step, part = (f"{mid:.0f} ({low:.0f}-{high:.0f})" for low, mid, high in quartiles)
        print(f"{name:8} {step:>18} {part:>15} {quartiles[1, 1] / quartiles[0, 1]:6.1%}")


def integer_from(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in [{low}, 2**63)")
        return int(text)

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a VAE on scans of handwritten digits, and time its sampler.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--sampler", choices=SAMPLERS, default="fused", help="what the model is trained with")
    add("--seed", type=integer_from(0), default=0, help="seed of weights, noise and batches")
    add("--latent", type=integer_from(1), default=2, help="latent dimensions")
    add("--epochs", type=integer_from(1), default=300, help="passes over the training set")
    add("--out", type=Path, default=Path("out/vae"), help="folder for the pictures")
    arguments = parser.parse_args()
    if reason := why_not(SAMPLERS[arguments.sampler]):
        parser.error(f"argument --sampler: {arguments.sampler} does not run here: {reason}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return arguments


def main() -> None:
    # The model is small: more threads gain little, and cost a lot where other work runs.
    torch.set_num_threads(1)
    arguments = parse_arguments()
    out: Path = arguments.out
    torch.manual_seed(arguments.seed)
    train_set, test_set, _, labels = load_data()
    model = VAE(arguments.latent)
    sampler = SAMPLERS[arguments.sampler]
    test_elbo = train(model, train_set, test_set, sampler, arguments.epochs, arguments.seed)
    with torch.no_grad():
        save_reconstructions(model, test_set, labels, out / "reconstructions.png")
        save_prior(model, out / "prior.png")
        save_latent_space(model, test_set, labels, out / "latent.png")
    compare(VAE(arguments.latent), train_set[:BATCH])
    print(f"\nfinal test ELBO, trained with {arguments.sampler}: {test_elbo:.2f} nats per image")
    print(f"pictures: reconstructions.png, prior.png and latent.png in {out}")


if __name__ == "__main__":
    main()
