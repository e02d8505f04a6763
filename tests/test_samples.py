"""sample_shape: samples of one mean and one scale, which are read once and never copied."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FORMS, assert_as_on_cpu, assert_same_bits, inputs, key_of
from test_forms import OPTIONS, eager, operands
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import reparam_fused
from reparam_fused import _forms, _ops, fused_reparameterize, reference

KEY = key_of(17, 2**32 - 7)
SAMPLE_SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)]


def sampled(sample_shape: tuple[int, ...], key: Tensor, **options: Any) -> Callable[..., Tensor]:
    """fused_reparameterize of a mean and a scale in this form."""

    def call(mu: Tensor, scale: Tensor, form: str = "log_var") -> Tensor:
        return fused_reparameterize(
            mu, **{form: scale}, sample_shape=sample_shape, key=key, **options
        )

    return call


@pytest.mark.parametrize("sample_shape", SAMPLE_SHAPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 1, 3), (4, 0)], ids=str)
def test_noise_is_that_of_the_whole_shape(
    both_paths: str, sample_shape: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    """Element (k, i) has the noise of index k N + i: the samples are those of expanded operands."""
    mu, log_var = inputs(*shape)
    whole = (*sample_shape, *shape)
    expected = fused_reparameterize(mu.expand(whole), log_var.expand(whole), key=KEY)
    key = KEY.to(device)
    z = sampled(sample_shape, key)(mu.to(device), log_var.to(device))
    assert z.shape == whole
    assert z.is_contiguous()
    assert_same_bits(z, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [None, (-0.5, 0.75, 0.125)], ids=["free", "bounded"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 127, 2_051])
def test_bits_are_those_of_the_reference(
    form: str, bounds: Any, n: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The samples', and the gradients', whose sums go from the first sample on."""
    if device.type == "cuda" and n > 127 and form != "log_var":
        pytest.skip("the interpreter is slow; one form shows what is of size")
    mu, scale = inputs(n, dtype=dtype, spread=2.0)
    kept = scale if _forms.Call(_forms.FORMS[form], bounds=bounds).backward_reads() else None
    for samples in (0, 1, 2, 5):
        options = (KEY, form, None, None, bounds)
        expected = reference.sample_from_key(mu, scale, *options, samples)
        on_device = (KEY.to(device), *options[1:])
        z = _ops.sample_from_key(mu.to(device), scale.to(device), *on_device, samples)
        grad_z, _ = inputs(samples, n, dtype=dtype, seed=3)
        expected_grads = reference.samples_backward(grad_z, kept, *options)
        grads = _ops.samples_backward(
            grad_z.to(device), None if kept is None else kept.to(device), *on_device
        )
        for ours, theirs in zip((z, *grads), (expected, *expected_grads), strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)
            else:
                assert_same_bits(ours, theirs)


@pytest.mark.parametrize("keys", ["one", "rows", "samples"])
@pytest.mark.parametrize("samples", [16, 17, 40])
def test_many_samples_of_few_elements(samples: int, keys: str, device: torch.device) -> None:
    """Side by side or in turn, with the same bits, as each sample alone has them."""
    mu, log_var = inputs(3, 5)
    key = {
        "one": KEY,
        "rows": reparam_fused.split(KEY, 3)[None],
        "samples": reparam_fused.split(KEY, samples),
    }[keys]
    options = (None, (-1.0, 1.5, 0.125))
    expected = reference.sample_from_key(mu, log_var, key, "rho", None, *options, samples)
    given = mu.to(device), log_var.to(device), key.to(device)
    assert_same_bits(_ops.sample_from_key(*given, "rho", None, *options, samples), expected)
    # and drawn: by the key of the generator, in the kernel
    z, drawn = _ops.sample(*given[:2], None, "rho", options[1], samples)
    of_key = reference.sample_from_key(mu, log_var, drawn.cpu(), "rho", None, *options, samples)
    assert_same_bits(z, of_key)


