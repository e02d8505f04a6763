"""Keys: what names a stream of noise. Bit for bit those of ``torch.func._random``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ops, _validate, reference


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Make a key from a seed.

    A key is a uint64 tensor ``(seed, offset)`` of shape ``(2,)``: it names one stream
    of standard normals, the same on every device and backend. Equal to
    ``torch.func._random.key(seed)``.

    Args:
        seed (int): in ``[0, 2**64)``.
        device (torch.device, optional): of the key. Default: the current default device.

    Raises:
        TypeError: seed is not an int.
        ValueError: seed is out of range.

    Example::

        >>> import reparam_fused
        >>> reparam_fused.key(42)
        tensor([42,  0], dtype=torch.uint64)
    """
    if not isinstance(seed, int):
        raise TypeError(f"key(): argument 'seed' must be int, not {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"key(): seed must be in [0, 2**64), got {seed}")
    return torch.tensor([seed, 0], dtype=torch.uint64, device=device)


def _children(key: Tensor, blocks: Tensor) -> Tensor:
    """The child keys of blocks, ``(*batch, n, 2)``: the Philox words at offset + block."""
    w0, w1, w2, w3 = reference.words(key, blocks)
    return torch.stack([w1 << 32 | w0, w3 << 32 | w2], -1).view(torch.uint64)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Derive ``num`` independent keys. Equal to ``torch.func._random.split(key, num)``.

    Args:
        key (Tensor): uint64 key of shape ``(*batch, 2)``.
        num (int): how many. Default: 2.

    Returns:
        Tensor: keys of shape ``(num, *batch, 2)``.

    Raises:
        TypeError: key is not a uint64 tensor, or num not an int.
        RuntimeError: key has another shape.
        ValueError: num is not positive.

    Example::

        >>> import reparam_fused
        >>> reparam_fused.split(reparam_fused.key(42)).shape
        torch.Size([2, 2])
    """
    _validate.check_key("split", key)
    if not isinstance(num, int):
        raise TypeError(f"split(): argument 'num' must be int, not {type(num).__name__}")
    if num <= 0:
        raise ValueError(f"split(): num must be positive, got {num}")
    return _children(key, torch.arange(num, device=key.device)).movedim(-2, 0).contiguous()


def fold_in(key: Tensor, data: int) -> Tensor:
    """Derive the key of an integer: a step, a layer, a rank.

    Equal to ``split(key, data + 1)[data]`` and to ``torch.func._random.fold_in(key, data)``.

    Args:
        key (Tensor): uint64 key of shape ``(*batch, 2)``.
        data (int): in ``[-2**63, 2**64)``; a negative one stands for ``2**64 + data``.

    Returns:
        Tensor: a key of the shape of ``key``.

    Raises:
        TypeError: key is not a uint64 tensor, or data not an int.
        RuntimeError: key has another shape.
        ValueError: data is out of range.

    Example::

        >>> import reparam_fused
        >>> k = reparam_fused.key(42)
        >>> torch.equal(reparam_fused.fold_in(k, 1), reparam_fused.split(k)[1])
        True
    """
    _validate.check_key("fold_in", key)
    if not isinstance(data, int):
        raise TypeError(f"fold_in(): argument 'data' must be int, not {type(data).__name__}")
    if not -(2**63) <= data < 2**64:
        raise ValueError(f"fold_in(): data must be in [-2**63, 2**64), got {data}")
    signed = data - 2**64 if data >= 2**63 else data
    return _children(key, torch.tensor([signed], device=key.device)).squeeze(-2)


def noise(
    key: Tensor,
    *shape: int | Sequence[int],
    dtype: torch.dtype | None = None,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> Tensor:
    """The standard normals eps that ``fused_reparameterize(..., key=key)`` uses.

    Element ``i`` (row-major) depends on the key and ``i`` alone. Equal up to rounding to
    ``torch.func._random.normal(key, shape)``; unlike it, float32 has the same bits on
    every device. Half types are the float32 noise, rounded.

    Args:
        key (Tensor): uint64 key of shape ``(2,)``, or ``(*batch, 2)`` to give each slice
            of the leading dimensions a stream of its own.
        *shape (int): of the result.
        dtype (torch.dtype, optional): float32, float64, float16 or bfloat16.
            Default: float32.
        global_shape, global_offset (sequences of ints, optional): the larger tensor of which
            this is a block, and where it begins, as in :func:`fused_reparameterize`.

    Returns:
        Tensor: of this shape and dtype, on the device of the key.

    Raises:
        TypeError: key is not a uint64 tensor, shape not of ints, or the dtype is not supported.
        RuntimeError: a negative size, shapes of key and result that do not fit, or a block
            that is not within global_shape.
        ValueError: one of global_shape and global_offset without the other.

    Example::

        >>> import reparam_fused
        >>> reparam_fused.noise(reparam_fused.key(42), 3)
        tensor([-0.9702,  0.1940, -1.2356])
    """
    _validate.check_key("noise", key)
    dtype = torch.float32 if dtype is None else dtype
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    size = _validate.check_sizes("noise", "shape", sizes)
    _validate.check_dtype("noise", "dtype", dtype)
    _validate.check_key_batch("noise", key, size)
    _validate.check_block("noise", size, key, global_shape, global_offset)
    return _ops.noise(key, size, dtype, global_shape, global_offset)
