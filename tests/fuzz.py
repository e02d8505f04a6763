"""Random calls of every public function and of every op, with arguments that are hostile.

    python tests/fuzz.py --calls 100000 --seed 0     minutes on one core; a table, and what is wrong
    python tests/fuzz.py --seed 0 --only 1234        that call of it again, with its traceback

Each argument is one that the call has to take, one that it has to refuse, or one that it may do
either with. A call has to give the right answer (that of reference.py, as bits) or to raise
TypeError, ValueError, IndexError or RuntimeError, of which a public function's names itself and the
argument. It must not end the process, hang, change an input, or raise and leave a generator
moved. The calls run in a process of their own, whose end, or silence, counts against the call that
it was at. The exit status is the number of findings.

A tensor whose storage was freed is left out: torch's own addition ends the process with it.
"""

from __future__ import annotations

import argparse
import math
import queue
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import reparam_fused as rf
from reparam_fused import _forms, _ops, reference
from reparam_fused._validate import DTYPES
from reparam_fused.check.parts import bits_of

# What a call has to do with an argument. Of several the greatest counts.
TAKE, EITHER, REFUSE = range(3)
FORMS = ("log_var", "log_std", "std", "rho")
# Seconds that a call may take, and bytes that it may have
LIMIT = 30.0
MEMORY = 2**30
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|overflow|out of memory|storage size|less than 2\^63", re.I
)
HUGE = (2**62, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**400)


class Given(NamedTuple):
    value: Any
    verdict: int = TAKE
    text: str = ""

    def __str__(self) -> str:
        return self.text or repr(self.value)[:60]


class Subclass(Tensor):
    """One that does nothing of its own."""


class Nothing:
    """Of no use for anything."""

    __hash__ = None  # type: ignore[assignment]


def same(value: Any, other: Any) -> bool:
    """What there is may not be comparable."""
    return type(value) is type(other) and bool(value == other)


def junk(rng: random.Random) -> Any:
    """No argument of any function is one of these."""
    return rng.choice(
        [
            "x",
            b"x",
            1j,
            {},
            {"a": 1},
            {1.5},
            object(),
            Nothing(),
            Nothing,
            Tensor,
            torch.float32,
            np.array([0.5, 2.5]),
            np.array(["x"]),
            [[1.5], [2]],
            [None, "x"],
            slice(3),
            lambda *_: None,
            torch.tensor([1.5, 2.5]),
            torch.tensor([[True]]),
            torch.zeros(3).to_sparse(),
        ]
    )


