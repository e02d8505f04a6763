"""Print a digest of the bits of many calls. Run by test_kernels.py under each ISA."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from helpers import DTYPES, inputs, key_of
from helpers import extremes as extremes
from torch import Tensor

import reparam_fused
from reparam_fused import _forms, _ops

SIZES = [*range(1, 300), 65539]
ROWS = [1, 3, 6, 15, 20, 60]
OFFSETS = [0, 2**32 - 9, 2**64 - 9]


def digest(tensor: Tensor) -> str:
    # fp64 promises ULPs between backends; between the ISAs of one it keeps its bits too
    clean = torch.where(tensor.isnan(), torch.full_like(tensor, 7.0), tensor).contiguous()
    return hashlib.sha256(clean.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def calls() -> Iterator[_forms.Call]:
    """Every form, without bounds and with some."""
    for call in _forms.SAMPLE.values():
        yield call
        yield call._replace(bounds=(-1.0, math.inf, 0.25))


def results(dtype: torch.dtype, key: Tensor, offset: int) -> Iterator[Tensor]:
    """Of every op and form, over what differs: sizes, keys of rows, extremes."""

    def ops(x: Tensor, scale: Tensor, keys: Tensor) -> Iterator[Tensor]:
        for call in calls():
            name, bounds = call.form.name, call.bounds
            kept = scale if call.backward_reads() else None
            yield _ops.sample_from_key(x, scale, keys, name, None, None, bounds)
            yield _ops.sample_backward(x, kept, keys, name, None, None, bounds)
            one_key = keys if keys.dim() == 1 else keys[None]
            z = _ops.sample_from_key(x, scale, one_key, name, None, None, bounds, 3)
            yield z
            yield from _ops.samples_backward(z, kept, one_key, name, None, None, bounds)

    def divergences(mu: Tensor, scale: Tensor) -> Iterator[Tensor]:
        for call in calls():
            for op in (_ops.kl_divergence, _ops.kl_divergence_backward):
                yield op(mu, scale, call.form.name, call.bounds)

    def heads(mu: Tensor, scale: Tensor, keys: Tensor) -> Iterator[Tensor]:
        (loc, prior), (grad, _) = (inputs(*mu.shape, dtype=dtype, seed=s) for s in (8, 9))
        names = list(_forms.FORMS)
        for i, call in enumerate(calls()):
            name, other = call.form.name, names[i * 3 % 4]
            for of_prior in ((None, None), (loc, prior)):
                given = (mu, scale, keys, *of_prior)
                options = ("kl_divergence", 1, name, other, None, None, call.bounds)
                z, total = _ops.head(*given, *options)
                yield from (z, total)
                yield from _ops.head_backward(*given, grad, total, *options)
            for term in _ops.TERMS[1:]:
                given = (mu, scale, keys, None, None)
                options = (term, 1, name, "std", None, None, call.bounds)
                z, total = _ops.head(*given, *options)
                yield from (z, total)
                yield from _ops.head_backward(*given, grad, total, *options)

    for n in SIZES[::10]:
        yield from heads(*inputs(n, dtype=dtype, seed=n, spread=20.0), key)
    for n in SIZES:
        mu, log_var = inputs(n, dtype=dtype, seed=n, spread=20.0)
        yield from ops(mu, log_var, key)
        yield _ops.noise(key, (n,), dtype)
        yield from divergences(mu, log_var)
    for n in ROWS:
        mu, log_var = inputs(37, n, dtype=dtype, seed=n)
        keys = torch.stack([key_of(r * 2**40 + r, (offset + r) % 2**64) for r in range(37)])
        yield from ops(mu, log_var, keys)
        yield from heads(mu, log_var, keys)
        yield reparam_fused.fold_in(keys, n)
        yield reparam_fused.split(key, n)
    log_var = extremes(dtype)
    yield from ops(torch.ones_like(log_var), log_var, key)
    yield from heads(torch.ones_like(log_var), log_var, key)
    yield from divergences(torch.ones_like(log_var), log_var)


def main() -> None:
    print("isa", reparam_fused.backends()["cpu"])
    for dtype in DTYPES:
        for offset in OFFSETS:
            state = hashlib.sha256()
            for result in results(dtype, key_of(2**64 - 59, offset), offset):
                state.update(digest(result).encode())
            print(dtype, offset, state.hexdigest()[:16])


if __name__ == "__main__":
    main()
