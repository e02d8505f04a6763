"""The fused op in code that knows nothing of it: methods of other libraries, replaced and put back.

A replaced method takes what the compiled kernels take, and leaves the rest to the original
before anything is drawn.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.types import _size

from . import _call, _extensions, _ops, _posteriors, _validate
from ._autograd import recorded
from ._forms import SAMPLE, Call
from ._heads import Head, heads_of
from ._posteriors import Posterior, first_argument, is_exp_of_half, unclamped
from .functional import fused_kl_divergence, fused_reparameterize

# The reference path is slower than what it would replace.
_SERVED = {
    "cpu": _extensions.library is not None,
    "cuda": _extensions.has_cuda or _extensions.has_triton,
    "xpu": _extensions.has_triton,
}
_DEVICES = frozenset(device for device, served in _SERVED.items() if served)


def _one_dtype(mean: object, spread: object) -> bool:
    """Whether expanded these give the dtype that they give as they are.

    Without dimensions one of two dtypes does not count for that of the result, expanded it does.
    """
    return (
        isinstance(mean, Tensor)
        and isinstance(spread, Tensor)
        and (mean.dtype == spread.dtype or mean.dim() > 0)
    )


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
        and _one_dtype(mean, spread)
        and mean.layout == spread.layout == torch.strided
        and not (mean.is_nested or spread.is_nested)
        # torch.jit.trace would record an op that a process without this package cannot load.
        and not torch._C._get_tracing_state()
        # There torch would take the tangent of an op for zero.
        and not (is_compiling() and forward_ad._current_level >= 0)
    )


def _plain_call(
    call: Call,
    mean: Any,
    scale: Any,
    generator: Any = None,
    source: tuple[Call, Tensor] | None = None,
) -> Tensor | None:
    """Nearly every call, which _fusible would make a third longer."""
    if is_compiling():
        return None
    if source is None:
        return _call.plain(call, mean, scale, None, generator)
    result = call.plain_draw(mean, scale, generator)
    return None if result is None else _recorded(source, result, mean)


def _recorded(source: tuple[Call, Tensor], result: tuple[Tensor, Tensor], mean: Tensor) -> Tensor:
    """A sample, of which autograd is told that it was made of the source of its scale."""
    call, scale = source
    return recorded(call, result, mean, scale)


def _recorded_call(
    source: tuple[Call, Tensor],
    call: Call,
    mean: Tensor,
    scale: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """By the op, where the call is not plain."""
    with torch.no_grad():
        result = _ops.sample(mean, scale, generator, call.form.name)
    return _recorded(source, result, mean)


def _records_alone() -> bool:
    """Whether nothing but autograd itself follows what is done."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


Method: TypeAlias = Callable[..., Any]
#: By the name of a method what makes, of the class and of its own one, the one that replaces it
_Methods: TypeAlias = Mapping[str, Callable[[type, Method], Method]]


@dataclass
class _Replacement:
    """Methods of a class that were replaced, by any number of patches."""

    makers: _Methods
    methods: dict[str, Method]
    # What the class itself held under these names, which may be nothing
    own: dict[str, Any]
    patches: int = 0


# By class. A global, because torch.compile sees no guard in what a method closes over.
_replacements: dict[type, _Replacement] = {}
_lock = threading.Lock()


@functools.lru_cache(typed=True)  # 1.0 is no size
def _of_samples(samples: int) -> Call:
    """Made anew it would be the most that a small call does in Python."""
    return SAMPLE["std"]._replace(samples=samples)


def _drawn(owner: type, distribution: torch.distributions.Normal, shape: _size) -> Tensor | None:
    """Fused samples of a normal distribution; None where they are left to the original."""
    if owner not in _replacements:
        return None
    loc, scale = distribution.loc, distribution.scale
    call = SAMPLE["std"]
    if len(shape) > 0:
        call = _of_samples(math.prod(shape))
    if call.samples is None or _one_dtype(loc, scale):
        z = _plain_call(call, loc, scale)
        if z is not None:
            return _call.as_sampled(z, shape)
    if not _fusible(loc, scale) or loc.shape != scale.shape:
        return None
    return fused_reparameterize(loc, std=scale, sample_shape=shape)


