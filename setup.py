"""Build the two libraries and the CUDA kernels, and leave out what no compiler is there for."""

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup
from setuptools.modified import newer_group
from torch.utils import cpp_extension

# Every generation of GPUs with bfloat16. The machine code of 8.0 serves 8.6 and 8.9 too, where
# their own would take 1 % less; PTX of the first serves those to come.
ARCHS = "8.0 9.0 10.0 12.0"
WINDOWS = sys.platform == "win32"
LIBRARY = "libreparam_fused.dll" if WINDOWS else "libreparam_fused.so"
# Contraction would let the compiler choose where an fma goes, and with it the bits.
GCC = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-ignored-attributes"]
LINK = ["-Wl,-s"] if sys.platform == "linux" else []
# Of tests/sanitize.py, as -fsanitize takes it. Such libraries stay out of the tree.
SANITIZE = os.environ.get("REPARAM_FUSED_SANITIZE", "")
if SANITIZE:
    # Python's own flags have -fwrapv, with which no sum overflows. Without the other two, of code
    # that is inlined so far, the compiler takes many minutes and gigabytes.
    GCC += ["-O1", "-g1", "-fno-sanitize-address-use-after-scope", "-fno-wrapv"]
    GCC += ["-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    LINK = [f"-fsanitize={SANITIZE}"]
    GCC += LINK


class Build(cpp_extension.BuildExtension):
    """BuildExtension, and nvcc for kernels.fatbin: data, which the driver loads."""

    def run(self) -> None:
        package = Path(self.build_lib, "reparam_fused")
        self.mkpath(str(package))
        if shutil.which(shlex.split(cpp_extension.get_cxx_compiler())[0]):
            super().run()
            (package / "built_with.txt").write_text(f"{torch.__version__}\n")
        else:
            self.leave_out("libraries", "no C++ compiler was found", "REPARAM_FUSED_REQUIRE_EXT")
            self.extensions.clear()
        home = os.environ.get("CUDA_HOME")
        if nvcc := shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc"):
            shutil.copy(self.compile_kernels(nvcc), package / "kernels.fatbin")
        else:
            self.leave_out("CUDA kernels", "no nvcc was found", "FORCE_CUDA")
        if SANITIZE:
            return
        # Python started in the checkout imports its tree: what was built lies there too.
        for pattern in ("*.so", "*.dll", "*.pyd", "*.fatbin", "built_with.txt"):
            for old in Path("reparam_fused").glob(pattern):
                old.unlink()
            for new in package.glob(pattern):
                shutil.copy2(new, "reparam_fused")

    def leave_out(self, name: str, reason: str, switch: str) -> None:
        if os.environ.get(switch) == "1":
            sys.exit(f"the {name} of reparam_fused cannot be built: {reason}")
        print(f"the {name} of reparam_fused were left out: {reason}", file=sys.stderr)

    def compile_kernels(self, nvcc: str) -> str:
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHS).replace(";", " ").replace("+PTX", "")
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        archs = [a for a in asked.replace(".", "").split() if f"compute_{a}\n" in listed]
        command = [nvcc, "-fatbin", "-std=c++17", "-O3", "--threads=0"]
        # nvcc 12.8, the first with compute_100, has the better compression.
        command += [
            "-compress-mode=size" if "compute_100\n" in listed else "-Xfatbin=-compress-all"
        ]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        command += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]
        made = os.path.join(self.build_temp, f"kernels-{'-'.join(archs)}.fatbin")
        if newer_group(["setup.py", *glob("csrc/c*/*.h"), *glob("csrc/cuda/*.cu*")], made):
            self.mkpath(self.build_temp)
            self.spawn([*command, "csrc/cuda/kernels.cu", "-o", made])
        return made

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("_C"):
            return str(super().get_ext_filename(name))  # type: ignore[no-untyped-call]
        return os.path.join(*name.split(".")[:-1], LIBRARY)  # which is no module of Python's

    def get_export_symbols(self, ext: Any) -> list[str]:
        return []  # they are declared where they are defined


def extension(name: str, *parts: str) -> Extension:
    """Of torch it takes the stable ABI of 2.13, all of it in libtorch_cpu."""
    return Extension(
        f"reparam_fused.{name}",
        sorted(path for part in parts for path in glob(f"csrc/{part}*.cpp")),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020d000000000000"), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=["/O2", "/std:c++17"] if WINDOWS else GCC,
        extra_link_args=LINK,
        language="c++",
        py_limited_api=True,
    )


library = extension("libreparam_fused", "", "cpu/", "cuda/")
module = extension("_C", "python/", "glibc")
options = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(ext_modules=[library, module], cmdclass={"build_ext": Build}, options=options)
