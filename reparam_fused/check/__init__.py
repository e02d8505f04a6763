"""The acceptance run for any machine: ``python -m reparam_fused check``.

A check is a function of a device that says what it has seen, or raises; one that fails
stops no other. No GPU is made the current one for it: all but the first are not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .. import __version__, backends
from . import bits, calls, gpu, timings
from .parts import DTYPES, Skip

SUMMARY = "check this installation on every device found, and say what is built and why"
Check: TypeAlias = Callable[[torch.device], str]

# The first of these is the first call of all on each GPU.
GPU_CHECKS: dict[str, Check] = {
    "capture, first call": partial(gpu.graph, warm_ups=0),
    "capture, warm": partial(gpu.graph, warm_ups=3),
    "streams": gpu.streams,
    "generator offset": gpu.generator_offset,
    "peak memory": gpu.peak_memory,
    "triton": gpu.triton,
    "2**31 elements": gpu.more_than_2_31_elements,
}
CHECKS: dict[str, Check] = {
    **{f"values {d}": partial(bits.values, dtype=d) for d in DTYPES},
    **{f"statistics {d}": partial(calls.statistics, dtype=d) for d in DTYPES[:2]},
    "gradients": calls.gradients,
    "generators": calls.generators,
}
TIMINGS: dict[str, Check] = {f"time {d}": partial(timings.times, dtype=d) for d in DTYPES[::3]}


def gpus() -> list[torch.device]:
    """Every GPU that torch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", i) for i in range(count)]


def parse_device(text: str) -> list[torch.device]:
    """The devices that ``--device`` names: ``cuda`` is every GPU."""
    found = [torch.device("cpu"), *gpus()]
    chosen = [d for d in found if text in (d.type, str(d))]
    if not chosen:
        raise argparse.ArgumentTypeError(f"no device {text!r}: found are {[*map(str, found)]}")
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", type=parse_device, help="cpu, cuda or cuda:N (default: all)")
    parser.add_argument("--quick", action="store_true", help="leave out the timings")
    parser.add_argument("--json", type=argparse.FileType("w"), help="a file for all of the report")


def environment() -> dict[str, str | None]:
    """What a reader of the report must know of the machine."""
    facts = {
        "reparam_fused": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": f"{platform.python_version()}, {platform.platform()}",
    }
    with suppress(importlib.metadata.PackageNotFoundError):
        facts["triton"] = importlib.metadata.version("triton")
    with suppress(OSError, IndexError):  # Linux knows the model of most CPUs
        facts["cpu"] = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    for device in gpus():
        about = torch.cuda.get_device_properties(device)
        size, capability = about.total_memory / 2**30, f"{about.major}.{about.minor}"
        facts[str(device)] = f"{about.name}, compute capability {capability}, {size:.0f} GiB"
    return facts | {f"backend {k}": text for k, text in backends().items()}


def run_check(name: str, check: Check, device: torch.device) -> dict[str, Any]:
    """What a check raises is its row, and stops no other."""
    row: dict[str, Any] = {"status": "pass", "device": str(device), "name": name}
    start = time.perf_counter()
    try:
        row["detail"] = check(device)
    except Skip as reason:
        row |= {"status": "skip", "detail": str(reason)}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        row |= {"status": "fail", "detail": text, "traceback": traceback.format_exc()}
    return row | {"seconds": time.perf_counter() - start}


def run(arguments: argparse.Namespace) -> int:
    """Print and write the report; 0 where nothing failed, else 1."""
    facts = environment()
    print(*(f"{name}: {text}" for name, text in facts.items()), "", sep="\n", flush=True)
    rows = []
    for device in arguments.device or [torch.device("cpu"), *gpus()]:
        checks = (GPU_CHECKS if device.type == "cuda" else {}) | CHECKS
        for name, check in (checks if arguments.quick else checks | TIMINGS).items():
            rows.append(run_check(name, check, device))
            print("{status}  {device:6}  {name:24}  {detail}".format_map(rows[-1]), flush=True)
    failed = sorted({row["name"] for row in rows if row["status"] == "fail"})
    count = {end: sum(r["status"] == end for r in rows) for end in ("pass", "fail", "skip")}
    print(f"\n{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped", end="")
    print(f": failed are {', '.join(failed)}" if failed else "")
    if arguments.json:
        with arguments.json as file:
            json.dump({"environment": facts, "summary": count, "results": rows}, file, indent=2)
    return 1 if failed else 0
