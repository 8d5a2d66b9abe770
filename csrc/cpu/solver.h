// Sinkhorn's iterations for one item: multiply-adds on an absorbed kernel, exact wherever floats run out (absorb.h).
#pragma once

#include <cmath>
#include <utility>

#include "../absorb.h"
#include "kernels.h"
#include "simd.h"

namespace otalign::OTALIGN_ISA {

// Calls f(j, count, inside) for each vector of a row of m numbers; the last may hold fewer.
template <class T, class F>
static OTALIGN_INLINE void for_vectors(int64_t m, F f) {
  constexpr int W = Simd<T>::W;
  int64_t j = 0;
#pragma GCC unroll 2
  for (; j + W <= m; j += W) f(j, W, typename Simd<T>::I{} - 1);
  if (j < m) f(j, static_cast<int>(m - j), Simd<T>::first(static_cast<int>(m - j)));
}

// Cuts aligned arrays out of one block of scratch memory, set to zero.
struct Arena {
  char* next;
  template <class N>
  N* take(int64_t count) {
    N* out = reinterpret_cast<N*>(next);
    next += (count * sizeof(N) + 63) / 64 * 64;
    for (int64_t k = 0; k < count; ++k) out[k] = N(0);
    return out;
  }
};

// An entry of K as its exponent, and back.
template <class T>
static OTALIGN_INLINE typename Simd<T>::V exponent(typename Simd<T>::V k) {
  using S = Simd<T>;
  const auto positive = k > 0, small = k <= S::splat(-Absorb<T>::kFar);
  const auto t = S::select(positive, log<T>(S::select(positive, k, S::splat(1))), k);
  return S::any(~(positive | small)) ? S::select(positive | small, t, -1 / k) : t;
}
template <class T>
static OTALIGN_INLINE typename Simd<T>::V entry(typename Simd<T>::V t) {
  using S = Simd<T>;
  const auto small = t<S::splat(-Absorb<T>::kFar), large = t> S::splat(Absorb<T>::kFar);
  const auto k = S::select(small, t, exp<T>(t));
  return S::any(large) ? S::select(large, -1 / t, k) : k;
}
// The entry k after its exponent has grown by `shift`, with factor = exp(shift): a product wherever floats can hold it.
template <class T>
static OTALIGN_INLINE typename Simd<T>::V grown(typename Simd<T>::V k, typename Simd<T>::V factor,
                                                typename Simd<T>::V shift) {
  using S = Simd<T>;
  const auto low = S::splat(std::exp(-Absorb<T>::kFar)), high = S::splat(std::exp(Absorb<T>::kFar));
  const auto product = k * factor;
  const auto held = (k > 0) & (product > low) & (product < high) & (factor > low) & (factor < high);
  if (!S::any(~held)) return product;
  return S::select(held, product, entry<T>(exponent<T>(k) + shift));
}

template <class T>
class Solver {
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int W = S::W;
  static constexpr int kNarrow = W < 4 ? 1 : OTALIGN_VECTOR_BYTES == 64 ? 16 : 8;  // vectors that registers can hold

 public:
  static size_t scratch(int64_t n, int64_t m) {
    const int64_t own = small(n, m) ? n * aligned(m) : 0;
    return (own + 4 * padded(n) + 6 * padded(m)) * sizeof(T) + (n + m) * sizeof(double) + 16 * 64;
  }

  Solver(Item<T>& item, void* memory) : it(item), n(item.n), m(item.m) {
    Arena arena{static_cast<char*>(memory)};
    stride = small(n, m) ? aligned(m) : m;
    K = small(n, m) ? arena.take<T>(n * stride) : item.K;
    a = arena.take<T>(padded(n));
    u = arena.take<T>(padded(n));
    u_next = arena.take<T>(padded(n));
    z = arena.take<T>(padded(n));
    b = arena.take<T>(padded(m));
    v = arena.take<T>(padded(m));
    w = arena.take<T>(padded(m));
    column = arena.take<T>(padded(m));
    top = arena.take<T>(padded(m));
    column_log = arena.take<T>(padded(m));
    phi = arena.take<double>(n);
    gamma = arena.take<double>(m);
    for (int64_t i = 0; i < padded(n); ++i) u[i] = u_next[i] = 1;
    keep_x = damping(it.reg, it.rho_x);
    keep_y = damping(it.reg, it.rho_y);
    for (int64_t i = 0; i < n; ++i) a[i] = it.a ? it.a[i] : T(1) / n;
    for (int64_t j = 0; j < m; ++j) b[j] = it.b ? it.b[j] : T(1) / m;
  }

