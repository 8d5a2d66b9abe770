// Sinkhorn's iterations: multiply-adds on an absorbed kernel matrix, exact in the log domain wherever floats overflow.
//
// With absorbed potentials phi, gamma (in units of reg), K_ij = exp(phi_i + gamma_j - C_ij / reg), an iteration is
//
//   u = 1 / (K w),  w = b v,   v = 1 / (K^T (a u)),
//
// and phi + log u, gamma + log v are the potentials. If an iteration would leave the range of absorb.h, it is made in
// the log domain from the costs instead, its potentials are absorbed, and K is built again. The first iteration of an
// item is always made so.
//
// Points without mass, and unreached points (at infinite cost to all mass of the other side), take no part: their
// weights kA, kB, their potentials, and their rows and columns of K are zero from then on, and their sums count as one.
// Their final potentials are made by put_last_potentials.
#pragma once

#include "course.h"
#include "matrix.cuh"

namespace otalign::cuda {

template <class Tile, Kind kKind>
class Sinkhorn {
  static constexpr bool kAccelerate = kKind == kAccelerated;
  static constexpr int C = Block<Tile>::C, kRowsAtOnce = Block<Tile>::kRowsAtOnce;
  // Indices for Block::columns and Block::row. v and u of two iterations take turns: kV and kV + 1, kU and kU + 1.
  enum ColumnVector { kW, kB, kGamma, kV };
  enum RowVector { kA, kPhi, kU };
  static constexpr float kLargestStart = 1e5f;  // of |g| / reg to start from

 public:
  OTALIGN_DEVICE explicit Sinkhorn(const Arguments& arguments) : block(arguments), tol(arguments.tol) {}

  OTALIGN_DEVICE void run() {
    int round = 0;
    while (block.next_item(round)) {
      if (block.current().x.length > 0 && block.m > 0)
        solve();
      else
        clear();
    }
  }

 private:
  // (width,) v of one of the two iterations.
  OTALIGN_DEVICE float* v(int turn) { return block.columns(kV + turn); }
  OTALIGN_DEVICE float& u(int i, int turn) { return block.row(kU + turn, i); }

  OTALIGN_DEVICE void solve() {
    begin();
    bool active = true;
    while (active) {
      update_rows_exactly();
      if (block.current().fresh ? error != error : should_stop(error, tol, n_iter, block.p.max_iter)) break;
      ++n_iter;
      update_columns_exactly();
      build();
      while (iterate(active)) {
      }
    }
    finish();
  }

  OTALIGN_DEVICE void begin() {
    const CudaProblem& p = block.p;
    error = 0;
    n_iter = 0;
    turn = 0;
    way = Way::plain;
    if (kAccelerate && intrinsics::thread() == 0) course().begin_item(block.current().reg);
    block.for_columns([&](int j) {
      const bool real = j < block.m;
      const float start = real && p.init ? p.init[block.current().y.start + j] * block.current().inv_reg : 0;
      block.columns(kB)[j] = weight_of_column(j);
      block.columns(kGamma)[j] = fabsf(start) <= kLargestStart ? start : NAN;
      v(0)[j] = 1;
    });
    // Rows in registers that the block lacks have a weight of zero.
    for (int i = intrinsics::thread(); i < block.count || i < Tile::kHeld; i += Tile::kThreads) {
      block.row(kA, i) = i < block.count ? weight_of_row(i) : 0;
      block.row(kPhi, i) = 0;
      u(i, 0) = 1;
    }
    intrinsics::sync_block();
  }

  // Exact updates ----------------------------------------------------------------------------------------------------

  // The weight as it was given, whether the point takes part or not.
  OTALIGN_DEVICE float weight_of_row(int i) const {
    return weight(block.p.x.weights, block.current().first + i, block.current().x.length);
  }
  OTALIGN_DEVICE float weight_of_column(int j) const {
    return j < block.m ? weight(block.p.y.weights, block.current().y.start + j, block.m) : 0;
  }

