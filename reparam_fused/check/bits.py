"""Known answers, and the bits of reference.py run on the CPU."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reparam_fused import _ops, fused_reparameterize, noise, reference, split

from .result import (
    Result,
    extremes,
    inputs,
    key_of,
    passed,
    poisoned_memory,
    require,
    require_same_bits,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Operands: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Random123 (Salmon, Moraes, Dror, Shaw, SC11), kat_vectors, philox4x32-10: counter, key, result.
PHILOX = (
    ("00000000 00000000 00000000 00000000", "0" * 16, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "f" * 16, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "299f31d0a4093822",  # high word first
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)
# The first normals of key (42, 0): -0.970190 0.194019 -1.235621 1.923927 -0.073182 ..., which
# torch.func._random.normal gives up to its rounding; the bits are those of reference.noise.
FIRST_NORMALS = "bf785e5c 3e46ace8 bf9e28d2 3ff6433d bd95e033 3e0e7a13 bf8da734 3ea742fe"

# SHA-256 of the bits of digest_calls, computed by reference.py.
DIGESTS = {
    torch.float32: "a1137e322aab86c81b822a0cd4f51bd7c9e4e5c58900e0f85871594426d57747",
    torch.float16: "6cb8deb3d9569e47e2cd616e151a2aeff30017a977750f80cb501b8fa6022bd0",
    torch.bfloat16: "9e9a321131dfed4ef570ec8dc849004965e9c3def524ffcb9a730fe2db5d7bee",
}
DIGEST_SIZES = (*range(1, 18), 1021, 4099)
# The carry into the second counter word, the sign of int64, and the wrap at 2**64
OFFSETS = (0, 2**32 - 3, 2**63 - 3, 2**64 - 3)
SEED = 2**64 - 59


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def known_answers(device: torch.device) -> Result:
    """Philox as Random123 published it, and the first normals of the contract."""
    for counter, seed, expected in PHILOX:
        c0, c1, c2, c3 = (torch.tensor([w], device=device) for w in _words(counter))
        seed_tensor = key_of(int(seed, 16), 0, device).view(torch.int64)[:1]
        got = [int(w) for w in reference.philox((c0, c1, c2, c3), seed_tensor)]
        require(got == _words(expected), f"Philox {counter} gives {got}, not {expected}")
    eps = noise(key_of(42, 0, device), len(_words(FIRST_NORMALS)))
    words = " ".join(f"{w & 0xFFFFFFFF:08x}" for w in eps.cpu().view(torch.int32).tolist())
    require(words == FIRST_NORMALS, f"key (42, 0) gives {words}, not {FIRST_NORMALS}")
    return passed("Philox-4x32-10 of Random123; the first normals of key (42, 0)")


def digest_calls(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, log_var and key of the fixed calls, on the CPU: x is mu, and grad_z."""
    for offset in OFFSETS:
        key = key_of(SEED, offset)
        for n in DIGEST_SIZES:
            yield *inputs(n, dtype), key
        log_var = extremes(dtype)
        yield torch.ones_like(log_var), log_var, key


def digest(results: Iterator[Tensor]) -> str:
    """SHA-256 of the bits of the results, every NaN a 7."""
    state = hashlib.sha256()
    for result in results:
        result = result.detach().cpu()
        clean = torch.where(result.isnan(), torch.full_like(result, 7.0), result)
        # without numpy, which is no dependency
        state.update(bytes(clean.view(torch.uint8).tolist()))
    return state.hexdigest()


def digest_as_expected(device: torch.device, dtype: torch.dtype) -> Result:
    """The public call and its backward, against a digest that is the same on every device."""

    def results() -> Iterator[Tensor]:
        for x, log_var, key in digest_calls(dtype):
            x, key = x.to(device), key.to(device)
            log_var = log_var.to(device).requires_grad_()
            z = fused_reparameterize(x, log_var, key=key)
            yield z
            yield from torch.autograd.grad(z, (log_var,), x)

    with poisoned_memory():
        got = digest(results())
    expected = DIGESTS[dtype]
    require(got == expected, f"sha256 {got}, expected {expected}")
    return passed(f"sha256 {got[:16]}...", sha256=got)


