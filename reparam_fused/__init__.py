"""The reparameterisation trick in one kernel: the same key gives the same bits everywhere."""

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
