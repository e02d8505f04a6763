"""Every way in which a small call may be made, and the line that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

import reparam_fused
from reparam_fused import fused_reparameterize

from .lines import FORMS, HEADS, LOG_VAR, PASSES, Line, Pair, eager_kl, step
from .timer import Call

SHAPE = (128, 20)
Operands = Callable[[torch.device], Sequence[Tensor]]


class Way(NamedTuple):
    """Two calls without arguments on a device, by the passes that are asked for."""

    make: Callable[..., dict[str, Call]]
    passes: Sequence[str] = PASSES
    shape: tuple[int, ...] = SHAPE
    #: What holds while it is measured
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def _of(*shapes: tuple[int, ...]) -> Operands:
    return lambda device: [0.5 + torch.rand(shape, device=device) for shape in shapes]


def _chunk(device: torch.device) -> Sequence[Tensor]:
    return torch.rand(SHAPE[0], 2 * SHAPE[1], device=device).chunk(2, -1)


def _mixed(device: torch.device) -> Sequence[Tensor]:
    mu, scale = _of(SHAPE, SHAPE)(device)
    return mu.bfloat16(), scale


def _steps(fused: Line, eager: Line, given: Sequence[Tensor], passes: str) -> dict[str, Call]:
    return {"fused": step(fused, given, passes), "eager": step(eager, given, passes)}


def _pair(pair: Pair, given: Operands, context: Any = nullcontext) -> Way:
    """Both lines, within a context."""

    def make(device: torch.device, passes: str) -> dict[str, Call]:
        def within(line: Line) -> Line:
            def run(*given: Tensor) -> Any:
                with context(device):
                    return line(*given)

            return line if context is nullcontext else run

        return _steps(within(pair.fused), within(pair.eager), given(device), passes)

    return Way(make)


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16)


def _keyed(rows: bool) -> Way:
    def make(device: torch.device, passes: str) -> dict[str, Call]:
        key = reparam_fused.key(3, device=device)
        if rows:
            key = reparam_fused.split(key, SHAPE[0])
        fused = FORMS["log_var"].sample(key=key).fused
        return _steps(fused, LOG_VAR.eager, _of(SHAPE, SHAPE)(device), passes)

    return Way(make)


def _generator() -> Way:
    def make(device: torch.device, passes: str) -> dict[str, Call]:
        generator = torch.Generator(device).manual_seed(5)
        fused = FORMS["log_var"].sample(generator=generator).fused

        def eager(mu: Tensor, log_var: Tensor) -> Tensor:
            noise = torch.randn(mu.shape, device=mu.device, generator=generator)
            return mu + torch.exp(0.5 * log_var) * noise

        return _steps(fused, eager, _of(SHAPE, SHAPE)(device), passes)

    return Way(make)


def _compiled(device: torch.device, passes: str) -> dict[str, Call]:
    """One graph each, of this shape alone."""
    torch.compiler.reset()
    fused, eager = (torch.compile(line, dynamic=False) for line in LOG_VAR)
    return _steps(fused, eager, _of(SHAPE, SHAPE)(device), passes)


def _chain(device: torch.device, passes: str) -> dict[str, Call]:
    """Calls that all are in one graph: what one more of them takes, 20 at a time."""
    del passes
    mu, *scales = _of(SHAPE, *[SHAPE] * 20)(device)
    leaves = [t.requires_grad_() for t in (mu, *scales)]
    grad = torch.randn_like(mu)

    def chain(line: Line) -> Call:
        def run() -> None:
            z: Any = leaves[0]
            for scale in leaves[1:]:
                z = line(z, scale)
            torch.autograd.grad(z, leaves, grad)

        return run

    return {"fused": chain(LOG_VAR.fused), "eager": chain(LOG_VAR.eager)}


def _vmap(device: torch.device, passes: str) -> dict[str, Call]:
    """Gradients of 128 examples of 20, each with its own noise."""
    del passes
    mu, scale = _of(SHAPE, SHAPE)(device)

    def gradients(line: Line) -> Call:
        def loss(mu: Tensor, scale: Tensor) -> Tensor:
            z = line(mu, scale)
            assert isinstance(z, Tensor)
            return z.square().sum()

        per_example = torch.func.vmap(torch.func.grad(loss, (0, 1)), randomness="different")
        return lambda: per_example(mu, scale)

    return {"fused": gradients(LOG_VAR.fused), "eager": gradients(LOG_VAR.eager)}


_RSAMPLE = Normal.rsample  # before any patch


def _patched_normal(batch: tuple[int, ...], samples: tuple[int, ...]) -> Way:
    """torch's own rsample, and what patch puts in its place."""

    def make(device: torch.device, passes: str) -> dict[str, Call]:
        def line(rsample: Any) -> Line:
            return lambda loc, scale: rsample(Normal(loc, scale, validate_args=False), samples)

        return _steps(line(Normal.rsample), line(_RSAMPLE), _of(batch, batch)(device), passes)

    context = partial(reparam_fused.patch, "normal")
    return Way(make, shape=(*samples, *batch), context=context)


def _own_normal(samples: tuple[int, ...]) -> Way:
    """Made of log_var and drawn from."""

    def fused(loc: Tensor, log_var: Tensor) -> Tensor:
        return reparam_fused.Normal(loc, None, False, log_var=log_var).rsample(samples)

    def eager(loc: Tensor, log_var: Tensor) -> Tensor:
        return Normal(loc, torch.exp(0.5 * log_var), False).rsample(samples)

    return _pair(Pair(fused, eager), _of(SHAPE, SHAPE))._replace(shape=(*samples, *SHAPE))


