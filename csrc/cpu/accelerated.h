// The passes that Solver makes in the place of many plain iterations (accelerate.h). Included by solver.h only.
#pragma once

#include "solver.h"

namespace otalign::OTALIGN_ISA {

// Measured for rows of 60 to 200 entries: an iteration takes 0.09 ns an entry, an entry of the system 2 ns, its
// factorisation 0.02 ns m^3, conjugate gradients 60 ns an entry.
template <class T>
inline Costs Solver<T>::costs() const {
  const double entries = 6.0 * n;  // that matter, about
  const double system = m <= Newton::kDense ? 2 * entries + m * m * (0.02 * m + 0.5) : 60 * entries;
  const double step = 4 + (system + 2000) / (0.09 * n * m);
  return {step, 12 * step + 6 * 16};  // six levels, each with the exponentials of all entries; a dozen steps
}

// Called after a sweep of plain iterations with its error, before its update. Makes other passes if they pay, and
// returns in such a state as well.
template <class T>
inline void Solver<T>::accelerate(double error) {
  outlook.observe(error);
  double ahead = outlook.passes_to(it.tol);
  const double contraction = damping_x * damping_y;  // of a relaxed iteration, in the largest norm
  if (contraction < 1) ahead = std::fmin(ahead, std::log(error / it.tol) / -std::log(contraction));
  if (shifted != 0 && undo_balance(error)) return;
  Way way = Accelerate::choose(ahead, descended ? 0.0 : spread, costs(), left());
  if (way == Way::plain || (balances && balance(error))) return;
  if (way == Way::mixing) way = mix();
  if (way == Way::levels) descend(error);
}

// Shifts the constants of f, as the sweep with this error made it, and of g, where they are most of the error.
template <class T>
inline bool Solver<T>::balance(double error) {
  const auto apart = [&](int64_t i) { return std::log(static_cast<double>(u[i]) / static_cast<double>(u_next[i])); };
  double constant = 0, rest = 0, sum_x = 0, sum_y = 0;
  for (int64_t i = 0; i < n; ++i)
    if (a[i] > 0) constant += a[i] * apart(i);
  for (int64_t i = 0; i < n; ++i) {
    if (!(a[i] > 0)) continue;
    rest += a[i] * std::fabs(std::expm1(apart(i) - constant));
    sum_x += a[i] * std::exp(-reg / it.rho_x * (phi[i] + std::log(static_cast<double>(u_next[i]))));
  }
  if (!Accelerate::is_constant(rest, error)) return false;
  for (int64_t j = 0; j < m; ++j)
    if (b[j] > 0) sum_y += b[j] * std::exp(-reg / it.rho_y * (gamma[j] + std::log(static_cast<double>(v[j]))));
  shifted = Accelerate::shift(it.rho_x, it.rho_y, sum_x, sum_y) / reg;
  before_shift = error;
  shift(shifted);
  return true;
}

// Takes the last shift back if the error has grown, and makes no other. It changes no entry of the plan, so that the
// pass since then is not lost.
template <class T>
inline bool Solver<T>::undo_balance(double error) {
  const double last = shifted;
  shifted = 0;
  balances = error <= before_shift;
  if (!balances) shift(-last);
  return !balances;
}

template <class T>
inline void Solver<T>::shift(double constant) {
  for (int64_t i = 0; i < n; ++i) {
    phi[i] += constant;
    z[i] = static_cast<T>(-(1 - damping_x) * phi[i]);
  }
  for (int64_t j = 0; j < m; ++j) gamma[j] -= constant;
  outlook.forget();
}

// One sweep at v, whose error becomes `here`. Returns false if floats cannot hold its results.
template <class T>
inline bool Solver<T>::pass() {
  absorbed = false;
  sweep<true>(true);
  count_pass();
  for (int tries = 0; exact && feasible && !stopped && tries < 3 && left() > 2; ++tries) {
    update();
    absorbed = true;
    sweep<true>(true);
    count_pass();
  }
  here = HUGE_VAL;
  const bool held = feasible && !exact && next_columns(here);
  lost = lost || !feasible || stopped;
  if (!held || !(here >= 0)) here = HUGE_VAL;
  return here < HUGE_VAL && !lost;
}

// Plain iterations whose updates of log v are mixed with those before. Returns how to go on.
template <class T>
inline Way Solver<T>::mix() {
  next_columns(here);
  double largest = 0;
  for (int64_t j = 0; j < m; ++j)
    if (b[j] > 0) largest = std::fmax(largest, std::fabs(std::log(static_cast<double>(v_next[j] / v[j]))));
  if (!(largest <= Accelerate::kLinear)) return Way::plain;
  Mixing<T> mixing(m, b);
  if (!mixing.ok()) {
    it.starved = true;
    return Way::plain;
  }
  Outlook outlook(Accelerate::kMixed, Accelerate::kMixedWindow);
  Rival<double> rival;
  int wait = Accelerate::kWarm, warming = wait;
  double tried = HUGE_VAL;  // the error at the last Newton step
  while (here > it.tol && left() > 2) {
    outlook.observe(here);
    const Way way = Accelerate::choose_mixed(outlook.passes_to(it.tol), spread, costs(), left());
    if (way == Way::levels && !descended) return way;
    if (way != Way::mixing && here < 0.1 * tried) {
      tried = here;
      if (solve_level(true)) return Way::plain;
      if (lost) return Way::plain;
      mixing.forget();
      continue;
    }
    const double before = here;
    const bool plain = warming-- > 0 || left() < 4 || rival.is_fast();
    const bool mixed = mix_step(mixing, plain, rival.is_ahead(here));
    for (int64_t j = 0; j < m; ++j) kept_v[j] = v_next[j];
    const bool held = pass();
    if (!mixed) {
      if (!held) return Way::plain;
      rival.plain(before, here);
      continue;
    }
    if (held && rival.mixed(here)) continue;
    if (lost) return Way::plain;
    mixing.forget();
    warming = wait *= 2;
    if (!take_back()) return Way::plain;
  }
  return Way::plain;
}

// Moves v by a mixed step; returns false if it is that of a plain iteration.
template <class T>
inline bool Solver<T>::mix_step(Mixing<T>& mixing, bool plain, bool bold) {
  T* const residual = mixing.residual();
  for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
    const V ratio = S::select(inside & (S::load(rest_b + j) > 0), S::load(v_next + j) / S::load(v + j), S::splat(1));
    S::store(residual + j, log<T>(ratio), count);
  });
  const bool mixed = mixing.advance(plain, bold);
  const T* const step = mixing.step();
  for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
    const V moved = S::select(inside, S::load(v + j) * exp<T>(S::load(step + j)), S::splat(1));
    S::store(v + j, moved, count);
    S::store(w + j, S::load(rest_b + j) * moved, count);
  });
  return mixed;
}

