"""The reparameterisation trick in one kernel: the same key gives the same bits everywhere."""

from .backends import backends
from .functional import fused_reparameterize
from .random import fold_in, key, noise, split

__all__ = ["backends", "fold_in", "fused_reparameterize", "key", "noise", "split"]
__version__ = "0.1.0"
