"""What classes like DiagonalGaussianDistribution compute, found out by asking them.

Many projects carry a copy of LDM's class, and few are quite alike: sample() may return a tuple,
kl() a mean, the noise may be of another dtype than the mean. So a class is asked, on an instance
made up for that, of small tensors on the CPU; what it answers as a fused op would is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """What is known of a class."""

    #: sample() is mean + sigma eps, of the sigma that has this form, of this attribute
    form: str
    scale: str
    #: Whether eps is of torch's default dtype, and not of the mean's
    default_dtype: bool
    #: The first argument of sample() and of kl(), if it is the generator and the other
    generator: str | None
    other: str | None
    #: Whether it may be a list, of one generator or of one for each row
    of_rows: bool
    #: Of a mean of so many dimensions kl() sums over these
    sums: Mapping[int, tuple[int, ...]]


def first_argument(
    name: str | None, args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[bool, Any]:
    """Whether a call gives nothing, or but the first argument, of this name; and what it gives."""
    if not args and not options:
        return True, None
    if name is not None and len(args) + len(options) == 1 and (args or name in options):
        return True, args[0] if args else options[name]
    return False, None


# What autograd has on record of an instance's tensors. The gradient of a sample then goes to
# where they come from, in one step in place of one for each function on the way.


def _untouched(t: Tensor) -> bool:
    """Whether t is as its function left it, and nobody waits for its gradient."""
    return t._version == 0 and not t.retains_grad and not t._backward_hooks


def is_exp_of_half(std: Tensor, log_var: object) -> bool:
    """Whether std is exp(log_var / 2)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    exp = std.grad_fn
    if not isinstance(log_var, Tensor) or exp is None or exp.name() != "ExpBackward0":
        return False
    half, _ = exp.next_functions[0]
    if half is None or half.name() not in ("MulBackward0", "DivBackward0"):
        return False
    (node, output), *others = half.next_functions
    return (
        node is not None
        and node is log_var.grad_fn
        and output == log_var.output_nr
        and all(other is None for other, _ in others)
        and _untouched(std)
        and log_var._version == 0
        and _number(half) == (0.5 if half.name() == "MulBackward0" else 2.0)
    )


def _number(node: Any) -> float | None:
    """What a tensor was multiplied with or divided by, if that was a number."""
    try:
        number: Tensor = node._saved_other
    except RuntimeError:  # a backward has been, and let it go
        return None
    return number.item() if number.dim() == 0 and number.is_cpu else None


