"""Whatever a call is given: the reference's bits, and torch's gradients. Of examples that shrink.

    pytest tests/test_properties.py                            seconds, the same examples each time
    pytest tests/test_properties.py --hypothesis-profile=deep  many more, others each time

An example is drawn as what its tensors are like, from a contiguous one of zeros on, so that the
smallest that fails is the plainest. Red for instance: a block of samples that begins elsewhere, or
other dimensions than the last ones summed as those (_call.py); the factor of a second derivative
(_forms.py); an offset of its own in a key that is drawn (_draw.py); an int beyond 2^63 folded in as
another (random.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import ON_STAND_IN
from helpers import DTYPES, FORMS, assert_same_bits, key_of, needs_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor

import reparam_fused
from reparam_fused import (
    fold_in,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
    noise,
    reference,
    split,
)

pytestmark = needs_kernels
Bounds = tuple[float, float, float]
#: The examples of the profile in force (conftest.py); of interpreted kernels a few
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
if ON_STAND_IN:
    quick = settings(quick, max_examples=15)

words = st.integers(0, 2**64 - 1)
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)
forms = st.sampled_from(FORMS)
#: Of the mean and of the scale, and what both broadcast to
pairs = mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=6)


@st.composite
def tensors(
    draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, special: bool = True
) -> Tensor:
    """A tensor of this shape, strided as views can be, of numbers that are any float's."""
    seed = draw(seeds)
    order = draw(st.permutations(range(len(shape))))  # of the dimensions in memory
    base, part = [], []
    for d in order:
        expanded = draw(st.booleans())
        first, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        base.append(1 if expanded else first + step * shape[d])
        part.append(slice(None) if expanded else slice(first, None, step))
    i = torch.arange(1, math.prod(base) + 1).reshape(base) + seed * 7368787
    values = ((i * 2654435761 & 0xFFFFFFFF) - 2**31).double() * 2.0**-30 if seed else i * 0.0
    t = values.to(dtype)[tuple(part)].expand([shape[d] for d in order])
    if special and t.numel() > 0:
        extremes = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 88.0, -104.0, 3e38]
        at = draw(st.lists(st.sampled_from(extremes), max_size=2))
        t = t.clone() if at else t  # in which an element may be written
        for k, value in enumerate(at):
            t.view(-1)[(seed * 31 + k * 7) % t.numel()] = value
    t = t.permute([order.index(d) for d in range(len(shape))])
    if t.dim() == 4 and draw(st.booleans()):
        t = t.contiguous(memory_format=torch.channels_last)
    return t.flip(list(range(t.dim()))) if draw(st.booleans()) else t


@st.composite
def limits(draw: st.DrawFn) -> Bounds | None:
    """A clamp and min_std, of which None is none of both."""
    if draw(st.booleans()):
        return None
    low = draw(st.sampled_from([-math.inf, -1.0, 0.0]))
    high = draw(st.sampled_from([math.inf, 1.0, 0.0]))
    min_std = draw(st.sampled_from([0.0, 1e-3, 0.5]))
    bounds = low, high, min_std
    return None if bounds == (-math.inf, math.inf, 0.0) else bounds


def as_arguments(bounds: Bounds | None) -> dict[str, Any]:
    if bounds is None:
        return {}
    return {"clamp": bounds[:2], "min_std": bounds[2]}


@st.composite
def keys(draw: st.DrawFn, shape: Sequence[int], samples: int = 0) -> Tensor:
    """A key for a result of this shape: one, one for each row or sample, in either dtype.

    Of `samples` first dimensions all are told apart, or none.
    """
    one = key_of(draw(words), draw(words))
    batch = [n if draw(st.booleans()) else 1 for n in shape[: draw(st.integers(0, len(shape)))]]
    if len(batch) < samples:
        batch = []
    elif samples:
        batch[:samples] = list(shape[:samples]) if draw(st.booleans()) else [1] * samples
    if batch:
        one = split(one, max(math.prod(batch), 1))[: math.prod(batch)].view(*batch, 2)
    if draw(st.booleans()):
        one = one.view(torch.int64)
    if draw(st.booleans()):  # with something between its words
        one = torch.stack([one.view(torch.int64), one.view(torch.int64)], -1)[..., 1]
    return one