def test_gradients_are_summed_from_the_first_sample_on(device: torch.device) -> None:
    """In float32: of 2^24, 1 and -2^24 nothing is left in this order, and in another 1."""
    mu = torch.zeros(8, device=device, requires_grad=True)
    log_var = torch.zeros(8, device=device, requires_grad=True)
    z = sampled((3,), KEY.to(device))(mu, log_var)
    incoming = torch.tensor([2.0**24, 1.0, -(2.0**24)], device=device)[:, None].expand(3, 8)
    by_mu, _ = torch.autograd.grad(z, (mu, log_var), incoming)
    assert (by_mu == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [OPTIONS["free"], OPTIONS["both"]], ids=["free", "both"])
@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)], ids=str)
def test_gradients_are_those_of_the_eager_line(
    both_paths: str,
    form: str,
    options: dict[str, Any],
    sample_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    for shapes in (((2, 3),), ((2, 3), (2, 1)), ((2, 3), (3,)), ((3,), (2, 3))):
        mu, scale = operands(form, *shapes)
        eps = reparam_fused.noise(KEY, (*sample_shape, 2, 3), dtype=torch.float64)
        incoming, _ = inputs(*eps.shape, dtype=torch.float64, seed=8)
        expected = eager(form, mu, scale, eps, options)
        given = [t.detach().to(device).requires_grad_() for t in (mu, scale)]
        z = sampled(sample_shape, KEY.to(device), **options)(*given, form)
        torch.testing.assert_close(z.cpu(), expected, rtol=1e-13, atol=1e-13)
        ours = torch.autograd.grad(z, given, incoming.to(device))
        theirs = torch.autograd.grad(expected, (mu, scale), incoming)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [OPTIONS["free"], OPTIONS["both"]], ids=["free", "both"])
