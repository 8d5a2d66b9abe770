// Sinkhorn's iterations for one item: multiply-adds on an absorbed kernel, exact wherever floats overflow (absorb.h).
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "../absorb.h"
#include "../accelerate.h"
#include "entries.h"
#include "isa.h"
#include "mixing.h"
#include "newton.h"
#include "simd.h"

namespace otalign::OTALIGN_ISA {

// K_ij = exp(phi_i + gamma_j - C_ij / reg) r_i r_j, where r are powers of two near the roots of the weights. They keep
// K in the range of floats for points of very small weight: an entry that matters to its row or column has an exponent
// within 45 (in float) of zero. Points without mass, because their weight is zero or because they are unreached (at
// infinite cost to all mass), have r = 1 and take no part in the iterations: their sums count as one, and their
// potentials are computed at the end.
template <class T>
class Solver {
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int W = S::W;
  static constexpr double kLog2 = 0.69314718055994530942;
  static constexpr double kFarthest = 0.5 * Absorb<T>::kEntryRange;  // nats by which u may differ from one
  static constexpr int kNarrow = W < 4 ? 1 : OTALIGN_VECTOR_BYTES == 64 ? 16 : 8;  // vectors that registers can hold

 public:
  static size_t scratch(int64_t n, int64_t m) {
    const int64_t own = small(n, m) ? n * aligned(m) : 0;
    const int64_t partial = chunks_of(n, m).count - 1;
    return (own + 6 * padded(n) + (10 + partial) * padded(m)) * sizeof(T) + (4 * n + 7 * m) * sizeof(double) + 29 * 64;
  }

  Solver(Item<T>& item, void* memory, Poll poll, Crew crew)
      : it(item), n(item.n), m(item.m), chunks(chunks_of(n, m)), crew(crew), pace(poll) {
    Arena arena{static_cast<char*>(memory)};
    stride = small(n, m) ? aligned(m) : m;
    K = small(n, m) ? arena.take<T>(n * stride) : item.K;
    for (T** vector : {&a, &rest_a, &over_root_a, &u, &u_next, &z}) *vector = arena.take<T>(padded(n));
    for (T** vector : {&b, &root_b, &rest_b, &v, &w, &column, &top, &column_log, &v_next, &kept_v})
      *vector = arena.take<T>(padded(m));
    for (double** vector : {&phi, &log_root_a, &next_log, &base_row}) *vector = arena.take<double>(n);
    for (double** vector : {&gamma, &log_root_b, &goal, &solved, &earlier, &start, &base})
      *vector = arena.take<double>(m);
    partial = arena.take<T>((chunks.count - 1) * padded(m));
    for (int64_t k = 0; k < chunks.count; ++k) parts[k].found = 0;
    for (int64_t i = 0; i < padded(n); ++i) u[i] = u_next[i] = 1;
    set_reg(it.reg);
    drop = Accelerate::drop(m);
    may_accelerate = it.accelerate && it.tol > 0 && !it.symmetric;
    balances =
        may_accelerate && !is_strict(it.rho_x) && !is_strict(it.rho_y) && damping_x * damping_y > Accelerate::kRelaxed;
    for (int64_t i = 0; i < n; ++i) a[i] = it.a ? it.a[i] : T(1) / n;
    for (int64_t j = 0; j < m; ++j) b[j] = it.b ? it.b[j] : T(1) / m;
  }

  // Returns false if there is no finite solution, or if the poll has stopped it.
  bool run() {
    if (!weights_valid() || !begin()) return false;
    double error = 0;
    while (feasible && !stopped) {
      error = passes < it.max_iter && !it.symmetric ? sweep<true>(passes == 0) : sweep<false>(passes == 0);
      if (!feasible || (passes > 0 && should_stop(error, it.tol, passes, it.max_iter))) break;
      if (may_accelerate && passes > 0 && !exact) accelerate(error);
      // Plain iterations could go on without that memory. Their bits would differ.
      it.starved = it.starved || !newton.ok() || !exponents.ok();
      if (it.starved) return false;
      update();
      count_pass();
    }
    if (!feasible || stopped || error != error) return false;
    it.n_iter = static_cast<int32_t>(passes);
    it.error = error + missing;
    absorb_far_rows();
    finish();
    return std::isfinite(static_cast<T>(it.value)) && std::isfinite(static_cast<T>(it.linear));
  }

