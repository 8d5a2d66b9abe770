// When and how an item leaves plain iterations: the policy that the engines share. All decisions are scalar; an engine
// brings the passes over the matrix, and every pass counts, whatever it is for.
//
// Plain iterations take few passes where reg is large and thousands where it is small. After a few of them, the rate of
// the error tells what is ahead. There are two faster ways:
//
// Mixing (Anderson 1965; Walker and Ni 2011). Near the solution an iteration is nearly linear, so its last updates of
// log v and what they did to the next update give the combination that leaves least. It costs nothing beside the pass.
// It starts where updates are small, and keeps an eye on what plain iterations would have reached at their last rate: a
// step that falls behind is taken back.
//
// Newton's method for the dual over g, whose f is exact. With the plan P at g, its row sums p and its column sums c,
// the step d of g / reg solves
//   (D - damping_x P^T diag(1 / p) P) d = b exp(-g / rho_y) - c,   D = diag(c + (reg / rho_y) b exp(-g / rho_y)).
// Where reg is small, a row of P has few entries that matter. Those below `drop` of their row are left out: the
// diagonal keeps their mass, so the matrix stays positive definite, and each pass still measures the true error. The
// method converges near the solution only, and tells so itself: its step is then of the order of reg. Where it is far
// longer, reg is raised until it is short, and lowered again level by level, each level starting on the line through
// the solutions of the last two. A level that turns out too far away is taken back for one half as far (in log reg).
//
// Where both marginals are relaxed by far more than reg, plain iterations hardly move the constant that f gains and g
// loses, on which the total mass depends; but the best one is known in closed form (Sejourne, Vialard and Peyre 2022):
// the one that makes sum_i a_i exp(-f_i / rho_x) and sum_j b_j exp(-g_j / rho_y) equal. It is taken where the error is
// mostly that of the constant.
//
// What is left over is done by plain iterations, and these end an item, by the same test as ever.
#pragma once

#include <cmath>
#include <cstdint>

#include "absorb.h"

namespace otalign {

// The passes to an error of `tol` at the rate of the last `window` passes, in which the error went from `before` to
// `now`.
template <class T>
OTALIGN_ANYWHERE T passes_to(T tol, T now, T before, int window) {
  constexpr T kForever = 1e9;
  if (!(now > tol)) return 0;
  const T passes = static_cast<T>(window) * std::log(now / tol) / std::log(before / now);
  return passes >= 0 && passes < kForever ? passes : kForever;
}

// How far a sequence of passes still has to go, from the errors that it went through.
class Outlook {
 public:
  // The rate is taken over `window` passes, less than kMost; before `first` passes there is none.
  OTALIGN_ANYWHERE Outlook(int first, int window) : first_(first), window_(window) {}
  // Call it once a pass.
  OTALIGN_ANYWHERE void observe(double error) { past_[seen_++ % kMost] = error; }
  OTALIGN_ANYWHERE void forget() { seen_ = 0; }
  // The passes to an error of `tol` at the last rate; 0 if too few were seen.
  OTALIGN_ANYWHERE double passes_to(double tol) const {
    if (seen_ < first_ || seen_ <= window_) return 0;
    return otalign::passes_to(tol, past_[(seen_ - 1) % kMost], past_[(seen_ - 1 - window_) % kMost], window_);
  }

 private:
  static constexpr int kMost = 16;
  const int first_, window_;
  double past_[kMost] = {};
  int seen_ = 0;
};

enum class Way { plain, mixing, newton, levels };

// What the ways cost, in passes of an iteration.
struct Costs {
  double step;    // a step of Newton's method
  double levels;  // the way over all levels
};

struct Accelerate {
  static constexpr int kFirst = 5, kWindow = 3;  // plain passes before the first judgement, and for the rate
  static constexpr double kAhead = 3;            // plain passes ahead that are worth leaving
  static constexpr double kSpread = 60;          // nats between costs from which on only levels lead to the solution

  static constexpr double kRelaxed = 0.5;  // product of the dampings from which on constants are balanced

  // Mixing.
  static constexpr double kLinear = 0.25;   // largest update of g / reg, in nats, that it starts with
  static constexpr int kWarm = 3;           // passes that it remembers before its first step
  static constexpr double kFast = 0.6;      // rate of plain iterations that needs no mixing
  static constexpr double kSlack = 0.05;    // by how much it may fall behind plain iterations
  static constexpr double kLead = 0.5;      // part of their error from which on it need not be careful
  static constexpr double kUseless = 0.95;  // part of the update that the best combination leaves, if useless
  static constexpr double kLongest = 5;     // longest step of g / reg, in nats
  static constexpr int kMixed = 16, kMixedWindow = 8;  // passes before it is judged, and for the rate
  static constexpr double kSteps = 4;                  // Newton steps that it may have ahead
  static constexpr double kPatience = 2;               // times the cost of the levels that it may have ahead

