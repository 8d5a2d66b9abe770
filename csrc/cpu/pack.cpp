// Plans from the engine's layout to a dense one, and back.
#include <algorithm>

#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

// Calls row(place in packed, place in dense, m) for all rows of all plans.
template <class F>
void for_rows(const Layout& layout, F row) {
  const Problem& p = layout.p;
  for (int64_t b = 0; b < p.items; ++b)
    for (int64_t i = 0; i < layout.n(b); ++i)
      row(layout.offsets[b] + i * layout.m(b), (b * p.x.size + i) * p.y.size, layout.m(b));
}

// Numbers in the dense plans, once both kinds of memory are known to be large enough.
template <class T>
int64_t dense_size(const Layout& layout, const void* data, int64_t bytes) {
  const int64_t size = product(product(layout.p.items, layout.p.x.size), layout.p.y.size);
  layout.check_plan(sizeof(T));
  need(data, bytes, size, sizeof(T), "plan");
  return size;
}

template <class T>
void unpack(const Layout& layout, Span<void> to) {
  const T* const packed = static_cast<const T*>(layout.p.plan.data);
  T* const dense = static_cast<T*>(to);
  std::fill_n(dense, dense_size<T>(layout, to.data, to.bytes), T(0));
  for_rows(layout, [&](int64_t from, int64_t to, int64_t m) {
    for (int64_t j = 0; j < m; ++j) dense[to + j] = packed[from + j] < 0 ? T(0) : packed[from + j];
  });
}

template <class T>
void pack(const Layout& layout, Span<const void> from) {
  dense_size<T>(layout, from.data, from.bytes);
  const T* const dense = static_cast<const T*>(from);
  T* const packed = static_cast<T*>(layout.p.plan);
  std::fill_n(packed, layout.p.capacity, T(0));
  for_rows(layout, [&](int64_t to, int64_t from, int64_t m) { std::copy_n(dense + from, m, packed + to); });
}

}  // namespace

void unpack(const Problem& problem, Span<void> dense) {
  const Layout layout(problem);
  problem.is_double ? unpack<double>(layout, dense) : unpack<float>(layout, dense);
}

void pack(const Problem& problem, Span<const void> dense) {
  const Layout layout(problem);
  problem.is_double ? pack<double>(layout, dense) : pack<float>(layout, dense);
}

}  // namespace otalign::cpu
