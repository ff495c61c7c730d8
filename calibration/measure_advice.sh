#!/usr/bin/env bash
# Measure what advice is held against, on a machine with a CUDA GPU and within a time: llama.cpp on whole models of
# random weights, over grids of layers on the CPU, threads and micro-batch, and what its own --fit takes of them.
#
#   bash calibration/measure_advice.sh SECONDS CARRIED OUT
#
# CARRIED holds llama.cpp.tar.xz (calibration/llama_cpp/build.py cut); Python finds prestage and gguf. OUT gets
# grid.jsonl (llama-bench's rows as they come; those of --fit have its margin in `fit_target`), machine.json and a log:
# `python tests/advice_regret.py OUT/grid.jsonl --prompt 2048` says what following advice would have cost.
# Flash attention's kernels are built within BUILD_SECONDS; if that is too short, all is built without them.
# For a trial on a small machine: ARCHITECTURE (none: without CUDA), JOBS, LAYERS, PROMPT; LLAMA_BIN: a folder of
# programs that are built already.
set -u
seconds=$1 carried=$(realpath "$2") out=$(realpath -m "$3")
began=$(date +%s)
work=$(mktemp -d)
mkdir -p "$out"
cd "$work" || exit
architecture=${ARCHITECTURE:-90} jobs=${JOBS:-$(nproc)} prompt=${PROMPT:-2048}
export CUDA_VISIBLE_DEVICES=0
spent() { echo $(($(date +%s) - began)); }
left() { echo $((seconds - $(spent))); }
say() { echo "[$(spent) s] $*" | tee -a "$out/log"; }
trap 'rm -rf "$work"; say end' EXIT

build() { # seconds, more options
  local cuda=(--cuda --architecture "$architecture")
  [[ $architecture == none ]] && cuda=()
  rm -rf "$work/llama"
  timeout -k 5 "$1" python3 -m prestage.calibration.llama_cpp.build make "$carried/llama.cpp.tar.xz" "$work/llama" \
    "${cuda[@]}" --jobs "$jobs" --programs llama-bench "${@:2}" >"$out/build.log" 2>&1
}

# name, experts' type, layers on the CPU, threads, micro-batches, GiB that --fit may use
grids=("qwen3-30b-a3b q8_0 14,16,20 8,16 512,2048 24" "gpt-oss-20b mxfp4 0,2,4,8 4,8,16 128,512,2048 10")
(for each in "${grids[@]}"; do
  read -r model type _ <<<"$each"
  python3 -m prestage.calibration.llama_cpp.random_gguf "$model" "$work/$model-$type.gguf" --experts "$type" \
    ${LAYERS:+--layers "$LAYERS"}
done >>"$out/log" 2>&1) &
writing=$!
flash=true bin=${LLAMA_BIN:-$work/llama/build/bin}
if [[ -z ${LLAMA_BIN:-} ]]; then
  say "build with $jobs jobs"
  if ! build "${BUILD_SECONDS:-280}" --flash-attention; then
    say "no flash attention: $(tail -1 "$out/build.log")"
    flash=false
    build "$(left)"
  fi
  say "build: $(tail -1 "$out/build.log")"
fi
wait "$writing"
say "files: $(ls -sh "$work"/*.gguf | tr '\n' ' ')"
python3 - "$out/machine.json" "$flash" <<'END'
import json, subprocess, sys
from prestage.calibration.llama_cpp.bench import machine
asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "-i", "0"]
try:
    gpu = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
except OSError:
    gpu = ""
with open(sys.argv[1], "w") as file:
    json.dump(machine() | {"gpu": gpu, "flash_attention_built": sys.argv[2] == "true"}, file, indent=1)
END

bench() { # seconds at most, then llama-bench's arguments
  local most=$1
  (($(left) < most)) && most=$(left)
  ((most < 5)) && return
  timeout -k 5 "$most" "$bin/llama-bench" "${@:2}" -p "$prompt" -n 64 -r 1 -o jsonl >>"$out/grid.jsonl" 2>"$work/messages"
  local status=$?
  grep -i "fit\|error" "$work/messages" | tail -40 >>"$out/log"
  say "${*:2}: status $status, $(wc -l <"$out/grid.jsonl") rows in all"
}

fit() { # file, threads, micro-batches, GiB
  local free
  free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits -i 0 2>/dev/null) || return
  # -v: what --fit takes is said in its messages alone.
  bench 60 -m "$1" -t "$2" -ub "$3" -fitt $((free - $4 * 1024)) -v
}

for round in 1 2 3; do
  for each in "${grids[@]}"; do
    read -r model type layers threads micro gib <<<"$each"
    bench 170 -m "$work/$model-$type.gguf" -ncmoe "$layers" -t "$threads" -ub "$micro"
    ((round < 3)) && fit "$work/$model-$type.gguf" 16 "$micro" "$gib"
  done
done
