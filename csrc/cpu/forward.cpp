// The forward pass: costs by blocks of rows, then one solve for each item.
#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

constexpr int64_t kBlock = 256;  // rows of a block of the cost
constexpr int64_t kRows = 16;    // of which a block has a multiple: whole cache lines, for any D
constexpr double kBlockWork =
    4.0 * (1ll << 30);  // most multiply-adds of a block, since a product cannot be interrupted

// Norms between whose reciprocals nothing over- or underflows: not their squares, nor the products of two.
template <class T>
constexpr T kShortest = sizeof(T) == 4 ? T(1e-15) : T(1e-140);

// The exponent that brings a row's largest number to between 1/2 and 1; 0 for rows of zeros, or not of numbers.
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

// What the products of `rows` points are scaled with: reciprocal norms for the cosine, squared norms for the distances.
// The cosine does not know lengths, but its squares do: points too long or too short for them are over 2^exponent here
// and wherever else they are used. Returns whether there are any.
template <class T>
bool scales(const Problem& p, Block<T> points, int64_t rows, T* out, T* exponent) {
  if (p.cost == Cost::dot) return false;
  kernels<T>().squares(points.data, rows, p.dim, points.stride, out);
  if (p.cost != Cost::cosine) return false;
  constexpr T least = kShortest<T> * kShortest<T>;
  bool wild = false;
  for (int64_t i = 0; i < rows; ++i) {
    exponent[i] = 0;
    if (out[i] >= least && out[i] <= 1 / least) {
      out[i] = 1 / std::sqrt(out[i]);
      continue;
    }
    exponent[i] = static_cast<T>(exponent_of(points.data + i * points.stride, p.dim));
    wild = wild || exponent[i] != 0;
    T square = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      const T z = std::scalbn(points.data[i * points.stride + d], -power(exponent[i]));
      square += z * z;
    }
    out[i] = square == 0 ? T(0) : square < T(HUGE_VAL) ? 1 / std::sqrt(square) : static_cast<T>(NAN);
  }
  return wild;
}

// Rows [begin, end) of an item's cost; false if any is not finite.
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
  Block<T> x = read_block(batch, p.x, b, task.begin, rows, 0, p.dim, x_buffer);
  Block<T> y = read_block(batch, p.y, b, 0, it.m, 0, p.dim, y_buffer);
  T* const exponent_x = at<T>(p.x.exponent, p.x.row(b) + task.begin);
  const bool wild_x = scales(p, x, rows, const_cast<T*>(it.scale_x) + task.begin, exponent_x);
  const bool wild_y = scales(p, y, it.m, scale_y, exponent_y);
  if (task.begin == 0 && p.cost != Cost::dot) std::copy_n(scale_y, it.m, const_cast<T*>(it.scale_y));
  if (task.begin == 0 && p.cost == Cost::cosine) std::copy_n(exponent_y, it.m, at<T>(p.y.exponent, p.y.row(b)));
  it.scale_y = scale_y;
  const Buffer tame_x((wild_x ? rows * p.dim : 0) * sizeof(T)), tame_y((wild_y ? it.m * p.dim : 0) * sizeof(T));
  if (wild_x) x = over_powers(x, rows, p.dim, exponent_x, tame_x.as<T>(), p.dim);
  if (wild_y) y = over_powers(y, it.m, p.dim, exponent_y, tame_y.as<T>(), p.dim);
  gemm_nt(rows, it.m, p.dim, x.data, x.stride, y.data, y.stride, out, it.m);
  return kernels<T>().cost(it, task.begin, task.end, x.data, x.stride, y.data, y.stride, p.dim,
                           const_cast<T*>(it.distance));
}

template <class T>
bool forward(const Problem& problem, Poll poll) {
  const Batch<T> batch(problem);
  const Problem& p = batch.p;
  for (const Span<void>* numbers : {&p.value, &p.linear}) need(*numbers, p.items, sizeof(T), "value");
  need(p.n_iter, p.items, sizeof(int32_t), "n_iter");
  std::vector<Task> blocks, items;
  for (int64_t b = 0; b < p.items; ++b) {
    const int64_t n = batch.n(b), m = batch.m(b);
    items.push_back({b, 0, 0, static_cast<double>(n) * m});
    if (batch.empty(b) || p.cost == Cost::given) continue;
    const int64_t heavy = std::llround(static_cast<double>(n) * m * p.dim / kBlockWork);
    const int64_t pieces = std::max<int64_t>({1, (n + kBlock / 2) / kBlock, std::min(n, heavy)});
    const int64_t rows = ceil_div(ceil_div(n, pieces), kRows) * kRows;
    for (int64_t i = 0; i < n; i += rows) {
      const int64_t end = std::min(n, i + rows);
      blocks.push_back({b, i, end, static_cast<double>(end - i) * m});
    }
  }
  longest_first(blocks);
  longest_first(items);

  Team team(p.threads, poll);
  const size_t block_rows = std::min<int64_t>(batch.most_n, 2 * kBlock);
  const Scratch scratch(team.threads(), {batch.may_copy(p.x) ? block_rows * p.dim * sizeof(T) : 0,
                                         batch.may_copy(p.y) ? batch.most_m * p.dim * sizeof(T) : 0,
                                         2 * batch.most_m * sizeof(T), batch.scratch});
  std::vector<std::atomic<bool>> broken(p.items);
  double elements = 0;
  for (const Task& item : items) elements += item.work;
  team.run(blocks.size(), elements * p.dim, [&](int64_t k, int thread, Poll stop) {
    const Task& task = blocks[k];
    const bool finite =
        build_cost(batch, batch.item(task.item), task, scratch.get<T>(thread, 0), scratch.get<T>(thread, 1),
                   scratch.get<T>(thread, 2), scratch.get<T>(thread, 2) + batch.most_m, stop);
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
    if (batch.empty(b) || p.cost != Cost::cosine) {
      std::fill_n(at<T>(p.x.exponent, p.x.row(b)), it.n, T(0));
      std::fill_n(at<T>(p.y.exponent, p.y.row(b)), it.m, T(0));
    }
    if (batch.empty(b)) {
      for (T* vector : {it.f, it.mass_x}) std::fill_n(vector, it.n, T(0));
      for (T* vector : {it.g, it.mass_y}) std::fill_n(vector, it.m, T(0));
    } else if (broken[b].load(std::memory_order_relaxed) ||
               (p.cost == Cost::given &&
                !build_cost<T>(batch, it, {b, 0, it.n, 0}, nullptr, nullptr, nullptr, nullptr, stop))) {
      kernels<T>().fail(it);
    } else {
      kernels<T>().solve(it, scratch.get<char>(thread, 3), stop);
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
