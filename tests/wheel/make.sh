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

# auditwheel names the oldest platform that has what a wheel wants, beside that of its tag.
PATH=$bin:$PATH "$bin/auditwheel" repair --exclude libtorch_cpu.so --wheel-dir "$folder/audited" \
  "$dist"/*.whl
if ls "$folder/audited" | grep -E 'manylinux_2_(29|[3-9][0-9])'; then
  echo "a wheel wants more than glibc 2.28" >&2
  exit 1
fi
"$bin/abi3audit" --strict "$dist"/*-cp310-abi3-*.whl
"$bin/twine" check --strict "$dist"/*

# The same files as a repository of Hugging Face's kernels has them: a package for each build of
# torch, all of them alike.
for wheel in "$dist"/*-cp310-abi3-*.whl; do
  processor=${wheel##*_2_28_}
  "$bin/wheel" unpack --dest "$folder/hub" "$wheel"
  for torch in torch213 torch214; do
    for cuda in cpu cu126 cu130 cu132; do
      variant=$dist/hub/build/$torch-cxx11-$cuda-${processor%.whl}-linux
      mkdir -p "$variant"
      cp -r "$folder"/hub/*/reparam_fused/. "$variant"
    done
  done
  rm -r "$folder/hub"
done
ls -l "$dist"
