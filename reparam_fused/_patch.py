"""The fused op in code that knows nothing of it: methods of other libraries, replaced and put back.

A replaced method takes what the compiled kernels take, and leaves the rest to the original
before anything is drawn.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.types import _size

from . import _call, _extensions, _validate
from ._forms import SAMPLE
from .functional import fused_kl_divergence, fused_reparameterize

# The reference path is slower than what it would replace.
_SERVED = {
    "cpu": _extensions.library is not None,
    "cuda": _extensions.has_cuda or _extensions.has_triton,
    "xpu": _extensions.has_triton,
}
_DEVICES = frozenset(device for device, served in _SERVED.items() if served)


def _fusible(mean: object, spread: object) -> bool:
    """Whether the kernels take these two, and give what torch's own operations would."""
    # By exact type: what a subclass means by an operation is its own affair.
    if type(mean) not in (Tensor, torch.nn.Parameter):
        return False
    if type(spread) not in (Tensor, torch.nn.Parameter):
        return False
    assert isinstance(mean, Tensor)
    assert isinstance(spread, Tensor)
    return (
        mean.device.type in _DEVICES
        and mean.device == spread.device
        and mean.dtype in _validate.DTYPES
        and spread.dtype in _validate.DTYPES
        # Without dimensions it does not count for the dtype of the result, expanded it would.
        and (mean.dtype == spread.dtype or mean.dim() > 0)
        and mean.layout == spread.layout == torch.strided
        and not (mean.is_nested or spread.is_nested)
        # torch.jit.trace would record an op that a process without this package cannot load.
        and not torch._C._get_tracing_state()
        and forward_ad._current_level < 0
    )


def _plain_call(loc: Tensor, std: Tensor) -> Tensor | None:
    """Nearly every call, which _fusible would make a third longer."""
    return _call.plain(SAMPLE["std"], loc, std)


@dataclass
class _Replacement:
    """Methods of a class that were replaced, by any number of patches."""

    owner: type
    methods: dict[str, Callable[..., Tensor]]
    # What the class itself held under these names, which may be nothing
    own: dict[str, Any]
    patches: int = 0


# By target. A global, because torch.compile sees no guard in what a method closes over.
_replacements: dict[str, _Replacement] = {}
_lock = threading.Lock()


