// Which pass an item makes next where it has left plain iterations (accelerate.h). All is scalar: one thread of each
// block decides, from sums that all blocks have with the same bits. accelerated.cuh makes the passes.
#pragma once

#include <cmath>
#include <cstdint>

#include "../accelerate.h"
#include "tiling.h"

namespace otalign::cuda {

// What accelerated.cuh does with a pass at v that is done, before the next one.
enum class Move : int32_t {
  leave,    // goes on plainly from the plain update
  rebuild,  // goes on plainly in the log domain from v
  update,   // takes the plain update and remembers it
  mix,      // takes the mixed step
  back,     // takes the plain update of where the last step came from
  newton,   // computes a step of Newton's method
  part,     // takes a part of it
  enter,    // goes on in the log domain with another reg
};
// The potentials that are kept for the levels.
enum class Keep : int32_t { nothing, start, solved };

// Products of a pass over the columns, for mixing: of the last change of the residual with each of those that are
// remembered, newest first; of the residual with each; of the residual with itself; and the error of the columns.
struct MixingSums {
  static constexpr int kDepth = 5, kCount = 16;
  float of_change[kDepth], of_residual[kDepth], all, error, unused[4];
};
static_assert(sizeof(MixingSums) == MixingSums::kCount * sizeof(float));

class Course {
  static constexpr int kDepth = MixingSums::kDepth, kPast = 16;
  // In passes. A step of Newton's method has its own pass, that for the diagonal, and two or three products.
  static constexpr Costs kCosts{4, 100};
  static constexpr float kRest = 0.2f, kMostRest = 0.5f;  // part of the residual that may remain in a system
  static constexpr int kMostProducts = 12;
  static constexpr float kFarthest = 0.5f * float(Accelerate::kFar);  // mean length at which a step is given up

 public:
  OTALIGN_DEVICE void begin_item(float reg_of_item) {
    reg = level = reg_of_item;
    way = Way::plain;
    descended = false;
    spread = 0;
    done();
  }

  // Plain iterations ------------------------------------------------------------------------------------------------

  // The errors of the passes since the way was last changed.
  OTALIGN_DEVICE void put_error(int seen, float error) { past[seen % kPast] = error; }
  // The passes that plain iterations have ahead after `seen` others, the last with this error, which may not be put
  // yet.
  OTALIGN_DEVICE float ahead(int seen, float error, float tol) const {
    constexpr int window = Accelerate::kWindow;
    return seen + 1 < Accelerate::kFirst ? 0 : passes_to(tol, error, past[(seen - window) % kPast], window);
  }
  OTALIGN_DEVICE Way choose(float passes, int left) const {
    return Accelerate::choose(passes, descended ? 0 : spread, kCosts, left);
  }

  OTALIGN_DEVICE void begin_mixing() {
    way = Way::mixing;
    seen = 0;
    rival = Rival<float>();
    warming = wait = Accelerate::kWarm;
    tried = INFINITY;
    forget();
    was = Was::start;
  }
  // Newton's method, first at this reg, then on levels above it.
  OTALIGN_DEVICE void begin_descent(float error, float tol, int left) {
    way = Way::levels;
    descended = true;
    first_error = error;
    keep = Keep::start;
    stage = Stage::first;
    begin_level(error, tol, left);
  }

  // Mixing ----------------------------------------------------------------------------------------------------------

  // After a pass; `held` says whether floats hold it, `missing` is the part of the error that no iteration changes.
  OTALIGN_DEVICE void mixed(const MixingSums& sums, bool held, float tol, int left) {
    const float error = held ? sums.error : INFINITY;
    remember(sums);
    if (!held && was != Was::mixed) return end(Move::rebuild);
    if (was == Was::mixed && !rival.mixed(error)) {
      forget();
      warming = wait *= 2;
      was = Was::start;
      move = Move::back;
      return;
    }
    if (was == Was::plain) rival.plain(before, error);
    before = error;
    if (!(error > tol) || left <= 2) return end(Move::leave);
    put_error(seen, error);
    ++seen;
    constexpr int window = Accelerate::kMixedWindow;
    const float passes =
        seen < Accelerate::kMixed ? 0 : passes_to(tol, error, past[(seen - 1 - window) % kPast], window);
    const Way next = Accelerate::choose_mixed(passes, spread, kCosts, left);
    if (next == Way::levels && !descended) return begin_descent(error, tol, left);
    if (next != Way::mixing && error < 0.1f * tried) {
      tried = error;
      way = Way::newton;
      stage = Stage::polish;
      return begin_level(error, tol, left);
    }
    const bool plain = warming-- > 0 || left < 4 || rival.is_fast();
    const bool mixes = !plain && (combine(sums) <= float(Accelerate::kUseless) || rival.is_ahead(error));
    was = mixes ? Was::mixed : Was::plain;
    move = mixes ? Move::mix : Move::update;
  }
  // The mixed step was too long.
  OTALIGN_DEVICE void refuse_mixed() { was = Was::plain; }

