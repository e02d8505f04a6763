"""Prove that one wheel serves many environments: the tests pass in each, and the bits are equal.

    python tests/wheel/run.py WHEEL ENVIRONMENT... [-- PYTEST OPTIONS]

An environment is a virtual environment with torch and what the tests import (pytest, numpy, scipy,
hypothesis, expecttest), or a folder of such, or of folders of such. One that lives in another root
or on another processor has a program `enter` beside its bin/, which runs its arguments there; it
has to see /tmp. The wheel replaces what is installed. Ends with a table, and with 1 where a test
failed or bits differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
ISAS = {"x86_64": ("scalar", "avx2", "avx512"), "aarch64": ("scalar", "neon")}
FACTS = """
import json, os, platform, sys, sysconfig, torch, reparam_fused
free = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(json.dumps({
    "python": platform.python_version() + free,
    "machine": platform.machine(),
    "libc": " ".join(platform.libc_ver()),
    "torch": torch.__version__ + ("" if torch.version.cuda else " (no CUDA)"),
    "installed": os.path.commonpath([reparam_fused.__file__, sys.prefix]) == sys.prefix,
    "backend": reparam_fused.backends()["cpu"],
}))
"""
COLUMNS = ("python", "machine", "libc", "torch", "install", "tests", "seconds", "digest", "isas")


@dataclass
class Environment:
    path: Path
    tests: Path
    row: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        enter = self.path / "enter"
        python = [str(enter)] * enter.exists() + [str(self.path / "bin" / "python")]
        # From within the tests: what they import by name lies there, the package does not.
        return subprocess.run(
            [*python, *arguments],
            cwd=self.tests,
            env={**os.environ, "PYTHONPATH": "", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def install(self, wheel: Path) -> None:
        start = time.perf_counter()
        pip = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--force-reinstall")
        done = self.run(*pip, str(wheel))
        self.row["install"] = f"{time.perf_counter() - start:.1f} s"
        if done.returncode:
            self.wrong.append(f"pip: {done.stdout}")
            return
        done = self.run("-c", FACTS)
        if done.returncode:
            self.wrong.append(f"import: {done.stdout}")
            return
        facts = json.loads(done.stdout.splitlines()[-1])
        self.row.update({name: facts[name] for name in ("python", "machine", "libc", "torch")})
        if not facts["installed"]:
            self.wrong.append("what is imported is not what was installed")
        if not facts["backend"].startswith("C++"):
            self.wrong.append(f"backends()['cpu'] is {facts['backend']}")

    def digest(self) -> None:
        digests = {}
        for isa in ISAS[self.row["machine"]]:
            done = self.run("digest.py", REPARAM_FUSED_ISA=isa)
            if "REPARAM_FUSED_ISA is" in done.stdout:  # not of this processor
                continue
            # After what torch may say of an emulated processor
            start = done.stdout.find("isa ")
            name, *lines = done.stdout[max(start, 0) :].splitlines() or [""]
            if done.returncode or not name.endswith(isa):
                self.wrong.append(f"digest of {isa}: {done.stdout}")
                continue
            digests[isa] = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        self.row["isas"] = " ".join(digests)
        self.row["digest"] = " ".join(sorted(set(digests.values())))

    def test(self, options: list[str]) -> None:
        start = time.perf_counter()
        done = self.run("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", *options)
        self.row["seconds"] = f"{time.perf_counter() - start:.0f}"
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        self.row["tests"] = ", ".join(re.findall(r"\d+ (?:passed|skipped|failed|error)", last))
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if re.match("FAILED|ERROR", line)]
            self.wrong += said or [f"pytest: {done.stdout[-2000:]}"]
        print(*reasons(done.stdout), sep="\n")


def reasons(log: str) -> list[str]:
    """How many tests were skipped, by reason."""
    counts: Counter[str] = Counter()
    for number, reason in re.findall(r"SKIPPED \[(\d+)\] \S+ (.*)", log):
        counts[reason] += int(number)
    return [f"{number} skipped: {reason}" for reason, number in counts.most_common()]


def environments(paths: list[Path], tests: Path) -> list[Environment]:
    found = []
    for path in paths:
        inside = [path, *sorted(path.glob("*")), *sorted(path.glob("*/*"))]
        here = [Environment(p.absolute(), tests) for p in inside if (p / "pyvenv.cfg").exists()]
        found += here
        if not here:
            sys.exit(f"{path} has no virtual environment")
    return found


def copy_checkout(to: Path) -> Path:
    """The files of the checkout, in whose tests/ only what is installed is found."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to / "tests"


def table(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, *(tuple(row.get(c, "") for c in COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(texts)


def main() -> int:
    given = [*sys.argv[1:], "--"]
    own, options = given[: given.index("--")], given[given.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("environment", type=Path, nargs="+")
    parser.add_argument("--no-tests", action="store_true", help="the install and the digests alone")
    arguments = parser.parse_args(own)
    wheel = arguments.wheel.absolute()
    sha = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        found = environments(arguments.environment, copy_checkout(Path(folder)))
        for environment in found:
            print(f"== {environment.path}", flush=True)
            environment.install(wheel)
            if not environment.wrong:
                environment.digest()
                if not arguments.no_tests:
                    environment.test(options)
            print(*environment.wrong, environment.row, sep="\n", flush=True)
    print(f"\n{wheel.name}, {wheel.stat().st_size} bytes, sha256 {sha}\n")
    print(table([environment.row for environment in found]))
    digests = {environment.row.get("digest", "") for environment in found}
    equal = len(digests) == 1 and re.fullmatch("[0-9a-f]{16}", *digests) is not None
    failed = sum(bool(environment.wrong) for environment in found)
    print(f"\n{'one digest' if equal else 'DIGESTS DIFFER'}, {failed} of {len(found)} failed")
    return int(failed > 0 or not equal)


if __name__ == "__main__":
    sys.exit(main())
