#!/usr/bin/env bash
# Execute held-out schedules on one CUDA GPU, within a time: those that attend to a context, as graphs and eager, then
# the eager ones of before; and what calls of products take of the host.
#
#   bash calibration/measure_held_out.sh SECONDS OUT
#
# Run it in the repository's root; Python finds prestage and torch. OUT gets runs.tar.gz, launches.json.gz and a log.
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
say "execute ${#files[@]}"
timeout -k 5 -s ABRT "$(left)" "${prestage[@]}" calibrate execute "${files[@]}" -o "$work/runs/held-out-context" \
  --all-repeats --repeats "${REPEATS:-5}" --keep-going >"$work/last" 2>&1
say "execute: status $?, $(ls "$work/runs/held-out-context" | wc -l) files"
grep -v "it/s\|^$" "$work/last" | tail -60 | cut -c1-400 | tee -a "$out/log"
