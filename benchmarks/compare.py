"""Two commits beside each other in one run: is the newer one slower, and where?

    python benchmarks/compare.py HEAD~1                 # against the working tree, calls and forms
    python benchmarks/compare.py v0.1.0 HEAD --case sizes --seconds 2
    python benchmarks/compare.py HEAD~1 installed --case "calls: one shape" --threshold 0.7

Each side is a commit, a folder with built libraries, or "installed". A commit is unpacked and
built for the CPU under build/compare, once. The two run in processes of their own, which take
turns: a ratio is the time of the first over that of the second in the same round. The exit status
is 1 if a case has become slower than the threshold allows, by three quarters of its rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CASES = ("calls: ", "forms: ")


def built(side: str) -> Path | None:
    """The folder that a Python finds this side's package in; None: it is installed."""
    if side == "installed":
        return None
    if Path(side).is_dir():
        return with_libraries(Path(side).resolve())
    git = ["git", "-C", str(ROOT)]
    sha = subprocess.run(
        [*git, "rev-parse", "--verify", f"{side}^{{commit}}"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    folder = ROOT / "build" / "compare" / sha
    if not (folder / "built").exists():
        print(f"building {side}, {sha[:12]}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run([*git, "archive", sha], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=folder, check=True, env=os.environ | {"CUDA_HOME": "/nonexistent"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (folder / "built").touch()
    return with_libraries(folder)


def with_libraries(folder: Path) -> Path:
    """Without them it would be the reference path that is timed."""
    if not list(folder.glob("reparam_fused/*.so")):
        sys.exit(f"{folder} has no libraries: python setup.py build_ext --inplace")
    return folder


def bench_of_this_tree() -> None:
    """reparam_fused.bench is that of this file's tree, whatever else of the package is not."""
    import reparam_fused

    name, folder = "reparam_fused.bench", ROOT / "reparam_fused" / "bench"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = reparam_fused.bench = module
    spec.loader.exec_module(module)


def serve(requests: IO[str], answer: Callable[[str], None]) -> None:
    """The worker: "make CASE" is answered by the calls of a block or an error, "take" by a time."""
    bench_of_this_tree()
    import torch

    from reparam_fused.bench.cases import cases
    from reparam_fused.bench.timer import Turns, quiet, threads

    known = {str(case): case for case in cases()}
    answer("\n".join(known))
    answer("")
    with ExitStack() as stack:
        turns: Turns | None = None
        for line in requests:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "take":
                assert turns is not None
                answer(repr(turns.take("fused")))
                continue
            stack.close()
            case, device = known[rest], torch.device("cpu")
            try:
                stack.enter_context(threads(case.threads))
                stack.enter_context(case.context())
                turns = Turns({"fused": case.make(device)["fused"]}, device)
                stack.enter_context(quiet())
            except Exception as error:
                answer(f"error {type(error).__name__}: {error}".replace("\n", " "))
            else:
                answer(f"made {turns.block}")


class Worker:
    """A process with the package of one side."""

    def __init__(self, folder: Path | None) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder) if folder else ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, cwd="/",
        )  # fmt: skip
        self.block = 1
        self.cases: list[str] = []
        while line := self.read():
            self.cases.append(line)

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with {self.process.wait()}")
        return line.rstrip("\n")

    def ask(self, request: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.read()

    def make(self, case: str) -> str:
        """The reason why it can't, or nothing."""
        word, _, rest = self.ask(f"make {case}").partition(" ")
        if word == "error":
            return rest
        self.block = int(rest)
        return ""


@contextmanager
def workers(folders: list[Path | None]) -> Iterator[list[Worker]]:
    made = [Worker(folder) for folder in folders]
    try:
        yield made
    finally:
        for worker in made:
            worker.process.kill()
            worker.process.wait()


def ratios(pair: list[Worker], seconds: float) -> list[float]:
    """First over second of each round; who goes first alternates."""
    found: list[float] = []
    taken = 0.0
    while taken < seconds or len(found) < 5:
        order = pair if len(found) % 2 == 0 else pair[::-1]
        times = {id(worker): float(worker.ask("take")) for worker in order}
        first, second = (times[id(worker)] for worker in pair)
        found.append(first / second)
        taken += sum(times[id(worker)] * worker.block for worker in pair)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", default="HEAD~1")
    parser.add_argument("head", nargs="?", default=str(ROOT))
    parser.add_argument("--case", action="append", help="what the names of cases begin with")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case (default: 1)")
    parser.add_argument("--threshold", type=float, default=0.0, help="the least ratio that passes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what others print is no answer

        def answer(text: str) -> None:
            out.write(text + "\n")
            out.flush()

        serve(sys.stdin, answer)
        return 0
    from scipy import stats

    folders = [built(arguments.base), built(arguments.head)]
    beginnings = tuple(arguments.case or DEFAULT_CASES)
    logs: dict[str, float] = {}
    failed = []
    with workers(folders) as pair:
        for case in pair[1].cases:
            if not case.startswith(beginnings):
                continue
            reasons = [reason for worker in pair if (reason := worker.make(case))]
            if reasons:
                print(f"{case:66} left out: {reasons[0]}")
                continue
            low, middle, high = statistics.quantiles(ratios(pair, arguments.seconds), n=4)
            logs[case] = math.log(middle)
            print(f"{case:66} {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)
            if high < arguments.threshold:
                failed.append(case)
    if not logs:
        sys.exit("no case begins so")
    mean = math.exp(statistics.fmean(logs.values()))
    print(f"\nbase / head, geometric mean of {len(logs)} cases: {mean:.3f}", end="")
    if len(logs) > 1:
        bounds = stats.ttest_1samp([*logs.values()], 0.0).confidence_interval(0.95)
        print(f", 95 % interval [{math.exp(bounds.low):.3f}, {math.exp(bounds.high):.3f}]", end="")
    lost = min(logs, key=lambda case: logs[case])
    print(f"\nlost most: {lost}, {math.exp(logs[lost]):.3f}")
    if failed:
        print(f"slower than {arguments.threshold} allows: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
