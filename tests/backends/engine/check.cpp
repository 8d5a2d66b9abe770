// The CPU engine without Python: compared with the definition in double, and bit by bit for different numbers of
// threads, addresses and layouts.
//
// It is for processors that the tests in Python do not reach, such as an emulated one. The products are the engine's
// own, or ones whose rounding depends on the addresses of their matrices.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cpu/blas.h"
#include "cpu/engine.h"
#include "cpu/isa.h"

using namespace otalign;

namespace {

int failures = 0;

void expect(bool holds, const char* what, const char* detail) {
  if (holds) return;
  std::printf("FAILED %s (%s)\n", what, detail);
  ++failures;
}

// A product with a small error that depends on where in a cache line its matrices start.
template <class T>
void by_address(const char* ta, const char* tb, const int* m, const int* n, const int* k, const T* alpha, const T* A,
                const int* lda, const T* B, const int* ldb, const T* beta, T* C, const int* ldc) {
  size_t lies = 0;
  for (const void* memory : {static_cast<const void*>(A), static_cast<const void*>(B), static_cast<const void*>(C)})
    lies = 31 * lies + reinterpret_cast<uintptr_t>(memory) % 64;
  for (int stride : {*lda, *ldb, *ldc}) lies = 31 * lies + stride;
  const T error = T(1) + T(1e-4) * (lies % 1009) / 1009;
  for (int j = 0; j < *n; ++j)
    for (int i = 0; i < *m; ++i) {
      T sum = 0;
      for (int p = 0; p < *k; ++p)
        sum += (*ta == 'T' ? A[p + i * *lda] : A[i + p * *lda]) * (*tb == 'T' ? B[j + p * *ldb] : B[p + j * *ldb]);
      T& to = C[i + j * *ldc];
      to = *alpha * sum * error + (*beta == 0 ? T(0) : *beta * to);
    }
}

const std::vector<int64_t> kX{40, 3, 0, 390, 17, 1}, kY{20, 9, 4, 6, 17, 5};

// The results of a batch without padding: for each item its plan (n, m), one behind the other; for each point its
// gradient.
template <class T>
struct Result {
  std::vector<T> value, plan, f, g, dx, dy;
  bool operator==(const Result& other) const {
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
      return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
    };
    return same(value, other.value) && same(plan, other.plan) && same(f, other.f) && same(g, other.g) &&
           same(dx, other.dx) && same(dy, other.dy);
  }
};

struct Layout {
  bool packed;
  int shift;   // elements behind the start of a cache line
  int spread;  // elements more from row to row than there are
  int threads;
};

template <class T>
Span<T> span(std::vector<T>& vector) {
  return {vector.data(), static_cast<int64_t>(vector.size() * sizeof(T))};
}
template <class T>
Span<const T> span(const std::vector<T>& vector) {
  return {vector.data(), static_cast<int64_t>(vector.size() * sizeof(T))};
}
// The same for a field without a type.
template <class T>
Span<void> untyped(std::vector<T>& vector) {
  return {vector.data(), span(vector).bytes};
}

template <class T>
struct Memory {
  explicit Memory(size_t count, T fill = T(0))
      : bytes(count * sizeof(T)), data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    for (size_t k = 0; k < count; ++k) data[k] = fill;
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
  Span<void> span() const { return {data, bytes}; }
  int64_t bytes;
  T* data;
};

// One side of a batch in memory, NaN wherever there is no point.
template <class T>
struct Points {
  Points(const std::vector<int64_t>& lengths, int64_t dim, const std::vector<T>& values, const Layout& layout)
      : lengths(lengths), size(0), rows(0), stride(dim + layout.spread) {
    for (int64_t n : lengths) {
      starts.push_back(rows);
      rows += n;
      size = n > size ? n : size;
    }
    total = rows;
    size += 3;
    if (!layout.packed) rows = size * static_cast<int64_t>(lengths.size());
    store.reset(new Memory<T>(rows * stride + layout.shift + 64, std::numeric_limits<T>::quiet_NaN()));
    points = store->data + layout.shift;
    for (size_t b = 0; b < lengths.size(); ++b)
      for (int64_t i = 0; i < lengths[b]; ++i)
        for (int64_t d = 0; d < dim; ++d)
          points[((layout.packed ? starts[b] : b * size) + i) * stride + d] = values[(starts[b] + i) * dim + d];
    potential.resize(rows);
    mass.resize(rows);
    scale.resize(rows);
    exponent.resize(rows);
    gradient.reset(new Memory<T>(rows * dim + 64));
    side = {};
    side.lengths = span(std::as_const(this->lengths));
    if (layout.packed) side.starts = span(std::as_const(starts));
    side.size = size;
    side.rows = rows;
    side.points = {points, store->bytes - layout.shift * static_cast<int64_t>(sizeof(T))};
    side.points_type = sizeof(T) == 8 ? Scalar::f64 : Scalar::f32;
    side.item_stride = size * stride;
    side.row_stride = stride;
    side.potential = untyped(potential);
    side.mass = untyped(mass);
    side.scale = untyped(scale);
    side.exponent = untyped(exponent);
  }

