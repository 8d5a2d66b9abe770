// The forward pass: costs by blocks of rows, then one solve for each item.
#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

constexpr int64_t kBlock = 256;  // rows of a block of the cost
constexpr int64_t kRows = 16;    // of which a block has a multiple: whole cache lines, for any D

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
bool tame(Block<T>& points, int64_t rows, int64_t dim, const T* scale, Buffer& store) {
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
  store = Buffer(rows * dim * sizeof(T));
  T* const out = store.as<T>();
  for (int64_t i = 0; i < rows; ++i) {
    const T length = largest(i);
    for (int64_t d = 0; d < dim; ++d)
      out[i * dim + d] = length > 0 ? points.data[i * points.stride + d] / length : T(0);
  }
  points = {out, dim};
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
  Buffer tame_x, tame_y;
  std::vector<T> tame_scale;
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
    const int64_t pieces = std::max<int64_t>(1, (n + kBlock / 2) / kBlock);
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

}  // namespace

bool forward(const Problem& problem, Poll poll) {
  return problem.is_double ? forward<double>(problem, poll) : forward<float>(problem, poll);
}

}  // namespace otalign::cpu