class Posterior:
    """What latent diffusion's class does of the halves of its parameters."""

    def __init__(self, parameters: Tensor) -> None:
        self.mean, log_var = parameters.chunk(2, 1)
        self.logvar = log_var.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self) -> Tensor:
        """A sample of the posterior."""
        return self.mean + self.std * torch.randn(self.mean.shape, device=self.mean.device)


def _patched_class(device: torch.device, passes: str) -> dict[str, Call]:
    """Made, and drawn from; the classes differ in being patched alone."""

    class Patched(Posterior):
        pass

    reparam_fused.patch(Patched)
    given = [torch.randn(8, 8, 4, 4, device=device)]
    return _steps(lambda p: Patched(p).sample(), lambda p: Posterior(p).sample(), given, passes)


def _module(device: torch.device, passes: str) -> dict[str, Call]:
    module = reparam_fused.nn.Reparameterize("log_var")
    return _steps(module, LOG_VAR.eager, _of(SHAPE, SHAPE)(device), passes)


def _of_a_key(name: str, random: str, *arguments: Any) -> Way:
    """A function of a key, beside that of torch.func._random."""

    def make(device: torch.device, passes: str) -> dict[str, Call]:
        del passes
        from torch.func import _random

        ours, theirs = getattr(reparam_fused, name), getattr(_random, random)
        key = reparam_fused.key(3, device=device)
        return {"fused": lambda: ours(key, *arguments), "eager": lambda: theirs(key, *arguments)}

    return Way(make, PASSES[:1])


def _mean_of_sum(name: str) -> Pair:
    """As a loss has it: the sample, and the mean of the sums."""

    def line(original: Line) -> Line:
        def run(*given: Tensor) -> Any:
            results = original(*given)
            if isinstance(results, Tensor):
                return results.mean()
            *samples, total = results
            return (*samples, total.mean())

        return run

    pair = HEADS[name].pair
    return Pair(line(pair.fused), line(pair.eager))


def _kl(mu: Tensor, log_var: Tensor) -> Tensor:
    return reparam_fused.fused_kl_divergence(mu, log_var)


_PLAIN = Pair(fused_reparameterize, LOG_VAR.eager)
_STD = FORMS["std"].sample()
_ROW, _COLUMN = (SHAPE[1],), (SHAPE[0], 1)

WAYS: dict[str, Way] = {
    "one shape": _pair(_PLAIN, _of(SHAPE, SHAPE)),
    "with a key": _keyed(rows=False),
    "a key for each row": _keyed(rows=True),
    "with a generator": _generator(),
    "log_var of a column": _pair(_PLAIN, _of(SHAPE, _COLUMN)),
    "log_var of a row": _pair(_PLAIN, _of(SHAPE, _ROW)),
    "bfloat16 mu, float32 log_var": _pair(_PLAIN, _mixed),
    "halves, as chunk leaves them": _pair(_PLAIN, _chunk),
    "within autocast": _pair(_PLAIN, _of(SHAPE, SHAPE), _autocast),
    "log_std": _pair(FORMS["log_std"].sample(), _of(SHAPE, SHAPE)),
    "log_std, 8 x 32": _pair(FORMS["log_std"].sample(), _of((8, 32), (8, 32)))._replace(
        shape=(8, 32)
    ),
    "rho": _pair(FORMS["rho"].sample(), _of(SHAPE, SHAPE)),
    "rho, min_std": _pair(FORMS["rho, min_std"].sample(), _of(SHAPE, SHAPE)),
    "log_var, clamp": _pair(FORMS["log_var, clamp"].sample(), _of(SHAPE, SHAPE)),
    "std": _pair(_STD, _of(SHAPE, SHAPE)),
    "std of a column": _pair(_STD, _of(SHAPE, _COLUMN)),
    "one std": _pair(_STD, _of(SHAPE, ())),
    "16 samples": _pair(FORMS["log_var"].samples(16), _of(SHAPE, SHAPE))._replace(
        shape=(16, *SHAPE)
    ),
    "compiled": Way(_compiled),
    "20 calls in one graph": Way(_chain, PASSES[1:]),
    "vmap of grad": Way(_vmap, PASSES[1:]),
    "nn.Reparameterize": Way(_module),
    "reparam_fused.Normal": _own_normal(()),
    "reparam_fused.Normal, 16 samples": _own_normal((16,)),
    'patch("normal")': _patched_normal(SHAPE, ()),
    'patch("normal"), 16 samples of 8': _patched_normal((8,), (16,)),
    'patch("normal"), 5 samples': _patched_normal(SHAPE, (5,)),
    "patch(cls), latents of 8 x 4 x 4 x 4": Way(_patched_class, shape=(8, 4, 4, 4)),
    "KL": _pair(Pair(_kl, eager_kl), _of(SHAPE, SHAPE)),
    "KL of a column": _pair(Pair(_kl, eager_kl), _of(SHAPE, _COLUMN)),
    "KL, mean of sums": _pair(_mean_of_sum("KL"), _of(SHAPE, SHAPE)),
    "z, KL, mean of sums": _pair(_mean_of_sum("z, KL"), _of(SHAPE, SHAPE)),
    "KL of two, mean of sums": _pair(_mean_of_sum("KL of two"), _of(*[SHAPE] * 4)),
    "z, KL of two, mean of sums": _pair(_mean_of_sum("z, KL of two"), _of(*[SHAPE] * 4)),
    "z, log q, mean of sums": _pair(_mean_of_sum("z, log q"), _of(SHAPE, SHAPE)),
    "tanh z, log q, 256 x 6": _pair(
        _mean_of_sum("tanh z, log q"), _of((256, 6), (256, 6))
    )._replace(shape=(256, 6)),
    "noise": _of_a_key("noise", "normal", *SHAPE),
    "split": _of_a_key("split", "split", 2),
    "fold_in": _of_a_key("fold_in", "fold_in", 3),
}