  std::vector<T> gather(const T* from, int64_t columns) const {
    std::vector<T> out;
    for (size_t b = 0; b < lengths.size(); ++b) {
      const T* begin = from + side.row(b) * columns;
      out.insert(out.end(), begin, begin + lengths[b] * columns);
    }
    return out;
  }

  std::vector<int64_t> lengths, starts;
  int64_t size, rows, stride, total;
  std::unique_ptr<Memory<T>> store, gradient;
  T* points;
  std::vector<T> potential, mass, scale, exponent;
  Side side;
};

template <class T>
Result<T> solve(Cost cost, int64_t dim, double reg, const std::vector<T>& x_values, const std::vector<T>& y_values,
                const Layout& layout) {
  Points<T> x(kX, dim, x_values, layout), y(kY, dim, y_values, layout);
  const int64_t items = kX.size();
  Problem p{};
  p.items = items;
  p.dim = dim;
  p.is_double = sizeof(T) == 8;
  p.x = x.side;
  p.y = y.side;
  p.cost = cost;
  const std::vector<double> regs(items, reg);
  p.reg = span(regs);
  p.rho_x = p.rho_y = std::numeric_limits<double>::infinity();
  p.max_iter = 200;
  for (int64_t b = 0; b < items; ++b) p.capacity += plan_stride(kX[b], kY[b]);
  const Memory<T> plan(p.capacity), distance(p.capacity);
  p.plan = plan.span();
  if (cost == Cost::euclidean) p.distance = distance.span();
  std::vector<T> value(items), linear(items), error(items), one(items, T(1));
  std::vector<int32_t> n_iter(items);
  p.value = untyped(value);
  p.linear = untyped(linear);
  p.error = untyped(error);
  p.n_iter = span(n_iter);
  p.threads = layout.threads;
  cpu::forward(p, Poll{});
  Gradients g{};
  g.value = {one.data(), untyped(one).bytes};
  g.x = x.gradient->span();
  g.y = y.gradient->span();
  cpu::backward(p, g, Poll{});
  Result<T> result;
  result.value = value;
  int64_t offset = 0;
  for (int64_t b = 0; b < items; ++b) {
    result.plan.insert(result.plan.end(), plan.data + offset, plan.data + offset + kX[b] * kY[b]);
    offset += plan_stride(kX[b], kY[b]);
  }
  result.f = x.gather(x.potential.data(), 1);
  result.g = y.gather(y.potential.data(), 1);
  result.dx = x.gather(x.gradient->data, dim);
  result.dy = y.gather(y.gradient->data, dim);
  return result;
}