@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("shapes", [((2, 3),), ((2, 3), (2, 1)), ((3,), (2, 3))], ids=str)
def test_gradcheck(
    form: str,
    options: dict[str, Any],
    sample_shape: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> None:
    alike = len(shapes) > 1 or form in ("log_std", "std") or sample_shape != (3,)
    if device.type == "cuda" and alike:
        pytest.skip("the interpreter is slow; what broadcasts is the engine's, on any device")
    pair = [t.detach().to(device).requires_grad_() for t in operands(form, *shapes)]
    key = KEY.to(device)

    def call(mu: Tensor, scale: Tensor) -> Tensor:
        return sampled(sample_shape, key, **options)(mu, scale, form)

    batched = device.type == "cpu"
    assert torch.autograd.gradcheck(
        call,
        pair,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched,
    )
    assert torch.autograd.gradgradcheck(call, pair)


@pytest.mark.parametrize("needs", ["mu", "scale"])
@pytest.mark.parametrize("form", FORMS)
def test_one_gradient_alone(both_paths: str, form: str, needs: str, device: torch.device) -> None:
    """The same bits as of both."""
    pair = [t.detach().to(device) for t in operands(form, (3, 5), dtype=torch.float32)]
    incoming, _ = inputs(4, 3, 5, seed=2, device=device)
    call = sampled((4,), KEY.to(device))
    both = [t.clone().requires_grad_() for t in pair]
    expected = torch.autograd.grad(call(*both, form), both, incoming)
    at = ["mu", "scale"].index(needs)
    one = [t.clone().requires_grad_(i == at) for i, t in enumerate(pair)]
    (actual,) = torch.autograd.grad(call(*one, form), one[at], incoming)
    assert_same_bits(actual, expected[at].cpu())


def test_a_key_for_each_sample(both_paths: str, device: torch.device) -> None:
    mu, log_var = inputs(4, 3)
    keys = reparam_fused.split(KEY, 6)
    z = sampled((6,), keys.to(device))(mu.to(device), log_var.to(device))
    for k in range(6):
        assert_same_bits(z[k], fused_reparameterize(mu, log_var, key=keys[k]))
    shaped = sampled((2, 3), keys.view(2, 3, 2).to(device))(mu.to(device), log_var.to(device))
    assert_same_bits(shaped.flatten(0, 1), z.cpu())


@pytest.mark.parametrize("width", [1, 3, 4, 6, 20, 64])
def test_a_key_for_each_row(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of size 1 over the samples: they are numbered within the stream of their row."""
    mu, log_var = inputs(5, width, dtype=dtype)
    keys = reparam_fused.split(KEY, 5)
    z = sampled((7,), keys[None].to(device))(mu.to(device), log_var.to(device))
    for row in range(5):
        expected = sampled((7,), keys[row])(mu[row], log_var[row])
        assert_as_on_cpu(z[:, row], expected)
    shaped = sampled((7, 1), keys[None, None].to(device))(mu.to(device), log_var.to(device))
    assert_as_on_cpu(shaped[:, 0], z.cpu())
    each = reparam_fused.split(KEY, 35).view(7, 5, 2)
    z = sampled((7,), each.to(device))(mu.to(device), log_var.to(device))
    for k in range(7):
        assert_as_on_cpu(z[k], fused_reparameterize(mu, log_var, key=each[k]))


def test_row_keys_in_the_backward(device: torch.device) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs(5, 6))
    keys = reparam_fused.split(KEY, 5)
    incoming, _ = inputs(4, 5, 6, seed=5)
    given = [t.detach().to(device).requires_grad_() for t in (mu, log_var)]
    z = sampled((4,), keys[None].to(device))(*given)
    actual = torch.autograd.grad(z, given, incoming.to(device))
    for row in range(5):
        z_row = sampled((4,), keys[row])(mu[row], log_var[row])
        expected = torch.autograd.grad(z_row, (mu, log_var), incoming[:, row])
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same_bits(ours[row], theirs[row])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "chunk": lambda t: torch.cat([t, t], -1).chunk(2, -1)[1],
    "steps": lambda t: t.repeat_interleave(2, -1)[:, ::2],
    "row": lambda t: t[:1].expand(6, -1),
    "column": lambda t: t[:, :1].expand(-1, 12),
    "one": lambda t: t[:1, :1].expand(6, 12),
}


@pytest.mark.parametrize("mu_layout", LAYOUTS)
@pytest.mark.parametrize("scale_layout", LAYOUTS)
def test_layouts(mu_layout: str, scale_layout: str, device: torch.device) -> None:
    mu, log_var = inputs(6, 12)
    mu, log_var = LAYOUTS[mu_layout](mu), LAYOUTS[scale_layout](log_var)
    keys = reparam_fused.split(KEY, 6)[None]
    incoming, _ = inputs(12, 3, 6, seed=2)
    incoming = incoming.permute(1, 2, 0)
    for key in (KEY, keys):
        expected = sampled((3,), key)(mu.contiguous(), log_var.contiguous())
        z = sampled((3,), key.to(device))(mu.to(device), log_var.to(device))
        assert_same_bits(z, expected)
        grads = _ops.samples_backward(incoming.to(device), log_var.to(device), key.to(device))
        expected_grads = _ops.samples_backward(incoming.contiguous(), log_var.contiguous(), key)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert_same_bits(ours, theirs)


def test_a_draw_is_one_key_for_all(device: torch.device) -> None:
    """It moves the generator on as a draw of the whole shape does; an empty one leaves it."""
    mu, log_var = inputs(3, 5, device=device)
    generator = torch.Generator(device).manual_seed(3)
    z = fused_reparameterize(mu, log_var, sample_shape=(4, 2), generator=generator)
    drawn = generator.get_state()
    generator.manual_seed(3)
    whole = (4, 2, 3, 5)
    expected = fused_reparameterize(mu.expand(whole), log_var.expand(whole), generator=generator)
    assert torch.equal(generator.get_state(), drawn)
    assert torch.equal(z, expected)
    fused_reparameterize(mu, log_var, sample_shape=(0,), generator=generator)
    assert torch.equal(generator.get_state(), drawn)


def test_blocks(device: torch.device) -> None:
    """A part of the samples, and of each, has the noise of its place."""
    mu, log_var = inputs(4, 6)
    z = sampled((5,), KEY)(mu, log_var)
    part = fused_reparameterize(
        mu[1:3, 2:].to(device),
        log_var[1:3, 2:].to(device),
        key=KEY.to(device),
        sample_shape=(2,),
        global_shape=(5, 4, 6),
        global_offset=(2, 1, 2),
    )
    assert_same_bits(part, z[2:4, 1:3, 2:])
    z = sampled((3, 2), KEY)(mu, log_var)
    part = fused_reparameterize(
        mu[1:].to(device),
        log_var[1:].to(device),
        key=KEY.to(device),
        sample_shape=(2, 2),
        global_shape=(3, 2, 4, 6),
        global_offset=(1, 0, 1, 0),
    )
    assert_same_bits(part, z[1:, :, 1:])


def test_transforms(device: torch.device) -> None:
    """Under vmap an example has the samples that it has alone, whatever of it is batched."""
    mu, log_var = inputs(3, 4, 2, dtype=torch.float64, device=device)
    keys = reparam_fused.split(KEY.to(device), 3)
    each = reparam_fused.split(KEY.to(device), 15).view(3, 5, 2)
    weight, _ = inputs(5, 4, 2, dtype=torch.float64, seed=9, device=device)

    def call(m: Tensor, s: Tensor, k: Tensor) -> Tensor:
        return fused_reparameterize(m, s, sample_shape=(5,), key=k)

    def loss(m: Tensor, s: Tensor, k: Tensor) -> Tensor:
        return (call(m, s, k) * weight).sin().sum()

    key = KEY.to(device)
    for function in (call, grad(loss, 1)):
        for arguments, dims in (
            ((mu, log_var, key), (0, 0, None)),
            ((mu, log_var, keys), (0, 0, 0)),
            ((mu, log_var, each), (0, 0, 0)),
            ((mu[0], log_var[0], keys), (None, None, 0)),
            ((mu, log_var[0], keys), (0, None, 0)),
        ):
            rows = [
                function(*(t if d is None else t[i] for t, d in zip(arguments, dims, strict=True)))
                for i in range(3)
            ]
            mapped = vmap(function, in_dims=dims)(*arguments)
            torch.testing.assert_close(mapped, torch.stack(rows), rtol=1e-14, atol=1e-14)

    def of_scale(s: Tensor) -> Tensor:
        return call(mu[0], s, key)

    torch.testing.assert_close(jacrev(of_scale)(log_var[0]), jacfwd(of_scale)(log_var[0]))


@pytest.mark.parametrize("sample_shape", [(5,), (2, 3)], ids=str)
def test_compiled(sample_shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("Inductor compiles for a real GPU; test_compile.py has what a stand-in can")

    def step(mu: Tensor, rho: Tensor) -> Tensor:
        z = fused_reparameterize(mu, rho=rho, sample_shape=sample_shape, clamp=(-1.0, 1.0))
        return z * fused_reparameterize(mu, rho=rho, sample_shape=sample_shape, key=KEY)

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        mu, rho = (t.detach().requires_grad_() for t in inputs(4, 3))
        torch.manual_seed(6)
        out = call(mu, rho)
        assert out.shape == (*sample_shape, 4, 3)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), (mu, rho))))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


def test_opcheck(device: torch.device) -> None:
    """The fake kernels give the shapes and strides of the real ones."""
    mu, scale = inputs(4, 6, device=device)
    key = KEY.to(device)
    ops = torch.ops.reparam_fused
    checks = ("test_schema", "test_faketensor")
    for m, s in ((mu, scale), (mu.t(), scale.t()), (mu, scale[:, :1])):
        arguments = (m, s, key, "rho", None, None, (-1.0, 1.0, 0.1), 3)
        torch.library.opcheck(ops.sample_from_key.default, arguments, test_utils=checks)
        grad_z = torch.ones(3, *m.shape, device=device)
        arguments = (grad_z, s, key, "rho", None, None, (-1.0, 1.0, 0.1))
        torch.library.opcheck(ops.samples_backward.default, arguments, test_utils=checks)


def test_autograd_keeps_no_samples(device: torch.device) -> None:
    """The scale and the key: nothing of the size of z."""
    mu, log_var = (t.requires_grad_() for t in inputs(4, 6, device=device))
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sampled((50,), KEY.to(device))(mu, log_var)
        assert sorted(t.numel() for t in kept) == [2, 24]
        kept.clear()
        sampled((50,), KEY.to(device))(mu, log_var.detach(), "std")
        assert [t.numel() for t in kept] == [2]


def test_wrong_sample_shapes_and_keys() -> None:
    x, keys = torch.zeros(2, 3), reparam_fused.split(KEY, 6)
    before = torch.get_rng_state()
    one = r"key must tell all dimensions of sample_shape \(2, 3\) apart or none, got batch shape "
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sample_shape": 3}, TypeError, "sample_shape must be ints, got 3"),
        ({"sample_shape": (1.5,)}, TypeError, r"sample_shape must be ints, got \(1.5,\)"),
        ({"sample_shape": (-1,)}, RuntimeError, r"sample_shape must not be negative, got \(-1,\)"),
        ({"sample_shape": (2, 3), "key": keys.view(2, 3, 2)[:, :1]}, RuntimeError, one),
        ({"sample_shape": (2, 3), "key": keys[:2]}, RuntimeError, one),
        (
            {"sample_shape": (5,), "key": keys},
            RuntimeError,
            r"the batch shape of key must broadcast with the leading dimensions of the output "
            r"\(5, 2, 3\), got \(6,\)",
        ),
        (
            {
                "sample_shape": (2, 2),
                "key": KEY,
                "global_shape": (2, 3, 2, 3),
                "global_offset": (0, 1, 0, 0),
            },
            RuntimeError,
            r"a block may be cut in the first dimension alone",
        ),
        (
            {"sample_shape": (2,), "key": KEY, "global_shape": (2, 3), "global_offset": (0, 0)},
            RuntimeError,
            r"global_shape must have the 3 dimensions of the output",
        ),
    ]
    for options, error, text in cases:
        with pytest.raises(error, match=text) as raised:
            fused_reparameterize(x, x, **options)
        assert re.match(r"fused_reparameterize\(\): ", str(raised.value))
    assert torch.equal(torch.get_rng_state(), before)


def test_direct_calls_are_checked() -> None:
    """Memory safety hangs on what the ops check themselves."""
    x, keys = torch.zeros(2, 3), reparam_fused.split(KEY, 4)
    ops = torch.ops.reparam_fused
    with pytest.raises(RuntimeError, match="samples not to be negative, got -1"):
        ops.sample_from_key(x, x, KEY, samples=-1)
    with pytest.raises(RuntimeError, match=r"expected a uint64 key of shape"):
        ops.sample_from_key(x, x, keys, samples=3)
    with pytest.raises(RuntimeError, match="expected bounds of 3 numbers, got 2"):
        ops.sample_from_key(x, x, KEY, bounds=[0.0, 1.0])
    with pytest.raises(RuntimeError, match="expected a dimension of samples"):
        ops.samples_backward(torch.zeros(()), torch.zeros(()), KEY)
    with pytest.raises(RuntimeError, match="takes no scale in the form std"):
        ops.samples_backward(x, x[0], KEY, "std")
    with pytest.raises(RuntimeError, match="takes a scale in the form std within bounds"):
        ops.samples_backward(x, None, KEY, "std", bounds=[0.0, 1.0, 0.0])
