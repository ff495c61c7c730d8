#!/usr/bin/env bash
# Serve requests in real time on a machine with one CUDA GPU, qwen3-30b-a3b and mixtral-8x7b of random weights: about
# five minutes.
#
#   bash calibration/measure_served.sh OUT
#
# Python finds prestage, torch and transformers. OUT gets a folder a model: fit/served.json, of other requests, to which
# costs are fitted; then served.json, which they are to predict.
#
#   prestage calibrate observe OUT/*/fit/served.json --runtime transformers -o OUT/served.toml
#   prestage calibrate served OUT/*/served.json --runtime OUT/served.toml
#
# PRESTAGE: what runs prestage; REPEATS, FIT_DEADLINE, DEADLINE: of each model.
set -u
out=$1
read -ra prestage <<<"${PRESTAGE:-python3 -m prestage}"
common=(
  machine.profile=h200 runtime.name=transformers prefetch.policy=none workload.synthetic.working_set=
  workload.synthetic.sequences=16 workload.synthetic.tokens=2000 workload.synthetic.prefill_tokens=64
  requests.prompt_tokens=64 requests.warmup=0% requests.cooldown=0% requests.kv.budget=2000blocks
  requests.scheduler.max_num_seqs=8 requests.scheduler.max_num_batched_tokens=96
)
# model, layers, folder, repeats, seconds, and what is asked of it
serve() {
  local model=$1 layers=$2 folder=$out/$3 repeats=$4 deadline=$5 each settings=()
  shift 5
  for each in "${common[@]}" "model.preset=$model" "model.layers=$layers" "$@"; do settings+=(--set "$each"); done
  mkdir -p "$folder"
  "${prestage[@]}" calibrate decode "$model" --requests synthetic "${settings[@]}" -o "$folder" \
    --layers "$layers" --repeats "$repeats" --deadline "$deadline" 2>&1 | tee "$folder/log"
}
# model, layers, output tokens, requests a second, how many of them
both() {
  local model=$1 layers=$2 asked=("requests.output_tokens=$3" "requests.rate=$4")
  serve "$model" "$layers" "$model/fit" 2 "${FIT_DEADLINE:-34}" "${asked[@]}" "requests.count=$(($5 * 2 / 3))" seed=1
  serve "$model" "$layers" "$model" "${REPEATS:-4}" "${DEADLINE:-80}" "${asked[@]}" "requests.count=$5" seed=0
}
both qwen3-30b-a3b 8 24 1.5 30
both mixtral-8x7b 4 12 1.6 24
