// Vectors of the instruction set that this file is compiled for, by the compilers' vector extension.
//
// Everything is in a namespace named after the instruction set. Otherwise object files for different hardware would
// define the same functions, and the linker would keep one of them for all.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define OTALIGN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define OTALIGN_VECTOR_BYTES 32
#else
#define OTALIGN_VECTOR_BYTES 16
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define OTALIGN_INLINE inline __attribute__((always_inline))

namespace otalign::OTALIGN_ISA {

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <class T>
struct Simd {
  using Int = typename IntegerOf<T>::type;
  static constexpr int W = OTALIGN_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(OTALIGN_VECTOR_BYTES)));
  typedef Int I __attribute__((vector_size(OTALIGN_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(OTALIGN_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  static OTALIGN_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static OTALIGN_INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static OTALIGN_INLINE void store(T* p, V v, int count) {
    if (count == W) return store(p, v);
#if OTALIGN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
    else
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), reinterpret_cast<__m512d>(v));
#elif OTALIGN_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
      _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first(count)), reinterpret_cast<__m256>(v));
    else
      _mm256_maskstore_pd(p, reinterpret_cast<__m256i>(first(count)), reinterpret_cast<__m256d>(v));
#else
    for (int k = 0; k < count; ++k) p[k] = v[k];
#endif
  }
  static OTALIGN_INLINE V splat(T x) { return V{} + x; }
  static OTALIGN_INLINE V select(I mask, V yes, V no) { return mask ? yes : no; }
  static OTALIGN_INLINE V max(V a, V b) { return a > b ? a : b; }
  static OTALIGN_INLINE V min(V a, V b) { return a < b ? a : b; }
  static OTALIGN_INLINE V abs(V a) { return max(a, -a); }

  // A mask of the first `count` lanes.
  static OTALIGN_INLINE I first(int count) {
    I lane;
    for (int k = 0; k < W; ++k) lane[k] = k;
    return lane < I{} + count;
  }
  static OTALIGN_INLINE bool any(I mask) {
#if OTALIGN_VECTOR_BYTES == 64
    return sizeof(T) == 4 ? _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0
                          : _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif OTALIGN_VECTOR_BYTES == 32
    return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
    Int seen = 0;
    for (int k = 0; k < W; ++k) seen |= mask[k];
    return seen != 0;
#endif
  }
  // Bit k of the result tells lane k of a mask.
  static OTALIGN_INLINE uint32_t bits(I mask) {
#if OTALIGN_VECTOR_BYTES == 64
    return sizeof(T) == 4 ? _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask))
                          : _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#elif OTALIGN_VECTOR_BYTES == 32
    return sizeof(T) == 4 ? _mm256_movemask_ps(reinterpret_cast<__m256>(mask))
                          : _mm256_movemask_pd(reinterpret_cast<__m256d>(mask));
#else
    uint32_t set = 0;
    for (int k = 0; k < W; ++k) set |= static_cast<uint32_t>(mask[k] & 1) << k;
    return set;
#endif
  }
  static OTALIGN_INLINE T sum(V v) {
    T lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
  }
  static OTALIGN_INLINE T smallest(V v) {
    T lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] = lanes[k + half] < lanes[k] ? lanes[k + half] : lanes[k];
    return lanes[0];
  }

  // Four numbers; lane k of the result is the sum of rows[k].
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  typedef T UnalignedFour __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  static OTALIGN_INLINE Four sum_four(const V* rows) {
    V v = interleave<2>(interleave<1>(rows[0], rows[1]), interleave<1>(rows[2], rows[3]));
    if constexpr (W >= 16) v += rotate<8>(v);
    if constexpr (W >= 8) v += rotate<4>(v);
    return *reinterpret_cast<const UnalignedFour*>(&v);
  }

  // Lane k of the result is the sum of rows[k]: a butterfly that halves the number of vectors at each step.
  static OTALIGN_INLINE V sum_rows(V* rows) { return fold<1>(rows); }

 private:
  template <int H>
  static OTALIGN_INLINE V rotate(V v) {
    I index;
    for (int l = 0; l < W; ++l) index[l] = (l + H) % W;
    return shuffle(v, v, index);
  }
  template <int H>
  static OTALIGN_INLINE V fold(V* rows) {
    if constexpr (H == W) {
      return rows[0];
    } else {
      for (int k = 0; k < W / H / 2; ++k) rows[k] = interleave<H>(rows[2 * k], rows[2 * k + 1]);
      return fold<2 * H>(rows);
    }
  }
  // Lane l gets a[l] + a[l + H] if bit H of l is clear, b[l] + b[l - H] if it is set: a blend and a shuffle.
  template <int H>
  static OTALIGN_INLINE V interleave(V a, V b) {
    I stay, move;
    for (int l = 0; l < W; ++l) {
      stay[l] = (l & H) ? W + l : l;
      move[l] = (l & H) ? W + l - H : l + H;
    }
    return shuffle(a, b, stay) + shuffle(a, b, move);
  }
  static OTALIGN_INLINE V shuffle(V a, V b, I index) {
#if defined(__clang__)
    V out;
    for (int l = 0; l < W; ++l) out[l] = index[l] < W ? a[index[l]] : b[index[l] - W];
    return out;
#else
    return __builtin_shuffle(a, b, index);
#endif
  }
};

