// The memory of Anderson's mixing (accelerate.h): the last steps and what they did to the residual.
#pragma once

#include <cmath>

#include "../accelerate.h"
#include "array.h"
#include "simd.h"

namespace otalign::OTALIGN_ISA {

// With residuals r = T(x) - x of a fixed-point map T, the next x is x + r - sum_k c_k (dx_k + dr_k) over the last steps
// dx_k and changes dr_k of the residual, where c minimises the weighted sum of squares of r - sum_k c_k dr_k.
template <class T>
class Mixing {
  using S = Simd<T>;
  using V = typename S::V;

 public:
  static constexpr int kDepth = 5;

  // `point_weights` is (padded(size),), zero behind its end.
  Mixing(int64_t size, const T* point_weights) : m(size), stride((size + 31) / 16 * 16), weights(point_weights) {
    memory.zeros((2 * kDepth + 3) * stride);
  }
  bool ok() const { return memory.ok(); }
  T* residual() { return row(2 * kDepth); }        // (m,) to be written before `advance`
  const T* step() { return row(2 * kDepth + 2); }  // (m,) out

  // Computes the step from x. Returns false if it is the residual alone: if `plain`, or if no combination promises
  // more. Unless `bold`, it has to promise something.
  bool advance(bool plain, bool bold) {
    T *const now = residual(), *const before = row(2 * kDepth + 1), *const out = row(2 * kDepth + 2);
    if (started) remember(now, before, out);
    started = true;
    for (int64_t j = 0; j < m; ++j) before[j] = out[j] = now[j];
    double c[kDepth] = {};
    if (plain || known == 0 || !(combine(c) <= Accelerate::kUseless || bold)) return false;
    for (int k = 0; k < known; ++k) {
      const T factor = static_cast<T>(c[k]);
      const T *const dx = row(k), *const dr = row(kDepth + k);
      for (int64_t j = 0; j < m; ++j) out[j] -= factor * (dx[j] + dr[j]);
    }
    T longest = 0;
    for (int64_t j = 0; j < m; ++j) longest = out[j] > longest ? out[j] : -out[j] > longest ? -out[j] : longest;
    if (longest <= T(Accelerate::kLongest)) return true;
    for (int64_t j = 0; j < m; ++j) out[j] = now[j];
    return false;
  }

  void forget() {
    known = next = 0;
    started = false;
  }

 private:
  T* row(int k) { return &memory[k * stride]; }

  double dot(const T* x, const T* y) const {
    V sum{};
    for (int64_t j = 0; j < m; j += S::W) sum += S::load(weights + j) * S::load(x + j) * S::load(y + j);
    return S::sum(sum);
  }

  // The last step and its effect replace the oldest.
  void remember(const T* now, const T* before, const T* step) {
    T *const dx = row(next), *const dr = row(kDepth + next);
    for (int64_t j = 0; j < m; ++j) {
      dr[j] = now[j] - before[j];
      dx[j] = step[j];
    }
    if (known < kDepth) ++known;
    for (int k = 0; k < known; ++k) gram[next][k] = gram[k][next] = dot(dr, row(kDepth + k));
    next = (next + 1) % kDepth;
  }

  // The coefficients by the normal equations, with a ridge that bounds them where changes depend on each other. Returns
  // the part of the residual that remains.
  double combine(double* c) {
    double factor[kDepth][kDepth], right[kDepth], trace = 0;
    for (int k = 0; k < known; ++k) trace += gram[k][k];
    const double ridge = (sizeof(T) == 4 ? 1e-7 : 1e-14) * trace;
    if (!(ridge > 0)) return 1;
    for (int i = 0; i < known; ++i) {
      right[i] = c[i] = dot(residual(), row(kDepth + i));
      for (int j = 0; j <= i; ++j) {
        double value = gram[i][j] + (i == j ? ridge : 0.0);
        for (int k = 0; k < j; ++k) value -= factor[i][k] * factor[j][k];
        factor[i][j] = i == j ? std::sqrt(std::fmax(value, ridge)) : value / factor[j][j];
      }
      for (int k = 0; k < i; ++k) c[i] -= factor[i][k] * c[k];
      c[i] /= factor[i][i];
    }
    for (int i = known - 1; i >= 0; --i) {
      for (int k = i + 1; k < known; ++k) c[i] -= factor[k][i] * c[k];
      c[i] /= factor[i][i];
    }
    const double all = dot(residual(), residual());
    double left = all;
    for (int i = 0; i < known; ++i) left -= c[i] * right[i];
    return std::sqrt(std::fmax(left, 0.0) / all);
  }

  const int64_t m, stride;
  const T* const weights;
  Array<T> memory;  // rows: kDepth steps, kDepth changes, the residual, the one before, the step
  double gram[kDepth][kDepth] = {};
  int known = 0, next = 0;
  bool started = false;
};

}  // namespace otalign::OTALIGN_ISA
