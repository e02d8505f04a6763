"""Gradients, generators, and what a call keeps for its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from reparam_fused import fused_reparameterize

from .result import Result, inputs, key_of, passed, require, require_same_bits


def gradients(device: torch.device) -> Result:
    """First and second derivatives against finite differences, in float64."""
    key = key_of(3, 2**32 - 1, device)

    def sample(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key)

    for mu_shape, log_var_shape in (((3, 5), (3, 5)), ((3, 1), (5,)), ((7,), ())):
        mu, log_var = (
            (t[: torch.Size(shape).numel()] / 8).reshape(shape).to(device).requires_grad_()
            for t, shape in zip(inputs(15, torch.float64), (mu_shape, log_var_shape), strict=True)
        )
        torch.autograd.gradcheck(sample, (mu, log_var))
        torch.autograd.gradgradcheck(sample, (mu, log_var))

    # What finite differences cannot tell: grad_mu is grad_z itself, in any dtype.
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        mu, log_var = (t.to(device).requires_grad_() for t in inputs(1021, dtype))
        grad_z = inputs(1021, dtype)[1].to(device)
        (grad_mu,) = torch.autograd.grad(sample(mu, log_var), (mu,), grad_z)
        require_same_bits(f"grad_mu {dtype}", grad_mu, grad_z)
    return passed("gradcheck and gradgradcheck in float64; grad_mu is grad_z")


def generators(device: torch.device) -> Result:
    """The default generator and one's own work as they do for torch.randn."""
    mu, log_var = (t.to(device) for t in inputs(1021, torch.float32))

    def sample(generator: torch.Generator | None = None) -> Tensor:
        return fused_reparameterize(mu, log_var, generator=generator)

    def get_state() -> Tensor:
        return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()

    def set_state(state: Tensor) -> None:
        torch.cuda.set_rng_state(state) if device.type == "cuda" else torch.set_rng_state(state)

    torch.manual_seed(5)
    state = get_state()
    first, second = sample(), sample()
    require(bool((first != second).float().mean() > 0.99), "two calls gave the same noise")
    torch.manual_seed(5)
    require_same_bits("after manual_seed", sample(), first)
    require_same_bits("after manual_seed, second call", sample(), second)
    set_state(state)
    require_same_bits("after set_rng_state", sample(), first)

    before = get_state()
    own = torch.Generator(device).manual_seed(7)
    own_state = own.get_state()
    theirs = [sample(own), sample(own)]
    require(torch.equal(get_state(), before), "generator=: the default generator moved")
    require(not torch.equal(theirs[0], theirs[1]), "generator=: two calls gave the same noise")
    own.manual_seed(7)
    require_same_bits("generator=, after manual_seed", sample(own), theirs[0])
    own.set_state(own_state)
    require_same_bits("generator=, after set_state", sample(own), theirs[0])
    require_same_bits("generator=, second call", sample(own), theirs[1])
    before = get_state()
    fused_reparameterize(mu, log_var, key=key_of(1, 0, device))
    require(torch.equal(get_state(), before), "key=: the default generator moved")
    return passed("manual_seed, get/set_rng_state, generator=, fresh noise a call")


def saved_tensors(device: torch.device) -> Result:
    """Between forward and backward a call keeps log_var and a 16-byte key."""
    mu, log_var = (t.to(device).requires_grad_() for t in inputs(1021, torch.float32))
    for key in (None, key_of(1, 0, device)):
        saved: list[Tensor] = []

        def pack(t: Tensor, into: list[Tensor] = saved) -> Tensor:
            into.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fused_reparameterize(mu, log_var, key=key)
        others = [t for t in saved if t.data_ptr() != log_var.data_ptr()]
        sizes = [t.numel() * t.element_size() for t in others]
        require(
            len(saved) == 2 and sizes == [16] and others[0].dtype == torch.uint64,
            f"beside log_var {[(t.dtype, tuple(t.shape)) for t in others]} are saved",
        )
    return passed("log_var and 16 bytes", bytes_beside_log_var=16)
