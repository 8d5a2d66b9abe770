// The passes that Sinkhorn makes in the place of many plain iterations (accelerate.h). Included by sinkhorn.cuh only.
//
// Every pass starts at v and puts u, exact at v, and the plain update of v into the other u and v. The error here is
// that of the columns, of the plan of u and v. Course decides how v moves: one thread writes it between barriers, so
// that all threads read the same decision, and all blocks of a cluster decide from the same bits.
//
// Newton's system is that of accelerate.h for the logarithms of both sides of the equation, so that its right-hand side
// is D times the plain update of log v, with D the column sums over the damping of y. Conjugate gradients solve it
// roughly, preconditioned with the diagonal of the whole matrix: a pass over the squares of K makes the diagonal, and
// each product is a pass over K with w times the direction in the place of w.
#pragma once

#include "sinkhorn.cuh"

namespace otalign::cuda {

// Plain iterations ----------------------------------------------------------------------------------------------------

template <class Tile, Kind kKind>
template <class F>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::for_columns_with_mass(F f) const {
  block.for_columns([&](int j) {
    if (block.columns(kB)[j] > 0) f(j);
  });
}

// Calls f(course) in one thread.
template <class Tile, Kind kKind>
template <class F>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::decide(F f) {
  intrinsics::sync_block();
  if (intrinsics::thread() == 0) f(course());
  intrinsics::sync_block();
}

// After a pass that was made plainly: whether the next one is plain, too.
template <class Tile, Kind kKind>
OTALIGN_DEVICE bool Sinkhorn<Tile, kKind>::stays_plain() {
  if (way != Way::plain) return false;
  const int before = n_iter - block.current().since - 1;  // other passes whose errors are comparable
  float ahead = course().ahead(before, error, tol);
  // Where a marginal is relaxed, each iteration contracts the largest norm at least so much.
  const float contraction = block.current().damping_x * block.current().damping_y;
  if (contraction < 1) ahead = fminf(ahead, logf(error / tol) / -logf(contraction));
  if (intrinsics::thread() == 0) course().put_error(before, error);
  if (!(ahead > float(Accelerate::kAhead)) || block.current().missing > 0) return true;
  if (Course::needs_spread(ahead) && course().spread == 0 && left() > 1) measure_spread();
  const Way next = course().choose(ahead, left());
  bool near = next != Way::plain;
  if (next == Way::mixing)
    for_columns_with_mass([&](int j) {
      if (!(fabsf(logf(v(1 - turn)[j] / v(turn)[j])) <= float(Accelerate::kLinear))) near = false;
    });
  if (!intrinsics::all_of_block(near)) return true;
  decide([&](Course& c) {
    c.done();
    if (next == Way::mixing)
      c.begin_mixing();
    else
      c.begin_descent(error, tol, left());
  });
  if (next == Way::mixing) forget();
  return false;
}

// The mean over the rows of the largest difference of finite costs.
template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::measure_spread() {
  float spread = 0;
  block.for_rows([&](int i, bool mine) {
    float cost[C], low = INFINITY, high = -INFINITY;
    block.load_costs(i, mine, cost, block.costs(), block.current().inv_reg);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) {
      if (block.column(c) >= block.m || !(fabsf(cost[c]) < INFINITY)) continue;
      low = fminf(low, cost[c]);
      high = fmaxf(high, cost[c]);
    }
    low = -over_lanes<Tile::kLanes>(-low, Largest());
    high = over_lanes<Tile::kLanes>(high, Largest());
    if (mine && block.across == 0 && block.row(kA, i) > 0 && high > low) spread += block.row(kA, i) * (high - low);
  });
  block.put_numbers({spread, 0, 0, 0});
  block.exchange(0, Sum(), [](int, float) {});
  decide([&](Course& c) { c.spread = block.numbers().x; });
  ++n_iter;
}

// Decisions -----------------------------------------------------------------------------------------------------------

// Decides how to go on after a pass, which floats hold or do not.
template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::judge(bool held) {
  const bool plain = way == Way::plain;  // this pass was
  way = course().way;
  if (way == Way::mixing) {
    float sums[MixingSums::kCount];
    sum_for_mixing(sums);
    const float* const found = block.sum_products(sums, 0);
    if (intrinsics::thread() == 0) {
      course().done();
      course().mixed(*reinterpret_cast<const MixingSums*>(found), held, tol, left());
    }
    intrinsics::sync_block();
  } else if (!plain) {
    float error_of_columns[1] = {};
    for_columns_with_mass(
        [&](int j) { error_of_columns[0] += block.columns(kB)[j] * fabsf(v(turn)[j] / v(1 - turn)[j] - 1); });
    block.sum_block(error_of_columns, 0);
    decide([&](Course& c) {
      c.done();
      c.tried_step(error_of_columns[0], held, tol, left());
    });
  }
}

