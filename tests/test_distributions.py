"""reparam_fused.Normal: torch's distribution, of a scale in any form."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, key_of
from test_compile import compilers
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.utils._python_dispatch import TorchDispatchMode

import reparam_fused
from reparam_fused import (
    Normal,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
    noise,
    patch,
)

Torchs = torch.distributions.Normal
KEY = key_of(21)
SIGMA: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda scale: scale,
    "log_var": lambda log_var: log_var.exp().sqrt(),
    "log_std": torch.exp,
    "rho": lambda rho: rho.exp().log1p(),
}
# None, and ends that take effect
BOUNDS: list[dict[str, Any]] = [{}, {"clamp": (0.5, 1.0), "min_std": 0.1}, {"clamp": (None, 1.0)}]
forms = pytest.mark.parametrize("form", SIGMA)
bounded = pytest.mark.parametrize("bounds", BOUNDS, ids=str)


def parameters(
    *shape: int,
    seed: int = 3,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A mean, and a scale that is good for every form."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.4 + 0.1
    return (
        loc.to(device, dtype).requires_grad_(),
        scale.to(device, dtype).requires_grad_(),
    )


def sigma_of(form: str, scale: Tensor, clamp: Any = None, min_std: float = 0.0) -> Tensor:
    if clamp is not None:
        scale = scale.clamp(*clamp)
    return SIGMA[form](scale) + min_std


@forms
@bounded
def test_it_is_the_distribution_of_torch(
    form: str, bounds: dict[str, Any], device: torch.device
) -> None:
    """In what it says of itself, and in the gradients of that."""
    loc, scale = parameters(4, 3, device=device)
    ours = Normal(loc, **{form: scale}, **bounds)
    theirs = Torchs(loc, sigma_of(form, scale, **bounds))
    value = torch.linspace(-3, 3, 12, dtype=torch.float64, device=device).view(4, 3)
    for question in (
        *(lambda d, name=name: getattr(d, name) for name in ("mean", "mode", "stddev", "variance")),
        lambda d: d.scale,
        lambda d: d.log_prob(value),
        lambda d: d.log_prob(value[:1]),
        lambda d: d.entropy(),
        lambda d: d.perplexity(),
        lambda d: d.cdf(value),
        lambda d: d.icdf(value.sigmoid()),
    ):
        actual, expected = question(ours), question(theirs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        gradients = (
            torch.autograd.grad(
                a.square().sum(), (loc, scale), retain_graph=True, allow_unused=True
            )
            for a in (actual, expected)
        )
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@forms
@bounded
def test_a_sample_is_that_of_the_function(
    form: str, bounds: dict[str, Any], device: torch.device
) -> None:
    loc, scale = parameters(4, 3, dtype=torch.float32, device=device)
    key = KEY.to(device)
    name = {"scale": "std"}.get(form, form)
    expected = fused_reparameterize(loc, **{name: scale}, **bounds, key=key)
    normal = Normal(loc, **{form: scale}, **bounds)
    assert_same_bits(normal.rsample(key=key).detach(), expected.detach())
    eps = noise(KEY, 4, 3).to(device)
    torch.testing.assert_close(expected, loc + sigma_of(form, scale, **bounds) * eps)


@forms
@bounded
@pytest.mark.parametrize("sample_shape", [(), (2,), (2, 2)])
def test_gradients_of_samples(
    form: str, bounds: dict[str, Any], sample_shape: tuple[int, ...], device: torch.device
) -> None:
    loc, scale = parameters(2, device=device)

    def draw(loc: Tensor, scale: Tensor) -> Tensor:
        return Normal(loc, **{form: scale}, **bounds).rsample(sample_shape, key=KEY.to(device))

    assert draw(loc, scale).shape == (*sample_shape, 2)
    assert torch.autograd.gradcheck(draw, (loc, scale))


@forms
@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 3), (0,)])
def test_sample_is_rsample_without_gradients(
    form: str, sample_shape: tuple[int, ...], device: torch.device
) -> None:
    normal = Normal(parameters(4, device=device)[0], **{form: parameters(4, device=device)[1]})
    torch.manual_seed(1)
    with_gradients = normal.rsample(sample_shape)
    torch.manual_seed(1)
    without = normal.sample(torch.Size(sample_shape))
    assert_same_bits(without, with_gradients.detach())
    assert (with_gradients.requires_grad, without.requires_grad) == (True, False)
    assert without.shape == (*sample_shape, 4)
    generator = torch.Generator(device).manual_seed(7)
    drawn = normal.sample(sample_shape, generator=generator)
    assert_same_bits(normal.sample(sample_shape, generator=generator.manual_seed(7)), drawn)
    if drawn.numel():
        assert drawn.unique().numel() == drawn.numel()


def test_it_takes_its_arguments_as_torch_does(device: torch.device) -> None:
    """Numbers, shapes that broadcast, two dtypes: the third positional argument too."""
    one = torch.ones((), device=device)
    many = torch.ones(3, 1, dtype=torch.float64, device=device)
    row = torch.ones(4, device=device)
    for loc, scale in (
        (0, 1),
        (0.0, one),
        (one, 2.0),
        (many, row),
        (row, many),
        (row, many[0, 0]),
        (one, many),
    ):
        theirs = Torchs(loc, scale, False)
        for ours in (Normal(loc, scale, False), Normal(loc, log_var=scale, validate_args=False)):
            assert ours.batch_shape == theirs.batch_shape
            for name in ("loc", "scale", "variance"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            a, b = ours.rsample(), theirs.rsample()
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_nothing_is_computed_before_it_is_asked_for(device: torch.device) -> None:
    seen: list[str] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    loc, log_var = parameters(4, device=device)
    key = KEY.to(device)
    with Spy():
        normal = Normal(loc, log_var=log_var, validate_args=False)
        normal.rsample(key=key)
        assert [op for op in seen if "detach" not in op] == [
            "reparam_fused.sample_from_key.default"
        ]
        seen.clear()
        normal.entropy()
        assert not [op for op in seen if "exp" in op or "log" in op]
        assert normal.scale is not normal.scale
    assert "aten.exp.default" in seen


def test_extremes(dtype: torch.dtype, device: torch.device) -> None:
    """Where sigma itself is 0 or infinite, but in float64, which is the judge."""
    log_vars = [-300.0, -30.0, 30.0, 300.0]
    log_var = torch.tensor(log_vars, dtype=dtype, device=device, requires_grad=True)
    loc = torch.zeros_like(log_var)
    exact = [Torchs(0.0, torch.tensor(x / 2, dtype=torch.float64).exp()) for x in log_vars]
    for normal in (Normal(loc, log_var=log_var), Normal(loc, log_std=0.5 * log_var)):
        log_prob = normal.log_prob(loc)
        zero = torch.zeros((), dtype=torch.float64)
        expected = torch.stack([d.log_prob(zero) for d in exact]).to(dtype)
        torch.testing.assert_close(log_prob.cpu(), expected)
        (gradient,) = torch.autograd.grad(log_prob.sum(), log_var)
        torch.testing.assert_close(gradient.cpu(), torch.full_like(expected, -0.5))
        expected = torch.stack([d.entropy() for d in exact]).to(dtype)
        torch.testing.assert_close(normal.entropy().cpu(), expected)
        far = normal.log_prob(loc + 1)
        assert far[0] == -math.inf or dtype == torch.float64
        assert far[1:].isfinite()[-1]
        assert not far.isnan().any()
        standard = Torchs(torch.zeros((), dtype=dtype, device=device), 1.0)
        from_standard = kl_divergence(normal, standard)
        assert from_standard[0] == torch.tensor(149.5, dtype=dtype)


@forms
@bounded
@pytest.mark.parametrize("of_q", [*SIGMA, "torch"])
def test_divergence(form: str, of_q: str, bounds: dict[str, Any], device: torch.device) -> None:
    """Of two of ours, and of one of ours and one of torch's, either way."""
    p = parameters(4, 3, device=device)
    q = parameters(3, seed=8, device=device)
    ours = Normal(p[0], **{form: p[1]}, **bounds)
    theirs = Torchs(p[0], sigma_of(form, p[1], **bounds))
    if of_q == "torch":
        second = expected_second = Torchs(*q)
    else:
        second = Normal(q[0], **{of_q: q[1]})
        expected_second = Torchs(q[0], SIGMA[of_q](q[1]))
    for actual, expected in (
        (kl_divergence(ours, second), kl_divergence(theirs, expected_second)),
        (kl_divergence(second, ours), kl_divergence(expected_second, theirs)),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        gradients = (
            torch.autograd.grad(kl.square().sum(), (*p, *q), retain_graph=True)
            for kl in (actual, expected)
        )
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_small_divergence_keeps_its_accuracy(device: torch.device) -> None:
    """Where torch's formula in float32 has nothing but rounding."""
    step = torch.logspace(-6, -2, 200, device=device)
    loc = torch.zeros_like(step)
    kl = kl_divergence(Normal(loc, log_var=step), Normal(loc, log_var=0.0))
    exact = 0.5 * (torch.expm1(step.double()) - step.double())
    assert ((kl - exact).abs() / exact).max() < 1e-5
    theirs = kl_divergence(Torchs(loc, (0.5 * step).exp()), Torchs(loc, 1.0))
    assert ((theirs - exact).abs() / exact).max() > 0.1
    kl = kl_divergence(Normal(loc, 1 + step), Normal(loc, 1.0))
    std = (1 + step).double()
    u = 2 * torch.log1p(std - 1)
    exact = 0.5 * (torch.expm1(u) - u)
    assert ((kl - exact).abs() / exact).max() < 1e-5


@forms
def test_expand(form: str, device: torch.device) -> None:
    loc, scale = parameters(3, device=device)
    bounds = {"clamp": (0.5, 1.0), "min_std": 0.1}
    normal = Normal(loc, **{form: scale}, **bounds, validate_args=False)
    wide = normal.expand((5, 3))
    assert (type(wide), wide.form, wide.batch_shape) == (Normal, form, (5, 3))
    assert wide.loc.shape == wide.scale.shape == (5, 3)
    assert wide._validate_args is False
    torch.testing.assert_close(wide.scale, normal.scale.expand(5, 3))
    key = KEY.to(device)
    name = {"scale": "std"}.get(form, form)
    expected = fused_reparameterize(
        loc.expand(5, 3), **{name: scale.expand(5, 3)}, **bounds, key=key
    )
    assert_same_bits(wide.rsample(key=key).detach(), expected.detach())

    class Own(Normal):
        def __init__(self) -> None:
            super().__init__(0.0, log_var=0.0)

    with pytest.raises(NotImplementedError, match=r"custom \.expand"):
        Own().expand((2,))


def test_within_other_distributions(device: torch.device) -> None:
    loc, log_var = parameters(4, 3, device=device)
    normal, theirs = Normal(loc, log_var=log_var), Torchs(loc, (0.5 * log_var).exp())
    value = torch.full((4, 3), 0.3, dtype=torch.float64, device=device)
    for wrap in (
        lambda d: Independent(d, 1),
        lambda d: TransformedDistribution(d, TanhTransform()),
        lambda d: Independent(d, 1).expand((2, 4)),
    ):
        ours, expected = wrap(normal), wrap(theirs)
        torch.testing.assert_close(ours.log_prob(value), expected.log_prob(value))
        torch.manual_seed(1)
        z = ours.rsample((2,))
        assert z.requires_grad
        assert z.shape == expected.rsample((2,)).shape
        torch.manual_seed(1)
        assert_same_bits(ours.sample((2,)), z.detach())
    torch.testing.assert_close(
        kl_divergence(Independent(normal, 1), Independent(Torchs(loc, 1.0), 1)),
        kl_divergence(theirs, Torchs(loc, 1.0)).sum(-1),
    )


@forms
def test_copies_and_files(form: str, device: torch.device) -> None:
    loc, scale = (t.detach() for t in parameters(4, device=device))
    normal = Normal(loc, **{form: scale}, clamp=(None, 1.0), min_std=0.1)
    buffer = io.BytesIO()
    torch.save(normal, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(normal),
        pickle.loads(pickle.dumps(normal)),
        torch.load(buffer, weights_only=False),
    ):
        assert (type(other), other.form, str(other)) == (Normal, form, str(normal))
        assert_same_bits(other.rsample(key=KEY.to(device)), normal.rsample(key=KEY.to(device)))
        assert_same_bits(other.scale, normal.scale)


def test_it_says_what_it_was_given() -> None:
    assert str(Normal(0.0, log_var=1.5)) == "Normal(loc: 0.0, log_var: 1.5)"
    assert str(Normal(torch.zeros(3), 1.0)) == str(Torchs(torch.zeros(3), 1.0))


@pytest.fixture
def validating(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: torch.compile turns torch's own default off."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


@pytest.mark.usefixtures("validating")
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan])
def test_validation_is_that_of_torch(value: float, device: torch.device) -> None:
    bad = torch.tensor([1.0, value], device=device)
    with pytest.raises(ValueError, match="Expected parameter scale") as theirs:
        Torchs(torch.zeros(2, device=device), bad)
    with pytest.raises(ValueError, match="Expected parameter scale") as ours:
        Normal(torch.zeros(2, device=device), bad)
    assert str(ours.value) == str(theirs.value)
    Normal(0.0, bad, validate_args=False)
    for form in ("log_var", "log_std", "rho"):
        if math.isnan(value):
            with pytest.raises(ValueError, match=rf"parameter {form} .*constraint Real\(\)"):
                Normal(0.0, **{form: bad})
        else:
            Normal(0.0, **{form: bad})


