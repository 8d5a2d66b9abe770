// Rows of K in hardware vectors, and how an entry of K is stored: as itself, or as its exponent (absorb.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "../absorb.h"
#include "simd.h"

namespace otalign::OTALIGN_ISA {

// Calls f(j, count, inside) for each hardware vector of a row of m numbers: `count` numbers from j on, where `inside`
// is set.
template <class T, class F>
static OTALIGN_INLINE void for_vectors(int64_t m, F f) {
  constexpr int W = Simd<T>::W;
  int64_t j = 0;
#pragma GCC unroll 2
  for (; j + W <= m; j += W) f(j, W, typename Simd<T>::I{} - 1);
  if (j < m) f(j, static_cast<int>(m - j), Simd<T>::first(static_cast<int>(m - j)));
}

// Takes aligned arrays, set to zero, out of scratch memory.
struct Arena {
  char* next;
  template <class N>
  N* take(int64_t count) {
    N* out = reinterpret_cast<N*>(next);
    next += (count * sizeof(N) + 63) / 64 * 64;
    for (int64_t k = 0; k < count; ++k) out[k] = N(0);
    return out;
  }
};

// The exponent of a stored entry of K, and back (absorb.h).
template <class T>
static OTALIGN_INLINE typename Simd<T>::V exponent(typename Simd<T>::V k) {
  using S = Simd<T>;
  const auto positive = k > 0, small = k <= S::splat(-Absorb<T>::kEntryRange);
  const auto t = S::select(positive, log<T>(S::select(positive, k, S::splat(1))), k);
  return S::any(~(positive | small)) ? S::select(positive | small, t, -1 / k) : t;
}
template <class T>
static OTALIGN_INLINE typename Simd<T>::V entry(typename Simd<T>::V t) {
  using S = Simd<T>;
  const auto small = t<S::splat(-Absorb<T>::kEntryRange), large = t> S::splat(Absorb<T>::kEntryRange);
  const auto k = S::select(small, t, exp<T>(t));
  return S::any(large) ? S::select(large, -1 / t, k) : k;
}
// The entry k after its exponent has grown by `shift`, where factor = exp(shift): a product if a float can hold it.
template <class T>
static OTALIGN_INLINE typename Simd<T>::V grown(typename Simd<T>::V k, typename Simd<T>::V factor,
                                                typename Simd<T>::V shift) {
  using S = Simd<T>;
  const auto low = S::splat(std::exp(-Absorb<T>::kEntryRange)), high = S::splat(std::exp(Absorb<T>::kEntryRange));
  const auto product = k * factor;
  const auto held = (k > 0) & (product > low) & (product < high) & (factor > low) & (factor < high);
  if (!S::any(~held)) return product;
  return S::select(held, product, entry<T>(exponent<T>(k) + shift));
}

}  // namespace otalign::OTALIGN_ISA
