"""Compare the Triton kernels under TRITON_INTERPRET=1 with the CPU kernels, for test_triton.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from helpers import FORMS, assert_same_bits, inputs, key_of
from ptx.arithmetic import fma32
from torch import Tensor
from triton.runtime import interpreter

import reparam_fused
from reparam_fused import _ops, reference, triton_kernels
from reparam_fused._draw import Position

OPS = [
    (triton_kernels.sample_from_key, _ops.sample_from_key),
    (triton_kernels.sample_backward, _ops.sample_backward),
]


def create_fma(
    _: object,
    x: interpreter.TensorHandle,
    y: interpreter.TensorHandle,
    z: interpreter.TensorHandle,
) -> interpreter.TensorHandle:
    """An fma that rounds once, which the interpreter has from Triton 3.9 on."""
    a, b, c = np.broadcast_arrays(x.data, y.data, z.data)
    result = fma32(a, b, c) if c.dtype == np.float32 else a * b + c
    return interpreter.TensorHandle(result, z.dtype.scalar)


KL_OPS = [
    (triton_kernels.kl_divergence, _ops.kl_divergence),
    (triton_kernels.kl_divergence_backward, _ops.kl_divergence_backward),
]


def compare_results(result: Tensor, expected: Tensor) -> None:
    assert result.stride() == expected.stride()
    if result.dtype == torch.float64:
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-14)
    else:
        assert_same_bits(result, expected)


def compare(x: Tensor, scale: Tensor, key: Tensor, *options: Any) -> None:
    for op, expected_op in OPS:
        unused = op is triton_kernels.sample_backward and "std" in options
        arguments = (x, None if unused else scale, key, *options)
        compare_results(op(*arguments), expected_op(*arguments))
    shape, dtype = torch.broadcast_shapes(x.shape, scale.shape), x.dtype
    arguments = (key, shape, dtype, *options[1:])
    compare_results(triton_kernels.noise(*arguments), _ops.noise(*arguments))
    for op, expected_op in KL_OPS if not options else []:
        compare_results(op(x, scale), expected_op(x, scale))


def compare_bounds(x: Tensor, scale: Tensor, key: Tensor) -> None:
    """Every form, within bounds and without, of which the numbers are no float32."""
    for form in FORMS:
        for bounds in (None, (-0.7, 0.9, 0.0), (-math.inf, 1e-300, 0.1)):
            place = (form, None, None, bounds)
            kept = None if form == "std" and bounds is None else scale
            for op, expected_op, arguments in (
                (*OPS[0], (x, scale, key, *place)),
                (*OPS[1], (x, kept, key, *place)),
                (*KL_OPS[0], (x, scale, form, bounds)),
                (*KL_OPS[1], (x, scale, form, bounds)),
            ):
                compare_results(op(*arguments), expected_op(*arguments))


def compare_samples(
    x: Tensor, scale: Tensor, key: Tensor, samples: int, form: str = "log_var", *options: Any
) -> None:
    z = triton_kernels.sample_from_key(x, scale, key, form, *(options or (None,) * 3), samples)
    expected = reference.sample_from_key(x, scale, key, form, *(options or (None,) * 3), samples)
    compare_results(z, expected)
    grads = triton_kernels.samples_backward(z, scale, key, form, *options)
    expected_grads = reference.samples_backward(z, scale, key, form, *options)
    for grad, other in zip(grads, expected_grads, strict=True):
        compare_results(grad, other)


def compare_draw(x: Tensor, scale: Tensor) -> None:
    z, key = torch.empty_like(x), torch.zeros(2, dtype=torch.uint64)
    triton_kernels._launch("sample", x, scale, z, key, position=Position(5 - 2**63, -80))
    assert key.tolist() == [5 + 2**63, 2**62 - 20 + 2**63]
    compare_results(z, _ops.sample_from_key(x, scale, key))


def compare_keys() -> None:
    """Against the definition, whatever the sign that the words are kept with."""
    keys = torch.stack([key_of(3 * r + 2**63, (2**64 - 2 + r) % 2**64) for r in range(5)])
    for first in (0, 2**32 - 3, -2):
        blocks = torch.arange(first, first + 70)
        expected = children(keys, blocks).movedim(-2, 0)
        derive = triton_kernels.derive
        assert torch.equal(derive(keys, None, first, 70), expected)
        some = keys[::2].contiguous()
        signed = derive(some.view(torch.int64), None, first, 70)
        assert torch.equal(signed.view(torch.uint64), expected[:, ::2])
        assert torch.equal(derive(keys[3:4], blocks, 0, 1)[0], expected[:, 3])
        assert torch.equal(derive(some, blocks[:1], 0, 1)[0], expected[0, ::2])
        diagonal = torch.stack([expected[2 * r, r] for r in range(5)])
        assert torch.equal(derive(keys, blocks[:10:2].contiguous(), 0, 1)[0], diagonal)
    assert derive(keys[:0], None, 0, 3).shape == (3, 0, 2)
    assert derive(keys[:0], blocks[:1], 0, 1).shape == (1, 0, 2)


def children(keys: Tensor, blocks: Tensor) -> Tensor:
    w0, w1, w2, w3 = reference.words(keys, blocks)
    return torch.stack([w1 << 32 | w0, w3 << 32 | w2], -1).view(torch.uint64)


def main() -> None:
    compare_keys()
    interpreter.InterpreterBuilder.create_fma = create_fma
    key = key_of(2**64 - 59, 2**32 - 7)
    for dtype in (torch.float32, torch.float64):
        for n in (0, 1, 6, 17, 2047, 2048, 5003):
            compare(*inputs(n, dtype=dtype, seed=n), key)
        x, log_var = inputs(4, 6, 10, dtype=dtype)
        compare(x.transpose(0, 2), log_var.transpose(0, 2), key)
        compare(x[..., ::3], log_var[:, :1, ::3], key)
        compare(x.flatten()[1:], log_var.flatten()[1:], key)
        compare(x, log_var, reparam_fused.split(key, 4))
        compare(x, log_var, key, "std")
        compare_bounds(x[0], log_var[0], key)
        for n in (1, 2, 3, 4, 5, 6, 8, 600):
            compare_samples(*inputs(n, dtype=dtype, seed=n), key, 3)
        compare_samples(x.transpose(0, 2), log_var.transpose(0, 2), key, 2, "rho")
        compare_samples(x[..., ::3], log_var[:, :1, ::3], key, 2)
        compare_samples(x, log_var, reparam_fused.split(key, 4)[None], 3)
        compare_samples(x, log_var, reparam_fused.split(key, 3), 3)
        bounds = (-0.7, 0.9, 0.1)
        block = (9, 4, 6, 11), (3, 0, 0, 1)
        compare_samples(x, log_var, key, 3, "log_std", *block, bounds)
        compare_samples(x, log_var, key, 0, "log_std")
        z, drawn = triton_kernels.sample_at(x, log_var, 5, 80, samples=3)
        compare_results(z, reference.sample_from_key(x, log_var, drawn, samples=3))
        compare_draw(x, log_var)
        compare_draw(x.transpose(0, 2), log_var.transpose(0, 2))
        compare(x, log_var, key, "log_var", (9, 8, 12), (5, 1, 2))
        compare(x[0, 0], log_var[0, 0], key, "std", (99,), (32,))
    print("compared")


if __name__ == "__main__":
    main()
