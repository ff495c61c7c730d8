#!/usr/bin/env bash
# Execute what runs beside the GPU's stream, in parts, within a time: experts on the CPU, reads from a drive, compressed
# and grouped experts, a predictor, two GPUs that share experts.
#
#   bash calibration/measure_beside.sh try|drive|one|two|pair OUT
#
# try: a schedule of each kind, once, in two minutes; drive: the drive, and the CPU in fewer bits, in two minutes; one:
# the drive, the sets to fit and to validate, on one GPU, in nine minutes at most; two: the same on two, in five; pair:
# the links of two GPUs with exchanges by size, what two does, decompression aside, and what one GPU of them takes today,
# in nine. Python finds prestage and torch. OUT gets runs.tar.gz, the samples of the drive or the links, and a log.
set -u
what=$1 out=$(realpath -m "$2")
began=$(date +%s)
work=$(mktemp -d -p "${WORK:-$PWD}")
mkdir -p "$out" "$work/runs"
read -ra prestage <<<"${PRESTAGE:-python3 -m prestage}"
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
say() { echo "[$(($(date +%s) - began)) s] $*" | tee -a "$out/log"; }
pack() { tar -C "$work" -czf "$out/runs.tmp" runs && mv "$out/runs.tmp" "$out/runs.tar.gz"; }
trap 'pack; rm -rf "$work"; say end' EXIT
# name, seconds, repeats, scenarios
execute() {
  say "$1"
  mkdir -p "$work/runs/$1"
  timeout -k 5 -s ABRT "$2" "${prestage[@]}" calibrate execute "${@:4}" -o "$work/runs/$1" --repeats "$3" --keep-going \
    --drive "$work/experts" >"$work/last" 2>&1
  local status=$?
  grep -v "^  0%\|it/s\|^$" "$work/last" | tail -60 | cut -c1-400 | tee -a "$out/log"
  say "$1: status $status"
  pack
}
{ date -u; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; lscpu | grep -i "model name\|^CPU(s)"; uname -r
  df -h "$work" | tail -1; findmnt -n -T "$work" -o FSTYPE,SOURCE; } 2>&1 | tee -a "$out/log"
f=fit-beside- s=fit-shared-
# Committed already, to see which costs have moved since.
known="mixtral-graph-ahead0 qwen-graph-ahead0 switch-graph-ahead0 deepseek-graph-ahead0 qwen-graph-ahead1-recall80
  deepseek-graph-ahead1-recall80 qwen-eager-ahead0 mixtral-eager-ahead0 qwen-graph-ahead3-recall100
  switch-graph-ahead1-recall80"
case $what in
try)
  execute others 45 1 ${f}qwen-graph-ahead0-packed ${f}mixtral-graph-ahead0-packed ${f}deepseek-graph-ahead0-packed-gpu \
    ${f}qwen-graph-ahead1-recall90-predictor beside-qwen-graph-ahead0-unequal beside-qwen-graph-ahead0-preloaded \
    beside-qwen-graph-ahead0-total beside-qwen-graph-ahead1-recall80-predictor-compute
  execute grouped 30 1 ${f}qwen-graph-ahead0-grouped ${f}deepseek-graph-ahead0-grouped-batch4
  execute cpu 35 1 ${f}qwen-graph-ahead0-cpu ${f}qwen-graph-ahead1-recall90-cpu ${f}qwen-graph-ahead0-cpu-balanced
  execute drive 45 1 ${f}qwen-graph-ahead0-drive ${f}deepseek-graph-ahead0-drive-pieces beside-qwen-graph-ahead0-drive-and-cpu
  if [[ $(nvidia-smi -L | wc -l) -gt 1 ]]; then
    execute shared 60 1 ${s}qwen-graph-ahead0-tokens ${s}qwen-graph-ahead0-peer shared-qwen-graph-ahead0-spare
  fi
  ;;
drive)
  timeout 60 "${prestage[@]}" calibrate measure --drive "$work/experts" -o "$out/drive.json" 2>&1 | tail -3 | tee -a "$out/log"
  execute fit-beside 30 5 ${f}qwen-graph-ahead0-cpu-int8 ${f}qwen-graph-ahead0-cpu-int4
  execute beside 30 5 beside-qwen-graph-ahead0-cpu-int8 beside-qwen-graph-ahead0-blind-cpu-int4
  ;;
one)
  timeout 60 "${prestage[@]}" calibrate measure --drive "$work/experts" -o "$out/drive.json" 2>&1 | tail -3 | tee -a "$out/log"
  execute fit-beside 120 5 fit-beside
  execute beside 220 5 beside
  execute fit 110 5 fit
  execute validation 50 5 $known
  ;;
two)
  execute fit-shared 100 5 fit-shared
  execute shared 170 5 shared
  ;;
pair)
  say links
  for less in "" --quick; do
    [[ -s $out/links.json.gz ]] ||
      timeout -k 5 -s ABRT 150 "${prestage[@]}" calibrate measure --links $less -o "$out/links.json.gz" 2>&1 |
      tail -5 | cut -c1-400 | tee -a "$out/log"
  done
  execute fit-shared 100 5 fit-shared
  execute shared 200 5 shared
  execute fit-aside 25 5 ${f}qwen-graph-ahead1-recall90-packed-aside ${f}qwen-graph-ahead0-packed-gpu-aside
  execute aside 40 5 beside-deepseek-graph-ahead0-packed-gpu-aside beside-deepseek-graph-ahead0-packed \
    beside-qwen-graph-ahead1-recall80-packed-gpu-aside beside-qwen-graph-ahead0-packed-aside
  execute validation 50 5 $known
  ;;
*) say "$what: choose try, drive, one, two or pair" ;;
esac
