#!/usr/bin/env bash
# tests/backends/engine/run.sh COMPILER [EMULATOR...]: builds tests/backends/engine/check.cpp and threads.cpp, and runs them with every
# instruction set.
set -euo pipefail
cd "$(dirname "$0")/../../.."
compiler=$1
shift
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=(-std=c++17 -O3 -DNDEBUG -fno-math-errno -fno-trapping-math -fopenmp-simd -fopenmp -Icsrc)

declare -A isas=([baseline]="")
if [[ $("$compiler" -dumpmachine) == x86_64* ]]; then
  isas[avx2]="-mavx2 -mfma -mf16c"
  isas[avx512]="${isas[avx2]} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
fi
have=()
for isa in "${!isas[@]}"; do
  # shellcheck disable=SC2086
  "$compiler" "${flags[@]}" ${isas[$isa]} -DOTALIGN_ISA="$isa" -c csrc/cpu/isa.cpp -o "$out/$isa.o"
  ar rcs "$out/lib$isa.a" "$out/$isa.o"
  have+=("-DOTALIGN_HAVE_${isa^^}=1")
done
libraries=("$out/libbaseline.a")
for isa in avx2 avx512; do
  if [[ -n ${isas[$isa]+set} ]]; then libraries+=("$out/lib$isa.a"); fi
done
"$compiler" "${flags[@]}" "${have[@]}" tests/backends/engine/check.cpp csrc/cpu/{blas,dispatch,forward,backward}.cpp \
  "${libraries[@]}" -o "$out/check"
"$compiler" "${flags[@]}" -pthread "${have[@]}" tests/backends/engine/threads.cpp csrc/cpu/{blas,dispatch}.cpp \
  "${libraries[@]}" -o "$out/threads"
for isa in baseline avx2 avx512; do
  if [[ -n ${isas[$isa]+set} ]]; then
    OTALIGN_SIMD=$isa "$@" "$out/check"
    OTALIGN_SIMD=$isa "$@" "$out/threads"
  fi
done
