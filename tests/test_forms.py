"""Every form of the scale, within bounds and without, against the eager line in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    FORMS,
    assert_as_on_cpu,
    assert_same_bits,
    extremes,
    inputs,
    key_of,
)
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import softplus

import reparam_fused
from reparam_fused import (
    _ops,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_log_prob,
    reference,
)

KEY = key_of(29, 2**33 + 1)
STD: dict[str, Callable[[Tensor], Tensor]] = {
    "log_var": lambda x: torch.exp(0.5 * x),
    "std": lambda x: x,
    "log_std": torch.exp,
    "rho": lambda x: softplus(x, threshold=800),  # of float64: exact where torch's own is not
}
OPTIONS: dict[str, dict[str, Any]] = {
    "free": {},
    "clamped": {"clamp": (-0.75, 0.5)},
    "clamped below": {"clamp": (-0.25, None)},
    "clamped above": {"clamp": (None, 0.5)},
    "raised": {"min_std": 0.125},
    "both": {"clamp": (-0.75, 0.5), "min_std": 0.1},
}
each_form = pytest.mark.parametrize("form", FORMS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# As ops have them
BOUNDS = [None, (-1.0, 2.0, 0.0), (-math.inf, 1.5, 0.25), (0.5, math.inf, 0.0)]
each_bounds = pytest.mark.parametrize("bounds", BOUNDS, ids=["free", "clamped", "both", "below"])


def eager_std(form: str, scale: Tensor, options: dict[str, Any]) -> Tensor:
    if "clamp" in options:
        scale = scale.clamp(*options["clamp"])
    return STD[form](scale) + options.get("min_std", 0.0)


def eager(
    form: str, mu: Tensor, scale: Tensor, eps: Tensor, options: dict[str, Any] = OPTIONS["free"]
) -> Tensor:
    return mu + eager_std(form, scale, options) * eps


def eager_kl(
    form: str, mu: Tensor, scale: Tensor, options: dict[str, Any] = OPTIONS["free"]
) -> Tensor:
    std = eager_std(form, scale, options)
    return 0.5 * (mu.square() + std.square() - 1) - std.log()


def operands(
    form: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """mu and a scale of these shapes, for which gradients are wanted; a std is positive."""
    mu, _ = inputs(*shapes[0], dtype=dtype)
    scale, _ = inputs(*shapes[-1], dtype=dtype, seed=7)
    if form == "std":
        scale = scale.abs() + 0.125
    return mu.requires_grad_(), scale.requires_grad_()


@each_form
@each_option
def test_values_and_gradients_are_those_of_the_eager_line(
    both_paths: str, form: str, options: dict[str, Any], device: torch.device
) -> None:
    mu, scale = operands(form, (5, 8))
    grad, _ = inputs(5, 8, dtype=torch.float64, seed=3)
    eps = reparam_fused.noise(KEY, (5, 8), dtype=torch.float64)
    given = [t.detach().to(device).requires_grad_() for t in (mu, scale)]
    pairs = [
        (
            fused_reparameterize(given[0], **{form: given[1]}, key=KEY.to(device), **options),
            eager(form, mu, scale, eps, options),
        ),
        (
            fused_kl_divergence(given[0], **{form: given[1]}, **options),
            eager_kl(form, mu, scale, options),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-13, atol=1e-14)
        ours_grads = torch.autograd.grad(ours, given, grad.to(device))
        theirs_grads = torch.autograd.grad(theirs, (mu, scale), grad)
        for a, b in zip(ours_grads, theirs_grads, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-14)


@each_form
@each_option
@pytest.mark.parametrize("shapes", [((2, 3),), ((2, 3), (2, 1)), ((2, 3), (3,)), ((3,), (2, 3))])
def test_gradcheck(
    form: str, options: dict[str, Any], shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    few = form in ("log_var", "rho") and options in (OPTIONS["free"], OPTIONS["both"])
    if device.type == "cuda" and (len(shapes) > 1 or not few):
        pytest.skip("the interpreter is slow: gradients of all are compared with the eager line's")
    pair = [t.detach().to(device).requires_grad_() for t in operands(form, *shapes)]
    key = KEY.to(device)

    def sample(mu: Tensor, scale: Tensor) -> Tensor:
        return fused_reparameterize(mu, **{form: scale}, key=key, **options)

    def divergence(mu: Tensor, scale: Tensor) -> Tensor:
        return fused_kl_divergence(mu, **{form: scale}, **options)

    for call in (sample, divergence):
        assert torch.autograd.gradcheck(call, pair, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, pair)


@each_form
@each_bounds
def test_bits_are_those_of_the_reference(
    form: str, bounds: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """Over special values and the range of the type. float64 promises ULPs, of the noise too:
    where sigma is small its errors are."""
    x, mu = inputs(2_000, dtype=dtype, spread=1.0 if dtype == torch.float64 else 20.0)
    special = extremes(dtype)[: 0 if dtype == torch.float64 else None]
    scale = torch.cat([special, x])
    mu = torch.cat([torch.ones_like(special), mu])
    kept = None if form == "std" and bounds is None else scale
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("sample_from_key", (mu, scale, KEY, form, None, None, bounds)),
        ("sample_backward", (mu, kept, KEY, form, None, None, bounds)),
        ("kl_divergence", (mu, scale, form, bounds)),
        ("kl_divergence_backward", (mu, scale, form, bounds)),
    ]
    for name, arguments in calls:
        expected = getattr(reference, name)(*arguments)
        moved = [t.to(device) if isinstance(t, Tensor) else t for t in arguments]
        actual = getattr(_ops, name)(*moved)
        if dtype == torch.float64:
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-13, atol=1e-13)
        else:
            assert_same_bits(actual, expected)


@each_form
@pytest.mark.parametrize("low", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_against_float64(form: str, low: torch.dtype, device: torch.device) -> None:
    """No worse than one rounding to the dtype and the ULPs of float32 before it."""
    mu, scale = (t.detach() for t in operands(form, (20_000,), dtype=low))
    grad, _ = inputs(20_000, dtype=low, seed=4)
    eps = reparam_fused.noise(KEY, 20_000)
    given = [t.to(device).requires_grad_() for t in (mu, scale)]
    z = fused_reparameterize(given[0], **{form: given[1]}, key=KEY.to(device))
    _, ours = torch.autograd.grad(z, given, grad.to(device))
    exact = [t.double().requires_grad_() for t in (mu, scale)]
    line = eager(form, *exact, eps.double())
    _, theirs = torch.autograd.grad(line, exact, grad.double())
    rounding, tiny = torch.finfo(low).eps / 2, torch.finfo(low).smallest_normal
    # measured: the errors of sigma and of its derivative (softplus.h, sigma.h) and two roundings
    for actual, expected, ulps in ((z, line - exact[0], 4), (ours, theirs, 5)):
        total = line if actual is z else theirs
        budget = ulps * 2.0**-24 * expected.abs() + rounding * (total.abs() + tiny)
        if low == torch.float32 and actual is z:
            budget = budget + rounding * exact[0].abs()
        assert ((actual.detach().cpu().double() - total).abs() <= budget).all()


INF, NAN = math.inf, math.nan


@each_form
def test_edge_values(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """The ends of the range are infinity and 0, NaN stays in its element, and no gradient of a
    finite scale is NaN."""
    scale = torch.tensor([-INF, -1e4, 1e4, INF, NAN], dtype=dtype, device=device)
    mu = torch.ones(5, dtype=dtype, device=device)
    eps = reparam_fused.noise(KEY, 5, dtype=dtype)
    leaf = scale.clone().requires_grad_()
    z = fused_reparameterize(mu, **{form: leaf}, key=KEY.to(device))
    kl = fused_kl_divergence(mu, **{form: scale})
    (grad,) = torch.autograd.grad(z.sum(), leaf)
    large = STD[form](torch.tensor(1e4, dtype=torch.float64)).to(dtype)
    sigma = {
        "log_var": [0, 0, INF, INF, NAN],
        "log_std": [0, 0, INF, INF, NAN],
        "rho": [0, 0, large, INF, NAN],
        "std": [-INF, -1e4, 1e4, INF, NAN],
    }[form]
    expected = 1 + torch.tensor(sigma, dtype=torch.float64) * eps.double()
    torch.testing.assert_close(z.cpu(), expected.to(dtype), equal_nan=True)
    assert kl[4].isnan()
    assert kl[[0, 3]].isinf().all()
    assert (kl[:4] > 0).all()
    assert not grad[1:3].isnan().any()
    if form == "rho":
        assert grad[1] == 0
        assert grad[2] == eps[2]


@each_form
def test_the_gradient_of_a_clamp(form: str, device: torch.device) -> None:
    """0 outside, as inside at both ends, and 0 for NaN, whatever comes in."""
    values = [-2.0, -1.0, 0.0, 1.0, 2.0, INF, -INF, NAN]
    scale = torch.tensor(values, device=device, requires_grad=True)
    mu = torch.zeros(8, device=device)
    incoming = torch.tensor([INF, 1.0, 1.0, 1.0, NAN, 1.0, 1.0, 1.0], device=device)
    z = fused_reparameterize(mu, **{form: scale}, clamp=(-1, 1), key=KEY.to(device))
    kl = fused_kl_divergence(mu, **{form: scale}, clamp=(-1, 1))
    assert z[:7].isfinite().all()
    assert z[7].isnan()
    for result in (z, kl):
        (grad,) = torch.autograd.grad(result, scale, incoming)
        assert (grad[[0, 4, 5, 6, 7]] == 0).all()
    (grad,) = torch.autograd.grad(
        fused_reparameterize(mu, **{form: scale}, clamp=(-1, 1), key=KEY.to(device)).sum(), scale
    )
    free = scale.detach().requires_grad_()
    (inside,) = torch.autograd.grad(
        fused_reparameterize(mu, **{form: free}, key=KEY.to(device)).sum(), free
    )
    assert_same_bits(grad[1:4], inside[1:4].cpu())


@each_form
def test_the_gradient_at_an_end_of_a_clamp_is_one_in_every_way(form: str) -> None:
    """By the kernels and by torch's operations, whose own clamp has 0 there since torch 2.14."""
    ends = (0.5, 1.75)
    mu, scale = torch.zeros(2), torch.tensor(ends, requires_grad=True)

    def sums(scale: Tensor) -> Tensor:
        given: dict[str, Any] = {form: scale, "clamp": ends}
        z, log_q = fused_reparameterize_log_prob(mu, dim=-1, key=KEY, **given)
        kl = fused_kl_divergence(mu, dim=-1, prior=Normal(0.5, 2.0), **given)
        return z.sum() + log_q + kl

    (plain,) = torch.autograd.grad(sums(scale), scale)
    assert (plain != 0).all()
    (again,) = torch.autograd.grad(sums(scale), scale, create_graph=True)
    free = scale.detach()
    tangents = [torch.func.jvp(sums, (free,), (torch.eye(2)[i],))[1] for i in range(2)]
    for other in (again, torch.func.grad(sums)(free), torch.stack(tangents)):
        torch.testing.assert_close(other.detach(), plain, rtol=1e-5, atol=1e-6)


