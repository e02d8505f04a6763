"""The acceptance run for any machine: ``python -m reparam_fused check``.

A check is a function of a device that gives a Result, or raises. One that fails
does not stop the others. What a CPU can show and what a GPU must show are the
same functions, given another device.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import reparam_fused

from . import bits, gpu, noise, speed, state
from .result import Check, Result, skipped

SUMMARY = "check this installation on every device found, and say what is built and why"

CHECKS: dict[str, Check] = {
    "known answers": bits.known_answers,
    "digest float32": partial(bits.digest_as_expected, dtype=torch.float32),
    "digest float16": partial(bits.digest_as_expected, dtype=torch.float16),
    "digest bfloat16": partial(bits.digest_as_expected, dtype=torch.bfloat16),
    "reference float32": partial(bits.sizes, dtype=torch.float32),
    "reference float16": partial(bits.sizes, dtype=torch.float16),
    "reference bfloat16": partial(bits.sizes, dtype=torch.bfloat16),
    "reference float64": partial(bits.sizes, dtype=torch.float64),
    "layouts": bits.layouts,
    "forms and blocks": bits.forms_and_blocks,
    "extreme values": bits.extreme_values,
    "divergence": bits.divergence,
    "gradients": state.gradients,
    "statistics float32": partial(noise.statistics, dtype=torch.float32),
    "statistics float64": partial(noise.statistics, dtype=torch.float64),
    "generators": state.generators,
    "saved tensors": state.saved_tensors,
}
GPU_CHECKS: dict[str, Check] = {
    "triton": gpu.triton_agrees,
    "generator offset": gpu.generator_offset,
    "peak memory": gpu.peak_memory,
    "graph replay": gpu.graph_replay,
    "graph key": gpu.graph_key,
    "side stream": gpu.side_stream,
    "no synchronisation": gpu.no_synchronisation,
    "every GPU": gpu.every_gpu,
    "2**31 elements": gpu.more_than_2_31_elements,
}
CPU_TIMINGS: dict[str, Check] = {"time": speed.cpu_time}
GPU_TIMINGS: dict[str, Check] = {
    f"bandwidth {str(dtype).removeprefix('torch.')} 2**{power}": partial(
        speed.gpu_bandwidth, dtype=dtype, n=1 << power
    )
    for dtype in (torch.float32, torch.bfloat16)
    for power in (24, 26)
}


def parse_device(text: str) -> list[torch.device]:
    """The devices that ``--device`` names: ``cuda`` is every GPU."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}: expected cpu, cuda or cuda:N")
    if text == "cpu":
        return [torch.device("cpu")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise argparse.ArgumentTypeError(f"device {text!r}: {why_no_gpu()}")
    if text == "cuda":
        return [torch.device("cuda", i) for i in range(count)]
    index = int(text.removeprefix("cuda:"))
    if index >= count:
        raise argparse.ArgumentTypeError(f"device {text!r}: there are {count} GPUs, from cuda:0")
    return [torch.device("cuda", index)]


def parse_json(text: str) -> Path:
    """The path of ``--json``, refused before the run where it cannot be written after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return path


def why_no_gpu() -> str:
    """What to say where there is no GPU to check."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "no GPU: this torch is built without CUDA"
    return "no GPU: torch.cuda.is_available() is False"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--device",
        type=parse_device,
        metavar="cpu|cuda|cuda:N",
        help="check this device alone (default: the CPU and every GPU)",
    )
    parser.add_argument("--quick", action="store_true", help="leave out the timings")
    parser.add_argument("--json", type=parse_json, metavar="FILE", help="write everything there")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cuda_driver() -> str | None:
    """The newest CUDA that the driver serves; torch has no public name for it."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    if ask is None or not torch.cuda.is_available():
        return None
    version = ask()
    return f"{version // 1000}.{version % 1000 // 10}"


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What a reader of the report must know of the machine."""
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu_properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "device": f"cuda:{i}",
                "name": gpu_properties.name,
                "compute capability": f"{gpu_properties.major}.{gpu_properties.minor}",
                "memory": gpu_properties.total_memory,
            }
        )
    return {
        "versions": {
            "reparam_fused": reparam_fused.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cuda driver": _cuda_driver(),
            "hip": torch.version.hip,
            "triton": _triton(),
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "gpus": gpus,
        "backends": reparam_fused.backends(),
    }


def print_header(about: dict[str, Any]) -> None:
    """The environment, a line for each fact."""
    print(", ".join(f"{name} {value}" for name, value in about["versions"].items() if value))
    print(f"platform: {about['platform']}")
    print(f"cpu: {about['cpu']}")
    for found in about["gpus"]:
        size = found["memory"] / 2**30
        print(
            f"{found['device']}: {found['name']}, compute capability "
            f"{found['compute capability']}, {size:.0f} GiB"
        )
    for name, value in about["backends"].items():
        print(f"backend {name}: {value}")
    print(flush=True)


def run_check(name: str, check: Check, device: torch.device) -> Result:
    """One check, whatever it does: what it raises is its result."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with ExitStack() as stack:
                # After an illegal access on a GPU these raise as well.
                if device.type == "cuda":
                    stack.enter_context(torch.cuda.device(device))
                gpus = [device.index] if device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices=gpus))
                result = check(device)
        except Exception as error:
            text = " ".join(str(error).split())
            shown = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
            result = Result("fail", shown, traceback=traceback.format_exc())
    return dataclasses.replace(
        result,
        name=name,
        device=str(device),
        seconds=time.perf_counter() - start,
        warnings=[str(w.message) for w in caught],
    )


def results(devices: list[torch.device] | None, quick: bool) -> Iterator[Result]:
    """Every check of these devices, or of all, in turn."""
    has_gpu = torch.cuda.is_available()
    chosen = devices or [torch.device("cpu"), *(parse_device("cuda") if has_gpu else [])]
    for device in chosen:
        is_gpu = device.type == "cuda"
        checks = CHECKS | (GPU_CHECKS if is_gpu else {})
        if not quick:
            checks = checks | (GPU_TIMINGS if is_gpu else CPU_TIMINGS)
        for name, check in checks.items():
            yield run_check(name, check, device)
    if devices is None and not has_gpu:
        for name in GPU_CHECKS | ({} if quick else GPU_TIMINGS):
            yield dataclasses.replace(skipped(why_no_gpu()), name=name, device="cuda")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """All of the report, or nothing."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, delete=False) as file:
        file.write(text)
    try:
        os.chmod(file.name, 0o644)  # mkstemp's own is 0o600
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def run(arguments: argparse.Namespace) -> int:
    """Print and write the report; 0 where nothing failed, else 1."""
    about = environment()
    print_header(about)
    rows = []
    width = max(map(len, CHECKS | GPU_CHECKS | CPU_TIMINGS | GPU_TIMINGS))
    for row in results(arguments.device, arguments.quick):
        rows.append(row)
        print(f"{row.status}  {row.device:6}  {row.name:{width}}  {row.detail}", flush=True)
    count = {status: sum(r.status == status for r in rows) for status in ("pass", "fail", "skip")}
    failed = sorted({r.name for r in rows if r.status == "fail"})
    print(f"\n{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped", end="")
    print(f": failed are {', '.join(failed)}" if failed else "")
    if arguments.json:
        write_json(arguments.json, about | {"summary": count, "results": [r.row() for r in rows]})
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command, without its name."""
    parser = argparse.ArgumentParser(prog="python -m reparam_fused check", description=SUMMARY)
    add_arguments(parser)
    return run(parser.parse_args(argv))
