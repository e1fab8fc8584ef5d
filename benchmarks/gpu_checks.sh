#!/usr/bin/env bash
# Everything that needs a GPU: kernels, tests, and speed. Under 9 minutes, the most telling first.
#
#   benchmarks/gpu_checks.sh [WHEELHOUSE]
#
# Installs into the environment of PYTHON (python3) what it lacks, from WHEELHOUSE alone: a folder
# of wheels for hydra-core, datasets and whatever else is not there already; pytest-xdist, with which
# the tests run side by side, bitsandbytes, liger-kernel and trl, which are compared with, and
# nvidia-ml-py, which reads the energy, are taken if they are there. Without WHEELHOUSE everything
# must be installed. What is printed is kept in OUT (benchmarks/results). LIMIT is the time for all
# of it in seconds (530), COMMIT says what is checked where this is no git checkout.
# Exit code: 0 all passed, 1 something failed, 2 the checks could not run here.
# shellcheck source=benchmarks/gpu_steps.sh
source "$(dirname "$0")/gpu_steps.sh"

rm -f "$out"/gpu_{kernels,tests,tests_large,kernels_speed,loop_overhead,memcheck}.txt
pytest=("$python" -m pytest -p no:cacheprovider -q)
large=tests/gpu/test_gpu_kernels_large.py
side_by_side=()
"$python" -c 'import xdist' 2>"$work/xdist.txt" && side_by_side=(-n 4)

check gpu_kernels 130 "$python" -m dtune kernels check --dtype bf16
check gpu_tests 230 "${pytest[@]}" "${side_by_side[@]}" --durations=10 --ignore "$large" tests/gpu
check gpu_tests_large 60 "${pytest[@]}" "$large"
# What comes after it needs about 70 s.
speed=$(($(left) - 100))
((speed > 240)) && speed=240
check gpu_kernels_speed $((speed + 30)) "$python" benchmarks/kernels/run.py --out "$out" \
  --seconds "$speed" ${COMMIT:+--commit "$COMMIT"}
check gpu_loop_overhead 60 "$python" benchmarks/throughput/loop_overhead.py 200

# Accesses outside of what was allocated, by the small shapes: without PyTorch's cache each tensor
# is an allocation of its own.
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [[ ! -x "$sanitizer" ]]; then
  note skipped gpu_memcheck 0 'no compute-sanitizer here'
elif (($(left) < 30)); then
  note skipped gpu_memcheck 0 "no time was left of $limit s"
else
  check gpu_memcheck "$(left)" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool memcheck --error-exitcode 9 \
    "${pytest[@]}" tests/gpu/test_gpu_kernels.py -k 'an_op_is and bf16 and small'
fi

echo
cat "$out/gpu_device.txt"
show gpu_kernels '^(measured|[0-9]+ passed)'
show gpu_tests '^[0-9]+ (passed|failed)'
show gpu_tests_large '^[0-9]+ (passed|failed|skipped)'
show gpu_kernels_speed ': (met|missed by|not measured)|^no time'
show gpu_loop_overhead '^ratio'
conclude