template <class To, class From>
static OTALIGN_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  return reinterpret_cast<To>(from);
}

template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  static constexpr int32_t round_bits = 0x4b400000, half_root = 0x3f3504f3;  // bits of `round` and of sqrt(1/2)
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, exp_degree = 7, log_terms = 5;
  static constexpr float exp_least = -87.0f, exp_most = 88.0f;
};
template <>
struct Constants<double> {
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t round_bits = 0x4338000000000000, half_root = 0x3fe6a09e667f3bcd;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, exp_degree = 13, log_terms = 11;
  static constexpr double exp_least = -708.0, exp_most = 709.0;
};

// 1 / d! and 1 / (2 d + 1), the coefficients of exp and of atanh.
template <class T>
struct Series {
  T factorial[16] = {}, odd[16] = {};
  constexpr Series() {
    double f = 1;
    for (int d = 0; d < 16; ++d) {
      factorial[d] = static_cast<T>(1 / f);
      odd[d] = static_cast<T>(1.0 / (2 * d + 1));
      f *= d + 1;
    }
  }
};

// exp, within 2 units in the last place; 0 below exp_least, clamped above exp_most, NaN for NaN.
template <class T>
static OTALIGN_INLINE typename Simd<T>::V exp(typename Simd<T>::V x) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  using C = Constants<T>;
  const V clamped = S::max(S::min(x, S::splat(C::exp_most)), S::splat(C::exp_least));
  const V shifted = clamped * T(1.4426950408889634) + C::round;
  const V k = shifted - C::round;
  const V r = (clamped - k * C::ln2_high) - k * C::ln2_low;
  constexpr Series<T> series;
  V p = S::splat(series.factorial[C::exp_degree]);
#pragma GCC unroll 16
  for (int d = C::exp_degree - 1; d >= 0; --d) p = p * r + series.factorial[d];
  const V result = bits_as<V>(bits_as<I>(p) + (bits_as<I>(shifted) << C::mantissa));
  return S::select(x < S::splat(C::exp_least), V{}, S::select(x == x, result, x));
}

// log of normal positive numbers, within 2 units in the last place.
template <class T>
static OTALIGN_INLINE typename Simd<T>::V log(typename Simd<T>::V x) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  using C = Constants<T>;
  // x = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m - 1) / (m + 1)).
  const I k = (bits_as<I>(x) - C::half_root) >> C::mantissa;
  const V m = bits_as<V>(bits_as<I>(x) - (k << C::mantissa));
  const V exponent = bits_as<V>(k + C::round_bits) - C::round;
  const V s = (m - 1) / (m + 1), s2 = s * s;
  constexpr Series<T> series;
  V p = S::splat(series.odd[C::log_terms - 1]);
#pragma GCC unroll 16
  for (int d = C::log_terms - 2; d >= 0; --d) p = p * s2 + series.odd[d];
  return exponent * C::ln2_high + (2 * s * p + exponent * C::ln2_low);
}

}  // namespace otalign::OTALIGN_ISA
