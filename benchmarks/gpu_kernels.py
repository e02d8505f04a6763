"""One launch of each main kernel, for Nsight Compute, and a table of what it read.

    ncu --profile-from-start off --csv --page raw --log-file kernels.csv \\
        $(python benchmarks/gpu_kernels.py --options) python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py --table kernels.csv

Where the clocks are not yours to set, add --clock-control none.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from reparam_fused import _ops, split
from reparam_fused.check.parts import key_of

METRICS = {  # of ncu, and a short name
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "smsp__inst_executed.sum": "instructions",
    "smsp__cycles_elapsed.avg.per_second": "clock",
}
# Beside these, the stalls and the pipes go into the file
SECTIONS = ("WarpStateStats", "ComputeWorkloadAnalysis", "Occupancy", "SchedulerStats")
N = 2**26


Call = Callable[[], object]


def calls(dtype: torch.dtype, n: int) -> dict[str, tuple[int, Call]]:
    """By name, the number of elements and the call, which is one launch."""
    device = torch.device("cuda")
    key, rows, columns = key_of(1, device=device), n // 1024, 1024
    keys = split(key, rows)
    wide = torch.randn(rows, 2 * columns, device=device).to(dtype)
    x, scale = (t.contiguous() for t in wide.chunk(2, dim=1))
    flat, flat_scale = x.flatten(), scale.flatten()
    halves, turned = wide.chunk(2, dim=1), x.view(columns, rows).t()
    large: dict[str, Call] = {
        "sample": lambda: _ops.sample_from_key(flat, flat_scale, key),
        "sample, a generator's key": lambda: _ops.sample(flat, flat_scale, None),
        "sample, std": lambda: _ops.sample_from_key(flat, flat_scale, key, "std"),
        "sample_backward": lambda: _ops.sample_backward(flat, flat_scale, key),
        "sample, chunk(2)": lambda: _ops.sample_from_key(*halves, key),
        "sample, a key a row": lambda: _ops.sample_from_key(x, scale, keys),
        "sample, one transposed": lambda: _ops.sample_from_key(turned, scale, key),
        "noise": lambda: _ops.noise(key, [n], dtype),
        "kl_divergence": lambda: _ops.kl_divergence(flat, flat_scale),
        "kl_divergence_backward": lambda: _ops.kl_divergence_backward(flat, flat_scale),
        "torch.add": lambda: torch.add(flat, flat_scale),
        "torch.randn": lambda: torch.randn(n, device=device, dtype=dtype),
    }

    def of_few(few: int) -> Call:
        return lambda: _ops.sample_from_key(flat[:few], flat_scale[:few], key)

    small = {f"sample of {few}": (few, of_few(few)) for few in (2560, 2**16, 2**20)}
    return {name: (n, call) for name, call in large.items()} | small


def run() -> None:
    """Each call twice: the first loads its module, or compiles."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, (n, call) in calls(dtype, N).items():
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"LAUNCH\t{n}\t{name}, {str(dtype).removeprefix('torch.')}", flush=True)


def table(path: Path, names: Path) -> None:
    """The rows of ncu in the order of the launches."""
    text = path.read_text()
    rows = list(csv.DictReader(io.StringIO(text[text.index('"ID"') :])))
    units, rows = rows[0], rows[1:]
    launches = [line.split("\t")[1:] for line in names.read_text().splitlines() if "LAUNCH" in line]
    if len(rows) != len(launches):
        sys.exit(f"{len(rows)} launches were profiled, and {len(launches)} were made")
    print("units:", ", ".join(f"{short} {units.get(m)}" for m, short in METRICS.items()))
    print(f"{'kernel':36}", *(f"{short:>13}" for short in METRICS.values()), "per element")
    for row, (n, name) in zip(rows, launches, strict=True):
        # ncu writes a clock with more digits than the column has.
        values = (row.get(metric, "")[:13] for metric in METRICS)
        executed = float(row["smsp__inst_executed.sum"].replace(",", ""))
        per_element = executed * 32 / int(n)
        print(f"{name:36}", *(f"{value:>13}" for value in values), f"{per_element:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--options", action="store_true", help="print those for ncu")
    parser.add_argument("--table", type=Path, nargs=2, metavar=("CSV", "OUTPUT"))
    arguments = parser.parse_args()
    if arguments.options:
        print("--metrics", ",".join(METRICS), *(f"--section {s}" for s in SECTIONS))
    elif arguments.table:
        table(*arguments.table)
    else:
        run()


if __name__ == "__main__":
    main()