 private:
  // What rows can find out, as bits: they need another sweep; the others set the member that is called so.
  enum Finding : uint32_t { kAgain = 1, kExact = 2, kExponents = 4, kHuge = 8, kInfeasible = 16 };

  // What the rows of a chunk leave behind.
  struct alignas(64) Part {
    double error, spread, mass, linear;  // of u; see `spread`; sums over the plan
    uint32_t found;
  };

  // Calls task(begin, end, part) for the rows of each chunk. Tasks of different chunks run at the same time; they write
  // to different rows, and to sums of their own. Behind the last number of a row, hardware vectors may read the next
  // row, which another task may be writing; these lanes are never used.
  template <class F>
  void for_chunks(const F& task) {
    struct Job {
      Solver* solver;
      const F* task;
      void run(int64_t chunk) const {
        const int64_t begin = chunk * solver->chunks.rows, end = begin + solver->chunks.rows;
        (*task)(begin, end < solver->n ? end : solver->n, solver->parts[chunk]);
      }
    } job{this, &task};
    if (chunks.count == 1) return job.run(0);
    crew.run(chunks.count, [](void* context, int64_t chunk) { static_cast<Job*>(context)->run(chunk); }, &job);
  }
  // The sum of what the chunks have left there.
  double sum_of(double Part::* number) const {
    double sum = parts[0].*number;
    for (int64_t k = 1; k < chunks.count; ++k) sum += parts[k].*number;
    return sum;
  }
  // All findings, which are forgotten with that.
  uint32_t findings() {
    uint32_t found = 0;
    for (int64_t k = 0; k < chunks.count; ++k) {
      found |= parts[k].found;
      parts[k].found = 0;
    }
    exact |= (found & kExact) != 0;
    has_exponents |= (found & kExponents) != 0;
    huge |= (found & kHuge) != 0;
    feasible &= !(found & kInfeasible);
    return found;
  }

  // Where a chunk writes a vector (padded(m),): the first into `all`.
  T* sums_of(const Part& part, T* all) const {
    return &part == parts ? all : partial + (&part - parts - 1) * padded(m);
  }
  // Adds the sums of the other chunks to those of the first.
  void add_sums(T* all) const {
    for (int64_t k = 0; k + 1 < chunks.count; ++k)
      for (int64_t j = 0; j < m; j += W) S::store(all + j, S::load(all + j) + S::load(partial + k * padded(m) + j));
  }

  void set_reg(double value) {
    reg = value;
    damping_x = damping(reg, it.rho_x);
    damping_y = damping(reg, it.rho_y);
  }

  // Whether so many passes remain besides those for the way back from the levels.
  bool room(int64_t count) const { return left() >= Accelerate::kReserve + count; }
  int64_t left() const { return it.max_iter - passes; }
  void count_pass() {
    ++passes;
    stopped = stopped || pace.stops((exact ? 16 : 1) * n * m + 8192);
  }

  // Passes in the place of many plain iterations: accelerated.h.
  Costs costs() const;
  void accelerate(double error);
  bool balance(double error);
  bool undo_balance(double error);
  void shift(double constant);
  bool pass();
  Way mix();
  bool mix_step(Mixing<T>& mixing, bool plain, bool bold);
  bool take_back();
  void descend(double error);
  bool keep_exponents();
  bool enter(double next_reg);
  void enter_rows(double ratio, int64_t begin, int64_t end, Part& part);
  bool solve_level(bool last);
  double direction();
  bool move(double part);

  bool weights_valid() const {
    bool valid = true;
    for (int64_t i = 0; i < n; ++i) valid &= a[i] >= 0 && a[i] <= 2;
    for (int64_t j = 0; j < m; ++j) valid &= b[j] >= 0 && b[j] <= 2;
    return valid;
  }

