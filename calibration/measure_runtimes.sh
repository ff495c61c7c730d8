#!/usr/bin/env bash
# Measure real runtimes on a machine with one CUDA GPU, within a time: `calibrate decode` on random weights of presets,
# and llama.cpp, built from source meanwhile.
#
#   bash calibration/measure_runtimes.sh SECONDS CARRIED OUT
#
# CARRIED holds llama.cpp.tar.xz (calibration/llama_cpp/build.py cut) and traces/ (gpt-oss-20b.npz, olmoe-1b-7b.npz,
# qwen3-30b-a3b_k6.npz). Python finds prestage, torch, transformers and gguf. OUT gets results.tar.gz and a log, both
# kept up to date. FLASH_ATTENTION=1 builds llama.cpp's kernels of that and uses them; MODELS=none decodes nothing, and
# then JOBS may be all cores. For a trial on a small machine: PRESTAGE (what runs prestage), LAYERS, TOKENS, REPEATS,
# ARCHITECTURE (none: without CUDA), JOBS, CONTEXT, MODELS, PROGRAMS; LLAMA_BIN: a folder of programs that are built already
# (none: llama.cpp is left out).
set -u
seconds=$1 carried=$(realpath "$2") out=$(realpath -m "$3")
began=$(date +%s)
work=$(mktemp -d)
mkdir -p "$out" "$work/results"
cd "$work" || exit
read -ra prestage <<<"${PRESTAGE:-python3 -m prestage}"
architecture=${ARCHITECTURE:-90} tokens=${TOKENS:-24} repeats=${REPEATS:-7} context=${CONTEXT:-8000}
cores=$(nproc)
jobs=${JOBS:-$((cores > 3 ? cores - 2 : 1))}
spent() { echo $(($(date +%s) - began)); }
left() { echo $((seconds - $(spent))); }
say() { echo "[$(spent) s] $*" | tee -a "$out/log"; }
pack() { tar -C "$work" -czf "$out/results.tmp" results && mv "$out/results.tmp" "$out/results.tar.gz"; }
# On few cores there is nothing to set apart.
on() { if ((cores > 3)); then taskset -c "$1" "${@:2}"; else "${@:2}"; fi; }
trap 'pack; say "end"' EXIT

{ date -u; nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current --format=csv; lscpu
  free -b; python3 -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
} >"$work/results/machine.txt" 2>&1

cuda=(--cuda --architecture "$architecture")
[[ $architecture == none ]] && cuda=()
flash=()
[[ -n ${FLASH_ATTENTION:-} ]] && flash=(--flash-attention)
read -ra programs <<<"${PROGRAMS:-llama-bench test-backend-ops}"
reserve=8 # seconds at the end
[[ ${programs[*]} == *test-backend-ops* ]] && reserve=60
build=
if [[ -z ${LLAMA_BIN:-} ]]; then
  say "build with $jobs jobs"
  on "0-$((jobs - 1))" setsid nice -n 5 python3 -m prestage.calibration.llama_cpp.build make "$carried/llama.cpp.tar.xz" \
    "$work/llama" "${cuda[@]}" "${flash[@]}" --jobs "$jobs" \
    --programs "${programs[@]}" >"$work/results/build.log" 2>&1 &
  build=$!
fi

# name, experts' type, layers
ggufs=("qwen3-30b-a3b q4_k 12" "gpt-oss-20b mxfp4 8" "mixtral-8x7b q4_k 4" "olmoe-1b-7b q8_0 8")
[[ ${LLAMA_BIN:-} == none ]] && ggufs=()
files=()
for each in "${ggufs[@]}"; do
  read -r model type layers <<<"$each"
  layers=${LAYERS:-$layers}
  files+=("$work/$model-$type.gguf=$layers")
done
(for each in "${ggufs[@]}"; do
  read -r model type layers <<<"$each"
  on "0-$((jobs - 1))" python3 -m prestage.calibration.llama_cpp.random_gguf "$model" "$work/$model-$type.gguf" \
    --experts "$type" --layers "${LAYERS:-$layers}"
done >"$work/results/gguf.log" 2>&1) &
writing=$!

# model, trace, layers, experts a token, seconds, and whether with recorded routing
models=${MODELS:-"gpt-oss-20b,gpt-oss-20b.npz,12,4,88 olmoe-1b-7b,olmoe-1b-7b.npz,16,8,88 qwen3-30b-a3b,qwen3-30b-a3b_k6.npz,16,6,88 mixtral-8x7b,,8,2,45"}
[[ $models == none ]] && models=
for each in $models; do
  IFS=, read -r model trace layers k limit <<<"$each"
  runs=(--run "25%,1,100,0,own" --run "25%,1,100,$k,own" --run "60%,4,100,0,own" --run "25%,1,$context,0,own")
  [[ -n $trace ]] && runs+=(--routing "$carried/traces/$trace" --run "100%,1,100,0,own" --run "25%,1,100,0,recorded"
    --run "25%,1,100,$k,recorded" --run "60%,4,$context,0,recorded" --run "50%,4,100,$k,recorded")
  name=$(basename "$model" .toml)
  say "decode $name"
  on "$((cores - 2)),$((cores - 1))" timeout -k 5 $((limit + 40)) "${prestage[@]}" calibrate decode "$model" \
    -o "$work/results/decode-$name" --layers "${LAYERS:-$layers}" --top-k "$k" --tokens "$tokens" \
    --warmup $((tokens / 3)) --repeats "$repeats" --deadline "$limit" "${runs[@]}" >"$work/results/decode-$name.log" 2>&1
  say "decode $name: status $?"
  tail -3 "$work/results/decode-$name.log" >>"$out/log"
  pack
done

wait "$writing"
say "files of random weights: $(grep -c bytes "$work/results/gguf.log")"
if [[ -n $build ]]; then
  while kill -0 "$build" 2>/dev/null && (($(left) > 60)); do sleep 1; done
  say "build: $(tail -1 "$work/results/build.log")"
fi
bin=${LLAMA_BIN:-$work/llama/build/bin}
if [[ -x $bin/llama-bench ]]; then
  python3 -m prestage.calibration.llama_cpp.bench "$bin/llama-bench" "$work/results/llama-bench.jsonl" "${files[@]}" \
    --threads "$cores" --repeats 2 --rounds 3 --depth "$((context / 2))" "${flash[@]}" --seconds $(($(left) - reserve)) 2>&1 |
    tee -a "$out/log"
  pack
fi
if [[ -x $bin/test-backend-ops ]] && (($(left) > 20)); then
  say "test-backend-ops"
  timeout $(($(left) - 12)) "$bin/test-backend-ops" perf -o MUL_MAT_ID -b CPU \
    -p 'type_a=(q4_K|q8_0|mxfp4)' >"$work/results/mul-mat-id-cpu.txt" 2>&1
fi
say "done"
