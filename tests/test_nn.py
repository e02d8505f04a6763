"""reparam_fused.nn.Reparameterize: the sample in training, its mean in evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, inputs, key_of
from test_compile import compilers
from torch import Tensor

import reparam_fused
from reparam_fused import fused_reparameterize
from reparam_fused.nn import Reparameterize

KEY = key_of(31)
forms = pytest.mark.parametrize("form", ["log_var", "log_std", "std", "rho"])


@forms
@pytest.mark.parametrize(
    "options",
    [{}, {"clamp": (-1.0, 0.5), "min_std": 0.1}, {"clamp": [None, 0.5], "sample_shape": [2, 3]}],
    ids=str,
)
def test_in_training_it_is_the_function(
    form: str, options: dict[str, Any], device: torch.device
) -> None:
    mu, scale = inputs(4, 5, device=device)
    key = KEY.to(device)
    z = Reparameterize(form, **options)(mu, scale, key=key)
    assert_same_bits(z, fused_reparameterize(mu, **{form: scale}, **options, key=key))
    assert z.shape == (*options.get("sample_shape", ()), 4, 5)


def test_it_draws_from_the_generator(device: torch.device) -> None:
    mu, log_var = inputs(50, device=device)
    layer, generator = Reparameterize(), torch.Generator(device)
    z = layer(mu, log_var, generator=generator.manual_seed(3))
    assert_same_bits(layer(mu, log_var, generator=generator.manual_seed(3)), z)
    torch.manual_seed(3)
    assert_same_bits(layer(mu, log_var), z)
    assert not torch.equal(layer(mu, log_var), z)


@forms
@pytest.mark.parametrize("sample_shape", [(), (2, 3)])
@pytest.mark.parametrize(
    ("mu_shape", "scale_shape"),
    [((4, 5), (4, 5)), ((5,), (4, 1)), ((4, 1), (5,)), ((4,), ()), ((), (4,))],
)
def test_in_evaluation_it_is_the_mean(
    form: str,
    sample_shape: tuple[int, ...],
    mu_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Of the shape and the dtype of the sample; nothing is drawn, and its gradient is mu's."""
    layer = Reparameterize(form, sample_shape=sample_shape)
    for mu_dtype, scale_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ):
        mu, _ = inputs(*mu_shape, dtype=mu_dtype, device=device)
        _, scale = inputs(*scale_shape, dtype=scale_dtype, device=device)
        mu.requires_grad_()
        z = layer.train()(mu, scale)
        torch.manual_seed(1)
        before = torch.rand(1)
        torch.manual_seed(1)
        mean = layer.eval()(mu, scale)
        assert torch.equal(torch.rand(1), before)
        assert (mean.shape, mean.dtype, mean.device) == (z.shape, z.dtype, z.device)
        assert torch.equal(mean, mu.expand(z.shape).to(z.dtype))
        (gradient,) = torch.autograd.grad(mean.sum(), mu)
        assert (gradient == z.numel() // mu.numel()).all()


def test_in_evaluation_mu_is_itself(device: torch.device) -> None:
    mu, log_var = inputs(4, device=device)
    assert_same_bits(Reparameterize().eval()(mu, log_var), mu)
    assert_same_bits(Reparameterize().eval()(mu, 0.0), mu)
    assert Reparameterize().eval()(mu, log_var).data_ptr() == mu.data_ptr()


def test_the_dtype_under_autocast(device: torch.device) -> None:
    mu, log_var = inputs(4, dtype=torch.bfloat16, device=device)
    layer = Reparameterize()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer.eval()(mu, log_var).dtype == layer.train()(mu, log_var).dtype


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_refuse_the_same(training: bool, device: torch.device) -> None:
    layer = Reparameterize("rho").train(training)
    mu = torch.zeros(3, device=device)
    with pytest.raises(TypeError, match="argument 'rho' must be Tensor, not str"):
        layer(mu, "1")
    with pytest.raises(RuntimeError, match="shapes of mu and rho must broadcast"):
        layer(mu, torch.zeros(4, device=device))


def test_options_are_checked_once() -> None:
    with pytest.raises(ValueError, match=r"Reparameterize\(\): form must be one of log_var, .*'va"):
        Reparameterize("variance")
    with pytest.raises(ValueError, match=r"Reparameterize\(\): clamp must have low <= high"):
        Reparameterize(clamp=(1.0, 0.0))
    with pytest.raises(TypeError, match=r"Reparameterize\(\): argument 'min_std' must be float"):
        Reparameterize(min_std="1")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"Reparameterize\(\): sample_shape must not be neg"):
        Reparameterize(sample_shape=(-1,))


def test_what_it_is() -> None:
    """Nothing of it goes into a file, and a copy is the same layer."""
    layer = Reparameterize("rho", clamp=(None, 2), min_std=0.1, sample_shape=torch.Size([3]))
    text = "Reparameterize(form='rho', clamp=(None, 2), min_std=0.1, sample_shape=(3,))"
    assert str(layer) == str(copy.deepcopy(layer)) == text
    assert str(Reparameterize()) == "Reparameterize(form='log_var')"
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert reparam_fused.nn.Reparameterize is Reparameterize


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(5, 6)
        self.sample = Reparameterize(clamp=(-30.0, 20.0))

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        mu, log_var = self.head(x).chunk(2, -1)
        return self.sample(mu, log_var, key=key)


@compilers("eager", "aot_eager", "inductor")
def test_compiled(backend: str, device: torch.device) -> None:
    """Once for each mode."""
    torch.compiler.reset()
    encoder = Encoder().to(device)
    compiled = torch.compile(encoder, backend=backend, fullgraph=True)
    x, _ = inputs(4, 5, device=device)
    for mode in (True, False):
        encoder.train(mode)
        z, expected = compiled(x, KEY.to(device)), encoder(x, KEY.to(device))
        torch.testing.assert_close(z, expected)
        gradients = [
            torch.autograd.grad(t.square().sum(), encoder.head.weight) for t in (z, expected)
        ]
        torch.testing.assert_close(*gradients)
    assert not encoder.training
    assert torch.equal(compiled(x), encoder.head(x).chunk(2, -1)[0])


def test_exported(device: torch.device) -> None:
    """As a module in evaluation is."""
    encoder = Encoder().eval()
    x, _ = inputs(4, 5)
    program = torch.export.export(encoder, (x,))
    assert "reparam_fused" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), encoder(x))


def test_in_evaluation_a_mean_without_dimensions() -> None:
    """Red by torch's own error, where expand() is given no sizes."""
    layer = reparam_fused.nn.Reparameterize().eval()
    mu = torch.tensor(0.5)
    assert torch.equal(layer(mu, torch.tensor(0.0)), mu)
    assert layer(mu, 0.0).shape == ()
