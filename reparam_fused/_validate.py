"""What bad input gets: one exception, before any work, naming the argument."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DTYPE_NAMES = "float32, float64, float16 or bfloat16"


def check_tensor(function: str, name: str, value: object) -> None:
    """value must be a dense floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )
    if value.dtype not in DTYPES:
        raise TypeError(f"{function}(): {name} must be {_DTYPE_NAMES}, got {value.dtype}")
    if value.is_nested or value.layout != torch.strided:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(
            f"{function}(): {name} must be a dense tensor (torch.strided), got {layout}"
        )


def check_key(function: str, key: object) -> None:
    """key must be a uint64 tensor (*batch, 2)."""
    expected = "a uint64 tensor of shape (2,) or (*batch, 2), as reparam_fused.key(seed) gives"
    if not isinstance(key, Tensor):
        raise TypeError(f"{function}(): key must be {expected}, got {type(key).__name__}")
    if key.dtype != torch.uint64:
        raise TypeError(f"{function}(): key must be {expected}, got dtype {key.dtype}")
    if key.dim() == 0 or key.shape[-1] != 2:
        raise RuntimeError(f"{function}(): key must be {expected}, got shape {tuple(key.shape)}")


def check_key_batch(function: str, key: Tensor, shape: torch.Size) -> None:
    """The batch of the key must broadcast with the leading dimensions of the output."""
    batch = key.shape[:-1]
    if len(batch) > len(shape) or any(k not in (1, n) for k, n in zip(batch, shape, strict=False)):
        raise RuntimeError(
            f"{function}(): the batch shape of key must broadcast with the leading dimensions of "
            f"the output {tuple(shape)}, got {tuple(batch)}"
        )


def check_reparameterize(mu: object, log_var: object, key: object, generator: object) -> None:
    """The arguments of fused_reparameterize."""
    function = "fused_reparameterize"
    check_tensor(function, "mu", mu)
    check_tensor(function, "log_var", log_var)
    assert isinstance(mu, Tensor)
    assert isinstance(log_var, Tensor)
    if mu.device != log_var.device:
        raise RuntimeError(
            f"{function}(): mu and log_var must be on the same device, "
            f"got mu on {mu.device} and log_var on {log_var.device}"
        )
    try:
        shape = torch.broadcast_shapes(mu.shape, log_var.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): the shapes of mu and log_var must broadcast, "
            f"got mu {tuple(mu.shape)} and log_var {tuple(log_var.shape)}"
        ) from None
    if key is not None and generator is not None:
        raise ValueError(f"{function}(): expected key or generator, got both")
    if key is not None:
        check_key(function, key)
        assert isinstance(key, Tensor)
        if key.device != mu.device:
            raise RuntimeError(
                f"{function}(): key must be on the device of mu, {mu.device}, got {key.device}"
            )
        check_key_batch(function, key, shape)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{function}(): argument 'generator' must be torch.Generator, "
                f"not {type(generator).__name__}"
            )
        if generator.device.type != mu.device.type:
            raise RuntimeError(
                f"{function}(): generator must be on the device of mu, {mu.device}, "
                f"got {generator.device}"
            )
