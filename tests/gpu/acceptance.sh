#!/usr/bin/env bash
# Everything that only a GPU can show, on the first one of this machine.
#
#     tests/gpu/acceptance.sh FOLDER [correctness|speed|profile]...
#
# The package is the installed one, PYTHON its interpreter. What a part prints is in a file of the
# folder, and so is a summary; a part that takes longer than its limit is ended. Correctness takes
# one or two minutes on 16 cores, for its parts run side by side, the profile less. Speed, with
# rich and matplotlib, takes some minutes; so far it was run in this form on no GPU.
# The exit status is the number of parts that failed.
set -uo pipefail
out=$(realpath -m "${1:?a folder for what is printed}")
shift
checkout=$(realpath "$(dirname "$0")/../..")
python=${PYTHON:-python3}
mkdir -p "$out"
# Not in the checkout's root, whose package has no extension
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$checkout"/{tests,benchmarks,pyproject.toml,csrc} "$work"
cd "$work" || exit 1
export PYTHONUNBUFFERED=1

part() { # name, limit in seconds, command
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
  status=$?
  echo "$name: status $status, $((SECONDS - start)) s: $(tail -n 1 "$out/$name.txt" | cut -c1-160)" |
    tee -a "$out/summary.txt"
  return $status
}

failed=0
finish() { # the parts that run side by side
  local job
  for job in $(jobs -p); do wait "$job" || failed=$((failed + 1)); done
}

correctness() {
  local workers=$(($(nproc) / 3 > 0 ? $(nproc) / 3 : 1))
  local tests=(tests --ignore=tests/gpu --ignore=tests/test_cuda.py --ignore=tests/test_ptx.py
    --ignore=tests/test_machine_code.py --ignore=tests/test_install.py
    -k "cuda or test_gpu" -q -p no:cacheprovider -n "$workers")
  # So many processes would be in each other's way with all cores for each.
  export OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=2
  part programs 120 "$python" tests/gpu/programs.py &
  part every_log_var 150 "$python" tests/gpu/programs.py --every-log-var &
  part check 150 "$python" -m reparam_fused check --device cuda --quick &
  part check_triton 200 env REPARAM_FUSED_GPU=triton \
    "$python" -m reparam_fused check --device cuda --quick &
  part tests 200 "$python" -m pytest "${tests[@]}" &
  part tests_triton 200 env REPARAM_FUSED_GPU=triton "$python" -m pytest "${tests[@]}" &
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      part "$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" tests/gpu/programs.py --small &
    done
  fi
  finish
  unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS
}

speed() {
  part speed 400 "$python" -m reparam_fused bench --device cuda --json "$out/speed.json" \
    --plot "$out/speed.png" || failed=$((failed + 1))
  part speed_triton 150 env REPARAM_FUSED_GPU=triton \
    "$python" -m reparam_fused bench --device cuda --quick --json "$out/speed_triton.json" ||
    failed=$((failed + 1))
  part check_times 120 "$python" -m reparam_fused check --device cuda || failed=$((failed + 1))
}

profile() {
  command -v ncu >/dev/null || return 0
  # shellcheck disable=SC2046
  part kernels 150 ncu --clock-control none --profile-from-start off --csv --page raw \
    --log-file "$out/kernels.csv" $("$python" benchmarks/gpu_kernels.py --options) \
    "$python" benchmarks/gpu_kernels.py || failed=$((failed + 1))
  part kernels_table 20 "$python" benchmarks/gpu_kernels.py --table \
    "$out/kernels.csv" "$out/kernels.txt"
}

for stage in "${@:-correctness speed profile}"; do
  for one in $stage; do "$one"; done
done
exit "$failed"
