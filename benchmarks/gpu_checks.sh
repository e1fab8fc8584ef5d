#!/usr/bin/env bash
# Everything that needs a GPU: its tests, and what the training loop costs there. Under 9 minutes.
#
#   benchmarks/gpu_checks.sh [WHEELHOUSE]
#
# Installs into the environment of PYTHON (python3) what it lacks, from WHEELHOUSE alone: a folder
# of wheels for hydra-core, datasets and whatever else is not there already. Without WHEELHOUSE
# everything must be installed. What is printed is kept in OUT (benchmarks/results).
# Exit code: 0 all passed, 1 something failed, 2 the checks could not run here.
set -uo pipefail
wheelhouse=${1:+$(realpath -- "$1")}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT

# The checkout is used as it is: building a wheel would need its build backend here as well.
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/launch${PYTHONPATH:+:$PYTHONPATH}"
export DTUNE_CACHE="$work/cache" HF_HUB_OFFLINE=1 NO_COLOR=1 TQDM_DISABLE=1 PYTHONUNBUFFERED=1

if [[ -n "$wheelhouse" ]]; then
  "$python" - >"$work/requirements.txt" <<'PYTHON' || exit 2
import tomllib

with open("pyproject.toml", "rb") as file:
    needs = tomllib.load(file)["project"]["dependencies"]
print("\n".join([*needs, "pytest>=8.4", "pytest-timeout>=2.4"]))
PYTHON
  "$python" -m pip install --quiet --disable-pip-version-check --no-index \
    --find-links "$wheelhouse" --requirement "$work/requirements.txt" || exit 2
fi

"$python" - <<'PYTHON' 2>&1 | tee "$out/gpu_device.txt" || exit 2
import platform
import sys

import torch
import transformers

if not torch.cuda.is_available():
    sys.exit("no CUDA device: nothing to check")
print(
    f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, Python "
    f"{platform.python_version()}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}"
)
PYTHON

table=()
failed=0

# check NAME SECONDS COMMAND...: run it, keep what it prints, and note how it ended.
check() {
  local name=$1 seconds=$2 began=$SECONDS code=0 verdict=PASS how=
  shift 2
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt" || code=$?
  if ((code)); then
    verdict=FAIL
    failed=1
    how="exit code $code"
    ((code == 124 || code == 137)) && how="not done in $seconds s"
  fi
  table+=("$(printf '%-4s  %-17s  %4d s  %s' "$verdict" "$name" $((SECONDS - began)) "$how")")
}

check gpu_tests 360 "$python" -m pytest -p no:cacheprovider --durations=5 tests/gpu
check gpu_loop_overhead 120 "$python" benchmarks/throughput/loop_overhead.py 200

echo
cat "$out/gpu_device.txt"
tail -n 1 "$out/gpu_tests.txt"
grep '^ratio' "$out/gpu_loop_overhead.txt"
printf '%s\n' "${table[@]}"
exit "$failed"
