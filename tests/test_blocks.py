"""Blocks of a larger tensor: each element has the noise, and the gradient, of its place there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from conftest import ON_STAND_IN
from helpers import assert_same_bits, inputs, key_of, needs_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compile import compilers
from torch import Tensor

import reparam_fused
from reparam_fused import _ops, fused_reparameterize, reference

KEY = key_of(77, 2**32 - 9)
Block = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# global_shape, global_offset, shape
BLOCKS: list[Block] = [
    ((1000,), (0,), (1000,)),
    ((1000,), (3,), (500,)),
    ((1000,), (128,), (872,)),
    ((1000,), (999,), (1,)),
    ((1000,), (1000,), (0,)),
    ((30, 40), (7, 0), (11, 40)),
    ((30, 40), (7, 13), (11, 20)),
    ((30, 40), (0, 16), (30, 16)),
    ((64, 3), (5, 1), (50, 1)),
    ((5, 6, 7), (1, 2, 3), (3, 3, 3)),
    ((5, 6, 7), (4, 0, 0), (1, 6, 7)),
    ((4, 1, 300), (2, 0, 100), (2, 1, 129)),
    ((), (), ()),
]


def part(whole: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


@pytest.mark.parametrize(("whole", "offset", "shape"), BLOCKS)
def test_a_block_is_a_part_of_the_whole(
    whole: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Forward and backward; as a tensor of its own, and read where it lies."""
    mu, log_var = inputs(*whole, dtype=dtype, device=device)
    key = KEY.to(device)
    forms = ["log_var", "std"]
    if device.type == "cuda" and dtype != torch.float32:  # Triton compiles all of it anew
        forms = ["std"] if dtype == torch.float16 else ["log_var"]
    for form in forms:
        z = _ops.sample_from_key(mu, log_var, key, form)
        grad = _ops.sample_backward(mu, log_var if form == "log_var" else None, key, form)
        views = part(mu, offset, shape), part(log_var, offset, shape)
        block = form, whole, offset
        expected = reference.sample_from_key(*(t.cpu() for t in views), KEY, *block)
        if dtype == torch.float64:
            z_part = part(z, offset, shape).cpu()
            torch.testing.assert_close(z_part, expected, rtol=1e-13, atol=1e-14)
        else:
            assert_same_bits(part(z, offset, shape), expected)
        for a, b in (views, tuple(t.clone() for t in views)):
            assert_same_bits(_ops.sample_from_key(a, b, key, *block), part(z, offset, shape))
            b_or_none = b if form == "log_var" else None
            result = _ops.sample_backward(a, b_or_none, key, *block)
            assert_same_bits(result, part(grad, offset, shape))


@given(st.data())
@settings(
    max_examples=20 if ON_STAND_IN else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_block(device: torch.device, data: st.DataObject) -> None:
    """float64 has the same bits on one device alone."""
    whole = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    offset = [data.draw(st.integers(0, n - 1)) for n in whole]
    shape = [data.draw(st.integers(1, n - o)) for n, o in zip(whole, offset, strict=True)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    key = key_of(data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 2**64 - 1)))
    on_device = key.to(device)
    eps = reparam_fused.noise(on_device if dtype == torch.float64 else key, whole, dtype=dtype)
    block = reparam_fused.noise(
        on_device, shape, dtype=dtype, global_shape=whole, global_offset=offset
    )
    assert_same_bits(block, part(eps, offset, shape))


