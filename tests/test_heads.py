"""A sample and the sum of its divergence or of its log-density, from one pass."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from helpers import FORMS, assert_as_on_cpu, assert_same_bits, extremes, inputs, key_of, leaves
from test_forms import OPTIONS, eager_std, operands
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

import reparam_fused
from reparam_fused import (
    _ops,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
    reference,
)

KEY = key_of(31, 2**32 - 3)
BOUNDED = (-0.75, 0.5, 0.125)
LOG_2 = math.log(2)


def leave_to_the_cpu(device: torch.device, few: bool) -> None:
    """On the stand-in each of many cases is compiled and interpreted: there are few for it."""
    if device.type == "cuda" and not few:
        pytest.skip("the stand-in is slow; test_cuda_head and test_triton_head have the others")


def head_and_gradients(
    tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What the ops give on the device and what reference.py gives, for incoming gradients."""
    expected = reference.head(*tensors, *options)  # type: ignore[arg-type]
    given = [None if t is None else t.to(device) for t in tensors]
    actual = _ops.head(*given, *options)
    z, total = expected
    grad_z, grad_total = (inputs(*t.shape, seed=s)[0].to(t.dtype) for s, t in ((4, z), (5, total)))
    grads: list[Tensor | None] = [None if tensors[2] is None else grad_z, grad_total]
    expected += reference.head_backward(*tensors, *grads, *options)  # type: ignore[arg-type]
    actual += _ops.head_backward(
        *given, *(None if g is None else g.to(device) for g in grads), *options
    )
    return list(zip(actual, expected, strict=True))