def _normal_rsample(owner: type, original: Method) -> Method:
    @functools.wraps(original)
    def rsample(self: torch.distributions.Normal, sample_shape: _size = ()) -> Tensor:
        z = _drawn(owner, self, sample_shape)
        return original(self, sample_shape) if z is None else z

    return rsample


def _normal_sample(owner: type, original: Method) -> Method:
    @functools.wraps(original)
    def sample(self: torch.distributions.Normal, sample_shape: _size = ()) -> Tensor:
        with torch.no_grad():
            z = _drawn(owner, self, sample_shape)
            # torch.normal has the dtype of the mean.
            return original(self, sample_shape) if z is None else z.to(self.loc.dtype)

    return sample


def _draws_by(generator: object, mean: Tensor) -> bool:
    """Whether the kernels draw for this mean by what was given as a generator."""
    return generator is None or (
        isinstance(generator, torch.Generator) and generator.device.type == mean.device.type
    )


def _of_list(generators: Any, mean: Tensor, scale: Tensor) -> tuple[Any, Tensor | None]:
    """A generator and no key, or keys of rows in place of a list of generators.

    As randn_tensor of diffusers takes a list: one draws all, of more each draws its row, as it
    would alone. What it does not take is given back for the original to refuse.
    """
    if not isinstance(generators, list):
        return generators, None
    if len(generators) == 1:
        return generators[0] if isinstance(generators[0], torch.Generator) else generators, None
    rows = mean.shape[0] if mean.dim() > 0 and mean.shape == scale.shape else 0
    given = generators[:rows]
    if (
        rows == 0
        or len(given) < rows
        or torch._C._are_functorch_transforms_active()
        or not all(isinstance(g, torch.Generator) and _draws_by(g, mean) for g in given)
    ):
        return generators, None
    row = mean.detach()[:1], scale.detach()[:1]
    return None, torch.stack([_ops.draw_key(*row, None, g) for g in given])


# sample() and kl() of one instance in one pass: where kl() was asked of what was sampled last, the
# next sample is made with its divergence, for kl() to find. In the graph of autograd the two stay
# the two functions that they are: the bits of neither depend on what was asked before, and a
# backward of one leaves the other's alone. That is for plain calls, on the CPU: on a GPU, where a
# sample draws its key itself, a key and then both would be as many kernels as the two are.


@dataclass
class _Pair:
    """What is known of a class of which kl() is asked."""

    #: The mean of what was sampled last, and whether kl() of that has been asked since
    sampled: weakref.ref[Tensor] | None = None
    asked: bool = False
    #: How many more divergences may be made in vain: each that kl() finds pays for one
    credit: int = 1


# Of the classes that are patched, as _replacements: apart from it, for torch.compile guards that.
_pairs: dict[type, _Pair] = {}


