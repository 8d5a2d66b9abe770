// The backward pass: what each item's reverse pass needs, then its gradients by slices of the embedding.
#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

constexpr int64_t kPanel = 128;                    // rows of a panel of its gradient: whole cache lines, for any D
constexpr int64_t kSlice = 256;                    // least columns of a slice of the gradient
constexpr double kSliceWork = 64.0 * 1024 * 1024;  // multiply-adds that make a slice

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
                     const Task& task, const Scratch& scratch, int thread, Poll poll) {
  const Problem& p = batch.p;
  const int64_t b = task.item, columns = task.end - task.begin;
  T* const panel = scratch.get<T>(thread, 1);
  Block<T> y = read_block(batch, p.y, b, 0, it.m, task.begin, columns, scratch.get<T>(thread, 3));
  const int64_t dx_stride = batch.product_stride(p.x, columns), dy_stride = batch.product_stride(p.y, columns);
  const T* const exponent_x = at<T>(p.x.exponent, p.x.row(b));
  const T* const exponent_y = at<T>(p.y.exponent, p.y.row(b));
  const bool wild_x = any_power(exponent_x, it.n), wild_y = any_power(exponent_y, it.m);
  const Buffer tame_x((wild_x ? std::min(kPanel, it.n) * columns : 0) * sizeof(T));
  const Buffer tame_y((wild_y ? it.m * columns : 0) * sizeof(T));
  if (wild_y) y = over_powers(y, it.m, columns, exponent_y, tame_y.as<T>(), columns);
  const int64_t x_element = p.x.row(b) * p.dim + task.begin, y_element = p.y.row(b) * p.dim + task.begin;
  const bool direct_x = batch.in_place(p.x, bytes_at(g.x, x_element, p.x.points_type), p.dim);
  const bool direct_y = batch.in_place(p.y, bytes_at(g.y, y_element, p.y.points_type), p.dim);
  T* const dy = !g.y ? nullptr : direct_y ? at<T>(g.y, y_element) : scratch.get<T>(thread, 5);
  if (dy) kernels<T>().scale_rows(y.data, y.stride, r.diagonal_y, it.m, columns, dy, dy_stride);
  for (int64_t i = 0; i < it.n && !poll(); i += kPanel) {
    const int64_t rows = std::min(kPanel, it.n - i);
    Block<T> x = read_block(batch, p.x, b, i, rows, task.begin, columns, scratch.get<T>(thread, 2));
    if (wild_x) x = over_powers(x, rows, columns, exponent_x + i, tame_x.as<T>(), columns);
    kernels<T>().panel(it, r, i, i + rows, panel);
    if (g.x) {
      T* const dx = direct_x ? at<T>(g.x, x_element + i * p.dim) : scratch.get<T>(thread, 4);
      kernels<T>().scale_rows(x.data, x.stride, r.diagonal_x + i, rows, columns, dx, dx_stride);
      gemm_nn_add(rows, columns, it.m, panel, it.m, y.data, y.stride, dx, dx_stride);
      if (wild_x) over_powers<T>({dx, dx_stride}, rows, columns, exponent_x + i, dx, dx_stride);
      for (int64_t k = 0; !direct_x && k < rows; ++k)
        kernels<T>().write(p.x.points_type, dx + k * dx_stride,
                           bytes_at(g.x, x_element + (i + k) * p.dim, p.x.points_type), columns);
    }
    if (dy) gemm_tn_add(it.m, columns, rows, panel, it.m, x.data, x.stride, dy, dy_stride);
  }
  if (dy && wild_y) over_powers<T>({dy, dy_stride}, it.m, columns, exponent_y, dy, dy_stride);
  for (int64_t k = 0; dy && !direct_y && k < it.m; ++k)
    kernels<T>().write(p.y.points_type, dy + k * dy_stride, bytes_at(g.y, y_element + k * p.dim, p.y.points_type),
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
                    T number, T* row, Poll poll) {
  const Problem& p = batch.p;
  const int64_t m = batch.m(b);
  std::fill_n(row, p.y.size, T(0));
  Pace pace(poll);
  for (int64_t i = 0; i < p.x.size && !pace.stops(p.y.size); ++i) {
    if (i < batch.n(b) && it)
      kernels<T>().panel(*it, r, i, i + 1, row);
    else
      std::fill_n(row, m, i < batch.n(b) ? number : T(0));
    kernels<T>().write(p.given_type, row, bytes_at(g.given, (b * p.x.size + i) * p.y.size, p.given_type), p.y.size);
  }
}

template <class T>
void check_gradients(const Batch<T>& batch, const Gradients& g) {
  const Problem& p = batch.p;
  need_if_any(g.value, p.items, sizeof(T), "grad_value");
  need_if_any(g.linear, p.items, sizeof(T), "grad_linear");
  need_if_any(g.plan, batch.total, sizeof(T), "grad_plan");
  need_if_any(g.a, p.x.rows, sizeof(T), "gradient by a");
  need_if_any(g.b, p.y.rows, sizeof(T), "gradient by b");
  if (p.cost == Cost::given) {
    check(!g.x && !g.y, "wanted: a given cost has no points");
    need_if_any(g.given, product(product(p.items, p.x.size), p.y.size), bytes(p.given_type), "gradient by C");
  } else {
    check(!g.given, "wanted: there is no given cost");
    need_if_any(g.x, product(p.x.rows, p.dim), bytes(p.x.points_type), "gradient by x");
    need_if_any(g.y, product(p.y.rows, p.dim), bytes(p.y.points_type), "gradient by y");
  }
}

template <class T>
bool backward(const Problem& problem, const Gradients& g, Poll poll) {
  const Batch<T> batch(problem);
  const Problem& p = batch.p;
  check_gradients(batch, g);
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
  const size_t x_block = rows * batch.product_stride(p.x, widest) * number;
  const size_t y_block = batch.most_m * batch.product_stride(p.y, widest) * number;
  const size_t panel = std::max<size_t>(points ? rows * batch.most_m : 0, p.y.size + kPlanGap) * number;
  const Scratch scratch(
      team.threads(), {batch.scratch, panel, batch.may_copy(p.x) ? x_block : 0, batch.may_copy(p.y) ? y_block : 0,
                       batch.may_copy_gradient(p.x, g.x) ? x_block : 0, batch.may_copy_gradient(p.y, g.y) ? y_block : 0,
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
  team.run(items.size(), elements * (implicit ? kSolveWork : 8) + cleared, [&](int64_t k, int thread, Poll stop) {
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
      kernels<T>().reverse(it, r, scratch.get<char>(thread, 0), stop);
    } else {
      if (r.a) std::fill_n(r.a, it.n, constant(b, r));
      if (r.b) std::fill_n(r.b, it.m, constant(b, r));
    }
    for (const auto& [side, out, row] : outputs) zero_padding(*side, p.items, b, out, row);
    if (g.given) given_gradient(batch, g, works ? &it : nullptr, r, b, constant(b, r), scratch.get<T>(thread, 1), stop);
  });
  team.run(slices.size(), 2 * elements * p.dim, [&](int64_t k, int thread, Poll stop) {
    const Task& task = slices[k];
    const Reverse<T> r = reverse_item(task.item);
    if (active(task.item, r))
      points_gradient(batch, g, batch.item(task.item), r, task, scratch, thread, stop);
    else
      constant_gradient(batch, g, task, constant(task.item, r));
  });
  for (const auto& [side, out, row] : outputs) zero_all(*side, p.items, out, row);
  return !team.stopped();
}

}  // namespace

bool backward(const Problem& problem, const Gradients& gradients, Poll poll) {
  return problem.is_double ? backward<double>(problem, gradients, poll) : backward<float>(problem, gradients, poll);
}

}  // namespace otalign::cpu
