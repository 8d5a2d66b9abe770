// Sinkhorn's iterations: multiply-adds on an absorbed kernel matrix, exact in the log domain wherever floats run out.
//
// With potentials phi, gamma (in units of reg) absorbed, K_ij = exp(phi_i + gamma_j - C_ij / reg), an iteration is
//
//   u = 1 / (K w),  w = b v,   v = 1 / (K^T (a u)),
//
// and phi + log u, gamma + log v are the potentials. An iteration that would leave the range of absorb.h is not made:
// the same iteration is made in the log domain from the costs, its potentials are absorbed, and K is built anew. The
// first iteration of an item is such a one.
//
// Points without mass, and points that nothing reaches (all that have mass across are at infinite cost), take no part:
// their weights kA, kB and potentials are zero from then on, as are their rows and columns of K, and their sums count
// as one. What they have in the end: put_last_potentials.
#pragma once

#include "matrix.cuh"

namespace otalign::cuda {

template <class L, bool kRelaxed>
class Sinkhorn {
  static constexpr int C = Block<L>::C;
  enum ColumnVector { kW, kB, kGamma, kV };  // kV and the next: v of two iterations, taking turns
  enum RowVector { kA, kPhi, kU };           // likewise
  static constexpr float kFarthest = 1e5f;   // over reg, that a start may be from zero

 public:
  OTALIGN_DEVICE explicit Sinkhorn(const Arguments& arguments) : block(arguments), tol(arguments.tol) {}

  OTALIGN_DEVICE void run() {
    block.for_items([&] {
      if (block.current().x.length > 0 && block.m > 0)
        solve();
      else
        clear();
    });
  }

 private:
  OTALIGN_DEVICE float* v(int turn) { return block.columns(kV + turn); }
  OTALIGN_DEVICE float& u(int i, int turn) { return block.row(kU + turn, i); }

  OTALIGN_DEVICE void solve() {
    begin();
    bool first = true, ahead = true;
    while (ahead) {
      update_rows_exactly();
      if (first ? error != error : should_stop(error, tol, n_iter, block.p.max_iter)) break;
      first = false;
      update_columns_exactly();
      ++n_iter;
      build();
      while (iterate(ahead)) ++n_iter;
    }
    finish();
  }

  OTALIGN_DEVICE void begin() {
    const Problem& p = block.p;
    error = 0;
    n_iter = 0;
    turn = 0;
    block.for_columns([&](int j) {
      const bool real = j < block.m;
      const float start =
          real && p.init ? static_cast<const float*>(p.init)[block.current().y.start + j] * block.current().per_reg : 0;
      block.columns(kB)[j] = weight_of_column(j);
      block.columns(kGamma)[j] = fabsf(start) <= kFarthest ? start : NAN;
      v(0)[j] = 1;
    });
    for (int i = port::thread(); i < block.count; i += L::kThreads) {
      block.row(kA, i) = weight_of_row(i);
      block.row(kPhi, i) = 0;
      u(i, 0) = 1;
    }
    port::sync_block();
  }

  // Exact updates ----------------------------------------------------------------------------------------------------

  // What is given, whether the point takes part or not.
  OTALIGN_DEVICE float weight_of_row(int i) const {
    return weight(block.p.x.weights, block.current().first + i, block.current().x.length);
  }
  OTALIGN_DEVICE float weight_of_column(int j) const {
    return j < block.m ? weight(block.p.y.weights, block.current().y.start + j, block.m) : 0;
  }

