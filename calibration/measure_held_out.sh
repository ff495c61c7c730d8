#!/usr/bin/env bash
# Execute held-out schedules on one CUDA GPU, within a time: those that attend to a context, as graphs and eager, then
# the eager ones of before; and what calls of products take of the host. Between them schedules of the set `fit` are
# executed, so that host and copies of that very session can be fitted: most of an eager error is the host's day.
#
#   bash calibration/measure_held_out.sh SECONDS OUT
#
# Run it in the repository's root; Python finds prestage and torch. OUT gets runs.tar.gz, launches.json.gz and a log.
# Then, without a GPU, where OUT/runs.tar.gz was unpacked:
#
#   s=calibration/samples/h200
#   prestage calibrate fit $s.json $s.surface.json.gz $s.attention.json.gz OUT/launches.json.gz --in-schedule runs/fit -o own.json
#   prestage calibrate validate --profile own.json --measured runs/held-out-context --tolerance 0.08 -o report
set -u
seconds=$1 out=$(realpath -m "$2")
began=$(date +%s)
work=$(mktemp -d)
mkdir -p "$out" "$work/runs/held-out-context"
read -ra prestage <<<"${PRESTAGE:-python3 -m prestage}"
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
say() { echo "[$(($(date +%s) - began)) s] $*" | tee -a "$out/log"; }
left() { echo $((seconds - ($(date +%s) - began))); }
pack() { tar -C "$work" -czf "$out/runs.tmp" runs && mv "$out/runs.tmp" "$out/runs.tar.gz"; }
trap 'pack; rm -rf "$work"; say end' EXIT
{ date -u; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; lscpu | grep -i "model name\|^CPU(s)"; uname -r; } 2>&1 |
  tee -a "$out/log"

say "launches"
timeout -k 5 -s ABRT 40 "${prestage[@]}" calibrate measure --launches -o "$out/launches.json.gz" >"$work/last" 2>&1
say "launches: status $?"
grep -v "%|\|it/s\|^$" "$work/last" | tail -20 | cut -c1-400 | tee -a "$out/log"

held=calibration/validation/held-out
mapfile -t files < <(ls $held-context/*-graph.toml $held-context/*-eager.toml)
for name in c d j f k b a l i g; do files+=("$held/held-$name-eager.toml"); done
fit=()
for way in eager graph; do
  for model in mixtral qwen switch deepseek; do fit+=("fit-$model-$way-ahead0" "fit-$model-$way-ahead1-recall90"); done
done
mixed=() every=$((${#files[@]} / ${#fit[@]}))
for at in "${!files[@]}"; do # one of the fit in front of every second or so
  if ((at % every == 0 && at / every < ${#fit[@]})); then mixed+=("${fit[at / every]}"); fi
  mixed+=("${files[at]}")
done
say "execute ${#mixed[@]}"
timeout -k 5 -s ABRT "$(left)" "${prestage[@]}" calibrate execute "${mixed[@]}" -o "$work/runs/held-out-context" \
  --all-repeats --repeats "${REPEATS:-5}" --keep-going >"$work/last" 2>&1
say "execute: status $?, $(ls "$work/runs/held-out-context" | wc -l) files"
mkdir "$work/runs/fit"
find "$work/runs/held-out-context" -name "fit-*" -exec mv -t "$work/runs/fit" {} +
grep -v "it/s\|^$" "$work/last" | tail -60 | cut -c1-400 | tee -a "$out/log"
