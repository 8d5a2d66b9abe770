// The implicit system: [D_x P; P^T D_y] (s, t) = (Q 1, Q^T 1), with Q = P S, S = dL/dP + l C, D = mass / damping.
//
// s is eliminated. Conjugate gradients, preconditioned with D_y, solve the rest for t. The plan stays on the chip as
// the kernel matrix does. From the adjoints s and t follows dL/dC = P (v + l - (S - s - t) / reg).
#pragma once

#include "matrix.cuh"

namespace otalign::cuda {

template <class Tile>
class Adjoint {
  static constexpr int C = Block<Tile>::C;
  // Indices for Block::columns and Block::row; kW is the direction of the search.
  enum ColumnVector { kW, kMass, kResidual, kSolution, kProduct };
  enum RowVector { kRowMass, kLoad };
  static constexpr float kTolerance = 1e-14f;  // relative, of the energy, which is the square of an error

 public:
  OTALIGN_DEVICE explicit Adjoint(const Arguments& arguments) : block(arguments), adjoints(arguments.adjoints) {}

  OTALIGN_DEVICE void run() {
    int round = 0;
    while (block.next_item(round))
      if (block.current().x.length > 0 && block.m > 0) solve();
  }

 private:
  OTALIGN_DEVICE void solve() {
    enter();
    load();
    build();
    const float enough = begin() * kTolerance;  // of the loads: below their rounding, a residual has no direction
    float energy_before = 0;
    for (int left = energy > enough ? 4 * block.m + 40 : 0; left > 0 && energy > enough; --left) {
      if (!step(energy_before > 0 ? energy / energy_before : 0, energy_before)) break;
    }
    finish();
  }

  OTALIGN_DEVICE void enter() {
    const CudaProblem& p = block.p;
    damping_x = static_cast<float>(damping(block.current().reg, p.rho_x));
    damping_y = static_cast<float>(damping(block.current().reg, p.rho_y));
    balanced = p.rho_x == HUGE_VAL && p.rho_y == HUGE_VAL;
    block.for_columns([&](int j) {
      const int64_t column = block.current().y.start + j;
      const float b = j < block.m ? weight(p.y.weights, column, block.m) : 0;
      block.columns(kMass)[j] = b;
      block.columns(kSolution)[j] = b > 0 ? p.y.potential[column] : -INFINITY;
      block.columns(kW)[j] = j < block.m ? 1 : 0;
    });
    intrinsics::sync_block();
  }

  // A point's weight and potential; without weight the potential is -inf, so that the plan is zero.
  struct Bounded {
    float weight, potential;
  };
  OTALIGN_DEVICE Bounded row(int i, bool mine) const {
    const int64_t row = block.current().first + i;
    const float a = mine ? weight(block.p.x.weights, row, block.current().x.length) : 0;
    return {a, a > 0 ? block.p.x.potential[row] : -INFINITY};
  }
  OTALIGN_DEVICE float plan(const Bounded& x, float b, float g, float cost, float inv_reg) const {
    return x.weight * b * density((x.potential - cost + g) * inv_reg);
  }