  // The update of a row, over reg, by all lanes that have it, from the columns' log b + potential: infinite if none
  // reaches it.
  OTALIGN_DEVICE float update(const float (&w)[C], const float (&cost)[C]) const {
    float top = -INFINITY;
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) top = fmaxf(top, w[c] - cost[c]);
    top = finite_top(over_lanes<L::kLanes>(top, Largest()));
    float sum = 0;
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) sum += expf(w[c] - cost[c] - top);
    sum = over_lanes<L::kLanes>(sum, Sum());
    return sum == 0 ? INFINITY : -block.current().keep_x * (top + logf(sum));
  }

  // phi + log u of the next iteration, into the other u; the largest exponents of columns with it, into the other v.
  // The error is NaN if any number of the item is, be it at a point without mass.
  OTALIGN_DEVICE void update_rows_exactly() {
    block.for_columns([&](int j) {
      block.columns(kGamma)[j] += logarithm(v(turn)[j]);
      v(turn)[j] = 1;
      block.columns(kW)[j] = j < block.m ? block.columns(kGamma)[j] + logarithm(block.columns(kB)[j]) : -INFINITY;
    });
    port::sync_block();
    float w[C], tops[C];
    block.load_columns(block.columns(kW), w);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) tops[c] = -INFINITY;
    float off = 0, lost = 0;
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), block.current().per_reg);
      const float potential = update(w, cost);
      if (!mine) return;
      const float a = block.row(kA, i), log_a = logarithm(a);
      const bool unreached = potential == INFINITY;
      if (block.across == 0) {
        const float before = block.row(kPhi, i) + logarithm(u(i, turn));
        if (potential != potential)
          off = potential;
        else if (!(a > 0))
          off += a;
        else if (unreached)
          lost += a;
        else
          off += a * fabsf(expf(before - potential) - 1);
        u(i, 1 - turn) = potential;
      }
      const float finite = unreached ? 0 : potential;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) tops[c] = fmaxf(tops[c], finite + log_a - cost[c]);
    });
    put_tops(tops, {off, lost, 0, 0});
    error = block.numbers().x + block.missing();
  }

  OTALIGN_DEVICE void put_tops(float (&tops)[C], float4 numbers) {
    block.put_columns(tops, Largest());
    block.put_numbers(numbers);
    float* const other = v(1 - turn);
    block.exchange(block.m, Largest(), [&](int j, float4 top) {
      *reinterpret_cast<float4*>(other + j) = {finite_top(top.x), finite_top(top.y), finite_top(top.z),
                                               finite_top(top.w)};
    });
    port::sync_block();
  }

  // gamma of the same iteration; who takes part is known now.
  OTALIGN_DEVICE void update_columns_exactly() {
    float lost = 0;
    const bool strict_x = block.p.rho_x == HUGE_VAL, strict_y = block.p.rho_y == HUGE_VAL;
    float missing = strict_x ? block.numbers().y : 0;
    sum_columns_exactly(0, [&](int j, float log_sum) {
      float& b = block.columns(kB)[j];
      if (log_sum == -INFINITY) {
        if (strict_y) lost += b;
        b = 0;
      }
      block.columns(kGamma)[j] = b > 0 ? -block.current().keep_y * log_sum : 0;
    });
    missing += block.sum_block(lost) + block.missing();
    port::sync_block();
    if (port::thread() == 0) block.missing() = missing;
    port::sync_block();
  }

  // Calls use(j, the logarithm of the sum) for real columns with the rows' potentials in the other u, infinite ones
  // being `unreached`, from the sums over exponents below those largest.
  template <class F>
  OTALIGN_DEVICE void sum_columns_exactly(float unreached, F use) {
    float sums[C], tops[C];
    block.load_columns(v(1 - turn), tops);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = 0;
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), block.current().per_reg);
      if (!mine) return;
      const float potential = or_unreached(u(i, 1 - turn), unreached) + logarithm(weight_of_row(i));
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) sums[c] += expf(potential - cost[c] - tops[c]);
    });
    block.put_columns(sums, Sum());
    block.put_number(0);
    block.exchange(block.m, Sum(), [&](int j, float4 sum) {
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k)
        if (j + k < block.m) use(j + k, v(1 - turn)[j + k] + logarithm(part(sum, k)));
    });
    port::sync_block();
  }

  // Absorb what the exact update has made. (Where one of the points has no mass nothing bounds an entry: it is left
  // out.)
  OTALIGN_DEVICE void build() {
    float gamma[C], potential = 0;
    block.load_columns(block.columns(kGamma), gamma);
    for (int i = port::thread(); i < block.count; i += L::kThreads)
      if (u(i, 1 - turn) == INFINITY) block.row(kA, i) = 0;
    port::sync_block();
    uint32_t with_mass = 0;  // of the lane's columns
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c)
      if (block.columns(kB)[block.column(c)] > 0) with_mass |= 1u << c;
    uint32_t wanted = 0;
    matrix.build(
        block, block.current().per_reg,
        [&](int, bool mine, auto numbers) {
          potential = mine ? numbers(kU + 1 - turn) : -INFINITY;
          wanted = mine && numbers(kA) > 0 ? with_mass : 0;
        },
        [&](int c, float cost) { return expf(wanted >> c & 1 ? gamma[c] - (cost - potential) : -INFINITY); });
    port::sync_block();
    for (int i = port::thread(); i < block.count; i += L::kThreads) {
      block.row(kPhi, i) = block.row(kA, i) > 0 ? u(i, 1 - turn) : 0;
      u(i, turn) = 1;
    }
    block.for_columns([&](int j) {
      v(turn)[j] = 1;
      block.columns(kW)[j] = block.columns(kB)[j];
    });
    port::sync_block();
  }

  // Multiply-adds ----------------------------------------------------------------------------------------------------

  OTALIGN_DEVICE float scaling(float sum, float absorbed, float keep) const {
    return kRelaxed ? expf(-(1 - keep) * absorbed - keep * logf(sum)) : port::reciprocal(sum);
  }
  OTALIGN_DEVICE static bool in_range(float sum, float scaling) {
    return is_near(sum) && (!kRelaxed || is_near(scaling));
  }

  // An iteration. False if it was not made: since the item is done (then `ahead` is false, too), or floats have run
  // out.
  OTALIGN_DEVICE bool iterate(bool& ahead) {
    float off = 0;
    float sums[C];
    matrix.pass(block, sums, [&](int, float sum, bool mine, bool one, auto numbers) {
      if (!mine) return 0.0f;
      const float a = numbers(kA), before = numbers(kU + turn);
      if (!(a > 0)) sum = 1;
      const float next = scaling(sum, kRelaxed ? numbers(kPhi) : 0, block.current().keep_x);
      const float ratio = kRelaxed ? before / next : before * sum;
      if (one) {
        off += in_range(sum, next) ? a * fabsf(ratio - 1) : INFINITY;
        numbers(kU + 1 - turn) = next;
      }
      return a * next;
    });
    block.put_columns(sums, Sum());
    block.put_number(off);
    bool columns_near = true;
    block.exchange(block.m, Sum(), [&](int j, float4 sum) {
      const float4 b = load4(block.columns(kB) + j);
      float4 gamma{};
      if (kRelaxed) gamma = load4(block.columns(kGamma) + j);
      const auto next = [&](int k) {
        const float total = part(b, k) > 0 ? part(sum, k) : 1;
        const float scaled = scaling(total, part(gamma, k), block.current().keep_y);
        columns_near = columns_near && in_range(total, scaled);
        return scaled;
      };
      const float4 v_next{next(0), next(1), next(2), next(3)};
      port::store(v_next, v(1 - turn) + j);
      port::store(float4{b.x * v_next.x, b.y * v_next.y, b.z * v_next.z, b.w * v_next.w}, block.columns(kW) + j);
    });
    columns_near = port::all_of_block(columns_near);
    off = block.numbers().x + block.missing();
    if (!(off < INFINITY)) return false;  // rows out of range: their error is for the exact update to find
    error = off;
    if (should_stop(error, tol, n_iter, block.p.max_iter)) ahead = false;
    if (!ahead || !columns_near) return false;
    turn = 1 - turn;
    return true;
  }

  // Results ----------------------------------------------------------------------------------------------------------

  OTALIGN_DEVICE void finish() {
    const Problem& p = block.p;
    put_last_potentials();
    float shift = 0;  // what moves from g to f, so that <b, g> = 0 if the problem is balanced
    block.for_columns([&](int j) {
      const float b = block.columns(kB)[j];
      if (!kRelaxed && b > 0) shift += b * block.columns(kW)[j];
    });
    shift = block.sum_block(shift);
    port::sync_block();
    const bool broken = error != error;
    float potentials[C], weights[C];
    block.load_columns(block.columns(kW), potentials);
    block.load_columns(block.columns(kB), weights);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c)
      if (!(weights[c] > 0)) potentials[c] = -INFINITY;
    float4 total{};  // mass of the plan, transport cost, worth of f
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), 1);
      if (!mine) return;
      const float a = weight_of_row(i), potential = u(i, 1 - turn);
      const float bounded = a > 0 ? potential : -INFINITY;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) {
        const float mass = a * weights[c] * density(potentials[c] - (cost[c] * block.current().per_reg - bounded));
        total.x += mass;
        if (mass != 0) total.y += mass * cost[c];
      }
      if (block.across != 0) return;
      const float f = block.current().epsilon * (potential + shift);
      if (a > 0) total.z += a * (kRelaxed ? worth(f, block.p.rho_x) : f);
      static_cast<float*>(p.x.potential)[block.current().first + i] = broken ? NAN : f;
    });
    block.put_numbers(total);
    block.exchange(0, Sum(), [](int, float4) {});
    port::sync_block();
    total = block.numbers();
    clear_rows(block.current().x.length);
    if (port::rank() == 0) store(total, shift, broken);
  }

  // The potentials of rows into the other u, those of columns into kW, all weights into kB. Those of points without
  // mass follow from what is across.
  OTALIGN_DEVICE void put_last_potentials() {
    const float per_reg = block.current().per_reg;
    const float unreached_x = unreached_potential(block.p.rho_x, per_reg);
    const float unreached_y = unreached_potential(block.p.rho_y, per_reg);
    bool rows_have_mass = true, columns_have_mass = true;
    for (int i = port::thread(); i < block.count; i += L::kThreads) {
      u(i, 1 - turn) = block.row(kA, i) > 0 ? block.row(kPhi, i) + logarithm(u(i, turn)) : unreached_x;
      rows_have_mass = rows_have_mass && weight_of_row(i) != 0;
    }
    block.for_columns([&](int j) {
      float& b = block.columns(kB)[j];
      const float potential = b > 0 ? block.columns(kGamma)[j] + logarithm(v(turn)[j]) : unreached_y;
      b = weight_of_column(j);
      block.columns(kW)[j] = j < block.m ? potential : 0;
      columns_have_mass = columns_have_mass && (j >= block.m || b != 0);
    });
    port::sync_block();
    if (!port::all_of_block(columns_have_mass)) late_columns();
    if (!port::all_of_block(rows_have_mass)) late_rows(unreached_x);
  }

  OTALIGN_DEVICE void late_columns() {
    float tops[C];
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) tops[c] = -INFINITY;
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), block.current().per_reg);
      if (!mine) return;
      const float potential = u(i, 1 - turn) + logarithm(weight_of_row(i));
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) tops[c] = fmaxf(tops[c], potential - cost[c]);
    });
    put_tops(tops, {});
    sum_columns_exactly(0, [&](int j, float log_sum) {
      if (!(block.columns(kB)[j] > 0) && log_sum > -INFINITY) block.columns(kW)[j] = -block.current().keep_y * log_sum;
    });
  }

  OTALIGN_DEVICE void late_rows(float unreached) {
    block.for_columns([&](int j) {
      block.columns(kGamma)[j] = j < block.m ? block.columns(kW)[j] + logarithm(block.columns(kB)[j]) : -INFINITY;
    });
    port::sync_block();
    float w[C];
    block.load_columns(block.columns(kGamma), w);
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), block.current().per_reg);
      const float potential = or_unreached(update(w, cost), unreached);
      if (mine && block.across == 0 && !(weight_of_row(i) > 0)) u(i, 1 - turn) = potential;
    });
    port::sync_block();
  }

  OTALIGN_DEVICE void store(float4 total, float shift, bool broken) {
    const Problem& p = block.p;
    float of_y = 0;
    block.for_columns([&](int j) {
      const float b = block.columns(kB)[j], g = block.current().epsilon * (block.columns(kW)[j] - shift);
      if (b > 0) of_y += b * (kRelaxed ? worth(g, block.p.rho_y) : g);
    });
    of_y = block.sum_block(of_y);
    const float value = total.z + of_y - block.current().epsilon * (total.x - 1);
    broken = broken || value != value;
    float* const g = static_cast<float*>(p.y.potential) + block.current().y.start;
    for (int64_t j = port::thread(); j < block.current().y.slot; j += L::kThreads)
      g[j] = j >= block.m ? 0 : broken ? NAN : block.current().epsilon * (block.columns(kW)[j] - shift);
    if (port::thread() != 0) return;
    static_cast<float*>(p.value)[block.current().item] = broken ? NAN : value;
    static_cast<float*>(p.linear)[block.current().item] = broken ? NAN : total.y;
    static_cast<float*>(p.error)[block.current().item] = broken ? NAN : error;
    p.n_iter[block.current().item] = broken ? 0 : n_iter;
  }

  // Zeros for the rows of the slot from `from` on, the blocks of the cluster taking turns.
  OTALIGN_DEVICE void clear_rows(int64_t from) {
    float* const f = static_cast<float*>(block.p.x.potential) + block.current().x.start;
    for (int64_t i = from + port::rank() * L::kThreads + port::thread(); i < block.current().x.slot;
         i += block.choice.cluster * L::kThreads)
      f[i] = 0;
  }

  // An empty item.
  OTALIGN_DEVICE void clear() {
    const Problem& p = block.p;
    clear_rows(0);
    if (port::rank() != 0) return;
    float* const g = static_cast<float*>(p.y.potential) + block.current().y.start;
    for (int64_t j = port::thread(); j < block.current().y.slot; j += L::kThreads) g[j] = 0;
    if (port::thread() != 0) return;
    static_cast<float*>(p.value)[block.current().item] = 0;
    static_cast<float*>(p.linear)[block.current().item] = 0;
    static_cast<float*>(p.error)[block.current().item] = 0;
    p.n_iter[block.current().item] = 0;
  }

  Block<L> block;
  Matrix<L> matrix;
  const float& tol;
  float error = 0;
  int n_iter = 0, turn = 0;
};

}  // namespace otalign::cuda
