"""The compiled kernels against reference.py, bit for bit, however the work is cut."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digest import extremes
from helpers import assert_same_bits, inputs, key_of, needs_kernels, patience
from torch import Tensor

import reparam_fused
from reparam_fused import _ops, reference

pytestmark = needs_kernels

OPS = [
    (_ops.sample_from_key, reference.sample_from_key),
    (_ops.sample_backward, reference.sample_backward),
]
Op = Callable[[Tensor, Tensor, Tensor], Tensor]
# The ends of tiles: 4 to 128 elements, by ISA and dtype, and what is left over
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 1021]
OFFSETS = [0, 1, 2**32 - 7, 2**63 - 3, 2**64 - 5]


def assert_matches_reference(result: Tensor, expected: Tensor) -> None:
    """Bits; in fp64, where reference.py goes through libm, a few ULP of the angle."""
    if result.dtype == torch.float64:
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=2e-14, equal_nan=True)
    else:
        assert_same_bits(result, expected)


@pytest.mark.parametrize(("op", "expected"), OPS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_sizes_and_offsets(op: Op, expected: Op, offset: int, dtype: torch.dtype) -> None:
    key = key_of(0x9E3779B97F4A7C15, offset)
    for n in SIZES:
        x, log_var = inputs(n, dtype=dtype, seed=n)
        assert_matches_reference(op(x, log_var, key), expected(x, log_var, key))


@pytest.mark.parametrize(("op", "expected"), OPS)
def test_a_million_elements(op: Op, expected: Op) -> None:
    """The last bit of a coefficient shows in one element of ten thousand."""
    x, log_var = inputs(1 << 20, spread=8.0)
    assert_matches_reference(op(x, log_var, key_of(77)), expected(x, log_var, key_of(77)))


@pytest.mark.parametrize(("op", "expected"), OPS)
def test_extreme_and_non_finite_values(op: Op, expected: Op, dtype: torch.dtype) -> None:
    log_var = extremes(dtype)
    for x in (0.0, 1.0, float("inf"), float("nan")):
        x_tensor = torch.full_like(log_var, x)
        result = op(x_tensor, log_var, key_of(1))
        assert_matches_reference(result, expected(x_tensor, log_var, key_of(1)))


def test_not_finite_values_stay_in_their_own_element(dtype: torch.dtype) -> None:
    mu, log_var = inputs(300, dtype=dtype)
    clean = reparam_fused.fused_reparameterize(mu, log_var, key=key_of(8))
    log_var[10], mu[77], mu[150], log_var[200], log_var[201] = (
        float("nan"), float("inf"), float("nan"), float("inf"), -float("inf"),
    )  # fmt: skip
    z = reparam_fused.fused_reparameterize(mu, log_var, key=key_of(8))
    touched = [10, 77, 150, 200, 201]
    assert z[10].isnan()
    assert z[77] == float("inf")
    assert z[150].isnan()
    assert z[200].isinf()
    assert z[201] == mu[201]
    rest = torch.ones(300, dtype=torch.bool)
    rest[touched] = False
    assert_same_bits(z[rest], clean[rest])


def test_sigma_of_zero_is_one(dtype: torch.dtype) -> None:
    zero = torch.zeros(999, dtype=dtype)
    assert_same_bits(
        reparam_fused.fused_reparameterize(zero, zero, key=key_of(4)),
        reparam_fused.noise(key_of(4), 999, dtype=dtype),
    )


def test_denormal_sigma_is_kept() -> None:
    log_var = torch.linspace(-206, -174, 500)
    z = reparam_fused.fused_reparameterize(torch.zeros(500), log_var, key=key_of(6))
    assert (z != 0).float().mean() > 0.9
    assert z.abs().max() < torch.finfo(torch.float32).smallest_normal * 8


@pytest.mark.parametrize(("op", "expected"), OPS)
def test_layouts(op: Op, expected: Op, dtype: torch.dtype) -> None:
    """Only the logical index of an element counts; the views are read where they lie."""
    key = key_of(11, 2**32 - 3)
    x, log_var = inputs(6, 10, 14, 8, dtype=dtype)
    wide, _ = inputs(6, 10, 14, 16, dtype=dtype, seed=5)
    views: list[tuple[Tensor, Tensor]] = [
        (x.transpose(0, 2), log_var.transpose(0, 2)),
        (x.permute(3, 1, 0, 2), log_var.permute(3, 1, 0, 2)),
        tuple(wide.chunk(2, dim=-1)),  # type: ignore[list-item]
        tuple(wide.chunk(2, dim=1)),  # type: ignore[list-item]
        (x.to(memory_format=torch.channels_last), log_var.to(memory_format=torch.channels_last)),
        (x.to(memory_format=torch.channels_last), log_var),
        (x[..., ::3], log_var[..., ::3]),
        (x[:, 3:4].expand(6, 10, 14, 8), log_var),
        (x.flatten()[1:], log_var.flatten()[1:]),
        (x[0, 0, 0, 0].expand(77), log_var.flatten()[:77]),
        (x.squeeze(), log_var[..., :1]),
        (x[2:3, :1], log_var[:, :, :1]),
    ]
    for a, b in views:
        result = op(a, b, key)
        dense = expected(*(t.contiguous() for t in torch.broadcast_tensors(a, b)), key)
        assert_matches_reference(result.contiguous(), dense)
        assert result.stride() == torch.add(a, b).stride()


def test_a_slice_of_the_noise_is_the_noise_of_the_slice(dtype: torch.dtype) -> None:
    """The element index is all that matters: not the size, nor where a call begins."""
    whole = reparam_fused.noise(key_of(3, 2**32 - 20), 5000, dtype=dtype)
    per_counter = 2 if dtype == torch.float64 else 4
    for n in (1, 6, 77, 1000):
        assert_same_bits(reparam_fused.noise(key_of(3, 2**32 - 20), n, dtype=dtype), whole[:n])
        shifted = reparam_fused.noise(key_of(3, 2**32 - 20 + n), 500, dtype=dtype)
        assert_same_bits(shifted, whole[n * per_counter : n * per_counter + 500])


@pytest.mark.parametrize(
    "shape", [(5, 1), (7, 3), (9, 64), (4, 130), (3, 1000), (2, 3, 50), (0, 4)]
)
def test_batched_keys(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each slice has the stream of its own key, from its own index 0."""
    keys = reparam_fused.split(key_of(17), torch.Size(shape[:-1]).numel() or 1)
    keys = keys[: torch.Size(shape[:-1]).numel()].reshape(*shape[:-1], 2)
    mu, log_var = inputs(*shape, dtype=dtype)
    z = reparam_fused.fused_reparameterize(mu, log_var, key=keys)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).reshape(
        -1, len(shape) - 1
    ):
        at = tuple(index.tolist())
        one = reparam_fused.fused_reparameterize(mu[at], log_var[at], key=keys[at])
        assert_same_bits(z[at], one)


