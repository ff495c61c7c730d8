#!/usr/bin/env bash
# Measure parts of real runtimes on a machine with one CUDA GPU and a C++ compiler, within some four minutes: what
# memory is read with (STREAM) and llama.cpp's expert kernels compute on the CPU, by threads; eager PyTorch's parts.
#
#   bash calibration/measure_components.sh llama.cpp.tar.xz OUT
#
# The archive is that of calibration/llama_cpp/build.py cut. Python finds prestage, torch and transformers; without a
# GPU (GPU=none) that part is left out.
set -u
source=$(realpath "$1") out=$(realpath -m "$2")
mkdir -p "$out"
work=$(mktemp -d)
began=$(date +%s)
say() { echo "[$(($(date +%s) - began)) s] $*" | tee -a "$out/log"; }
cores=$(nproc)
{ date -u; lscpu; free -b; nvidia-smi --query-gpu=name,driver_version --format=csv; } >"$out/machine.txt" 2>&1

say "build"
tar -C "$work" -xf "$source"
# As many threads as are asked for, in place of half of the cores.
sed -i 's|std::max<int>(1, N_THREADS/2)|atoi(getenv("THREADS"))|' "$work/llama.cpp/tests/test-backend-ops.cpp"
# A quarter of Qwen3-30B's experts, of which 8 are used as before, are made in a quarter of the time.
sed -i 's|type_b, 128, 8, false, 768, bs|type_b, 32, 8, false, 768, bs|' "$work/llama.cpp/tests/test-backend-ops.cpp"
grep -q 'getenv("THREADS")' "$work/llama.cpp/tests/test-backend-ops.cpp" || say "test-backend-ops sets its own threads"
cat >"$work/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.14)
project(ops C CXX)
add_subdirectory(llama.cpp/ggml)
add_executable(ops llama.cpp/tests/test-backend-ops.cpp)
target_compile_features(ops PRIVATE cxx_std_17)
target_compile_options(ops PRIVATE -O1)
target_link_libraries(ops PRIVATE ggml)
CMAKE
(cmake -G Ninja -S "$work" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON &&
  ninja -C "$work/build" ops) >"$out/build.log" 2>&1
ops=$(find "$work/build" -name ops -type f -perm -u+x | head -1)
say "built: ${ops:-nothing}"

cat >"$work/stream.c" <<'C'
// What memory is read with, and copied and scaled (the triad of STREAM), in GB/s, by so many threads.
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
  const size_t n = (size_t)1 << 28;
  float *a = malloc(4 * n), *b = malloc(4 * n), *c = malloc(4 * n), sum = 0;
  for (int at = 1; at < argc; at++) {
    omp_set_num_threads(atoi(argv[at]));
    double read = 1e9, triad = 1e9;
    if (at == 1)
#pragma omp parallel for
      for (size_t i = 0; i < n; i++) a[i] = b[i] = c[i] = 1;
    for (int repeat = 0; repeat < 5; repeat++) {
      double begun = omp_get_wtime();
#pragma omp parallel for simd reduction(+ : sum)
      for (size_t i = 0; i < n; i++) sum += a[i];
      double between = omp_get_wtime();
#pragma omp parallel for simd
      for (size_t i = 0; i < n; i++) a[i] = b[i] + 3 * c[i];
      double ended = omp_get_wtime();
      if (between - begun < read) read = between - begun;
      if (ended - between < triad) triad = ended - between;
    }
    printf("{\"threads\": %s, \"read_gb_per_s\": %.2f, \"triad_gb_per_s\": %.2f}\n", argv[at], 4e-9 * n / read,
           12e-9 * n / triad);
  }
  return sum == 0.5f;
}
C
gcc -O3 -march=native -ffast-math -fopenmp "$work/stream.c" -o "$work/stream" 2>>"$out/build.log" &&
  "$work/stream" "$cores" $((cores / 2)) $((cores / 4)) 2 1 >"$out/stream.jsonl"
say "stream"

for threads in "$cores" $((cores / 2)) $((cores / 4)); do
  for shape in 2880 768; do
    THREADS=$threads timeout $((shape == 2880 ? 15 : 30)) "$ops" perf -o MUL_MAT_ID -b CPU \
      -p "type_a=(q4_K|q8_0|q6_K|iq2_xs|mxfp4),type_b=f32,n_mats=32,n_used=(8|4),b=0,m=$shape,n=(1|4)," \
      >"$out/mul-mat-id-cpu-t$threads-m$shape.txt" 2>>"$out/build.log"
  done
  say "test-backend-ops with $threads threads"
done

if [[ ${GPU:-} != none ]]; then
  timeout 100 python3 -m prestage.calibration.decode.parts "$out" gpt-oss-20b=1,100 gpt-oss-20b=4,8000 \
    olmoe-1b-7b=4,8000 >"$out/parts.log" 2>&1
  say "parts: status $?"
fi
say "done"
