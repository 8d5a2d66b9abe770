// A program that runs the kernels over intrinsics.h and compares them with plain loops in double. It has no Python, so
// that sanitizers see the kernels' memory alone. It prints what it does; its exit status is 1 if a comparison fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cuda/adjoint.cuh"
#include "cuda/heuristics.h"
#include "cuda/sinkhorn.cuh"

using namespace otalign;
using namespace otalign::cuda;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A padded ragged batch with random costs. Memory that may not be read, or is still to be written, is NaN.
struct RandomBatch {
  RandomBatch(std::vector<int64_t> n, std::vector<int64_t> m, int64_t size_x, int64_t size_y, bool weighted,
              unsigned seed)
      : n(std::move(n)), m(std::move(m)), size_x(size_x), size_y(size_y), pitch((size_y + 31) / 32 * 32) {
    const size_t items = this->n.size(), rows = items * size_x, columns = items * size_y;
    std::minstd_rand random(seed);
    std::uniform_real_distribution<float> uniform(0, 1);
    for (auto* v : {&costs, &upstream}) v->assign(rows * pitch, NAN);
    for (auto* v : {&a, &f, &s}) v->assign(rows, NAN);
    for (auto* v : {&b, &g, &t}) v->assign(columns, NAN);
    for (auto* v : {&value, &linear, &error}) v->assign(items, NAN);
    n_iter.assign(items, -1);
    for (size_t item = 0; item < items; ++item) {
      const int64_t rows_of = this->n[item], columns_of = this->m[item];
      fill(&a[item * size_x], rows_of, [&] { return weighted ? uniform(random) + 0.1f : 1; });
      fill(&b[item * size_y], columns_of, [&] { return weighted ? uniform(random) + 0.1f : 1; });
      for (int64_t i = 0; i < rows_of; ++i)
        for (int64_t j = 0; j < (columns_of + 3) / 4 * 4; ++j) {
          const int64_t at = (item * size_x + i) * pitch + j;
          costs[at] = j < columns_of ? uniform(random) : 0;
          upstream[at] = j < columns_of ? uniform(random) - 0.5f : 0;
        }
    }
    if (weighted && rows) a[0] += std::exchange(a[1], 0.0f);  // a point without mass
  }

  template <class F>
  static void fill(float* to, int64_t count, F draw) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += to[i] = draw();
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(to[i] / sum);
  }

  // Costs near a diagonal, where plain iterations are slow.
  void draw_near_diagonal() {
    for (size_t item = 0; item < n.size(); ++item)
      for (int64_t i = 0; i < n[item]; ++i)
        for (int64_t j = 0; j < m[item]; ++j) {
          const float apart = static_cast<float>(i) / n[item] - static_cast<float>(j) / m[item];
          float& cost = costs[(item * size_x + i) * pitch + j];
          cost = 0.1f * cost + apart * apart;
        }
  }

  CudaProblem problem(double reg, double rho_x, double rho_y, int64_t max_iter, double tol) {
    CudaProblem p{};
    p.items = static_cast<int64_t>(n.size());
    p.x = {n.data(), nullptr, size_x, p.items * size_x, a.data(), f.data()};
    p.y = {m.data(), nullptr, size_y, p.items * size_y, b.data(), g.data()};
    p.costs = costs.data();
    p.pitch = pitch;
    p.reg_of_all = reg;
    p.rho_x = rho_x;
    p.rho_y = rho_y;
    p.max_iter = max_iter;
    p.tol = tol;
    p.value = value.data();
    p.linear = linear.data();
    p.error = error.data();
    p.n_iter = n_iter.data();
    return p;
  }

  std::vector<int64_t> n, m;
  int64_t size_x, size_y, pitch;
  std::vector<float> costs, upstream, a, b, f, g, s, t, value, linear, error;
  std::vector<int32_t> n_iter;
};

bool expect(bool right, const char* what, double off) {
  if (!right) std::printf("WRONG: %s, off by %g\n", what, off);
  return right;
}

// The plan of an item after `iterations`, by logarithms of sums in double, and potentials for it.
std::vector<double> reference(const RandomBatch& batch, int64_t item, double reg, double rho_x, double rho_y,
                              int iterations) {
  const int64_t n = batch.n[item], m = batch.m[item];
  const float* a = &batch.a[item * batch.size_x];
  const float* b = &batch.b[item * batch.size_y];
  const auto cost = [&](int64_t i, int64_t j) {
    return static_cast<double>(batch.costs[(item * batch.size_x + i) * batch.pitch + j]);
  };
  const auto log_sum = [](const std::vector<double>& terms) {
    double top = -kInfinity, sum = 0;
    for (const double term : terms) top = std::fmax(top, term);
    for (const double term : terms) sum += std::exp(term - top);
    return top + std::log(sum);
  };
  std::vector<double> f(n), g(m, 0.0), plan(n * m);
  for (int iteration = 0; iteration < iterations; ++iteration) {
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> terms(m);
      for (int64_t j = 0; j < m; ++j) terms[j] = std::log(static_cast<double>(b[j])) + (g[j] - cost(i, j)) / reg;
      f[i] = -damping(reg, rho_x) * reg * log_sum(terms);
    }
    for (int64_t j = 0; j < m; ++j) {
      std::vector<double> terms(n);
      for (int64_t i = 0; i < n; ++i) terms[i] = std::log(static_cast<double>(a[i])) + (f[i] - cost(i, j)) / reg;
      g[j] = -damping(reg, rho_y) * reg * log_sum(terms);
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) plan[i * m + j] = a[i] * b[j] * std::exp((f[i] + g[j] - cost(i, j)) / reg);
  return plan;
}