@pytest.mark.usefixtures("validating")
def test_validation_of_loc_and_of_values(device: torch.device) -> None:
    nan = torch.tensor([0.0, math.nan], device=device)
    normal = Normal(torch.zeros(2, device=device), log_var=0.0)
    theirs = Torchs(torch.zeros(2, device=device), 1.0)
    for call in (
        lambda d, cls: cls(nan, 1.0),
        lambda d, cls: d.log_prob(torch.zeros(3, device=device)),
        lambda d, cls: cls("0", 1.0),
    ):
        messages = []
        for d, cls in ((normal, Normal), (theirs, Torchs)):
            with pytest.raises(ValueError, match=r".") as error:
                call(d, cls)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="within the support"):
        normal.log_prob(nan)
    assert Normal(torch.zeros(2), log_var=0.0, validate_args=False).log_prob(nan.cpu())[1].isnan()


@pytest.mark.parametrize(
    ("given", "got"),
    [({}, "none"), ({"scale": 1.0, "rho": 1.0}, "scale and rho")],
)
def test_one_scale(given: dict[str, float], got: str) -> None:
    message = rf"Normal\(\): expected one of scale, log_var, log_std, rho, got {got}"
    with pytest.raises(ValueError, match=message):
        Normal(0.0, **given)


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Normal\(\): clamp must have low <= high"):
        Normal(0.0, log_var=1.0, clamp=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"Normal\(\): min_std must be finite"):
        Normal(0.0, log_var=1.0, min_std=-1.0)
    with pytest.raises(TypeError, match=r"argument 'min_std' must be float"):
        Normal(0.0, log_var=1.0, min_std="1")  # type: ignore[arg-type]


