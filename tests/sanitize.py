"""Build with a sanitizer, and run what it can judge: make sanitize, or one of these by name.

    python tests/sanitize.py address,undefined    # memory and undefined behaviour: the tests
    python tests/sanitize.py thread               # races: the tests of threads
    python tests/sanitize.py memcheck             # the same memory by valgrind, built as ever

Everything goes to build/sanitize/; neither the tree nor its libraries change. First comes
tests/cpp/kernels.cpp, in which all is compiled for the sanitizer, then the package under pytest,
where Python and torch are not: the runtime is preloaded into them.

What each can see. The address sanitizer sees every access of the library, and the bounds of what
torch allocates, for its malloc is the sanitizer's; leaks are not looked for, as Python leaves much
behind. The thread sanitizer knows the locks of pthread, which the GIL and the threads of Python
and of autograd are made of, but not those of libgomp, which spin on words of their own: with
torch's pool it would take every parallel call for a race. So under pytest a call takes one thread,
and many threads call; that the shares of one call do not race is what kernels.cpp shows, by
std::thread. valgrind has no AVX-512, and runs the other instruction sets.

A build takes 3 minutes of a processor; kernels.cpp then 2 minutes under the first of these, half a
minute under the second, and 2 under valgrind; the tests some 15 minutes and 5.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from test_aarch64 import flags

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")
KERNELS = ("scalar", "avx2", "avx512", "neon", "dispatch")
ISAS = ("scalar", "avx2", "avx512") if platform.machine() == "x86_64" else ("scalar", "neon")


class Sanitizer(NamedTuple):
    programs: Sequence[str]  # what kernels.cpp is asked for, by each ISA
    runtimes: Sequence[str]  # to preload
    options: dict[str, str]
    tests: Sequence[str]
    environment: dict[str, str] = {}  # noqa: RUF012


SANITIZERS = {
    "address,undefined": Sanitizer(
        ["edges", "threads", "layouts", "digests"],
        ["libasan.so", "libubsan.so", "libstdc++.so"],
        {
            # What throws in C++ is caught there; alloc_dealloc: of torch's libraries and Python's
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
        [
            "test_kernels.py", "test_heads.py", "test_samples.py", "test_layouts.py",
            "test_blocks.py", "test_validation.py", "test_keys.py", "test_fast_module.py",
            "test_unaligned.py", "test_std.py", "test_forms.py", "test_kl_divergence.py",
            "test_generator.py", "test_functional.py", "test_concurrency.py",
        ],
    ),
    "thread": Sanitizer(
        ["threads"],
        ["libtsan.so", "libstdc++.so"],
        {"TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1"},
        # But for two that are about torch's pool
        ["test_concurrency.py", "test_generator.py", "-k", "not midway and not parallel_region"],
        {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    ),
}  # fmt: skip


def run(*command: object, output: bool = True, **environment: str) -> None:
    line = " ".join([*(f"{k}={v}" for k, v in environment.items()), *map(str, command)])
    print(f"== {line}", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=None if output else subprocess.DEVNULL,
    )
    print(f"== {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode != 0:
        sys.exit(f"exit status {done.returncode}: {line}")


def build(folder: Path, sanitizer: str = "") -> Path:
    """The package, in this folder, and in it tests/cpp/kernels.cpp with the same kernels."""
    run(
        sys.executable, "setup.py", "-q", "build", f"--build-base={folder}",
        f"--build-lib={folder}/package",
        REPARAM_FUSED_SANITIZE=sanitizer, REPARAM_FUSED_REQUIRE_EXT="1", CUDA_HOME="/nonexistent",
    )  # fmt: skip
    objects = [path for name in KERNELS for path in folder.glob(f"temp*/csrc/cpu/{name}.o")]
    program, source = folder / "kernels", ROOT / "tests/cpp/kernels.cpp"
    sanitized = [f"-fsanitize={sanitizer}"] if sanitizer else []
    run(COMPILER, *flags(), "-O1", "-g", "-pthread", *sanitized, source, *objects, "-o", program)
    return program


def has(binary: Path, isa: str) -> bool:
    environment = {**os.environ, "REPARAM_FUSED_ISA": isa}
    return subprocess.run([binary, "isa"], env=environment, capture_output=True).returncode == 0


def sanitize(name: str, arguments: Sequence[str]) -> None:
    of, folder = SANITIZERS[name], ROOT / "build/sanitize" / name.replace(",", "-")
    program = build(folder, name)
    # The shadow of the thread sanitizer has a place of its own, where addresses are not random.
    prefix = ["setarch", "-R"]
    for isa in filter(lambda isa: has(program, isa), () if arguments else ISAS):
        for what in of.programs:
            run(*prefix, program, what, output=False, **of.options, REPARAM_FUSED_ISA=isa)
    ask = [COMPILER, "-print-file-name="]
    preloaded = [
        subprocess.run([ask[0], ask[1] + runtime], capture_output=True, text=True).stdout.strip()
        for runtime in of.runtimes
    ]
    tests = arguments or [f"tests/{t}" if t.startswith("test_") else t for t in of.tests]
    pytest = [sys.executable, Path(sys.executable).with_name("pytest"), "-q"]
    environment = {**of.options, **of.environment, "PYTHONPATH": f"{folder}/package"}
    run(
        *prefix, "env", f"LD_PRELOAD={' '.join(preloaded)}", *pytest, "-p", "no:cacheprovider",
        *tests, **environment,
    )  # fmt: skip


def memcheck() -> None:
    program = build(ROOT / "build/sanitize/memcheck")
    for isa in ISAS:
        if isa != "avx512" and has(program, isa):
            valgrind = ["valgrind", "-q", "--error-exitcode=1", "--track-origins=yes"]
            run(*valgrind, program, "edges", REPARAM_FUSED_ISA=isa)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*SANITIZERS, "memcheck"])
    parser.add_argument("tests", nargs="*", help="of pytest, in place of kernels.cpp and its own")
    given = parser.parse_args()
    memcheck() if given.name == "memcheck" else sanitize(given.name, given.tests)