  // False if there is no finite solution.
  bool run(Poll poll) {
    if (!weights_valid() || !begin()) return false;
    double error = 0;
    int64_t n_iter = 0;
    Pace pace(poll);
    sweep<true>(true);
    while (feasible) {
      for (int64_t i = 0; i < n; ++i) u[i] = u_next[i];
      update_columns();
      ++n_iter;
      error = n_iter < it.max_iter ? sweep<true>(false) : sweep<false>(false);
      if (should_stop(error, it.tol, n_iter, it.max_iter)) break;
      if (pace.stops(n * m + 8192)) return false;
    }
    if (!feasible || error != error) return false;
    it.n_iter = static_cast<int32_t>(n_iter);
    it.error = error;
    finish();
    return it.value == it.value;
  }

 private:
  bool weights_valid() const {
    bool valid = true;
    for (int64_t i = 0; i < n; ++i) valid &= a[i] >= 0 && a[i] <= 2;
    for (int64_t j = 0; j < m; ++j) valid &= b[j] >= 0 && b[j] <= 2;
    return valid;
  }

  // K = exp((g - C + phi reg) / reg) with phi such that the largest entry of each row is 1.
  bool begin() {
    const T per_reg = static_cast<T>(1 / it.reg);
    for (int64_t j = 0; j < m; ++j) {
      gamma[j] = it.init ? it.init[j] / it.reg : 0.0;
      top[j] = it.init ? it.init[j] : T(0);
      v[j] = 1;
      w[j] = b[j];
      massless |= b[j] == 0;
    }
    const V infinity = S::splat(T(HUGE_VAL));
    V extreme{};
    for (int64_t i = 0; i < n; ++i) {
      const T* cost = it.K + i * m;
      T* row = K + i * stride;
      V least = infinity;
      for_vectors<T>(m, [&](int64_t j, int, auto inside) {
        const V h = S::load(cost + j) - S::load(top + j);
        least = S::select(inside & (S::load(b + j) > 0), S::min(least, h), least);
      });
      const T lowest = S::smallest(least);
      if (!(lowest < T(HUGE_VAL))) return false;  // no finite cost where there is mass
      const auto exponents = [&](auto make) {
        for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
          const V t = (lowest - S::load(cost + j) + S::load(top + j)) * per_reg;
          extreme = S::select(inside, S::max(extreme, S::abs(t)), extreme);
          S::store(row + j, make(t), count);
        });
      };
      if (massless)
        exponents([](V t) { return entry<T>(t); });
      else  // no exponent is positive
        exponents([](V t) { return S::select(t < S::splat(-Absorb<T>::kFar), t, exp<T>(t)); });
      phi[i] = lowest / it.reg;
    }
    far = S::any(extreme > S::splat(Absorb<T>::kFar));
    for (int64_t i = 0; i < n; ++i) z[i] = static_cast<T>(-(1 - keep_x) * phi[i]);
    return true;
  }

  // One pass over K, W rows at a time: their sums, from them u_next and the error that u leaves, and (if Columns) the
  // column sums with u_next. The first pass has no u yet.
  template <bool Columns>
  double sweep(bool first) {
    const int64_t vectors = (m + W - 1) / W;
    if (Columns && !far && keep_x == 1 && W >= 4 && vectors <= kNarrow)
      return sweep_vectors(static_cast<int>(vectors), first, std::make_integer_sequence<int, kNarrow>());
    return far ? sweep_rows<Columns, true>(first) : sweep_rows<Columns, false>(first);
  }

  template <int... N>
  double sweep_vectors(int vectors, bool first, std::integer_sequence<int, N...>) {
    static constexpr double (Solver::* table[])(bool) = {&Solver::sweep_narrow<N + 1>...};
    return (this->*table[vectors - 1])(first);
  }

  // The same, four rows at a time, for a strict marginal and rows of N vectors, whose column sums stay in registers.
  template <int N>
  double sweep_narrow(bool first) {
    using Four = typename S::Four;
    if constexpr (W >= 4) {
      V sums_j[N] = {};
      Four least = Four{} + 1, most = least;
      for (int64_t i = 0; i < n; i += 4) {
        const int64_t last = n - i - 1;
        const T* const row = K + i * stride;
        const T* const rows[4] = {row, row + (last < 1 ? 0 : stride), row + (last < 2 ? 0 : 2 * stride),
                                  row + (last < 3 ? 0 : 3 * stride)};
        V sums[4] = {};
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v)
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sums[k] += S::load(rows[k] + v * W) * S::load(w + v * W);
        const Four sum = S::sum_four(sums);
        const Four next = 1 / sum;
        least = sum < least ? sum : least;
        most = sum > most ? sum : most;
        *reinterpret_cast<typename S::UnalignedFour*>(u_next + i) = next;
        alignas(32) T weight[4];
        for (int k = 0; k < 4; ++k) weight[k] = next[k] * a[i + k];
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v)
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sums_j[v] += S::load(rows[k] + v * W) * weight[k];
      }
      for (int k = 0; k < 4; ++k)
        if (!(least[k] >= Absorb<T>::kLow && most[k] <= Absorb<T>::kHigh)) return sweep_rows<true, false>(first);
      for (int v = 0; v < N; ++v) S::store(column + v * W, sums_j[v]);
      V error{};
      for (int64_t i = 0; i < n; i += W) error += S::load(a + i) * S::abs(S::load(u + i) / S::load(u_next + i) - 1);
      return S::sum(error);
    }
    return sweep_rows<true, false>(first);
  }

  // A number of K as a factor: what is kept as an exponent is zero. Without such entries there is nothing to do.
  template <bool Far>
  static OTALIGN_INLINE V factor(const T* k) {
    return Far ? S::max(S::load(k), V{}) : S::load(k);
  }

  template <bool Columns, bool Far>
  double sweep_rows(bool first) {
    if (Columns)
      for (int64_t j = 0; j < padded(m); ++j) column[j] = 0;
    V error{};
    for (int64_t i = 0; i < n; i += W) {
      const int count = n - i < W ? static_cast<int>(n - i) : W;
      const T* rows[W];
      for (int k = 0; k < W; ++k) rows[k] = K + (i + (k < count ? k : 0)) * stride;
      V sums[W] = {};
      for (int64_t j = 0; j < m; j += W) {
        const V wj = S::load(w + j);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) sums[k] += factor<Far>(rows[k] + j) * wj;
      }
      const V sum = S::sum_rows(sums);
      V next, ratio;
      if (keep_x == 1) {
        next = 1 / sum;
        ratio = S::load(u + i) * sum;
      } else {
        next =
            exp<T>(S::load(z + i) - static_cast<T>(keep_x) * log<T>(S::max(sum, S::splat(Absorb<T>::kLow * T(0.5)))));
        ratio = S::load(u + i) / next;
      }
      const auto near = inside_range(sum) & inside_range(next);
      if (__builtin_expect(S::any(~near), 0)) {
        if (!Far && Columns) {
          far = true;  // absorbing may bring entries that only exponents can hold
          return sweep_rows<Columns, true>(first);
        }
        for (int k = 0; k < count; ++k)
          if (!near[k]) rescue_row(i + k, Columns, first, next[k], ratio[k]);
      }
      const V ai = S::load(a + i);
      error += ai * S::abs(ratio - 1);
      if (!Columns) continue;
      S::store(u_next + i, next);
      alignas(64) T weight[W];
      S::store(weight, ai * next);
      for (int64_t j = 0; j < m; j += W) {
        V even = S::load(column + j), odd{};
#pragma GCC unroll 16
        for (int k = 0; k < W; k += 2) {
          even += factor<Far>(rows[k] + j) * weight[k];
          odd += factor<Far>(rows[k + 1] + j) * weight[k + 1];
        }
        S::store(column + j, even + odd);
      }
    }
    return S::sum(error);
  }

  static OTALIGN_INLINE auto inside_range(V x) {
    return (x >= S::splat(Absorb<T>::kLow)) & (x <= S::splat(Absorb<T>::kHigh));
  }

  // A row whose sum floats cannot hold: made exactly, and its potential absorbed unless K is only being looked at.
  void rescue_row(int64_t i, bool absorb, bool first, T& next, T& ratio) {
    T* row = K + i * stride;
    V most = S::splat(T(-HUGE_VAL));
    const auto terms = [&](auto use) {
      for_vectors<T>(m, [&](int64_t j, int, auto inside) {
        const V wj = S::load(w + j);
        const auto mass = inside & (wj > 0);
        const V t = exponent<T>(S::load(row + j)) + log<T>(S::select(mass, wj, S::splat(1)));
        use(S::select(mass, t, S::splat(T(-HUGE_VAL))));
      });
    };
    terms([&](V t) { most = S::max(most, t); });
    const T largest = -S::smallest(-most);
    if (!(largest > T(-HUGE_VAL)) || !(largest < T(HUGE_VAL))) {
      feasible = false;
      return;
    }
    V scaled = V{};
    terms([&](V t) { scaled += exp<T>(t - largest); });
    const double sum_log = largest + std::log(static_cast<double>(S::sum(scaled)));
    const double next_log = -(1 - keep_x) * phi[i] - keep_x * sum_log;
    const double old_log = std::log(static_cast<double>(u[i]));
    ratio = first ? T(1) : static_cast<T>(std::exp(keep_x == 1 ? old_log + sum_log : old_log - next_log));
    if (!absorb) return;
    const V factor = S::splat(static_cast<T>(std::exp(next_log))), shift = S::splat(static_cast<T>(next_log));
    for_vectors<T>(
        m, [&](int64_t j, int count, auto) { S::store(row + j, grown<T>(S::load(row + j), factor, shift), count); });
    phi[i] += next_log;
    z[i] = static_cast<T>(-(1 - keep_x) * phi[i]);
    next = 1;
    const double kept = old_log - next_log, limit = 0.5 * Absorb<T>::kFar;
    u[i] = static_cast<T>(std::exp(kept < -limit ? -limit : kept > limit ? limit : kept));
  }

  // v and w from the column sums.
  void update_columns() {
    bool near = true;
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const V sum = S::load(column + j), bj = S::load(b + j);
      V next = 1 / sum;
      if (keep_y != 1) {
        V offset;
        for (int k = 0; k < count; ++k) offset[k] = static_cast<T>(-(1 - keep_y) * gamma[j + k]);
        for (int k = count; k < W; ++k) offset[k] = 0;
        next = exp<T>(offset - static_cast<T>(keep_y) * log<T>(S::max(sum, S::splat(Absorb<T>::kLow * T(0.5)))));
      }
      const auto mass = inside & (bj > 0);
      near = near && !S::any(mass & ~(inside_range(sum) & inside_range(next)));
      next = S::select(mass, next, S::splat(1));
      S::store(v + j, next, count);
      S::store(w + j, bj * next, count);
    });
    if (!near) rescue_columns();
  }

  // log sum_i a_i u_i K_ij of every column, into column_log.
  void exact_columns() {
    for (int64_t j = 0; j < m; ++j) {
      top[j] = T(-HUGE_VAL);
      column_log[j] = 0;
    }
    const auto terms = [&](auto use) {
      for (int64_t i = 0; i < n; ++i) {
        if (!(a[i] > 0)) continue;
        const T weight = static_cast<T>(std::log(static_cast<double>(a[i])) + std::log(static_cast<double>(u[i])));
        const T* row = K + i * stride;
        for_vectors<T>(m, [&](int64_t j, int count, auto) { use(j, count, exponent<T>(S::load(row + j)) + weight); });
      }
    };
    terms([&](int64_t j, int count, V t) { S::store(top + j, S::max(S::load(top + j), t), count); });
    terms([&](int64_t j, int count, V t) {
      const V largest = S::load(top + j);
      const V scaled = S::select(largest > S::splat(T(-HUGE_VAL)), exp<T>(t - largest), V{});
      S::store(column_log + j, S::load(column_log + j) + scaled, count);
    });
    for (int64_t j = 0; j < m; ++j)
      column_log[j] = static_cast<T>(top[j] + std::log(static_cast<double>(column_log[j])));
  }

  // Column sums that floats cannot hold: all made exactly, and all potentials absorbed.
  void rescue_columns() {
    far = true;
    exact_columns();
    for (int64_t j = 0; j < m; ++j) {
      T shift = 0;
      if (b[j] > 0) {
        if (!(column_log[j] > T(-HUGE_VAL))) feasible = false;
        shift = static_cast<T>(-(1 - keep_y) * gamma[j] - keep_y * column_log[j]);
      }
      gamma[j] += shift;
      top[j] = shift;
      column_log[j] = static_cast<T>(std::exp(static_cast<double>(shift)));
      v[j] = 1;
      w[j] = b[j];
    }
    for (int64_t i = 0; i < n && feasible; ++i) {
      T* row = K + i * stride;
      for_vectors<T>(m, [&](int64_t j, int count, auto) {
        S::store(row + j, grown<T>(S::load(row + j), S::load(column_log + j), S::load(top + j)), count);
      });
    }
  }

  // Potentials, masses, the plan in the place of K, and the values.
  void finish() {
    if (massless) exact_columns();  // nothing else has asked for their potentials
    const T reg = static_cast<T>(it.reg);
    for (int64_t j = 0; j < m; ++j) {
      top[j] = static_cast<T>(it.reg * gamma[j]);
      if (b[j] == 0) {
        const double shift = -(1 - keep_y) * gamma[j] - keep_y * column_log[j];
        gamma[j] += shift;
        it.mass_y[j] = static_cast<T>(std::exp(column_log[j] + shift));
        column_log[j] = static_cast<T>(shift);
      }
      column[j] = 0;
    }
    double linear = 0, mass = 0, value = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* row = K + i * stride;
      T* plan = it.K + i * m;
      const T weight = a[i] * u[i], potential = static_cast<T>(it.reg * phi[i]);
      const T density = a[i] > 0 ? weight : -u[i];  // see Item::K
      V sum = V{}, cost = V{};
      for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
        const V k = S::load(row + j), kept = S::max(k, V{}), wj = S::load(w + j);
        const V p = weight * kept * wj;
        const V C = S::load(top + j) + potential - reg * log<T>(S::select(k > 0, k, S::splat(1)));
        sum += kept * wj;
        cost += S::select(inside & (p > 0), p * C, V{});
        S::store(column + j, S::load(column + j) + weight * kept, count);
        V stored = density * kept * wj;
        if (massless && a[i] > 0) {
          const V mass = exp<T>(exponent<T>(k) + std::log(weight) + S::load(column_log + j));
          stored = S::select(S::load(b + j) == 0, -mass, stored);
        }
        S::store(plan + j, stored, count);
      });
      it.mass_x[i] = u[i] * S::sum(sum);
      linear += S::sum(cost);
      mass += static_cast<double>(a[i]) * it.mass_x[i];
    }
    const bool balanced = keep_x == 1 && keep_y == 1;
    double shift = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (b[j] > 0) it.mass_y[j] = v[j] * column[j];
      gamma[j] = it.reg * (gamma[j] + (b[j] > 0 ? std::log(static_cast<double>(v[j])) : 0.0));
      if (balanced) shift += b[j] * gamma[j];
    }
    for (int64_t i = 0; i < n; ++i) {
      const double f = it.reg * (phi[i] + std::log(static_cast<double>(u[i]))) + shift;
      if (a[i] > 0) value += a[i] * worth(f, it.rho_x);
      it.f[i] = static_cast<T>(f);
    }
    for (int64_t j = 0; j < m; ++j) {
      const double g = gamma[j] - shift;
      if (b[j] > 0) value += b[j] * worth(g, it.rho_y);
      it.g[j] = static_cast<T>(g);
    }
    it.value = value - it.reg * (mass - 1);
    it.linear = linear;
  }

  // What a potential adds to the dual per unit of mass.
  static double worth(double f, double rho) { return rho > 1.7e308 ? f : -rho * std::expm1(-f / rho); }

  // An item that fits into the first-level cache is iterated on in a copy with aligned rows.
  static bool small(int64_t n, int64_t m) { return n * aligned(m) * sizeof(T) <= 64 * 1024; }
  static int64_t aligned(int64_t m) { return (m + W - 1) / W * W; }

  Item<T>& it;
  const int64_t n, m;
  int64_t stride;  // from row to row of K
  T* K;
  T *a, *u, *u_next;
  T* z;  // what a relaxed update adds to log u
  T *b, *v, *w, *column, *top, *column_log;
  double *phi, *gamma;  // absorbed potentials over reg
  double keep_x, keep_y;
  bool feasible = true;
  bool massless = false;  // some point of y has no weight
  bool far = false;       // K holds entries as exponents
};

}  // namespace otalign::OTALIGN_ISA
