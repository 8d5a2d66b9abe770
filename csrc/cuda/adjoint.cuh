// The implicit system: [D_x P; P^T D_y] (s, t) = (Q 1, Q^T 1), with Q = P S, S = dL/dP + l C, D = mass / keep.
//
// s is eliminated; conjugate gradients, preconditioned with D_y, solve what is left for t, on a plan that stays on the
// chip as the kernel matrix does. From the lifts s and t, dL/dC = P (v + l - (S - s - t) / reg).
#pragma once

#include "matrix.cuh"

namespace otalign::cuda {

template <class L>
class Lift {
  static constexpr int C = Block<L>::C;
  enum ColumnVector { kW, kMass, kResidual, kSolution, kProduct };  // kW is the direction
  enum RowVector { kRowMass, kLoad };
  static constexpr float kTolerance = 1e-14f;  // of the energy, the square of an error

 public:
  OTALIGN_DEVICE explicit Lift(const Arguments& arguments) : block(arguments), lifts(arguments.lifts) {}

  OTALIGN_DEVICE void run() {
    block.for_items([&] {
      if (block.current().x.length > 0 && block.m > 0) solve();
    });
  }

 private:
  OTALIGN_DEVICE void solve() {
    enter();
    load();
    build();
    const float enough = begin() * kTolerance;
    float energy_before = 0;
    for (int left = energy > enough ? 4 * block.m + 40 : 0; left > 0 && energy > enough; --left) {
      if (!step(energy_before > 0 ? energy / energy_before : 0, energy_before)) break;
    }
    finish();
  }

  OTALIGN_DEVICE void enter() {
    const Problem& p = block.p;
    keep_x = static_cast<float>(damping(block.current().epsilon, p.rho_x));
    keep_y = static_cast<float>(damping(block.current().epsilon, p.rho_y));
    balanced = p.rho_x == HUGE_VAL && p.rho_y == HUGE_VAL;
    block.for_columns([&](int j) {
      const int64_t column = block.current().y.start + j;
      const float b = j < block.m ? weight(p.y.weights, column, block.m) : 0;
      block.columns(kMass)[j] = b;
      block.columns(kSolution)[j] = b > 0 ? static_cast<const float*>(p.y.potential)[column] : -INFINITY;
      block.columns(kW)[j] = j < block.m ? 1 : 0;
    });
    port::sync_block();
  }

  // The weight of a point and its potential, which leaves no plan where there is no weight.
  struct Bounded {
    float weight, potential;
  };
  OTALIGN_DEVICE Bounded row(int i, bool mine) const {
    const int64_t row = block.current().first + i;
    const float a = mine ? weight(block.p.x.weights, row, block.current().x.length) : 0;
    return {a, a > 0 ? static_cast<const float*>(block.p.x.potential)[row] : -INFINITY};
  }
  OTALIGN_DEVICE float plan(const Bounded& x, float b, float g, float cost, float per_reg) const {
    return x.weight * b * density((x.potential - cost + g) * per_reg);
  }

  // Q 1 into the rows' load, Q^T 1 into the residual.
  OTALIGN_DEVICE void load() {
    const Problem& p = block.p;
    const float linear =
        lifts.linear ? static_cast<const float*>(lifts.linear)[block.current().item * lifts.linear_step] : 0.0f;
    const float* const gradient =
        lifts.plan ? static_cast<const float*>(lifts.plan) + block.current().first * p.pitch : nullptr;
    float g[C], b[C], sums[C];
    block.load_columns(block.columns(kSolution), g);
    block.load_columns(block.columns(kMass), b);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = 0;
    block.for_rows([&](int i, bool mine) {
      float cost[C], upstream[C];
      block.load_costs(i, mine, cost, block.costs(), 1);
      block.load_costs(i, mine && gradient, upstream, gradient, 1);
      const Bounded x = row(i, mine);
      float sum = 0;
      OTALIGN_UNROLL
      for (int c = 0; c < C; ++c) {
        const float mass = plan(x, b[c], g[c], cost[c], block.current().per_reg);
        const float term = mass == 0 ? 0 : mass * (upstream[c] + (linear == 0 ? 0 : linear * cost[c]));
        sum += term;
        sums[c] += term;
      }
      sum = over_lanes<L::kLanes>(sum, Sum());
      if (mine && block.across == 0) block.row(kLoad, i) = sum;
    });
    put(sums);
    block.exchange(block.m, Sum(),
                   [&](int j, float4 sum) { *reinterpret_cast<float4*>(block.columns(kResidual) + j) = sum; });
    port::sync_block();
  }