@each_form
def test_bounds_that_do_nothing_change_no_bit(form: str, device: torch.device) -> None:
    mu, scale = (t.detach().to(device) for t in operands(form, (300,), dtype=torch.float32))
    key = KEY.to(device)
    free = fused_reparameterize(mu, **{form: scale}, key=key).cpu()
    for clamp in ((-100, 100), (None, 100), (-100, None), (None, None), [-100, 100]):
        assert_same_bits(fused_reparameterize(mu, **{form: scale}, key=key, clamp=clamp), free)


@each_form
def test_a_number_is_a_scale(form: str, device: torch.device) -> None:
    mu, _ = inputs(40, device=device)
    key = KEY.to(device)
    for call in (
        lambda scale: fused_reparameterize(mu, **{form: scale}, key=key, clamp=(0.1, 2.0)),
        lambda scale: fused_kl_divergence(mu, **{form: scale}, min_std=0.5),
    ):
        assert_same_bits(call(0.75), call(torch.full_like(mu, 0.75)).cpu())


@each_form
def test_layouts(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """A scale that broadcasts is as one that is expanded, of rows with keys as well."""
    mu, _ = inputs(7, 12, dtype=dtype)
    keys = reparam_fused.split(KEY, 7)
    for shape in ((7, 1), (12,), (1, 1), (7, 12)):
        scale, _ = inputs(*shape, dtype=dtype, seed=2)
        for key in (KEY, keys):
            expected = fused_reparameterize(
                mu, **{form: scale.expand(7, 12).contiguous()}, key=key, clamp=(-1, 0.5)
            )
            actual = fused_reparameterize(
                mu.to(device), **{form: scale.to(device)}, key=key.to(device), clamp=(-1, 0.5)
            )
            assert_as_on_cpu(actual, expected)
            turned = fused_reparameterize(
                mu.t().contiguous().t().to(device),
                **{form: scale.to(device)},
                key=key.to(device),
                clamp=(-1, 0.5),
            )
            assert_as_on_cpu(turned, expected)


def test_a_divergence_keeps_its_digits_near_zero(device: torch.device) -> None:
    """Of N(0, 1 + d) it is d^2, of which the formula in float32 keeps nothing."""
    d = torch.logspace(-7, -2, 200, dtype=torch.float64)
    for form, exact_scale in (("std", 1 + d), ("log_std", d), ("log_var", d)):
        scale = exact_scale.float()
        kl = fused_kl_divergence(torch.zeros(200, device=device), **{form: scale.to(device)})
        x = scale.double()
        log_var = {"std": 2 * torch.log1p(x - 1), "log_std": 2 * x, "log_var": x}[form]
        expected = 0.5 * (torch.expm1(log_var) - log_var)
        small = log_var.abs() < 1e-4
        series = log_var**2 / 4 + log_var**3 / 12
        expected = torch.where(small, series, expected)
        torch.testing.assert_close(kl.cpu().double(), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("function", [fused_reparameterize, fused_kl_divergence])
def test_wrong_scales_and_bounds(function: Callable[..., Tensor]) -> None:
    x, before = torch.ones(3), torch.get_rng_state()
    name = function.__name__ + "(): "
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ValueError, "expected one of log_var, log_std, std, rho, got none"),
        (
            {"log_std": x, "rho": x},
            ValueError,
            "expected one of log_var, log_std, std, rho, got log_std and rho",
        ),
        (
            {"log_var": x, "std": x},
            ValueError,
            "expected one of log_var, log_std, std, rho, got log_var and std",
        ),
        ({"rho": "0"}, TypeError, "argument 'rho' must be Tensor, not str"),
        ({"log_std": x.long()}, TypeError, "log_std must be float32, float64"),
        (
            {"rho": torch.ones(4)},
            RuntimeError,
            "the shapes of mu and rho must broadcast, got mu (3,) and rho (4,)",
        ),
        ({"rho": x, "clamp": 3}, TypeError, "clamp must be (low, high), numbers of which either"),
        ({"rho": x, "clamp": (1,)}, TypeError, "clamp must be (low, high)"),
        ({"rho": x, "clamp": (1, "2")}, TypeError, "got (1, '2')"),
        ({"rho": x, "clamp": (x, None)}, TypeError, "clamp must be (low, high)"),
        ({"rho": x, "clamp": (2, 1)}, ValueError, "clamp must have low <= high, got (2, 1)"),
        ({"rho": x, "clamp": (NAN, 1)}, ValueError, "clamp must have low <= high, got (nan, 1)"),
        (
            {"rho": x, "min_std": -0.5},
            ValueError,
            "min_std must be finite and at least 0, got -0.5",
        ),
        ({"rho": x, "min_std": INF}, ValueError, "min_std must be finite and at least 0, got inf"),
        ({"rho": x, "min_std": NAN}, ValueError, "min_std must be finite and at least 0, got nan"),
        ({"rho": x, "min_std": "1"}, TypeError, "argument 'min_std' must be float, not str"),
        ({"rho": x, "min_std": None}, TypeError, "argument 'min_std' must be float, not NoneType"),
    ]
    for options, error, text in cases:
        with pytest.raises(error, match=re.escape(text)) as raised:
            function(x, **options)
        assert str(raised.value).startswith(name)
    assert torch.equal(torch.get_rng_state(), before)


