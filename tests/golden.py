"""Golden outputs: what calls give under a version of the contract, as bits, in data/golden_N.json.

    python tests/golden.py              compare this machine's CPU with the file
    python tests/golden.py --write      add what the file has not; refuses to change what it has

A value changes with the contract alone: raise CONTRACT, and --write makes a file of its own; that
is a major release (docs/compatibility.md). float64, of which ULPs are promised, is in decimals.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reparam_fused
from reparam_fused import (
    Normal,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
    noise,
)
from reparam_fused._forms import FORMS
from reparam_fused.check.parts import DTYPES, bits_of, inputs, key_of

#: The version of the contract: the major version of a release, from 1.0 on
CONTRACT = 1
KEY = key_of(2**64 - 59, 2**32 - 2)  # the carry into the second word of the counter is among them
SEED = 7
BOUNDS: dict[str, dict[str, Any]] = {
    "": {},
    ", clamp (-1, 2.5), min_std 0.25": {"clamp": (-1.0, 2.5), "min_std": 0.25},
}


def path(contract: int = CONTRACT) -> Path:
    return Path(__file__).parent / "data" / f"golden_{contract}.json"


def operands(*shape: int, form: str, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    mu, scale = inputs(*shape, dtype=dtype)
    if form == "std":
        scale = scale.abs()
    return mu.to(device).requires_grad_(), scale.to(device).requires_grad_()


def with_gradients(
    call: str, results: dict[str, Tensor], leaves: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The results of a call, and of each leaf the gradient of all of them, weighed."""
    for name, result in results.items():
        yield f"{call}: {name}", result
    outputs = list(results.values())
    weights = [inputs(*z.shape, dtype=z.dtype, seed=5)[0].to(z.device) for z in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        yield f"{call}: gradient of {leaf}", gradient


def of_a_form(
    form: str, bounds: dict[str, Any], dtype: torch.dtype, device: Any
) -> Iterator[tuple[str, Tensor]]:
    key = KEY.to(device)
    mu, scale = operands(5, form=form, dtype=dtype, device=device)
    leaves, given = {"mu": mu, form: scale}, {form: scale, **bounds}
    z = fused_reparameterize(mu, key=key, **given)
    yield from with_gradients("reparameterize", {"z": z}, leaves)
    z = fused_reparameterize(mu, key=key, sample_shape=(2,), **given)
    yield from with_gradients("reparameterize, 2 samples", {"z": z}, leaves)
    kl = fused_kl_divergence(mu, **given)
    yield from with_gradients("kl_divergence", {"kl": kl}, leaves)
    if bounds and dtype != torch.float32:
        return
    mu, scale = operands(2, 3, form=form, dtype=dtype, device=device)
    leaves, given = {"mu": mu, form: scale}, {form: scale, **bounds}
    kl = fused_kl_divergence(mu, dim=-1, **given)
    yield from with_gradients("kl_divergence of rows", {"kl": kl}, leaves)
    z, kl = fused_reparameterize_kl(mu, dim=-1, key=key, **given)
    yield from with_gradients("reparameterize_kl", {"z": z, "kl": kl}, leaves)
    for tanh, call in ((False, "reparameterize_log_prob"), (True, "tanh, reparameterize_log_prob")):
        z, log_q = fused_reparameterize_log_prob(mu, dim=-1, tanh=tanh, key=key, **given)
        yield from with_gradients(call, {"z": z, "log_q": log_q}, leaves)


def from_a_prior(form: str, dtype: torch.dtype, device: Any) -> Iterator[tuple[str, Tensor]]:
    for of_prior in FORMS:
        mu, scale = operands(2, 3, form=form, dtype=dtype, device=device)
        loc, far = (
            t.detach().flip(1) for t in operands(2, 3, form=of_prior, dtype=dtype, device=device)
        )
        loc.requires_grad_(), far.requires_grad_()
        prior: Any = Normal(loc, **{"scale" if of_prior == "std" else of_prior: far})
        leaves = {"mu": mu, form: scale, "loc": loc, f"the prior's {of_prior}": far}
        given: dict[str, Any] = {form: scale}
        z, kl = fused_reparameterize_kl(mu, dim=-1, prior=prior, key=KEY.to(device), **given)
        call = f"reparameterize_kl from a prior of {of_prior}"
        yield from with_gradients(call, {"z": z, "kl": kl}, leaves)


def of_keys(device: Any) -> Iterator[tuple[str, Tensor]]:
    key = KEY.to(device)
    for seed in (0, 42, 2**64 - 1):
        yield f"key({seed})", reparam_fused.key(seed, device=device)
    yield "key([1, 2])", reparam_fused.key([1, 2], device=device)
    yield "split(key, 3)", reparam_fused.split(key, 3)
    for data in (0, 1, 2**64 - 1, -(2**63)):
        yield f"fold_in(key, {data})", reparam_fused.fold_in(key, data)
    yield "fold_in(key, [3, -1])", reparam_fused.fold_in(key, torch.tensor([3, -1], device=device))


def of_noise(dtype: torch.dtype, device: Any) -> Iterator[tuple[str, Tensor]]:
    for seed, offset in ((42, 0), (2**64 - 59, 2**32 - 1), (1, 2**64 - 1)):
        yield f"noise of {seed}, {offset}", noise(key_of(seed, offset, device), 6, dtype=dtype)
    yield "noise of two keys", noise(reparam_fused.key([1, 2], device=device), 2, 3, dtype=dtype)
    yield (
        "noise of a block",
        noise(KEY.to(device), 2, 2, dtype=dtype, global_shape=(2**20, 2**30), global_offset=(7, 5)),
    )


def of_generators(dtype: torch.dtype, device: Any) -> Iterator[tuple[str, Tensor]]:
    """Two draws of a generator that was seeded; those of a GPU on it, else of the keys they are."""
    mu, scale = operands(5, form="log_var", dtype=dtype, device=device)
    mu, scale = mu.detach(), scale.detach()
    gpu = torch.device(device).type == "cuda"
    generator = torch.Generator(device).manual_seed(SEED)
    for name in ("first", "second"):
        if gpu:
            z = fused_reparameterize(mu, scale, generator=generator)
        else:
            yield (
                f"{name} of a CPU's generator",
                fused_reparameterize(mu, scale, generator=generator),
            )
            blocks = 3 if dtype == torch.float64 else 2
            key = key_of(SEED, 2**63 + (blocks if name == "second" else 0))
            z = fused_reparameterize(mu, scale, key=key)
        yield f"{name} of a GPU's generator", z


def outputs(
    device: Any = "cpu",
    dtypes: Iterable[torch.dtype] = DTYPES,
    forms: Iterable[str] = FORMS,
) -> dict[str, Tensor]:
    """Every output by its name; of the CPU's generator on a CPU alone."""
    found = dict(of_keys(device))
    for dtype in dtypes:

        def add(prefix: str, values: Iterator[tuple[str, Tensor]]) -> None:
            for name, value in values:
                name = f"{prefix}{name}, {str(dtype).removeprefix('torch.')}"  # noqa: B023
                assert name not in found, name
                found[name] = value.detach()

        add("", of_noise(dtype, device))
        add("", of_generators(dtype, device))
        for form in forms:
            for words, bounds in BOUNDS.items():
                add(f"{form}{words}: ", of_a_form(form, bounds, dtype, device))
            add(f"{form}: ", from_a_prior(form, dtype, device))
    return found


def as_text(value: Tensor) -> str:
    if value.dtype == torch.float64:
        return " ".join(repr(x) for x in value.flatten().tolist())
    if value.dtype == torch.uint64:
        return " ".join(f"{x:016x}" for x in value.flatten().tolist())
    bits = 8 * value.element_size()
    return " ".join(f"{x % 2**bits:0{bits // 4}x}" for x in bits_of(value).tolist())


def is_as_written(value: Tensor, text: str) -> bool:
    """Bit for bit; in float64 within the ULPs of the largest of what is written at once."""
    if value.dtype != torch.float64:
        return as_text(value) == text
    written = torch.tensor([float(word) for word in text.split()], dtype=torch.float64)
    got = value.cpu().flatten()
    return got.shape == written.shape and torch.allclose(
        got, written, rtol=1e-13, atol=1e-13 * float(written.abs().max())
    )


def read(contract: int = CONTRACT) -> dict[str, str]:
    if not path(contract).exists():
        return {}
    content = json.loads(path(contract).read_text())
    assert content["contract"] == contract
    return content["values"]  # type: ignore[no-any-return]


def differences(found: dict[str, Tensor], written: dict[str, str]) -> list[str]:
    """Outputs that are not those of the file."""
    return [
        f"{name}: {as_text(value)} instead of {written[name]}"
        for name, value in found.items()
        if name in written and not is_as_written(value, written[name])
    ]


def write(found: dict[str, Tensor], contract: int = CONTRACT) -> int:
    """Add what the file has not. What it has stays, or this ends."""
    written = read(contract)
    wrong = differences(found, written)
    wrong += [f"{name}: no output has this name" for name in written if name not in found]
    if wrong:
        raise SystemExit(
            f"{path(contract).name} is not written; it holds other values, which change with the "
            "contract alone (raise CONTRACT):\n" + "\n".join(wrong)
        )
    values = {name: written.get(name) or as_text(value) for name, value in found.items()}
    text = json.dumps({"contract": contract, "values": values}, indent=0)
    path(contract).write_text(text + "\n")
    return len(values) - len(written)


def main() -> None:
    written, found = read(), outputs()
    if "--write" in sys.argv:
        print(f"{write(found)} added to {path().name}, which has {len(read())}")
        return
    wrong = differences(found, written)
    compared = sum(name in written for name in found)
    print(f"{reparam_fused.backends()['cpu']}: {compared} compared")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
