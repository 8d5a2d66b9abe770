#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blas.h"

namespace otalign::cpu {
namespace {

constexpr int64_t kBlock = 256;                    // rows of a block of the cost
constexpr int64_t kPanel = 128;                    // rows of a panel of its gradient
constexpr int64_t kSlice = 256;                    // least columns of a slice of the gradient
constexpr double kSliceWork = 64.0 * 1024 * 1024;  // multiply-adds that make a slice
constexpr double kThreadWork = 1 << 20;            // multiply-adds that are worth waking a thread for
constexpr double kSolveWork = 64;                  // multiply-adds for each number of an item's cost, as a guess

size_t bytes(Scalar type) { return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2; }
template <class T>
constexpr Scalar scalar() {
  return sizeof(T) == 8 ? Scalar::f64 : Scalar::f32;
}
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory aligned for vectors; not initialised.
class Buffer {
 public:
  explicit Buffer(size_t size) : data_(size ? ::operator new(size, std::align_val_t(64)) : nullptr) {}
  template <class T>
  T* as(size_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_.get()) + offset);
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
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
      total += (size + 63) / 64 * 64;
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

void longest_first(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
}

void check(bool valid, const char* what) {
  if (!valid) throw std::invalid_argument(what);
}

void check_side(const Side& side, int64_t items, const char* lengths, const char* offsets) {
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
const char* bytes_at(const void* base, int64_t elements, Scalar type) {
  return static_cast<const char*>(base) + elements * static_cast<int64_t>(bytes(type));
}
char* bytes_at(void* base, int64_t elements, Scalar type) {
  return static_cast<char*>(base) + elements * static_cast<int64_t>(bytes(type));
}

// Zeroes the rows behind an item, in a tensor with `row` bytes for each row of a side.
void zero_padding(const Side& side, int64_t items, int64_t b, void* out, size_t row) {
  const int64_t begin = side.row(b) + side.lengths[b];
  const int64_t end = !side.starts ? (b + 1) * side.size : b + 1 == items ? side.rows : begin;
  if (out && end > begin) kernels<float>().clear(static_cast<char*>(out) + begin * row, (end - begin) * row);
}
// Nothing is behind an item where there is none.
void zero_all(const Side& side, int64_t items, void* out, size_t row) {
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

  const Problem& p;
  std::vector<int64_t> offsets;
  int64_t most_n = 0, most_m = 0;
  size_t scratch = 0;
};

// A block of an item's points as T: where they lie if they are T, else converted into `buffer`.
template <class T>
struct Block {
  const T* data;
  int64_t stride;
};
template <class T>
Block<T> read_block(const Batch<T>& batch, const Side& side, int64_t b, int64_t row, int64_t rows, int64_t column,
                    int64_t columns, T* buffer) {
  if (!batch.converts(side)) return {reinterpret_cast<const T*>(batch.points(side, b, row, column)), side.row_stride};
  for (int64_t i = 0; i < rows; ++i)
    kernels<T>().read(side.points_type, batch.points(side, b, row + i, column), buffer + i * columns, columns);
  return {buffer, columns};
}

// Forward -------------------------------------------------------------------------------------------------------------

// What the products of `rows` points are scaled with: reciprocal norms for the cosine, squared norms for the distances.
template <class T>
void scales(const Problem& p, Block<T> points, int64_t rows, T* out) {
  if (p.cost == Cost::dot) return;
  kernels<T>().squares(points.data, rows, p.dim, points.stride, out);
  if (p.cost != Cost::cosine) return;
  // Shorter still, a point counts as zero where its gradient, of the order of 1 / norm, is concerned.
  const T shortest = sizeof(T) == 4 ? T(1e-36) : T(1e-300);
  for (int64_t i = 0; i < rows; ++i) out[i] = out[i] < shortest ? T(0) : 1 / std::sqrt(out[i]);
}

// The cosine does not know lengths, but its squares do: points so long or short that they over- or underflow are
// brought to lengths near one in a copy, in `store`. Returns whether there were any.
template <class T>
bool tame(Block<T>& points, int64_t rows, int64_t dim, const T* scale, std::vector<T>& store) {
  const T least = sizeof(T) == 4 ? T(1e-15) : T(1e-140), most = 1 / least;
  const auto largest = [&](int64_t i) {
    T most_of_row = 0;
    for (int64_t d = 0; d < dim; ++d) most_of_row = std::max(most_of_row, std::abs(points.data[i * points.stride + d]));
    return most_of_row;
  };
  bool wild = false;
  for (int64_t i = 0; i < rows && !wild; ++i)
    wild = !(scale[i] > least && scale[i] < most) && largest(i) > 0 && std::isfinite(largest(i));
  if (!wild) return false;
  store.resize(rows * dim);
  for (int64_t i = 0; i < rows; ++i) {
    const T length = largest(i);
    for (int64_t d = 0; d < dim; ++d)
      store[i * dim + d] = length > 0 ? points.data[i * points.stride + d] / length : T(0);
  }
  points = {store.data(), dim};
  return true;
}

// Rows [begin, end) of an item's cost; false if any is not finite.
template <class T>
bool build_cost(const Batch<T>& batch, Item<T> it, const Task& task, T* x_buffer, T* y_buffer, T* scale_y) {
  const Problem& p = batch.p;
  const int64_t rows = task.end - task.begin, b = task.item;
  T* const out = it.K + task.begin * it.m;
  if (p.cost == Cost::given) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t element = b * p.given_strides[0] + (task.begin + i) * p.given_strides[1];
      if (p.given_strides[2] == 1)
        kernels<T>().read(p.given_type, bytes_at(p.given, element, p.given_type), out + i * it.m, it.m);
      else
        for (int64_t j = 0; j < it.m; ++j)
          kernels<T>().read(p.given_type, bytes_at(p.given, element + j * p.given_strides[2], p.given_type),
                            out + i * it.m + j, 1);
    }
    return kernels<T>().cost(it, task.begin, task.end, nullptr, 0, nullptr, 0, 0, nullptr);
  }
  Block<T> x = read_block(batch, p.x, b, task.begin, rows, 0, p.dim, x_buffer);
  Block<T> y = read_block(batch, p.y, b, 0, it.m, 0, p.dim, y_buffer);
  T* const scale_x = const_cast<T*>(it.scale_x) + task.begin;
  scales(p, x, rows, scale_x);
  scales(p, y, it.m, scale_y);
  if (task.begin == 0 && p.cost != Cost::dot) std::copy(scale_y, scale_y + it.m, const_cast<T*>(it.scale_y));
  it.scale_y = scale_y;
  std::vector<T> tame_x, tame_y, tame_scale;
  if (p.cost == Cost::cosine) {
    if (tame(y, it.m, p.dim, scale_y, tame_y)) scales(p, y, it.m, scale_y);
    if (tame(x, rows, p.dim, scale_x, tame_x)) {
      tame_scale.resize(task.end);
      scales(p, x, rows, tame_scale.data() + task.begin);
      it.scale_x = tame_scale.data();
    }
  }
  gemm_nt(rows, it.m, p.dim, x.data, x.stride, y.data, y.stride, out, it.m);
  return kernels<T>().cost(it, task.begin, task.end, x.data, x.stride, y.data, y.stride, p.dim,
                           const_cast<T*>(it.distance));
}

template <class T>
bool forward(const Problem& p, Poll poll) {
  const Batch<T> batch(p);
  std::vector<Task> blocks, items;
  for (int64_t b = 0; b < p.items; ++b) {
    const int64_t n = batch.n(b), m = batch.m(b);
    items.push_back({b, 0, 0, static_cast<double>(n) * m});
    if (batch.empty(b) || p.cost == Cost::given) continue;
    const int64_t pieces = std::max<int64_t>(1, (n + kBlock / 2) / kBlock), rows = ceil_div(n, pieces);
    for (int64_t i = 0; i < n; i += rows) {
      const int64_t end = std::min(n, i + rows);
      blocks.push_back({b, i, end, static_cast<double>(end - i) * m});
    }
  }
  longest_first(blocks);
  longest_first(items);

  Team team(p.threads, poll);
  const size_t block_rows = std::min<int64_t>(batch.most_n, 2 * kBlock);
  const Scratch scratch(team.threads(), {batch.converts(p.x) ? block_rows * p.dim * sizeof(T) : 0,
                                         batch.converts(p.y) ? batch.most_m * p.dim * sizeof(T) : 0,
                                         batch.most_m * sizeof(T), batch.scratch});
  std::vector<std::atomic<bool>> broken(p.items);
  double elements = 0;
  for (const Task& item : items) elements += item.work;
  team.run(blocks.size(), elements * p.dim, [&](int64_t k, int thread, Poll) {
    const Task& task = blocks[k];
    const bool finite = build_cost(batch, batch.item(task.item), task, scratch.get<T>(thread, 0),
                                   scratch.get<T>(thread, 1), scratch.get<T>(thread, 2));
    if (!finite) broken[task.item].store(true, std::memory_order_relaxed);
  });
  team.run(items.size(), elements * kSolveWork, [&](int64_t k, int thread, Poll stop) {
    const int64_t b = items[k].item;
    Item<T> it = batch.item(b);
    const int64_t used = it.n * it.m;
    for (T* matrix : {it.K, const_cast<T*>(it.distance)})
      if (matrix) std::fill_n(matrix + used, plan_stride(it.n, it.m) - used, T(0));
    if (batch.empty(b) || p.cost == Cost::given || p.cost == Cost::dot) {
      std::fill_n(at<T>(p.x.scale, p.x.row(b)), it.n, T(0));
      std::fill_n(at<T>(p.y.scale, p.y.row(b)), it.m, T(0));
    }
    if (batch.empty(b)) {
      for (T* vector : {it.f, it.mass_x}) std::fill_n(vector, it.n, T(0));
      for (T* vector : {it.g, it.mass_y}) std::fill_n(vector, it.m, T(0));
    } else if (broken[b].load(std::memory_order_relaxed) ||
               (p.cost == Cost::given && !build_cost<T>(batch, it, {b, 0, it.n, 0}, nullptr, nullptr, nullptr))) {
      kernels<T>().fail(it);
    } else {
      kernels<T>().solve(it, scratch.get<char>(thread, 3), stop);
    }
    static_cast<T*>(p.value)[b] = static_cast<T>(it.value);
    static_cast<T*>(p.linear)[b] = static_cast<T>(it.linear);
    static_cast<T*>(p.error)[b] = static_cast<T>(it.error);
    p.n_iter[b] = it.n_iter;
    for (const Side* side : {&p.x, &p.y})
      for (void* vector : {side->potential, side->mass, side->scale})
        zero_padding(*side, p.items, b, vector, sizeof(T));
  });
  for (const Side* side : {&p.x, &p.y})
    for (void* vector : {side->potential, side->mass, side->scale}) zero_all(*side, p.items, vector, sizeof(T));
  return !team.stopped();
}

// Backward ------------------------------------------------------------------------------------------------------------

// Vectors of an item that outlast its reverse pass: the diagonals, and what an implicit gradient is made of.
int64_t vectors_size(bool implicit, int64_t n, int64_t m) { return (implicit ? 3 : 1) * (n + padded(m)); }

template <class T>
Reverse<T> reverse_of(const Batch<T>& batch, const Gradients& g, int64_t b, T* vectors) {
  const int64_t n = batch.n(b), m = batch.m(b);
  Reverse<T> r{};
  r.value = g.value ? static_cast<const T*>(g.value)[b] : 0;
  r.linear = g.linear ? static_cast<const T*>(g.linear)[b] : 0;
  r.plan = at<T>(g.plan, batch.offsets[b]);
  r.a = at<T>(g.a, batch.p.x.row(b));
  r.b = at<T>(g.b, batch.p.y.row(b));
  r.diagonal_x = vectors;
  r.diagonal_y = vectors + n;
  vectors += n + padded(m);
  if (g.linear || g.plan) {
    r.term_x = vectors;
    r.term_y = vectors + n;
    r.lift_x = vectors + n + padded(m);
    r.lift_y = vectors + 2 * n + padded(m);
  }
  return r;
}

// Columns [begin, end) of the gradients by an item's points.
template <class T>
void points_gradient(const Batch<T>& batch, const Gradients& g, const Item<T>& it, const Reverse<T>& r,
                     const Task& task, const Scratch& scratch, int thread) {
  const Problem& p = batch.p;
  const int64_t b = task.item, columns = task.end - task.begin;
  T* const panel = scratch.get<T>(thread, 1);
  const Block<T> y = read_block(batch, p.y, b, 0, it.m, task.begin, columns, scratch.get<T>(thread, 3));
  const bool direct_x = p.x.points_type == scalar<T>(), direct_y = p.y.points_type == scalar<T>();
  const int64_t x_element = p.x.row(b) * p.dim + task.begin, y_element = p.y.row(b) * p.dim + task.begin;
  T* const dy = !g.y ? nullptr : direct_y ? at<T>(g.y, y_element) : scratch.get<T>(thread, 5);
  const int64_t dy_stride = direct_y ? p.dim : columns;
  if (dy) kernels<T>().scale_rows(y.data, y.stride, r.diagonal_y, it.m, columns, dy, dy_stride);
  for (int64_t i = 0; i < it.n; i += kPanel) {
    const int64_t rows = std::min(kPanel, it.n - i);
    const Block<T> x = read_block(batch, p.x, b, i, rows, task.begin, columns, scratch.get<T>(thread, 2));
    kernels<T>().panel(it, r, i, i + rows, panel);
    if (g.x) {
      T* const dx = direct_x ? at<T>(g.x, x_element + i * p.dim) : scratch.get<T>(thread, 4);
      const int64_t dx_stride = direct_x ? p.dim : columns;
      kernels<T>().scale_rows(x.data, x.stride, r.diagonal_x + i, rows, columns, dx, dx_stride);
      gemm_nn_add(rows, columns, it.m, panel, it.m, y.data, y.stride, dx, dx_stride);
      for (int64_t k = 0; !direct_x && k < rows; ++k)
        kernels<T>().write(p.x.points_type, dx + k * columns,
                           bytes_at(g.x, x_element + (i + k) * p.dim, p.x.points_type), columns);
    }
    if (dy) gemm_tn_add(it.m, columns, rows, panel, it.m, x.data, x.stride, dy, dy_stride);
  }
  for (int64_t k = 0; dy && !direct_y && k < it.m; ++k)
    kernels<T>().write(p.y.points_type, dy + k * columns, bytes_at(g.y, y_element + k * p.dim, p.y.points_type),
                       columns);
}

// Columns [begin, end) of an item's gradients set to one number: zero, or NaN.
template <class T>
void constant_gradient(const Batch<T>& batch, const Gradients& g, const Task& task, T number) {
  const Problem& p = batch.p;
  const std::vector<T> row(task.end - task.begin, number);
  for (const Side* side : {&p.x, &p.y}) {
    void* const out = side == &p.x ? g.x : g.y;
    for (int64_t i = 0; out && i < side->lengths[task.item]; ++i)
      kernels<T>().write(side->points_type, row.data(),
                         bytes_at(out, (side->row(task.item) + i) * p.dim + task.begin, side->points_type), row.size());
  }
}

// The gradient by a given cost, padding and all.
template <class T>
void given_gradient(const Batch<T>& batch, const Gradients& g, const Item<T>* it, const Reverse<T>& r, int64_t b,
                    T number, T* row) {
  const Problem& p = batch.p;
  const int64_t m = batch.m(b);
  std::fill_n(row, p.y.size, T(0));
  for (int64_t i = 0; i < p.x.size; ++i) {
    if (i < batch.n(b) && it)
      kernels<T>().panel(*it, r, i, i + 1, row);
    else
      std::fill_n(row, m, i < batch.n(b) ? number : T(0));
    kernels<T>().write(p.given_type, row, bytes_at(g.given, (b * p.x.size + i) * p.y.size, p.given_type), p.y.size);
  }
}

template <class T>
bool backward(const Problem& p, const Gradients& g, Poll poll) {
  const Batch<T> batch(p);
  const bool points = p.cost != Cost::given && (g.x || g.y), implicit = g.linear || g.plan;
  std::vector<Task> items, slices;
  std::vector<int64_t> vectors(1, 0);
  size_t widest = 0;
  for (int64_t b = 0; b < p.items; ++b) {
    const int64_t n = batch.n(b), m = batch.m(b);
    const double work = static_cast<double>(n) * m;
    items.push_back({b, 0, 0, work});
    vectors.push_back(vectors.back() + vectors_size(implicit, n, m));
    if (!points) continue;
    const int64_t pieces =
        std::max<int64_t>(1, std::min<int64_t>(std::llround(2 * work * p.dim / kSliceWork), p.dim / kSlice));
    const int64_t columns = ceil_div(ceil_div(p.dim, pieces), 64) * 64;
    for (int64_t d = 0; d < p.dim; d += columns) {
      const int64_t end = std::min(p.dim, d + columns);
      slices.push_back({b, d, end, work * (end - d)});
      widest = std::max<size_t>(widest, end - d);
    }
  }
  longest_first(items);
  longest_first(slices);

  Team team(p.threads, poll);
  const size_t rows = std::min(batch.most_n, kPanel), number = sizeof(T);
  const size_t x_part = batch.converts(p.x) ? rows * widest * number : 0;
  const size_t y_part = batch.converts(p.y) ? batch.most_m * widest * number : 0;
  const size_t panel = std::max<size_t>(points ? rows * batch.most_m : 0, p.y.size + kPlanGap) * number;
  const Scratch scratch(team.threads(), {batch.scratch, panel, x_part, y_part, x_part, y_part,
                                         (batch.most_n + padded(batch.most_m)) * number});
  const Buffer store(vectors.back() * number);

  const auto reverse_item = [&](int64_t b) { return reverse_of(batch, g, b, store.as<T>(vectors[b] * number)); };
  const auto broken = [&](int64_t b) { return !(batch.error(b) == batch.error(b)); };
  // Nothing flows into an item that the caller has masked out, be it NaN itself.
  const auto idle = [&](const Reverse<T>& r) { return r.value == 0 && !r.implicit(); };
  const auto active = [&](int64_t b, const Reverse<T>& r) { return !batch.empty(b) && !broken(b) && !idle(r); };
  const auto constant = [&](int64_t b, const Reverse<T>& r) {
    return !batch.empty(b) && broken(b) && !idle(r) ? static_cast<T>(NAN) : T(0);
  };

  struct Output {
    const Side* side;
    void* out;
    size_t row;
  };
  const Output outputs[] = {{&p.x, g.x, p.dim * bytes(p.x.points_type)},
                            {&p.y, g.y, p.dim * bytes(p.y.points_type)},
                            {&p.x, g.a, number},
                            {&p.y, g.b, number}};
  double elements = 0;
  for (const Task& item : items) elements += item.work;
  const double cleared = static_cast<double>(p.x.rows + p.y.rows) * p.dim / 16;
  team.run(items.size(), elements * (implicit ? kSolveWork : 8) + cleared, [&](int64_t k, int thread, Poll) {
    const int64_t b = items[k].item;
    const Item<T> it = batch.item(b);
    Reverse<T> r = reverse_item(b);
    const bool works = active(b, r);
    if (works) {
      if (!implicit) {
        r.term_x = scratch.get<T>(thread, 6);
        r.term_y = r.term_x + it.n;
      }
      std::fill_n(r.term_y, padded(it.m), T(0));
      if (implicit) std::fill_n(r.lift_y, padded(it.m), T(0));
      kernels<T>().reverse(it, r, scratch.get<char>(thread, 0));
    } else {
      if (r.a) std::fill_n(r.a, it.n, constant(b, r));
      if (r.b) std::fill_n(r.b, it.m, constant(b, r));
    }
    for (const auto& [side, out, row] : outputs) zero_padding(*side, p.items, b, out, row);
    if (g.given) given_gradient(batch, g, works ? &it : nullptr, r, b, constant(b, r), scratch.get<T>(thread, 1));
  });
  team.run(slices.size(), 2 * elements * p.dim, [&](int64_t k, int thread, Poll) {
    const Task& task = slices[k];
    const Reverse<T> r = reverse_item(task.item);
    if (active(task.item, r))
      points_gradient(batch, g, batch.item(task.item), r, task, scratch, thread);
    else
      constant_gradient(batch, g, task, constant(task.item, r));
  });
  for (const auto& [side, out, row] : outputs) zero_all(*side, p.items, out, row);
  return !team.stopped();
}

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

bool forward(const Problem& problem, Poll poll) {
  return problem.is_double ? forward<double>(problem, poll) : forward<float>(problem, poll);
}

bool backward(const Problem& problem, const Gradients& gradients, Poll poll) {
  return problem.is_double ? backward<double>(problem, gradients, poll) : backward<float>(problem, gradients, poll);
}

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