std::vector<double> plan_of(const RandomBatch& batch, int64_t item, double reg) {
  const int64_t n = batch.n[item], m = batch.m[item];
  std::vector<double> plan(n * m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const int64_t row = item * batch.size_x + i, column = item * batch.size_y + j;
      const double exponent = static_cast<double>(batch.f[row]) + batch.g[column] - batch.costs[row * batch.pitch + j];
      plan[i * m + j] = static_cast<double>(batch.a[row]) * batch.b[column] * std::exp(exponent / reg);
    }
  return plan;
}

// The residual of the implicit system at the adjoints, relative to its right side.
double residual(const RandomBatch& batch, int64_t item, double reg, double rho_x, double rho_y, double linear) {
  const int64_t n = batch.n[item], m = batch.m[item];
  const std::vector<double> plan = plan_of(batch, item, reg);
  std::vector<double> left(n + m), right(n + m), mass(n + m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const int64_t row = item * batch.size_x + i, column = item * batch.size_y + j, at = row * batch.pitch + j;
      const double p = plan[i * m + j], q = p * (batch.upstream[at] + linear * batch.costs[at]);
      mass[i] += p;
      mass[n + j] += p;
      right[i] += q;
      right[n + j] += q;
      left[i] += p * batch.t[column];
      left[n + j] += p * batch.s[row];
    }
  double off = 0, all = 0;
  for (int64_t k = 0; k < n + m; ++k) {
    const double adjoint = k < n ? batch.s[item * batch.size_x + k] : batch.t[item * batch.size_y + k - n];
    left[k] += mass[k] / damping(reg, k < n ? rho_x : rho_y) * adjoint;
    off += std::fabs(left[k] - right[k]);
    all += std::fabs(right[k]);
  }
  return off / all;
}

// How far the marginals of the plan are from those of the optimum, a exp(-f / rho_x) and b exp(-g / rho_y).
double distance_from_optimum(const RandomBatch& batch, int64_t item, double reg, double rho_x, double rho_y) {
  const int64_t n = batch.n[item], m = batch.m[item], row = item * batch.size_x, column = item * batch.size_y;
  const std::vector<double> plan = plan_of(batch, item, reg);
  std::vector<double> x(n), y(m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      x[i] += plan[i * m + j];
      y[j] += plan[i * m + j];
    }
  double off = 0;
  for (int64_t i = 0; i < n; ++i) off += std::fabs(x[i] - batch.a[row + i] * std::exp(-batch.f[row + i] / rho_x));
  for (int64_t j = 0; j < m; ++j) off += std::fabs(y[j] - batch.b[column + j] * std::exp(-batch.g[column + j] / rho_y));
  return off;
}

struct Case {
  int cluster, shared, scatter, in_flight;
  double reg, rho_x, rho_y;
  bool weighted;
};

