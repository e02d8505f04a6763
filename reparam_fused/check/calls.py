"""The public calls: gradients, the noise, generators."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import fused_reparameterize, noise
from .parts import assert_same_bits, inputs, key_of, require


def gradients(device: torch.device) -> str:
    """First and second derivatives against finite differences, in float64."""
    key = key_of(3, 2**32 - 1, device)

    def sample(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key)

    for mu_shape, log_var_shape in (((3, 2), (3, 2)), ((3, 1), (5,)), ((7,), ())):
        mu = inputs(*mu_shape, dtype=torch.float64, device=device)[0].requires_grad_()
        log_var = inputs(*log_var_shape, dtype=torch.float64, device=device)[1].requires_grad_()
        torch.autograd.gradcheck(sample, (mu, log_var))
        torch.autograd.gradgradcheck(sample, (mu, log_var))
    return "gradcheck and gradgradcheck in float64"


def statistics(device: torch.device, dtype: torch.dtype) -> str:
    """Moments, correlations and the distribution of 2**20 normals; the key is fixed."""
    eps = noise(key_of(12345, 0, device), 2**20, dtype=dtype).cpu().double()
    moments = [eps, eps**2 - 1, eps**3, eps**4 - 3, *(eps * eps.roll(lag) for lag in (1, 2, 3))]
    errors = [float(x.mean() / x.std()) * 2**10 for x in moments]
    cdf, steps = torch.special.ndtr(eps.sort().values), torch.arange(2**20 + 1) / 2**20
    distance = float(torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max()) * 2**10
    # Normals exceed either once in 3e7 times; NaN is not below anything.
    right = all(abs(error) < 5.5 for error in errors) and distance < 3.0
    require(right, f"standard errors {errors}, Kolmogorov-Smirnov {distance}")
    return f"moments, correlations, distribution: {max(map(abs, errors)):.1f} standard errors"


def generators(device: torch.device) -> str:
    """The default generator and one's own work as they do for torch.randn."""
    mu, log_var = inputs(1021, device=device)
    on_gpu = device.type == "cuda"
    default = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    own = torch.Generator(device)

    def two_calls(g: torch.Generator | None) -> Tensor:
        return torch.stack([fused_reparameterize(mu, log_var, generator=g) for _ in range(2)])

    for given, moves, stays in ((None, default, own), (own, own, default)):
        what = f"generator={given}"
        state, others = moves.manual_seed(5).get_state(), stays.get_state()
        expected = two_calls(given)
        require(not torch.equal(*expected), f"{what}: the same noise twice")
        moves.manual_seed(5)
        assert_same_bits(two_calls(given), expected, f"{what}, after manual_seed")
        moves.set_state(state)
        assert_same_bits(two_calls(given), expected, f"{what}, after set_state")
        require(torch.equal(stays.get_state(), others), f"{what}: another one moved")
    state = default.get_state()
    fused_reparameterize(mu, log_var, key=key_of(1, 0, device))
    require(torch.equal(default.get_state(), state), "key=: the default generator moved")
    return "manual_seed, get_state and set_state, generator=, fresh noise a call"