  // Prepares the iterations: K at the potentials gamma of `init` and phi that make each row's largest entry one (or at
  // zero, if symmetric), and the weights of the points that carry mass. Returns false if `init` is not finite.
  bool begin() {
    for (int64_t j = 0; j < m; ++j) {
      gamma[j] = it.init ? it.init[j] / it.reg : 0.0;
      top[j] = it.init ? it.init[j] : T(0);
      if (!std::isfinite(gamma[j])) return false;
    }
    for_chunks([&](int64_t begin, int64_t end, Part&) {
      for (int64_t i = begin; i < end; ++i) z[i] = lowest_cost(i);
    });
    for (int64_t i = 0; i < n; ++i) {
      if (!(z[i] < T(HUGE_VAL))) take_out(a[i], it.rho_x);
    }
    const bool taken_out = take_out_columns();
    for (int64_t i = 0; i < n; ++i) {
      if (taken_out) z[i] = lowest_cost(i);
      phi[i] = z[i] < T(HUGE_VAL) && !it.symmetric ? z[i] / it.reg : 0.0;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int exponent = root_exponent(a[i]);
      const T root = std::ldexp(T(1), exponent);
      log_root_a[i] = exponent * kLog2;
      rest_a[i] = a[i] / root;
      over_root_a[i] = a[i] > 0 ? 1 / root : T(0);
      z[i] = static_cast<T>(-(1 - damping_x) * phi[i]);
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

  // The least C - g of a row over the points that have mass; infinite if the row is unreached.
  T lowest_cost(int64_t i) const {
    const T* cost = it.K + i * m;
    V least = S::splat(T(HUGE_VAL));
    for_vectors<T>(m, [&](int64_t j, int, auto inside) {
      const V h = S::load(cost + j) - S::load(top + j);
      least = S::select(inside & (S::load(b + j) > 0), S::min(least, h), least);
    });
    return S::smallest(least);
  }

  // Takes out unreached columns, and returns whether there are any with mass. If the first row with mass has no
  // infinite cost, there are none. Their potentials are of no use to start from: those of an earlier solve may be huge.
  bool take_out_columns() {
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
      if (!S::any(most == infinity)) return false;
    }
    bool any = false;
    for (int64_t j = 0; j < m; ++j) {
      if (column[j] < T(HUGE_VAL)) continue;
      any |= b[j] > 0;
      take_out(b[j], it.rho_y);
      gamma[j] = 0;
      top[j] = 0;
    }
    return any;
  }

  // An unreached point carries no mass. If its marginal is strict, no plan has that marginal: the error keeps its
  // weight.
  void take_out(T& weight, double rho) {
    if (is_strict(rho)) missing += weight;
    weight = 0;
  }

  void build() {
    for (int64_t j = 0; j < m; ++j) column[j] = static_cast<T>(log_root_b[j]);
    for_chunks([&](int64_t begin, int64_t end, Part& part) { build_rows(begin, end, part); });
    findings();
    for (int64_t k = 0; k < chunks.count; ++k) spread = std::fmax(spread, parts[k].spread);
  }

  void build_rows(int64_t begin, int64_t end, Part& part) {
    const T inv_reg = static_cast<T>(1 / reg);
    const V most = S::splat(Absorb<T>::kEntryRange);
    V extreme{}, largest{}, widest{};
    const V least = S::splat(-std::numeric_limits<T>::max());
    for (int64_t i = begin; i < end; ++i) {
      const T* cost = it.K + i * m;
      T* row = K + i * stride;
      const T lowest = static_cast<T>(phi[i] * it.reg), half = static_cast<T>(log_root_a[i]);
      const T root = a[i] > 0 ? 1 / over_root_a[i] : T(1);
      const auto exponents = [&](auto make) {
        for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
          const V density = (lowest - S::load(cost + j) + S::load(top + j)) * inv_reg;
          const V t = density + (S::load(column + j) + half);
          extreme = S::select(inside, S::max(extreme, S::abs(t)), extreme);
          largest = S::select(inside, S::max(largest, t), largest);
          widest = S::select(inside & (density > least), S::min(widest, density), widest);
          // A product with powers of two is not rounded, which matters if reg is large against the cost.
          S::store(row + j, make(t, exp<T>(density) * (S::load(root_b + j) * root), density < most), count);
        });
      };
      if (massless_y || it.symmetric)
        exponents([&](V t, V product, auto held) { return S::select(held & (t >= -most), product, entry<T>(t)); });
      else  // no exponent is positive
        exponents([&](V t, V product, auto) { return S::select(t < -most, t, product); });
    }
    if (S::any(extreme > S::splat(Absorb<T>::kEntryRange))) part.found |= kExponents;
    if (it.symmetric && S::any(largest > S::splat(Absorb<T>::kEntryRange))) part.found |= kHuge;
    part.spread = -S::smallest(widest);
  }

