// The reverse pass of one item: the adjoints, which solve its implicit system, and the matrix by which the points are
// multiplied in their gradients.
#pragma once

#include <initializer_list>

#include "prior.h"
#include "solver.h"

namespace otalign::OTALIGN_ISA {

template <class T>
class ReversePass {
  using S = Simd<T>;
  using V = typename S::V;

 public:
  static size_t scratch(int64_t n, int64_t m) {
    return 3 * padded(m) * sizeof(T) + (2 * n + 6 * m) * sizeof(double) + 16 * 64;
  }

  ReversePass(const Item<T>& item, Reverse<T>& reverse, void* memory, Poll poll)
      : it(item), back(reverse), n(item.n), m(item.m), P(item.K), pace(poll) {
    Arena arena{static_cast<char*>(memory)};
    column = arena.take<T>(padded(m));
    row_buffer = arena.take<T>(padded(m));
    row_prior = arena.take<T>(padded(m));
    row_mass = arena.take<double>(n);
    row_load = arena.take<double>(n);
    for (double** vector : {&column_mass, &right, &solution, &residual, &direction, &image})
      *vector = arena.take<double>(m);
  }

  void run() {
    for (int64_t i = 0; i < n; ++i) back.term_x[i] = term(it.f[i], it.a ? it.a[i] : T(1) / n, it.reg);
    for (int64_t j = 0; j < m; ++j) back.term_y[j] = term(it.g[j], it.b ? it.b[j] : T(1) / m, it.reg);
    if (back.implicit()) solve_system();
    if (it.cost != Cost::given) diagonals();
    weights();
  }

  static T term(T potential, T weight, double reg) {
    return static_cast<T>(potential + (weight > 0 ? reg * std::log(static_cast<double>(weight)) : 0.0));
  }

  static OTALIGN_INLINE V cost(V p, V terms, T reg) {
    return terms - reg * log<T>(S::select(usable(p), p, S::splat(1)));
  }
  // `log` takes normal numbers only; a subnormal entry of the plan counts as zero.
  static OTALIGN_INLINE auto usable(V p) { return p >= S::splat(Tiny<T>::value); }

 private:
  template <class U>
  struct Tiny {
    static constexpr U value = sizeof(U) == 4 ? U(1.17549435e-38) : U(2.2250738585072014e-308);
  };

