// The table of functions for one instruction set. This file is compiled once for each of them, with OTALIGN_ISA its
// name.
#include "isa.h"

#include <cstring>
#include <limits>

#include "adjoint.h"
#include "both_orders.h"
#include "prior.h"
#include "solver.h"

namespace otalign::OTALIGN_ISA {
namespace {

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  const float magnitude = from_bits(rest << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  const uint32_t bits = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : to_bits(magnitude);
  return from_bits(bits | sign);
}
uint16_t to_f16(float x) {
  const uint32_t sign = (to_bits(x) >> 16) & 0x8000, bits = to_bits(x) & 0x7fffffff;
  uint32_t h;
  if (bits >= 0x47800000)
    h = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  else if (bits < 0x38800000)
    h = to_bits(from_bits(bits) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
  else
    h = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  return static_cast<uint16_t>(h | sign);
}

template <class T>
void read(Scalar type, const void* from, T* to, int64_t count) {
  switch (type) {
    case Scalar::f32:
      for (int64_t k = 0; k < count; ++k) to[k] = static_cast<T>(static_cast<const float*>(from)[k]);
      return;
    case Scalar::f64:
      for (int64_t k = 0; k < count; ++k) to[k] = static_cast<T>(static_cast<const double*>(from)[k]);
      return;
    case Scalar::bf16:
      for (int64_t k = 0; k < count; ++k) to[k] = from_bf16(static_cast<const uint16_t*>(from)[k]);
      return;
    case Scalar::f16:
      for (int64_t k = 0; k < count; ++k) to[k] = from_f16(static_cast<const uint16_t*>(from)[k]);
      return;
  }
}

template <class T>
void write(Scalar type, const T* from, void* to, int64_t count) {
  switch (type) {
    case Scalar::f32:
      for (int64_t k = 0; k < count; ++k) static_cast<float*>(to)[k] = static_cast<float>(from[k]);
      return;
    case Scalar::f64:
      for (int64_t k = 0; k < count; ++k) static_cast<double*>(to)[k] = static_cast<double>(from[k]);
      return;
    case Scalar::bf16:
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(to)[k] = to_bf16(static_cast<float>(from[k]));
      return;
    case Scalar::f16:
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(to)[k] = to_f16(static_cast<float>(from[k]));
      return;
  }
}

// The sum of f(d, lanes) over a row of dim numbers; the last vector may have fewer lanes.
template <class T, class F>
OTALIGN_INLINE T sum_over(int64_t dim, F f) {
  using S = Simd<T>;
  typename S::V first{}, second{};
  int64_t d = 0;
  for (; d + 2 * S::W <= dim; d += 2 * S::W) {
    first += f(d, S::W);
    second += f(d + S::W, S::W);
  }
  for (; d < dim; d += S::W) first += f(d, dim - d < S::W ? static_cast<int>(dim - d) : S::W);
  return S::sum(first + second);
}

template <class T>
OTALIGN_INLINE typename Simd<T>::V load_part(const T* p, int count) {
  using S = Simd<T>;
  if (count == S::W) return S::load(p);
  T lanes[S::W] = {};
  for (int k = 0; k < count; ++k) lanes[k] = p[k];
  return S::load(lanes);
}

template <class T>
void squares(const T* x, int64_t rows, int64_t dim, int64_t stride, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + i * stride;
    out[i] = sum_over<T>(dim, [&](int64_t d, int count) {
      const auto v = load_part(row + d, count);
      return v * v;
    });
  }
}

template <class T>
T square_distance(const T* x, const T* y, int64_t dim) {
  return sum_over<T>(dim, [&](int64_t d, int count) {
    const auto v = load_part(x + d, count) - load_part(y + d, count);
    return v * v;
  });
}

// A distance is the root of a square from kLeastSquare to 1 / kLeastSquare; other squares are computed anew. The
// gradient of a distance has its reciprocal as a factor: below kLeastDistance it is zero.
template <class T>
constexpr T kLeastSquare = sizeof(T) == 4 ? T(1e-30) : T(1e-280);
template <class T>
constexpr T kLeastDistance = sizeof(T) == 4 ? T(1e-30) : T(1e-290);

// |x - y|, even if its square leaves the range of T.
template <class T>
T wide_distance(const T* x, const T* y, int64_t dim) {
  const T square = square_distance(x, y, dim);
  if (square > kLeastSquare<T> && square < 1 / kLeastSquare<T>) return std::sqrt(square);
  T largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const T apart = std::abs(x[d] - y[d]);
    if (!(apart <= std::numeric_limits<T>::max())) return static_cast<T>(NAN);
    if (apart > largest) largest = apart;
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  T sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const T apart = std::scalbn(x[d] - y[d], -exponent);
    sum += apart * apart;
  }
  return std::scalbn(std::sqrt(sum), exponent);
}

// A squared distance below this share of the squared norms has lost too many digits in the product, and is computed
// anew.
constexpr double kCancelled = 1.0 / 64;

template <class T>
bool cost(Item<T>& it, int64_t begin, int64_t end, const T* x, int64_t x_stride, const T* y, int64_t y_stride,
          int64_t dim, T* distance) {
  const int64_t m = it.m;
  const T* scale_y = it.scale_y;
  const PriorRow<T> prior(it);
  // NaN where any number is not finite, except where an infinite given cost forbids a pair.
  typename Simd<T>::V zeros{};
  const typename Simd<T>::V infinity = Simd<T>::splat(T(HUGE_VAL));
  for (int64_t i = begin; i < end; ++i) {
    T* row = it.K + i * m;
    const T scale = it.scale_x ? it.scale_x[i] : T(0);
    switch (it.cost) {
      case Cost::cosine:
        for (int64_t j = 0; j < m; ++j) row[j] = 1 - row[j] * (scale * scale_y[j]);
        break;
      case Cost::dot:
        for (int64_t j = 0; j < m; ++j) row[j] = -row[j];
        break;
      case Cost::sqeuclidean:
        for (int64_t j = 0; j < m; ++j) {
          T square = scale + scale_y[j] - 2 * row[j];
          // The comparison is false for NaN, too: then the squared norms overflow.
          if (!(square - T(kCancelled) * (scale + scale_y[j]) >= 0))
            square = square_distance(x + (i - begin) * x_stride, y + j * y_stride, dim);
          row[j] = square;
        }
        break;
      case Cost::euclidean:
        for (int64_t j = 0; j < m; ++j) {
          const T square = scale + scale_y[j] - 2 * row[j], least = T(kCancelled) * (scale + scale_y[j]);
          const bool held =
              square >= (least > kLeastSquare<T> ? least : kLeastSquare<T>) && square < 1 / kLeastSquare<T>;
          row[j] = held ? square : T(-1);
        }
        for (int64_t j = 0; j < m; ++j) {
          row[j] = row[j] >= 0 ? std::sqrt(row[j]) : wide_distance(x + (i - begin) * x_stride, y + j * y_stride, dim);
          distance[i * m + j] = row[j] < kLeastDistance<T> ? T(0) : row[j];
        }
        break;
      case Cost::given:
        break;
    }
    for_vectors<T>(m, [&](int64_t j, int count, auto) {
      const auto C = load_part(row + j, count);
      zeros += it.cost == Cost::given ? Simd<T>::select(C == infinity, typename Simd<T>::V{}, C * 0) : C * 0;
    });
    prior.add(i, row);
  }
  return Simd<T>::sum(zeros) == 0;
}

template <class T>
size_t scratch(int64_t n, int64_t m) {
  const size_t other = BothOrders<T>::few(n, m) ? Solver<T>::scratch(m, n) : 0;
  const size_t solve = std::max(Solver<T>::scratch(n, m), other), reverse = ReversePass<T>::scratch(n, m);
  return solve > reverse ? solve : reverse;
}

template <class T>
void fail(Item<T>& it, Poll poll) {
  const T nan = static_cast<T>(NAN);
  Pace pace(poll);
  for (int64_t i = 0; i < it.n && !pace.stops(it.m); ++i)
    for (int64_t j = 0; j < it.m; ++j) it.K[i * it.m + j] = nan;
  for (int64_t i = 0; i < it.n; ++i) it.f[i] = it.mass_x[i] = nan;
  for (int64_t j = 0; j < it.m; ++j) it.g[j] = it.mass_y[j] = nan;
  it.value = it.linear = it.error = NAN;
  it.n_iter = 0;
}

template <class T>
void solve_once(Item<T>& it, void* memory, Poll poll, Crew crew) {
  Solver<T> solver(it, memory, poll, crew);
  if (!solver.run()) fail(it, poll);
}

template <class T>
void solve(Item<T>& it, void* memory, Poll poll, Crew crew) {
  const auto once = [&](Item<T>& item) { solve_once(item, memory, poll, crew); };
  if (BothOrders<T>::few(it))
    BothOrders<T>(it).solve(once);
  else
    once(it);
}

template <class T>
void reverse(const Item<T>& it, Reverse<T>& back, void* memory, Poll poll) {
  ReversePass<T>(it, back, memory, poll).run();
}

template <class T>
void panel(const Item<T>& it, const Reverse<T>& back, int64_t begin, int64_t end, T* out) {
  ReversePass<T>::panel(it, back, begin, end, out);
}

template <class T>
void scale_rows(const T* x, int64_t x_stride, const T* diagonal, int64_t rows, int64_t dim, T* out,
                int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = x + i * x_stride;
    T* to = out + i * out_stride;
    for (int64_t d = 0; d < dim; ++d) to[d] = diagonal[i] * from[d];
  }
}

void clear(void* memory, size_t bytes) {
  char* p = static_cast<char*>(memory);
#if OTALIGN_VECTOR_BYTES >= 32
  constexpr size_t kLine = 64, kMuch = 1 << 16;
  if (bytes >= kMuch) {
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(p) % kLine) % kLine;
    std::memset(p, 0, head);
    char* const end = p + bytes;
    for (p += head; p + kLine <= end; p += kLine)
      for (size_t k = 0; k < kLine; k += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p + k), __m256i{});
    _mm_sfence();
    bytes = end - p;
  }
#endif
  std::memset(p, 0, bytes);
}

template <class T>
constexpr Kernels<T> table{scratch<T>, read<T>,    write<T>, squares<T>,    cost<T>, solve<T>,
                           fail<T>,    reverse<T>, panel<T>, scale_rows<T>, clear};

}  // namespace

#define OTALIGN_STRING_(x) #x
#define OTALIGN_STRING(x) OTALIGN_STRING_(x)

extern const Isa kIsa;
const Isa kIsa{OTALIGN_STRING(OTALIGN_ISA), &table<float>, &table<double>};

}  // namespace otalign::OTALIGN_ISA
