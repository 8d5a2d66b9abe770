// The forward pass: costs in tasks of some rows, then one solve for each item.
#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

constexpr int64_t kCostRows = 256;       // rows of a task of the cost, about
constexpr int64_t kRowsMultiple = 16;    // a task has a multiple of so many rows: whole cache lines, for any D
constexpr int64_t kCostBlock = 1 << 24;  // multiply-adds between two polls after the product

// Norms from kShortest to 1 / kShortest have squares and products of two that neither overflow nor underflow.
template <class T>
constexpr T kShortest = sizeof(T) == 4 ? T(1e-15) : T(1e-140);

// The exponent e such that the largest number of a row over 2^e is in [1/2, 1); 0 if all are zero or any is not finite.
template <class T>
int exponent_of(const T* row, int64_t dim) {
  T largest = 0;
  bool finite = true;
  for (int64_t d = 0; d < dim; ++d) {
    finite = finite && std::isfinite(row[d]);
    largest = std::max(largest, std::abs(row[d]));
  }
  int exponent = 0;
  if (finite && largest > 0) std::frexp(largest, &exponent);
  return exponent;
}

// Writes what the products of `rows` points are scaled with: reciprocal norms for the cosine, squared norms for the
// distances; `out` and `exponent` are (rows,). The cosine does not depend on lengths, but the squares of very long or
// very short points leave the range of T: such points are taken over 2^exponent, here and wherever else they are used.
// Returns whether there are any.
template <class T>
bool scales(const Problem& p, PointsView<T> points, int64_t rows, T* out, T* exponent) {
  if (p.cost == Cost::dot) return false;
  kernels<T>().squares(points.data, rows, p.dim, points.stride, out);
  if (p.cost != Cost::cosine) return false;
  constexpr T least = kShortest<T> * kShortest<T>;
  bool rescale = false;
  for (int64_t i = 0; i < rows; ++i) {
    exponent[i] = 0;
    if (out[i] >= least && out[i] <= 1 / least) {
      out[i] = 1 / std::sqrt(out[i]);
      continue;
    }
    exponent[i] = static_cast<T>(exponent_of(points.data + i * points.stride, p.dim));
    rescale = rescale || exponent[i] != 0;
    T square = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      const T z = std::scalbn(points.data[i * points.stride + d], -power(exponent[i]));
      square += z * z;
    }
    out[i] = square == 0 ? T(0) : square < T(HUGE_VAL) ? 1 / std::sqrt(square) : static_cast<T>(NAN);
  }
  return rescale;
}

