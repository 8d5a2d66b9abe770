// Plans from the engine's layout to a dense one, and back.
#include <algorithm>

#include "engine.h"

namespace otalign::cpu {
namespace {

template <class T, class F>
void for_rows(const Problem& p, F row) {
  int64_t offset = 0;
  for (int64_t b = 0; b < p.items; ++b) {
    const int64_t n = p.x.lengths[b], m = p.y.lengths[b];
    for (int64_t i = 0; i < n; ++i) row(offset + i * m, (b * p.x.size + i) * p.y.size, m);
    offset += plan_stride(n, m);
  }
}

template <class T>
void unpack(const Problem& p, const T* packed, T* dense) {
  std::fill_n(dense, p.items * p.x.size * p.y.size, T(0));
  for_rows<T>(p, [&](int64_t from, int64_t to, int64_t m) {
    for (int64_t j = 0; j < m; ++j) dense[to + j] = packed[from + j] < 0 ? T(0) : packed[from + j];
  });
}

template <class T>
void pack(const Problem& p, const T* dense, T* packed) {
  std::fill_n(packed, p.capacity, T(0));
  for_rows<T>(p, [&](int64_t to, int64_t from, int64_t m) { std::copy_n(dense + from, m, packed + to); });
}

}  // namespace

void unpack(const Problem& problem, const void* packed, void* dense) {
  if (problem.is_double)
    unpack(problem, static_cast<const double*>(packed), static_cast<double*>(dense));
  else
    unpack(problem, static_cast<const float*>(packed), static_cast<float*>(dense));
}

void pack(const Problem& problem, const void* dense, void* packed) {
  if (problem.is_double)
    pack(problem, static_cast<const double*>(dense), static_cast<double*>(packed));
  else
    pack(problem, static_cast<const float*>(dense), static_cast<float*>(packed));
}

}  // namespace otalign::cpu
