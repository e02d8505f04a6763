"""The reparameterisation trick in one kernel: the same key gives the same bits everywhere.

``fused_reparameterize(mu, log_var)`` is ``mu + exp(0.5 * log_var) * eps`` with eps drawn from
N(0, 1), in one pass over the memory. Its backward draws eps again instead of keeping it. Without
a key the noise comes from torch's generators, as that of ``torch.randn`` does; with one, the
result is a pure function of its arguments, in float32 and the half types the same on every CPU
and GPU.

Examples:
    >>> import torch, reparam_fused
    >>> mu = torch.zeros(3, requires_grad=True)
    >>> log_var = torch.zeros(3, requires_grad=True)
    >>> z = reparam_fused.fused_reparameterize(mu, log_var, key=reparam_fused.key(42))
    >>> z.detach()
    tensor([-0.9702,  0.1940, -1.2356])
    >>> z.sum().backward()
    >>> torch.equal(log_var.grad, 0.5 * reparam_fused.noise(reparam_fused.key(42), 3))
    True

The sample, and what is computed beside it in the same pass:

- ``fused_reparameterize``: the sample, of a scale given as log_var, log_std, std or rho
- ``fused_kl_divergence``: the divergence from N(0, 1) or from a prior, of each element or summed
- ``fused_reparameterize_kl``: the sample and that divergence
- ``fused_reparameterize_log_prob``: the sample, or its tanh, and its log-density

Keys, each the name of a stream of noise:

- ``key``: of a seed, of many seeds, or drawn from a generator
- ``split``, ``fold_in``: keys of a key
- ``noise``: the eps that a call with this key uses

The same for code in other shapes:

- ``Normal``: a ``torch.distributions.Normal`` that samples by these functions
- ``nn.Reparameterize``: a module that samples in training and gives the mean in evaluation
- ``patch``: lets torch.distributions, diffusers and others sample by them, until it is undone
- ``backends``: what runs where on this machine, and what is missing

``python -m reparam_fused check`` tests an installation, ``python -m reparam_fused bench`` measures
it. The module ``reparam_fused.reference`` states what is computed, in plain torch operations.
"""

from . import nn
from ._patch import patch
from .backends import backends
from .distributions import Normal
from .functional import (
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)
from .random import fold_in, key, noise, split

__all__ = [
    "Normal",
    "backends",
    "fold_in",
    "fused_kl_divergence",
    "fused_reparameterize",
    "fused_reparameterize_kl",
    "fused_reparameterize_log_prob",
    "key",
    "nn",
    "noise",
    "patch",
    "split",
]
__version__ = "0.1.0"