  // [D_x P; P^T D_y] (adjoint_x, adjoint_y) = (q 1, q^T 1) with q = P o (l C + G), D = mass / damping, by conjugate
  // gradients on what eliminating adjoint_x leaves, preconditioned with D_y. In the balanced case its null vector is
  // constant.
  void solve_system() {
    const T reg = static_cast<T>(it.reg), linear = static_cast<T>(back.linear);
    const double damping_x = damping(it.reg, it.rho_x), damping_y = damping(it.reg, it.rho_y);
    for (int64_t j = 0; j < padded(m); ++j) column[j] = row_buffer[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (pace.stops(m)) return;
      const T* row = P + i * m;
      V load = V{}, mass = V{};
      for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
        const V p = S::max(S::load(row + j), V{});
        V slope = linear * cost(p, S::load(back.term_y + j) + back.term_x[i], reg);
        if (back.plan) slope += S::load(back.plan + i * m + j);
        const V q = S::select(inside & usable(p), p * slope, V{});
        load += q;
        mass += S::select(inside, p, V{});
        S::store(column + j, S::load(column + j) + q, count);
        S::store(row_buffer + j, S::load(row_buffer + j) + p, count);
      });
      row_load[i] = S::sum(load);
      row_mass[i] = S::sum(mass) / damping_x;
    }
    double total = 0;
    for (int64_t j = 0; j < m; ++j) {
      column_mass[j] = row_buffer[j] / damping_y;
      right[j] = column[j];
      total += row_buffer[j];
    }
    apply([&](int64_t i, double) { return row_mass[i] > 0 ? row_load[i] / row_mass[i] : 0.0; });
    for (int64_t j = 0; j < m; ++j) residual[j] = column_mass[j] > 0 ? right[j] - column[j] : 0.0;
    conjugate_gradients(damping_x == 1 && damping_y == 1, total);
    apply([&](int64_t i, double product) {
      const double adjoint = row_mass[i] > 0 ? (row_load[i] - product) / row_mass[i] : 0.0;
      back.adjoint_x[i] = static_cast<T>(adjoint);
      return adjoint;
    });
    // The gradients have ended by the error of all columns together, of which a column of little mass has little: from
    // the adjoints of the rows follow those of the columns, each to its own last digits.
    for (int64_t j = 0; j < m; ++j)
      back.adjoint_y[j] = column_mass[j] > 0 ? static_cast<T>((right[j] - column[j]) / column_mass[j]) : T(0);
  }

  void conjugate_gradients(bool gauge, double total) {
    const double tolerance = sizeof(T) == 4 ? 1e-7 : 1e-14;
    const auto project = [&] {
      if (!gauge || !(total > 0)) return;
      double excess = 0;
      for (int64_t j = 0; j < m; ++j) excess += residual[j];
      for (int64_t j = 0; j < m; ++j) residual[j] -= excess * column_mass[j] / total;
    };
    const auto energy = [&](const double* of, double least) {
      double sum = 0;
      for (int64_t j = 0; j < m; ++j)
        sum += column_mass[j] > 0 ? of[j] * of[j] / std::fmax(column_mass[j], least) : 0.0;
      return sum;
    };
    for (int64_t j = 0; j < m; ++j) solution[j] = direction[j] = 0;
    project();
    double now = energy(residual, 0), before = 0;
    // Of the loads, since a residual below their rounding has no direction, and parts of the plan that hardly touch
    // would follow it for ever. A column of hardly any mass counts as heavier: rounding over its mass would be all
    // there is.
    const double least = total * std::numeric_limits<T>::epsilon();
    const double enough = std::fmax(energy(residual, least), energy(right, least)) * tolerance * tolerance;
    for (int64_t k = 0; k < 4 * m + 40 && now > enough && !pace.stops(0); ++k) {
      const double carry = before > 0 ? now / before : 0.0;
      for (int64_t j = 0; j < m; ++j) {
        const double step = column_mass[j] > 0 ? residual[j] / column_mass[j] : 0.0;
        direction[j] = step + carry * direction[j];
        back.adjoint_y[j] = static_cast<T>(direction[j]);
      }
      apply([&](int64_t i, double product) { return row_mass[i] > 0 ? product / row_mass[i] : 0.0; });
      double curvature = 0, size = 0;
      for (int64_t j = 0; j < m; ++j) {
        image[j] = column_mass[j] * direction[j] - column[j];
        curvature += direction[j] * image[j];
        size += direction[j] * direction[j] * column_mass[j];
      }
      // Along a constant on a part of the plan, there is no curvature but rounding.
      if (!(curvature > 16 * std::numeric_limits<T>::epsilon() * size)) break;
      for (int64_t j = 0; j < m; ++j) {
        solution[j] += now / curvature * direction[j];
        residual[j] -= now / curvature * image[j];
      }
      project();
      before = now;
      now = energy(residual, 0);
    }
    for (int64_t j = 0; j < m; ++j) back.adjoint_y[j] = static_cast<T>(solution[j]);
  }

  // column = P^T t with t_i = per_row(i, (P adjoint_y)_i), in one pass over P.
  template <class F>
  void apply(F per_row) {
    for (int64_t j = 0; j < padded(m); ++j) column[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* row = P + i * m;
      V product = V{};
      for_vectors<T>(m, [&](int64_t j, int, auto inside) {
        product += S::select(inside, S::max(S::load(row + j), V{}) * S::load(back.adjoint_y + j), V{});
      });
      const T weight = static_cast<T>(per_row(i, S::sum(product)));
      if (pace.stops(m)) return;
      for_vectors<T>(m, [&](int64_t j, int count, auto) {
        S::store(column + j, S::load(column + j) + weight * S::max(S::load(row + j), V{}), count);
      });
    }
  }

  // The factor of a point itself in its gradient: for the cosine sum_j H_ij cos_ij / |x_i|^2, and so on.
  void diagonals() {
    for (int64_t j = 0; j < padded(m); ++j) column[j] = 0;
    const PriorRow<T> prior(it);
    const T reg = static_cast<T>(it.reg);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = P + i * m;
      if (pace.stops(m)) return;
      gradient_row(it, back, i, row_buffer);
      for (int64_t j = 0; j < m; ++j) row_prior[j] = 0;
      if (it.cost == Cost::cosine && !prior.none()) prior.add(i, row_prior);
      V sum = V{};
      for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
        V weight = S::load(row_buffer + j);
        if (it.cost == Cost::cosine) {
          const V p = S::load(row + j);
          const V C = cost(p, S::load(back.term_y + j) + back.term_x[i], reg) - S::load(row_prior + j);
          weight = S::select(usable(p), weight * (1 - C), V{});
        } else if (it.cost == Cost::euclidean) {
          weight = over_distance(weight, S::load(it.distance + i * m + j));
        }
        weight = S::select(inside, weight, V{});
        sum += weight;
        S::store(column + j, S::load(column + j) + weight, count);
      });
      back.diagonal_x[i] = diagonal(S::sum(sum), it.scale_x, i);
    }
    for (int64_t j = 0; j < m; ++j) back.diagonal_y[j] = diagonal(column[j], it.scale_y, j);
  }

  T diagonal(T sum, const T* scale, int64_t i) const {
    switch (it.cost) {
      case Cost::cosine:
        return sum * scale[i] * scale[i];
      case Cost::sqeuclidean:
        return 2 * sum;
      case Cost::euclidean:
        return sum;
      default:
        return 0;
    }
  }

  void weights() {
    const double damping_x = damping(it.reg, it.rho_x), damping_y = damping(it.reg, it.rho_y);
    for (int64_t i = 0; back.a && i < n; ++i) {
      back.a[i] =
          weight_gradient(it.f[i], it.mass_x[i], it.rho_x, damping_x, back.implicit() ? back.adjoint_x[i] : T(0));
      if (back.implicit() && it.a && it.a[i] == 0 && !pace.stops(m))
        for (int64_t j = 0; j < m; ++j) back.a[i] += massless_slope(i, j, back.adjoint_y[j]);
    }
    for (int64_t j = 0; back.b && j < m; ++j) {
      back.b[j] =
          weight_gradient(it.g[j], it.mass_y[j], it.rho_y, damping_y, back.implicit() ? back.adjoint_y[j] : T(0));
      if (back.implicit() && it.b && it.b[j] == 0 && !pace.stops(8 * n))
        for (int64_t i = 0; i < n; ++i) back.b[j] += massless_slope(i, j, back.adjoint_x[i]);
    }
  }
  // The one-sided derivative by a weight of zero, through the plan's entry between i and j.
  T massless_slope(int64_t i, int64_t j, T adjoint) const {
    const T p = -P[i * m + j];
    if (!(p >= Tiny<T>::value)) return 0;
    const T C = back.term_x[i] + back.term_y[j] - static_cast<T>(it.reg * std::log(static_cast<double>(p)));
    return p * (static_cast<T>(back.linear) * C + (back.plan ? back.plan[i * m + j] : T(0)) - adjoint);
  }
  T weight_gradient(double f, double mass, double rho, double damping, double adjoint) const {
    const double most = std::numeric_limits<T>::max();  // a one-sided derivative may be infinite
    const double gradient = back.value * (dual_term(f, rho) + it.reg * (1 - mass)) + adjoint * mass / damping;
    return static_cast<T>(gradient < -most ? -most : gradient > most ? most : gradient);
  }

 public:
  // Writes row i of H to out (m,).
  static OTALIGN_INLINE void gradient_row(const Item<T>& it, const Reverse<T>& back, int64_t i, T* out) {
    const T* row = it.K + i * it.m;
    const T direct = static_cast<T>(back.value + back.linear);
    if (!back.implicit()) {
      for_vectors<T>(
          it.m, [&](int64_t j, int count, auto) { S::store(out + j, direct * S::max(S::load(row + j), V{}), count); });
      return;
    }
    const T reg = static_cast<T>(it.reg), inv_reg = static_cast<T>(1 / it.reg), linear = static_cast<T>(back.linear);
    for_vectors<T>(it.m, [&](int64_t j, int count, auto) {
      const V p = S::load(row + j);
      V slope = linear * cost(p, S::load(back.term_y + j) + back.term_x[i], reg);
      if (back.plan) slope += S::load(back.plan + i * it.m + j);
      slope -= S::load(back.adjoint_y + j) + back.adjoint_x[i];
      S::store(out + j, S::select(usable(p), p * (direct - slope * inv_reg), V{}), count);
    });
  }

  static OTALIGN_INLINE V over_distance(V weight, V distance) {
    return S::select(distance > 0, weight / distance, V{});
  }

  // Rows [begin, end) of the matrix of the products, see Kernels::panel.
  static void panel(const Item<T>& it, const Reverse<T>& back, int64_t begin, int64_t end, T* out) {
    const int64_t m = it.m;
    for (int64_t i = begin; i < end; ++i) {
      T* row = out + (i - begin) * m;
      gradient_row(it, back, i, row);
      switch (it.cost) {
        case Cost::cosine: {
          const T scale = -it.scale_x[i];
          for (int64_t j = 0; j < m; ++j) row[j] *= scale * it.scale_y[j];
          break;
        }
        case Cost::sqeuclidean:
          for (int64_t j = 0; j < m; ++j) row[j] *= -2;
          break;
        case Cost::euclidean:
          for (int64_t j = 0; j < m; ++j) {
            const T distance = it.distance[i * m + j];
            row[j] = distance > 0 ? -row[j] / distance : T(0);
          }
          break;
        case Cost::dot:
          for (int64_t j = 0; j < m; ++j) row[j] = -row[j];
          break;
        case Cost::given:
          break;
      }
    }
  }

 private:
  const Item<T>& it;
  Reverse<T>& back;
  const int64_t n, m;
  const T* const P;  // (n, m) the plan. Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan.
  Pace pace;         // nothing reads the results after it has stopped
  T *column, *row_buffer, *row_prior;               // (padded(m),) each
  double *row_mass, *row_load;                      // (n,) D_x and q 1
  double *column_mass, *right;                      // (m,) D_y and q^T 1
  double *solution, *residual, *direction, *image;  // (m,) of the conjugate gradients
};

}  // namespace otalign::OTALIGN_ISA