def assert_bits(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for actual, expected in pairs:
        assert actual.is_contiguous()
        if expected.dtype == torch.float64:
            torch.testing.assert_close(
                actual.cpu(), expected, rtol=2e-12, atol=2e-12, equal_nan=True
            )
        else:
            assert_as_on_cpu(actual, expected)


CASES: dict[str, tuple[str, str | None, bool]] = {
    # the term, the form of a prior, and whether there is a sample
    "kl": ("kl_divergence", None, True),
    "kl alone": ("kl_divergence", None, False),
    "kl from log_var": ("kl_divergence", "log_var", True),
    "kl from std": ("kl_divergence", "std", True),
    "kl alone from log_std": ("kl_divergence", "log_std", False),
    "log_prob": ("log_prob", None, True),
    "tanh": ("tanh_log_prob", None, True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [None, BOUNDED], ids=["free", "bounded"])
def test_bits_are_those_of_the_reference(
    case: tuple[str, str | None, bool],
    form: str,
    bounds: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Of z, the sums and every gradient, whatever the row is."""
    term, prior, draws = case
    few = dtype in (torch.float32, torch.bfloat16) and (form, bounds) in (
        ("log_var", None),
        ("rho", BOUNDED),
    )
    leave_to_the_cpu(device, few)
    shapes = ((9, 20), (2, 130), (5, 1), (7, 3))
    for rows, n in shapes[:2] if device.type == "cuda" else shapes:
        mu, scale = inputs(rows, n, dtype=dtype)
        loc, of_prior = inputs(rows, n, dtype=dtype, seed=2) if prior else (None, None)
        key = KEY if draws else None
        options = (term, 1, form, prior or "std", None, None, bounds, None)
        assert_bits(head_and_gradients((mu, scale, key, loc, of_prior), options, device))


@pytest.mark.parametrize("n", [2047, 2048, 2049, 4097, 9001])
@pytest.mark.parametrize("term", ["kl_divergence", "tanh_log_prob"])
def test_bits_of_long_rows(n: int, term: str, dtype: torch.dtype, device: torch.device) -> None:
    """Where a chunk ends, and of more than one."""
    leave_to_the_cpu(device, n == 2049 and dtype == torch.float32)
    options = (term, 1)
    assert_bits(head_and_gradients((*inputs(2, n, dtype=dtype), KEY, None, None), options, device))


@pytest.mark.parametrize("keys", ["one", "rows", "elements", "block", "samples", "every sample"])
@pytest.mark.parametrize("term", ["kl_divergence", "log_prob"])
def test_bits_by_how_noise_is_numbered(keys: str, term: str, device: torch.device) -> None:
    mu, scale = inputs(6, 10)
    key: Tensor = {
        "rows": reparam_fused.split(KEY, 6),
        "elements": reparam_fused.split(KEY, 60).view(6, 10, 2),
        "every sample": reparam_fused.split(KEY, 3),
        "samples": reparam_fused.split(KEY, 6)[None],
    }.get(keys, KEY)
    block = ((11, 23), (3, 7)) if keys == "block" else (None, None)
    samples = 3 if "sample" in keys else None
    if samples is not None and term == "kl_divergence":
        with pytest.raises(RuntimeError, match="samples"):
            _ops.head(mu, scale, key, None, None, term, 1, "rho", "std", *block, None, None, 3)
        return
    options = (term, 1, "rho", "std", *block, None, None, samples)
    assert_bits(head_and_gradients((mu, scale, key, None, None), options, device))


@pytest.mark.parametrize("summed", [0, 1, 2, 3])
def test_bits_by_how_operands_lie(summed: int, device: torch.device) -> None:
    """Broadcast, transposed, with gaps, or from within a vector on."""
    mu, scale = inputs(4, 5, 6)
    views: dict[str, tuple[Tensor, Tensor]] = {
        "row": (mu, scale[0, 0]),
        "column": (mu, scale[:, :, :1]),
        "one": (mu, scale[0, 0, 0]),
        "transposed": (mu.transpose(0, 2), scale.transpose(0, 2)),
        "halves": (mu[..., :3], scale[..., 3:]),
        "within": (inputs(121)[0][1:].view(4, 5, 6), scale),
    }
    for a, b in views.values():
        given = (a, b, KEY, a.mul(0.5), b)
        options = ("kl_divergence", summed, "log_std", "rho")
        assert_bits(head_and_gradients(given, options, device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prior", [None, "log_var", "std"])
def test_extremes(form: str, prior: str | None, dtype: torch.dtype) -> None:
    """Every edge of the scale, of mu and of the prior's: with the bits of the reference."""
    scale = extremes(dtype)
    for term in _ops.TERMS if prior is None else _ops.TERMS[:1]:
        for mu in (torch.ones_like(scale), scale.flip(0)):
            others = (mu.flip(0), scale.roll(3)) if prior else (None, None)
            options = (term, 0, form, prior or "std")
            pairs = head_and_gradients((mu, scale, KEY, *others), options, torch.device("cpu"))
            if dtype != torch.float64:
                assert_bits(pairs)


def eager_head(
    form: str, mu: Tensor, scale: Tensor, eps: Tensor, term: str, dim: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """By torch.distributions, with given noise; validated, none of its own is negative."""
    std = eager_std(form, scale, options)
    z = mu + std * eps
    q = Normal(mu, std, validate_args=False)
    if term == "kl_divergence":
        prior = options.get("prior") or Normal(torch.zeros_like(mu), torch.ones_like(mu))
        terms = kl_divergence(q, Normal(prior.loc, prior.scale, validate_args=False))
        terms = terms.expand(torch.broadcast_shapes(mu.shape, scale.shape))
    else:
        terms = q.log_prob(z)
    if term == "tanh_log_prob":
        terms = terms - 2 * (LOG_2 - z - softplus(-2 * z, threshold=800))
        z = torch.tanh(z)
    if dim != ():
        n = max(mu.dim(), scale.dim())
        dims = (
            range(n)
            if dim is None
            else [d % n - n for d in ([dim] if isinstance(dim, int) else dim)]
        )
        terms = terms.sum([d if d < 0 else d - n for d in dims])
    return z, terms


def fused(
    term: str, form: str, options: dict[str, Any]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def call(mu: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {form: scale, "key": KEY.to(mu.device), **options}
        if term == "kl_divergence":
            return fused_reparameterize_kl(mu, **given)
        return fused_reparameterize_log_prob(mu, tanh=term == "tanh_log_prob", **given)

    return call


@pytest.mark.parametrize("term", _ops.TERMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [OPTIONS["free"], OPTIONS["both"]], ids=["free", "both"])
@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)], ids=str)
def test_values_and_gradients_are_those_of_the_eager_line(
    both_paths: str,
    term: str,
    form: str,
    options: dict[str, Any],
    sample_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    leave_to_the_cpu(
        device, both_paths == "op" and form == "log_var" and options == {} and sample_shape == ()
    )
    for shapes, dim in (
        (((2, 3),), -1), (((2, 3),), None), (((2, 3), (2, 1)), 0), (((2, 3), (3,)), (0, 1)),
        (((3,), (2, 3)), ()), (((2, 3, 2),), (0, 2)),
    ):  # fmt: skip
        mu, scale = (t.detach().to(device).requires_grad_() for t in operands(form, *shapes))
        one = torch.broadcast_shapes(*shapes)
        eps = reparam_fused.noise(KEY, (*sample_shape, *one), dtype=torch.float64).to(device)
        given = {**options, "dim": dim, "sample_shape": sample_shape}
        actual = fused(term, form, given)(mu, scale)
        expected = eager_head(form, mu, scale, eps, term, dim, options)
        if term == "kl_divergence":
            assert actual[1].shape == expected[1].shape
        grads = []
        for result in (actual, expected):
            incoming = [inputs(*t.shape, dtype=t.dtype, seed=6)[0].to(device) for t in result]
            grads.append(torch.autograd.grad(result, (mu, scale), incoming))
        for ours, theirs in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def parameters_of_prior(*shape: int) -> tuple[Tensor, Tensor]:
    """Others than those of the sample, of which every difference would be 0."""
    loc, scale = inputs(*shape, dtype=torch.float64, seed=11)
    return loc.requires_grad_(), scale.requires_grad_()


PRIORS: dict[str, Callable[[Tensor, Tensor], Normal]] = {
    "numbers": lambda loc, scale: Normal(0.25, 1.5),
    "std": lambda loc, scale: Normal(loc, scale.abs() + 0.5),
    "ours by std": lambda loc, scale: reparam_fused.Normal(loc, scale.abs() + 0.5),
    "log_var": lambda loc, scale: reparam_fused.Normal(loc, log_var=scale),
    "log_std": lambda loc, scale: reparam_fused.Normal(loc, log_std=scale, clamp=(-0.5, 0.5)),
    "rho": lambda loc, scale: reparam_fused.Normal(loc, rho=scale, min_std=0.1),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("form", FORMS)
def test_priors_of_each_kind(
    both_paths: str, prior: Callable[[Tensor, Tensor], Normal], form: str, device: torch.device
) -> None:
    """Their gradients too; loc and scale of a prior broadcast."""
    few = both_paths == "op" and form == "log_var" and prior in list(PRIORS.values())[::3]
    leave_to_the_cpu(device, few)
    mu, scale = (t.detach().to(device).requires_grad_() for t in operands(form, (4, 3)))
    loc, spread = (t.detach().to(device).requires_grad_() for t in parameters_of_prior(3))
    eps = reparam_fused.noise(KEY, (4, 3), dtype=torch.float64).to(device)
    inputs_of = (mu, scale, loc, spread)
    given = prior(loc, spread)
    results = [
        fused("kl_divergence", form, {"dim": 1, "prior": given})(mu, scale),
        eager_head(form, mu, scale, eps, "kl_divergence", 1, {"prior": given}),
        (eps, fused_kl_divergence(mu, dim=1, prior=given, **{form: scale})),
        (eps, fused_kl_divergence(mu, prior=given, **{form: scale}).sum(1)),
    ]
    grads = [
        torch.autograd.grad(total.square().sum(), inputs_of, allow_unused=True, retain_graph=True)
        for _, total in results
    ]
    for (_, total), found in zip(results, grads, strict=True):
        torch.testing.assert_close(total, results[1][1], rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(found, grads[1], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)


GRADCHECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("kl_divergence", {"dim": -1}),
    "kl of all, bounded": ("kl_divergence", {"dim": None, "clamp": (-1, 1), "min_std": 0.1}),
    "kl of rows, samples": ("kl_divergence", {"dim": 0, "sample_shape": (2,)}),
    "log_prob": ("log_prob", {"dim": -1}),
    "log_prob of elements, samples": ("log_prob", {"dim": (), "sample_shape": (2, 3)}),
    "tanh": ("tanh_log_prob", {"dim": -1, "clamp": (-1, 1), "min_std": 0.1}),
    "tanh, samples": ("tanh_log_prob", {"dim": 0, "sample_shape": (2,)}),
}


@pytest.mark.parametrize("case", GRADCHECKS.values(), ids=GRADCHECKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shapes", [((2, 3),), ((2, 3), (3,))], ids=["alike", "row"])
def test_gradcheck(
    case: tuple[str, dict[str, Any]], form: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    term, options = case
    call, given = fused(term, form, options), operands(form, *shapes)
    assert torch.autograd.gradcheck(call, given, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("prior", list(PRIORS.values())[1:], ids=list(PRIORS)[1:])
@pytest.mark.parametrize("form", ["log_var", "rho"])
def test_gradcheck_of_priors(prior: Callable[[Tensor, Tensor], Normal], form: str) -> None:
    def call(mu: Tensor, scale: Tensor, loc: Tensor, of_prior: Tensor) -> Tensor:
        given: dict[str, Any] = {form: scale}
        return fused_kl_divergence(mu, dim=-1, prior=prior(loc, of_prior), **given)

    given = (*operands(form, (2, 3)), *parameters_of_prior(2, 3))
    assert torch.autograd.gradcheck(call, given, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("prior", [None, *PRIORS.values()], ids=["none", *PRIORS])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_to_be_differentiated_are_the_same(
    prior: Callable[[Tensor, Tensor], Normal] | None, form: str
) -> None:
    """They are made of other ops, which second derivatives alone would not show to be right."""
    mu, scale = operands(form, (2, 3))
    loc, of_prior = parameters_of_prior(2, 3)
    for term in _ops.TERMS if prior is None else _ops.TERMS[:1]:
        options: dict[str, Any] = {"dim": -1, "clamp": (-1.0, 0.5), "min_std": 0.1}
        if prior is not None:
            options["prior"] = prior(loc, of_prior)
        results = fused(term, form, options)(mu, scale)
        incoming = [inputs(*t.shape, dtype=t.dtype, seed=6)[0] for t in results]
        once, again = (
            torch.autograd.grad(
                results,
                (mu, scale, loc, of_prior),
                incoming,
                retain_graph=True,
                create_graph=more,
                allow_unused=True,
            )
            for more in (False, True)
        )
        for a, b in zip(once, again, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("term", _ops.TERMS[1:])
def test_gradients_to_be_differentiated_where_sigma_is_0(term: str) -> None:
    """Of its logarithm there is one nevertheless; and of tanh where it is 1 to rounding."""
    mu = torch.full((3,), 19.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([-2000.0, -3.0, 1.0], dtype=torch.float64, requires_grad=True)
    results = fused(term, "log_var", {"dim": -1})(mu, scale)
    incoming = [torch.ones_like(results[0]) * 1e18, torch.ones_like(results[1])]
    once, again = (
        torch.autograd.grad(results, (mu, scale), incoming, retain_graph=True, create_graph=more)
        for more in (False, True)
    )
    assert once[1][0] == -0.5
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("term", _ops.TERMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(term: str, form: str, low: torch.dtype, device: torch.device) -> None:
    """Against float64 on the same numbers, of 300 rows of 40: the sum is float32 to rounding, and
    z and the gradients are rounded once."""
    leave_to_the_cpu(device, form == "rho" and low != torch.float16)
    shape = (30, 40) if device.type == "cuda" else (300, 40)
    mu, scale = (t.detach().to(low) for t in operands(form, shape))
    eps = reparam_fused.noise(KEY, shape, dtype=low).double() if low == torch.float32 else None
    if eps is None:
        eps = reparam_fused.noise(KEY, shape, dtype=torch.float32).double()
    exact = [t.double().requires_grad_() for t in (mu, scale)]
    given = [t.to(device).requires_grad_() for t in (mu, scale)]
    actual = fused(term, form, {"dim": 1})(*given)
    expected = eager_head(form, *exact, eps, term, 1, {})
    assert actual[1].dtype == torch.float32
    incoming = [inputs(*t.shape, seed=6)[0] for t in expected]
    grads = torch.autograd.grad(
        actual, given, [g.to(t.dtype).to(device) for g, t in zip(incoming, actual, strict=True)]
    )
    exact_grads = torch.autograd.grad(
        expected, exact, [g.to(t.dtype).double() for g, t in zip(incoming, actual, strict=True)]
    )
    # Measured: 1.3e-6 of the sum of magnitudes
    size = expected[1].abs().clamp(min=10.0)
    assert ((actual[1].cpu().double() - expected[1]).abs() / size).max() < 3e-6
    unit = torch.finfo(low).eps
    for ours, theirs in zip((actual[0], *grads), (expected[0], *exact_grads), strict=True):
        scale_of = theirs.abs().clamp(min=1.0)
        error = ((ours.cpu().double() - theirs).abs() / scale_of).max().item()
        # half an ULP for the rounding, and of the arithmetic: 4.6e-6 at most, where terms cancel
        assert error < 0.51 * unit + 6e-6, (term, form, error)


@pytest.mark.parametrize("n", [1, 20, 2047, 2048, 2049, 100_000])
def test_sums_of_any_length(n: int) -> None:
    """Against float64. Measured: 5e-7 of the sum, and less for the long rows."""
    mu, log_var = inputs(3, n)
    _, kl = fused_reparameterize_kl(mu, log_var, dim=1, key=KEY)
    exact = fused_kl_divergence(mu.double(), log_var.double()).sum(1)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=1e-7)
    _, log_prob = fused_reparameterize_log_prob(mu, log_var, dim=1, key=KEY)
    eps = reparam_fused.noise(KEY, (3, n)).double()
    terms = -0.5 * eps.square() - 0.5 * log_var.double() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob.double(), terms.sum(1), rtol=1e-6, atol=1e-6 * math.sqrt(n))


def test_sums_of_many_short_rows(dtype: torch.dtype) -> None:
    """As many as a block has, of every length that is filled up to whole vectors: memory for fewer
    of them, in sums.h, is written beyond its end, which ends the process."""
    for n in range(1, 67):
        mu, scale = inputs(2 * 2048 // n + 3, n, dtype=dtype)
        given = (mu, scale, None, None, None, "kl_divergence", 1)
        assert_bits([(_ops.head(*given)[1], reference.head(*given)[1])])


def test_order_of_a_sum() -> None:
    """That of the contract, on sums that any other order has otherwise: 2^24 swallows a 1 that is
    added to it alone, and not a sum of two."""
    big = 2.0**24
    terms = torch.zeros(2048)
    terms[[0, 512]] = torch.tensor([big, -big])  # strides first: 0 and 512 meet
    terms[1] = 1.0
    assert reference.sum_rows(terms, 4) == 1.0
    terms = torch.zeros(2048)
    terms[[0, 2]] = torch.tensor([big, 1.0])  # then the halves of a vector: 0 and 2
    terms[1] = -big
    assert reference.sum_rows(terms, 4) == 0.0
    terms[[1, 2]] = torch.tensor([1.0, -big])
    assert reference.sum_rows(terms, 4) == 1.0
    assert not torch.signbit(reference.sum_rows(torch.tensor([-0.0]), 4))


def test_nothing_moves_the_bits_of_a_sum() -> None:
    """Neither threads nor the rest of the batch."""
    threads = torch.get_num_threads()
    for n in (20, 5000):
        mu, log_var = inputs(50, n)
        keys = reparam_fused.split(KEY, 50)
        whole = fused_reparameterize_kl(mu, log_var, dim=1, key=keys)
        part = fused_reparameterize_kl(mu[7:9], log_var[7:9], dim=1, key=keys[7:9])
        for a, b in zip(whole, part, strict=True):
            assert_same_bits(a[7:9], b)
        try:
            torch.set_num_threads(1)
            alone = fused_reparameterize_kl(mu, log_var, dim=1, key=keys)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(whole, alone, strict=True):
            assert_same_bits(a, b)


def test_a_thread_of_a_small_stack(dtype: torch.dtype) -> None:
    """512 KiB, as threads have on some systems."""
    mu, log_var = inputs(64, 100, dtype=dtype)
    expected = fused_reparameterize_kl(mu, log_var, dim=-1, key=KEY)
    results: list[Tensor] = []

    def run() -> None:
        leaves = [t.detach().requires_grad_() for t in (mu, log_var)]
        z, kl = fused_reparameterize_kl(*leaves, dim=-1, key=KEY)
        torch.autograd.grad((z.sum() + kl.sum()), leaves)
        results.extend((z.detach(), kl.detach()))

    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    for a, b in zip(results, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("z", [20.0, -20.0, 50.0, -50.0])
def test_saturated_tanh(z: float, dtype: torch.dtype) -> None:
    """The action is 1, its density right, and so are the gradients, where 1 - tanh^2 is 0."""
    mu = torch.full((4,), z, dtype=dtype, requires_grad=True)
    log_std = torch.full((4,), -3.0, dtype=dtype, requires_grad=True)
    a, log_prob = fused_reparameterize_log_prob(mu, log_std=log_std, dim=(), tanh=True, key=KEY)
    exact = [t.detach().double().requires_grad_() for t in (mu, log_std)]
    eps = reparam_fused.noise(KEY, (4,), dtype=torch.float32).double()
    if dtype == torch.float64:
        eps = reparam_fused.noise(KEY, (4,), dtype=dtype)
    expected = eager_head("log_std", *exact, eps, "tanh_log_prob", (), {})
    assert (a == math.copysign(1.0, z)).all()
    torch.testing.assert_close(log_prob.double(), expected[1], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(log_prob.sum(), (mu, log_std))
    exact_grads = torch.autograd.grad(expected[1].sum(), exact)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-5
        )
    assert (grads[0].double() - 2 * math.copysign(1.0, z)).abs().max() < 1e-6


def test_nan_and_infinity_stay_in_their_row(device: torch.device) -> None:
    mu, log_var = (t.to(device) for t in inputs(4, 20))
    mu[1, 3], log_var[2, 5] = math.nan, math.inf
    z, kl = fused_reparameterize_kl(mu, log_var, dim=1, key=KEY.to(device))
    assert kl.isnan().tolist() == [False, True, False, False]
    assert kl[2] == math.inf
    assert z.isfinite().sum() == 78


def test_an_infinite_prior_and_one_of_no_width() -> None:
    """Both are infinitely far, as from a sigma of 0."""
    mu, one = torch.tensor([0.0, 1.0]), torch.ones(2)
    for sigma in (math.inf, 0.0):
        prior = Normal(torch.tensor([2.0, 3.0]), torch.tensor(sigma), validate_args=False)
        assert fused_kl_divergence(mu, std=one, prior=prior).tolist() == [math.inf] * 2
    for sigma in (1.0, 1e-30, 1e-45, 3e38):
        assert fused_kl_divergence(mu, std=0.0, prior=Normal(0.0, sigma)).tolist() == [math.inf] * 2
    equal = mu.clone().requires_grad_()
    prior = Normal(mu, torch.tensor(0.0), validate_args=False)
    kl = fused_kl_divergence(equal, std=one, prior=prior)
    assert kl.tolist() == [math.inf] * 2
    assert torch.autograd.grad(kl.sum(), equal)[0].tolist() == [0.0] * 2


def exact_divergence(
    operands: tuple[Tensor, ...], logs: tuple[bool, bool]
) -> tuple[list[float], list[list[float]]]:
    """From a prior, of (mu, scale, loc, prior's scale), each scale a log_var or a std, with the
    gradients: of 60 digits."""
    values, grads = [], []
    with mpmath.workdps(60):
        for row in zip(*(t.tolist() for t in operands), strict=True):
            mu, scale, loc, prior = map(mpmath.mpf, row)
            s, t = (
                mpmath.exp(x / 2) if log else x for x, log in zip((scale, prior), logs, strict=True)
            )
            d, square = (mu - loc) / t, (s / t) ** 2 - 1
            values.append(float((d * d + square) / 2 - mpmath.log(s / t)))
            by_scales = [
                slope / 2 if log else slope / x
                for slope, x, log in zip((square, -d * d - square), (s, t), logs, strict=True)
            ]
            grads.append([float(x) for x in (d / t, by_scales[0], -d / t, by_scales[1])])
    return values, [list(g) for g in zip(*grads, strict=True)]


# Mean, scale, mean and scale of a prior, where a factor of the formula is beyond float32
FAR_BY_LOG = [
    (0.5, -200.0, 0.5, -200.0),  # the inverse of the prior's sigma
    (0.5, -210.0, 0.5, -209.0),
    (0.5, -180.0, 0.5, -200.0),
    (1e-38, -280.0, 0.0, -200.0),
    (1e-45, -280.0, 0.0, -260.0),
    (-1.0, -400.0, -1.0, -400.5),
    (2.0, -400.0, 2.0, 3.0),  # the ratio
    (2.0, -300.0, 1.0, 300.0),
]
FAR_BY_STD = [
    (0.5, 1e-30, 0.5, 1e15),
    (0.5, 1e-30, 0.25, 3e9),  # a denormal ratio
    (0.5, 1e-40, 0.5, 3e38),
    (0.5, 1e-45, 3.0, 3e38),
    (0.5, 1e-45, 0.5, 1.0),
    (0.5, 1e-40, 0.5, 3e-40),
    (1.0, 3e-45, 1.0, 3e-45),
    (1.0, 3e37, -1.0, 1e38),
    (0.5, 0.7, 0.5, 1.0),
    (0.5, 1.45, 0.5, 1.0),
]


FAR = {
    ("log_var", "log_var"): FAR_BY_LOG,
    ("std", "std"): FAR_BY_STD,
    ("log_var", "std"): [(0.5, -160.0, 0.5, 1e15), (0.5, -160.0, 1.0, 1e3)],
    ("std", "log_var"): [(0.5, 1e-30, 0.5, 160.0), (0.5, 1e-38, 0.5, 1.0)],
}


@pytest.mark.parametrize("forms", FAR, ids="-".join)
@pytest.mark.parametrize("way", ["kernel", "reference", "samples", "again", "vmap"])
def test_divergence_where_a_factor_of_it_is_no_number(
    forms: tuple[str, str], way: str, device: torch.device
) -> None:
    """It and its gradients are those of real numbers: infinite only where these are beyond what
    there is, and never NaN."""
    leave_to_the_cpu(device, way == "kernel" and forms[0] == forms[1])
    rows, (form, prior_form) = FAR[forms], forms
    if way == "vmap":  # the gradients are those of torch's own formulas for these operations
        rows = [row for row in rows if row[3] not in (-260.0, 3e-45)]
    operands = tuple(torch.tensor(column) for column in zip(*rows, strict=True))
    values, exact_grads = exact_divergence(operands, (form == "log_var", prior_form == "log_var"))
    mu, scale, loc, of_prior = leaves = [t.to(device).requires_grad_() for t in operands]
    options = ("kl_divergence", 0, *forms)
    given: dict[str, Any] = {form: scale, "dim": ()}
    of = {"log_var" if prior_form == "log_var" else "scale": of_prior}
    prior = reparam_fused.Normal(loc, validate_args=False, **of)
    grads: tuple[Tensor, ...]
    if way == "reference":
        tensors = (*operands[:2], None, *operands[2:])
        total = reference.head(*tensors, *options)[1]
        grads = reference.head_backward(*tensors, None, torch.ones_like(total), *options)
    elif way == "vmap":

        def call(*leaves: Tensor) -> Tensor:
            return _ops.head(*leaves[:2], None, *leaves[2:], *options)[1]

        total = torch.vmap(call)(*leaves)
        grads = torch.func.grad(lambda *t: torch.vmap(call)(*t).sum(), (0, 1, 2, 3))(*leaves)
    else:
        if way == "samples":
            total = fused_reparameterize_kl(mu, prior=prior, key=KEY.to(device), **given)[1]
        else:
            total = fused_kl_divergence(mu, prior=prior, **given)
        grads = torch.autograd.grad(total.sum(), leaves, create_graph=way == "again")
    if way != "reference":
        total, grads = total.detach().cpu(), tuple(g.detach().cpu() for g in grads)
    rtol = 1e-5 if way == "vmap" or way == "again" else 2e-6
    exact = torch.tensor(values, dtype=torch.float64).float()
    torch.testing.assert_close(total, exact, rtol=rtol, atol=0.0)
    for ours, theirs in zip((grads[0], grads[1], grads[2], grads[3]), exact_grads, strict=True):
        expected = torch.tensor(theirs, dtype=torch.float64).float()
        assert not ours.isnan().any(), ours
        # A gradient may be infinite where a product on the way is.
        finite = ours.isfinite() | expected.isinf()
        assert (finite | (expected.abs() > 1e30)).all(), (ours, expected)
        torch.testing.assert_close(ours[finite], expected[finite], rtol=1e-4, atol=1e-6)


def test_tanh_of_zero() -> None:
    for std in (0.0, -0.0):
        a, _ = fused_reparameterize_log_prob(
            torch.zeros(4), std=torch.full((4,), std), dim=(), tanh=True, key=KEY
        )
        assert (a == 0).all()
        assert not torch.signbit(a).any()


def test_half_is_finite_wherever_the_sum_is() -> None:
    """Of 4096 terms of about 40: beyond what a float16 holds."""
    mu = torch.full((2, 4096), 9.0, dtype=torch.float16, requires_grad=True)
    _, kl = fused_reparameterize_kl(mu, torch.zeros_like(mu), dim=1, key=KEY)
    assert kl.tolist() == [4096 * 40.5] * 2
    (grad,) = torch.autograd.grad(kl.sum(), mu)
    assert (grad == 9.0).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("term", _ops.TERMS)
def test_empty(term: str, shape: tuple[int, ...], device: torch.device) -> None:
    """A sum of nothing is 0, and its gradients are empty."""
    mu, log_var = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    for dim in (-1, None, ()):
        state = torch.get_rng_state()
        z, total = fused(term, "log_var", {"dim": dim, "key": None})(mu, log_var)
        assert torch.equal(torch.get_rng_state(), state)
        assert z.shape == shape
        assert (
            total.shape == torch.zeros(shape).sum(dim if dim != () else [-9][:0] or None).shape
            or dim == ()
        )
        assert (total == 0).all()
        for grad in torch.autograd.grad((z.sum() + total.sum()), (mu, log_var)):
            assert grad.shape == shape


@pytest.mark.parametrize("by_log", [True, False], ids=["log", "std"])
def test_digits_near_equality(by_log: bool) -> None:
    """Of two normals that differ by some millionths: 1e-5 of the divergence, where the formula has
    none of its digits."""
    torch.manual_seed(0)
    loc, log_var = torch.randn(1000), torch.randn(1000)
    mu = loc * (1 + 2.0**-18 * torch.randint(-8, 9, (1000,)))
    std = torch.exp(0.5 * log_var)
    if by_log:
        scale = log_var + 2.0**-16 * torch.randint(-8, 9, (1000,))
        kl = fused_kl_divergence(mu, scale, prior=reparam_fused.Normal(loc, log_var=log_var))
        s, t = (torch.exp(0.5 * x.double()) for x in (scale, log_var))
    else:
        scale = std * (1 + 2.0**-16 * torch.randint(-8, 9, (1000,)))
        kl = fused_kl_divergence(mu, std=scale, prior=Normal(loc, std))
        s, t = scale.double(), std.double()
    over = (s - t) / t
    exact = 0.5 * ((mu.double() - loc.double()) / t) ** 2 + (
        over * over / 2 + over - torch.log1p(over)
    )
    assert ((kl.double() - exact).abs() <= 1e-5 * exact + 1e-18).all()


@pytest.mark.parametrize("term", _ops.TERMS)
def test_samples_are_those_of_fused_reparameterize(
    both_paths: str, term: str, device: torch.device
) -> None:
    """By a key, by a seed, by a generator; and the generator moves on as far."""
    mu, log_var = (t.to(device) for t in inputs(6, 5))
    generator = torch.Generator(device).manual_seed(3)
    for options in ({"key": KEY.to(device)}, {"key": None}, {"key": None, "generator": generator}):
        states = []
        results = []
        for sample_shape in ((), (4,)):
            for draw in (
                lambda **o: fused_reparameterize(mu, log_var, **o),
                lambda **o: fused(term, "log_var", {"dim": -1, **o})(mu, log_var)[0],
            ):
                torch.manual_seed(5)
                generator.manual_seed(6)
                results.append(draw(sample_shape=sample_shape, **options))
                states.append((torch.get_rng_state(), generator.get_state()))
            z, of_head = results[-2:]
            if term == "tanh_log_prob":
                z = torch.tanh(z)
                torch.testing.assert_close(of_head, z, rtol=1e-6, atol=1e-7)
            else:
                assert_same_bits(of_head, z.cpu())
            for a, b in zip(*states[-2:], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("term", _ops.TERMS)
def test_either_result_may_be_unused(term: str, device: torch.device) -> None:
    mu, log_var = (t.to(device).requires_grad_() for t in inputs(3, 8))
    for which in (0, 1):
        result = fused(term, "log_var", {"dim": -1})(mu, log_var)[which]
        exact = [t.detach().double().requires_grad_() for t in (mu, log_var)]
        eps = reparam_fused.noise(KEY, (3, 8)).double().to(device)
        expected = eager_head("log_var", *exact, eps, term, -1, {})[which]
        grads = torch.autograd.grad(result.sum(), (mu, log_var), allow_unused=True)
        exact_grads = torch.autograd.grad(expected.sum(), exact, allow_unused=True)
        for ours, theirs in zip(grads, exact_grads, strict=True):
            ours = torch.zeros(3, 8, device=device) if ours is None else ours
            theirs = torch.zeros(3, 8, device=device) if theirs is None else theirs
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_backward_keeps_no_noise() -> None:
    """Inputs and a key: with the pass itself nothing else."""
    mu, log_var = (t.requires_grad_() for t in inputs(64, 64))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_reparameterize_kl(mu, log_var, dim=-1)
    assert {t.data_ptr() for t in saved if t.numel() > 2} == {mu.data_ptr(), log_var.data_ptr()}


@pytest.mark.parametrize("term", _ops.TERMS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(term: str, backend: str) -> None:
    """One node each way, with fresh noise for each call, and the gradients of eager."""
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    mu, log_var = (t.requires_grad_() for t in inputs(3, 8))

    def call(mu: Tensor, log_var: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return fused(term, "log_var", {"dim": -1, "key": key})(mu, log_var)

    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    z, _ = compiled(mu, log_var)
    assert not torch.equal(z, compiled(mu, log_var)[0])
    results = [f(mu, log_var, KEY) for f in (compiled, call)]
    grads = [torch.autograd.grad((a.square().sum() + b.sum()), (mu, log_var)) for a, b in results]
    for ours, theirs in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert_same_bits(ours, theirs)
    if backend == "inductor":
        return
    boxed = lambda graph, args: make_boxed_func(look(graph, args))  # noqa: E731
    torch.compiler.reset()
    counted = torch.compile(
        call, backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True
    )
    z, total = counted(mu, log_var)
    (z.sum() + total.sum()).backward()
    nodes = [
        str(n.target) for graph in graphs for n in graph.graph.nodes if "reparam" in str(n.target)
    ]
    assert sorted(nodes) == [
        "reparam_fused.draw_key.default",
        "reparam_fused.head.default",
        "reparam_fused.head_backward.default",
    ]


def test_export() -> None:
    class Encoder(torch.nn.Module):
        def forward(self, mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
            return fused_reparameterize_kl(mu, log_var, dim=-1)

    program = torch.export.export(Encoder(), inputs(3, 8))
    _, kl = program.module()(*inputs(3, 8))
    assert_same_bits(kl, fused_reparameterize_kl(*inputs(3, 8), dim=-1)[1])


def test_traced_programs_have_the_eager_line() -> None:
    """torch.jit.trace and ONNX, whose programs run without this package."""
    mu, log_var = inputs(3, 8)
    for term in _ops.TERMS:
        traced = torch.jit.trace(
            lambda m, s, term=term: fused(term, "log_var", {"dim": -1, "key": None})(m, s),
            (mu, log_var),
            check_trace=False,
        )
        assert "reparam_fused::" not in str(traced.graph)
        torch.manual_seed(0)
        z, total = traced(mu, log_var)
        torch.manual_seed(0)
        eps = torch.randn_like(mu)
        expected = eager_head("log_var", mu, log_var, eps, term, -1, {})
        torch.testing.assert_close(z, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total, expected[1], rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    """The sum is float32, z of the dtype that fused_reparameterize gives."""
    mu, log_var = inputs(3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z, kl = fused_reparameterize_kl(mu, log_var, dim=-1, key=KEY)
        alone = fused_reparameterize(mu, log_var, key=KEY)
    assert kl.dtype == torch.float32
    assert_same_bits(z, alone)


@pytest.mark.parametrize("term", _ops.TERMS)
def test_vmap_and_torch_func(term: str) -> None:
    """Over examples with keys of their own, and jacfwd equal to jacrev."""
    mu, log_var = (t.detach() for t in leaves(4, 3))
    keys = reparam_fused.split(KEY, 4)

    def call(mu: Tensor, log_var: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return fused(term, "log_var", {"dim": -1, "key": key})(mu, log_var)

    together = torch.vmap(call)(mu, log_var, keys)
    apart = [call(mu[i], log_var[i], keys[i]) for i in range(4)]
    for i, result in enumerate(together):
        torch.testing.assert_close(
            result, torch.stack([a[i] for a in apart]), rtol=1e-12, atol=1e-12
        )
    forward = torch.func.jacfwd(call, argnums=(0, 1))(mu[0], log_var[0], KEY)
    reverse = torch.func.jacrev(call, argnums=(0, 1))(mu[0], log_var[0], KEY)
    for a, b in zip(forward, reverse, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_dtypes_of_mu_and_scale_may_differ(both_paths: str) -> None:
    """Promoted as torch.add has it; the divergence of each element is of that dtype."""
    prior = Normal(0.25, 1.5)
    for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        mu, log_var = inputs(3, 8)[0].to(a), inputs(3, 8)[1].to(b)
        for x, y in ((mu, log_var), (mu, log_var[0, 0]), (mu[0, 0], log_var)):
            dtype = torch.result_type(x, y)
            kl = fused_kl_divergence(x, y, prior=prior)
            assert kl.dtype == dtype
            z, total = fused_reparameterize_kl(x, y, dim=None, key=KEY, prior=prior)
            assert z.dtype == dtype
            torch.testing.assert_close(total.double(), kl.double().sum(), rtol=2e-2, atol=0.0)


def test_a_prior_of_more_digits() -> None:
    """z keeps its dtype, the divergence is computed in the prior's."""
    mu, log_var = inputs(3, 8, dtype=torch.bfloat16)
    loc, std = torch.randn(8), torch.rand(8) + 0.5
    z, kl = fused_reparameterize_kl(mu, log_var, dim=-1, key=KEY, prior=Normal(loc, std))
    assert z.dtype == torch.bfloat16
    exact = kl_divergence(Normal(mu.double(), torch.exp(0.5 * log_var.double())),
                          Normal(loc.double(), std.double())).sum(-1)  # fmt: skip
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 2}, IndexError, "dim must be in the range of [-2, 1]"),
        ({"dim": (0, -2)}, RuntimeError, "dim must name each dimension once, got (0, -2)"),
        ({"dim": "all"}, TypeError, "dim must be an int, a sequence of ints or None, got 'all'"),
        ({"dim": True}, TypeError, "got True"),
        (
            {"dim": 1, "prior": 1.0},
            TypeError,
            "prior must be torch.distributions.Normal, not float",
        ),
        ({"dim": 1, "prior": Normal(torch.zeros(4), 1.0)}, RuntimeError, "the shape of prior must"),
        ({"dim": 1, "key": KEY, "generator": torch.Generator()}, ValueError, "key or generator"),
        ({"dim": 1, "min_std": -1}, ValueError, "min_std"),
        ({"dim": 1, "log_std": torch.zeros(3)}, ValueError, "expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Named, before the generator moves."""
    state = torch.get_rng_state()
    mu, log_var = inputs(2, 3)
    with pytest.raises(error, match="fused_reparameterize_kl.*" + re.escape(message)):
        fused_reparameterize_kl(mu, log_var, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_of_the_op(device: torch.device) -> None:
    """What memory hangs on."""
    mu, log_var = (t.to(device) for t in inputs(2, 3))
    given, key = (mu, log_var), KEY.to(device)
    for arguments, message in (
        ((*given, key, None, None, "entropy", 1), "expected term"),
        ((*given, key, None, None, "log_prob", 3), "expected summed to be 0 to 2"),
        ((*given, key, None, None, "log_prob", -1), "expected summed to be 0 to 2"),
        ((*given, None, None, None, "log_prob", 1), "key"),
        ((*given, key, mu, None, "kl_divergence", 1), "loc and prior"),
        ((*given, key, mu, mu, "log_prob", 1), "loc and prior"),
        ((*given, key, mu[:, :2], mu, "kl_divergence", 1), "broadcast"),
        ((*given, key, mu.double(), mu, "kl_divergence", 1), "dtype|float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _ops.head(*arguments)
    grad = torch.zeros(2, device=device)
    for grad_z, grad_total in (
        (None, grad),
        (mu, grad[:1]),
        (mu, grad.double()),
        (mu[:1, :1].expand(3, 3), grad),
    ):
        with pytest.raises(RuntimeError, match=r"grad|broadcasts"):
            _ops.head_backward(*given, key, None, None, grad_z, grad_total, "kl_divergence", 1)
