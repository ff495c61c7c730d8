#!/usr/bin/env bash
# Serve requests in real time on a machine with one CUDA GPU, mixtral-8x7b and qwen3-30b-a3b of random weights: about
# four minutes.
#
#   bash calibration/measure_served.sh OUT
#
# Python finds prestage, torch and transformers. OUT gets a folder a model, with served.json. `prestage calibrate served
# OUT/*` then holds them against the simulation. PRESTAGE: what runs prestage; REPEATS, DEADLINE: of each model.
set -u
out=$1
read -ra prestage <<<"${PRESTAGE:-python3 -m prestage}"
common=(
  machine.profile=h200 runtime.name=transformers prefetch.policy=none workload.synthetic.working_set=
  workload.synthetic.sequences=16 workload.synthetic.tokens=2000 workload.synthetic.prefill_tokens=64
  requests.prompt_tokens=64 requests.warmup=0% requests.cooldown=0% requests.kv.budget=2000blocks
  requests.scheduler.max_num_seqs=8 requests.scheduler.max_num_batched_tokens=96
)
# model, layers, and what is asked of it
serve() {
  local model=$1 layers=$2 each settings=()
  shift 2
  for each in "${common[@]}" "model.preset=$model" "model.layers=$layers" "$@"; do settings+=(--set "$each"); done
  mkdir -p "$out/$model"
  "${prestage[@]}" calibrate decode "$model" --requests synthetic "${settings[@]}" -o "$out/$model" \
    --layers "$layers" --repeats "${REPEATS:-3}" --deadline "${DEADLINE:-85}" 2>&1 | tee "$out/$model/log"
}
serve mixtral-8x7b 8 requests.count=16 requests.rate=0.8 requests.output_tokens=12
serve qwen3-30b-a3b 12 requests.count=20 requests.rate=1 requests.output_tokens=24
