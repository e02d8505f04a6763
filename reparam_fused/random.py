"""Keys, each the name of a stream of noise. Bit for bit those of ``torch.func._random``."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _draw, _extensions, _ops, _validate


def key(
    seed: int | Sequence[int] | Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Make a key from a seed, or draw one.

    A key is a uint64 tensor ``(seed, offset)`` of shape ``(2,)``: it names one stream
    of standard normals, the same on every device and backend. Equal to
    ``torch.func._random.key(seed)``.

    Every function takes the same 128 bits as int64 too: ``key(7).view(torch.int64)`` is what
    a module's buffer should hold, as much of torch (gloo's collectives, arithmetic, pickle)
    knows no uint64.

    Args:
        seed (int, or sequence or tensor of them): in ``[0, 2**64)``; in a tensor, which is
            not read here, a negative one counts as the unsigned one of its 64 bits. Of several
            seeds each gives a key: a sequence of n gives ``(n, 2)``, a tensor ``(*shape, 2)``.
        generator (torch.Generator, optional): draws a fresh key in place of a seed, as a call
            of :func:`fused_reparameterize` without a key does.
        device (torch.device, optional): of the key. Default: that of the seeds or of the
            generator, else the current default device.

    Returns:
        Tensor: a uint64 key of shape ``(2,)``, ``(n, 2)`` or ``(*shape, 2)``, with offset 0 where
            it is made from a seed.

    Raises:
        TypeError: seed is not an integer, or not integers.
        ValueError: seed is out of range; or both of seed and generator, or neither.

    Examples:
        >>> import reparam_fused
        >>> reparam_fused.key(42)
        tensor([42,  0], dtype=torch.uint64)
        >>> reparam_fused.key([1, 2])
        tensor([[1, 0],
                [2, 0]], dtype=torch.uint64)
    """
    if (seed is None) == (generator is None):
        got = "neither" if seed is None else "both"
        raise ValueError(f"key(): expected seed or generator, got {got}")
    if device is not None and not isinstance(device, (torch.device, str, int)):
        raise TypeError(
            f"key(): argument 'device' must be torch.device or str, not {type(device).__name__}"
        )
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                "key(): argument 'generator' must be torch.Generator, "
                f"not {type(generator).__name__}"
            )
        if device is not None:
            torch.empty(0, device=device)  # where there is no such device, before the draw
        drawn = _draw.draw_key(_draw.device_of(generator), generator, 1)
        return drawn if device is None else drawn.to(device)
    if isinstance(seed, Tensor):
        seeds = seed
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = torch.tensor([_as_word(s) for s in seed], dtype=torch.int64)
    elif getattr(seed, "ndim", 0) > 0:
        try:
            seeds = torch.as_tensor(seed)  # of numpy
        except TypeError:
            kind = getattr(seed, "dtype", type(seed).__name__)
            raise TypeError(f"key(): seed must be an int or integers, got {kind}") from None
    else:
        words = [_as_word(seed), 0]
        return _as_key(torch.tensor(words, dtype=torch.int64, device=device))
    if seeds.dtype not in _validate.INTEGERS:
        raise TypeError(f"key(): seed must be an int or integers, got dtype {seeds.dtype}")
    _validate.check_dense("key", "seed", seeds)
    seeds = _as_words(seeds.to(device=device))
    return _as_key(torch.stack([seeds, torch.zeros_like(seeds)], -1))


def _as_word(seed: object) -> int:
    """An int as the signed one with the same 64 bits."""
    try:
        word = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"key(): argument 'seed' must be int, not {type(seed).__name__}") from None
    if not 0 <= word < 2**64:
        raise ValueError(f"key(): seed must be in [0, 2**64), got {word}")
    return word - 2**64 if word >= 2**63 else word


def _as_words(integers: Tensor) -> Tensor:
    """Integers as int64 ones of the same bits."""
    if integers.dtype == torch.uint64:
        return integers.view(torch.int64)
    return integers.to(torch.int64)


def _as_key(words: Tensor) -> Tensor:
    """Made as int64 and seen as uint64, for Inductor knows no constant of that."""
    return words.view(torch.uint64)


def _children(key: Tensor, data: Tensor | None, first: int, num: int) -> Tensor:
    """By the op, which has them in a row."""
    data = None if data is None else data.reshape(-1).contiguous()
    return _ops.derive(key.reshape(-1, 2).contiguous(), data, first, num)


def _plain_split(key: Tensor, first: int, num: int | None) -> Tensor | None:
    """num children of one key, or the first alone, without the dispatcher: csrc/python."""
    if torch.compiler.is_compiling() or _extensions.module is None:
        return None
    return _extensions.module.split(key, first, num)  # type: ignore[no-any-return]


