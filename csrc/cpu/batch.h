// What the forward and the backward pass share: memory, threads, tasks, and a problem's items one by one.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../problem.h"
#include "blas.h"
#include "kernels.h"

namespace otalign::cpu {

constexpr double kThreadWork = 1 << 20;  // multiply-adds that are worth waking a thread for
constexpr double kSolveWork = 64;        // multiply-adds for each number of an item's cost, as a guess

inline size_t bytes(Scalar type) { return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2; }
template <class T>
constexpr Scalar scalar() {
  return sizeof(T) == 8 ? Scalar::f64 : Scalar::f32;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of a cache line.
constexpr int64_t kLine = 64;
inline bool aligned(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % kLine == 0; }

// Memory that starts at a cache line; not initialised.
class Buffer {
 public:
  explicit Buffer(size_t size = 0) : data_(size ? ::operator new(size, std::align_val_t(kLine)) : nullptr) {}
  template <class T>
  T* as(size_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_.get()) + offset);
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(kLine)); }
  };
  std::unique_ptr<void, Free> data_;
};

// Memory for each thread, in parts whose sizes are the most that any task asks for.
class Scratch {
 public:
  Scratch(int threads, std::initializer_list<size_t> parts) {
    size_t total = 0;
    for (size_t size : parts) {
      offsets_.push_back(total);
      total += (size + kLine - 1) / kLine * kLine;
    }
    for (int t = 0; t < threads; ++t) buffers_.emplace_back(total);
  }
  template <class T>
  T* get(int thread, int part) const {
    return buffers_[thread].as<T>(offsets_[part]);
  }

 private:
  std::vector<size_t> offsets_;
  std::vector<Buffer> buffers_;
};

// Runs tasks in parallel, in their order, until the caller's poll says stop. Tasks must not throw.
class Team {
 public:
  Team(int threads, Poll poll) : threads_(std::max(1, threads)), poll_(poll) {}

  int threads() const { return threads_; }
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  // `work` is in multiply-adds: a little is not worth a second thread, which may have to be woken.
  template <class F>
  void run(int64_t tasks, double work, F task) {
    const double useful = std::min(static_cast<double>(tasks), work / kThreadWork);
    const int team = static_cast<int>(std::max(1.0, std::min<double>(threads_, useful)));
#pragma omp parallel num_threads(team)
    {
      const OneThread one;
#ifdef _OPENMP
      const int thread = omp_get_thread_num();
#else
      const int thread = 0;
#endif
      const Seat seat{this, thread == 0};
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < tasks; ++k)
        if (!ask(const_cast<Seat*>(&seat))) task(k, thread, Poll{&ask_stop, const_cast<Seat*>(&seat)});
    }
  }

 private:
  struct Seat {
    Team* team;
    bool caller;
  };
  static bool ask_stop(void* seat) { return ask(static_cast<Seat*>(seat)); }
  static bool ask(Seat* seat) {
    Team& team = *seat->team;
    if (seat->caller && team.poll_.function && !team.stopped()) {
      const auto now = std::chrono::steady_clock::now();
      if (now - team.asked_ > std::chrono::milliseconds(20)) {
        team.asked_ = now;
        if (team.poll_()) team.stop_.store(true, std::memory_order_relaxed);
      }
    }
    return team.stopped();
  }

  const int threads_;
  const Poll poll_;
  std::atomic<bool> stop_{false};
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

struct Task {
  int64_t item, begin, end;
  double work;
};

inline void longest_first(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
}

inline void check(bool valid, const char* what) {
  if (!valid) throw std::invalid_argument(what);
}

inline void check_side(const Side& side, int64_t items, const char* lengths, const char* offsets) {
  for (int64_t b = 0; b < items; ++b) {
    check(side.lengths[b] >= 0 && (side.starts || side.lengths[b] <= side.size), lengths);
    if (!side.starts) continue;
    const int64_t expected = b == 0 ? 0 : side.starts[b - 1] + side.lengths[b - 1];
    check(side.starts[b] == expected && side.starts[b] + side.lengths[b] <= side.rows, offsets);
  }
}

template <class T>
T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}
template <class T>
const T* at(const void* base, int64_t offset) {
  return base ? static_cast<const T*>(base) + offset : nullptr;
}
inline const char* bytes_at(const void* base, int64_t elements, Scalar type) {
  return static_cast<const char*>(base) + elements * static_cast<int64_t>(bytes(type));
}
inline char* bytes_at(void* base, int64_t elements, Scalar type) {
  return static_cast<char*>(base) + elements * static_cast<int64_t>(bytes(type));
}

// Zeroes the rows behind an item, in a tensor with `row` bytes for each row of a side.
inline void zero_padding(const Side& side, int64_t items, int64_t b, void* out, size_t row) {
  const int64_t begin = side.row(b) + side.lengths[b];
  const int64_t end = !side.starts ? (b + 1) * side.size : b + 1 == items ? side.rows : begin;
  if (out && end > begin) kernels<float>().clear(static_cast<char*>(out) + begin * row, (end - begin) * row);
}
// Nothing is behind an item where there is none.
inline void zero_all(const Side& side, int64_t items, void* out, size_t row) {
  if (out && items == 0 && side.rows > 0) std::memset(out, 0, side.rows * row);
}

