"""Run a Python program with a stand-in GPU under torch, as "cuda".

python tests/gpu/run.py SCRIPT [ARGS]            by the CUDA extension
python tests/gpu/run.py --triton SCRIPT [ARGS]   by the Triton kernels
python tests/gpu/run.py -m MODULE [ARGS]         a module, such as pytest

README.md of tests/ says what it shows and what it cannot.
"""

from __future__ import annotations

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
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache)),
        **({"REPARAM_FUSED_GPU": "triton"} if triton else {}),
    }


def start(arguments: list[str]) -> None:
    """Become a process with the stand-in under it."""
    from gpu.build import Unavailable, build

    triton = arguments[:1] == ["--triton"]
    try:
        folder = build()
    except Unavailable as reason:
        # Not an error: a machine without CUDA's headers tests what it can.
        print(f"no stand-in GPU: {reason}")
        return
    command = [sys.executable, "-P", str(Path(__file__)), *arguments[triton:]]
    os.execve(sys.executable, command, environment(folder, triton))


def main() -> None:
    """The program that the command line names, where its own command line is the rest."""
    sys.path.insert(0, str(TESTS))
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    if ACTIVE not in os.environ:
        start(arguments)
        return
    from gpu.stand_in import attach

    attach()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