def _normal(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def rsample(self: torch.distributions.Normal, sample_shape: _size = ()) -> Tensor:
        loc, scale = self.loc, self.scale
        if "normal" not in _replacements:
            return original(self, sample_shape)
        if len(sample_shape) == 0 and not torch.compiler.is_compiling():
            z = _plain_call(loc, scale)
            if z is not None:
                return z
        if not _fusible(loc, scale):
            return original(self, sample_shape)
        shape = self._extended_shape(sample_shape)
        if loc.shape != shape:
            loc, scale = loc.expand(shape), scale.expand(shape)
        return fused_reparameterize(loc, std=scale)

    return rsample


def _diffusers_sample(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def sample(self: Any, generator: object = None) -> Tensor:
        mean, log_var = self.mean, self.logvar
        if (
            "diffusers" in _replacements
            and not self.deterministic
            and _fusible(mean, log_var)
            and (generator is None or isinstance(generator, torch.Generator))
            and (generator is None or generator.device.type == mean.device.type)
        ):
            return fused_reparameterize(mean, log_var, generator=generator)
        return original(self, generator)

    return sample


def _diffusers_kl(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def kl(self: Any, other: object = None) -> Tensor:
        mean, log_var = self.mean, self.logvar
        if (
            "diffusers" in _replacements
            and other is None
            and not self.deterministic
            and _fusible(mean, log_var)
        ):
            return fused_kl_divergence(mean, log_var).sum([1, 2, 3])
        return original(self, other)

    return kl


class _Target(NamedTuple):
    module: str
    owner: str
    replace: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]]


_TARGETS = {
    "normal": _Target("torch.distributions.normal", "Normal", {"rsample": _normal}),
    "diffusers": _Target(
        "diffusers.models.autoencoders.vae",
        "DiagonalGaussianDistribution",
        {"sample": _diffusers_sample, "kl": _diffusers_kl},
    ),
}


def _install(target: str, owner: type) -> None:
    replacement = _replacements.get(target)
    if replacement is None:
        replace = _TARGETS[target].replace
        methods = {name: new(getattr(owner, name)) for name, new in replace.items()}
        own = {name: vars(owner)[name] for name in replace if name in vars(owner)}
        replacement = _replacements[target] = _Replacement(owner, methods, own)
        for name, method in methods.items():
            setattr(owner, name, method)
    replacement.patches += 1


def _remove(target: str) -> None:
    replacement = _replacements[target]
    replacement.patches -= 1
    if replacement.patches > 0:
        return
    del _replacements[target]
    owner = replacement.owner
    for name, method in replacement.methods.items():
        # Somebody's wrapper, which may still call the method: it now goes to the original.
        if vars(owner).get(name) is not method:
            continue
        if name in replacement.own:
            setattr(owner, name, replacement.own[name])
        else:
            delattr(owner, name)


class Patch:
    """A patch in force, as :func:`patch` returns it: :meth:`undo`, or the end of ``with``."""

    def __init__(self, owners: dict[str, type]) -> None:
        self._targets: tuple[str, ...] | None = tuple(owners)
        with _lock:
            for target, owner in owners.items():
                _install(target, owner)

    def undo(self) -> None:
        """Take the patch back. A second call does nothing."""
        with _lock:
            for target in self._targets or ():
                _remove(target)
            self._targets = None

    def __enter__(self) -> Patch:
        if self._targets is None:
            raise RuntimeError("patch(): this patch was undone; call patch() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def patch(*targets: str) -> Patch:
    """Make code that knows nothing of this package use the fused op.

    ``"normal"`` replaces ``torch.distributions.Normal.rsample``, and with it what samples
    through it: ``LogNormal``, ``Independent``, Pyro, scvi-tools, stable-baselines3.
    ``"diffusers"`` replaces ``DiagonalGaussianDistribution.sample``, the latents of the
    autoencoders of diffusers, and its ``kl`` from the standard normal, by
    :func:`fused_kl_divergence`.

    The patch is in force from the call on, in all threads, until ``undo()`` of what it
    returns, or the end of a ``with`` block. Patches nest and overlap: the last one undone
    puts the original back. A method that somebody else has replaced since is left to them.
    What ``torch.compile`` compiled before stays as it was, until ``torch.compiler.reset()``.

    Distributions, divergences, gradients, shapes and dtypes are those of the original; the noise is
    that of :func:`fused_reparameterize`, which ``torch.manual_seed`` and generators
    seed, but with other numbers. What the kernels do not take goes to the original: other
    dtypes, devices without a compiled kernel, tensors that are not dense, subclasses of
    Tensor, ``torch.jit.trace``, forward-mode differentiation; for diffusers a deterministic
    distribution, lists of generators, a generator of another device than the latents, and
    the divergence from another distribution than the standard normal.

    Args:
        *targets (str): ``"normal"``, ``"diffusers"``. Default: ``"normal"``, and
            ``"diffusers"`` if that library has been imported by then.

    Returns:
        Patch: has ``undo()``, and is a context manager.

    Raises:
        TypeError: a target is not a str.
        ValueError: an unknown target.
        ImportError: the library of a target is missing. Nothing is patched then.

    Example::

        >>> import torch, reparam_fused
        >>> normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        >>> with reparam_fused.patch("normal"):
        ...     z = normal.rsample((2,))  # one kernel
        >>> z.shape
        torch.Size([2, 3])
    """
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"patch(): argument 'targets' must be str, not {type(target).__name__}")
        if target not in _TARGETS:
            names = " or ".join(f"'{name}'" for name in _TARGETS)
            raise ValueError(f"patch(): targets must be {names}, got '{target}'")
    if not targets:
        targets = ("normal", "diffusers") if "diffusers" in sys.modules else ("normal",)
    # All libraries are imported before the first class is touched.
    owners = {t: getattr(import_module(_TARGETS[t].module), _TARGETS[t].owner) for t in targets}
    return Patch(owners)
