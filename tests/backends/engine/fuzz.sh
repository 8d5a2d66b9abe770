#!/usr/bin/env bash
# tests/backends/engine/fuzz.sh SECONDS [CORPUS]: fuzz_problem.cpp under libFuzzer with AddressSanitizer and UBSan for so long. Inputs
# that reach new code are added to the folder CORPUS; one that fails is written to the current folder. Needs clang, as CXX if it
# is not called clang++.
set -euo pipefail
cd "$(dirname "$0")/../../.."
seconds=$1
corpus=${2:-build/fuzz/corpus}
mkdir -p "$corpus" build/fuzz
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
"${CXX:-clang++}" "${flags[@]}" -fopenmp-simd -Icsrc -DOTALIGN_ISA=baseline -DOTALIGN_THREAD_WORK=1 -pthread \
  tests/backends/engine/fuzz_problem.cpp csrc/cpu/{forward,backward,pack,isa,dispatch,blas}.cpp -latomic \
  -o build/fuzz/fuzz_problem
build/fuzz/fuzz_problem -max_total_time="$seconds" -max_len=160 -rss_limit_mb=4096 -timeout=60 -print_final_stats=1 \
  "$corpus" tests/backends/engine/corpus