  // The plan, and the masses of its rows and columns over what they keep.
  OTALIGN_DEVICE void build() {
    float g[C], b[C];
    block.load_columns(block.columns(kSolution), g);
    block.load_columns(block.columns(kMass), b);
    const float per_reg = block.current().per_reg;
    Bounded x{};
    matrix.build(
        block, 1, [&](int i, bool mine, auto) { x = row(i, mine); },
        [&](int c, float cost) { return plan(x, b[c], g[c], cost, per_reg); });
    port::sync_block();
    product([&](int, float sum, bool one, auto numbers) {
      if (one) numbers(kRowMass) = sum / keep_x;
      return 1.0f;
    });
    block.for_columns([&](int j) { block.columns(kMass)[j] = j < block.m ? block.columns(kProduct)[j] / keep_y : 0; });
    port::sync_block();
  }

  // The right-hand side of the eliminated system, and its energy.
  OTALIGN_DEVICE float begin() {
    product([&](int, float, bool, auto numbers) { return over_mass(numbers(kLoad), numbers(kRowMass)); });
    block.for_columns([&](int j) {
      const bool real = block.columns(kMass)[j] > 0;
      block.columns(kResidual)[j] = real ? block.columns(kResidual)[j] - block.columns(kProduct)[j] : 0;
      block.columns(kSolution)[j] = block.columns(kW)[j] = 0;
    });
    mass = 0;
    block.for_columns([&](int j) { mass += block.columns(kMass)[j]; });
    mass = block.sum_block(mass);
    remove_gauge();
    return energy;
  }

  // A step of conjugate gradients, whose direction keeps `carry` of the last one. False if it could not be made.
  OTALIGN_DEVICE bool step(float carry, float& energy_before) {
    block.for_columns([&](int j) {
      const float preconditioned = over_mass(block.columns(kResidual)[j], block.columns(kMass)[j]);
      block.columns(kW)[j] = preconditioned + carry * block.columns(kW)[j];
    });
    port::sync_block();
    product([&](int, float sum, bool, auto numbers) { return over_mass(sum, numbers(kRowMass)); });
    float curvature = 0;
    block.for_columns([&](int j) {
      if (j >= block.m) return;
      const float image = block.columns(kMass)[j] * block.columns(kW)[j] - block.columns(kProduct)[j];
      block.columns(kProduct)[j] = image;
      curvature += block.columns(kW)[j] * image;
    });
    curvature = block.sum_block(curvature);
    const float length = curvature > 0 ? energy / curvature : 0;
    block.for_columns([&](int j) {
      if (j >= block.m) return;
      block.columns(kSolution)[j] += length * block.columns(kW)[j];
      block.columns(kResidual)[j] -= length * block.columns(kProduct)[j];
    });
    energy_before = energy;
    remove_gauge();
    return curvature > 0;
  }

  OTALIGN_DEVICE static float over_mass(float value, float mass) { return mass > 0 ? value / mass : 0; }

  // Takes out the residual's component along the null vector of a balanced problem, the constant; and finds its energy.
  OTALIGN_DEVICE void remove_gauge() {
    if (balanced) {
      float along = 0;
      block.for_columns([&](int j) { along += block.columns(kResidual)[j]; });
      along = over_mass(block.sum_block(along), mass);
      block.for_columns([&](int j) { block.columns(kResidual)[j] -= along * block.columns(kMass)[j]; });
    }
    float sum = 0;
    block.for_columns([&](int j) {
      const float residual = block.columns(kResidual)[j];
      sum += residual * over_mass(residual, block.columns(kMass)[j]);
    });
    energy = block.sum_block(sum);
    port::sync_block();
  }

  // P^T t into kProduct, where t_i = update(i, (P w)_i, ...).
  template <class Update>
  OTALIGN_DEVICE void product(Update update) {
    float sums[C];
    matrix.pass(block, sums, [&](int i, float sum, bool mine, bool one, auto numbers) {
      return mine ? update(i, sum, one, numbers) : 0.0f;
    });
    put(sums);
    block.exchange(block.m, Sum(),
                   [&](int j, float4 sum) { *reinterpret_cast<float4*>(block.columns(kProduct) + j) = sum; });
    port::sync_block();
  }
  OTALIGN_DEVICE void put(float (&sums)[C]) {
    block.put_columns(sums, Sum());
    block.put_number(0);
  }

  OTALIGN_DEVICE void finish() {
    block.for_columns([&](int j) { block.columns(kW)[j] = block.columns(kSolution)[j]; });
    port::sync_block();
    float* const s = static_cast<float*>(lifts.x) + block.current().first;
    float sums[C];
    matrix.pass(block, sums, [&](int i, float sum, bool mine, bool one, auto numbers) {
      if (mine && one) s[i] = over_mass(numbers(kLoad) - sum, numbers(kRowMass));
      return 0.0f;
    });
    float* const t = static_cast<float*>(lifts.y) + block.current().y.start;
    if (port::rank() == 0)
      block.for_columns([&](int j) {
        if (j < block.m) t[j] = block.columns(kSolution)[j];
      });
  }

  Block<L> block;
  Matrix<L> matrix;
  const Lifts& lifts;
  bool balanced = true;
  float keep_x = 1, keep_y = 1, mass = 0, energy = 0;
};

}  // namespace otalign::cuda
