// The backward pass: the reverse pass of each item, then the gradients by its points in slices of their columns.
#include "batch.h"
#include "engine.h"

namespace otalign::cpu {
namespace {

constexpr int64_t kPanel = 128;                    // most rows of a panel of the gradient
constexpr int64_t kRowsMultiple = 16;              // of a panel: whole cache lines, for any D
constexpr int64_t kSlice = 256;                    // least columns of a slice of the gradient
constexpr double kSliceWork = 64.0 * 1024 * 1024;  // multiply-adds of a slice, about

// Parts of a thread's scratch memory.
enum Part { kReversePass, kPanelPart, kX, kY, kGradientX, kGradientY, kTerms };

// Elements of an item's vectors that the gradients by points read after the reverse pass: the diagonals and, for an
// implicit gradient, terms and adjoints.
int64_t vectors_size(bool implicit, int64_t n, int64_t m) { return (implicit ? 3 : 1) * (n + padded(m)); }

// The reverse pass of item b; `vectors` has vectors_size elements.
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
    r.adjoint_x = vectors + n + padded(m);
    r.adjoint_y = vectors + 2 * n + padded(m);
  }
  return r;
}

// Rows of a panel whose products end soon.
int64_t panel_rows(int64_t m, int64_t columns) {
  const double rows = most_work() / (static_cast<double>(m) * columns);
  return std::clamp<int64_t>(std::llround(std::min<double>(rows, kPanel)) / kRowsMultiple * kRowsMultiple,
                             kRowsMultiple, kPanel);
}