template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::sum_for_mixing(float (&sums)[MixingSums::kCount]) {
  constexpr int depth = MixingSums::kDepth;
  OTALIGN_UNROLL
  for (int k = 0; k < MixingSums::kCount; ++k) sums[k] = 0;
  const bool started = course().started;
  const int newest = started ? course().slot_after() : course().newest;
  for_columns_with_mass([&](int j) {
    const float b = block.columns(kB)[j], ratio = v(1 - turn)[j] / v(turn)[j], residual = logf(ratio);
    float change = 0;
    if (started) {
      change = residual - remembered(kResidual)[j];
      remembered(kChanges + newest)[j] = change;
      remembered(kMoves + newest)[j] = change + remembered(kStep)[j];
    }
    remembered(kResidual)[j] = residual;
    OTALIGN_UNROLL
    for (int age = 0; age < depth; ++age) {
      const float before = remembered(kChanges + (newest + depth - age) % depth)[j];
      sums[age] += b * change * before;
      sums[depth + age] += b * residual * before;
    }
    sums[2 * depth] += b * residual * residual;
    sums[2 * depth + 1] += b * fabsf(1 / ratio - 1);
  });
}

// Moves ---------------------------------------------------------------------------------------------------------------

// Makes the moves that were decided until the next pass. Returns false if K has to be built before it.
template <class Tile, Kind kKind>
OTALIGN_DEVICE bool Sinkhorn<Tile, kKind>::move() {
  for (;;) {
    if (course().keep != Keep::nothing) keep_potentials(course().keep);
    if (course().forgot) forget();
    way = course().way;
    switch (course().move) {
      case Move::leave:
        if (intrinsics::thread() == 0) block.changing().since = n_iter;
        take_plain_update();
        return true;
      case Move::rebuild:
        if (intrinsics::thread() == 0) block.changing().fresh = true;
        intrinsics::sync_block();
        return false;
      case Move::update:
        for_columns_with_mass([&](int j) { remembered(kStep)[j] = remembered(kResidual)[j]; });
        take_plain_update();
        return true;
      case Move::mix:
        mix();
        return true;
      case Move::back:
        move_columns([&](int j) { return remembered(kKept)[j]; });
        return true;
      case Move::part:
        move_columns([&](int j) { return remembered(kBase)[j] * expf(course().part * remembered(kSolution)[j]); });
        return true;
      case Move::enter:
        enter_level();
        return false;
      case Move::newton:
        break;
    }
    bool is_near, is_within;
    compute_step(is_near, is_within);
    decide([&](Course& c) {
      c.done();
      c.stepped(is_near, is_within, left());
    });
  }
}

// Keeps the potentials of y at v, in the unit of the cost.
template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::keep_potentials(Keep what) {
  const float reg = block.current().reg;
  for_columns_with_mass([&](int j) {
    const float potential = reg * (block.columns(kGamma)[j] + logf(v(turn)[j]));
    if (what == Keep::start) {
      remembered(kStart)[j] = potential;
    } else {
      remembered(kEarlier)[j] = remembered(kSolved)[j];
      remembered(kSolved)[j] = potential;
    }
  });
  if (what == Keep::start && course().spread == 0) measure_spread();
}

template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::forget() {
  block.for_columns([&](int j) {
    OTALIGN_UNROLL
    for (int k = kChanges; k < kRemembered; ++k) remembered(k)[j] = 0;
  });
}

template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::take_plain_update() {
  turn = 1 - turn;
  move_columns([&](int j) { return v(turn)[j]; });
}

// Moves v, and w with it, to next(j) where columns have mass.
template <class Tile, Kind kKind>
template <class F>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::move_columns(F next) {
  block.for_columns([&](int j) {
    const float b = block.columns(kB)[j];
    if (b > 0) v(turn)[j] = next(j);
    block.columns(kW)[j] = b > 0 ? b * v(turn)[j] : 0;
  });
  intrinsics::sync_block();
}

// Takes the step of the residual less its combination with what is remembered; the plain update where that is too long.
template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::mix() {
  bool is_short = true;
  for_columns_with_mass([&](int j) {
    float step = remembered(kResidual)[j];
    OTALIGN_UNROLL
    for (int age = 0; age < MixingSums::kDepth; ++age)
      step -= course().coefficients[age] * remembered(kMoves + course().slot(age))[j];
    remembered(kStep)[j] = step;
    remembered(kKept)[j] = v(1 - turn)[j];
    is_short = is_short && fabsf(step) <= float(Accelerate::kLongest);
  });
  if (!intrinsics::all_of_block(is_short)) {
    decide([](Course& c) { c.refuse_mixed(); });
    for_columns_with_mass([&](int j) { remembered(kStep)[j] = remembered(kResidual)[j]; });
  }
  move_columns([&](int j) { return v(turn)[j] * expf(remembered(kStep)[j]); });
}

// Goes to the level of the course, from a point on the line through the solutions of the last two.
template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::enter_level() {
  const float level = course().level, reach = course().reach, inv_level = 1 / level;
  const bool from_start = course().from_start;
  block.set_reg(level);
  for_columns_with_mass([&](int j) {
    float goal = remembered(from_start ? kStart : kSolved)[j];
    if (reach != 0) goal += reach * (goal - remembered(kEarlier)[j]);
    block.columns(kGamma)[j] = goal * inv_level;
    v(turn)[j] = 1;
  });
  if (intrinsics::thread() == 0) block.changing().fresh = true;
  intrinsics::sync_block();
}

