# Sourced by the scripts that run on a machine with a GPU, with their arguments: installs, and runs
# steps within LIMIT.
#
# Gives: python, out, work, a folder that is removed in the end, and check, note, left, show,
# conclude. Where nothing can run here it exits with 2.
# shellcheck shell=bash

set -uo pipefail
wheelhouse=${1:+$(realpath -- "$1")}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
limit=${LIMIT:-530}
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
  install=("$python" -m pip install --quiet --disable-pip-version-check --no-index
    --find-links "$wheelhouse")
  "${install[@]}" --requirement "$work/requirements.txt" || exit 2
  for extra in pytest-xdist execnet bitsandbytes liger-kernel trl accelerate nvidia-ml-py; do
    "${install[@]}" --no-deps "$extra" 2>"$work/pip.txt" || echo "without $extra: not in $wheelhouse"
  done
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

# left: seconds until LIMIT.
left() { echo $((limit - SECONDS)); }

# note VERDICT NAME SECONDS HOW: one row of the last table.
note() { table+=("$(printf '%-7s  %-17s  %4d s  %s' "$@")"); }

# check NAME SECONDS COMMAND...: run it, keep what it prints, and note how it ended.
check() {
  local name=$1 seconds=$2 began=$SECONDS code=0
  shift 2
  ((seconds > $(left))) && seconds=$(left)
  if ((seconds < 10)); then
    failed=1
    note FAILED "$name" 0 "not begun: no time was left of $limit s"
    return
  fi
  echo "== $name: at most $seconds s"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt" || code=$?
  if ((code == 0)); then
    note passed "$name" $((SECONDS - began)) ''
    return
  fi
  failed=1
  if ((code == 124 || code == 137)); then
    note FAILED "$name" $((SECONDS - began)) "not done in $seconds s"
  else
    note FAILED "$name" $((SECONDS - began)) "exit code $code"
  fi
}

# show NAME PATTERN: lines of what a step has printed, if it was begun.
show() { [[ -f "$out/$1.txt" ]] && grep -E "$2" "$out/$1.txt"; }

# conclude: the rows of all steps; exits with 1 if one of them has failed.
conclude() {
  printf '%s\n' "${table[@]}"
  exit "$failed"
}
