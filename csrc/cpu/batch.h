// What the forward and the backward pass share: memory, threads, tasks, and a problem's items one by one.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../problem.h"
#include "blas.h"
#include "isa.h"

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

// Runs tasks in parallel, in their order, until the caller's poll says stop. What a task throws is thrown by `run`,
// once no task runs any more: no exception may leave a parallel region.
class Team {
 public:
  Team(int threads, Poll poll) : threads_(std::max(1, threads)), poll_(poll) {}

  int threads() const { return threads_; }
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  // `work` is in multiply-adds: a little is not worth a second thread, which may have to be woken.
  template <class F>
  void run(int64_t tasks, double work, const F& task) {
    const double useful = std::min(static_cast<double>(tasks), work / kThreadWork);
    const int team = static_cast<int>(std::max(1.0, std::min<double>(threads_, useful)));
    std::atomic<int64_t> next{0};
    std::atomic<int> finished{0};
#pragma omp parallel num_threads(team)
    {
      const OneThread one;
#ifdef _OPENMP
      const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
      const int thread = 0, members = 1;
#endif
      Seat seat{this, thread == 0};
      for (int64_t k = next++; k < tasks && !ask(&seat); k = next++) attempt(task, k, thread, Poll{&ask_stop, &seat});
      finished.fetch_add(1, std::memory_order_release);
      if (seat.caller) wait_for(finished, members, seat);
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Seat {
    Team* team;
    bool caller;
  };

  template <class F>
  void attempt(const F& task, int64_t k, int thread, Poll poll) noexcept {
    try {
      task(k, thread, poll);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
      stop_.store(true, std::memory_order_relaxed);
    }
  }

  // The caller alone can ask whether to stop, so it does not sleep in the barrier while others work. Its naps are a
  // small share of what it has waited, so that they cost as little.
  static void wait_for(const std::atomic<int>& finished, int members, Seat& seat) {
    const auto begin = std::chrono::steady_clock::now();
    while (finished.load(std::memory_order_acquire) < members) {
      ask(&seat);
      const auto waited = std::chrono::steady_clock::now() - begin;
      if (waited < std::chrono::milliseconds(1))
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(waited / 128, std::chrono::milliseconds(10)));
    }
  }

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
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr failure_;
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

// a * b of sizes; throws rather than overflow.
inline int64_t product(int64_t a, int64_t b) {
  check(a >= 0 && b >= 0, "sizes: expected numbers >= 0");
  check(b == 0 || a <= INT64_MAX / 64 / b, "sizes: too large");
  return a * b;
}

// Throws unless there are `count` numbers of `size` bytes at `data`.
inline void need(const void* data, int64_t bytes, int64_t count, size_t size, const char* name) {
  const int64_t expected = product(count, static_cast<int64_t>(size));
  if (expected == 0 || (data && bytes >= expected)) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " bytes of memory, got " +
                              (data ? std::to_string(bytes) : "none"));
}
template <class T>
void need(const Span<T>& memory, int64_t count, size_t size, const char* name) {
  need(memory.data, memory.bytes, count, size, name);
}
// The same for memory that may be missing.
template <class T>
void need_if_any(const Span<T>& memory, int64_t count, size_t size, const char* name) {
  if (memory) need(memory, count, size, name);
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

// A problem with lengths and offsets of its own, checked: whoever made them may change them at any moment.
class Layout {
 public:
  explicit Layout(const Problem& problem) : p(problem) {
    check(p.items >= 0 && p.capacity >= 0, "sizes: expected numbers >= 0");
    own_side(p.x, kept_[0], kept_[1], {"x_lengths", "cu_seqlens_x", "max_seqlen_x"});
    own_side(p.y, kept_[2], kept_[3], {"y_lengths", "cu_seqlens_y", "max_seqlen_y"});
    offsets.reserve(p.items);
    for (int64_t b = 0; b < p.items; ++b) {
      check(n(b) < INT32_MAX && m(b) < INT32_MAX, "lengths: too large for the BLAS");
      offsets.push_back(total);
      total += plan_stride(n(b), m(b));
      check(total <= p.capacity, "capacity: too small for the plans of this batch");
    }
  }
  Layout(const Layout&) = delete;

  int64_t n(int64_t b) const { return p.x.lengths[b]; }
  int64_t m(int64_t b) const { return p.y.lengths[b]; }
  bool empty(int64_t b) const { return n(b) == 0 || m(b) == 0; }

  void check_plan(size_t number) const { need(p.plan, p.capacity, number, "plan"); }

  Problem p;
  std::vector<int64_t> offsets;  // of the items' plans
  int64_t total = 0;             // numbers in all plans

 private:
  struct Names {
    const char *lengths, *offsets, *longest;
  };

  void own(Span<const int64_t>& memory, std::vector<int64_t>& kept, const char* name) {
    need(memory, p.items, sizeof(int64_t), name);
    kept.assign(memory.data, memory.data + p.items);
    memory = {kept.data(), memory.bytes};
  }

  void own_side(Side& side, std::vector<int64_t>& lengths, std::vector<int64_t>& starts, Names names) {
    check(side.size >= 0 && side.rows >= 0, "sizes: expected numbers >= 0");
    const bool packed = side.starts;
    own(side.lengths, lengths, names.lengths);
    if (packed) own(side.starts, starts, names.offsets);
    if (!packed) check(product(p.items, side.size) <= side.rows, "sizes: expected items of the padded size");
    int64_t begin = 0;
    for (int64_t b = 0; b < p.items; ++b) {
      const int64_t length = lengths[b];
      if (!packed && (length < 0 || length > side.size))
        refuse(names.lengths, "values in [0, ", side.size, "]", length);
      if (!packed) continue;
      if (starts[b] != begin || length < 0 || length > side.rows - begin)
        refuse(names.offsets, "offsets that rise from 0 to at most ", side.rows, "", starts[b]);
      if (length > side.size) refuse(names.longest, "at least the length of the longest item, ", length, "", side.size);
      begin += length;
    }
  }

  [[noreturn]] static void refuse(const char* name, const char* expected, int64_t limit, const char* end, int64_t got) {
    throw std::invalid_argument(std::string(name) + ": expected " + expected + std::to_string(limit) + end + ", got " +
                                std::to_string(got));
  }

  std::vector<int64_t> kept_[4];
};

template <class T>
class Batch : public Layout {
 public:
  explicit Batch(const Problem& problem) : Layout(problem) {
    check_options();
    check_side(p.x, "x", "a");
    check_side(p.y, "y", "b");
    check_plan(sizeof(T));
    need(p.error, p.items, sizeof(T), "error");
    need_if_any(p.init, p.y.rows, sizeof(T), "init");
    if (p.cost == Cost::given) check_given();
    if (p.cost == Cost::euclidean) need(p.distance, p.capacity, sizeof(T), "distance");
    for (int64_t b = 0; b < p.items; ++b) {
      most_n = std::max(most_n, n(b));
      most_m = std::max(most_m, m(b));
      scratch = std::max(scratch, kernels<T>().scratch(n(b), m(b)));
    }
  }

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
    it.reg = reg_[b];
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

  int64_t most_n = 0, most_m = 0;
  size_t scratch = 0;

 private:
  void check_options() {
    need(p.reg, p.items, sizeof(double), "reg");
    reg_.assign(p.reg.data, p.reg.data + p.items);
    for (const double reg : reg_) check(reg > 0 && std::isfinite(reg), "reg: expected finite numbers > 0");
    check(p.dim >= 0 && p.dim < INT32_MAX, "D: too large for the BLAS");
  }

  // A side's vectors, and its points as far as strides lead.
  void check_side(const Side& side, const char* name, const char* weights) {
    for (const Span<void>* vector : {&side.potential, &side.mass, &side.scale, &side.exponent})
      need(*vector, side.rows, sizeof(T), name);
    need_if_any(side.weights, side.rows, sizeof(T), weights);
    if (p.cost == Cost::given) return;
    const int64_t slots = side.starts ? 1 : p.items, rows = side.starts ? side.rows : side.size;
    if (slots == 0 || rows == 0 || p.dim == 0) return;
    check(side.row_stride >= p.dim && side.item_stride >= 0, "strides: expected rows that do not overlap");
    check(side.row_stride < INT32_MAX, "strides: too large for the BLAS");
    const int64_t last = product(slots - 1, side.item_stride) + product(rows - 1, side.row_stride) + p.dim;
    need(side.points, last, bytes(side.points_type), name);
  }

  void check_given() {
    check(!p.x.starts && !p.y.starts, "C: expected a padded batch");
    int64_t last = 1;
    const int64_t sizes[] = {p.items, p.x.size, p.y.size};
    for (int k = 0; k < 3; ++k) {
      if (sizes[k] == 0) return;
      check(p.given_strides[k] >= 0, "C: expected strides >= 0");
      last += product(sizes[k] - 1, p.given_strides[k]);
    }
    need(p.given, last, bytes(p.given_type), "C");
  }

  std::vector<double> reg_;
};

// A block of an item's points as T, as the products want them: in place, or copied into `buffer`.
template <class T>
struct Block {
  const T* data;
  int64_t stride;
};
// A kept exponent as a number for scalbn, were it changed meanwhile.
template <class T>
int power(T exponent) {
  return std::abs(exponent) < 5000 ? static_cast<int>(exponent) : 0;
}

// Points over two to the power of what `exponent` says of each, in `store`.
template <class T>
Block<T> over_powers(Block<T> points, int64_t rows, int64_t columns, const T* exponent, T* store, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < columns; ++d)
      store[i * stride + d] = std::scalbn(points.data[i * points.stride + d], -power(exponent[i]));
  return {store, stride};
}
template <class T>
bool any_power(const T* exponent, int64_t rows) {
  return std::any_of(exponent, exponent + rows, [](T e) { return e != 0; });
}

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