def _require_close(what: str, actual: Tensor, expected: Tensor, scale: Tensor) -> None:
    """float64, which promises ULPs of what is rounded on the way: of the angle, times scale.

    An angle below 2 pi is off by 9e-16, and the radius, below 9.5, multiplies that.
    """
    actual = actual.detach().cpu()
    error = (actual - expected).abs()
    denormal = 1e-320
    close = error <= 1e-13 * expected.abs() + 1e-14 * scale + denormal
    same = (actual == expected) | (actual.isnan() & expected.isnan())  # infinity as well
    wrong = (~(close | same)).flatten().nonzero().flatten()
    if wrong.numel():
        i = int(wrong[0])
        raise AssertionError(
            f"{what}: {wrong.numel()} of {actual.numel()} elements differ, first at {i}: "
            f"{float(actual.flatten()[i])!r} instead of {float(expected.flatten()[i])!r}"
        )


def _expected(
    name: str, x: Tensor, scale: Tensor | None, key: Tensor, options: tuple[Any, ...]
) -> Tensor:
    """reference.py, where that is long in pieces: each begins at a Philox block of its own.

    Pieces this short stay in the cache, and each operation on one thread: to let many
    small operations share threads takes ten times as long on cores that are busy.
    """
    op: _ops.KeyOp = getattr(reference, name)
    piece = 1 << 15
    if scale is None or options or x.dim() != 1 or x.shape != scale.shape or x.numel() <= piece:
        return op(x, scale, key, *options)
    seed, offset = key.tolist()
    per_block = 2 if x.dtype == torch.float64 else 4
    starts = range(0, x.numel(), piece)
    keys = [key_of(seed, offset + start // per_block) for start in starts]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.cat(list(pool.map(op, x.split(piece), scale.split(piece), keys)))


def _compare(what: str, on_device: Operands, on_cpu: Operands, *options: Any) -> int:
    """Both ops on the device against reference.py on the CPU; how many elements that were."""
    count = 0
    is_std = "std" in options
    for name in ("sample_from_key", "sample_backward"):
        x, scale, key = on_device
        cpu_x, cpu_scale, cpu_key = on_cpu
        unused = is_std and name == "sample_backward"
        with poisoned_memory():
            actual = getattr(_ops, name)(x, None if unused else scale, key, *options)
        expected = _expected(name, cpu_x, None if unused else cpu_scale, cpu_key, options)
        strides = torch.add(x, x if unused else scale).stride()
        what_op = f"{name}, {what}, {actual.dtype}"
        require(
            actual.shape == expected.shape and actual.stride() == strides,
            f"{what_op}: shape {tuple(actual.shape)} and strides {actual.stride()}, "
            f"expected {tuple(expected.shape)} and {strides}",
        )
        if actual.dtype == torch.float64:
            sigma = cpu_scale.abs() if is_std else torch.exp(0.5 * cpu_scale)
            by_sigma = cpu_x.abs() if unused else cpu_x.abs() * sigma
            size = sigma if name == "sample_from_key" else by_sigma
            _require_close(what_op, actual, expected, size)
        else:
            require_same_bits(what_op, actual, expected)
        count += actual.numel()
    return count


def _to(device: torch.device, operands: Operands) -> Operands:
    x, log_var, key = operands
    return x.to(device), log_var.to(device), key.to(device)


def sizes(device: torch.device, dtype: torch.dtype) -> Result:
    """Every tail, and enough elements that the last bit of a coefficient shows."""
    count = 0
    for n in (*range(1, 18), 65539, 2**20 + 3):
        for offset in OFFSETS if n < 18 else OFFSETS[1:2]:
            on_cpu = (*inputs(n, dtype), key_of(SEED, offset))
            count += _compare(f"{n} elements, offset {offset}", _to(device, on_cpu), on_cpu)
    how = "within 1e-13" if dtype == torch.float64 else "as bits"
    return passed(f"{count} elements equal {how}", elements=count)


def _views(base: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """mu and log_var as views of one (64, 48) tensor, made on the device of base."""
    other = base.flip(0)
    left, right = base.chunk(2, dim=1)
    top, bottom = base.chunk(2, dim=0)
    first, second = (t.reshape(2, 8, 12, 16) for t in (base, other))
    channels_last = torch.channels_last
    return {
        "chunks of columns": (left, right),
        "chunks of rows": (top, bottom),
        "every second column": (base[:, ::2], base[:, 1::2]),
        "transposed": (base.t(), other.t()),
        "transposed against not": (base[:48].t(), other[:48, :48].contiguous()),
        "a row and a column": (base[:1], base[:, :1]),
        "a scalar": (base, base[3, 4]),
        "unaligned": (base.flatten()[1:], other.flatten()[1:]),
        "differently aligned": (base.flatten()[1:-2], other.flatten()[3:]),
        "expanded": (base[0, 0].expand(1025), base[1, 1].expand(1025)),
        "channels last": (
            first.contiguous(memory_format=channels_last),
            second.contiguous(memory_format=channels_last),
        ),
        "four dimensions permuted": (first.permute(3, 1, 0, 2), second.permute(3, 1, 0, 2)),
        "no dimension": (base[0, 0], base[1, 1]),
        "no element": (base[:0], base[:0]),
    }


def layouts(device: torch.device) -> Result:
    """Views of any strides, and batched keys: the logical index alone counts."""
    cases = 0
    key = key_of(5, 2**32 - 9)
    for dtype in DTYPES:
        base = inputs(64 * 48, dtype)[0].reshape(64, 48)
        views, device_views = _views(base), _views(base.to(device))
        for what, pair in views.items():
            _compare(what, (*device_views[what], key.to(device)), (*pair, key))
        shape = (6, 8, 64)
        x, log_var = (t.reshape(shape) for t in inputs(6 * 8 * 64, dtype))
        batches = ((6,), (6, 8), (6, 1), (1, 8), (6, 8, 64))
        for batch in batches:
            keys = split(key, torch.Size(batch).numel()).reshape(*batch, 2)
            on_cpu = (x, log_var, keys)
            _compare(f"keys {batch} for {shape}", _to(device, on_cpu), on_cpu)
        cases += len(views) + len(batches)
    return passed(f"{cases} cases equal", cases=cases)


def forms_and_blocks(device: torch.device) -> Result:
    """The scale as std; and blocks of a larger tensor, with the noise of their place there."""
    key = key_of(5, 2**32 - 9)
    blocks: list[tuple[tuple[int, ...], ...]] = [
        ((6000,), (256,), (5001,)),
        ((6000,), (257,), (3001,)),
        ((30, 64), (7, 16), (11, 32)),
        ((30, 43), (7, 3), (11, 40)),
        ((64, 3), (5, 1), (50, 1)),
        ((9, 2**30, 2**20), (4, 2**29 + 1, 2**19 + 7), (3, 2, 9)),
    ]
    count = 0
    for dtype in DTYPES:
        for n in (1, 17, 65539):
            on_cpu = (*inputs(n, dtype), key)
            count += _compare(f"std, {n} elements", _to(device, on_cpu), on_cpu, "std")
        for whole, offset, shape in blocks:
            x, scale = (t.reshape(shape) for t in inputs(math.prod(shape), dtype))
            keys = split(key, 3) if len(shape) == 3 else key
            what = f"the block {shape} at {offset} of {whole}"
            on_cpu = (x, scale, keys)
            for form in ("log_var", "std"):
                count += _compare(what, _to(device, on_cpu), on_cpu, form, whole, offset)
    return passed(f"{count} elements equal", elements=count)


def extreme_values(device: torch.device) -> Result:
    """log_var that overflows, underflows or is not finite, with mu of every kind."""
    count = 0
    for dtype in DTYPES:
        log_var = extremes(dtype)
        for value in (0.0, -1.0, float("inf"), float("nan")):
            on_cpu = (torch.full_like(log_var, value), log_var, key_of(SEED))
            count += _compare(f"mu {value}", _to(device, on_cpu), on_cpu)
    return passed(f"{count} elements equal", elements=count)


def divergence(device: torch.device) -> Result:
    """The KL divergence and its gradient: tails, views, values of every kind."""
    count = 0
    for dtype in DTYPES:
        base = inputs(64 * 48, dtype)[0].reshape(64, 48)
        views, device_views = _views(base), _views(base.to(device))
        # and where half of e^x overflows
        log_var = torch.cat([extremes(dtype), torch.linspace(85, 92, 999).to(dtype)])
        pairs = [inputs(n, dtype) for n in (*range(1, 18), 65539)]
        pairs += [(torch.full_like(log_var, x), log_var) for x in (0.0, -1.0, math.inf, math.nan)]
        on_device = [tuple(t.to(device) for t in pair) for pair in pairs]
        for (x, v), (cpu_x, cpu_v) in zip(
            [*on_device, *device_views.values()], [*pairs, *views.values()], strict=True
        ):
            for name in ("kl_divergence", "kl_divergence_backward"):
                with poisoned_memory():
                    actual = getattr(_ops, name)(x, v)
                expected = getattr(reference, name)(cpu_x, cpu_v)
                what = f"{name}, {tuple(actual.shape)}, {dtype}"
                require(
                    actual.stride() == torch.add(x, v).stride(),
                    f"{what}: strides {actual.stride()}, expected {torch.add(x, v).stride()}",
                )
                if dtype == torch.float64:
                    _require_close(what, actual, expected, torch.zeros_like(expected))
                else:
                    require_same_bits(what, actual, expected)
                count += actual.numel()
    return passed(f"{count} elements equal", elements=count)