// Columns [begin, end) of the gradients by an item's points.
template <class T>
void points_gradient(const Batch<T>& batch, const Gradients& g, const Item<T>& it, const Reverse<T>& r,
                     const Task& task, const Scratch& scratch, int thread, Poll poll) {
  const Problem& p = batch.p;
  const int64_t b = task.item, columns = task.end - task.begin;
  T* const panel = scratch.get<T>(thread, kPanelPart);
  PointsView<T> y = read_points(batch, p.y, b, 0, it.m, task.begin, columns, scratch.get<T>(thread, kY));
  const int64_t dx_stride = batch.product_stride(p.x, columns), dy_stride = batch.product_stride(p.y, columns);
  const T* const exponent_x = at<T>(p.x.exponent, p.x.row(b));
  const T* const exponent_y = at<T>(p.y.exponent, p.y.row(b));
  const bool rescale_x = any_power(exponent_x, it.n), rescale_y = any_power(exponent_y, it.m);
  const Buffer rescaled_x((rescale_x ? std::min(kPanel, it.n) * columns : 0) * sizeof(T));
  const Buffer rescaled_y((rescale_y ? it.m * columns : 0) * sizeof(T));
  if (rescale_y) y = over_powers(y, it.m, columns, exponent_y, rescaled_y.as<T>(), columns);
  const int64_t x_element = p.x.row(b) * p.dim + task.begin, y_element = p.y.row(b) * p.dim + task.begin;
  const bool direct_x = batch.in_place(p.x, bytes_at(g.x, x_element, p.x.points_type), p.dim);
  const bool direct_y = batch.in_place(p.y, bytes_at(g.y, y_element, p.y.points_type), p.dim);
  T* const dy = !g.y ? nullptr : direct_y ? at<T>(g.y, y_element) : scratch.get<T>(thread, kGradientY);
  if (dy) kernels<T>().scale_rows(y.data, y.stride, r.diagonal_y, it.m, columns, dy, dy_stride);
  const int64_t most_rows = panel_rows(it.m, columns);
  for (int64_t i = 0; i < it.n && !poll(); i += most_rows) {
    const int64_t rows = std::min(most_rows, it.n - i);
    PointsView<T> x = read_points(batch, p.x, b, i, rows, task.begin, columns, scratch.get<T>(thread, kX));
    if (rescale_x) x = over_powers(x, rows, columns, exponent_x + i, rescaled_x.as<T>(), columns);
    kernels<T>().panel(it, r, i, i + rows, panel);
    if (g.x) {
      T* const dx = direct_x ? at<T>(g.x, x_element + i * p.dim) : scratch.get<T>(thread, kGradientX);
      kernels<T>().scale_rows(x.data, x.stride, r.diagonal_x + i, rows, columns, dx, dx_stride);
      gemm_nn_add(rows, columns, it.m, panel, it.m, y.data, y.stride, dx, dx_stride);
      if (rescale_x) over_powers<T>({dx, dx_stride}, rows, columns, exponent_x + i, dx, dx_stride);
      for (int64_t k = 0; !direct_x && k < rows; ++k)
        kernels<T>().write(p.x.points_type, dx + k * dx_stride,
                           bytes_at(g.x, x_element + (i + k) * p.dim, p.x.points_type), columns);
    }
    if (dy) gemm_tn_add(it.m, columns, rows, panel, it.m, x.data, x.stride, dy, dy_stride);
  }
  if (dy && rescale_y) over_powers<T>({dy, dy_stride}, it.m, columns, exponent_y, dy, dy_stride);
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

// What the gradients of an item are: zero, since the item is empty or no gradient flows into it; NaN, since it has no
// finite solution; or to be computed. An item that the caller has masked out gets zeros even if its solution is NaN.
enum class Action { skip, nan, compute };

template <class T>
Action action_of(const Batch<T>& batch, int64_t b, const Reverse<T>& r) {
  if (batch.empty(b) || (r.value == 0 && !r.implicit())) return Action::skip;
  return batch.error(b) == batch.error(b) ? Action::compute : Action::nan;
}
template <class T>
T constant_of(Action action) {
  return action == Action::nan ? static_cast<T>(NAN) : T(0);
}

// The gradient by a given cost, and zeros for its padding. `row` has room for one row of the cost.
template <class T>
void given_gradient(const Batch<T>& batch, const Gradients& g, const Item<T>& it, const Reverse<T>& r, Action action,
                    int64_t b, T* row, Poll poll) {
  const Problem& p = batch.p;
  std::fill_n(row, p.y.size, T(0));
  Pace pace(poll);
  for (int64_t i = 0; i < p.x.size && !pace.stops(p.y.size); ++i) {
    if (i < it.n && action == Action::compute)
      kernels<T>().panel(it, r, i, i + 1, row);
    else
      std::fill_n(row, it.m, i < it.n ? constant_of<T>(action) : T(0));
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

// The tasks of a backward pass, and where each item's vectors are.
struct Tasks {
  std::vector<Task> items, slices;  // of all items; of the columns of their gradients by points
  std::vector<int64_t> vectors{0};  // (B + 1,) first element of each item's vectors, then the number of all elements
  int64_t widest = 0;               // most columns of a slice
  double elements = 0;              // of all costs
};

template <class T>
Tasks plan_tasks(const Batch<T>& batch, bool points, bool implicit) {
  const Problem& p = batch.p;
  Tasks tasks;
  for (int64_t b = 0; b < p.items; ++b) {
    const int64_t n = batch.n(b), m = batch.m(b);
    const double work = static_cast<double>(n) * m;
    tasks.items.push_back({b, 0, 0, work});
    tasks.elements += work;
    tasks.vectors.push_back(tasks.vectors.back() + vectors_size(implicit, n, m));
    if (!points) continue;
    const int64_t pieces =
        std::max<int64_t>(1, std::min<int64_t>(std::llround(2 * work * p.dim / kSliceWork), p.dim / kSlice));
    const int64_t columns = ceil_div(ceil_div(p.dim, pieces), 64) * 64;
    for (int64_t d = 0; d < p.dim; d += columns) {
      const int64_t end = std::min(p.dim, d + columns);
      tasks.slices.push_back({b, d, end, work * (end - d)});
      tasks.widest = std::max(tasks.widest, end - d);
    }
  }
  longest_first(tasks.items);
  longest_first(tasks.slices);
  return tasks;
}

// A tensor with one row for each row of a side.
struct Output {
  const Side* side;
  void* data;  // (side->rows, row bytes), or null
  size_t row;
};

template <class T>
class BackwardPass {
 public:
  BackwardPass(const Batch<T>& batch, const Gradients& gradients, Poll poll)
      : batch(batch),
        g(gradients),
        points(p.cost != Cost::given && (g.x || g.y)),
        implicit(g.linear || g.plan),
        tasks(plan_tasks(batch, points, implicit)),
        team(p.threads, poll),
        store(tasks.vectors.back() * sizeof(T)),
        scratch(team.threads(), parts()) {}

  bool run() {
    reverse_items();
    points_gradients();
    for (const Output& output : outputs) zero_all(*output.side, p.items, output.data, output.row);
    return !team.stopped();
  }

 private:
  // Bytes of each Part.
  std::vector<size_t> parts() const {
    const size_t rows = std::min(batch.most_n, kPanel), number = sizeof(T);
    const size_t x = rows * batch.product_stride(p.x, tasks.widest) * number;
    const size_t y = batch.most_m * batch.product_stride(p.y, tasks.widest) * number;
    const size_t row_of_cost = p.cost == Cost::given && p.items > 0 ? p.y.size + kPlanGap : 0;
    const size_t panel = std::max<size_t>(points ? rows * batch.most_m : 0, row_of_cost) * number;
    return {batch.scratch,
            panel,
            batch.may_copy(p.x) ? x : 0,
            batch.may_copy(p.y) ? y : 0,
            batch.may_copy_gradient(p.x, g.x) ? x : 0,
            batch.may_copy_gradient(p.y, g.y) ? y : 0,
            (batch.most_n + padded(batch.most_m)) * number};
  }

  Reverse<T> reverse(int64_t b) const {
    return reverse_of(batch, g, b, store.template as<T>(tasks.vectors[b] * sizeof(T)));
  }

  // The reverse pass of each item, with the gradients by its weights and by a given cost.
  void reverse_items() {
    const double cleared = static_cast<double>(p.x.rows + p.y.rows) * p.dim / 16;
    const double work = tasks.elements * (implicit ? kSolveWork : 8) + cleared;
    team.run(tasks.items.size(), work, [&](int64_t k, int thread, Poll stop) {
      const int64_t b = tasks.items[k].item;
      const Item<T> it = batch.item(b);
      Reverse<T> r = reverse(b);
      const Action action = action_of(batch, b, r);
      if (action == Action::compute) {
        if (!implicit) {
          r.term_x = scratch.template get<T>(thread, kTerms);
          r.term_y = r.term_x + it.n;
        }
        std::fill_n(r.term_y, padded(it.m), T(0));
        if (implicit) std::fill_n(r.adjoint_y, padded(it.m), T(0));
        kernels<T>().reverse(it, r, scratch.template get<char>(thread, kReversePass), stop);
      } else {
        if (r.a) std::fill_n(r.a, it.n, constant_of<T>(action));
        if (r.b) std::fill_n(r.b, it.m, constant_of<T>(action));
      }
      for (const Output& output : outputs) zero_padding(*output.side, p.items, b, output.data, output.row);
      if (g.given) given_gradient(batch, g, it, r, action, b, scratch.template get<T>(thread, kPanelPart), stop);
    });
  }

  // The gradients by the points, in slices of columns.
  void points_gradients() {
    team.run(tasks.slices.size(), 2 * tasks.elements * p.dim, [&](int64_t k, int thread, Poll stop) {
      const Task& task = tasks.slices[k];
      const Reverse<T> r = reverse(task.item);
      const Action action = action_of(batch, task.item, r);
      if (action == Action::compute)
        points_gradient(batch, g, batch.item(task.item), r, task, scratch, thread, stop);
      else
        constant_gradient(batch, g, task, constant_of<T>(action));
    });
  }

  const Batch<T>& batch;
  const Problem& p = batch.p;
  const Gradients& g;
  const bool points, implicit;  // gradients by points are wanted; the implicit system has to be solved
  const Tasks tasks;
  Team team;
  const Buffer store;  // the items' vectors, at tasks.vectors
  const Scratch scratch;
  const Output outputs[4] = {{&p.x, g.x, p.dim * bytes(p.x.points_type)},
                             {&p.y, g.y, p.dim * bytes(p.y.points_type)},
                             {&p.x, g.a, sizeof(T)},
                             {&p.y, g.b, sizeof(T)}};
};

template <class T>
bool backward(const Problem& problem, const Gradients& gradients, Poll poll) {
  const Batch<T> batch(problem);
  check_gradients(batch, gradients);
  return BackwardPass<T>(batch, gradients, poll).run();
}

}  // namespace

bool backward(const Problem& problem, const Gradients& gradients, Poll poll) {
  return problem.is_double ? backward<double>(problem, gradients, poll) : backward<float>(problem, gradients, poll);
}

}  // namespace otalign::cpu