@each_form
def test_compiled(form: str, device: torch.device) -> None:
    """In one graph, with the bits of the eager call."""
    if device.type == "cuda":
        pytest.skip("Inductor compiles for a real GPU; test_compile.py has what a stand-in can")

    def step(mu: Tensor, scale: Tensor) -> Tensor:
        options: dict[str, Any] = {form: scale, "clamp": (-1.0, 0.5), "min_std": 0.1}
        z = fused_reparameterize(mu, key=KEY, **options)
        return z + fused_kl_divergence(mu, **options) + fused_reparameterize(mu, **options)

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        mu, scale = (
            t.detach().requires_grad_() for t in operands(form, (5, 9), dtype=torch.float32)
        )
        torch.manual_seed(4)
        out = call(mu, scale)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), (mu, scale))))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


@each_form
def test_traced_programs_have_the_eager_line(form: str) -> None:
    """jit.trace records torch's own operations, which run without this package."""
    mu, scale = (t.detach() for t in operands(form, (4, 5), (5,)))
    options: dict[str, Any] = {"clamp": (-1.0, 0.5), "min_std": 0.1}

    def step(mu: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (
            fused_reparameterize(mu, **{form: scale}, **options),
            fused_kl_divergence(mu, **{form: scale}, **options),
        )

    traced = torch.jit.trace(step, (mu, scale), check_trace=False)
    assert "reparam_fused::" not in str(traced.graph)
    torch.manual_seed(1)
    z, kl = traced(mu, scale)
    torch.manual_seed(1)
    expected = eager(form, mu, scale, torch.randn(4, 5, dtype=torch.float64), options)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(kl, eager_kl(form, mu, scale, options))