@dataclass
class Maker:
    """The arguments of one call, around one shape of its result."""

    rng: random.Random
    hostility: float
    device: torch.device
    shape: tuple[int, ...] = ()
    huge: bool = False  # whether a tensor was given that no memory holds

    def __post_init__(self) -> None:
        self.shape = self.rng.choice(
            [(), (0,), (1,), (3,), (5,), (33,), (2, 3), (4, 1, 3), (2, 0, 3), (1, 1), (2, 3, 4, 5)]
        )

    def hostile(self) -> bool:
        return self.rng.random() < self.hostility

    # Tensors

    def values(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        n = math.prod(shape)
        special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, -200.0, 90.0]
        odd = self.rng.random() < 0.15
        numbers = [
            self.rng.choice(special) if odd and self.rng.random() < 0.2 else self.rng.uniform(-3, 3)
            for _ in range(min(n, 997))
        ]
        flat = torch.tensor(numbers, dtype=torch.float64)
        return flat.repeat(-(-n // max(len(numbers), 1)))[:n].view(shape).float().to(dtype)

    def laid_out(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, str]:
        """A tensor of this shape, strided as views can be."""
        rng, shape = self.rng, list(shape)
        how = rng.choice(["plain"] * 4 + ["expanded", "moved", "steps", "offset", "flipped"])
        if how == "expanded":
            base = [n if rng.random() < 0.5 else 1 for n in shape]
            return self.values(base, dtype).to(self.device).expand(shape), how
        if how == "moved":
            order = list(range(len(shape)))
            rng.shuffle(order)
            t = self.values([shape[d] for d in order], dtype).to(self.device)
            return t.permute([order.index(d) for d in range(len(order))]), how
        if how == "steps":
            step = rng.randint(2, 3)
            t = self.values([n * step for n in shape], dtype).to(self.device)
            return t[tuple(slice(rng.randrange(step), None, step) for _ in shape)], how
        t = self.values(shape, dtype)
        if how == "offset":
            first = rng.randint(1, 3)
            t = torch.cat([t.new_zeros(first), t.flatten()])[first:].view(shape)
        if how == "flipped":
            t = t.flip(list(range(len(shape))))
        return t.to(self.device), how

    def part_of(self, shape: Sequence[int]) -> list[int]:
        """A shape that broadcasts to this one."""
        shape = list(shape[self.rng.randint(0, len(shape)) if self.rng.random() < 0.2 else 0 :])
        return [1 if self.rng.random() < 0.1 else n for n in shape]

    def tensor(self, dtype: torch.dtype | None = None, whole: bool = False) -> Given:
        rng = self.rng
        if self.hostile():
            return self.bad_tensor()
        dtype = rng.choice([torch.float32] * 3 + list(DTYPES)) if dtype is None else dtype
        t, how = self.laid_out(self.shape if whole else self.part_of(self.shape), dtype)
        kind = rng.choice(["tensor"] * 8 + ["grad", "parameter", "subclass", "negated", "zero"])
        if kind == "grad":
            t = t.requires_grad_()
        elif kind == "parameter":
            t = torch.nn.Parameter(t)
        elif kind == "subclass":
            t = t.as_subclass(Subclass)
        elif kind == "negated":
            t = torch._neg_view(t)
        elif kind == "zero" and t.device.type == "cpu":
            t = torch._efficientzerotensor(t.shape, dtype=t.dtype)
        return Given(t, TAKE, f"{kind} {how} {t.dtype} {tuple(t.shape)} {t.stride()}")

    def bad_tensor(self) -> Given:
        rng, shape = self.rng, self.part_of(self.shape)
        t = self.values(shape, torch.float32).to(self.device)
        wrong = list(self.shape) or [3]
        wrong[rng.randrange(len(wrong))] += 7
        kinds: dict[str, Callable[[], Any]] = {
            "int": lambda: t.to(rng.choice([torch.int32, torch.int64, torch.uint8, torch.uint64])),
            "bool": lambda: t.bool(),
            "complex": lambda: t.to(rng.choice([torch.complex64, torch.complex128])),
            "conjugate": lambda: torch.view_as_real(t.cfloat()).mul(1j).conj(),
            "float8": lambda: t.to(rng.choice([torch.float8_e4m3fn, torch.float8_e5m2])),
            "quantized": lambda: torch._empty_affine_quantized(
                shape, scale=0.1, zero_point=0, dtype=torch.qint8
            ),
            "sparse": lambda: t.to_sparse(),
            "sparse csr": lambda: self.values((2, 3), torch.float32).to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            "jagged": lambda: torch.nested.nested_tensor(
                [torch.zeros(2), torch.zeros(3)], layout=torch.jagged
            ),
            "mkldnn": lambda: self.values(self.shape, torch.float32).to_mkldnn(),
            "meta": lambda: torch.zeros(shape, device="meta"),
            "shape": lambda: torch.zeros(wrong, device=self.device),
            "rank": lambda: torch.zeros([1] * 70, device=self.device),
            "huge": lambda: torch.zeros([1], device=self.device).expand(2**40),
            "huge twice": lambda: torch.zeros(1, 1, device=self.device).expand(2**31, 2**31),
            "none": lambda: None,
            "number": lambda: rng.choice([1, 0.5, True, *HUGE]),
            "list": lambda: [1.0, 2.0],
            "array": lambda: np.zeros(self.shape, np.float32),
            "junk": lambda: junk(rng),
        }
        kind = rng.choice(list(kinds))
        verdict = REFUSE
        if kind == "shape":  # it may fit after all: a size of 8 beside one of 1
            verdict = EITHER
        if kind in ("huge", "huge twice", "meta", "rank"):
            verdict = EITHER
            self.huge = self.huge or kind.startswith("huge")
        if kind == "mkldnn" and (not self.shape or 0 in self.shape):
            kind = "none"
        value = kinds[kind]()
        if kind == "junk" and isinstance(value, Tensor):  # which may do as one
            verdict = EITHER
        return Given(value, verdict, f"{kind} of {shape}")

    def scale(self) -> Given:
        rng = self.rng
        if rng.random() < 0.15:
            number = rng.choice([0, -1, 0.5, -3.25, math.inf, math.nan, np.float64(0.5)])
            return Given(number)
        if rng.random() < 0.05:
            return Given(rng.choice((*HUGE, 1e300)), EITHER)
        given = self.tensor()
        number = isinstance(given.value, (int, float)) and given.value is not True
        return given._replace(verdict=EITHER) if number else given

    # Keys and generators

    def key(self, shape: Sequence[int], optional: bool = True) -> Given:
        """A key for a result of this shape."""
        rng = self.rng
        if optional and rng.random() < 0.4:
            return Given(None)
        seed = rng.choice([0, 1, 42, 2**63, 2**64 - 1, rng.randrange(2**64)])
        key = rf.key(seed, device=self.device)
        if self.hostile():
            return self.bad_key(key, shape)
        if rng.random() < 0.3 and shape:
            batch = [int(rng.choice([n, n, 1])) for n in shape[: rng.randint(1, len(shape))]]
            if 0 < math.prod(batch) < 10000:
                key = rf.split(key, math.prod(batch)).view(*batch, 2)
        how = rng.choice(["", "", "int64", "strided"])
        if how:
            key = key.view(torch.int64)
        if how == "strided":
            key = key.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
        return Given(key, TAKE, f"key {tuple(key.shape)} {how}")

    def bad_key(self, key: Tensor, shape: Sequence[int]) -> Given:
        rng, words = self.rng, key.view(torch.int64)
        kinds: dict[str, Callable[[], Any]] = {
            "int32": lambda: words.int(),
            "float": lambda: words.double(),
            "bool": lambda: words.bool(),
            "complex": lambda: words.to(torch.complex64),
            "one word": lambda: key[:1],
            "no dimension": lambda: key[0],
            "three words": lambda: torch.cat([words, words[:1]]),
            "none of them": lambda: key[:0],
            "batch": lambda: key.expand(17, 2),
            "batch of none": lambda: key.expand(0, 19, 2),
            "batch of many": lambda: words.expand(2**40, 2),
            "rank": lambda: key.expand(*[1] * 40, 2),
            "sparse": lambda: words.to_sparse(),
            "sparse csr": lambda: words.expand(3, 2).to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor([words, words]),
            "jagged": lambda: torch.nested.nested_tensor([words, words], layout=torch.jagged),
            "meta": lambda: torch.zeros(2, dtype=torch.uint64, device="meta"),
            "quantized": lambda: torch._empty_affine_quantized(
                [2], scale=0.1, zero_point=0, dtype=torch.qint32
            ),
            "int": lambda: 42,
            "list": lambda: [1, 2],
            "junk": lambda: junk(rng),
        }
        kind = rng.choice(list(kinds))
        open_ = kind in ("batch", "batch of none", "rank", "meta")
        return Given(kinds[kind](), EITHER if open_ else REFUSE, f"key: {kind}")

    def generator(self) -> Given:
        if self.rng.random() < 0.6:
            return Given(None)
        if self.hostile():
            return Given(
                self.rng.choice([7, "cpu", random.Random(0), np.random, junk(self.rng)]), REFUSE
            )
        return Given(torch.Generator(self.device).manual_seed(self.rng.randrange(1000)))

    # Numbers

    def bounds(self) -> tuple[Given, Given]:
        rng = self.rng
        clamp: Given = Given(
            rng.choice([None] * 4 + [(-1, 1), (None, 2.0), [-3.5, None], (-math.inf, math.inf)])
        )
        min_std: Given = Given(rng.choice([0] * 4 + [0.0, 0.1, 1e-3, 2]))
        if self.hostile():
            clamp = Given(
                rng.choice(
                    [
                        (), (1,), (2, 1), (math.nan, 1), (0, math.nan), (1, 2, 3), 5, "ab", b"ab",
                        ("a", "b"), (True, 3), {1, 2}, {1: 2, 3: 4}, (1j, 2), (10**400, None),
                        (None, -(10**400)), torch.tensor([0.0, 1.0]), np.array([0, 1]), junk(rng),
                    ]
                ),
                REFUSE,
            )  # fmt: skip
        if self.hostile():
            min_std = Given(
                rng.choice(
                    [
                        -1, -1e-300, math.nan, math.inf, "x", None, [0], torch.tensor(0.5),
                        torch.tensor([0.5, 0.5]), np.array([0.0, 0.0]), 10**400, 1j, junk(rng),
                    ]
                ),
                REFUSE,
            )  # fmt: skip
        return clamp, min_std

    def sizes(self) -> Given:
        """Of sample_shape, or of what has a shape."""
        rng = self.rng
        if self.hostile():
            bad = [
                -1, 2.5, None, "ab", (-1,), (2, -3), (2.5,), (None,), ("a",), [[2]], 5,
                (2**63,), (2**64,), (-(2**63),), (2**62,), (2**40, 2**40), (10**400,),
                (np.int64(2**40), np.int64(2**40)), (np.int64(2**62), 2), np.array([2.5]),
                (1,) * 70, (torch.tensor([1, 2]),), (1j,), (math.nan,), object(), Nothing(),
            ]  # fmt: skip
            either = [
                (2**40,), [2**31, 2], (True,), torch.tensor([2]), torch.tensor([2, 3]),
                np.array([2]), np.array([2, 3]), {2: 3}, {2}, (np.float64(2),),
                junk(rng), torch.tensor([], dtype=torch.int64), (1,) * 64, iter([2]), b"\x02",
                b"ab",
            ]  # fmt: skip
            if rng.random() < 0.6:
                return Given(rng.choice(bad), REFUSE)
            return Given(rng.choice(either), EITHER)
        given = rng.choice([()] * 5 + [(2,), (3,), [2], (2, 3), (0,), (1,), torch.Size([2])])
        return Given(rng.choice([given, tuple(np.int64(n) for n in given)]))

    def block(self, shape: Sequence[int], key: Any) -> tuple[Given, Given]:
        rng, shape = self.rng, [int(n) for n in shape]
        if key is None or rng.random() < 0.7:
            if self.hostile():
                whole = Given(rng.choice([None, list(shape)]))
                wrong = key is None or whole.value is None
                return whole, Given((0,) * len(shape), REFUSE if wrong else TAKE)
            return Given(None), Given(None)
        whole = [n + rng.choice([0, 0, 1, 5, 2**12]) for n in shape]
        first = [rng.randint(0, w - n) for w, n in zip(whole, shape, strict=True)]
        if not self.hostile():
            return Given(whole), Given(tuple(first))
        verdict = REFUSE
        kind = rng.randrange(6)
        number = rng.choice([-1, *HUGE, 2.5, "a", None, 1j, True, torch.tensor([1, 2])])
        if kind == 0 and shape:
            whole[rng.randrange(len(whole))] = number
            verdict = EITHER
        elif kind == 1 and shape:
            first[rng.randrange(len(first))] = number
            verdict = EITHER
        elif kind == 2:
            whole = [*whole, 1]
        elif kind == 3:
            first = [*first, 0]
        elif kind == 4:
            return Given(junk(rng), REFUSE), Given(first)
        else:
            return Given(whole), Given(rng.choice([None, junk(rng), 5, "x"]), REFUSE)
        return Given(whole, verdict), Given(first, verdict)

    def dim(self, rank: int) -> Given:
        rng = self.rng
        if self.hostile():
            bad = [
                rank + 1, -rank - 1 if rank else -2, 99, 2**63, -(2**63), 10**400, 1.0, "a", True,
                (0, 0), (0.5,), [None], (True,), ((0,),), Nothing(), {0}, torch.tensor(0), b"a",
                torch.tensor([0, 1]), np.array([0]), np.int64(0), 1j, junk(rng),
            ]  # fmt: skip
            value = rng.choice(bad)
            # One dimension of none may be named, as in torch, and as often as one likes.
            open_ = rank == 0 and (isinstance(value, tuple) or same(value, 1))
            return Given(value, EITHER if open_ else REFUSE)
        dims = rng.sample(range(rank), rng.randint(0, rank))
        dims = [d - rng.choice([0, rank]) for d in dims]
        choices: list[Any] = [None, (), tuple(dims), list(dims), tuple(range(rank))]
        if rank:
            choices += [-1, rank - 1, 0, -rank]
        return Given(rng.choice(choices))

    def prior(self) -> Given:
        rng = self.rng
        if rng.random() < 0.5:
            return Given(None)
        if self.hostile():
            bad: list[Callable[[], Any]] = [
                lambda: torch.distributions.Beta(1.0, 2.0),
                lambda: torch.distributions.LogNormal(0.0, 1.0),
                lambda: torch.distributions.Normal,
                lambda: rf.Normal,
                lambda: "normal",
                lambda: 0,
                lambda: (0.0, 1.0),
                lambda: torch.distributions.Independent(
                    torch.distributions.Normal(torch.zeros(3), 1.0), 1
                ),
                lambda: torch.distributions.Normal(torch.zeros(2, 9, 9, 9, 9), 1.0),
                lambda: torch.distributions.Normal(torch.zeros(1, device="meta"), 1.0, False),
                lambda: junk(rng),
            ]
            prior = rng.choice(bad)()
            on_meta = isinstance(prior, torch.distributions.Normal) and prior.loc.is_meta
            return Given(prior, EITHER if on_meta else REFUSE)  # as mu may be
        loc = self.values(self.part_of(self.shape), rng.choice(DTYPES)).to(self.device).nan_to_num()
        scale = self.values(self.part_of(self.shape), rng.choice(DTYPES)).to(self.device)
        scale = scale.nan_to_num(0.5, 2.0, 2.0).abs() + 0.1
        # Both of mu and of the scale may have less dimensions than this.
        fits = TAKE if loc.numel() == scale.numel() == 1 and not loc.dim() + scale.dim() else EITHER
        if rng.random() < 0.4:
            return Given(rng.choice([torch.distributions.Normal, rf.Normal])(0.0, 1.5))
        if rng.random() < 0.5:
            return Given(torch.distributions.Normal(loc, scale, False), fits, "Normal")
        form = rng.choice(["log_var", "log_std", "rho"])
        prior = rf.Normal(loc, validate_args=False, clamp=(-2, 2), **{form: scale})
        return Given(prior, fits, f"Normal of {form}")


@dataclass
class Plan:
    """A call: of what, with what, and what is right."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Given]
    by_position: bool = False
    public: bool = True
    #: What the reference gives for the same; None where it is not asked
    expected: Callable[[], Any] | None = None
    maker: Maker | None = None
    #: Those that a message may name beside the call's own
    words: tuple[str, ...] = ()
    values: list[Tensor] = field(default_factory=list)

    @property
    def verdict(self) -> int:
        verdict = max((g.verdict for g in self.arguments.values()), default=TAKE)
        values = [g.value for g in self.arguments.values()]
        if not self.public and any(isinstance(t, Tensor) and t.is_meta for t in values):
            return EITHER  # of which an op computes the shape alone
        huge = self.maker is not None and self.maker.huge
        return max(verdict, EITHER) if huge else verdict

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={g}' for k, g in self.arguments.items())})"

    def call(self) -> Any:
        values = {name: given.value for name, given in self.arguments.items()}
        return self.function(*values.values()) if self.by_position else self.function(**values)


def plain(t: Any) -> Any:
    """The same numbers in a tensor with nothing special about it."""
    if not isinstance(t, Tensor):
        return t
    t = t.detach().as_subclass(Tensor)
    return t.resolve_neg().clone(memory_format=torch.contiguous_format).cpu()


def scale_of(maker: Maker) -> tuple[str, dict[str, Given]]:
    """One form of the scale; now and then none, or two."""
    form = maker.rng.choice(FORMS)
    given = {form: maker.scale()}
    if maker.hostile() and maker.hostile():
        other = maker.rng.choice([f for f in FORMS if f != form])
        given = maker.rng.choice([{}, {form: maker.scale(), other: Given(0.5, REFUSE)}])
        if not given:
            given = {form: Given(None, REFUSE)}
    return form, given


def bounds_as_numbers(clamp: Any, min_std: Any) -> tuple[float, float, float] | None:
    low, high = (None, None) if clamp is None else clamp
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    bounds = float(low), float(high), float(min_std)
    return None if bounds == (-math.inf, math.inf, 0.0) else bounds


def as_number(value: float, dtype: torch.dtype) -> Tensor:
    """As torch has it of a number in an operation."""
    return torch.tensor(float(value), dtype=torch.float64).to(dtype)


def common_shape(mu: Any, scale: Any) -> tuple[int, ...] | None:
    """The shape of one sample, if these have one."""
    try:
        shape = tuple(torch.broadcast_shapes(mu.shape, getattr(scale, "shape", ())))
    except Exception:
        return None
    return shape if all(type(n) is int for n in shape) else None


def sample_call(maker: Maker, name: str) -> Plan:
    """One of the functions that give a sample."""
    form, scale = scale_of(maker)
    mu = maker.tensor()
    clamp, min_std = maker.bounds()
    samples = maker.sizes()
    arguments = {"mu": mu, **scale, "clamp": clamp, "min_std": min_std, "sample_shape": samples}
    one = common_shape(mu.value, next(iter(scale.values())).value)
    taken = samples.verdict == TAKE and one is not None
    shape = (*samples.value, *one) if taken and one is not None else maker.shape
    n = len(samples.value) if taken else 0
    key = maker.key(() if n > 0 else shape)  # of samples one for all
    whole, first = maker.block(shape, key.value)
    if n > 1:  # of which only the first may be cut
        whole, first = Given(None), Given(None)
    arguments.update(key=key, global_shape=whole, global_offset=first)
    generator = maker.generator()
    if key.value is not None and generator.value is not None:
        generator = generator._replace(verdict=REFUSE)
    arguments["generator"] = generator
    if name != "fused_reparameterize":
        arguments["dim"] = maker.dim(len(one if one is not None else maker.shape))
        if name == "fused_reparameterize_kl":
            arguments["prior"] = maker.prior()
        else:
            tanh = maker.rng.choice([True, False])
            arguments["tanh"] = Given(tanh)
            if maker.hostile():
                arguments["tanh"] = Given(maker.rng.choice(["x", None, 1, junk(maker.rng)]), REFUSE)
    plan = Plan(name, getattr(rf, name), arguments, maker=maker)

    def expected() -> Any:
        value = plain(next(iter(scale.values())).value)
        x = plain(mu.value)
        value = value if isinstance(value, Tensor) else as_number(value, x.dtype)
        n = math.prod(samples.value) if len(samples.value) > 0 else None
        bounds = bounds_as_numbers(clamp.value, min_std.value)
        place = whole.value, first.value
        z = reference.sample_from_key(x, value, plain(key.value), form, *place, bounds, n)
        return z.view(shape)

    tanh = "tanh" in arguments and arguments["tanh"].value is True
    if key.value is not None and taken and not tanh:
        plan.expected = expected
    return plan


def plan_divergence(maker: Maker) -> Plan:
    form, scale = scale_of(maker)
    mu = maker.tensor()
    clamp, min_std = maker.bounds()
    one = common_shape(mu.value, next(iter(scale.values())).value)
    rank = len(maker.shape if one is None else one)
    # Of what no memory holds a sum would be computed, for hours.
    dim = Given(()) if maker.huge or maker.rng.random() < 0.5 else maker.dim(rank)
    prior = maker.prior()
    arguments = {"mu": mu, **scale, "clamp": clamp, "min_std": min_std, "dim": dim, "prior": prior}
    plan = Plan("fused_kl_divergence", rf.fused_kl_divergence, arguments, maker=maker)

    def expected() -> Tensor:
        value = plain(next(iter(scale.values())).value)
        x = plain(mu.value)
        value = value if isinstance(value, Tensor) else as_number(value, x.dtype)
        bounds = bounds_as_numbers(clamp.value, min_std.value)
        return reference.kl_divergence(x, value, form, bounds)

    if same(dim.value, ()) and prior.value is None:
        plan.expected = expected
    return plan


def plan_key(maker: Maker) -> Plan:
    rng = maker.rng
    name = "key"
    if rng.random() < 0.3:
        generator = torch.Generator(maker.device).manual_seed(3)
        arguments = {"generator": Given(generator)}
        if maker.hostile():
            arguments = {"generator": Given(rng.choice([7, "cpu", junk(rng)]), REFUSE)}
        if maker.hostile():
            arguments["device"] = Given(rng.choice(["nonsense", 3.5, "cuda:9", junk(rng)]), REFUSE)
        return Plan(name, rf.key, arguments, maker=maker)
    good = [0, 7, 2**64 - 1, 2**63, [1, 2, 2**64 - 1], (), range(3), torch.tensor(5), np.int64(3)]
    good += [torch.tensor([[-1, 2]]), torch.tensor([3], dtype=torch.uint64), np.array([1, 2])]
    good += [torch.tensor([3, 4], dtype=torch.uint8).expand(3, 2), bytes(2), True]
    seed = Given(rng.choice(good))
    if maker.hostile():
        i = torch.tensor([1, 2])
        bad = [
            -1, 2**64, 10**400, 1.5, "7", None, [1.5], [-1], [[1]], [2**64], i.double(),
            i.bool(),
            i.cfloat(), i.to_sparse(), torch.nested.nested_tensor([i, i]), np.array([1.5]), 1j,
            torch.nested.nested_tensor([i, i], layout=torch.jagged), np.array(["a"]), ["a"], {1, 2},
            np.array([object()]), torch.zeros(2).to_sparse(), torch._empty_affine_quantized(
                [2], scale=0.1, zero_point=0, dtype=torch.quint8), i.expand(3, 2).to_sparse_csr(),
        ]  # fmt: skip
        seed = Given(rng.choice(bad), REFUSE)
    arguments = {"seed": seed}
    if maker.hostile():
        bad = ["nonsense", 3.5, "cuda:9", torch.float32, [], junk(rng)]
        arguments["device"] = Given(rng.choice(bad), REFUSE)
    return Plan(name, rf.key, arguments, maker=maker)


def plan_split(maker: Maker) -> Plan:
    rng = maker.rng
    key = maker.key((2, 3), optional=False)
    num = Given(rng.choice([1, 2, 7]))
    if maker.hostile():
        num = Given(
            rng.choice([0, -1, *HUGE, 2**40, 1.0, "2", None, (2,), torch.tensor(2), junk(rng)]),
            REFUSE,
        )
        if same(num.value, 2**40):
            num = num._replace(verdict=EITHER)
            maker.huge = True
        if key.text == "key: batch of none":
            num = num._replace(verdict=EITHER)
    plan = Plan("split", rf.split, {"key": key, "num": num}, maker=maker)

    def expected() -> Tensor:
        k = plain(key.value)
        return reference.derive(k.reshape(-1, 2), None, 0, num.value).view(num.value, *k.shape)

    plan.expected = expected
    return plan


def plan_fold_in(maker: Maker) -> Plan:
    rng = maker.rng
    key = maker.key((2, 3), optional=False)
    i = torch.tensor([1, -2, 3], device=maker.device)
    data = Given(rng.choice([0, 7, -1, 2**64 - 1, -(2**63), True, i[0], i[:1], i[:1].byte()]))
    if maker.hostile():
        bad = [
            2**64, -(2**63) - 1, 10**400, 1.5, "7", None, [1, 2], i.float(), i.bool(),
            i.to_sparse(),
            i.expand(2, 3).to_sparse_csr(), torch.nested.nested_tensor([i, i]), i.cfloat(), 1j,
            torch.nested.nested_tensor([i, i], layout=torch.jagged), np.array([1]), i.to("meta"),
            i.expand(5, 3), i.new_zeros(1).expand(2**40), junk(rng),
        ]  # fmt: skip
        value = rng.choice(bad)
        data = Given(value, REFUSE)
        if isinstance(value, Tensor) and value.layout == torch.strided and value.dim() > 0:
            data = Given(value, EITHER if not value.is_nested else REFUSE)
        if isinstance(value, Tensor) and value.is_meta:
            data = Given(value, EITHER)
    return Plan("fold_in", rf.fold_in, {"key": key, "data": data}, maker=maker)


def plan_noise(maker: Maker) -> Plan:
    rng = maker.rng
    sizes = maker.sizes()
    taken = sizes.verdict == TAKE
    key = maker.key(tuple(sizes.value) if taken else (), optional=False)
    whole, first = maker.block(tuple(sizes.value) if taken else (), key.value)
    dtype = Given(rng.choice([None, *DTYPES]))
    if maker.hostile():
        bad = ["float32", torch.int32, torch.qint8, torch.complex64, float, torch.float8_e5m2, 1]
        dtype = Given(rng.choice([*bad, junk(rng)]), REFUSE)
        if dtype.value is torch.float32:
            dtype = Given(torch.float32)
    spread = taken and rng.random() < 0.5

    def noise(key: Any, shape: Any, **options: Any) -> Tensor:
        return rf.noise(key, *shape, **options) if spread else rf.noise(key, shape, **options)

    arguments = {"key": key, "shape": sizes, "dtype": dtype}
    if whole.value is not None or first.value is not None:
        arguments.update(global_shape=whole, global_offset=first)
    plan = Plan("noise", noise, arguments, maker=maker)

    def expected() -> Tensor:
        as_dtype = torch.float32 if dtype.value is None else dtype.value
        return reference.noise(plain(key.value), sizes.value, as_dtype, whole.value, first.value)

    if not taken and same(sizes.value, 5):  # one size, and no sequence
        arguments["shape"] = sizes._replace(verdict=EITHER)
    if not taken and (sizes.value is None or isinstance(sizes.value, (int, float))):
        arguments["shape"] = sizes._replace(verdict=EITHER)
    plan.expected = expected if taken else None
    return plan


def plan_normal(maker: Maker) -> Plan:
    """The class, and one of its methods at once."""
    rng = maker.rng
    form = rng.choice(["scale", "log_var", "log_std", "rho"])
    loc, scale = maker.tensor(torch.float32), maker.scale()
    clamp, min_std = maker.bounds()
    validate = Given(rng.choice([None, False]))
    method = rng.choice(
        [
            "",
            "rsample",
            "sample",
            "rsample_and_log_prob",
            "rsample_and_kl",
            "log_prob",
            "expand",
            "kl",
        ]
    )
    arguments = {"loc": loc, form: scale, "clamp": clamp, "min_std": min_std}
    arguments["validate_args"] = validate
    if method in ("rsample", "sample", "rsample_and_log_prob", "rsample_and_kl"):
        arguments["sample_shape"], arguments["generator"] = maker.sizes(), maker.generator()
    if method in ("rsample_and_log_prob", "rsample_and_kl"):
        arguments["dim"] = maker.dim(len(maker.shape))
    if method in ("rsample_and_kl", "kl"):
        arguments["prior"] = maker.prior()
    if method == "expand":
        arguments["batch_shape"] = maker.sizes()
    # torch decides what its own class takes: of the numbers that are no float and of a scale that
    # is not positive it is asked first.
    arguments = {k: g._replace(verdict=EITHER) for k, g in arguments.items()}

    def run(**given: Any) -> Any:
        own = ("loc", form, "clamp", "min_std", "validate_args")
        normal = rf.Normal(**{k: v for k, v in given.items() if k in own})
        rest = {k: v for k, v in given.items() if k not in own}
        if method == "":
            return normal.scale, normal.mean, normal.entropy()
        if method == "kl":
            return torch.distributions.kl_divergence(normal, rest["prior"])
        if method == "log_prob":
            return normal.log_prob(torch.zeros(()))
        return getattr(normal, method)(**rest)

    if maker.huge and method in ("kl", "rsample_and_kl", "rsample_and_log_prob"):
        method = "rsample"
        for name in ("dim", "prior"):
            arguments.pop(name, None)
    return Plan(f"Normal.{method}" if method else "Normal", run, arguments, maker=maker)


def plan_module(maker: Maker) -> Plan:
    rng = maker.rng
    form = Given(rng.choice(FORMS))
    if maker.hostile():
        form = Given(rng.choice(["scale", "", None, 3, ["std"], {"std": 1}, junk(rng)]), REFUSE)
    clamp, min_std = maker.bounds()
    samples = maker.sizes()
    mu, scale, key = maker.tensor(), maker.scale(), maker.key(())
    training = rng.random() < 0.7
    generator = Given(None) if key.value is not None else maker.generator()
    if not training:
        samples = samples if samples.verdict == TAKE else Given(())
        key, generator = Given(None), Given(None)
    arguments = {"form": form, "clamp": clamp, "min_std": min_std, "sample_shape": samples}
    arguments.update(mu=mu, scale=scale, key=key, generator=generator)
    if key.verdict == TAKE and key.value is not None and samples.verdict == EITHER:
        arguments["key"] = key._replace(verdict=EITHER)

    def run(form: Any, mu: Any, scale: Any, key: Any, generator: Any, **options: Any) -> Any:
        layer = rf.nn.Reparameterize(form, **options).train(training)
        return layer(mu, scale, key=key, generator=generator)

    words = ("log_var", "log_std", "std", "rho")
    return Plan("nn.Reparameterize", run, arguments, maker=maker, words=words)


class Sampler:
    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std

    def sample(self) -> Any:
        return self.mean + self.std * torch.randn_like(self.mean)


class Raising:
    def __init__(self, *_: Any) -> None:
        raise SystemError("of its own")

    def sample(self) -> None: ...


def plan_patch(maker: Maker) -> Plan:
    rng = maker.rng
    target = Given(rng.choice(["normal", Sampler, torch.distributions.Normal]))
    if maker.hostile():
        bad = [
            "norma", "", b"normal", None, 3, int, object, Raising, random.Random, Tensor, Nothing,
            torch.distributions.Beta, torch.distributions.Distribution, ["normal"], junk(rng),
        ]  # fmt: skip
        target = Given(rng.choice(bad), REFUSE)

    def run(targets: Any) -> None:
        rf.patch(targets).undo()

    words = ("class", "must return")
    return Plan("patch", run, {"targets": target}, maker=maker, words=words)


def good_arguments(maker: Maker, op: str) -> dict[str, Any]:
    """Of every name that an op's schema has, what goes together."""
    rng, shape = maker.rng, maker.shape
    hostility, maker.hostility = maker.hostility, 0.0
    form, bounds = rng.choice(FORMS), rng.choice([None, None, [-1.0, 1.0, 0.0], [-9.0, 9.0, 0.1]])
    term = rng.choice(_ops.TERMS)
    head, divergence = op.startswith("head"), term == "kl_divergence"
    samples = None if head and divergence else rng.choice([None, None, 2, 0])
    samples = (samples or 3) if op == "samples_backward" else samples
    mu, scale = maker.tensor(whole=True).value, maker.tensor().value
    out = shape if samples is None else (samples, *shape)
    key = maker.key(out, optional=head and divergence).value
    whole, first = (given.value for given in maker.block(out, key))
    dtype, summed = torch.result_type(mu, scale), rng.randint(0, len(shape))
    rows = out[: len(out) - summed]
    total = torch.float64 if dtype == torch.float64 else torch.float32
    prior = head and divergence and rng.random() < 0.5
    grad = maker.laid_out(out, dtype)[0]
    backward = ("sample_backward", "samples_backward")
    reads = _forms.SAMPLE[form].backward_reads() or bounds is not None
    state = [torch.tensor([5], device=maker.device)] * 2 if rng.random() < 0.5 else [None] * 2
    if maker.device.type == "cuda":
        state = [None] * 2  # of a capture alone
    keys = maker.key((3,), optional=False).value.reshape(-1, 2).contiguous()
    data = torch.tensor([1, -2, 3], device=maker.device)[: rng.choice([1, len(keys)])]
    data = data if rng.random() < 0.5 else None
    maker.hostility = hostility
    return {
        "mu": mu, "scale": scale if reads or op not in backward else None,
        "key": key, "form": form, "prior_form": rng.choice(FORMS), "bounds": bounds,
        "prior_bounds": rng.choice([None, [-2.0, 2.0, 0.1]]), "samples": samples, "term": term,
        "global_shape": whole, "global_offset": None if first is None else list(first),
        "summed": summed, "size": list(out), "dtype": rng.choice(DTYPES), "keys": keys,
        "data": data, "first": rng.choice([0, 1, -1]), "fresh": torch.empty(()), "seed": 7,
        "num": 1 if data is not None else rng.choice([0, 1, 4]), "offset": rng.choice([0, -4, 8]),
        "captured_seed": state[0], "captured_offset": state[1],
        "generator": rng.choice([None, torch.Generator(maker.device).manual_seed(3)]),
        "loc": torch.randn(shape).to(maker.device, dtype) if prior else None,
        "prior": torch.rand(shape).to(maker.device, dtype) + 0.5 if prior else None,
        "grad": maker.laid_out(shape, dtype)[0],
        "grad_z": grad if not head or key is not None else None,
        "grad_total": maker.laid_out(rows, total)[0],
    }  # fmt: skip


def bad_argument(maker: Maker, arg: str, what: str, shape: Sequence[int]) -> Given:
    """In place of one of those."""
    rng = maker.rng
    sizes = [[n] * len(shape) for n in (-1, *HUGE[:5], 2**31, "a", 1.5)]
    choices: dict[str, list[Any]] = {
        "form": ["nope", "", "log_var\0", 3, None, b"no"],
        "prior_form": ["nope", "", 3, None],
        "term": ["kl", "", 0, None],
        "global_shape": [*sizes, [2**32] * len(shape), [3], 5, None],
        "global_offset": [*sizes, [3], 5, None],
        "bounds": [[], [1.0], [1.0, 0.0, -1.0], [math.nan] * 3, ["a"] * 3, [1.0] * 4, 5, "abc"],
        "prior_bounds": [[], [1.0], [math.nan] * 3, [1.0] * 4, 5, "abc"],
        "samples": [-1, *HUGE, 2**40, 1.5, "a", True],
        "size": [[-1], [2**62], [2**40] * 2, [2**40], [1.5], "a", 5, [1] * 70],
        "dtype": [torch.int32, torch.qint8, torch.bool, "a", 99],
        "summed": [-1, 99, *HUGE, 1.5, None],
        "generator": [7, "cpu", random.Random(0)],
    }
    numbers = [-1, -(2**63), 2**63 - 1, 2**63, 2**62, 1.5, "a", None]
    if arg in ("key", "keys"):
        return maker.bad_key(rf.key(5, device=maker.device), shape)
    if "Tensor" in what:
        given = maker.bad_tensor()
        loose = arg in ("fresh", "data") or not isinstance(
            given.value, Tensor
        )  # a number is a tensor, to torch
        return given._replace(verdict=EITHER) if loose else given
    verdict = REFUSE if arg in ("form", "prior_form", "term", "dtype", "generator") else EITHER
    return Given(rng.choice(choices.get(arg, numbers)), verdict)


def plan_op(maker: Maker, name: str) -> Plan:
    """An op as torch has it, past every check of a public function."""
    op, _, overload = name.partition(".")
    function = getattr(getattr(torch.ops.reparam_fused, op), overload or "default")
    good = good_arguments(maker, op)
    arguments: dict[str, Given] = {}
    for argument in function._schema.arguments:
        value = good[argument.name]
        text = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        given = Given(value, TAKE, text)
        if maker.hostile():
            given = bad_argument(maker, argument.name, str(argument.type), maker.shape)
        arguments[argument.name] = given
    if maker.huge and (op == "samples_backward" or (op == "head" and good["key"] is None)):
        # Of what no memory holds a sum would be computed, for hours.
        return plan_op(Maker(maker.rng, 0.0, maker.device), name)
    plan = Plan(f"ops.{name}", function, arguments, True, False, maker=maker)

    def expected() -> Any:
        return getattr(reference, op)(*(plain(given.value) for given in arguments.values()))

    if op == "draw_key":  # which asks of its operands how many there are, and no more
        for arg, given in arguments.items():
            if isinstance(given.value, Tensor):
                arguments[arg] = given._replace(verdict=EITHER)
    # What stands beside a wrong argument may not be looked at.
    if op in _ops._PURE and plan.verdict == TAKE:
        plan.expected = expected
    return plan


OPS = [*_ops._SCHEMAS, *(f"{op}.python" for op in _ops._CHECKS)]
PLANS: dict[str, Callable[[Maker], Plan]] = {
    "fused_reparameterize": lambda maker: sample_call(maker, "fused_reparameterize"),
    "fused_reparameterize_kl": lambda maker: sample_call(maker, "fused_reparameterize_kl"),
    "fused_reparameterize_log_prob": lambda maker: sample_call(
        maker, "fused_reparameterize_log_prob"
    ),
    "fused_kl_divergence": plan_divergence,
    "key": plan_key,
    "split": plan_split,
    "fold_in": plan_fold_in,
    "noise": plan_noise,
    "Normal": plan_normal,
    "nn.Reparameterize": plan_module,
    "patch": plan_patch,
    **{f"ops.{op}": (lambda maker, op=op: plan_op(maker, op)) for op in OPS},
}


def plan_of(seed: int, index: int, device: torch.device) -> Plan:
    """The call of this number: it depends on nothing else."""
    rng = random.Random(f"{seed} {index}")
    names = list(PLANS)
    publics = [name for name in names if not name.startswith("ops.")]
    name = rng.choice(publics if rng.random() < 0.6 else names)
    return PLANS[name](Maker(rng, rng.choice([0.0, 0.05, 0.15, 0.4]), device))


def snapshot(plan: Plan) -> list[tuple[Tensor, Tensor, int]]:
    """The tensors that are given, with their bits."""
    found = []
    for given in plan.arguments.values():
        t = given.value
        small = isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested
        if small and not t.is_meta and not t.is_quantized and t.numel() < 10000:
            found.append((t, t.detach().as_subclass(Tensor).clone(), t._version))
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of tensors of one dtype and shape; payloads of NaN do not count."""
    a, b = (t.detach().as_subclass(Tensor).resolve_neg().resolve_conj().cpu() for t in (a, b))
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.dtype in DTYPES:
        return torch.equal(bits_of(a), bits_of(b))
    if a.is_floating_point():
        a, b = (t.contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def differs(actual: Any, expected: Any) -> str:
    """What is wrong with a result: a tensor, or a tuple of which the first ones are compared."""
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(actual, expected, strict=False):
        if (got.dtype, tuple(got.shape)) != (wanted.dtype, tuple(wanted.shape)):
            return f"{got.dtype} {tuple(got.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
        got = got.detach().as_subclass(Tensor).cpu()
        if got.dtype == torch.float64:
            if not torch.allclose(got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True):
                return "another result than the reference's"
        elif not same_bits(got, wanted):
            return "other bits than the reference's"
    return ""


def finding_of(plan: Plan, error: BaseException | None, result: Any) -> str:
    """What a call did wrong; nothing, if it did well."""
    if error is not None:
        message = str(error)
        if "INTERNAL ASSERT" in message:
            return "an internal assertion of torch"
        out_of_memory = OUT_OF_MEMORY.search(message) is not None
        if plan.verdict == TAKE:
            return "a good call was refused"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            out_of_memory and isinstance(error, RuntimeError)
        ):
            return ""
        kinds: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError, IndexError)
        if not plan.public or plan.name.startswith("Normal"):  # where it is torch's own answer
            kinds = (*kinds, OverflowError)
        if not isinstance(error, kinds):
            return f"{type(error).__name__} is not for bad arguments"
        if not plan.public:
            return ""
        if plan.name.startswith("Normal"):  # whose words are torch's
            return ""
        of = plan.name.removeprefix("nn.")
        if "device" in plan.arguments and re.search("device|driver", message):
            return ""  # in torch's words
        if "no implementation found" in message:  # of a __torch_function__ of something's own
            return ""
        names = [*plan.arguments, "key or generator", "expected one of", *plan.words]
        if not re.match(rf"(fused_reparameterize|{re.escape(of)})\(\): ", message):
            return "the message does not name the function"
        if not any(re.search(rf"\b{re.escape(name)}\b", message) for name in names):
            return "the message names no argument"
        return ""
    if plan.verdict == REFUSE:
        return "a bad call was taken"
    if plan.expected is not None:
        meta = any(isinstance(g.value, Tensor) and g.value.is_meta for g in plan.arguments.values())
        if plan.maker is not None and not plan.maker.huge and not meta:
            try:
                expected = plan.expected()
            except Exception as e:
                return f"the reference refuses it: {type(e).__name__}: {e}"
            return differs(result, expected)
    return ""


def states(plan: Plan) -> list[Tensor]:
    generators = [torch.default_generator]
    if torch.cuda.is_available():
        generators.append(torch.cuda.default_generators[0])
    given = plan.arguments.get("generator")
    if given is not None and isinstance(given.value, torch.Generator):
        generators.append(given.value)
    return [generator.get_state() for generator in generators]


def run(plan: Plan, show: bool = False) -> tuple[str, str]:
    """How a call went, and what is wrong with that."""
    before, inputs = states(plan), snapshot(plan)
    error: BaseException | None = None
    result = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = plan.call()
        except (Exception, RecursionError) as e:
            error = e
    if show:
        print(plan)
        if error is not None:
            traceback.print_exception(error)
        else:
            print(result)
    finding = finding_of(plan, error, result)
    missing = any("C++ library is missing" in str(w.message) for w in said)
    if not finding and missing and ".python" not in plan.name:
        finding = "a warning that the library is missing"
    if not finding and error is not None:
        moved = any(not torch.equal(a, b) for a, b in zip(before, states(plan), strict=True))
        finding = "it raised, and a generator had moved" if moved else ""
    for t, bits, version in inputs:
        if not finding and (t._version != version or not same_bits(t, bits)):
            finding = "an input was changed"
    if error is not None and finding:
        finding += f": {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "taken" if error is None else type(error).__name__, finding


def work(seed: int, first: int, last: int, device: torch.device) -> None:
    """The calls from first to last, with a line for each."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    if device.type == "cpu":  # so that what is too large fails soon
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for index in range(first, last):
        plan = plan_of(seed, index, device)
        print(f"at\t{index}\t{plan.name}", flush=True)
        outcome, finding = run(plan)
        about = f"{finding}\t{plan}" if finding else "\t"
        print(f"did\t{index}\t{plan.name}\t{outcome}\t" + about.replace("\n", " "), flush=True)


class Finding(NamedTuple):
    index: int
    name: str
    what: str
    call: str


@dataclass
class Report:
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> Iterator[str]:
        names = sorted({name for name, _ in self.outcomes})
        kinds = sorted({kind for _, kind in self.outcomes})
        yield f"{'':34}" + "".join(f"{kind:>20}" for kind in kinds)
        for name in names:
            yield f"{name:34}" + "".join(f"{self.outcomes[name, kind]:>20}" for kind in kinds)
        total = sum(self.outcomes.values())
        yield f"{total} calls in {self.seconds:.0f} s: {len(self.findings)} findings"


def feed(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """What the process prints, line by line, and an empty line at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def fuzz(calls: int, seed: int, device: str = "cpu", first: int = 0) -> Report:
    """So many calls, in processes of their own."""
    report, start, at = Report(), time.monotonic(), first
    while at < first + calls:
        command = [sys.executable, __file__, "--work", "--seed", str(seed), "--device", device]
        command += ["--first", str(at), "--calls", str(first + calls - at)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda p=process, q=lines: feed(p, q), daemon=True)
        reader.start()
        name, silent = "", False
        with process:
            while True:
                try:
                    line = lines.get(timeout=LIMIT if name else 2 * LIMIT)
                except queue.Empty:
                    silent = True
                    process.kill()
                    break
                if not line:
                    break
                kind, index, name, *rest = line.rstrip("\n").split("\t")
                at = int(index)
                if kind == "did":
                    outcome, finding, call = rest
                    report.outcomes[name, outcome] += 1
                    if finding:
                        report.findings.append(Finding(at, name, finding, call))
                    at += 1
        if at >= first + calls:
            break
        code = process.returncode
        what = f"no answer in {LIMIT:.0f} s" if silent else f"the process ended with {code}"
        if code < 0 and not silent:
            what = f"the process ended by {signal.Signals(-code).name}"
        report.outcomes[name, "hang" if silent else "crash"] += 1
        report.findings.append(
            Finding(at, name, what, f"python tests/fuzz.py --seed {seed} --only {at}")
        )
        at += 1
    report.seconds = time.monotonic() - start
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--only", type=int, help="one call, in this process, with its traceback")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.only is not None:
        _, finding = run(plan_of(options.seed, options.only, device), show=True)
        print(f"finding: {finding or 'none'}")
        return bool(finding)
    if options.work:
        work(options.seed, options.first, options.first + options.calls, device)
        return 0
    report = fuzz(options.calls, options.seed, options.device, options.first)
    for finding in report.findings:
        print(f"{finding.index}: {finding.what}\n    {finding.call}")
    print(*report.table(), sep="\n")
    return min(len(report.findings), 255)


if __name__ == "__main__":
    sys.exit(main())
