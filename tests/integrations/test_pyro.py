"""SVI of Pyro with AutoNormal: the posterior that it reaches unpatched, and the exact one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pyro", reason="pyro-ppl is not installed: make integrations")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: make integrations")

import pyro
import pyro.distributions as dist
from clients import SIGMA, STEPS, diabetes, linear_regression
from scipy import stats
from torch import Tensor

from reparam_fused import patch

SEEDS = 6


def exact() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the weights, in closed form."""
    x, y = (t.double() for t in diabetes())
    precision = x.T @ x / SIGMA**2 + torch.eye(x.shape[1])
    mean = torch.linalg.solve(precision, x.T @ y / SIGMA**2)
    return mean, precision.inverse().diagonal().sqrt()


def posterior(seed: int) -> Tensor:
    """What SVI arrives at, in units of the exact posterior: 0 for a mean, 1 for a deviation."""
    torch.manual_seed(seed)
    svi = linear_regression()
    for _ in range(STEPS):
        assert svi.step() < float("inf")
    mean, deviation = exact()
    found = pyro.get_param_store()
    loc, scale = (found[f"AutoNormal.{name}.weights"].detach() for name in ("locs", "scales"))
    return torch.cat([(loc - mean) / deviation, scale / deviation])


def test_the_posterior_is_the_same(calls: list[Any]) -> None:
    """Over several seeds: the difference of the means next to its standard error."""
    unpatched = torch.stack([posterior(seed) for seed in range(SEEDS)])
    assert not calls
    with patch("normal"):
        patched = torch.stack([posterior(SEEDS + seed) for seed in range(SEEDS)])
    assert len(calls) >= SEEDS * STEPS

    error = ((patched.var(0) + unpatched.var(0)) / SEEDS).sqrt()
    t = (patched.mean(0) - unpatched.mean(0)) / error
    print(
        f"\nlargest |t| of {len(t)}: {t.abs().max():.2f}, standard errors up to {error.max():.3f}"
    )
    assert error.max() < 0.06
    # One in 10,000 choices of seeds would exceed it by chance.
    assert t.abs().max() < stats.t.isf(1e-4 / (2 * len(t)), 2 * SEEDS - 2)

    mean, deviation = patched.mean(0).chunk(2)
    assert mean.abs().max() < 0.25
    assert (deviation - 1).abs().max() < 0.1


def test_sites_of_a_trace(calls: list[Any]) -> None:
    """pyro.sample in plates, with expand, to_event and a mask."""

    def model() -> Tensor:
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("outer", 4):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        with pyro.plate("inner", 3):
            pyro.sample("w", dist.Normal(0.0, 1.0).mask(False))
        return z

    pyro.clear_param_store()
    with patch("normal"):
        trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (4, 3)
    assert trace.nodes["w"]["value"].shape == (3,)
    assert len(calls) == 2
    (gradient,) = torch.autograd.grad(
        trace.nodes["z"]["value"].sum(), pyro.param("loc").unconstrained()
    )
    assert torch.equal(gradient, torch.full((3,), 4.0))