@forms
@bounded
@pytest.mark.parametrize("sample_shape", [(), (2,), (2, 2)])
@pytest.mark.parametrize("dim", [(), -1, None])
def test_heads_are_those_of_the_functions(
    form: str,
    bounds: dict[str, Any],
    sample_shape: tuple[int, ...],
    dim: Any,
    device: torch.device,
) -> None:
    """To the bit; and the sample is that of rsample."""
    loc, scale = parameters(4, 3, dtype=torch.float32, device=device)
    prior = Torchs(*(t.detach() for t in parameters(3, seed=8, dtype=torch.float32, device=device)))
    normal, key = Normal(loc, **{form: scale}, **bounds), KEY.to(device)
    options: dict[str, Any] = {{"scale": "std"}.get(form, form): scale, **bounds, "dim": dim}
    options |= {"sample_shape": sample_shape, "key": key}
    given = {"dim": dim, "key": key}
    for ours, theirs in (
        (
            normal.rsample_and_log_prob(sample_shape, **given),
            fused_reparameterize_log_prob(loc, **options),
        ),
        (
            normal.rsample_and_log_prob(sample_shape, tanh=True, **given),
            fused_reparameterize_log_prob(loc, tanh=True, **options),
        ),
        (
            normal.rsample_and_kl(sample_shape=sample_shape, **given),
            fused_reparameterize_kl(loc, **options),
        ),
        (
            normal.rsample_and_kl(prior, sample_shape, **given),
            fused_reparameterize_kl(loc, prior=prior, **options),
        ),
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a.detach(), b.detach())
    for z, _ in (
        normal.rsample_and_log_prob(sample_shape, key=key),
        normal.rsample_and_kl(None, sample_shape, key=key),
    ):
        assert_same_bits(z.detach(), normal.rsample(sample_shape, key=key).detach())


