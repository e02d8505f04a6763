"""Run a Python program with a stand-in GPU under torch, as "cuda".

python tests/gpu/run.py SCRIPT [ARGS]            by the CUDA kernels
python tests/gpu/run.py --triton SCRIPT [ARGS]   by the Triton kernels
python tests/gpu/run.py -m MODULE [ARGS]         a module, such as pytest

With --caching, torch's allocator keeps memory and counts it, as on a GPU; without, every tensor is
an allocation of its own, so that an access beyond its end is found. --old-driver leaves out what
a driver of before CUDA 12 does not have.

README.md of tests/ says what it shows and what it cannot.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ACTIVE = "REPARAM_FUSED_STAND_IN"  # in the environment: the folder of the libraries


def environment(folder: Path, triton: bool) -> dict[str, str]:
    """What a process needs to find the stand-in instead of a driver."""
    runtime = next(folder.glob("libcudart.so.*"))
    cache = Path(tempfile.gettempdir()) / f"reparam_fused-triton-{os.getuid()}"
    return {
        **os.environ,
        ACTIVE: str(folder),
        "PYTHONSAFEPATH": "1",  # the checkout has no extension
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache)),
        **({"REPARAM_FUSED_GPU": "triton"} if triton else {}),
    }


def start(arguments: argparse.Namespace) -> None:
    """Become a process with the stand-in under it."""
    from gpu.build import Unavailable, build

    try:
        folder = build(arguments.old_driver)
    except Unavailable as reason:
        # Not an error: a machine without CUDA's headers tests what it can.
        print(f"no stand-in GPU: {reason}")
        return
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:]]
    os.execve(sys.executable, command, environment(folder, arguments.triton))


def main() -> None:
    """The program that the command line names, where its own command line is the rest."""
    sys.path.insert(0, str(TESTS))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", action="store_true")
    parser.add_argument("--caching", action="store_true")
    parser.add_argument("--old-driver", action="store_true")
    parser.add_argument("-m", dest="module", action="store_true")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if ACTIVE not in os.environ:
        start(arguments)
        return
    from gpu.stand_in import attach

    attach(arguments.caching)
    sys.argv = [arguments.program, *arguments.arguments]
    if arguments.module:
        runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments.program).resolve().parent))
        runpy.run_path(arguments.program, run_name="__main__")


if __name__ == "__main__":
    main()
