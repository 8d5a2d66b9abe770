// Few entries are solved in both orders of the updates, if the first does not converge.
#pragma once

#include <cmath>

#include "../absorb.h"
#include "entries.h"
#include "isa.h"

namespace otalign::OTALIGN_ISA {

// Where iterations end before they converge, the side that is updated last is exact and the other is not. With the
// better of both orders it does not matter which side is called x: the result of the transposed problem is the
// transposed result. A problem that equals its transposed one gets the mean of both, in the potentials.
template <class T>
class BothOrders {
 public:
  static bool few(const Item<T>& it) {
    return it.accelerate && it.tol > 0 && !it.symmetric && !it.init && few(it.n, it.m);
  }
  static bool few(int64_t n, int64_t m) { return n * m <= kMost; }

  explicit BothOrders(Item<T>& item) : it(item) {
    for (int64_t k = 0; k < it.n * it.m; ++k) cost[k] = it.K[k];
  }

  template <class F>
  void solve(F once) {
    once(it);
    if (it.error <= it.tol) return;
    Item<T> other = transposed();
    once(other);
    const bool tied = other.error == it.error && other.linear == it.linear && other.value == it.value;
    if (tied)
      average(other);
    else if (better(other))
      take(other);
  }

 private:
  static constexpr int64_t kMost = 128;

  Item<T> transposed() {
    Item<T> other = it;
    other.n = it.m;
    other.m = it.n;
    other.K = matrix;
    other.a = it.b;
    other.b = it.a;
    other.rho_x = it.rho_y;
    other.rho_y = it.rho_x;
    other.f = vectors;
    other.g = vectors + kMost;
    other.mass_x = vectors + 2 * kMost;
    other.mass_y = vectors + 3 * kMost;
    for (int64_t i = 0; i < it.n; ++i)
      for (int64_t j = 0; j < it.m; ++j) matrix[j * it.n + i] = cost[i * it.m + j];
    return other;
  }

  bool better(const Item<T>& other) const {
    if (other.error != it.error) return other.error < it.error || it.error != it.error;
    return other.linear != it.linear ? other.linear < it.linear : other.value < it.value;
  }

  void take(const Item<T>& other) {
    const double shift = gauge(other.f);
    double unreached = 0;  // weight of y, less that of x: what a gauge without these points adds to the value
    for (int64_t i = 0; i < it.n; ++i) {
      const bool reached = other.mass_y[i] > 0;
      if (!reached) unreached -= it.a ? it.a[i] : T(1) / it.n;
      it.f[i] = static_cast<T>(other.g[i] + (reached ? shift : 0.0));
      it.mass_x[i] = other.mass_y[i];
      for (int64_t j = 0; j < it.m; ++j) it.K[i * it.m + j] = other.K[j * it.n + i];
    }
    for (int64_t j = 0; j < it.m; ++j) {
      const bool reached = other.mass_x[j] > 0;
      if (!reached) unreached += it.b ? it.b[j] : T(1) / it.m;
      it.g[j] = static_cast<T>(other.f[j] - (reached ? shift : 0.0));
      it.mass_y[j] = other.mass_x[j];
    }
    it.value = other.value + shift * unreached;
    it.linear = other.linear;
    it.error = other.error;
    it.n_iter = other.n_iter;
  }

  void average(const Item<T>& other) {
    for (int64_t i = 0; i < it.n; ++i) it.f[i] = (it.f[i] + other.g[i]) / 2;
    for (int64_t j = 0; j < it.m; ++j) {
      it.g[j] = (it.g[j] + other.f[j]) / 2;
      it.mass_y[j] = 0;
    }
    const double shift = gauge(it.g);
    double value = 0, linear = 0, mass = 0, total_x = 0, total_y = 0;
    for (int64_t i = 0; i < it.n; ++i) {
      const T weight = it.a ? it.a[i] : T(1) / it.n;
      T sum = 0;
      for (int64_t j = 0; j < it.m; ++j) {
        T& entry = it.K[i * it.m + j];
        const T size = std::sqrt(std::fabs(entry)) * std::sqrt(std::fabs(other.K[j * it.n + i]));
        const bool carries_y = !it.b || it.b[j] > 0;
        if (carries_y) sum += size;  // the entries of a point without mass have a weight of one
        if (weight > 0) it.mass_y[j] += size;
        if (weight > 0 && carries_y && size > 0) linear += static_cast<double>(size) * cost[i * it.m + j];
        entry = entry < 0 ? -size : size;
      }
      it.f[i] = static_cast<T>(it.f[i] + (sum > 0 ? shift : 0.0));  // unreached points have no gauge
      it.mass_x[i] = weight > 0 ? sum / weight : sum;
      total_x += weight;
      if (!(weight > 0)) continue;
      value += weight * dual_term(it.f[i], it.rho_x);
      mass += sum;
    }
    for (int64_t j = 0; j < it.m; ++j) {
      const T weight = it.b ? it.b[j] : T(1) / it.m;
      it.g[j] = static_cast<T>(it.g[j] - (it.mass_y[j] > 0 ? shift : 0.0));
      total_y += weight;
      if (!(weight > 0)) continue;
      it.mass_y[j] /= weight;
      value += weight * dual_term(it.g[j], it.rho_y);
    }
    it.value = value - it.reg * (mass - total_x * total_y);
    it.linear = linear;
    it.error = 0;
    for (int64_t i = 0; i < it.n; ++i)
      it.error += residual(it.m, it.a ? it.a[i] : T(1) / it.n, it.f[i], it.rho_x, it.b, it.g, cost + i * it.m, 1);
    for (int64_t j = 0; j < it.m; ++j)
      it.error += residual(it.n, it.b ? it.b[j] : T(1) / it.m, it.g[j], it.rho_y, it.a, it.f, cost + j, it.m);
  }

  // What a point adds to the error, from the points across and the costs to them, `step` apart: see `residual` in
  // otalign/backends/reference.py.
  double residual(int64_t count, double weight, double potential, double rho, const T* weights, const T* across,
                  const T* costs, int64_t step) const {
    if (!(weight > 0)) return 0;
    double top = -HUGE_VAL, sum = 0;
    const auto exponents = [&](auto use) {
      for (int64_t k = 0; k < count; ++k) {
        const double other = weights ? weights[k] : T(1) / count;
        if (other > 0 && costs[k * step] < T(HUGE_VAL))
          use(std::log(other) + (static_cast<double>(across[k]) - costs[k * step]) / it.reg);
      }
    };
    exponents([&](double t) { top = std::fmax(top, t); });
    if (!(top > -HUGE_VAL)) return is_strict(rho) ? weight : 0.0;  // unreached
    exponents([&](double t) { sum += std::exp(t - top); });
    return weight * std::fabs(std::expm1(potential / it.reg + damping(it.reg, rho) * (top + std::log(sum))));
  }

  // What the potentials of y lose and those of x gain, so that the former have a weighted mean of zero, as in finish.h.
  double gauge(const T* g) const {
    if (!is_strict(it.rho_x) || !is_strict(it.rho_y)) return 0;
    double mean = 0;
    for (int64_t j = 0; j < it.m; ++j) {
      const double weight = it.b ? it.b[j] : T(1) / it.m;
      if (weight > 0) mean += weight * g[j];
    }
    return mean;
  }

  Item<T>& it;
  T cost[kMost], matrix[kMost], vectors[4 * kMost];
};

}  // namespace otalign::OTALIGN_ISA