  // Newton's method and levels ----------------------------------------------------------------------------------------

  // The search for a step by conjugate gradients: from this energy of the residual, the square of its norm. The last
  // step need not be better than the tolerance asks for. `weight` is the sum over D.
  OTALIGN_DEVICE void begin_search(float energy_of_residual, float weight, float tol) {
    const float rest = is_last() ? fmaxf(kRest, fminf(0.5f * tol / before, kMostRest)) : kRest;
    energy = energy_of_residual;
    enough = energy * rest * rest;
    farthest = weight * kFarthest * kFarthest;
    products = 0;
    far = false;
  }
  // Whether another product is worth it.
  OTALIGN_DEVICE bool searches(float energy_of_residual, int left) const {
    return energy_of_residual > enough && products < kMostProducts && !far && left > Accelerate::kReserve;
  }
  // After a product; `square` is that of the step in the norm of D, in which it grows with every product.
  OTALIGN_DEVICE void searched(float energy_of_residual, float square) {
    energy = energy_of_residual;
    ++products;
    far = square > farthest;
  }
  OTALIGN_DEVICE bool found() const { return products > 0 && !far; }
  // After a step was computed: whether it is at most kNear and kFar long.
  OTALIGN_DEVICE void stepped(bool is_near, bool is_within, int left) {
    near = is_near;
    part = 1;
    move = Move::part;
    if (!is_within || left < 2) end_level(false, left);
  }

  // After the pass at the trial of a step, at the point that is taken back to, or at the start of a level.
  OTALIGN_DEVICE void tried_step(float error, bool held, float tol, int left) {
    if (!held) error = INFINITY;
    if (was == Was::entered) return entered(error, held, tol, left);
    if (was == Was::start) return end_level(false, left);
    if (held && Accelerate::accepts(error, before, part)) {
      ++steps;
      if (part != 1) near = false;
      return next_step(error, tol, left);
    }
    part *= float(Accelerate::kShorter);
    if (part > float(Accelerate::kShortest) && room(1, left)) {
      move = Move::part;
      return;
    }
    was = Was::start;
    move = Move::back;
  }

  // Where the memory has the change of this age, 0 = the newest, and where the next one will be.
  OTALIGN_DEVICE int slot(int age) const { return (newest + kDepth - age) % kDepth; }
  OTALIGN_DEVICE int slot_after() const { return (newest + 1) % kDepth; }
  // Before a decision: what the last one asked for is done.
  OTALIGN_DEVICE void done() {
    keep = Keep::nothing;
    forgot = false;
  }
  OTALIGN_DEVICE static bool needs_spread(float passes) { return passes > float(kCosts.levels); }

  // Read by all threads between the decisions.
  Way way;
  Move move;
  Keep keep;
  bool started, forgot;  // whether a step is remembered to compare with; whether the memory has to be cleared
  bool from_start;       // levels are entered from the potentials of Keep::start
  int newest;            // the slot of the last change of the residual
  float part;            // of a step
  float reg, level;      // of the item, and of the level that is entered
  float reach;           // how far to go beyond the last two levels, in their distances
  float spread;          // largest difference of costs in a row, a mean over the rows, in nats
  float coefficients[kDepth];
  float energy;  // of the residual of the search

 private:
  // What the last pass was made at: where mixing starts or was taken back to, a plain update, a mixed step or a part of
  // Newton's, or the start of a level.
  enum class Was : int32_t { start, plain, mixed, entered };
  // What Newton's method is for: the end of mixing; the item's reg before any levels; the first level; the levels below
  // it; the way back to the item's reg.
  enum class Stage : int32_t { polish, first, climb, descend, way_back };

  static OTALIGN_DEVICE bool room(int count, int left) { return left >= Accelerate::kReserve + count; }

  OTALIGN_DEVICE void end(Move next) {
    way = Way::plain;
    move = next;
  }

  OTALIGN_DEVICE void forget() {
    started = false;
    forgot = true;
    newest = 0;
    for (float& product : gram) product = 0;
  }
  // Puts the products of the last change into the matrix, where they move those before by one.
  OTALIGN_DEVICE void remember(const MixingSums& sums) {
    if (started) {
      newest = slot_after();
      for (int i = kDepth - 1; i > 0; --i)
        for (int j = i; j > 0; --j) gram[at(i, j)] = gram[at(i - 1, j - 1)];
      for (int i = 0; i < kDepth; ++i) gram[at(i, 0)] = sums.of_change[i];
    }
    started = true;
  }
  static constexpr OTALIGN_DEVICE int at(int i, int j) { return i * (i + 1) / 2 + j; }

