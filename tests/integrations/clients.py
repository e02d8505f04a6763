"""The clients, small enough for two cores: what their tests and times.py run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of the noise that the linear regression takes for granted
SIGMA = 0.7
STEPS = 300


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator, dtype=dtype)


def autoencoder(channels: tuple[int, ...] = (8, 16)) -> Any:
    """An AutoencoderKL, randomly initialised: 4 latent channels, half the side for each level."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=4,
        norm_num_groups=4,
    )


def diabetes() -> tuple[Tensor, Tensor]:
    """scikit-learn's 442 patients: the ten principal components, and the progression.

    Uncorrelated and of variance 1, so that a diagonal normal is the exact posterior.
    """
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    x = torch.linalg.svd(x, full_matrices=False).U * len(x) ** 0.5
    return x, (y - y.mean()) / y.std()


def linear_regression() -> Any:
    """An SVI of Pyro for Bayesian linear regression, whose rate falls over STEPS steps."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal, init_to_mean

    x, y = diabetes()

    def model() -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("patients", len(x)):
            pyro.sample("y", dist.Normal((weights * x).sum(-1), SIGMA), obs=y)

    pyro.clear_param_store()
    guide = AutoNormal(model, init_loc_fn=init_to_mean)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / STEPS)})
    return SVI(model, guide, optimizer, elbo)


def cells() -> Any:
    """An SCVI over 400 synthetic cells of 100 genes."""
    import scvi

    scvi.settings.seed = 0
    data = scvi.data.synthetic_iid()
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    return scvi.model.SCVI(data, n_latent=10, n_hidden=64)


def pendulum() -> Any:
    """A soft actor-critic that has yet to learn to swing."""
    from stable_baselines3 import SAC

    return SAC(
        "MlpPolicy",
        "Pendulum-v1",
        learning_starts=100,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )


def diffusers_step() -> Callable[[], object]:
    model = autoencoder((16, 32, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    batch = images(8, 3, 32, 32)

    def step() -> None:
        posterior = model.encode(batch).latent_dist
        loss = (model.decode(posterior.sample()).sample - batch).square().mean()
        optimizer.zero_grad()
        (loss + 1e-6 * posterior.kl().mean()).backward()
        optimizer.step()

    return step


def pyro_step() -> Callable[[], object]:
    return linear_regression().step


def scvi_step() -> Callable[[], object]:
    model = cells()
    module = model.module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    batch = next(iter(model._make_data_loader(model.adata, batch_size=128)))

    def step() -> None:
        _, _, losses = module(batch)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()

    return step


def stable_baselines_step() -> Callable[[], object]:
    model = pendulum()
    model.learn(110)
    return lambda: model.train(gradient_steps=1, batch_size=256)
