"""The ops on any device against reference.py on the CPU, as bits."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _ops, reference, split
from .._forms import FORMS, Bounds, Call
from .parts import assert_same_bits, bits_of, extremes, inputs, key_of, poisoned_memory, require

Case: TypeAlias = tuple[str, tuple[Any, ...], tuple[Any, ...]]  # op, operands, options

# SHA-256 of the bits of all cases, computed by reference.py
DIGESTS = {
    torch.float32: "d0576203f1ffcf67df3d8b547183e0a90849ea1fa8c78e3ad6634cba7c1f7fc1",
    torch.float16: "947775c1d95ab8e9079404bec65f5350b1bf3a5d7a4411b6815fbeea462aa47c",
    torch.bfloat16: "9dfacccda5458070702d31ea98fe19afd90cd9c4696f70f0ff74a6d4a97f5220",
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
    yield from _of_every_form(dtype)
    yield from _of_heads(dtype)


# Of a clamp that cuts, and of what is added to sigma
_BOUNDS: tuple[Bounds | None, ...] = (None, (-1.0, 2.5, 0.0), (-math.inf, 2.5, 0.25))


def _of_every_form(dtype: torch.dtype) -> Iterator[Case]:
    """One form after the other, within bounds and without, and several samples of each element:
    of counters that are shared by two of them, and with keys of rows."""
    key = key_of(SEED, OFFSETS[1])
    scale = extremes(dtype)
    if dtype == torch.float64:  # the logarithm of a denormal sigma has no ULPs to promise
        scale = scale[~(scale.isfinite() & (scale < -700))]
    pairs = [(torch.full_like(scale, -1.0), scale), inputs(1031, dtype=dtype, spread=4.0)]
    rows = inputs(7, 12, dtype=dtype)
    for form, bounds in itertools.product(FORMS, _BOUNDS):
        reads = Call(FORMS[form], bounds=bounds).backward_reads()
        options = (form, None, None, bounds)
        for x, scale in pairs:
            kept = scale if reads else None
            yield "kl_divergence", (x, scale), (form, bounds)
            yield "kl_divergence_backward", (x, scale), (form, bounds)
            yield "sample_from_key", (x, scale, key), options
            yield "sample_backward", (x, kept, key), options
        for (x, scale), keys in ((pairs[1], key), (rows, key), (rows, split(key, 7)[None])):
            kept = scale if reads else None
            yield "sample_from_key", (x, scale, keys), (*options, 3)
            grad = torch.stack([x, -x, scale])
            yield "samples_backward", (grad, kept, keys), options


def _of_heads(dtype: torch.dtype) -> Iterator[Case]:
    """Sums beside the sample: every term, of rows that share a block, of a long one and of
    elements, with keys of rows, and from a prior; of one form and its bounds after the other."""
    key = key_of(SEED, OFFSETS[1])
    forms, names = list(itertools.product(FORMS, _BOUNDS)), list(FORMS)
    terms = (
        ("kl_divergence", True, False),
        ("kl_divergence", True, True),
        ("kl_divergence", False, True),
        ("log_prob", True, False),
        ("tanh_log_prob", True, False),
    )
    shapes = ((7, 12), (3, 25), (2, 2049), (5, 1))
    for i, ((rows, n), (term, draws, far)) in enumerate(itertools.product(shapes, terms)):
        # Of odd rows in float64 Triton has two warps write one value to shared memory, which
        # changes nothing, but is a race to the stand-in for a GPU.
        n += n % 2 if dtype == torch.float64 else 0
        (form, bounds), of_prior = forms[i * 5 % len(forms)], names[i % len(names)]
        (mu, scale), (loc, prior) = (inputs(rows, n, dtype=dtype, seed=s) for s in (0, 1))
        keys = (split(key, rows) if n == 12 else key) if draws else None
        tensors = mu, scale, keys, *((loc, prior) if far else (None, None))
        options = term, 1, form, of_prior, None, None, bounds
        yield "head", tensors, options
        grads = loc if draws else None, prior[:, 0].to(_sum_dtype(dtype))
        yield "head_backward", (*tensors, *grads), options


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on(device: torch.device, t: Tensor) -> Tensor:
    """t on the device, with the strides and the offset that it has."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def compare(case: Case, device: torch.device, ops: Any = _ops) -> list[Tensor]:
    """What an op gives on the device, which has to be what reference.py gives on the CPU."""
    op, operands, options = case
    with poisoned_memory():
        there = (t if t is None else _on(device, t) for t in operands)
        results = getattr(ops, op)(*there, *options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: ten times as long where cores are busy
    expected = getattr(reference, op)(*operands, *options)
    torch.set_num_threads(threads)
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    return [_same(case, *pair, device) for pair in zip(results, expected, strict=True)]


def _size_of_sigma(op: str, scale: Tensor | None, options: tuple[Any, ...]) -> Tensor | float:
    """What eps, and its error, is multiplied by beside the first operand."""
    form = options[0] if options else "log_var"
    call = Call(FORMS[form], bounds=options[3] if len(options) > 3 else None)
    if scale is None:
        return 1.0
    return (call.std if op == "sample_from_key" else call.slope)(scale).abs()


def _same(case: Case, actual: Tensor, expected: Tensor, device: torch.device) -> Tensor:
    op, operands, options = case
    x, scale, *key = operands
    what = f"{op} {options} of {[(t.shape, t.stride()) for t in operands if t is not None]}"
    got, wanted = (actual.device, actual.stride()), (device, expected.stride())
    require(got == wanted, f"{what}: {got} instead of {wanted}")
    if expected.dtype != torch.float64:
        assert_same_bits(actual, expected, what)
        return actual
    if op.startswith("head"):  # of sums, and of differences: relative to 1 at least
        close = torch.isclose(actual.cpu(), expected, 1e-12, 1e-12, equal_nan=True)
        require(bool(close.all()), f"{what}: {int((~close).sum())} elements differ")
        return actual
    # float64 promises ULPs of what is rounded on the way: an angle below 2 pi is off by 9e-16;
    # the radius, below 9.5, multiplies that, and so does the factor of eps.
    if op == "samples_backward":
        x = x.abs().sum(0)
    size = x.abs() if "backward" in op else torch.ones_like(x)
    size = size * _size_of_sigma(op, scale, options) if key else expected.abs()
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
    results = [t for case in cases(dtype) for t in compare(case, device)]
    if dtype != torch.float64:
        got, expected = digest(results), DIGESTS[dtype]
        require(got == expected, f"sha256 {got}, expected {expected}")
    return f"{sum(t.numel() for t in results)} elements of {len(results)} calls"
