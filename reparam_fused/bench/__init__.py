"""Speed and accuracy beside the rivals: ``python -m reparam_fused bench``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

import torch

from ..check import gpus, parse_device

SUMMARY = "measure speed, memory and errors beside the lines that the library replaces"
#: Seconds for each case, of a full run and of a quick one
SECONDS, QUICK_SECONDS = 0.6, 0.12
GROUPS = ("sizes", "forms", "views", "calls", "workloads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", type=parse_device, help="cpu, cuda or cuda:N (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few cases, in less than a minute")
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be given again")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw time per element over size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for the raw rows")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same as a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show a table, and write what is asked for; the exit status is 0."""
    missing = [name for name in ("rich", "numpy") if importlib.util.find_spec(name) is None]
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        missing.append("matplotlib")
    if missing:
        sys.exit(f"bench needs {', '.join(missing)}: pip install {' '.join(missing)}")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import plot, rows, table
    from .cases import cases

    # That there is no GPU is said above.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    facts = rows.about()
    devices = arguments.device or [torch.device("cpu"), *gpus()]
    chosen = [
        case for case in cases()
        if (case.quick or not arguments.quick)
        and (not arguments.group or case.group in arguments.group)
    ]  # fmt: skip
    if not chosen:
        sys.exit(f"bench: --quick has no case of {' or '.join(arguments.group)}")
    if arguments.plot and not any(case.group == "sizes" for case in chosen):
        sys.exit("bench: --plot draws the cases of --group sizes, and they are left out")
    for path in (arguments.plot, arguments.json, arguments.csv):
        if path and not (path.parent.is_dir() and not path.is_dir()):
            sys.exit(f"bench: cannot write {path}: there is no such folder, or it is one")
    print(*(f"{name}: {text}" for name, text in facts.items()), "", sep="\n", flush=True)
    found: list[rows.Row] = []
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    text = TextColumn("{task.description}")
    # Drawn between cases alone: a thread that draws takes its time from what is measured.
    with Progress(*columns, text, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(devices) * len(chosen))
        for device in devices:
            for case in chosen:
                progress.update(task, description=f"{device}, {case}", refresh=True)
                seconds = QUICK_SECONDS if arguments.quick else SECONDS
                found += rows.measure(case, device, seconds)
                progress.advance(task)
    table.show(found)
    if arguments.plot:
        plot.save(found, arguments.plot)
    for path, write in ((arguments.json, rows.write_json), (arguments.csv, rows.write_csv)):
        if path:
            with path.open("w", newline="") as file:
                write(found, facts, file)
    return 0