@dataclass
class Example:
    """A call, but for its key."""

    mu: Tensor
    scale: Tensor
    form: str
    bounds: Bounds | None
    samples: tuple[int, ...]
    shape: tuple[int, ...]  # of the result

    @property
    def one(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.shape[len(self.samples) :]

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        options: dict[str, Any] = {self.form: self.scale.to(device), **as_arguments(self.bounds)}
        return {**options, "sample_shape": self.samples} if self.samples else options

    def n(self) -> int | None:
        return math.prod(self.samples) if self.samples else None


@st.composite
def examples(
    draw: st.DrawFn,
    dtype: torch.dtype | None = None,
    special: bool = True,
    with_samples: bool = True,
    alike: bool = False,
) -> Example:
    shapes, one = draw(pairs)
    if alike:
        shapes = (one, one)
    of_both = dtype or draw(dtypes)
    others = of_both if dtype or alike or draw(st.booleans()) else draw(dtypes)
    mu = draw(tensors(shapes[0], of_both, special))
    scale = draw(tensors(shapes[1], others, special))
    samples: tuple[int, ...] = ()
    if with_samples:
        samples = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    return Example(mu, scale, draw(forms), draw(limits()), samples, (*samples, *one))


@st.composite
def blocks(
    draw: st.DrawFn, shape: Sequence[int], samples: int = 0
) -> tuple[list[int], list[int]] | tuple[None, None]:
    """global_shape and global_offset of such a result; of samples the first is cut."""
    if draw(st.booleans()):
        return None, None
    whole, first = [], []
    for d, n in enumerate(shape):
        whole_here = 0 < d < samples
        before, after = (0, 0) if whole_here else (draw(st.integers(0, 9)) for _ in range(2))
        first.append(before)
        whole.append(before + n + after)
    return whole, first


def flat(
    samples: tuple[int, ...], key: Tensor, whole: list[int] | None, first: list[int] | None
) -> tuple[Tensor, list[int] | None, list[int] | None]:
    """A key and a block with one dimension for all samples, as the reference has them."""
    n = len(samples)
    batch = key.shape[:-1]
    if n and batch:
        key = key.reshape(math.prod(batch[:n]), *batch[n:], 2)
    if n and whole is not None and first is not None:
        inner = math.prod(whole[1:n])
        whole, first = [whole[0] * inner, *whole[n:]], [first[0] * inner, *first[n:]]
    return key, whole, first


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """The same bits; in float64, where the reference goes through libm, some ULP of 2^-52."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(
            actual.cpu(), expected, rtol=1e-12, atol=1e-13, equal_nan=True, check_stride=False
        )
    else:
        assert_same_bits(actual, expected)


@quick
@given(data=st.data())
def test_samples(device: torch.device, data: st.DataObject) -> None:
    """fused_reparameterize: the bits, the dtype, the shape, and torch.add's strides."""
    e = data.draw(examples())
    key = data.draw(keys(e.shape, len(e.samples)))
    whole, first = data.draw(blocks(e.shape, len(e.samples)))
    mu, options = e.mu.to(device), e.options(device)
    if whole is not None:
        options.update(global_shape=whole, global_offset=first)
    z = fused_reparameterize(mu, key=key.to(device), **options)
    flat_key, *block = flat(e.samples, key, whole, first)
    expected = reference.sample_from_key(e.mu, e.scale, flat_key, e.form, *block, e.bounds, e.n())
    assert_near(z, expected.view(e.shape))
    if not e.samples:
        assert z.stride() == torch.add(mu, options[e.form]).stride()


@quick
@given(data=st.data())
def test_generators(device: torch.device, data: st.DataObject) -> None:
    """Without a key: the noise of the key that the generator gives, which moves on as for that."""
    e = data.draw(examples())
    mu, options = e.mu.to(device), e.options(device)
    seed = data.draw(seeds)
    generator, other = (torch.Generator(device).manual_seed(seed) for _ in range(2))
    default = data.draw(st.booleans())
    if default:
        torch.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        generator = (
            torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[0]
        )
    z = fused_reparameterize(mu, generator=None if default else generator, **options)
    assert tuple(z.shape) == e.shape
    if z.numel() == 0:
        assert torch.equal(generator.get_state(), other.get_state())
        return
    key = reparam_fused.key(generator=other)
    assert_same_bits(z, fused_reparameterize(mu, key=key, **options))
    if device.type == "cpu":
        assert torch.equal(generator.get_state(), other.get_state())


@quick
@given(data=st.data())
def test_noise(device: torch.device, data: st.DataObject) -> None:
    """noise: the bits of the reference, of any block."""
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4))
    key, dtype = data.draw(keys(shape)), data.draw(dtypes)
    block = data.draw(blocks(shape))
    options = {} if block[0] is None else {"global_shape": block[0], "global_offset": block[1]}
    eps = noise(key.to(device), *shape, dtype=dtype, **options)  # type: ignore[arg-type]
    assert_near(eps, reference.noise(key, shape, dtype, *block))