  // The rows' new potentials over reg, computed by all lanes that have the rows; w holds log b + potential of their
  // columns. Infinite for unreached points.
  template <int N>
  OTALIGN_DEVICE void update(const float (&w)[C], const float (&cost)[N][C], float (&potentials)[N]) const {
    float tops[N], sums[N];
    OTALIGN_UNROLL
    for (int k = 0; k < N; ++k) {
      tops[k] = -INFINITY;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) tops[k] = fmaxf(tops[k], w[c] - cost[k][c]);
    }
    over_lanes<Tile::kLanes>(tops, Largest());
    OTALIGN_UNROLL
    for (int k = 0; k < N; ++k) {
      tops[k] = finite_top(tops[k]);
      sums[k] = 0;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) sums[k] += expf(w[c] - cost[k][c] - tops[k]);
    }
    over_lanes<Tile::kLanes>(sums, Sum());
    OTALIGN_UNROLL
    for (int k = 0; k < N; ++k)
      potentials[k] = sums[k] == 0 ? INFINITY : -block.current().damping_x * (tops[k] + logf(sums[k]));
  }

  // The lane's columns of the costs of rows i, i + kStep and so on, over reg.
  template <int N>
  OTALIGN_DEVICE void load_costs_over_reg(int i, float (&cost)[N][C]) const {
    OTALIGN_UNROLL
    for (int k = 0; k < N; ++k) {
      const int row = i + k * Tile::kStep;
      block.load_costs(row, row < block.count, cost[k], block.costs(), block.current().inv_reg);
    }
  }

  // Puts phi + log u of the next iteration into the other u, and the columns' largest exponents with it into the other
  // v. The error is NaN if any number of the item is NaN, even at a point without mass.
  OTALIGN_DEVICE void update_rows_exactly() {
    block.for_columns([&](int j) {
      block.columns(kGamma)[j] += logarithm(v(turn)[j]);
      v(turn)[j] = 1;
      block.columns(kW)[j] = j < block.m ? block.columns(kGamma)[j] + logarithm(block.columns(kB)[j]) : -INFINITY;
    });
    intrinsics::sync_block();
    float w[C], tops[C];
    block.load_columns(block.columns(kW), w);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) tops[c] = -INFINITY;
    float off = 0, lost = 0;
    block.for_several_rows([&](int first) {
      float costs[kRowsAtOnce][C], potentials[kRowsAtOnce];
      load_costs_over_reg(first, costs);
      update(w, costs, potentials);
      OTALIGN_UNROLL
      for (int k = 0; k < kRowsAtOnce; ++k) {
        const int i = first + k * Tile::kStep;
        if (i >= block.count) return;
        const float potential = potentials[k], a = block.row(kA, i), log_a = logarithm(a);
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
        for (int c = 0; c < C; ++c) tops[c] = fmaxf(tops[c], finite + log_a - costs[k][c]);
      }
    });
    put_tops(tops, {off, lost, 0, 0});
    error = block.numbers().x + block.current().missing;
  }

  OTALIGN_DEVICE void put_tops(float (&tops)[C], float4 numbers) {
    block.put_columns(tops, Largest());
    block.put_numbers(numbers);
    float* const other = v(1 - turn);
    block.exchange(block.m, Largest(), [&](int j, float top) { other[j] = finite_top(top); });
    intrinsics::sync_block();
  }

  // gamma of the same iteration. From here on it is known which points are unreached.
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
      block.columns(kGamma)[j] = b > 0 ? -block.current().damping_y * log_sum : 0;
    });
    missing += block.sum_block(lost) + block.current().missing;
    intrinsics::sync_block();
    if (intrinsics::thread() == 0) {
      block.changing().missing = missing;
      block.changing().since = n_iter;
      block.changing().fresh = false;
    }
    intrinsics::sync_block();
  }

  // Calls use(j, log of the sum over the column) for the columns that exist. The rows' potentials are in the other u,
  // where infinite ones count as `unreached`; the largest exponents are in the other v.
  template <class F>
  OTALIGN_DEVICE void sum_columns_exactly(float unreached, F use) {
    float sums[C], tops[C];
    block.load_columns(v(1 - turn), tops);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = 0;
    block.for_several_rows([&](int first) {
      float costs[kRowsAtOnce][C];
      load_costs_over_reg(first, costs);
      OTALIGN_UNROLL
      for (int k = 0; k < kRowsAtOnce; ++k) {
        const int i = first + k * Tile::kStep;
        if (i >= block.count) return;
        const float potential = or_unreached(u(i, 1 - turn), unreached) + logarithm(weight_of_row(i));
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) sums[c] += expf(potential - costs[k][c] - tops[c]);
      }
    });
    block.put_columns(sums, Sum());
    block.put_number(0);
    block.exchange(block.m, Sum(), [&](int j, float sum) { use(j, v(1 - turn)[j] + logarithm(sum)); });
    intrinsics::sync_block();
  }

  // Absorbs the potentials of the exact update and builds K. Where one of the points has no mass, nothing bounds the
  // entry: it is zero.
  OTALIGN_DEVICE void build() {
    float gamma[C], potential = 0;
    block.load_columns(block.columns(kGamma), gamma);
    for (int i = intrinsics::thread(); i < block.count; i += Tile::kThreads)
      if (u(i, 1 - turn) == INFINITY) block.row(kA, i) = 0;
    intrinsics::sync_block();
    uint32_t with_mass = 0;  // of the lane's columns
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c)
      if (block.columns(kB)[block.column(c)] > 0) with_mass |= 1u << c;
    uint32_t wanted = 0;
    matrix.build(
        block, block.current().inv_reg,
        [&](int, bool mine, auto numbers) {
          potential = mine ? numbers(kU + 1 - turn) : -INFINITY;
          wanted = mine && numbers(kA) > 0 ? with_mass : 0;
        },
        [&](int c, float cost) { return expf(wanted >> c & 1 ? gamma[c] - (cost - potential) : -INFINITY); });
    intrinsics::sync_block();
    for (int i = intrinsics::thread(); i < block.count; i += Tile::kThreads) {
      block.row(kPhi, i) = block.row(kA, i) > 0 ? u(i, 1 - turn) : 0;
      u(i, turn) = 1;
    }
    block.for_columns([&](int j) {
      v(turn)[j] = 1;
      block.columns(kW)[j] = block.columns(kB)[j];
    });
    intrinsics::sync_block();
  }

  // Multiply-adds ----------------------------------------------------------------------------------------------------

  OTALIGN_DEVICE float scaling(float sum, float absorbed, float damping) const {
    if (kKind == kStrict || (kKind == kAccelerated && damping == 1)) return intrinsics::reciprocal(sum);
    return expf(-(1 - damping) * absorbed - damping * logf(sum));
  }
  OTALIGN_DEVICE static bool in_range(float sum, float scaling) {
    return in_scaling_range(sum) && (kKind == kStrict || in_scaling_range(scaling));
  }

  // One iteration, or another pass of the accelerated solver. Returns false if K has to be built again, because a
  // number would leave the range of floats or reg has changed; or because the item is done: then `active` becomes
  // false, too.
  OTALIGN_DEVICE bool iterate(bool& active) {
    float off;
    const bool columns_in_range = pass(off);
    if (!kAccelerate || way == Way::plain) {
      const bool rows_in_range = off < INFINITY, stops = should_stop(off, tol, n_iter, block.p.max_iter);
      if (rows_in_range) error = off;                    // or else the exact update computes it
      if (stops | !rows_in_range | !columns_in_range) {  // one branch, which is seldom taken
        if (rows_in_range && stops) active = false;
        return false;
      }
    }
    ++n_iter;
    if constexpr (kAccelerate) {
      if (!stays_plain()) {
        judge(off < INFINITY && columns_in_range);
        return move();
      }
    }
    turn = 1 - turn;
    return true;
  }

  // A row of a pass: its weight, u before, the sum over K w, and the next u.
  struct UpdatedRow {
    float a = 0, before = 0, sum = 0, next = 0;
    OTALIGN_DEVICE operator float() const { return a * next; }
  };

  // Puts the next u and v into the others, and w of them. `off` becomes the error of the rows, infinite if they are out
  // of range; returns whether the columns are in range.
  OTALIGN_DEVICE bool pass(float& off) {
    constexpr int N = Block<Tile>::kTurns;
    float sums[C], weights[N], gammas[N], of_lane = 0;
    // The accelerated kernel is long as it is: it does without straight code for every size of clusters.
    const int straight = kAccelerate ? 0 : block.current().straight;
    const auto update = [&](int, float sum, bool mine, bool, auto numbers) -> UpdatedRow {
      if (!mine) return {};
      const float a = numbers(kA), before = numbers(kU + turn);
      if (!(a > 0)) sum = 1;
      const float next = scaling(sum, kKind == kStrict ? 0 : numbers(kPhi), block.current().damping_x);
      return {a, before, sum, next};
    };
    const auto store = [&](const UpdatedRow& row, auto numbers) {
      const float ratio = kKind == kStrict ? row.before * row.sum : row.before / row.next;
      of_lane += in_range(row.sum, row.next) ? row.a * fabsf(ratio - 1) : INFINITY;
      numbers(kU + 1 - turn) = row.next;
    };
    matrix.pass(block, sums, update, store);
    block.put_columns(sums, Sum());
    block.put_number(of_lane);
    block.load_of_exchange(block.columns(kB), weights);
    if (kKind != kStrict) block.load_of_exchange(block.columns(kGamma), gammas);
    bool columns_in_range = true;
    const auto use = [&](int k, int j, float sum) {
      const float total = weights[k] > 0 ? sum : 1;
      const float next = scaling(total, kKind == kStrict ? 0 : gammas[k], block.current().damping_y);
      if (j >= block.m) return;
      columns_in_range = columns_in_range && in_range(total, next);
      v(1 - turn)[j] = next;
      block.columns(kW)[j] = weights[k] * next;
    };
    block.exchange_often(straight, block.m, Sum(), use);
#ifndef OTALIGN_MUTATE_3
    columns_in_range = intrinsics::all_of_block(columns_in_range);
#endif
    off = block.number() + block.current().missing;
    return columns_in_range;
  }

  // The accelerated solver: accelerated.cuh --------------------------------------------------------------------------

  // Column vectors that are remembered: the plain update of where the last step came from. Then for mixing: the
  // residual and the step of the last pass; the last changes of the residual, and these and the steps that made them.
  enum Mixing { kKept, kResidual, kStep, kChanges, kMoves = kChanges + MixingSums::kDepth };
  // For Newton's method: v before the step; of conjugate gradients the residual, direction, solution, D, diagonal of
  // the matrix and product; and potentials to enter levels from.
  enum Newton { kBase = kKept + 1, kRest, kDirection, kSolution, kWeight, kDiagonal, kProduct };
  enum Levels { kStart = kProduct + 1, kSolved, kEarlier };
  static_assert(kMoves + MixingSums::kDepth == kRemembered && kEarlier < kRemembered);

  OTALIGN_DEVICE Course& course() const { return *reinterpret_cast<Course*>(block.shared + block.at.course); }
  OTALIGN_DEVICE float* remembered(int which) const {
    return block.shared + block.at.remembered + which * Tile::kWidth;
  }
  OTALIGN_DEVICE int left() const { return static_cast<int>(block.p.max_iter - n_iter); }
  template <class F>
  OTALIGN_DEVICE void for_columns_with_mass(F f) const;
  template <class F>
  OTALIGN_DEVICE void decide(F f);
  OTALIGN_DEVICE bool stays_plain();
  OTALIGN_DEVICE void measure_spread();
  OTALIGN_DEVICE void judge(bool held);
  OTALIGN_DEVICE void sum_for_mixing(float (&sums)[MixingSums::kCount]);
  OTALIGN_DEVICE bool move();
  OTALIGN_DEVICE void keep_potentials(Keep what);
  OTALIGN_DEVICE void forget();
  OTALIGN_DEVICE void take_plain_update();
  OTALIGN_DEVICE void mix();
  template <class F>
  OTALIGN_DEVICE void move_columns(F next);
  OTALIGN_DEVICE void enter_level();
  OTALIGN_DEVICE void compute_step(bool& is_near, bool& is_within);
  template <bool kSquare>
  OTALIGN_DEVICE void multiply();

  // Results ----------------------------------------------------------------------------------------------------------

  OTALIGN_DEVICE void finish() {
    const CudaProblem& p = block.p;
    put_last_potentials();
    const bool balanced = kKind == kStrict || (p.rho_x == HUGE_VAL && p.rho_y == HUGE_VAL);
    float shift = 0;  // moves from g to f, so that <b, g> = 0 if the problem is balanced
    block.for_columns([&](int j) {
      const float b = block.columns(kB)[j];
      const float potential = block.columns(kW)[j];
      if (balanced && b > 0 && potential < INFINITY) shift += b * potential;
    });
    shift = block.sum_block(shift);
    intrinsics::sync_block();
    const bool broken = error != error;
    float potentials[C], weights[C];
    block.load_columns(block.columns(kW), potentials);
    block.load_columns(block.columns(kB), weights);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c)
      if (!(weights[c] > 0 && potentials[c] < INFINITY)) potentials[c] = -INFINITY;
    float4 total{};  // mass of the plan, transport cost, dual terms of f
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), 1);
      if (!mine) return;
      const float a = weight_of_row(i), potential = u(i, 1 - turn);
      const float bounded = a > 0 && potential < INFINITY ? potential : -INFINITY;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) {
        const float mass = a * weights[c] * density(potentials[c] - (cost[c] * block.current().inv_reg - bounded));
        total.x += mass;
        if (mass != 0) total.y += mass * cost[c];
      }
      if (block.across != 0) return;
      const float f = block.current().reg * shifted(potential, shift, block.p.rho_x);
      if (a > 0) total.z += a * (kKind == kStrict ? f : dual_term(f, block.p.rho_x));
      p.x.potential[block.current().first + i] = broken ? NAN : f;
    });
    block.put_numbers(total);
    block.exchange(0, Sum(), [](int, float) {});
    intrinsics::sync_block();
    total = block.numbers();
    clear_rows(block.current().x.length);
    if (intrinsics::rank() == 0) store(total, shift, broken);
  }

  // A potential over reg with its gauge. Points that no mass reaches, whose potential is infinite, get a finite one.
  OTALIGN_DEVICE float shifted(float potential, float shift, double rho) const {
    return potential < INFINITY ? potential + shift : unreached_potential(rho, block.current().inv_reg);
  }

  // Puts the potentials of rows into the other u, those of columns into kW, and the weights as given into kB. The
  // potentials of points without mass follow from those of the other side. Those of unreached points are infinite.
  OTALIGN_DEVICE void put_last_potentials() {
    bool rows_have_mass = true, columns_have_mass = true;
    for (int i = intrinsics::thread(); i < block.count; i += Tile::kThreads) {
      u(i, 1 - turn) = block.row(kA, i) > 0 ? block.row(kPhi, i) + logarithm(u(i, turn)) : INFINITY;
      rows_have_mass = rows_have_mass && weight_of_row(i) != 0;
    }
    block.for_columns([&](int j) {
      float& b = block.columns(kB)[j];
      const float potential = b > 0 ? block.columns(kGamma)[j] + logarithm(v(turn)[j]) : INFINITY;
      b = weight_of_column(j);
      block.columns(kW)[j] = j < block.m ? potential : 0;
      columns_have_mass = columns_have_mass && (j >= block.m || b != 0);
    });
    intrinsics::sync_block();
    if (!intrinsics::all_of_block(columns_have_mass)) late_columns();
    if (!intrinsics::all_of_block(rows_have_mass)) late_rows();
  }

  OTALIGN_DEVICE void late_columns() {
    float tops[C];
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) tops[c] = -INFINITY;
    block.for_rows([&](int i, bool mine) {
      float cost[C];
      block.load_costs(i, mine, cost, block.costs(), block.current().inv_reg);
      if (!mine) return;
      const float f = u(i, 1 - turn), potential = f < INFINITY ? f + logarithm(weight_of_row(i)) : -INFINITY;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) tops[c] = fmaxf(tops[c], potential - cost[c]);
    });
    put_tops(tops, {});
    sum_columns_exactly(0, [&](int j, float log_sum) {
      if (!(block.columns(kB)[j] > 0) && log_sum > -INFINITY)
        block.columns(kW)[j] = -block.current().damping_y * log_sum;
    });
  }

  OTALIGN_DEVICE void late_rows() {
    block.for_columns([&](int j) {
      const float g = block.columns(kW)[j];
      block.columns(kGamma)[j] = j < block.m && g < INFINITY ? g + logarithm(block.columns(kB)[j]) : -INFINITY;
    });
    intrinsics::sync_block();
    float w[C];
    block.load_columns(block.columns(kGamma), w);
    block.for_rows([&](int i, bool mine) {
      float cost[1][C], updated[1];
      load_costs_over_reg(i, cost);
      update(w, cost, updated);
      if (mine && block.across == 0 && !(weight_of_row(i) > 0)) u(i, 1 - turn) = updated[0];
    });
    intrinsics::sync_block();
  }

  OTALIGN_DEVICE void store(float4 total, float shift, bool broken) {
    const CudaProblem& p = block.p;
    float of_y = 0;
    block.for_columns([&](int j) {
      const float b = block.columns(kB)[j];
      const float g = block.current().reg * shifted(block.columns(kW)[j], -shift, block.p.rho_y);
      if (b > 0) of_y += b * (kKind == kStrict ? g : dual_term(g, block.p.rho_y));
    });
    of_y = block.sum_block(of_y);
    const float value = total.z + of_y - block.current().reg * (total.x - 1);
    broken = broken || value != value;
    float* const g = p.y.potential + block.current().y.start;
    for (int64_t j = intrinsics::thread(); j < block.current().y.slot; j += Tile::kThreads)
      g[j] = j >= block.m ? 0
             : broken     ? NAN
                          : block.current().reg * shifted(block.columns(kW)[j], -shift, block.p.rho_y);
    if (intrinsics::thread() != 0) return;
    p.value[block.current().item] = broken ? NAN : value;
    p.linear[block.current().item] = broken ? NAN : total.y;
    p.error[block.current().item] = broken ? NAN : error;
    p.n_iter[block.current().item] = broken ? 0 : n_iter;
  }

  // Zeros f from row `from` of the slot on; the blocks of the cluster share the rows.
  OTALIGN_DEVICE void clear_rows(int64_t from) {
    float* const f = block.p.x.potential + block.current().x.start;
    for (int64_t i = from + intrinsics::rank() * Tile::kThreads + intrinsics::thread(); i < block.current().x.slot;
         i += block.config.cluster * Tile::kThreads)
      f[i] = 0;
  }

  // The results of an empty item.
  OTALIGN_DEVICE void clear() {
    const CudaProblem& p = block.p;
    clear_rows(0);
    if (intrinsics::rank() != 0) return;
    float* const g = p.y.potential + block.current().y.start;
    for (int64_t j = intrinsics::thread(); j < block.current().y.slot; j += Tile::kThreads) g[j] = 0;
    if (intrinsics::thread() != 0) return;
    p.value[block.current().item] = 0;
    p.linear[block.current().item] = 0;
    p.error[block.current().item] = 0;
    p.n_iter[block.current().item] = 0;
  }

  Block<Tile> block;
  Matrix<Tile> matrix;
  const float& tol;
  float error = 0;
  int n_iter = 0, turn = 0;
  Way way = Way::plain;
};

}  // namespace otalign::cuda

#include "accelerated.cuh"