class _Kept:
    """The sums of a divergence, and of which tensors as they were they are."""

    __slots__ = ("log_var", "mean", "total", "versions")

    def __init__(self, mean: Tensor, log_var: Tensor, total: Tensor) -> None:
        # Weakly: an instance may be given others, and these go.
        self.mean, self.log_var = weakref.ref(mean), weakref.ref(log_var)
        self.versions = mean._version, log_var._version
        self.total = total

    def is_of(self, mean: Tensor, log_var: Tensor) -> bool:
        return (
            self.mean() is mean
            and self.log_var() is log_var
            and self.versions == (mean._version, log_var._version)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ()  # a copy of an instance has tensors of its own


_KEPT = "_reparam_fused_kl"


@functools.lru_cache(maxsize=64)
def _in_one_pass(
    shape: torch.Size, stride: tuple[int, ...], other: tuple[int, ...], sums: tuple[int, ...]
) -> bool:
    """Whether it sums over the last dimensions, and gives z in the order that two tensors of
    these strides have added up."""
    n = len(shape)
    mean, scale = (torch.empty_strided(shape, t, device="meta") for t in (stride, other))
    row_major = torch.empty(shape, device="meta").stride()
    return sums == tuple(range(n - len(sums), n)) and torch.add(mean, scale).stride() == row_major


def _sample_with_kl(
    pair: _Pair,
    instance: Any,
    call: Call,
    mean: Tensor,
    scale: Tensor,
    sums: tuple[int, ...] | None,
    generator: Any,
) -> Tensor | None:
    """The sample, for which the instance keeps its divergence; None where they are to be apart."""
    if sums is None or not mean.is_cpu or call.form.name != "log_var":
        return None
    asked, pair.asked, pair.sampled = pair.asked, False, weakref.ref(mean)
    if not asked or pair.credit == 0 or mean.shape != scale.shape or not _draws_by(generator, mean):
        return None
    held: dict[str, Any] = getattr(instance, "__dict__", {})
    log_var = held.get("logvar")
    if (
        # Made anew whenever it is asked for
        not isinstance(log_var, Tensor)
        # Whose versions are not counted
        or mean.is_inference()
        or log_var.is_inference()
        or not _in_one_pass(mean.shape, mean.stride(), scale.stride(), sums)
    ):
        return None
    made = _head(call, sums).plain(mean, scale, None, None, None, generator)
    if made is None:
        return None
    z, total, *key = made
    if key:
        z = recorded(call, (z, *key), mean, scale)
    held[_KEPT] = _Kept(mean, log_var, total)
    pair.credit -= 1
    return z  # type: ignore[no-any-return]


def _head(call: Call, sums: tuple[int, ...]) -> Head:
    return Head(call, "kl_divergence", len(sums))


def _kl_of(
    owner: type,
    instance: Any,
    mean: Tensor,
    log_var: Tensor,
    clamp: tuple[float, float] | None,
    sums: tuple[int, ...],
) -> Tensor:
    """The divergence of an instance, of which a sample may have kept it."""
    total = _kept_kl(owner, instance, mean)
    if total is None:
        total = fused_kl_divergence(mean, log_var, clamp=clamp, dim=sums)
    elif torch.is_grad_enabled() and (mean.requires_grad or log_var.requires_grad):
        head = _head(_log_var_within(clamp), sums)
        given = None, total, None
        _, total = heads_of(head, given).apply(head, given, mean, log_var, None, None)
    if mean.dtype == log_var.dtype == total.dtype:
        return total
    # Half types are added up in float32. On GPUs autocast has the formula in float32 as well.
    return total.to(_call._result_type(mean, _call._autocast_exp(mean, log_var)))


def _kept_kl(owner: type, instance: Any, mean: Tensor) -> Tensor | None:
    """What an instance keeps, which it does not from then on."""
    if is_compiling():
        return None
    pair = _pairs.get(owner)
    if pair is None:
        with _lock:
            if owner in _replacements:
                _pairs[owner] = _Pair()
        return None
    if pair.sampled is not None and pair.sampled() is mean:
        pair.asked = True
    kept = getattr(instance, "__dict__", {}).pop(_KEPT, None)
    if (
        isinstance(kept, _Kept)
        and not torch._C._are_functorch_transforms_active()
        and kept.is_of(mean, instance.logvar)
    ):
        pair.credit += 2
        return kept.total
    return None


def _log_var_within(clamp: tuple[float, float] | None) -> Call:
    call = SAMPLE["log_var"]
    return call if clamp is None else Call(call.form, bounds=(*clamp, 0.0))


def _diffusers_sample(owner: type, original: Method) -> Method:
    @functools.wraps(original)
    def sample(self: Any, generator: Any = None) -> Tensor:
        mean, log_var = self.mean, self.logvar
        if owner not in _replacements or self.deterministic or not _fusible(mean, log_var):
            return original(self, generator)  # type: ignore[no-any-return]
        one, key = _of_list(generator, mean, log_var)
        if key is not None:
            return fused_reparameterize(mean, log_var, key=key)
        if not _draws_by(one, mean):
            return original(self, generator)  # type: ignore[no-any-return]
        if not is_compiling() and (pair := _pairs.get(owner)) is not None:
            sums = _DIFFUSERS_SUMS
            z = _sample_with_kl(pair, self, SAMPLE["log_var"], mean, log_var, sums, one)
            if z is not None:
                return z
        return fused_reparameterize(mean, log_var, generator=one)

    return sample


_DIFFUSERS_SUMS = (1, 2, 3)


def _diffusers_kl(owner: type, original: Method) -> Method:
    @functools.wraps(original)
    def kl(self: Any, other: object = None) -> Tensor:
        mean, log_var = self.mean, self.logvar
        if (
            owner in _replacements
            and other is None
            and not self.deterministic
            and _fusible(mean, log_var)
        ):
            return _kl_of(owner, self, mean, log_var, None, _DIFFUSERS_SUMS)
        return original(self, other)  # type: ignore[no-any-return]

    return kl


class _Scale(NamedTuple):
    """What a sample of an instance is made of."""

    call: Call
    scale: Tensor
    #: Where autograd has it on record that the scale came from: the gradient goes there at once.
    source: tuple[Call, Tensor] | None


def _scale_of(instance: Any, known: Posterior, mean: Any) -> _Scale | None:
    """An instance's scale, if it is as its class was asked.

    Which numbers a sample is made of does not depend on what is on record, which is nothing where
    no gradient is wanted or torch.compile traces: one seed gives the same bits there.
    """
    scale: Any = getattr(instance, known.scale, None)
    if (
        not isinstance(mean, Tensor)
        or not isinstance(scale, Tensor)
        or mean.shape != scale.shape
        or getattr(instance, "deterministic", False)
    ):
        return None
    if known.form == "log_var":
        log_var, clamp = unclamped(scale)
        return _Scale(_log_var_within(clamp), log_var, None)
    source = None
    held: Any = getattr(instance, "logvar", None)
    if is_exp_of_half(scale, held):
        log_var, clamp = unclamped(held)
        source = _log_var_within(clamp), log_var
    return _Scale(SAMPLE[known.form], scale, source)


def _methods_of(cls: type) -> _Methods:
    """What to replace of a class like DiagonalGaussianDistribution."""
    if not callable(getattr(cls, "sample", None)):
        raise TypeError(
            f"patch(): a class must have the method sample, {cls.__qualname__} has none"
        )
    try:
        known = _posteriors.posterior(cls)
    except Exception as error:
        raise ValueError(_refusal(cls)) from error
    if known is None:
        raise ValueError(_refusal(cls))
    methods = {"sample": functools.partial(_posterior_sample, known)}
    if known.sums:
        methods["kl"] = functools.partial(_posterior_kl, known)
    return methods


def _refusal(cls: type) -> str:
    return (
        f"patch(): {cls.__qualname__}.sample() must return mean + std * noise, or mean + "
        "exp(logvar / 2) * noise, of the attributes of these names"
    )


def _fused(call: Call, mean: Tensor, scale: Tensor, **randomness: Any) -> Tensor:
    given_as: dict[str, Any] = {call.form.name: scale}
    clamp = None if call.bounds is None else call.bounds[:2]
    return fused_reparameterize(mean, clamp=clamp, **given_as, **randomness)


def _posterior_sample(known: Posterior, owner: type, original: Method) -> Method:
    @functools.wraps(original)
    def sample(self: Any, *args: Any, **options: Any) -> Any:
        plain, generator = first_argument(known.generator, args, options)
        mean: Any = getattr(self, "mean", None)
        given = _scale_of(self, known, mean) if plain and owner in _replacements else None
        if given is None:
            return original(self, *args, **options)
        call, scale, source = given
        if known.default_dtype and scale.dtype != (default := torch.get_default_dtype()):
            scale = scale.to(torch.promote_types(scale.dtype, default))
        if known.of_rows and isinstance(generator, list) and _fusible(mean, scale):
            generator, key = _of_list(generator, mean, scale)
            if key is not None:
                return _fused(call, mean, scale, key=key)
        z = None
        if not is_compiling() and (pair := _pairs.get(owner)) is not None:
            sums = known.sums.get(mean.dim())
            z = _sample_with_kl(pair, self, call, mean, scale, sums, generator)
        if z is None:
            z = _plain_call(call, mean, scale, generator, source)
        if z is not None:
            return z
        if not (_fusible(mean, scale) and _draws_by(generator, mean)):
            return original(self, *args, **options)
        if source is not None and _records_alone():
            return _recorded_call(source, call, mean, scale, generator)
        return _fused(call, mean, scale, generator=generator)

    return sample


def _posterior_kl(known: Posterior, owner: type, original: Method) -> Method:
    @functools.wraps(original)
    def kl(self: Any, *args: Any, **options: Any) -> Any:
        plain, other = first_argument(known.other, args, options)
        mean: Any = getattr(self, "mean", None)
        log_var: Any = getattr(self, "logvar", None)
        if (
            not plain
            or other is not None
            or owner not in _replacements
            or getattr(self, "deterministic", False)
            or not _fusible(mean, log_var)
            or mean.shape != log_var.shape
            or mean.dim() not in known.sums
            or getattr(self, "var", log_var).dtype != log_var.dtype  # as autocast has exp
        ):
            return original(self, *args, **options)
        return _kl_of(owner, self, mean, *unclamped(log_var), known.sums[mean.dim()])

    return kl


class _Target(NamedTuple):
    module: str
    owner: str
    methods: _Methods


_TARGETS = {
    "normal": _Target(
        "torch.distributions.normal",
        "Normal",
        {"rsample": _normal_rsample, "sample": _normal_sample},
    ),
    "diffusers": _Target(
        "diffusers.models.autoencoders.vae",
        "DiagonalGaussianDistribution",
        {"sample": _diffusers_sample, "kl": _diffusers_kl},
    ),
}


def _found(target: str | type) -> tuple[type, _Methods]:
    """The class of a target, and what to replace of it."""
    if isinstance(target, str):
        module, owner, methods = _TARGETS[target]
        return getattr(import_module(module), owner), methods
    if target in _replacements:
        return target, _replacements[target].makers
    for module, owner, methods in _TARGETS.values():
        if getattr(sys.modules.get(module), owner, None) is target:
            return target, methods
    return target, _methods_of(target)


def _install(owner: type, methods: _Methods) -> None:
    replacement = _replacements.get(owner)
    if replacement is None:
        new = {name: make(owner, getattr(owner, name)) for name, make in methods.items()}
        own = {name: vars(owner)[name] for name in methods if name in vars(owner)}
        replacement = _replacements[owner] = _Replacement(methods, new, own)
        for name, method in new.items():
            setattr(owner, name, method)
    replacement.patches += 1


def _remove(owner: type) -> None:
    replacement = _replacements[owner]
    replacement.patches -= 1
    if replacement.patches > 0:
        return
    del _replacements[owner]
    _pairs.pop(owner, None)
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

    def __init__(self, targets: Mapping[type, _Methods]) -> None:
        self._owners: tuple[type, ...] | None = tuple(targets)
        with _lock:
            for owner, methods in targets.items():
                _install(owner, methods)

    def undo(self) -> None:
        """Take the patch back. A second call does nothing."""
        with _lock:
            for owner in self._owners or ():
                _remove(owner)
            self._owners = None

    def __enter__(self) -> Patch:
        if self._owners is None:
            raise RuntimeError("patch(): this patch was undone; call patch() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def patch(*targets: str | type) -> Patch:
    """Make code that knows nothing of this package use the fused op.

    ``"normal"`` replaces ``rsample`` and ``sample`` of ``torch.distributions.Normal``, and with
    them what samples through them: ``LogNormal``, ``Independent``, Pyro, scvi-tools,
    stable-baselines3.
    ``"diffusers"`` replaces ``DiagonalGaussianDistribution.sample``, the latents of the
    autoencoders of diffusers, and its ``kl`` from the standard normal, by
    :func:`fused_kl_divergence`.

    A class stands for itself: a project's copy of ``DiagonalGaussianDistribution``, such as
    that of latent diffusion, or one that gives the standard deviation otherwise, such as
    ``OobleckDiagonalGaussianDistribution``. It is asked what it computes, by calls of its own
    methods on a small instance that is made up for that, on the CPU; no generator moves on.

    - ``sample()`` is replaced if it returns ``mean + std * noise``, or ``mean + exp(logvar / 2) *
      noise``, of the attributes of these names, with noise that is standard normal; if its
      first argument is called ``generator``, noise of that, or of a list of generators if it
      takes one. A class of which that is not so is refused. At most it may look at
      ``parameters``, ``device`` and ``deterministic`` beside.
    - ``kl()`` is replaced for a mean of 2 to 5 dimensions if it returns the divergence from the
      standard normal, summed over all dimensions but the first, or over the first three after
      it; else it is left as it is. Where it is replaced, ``var`` is taken to be ``exp(logvar)``.
    - Where ``sample()`` is of ``logvar``, as that of diffusers is taken to be, and ``kl()`` is
      asked after it, the next instance of the class has both from one pass, on the CPU: it holds
      the divergence until ``kl()`` takes it, or its tensors are others. The numbers and the
      gradients are those of the two calls made apart.
    - Everything else, ``__init__`` among it, is left as it is: what an instance holds when it is
      asked is what counts. Where autograd has it on record that ``std`` is still ``exp(logvar /
      2)``, and ``logvar`` a clamp by numbers, the gradient passes both by, unless it is retained
      there. A call with other arguments, or of an
      instance that is ``deterministic``, or whose scale is of another shape than the mean, is
      left to the original.

    The patch is in force from the call on, in all threads, until ``undo()`` of what it
    returns, or the end of a ``with`` block. Patches nest and overlap: the last one undone
    puts the original back. A method that somebody else has replaced since is left to them.
    What ``torch.compile`` compiled before stays as it was, until ``torch.compiler.reset()``.

    Distributions, divergences, gradients, shapes and dtypes are those of the original; the noise is
    that of :func:`fused_reparameterize`, which ``torch.manual_seed`` and generators
    seed, but with other numbers. One seed gives one draw wherever it does so without the patch:
    ``sample`` what ``rsample`` does, with gradients or without, compiled by the backends ``eager``
    and ``aot_eager`` or not, by a generator or a list of that one, of a row alone or by its
    generator in a list. There are two exceptions, ``torch.jit.trace`` and ``torch.vmap``, within
    which the same seed gives other numbers. What the kernels do not take goes to the original:
    other dtypes, devices without a compiled kernel, tensors that are not dense, subclasses of
    Tensor, ``torch.jit.trace``, forward-mode differentiation within ``torch.compile``; for
    diffusers a deterministic distribution, a generator of another device than the latents, and
    the divergence from another distribution than the standard normal.

    Args:
        *targets (str or type): ``"normal"``, ``"diffusers"``, or a class. Default:
            ``"normal"``, and ``"diffusers"`` if that library has been imported by then.

    Returns:
        Patch: has ``undo()``, and is a context manager.

    Raises:
        TypeError: a target is neither a str nor a class, or is a class without ``sample``.
        ValueError: an unknown target, or a class whose ``sample`` computes something else.
        ImportError: the library of a target is missing. Nothing is patched then.

    Examples:
        >>> import torch, reparam_fused
        >>> normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        >>> with reparam_fused.patch("normal"):
        ...     z = normal.rsample((2,))  # one kernel
        >>> z.shape
        torch.Size([2, 3])
        >>> class Posterior:
        ...     def __init__(self, mean, logvar):
        ...         self.mean, self.std = mean, torch.exp(0.5 * logvar)
        ...     def sample(self):
        ...         return self.mean + self.std * torch.randn_like(self.mean)
        >>> with reparam_fused.patch(Posterior):
        ...     z = Posterior(torch.zeros(3), torch.zeros(3)).sample()  # one kernel
    """
    for target in targets:
        if not isinstance(target, (str, type)):
            raise TypeError(
                f"patch(): argument 'targets' must be str or a class, not {type(target).__name__}"
            )
        if isinstance(target, str) and target not in _TARGETS:
            names = ", ".join(f"'{name}'" for name in _TARGETS)
            raise ValueError(f"patch(): targets must be {names} or a class, got '{target}'")
    if not targets:
        targets = ("normal", "diffusers") if "diffusers" in sys.modules else ("normal",)
    # All libraries are imported, and all classes asked, before the first one is touched.
    return Patch(dict(map(_found, targets)))
