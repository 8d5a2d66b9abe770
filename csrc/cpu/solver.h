// Sinkhorn's iterations for one item: multiply-adds on an absorbed kernel, exact wherever floats run out (absorb.h).
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "../absorb.h"
#include "isa.h"
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

// K_ij = exp(phi_i + gamma_j - C_ij / reg) r_i r_j, with r powers of two near the roots of the weights, so
// that points of very small weight keep K in the range of floats: an entry that matters to its row or column lies
// within 45 nats (in float) of one. Points that carry no mass, since their weight is zero or since nothing with mass
// reaches them, have a factor of one, and have no part in the iterations: their sums count as one, and their potentials
// are made in the end.
template <class T>
class Solver {
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int W = S::W;
  static constexpr double kLog2 = 0.69314718055994530942;
  static constexpr int kNarrow = W < 4 ? 1 : OTALIGN_VECTOR_BYTES == 64 ? 16 : 8;  // vectors that registers can hold

 public:
  static size_t scratch(int64_t n, int64_t m) {
    const int64_t own = small(n, m) ? n * aligned(m) : 0;
    return (own + 6 * padded(n) + 8 * padded(m)) * sizeof(T) + (3 * n + 2 * m) * sizeof(double) + 24 * 64;
  }

  Solver(Item<T>& item, void* memory) : it(item), n(item.n), m(item.m) {
    Arena arena{static_cast<char*>(memory)};
    stride = small(n, m) ? aligned(m) : m;
    K = small(n, m) ? arena.take<T>(n * stride) : item.K;
    for (T** vector : {&a, &rest_a, &over_root_a, &u, &u_next, &z}) *vector = arena.take<T>(padded(n));
    for (T** vector : {&b, &root_b, &rest_b, &v, &w, &column, &top, &column_log}) *vector = arena.take<T>(padded(m));
    for (double** vector : {&phi, &log_root_a, &next_log}) *vector = arena.take<double>(n);
    for (double** vector : {&gamma, &log_root_b}) *vector = arena.take<double>(m);
    for (int64_t i = 0; i < padded(n); ++i) u[i] = u_next[i] = 1;
    keep_x = damping(it.reg, it.rho_x);
    keep_y = damping(it.reg, it.rho_y);
    for (int64_t i = 0; i < n; ++i) a[i] = it.a ? it.a[i] : T(1) / n;
    for (int64_t j = 0; j < m; ++j) b[j] = it.b ? it.b[j] : T(1) / m;
  }

  // False if there is no finite solution, or if it was told to stop.
  bool run(Poll poll) {
    if (!weights_valid() || !begin()) return false;
    double error = 0;
    int64_t n_iter = 0;
    Pace pace(poll);
    while (feasible) {
      error = n_iter < it.max_iter && !it.symmetric ? sweep<true>(n_iter == 0) : sweep<false>(n_iter == 0);
      if (!feasible || (n_iter > 0 && should_stop(error, it.tol, n_iter, it.max_iter))) break;
      update();
      ++n_iter;
      if (pace.stops((exact ? 16 : 1) * n * m + 8192)) return false;
    }
    if (!feasible || error != error) return false;
    it.n_iter = static_cast<int32_t>(n_iter);
    it.error = error + missing;
    finish();
    return std::isfinite(static_cast<T>(it.value)) && std::isfinite(static_cast<T>(it.linear));
  }

 private:
  bool weights_valid() const {
    bool valid = true;
    for (int64_t i = 0; i < n; ++i) valid &= a[i] >= 0 && a[i] <= 2;
    for (int64_t j = 0; j < m; ++j) valid &= b[j] >= 0 && b[j] <= 2;
    return valid;
  }