  // Puts Q 1 into kLoad and Q^T 1 into kResidual.
  OTALIGN_DEVICE void load() {
    const CudaProblem& p = block.p;
    const float linear = adjoints.linear ? adjoints.linear[block.current().item * adjoints.linear_step] : 0.0f;
    const float* const gradient =  // (count, pitch) by the plan
        adjoints.plan ? adjoints.plan + block.current().first * p.pitch : nullptr;
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
        const float mass = plan(x, b[c], g[c], cost[c], block.current().inv_reg);
        const float term = mass == 0 ? 0 : mass * (upstream[c] + (linear == 0 ? 0 : linear * cost[c]));
        sum += term;
        sums[c] += term;
      }
      sum = over_lanes<Tile::kLanes>(sum, Sum());
      if (mine && block.across == 0) block.row(kLoad, i) = sum;
    });
    put(sums);
    block.exchange(block.m, Sum(), [&](int j, float sum) { block.columns(kResidual)[j] = sum; });
    intrinsics::sync_block();
  }

  // Builds the plan in the matrix, and puts the masses of its rows and columns over their damping into kRowMass and
  // kMass.
  OTALIGN_DEVICE void build() {
    float g[C], b[C];
    block.load_columns(block.columns(kSolution), g);
    block.load_columns(block.columns(kMass), b);
    const float inv_reg = block.current().inv_reg;
    Bounded x{};
    matrix.build(
        block, 1, [&](int i, bool mine, auto) { x = row(i, mine); },
        [&](int c, float cost) { return plan(x, b[c], g[c], cost, inv_reg); });
    intrinsics::sync_block();
    product([&](int, float sum, bool one, auto numbers) {
      if (one) numbers(kRowMass) = sum / damping_x;
      return 1.0f;
    });
    block.for_columns(
        [&](int j) { block.columns(kMass)[j] = j < block.m ? block.columns(kProduct)[j] / damping_y : 0; });
    intrinsics::sync_block();
  }

  // Puts the right-hand side of the eliminated system, over `size`, into kResidual. Returns the larger one of its
  // energy and that of the loads.
  OTALIGN_DEVICE float begin() {
    float sizes = 0;
    block.for_columns([&](int j) { sizes += j < block.m ? fabsf(block.columns(kResidual)[j]) : 0; });
    size = block.sum_block(sizes);  // the squares of large costs leave the range of floats
    const float inv_size = size > 0 ? 1 / size : 0;
    mass = 0;
    block.for_columns([&](int j) { mass += block.columns(kMass)[j]; });
    mass = block.sum_block(mass);
    // A column of hardly any mass counts as heavier: rounding over its mass would be all there is.
    const float least = mass * 1.2e-7f;
    float loads = 0;
    block.for_columns([&](int j) {
      const float load = j < block.m ? block.columns(kResidual)[j] * inv_size : 0;
      loads += load * over_mass(load, fmaxf(block.columns(kMass)[j], least));
    });
    loads = block.sum_block(loads);
    product([&](int, float, bool, auto numbers) { return over_mass(numbers(kLoad), numbers(kRowMass)); });
    block.for_columns([&](int j) {
      const bool real = block.columns(kMass)[j] > 0;
      block.columns(kResidual)[j] = real ? (block.columns(kResidual)[j] - block.columns(kProduct)[j]) * inv_size : 0;
      block.columns(kSolution)[j] = block.columns(kW)[j] = 0;
    });
    remove_gauge();
    float residuals = 0;
    block.for_columns([&](int j) {
      const float residual = j < block.m ? block.columns(kResidual)[j] : 0;
      residuals += residual * over_mass(residual, fmaxf(block.columns(kMass)[j], least));
    });
    return fmaxf(block.sum_block(residuals), loads);
  }

  // One step of conjugate gradients, whose direction keeps `carry` times the last one. Returns false if the curvature
  // along it is not positive.
  OTALIGN_DEVICE bool step(float carry, float& energy_before) {
    block.for_columns([&](int j) {
      const float preconditioned = over_mass(block.columns(kResidual)[j], block.columns(kMass)[j]);
      block.columns(kW)[j] = preconditioned + carry * block.columns(kW)[j];
    });
    intrinsics::sync_block();
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

  // If the problem is balanced, removes the residual's component along the null vector, which is constant. Then
  // computes the residual's energy.
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
    intrinsics::sync_block();
  }

  // Puts P^T t into kProduct, where t_i = update(i, (P w)_i, ...).
  template <class Update>
  OTALIGN_DEVICE void product(Update update) {
    float sums[C];
    const int straight = block.current().straight;
    matrix.pass(block, sums, [&](int i, float sum, bool mine, bool one, auto numbers) {
      return mine ? update(i, sum, one, numbers) : 0.0f;
    });
    put(sums);
    block.exchange_often(straight, block.m, Sum(), [&](int, int j, float sum) {
      if (j < block.m) block.columns(kProduct)[j] = sum;
    });
    intrinsics::sync_block();
  }
  OTALIGN_DEVICE void put(float (&sums)[C]) {
    block.put_columns(sums, Sum());
    block.put_number(0);
  }

  OTALIGN_DEVICE void finish() {
    block.for_columns([&](int j) { block.columns(kW)[j] = block.columns(kSolution)[j] *= size; });
    intrinsics::sync_block();
    float* const s = adjoints.x + block.current().first;
    float sums[C];
    matrix.pass(block, sums, [&](int i, float sum, bool mine, bool one, auto numbers) {
      if (mine && i < block.count && one) s[i] = over_mass(numbers(kLoad) - sum, numbers(kRowMass));
      return 0.0f;
    });
    float* const t = adjoints.y + block.current().y.start;
    if (intrinsics::rank() == 0)
      block.for_columns([&](int j) {
        if (j < block.m) t[j] = block.columns(kSolution)[j];
      });
  }

  Block<Tile> block;
  Matrix<Tile> matrix;
  const Adjoints& adjoints;
  bool balanced = true;
  float damping_x = 1, damping_y = 1, mass = 0, energy = 0, size = 0;
};

}  // namespace otalign::cuda
