"""Sources, compilers and commands for the tests of what is built and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (
    "csrc", "reparam_fused", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
)  # fmt: skip


def copy_sources(to: Path) -> Path:
    """What a build needs of the checkout, and nothing that one has made."""
    to.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            built = shutil.ignore_patterns("*.so", "*.fatbin", "built_with.txt", "__pycache__")
            shutil.copytree(source, to / name, ignore=built)
        else:
            shutil.copy(source, to / name)
    return to


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def failing_compiler(folder: Path) -> Path:
    """It says its version, and of whatever it is to compile that it has no space for it."""
    return script(
        folder / "c++",
        'case "$1" in -*version) echo "c++ (GCC) 12.2.0"; exit;; esac\n'
        'echo "no space for $0" >&2; exit 1',
    )


def path_without_compilers(folder: Path) -> str:
    """A PATH with the few tools that pip needs."""
    for tool in ("uname", "env"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent)])