  // What iterations start from: K at the potentials gamma of `init` and, for rows, those that make the largest entry
  // one (or at zero, if symmetric), and which points carry mass.
  bool begin() {
    for (int64_t j = 0; j < m; ++j) {
      gamma[j] = it.init ? it.init[j] / it.reg : 0.0;
      top[j] = it.init ? it.init[j] : T(0);
      if (!std::isfinite(gamma[j])) return false;
    }
    for (int64_t i = 0; i < n; ++i) {
      const T lowest = lowest_cost(i);
      const bool reached = lowest < T(HUGE_VAL);
      if (!reached) take_out(a[i], it.rho_x);
      phi[i] = reached && !it.symmetric ? lowest / it.reg : 0.0;
    }
    take_out_columns();
    for (int64_t i = 0; i < n; ++i) {
      const int exponent = root_exponent(a[i]);
      const T root = std::ldexp(T(1), exponent);
      log_root_a[i] = exponent * kLog2;
      rest_a[i] = a[i] / root;
      over_root_a[i] = a[i] > 0 ? 1 / root : T(0);
      z[i] = static_cast<T>(-(1 - keep_x) * phi[i]);
    }
    for (int64_t j = 0; j < m; ++j) {
      const int exponent = root_exponent(b[j]);
      root_b[j] = std::ldexp(T(1), exponent);
      log_root_b[j] = exponent * kLog2;
      w[j] = rest_b[j] = b[j] / root_b[j];
      v[j] = 1;
      massless_y |= b[j] == 0;
    }
    build();
    return true;
  }

  // The least C - g of a row over the points that have mass; infinite if it reaches none.
  T lowest_cost(int64_t i) const {
    const T* cost = it.K + i * m;
    V least = S::splat(T(HUGE_VAL));
    for_vectors<T>(m, [&](int64_t j, int, auto inside) {
      const V h = S::load(cost + j) - S::load(top + j);
      least = S::select(inside & (S::load(b + j) > 0), S::min(least, h), least);
    });
    return S::smallest(least);
  }

