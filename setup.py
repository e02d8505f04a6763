"""Build the C++ extension where that can be done, and install without it where not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "reparam_fused builds against the torch that it will run with: install torch first, "
        "then run: pip install --no-build-isolation ."
    ) from error

REASON = Path("reparam_fused") / "_build_error.txt"


class BuildWherePossible(BuildExtension):
    """BuildExtension, but a failed build leaves a working pure-Python package and says why.

    REPARAM_FUSED_REQUIRE_EXT=1 makes the failure fatal, for those who build wheels.
    """

    def run(self) -> None:
        note = Path(self.build_lib) / REASON
        note.unlink(missing_ok=True)
        REASON.unlink(missing_ok=True)
        try:
            super().run()
        except (Exception, SystemExit) as error:
            if os.environ.get("REPARAM_FUSED_REQUIRE_EXT") == "1":
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            print(f"reparam_fused: the C++ extension was left out: {reason}", file=sys.stderr)
            if self.inplace or self.editable_mode:
                note = REASON
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


# at::parallel_for is a template with an OpenMP pragma inside: without -fopenmp
# here it is serial, and says nothing. The runtime itself is torch's, found at
# load time through libtorch_cpu: to link one here would bring in a second.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

extension = CppExtension(
    "reparam_fused._C",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
    # Contraction would let the compiler choose where an fma goes, and with it the bits.
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wno-ignored-attributes", *OPENMP],
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildWherePossible},
)
