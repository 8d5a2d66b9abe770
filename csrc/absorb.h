// The absorption and stopping policy that the compiled engines share, on the CPU and on the GPU.
//
// An iteration is multiply-adds on K_ij = exp((f_i + g_j - C_ij) / reg), where f, g are the potentials absorbed so far:
//   u = a / (K v), v = b / (K^T u).
// A float holds exponents of about 170 nats. Entries of K below exp(-kEntryRange) are stored as their exponent instead
// (a negative number, which the iteration reads as zero), so no entry is lost. If u, v or a sum leaves
// exp(+-kScalingRange), the sum is recomputed exactly in the log domain and its potential is absorbed; exponents that
// return into the range become entries again. What an iteration leaves out is below exp(2 kScalingRange - kEntryRange)
// of a sum, far under rounding.
//
// Entries above exp(kEntryRange) are stored as -1 / exponent, and are read as zero as well. They occur in rows and
// columns without mass, where nothing bounds them and nothing reads them. Between points with mass they can occur for
// one iteration, where relaxed marginals meet costs far from zero; while there are any, iterations are made in the log
// domain.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace otalign {

template <class T>
struct Absorb;
template <>
struct Absorb<float> {
  static constexpr float kEntryRange = 80, kScalingRange = 20;
  static constexpr float kLow = 2.0611536e-9f, kHigh = 4.8516520e8f;  // exp(-+kScalingRange)
};
template <>
struct Absorb<double> {
  static constexpr double kEntryRange = 650, kScalingRange = 200;
  static constexpr double kLow = 1.3838965267367376e-87, kHigh = 7.225973768125749e86;
};

// Whether multiply-adds can go on with this sum, or with the scaling made of it. False for NaN.
template <class T>
OTALIGN_ANYWHERE bool in_scaling_range(T value) {
  return value >= Absorb<T>::kLow && value <= Absorb<T>::kHigh;
}

// Each item stops by itself. tol = 0 means all iterations; NaN stops at once, since it never becomes a number again.
template <class T>
OTALIGN_ANYWHERE bool should_stop(T error, T tol, int64_t n_iter, int64_t max_iter) {
  return (tol > 0 && error <= tol) || n_iter >= max_iter || error != error;
}

OTALIGN_ANYWHERE bool is_strict(double rho) { return rho > 1.7e308; }

// rho / (rho + reg), the exponent of a relaxed update; 1 where the marginal is strict (rho infinite).
OTALIGN_ANYWHERE double damping(double reg, double rho) { return is_strict(rho) ? 1.0 : rho / (rho + reg); }

// What a potential adds to the dual objective per unit of mass.
OTALIGN_ANYWHERE double dual_term(double f, double rho) { return is_strict(rho) ? f : -rho * expm1(-f / rho); }

// A finite replacement for the infinite potential of an unreached point, at infinite cost to all mass. Its dual term is
// 0 if the marginal is strict; if it is relaxed, rho, the price of carrying no mass.
OTALIGN_ANYWHERE double unreached_potential(double rho) { return is_strict(rho) ? 0.0 : 40 * rho; }

}  // namespace otalign
