"""Times of a step of each client, with the patch and without it.

    .venv/bin/python tests/integrations/times.py      # after make integrations

The two take turns at going first; a time is the median of many rounds, and the ratio that of
the rounds' ratios, for the machines are shared. Beside the whole step stands what it draws,
alone: Normal.rsample of the same shapes, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import clients
import pytest
import torch
from torch.distributions import Normal

from reparam_fused import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import count_patched

STEPS: dict[str, tuple[str, Callable[[], Callable[[], object]]]] = {
    "diffusers": ("AutoencoderKL, 8 x 3 x 32 x 32", clients.diffusers_step),
    "pyro": ("Pyro SVI, AutoNormal, 8 particles", clients.pyro_step),
    "scvi": ("SCVI, 128 cells of 100 genes", clients.scvi_step),
    "stable_baselines3": ("SAC, batch of 256", clients.stable_baselines_step),
}


def seconds(step: Callable[[], object], calls: int) -> float:
    step()  # a class that has just changed looks its methods up again
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def shapes_drawn(step: Callable[[], object]) -> list[torch.Size]:
    with pytest.MonkeyPatch.context() as monkeypatch, patch():
        means = count_patched(monkeypatch)
        step()
    return [mean.shape for mean in means]


def draws(shapes: list[torch.Size]) -> Callable[[], object]:
    leaves = [
        (torch.zeros(shape, requires_grad=True), torch.ones(shape, requires_grad=True))
        for shape in shapes
    ]
    normals = [(Normal(*pair, validate_args=False), pair) for pair in leaves]
    grads = [torch.ones(shape) for shape in shapes]

    def run() -> None:
        for (normal, pair), grad in zip(normals, grads, strict=True):
            torch.autograd.grad(normal.rsample(), pair, grad)

    return run


def compare(step: Callable[[], object], calls: int, limit: float) -> tuple[float, float, str]:
    """Medians of the times unpatched and patched, and of their ratio, with its quartiles."""
    times: dict[bool, list[float]] = {False: [], True: []}
    end = time.monotonic() + limit
    for i in count():
        for patched in (i % 2 == 0, i % 2 == 1):
            with patch() if patched else nullcontext():
                times[patched].append(seconds(step, calls))
        if time.monotonic() > end:
            break
    ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    before, after = (statistics.median(times[p]) for p in (False, True))
    return before, after, f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=40, help="for each client")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    print(
        "| client | unpatched, ms a step | patched, ms a step | ratio [quartiles] "
        "| its draws: elements | unpatched, us | patched, us | ratio [quartiles] |"
    )
    print("|---" * 8 + "|")
    for library, (name, prepare) in STEPS.items():
        if find_spec(library) is None:
            print(f"| {name} | {library} is not installed |" + " |" * 6)
            continue
        step = prepare()
        shapes = shapes_drawn(step)
        elements = " + ".join(str(shape.numel()) for shape in shapes)
        before, after, ratio = compare(step, 1, options.seconds)
        whole = f"{1e3 * before:.2f} | {1e3 * after:.2f} | {ratio}"
        before, after, ratio = compare(draws(shapes), 50, options.seconds / 4)
        alone = f"{elements} | {1e6 * before:.0f} | {1e6 * after:.0f} | {ratio}"
        print(f"| {name} | {whole} | {alone} |", flush=True)


if __name__ == "__main__":
    main()
