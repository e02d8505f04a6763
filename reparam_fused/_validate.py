"""What bad input gets: one exception, before any work, naming the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEY_DTYPES = (torch.uint64, torch.int64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip
_DTYPE_NAMES = "float32, float64, float16 or bfloat16"


def broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    """Their common shape, which torch takes 30 us to find where they are one."""
    return a if a == b else torch.broadcast_shapes(a, b)


def check_dtype(function: str, name: str, dtype: object) -> None:
    """dtype must be one that the kernels compute."""
    if dtype not in DTYPES:
        raise TypeError(f"{function}(): {name} must be {_DTYPE_NAMES}, got {dtype}")


def check_tensor(function: str, name: str, value: object) -> None:
    """value must be a dense floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )
    check_dtype(function, name, value.dtype)
    if value.is_nested or value.layout != torch.strided:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(
            f"{function}(): {name} must be a dense tensor (torch.strided), got {layout}"
        )


def check_pair(function: str, mu: object, name: str, scale: object) -> torch.Size:
    """mu and a scale of this name must go together; their broadcast shape.

    As in torch, the scale may be a number, or a tensor without dimensions on the CPU.
    """
    check_tensor(function, "mu", mu)
    assert isinstance(mu, Tensor)
    if isinstance(scale, (int, float, torch.SymFloat)) and not isinstance(scale, bool):
        return mu.shape
    check_tensor(function, name, scale)
    assert isinstance(scale, Tensor)
    if mu.device != scale.device and not (scale.dim() == 0 and scale.device.type == "cpu"):
        raise RuntimeError(
            f"{function}(): mu and {name} must be on the same device, "
            f"got mu on {mu.device} and {name} on {scale.device}"
        )
    try:
        return broadcast(mu.shape, scale.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): the shapes of mu and {name} must broadcast, "
            f"got mu {tuple(mu.shape)} and {name} {tuple(scale.shape)}"
        ) from None


def check_key(function: str, key: object) -> None:
    """key must be a uint64 tensor (*batch, 2), or the same bits as int64."""
    expected = "a uint64 tensor of shape (2,) or (*batch, 2), as reparam_fused.key(seed) gives"
    if not isinstance(key, Tensor):
        raise TypeError(f"{function}(): key must be {expected}, got {type(key).__name__}")
    if key.dtype not in KEY_DTYPES:
        raise TypeError(f"{function}(): key must be {expected}, got dtype {key.dtype}")
    if key.dim() == 0 or key.shape[-1] != 2:
        raise RuntimeError(f"{function}(): key must be {expected}, got shape {tuple(key.shape)}")


def check_data(function: str, key: Tensor, data: Tensor) -> torch.Size:
    """data must be integers, each for a key of the batch; the shape of both."""
    if data.dtype not in INTEGERS:
        raise TypeError(f"{function}(): data must be an int or integers, got dtype {data.dtype}")
    if data.device != key.device:
        raise RuntimeError(
            f"{function}(): data must be on the device of key, {key.device}, got {data.device}"
        )
    try:
        return broadcast(key.shape[:-1], data.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): data must broadcast with the batch shape of key "
            f"{tuple(key.shape[:-1])}, got {tuple(data.shape)}"
        ) from None


def check_key_batch(function: str, key: Tensor, shape: torch.Size) -> None:
    """The batch of the key must broadcast with the leading dimensions of the output."""
    batch = key.shape[:-1]
    if len(batch) > len(shape) or any(k not in (1, n) for k, n in zip(batch, shape, strict=False)):
        raise RuntimeError(
            f"{function}(): the batch shape of key must broadcast with the leading dimensions of "
            f"the output {tuple(shape)}, got {tuple(batch)}"
        )


def check_sizes(function: str, name: str, sizes: Iterable[object]) -> torch.Size:
    """sizes must be those of a tensor."""
    try:
        shape = torch.Size(sizes)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{function}(): {name} must be ints, got {sizes!r}") from None
    if any(n < 0 for n in shape):
        raise RuntimeError(f"{function}(): {name} must not be negative, got {tuple(shape)}")
    return shape


def check_block(
    function: str, shape: torch.Size, key: object, global_shape: object, global_offset: object
) -> None:
    """The block of this shape must lie within the larger tensor, and have a key."""
    if (global_shape is None) != (global_offset is None):
        given = "global_offset" if global_shape is None else "global_shape"
        raise ValueError(
            f"{function}(): expected global_shape and global_offset together, got {given} alone"
        )
    if global_shape is None:
        return
    if key is None:
        raise ValueError(
            f"{function}(): global_shape needs a key: blocks that drew keys of their own would "
            "not be parts of one whole"
        )
    for name, sizes in (("global_shape", global_shape), ("global_offset", global_offset)):
        if not isinstance(sizes, Sequence) or not all(
            isinstance(n, (int, torch.SymInt)) for n in sizes
        ):
            raise TypeError(f"{function}(): {name} must be a sequence of ints, got {sizes!r}")
        if len(sizes) != len(shape):
            raise RuntimeError(
                f"{function}(): {name} must have the {len(shape)} dimensions of the output "
                f"{tuple(shape)}, got {tuple(sizes)}"
            )
    assert isinstance(global_shape, Sequence)
    assert isinstance(global_offset, Sequence)
    for n, whole, first in zip(shape, global_shape, global_offset, strict=True):
        if not 0 <= first <= whole - n:
            raise RuntimeError(
                f"{function}(): the block {tuple(shape)} at global_offset {tuple(global_offset)} "
                f"must be within global_shape {tuple(global_shape)}"
            )
    if math.prod(global_shape) >= 2**63:
        raise RuntimeError(
            f"{function}(): global_shape must have less than 2**63 elements, "
            f"got {tuple(global_shape)}"
        )


def check_reparameterize(
    mu: object,
    log_var: object,
    std: object,
    key: object,
    generator: object,
    global_shape: object,
    global_offset: object,
) -> None:
    """The arguments of fused_reparameterize."""
    function = "fused_reparameterize"
    if (log_var is None) == (std is None):
        got = "neither" if std is None else "both"
        raise ValueError(f"{function}(): expected log_var or std, got {got}")
    name, scale = ("log_var", log_var) if log_var is not None else ("std", std)
    shape = check_pair(function, mu, name, scale)
    assert isinstance(mu, Tensor)
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
    check_block(function, shape, key, global_shape, global_offset)