template <class T>
class Batch {
 public:
  explicit Batch(const Problem& problem) : p(problem) {
    check_side(p.x, p.items, "x_lengths: expected values in [0, N]", "cu_seqlens_x: expected offsets that rise from 0");
    check_side(p.y, p.items, "y_lengths: expected values in [0, M]", "cu_seqlens_y: expected offsets that rise from 0");
    check(p.dim < INT32_MAX && p.x.row_stride < INT32_MAX && p.y.row_stride < INT32_MAX, "D: too large for the BLAS");
    int64_t offset = 0;
    for (int64_t b = 0; b < p.items; ++b) {
      check(n(b) < INT32_MAX && m(b) < INT32_MAX, "lengths: too large for the BLAS");
      check(p.reg[b] > 0 && std::isfinite(p.reg[b]), "reg: expected finite numbers > 0");
      offsets.push_back(offset);
      offset += plan_stride(n(b), m(b));
      most_n = std::max(most_n, n(b));
      most_m = std::max(most_m, m(b));
      scratch = std::max(scratch, kernels<T>().scratch(n(b), m(b)));
    }
    check(offset <= p.capacity, "capacity: too small for the plans of this batch");
  }

  int64_t n(int64_t b) const { return p.x.lengths[b]; }
  int64_t m(int64_t b) const { return p.y.lengths[b]; }
  bool empty(int64_t b) const { return n(b) == 0 || m(b) == 0; }
  double error(int64_t b) const { return static_cast<const T*>(p.error)[b]; }

  Item<T> item(int64_t b) const {
    const int64_t x = p.x.row(b), y = p.y.row(b);
    Item<T> it{};
    it.n = n(b);
    it.m = m(b);
    it.K = at<T>(p.plan, offsets[b]);
    it.a = at<T>(p.x.weights, x);
    it.b = at<T>(p.y.weights, y);
    it.init = at<T>(p.init, y);
    it.reg = p.reg[b];
    it.rho_x = p.rho_x;
    it.rho_y = p.rho_y;
    it.max_iter = p.max_iter;
    it.tol = p.tol;
    it.symmetric = p.symmetric;
    it.f = at<T>(p.x.potential, x);
    it.g = at<T>(p.y.potential, y);
    it.mass_x = at<T>(p.x.mass, x);
    it.mass_y = at<T>(p.y.mass, y);
    it.scale_x = at<T>(p.x.scale, x);
    it.scale_y = at<T>(p.y.scale, y);
    it.distance = at<T>(p.distance, offsets[b]);
    it.cost = p.cost;
    it.prior = p.prior;
    it.prior_parameters[0] = p.prior_parameters[0];
    it.prior_parameters[1] = p.prior_parameters[1];
    return it;
  }

  const char* points(const Side& side, int64_t b, int64_t row, int64_t column) const {
    return bytes_at(side.points, side.element(b) + row * side.row_stride + column, side.points_type);
  }
  bool converts(const Side& side) const { return side.points && side.points_type != scalar<T>(); }

  // A BLAS may round by where in a cache line a matrix starts, and by how far apart its rows are. So that the bits of
  // an item are the same in every batch and layout, both depend on the item's sizes alone: the products see points,
  // and their gradients, at the start of a line and `product_stride` apart. Where they do not lie like that, the
  // products see a copy; `may_copy` says whether any of a side's do.
  int64_t product_stride(const Side& side, int64_t columns) const {
    return std::max<int64_t>(1, converts(side) ? columns : p.dim);
  }
  bool in_place(const Side& side, const void* points, int64_t row_stride) const {
    return !converts(side) && aligned(points) && row_stride == product_stride(side, 0);
  }
  bool may_copy(const Side& side, const void* points, int64_t item_stride, int64_t row_stride) const {
    const auto in_lines = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % kLine == 0; };
    return points && !(in_place(side, points, row_stride) && in_lines(row_stride) && in_lines(item_stride));
  }
  bool may_copy(const Side& side) const {
    return may_copy(side, side.points, side.starts ? 0 : side.item_stride, side.row_stride);
  }
  bool may_copy_gradient(const Side& side, const void* gradient) const { return may_copy(side, gradient, 0, p.dim); }

  const Problem& p;
  std::vector<int64_t> offsets;
  int64_t most_n = 0, most_m = 0;
  size_t scratch = 0;
};

// A block of an item's points as T, as the products want them: in place, or copied into `buffer`.
template <class T>
struct Block {
  const T* data;
  int64_t stride;
};
template <class T>
Block<T> read_block(const Batch<T>& batch, const Side& side, int64_t b, int64_t row, int64_t rows, int64_t column,
                    int64_t columns, T* buffer) {
  const int64_t stride = batch.product_stride(side, columns);
  const char* const points = batch.points(side, b, row, column);
  if (batch.in_place(side, points, side.row_stride)) return {reinterpret_cast<const T*>(points), stride};
  for (int64_t i = 0; i < rows; ++i)
    kernels<T>().read(side.points_type, batch.points(side, b, row + i, column), buffer + i * stride, columns);
  return {buffer, stride};
}

}  // namespace otalign::cpu