def test_ones_in_the_batch_of_a_key() -> None:
    """At its end they leave their dimension within a slice; before, the key is that of all."""
    x, log_var = inputs(3, 4, 5)
    keys = reparam_fused.split(key_of(4), 4)
    ended, rows = (_ops.sample_from_key(x, log_var, k) for k in (keys[:3, None], keys[:3]))
    assert_same_bits(ended, rows)
    shared = _ops.sample_from_key(x, log_var, keys[None])
    for i in range(3):
        assert_same_bits(shared[i], _ops.sample_from_key(x[i], log_var[i], keys))


def keys_about(offset: int, rows: int) -> Tensor:
    """A key for each row: of other seeds, at offsets on both sides of this one."""
    keys = [
        key_of(0x9E3779B97F4A7C15 * (r + 1) % 2**64, (offset - 2 + r) % 2**64) for r in range(rows)
    ]
    return torch.stack(keys)


# About a counter, and about half a tile and a whole one of any ISA and dtype
LENGTHS = [1, 2, 3, 4, 5, 6, 8, 12, 15, 16, 17, 20, 28, 31, 32, 33, 60, 63, 64, 65]


@pytest.mark.parametrize(("op", "expected"), OPS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_short_rows_share_tiles(op: Op, expected: Op, offset: int, dtype: torch.dtype) -> None:
    """With keys of their own, and as rows of a larger tensor that begin within a counter."""
    for length in LENGTHS:
        x, log_var = inputs(2, 67, length, dtype=dtype, seed=length)
        keys = keys_about(offset, 67)
        for rows in (1, 5, 67):
            args = x[0, :rows], log_var[0, :rows], keys[:rows]
            assert_matches_reference(op(*args), expected(*args))
        across = x[0].t().contiguous().t(), log_var[0, :1].expand(67, length), keys
        assert_matches_reference(op(*across), expected(*across))
        for shape, place in (((69, length + 3), (1, 2)), ((70, length + 4), (0, 4))):
            block = x[0], log_var[0], keys[0], "log_var", shape, place
            assert_matches_reference(op(*block), expected(*block))
        block = x, log_var, keys[:2, None], "log_var", (2, 70, length + 1), (0, 3, 1)
        assert_matches_reference(op(*block), expected(*block))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_cut_short_rows(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    for length in (1, 3, 6, 20, 31):
        keys = reparam_fused.split(key_of(5), 60_000 // length)
        x, log_var = inputs(len(keys), length, dtype=dtype)
        try:
            torch.set_num_threads(1)
            whole = _ops.sample_from_key(x, log_var, keys)
            torch.set_num_threads(threads)
            assert_same_bits(_ops.sample_from_key(x, log_var, keys), whole)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("offset", OFFSETS)
def test_noise_is_eps(offset: int, dtype: torch.dtype) -> None:
    """What a sample of -0 and a std of 1 is, signs of zeros included, in contiguous memory."""
    keys = reparam_fused.split(key_of(5, offset), 6)[::2]
    block = (9, 40), (5, 13)
    for key, shape, options in (
        *((key_of(77, offset), (n,), ()) for n in [*SIZES, 65539]),
        (keys, (3, 7, 5), ()),
        (key_of(78, offset), (3, 17), block),
        (keys, (3, 17), block),
    ):
        eps = _ops.noise(key, shape, dtype, *options)
        mu = torch.full(shape, -0.0, dtype=dtype)
        expected = _ops.sample_from_key(mu, torch.ones_like(mu), key, "std", *options)
        assert_same_bits(eps, expected)
        assert eps.is_contiguous()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_thread_counts(threads: int, dtype: torch.dtype) -> None:
    mu, log_var = inputs(3, 70_001, dtype=dtype)
    expected = [op(mu, log_var, key_of(9)) for op, _ in OPS]
    keys = reparam_fused.split(key_of(10), 3)
    batched = reparam_fused.fused_reparameterize(mu, log_var, key=keys)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (op, _), first in zip(OPS, expected, strict=True):
            assert_same_bits(op(mu, log_var, key_of(9)), first)
            # Rows that do not fill a tile, read where they lie
            rows = op(mu.t(), log_var.t(), key_of(9))
            assert_same_bits(rows, op(mu.t().contiguous(), log_var.t().contiguous(), key_of(9)))
        again = reparam_fused.fused_reparameterize(mu, log_var, key=keys)
        assert_same_bits(again, batched)
    finally:
        torch.set_num_threads(before)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,  # with -c, the repository's root would hide what is installed
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=patience(600),
        check=False,
    )


def test_every_isa_gives_the_same_bits() -> None:
    digests = {}
    for isa in ("scalar", "avx2", "avx512", "neon"):
        result = run_python(str(Path(__file__).with_name("digest.py")), REPARAM_FUSED_ISA=isa)
        if "REPARAM_FUSED_ISA is" in result.stderr:  # this CPU lacks it
            continue
        assert result.returncode == 0, result.stderr
        name, *digests[isa] = result.stdout.splitlines()
        assert name.endswith(isa)
    assert len(digests["scalar"]) == 12
    assert all(d == digests["scalar"] for d in digests.values())


def test_an_unknown_isa_is_refused_by_name() -> None:
    result = run_python(
        "-c", "import reparam_fused; print(reparam_fused.backends())", REPARAM_FUSED_ISA="sse9"
    )
    assert result.returncode != 0
    assert "REPARAM_FUSED_ISA is 'sse9', but this CPU and build have: scalar" in result.stderr


@pytest.mark.parametrize("way", ["module", "op"])
def test_threads_are_those_of_torch(way: str) -> None:
    """The first call above the grain starts them, no smaller one does, and torch starts no more."""
    program = """
import os, sys, torch
from reparam_fused import _extensions, _forms, _ops, key
torch.set_num_threads(2)
form, key = _forms.SAMPLE["std"], key(1)
call = form.plain if sys.argv[1] == "module" else lambda *a: _ops.sample_from_key(*a, "std")
x = torch.empty(1)
count = lambda: len(os.listdir("/proc/self/task"))
counts = [count()]
for n in (8192, 8193):
    z = call(x.expand(n), x, key)
    assert z is not None or torch.__version__ < "2.14"
    if z is None:
        z = _ops.sample_from_key(x.expand(n), x, key, "std")
    counts.append(count())
torch.exp(torch.empty(1 << 22))
counts.append(count())
print(*(n - counts[0] for n in counts))
"""
    result = run_python("-c", program, way)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "0", "1", "1"]


def test_poison_reaches_the_results() -> None:
    """They come from torch's allocator by the function of C that is called here."""
    torch_ = ctypes.CDLL(torch._C.__file__)
    size, one = ctypes.c_int64(1000), ctypes.c_int64(1)
    for _ in range(3):  # of memory that has held something else
        torch.zeros(1000)
        tensor, data = ctypes.c_void_p(), ctypes.c_void_p()
        error = torch_.aoti_torch_empty_strided(
            one, ctypes.byref(size), ctypes.byref(one), torch_.aoti_torch_dtype_float32(),
            torch_.aoti_torch_device_type_cpu(), 0, ctypes.byref(tensor),
        )  # fmt: skip
        assert error == 0
        torch_.aoti_torch_get_data_ptr(tensor, ctypes.byref(data))
        assert data.value is not None
        values = torch.frombuffer(
            (ctypes.c_float * 1000).from_address(data.value), dtype=torch.float32
        )
        assert values.isnan().all()
        torch_.aoti_torch_delete_tensor_object(tensor)


def test_the_floating_point_state_of_the_process_is_left_alone() -> None:
    """Neither the import nor a call turns on flush-to-zero."""
    program = """
import ctypes, math
libm = ctypes.CDLL('libm.so.6')
libm.fegetround.restype = ctypes.c_int
def state():
    tiny = 5e-324
    return (tiny * 1.0 != 0.0, math.ldexp(1.0, -1060) * 0.5 != 0.0, libm.fegetround())
import torch
before = state(), (torch.full((64,), 1e-40) * 0.5 != 0).all().item()
import reparam_fused
x = torch.full((1 << 16,), -190.0)
reparam_fused.fused_reparameterize(x, x)
after = state(), (torch.full((64,), 1e-40) * 0.5 != 0).all().item()
print(before == after and after[1] and all(after[0][:2]))
"""
    result = run_python("-c", program)
    assert result.stdout.strip() == "True", result.stderr


def test_more_than_2_to_31_elements() -> None:
    """Through inputs of one element, expanded: only z takes memory (4.3 GB)."""
    n = 2**31 + 1000
    zero = torch.zeros(1, dtype=torch.bfloat16).expand(n)
    torch.use_deterministic_algorithms(False)  # no need to write 4 GB of NaN first
    z = reparam_fused.fused_reparameterize(zero, zero, key=key_of(2, 7))
    for start in (0, 2**31 - 64, n - 40):
        expected = reparam_fused.noise(key_of(2, 7 + start // 4), 40, dtype=torch.bfloat16)
        assert_same_bits(z[start : start + 40], expected)