@forms
@bounded
def test_gradients_of_heads(form: str, bounds: dict[str, Any], device: torch.device) -> None:
    """Those of the eager lines with the noise of the key, of the parameters and of a prior's."""
    loc, scale = parameters(4, 3, device=device)
    of_prior = parameters(3, seed=8, device=device)
    normal, key = Normal(loc, **{form: scale}, **bounds), KEY.to(device)
    eps = noise(KEY, 4, 3, dtype=torch.float64).to(device)
    theirs = Torchs(loc, sigma_of(form, scale, **bounds))
    z = theirs.loc + theirs.scale * eps
    log_prob = theirs.log_prob(z)
    squashed = log_prob - torch.log1p(-torch.tanh(z).square())
    prior = Torchs(*of_prior)
    leaves = (loc, scale, *of_prior)
    for ours, expected in (
        (normal.rsample_and_log_prob(dim=-1, key=key), (z, log_prob.sum(-1))),
        (normal.rsample_and_log_prob(dim=-1, tanh=True, key=key), (z.tanh(), squashed.sum(-1))),
        (
            normal.rsample_and_kl(dim=-1, key=key),
            (z, kl_divergence(theirs, Torchs(torch.zeros_like(loc), 1.0)).sum(-1)),
        ),
        (
            normal.rsample_and_kl(prior, dim=-1, key=key),
            (z, kl_divergence(theirs, prior).sum(-1)),
        ),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        gradients = (
            torch.autograd.grad(
                sum(t.square().sum() for t in pair), leaves, retain_graph=True, allow_unused=True
            )
            for pair in (ours, expected)
        )
        for a, b in zip(*gradients, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_heads_draw(device: torch.device) -> None:
    """As rsample does, by the seed and by a generator."""
    normal = Normal(*(t.detach() for t in parameters(4, 3, device=device)))
    generator = torch.Generator(device)
    for call in (normal.rsample_and_log_prob, normal.rsample_and_kl):
        torch.manual_seed(1)
        z = call(dim=-1)[0]
        torch.manual_seed(1)
        assert_same_bits(z, normal.rsample())
        z = call(dim=-1, generator=generator.manual_seed(3))[0]
        assert_same_bits(z, normal.rsample(generator=generator.manual_seed(3)))
    with pytest.raises(IndexError, match=r"fused_reparameterize_kl\(\): dim must be in the range"):
        normal.rsample_and_kl(dim=2)
    with pytest.raises(TypeError, match=r"prior must be torch.distributions.Normal, not float"):
        normal.rsample_and_kl(0.0, dim=-1)  # type: ignore[arg-type]


SIGMAS = {  # of q, and whether the kernel takes it as the prior of a p of (4, 3)
    "as p": ((4, 3), True),
    "a row": ((3,), True),
    "one": ((), True),
    "more": ((2, 4, 3), False),
}


@pytest.mark.parametrize("shape", SIGMAS)
@pytest.mark.parametrize("form", ["scale", "rho"])
def test_divergence_of_two_sigmas(shape: str, form: str, device: torch.device) -> None:
    """In one op, where q broadcasts to p; else of their ratio. Of the type that torch gives."""
    seen: list[str] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    of_q, at_once = SIGMAS[shape]
    for dtype, dtype_of_q in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        p = parameters(4, 3, dtype=dtype, device=device)
        q = parameters(*of_q, seed=8, dtype=dtype_of_q, device=device)
        ours, theirs = Normal(p[0], **{form: p[1]}), Torchs(p[0], SIGMA[form](p[1]))
        second = Torchs(*q)
        seen.clear()
        with Spy():
            kl = kl_divergence(ours, second)
        assert ("aten.div.Tensor" not in seen) == at_once
        expected = kl_divergence(theirs, second)
        assert (kl.dtype, kl.shape) == (expected.dtype, expected.shape)
        torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p_dtype", [torch.float32, torch.float64])
def test_divergence_without_dimensions_has_the_type_of_torch(
    p_dtype: torch.dtype, device: torch.device
) -> None:
    p = parameters(dtype=p_dtype, device=device)
    q = parameters(seed=8, dtype=torch.float64, device=device)
    kl = kl_divergence(Normal(*p), Torchs(*q))
    assert kl.dtype == kl_divergence(Torchs(*p), Torchs(*q)).dtype == torch.float64


def test_divergence_of_equals_beyond_the_range_of_sigma(device: torch.device) -> None:
    """Of two logarithms, of which sigma_q is 0 or infinite in float32: 0 where they are equal."""
    log_var = torch.tensor([-400.0, -300.0, -180.0, 0.0, 180.0, 300.0, 400.0], device=device)
    zero = torch.zeros_like(log_var)
    for q in (Normal(zero, log_var=log_var), Normal(zero, log_std=0.5 * log_var)):
        kl = kl_divergence(Normal(zero, log_var=log_var), q)
        assert_same_bits(kl, zero)
        nearly = kl_divergence(Normal(zero, log_var=log_var + 0.5), q)
        expected = 0.5 * (torch.expm1(torch.tensor(0.5)) - 0.5)
        torch.testing.assert_close(nearly.cpu(), expected.expand(7), rtol=1e-4, atol=0)
    near = Normal(zero + 1e-20, log_var=-170.0)
    assert kl_divergence(near, Normal(zero, log_var=-170.0)).isfinite().all()


@compilers("eager", "aot_eager", "inductor")
def test_compiled(backend: str, device: torch.device) -> None:
    loc, log_var = parameters(4, 3, device=device)
    prior = Torchs(torch.zeros(3, dtype=torch.float64, device=device), 1.0)
    # dynamo follows torch's choice of a divergence once it has been made.
    kl_divergence(Normal(loc, log_var=log_var), prior)

    def loss(loc: Tensor, log_var: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
        normal = Normal(loc, log_var=log_var, clamp=(-1.0, 1.0))
        z = normal.rsample((2,), key=key)
        total = normal.log_prob(z).sum() + kl_divergence(normal, prior).sum() + z.sum()
        total = total + kl_divergence(Normal(loc, rho=log_var), prior).sum()
        a, log_prob = normal.rsample_and_log_prob((2,), dim=-1, tanh=True, key=key)
        w, kl = normal.rsample_and_kl(prior, dim=-1, key=key)
        return z, total + a.sum() + log_prob.sum() + w.sum() + kl.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    key = KEY.to(device)
    (z, actual), (expected_z, expected) = compiled(loc, log_var, key), loss(loc, log_var, key)
    torch.testing.assert_close(z, expected_z, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, (loc, log_var)),
        torch.autograd.grad(expected, (loc, log_var)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    first, second = (compiled(loc, log_var, None)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_vmap(device: torch.device) -> None:
    loc, log_var = (t.detach() for t in parameters(4, 3, device=device))
    keys = reparam_fused.split(KEY, 4).to(device)

    def draw(loc: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
        return Normal(loc, log_var=log_var, validate_args=False).rsample((2,), key=key)

    mapped = torch.vmap(draw)(loc, log_var, keys)
    for i in range(4):
        torch.testing.assert_close(mapped[i], draw(loc[i], log_var[i], keys[i]))
    log_prob = torch.vmap(
        lambda m, v: Normal(m, log_var=v, validate_args=False).log_prob(torch.zeros_like(m))
    )
    expected = Torchs(loc, (0.5 * log_var).exp()).log_prob(torch.zeros_like(loc))
    torch.testing.assert_close(log_prob(loc, log_var), expected)


def test_a_patch_leaves_it_alone(device: torch.device) -> None:
    with patch("normal"):
        assert "rsample" in vars(Normal)
        z = Normal(*parameters(4, device=device)).rsample(key=KEY.to(device))
    assert_same_bits(z, Normal(*parameters(4, device=device)).rsample(key=KEY.to(device)))
