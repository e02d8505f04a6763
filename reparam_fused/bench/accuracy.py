"""What a line computes, beside its exact value: the bits of the contract, or an error in ULP.

The error of a sample is that of mu + sigma eps for the eps that the line drew, in units in the last
place of the larger of mu and sigma eps; of a sum, in those of the sum. The exact value is computed
in numpy's longdouble, which has 64 bits of precision on x86.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import reparam_fused
from reparam_fused import reference

from .lines import FORMS, HEADS, LOG_VAR, Line, compiled, keyed_random, operands

N = 2**16
ROWS = (512, 128)
SEED = 11
Exact = npt.NDArray[np.longdouble]


def exact(t: Tensor) -> Exact:
    """The same numbers, without rounding."""
    return np.asarray(t.detach().cpu().double().numpy(), dtype=np.longdouble)


def ulp(size: Exact, dtype: torch.dtype) -> Exact:
    """The unit in the last place of numbers of this size."""
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(size), info.tiny)))
    return np.exp2(exponent) * np.longdouble(info.eps)


def error(actual: Tensor, wanted: Exact, size: Exact) -> float:
    """The largest error of any element."""
    return float(np.max(np.abs(exact(actual) - wanted) / ulp(size, actual.dtype)))


_SIGMAS: dict[str, Any] = {
    "log_var": lambda s: np.exp(s / 2),
    "log_std": np.exp,
    "std": lambda s: s,
    "rho": lambda s: np.log1p(np.exp(s)),
    "log_var, clamp": lambda s: np.exp(np.clip(s, -1, 1) / 2),
    "rho, min_std": lambda s: np.log1p(np.exp(s)) + np.longdouble(0.1),
}


def _of_sample(line: Line, name: str, mu: Tensor, scale: Tensor, eps: Tensor) -> str:
    torch.manual_seed(SEED)
    z: Any = line(mu, scale)
    spread = _SIGMAS[name](exact(scale)) * exact(eps)
    size = np.maximum(np.abs(exact(mu)), np.abs(spread))
    return f"{error(z, exact(mu) + spread, size):.2g} ULP"


@cache
def of_form(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Of a sample in this form: of ours, and of each rival that draws the same eps for a seed."""
    form = FORMS[name]
    torch.manual_seed(SEED)
    mu, scale = operands((N,), (N,), dtype=dtype, device=device)
    zero, unit = torch.zeros_like(mu), torch.full_like(mu, form.unit)
    key = reparam_fused.key(SEED, device=device)
    keyed = form.sample(key=key).fused
    eps = reparam_fused.noise(key, N, dtype=torch.promote_types(dtype, torch.float32))
    found = {"fused": _of_sample(keyed, name, mu, scale, eps)}
    if dtype != torch.float64:
        found["fused"] = f"{_bits_of_sample(name, mu, scale, key)}, {found['fused']}"
    torch.manual_seed(SEED)
    found["eager"] = _of_sample(form.sample().eager, name, mu, scale, torch.randn_like(mu))
    if name != "log_var":
        return found
    # What Inductor draws, by what it makes of zeros; in a half type that is rounded.
    if dtype in (torch.float32, torch.float64):
        line = compiled(LOG_VAR.eager, (N,), dtype)
        torch.manual_seed(SEED)
        drawn: Any = line(zero, unit)
        found["torch.compile"] = _of_sample(line, name, mu, scale, drawn)
    try:
        line = keyed_random(form.sigma, key)
        drawn = line(zero, unit)
    except (ImportError, NotImplementedError):
        return found
    found["func._random"] = _of_sample(line, name, mu, scale, drawn)
    return found


def same_bits(actual: Tensor, expected: Tensor) -> str:
    """Whether they are equal bit for bit."""
    equal = torch.equal(actual.cpu(), expected.cpu())  # of finite numbers
    return "same bits" if equal else "OTHER BITS"


def _bits_of_sample(name: str, mu: Tensor, scale: Tensor, key: Tensor) -> str:
    form = FORMS[name]
    bounds = (*(form.clamp or (-math.inf, math.inf)), form.min_std)
    actual: Any = form.sample(key=key).fused(mu, scale)
    expected = reference.sample_from_key(
        mu.cpu(), scale.cpu(), key.cpu(), form.keyword, None, None, bounds
    )
    return same_bits(actual, expected)


@cache
def of_head(name: str, device: torch.device) -> dict[str, str]:
    """The error of a divergence's sum, which draws nothing."""
    if name not in ("KL", "KL of two"):
        return {}
    head = HEADS[name]
    torch.manual_seed(SEED)
    given = operands(*[ROWS] * head.operands, dtype=torch.float32, device=device)
    mu, log_var, loc, other = [exact(t) for t in given] + [np.longdouble(0)] * (4 - head.operands)
    ratio = log_var - other
    terms = ((mu - loc) ** 2 * np.exp(-other) + np.exp(ratio) - 1 - ratio) / 2
    wanted = terms.sum(-1)
    found = {}
    for call, line in zip(("fused", "eager"), head.pair, strict=True):
        sums: Any = line(*given)
        found[call] = f"{error(sums, wanted, wanted):.2g} ULP"
    return found


def of(line: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """By the names of the rivals; empty where nothing is measured."""
    if line in FORMS:
        return of_form(line, dtype, device)
    return of_head(line, device) if line in HEADS else {}
