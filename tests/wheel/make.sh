#!/usr/bin/env bash
# Make what a release uploads, in dist/, and check it: make.sh BIN [TRIPLET...]
#
# BIN has Python, and what the extra "release" of pyproject.toml names. First the sdist, and out of
# it the wheels: for this processor, and for each that a cross compiler's TRIPLET names.
#   cp310-abi3   every Python with a GIL
#   py3-none     the same without _C, for a Python that has none: the ops take nothing of Python
# Both run on glibc 2.28 and later (csrc/glibc.cpp); tests/test_wheel.py holds them to it.
set -euo pipefail
bin=$(realpath "$1")
shift
export REPARAM_FUSED_REQUIRE_EXT=1 FORCE_CUDA=1
rm -rf dist
"$bin/python" -m build --no-isolation --sdist
dist=$(realpath dist)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The wheel of the sdist's sources, tagged for a processor, and the same without _C
build_for() {
  local source=$folder/$1 alone=$folder/$1-alone
  mkdir "$source" "$alone"
  tar -x -C "$source" --strip-components=1 -f "$dist"/*.tar.gz
  "$bin/python" -m build --no-isolation --wheel --outdir "$dist" "$source"
  "$bin/wheel" tags --remove --platform-tag "manylinux_2_28_$1" "$dist"/*-linux_*.whl
  "$bin/wheel" unpack --dest "$alone" "$dist"/*-cp310-abi3-manylinux_2_28_"$1".whl
  rm "$alone"/*/reparam_fused/_C.*
  "$bin/wheel" pack --dest-dir "$alone" "$alone"/*/
  "$bin/wheel" tags --remove --python-tag py3 --abi-tag none "$alone"/*.whl
  mv "$alone"/*.whl "$dist"
}

build_for "$(uname -m)"
for triplet in "$@"; do
  # Nothing of torch for that processor is needed: its headers are the same, and an empty library
  # tells the linker what the name of libtorch_cpu is. Nor of its Python, whose limited API is the
  # same on every 64-bit Linux.
  stub=$folder/stub-$triplet
  mkdir "$stub"
  "$triplet-gcc" -shared -nostdlib -Wl,-soname,libtorch_cpu.so -x c /dev/null \
    -o "$stub/libtorch_cpu.so"
  link="$triplet-g++ -shared -L$stub -Wl,--no-as-needed"
  CC=$triplet-gcc CXX=$triplet-g++ LDSHARED=$link LDCXXSHARED=$link build_for "${triplet%%-*}"
done

for wheel in "$dist"/*.whl; do "$bin/auditwheel" show "$wheel"; done
"$bin/abi3audit" --strict --report "$dist"/*-cp310-abi3-*.whl
"$bin/twine" check --strict "$dist"/*
ls -l "$dist"