@quick
@given(data=st.data())
def test_keys(device: torch.device, data: st.DataObject) -> None:
    """split and fold_in: the words of the reference, and each other's."""
    key = data.draw(keys(data.draw(st.lists(st.integers(0, 4), max_size=3))))
    num = data.draw(st.integers(1, 9))
    rows = key.reshape(-1, 2)
    children = split(key.to(device), num).cpu()
    expected = reference.derive(rows, None, 0, num).view(num, *key.shape)
    assert torch.equal(children.view(torch.int64), expected.view(torch.int64))
    i = data.draw(st.integers(-(2**63), 2**64 - 1))
    child = fold_in(key.to(device), i).cpu()
    signed = (i + 2**63) % 2**64 - 2**63
    expected = reference.derive(rows, None, signed, 1).view(key.shape)
    assert torch.equal(child.view(torch.int64), expected.view(torch.int64))
    named = fold_in(key.to(device), torch.tensor(signed, device=device)).cpu()
    assert torch.equal(named.view(torch.int64), child.view(torch.int64))
    if 0 <= i < num:
        assert torch.equal(children[i].view(torch.int64), child.view(torch.int64))


@dataclass
class Prior:
    """What a divergence is taken from; of no loc N(0.5, 2) of numbers."""

    loc: Tensor | None
    scale: Tensor | None
    form: str
    bounds: Bounds | None

    def make(self, device: torch.device) -> torch.distributions.Normal:
        if self.loc is None or self.scale is None:
            return torch.distributions.Normal(0.5, 2.0)
        loc, scale = self.loc.to(device), self.scale.to(device)
        if self.form == "torch":
            return torch.distributions.Normal(loc, scale)
        options = {"scale" if self.form == "std" else self.form: scale}
        return reparam_fused.Normal(loc, **options, **as_arguments(self.bounds))

    def parameters(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """As the reference has them: mean, scale, form and bounds."""
        if self.loc is None or self.scale is None:
            return torch.tensor(0.5, dtype=dtype), torch.tensor(2.0, dtype=dtype), "std", None
        form = "std" if self.form == "torch" else self.form
        return self.loc.to(dtype), self.scale.to(dtype), form, self.bounds


@st.composite
def priors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> Prior | None:
    """None, one of numbers, or one of tensors, whose scale may be given in any form."""
    kind = draw(st.sampled_from(["none", "numbers", "torch", *FORMS]))
    if kind in ("none", "numbers"):
        return None if kind == "none" else Prior(None, None, "torch", None)
    first = draw(st.integers(0, len(shape)))
    part = [n if draw(st.booleans()) else 1 for n in shape[first:]]
    loc, scale = (draw(tensors(part, dtype, False)) for _ in range(2))
    if kind in ("torch", "std"):
        return Prior(loc, scale.abs() + 0.5, kind, None)
    return Prior(loc, scale, kind, draw(limits()))


@st.composite
def dims_of(draw: st.DrawFn, rank: int) -> int | tuple[int, ...] | None:
    """What to sum over, as torch.sum takes it: the last ones, any, all or none."""
    kind = draw(st.sampled_from(["none", "last", "some", "one", "all"]))
    if kind == "all":
        return None
    if kind == "none" or rank == 0:
        return ()
    if kind == "one":
        return draw(st.integers(-rank, rank - 1))
    if kind == "last":
        return tuple(range(-draw(st.integers(1, rank)), 0))
    some = draw(st.lists(st.integers(0, rank - 1), unique=True))
    return tuple(d - rank if draw(st.booleans()) else d for d in some)


def summed(dim: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    """The dimensions, counted from the end."""
    dims = range(rank) if dim is None else (dim,) if isinstance(dim, int) else dim
    return tuple(sorted(d % rank - rank for d in dims))


def terms_of(
    e: Example,
    term: str,
    key: Tensor | None,
    prior: Prior | None,
    dims: tuple[int, ...],
    *block: Any,
) -> tuple[Tensor, Tensor]:
    """The sample and the sums, by the reference."""
    loc = of_prior = bounds = None
    form = "std"
    if prior is not None:
        dtype = torch.result_type(e.mu, e.scale)
        loc, of_prior, form, bounds = prior.parameters(dtype)
    trailing = dims == tuple(range(-len(dims), 0))
    n = None if term == "kl_divergence" else e.n()
    z, total = reference.head(
        e.mu, e.scale, key, loc, of_prior, term, len(dims) if trailing else 0,
        e.form, form, *(block or (None, None)), e.bounds, bounds, n,
    )  # fmt: skip
    return z, total if trailing else total.sum(dims)


@quick
@given(data=st.data())
def test_divergences(device: torch.device, data: st.DataObject) -> None:
    """fused_kl_divergence: of each element and in sums, from N(0, 1) and from a prior."""
    e = data.draw(examples(with_samples=False))
    wide = torch.result_type(e.mu, e.scale)
    prior = data.draw(priors(e.one, wide))
    dim = data.draw(dims_of(len(e.one)))
    dims = summed(dim, len(e.one))
    given = None if prior is None else prior.make(device)
    kl = fused_kl_divergence(e.mu.to(device), dim=dim, prior=given, **e.options(device))
    _, total = terms_of(e, "kl_divergence", None, prior, dims)
    if len(dims) == 0:
        total = total.to(kl.dtype)
    assert_near(kl, total)


@quick
@given(data=st.data())
def test_samples_with_sums(device: torch.device, data: st.DataObject) -> None:
    """fused_reparameterize_kl and _log_prob: the sample is fused_reparameterize's, the sums the
    reference's."""
    e = data.draw(examples())
    term = data.draw(st.sampled_from(["kl_divergence", "log_prob", "tanh_log_prob"]))
    dim = data.draw(dims_of(len(e.one)))
    dims = summed(dim, len(e.one))
    key = data.draw(keys(e.shape, len(e.samples)))
    whole, first = data.draw(blocks(e.shape, len(e.samples)))
    mu, options = e.mu.to(device), e.options(device)
    if whole is not None:
        options.update(global_shape=whole, global_offset=first)
    prior = None
    function: Callable[..., tuple[Tensor, Tensor]] = fused_reparameterize_log_prob
    if term == "kl_divergence":
        function = fused_reparameterize_kl
        prior = data.draw(priors(e.one, torch.result_type(e.mu, e.scale)))
        options["prior"] = None if prior is None else prior.make(device)
    else:
        options["tanh"] = term == "tanh_log_prob"
    z, total = function(mu, dim=dim, key=key.to(device), **options)
    flat_key, *block = flat(e.samples, key, whole, first)
    if term == "kl_divergence":
        alone = None if e.samples else flat_key
        _, expected = terms_of(e, term, alone, prior, dims, *block)
        plain = {k: v for k, v in options.items() if k != "prior"}
        sample = fused_reparameterize(mu, key=key.to(device), **plain).cpu()
    else:
        sample, expected = terms_of(e, term, flat_key, None, dims, *block)
        sample = sample.view(e.shape)
        expected = expected.view((*e.samples, *expected.shape[bool(e.samples) :]))
    assert z.is_contiguous()
    assert_near(z, sample)
    assert_near(total, expected)


def eager_std(form: str, bounds: Bounds | None, scale: Tensor) -> Tensor:
    """sigma, in torch's operations."""
    if bounds is not None:
        # At an end torch.clamp has a gradient of 1 before torch 2.14, as here, and then 0.
        clamped = scale.detach().clamp(bounds[0], bounds[1])
        scale = torch.where(clamped == scale, scale, clamped)
    sigma = {
        "log_var": lambda: torch.exp(0.5 * scale),
        "log_std": scale.exp,
        "std": lambda: scale,
        "rho": lambda: torch.nn.functional.softplus(scale, threshold=40),
    }[form]()
    return sigma if bounds is None else sigma + bounds[2]


@quick
@given(data=st.data())
def test_gradients_are_those_of_the_eager_line(data: st.DataObject) -> None:
    """In float64, of those that are asked for, of first and of second order; by any key."""
    e = data.draw(examples(dtype=torch.float64, special=False))
    key = data.draw(keys(e.shape, len(e.samples)))
    wanted = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    flat_key, _, _ = flat(e.samples, key, None, None)
    flat_shape = e.one if e.n() is None else (e.n() or 0, *e.one)
    eps = reference.normals(flat_key, flat_shape, torch.float64, samples=bool(e.samples))
    eps = eps.reshape(e.shape)
    mu, scale = (t.detach().requires_grad_(w) for t, w in zip((e.mu, e.scale), wanted, strict=True))
    leaves = [t for t in (mu, scale) if t.requires_grad]
    z = fused_reparameterize(mu, key=key, **{**e.options(), e.form: scale})
    line = mu + eager_std(e.form, e.bounds, scale) * eps
    weight = data.draw(tensors(e.shape, torch.float64, False)).detach().requires_grad_()
    all_of_them = [*leaves, weight]
    results = []
    for out in (z, line):
        grads = torch.autograd.grad((out * weight).sum(), leaves, create_graph=True)
        again = [g.square().sum() for g in grads if g.requires_grad]
        seconds = torch.autograd.grad(sum(again), all_of_them, allow_unused=True)
        given = zip(seconds, all_of_them, strict=True)
        results.append([*grads, *(torch.zeros_like(x) if g is None else g for g, x in given)])
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-11, atol=1e-11, check_stride=False)


@quick
@given(data=st.data())
def test_gradients_have_the_references_bits(device: torch.device, data: st.DataObject) -> None:
    """Of one sample; a sum over what broadcasts is torch's."""
    e = data.draw(examples(with_samples=False, alike=True))
    key = data.draw(keys(e.shape))
    mu, scale = (t.to(device).detach().requires_grad_() for t in (e.mu, e.scale))
    z = fused_reparameterize(mu, key=key.to(device), **{**e.options(device), e.form: scale})
    weight = data.draw(tensors(e.shape, e.mu.dtype))
    by_mu, by_scale = torch.autograd.grad(z, (mu, scale), weight.to(device))
    assert_same_bits(by_mu, weight)
    reads = e.bounds is not None or e.form != "std"
    expected = reference.sample_backward(
        weight, e.scale if reads else None, key, e.form, None, None, e.bounds
    )
    assert_near(by_scale, expected)


@pytest.mark.parametrize("dim", [0, -1, (0, 1), (), None])
def test_a_divergence_is_the_same_by_either_function(dim: Any, device: torch.device) -> None:
    mu, log_var = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    _, kl = fused_reparameterize_kl(mu, log_var, dim=dim)
    assert_same_bits(kl, fused_kl_divergence(mu, log_var, dim=dim).float())