// Rows [begin, end) of an item's cost; false if any is not finite. Buffers: x (rows, D), y (m, D), scale_y and
// exponent_y (m,).
template <class T>
bool build_cost(const Batch<T>& batch, Item<T> it, const Task& task, T* x_buffer, T* y_buffer, T* scale_y,
                T* exponent_y, Poll poll) {
  const Problem& p = batch.p;
  const int64_t rows = task.end - task.begin, b = task.item;
  T* const out = it.K + task.begin * it.m;
  if (p.cost == Cost::given) {
    Pace pace(poll);
    for (int64_t i = 0; i < rows && !pace.stops(it.m); ++i) {
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
  PointsView<T> x = read_points(batch, p.x, b, task.begin, rows, 0, p.dim, x_buffer);
  PointsView<T> y = read_points(batch, p.y, b, 0, it.m, 0, p.dim, y_buffer);
  T* const exponent_x = at<T>(p.x.exponent, p.x.row(b) + task.begin);
  if (poll()) return true;
  const bool rescale_x = scales(p, x, rows, const_cast<T*>(it.scale_x) + task.begin, exponent_x);
  const bool rescale_y = scales(p, y, it.m, scale_y, exponent_y);
  if (task.begin == 0 && p.cost != Cost::dot) std::copy_n(scale_y, it.m, const_cast<T*>(it.scale_y));
  if (task.begin == 0 && p.cost == Cost::cosine) std::copy_n(exponent_y, it.m, at<T>(p.y.exponent, p.y.row(b)));
  it.scale_y = scale_y;
  const Buffer rescaled_x((rescale_x ? rows * p.dim : 0) * sizeof(T)),
      rescaled_y((rescale_y ? it.m * p.dim : 0) * sizeof(T));
  if (rescale_x) x = over_powers(x, rows, p.dim, exponent_x, rescaled_x.as<T>(), p.dim);
  if (rescale_y) y = over_powers(y, it.m, p.dim, exponent_y, rescaled_y.as<T>(), p.dim);
  if (poll()) return true;
  gemm_nt(rows, it.m, p.dim, x.data, x.stride, y.data, y.stride, out, it.m);
  // Where the products have lost their digits, each distance takes as long as its product did, or longer.
  const int64_t block = std::max<int64_t>(1, kCostBlock / std::max<int64_t>(1, it.m * p.dim));
  bool finite = true;
  for (int64_t i = 0; i < rows && !poll(); i += block)
    finite &= kernels<T>().cost(it, task.begin + i, task.begin + std::min(rows, i + block), x.data + i * x.stride,
                                x.stride, y.data, y.stride, p.dim, const_cast<T*>(it.distance));
  return finite;
}

// The whole of an item's given cost, by a crew; false if any is not finite. Helpers may not call the poll of the
// leader, and call that of their own.
template <class T>
bool build_given(const Batch<T>& batch, const Item<T>& it, int64_t b, Poll poll, Poll of_helpers, Crew crew) {
  struct Job {
    const Batch<T>& batch;
    const Item<T>& it;
    int64_t item, rows;
    Poll poll, of_helpers;
    std::thread::id leader;
    std::atomic<bool> finite{true};
  };
  const Chunks chunks = chunks_of(it.n, it.m);
  Job job{batch, it, b, chunks.rows, poll, of_helpers, std::this_thread::get_id()};
  const auto build = [](void* context, int64_t chunk) {
    Job& job = *static_cast<Job*>(context);
    const int64_t begin = chunk * job.rows, end = std::min(job.it.n, begin + job.rows);
    const Poll poll = std::this_thread::get_id() == job.leader ? job.poll : job.of_helpers;
    if (!build_cost<T>(job.batch, job.it, {job.item, begin, end, 0}, nullptr, nullptr, nullptr, nullptr, poll))
      job.finite.store(false, std::memory_order_relaxed);
  };
  crew.run(chunks.count, build, &job);
  return job.finite;
}

// The tasks of the cost: rows of each item, longest first.
template <class T>
std::vector<Task> cost_tasks(const Batch<T>& batch) {
  const Problem& p = batch.p;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < p.items; ++b) {
    if (batch.empty(b) || p.cost == Cost::given) continue;
    const int64_t n = batch.n(b), m = batch.m(b);
    const int64_t heavy = std::llround(static_cast<double>(n) * m * p.dim / most_work());
    const int64_t pieces = std::max<int64_t>({1, (n + kCostRows / 2) / kCostRows, std::min(n, heavy)});
    const int64_t rows = ceil_div(ceil_div(n, pieces), kRowsMultiple) * kRowsMultiple;
    for (int64_t i = 0; i < n; i += rows) {
      const int64_t end = std::min(n, i + rows);
      tasks.push_back({b, i, end, static_cast<double>(end - i) * m});
    }
  }
  longest_first(tasks);
  return tasks;
}

// Zeroes those outputs of an item that neither its cost nor its solve writes.
template <class T>
void zero_unwritten(const Batch<T>& batch, const Item<T>& it, int64_t b) {
  const Problem& p = batch.p;
  const int64_t used = it.n * it.m;
  for (T* matrix : {it.K, const_cast<T*>(it.distance)})
    if (matrix) std::fill_n(matrix + used, plan_stride(it.n, it.m) - used, T(0));
  if (batch.empty(b) || p.cost == Cost::given || p.cost == Cost::dot) {
    std::fill_n(at<T>(p.x.scale, p.x.row(b)), it.n, T(0));
    std::fill_n(at<T>(p.y.scale, p.y.row(b)), it.m, T(0));
  }
  if (batch.empty(b) || p.cost != Cost::cosine) {
    std::fill_n(at<T>(p.x.exponent, p.x.row(b)), it.n, T(0));
    std::fill_n(at<T>(p.y.exponent, p.y.row(b)), it.m, T(0));
  }
  if (!batch.empty(b)) return;
  for (T* vector : {it.f, it.mass_x}) std::fill_n(vector, it.n, T(0));
  for (T* vector : {it.g, it.mass_y}) std::fill_n(vector, it.m, T(0));
}

template <class T>
bool forward(const Problem& problem, Poll poll) {
  const Batch<T> batch(problem);
  const Problem& p = batch.p;
  for (const Span<void>* numbers : {&p.value, &p.linear}) need(*numbers, p.items, sizeof(T), "value");
  need(p.n_iter, p.items, sizeof(int32_t), "n_iter");
  const std::vector<Task> costs = cost_tasks(batch);
  std::vector<Task> items;
  double elements = 0;  // of all costs
  for (int64_t b = 0; b < p.items; ++b) {
    items.push_back({b, 0, 0, static_cast<double>(batch.n(b)) * batch.m(b)});
    elements += items.back().work;
  }
  longest_first(items);

  Team team(p.threads, poll);
  const size_t rows = std::min<int64_t>(batch.most_n, 2 * kCostRows);
  enum Part { kX, kY, kNormsOfY, kSolve };
  const Scratch scratch(team.threads(), {batch.may_copy(p.x) ? rows * p.dim * sizeof(T) : 0,
                                         batch.may_copy(p.y) ? batch.most_m * p.dim * sizeof(T) : 0,
                                         2 * batch.most_m * sizeof(T), batch.scratch});
  std::vector<std::atomic<bool>> broken(p.items);
  team.run(costs.size(), elements * p.dim, [&](int64_t k, int thread, Poll stop) {
    const Task& task = costs[k];
    T* const norms = scratch.get<T>(thread, kNormsOfY);
    if (!build_cost(batch, batch.item(task.item), task, scratch.get<T>(thread, kX), scratch.get<T>(thread, kY), norms,
                    norms + batch.most_m, stop))
      broken[task.item].store(true, std::memory_order_relaxed);
  });
  const auto parts = [&](int64_t k) {
    const int64_t b = items[k].item;
    const Chunks chunks = chunks_of(batch.n(b), batch.m(b));
    return Parts{chunks.count, chunks.rows * batch.m(b)};
  };
  team.share(items.size(), elements * kSolveWork, parts, [&](int64_t k, int thread, Poll stop, Crew crew) {
    const int64_t b = items[k].item;
    Item<T> it = batch.item(b);
    zero_unwritten(batch, it, b);
    if (!batch.empty(b)) {
      const bool finite = p.cost == Cost::given ? build_given<T>(batch, it, b, stop, team.stopping(), crew)
                                                : !broken[b].load(std::memory_order_relaxed);
      if (finite)
        kernels<T>().solve(it, scratch.get<char>(thread, kSolve), stop, crew);
      else
        kernels<T>().fail(it, stop);
      if (it.starved) throw std::bad_alloc();
    }
    static_cast<T*>(p.value)[b] = static_cast<T>(it.value);
    static_cast<T*>(p.linear)[b] = static_cast<T>(it.linear);
    static_cast<T*>(p.error)[b] = static_cast<T>(it.error);
    p.n_iter[b] = it.n_iter;
    for (const Side* side : {&p.x, &p.y})
      for (void* vector : {side->potential.data, side->mass.data, side->scale.data, side->exponent.data})
        zero_padding(*side, p.items, b, vector, sizeof(T));
  });
  for (const Side* side : {&p.x, &p.y})
    for (void* vector : {side->potential.data, side->mass.data, side->scale.data, side->exponent.data})
      zero_all(*side, p.items, vector, sizeof(T));
  return !team.stopped();
}

}  // namespace

bool forward(const Problem& problem, Poll poll) {
  return problem.is_double ? forward<double>(problem, poll) : forward<float>(problem, poll);
}

}  // namespace otalign::cpu
