#!/usr/bin/env bash
# tests/backends/engine/replay.sh COMPILER [SANITIZERS [FLAG...]]: runs the corpus of fuzz_problem.cpp, on a build with these sanitizers
# ("address,undefined", "thread"; "" = none). Without OpenMP, whose synchronisation ThreadSanitizer does not know, the threads are
# those of the standard library.
set -euo pipefail
cd "$(dirname "$0")/../../.."
compiler=$1
sanitizers=${2:-}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=(-std=c++17 -O1 -g -fopenmp-simd -Icsrc -DOTALIGN_ISA=baseline -DOTALIGN_REPLAY -DOTALIGN_THREAD_WORK=1 -pthread "${@:3}")
if [[ -n $sanitizers ]]; then flags+=("-fsanitize=$sanitizers" -fno-sanitize-recover=all); fi
"$compiler" "${flags[@]}" tests/backends/engine/fuzz_problem.cpp \
  csrc/cpu/{forward,backward,pack,isa,dispatch,blas}.cpp -latomic -o "$out/replay"
"$out/replay" tests/backends/engine/corpus/*