// A sweep at the plain update, in kept_v, of where the last step came from.
template <class T>
inline bool Solver<T>::take_back() {
  if (absorbed) return false;
  for (int64_t j = 0; j < m; ++j) {
    v[j] = kept_v[j];
    w[j] = rest_b[j] * v[j];
  }
  return pass();
}

// Newton's method at the item's reg, or on levels of reg down to it.
template <class T>
inline void Solver<T>::descend(double error) {
  descended = true;
  const auto set = [&](double* out, const double* in) {
    for (int64_t j = 0; j < m; ++j) out[j] = in[j];
  };
  const auto potentials = [&](double* out) {
    for (int64_t j = 0; j < m; ++j) out[j] = reg * (gamma[j] + std::log(static_cast<double>(v[j])));
  };
  next_columns(here);
  potentials(start);
  if (solve_level(true) || lost || !keep_exponents()) return;
  bool found = false;
  double level = it.reg * std::fmax(spread / Accelerate::kTop, 2.0);
  for (; level <= spread * it.reg && room(6) && !lost; level *= Accelerate::kClimb) {
    set(goal, start);
    found = enter(level) && solve_level(false);
    if (found) break;
  }
  set(goal, start);
  if (found) {
    Ladder<double> ladder(it.reg);
    double above = 0;  // the level before `level`; 0 = none
    potentials(solved);
    while (level > it.reg && room(6) && !lost) {
      const double next = ladder.below(level), reach = above > 0 ? (next - level) / (level - above) : 0.0;
      for (int64_t j = 0; j < m; ++j) goal[j] = solved[j] + (above > 0 ? reach * (solved[j] - earlier[j]) : 0.0);
      if (enter(next) && solve_level(next == it.reg)) {
        set(earlier, solved);
        potentials(solved);
        above = level;
        level = next;
        ladder.solved(steps);
      } else if (!ladder.refused()) {
        break;
      }
    }
    if (level == it.reg || lost) return;
    set(goal, solved);
  }
  // Out of passes, or no way found: goes on from these potentials, or from the first if they are better.
  if (lost || (enter(it.reg) && here <= Accelerate::kWorth * error) || lost) return;
  set(goal, start);
  enter(it.reg);
}