def unclamped(log_var: Tensor) -> tuple[Tensor, tuple[float, float] | None]:
    """What log_var is the clamp of, and the ends; itself if it is none of numbers."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return log_var, None
    node: Any = log_var.grad_fn
    if node is None or node.name() != "ClampBackward1" or not _untouched(log_var):
        return log_var, None
    low, high = node._saved_min, node._saved_max
    try:
        # With a hook it would be unpacked, which may be a computation: a checkpoint's.
        if node._raw_saved_self.unpack_hook is not None or None in (low, high) or low > high:
            return log_var, None
        return node._saved_self, (low, high)
    except (AttributeError, RuntimeError):  # of an older torch; let go, or changed in place
        return log_var, None


def posterior(cls: type) -> Posterior | None:
    """What this class is found to compute; None if its sample() is none that could be fused."""
    with torch.random.fork_rng(devices=()), torch.device("cpu"), torch.no_grad():
        generator = _first_if(cls.sample, "generator")  # type: ignore[attr-defined]
        found = _scale_of(cls, generator)
        if found is None:
            return None
        low = _ask(cls, "sample", _any_fields((2, 4), torch.bfloat16))
        default_dtype = isinstance(low, Tensor) and low.dtype != torch.bfloat16
        kl = getattr(cls, "kl", None)
        other = None if kl is None else _first_if(kl, "other")
        sums = {} if kl is None else _sums(cls)
        of_rows = generator is not None and _takes_a_list(cls)
        return Posterior(*found, default_dtype, generator, other, of_rows, sums)


def _first_if(method: Any, name: str) -> str | None:
    """The name of the first argument, if it is this one."""
    return name if list(inspect.signature(method).parameters)[1:2] == [name] else None


def _ask(cls: type, method: str, fields: Mapping[str, Tensor], *args: Any) -> Any:
    """What the method returns of an instance that holds these fields, and no more."""
    instance: Any = object.__new__(cls)
    others = {
        "parameters": torch.cat([fields["mean"], fields["logvar"]], 1),
        "deterministic": False,
        "device": torch.device("cpu"),
    }
    for name, value in {**others, **fields}.items():
        with suppress(AttributeError):  # a property, or a class of slots without it
            object.__setattr__(instance, name, value)
    return getattr(cls, method)(instance, *args)


def _any_fields(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of which none follows from another."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).to(dtype)
        for name in ("mean", "logvar", "std", "var")
    }


def _scale_of(cls: type, generator: str | None) -> tuple[str, str] | None:
    """The form and the attribute of what sample() multiplies its noise with."""
    fields = _any_fields((2, 4, 16, 16), torch.float64)
    zero = torch.zeros_like(fields["mean"])
    standard = {"mean": zero, "logvar": zero, "std": zero + 1, "var": zero + 1}

    def draw(fields: Mapping[str, Tensor], seed: int) -> Any:
        if generator is not None:
            return _ask(cls, "sample", fields, torch.Generator().manual_seed(seed))
        # The CPU's alone: torch.manual_seed would go to those of all devices.
        torch.default_generator.manual_seed(seed)
        return _ask(cls, "sample", fields)

    eps, other_eps, z = draw(standard, 3), draw(standard, 4), draw(fields, 3)
    if not all(isinstance(t, Tensor) and t.shape == zero.shape for t in (eps, other_eps, z)):
        return None
    if torch.equal(eps, other_eps):
        return None
    # Mean and variance, and next to each element another; within 5 standard errors.
    error = 5 * eps.numel() ** -0.5
    neighbours = [(eps * eps.roll(1, dim)).mean() for dim in range(eps.dim())]
    if max(map(abs, (eps.mean(), (eps.var() - 1) / 2**0.5, *neighbours))) > error:
        return None
    for form, scale, sigma in (
        ("std", "std", fields["std"]),
        ("log_var", "logvar", torch.exp(0.5 * fields["logvar"])),
    ):
        if torch.allclose(z.double(), fields["mean"] + sigma * eps, rtol=1e-6, atol=1e-6):
            return form, scale
    return None


def _takes_a_list(cls: type) -> bool:
    """Whether sample() takes a list of generators, of which each draws a row as it does alone."""
    fields = _any_fields((2, 4), torch.float64)

    def draw(rows: slice, *seeds: int) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return _ask(cls, "sample", {name: t[rows] for name, t in fields.items()}, generators)

    def draw_alone(rows: slice, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return _ask(cls, "sample", {name: t[rows] for name, t in fields.items()}, generator)

    with suppress(Exception):  # most take none, and have words of their own for that
        rows = [draw_alone(slice(i, i + 1), 3 + i) for i in range(2)]
        return torch.equal(draw(slice(2), 3, 4), torch.cat(rows)) and torch.equal(
            draw(slice(2), 3), draw_alone(slice(2), 3)
        )
    return False


def _sums(cls: type) -> dict[int, tuple[int, ...]]:
    """The dimensions over which kl() sums the divergence from the standard normal."""
    sums: dict[int, tuple[int, ...]] = {}
    for dim in range(2, 6):
        fields = _any_fields((2, 3, 4, 5, 6)[:dim], torch.float64)
        mean, log_var = fields["mean"], fields["logvar"]
        fields["std"], fields["var"] = torch.exp(0.5 * log_var), torch.exp(log_var)
        each = 0.5 * (mean.square() + fields["var"] - 1 - log_var)
        # What it cannot tell of so little an instance, it is left to tell itself.
        with suppress(Exception):
            kl = _ask(cls, "kl", fields)
            for over in (tuple(range(1, dim)), (1, 2, 3)[: dim - 1]):
                expected = each.sum(over)
                if kl.shape == expected.shape and torch.allclose(kl, expected, rtol=1e-9):
                    sums[dim] = over
    return sums
