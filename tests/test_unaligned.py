"""Storage that begins within an element, as torch.frombuffer gives it.

In C++ to read such an element as one is undefined: `make sanitize` is red where rows.h takes an
operand for aligned, or call.h a key or the gradient of a sum. Here a copy of the wrong part, or
past the end, shows; and a GPU, which cannot read it, has to be asked for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import assert_same_bits, inputs, key_of, needs_kernels
from torch import Tensor

import reparam_fused
from reparam_fused import (
    _ops,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)

KEY = key_of(5, 2**32 - 3)
OFFSETS = [
    *((torch.float32, n) for n in (1, 2, 3)),
    *((dtype, 1) for dtype in (torch.float16, torch.bfloat16)),
    *((torch.float64, n) for n in range(1, 8)),
]
each_offset = pytest.mark.parametrize(
    ("dtype", "offset"), OFFSETS, ids=lambda x: str(x).removeprefix("torch.")
)


def unaligned(t: Tensor, offset: int) -> Tensor:
    """The same elements, so many bytes from where they could be."""
    words = t.contiguous().reshape(-1)
    memory = bytearray(t.nbytes + 16)
    # From an aligned byte on, wherever Python has put the memory
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 8 + offset
    moved = torch.frombuffer(memory, dtype=t.dtype, count=words.numel(), offset=start)
    moved.copy_(words)
    assert moved.data_ptr() % t.element_size() == offset
    return moved.view(t.shape)


def results(mu: Tensor, scale: Tensor, loc: Tensor, prior: Tensor, key: Tensor) -> list[Tensor]:
    """Of every op: values, and gradients of the leaves among these."""
    given = [t.requires_grad_() for t in (mu, scale, loc, prior)]
    of_prior = torch.distributions.Normal(loc, prior, validate_args=False)
    made: list[Tensor | Sequence[Tensor]] = [
        fused_reparameterize(mu, scale, key=key),
        fused_reparameterize(mu, std=scale, key=key),
        fused_reparameterize(mu, rho=scale, key=key, sample_shape=(3,)),
        fused_kl_divergence(mu, scale),
        fused_reparameterize_kl(mu, scale, key=key, dim=-1),
        fused_reparameterize_kl(mu, scale, key=key, dim=-1, prior=of_prior),
        fused_reparameterize_log_prob(mu, scale, key=key, dim=-1),
        fused_reparameterize_log_prob(mu, rho=scale, key=key, dim=-1, tanh=True),
    ]
    flat = [t for one in made for t in ((one,) if isinstance(one, Tensor) else one)]
    # The gradients that come in are where the operands are, too.
    grads = [like(t, mu) for t in flat]
    out = [t.detach() for t in flat]
    for t, grad in zip(flat, grads, strict=True):
        taken = torch.autograd.grad(t, given, grad, retain_graph=True, allow_unused=True)
        out += [g for g in taken if g is not None]
    return out


def like(t: Tensor, given: Tensor) -> Tensor:
    """A gradient for a result, as unaligned as what was given."""
    grad = inputs(*t.shape, seed=9)[0].to(t.dtype)
    offset = given.data_ptr() % given.element_size()
    return unaligned(grad, offset % t.element_size()) if offset else grad


# A part of a tile, a block with a tail, rows apart in memory, columns, and what threads share
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "33": lambda t: t[:33],
    "2049": lambda t: t[:2049],
    "parts of rows": lambda t: t[: 130 * 40].view(130, 40)[:, 3:24],
    "columns": lambda t: t[: 131 * 70].view(131, 70).t(),
    "40000": lambda t: t,
}


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@each_offset
def test_bits_of_the_aligned_call(
    both_paths: str, dtype: torch.dtype, offset: int, shape: str
) -> None:
    view = SHAPES[shape]
    mu, scale = inputs(40000, dtype=dtype)
    loc, prior = inputs(40000, dtype=dtype, seed=1)
    aligned = [mu, scale, loc, prior.abs() + 0.25]
    expected = results(*(view(t.clone()) for t in aligned), KEY)
    actual = results(*(view(unaligned(t, offset)) for t in aligned), unaligned(KEY, offset))
    for got, wanted in zip(actual, expected, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("offset", range(1, 8))
def test_keys(offset: int) -> None:
    """Splits, folds and draws, of a key and of keys for rows."""
    keys, data = reparam_fused.split(KEY, 7), torch.arange(7) * 2**40
    mu, log_var = inputs(7, 21)
    pairs = [
        (lambda key: reparam_fused.split(key, 5), KEY),
        (lambda key: reparam_fused.fold_in(key, 3), KEY),
        (lambda key: reparam_fused.fold_in(key, unaligned(data, offset)), keys),
        (lambda key: fused_reparameterize(mu, log_var, key=key), keys),
        (lambda key: _ops.noise(key, (7, 21), torch.float32), keys),
    ]
    for call, key in pairs:
        assert_same_words(call(unaligned(key, offset)), call(key.clone()))


def assert_same_words(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("which", range(3), ids=["mu", "log_var", "key"])
def test_a_gpu_refuses_before_anything_is_launched(cuda: torch.device, which: int) -> None:
    """By a slice of a storage, of bytes; a view by another dtype refuses to make such a tensor. An
    access would be a fault, after which no other call of the process works."""
    tensors = [*inputs(64), KEY]
    given = [t.to(cuda) for t in tensors]
    moved = given[which]
    storage = torch.UntypedStorage(moved.nbytes + 8, device=cuda)
    whole = torch.empty(0, dtype=torch.uint8, device=cuda).set_(storage)
    given[which] = torch.empty(0, dtype=moved.dtype, device=cuda).set_(
        storage[1 : moved.nbytes + 1], 0, moved.shape
    )
    assert given[which].data_ptr() == whole.data_ptr() + 1
    with pytest.raises(RuntimeError, match="to be aligned to its elements, got"):
        fused_reparameterize(given[0], given[1], key=given[2])
    if which < 2:
        with pytest.raises(RuntimeError, match="to be aligned to its elements, got"):
            fused_kl_divergence(given[0], given[1])
    with pytest.raises(RuntimeError, match="to be aligned to its elements, got"):
        fused_reparameterize_kl(given[0], given[1], key=given[2], dim=-1)
    z = fused_reparameterize(*(t.to(cuda) for t in tensors[:2]), key=KEY.to(cuda))
    assert_same_bits(z.cpu(), fused_reparameterize(*tensors[:2], key=KEY))