// Keeps the exponents (g - C) / reg of K without their roots, from which the levels are made. Returns false if there is
// no memory.
template <class T>
inline bool Solver<T>::keep_exponents() {
  exponents.zeros(n * aligned(m));
  if (!exponents.ok()) return false;
  base_reg = reg;
  for (int64_t j = 0; j < m; ++j) {
    base[j] = gamma[j];
    column[j] = static_cast<T>(log_root_b[j]);
  }
  for_chunks([&](int64_t begin, int64_t end, Part&) {
    for (int64_t i = begin; i < end; ++i) {
      T* const kept = &exponents[i * aligned(m)];
      const T half = static_cast<T>(log_root_a[i]);
      base_row[i] = phi[i];
      for_vectors<T>(m, [&](int64_t j, int count, auto) {
        S::store(kept + j, exponent<T>(S::load(K + i * stride + j)) - (S::load(column + j) + half), count);
      });
    }
  });
  return true;
}

// Makes the iterations go on with `next_reg` from the potentials g = goal, in the unit of the cost: one pass over K,
// and a sweep, an update and a sweep.
template <class T>
inline bool Solver<T>::enter(double next_reg) {
  const double ratio = base_reg / next_reg;
  for (int64_t j = 0; j < m; ++j) {
    gamma[j] = b[j] > 0 ? goal[j] / next_reg : ratio * base[j];
    top[j] = static_cast<T>(gamma[j] - ratio * base[j]);
    column[j] = static_cast<T>(log_root_b[j]);
    v[j] = 1;
    w[j] = rest_b[j];
  }
  set_reg(next_reg);
  drop = Accelerate::drop(m);
  for_chunks([&](int64_t begin, int64_t end, Part& part) { enter_rows(ratio, begin, end, part); });
  has_exponents = huge = exact = false;
  findings();
  count_pass();
  if (!pass() || left() < 5) return here < HUGE_VAL;
  update();
  return pass();
}

template <class T>
inline void Solver<T>::enter_rows(double ratio, int64_t begin, int64_t end, Part& part) {
  const T scale = static_cast<T>(ratio);
  typename S::I outside{};
  for (int64_t i = begin; i < end; ++i) {
    const T* const kept = &exponents[i * aligned(m)];
    T* const row = K + i * stride;
    const T half = static_cast<T>(log_root_a[i]);
    V most = S::splat(T(-HUGE_VAL));
    for_vectors<T>(m, [&](int64_t j, int, auto inside) {
      const V t = S::load(kept + j) * scale + S::load(top + j);
      most = S::select(inside & (S::load(rest_b + j) > 0), S::max(most, t), most);
    });
    const T largest = -S::smallest(-most), shift = largest > T(-HUGE_VAL) ? largest : T(0);
    phi[i] = ratio * base_row[i] - shift;
    z[i] = static_cast<T>(-(1 - damping_x) * phi[i]);
    u[i] = u_next[i] = 1;
    for_vectors<T>(m, [&](int64_t j, int count, auto inside) {
      const V t = S::load(kept + j) * scale + S::load(top + j) - shift;
      const V k = entry<T>(t + (S::load(column + j) + half));
      outside |= inside & (k < 0);
      S::store(row + j, k, count);
    });
  }
  if (S::any(outside)) part.found |= kExponents;
}

