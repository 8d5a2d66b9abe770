// The results of a solve: Solver's last steps. Included by solver.h only.
#pragma once

#include "solver.h"

namespace otalign::OTALIGN_ISA {

// Computes potentials, masses, the plan in the place of Item::K, and the values.
template <class T>
inline void Solver<T>::finish() {
  finish_columns();
  for_chunks([&](int64_t begin, int64_t end, Part& part) {
    T* const column_sums = sums_of(part, column);
    part.mass = part.linear = 0;
    for (int64_t j = 0; j < padded(m); ++j) column_sums[j] = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (a[i] > 0)
        finish_row(i, column_sums, part);
      else
        finish_massless_row(i);
    }
  });
  add_sums(column);
  const bool balanced = damping_x == 1 && damping_y == 1 && !it.symmetric;
  double shift = 0, value = 0, total_a = 0, total_b = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (b[j] > 0) it.mass_y[j] = v[j] * column[j] / root_b[j];
    gamma[j] = it.reg * (gamma[j] + std::log(static_cast<double>(v[j])));
    if (balanced) shift += b[j] * gamma[j];
  }
  const auto gauge = [&](T weight, T mass) {
    return weight == 0 && mass == 0 ? 0.0 : shift;
  };  // unreached points have no gauge
  for (int64_t i = 0; i < n; ++i) {
    const double f = it.reg * (phi[i] + std::log(static_cast<double>(u[i]))) + gauge(a[i], it.mass_x[i]);
    const T weight = it.a ? it.a[i] : T(1) / n;
    value += weighted_dual_term(weight, f, it.rho_x);
    total_a += weight;
    it.f[i] = static_cast<T>(f);
  }
  for (int64_t j = 0; j < m; ++j) {
    const double g = gamma[j] - gauge(b[j], it.mass_y[j]);
    const T weight = it.b ? it.b[j] : T(1) / m;
    value += weighted_dual_term(weight, g, it.rho_y);
    total_b += weight;
    it.g[j] = it.symmetric ? it.f[j] : static_cast<T>(g);
  }
  it.value = value - it.reg * (sum_of(&Part::mass) - total_a * total_b);  // the product is one up to rounding
  it.linear = sum_of(&Part::linear);
}

// Computes the potentials of columns without mass from those of the rows. `top` becomes gamma times reg, and column_log
// the growth of the potentials of columns without mass.
template <class T>
inline void Solver<T>::finish_columns() {
  if (massless_y) exact_columns([&](int64_t i) { return std::log(static_cast<double>(u[i])); });
  for (int64_t j = 0; j < m; ++j) {
    top[j] = static_cast<T>(it.reg * gamma[j]);
    if (b[j] > 0) continue;
    const bool reached = column_log[j] > T(-HUGE_VAL);
    const double next = reached ? next_of_column(j) : unreached_potential(it.rho_y) / it.reg - gamma[j];
    it.mass_y[j] = reached ? bounded(column_log[j] + next) : T(0);
    gamma[j] += next;
    column_log[j] = static_cast<T>(next);
  }
}

template <class T>
inline void Solver<T>::finish_row(int64_t i, T* column_sums, Part& part) {
  const T* row = K + i * stride;
  T* plan = it.K + i * m;
  const T reg = static_cast<T>(it.reg), weight = rest_a[i] * u[i], log_weight = std::log(weight);
  const T potential = static_cast<T>(it.reg * phi[i]);
  V sum = V{}, cost = V{};
  for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
    const V k = S::load(row + j), kept = S::max(k, V{}), wj = S::load(w + j);
    const V p = weight * kept * wj;
    const V density = kept * (over_root_a[i] / S::load(root_b + j));
    const auto held = (density > 0) & (density < S::splat(std::numeric_limits<T>::max()));
    const V C = S::load(top + j) + potential - reg * log<T>(S::select(held, density, S::splat(1)));
    sum += kept * wj;
    cost += S::select(inside & held & (p > 0), p * C, V{});
    S::store(column_sums + j, S::load(column_sums + j) + weight * kept, count);
    V stored = p;
    if (massless_y) {  // Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan.
      const V with_one = exp<T>(exponent<T>(k) + log_weight + S::load(column_log + j));
      stored = S::select(S::load(b + j) == 0, V{} - with_one, stored);
    }
    S::store(plan + j, stored, count);
  });
  it.mass_x[i] = u[i] * S::sum(sum) * over_root_a[i];
  part.linear += S::sum(cost);
  part.mass += static_cast<double>(a[i]) * it.mass_x[i];
}

// A row without mass: computes its potential from those of the columns, and stores minus its plan with a weight of one.
// Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan.
template <class T>
inline void Solver<T>::finish_massless_row(int64_t i) {
  const T* row = K + i * stride;
  T* plan = it.K + i * m;
  const double log_sum = log_row_sum(i);
  const bool reached = log_sum > -HUGE_VAL;
  const double next = reached ? next_of(i, log_sum) : unreached_potential(it.rho_x) / it.reg - phi[i];
  const T shift = static_cast<T>(next);
  it.mass_x[i] = reached ? bounded(log_sum + next) : T(0);
  phi[i] += next;
  u[i] = 1;
  for_vectors<T>(m, [&](int64_t j, int count, auto) {
    const V wj = S::load(w + j);
    const V density = exp<T>(exponent<T>(S::load(row + j)) + shift + log<T>(S::select(wj > 0, wj, S::splat(1))));
    S::store(plan + j, S::select(wj > 0, V{} - density, V{}), count);
  });
}

}  // namespace otalign::OTALIGN_ISA
