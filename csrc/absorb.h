// The absorption and stopping policy that the compiled engines share, on the CPU and on the GPU.
//
// An iteration is multiply-adds on K_ij = exp((f_i + g_j - C_ij) / reg), the potentials f, g absorbed so far:
//   u = a / (K v), v = b / (K^T u).
// A float holds about 170 nats. Entries of K below exp(-kFar) are kept as their exponent instead (a negative number,
// which the iteration reads as zero), so that nothing is ever lost: once u, v or a sum leave exp(+-kNear), the sum is
// made exactly in the log domain, its potential is absorbed, and exponents that came back are entries again. What an
// iteration leaves out is below exp(2 kNear - kFar) of a sum, far under rounding.
//
// Entries above exp(kFar) are kept as -1 / exponent, and read as zero as well. They occur in rows and columns without
// mass, where nothing bounds them and nothing asks for them. Between points with mass they can occur for an iteration,
// where relaxed marginals meet costs far from zero; while there are any, iterations are made in the log domain.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define OTALIGN_ANYWHERE __host__ __device__ inline
#else
#define OTALIGN_ANYWHERE inline
#endif

namespace otalign {

template <class T>
struct Absorb;
template <>
struct Absorb<float> {
  static constexpr float kFar = 80, kNear = 20;
  static constexpr float kLow = 2.0611536e-9f, kHigh = 4.8516520e8f;  // exp(-+kNear)
};
template <>
struct Absorb<double> {
  static constexpr double kFar = 650, kNear = 200;
  static constexpr double kLow = 1.3838965267367376e-87, kHigh = 7.225973768125749e86;
};

// Whether a sum, or the scaling made of it, allows multiply-adds to go on. NaN does not.
template <class T>
OTALIGN_ANYWHERE bool is_near(T value) {
  return value >= Absorb<T>::kLow && value <= Absorb<T>::kHigh;
}

// An item stops by itself; tol = 0 asks for all iterations. NaN never gets better.
template <class T>
OTALIGN_ANYWHERE bool should_stop(T error, T tol, int64_t n_iter, int64_t max_iter) {
  return (tol > 0 && error <= tol) || n_iter >= max_iter || error != error;
}

OTALIGN_ANYWHERE bool is_strict(double rho) { return rho > 1.7e308; }

// rho / (rho + reg), the exponent of a relaxed update; 1 where the marginal is strict (rho infinite).
OTALIGN_ANYWHERE double damping(double reg, double rho) { return is_strict(rho) ? 1.0 : rho / (rho + reg); }

// What a potential adds to the dual per unit of mass.
OTALIGN_ANYWHERE double dual_term(double f, double rho) { return is_strict(rho) ? f : -rho * expm1(-f / rho); }

// What stands for the infinite potential of a point that nothing with mass reaches: its dual term is 0 if the marginal
// is strict, and the price rho of carrying nothing if it is relaxed.
OTALIGN_ANYWHERE double unreached_potential(double rho) { return is_strict(rho) ? 0.0 : 40 * rho; }

}  // namespace otalign
