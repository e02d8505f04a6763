"""Build the extensions where that can be done, and install without them where not."""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit("reparam_fused is built against torch: install it, then use --no-build-isolation")

CPU, CUDA = "reparam_fused._C", "reparam_fused._cuda"
REQUIRED = os.environ.get("REPARAM_FUSED_REQUIRE_EXT") == "1"  # a failed build is fatal
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"  # and a missing toolkit
# Every generation of GPUs with bfloat16, and PTX for those between and those to come.
ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX;12.0+PTX"


def known_archs(archs: str, listed: str) -> str:
    """Those that nvcc lists, an older one fewer than all, with PTX for the newest of them."""
    names = listed.replace("compute_", "").split()
    known = [a for a in archs.split(";") if a.removesuffix("+PTX").replace(".", "") in names]
    return ";".join(known).removesuffix("+PTX") + "+PTX"


def find_cuda() -> str:
    """Point torch to the toolkit. Gives the reason why its kernels cannot be built, or ""."""
    if not torch.version.cuda:
        return "torch is a build without CUDA"
    if not (nvcc := shutil.which(os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc"))):
        return f"no nvcc was found: install the CUDA {torch.version.cuda} toolkit"
    # What is on the PATH may be a wrapper: nvcc itself knows where its toolkit is.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True)
    version = subprocess.run([nvcc, "--version"], capture_output=True)
    top = re.search(rb"TOP=(.+)", dry_run.stderr)
    release = re.search(r"release ((\d+)\.\d+)", version.stdout.decode())
    if not top or not release:
        return f"{nvcc} does not say its version and folder"
    if release[2] != torch.version.cuda.split(".")[0]:
        return f"nvcc is release {release[1]}, but torch is built for CUDA {torch.version.cuda}"
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", known_archs(ARCHS, listed))
    cpp_extension.CUDA_HOME = os.path.realpath(top[1].decode())
    return ""


class BuildWherePossible(cpp_extension.BuildExtension):
    """BuildExtension, but what cannot be built is left out of a working package that says why."""

    def run(self) -> None:
        if cuda_missing:
            self.leave_out(CUDA, cuda_missing)
        try:
            super().run()
        except Exception as error:  # no compiler at all
            self.leave_out(CPU, str(error))

    def build_extension(self, ext: Extension) -> None:
        self.note(ext.name).unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            self.leave_out(ext.name, str(error))

    def leave_out(self, name: str, reason: str) -> None:
        if (REQUIRED and reason != cuda_missing) or (FORCE_CUDA and name == CUDA):
            raise SystemExit(f"{name} cannot be built: {reason}")
        print(f"reparam_fused: {name} was left out: {reason}", file=sys.stderr)
        self.note(name).parent.mkdir(parents=True, exist_ok=True)
        self.note(name).write_text(reason.strip().partition("\n")[0] + "\n")

    def note(self, name: str) -> Path:
        """The file from which the package knows why an extension is missing."""
        root = "" if self.inplace or self.editable_mode else self.build_lib
        return Path(root, f"{name.replace('.', '/')}_missing.txt")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


# Contraction would let the compiler choose where an fma goes, and with it the bits.
# Of torch the stable ABI of 2.13 is used, and libtorch_cpu alone, in which it all is: one
# binary serves every torch since and every Python, with CUDA and without.
CXX = ["-O3", "-ffp-contract=off", "-Wall", "-Wno-ignored-attributes", "-fvisibility=hidden"]
STABLE = [("TORCH_TARGET_VERSION", "0x020d000000000000"), ("TORCH_STABLE_ONLY", None)]
options: dict[str, Any] = {
    "define_macros": STABLE,
    "extra_compile_args": {"cxx": CXX, "nvcc": ["-O3"]},
    "extra_link_args": ["-Wl,-s"] if sys.platform == "linux" else [],
    "optional": True,
    "py_limited_api": True,
}
cpu = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
cuda = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
extensions = [cpp_extension.CppExtension(CPU, cpu, **options)]
extensions[0].libraries = ["torch_cpu"]
if not (cuda_missing := find_cuda()):
    extensions += [cpp_extension.CUDAExtension(CUDA, cuda, **options)]
    extensions[1].libraries = ["torch_cpu", "cudart"]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWherePossible},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