// Newton's steps at this reg after a sweep, until the error is at most the tolerance at the `last` level, or until the
// steps have become short. Returns false where they are long or many; at v is then the plain update of the last that
// was good.
template <class T>
inline bool Solver<T>::solve_level(bool last) {
  const double enough = std::fmax(it.tol, sizeof(T) == 4 ? 2e-6 : 1e-13);
  if (!newton.prepare(m, sizeof(T) == 4 ? 1e-7 : 1e-15)) return false;
  if (last) drop = std::fmin(drop, Accelerate::kLastDrop);
  double longest = HUGE_VAL;
  for (steps = 0; room(2) && !lost; ++steps) {
    if (last ? here <= enough : longest <= Accelerate::kNear) return true;
    if (steps >= Accelerate::kMostSteps && longest > Accelerate::kNear) return false;
    longest = direction();
    if (!(longest <= Accelerate::kFar)) return false;
    const double before = here;
    for (int64_t j = 0; j < m; ++j) {
      goal[j] = gamma[j] + std::log(static_cast<double>(v[j]));
      kept_v[j] = v_next[j];
    }
    double part = 1;
    bool taken = false;
    while (!taken && part > Accelerate::kShortest && room(1) && !lost) {
      taken = move(part) && pass() && Accelerate::accepts(here, before, part);
      if (!taken && longest <= Accelerate::kNear && drop > Accelerate::kLeastDrop) break;
      if (!taken) part *= Accelerate::kShorter;
    }
    if (!taken) {
      if (lost || !take_back() || part != 1) return false;
      drop = std::fmax(0.1 * drop, Accelerate::kLeastDrop);  // so short a step is wrong only for what was left out
      longest = HUGE_VAL;
      continue;
    }
    if (part == 1 && Accelerate::too_coarse(here, before, longest))
      drop = std::fmax(0.1 * drop, Accelerate::kLeastDrop);
    if (part != 1) longest = HUGE_VAL;
  }
  return last ? here <= enough : longest <= Accelerate::kNear;
}

// Newton's step of g / reg from the plan after a sweep, in one pass over K. Returns its length in nats, infinite if
// there is none.
template <class T>
inline double Solver<T>::direction() {
  newton.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (!(a[i] > 0)) continue;
    const T* row = K + i * stride;
    if (pace.stops(m) || !newton.begin_row()) return HUGE_VAL;
    double sum = 1 / (static_cast<double>(u_next[i]) * over_root_a[i]);  // of K w
    if (damping_x != 1) {
      V sums{};
      for_vectors<T>(m, [&](int64_t j, int, auto inside) {
        sums += S::select(inside, S::max(S::load(row + j), V{}) * S::load(w + j), V{});
      });
      sum = S::sum(sums);
    }
    const V least = S::splat(static_cast<T>(drop * sum));
    const double over = 1 / sum;
    for_vectors<T>(m, [&](int64_t j, int, auto inside) {
      for (uint32_t kept = S::bits(inside & (S::load(row + j) * S::load(w + j) >= least)); kept; kept &= kept - 1) {
        const int64_t k = j + __builtin_ctz(kept);
        newton.put(k, static_cast<double>(row[k]) * w[k] * over);
      }
    });
    newton.end_row(damping_x * rest_a[i] * u_next[i] * sum);
  }
  count_pass();
  const double relaxed = 1 / damping_y - 1;  // reg / rho_y
  for (int64_t j = 0; j < m; ++j) {
    const double mass = static_cast<double>(w[j]) * column[j];
    double wanted = b[j];
    if (relaxed > 0) wanted *= std::exp(-relaxed * (gamma[j] + std::log(static_cast<double>(v[j]))));
    newton.diagonal[j] = b[j] > 0 ? mass + relaxed * wanted : 1.0;
    newton.right[j] = b[j] > 0 ? wanted - mass : 0.0;
    newton.shared[j] = b[j] > 0 ? damping_x * mass : 0.0;
  }
  return newton.solve(damping_x == 1 && damping_y == 1, pace) ? newton.longest() : HUGE_VAL;
}

// Moves g / reg from `goal` by a part of the step. Returns false if floats cannot hold it.
template <class T>
inline bool Solver<T>::move(double part) {
  double farthest = 0;
  for (int64_t j = 0; j < m; ++j) {
    const double shift = b[j] > 0 ? goal[j] + part * newton.step[j] - gamma[j] : 0.0;
    farthest = std::fmax(farthest, std::fabs(shift));
    v[j] = static_cast<T>(std::exp(shift));
    w[j] = rest_b[j] * v[j];
  }
  return farthest < Absorb<T>::kScalingRange;
}

}  // namespace otalign::OTALIGN_ISA