  // Anderson's coefficients by the normal equations, with a ridge that bounds them. Returns the part of the residual
  // that remains.
  OTALIGN_DEVICE float combine(const MixingSums& sums) {
    float matrix[kDepth][kDepth], right[kDepth], over[kDepth], trace = 0;
    OTALIGN_UNROLL
    for (int i = 0; i < kDepth; ++i) {
      trace += gram[at(i, i)];
      right[i] = sums.of_residual[i];
      OTALIGN_UNROLL
      for (int j = 0; j <= i; ++j) matrix[i][j] = gram[at(i, j)];
    }
    const float ridge = 1e-6f * trace;
    if (!(ridge > 0)) return 1;
    OTALIGN_UNROLL
    for (int p = 0; p < kDepth; ++p) {
      over[p] = 1 / fmaxf(matrix[p][p] + ridge, ridge);
      OTALIGN_UNROLL
      for (int i = p + 1; i < kDepth; ++i) {
        const float factor = matrix[i][p] * over[p];
        right[i] -= factor * right[p];
        OTALIGN_UNROLL
        for (int j = p + 1; j <= i; ++j) matrix[i][j] -= factor * matrix[j][p];
      }
    }
    float rest = sums.all;
    OTALIGN_UNROLL
    for (int p = kDepth - 1; p >= 0; --p) {
      float value = right[p];
      OTALIGN_UNROLL
      for (int i = p + 1; i < kDepth; ++i) value -= matrix[i][p] * right[i];
      right[p] = value * over[p];
      coefficients[p] = right[p];
      rest -= right[p] * sums.of_residual[p];
    }
    return sqrtf(fmaxf(rest, 0) / sums.all);
  }

  OTALIGN_DEVICE static float smallest(float tol) { return fmaxf(tol, 2e-6f); }

  OTALIGN_DEVICE void begin_level(float error, float tol, int left) {
    steps = 0;
    near = false;
    was = Was::mixed;
    next_step(error, tol, left);
  }
  OTALIGN_DEVICE bool is_last() const { return level == reg; }
  OTALIGN_DEVICE void next_step(float error, float tol, int left) {
    const bool solved = is_last() ? error <= smallest(tol) : near;
    before = error;
    move = Move::newton;
    if (solved || !room(2, left) || (steps >= Accelerate::kMostSteps && !near)) end_level(solved, left);
  }

  OTALIGN_DEVICE void end_level(bool solved, int left) {
    switch (stage) {
      case Stage::polish:
        if (solved) return end(Move::leave);
        way = Way::mixing;
        forget();
        was = Was::start;
        move = Move::update;
        return;
      case Stage::first:
        if (solved) return end(Move::leave);
        stage = Stage::climb;
        from_start = true;
        above = 0;
        return climb(reg * fmaxf(spread / float(Accelerate::kTop), 2), left);
      case Stage::climb:
        if (!solved) return climb(level * float(Accelerate::kClimb), left);
        stage = Stage::descend;
        from_start = false;
        ladder = Ladder<float>(reg);
        reached = level;
        keep = Keep::solved;
        return descend(left);
      case Stage::descend:
        if (!solved) return ladder.refused() ? descend(left) : go_back();
        if (is_last()) return end(Move::leave);
        ladder.solved(steps);
        above = reached;
        reached = level;
        keep = Keep::solved;
        return descend(left);
      case Stage::way_back:
        return end(Move::leave);
    }
  }
  OTALIGN_DEVICE void climb(float next, int left) {
    if (!(next <= spread * reg) || !room(6, left)) return go_back();
    enter(next, 0);
  }
  OTALIGN_DEVICE void descend(int left) {
    if (!room(6, left)) return go_back();
    const float next = ladder.below(reached);
    enter(next, above > 0 ? (next - reached) / (reached - above) : 0);
  }
  // Out of passes, or no way found: goes on from these potentials, or from the first if they are better.
  OTALIGN_DEVICE void go_back() {
    stage = Stage::way_back;
    enter(reg, 0);
  }
  OTALIGN_DEVICE void enter(float next, float how_far) {
    level = next;
    reach = how_far;
    was = Was::entered;
    move = Move::enter;
  }
  OTALIGN_DEVICE void entered(float error, bool held, float tol, int left) {
    if (stage == Stage::way_back) {
      if (from_start || error <= float(Accelerate::kWorth) * first_error)
        return end(held ? Move::leave : Move::rebuild);
      from_start = true;
      return go_back();
    }
    if (!held) return end_level(false, left);
    begin_level(error, tol, left);
  }

  Was was;
  Stage stage;
  bool descended;        // whether the levels were used for this item
  bool near;             // whether the last step was short
  int seen;              // errors that were put
  int warming, wait;     // plain steps before the next mixed one, and before one after the next that fails
  int steps;             // at this level
  float before;          // the error before the last step
  float tried;           // the error at the last try of Newton's method
  float first_error;     // that before the levels
  float above, reached;  // the last two levels that were solved; 0 = none
  float past[kPast];
  float gram[kDepth * (kDepth + 1) / 2];  // (lower triangle) products of the changes, newest first
  float enough, farthest;                 // of the search for a step
  int products;
  bool far;
  Rival<float> rival;
  Ladder<float> ladder{0};
};
static_assert(sizeof(Course) <= kCourse * sizeof(float));

}  // namespace otalign::cuda