template <int N>
bool check(const Case& c, unsigned seed) {
  using Tile = Tiling<N>;
  const int64_t size_y = Tile::kWidth - 3;
  // Some rows in L2, if there may be so many.
  const int64_t size_x = c.cluster * std::min(OTALIGN_ROWS, Tile::kHeld + c.shared + 11);
  const std::vector<int64_t> n = {size_x, size_x - 3, 1, 0, 4, 5, 2}, m = {size_y, size_y - 5, 1, 3, 0, 9, 1};
  RandomBatch batch(n, m, size_x, size_y, c.weighted, seed);
  constexpr int iterations = OTALIGN_ITERATIONS;
  Arguments arguments{batch.problem(c.reg, c.rho_x, c.rho_y, iterations, 0), {}, {}, {}, 0};
  const int32_t ordered = c.in_flight < static_cast<int>(n.size());
  arguments.config = {N, c.cluster, c.in_flight, c.shared, 0, c.scatter, ordered, 0};
  arguments.memory = shared_memory(Tile::shape(), arguments.config);
  std::vector<float> scratch(off_chip_rows(arguments.config, size_x) ? scratch_bytes(arguments.problem) / 4 : 0);
  arguments.problem.scratch = scratch.data();
  const float one = 0.5f;
  arguments.adjoints = {&one, 0, batch.upstream.data(), batch.s.data(), batch.t.data()};
  const auto launch = [&](auto run) {
    intrinsics::launch(c.in_flight, c.cluster, Tile::kThreads, 4 * arguments.memory.end, seed, run);
  };
  const bool relaxed = c.rho_x < kInfinity || c.rho_y < kInfinity;
  launch([&] { relaxed ? Sinkhorn<Tile, kRelaxed>(arguments).run() : Sinkhorn<Tile, kStrict>(arguments).run(); });
  launch([&] { Adjoint<Tile>(arguments).run(); });
  bool right = true;
  double worst = 0, worst_residual = 0;
  for (int64_t item = 0; item < static_cast<int64_t>(n.size()); ++item) {
    const bool empty = n[item] == 0 || m[item] == 0;
    right &= expect(batch.n_iter[item] == (empty ? 0 : iterations), "number of iterations", batch.n_iter[item]);
    if (empty) {
      right &= expect(batch.value[item] == 0 && batch.error[item] == 0, "value of an empty item", batch.value[item]);
      continue;
    }
    const std::vector<double> plan = plan_of(batch, item, c.reg);
    const std::vector<double> wanted = reference(batch, item, c.reg, c.rho_x, c.rho_y, iterations);
    double off = 0, mass = 0;
    for (size_t k = 0; k < plan.size(); ++k) {
      off += std::fabs(plan[k] - wanted[k]);
      mass += wanted[k];
    }
    right &= expect(off <= 3e-5 * std::fmax(mass, 1), "plan (L1)", off);
    const double left = residual(batch, item, c.reg, c.rho_x, c.rho_y, one);
    right &= expect(left <= 3e-5, "implicit system", left);
    worst = std::fmax(worst, off);
    worst_residual = std::fmax(worst_residual, left);
  }
  for (int64_t k = 0; k < static_cast<int64_t>(n.size()); ++k) {
    for (int64_t i = n[k]; i < size_x; ++i) right &= expect(batch.f[k * size_x + i] == 0, "padding of f", i);
    for (int64_t j = m[k]; j < size_y; ++j) right &= expect(batch.g[k * size_y + j] == 0, "padding of g", j);
  }
  std::printf("shape %d, cluster %d, shared %d, scatter %d, reg %g, rho %g %g: plan %.1e, adjoints %.1e\n", N,
              c.cluster, c.shared, c.scatter, c.reg, c.rho_x, c.rho_y, worst, worst_residual);
  return right;
}

// The accelerated solver to a tolerance.
template <int N>
bool check_accelerated(const Case& c, unsigned seed) {
  using Tile = Tiling<N>;
  const double reg = 0.1 * c.reg, tol = 1e-4;
  const int64_t size_y = std::min(Tile::kWidth - 3, 61), size_x = c.cluster * std::min(OTALIGN_ROWS, 61);
  RandomBatch batch({size_x, 1, 0, 5}, {size_y, 3, 4, 2}, size_x, size_y, c.weighted, seed);
  batch.draw_near_diagonal();
  Arguments arguments{batch.problem(reg, c.rho_x, c.rho_y, 5000, tol), {}, {}, {}, static_cast<float>(tol)};
  arguments.config = {N, c.cluster, c.in_flight, c.shared, 0, c.scatter, 0, 1};
  arguments.memory = shared_memory(Tile::shape(), arguments.config);
  std::vector<float> scratch(off_chip_rows(arguments.config, size_x) ? scratch_bytes(arguments.problem) / 4 : 0);
  arguments.problem.scratch = scratch.data();
  intrinsics::launch(c.in_flight, c.cluster, Tile::kThreads, 4 * arguments.memory.end, seed,
                     [&] { Sinkhorn<Tile, kAccelerated>(arguments).run(); });
  bool right = true;
  for (int64_t item = 0; item < 4; ++item) {
    if (batch.n[item] == 0) continue;
    right &= expect(batch.error[item] <= tol, "error of the accelerated solver", batch.error[item]);
    const double off = distance_from_optimum(batch, item, reg, c.rho_x, c.rho_y);
    right &= expect(off <= 3 * tol, "marginals of the accelerated solver (L1)", off);
  }
  std::printf("shape %d, cluster %d, accelerated: %d passes\n", N, c.cluster, batch.n_iter[0]);
  return right;
}

template <int... N>
bool check_all(const std::vector<Case>& cases, unsigned seed, std::integer_sequence<int, N...>) {
  bool right = true;
  for (const Case& c : cases) right = ((check<N>(c, seed) & check_accelerated<N>(c, seed)) & ... & right);
  return right;
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 0;
  const double inf = kInfinity;
  const std::vector<Case> cases = {
      {1, 0, 0, 2, 0.1, inf, inf, false},  {2, 8, 0, 1, 0.05, inf, inf, true}, {4, 0, 0, 2, 0.1, inf, inf, true},
      {4, 8, 1, 1, 0.005, inf, inf, true}, {2, 0, 1, 3, 0.1, 0.5, inf, true},  {1, 8, 0, 7, 0.2, 0.3, 0.6, false},
  };
  const bool right = check_all(cases, seed, std::integer_sequence<int, OTALIGN_TILE_SHAPES>());
  std::puts(right ? "all right" : "something is wrong");
  return right ? 0 : 1;
}
