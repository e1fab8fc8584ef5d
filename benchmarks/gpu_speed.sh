#!/usr/bin/env bash
# Training speed and memory on a GPU, beside the plan and beside peers. Under 9 minutes, the most
# telling first.
#
#   benchmarks/gpu_speed.sh [WHEELHOUSE]
#
# Needs a GPU of 80 GB, 20 GB of free space in TMPDIR and 64 GB of host memory. Arguments,
# environment and exit code are those of benchmarks/gpu_checks.sh. Results are kept in OUT:
# gpu_bench_*.jsonl of `dtune bench` with what its cases said in gpu_bench_*.log, gpu_peers_*.jsonl
# of benchmarks/peers. Planned memory is held against the peaks, and speed against its aims
# (benchmarks/aims.py): both are rows of the last table.
# shellcheck source=benchmarks/gpu_steps.sh
source "$(dirname "$0")/gpu_steps.sh"

steps=(gpu_bench_llama8b gpu_peers_llama8b gpu_peers_llama1b gpu_bench_torch)
for step in "${steps[@]}"; do
  rm -f "$out/$step".{txt,jsonl,md,log}
done
rm -f "$out"/gpu_{plan_error,aims}.txt

# bench NAME SECONDS SETTINGS...: the shape of Llama 3.1 8B with random weights, rank 16 on all
# linears, rows of one document.
bench() {
  local name=$1 seconds=$2
  shift 2
  check "$name" "$seconds" "$python" -m dtune bench model=llama3_8b precision=bf16 \
    data.max_length=4096 optim.lr=1e-3 bench.documents=1 bench.warm_up=3 bench.steps=12 \
    bench.repeats=1 bench.plots=false "bench.out=$work/$name" "$@"
  [[ -f "$work/$name/results.jsonl" ]] && cp "$work/$name/results.jsonl" "$out/$name.jsonl"
  cat "$work/$name"/cases/*/repeat-*/case.log >"$out/$name.log" 2>/dev/null
}

# peers NAME SECONDS SETTINGS...: beside the Trainer of transformers with a model of peft.
peers() {
  local name=$1 seconds=$2
  shift 2
  check "$name" "$seconds" "$python" -m benchmarks.peers.run device=cuda peers=hf-peft rounds=1 \
    warmup=3 steps=12 "out=$out/$name.jsonl" "$@"
}

bench gpu_bench_llama8b 170 train.micro_batch_size=2 train.global_batch_size=2 kernels=triton \
  peft=lora,qlora -m
# One row a micro batch: without recomputation others need more than twice dtune's memory.
peers gpu_peers_llama8b 240 model=llama8b settings=plain,recompute micro_batch=1 accumulation=2
# The judgements come after it, and take no more than 20 s.
peers gpu_peers_llama1b $(($(left) - 20)) model=llama1b settings=plain
# The plan of plain PyTorch as well; two rows would not fit 80 GB.
if (($(left) < 110)); then
  note skipped gpu_bench_torch 0 "less than 110 s were left of $limit s"
else
  bench gpu_bench_torch $(($(left) - 20)) train.micro_batch_size=1 train.global_batch_size=1 \
    kernels=torch peft=lora
fi
plans=("$out/gpu_bench_llama8b.jsonl")
[[ -f "$out/gpu_bench_torch.jsonl" ]] && plans+=("$out/gpu_bench_torch.jsonl")
check gpu_plan_error 20 "$python" -m benchmarks.aims plan "${plans[@]}"
check gpu_aims 20 "$python" -m benchmarks.aims speed "$out"

echo
cat "$out/gpu_device.txt"
for step in "${steps[@]}"; do
  show "$step" '^\|'
done
show gpu_plan_error ': (met|missed|not measured)'
show gpu_aims ': (met|missed|not measured)'
conclude