@pytest.mark.parametrize("batch", [(6,), (6, 1), (1, 7), (6, 7), (1, 1, 9)])
def test_with_batched_keys(
    batch: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Where keys tell slices apart, the index counts within a slice; keys go by the block."""
    whole, offset, shape = (6, 7, 9), (2, 3, 1), (3, 4, 7)
    keys = reparam_fused.split(KEY.to(device), math.prod(batch)).view(*batch, 2)
    mu, log_var = inputs(*whole, dtype=dtype, device=device)
    z = fused_reparameterize(mu, log_var, key=keys)
    block_keys = keys[
        tuple(
            slice(o, o + n) if k > 1 else slice(None)
            for k, o, n in zip(batch, offset, shape, strict=False)
        )
    ]
    result = fused_reparameterize(
        part(mu, offset, shape),
        part(log_var, offset, shape),
        key=block_keys,
        global_shape=whole,
        global_offset=offset,
    )
    assert_same_bits(result, part(z, offset, shape))


def test_keys_are_read_where_they_lie(dtype: torch.dtype, device: torch.device) -> None:
    keys = reparam_fused.split(KEY.to(device), 30).view(5, 6, 2)
    x, log_var = inputs(6, 5, 11, dtype=dtype, device=device)
    z = _ops.sample_from_key(x, log_var, keys.transpose(0, 1))
    assert_same_bits(z, _ops.sample_from_key(x, log_var, keys.transpose(0, 1).contiguous()))
    words_apart = torch.stack([keys, keys], -1)[..., 0]
    assert_same_bits(_ops.sample_from_key(x.transpose(0, 1), log_var.transpose(0, 1), words_apart),
                     z.transpose(0, 1))  # fmt: skip


def test_the_place_may_be_far_out(dtype: torch.dtype, device: torch.device) -> None:
    """Indices beyond 2^32, without the memory for what lies before them."""
    n, per_counter = 100, 2 if dtype == torch.float64 else 4
    for first in (2**33, 2**40 + 3, 2**62):
        block = reparam_fused.noise(
            key_of(3, device=device),
            n,
            dtype=dtype,
            global_shape=(first + n,),
            global_offset=(first,),
        )
        skip = first % per_counter
        key = key_of(3, first // per_counter, device=device)
        expected = reparam_fused.noise(key, n + skip, dtype=dtype)
        assert_same_bits(block, expected[skip:])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    whole, offset, shape = (200, 301), (50, 7), (100, 290)
    eps = reparam_fused.noise(KEY, whole)
    torch.set_num_threads(threads)
    try:
        block = reparam_fused.noise(KEY, shape, global_shape=whole, global_offset=offset)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(block, part(eps, offset, shape))


def test_gradients_through_the_public_call(device: torch.device) -> None:
    whole, offset, shape = (6, 7), (2, 3), (3, 4)
    mu, log_var = (t.requires_grad_() for t in inputs(*whole, dtype=torch.float64, device=device))
    key = KEY.to(device)
    for name in ("log_var", "std"):
        z = fused_reparameterize(mu, **{name: log_var}, key=key)
        z_block = fused_reparameterize(
            part(mu, offset, shape),
            **{name: part(log_var, offset, shape)},
            key=key,
            global_shape=whole,
            global_offset=offset,
        )
        loss = part(z, offset, shape).square().sum()
        expected = torch.autograd.grad(loss, (mu, log_var), create_graph=True)
        grads = torch.autograd.grad(z_block.square().sum(), (mu, log_var), create_graph=True)
        for grad, grad_expected in zip(grads, expected, strict=True):
            assert torch.equal(grad, grad_expected)
        second = torch.autograd.grad(grads[1].sum(), log_var, allow_unused=True)
        torch.testing.assert_close(second, torch.autograd.grad(expected[1].sum(), log_var))


def test_vmap(device: torch.device) -> None:
    """A block of each example; the batch itself is no dimension of the whole."""
    mu, log_var = inputs(4, 5, 6, device=device)
    keys = reparam_fused.split(KEY.to(device), 4)
    block = {"global_shape": (9, 10), "global_offset": (3, 4)}

    def call(m: Tensor, v: Tensor, k: Tensor) -> Tensor:
        return fused_reparameterize(m, v, key=k, **block)  # type: ignore[arg-type]

    for key, dim in ((KEY.to(device), None), (keys, 0)):
        result = torch.vmap(call, in_dims=(0, 0, dim))(mu, log_var, key)
        for i in range(4):
            k = key if dim is None else key[i]
            one = (t.cpu() for t in (mu[i], log_var[i], k))
            assert_same_bits(result[i], call(*one))


@compilers("aot_eager", "inductor")
@needs_kernels
def test_compiled(backend: str, device: torch.device) -> None:
    operands = (*inputs(5, 6), KEY)

    def call(m: Tensor, v: Tensor, key: Tensor) -> Tensor:
        return fused_reparameterize(m, v, key=key, global_shape=(9, 10), global_offset=(3, 4))

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    assert_same_bits(compiled(*(t.to(device) for t in operands)), call(*operands))


def test_ops(device: torch.device) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs(3, 5, device=device))
    for op in (_ops.sample_from_key, _ops.sample_backward):
        torch.library.opcheck(op, (mu, log_var, KEY.to(device), "log_var", (7, 8), (4, 3)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"global_shape": (6, 8)}, ValueError, "together, got global_shape alone"),
        ({"global_offset": (0, 0)}, ValueError, "together, got global_offset alone"),
        (
            {"global_shape": (6, 8), "global_offset": (0, 0), "key": None},
            ValueError,
            "global_shape needs a key",
        ),
        ({"global_shape": 12, "global_offset": (0,)}, TypeError, "global_shape must be a sequence"),
        (
            {"global_shape": (6, 8), "global_offset": (0, 0.5)},
            TypeError,
            r"global_offset must be a sequence of ints, got \(0, 0.5\)",
        ),
        (
            {"global_shape": (6, 8), "global_offset": (1,)},
            RuntimeError,
            r"global_offset must have the 2 dimensions of the output \(3, 4\), got \(1,\)",
        ),
        (
            {"global_shape": (6, 8), "global_offset": (4, 0)},
            RuntimeError,
            r"block \(3, 4\) at global_offset \(4, 0\) must be within global_shape \(6, 8\)",
        ),
        (
            {"global_shape": (6, 8), "global_offset": (-1, 0)},
            RuntimeError,
            r"must be within global_shape \(6, 8\)",
        ),
        (
            {"global_shape": (2**32, 2**31), "global_offset": (0, 0)},
            RuntimeError,
            r"less than 2\*\*63 elements",
        ),
    ],
)
def test_bad_blocks(
    arguments: dict[str, object], error: type[Exception], message: str, device: torch.device
) -> None:
    mu = torch.zeros(3, 4, device=device)
    with pytest.raises(error, match=message):
        fused_reparameterize(mu, mu, **{"key": KEY.to(device), **arguments})  # type: ignore[arg-type]


@needs_kernels
def test_the_ops_refuse_what_is_out_of_bounds(device: torch.device) -> None:
    mu, key = torch.zeros(3, 4, device=device), KEY.to(device)
    with pytest.raises(RuntimeError, match="is not within 6"):
        _ops.sample_from_key(mu, mu, key, "log_var", (6, 8), (4, 0))
    with pytest.raises(RuntimeError, match="global_shape and global_offset, or neither"):
        _ops.sample_from_key(mu, mu, key, "log_var", (6, 8))
    with pytest.raises(RuntimeError, match="to have the 2 dimensions"):
        _ops.sample_from_key(mu, mu, key, "log_var", (6,), (1,))
    with pytest.raises(RuntimeError, match=r"less than 2\^63 elements"):
        _ops.sample_from_key(mu, mu, key, "log_var", (2**32, 2**31), (0, 0))
    with pytest.raises(RuntimeError, match="expected a uint64 key"):
        _ops.sample_from_key(mu, mu, reparam_fused.split(key, 2))