  // Newton's method.
  static constexpr double kNear = 1;        // longest step, in nats, after which a level counts as solved
  static constexpr double kFar = 8;         // a longer step says that the solution is far away
  static constexpr double kGain = 0.2;      // part of the error that a whole step has to remove
  static constexpr double kShorter = 0.35;  // what fails is tried again with this part of it, ...
  static constexpr double kShortest = 0.1;  // ... down to this part
  static constexpr int kMostSteps = 6;      // that a level may take before the steps are short
  static constexpr double kTop = 12;        // nats between costs on the first level
  static constexpr double kClimb = 8;       // factor of reg from there to the next, if it is far away as well
  static constexpr double kWorth = 0.8;     // part of the error that levels without an end have to reach
  static constexpr int64_t kReserve = 8;    // passes that remain for the way back
  static constexpr double kDrop = 1e-2, kLastDrop = 1e-3, kLeastDrop = 1e-5;

  // How to go on where plain iterations have `ahead` passes to go. `spread` is the largest difference of finite costs
  // in a row, in nats.
  template <class T>
  static OTALIGN_ANYWHERE Way choose(T ahead, T spread, Costs costs, int64_t left) {
    if (!(ahead > T(kAhead))) return Way::plain;
    const bool far = ahead > T(costs.levels) && spread > T(kSpread);
    return far && left > budget(spread) ? Way::levels : Way::mixing;
  }
  // How to go on where mixing has `ahead` passes to go.
  template <class T>
  static OTALIGN_ANYWHERE Way choose_mixed(T ahead, T spread, Costs costs, int64_t left) {
    if (ahead > T(kPatience * costs.levels) && left > budget(spread)) return Way::levels;
    return ahead > T(kSteps * costs.step) && left > 2 * kReserve ? Way::newton : Way::mixing;
  }
  // The passes that all levels take, at most, about.
  static OTALIGN_ANYWHERE double budget(double spread) { return 30 + 16 * std::log2(std::fmax(spread, 16.0) / 8); }
  // Whether a part of a step has removed enough of the error.
  template <class T>
  static OTALIGN_ANYWHERE bool accepts(T error, T before, T part) {
    return error < before * (1 - T(kGain) * part);
  }
  // Whether an error is mostly that of the constants, and `rest` would be left without it.
  static OTALIGN_ANYWHERE bool is_constant(double rest, double error) { return rest < 0.1 * error; }
  // The constant that f gains and g loses, from the two sums.
  static OTALIGN_ANYWHERE double shift(double rho_x, double rho_y, double sum_x, double sum_y) {
    const double constant = std::log(sum_x / sum_y) / (1 / rho_x + 1 / rho_y);
    return constant - constant == 0 ? constant : 0.0;  // 0 if it is not finite
  }
  // The first `drop` for rows of m entries: a plan that is nearly uniform has too many that matter, and needs none.
  static OTALIGN_ANYWHERE double drop(int64_t m) { return m > 32 ? std::fmax(kDrop, 2.0 / m) : kDrop; }
  // Whether what was dropped holds the steps up, of which the longest was `longest` nats.
  static OTALIGN_ANYWHERE bool too_coarse(double error, double before, double longest) {
    return longest <= 1 && error > std::fmax(0.3, longest) * before;
  }
};

// What plain iterations would have reached, as far as it is known while mixing.
template <class T>
class Rival {
 public:
  // A pass of plain iterations led from an error to another.
  OTALIGN_ANYWHERE void plain(T before, T error) {
    rate_ = std::fmin(error / before, T(1));
    bound_ = std::fmax(bound_ * rate_, T(1 + Accelerate::kSlack) * error);
  }
  // A mixed pass was made; returns whether its error is as good.
  OTALIGN_ANYWHERE bool mixed(T error) {
    bound_ *= rate_;
    return error <= bound_;
  }
  // Whether plain iterations are so fast that mixing has little to win.
  OTALIGN_ANYWHERE bool is_fast() const { return rate_ < T(Accelerate::kFast); }
  // Whether an error is so good that it may grow.
  OTALIGN_ANYWHERE bool is_ahead(T error) const { return error < T(Accelerate::kLead) * bound_; }

 private:
  T bound_ = 0, rate_ = 1;
};

// The levels of reg on the way down to that of the problem.
template <class T>
class Ladder {
 public:
  explicit OTALIGN_ANYWHERE Ladder(T target) : target_(target) {}
  // The next level below `reg`.
  OTALIGN_ANYWHERE T below(T reg) const {
    const T next = reg * std::exp2(-octaves_);
    return next * std::exp2(-octaves_ / 2) < target_ ? target_ : next;
  }
  // A level was solved in so many steps.
  OTALIGN_ANYWHERE void solved(int steps) {
    if (steps <= 2) octaves_ = std::fmin(T(kMost), T(kLonger) * octaves_);
  }
  // A level was too far away. Returns false if levels have become so close that this leads nowhere.
  OTALIGN_ANYWHERE bool refused() {
    octaves_ /= 2;
    return octaves_ > T(kLeast);
  }

 private:
  static constexpr double kLonger = 1.3, kMost = 2, kLeast = 0.04;
  T target_;
  T octaves_ = 1;  // of reg from a level to the next
};

}  // namespace otalign
