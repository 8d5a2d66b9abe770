// Plans from the places of Problem::plan to a dense tensor, and back.
#include <algorithm>

#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

// Calls row(element in packed, element in dense, m) for all rows of all plans.
template <class F>
void for_rows(const CheckedProblem& checked, F row) {
  const Problem& p = checked.p;
  for (int64_t b = 0; b < p.items; ++b)
    for (int64_t i = 0; i < checked.n(b); ++i)
      row(checked.offsets[b] + i * checked.m(b), (b * p.x.size + i) * p.y.size, checked.m(b));
}

// Checks that both memories are large enough; returns the number of elements in the dense one.
template <class T>
int64_t dense_size(const CheckedProblem& checked, const void* data, int64_t bytes) {
  const int64_t size = product(product(checked.p.items, checked.p.x.size), checked.p.y.size);
  checked.check_plan(sizeof(T));
  need(data, bytes, size, sizeof(T), "plan");
  return size;
}

template <class T>
void unpack(const CheckedProblem& checked, Span<void> to) {
  const T* const packed = static_cast<const T*>(checked.p.plan.data);
  T* const dense = static_cast<T*>(to);
  std::fill_n(dense, dense_size<T>(checked, to.data, to.bytes), T(0));
  for_rows(checked, [&](int64_t from, int64_t to, int64_t m) {
    // Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan.
    for (int64_t j = 0; j < m; ++j) dense[to + j] = packed[from + j] < 0 ? T(0) : packed[from + j];
  });
}

template <class T>
void pack(const CheckedProblem& checked, Span<const void> from) {
  dense_size<T>(checked, from.data, from.bytes);
  const T* const dense = static_cast<const T*>(from);
  T* const packed = static_cast<T*>(checked.p.plan);
  std::fill_n(packed, checked.p.capacity, T(0));
  for_rows(checked, [&](int64_t to, int64_t from, int64_t m) { std::copy_n(dense + from, m, packed + to); });
}

}  // namespace

void unpack(const Problem& problem, Span<void> dense) {
  const CheckedProblem checked(problem);
  problem.is_double ? unpack<double>(checked, dense) : unpack<float>(checked, dense);
}

void pack(const Problem& problem, Span<const void> dense) {
  const CheckedProblem checked(problem);
  problem.is_double ? pack<double>(checked, dense) : pack<float>(checked, dense);
}

}  // namespace otalign::cpu