  // One pass over K, W rows at a time: row sums, from them u_next and the error of u, and (if Columns) the column sums
  // with u_next. The first pass has no u yet. Sets `exact` if the pass had to be made in the log domain: then the
  // result is in next_log instead of u_next.
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
    if (Columns && !has_exponents && damping_x == 1 && W >= 4 && vectors <= kNarrow) {
      const SweepChunk narrow = narrow_sweep(static_cast<int>(vectors), std::make_integer_sequence<int, kNarrow>());
      if (sweep_chunks<Columns>(narrow, first)) return sum_of(&Part::error);
    }
    if (!has_exponents) {
      if (sweep_chunks<Columns>(&Solver::sweep_rows<Columns, false>, first)) return sum_of(&Part::error);
      has_exponents = true;  // absorbing may make entries that leave the range of floats
    }
    sweep_chunks<Columns>(&Solver::sweep_rows<Columns, true>, first);
    return sum_of(&Part::error);
  }

  // Sweeps rows [begin, end), and writes their column sums. Returns the error of u.
  using SweepChunk = double (Solver::*)(int64_t begin, int64_t end, bool first, T* sums, Part& part);

  // Returns false if the rows need another sweep.
  template <bool Columns>
  bool sweep_chunks(SweepChunk sweep, bool first) {
    for_chunks([&](int64_t begin, int64_t end, Part& part) {
      part.error = (this->*sweep)(begin, end, first, Columns ? sums_of(part, column) : nullptr, part);
    });
    if (findings() & kAgain) return false;
    if (Columns) add_sums(column);
    return true;
  }

  template <int... N>
  static SweepChunk narrow_sweep(int vectors, std::integer_sequence<int, N...>) {
    static constexpr SweepChunk table[] = {&Solver::sweep_narrow<N + 1>...};
    return table[vectors - 1];
  }

  // The same, four rows at a time, for a strict marginal and rows of N hardware vectors, whose column sums stay in
  // registers.
  template <int N>
  double sweep_narrow(int64_t begin, int64_t end, bool, T* column_sums, Part& part) {
    using Four = typename S::Four;
    if constexpr (W >= 4) {
      V sums_j[N] = {};
      Four least = Four{} + 1, most = least;
      for (int64_t i = begin; i < end; i += 4) {
        const int64_t last = end - i - 1;
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
        if (!(least[k] >= Absorb<T>::kLow && most[k] <= Absorb<T>::kHigh)) {
          part.found = kAgain;
          return 0;
        }
      for (int v = 0; v < N; ++v) S::store(column_sums + v * W, sums_j[v]);
      V error{};
      for (int64_t i = begin; i < end; i += W)
        error += S::load(a + i) * S::abs(S::load(u + i) / S::load(u_next + i) - 1);
      return S::sum(error);
    }
    return 0;
  }
  static OTALIGN_INLINE typename S::Four load_four(const T* p) {
    return *reinterpret_cast<const typename S::UnalignedFour*>(p);
  }

  // Entries of K as factors: those that are stored as exponents are zero.
  template <bool HasExponents>
  static OTALIGN_INLINE V factor(const T* k) {
    return HasExponents ? S::max(S::load(k), V{}) : S::load(k);
  }

  template <bool Columns, bool HasExponents>
  double sweep_rows(int64_t begin, int64_t end, bool first, T* column_sums, Part& part) {
    if (Columns)
      for (int64_t j = 0; j < padded(m); ++j) column_sums[j] = 0;
    V error{};
    for (int64_t i = begin; i < end; i += W) {
      const int count = end - i < W ? static_cast<int>(end - i) : W;
      const T* rows[W];
      for (int k = 0; k < W; ++k) rows[k] = K + (i + (k < count ? k : 0)) * stride;
      V sums[W] = {};
      for (int64_t j = 0; j < m; j += W) {
        const V wj = S::load(w + j);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) sums[k] += factor<HasExponents>(rows[k] + j) * wj;
      }
      const V over = S::load(over_root_a + i);
      const V sum = S::select(over > 0, S::sum_rows(sums) * over, S::splat(1));
      V next, ratio;
      if (damping_x == 1) {
        next = 1 / sum;
        ratio = S::load(u + i) * sum;
      } else {
        next = exp<T>(S::load(z + i) -
                      static_cast<T>(damping_x) * log<T>(S::max(sum, S::splat(Absorb<T>::kLow * T(0.5)))));
        next = S::select(over > 0, next, S::splat(1));
        ratio = S::load(u + i) / next;
      }
      const auto in_range = in_scaling_range(sum) & in_scaling_range(next);
      if (__builtin_expect(S::any(~in_range), 0)) {
        // A relaxed row may grow by any factor until the columns follow, so both are updated together.
        if (damping_x != 1 || it.symmetric) {
          part.found |= kExact;
          return 0;
        }
        if (!HasExponents && Columns) {
          part.found |= kAgain;
          return 0;
        }
        for (int k = 0; k < count; ++k)
          if (!in_range[k]) rescue_row(i, k, Columns, first, next, ratio, part);
      }
      error += S::load(a + i) * S::abs(ratio - 1);
      S::store(u_next + i, next);
      if (!Columns) continue;
      alignas(64) T weight[W];
      S::store(weight, S::load(rest_a + i) * next);
      for (int64_t j = 0; j < m; j += W) {
        V even = S::load(column_sums + j), odd{};
#pragma GCC unroll 16
        for (int k = 0; k < W; k += 2) {
          even += factor<HasExponents>(rows[k] + j) * weight[k];
          odd += factor<HasExponents>(rows[k + 1] + j) * weight[k + 1];
        }
        S::store(column_sums + j, even + odd);
      }
    }
    return S::sum(error);
  }

  static OTALIGN_INLINE auto in_scaling_range(V x) {
    return (x >= S::splat(Absorb<T>::kLow)) & (x <= S::splat(Absorb<T>::kHigh));
  }

  // The row and column update, or the averaged one, from the results of the sweep.
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
  double next_of(int64_t i, double log_sum) const { return -(1 - damping_x) * phi[i] - damping_x * log_sum; }

  // u / u_next from logarithms.
  double ratio_of(int64_t i, double log_sum, double next) const {
    const double old = std::log(static_cast<double>(u[i]));
    return std::exp(damping_x == 1 ? old + log_sum : old - next);
  }

  // The row update in the log domain, into next_log; returns the error of u.
  double exact_rows(bool first) {
    for_chunks([&](int64_t begin, int64_t end, Part& part) {
      part.error = 0;
      for (int64_t i = begin; i < end; ++i) {
        if (!(a[i] > 0)) continue;
        const double log_sum = log_row_sum(i) - log_root_a[i];
        if (!std::isfinite(log_sum)) part.found |= kInfeasible;
        next_log[i] = next_of(i, log_sum);
        if (!first) part.error += a[i] * std::fabs(ratio_of(i, log_sum, next_log[i]) - 1);
      }
    });
    findings();
    return sum_of(&Part::error);
  }

  // The row in a lane of those from `row` on, whose sum leaves the range of floats: computes its next scaling and its
  // ratio exactly and, if `absorb`, absorbs its potential into K.
  void rescue_row(int64_t row, int lane, bool absorb, bool first, V& next, V& ratio, Part& part) {
    const int64_t i = row + lane;
    const double log_sum = log_row_sum(i) - log_root_a[i];
    if (!std::isfinite(log_sum)) {
      part.found |= kInfeasible;
      return;
    }
    const double next_log = next_of(i, log_sum), old_log = std::log(static_cast<double>(u[i]));
    ratio[lane] = first ? T(1) : static_cast<T>(ratio_of(i, log_sum, next_log));
    if (!absorb) return;
    const V shift = S::splat(static_cast<T>(next_log)), factor = S::splat(static_cast<T>(std::exp(next_log)));
    if (grow_row(i, [&](int64_t) { return Growth{factor, shift}; })) part.found |= kHuge;
    phi[i] += next_log;
    z[i] = static_cast<T>(-(1 - damping_x) * phi[i]);
    next[lane] = 1;
    const double kept = this->next_log[i] = old_log - next_log;
    u[i] = static_cast<T>(std::exp(kept < -kFarthest ? -kFarthest : kept > kFarthest ? kFarthest : kept));
  }

  // Where an item ends, its potentials are those before the sweep. Absorbs those that are too far from the next ones
  // for a float: the weight of such a point is so small that the error does not show it.
  void absorb_far_rows() {
    if (!has_exponents) return;
    const T far = static_cast<T>(0.9 * kFarthest);
    for (int64_t i = 0; i < n; ++i) {
      if (!(std::fabs(std::log(u[i])) > far)) continue;
      const V shift = S::splat(static_cast<T>(next_log[i])), factor = exp<T>(shift);
      grow_row(i, [&](int64_t) { return Growth{factor, shift}; });
      phi[i] += next_log[i];
      u[i] = 1;
    }
  }

  struct Growth {
    V factor, shift;  // factor = exp(shift), if a float can hold it
  };

  // Lets the exponents of a row of K grow by growth(j). Returns whether an entry between points with mass now exceeds
  // the range of floats.
  template <class F>
  bool grow_row(int64_t i, F growth) {
    T* row = K + i * stride;
    const bool counts = a[i] > 0;
    bool exceeds = false;
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const Growth by = growth(j);
      const V k = grown<T>(S::load(row + j), by.factor, by.shift);
      if (counts) exceeds |= S::any(inside & (S::load(rest_b + j) > 0) & (k < 0) & (k > S::splat(-1)));
      S::store(row + j, k, count);
    });
    return exceeds;
  }

  // The same for all rows, by grow(i), unless there is no solution; it may exceed no range before.
  template <class F>
  void grow_rows(F grow) {
    huge = false;
    if (!feasible) return;
    for_chunks([&](int64_t begin, int64_t end, Part& part) {
      for (int64_t i = begin; i < end; ++i)
        if (grow(i)) part.found |= kHuge;
    });
    findings();
  }

  // Writes into v_next what the column sums make of v; `error` becomes sum_j b_j |v_j / v_next_j - 1|. Returns false if
  // a sum leaves the range of floats.
  bool next_columns(double& error) {
    bool in_range = true;
    V apart{};
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const auto mass = inside & (S::load(rest_b + j) > 0);
      const V sum = S::select(mass, S::load(column + j) / S::load(root_b + j), S::splat(1));
      V next = 1 / sum;
      if (damping_y != 1) {
        V offset;
        for (int k = 0; k < count; ++k) offset[k] = static_cast<T>(-(1 - damping_y) * gamma[j + k]);
        for (int k = count; k < W; ++k) offset[k] = 0;
        next = exp<T>(offset - static_cast<T>(damping_y) * log<T>(S::max(sum, S::splat(Absorb<T>::kLow * T(0.5)))));
      }
      in_range = in_range && !S::any(mass & ~(in_scaling_range(sum) & in_scaling_range(next)));
      next = S::select(mass, next, S::splat(1));
      apart += S::select(mass, S::load(b + j) * S::abs(S::load(v + j) / next - 1), V{});
      S::store(v_next + j, next, count);
    });
    error = S::sum(apart);
    return in_range;
  }

  // Computes v and w from the column sums.
  void update_columns() {
    double error;
    if (next_columns(error)) {
      for (int64_t j = 0; j < m; ++j) {
        v[j] = v_next[j];
        w[j] = rest_b[j] * v[j];
      }
      return;
    }
    // A column sum leaves the range of floats: computes all of them exactly, and absorbs all potentials.
    has_exponents = true;
    exact_columns([&](int64_t i) { return std::log(static_cast<double>(u[i])); });
    absorb_columns();
    grow_rows([&](int64_t i) {
      return grow_row(i, [&](int64_t j) { return Growth{S::load(column_log + j), S::load(top + j)}; });
    });
  }

  // Both updates in the log domain: the rows from next_log, then the columns.
  void update_exactly() {
    has_exponents = true;
    exact_columns([&](int64_t i) { return next_log[i]; });
    absorb_columns();
    grow_rows([&](int64_t i) {
      const T shift = a[i] > 0 ? static_cast<T>(next_log[i]) : T(0);
      if (a[i] > 0) phi[i] += next_log[i];
      z[i] = static_cast<T>(-(1 - damping_x) * phi[i]);
      u[i] = 1;
      return grow_row(i, [&](int64_t j) {
        const V both = S::load(top + j) + shift;
        return Growth{exp<T>(both), both};
      });
    });
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
    has_exponents = true;
    for (int64_t i = 0; i < n; ++i) {
      const double shift = a[i] > 0 ? 0.5 * (std::log(static_cast<double>(u[i])) + next_log[i]) : 0.0;
      top[i] = static_cast<T>(shift);
      gamma[i] = phi[i] += shift;
      z[i] = static_cast<T>(-(1 - damping_x) * phi[i]);
      u[i] = v[i] = 1;
      w[i] = rest_b[i];
    }
    grow_rows([&](int64_t i) {
      return grow_row(i, [&](int64_t j) {
        const V both = S::load(top + j) + top[i];
        return Growth{exp<T>(both), both};
      });
    });
  }

  // column_log_j = log sum_i K_ij a_i u_i / (r_i r_j), where log u_i = log_u(i).
  template <class F>
  void exact_columns(F log_u) {
    const auto terms = [&](int64_t begin, int64_t end, auto use) {
      for (int64_t i = begin; i < end; ++i) {
        if (!(a[i] > 0)) continue;
        const T weight = static_cast<T>(std::log(static_cast<double>(rest_a[i])) + log_u(i));
        const T* row = K + i * stride;
        for_vectors<T>(m, [&](int64_t j, int count, auto) { use(j, count, exponent<T>(S::load(row + j)) + weight); });
      }
    };
    for_chunks([&](int64_t begin, int64_t end, Part& part) {
      T* const most = sums_of(part, top);
      for (int64_t j = 0; j < m; ++j) most[j] = T(-HUGE_VAL);
      terms(begin, end, [&](int64_t j, int count, V t) { S::store(most + j, S::max(S::load(most + j), t), count); });
    });
    for (int64_t k = 0; k + 1 < chunks.count; ++k)
      for (int64_t j = 0; j < m; ++j)
        top[j] = partial[k * padded(m) + j] > top[j] ? partial[k * padded(m) + j] : top[j];
    for_chunks([&](int64_t begin, int64_t end, Part& part) {
      T* const sums = sums_of(part, column_log);
      for (int64_t j = 0; j < padded(m); ++j) sums[j] = 0;
      terms(begin, end, [&](int64_t j, int count, V t) {
        const V largest = S::load(top + j);
        const V scaled = S::select(largest > S::splat(T(-HUGE_VAL)), exp<T>(t - largest), V{});
        S::store(sums + j, S::load(sums + j) + scaled, count);
      });
    });
    add_sums(column_log);
    for (int64_t j = 0; j < m; ++j)
      column_log[j] = top[j] > T(-HUGE_VAL)
                          ? static_cast<T>(top[j] + std::log(static_cast<double>(column_log[j])) - log_root_b[j])
                          : T(-HUGE_VAL);
  }

  // Updates gamma by column_log. Its growth goes into `top`, and exp of the growth into column_log.
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
  double next_of_column(int64_t j) const { return -(1 - damping_y) * gamma[j] - damping_y * column_log[j]; }

  // The results of the solve: finish.h.
  void finish();
  void finish_columns();
  void finish_row(int64_t i, T* column_sums, Part& part);
  void finish_massless_row(int64_t i);

  // The exponent of a power of two near the root of a weight; 0 for points that carry no mass.
  static int root_exponent(T weight) {
    int exponent = 0;
    if (weight > 0) std::frexp(weight, &exponent);
    return exponent / 2;
  }

  // exp, clamped to the range of T.
  static T bounded(double exponent) {
    return static_cast<T>(std::fmin(std::exp(exponent), static_cast<double>(std::numeric_limits<T>::max())));
  }

  // A point without weight adds nothing, even if its potential is infinite.
  static double weighted_dual_term(T weight, double potential, double rho) {
    return weight > 0 ? weight * dual_term(potential, rho) : 0.0;
  }

  // An item that fits into the first-level cache is iterated in a copy with aligned rows.
  static bool small(int64_t n, int64_t m) { return n * aligned(m) * sizeof(T) <= 64 * 1024; }
  static int64_t aligned(int64_t m) { return (m + W - 1) / W * W; }

  Item<T>& it;
  const int64_t n, m;
  const Chunks chunks;
  const Crew crew;
  Part parts[kMostChunks];          // of the last for_chunks
  T* partial;                       // (chunks.count - 1, padded(m)) see sums_of
  int64_t stride;                   // elements from one row of K to the next
  T* K;                             // (n, m)
  T *a, *b;                         // (n,), (m,) weights; 0 also for unreached points
  T* over_root_a;                   // (n,) 1 / r_i; 0 without mass
  T* root_b;                        // (m,) r_j
  T *rest_a, *rest_b;               // (n,), (m,) a / r, b / r
  T *u, *u_next, *v;                // (n,), (n,), (m,)
  T* w;                             // (m,) rest_b v, the factors of the columns in the products with K
  T* z;                             // (n,) -(1 - damping_x) phi, a term of log u in a relaxed update
  T* column;                        // (m,) column sums
  T *top, *column_log;              // (m,) see the functions that write them
  double *phi, *gamma;              // (n,), (m,) absorbed potentials over reg
  double *log_root_a, *log_root_b;  // (n,), (m,) log r
  double* next_log;                 // (n,) log u_next after exact_rows; log u, before its bounds, after rescue_row
  T* v_next;                        // (m,) the column update, see next_columns
  double reg;                       // of the iterations: on levels above that of the item
  double damping_x, damping_y;
  Pace pace;
  int64_t passes = 0;    // over K
  double spread = 0;     // the largest difference of finite costs in a row, in nats
  double missing = 0;    // weights of unreached points whose marginals are strict
  bool stopped = false;  // by the poll
  bool feasible = true;
  bool massless_y = false;     // some point of y carries no mass
  bool has_exponents = false;  // K has entries that are stored as exponents
  bool huge = false;           // K has entries between points with mass that exceed the range of floats
  bool exact = false;          // the last sweep was made in the log domain

  // Of accelerated.h.
  bool may_accelerate;
  bool balances;                     // both marginals are relaxed, by far more than reg
  double shifted = 0, before_shift;  // the last shift of constants, 0 = none; the error before it
  bool descended = false;            // the levels were used
  bool lost = false;                 // there is no way on
  double here = 0;                   // the error of v in the last pass
  bool absorbed = false;             // the last pass had to change what v is relative to
  T* kept_v;                         // (m,) see take_back
  Outlook outlook{Accelerate::kFirst, Accelerate::kWindow};
  Newton newton;
  double drop = 0;                    // part of its row below which an entry is left out of Newton's system
  int steps = 0;                      // of Newton's method at this level
  double* goal;                       // (m,) g to start a level from; g / reg before a step
  double *start, *solved, *earlier;   // (m,) g at the beginning, of the last level and of the level before
  Array<T> exponents;                 // (n, aligned(m)) see keep_exponents
  double *base, *base_row, base_reg;  // (m,), (n,) gamma, phi and reg of the exponents
};

}  // namespace otalign::OTALIGN_ISA

#include "accelerated.h"
#include "finish.h"
