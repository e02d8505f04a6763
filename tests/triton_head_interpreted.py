"""Compare the head's Triton kernels under TRITON_INTERPRET=1 with reference.py, for
test_triton_head.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from helpers import FORMS, assert_same_bits, inputs, key_of
from torch import Tensor
from triton.runtime import interpreter
from triton_interpreted import create_fma

import reparam_fused
from reparam_fused import reference, triton_head, triton_kernels

KEY = key_of(2**64 - 59, 2**32 - 7)


def compare_results(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.stride() == wanted.stride()
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, wanted, rtol=2e-13, atol=2e-14, equal_nan=True)
        else:
            assert_same_bits(got, wanted)


def compare(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    *prior: Tensor,
    term: str = "kl_divergence",
    summed: int = 1,
    **named: Any,
) -> None:
    loc, of_prior = prior or (None, None)
    rest = (term, summed, *reference._all_options(**named))
    given: tuple[Any, ...] = (mu, scale, key, loc, of_prior)
    z, total = reference.head(*given, *rest)
    compare_results(triton_kernels.head(*given, *rest), (z, total))
    grad_z = None if key is None else inputs(*z.shape, dtype=z.dtype, seed=3)[0]
    given = (*given, grad_z, inputs(*total.shape, dtype=total.dtype, seed=4)[0])
    compare_results(
        triton_kernels.head_backward(*given, *rest), reference.head_backward(*given, *rest)
    )


def main() -> None:
    interpreter.InterpreterBuilder.create_fma = create_fma
    dtype = torch.float64
    mu, scale = inputs(4, 21, dtype=dtype)
    loc, prior = inputs(4, 21, dtype=dtype, seed=5)
    near = scale * (1 + 1e-6)  # where a ratio less 1 would cancel
    for form in FORMS:
        for term in ("kl_divergence", "log_prob", "tanh_log_prob"):
            compare(mu, scale, KEY, term=term, form=form)
        for bounds in (None, (-math.inf, 1e-300, 0.1)):
            compare(
                mu, scale, None, loc, near,
                form=form, bounds=bounds, prior_form=form, prior_bounds=bounds,
            )  # fmt: skip
        compare(mu, scale, KEY, loc, prior, form="std", prior_form=form)
    for n in (1, 2, 255, 256, 257, 1025, 2600):
        compare(*inputs(3, n, dtype=dtype, seed=n), KEY, term="log_prob")
    compare(mu, scale, KEY, term="log_prob", samples=3, summed=0)
    compare(mu, scale, reparam_fused.split(KEY, 4), term="log_prob")
    compare(mu, scale, KEY, global_shape=(9, 30), global_offset=(2, 5))
    compare(mu.t(), scale.t(), KEY, summed=2)
    compare(mu.float(), scale.float(), KEY, loc.float(), prior.float(), prior_form="rho")
    # What is added up in float64 has the order of the contract too.
    terms, _ = inputs(2, 1030, dtype=dtype)
    total = torch.empty(2, dtype=dtype)
    triton_head._add_up(terms, total)
    assert torch.equal(total, reference.sum_rows(terms, 2))
    print("compared")


if __name__ == "__main__":
    main()
