#!/usr/bin/env bash
# Training speed and memory on a GPU, beside the plan and beside peers. Under 9 minutes, the most
# telling first.
#
#   benchmarks/gpu_speed.sh [WHEELHOUSE]
#
# Arguments, environment and exit code are those of benchmarks/gpu_checks.sh. Results are kept in
# OUT: gpu_bench_*/results.jsonl of `dtune bench`, gpu_peers_*.jsonl of benchmarks/peers.
set -uo pipefail
wheelhouse=${1:+$(realpath -- "$1")}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
limit=${LIMIT:-530}
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
# shellcheck source=benchmarks/gpu_steps.sh
source benchmarks/gpu_steps.sh

rm -f "$out"/gpu_{bench_llama8b,bench_methods,peers_llama1b,peers_llama8b}.txt
# The shape of Llama 3.1 8B with random weights: rank 16 on all linears, one packed row of 4096.
llama8b=(model=llama3_8b precision=bf16 data.max_length=4096 train.micro_batch_size=2
  train.global_batch_size=2 train.recompute=none bench.repeats=1)
check gpu_bench_llama8b 200 "$python" -m dtune bench "${llama8b[@]}" \
  "bench.out=$out/gpu_bench_llama8b" peft=lora,qlora kernels=triton,torch -m
check gpu_peers_llama1b 200 "$python" -m benchmarks.peers.run model=llama1b device=cuda \
  settings=plain,recompute rounds=1 "out=$out/gpu_peers_llama1b.jsonl"
check gpu_bench_methods 120 "$python" -m dtune bench "${llama8b[@]}" \
  "bench.out=$out/gpu_bench_methods" peft=dora,freeze,ia3 kernels=triton -m
check gpu_peers_llama8b "$(left)" "$python" -m benchmarks.peers.run model=llama8b device=cuda \
  peers=hf-peft settings=plain rounds=1 "out=$out/gpu_peers_llama8b.jsonl"

echo
cat "$out/gpu_device.txt"
for step in gpu_bench_llama8b gpu_peers_llama1b gpu_bench_methods gpu_peers_llama8b; do
  show "$step" '^\|'
done
conclude
