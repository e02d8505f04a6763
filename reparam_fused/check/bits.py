"""The ops on any device against reference.py on the CPU, as bits."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _ops, reference, split
from .parts import assert_same_bits, bits_of, extremes, inputs, key_of, poisoned_memory, require

Case: TypeAlias = tuple[str, tuple[Any, ...], tuple[Any, ...]]  # op, operands, options

# SHA-256 of the bits of all cases, computed by reference.py
DIGESTS = {
    torch.float32: "3e690fa622b7cffd3d296f321247d648a729f96d1f2d3fe496ecba01b8d7fb52",
    torch.float16: "9935a6b14f6aacec06434e0c27d3c108d2ce2daa8928ca60aa8930504ee8c476",
    torch.bfloat16: "de485e508af5866d4adc7f078d00e71cf617a384c3126ac1021d46e7960de8ea",
}
SEED = 2**64 - 59
# The carry into the second counter word, the sign of int64, and the wrap at 2**64
OFFSETS = (0, 2**32 - 3, 2**63 - 3, 2**64 - 3)
# A larger tensor, where in it a block begins, and the shape of the block
BLOCKS = (
    ((6000,), (256,), (5001,)),
    ((6000,), (257,), (3001,)),
    ((30, 64), (7, 16), (11, 32)),
    ((30, 43), (7, 3), (11, 40)),
    ((64, 3), (5, 1), (50, 1)),
    ((9, 2**30, 2**20), (4, 2**29 + 1, 2**19 + 7), (3, 2, 9)),
)


def _pairs(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """x and scale: every tail, values of every kind, views of any strides."""
    scale, base = extremes(dtype), inputs(64, 48, dtype=dtype)[0]
    other, planes = base.flip(0), base.reshape(2, 8, 12, 16)
    return [
        *(inputs(n, dtype=dtype, spread=8.0) for n in (*range(1, 18), 65539)),
        *((torch.full_like(scale, x), scale) for x in (0.0, -1.0, math.inf, math.nan)),
        (base[:, :24], base[:, 24:]),  # halves, as chunk makes them
        (base[:32], base[32:]),
        (base[:, ::2], base[:, 1::2]),
        (base.t(), other.t()),
        (base[:48].t(), other[:48, :48].contiguous()),
        (base[:1], base[:, :1]),
        (base, base[3, 4]),
        (base.flatten()[1:], other.flatten()[1:]),  # vectors that are not aligned, or differently
        (base.flatten()[1:-2], other.flatten()[3:]),
        (base[0, 0].expand(1025), base[1, 1].expand(1025)),
        (planes.to(memory_format=torch.channels_last), planes.flip(0)),
        (planes.permute(3, 1, 0, 2), planes.flip(0).permute(3, 1, 0, 2)),
        (base[0, 0], base[1, 1]),
        (base[:0], base[:0]),
    ]


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Both forms, blocks, batched keys, the divergence; x is mu, and the gradient of z."""
    pairs = _pairs(dtype)
    draws: list[Any] = []
    for i, pair in enumerate(pairs):
        yield from (("kl_divergence", pair, ()), ("kl_divergence_backward", pair, ()))
        key = key_of(SEED, OFFSETS[i % len(OFFSETS)])
        draws += [(pair, key, ()), (pair, key, ("std",))]
    n = 2**20 + 3 if dtype == torch.float32 else 2**18 + 3  # a coefficient's last bit shows
    draws.append((inputs(n, dtype=dtype, spread=8.0), key, ()))
    for batch in ((6,), (6, 8), (6, 1), (1, 8), (6, 8, 64)):
        keys = split(key, math.prod(batch)).reshape(*batch, 2)
        draws.append((inputs(6, 8, 64, dtype=dtype), keys, ()))
    for form in ("log_var", "std"):
        for whole, offset, shape in BLOCKS:
            keys = split(key, 3) if len(shape) == 3 else key
            draws.append((inputs(*shape, dtype=dtype), keys, (form, whole, offset)))
    for (x, scale), key, options in draws:
        yield "sample_from_key", (x, scale, key), options
        yield "sample_backward", (x, None if "std" in options else scale, key), options


def _on(device: torch.device, t: Tensor) -> Tensor:
    """t on the device, with the strides and the offset that it has."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def compare(case: Case, device: torch.device, ops: Any = _ops) -> Tensor:
    """What an op gives on the device, which has to be what reference.py gives on the CPU."""
    op, operands, options = case
    x, scale, *key = operands
    with poisoned_memory():
        there = (t if t is None else _on(device, t) for t in operands)
        actual: Tensor = getattr(ops, op)(*there, *options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: ten times as long where cores are busy
    expected: Tensor = getattr(reference, op)(*operands, *options)
    torch.set_num_threads(threads)
    what = f"{op} {options} of {[(t.shape, t.stride()) for t in operands if t is not None]}"
    got, wanted = (actual.device, actual.stride()), (device, expected.stride())
    require(got == wanted, f"{what}: {got} instead of {wanted}")
    if expected.dtype != torch.float64:
        assert_same_bits(actual, expected, what)
        return actual
    # float64 promises ULPs of what is rounded on the way: an angle below 2 pi is off by 9e-16;
    # the radius, below 9.5, multiplies that, and so does the factor of eps.
    size = x.abs() if op == "sample_backward" else torch.ones_like(x) if key else expected.abs()
    if key and scale is not None:
        size = size * (scale.abs() if "std" in options else torch.exp(0.5 * scale))
    size = size.nan_to_num(1.0, 1e300).clamp_min(1e-300)
    close = torch.isclose(actual.cpu() / size, expected / size, 1e-13, 1e-14, equal_nan=True)
    require(bool(close.all()), f"{what}: {int((~close).sum())} elements differ")
    return actual


def digest(results: Iterable[Tensor]) -> str:
    """SHA-256 of the bits of the results."""
    state = hashlib.sha256()
    for result in results:
        bits = bits_of(result)
        state.update(ctypes.string_at(bits.data_ptr(), bits.nbytes))  # numpy is no dependency
    return state.hexdigest()


def values(device: torch.device, dtype: torch.dtype) -> str:
    """All cases against reference.py, and against what it gave where it was written."""
    results = [compare(case, device) for case in cases(dtype)]
    if dtype != torch.float64:
        got, expected = digest(results), DIGESTS[dtype]
        require(got == expected, f"sha256 {got}, expected {expected}")
    return f"{sum(t.numel() for t in results)} elements of {len(results)} calls"