// Newton's method -----------------------------------------------------------------------------------------------------

// Computes a step of log v after a pass, and whether it is at most kNear and kFar long. The other u stays, u itself
// becomes the factors of the rows.
template <class Tile, Kind kKind>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::compute_step(bool& is_near, bool& is_within) {
  const float damping_x = block.current().damping_x, damping_y = block.current().damping_y;
  // The sums over K that a pass made these scalings of.
  const auto sum = [](float scaling, float absorbed, float damping) {
    return damping == 1 ? 1 / scaling : expf(-(logf(scaling) + (1 - damping) * absorbed) / damping);
  };
  for (int i = intrinsics::thread(); i < block.count; i += Tile::kThreads) {
    const float a = block.row(kA, i), next = u(i, 1 - turn);
    u(i, turn) = a > 0 ? damping_x * a * next / sum(next, block.row(kPhi, i), damping_x) : 0;
  }
  intrinsics::sync_block();
  multiply<true>();
  float totals[2] = {};  // the energy of the residual, and D
  for_columns_with_mass([&](int j) {
    const float base = v(turn)[j], next = v(1 - turn)[j], w = block.columns(kB)[j] * base;
    const float of_column = sum(next, block.columns(kGamma)[j], damping_y);
    const float weight = w * of_column / damping_y, update = logf(next / base);
    const float diagonal = fmaxf(weight - w * w * remembered(kProduct)[j], 1e-4f * weight);
    remembered(kKept)[j] = next;
    remembered(kBase)[j] = base;
    remembered(kWeight)[j] = weight;
    remembered(kDiagonal)[j] = diagonal;
    remembered(kRest)[j] = weight * update;
    remembered(kSolution)[j] = remembered(kDirection)[j] = 0;
    totals[0] += weight * update * (weight * update / diagonal);
    totals[1] += weight;
  });
  block.sum_block(totals, 1);
  float energy = totals[0], carry = 0;
  decide([&](Course& c) { c.begin_search(energy, totals[1], tol); });
  while (course().searches(energy, left())) {
    for_columns_with_mass([&](int j) {
      const float direction = remembered(kRest)[j] / remembered(kDiagonal)[j] + carry * remembered(kDirection)[j];
      remembered(kDirection)[j] = direction;
      block.columns(kW)[j] = block.columns(kB)[j] * remembered(kBase)[j] * direction;
    });
    intrinsics::sync_block();
    multiply<false>();
    float curvature[1] = {};
    for_columns_with_mass([&](int j) {
      const float direction = remembered(kDirection)[j], w = block.columns(kB)[j] * remembered(kBase)[j];
      const float image = remembered(kWeight)[j] * direction - w * remembered(kProduct)[j];
      remembered(kProduct)[j] = image;
      curvature[0] += direction * image;
    });
    block.sum_block(curvature, 0);
    if (!(curvature[0] > 0)) break;
    energy = course().energy;
    const float length = energy / curvature[0];
    float next[2] = {};  // the energy, and the square of the step in the norm of D, which grows with every product
    for_columns_with_mass([&](int j) {
      const float rest = remembered(kRest)[j] - length * remembered(kProduct)[j];
      const float solution = remembered(kSolution)[j] + length * remembered(kDirection)[j];
      remembered(kRest)[j] = rest;
      remembered(kSolution)[j] = solution;
      next[0] += rest * (rest / remembered(kDiagonal)[j]);
      next[1] += remembered(kWeight)[j] * solution * solution;
    });
    block.sum_block(next, 1);
    carry = next[0] / energy;
    energy = next[0];
    decide([&](Course& c) { c.searched(energy, next[1]); });
  }
  bool near = true, within = course().found();
  for_columns_with_mass([&](int j) {
    const float length = fabsf(remembered(kSolution)[j]);
    near = near && length <= float(Accelerate::kNear);
    within = within && length <= float(Accelerate::kFar);
  });
  is_near = intrinsics::all_of_block(near);
  is_within = intrinsics::all_of_block(within);
}

// Puts K^T t into kProduct, where t is K w times the factors of the rows; or, if `kSquare`, the sums over the squares
// of K times the factors alone. It counts as a pass.
template <class Tile, Kind kKind>
template <bool kSquare>
OTALIGN_DEVICE void Sinkhorn<Tile, kKind>::multiply() {
  float sums[C];
  matrix.template pass<kSquare>(block, sums, [&](int i, float sum, bool mine, bool, auto numbers) {
    return mine && i < block.count ? (kSquare ? 1 : sum) * numbers(kU + turn) : 0.0f;
  });
  block.put_columns(sums, Sum());
  block.put_number(0);
  block.exchange(block.m, Sum(), [&](int j, float sum) { remembered(kProduct)[j] = sum; });
  intrinsics::sync_block();
  ++n_iter;
}

}  // namespace otalign::cuda
