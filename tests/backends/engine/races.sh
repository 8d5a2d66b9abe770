#!/usr/bin/env bash
# tests/backends/engine/races.sh COMPILER: builds tests/backends/engine/threads.cpp with ThreadSanitizer, and runs it.
set -euo pipefail
cd "$(dirname "$0")/../../.."
compiler=$1
out=$(mktemp -d)
flags=(-std=c++17 -O1 -g -fno-math-errno -fno-trapping-math -fopenmp-simd -fsanitize=thread -pthread -Icsrc -DOTALIGN_ISA=baseline)
"$compiler" "${flags[@]}" tests/backends/engine/threads.cpp csrc/cpu/{isa,dispatch,blas}.cpp -o "$out/threads"
"$out/threads"
