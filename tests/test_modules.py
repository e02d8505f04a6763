"""In a module as in any other: hooks, checkpointing, copies and files."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import assert_same_bits, inputs, key_of, leaves
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reparam_fused import fused_reparameterize, key, noise

LARGEST = 2**64 - 1


def test_the_backward_takes_what_the_hooks_unpack(both_paths: str, device: torch.device) -> None:
    """log_var and the key, and nothing of them is kept beside."""
    mu, log_var = leaves(6, 8, device=device)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t)
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        if packed[index].dtype == torch.uint64:
            return key_of(5, device=device)
        return torch.zeros_like(log_var)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        z = fused_reparameterize(mu, log_var, key=key_of(4, device=device))
    saved_log_var, saved_key = packed
    assert_same_bits(saved_log_var, log_var)
    assert torch.equal(saved_key.cpu(), key_of(4))
    (grad,) = torch.autograd.grad(z.sum(), log_var)
    torch.testing.assert_close(grad.cpu(), 0.5 * noise(key_of(5), 6, 8, dtype=torch.float64))


def test_save_on_cpu(both_paths: str, device: torch.device) -> None:
    mu, log_var = leaves(6, 8, device=device)
    with torch.autograd.graph.save_on_cpu():
        z = fused_reparameterize(mu, log_var)
    (grad,) = torch.autograd.grad(z.sum(), log_var)
    torch.testing.assert_close(grad, 0.5 * (z - mu))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_with_a_key_needs_no_rng_state(
    both_paths: str, use_reentrant: bool, device: torch.device
) -> None:
    mu, log_var = leaves(6, 8, device=device)

    def run(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key_of(4, device=device)).square()

    squared = checkpoint(run, mu, log_var, use_reentrant=use_reentrant, preserve_rng_state=False)
    squared.sum().backward()
    z = fused_reparameterize(mu, log_var, key=key_of(4, device=device)).detach()
    assert_same_bits(squared, z.square())
    torch.testing.assert_close(mu.grad, 2 * z)
    torch.testing.assert_close(log_var.grad, z * (z - mu.detach()))


class Encoder(torch.nn.Module):
    key: Tensor

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 6, device=device)
        self.generator = torch.Generator(device).manual_seed(1)
        self.register_buffer("key", key(seed, device=device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.linear(x).chunk(2, -1)
        fixed = fused_reparameterize(mu, log_var, key=self.key)
        return fixed, fused_reparameterize(mu, log_var, generator=self.generator)


def assert_same_module(a: Encoder, b: Encoder) -> None:
    x, _ = inputs(5, 4, device=a.key.device)
    for ours, theirs in zip(a(x), b(x), strict=True):
        assert_same_bits(ours, theirs)


def test_copies_and_files(device: torch.device) -> None:
    """A copy has the key, and the state of the generator."""
    encoder = Encoder(LARGEST, device)
    encoder(torch.zeros(1, 4, device=device))
    buffer = io.BytesIO()
    torch.save(encoder, buffer)
    buffer.seek(0)
    copied, loaded = copy.deepcopy(encoder), torch.load(buffer, weights_only=False)
    assert_same_module(copied, encoder)
    assert_same_module(loaded, copy.deepcopy(loaded))
    assert torch.equal(loaded.key, encoder.key)


def test_state_dict_and_casts(device: torch.device) -> None:
    """The key is no floating-point buffer: it is carried, and cast to nothing."""
    encoder, other = Encoder(LARGEST, device), Encoder(0, device)
    buffer = io.BytesIO()
    torch.save(encoder.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_module(other, encoder)
    assert torch.equal(encoder.to(torch.bfloat16).key.cpu(), key(LARGEST))
    x = torch.zeros(2, 4, dtype=torch.bfloat16, device=device)
    assert encoder(x)[0].dtype == torch.bfloat16


def test_a_module_moves_with_its_key(cuda: torch.device) -> None:
    """From the CPU to a GPU: the noise stays."""
    encoder = Encoder(LARGEST, torch.device("cpu")).requires_grad_(False)
    x, _ = inputs(5, 4)
    mu, log_var = encoder.linear(x).chunk(2, -1)
    encoder.to(cuda)
    z = fused_reparameterize(mu.to(cuda), log_var.to(cuda), key=encoder.key)
    assert_same_bits(z, fused_reparameterize(mu, log_var, key=key(LARGEST)))


def test_meta_tensors_have_the_layout_of_real_ones(device: torch.device) -> None:
    for view in (
        lambda t: t.transpose(0, 2),
        lambda t: t[:, ::2],
        lambda t: t[:, :1].expand(3, 4, 5),
        lambda t: t.to(torch.bfloat16),
    ):
        real = view(torch.zeros(3, 4, 5, device=device))
        log_var = torch.zeros((), dtype=torch.bfloat16, device=device)
        z = fused_reparameterize(real, log_var)
        mu = real.to("meta").requires_grad_()
        ours = fused_reparameterize(mu, log_var.to("meta"))
        layout = (ours.shape, ours.stride(), ours.dtype)
        assert ours.is_meta
        assert layout == (z.shape, z.stride(), z.dtype)
        ours.sum().backward()
        assert mu.grad is not None
        assert (mu.grad.is_meta, mu.grad.shape) == (True, real.shape)


@pytest.mark.parametrize("redraws", ["generator", "preserve_rng_state"])
def test_what_checkpoint_does_not_restore_is_drawn_again(redraws: str) -> None:
    """As the eager line does, and as the docstring says; with a key it is the same noise."""
    generator = torch.Generator().manual_seed(1) if redraws == "generator" else None

    def slope(given: Tensor | None) -> tuple[Tensor, Tensor]:
        """eps by the gradient of log_var, and by z itself"""
        log_var = torch.zeros(64, requires_grad=True)

        def sample(log_var: Tensor) -> Tensor:
            drawn = {"generator": generator} if given is None else {"key": given}
            return fused_reparameterize(torch.zeros(64), log_var, **drawn)

        options = {} if redraws == "generator" else {"preserve_rng_state": False}
        z = checkpoint(sample, log_var, use_reentrant=False, **options)
        (grad,) = torch.autograd.grad(z.sum(), log_var)
        return 2 * grad, z.detach()

    seen, drawn = slope(None)
    assert not torch.equal(seen, drawn)
    seen, drawn = slope(key(3))
    assert torch.equal(seen, drawn)