def split(key: Tensor, num: int = 2) -> Tensor:
    """Derive ``num`` independent keys. Equal to ``torch.func._random.split(key, num)``.

    Child ``i`` is made of the four words of Philox-4x32-10 (Salmon et al., Parallel Random
    Numbers: As Easy as 1, 2, 3, 2011) at the counter ``offset + i``: two are its seed, two its
    offset.

    Args:
        key (Tensor): key of shape ``(*batch, 2)``, uint64, or int64 of the same bits.
        num (int): how many. Default: 2.

    Returns:
        Tensor: keys of shape ``(num, *batch, 2)``, of the dtype of ``key``.

    Raises:
        TypeError: key is not a dense uint64 or int64 tensor, or num not an int.
        RuntimeError: key has another shape.
        ValueError: num is not positive, or so large that no tensor could have the keys.

    Examples:
        >>> import reparam_fused
        >>> reparam_fused.split(reparam_fused.key(42)).shape
        torch.Size([2, 2])
    """
    _validate.check_key("split", key)
    if not isinstance(num, int):
        raise TypeError(f"split(): argument 'num' must be int, not {type(num).__name__}")
    if num <= 0:
        raise ValueError(f"split(): num must be positive, got {num}")
    if num * max(key.numel(), 1) >= 2**60:  # their bytes
        raise ValueError(f"split(): num must be small enough for a tensor, got {num}")
    keys = _plain_split(key, 0, num)
    if keys is None:
        keys = _children(key, None, 0, num).view(num, *key.shape)
    return keys


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Derive the key of an integer: a step, a layer, a rank, or of each of many.

    Equal to ``split(key, data + 1)[data]`` and to ``torch.func._random.fold_in(key, data)``.
    A tensor gives a key for each index in it, so that rows may be named by a global id; it is
    read on its device, and is no constant of a graph.

    Args:
        key (Tensor): key of shape ``(*batch, 2)``, uint64, or int64 of the same bits.
        data (int or Tensor of integers): in ``[-2**63, 2**64)``; a negative one stands for
            ``2**64 + data``. A tensor broadcasts with ``batch``.

    Returns:
        Tensor: keys of shape ``(*broadcast, 2)``, of the dtype of ``key``; of an int one of
            the shape of ``key``.

    Raises:
        TypeError: key is not a uint64 or an int64 tensor, or data not an int or a tensor of
            integers.
        RuntimeError: key has another shape, data does not broadcast with its batch, or is on
            another device.
        ValueError: data is out of range.

    Examples:
        >>> import torch, reparam_fused
        >>> k = reparam_fused.key(42)
        >>> torch.equal(reparam_fused.fold_in(k, 1), reparam_fused.split(k)[1])
        True
        >>> reparam_fused.fold_in(k, torch.tensor([7, 5, 1])).shape
        torch.Size([3, 2])
    """
    _validate.check_key("fold_in", key)
    if isinstance(data, Tensor):
        shape = _validate.check_data("fold_in", key, data)
        # Copied to one shape, but where there is one of them for all of the other.
        data = _as_words(data)
        if key.numel() != 2:
            key = key.expand(*shape, 2)
        if data.numel() != 1:
            data = data.expand(shape)
        return _children(key, data, 0, 1).view(*shape, 2)
    if not isinstance(data, int):
        raise TypeError(f"fold_in(): argument 'data' must be int, not {type(data).__name__}")
    if not -(2**63) <= data < 2**64:
        raise ValueError(f"fold_in(): data must be in [-2**63, 2**64), got {data}")
    first = data - 2**64 if data >= 2**63 else data
    child = _plain_split(key, first, None)
    return _children(key, None, first, 1).view(key.shape) if child is None else child


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

    The bits come from Philox-4x32-10 at the counter ``offset + i // 4`` (float64: ``i // 2``),
    the normals from the method of Box and Muller: ``sqrt(-2 * ln(u)) * cos(2 * pi * v)``, and with
    the sine for the next element. They reach 6.76 (float64: 9.4); nothing is clamped.

    Args:
        key (Tensor): uint64 key, or the same bits as int64, of shape ``(2,)``, or ``(*batch, 2)``
            to give each slice of the leading dimensions a stream of its own.
        *shape (int): of the result.
        dtype (torch.dtype, optional): float32, float64, float16 or bfloat16.
            Default: float32.
        global_shape (sequence of ints, optional): the shape of the larger tensor of which this
            is a block, as in :func:`fused_reparameterize`. Default: ``shape``.
        global_offset (sequence of ints, optional): where in it the block begins.

    Returns:
        Tensor: of this shape and dtype, on the device of the key.

    Raises:
        TypeError: key is not a uint64 or an int64 tensor, shape not of ints, or the dtype is
            not supported.
        RuntimeError: a negative size, shapes of key and result that do not fit, or a block
            that is not within global_shape.
        ValueError: one of global_shape and global_offset without the other.

    Examples:
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
