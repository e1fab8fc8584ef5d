#!/usr/bin/env bash
# Training speed and memory on a GPU, beside the plan and beside peers. Under 9 minutes, the most
# telling first.
#
#   benchmarks/gpu_speed.sh [WHEELHOUSE]
#
# Arguments, environment and exit code are those of benchmarks/gpu_checks.sh. Results are kept in
# OUT: gpu_bench_llama8b.jsonl of `dtune bench`, gpu_peers_*.jsonl of benchmarks/peers.
# shellcheck source=benchmarks/gpu_steps.sh
source "$(dirname "$0")/gpu_steps.sh"

steps=(gpu_bench_llama8b gpu_peers_llama8b gpu_peers_llama1b)
for step in "${steps[@]}"; do
  rm -f "$out/$step.txt" "$out/$step.jsonl"
done
# The shape of Llama 3.1 8B with random weights: rank 16 on all linears, rows of one document.
check gpu_bench_llama8b 160 "$python" -m dtune bench model=llama3_8b precision=bf16 \
  data.max_length=4096 train.micro_batch_size=2 train.global_batch_size=2 bench.documents=1 \
  bench.repeats=1 bench.plots=false "bench.out=$work/bench" peft=lora,qlora kernels=triton,torch -m
[[ -f "$work/bench/results.jsonl" ]] && cp "$work/bench/results.jsonl" "$out/gpu_bench_llama8b.jsonl"
# One row a micro batch: without recomputation others need more than twice dtune's memory.
check gpu_peers_llama8b 330 "$python" -m benchmarks.peers.run model=llama8b device=cuda \
  peers=hf-peft settings=plain,recompute micro_batch=1 accumulation=2 rounds=1 \
  "out=$out/gpu_peers_llama8b.jsonl"
check gpu_peers_llama1b "$(left)" "$python" -m benchmarks.peers.run model=llama1b device=cuda \
  peers=hf-peft settings=plain rounds=1 "out=$out/gpu_peers_llama1b.jsonl"

echo
cat "$out/gpu_device.txt"
for step in "${steps[@]}"; do
  show "$step" '^\|'
done
conclude