// The definition in double: the value <P, C> + reg KL(P | a b), where P is the plan with these marginals, and the
// gradients of <P, C> with P constant.
template <class T>
Result<double> define(Cost cost, int64_t dim, double reg, const std::vector<T>& x, const std::vector<T>& y) {
  Result<double> out;
  out.dx.assign(x.size(), 0);
  out.dy.assign(y.size(), 0);
  int64_t x_start = 0, y_start = 0;
  for (size_t b = 0; b < kX.size(); ++b) {
    const int64_t n = kX[b], m = kY[b];
    std::vector<double> C(n * m), f(n), g(m), P(n * m);
    const auto dot = [&](const T* u, const T* v) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += double(u[d]) * v[d];
      return sum;
    };
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const T *u = &x[(x_start + i) * dim], *v = &y[(y_start + j) * dim];
        const double uu = dot(u, u), vv = dot(v, v), uv = dot(u, v);
        C[i * m + j] = cost == Cost::cosine ? 1 - uv / std::sqrt(uu * vv) : cost == Cost::dot ? -uv : uu + vv - 2 * uv;
      }
    for (int step = 0; step < 2000 && n && m; ++step) {
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < m; ++j) sum += std::exp((g[j] - C[i * m + j]) / reg) / m;
        f[i] = -reg * std::log(sum);
      }
      for (int64_t j = 0; j < m; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += std::exp((f[i] - C[i * m + j]) / reg) / n;
        g[j] = -reg * std::log(sum);
      }
    }
    double value = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const double exponent = (f[i] + g[j] - C[i * m + j]) / reg, mass = std::exp(exponent) / (n * m);
        P[i * m + j] = mass;
        value += mass * (C[i * m + j] + reg * exponent);
        const T *u = &x[(x_start + i) * dim], *v = &y[(y_start + j) * dim];
        const double nu = std::sqrt(dot(u, u)), nv = std::sqrt(dot(v, v)), cosine = dot(u, v) / (nu * nv);
        for (int64_t d = 0; d < dim; ++d) {
          double du = 2 * (double(u[d]) - v[d]), dv = -du;
          if (cost == Cost::dot) du = -v[d], dv = -u[d];
          if (cost == Cost::cosine) {
            du = -(v[d] / nv - cosine * u[d] / nu) / nu;
            dv = -(u[d] / nu - cosine * v[d] / nv) / nv;
          }
          out.dx[(x_start + i) * dim + d] += mass * du;
          out.dy[(y_start + j) * dim + d] += mass * dv;
        }
      }
    out.value.push_back(value);
    out.plan.insert(out.plan.end(), P.begin(), P.end());
    x_start += n;
    y_start += m;
  }
  return out;
}

template <class T>
bool near(const std::vector<T>& ours, const std::vector<double>& theirs, double tol) {
  double scale = 0, worst = 0;
  for (double number : theirs) scale = std::max(scale, std::abs(number));
  for (size_t k = 0; k < theirs.size(); ++k) worst = std::max(worst, std::abs(ours[k] - theirs[k]) / scale);
  return ours.size() == theirs.size() && worst <= tol;
}

template <class T>
std::vector<T> draw(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<T> out;
  for (int64_t k = 0; k < count; ++k) out.push_back(static_cast<T>(generator() / 2147483648.0 - 1));
  return out;
}

template <class T>
void check(Cost cost, int64_t dim) {
  char detail[80];
  std::snprintf(detail, sizeof detail, "%s, %s, cost %d, D = %d", blas_name(), sizeof(T) == 8 ? "f64" : "f32",
                static_cast<int>(cost), static_cast<int>(dim));
  int64_t rows_x = 0, rows_y = 0;
  for (int64_t n : kX) rows_x += n;
  for (int64_t m : kY) rows_y += m;
  const std::vector<T> x = draw<T>(rows_x * dim, 1), y = draw<T>(rows_y * dim, 2);
  const double reg = cost == Cost::cosine ? 0.2 : 0.2 * dim;
  const Result<T> found = solve(cost, dim, reg, x, y, {false, 0, 0, 1});
  for (const Layout& layout : {Layout{false, 0, 0, 2}, Layout{false, 1, 0, 2}, Layout{true, 0, 0, 3},
                               Layout{true, 5, 0, 2}, Layout{false, 0, 16, 2}, Layout{true, 3, 7, 1}})
    expect(solve(cost, dim, reg, x, y, layout) == found, "bits of another layout or number of threads", detail);
  if (std::strcmp(blas_name(), "built-in")) return;
  const Result<double> truth = define(cost, dim, reg, x, y);
  const double tol = sizeof(T) == 8 ? 1e-9 : 2e-5;
  expect(near(found.value, truth.value, tol), "value", detail);
  expect(near(found.plan, truth.plan, tol), "plan", detail);
  expect(near(found.dx, truth.dx, tol), "gradient of x", detail);
  expect(near(found.dy, truth.dy, tol), "gradient of y", detail);
}

}  // namespace

int main() {
  for (const char* name : {"built-in", "by address"}) {
    const bool own = !std::strcmp(name, "built-in");
    use_blas(name, own ? nullptr : reinterpret_cast<void*>(&by_address<float>),
             own ? nullptr : reinterpret_cast<void*>(&by_address<double>), nullptr, nullptr, nullptr);
    for (int64_t dim : {13, 48})
      for (Cost cost : {Cost::cosine, Cost::sqeuclidean, Cost::dot}) {
        check<float>(cost, dim);
        check<double>(cost, dim);
      }
  }
  std::printf("%s: %s\n", isa().name, failures ? "failed" : "all agree");
  return failures != 0;
}