  // Columns that no row with mass reaches. Without infinite costs there are none, which the first row tells.
  void take_out_columns() {
    const V infinity = S::splat(T(HUGE_VAL));
    for (int64_t j = 0; j < padded(m); ++j) column[j] = T(HUGE_VAL);
    for (int64_t i = 0; i < n; ++i) {
      if (!(a[i] > 0)) continue;
      const T* cost = it.K + i * m;
      V most = -infinity;
      for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
        const V least = S::min(S::load(column + j), S::load(cost + j));
        S::store(column + j, least, count);
        most = S::select(inside, S::max(most, least), most);
      });
      if (!S::any(most == infinity)) return;
    }
    for (int64_t j = 0; j < m; ++j)
      if (column[j] == T(HUGE_VAL)) take_out(b[j], it.rho_y);
  }

  // A point that nothing with mass reaches carries none; where it has to, no plan has the marginals.
  void take_out(T& weight, double rho) {
    if (is_strict(rho)) missing += weight;
    weight = 0;
  }

  void build() {
    const T per_reg = static_cast<T>(1 / it.reg);
    const V most = S::splat(Absorb<T>::kFar);
    for (int64_t j = 0; j < m; ++j) column[j] = static_cast<T>(log_root_b[j]);
    V extreme{}, largest{};
    for (int64_t i = 0; i < n; ++i) {
      const T* cost = it.K + i * m;
      T* row = K + i * stride;
      const T lowest = static_cast<T>(phi[i] * it.reg), half = static_cast<T>(log_root_a[i]);
      const T root = a[i] > 0 ? 1 / over_root_a[i] : T(1);
      const auto exponents = [&](auto make) {
        for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
          const V density = (lowest - S::load(cost + j) + S::load(top + j)) * per_reg;
          const V t = density + (S::load(column + j) + half);
          extreme = S::select(inside, S::max(extreme, S::abs(t)), extreme);
          largest = S::select(inside, S::max(largest, t), largest);
          // Times powers of two nothing is rounded, which counts where reg is large against the cost.
          S::store(row + j, make(t, exp<T>(density) * (S::load(root_b + j) * root), density < most), count);
        });
      };
      if (massless_y || it.symmetric)
        exponents([&](V t, V product, auto held) { return S::select(held & (t >= -most), product, entry<T>(t)); });
      else  // no exponent is positive
        exponents([&](V t, V product, auto) { return S::select(t < -most, t, product); });
    }
    far = S::any(extreme > S::splat(Absorb<T>::kFar));
    huge = it.symmetric && S::any(largest > S::splat(Absorb<T>::kFar));
  }

  // One pass over K, W rows at a time: their sums, from them u_next and the error that u leaves, and (if Columns) the
  // column sums with u_next. The first pass has no u yet. Sets `exact` where multiply-adds cannot do it: then next_log
  // holds what u_next cannot.
  template <bool Columns>
  double sweep(bool first) {
    exact = huge;
    if (!exact) {
      const double error = sweep_fast<Columns>(first);
      if (!exact && !huge) return error;
      exact = true;
    }
    return exact_rows(first);
  }

  template <bool Columns>
  double sweep_fast(bool first) {
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
        const Four over = load_four(over_root_a + i), rest = load_four(rest_a + i);
        const Four sum = over > 0 ? S::sum_four(sums) * over : Four{} + 1;
        const Four next = 1 / sum;
        least = sum < least ? sum : least;
        most = sum > most ? sum : most;
        *reinterpret_cast<typename S::UnalignedFour*>(u_next + i) = next;
        const Four weight = next * rest;
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
  static OTALIGN_INLINE typename S::Four load_four(const T* p) {
    return *reinterpret_cast<const typename S::UnalignedFour*>(p);
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
      const V over = S::load(over_root_a + i);
      const V sum = S::select(over > 0, S::sum_rows(sums) * over, S::splat(1));
      V next, ratio;
      if (keep_x == 1) {
        next = 1 / sum;
        ratio = S::load(u + i) * sum;
      } else {
        next =
            exp<T>(S::load(z + i) - static_cast<T>(keep_x) * log<T>(S::max(sum, S::splat(Absorb<T>::kLow * T(0.5)))));
        next = S::select(over > 0, next, S::splat(1));
        ratio = S::load(u + i) / next;
      }
      const auto near = inside_range(sum) & inside_range(next);
      if (__builtin_expect(S::any(~near), 0)) {
        // A relaxed row may grow by any factor until the columns follow: both are then updated at once.
        if (keep_x != 1 || it.symmetric) {
          exact = true;
          return 0;
        }
        if (!Far && Columns) {
          far = true;  // absorbing may bring entries that only exponents can hold
          return sweep_rows<Columns, true>(first);
        }
        for (int k = 0; k < count; ++k)
          if (!near[k]) rescue_row(i + k, Columns, first, next[k], ratio[k]);
      }
      error += S::load(a + i) * S::abs(ratio - 1);
      S::store(u_next + i, next);
      if (!Columns) continue;
      alignas(64) T weight[W];
      S::store(weight, S::load(rest_a + i) * next);
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

  // Row and column update, or the averaged one, from what the sweep has found.
  void update() {
    if (it.symmetric) {
      update_symmetric();
    } else if (exact) {
      update_exactly();
    } else {
      std::swap(u, u_next);
      update_columns();
    }
  }

  // log sum_j K_ij w_j, exactly; -inf if there is nothing to sum.
  double log_row_sum(int64_t i) const {
    const T* row = K + i * stride;
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
    if (!(largest > T(-HUGE_VAL))) return -HUGE_VAL;
    V scaled = V{};
    terms([&](V t) { scaled += exp<T>(t - largest); });
    return largest + std::log(static_cast<double>(S::sum(scaled)));
  }

  // log u_next for the exact sum of a row.
  double next_of(int64_t i, double log_sum) const { return -(1 - keep_x) * phi[i] - keep_x * log_sum; }

  // |u / u_next - 1|'s ratio from logarithms.
  double ratio_of(int64_t i, double log_sum, double next) const {
    const double old = std::log(static_cast<double>(u[i]));
    return std::exp(keep_x == 1 ? old + log_sum : old - next);
  }

  // The row update in the log domain, into next_log; the error that u leaves.
  double exact_rows(bool first) {
    double error = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(a[i] > 0)) continue;
      const double log_sum = log_row_sum(i) - log_root_a[i];
      feasible = feasible && std::isfinite(log_sum);
      next_log[i] = next_of(i, log_sum);
      if (!first) error += a[i] * std::fabs(ratio_of(i, log_sum, next_log[i]) - 1);
    }
    return error;
  }

  // A row whose sum floats cannot hold: made exactly, and its potential absorbed unless K is only being looked at.
  void rescue_row(int64_t i, bool absorb, bool first, T& next, T& ratio) {
    const double log_sum = log_row_sum(i) - log_root_a[i];
    if (!std::isfinite(log_sum)) {
      feasible = false;
      return;
    }
    const double next_log = next_of(i, log_sum), old_log = std::log(static_cast<double>(u[i]));
    ratio = first ? T(1) : static_cast<T>(ratio_of(i, log_sum, next_log));
    if (!absorb) return;
    const V shift = S::splat(static_cast<T>(next_log)), factor = S::splat(static_cast<T>(std::exp(next_log)));
    grow_row(i, [&](int64_t) { return Growth{factor, shift}; });
    phi[i] += next_log;
    z[i] = static_cast<T>(-(1 - keep_x) * phi[i]);
    next = 1;
    const double kept = old_log - next_log, limit = 0.5 * Absorb<T>::kFar;
    u[i] = static_cast<T>(std::exp(kept < -limit ? -limit : kept > limit ? limit : kept));
  }

  struct Growth {
    V factor, shift;  // exp(shift), where floats hold it
  };

  // A row of K after its exponents have grown by growth(j); tells in `huge` if an entry that counts is now beyond
  // floats.
  template <class F>
  void grow_row(int64_t i, F growth) {
    T* row = K + i * stride;
    const bool counts = a[i] > 0;
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const Growth by = growth(j);
      const V k = grown<T>(S::load(row + j), by.factor, by.shift);
      if (counts) huge |= S::any(inside & (S::load(rest_b + j) > 0) & (k < 0) & (k > S::splat(-1)));
      S::store(row + j, k, count);
    });
  }

  // v and w from the column sums.
  void update_columns() {
    bool near = true;
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const V rest = S::load(rest_b + j);
      const auto mass = inside & (rest > 0);
      const V sum = S::select(mass, S::load(column + j) / S::load(root_b + j), S::splat(1));
      V next = 1 / sum;
      if (keep_y != 1) {
        V offset;
        for (int k = 0; k < count; ++k) offset[k] = static_cast<T>(-(1 - keep_y) * gamma[j + k]);
        for (int k = count; k < W; ++k) offset[k] = 0;
        next = exp<T>(offset - static_cast<T>(keep_y) * log<T>(S::max(sum, S::splat(Absorb<T>::kLow * T(0.5)))));
      }
      near = near && !S::any(mass & ~(inside_range(sum) & inside_range(next)));
      next = S::select(mass, next, S::splat(1));
      S::store(v + j, next, count);
      S::store(w + j, rest * next, count);
    });
    if (near) return;
    // Column sums that floats cannot hold: all made exactly, and all potentials absorbed.
    far = true;
    exact_columns([&](int64_t i) { return std::log(static_cast<double>(u[i])); });
    absorb_columns();
    huge = false;
    for (int64_t i = 0; i < n && feasible; ++i)
      grow_row(i, [&](int64_t j) { return Growth{S::load(column_log + j), S::load(top + j)}; });
  }

  // Both updates in the log domain: rows by next_log, then columns.
  void update_exactly() {
    far = true;
    exact_columns([&](int64_t i) { return next_log[i]; });
    absorb_columns();
    huge = false;
    for (int64_t i = 0; i < n && feasible; ++i) {
      const T shift = a[i] > 0 ? static_cast<T>(next_log[i]) : T(0);
      if (a[i] > 0) phi[i] += next_log[i];
      z[i] = static_cast<T>(-(1 - keep_x) * phi[i]);
      u[i] = 1;
      grow_row(i, [&](int64_t j) {
        const V both = S::load(top + j) + shift;
        return Growth{exp<T>(both), both};
      });
    }
  }

  // f <- (f + T f) / 2 for both sides at once.
  void update_symmetric() {
    if (!exact) {
      for (int64_t i = 0; i < n; ++i) {
        u[i] = v[i] = std::sqrt(u[i] * u_next[i]);
        w[i] = rest_b[i] * v[i];
      }
      return;
    }
    far = true;
    huge = false;
    for (int64_t i = 0; i < n; ++i) {
      const double shift = a[i] > 0 ? 0.5 * (std::log(static_cast<double>(u[i])) + next_log[i]) : 0.0;
      top[i] = static_cast<T>(shift);
      gamma[i] = phi[i] += shift;
      z[i] = static_cast<T>(-(1 - keep_x) * phi[i]);
      u[i] = v[i] = 1;
      w[i] = rest_b[i];
    }
    for (int64_t i = 0; i < n && feasible; ++i)
      grow_row(i, [&](int64_t j) {
        const V both = S::load(top + j) + top[i];
        return Growth{exp<T>(both), both};
      });
  }

  // log sum_i K_ij a_i u_i / (r_i r_j) of every column, into column_log, with log u_i = log_u(i).
  template <class F>
  void exact_columns(F log_u) {
    for (int64_t j = 0; j < m; ++j) {
      top[j] = T(-HUGE_VAL);
      column_log[j] = 0;
    }
    const auto terms = [&](auto use) {
      for (int64_t i = 0; i < n; ++i) {
        if (!(a[i] > 0)) continue;
        const T weight = static_cast<T>(std::log(static_cast<double>(rest_a[i])) + log_u(i));
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
      column_log[j] = top[j] > T(-HUGE_VAL)
                          ? static_cast<T>(top[j] + std::log(static_cast<double>(column_log[j])) - log_root_b[j])
                          : T(-HUGE_VAL);
  }

  // gamma after an update by column_log; by how much it has grown into `top`, exp of that into column_log.
  void absorb_columns() {
    for (int64_t j = 0; j < m; ++j) {
      T shift = 0;
      if (b[j] > 0) {
        feasible = feasible && std::isfinite(column_log[j]);
        shift = static_cast<T>(next_of_column(j));
      }
      gamma[j] += shift;
      top[j] = shift;
      column_log[j] = static_cast<T>(std::exp(static_cast<double>(shift)));
      v[j] = 1;
      w[j] = rest_b[j];
    }
  }
  double next_of_column(int64_t j) const { return -(1 - keep_y) * gamma[j] - keep_y * column_log[j]; }

  // Potentials, masses, the plan in the place of K, and the values.
  void finish() {
    finish_columns();
    Sums sums;
    for (int64_t i = 0; i < n; ++i) {
      if (a[i] > 0)
        finish_row(i, sums);
      else
        finish_massless_row(i);
    }
    const bool balanced = keep_x == 1 && keep_y == 1 && !it.symmetric;
    double shift = 0, value = 0, total_a = 0, total_b = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (b[j] > 0) it.mass_y[j] = v[j] * column[j] / root_b[j];
      gamma[j] = it.reg * (gamma[j] + std::log(static_cast<double>(v[j])));
      if (balanced) shift += b[j] * gamma[j];
    }
    const auto gauge = [&](T weight, T mass) {
      return weight == 0 && mass == 0 ? 0.0 : shift;
    };  // not of the unreached
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
    it.value = value - it.reg * (sums.mass - total_a * total_b);  // one, but for the rounding of the weights
    it.linear = sums.linear;
  }

  struct Sums {
    double mass = 0, linear = 0;
  };

  // The potentials of columns without mass, from those of the rows; `top` becomes the part of a column in C, column_log
  // by how much the potential of a massless column has moved.
  void finish_columns() {
    if (massless_y) exact_columns([&](int64_t i) { return std::log(static_cast<double>(u[i])); });
    for (int64_t j = 0; j < m; ++j) {
      top[j] = static_cast<T>(it.reg * gamma[j]);
      column[j] = 0;
      if (b[j] > 0) continue;
      const bool reached = column_log[j] > T(-HUGE_VAL);
      const double next = reached ? next_of_column(j) : unreached_potential(it.rho_y) / it.reg - gamma[j];
      it.mass_y[j] = reached ? bounded(column_log[j] + next) : T(0);
      gamma[j] += next;
      column_log[j] = static_cast<T>(next);
    }
  }

  void finish_row(int64_t i, Sums& sums) {
    const T* row = K + i * stride;
    T* plan = it.K + i * m;
    const T reg = static_cast<T>(it.reg), weight = rest_a[i] * u[i], log_weight = std::log(weight);
    const T potential = static_cast<T>(it.reg * phi[i]);
    V sum = V{}, cost = V{};
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const V k = S::load(row + j), kept = S::max(k, V{}), wj = S::load(w + j);
      const V p = weight * kept * wj;
      const V density = kept * (over_root_a[i] / S::load(root_b + j));
      const auto held = (density > 0) & (density < S::splat(T(1e30)));  // else the weights leave no mass
      const V C = S::load(top + j) + potential - reg * log<T>(S::select(held, density, S::splat(1)));
      sum += kept * wj;
      cost += S::select(inside & held & (p > 0), p * C, V{});
      S::store(column + j, S::load(column + j) + weight * kept, count);
      V stored = p;
      if (massless_y) {  // see Item::K
        const V with_one = exp<T>(exponent<T>(k) + log_weight + S::load(column_log + j));
        stored = S::select(S::load(b + j) == 0, V{} - with_one, stored);
      }
      S::store(plan + j, stored, count);
    });
    it.mass_x[i] = u[i] * S::sum(sum) * over_root_a[i];
    sums.linear += S::sum(cost);
    sums.mass += static_cast<double>(a[i]) * it.mass_x[i];
  }

  // Of a row without mass: its potential from those of the columns, and its plan with a weight of one.
  void finish_massless_row(int64_t i) {
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

  // Of the power of two near the root of a weight; 0 for points that carry no mass.
  static int root_exponent(T weight) {
    int exponent = 0;
    if (weight > 0) std::frexp(weight, &exponent);
    return exponent / 2;
  }

  // exp, within the range of T.
  static T bounded(double exponent) {
    return static_cast<T>(std::fmin(std::exp(exponent), static_cast<double>(std::numeric_limits<T>::max())));
  }

  // A point without weight counts nothing, whatever its potential.
  static double weighted_dual_term(T weight, double potential, double rho) {
    return weight > 0 ? weight * dual_term(potential, rho) : 0.0;
  }

  // An item that fits into the first-level cache is iterated on in a copy with aligned rows.
  static bool small(int64_t n, int64_t m) { return n * aligned(m) * sizeof(T) <= 64 * 1024; }
  static int64_t aligned(int64_t m) { return (m + W - 1) / W * W; }

  Item<T>& it;
  const int64_t n, m;
  int64_t stride;  // from row to row of K
  T* K;
  T *a, *b;                 // weights; 0 also for points that nothing with mass reaches
  T *over_root_a, *root_b;  // of the powers of two near the roots of weights that are in K: 1 / theirs, or 0; theirs
  T *rest_a, *rest_b;       // weights over these powers of two
  T *u, *u_next, *v;
  T* w;  // weights of y in the products with K: rest_b v
  T* z;  // what a relaxed update adds to log u
  T *column, *top, *column_log;
  double *phi, *gamma;  // absorbed potentials over reg
  double *log_root_a, *log_root_b;
  double* next_log;  // log u_next after exact_rows
  double keep_x, keep_y;
  double missing = 0;  // weights of points that have to carry mass and cannot
  bool feasible = true;
  bool massless_y = false;  // some point of y carries no mass
  bool far = false;         // K holds entries as exponents
  bool huge = false;        // K holds entries that count and are beyond floats
  bool exact = false;       // the last sweep was made in the log domain
};

}  // namespace otalign::OTALIGN_ISA
