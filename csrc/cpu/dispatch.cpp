// The choice of the instruction set.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace otalign {

namespace baseline {
extern const Isa kIsa;
}
#ifdef OTALIGN_HAVE_AVX2
namespace avx2 {
extern const Isa kIsa;
}
#endif
#ifdef OTALIGN_HAVE_AVX512
namespace avx512 {
extern const Isa kIsa;
}
#endif

namespace {

// OTALIGN_SIMD=baseline|avx2|avx512 lowers the choice, to test the code that other processors run.
bool allowed(const char* name) {
  static const char* const order[] = {"baseline", "avx2", "avx512"};
  const char* most = std::getenv("OTALIGN_SIMD");
  if (!most || !*most) return true;
  for (const char* known : order) {
    if (!std::strcmp(known, name)) return true;
    if (!std::strcmp(known, most)) return false;
  }
  return true;
}

const Isa& choose() {
#ifdef OTALIGN_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && allowed("avx512"))
    return avx512::kIsa;
#endif
#ifdef OTALIGN_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2")) return avx2::kIsa;
#endif
  return baseline::kIsa;
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace otalign
