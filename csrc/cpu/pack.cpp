// Plans from the places of Problem::plan to a dense tensor, and back.
#include <algorithm>

#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

// Checks that both memories are large enough.
template <class T>
void check_sizes(const CheckedProblem& checked, const void* data, int64_t bytes) {
  checked.check_plan(sizeof(T));
  need(data, bytes, product(product(checked.p.items, checked.p.x.size), checked.p.y.size), sizeof(T), "plan");
}

// Whether copy(pace) came to its end.
template <class F>
bool finished(Poll poll, F copy) {
  Team team(1, poll);
  team.run(1, 0, [&](int64_t, int, Poll stop) { copy(Pace(stop)); });
  return !team.stopped();
}

template <class T>
bool unpack(const CheckedProblem& checked, Span<void> to, Poll poll) {
  check_sizes<T>(checked, to.data, to.bytes);
  const Problem& p = checked.p;
  const T* const packed = static_cast<const T*>(p.plan.data);
  T* row = static_cast<T*>(to);
  return finished(poll, [&](Pace pace) {
    for (int64_t b = 0; b < p.items; ++b) {
      const T* from = packed + checked.offsets[b];
      for (int64_t i = 0; i < p.x.size; ++i, row += p.y.size) {
        if (pace.stops(p.y.size)) return;
        const int64_t m = i < checked.n(b) ? checked.m(b) : 0;
        // Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan.
        for (int64_t j = 0; j < m; ++j) row[j] = from[j] < 0 ? T(0) : from[j];
        std::fill(row + m, row + p.y.size, T(0));
        from += m;
      }
    }
  });
}

template <class T>
bool pack(const CheckedProblem& checked, Span<const void> from, Poll poll) {
  check_sizes<T>(checked, from.data, from.bytes);
  const Problem& p = checked.p;
  const T* const dense = static_cast<const T*>(from);
  T *to = static_cast<T*>(p.plan), *const end = to + p.capacity;
  return finished(poll, [&](Pace pace) {
    for (int64_t b = 0; b < p.items; ++b) {
      T* const next = static_cast<T*>(p.plan) + checked.offsets[b];
      to = std::fill_n(to, next - to, T(0));
      for (int64_t i = 0; i < checked.n(b); ++i) {
        if (pace.stops(checked.m(b))) return;
        to = std::copy_n(dense + (b * p.x.size + i) * p.y.size, checked.m(b), to);
      }
    }
    std::fill(to, end, T(0));
  });
}

}  // namespace

bool unpack(const Problem& problem, Span<void> dense, Poll poll) {
  const CheckedProblem checked(problem);
  return problem.is_double ? unpack<double>(checked, dense, poll) : unpack<float>(checked, dense, poll);
}

bool pack(const Problem& problem, Span<const void> dense, Poll poll) {
  const CheckedProblem checked(problem);
  return problem.is_double ? pack<double>(checked, dense, poll) : pack<float>(checked, dense, poll);
}

}  // namespace otalign::cpu
