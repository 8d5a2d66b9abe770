// The linear system of a Newton step (accelerate.h): sparse rows in, the step out.
#pragma once

#include <cmath>

#include "array.h"
#include "isa.h"
#include "simd.h"

namespace otalign::OTALIGN_ISA {

// (diag(diagonal) - sum_i weight_i s_i s_i^T - r r^T / sum(r)) step = right over m unknowns, with sparse rows s_i whose
// small entries are left out. Their share r is as if each were shared by all unknowns in proportion, so that the matrix
// does to the constant vector what it does with all entries: on this the mass of a relaxed problem depends.
class Newton {
  using S = Simd<double>;
  using V = S::V;

 public:
  static constexpr int64_t kDense = 256;  // most unknowns of a factorisation

  // Makes room for m unknowns; `rounding` is that of the entries, relative. Returns false without memory.
  bool prepare(int64_t size, double rounding) {
    m = size;
    ridge = rounding;
    for (Array<double>* vector : {&diagonal, &shared, &right, &step, &rest}) vector->zeros(m + S::W);
    return diagonal.ok() && shared.ok() && right.ok() && step.ok() && rest.ok();
  }

  void clear() {
    begin.clear();
    begin.push(0);
    column.clear();
    share.clear();
    weight.clear();
  }
  // A row of at most m entries: begin_row, then put and end_row if it is true.
  bool begin_row() { return column.room(m) && share.room(m); }
  void put(int64_t j, double s) {
    column.put(static_cast<int32_t>(j));
    share.put(s);
  }
  void end_row(double w) {
    weight.push(w);
    begin.push(column.size());
  }
  int64_t entries() const { return column.size(); }
  // Whether there has been memory for everything.
  bool ok() const {
    for (const Array<double>* numbers : {&diagonal, &right, &step, &shared, &rest, &share, &weight, &matrix, &over,
                                         &residual, &direction, &image, &scale})
      if (!numbers->ok()) return false;
    return begin.ok() && column.ok();
  }
  // Writes `step`. Returns false if rounding has left no positive matrix, or if the pace stops it. If `gauge`, the null
  // vector of the matrix with all entries is constant, and the step has no part along it.
  bool solve(bool gauge, Pace& pace) {
    if (!begin.ok() || !weight.ok()) return false;
    double mass = 0, excess = 0;
    for (int64_t j = 0; j < m; ++j) {
      mass += diagonal[j];
      excess += right[j];
    }
    if (gauge)
      for (int64_t j = 0; j < m; ++j) right[j] -= excess / mass * diagonal[j];
    spread_rest();
    return m <= kDense ? cholesky(gauge ? mass : 0, pace) : conjugate_gradients(gauge ? mass : 0, pace);
  }

 private:
  // What the entries that were left out would add to `shared`, as if each were shared by all in proportion.
  void spread_rest() {
    for (int64_t j = 0; j < m; ++j) rest[j] = shared[j];
    for (int64_t i = 0; i < weight.size(); ++i) {
      double sum = 0;
      for (int64_t p = begin[i]; p < begin[i + 1]; ++p) sum += share[p];
      for (int64_t p = begin[i]; p < begin[i + 1]; ++p) rest[column[p]] -= weight[i] * sum * share[p];
    }
    over_rest = 0;
    for (int64_t j = 0; j < m; ++j) {
      rest[j] = std::fmax(rest[j], 0.0);
      over_rest += rest[j];
    }
    over_rest = over_rest > 0 ? 1 / over_rest : 0.0;
  }

  static constexpr double kEnough = 1e-3;  // remaining part of the residual of conjugate gradients

  bool cholesky(double mass, Pace& pace) {
    const int64_t stride = (m + 15) / 16 * 16, rows = (m + 3) / 4 * 4;
    matrix.zeros(rows * stride);
    over.zeros(rows);
    if (!matrix.ok() || !over.ok()) return false;
    for (int64_t i = 0; i < weight.size(); ++i) {
      if (pace.stops((begin[i + 1] - begin[i]) * (begin[i + 1] - begin[i]))) return false;
      for (int64_t p = begin[i]; p < begin[i + 1]; ++p) {
        double* const row = &matrix[column[p] * stride];
        const double s = weight[i] * share[p];
        for (int64_t q = begin[i]; q <= p; ++q) row[column[q]] -= s * share[q];
      }
    }
    for (int64_t j = 0; j < m; ++j) {
      double* const row = &matrix[j * stride];
      const double left_out = over_rest * rest[j], constant = mass > 0 ? diagonal[j] / mass : 0.0;
      for (int64_t k = 0; k <= j; ++k) row[k] += constant * diagonal[k] - left_out * rest[k];
      row[j] += diagonal[j] * (1 + ridge);
    }
    for (int64_t j = m; j < rows; ++j) matrix[j * stride + j] = 1;
    for (int64_t i = 0; i < m; i += 4)
      for (int64_t j = 0; j <= i; j += 4)
        if (!factor_tile(i, j, stride)) return false;
    for (int64_t i = 0; i < m; ++i) {
      const double* const row = &matrix[i * stride];
      V sum{};
      for (int64_t k = 0; k < i; k += S::W) {
        const auto inside = S::first(i - k < S::W ? static_cast<int>(i - k) : S::W);
        sum += S::select(inside, S::load(row + k) * S::load(&step[k]), V{});
      }
      step[i] = (right[i] - S::sum(sum)) * over[i];
    }
    for (int64_t i = m - 1; i >= 0; --i) {
      const double* const row = &matrix[i * stride];
      step[i] *= over[i];
      for (int64_t k = 0; k < i; ++k) step[k] -= row[k] * step[i];
    }
    return finite();
  }

  // out[p][q] = row i + p of the factor times its row j + q, over the columns before j.
  OTALIGN_INLINE void tile_products(int64_t i, int64_t j, int64_t stride, double (*out)[4]) {
    V products[4][4] = {};
    const auto add = [&](int64_t k, auto part) {
      V right_rows[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) right_rows[q] = S::load(&matrix[(j + q) * stride + k]);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const V left = part(S::load(&matrix[(i + p) * stride + k]));
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) products[p][q] += left * right_rows[q];
      }
    };
    int64_t k = 0;
    for (; k + S::W <= j; k += S::W) add(k, [](V left) { return left; });
    if (k < j) {
      const auto inside = S::first(static_cast<int>(j - k));
      add(k, [&](V left) { return S::select(inside, left, V{}); });
    }
    for (int p = 0; p < 4; ++p) {
      if constexpr (S::W >= 4) {
        *reinterpret_cast<typename S::UnalignedFour*>(out[p]) = S::sum_four(products[p]);
      } else {
        for (int q = 0; q < 4; ++q) out[p][q] = S::sum(products[p][q]);
      }
    }
  }

  // Factors rows i to i + 3, columns j to j + 3 of the lower triangle, after all tiles above and to the left. The
  // reciprocals of the diagonal go into `over`.
  bool factor_tile(int64_t i, int64_t j, int64_t stride) {
    double x[4][4];
    tile_products(i, j, stride, x);
    for (int p = 0; p < 4; ++p)
      for (int q = 0; q < 4; ++q) x[p][q] = matrix[(i + p) * stride + j + q] - x[p][q];
    for (int q = 0; q < 4; ++q) {
      if (i == j) {
        for (int k = 0; k < q; ++k)
          for (int p = q; p < 4; ++p) x[p][q] -= x[p][k] * x[q][k];
        if (!(x[q][q] > 0)) return false;
        x[q][q] = std::sqrt(x[q][q]);
        over[j + q] = 1 / x[q][q];
        for (int p = q + 1; p < 4; ++p) x[p][q] *= over[j + q];
      } else {
        const double* const other = &matrix[(j + q) * stride + j];
        for (int k = 0; k < q; ++k)
          for (int p = 0; p < 4; ++p) x[p][q] -= x[p][k] * other[k];
        for (int p = 0; p < 4; ++p) x[p][q] *= over[j + q];
      }
    }
    for (int p = 0; p < 4; ++p)
      for (int q = 0; q < 4; ++q) matrix[(i + p) * stride + j + q] = x[p][q];
    return true;
  }

  // image = matrix direction. Returns false if the pace stops it.
  bool apply(Pace& pace) {
    for (int64_t j = 0; j < m; ++j) image[j] = diagonal[j] * direction[j];
    for (int64_t i = 0; i < weight.size(); ++i) {
      if (pace.stops(begin[i + 1] - begin[i])) return false;
      double product = 0;
      for (int64_t p = begin[i]; p < begin[i + 1]; ++p) product += share[p] * direction[column[p]];
      product *= weight[i];
      for (int64_t p = begin[i]; p < begin[i + 1]; ++p) image[column[p]] -= product * share[p];
    }
    double along = 0;
    for (int64_t j = 0; j < m; ++j) along += rest[j] * direction[j];
    for (int64_t j = 0; j < m; ++j) image[j] -= over_rest * along * rest[j];
    return true;
  }

  // Preconditioned with the diagonal.
  bool conjugate_gradients(double mass, Pace& pace) {
    for (Array<double>* vector : {&residual, &direction, &image, &scale, &step}) vector->zeros(m + S::W);
    if (!residual.ok() || !direction.ok() || !image.ok() || !scale.ok()) return false;
    for (int64_t j = 0; j < m; ++j) {
      scale[j] = diagonal[j];
      residual[j] = right[j];
    }
    for (int64_t i = 0; i < weight.size(); ++i)
      for (int64_t p = begin[i]; p < begin[i + 1]; ++p) scale[column[p]] -= weight[i] * share[p] * share[p];
    for (int64_t j = 0; j < m; ++j) scale[j] = std::fmax(scale[j], 1e-8 * diagonal[j]);
    double before = 0, first = 0;
    for (int64_t k = 0; k < 4 * m; ++k) {
      double now = 0, along = 0, curvature = 0;
      for (int64_t j = 0; j < m; ++j) now += residual[j] * residual[j] / scale[j];
      if (k == 0) first = now;
      if (!(now > kEnough * kEnough * first)) break;
      for (int64_t j = 0; j < m; ++j)
        direction[j] = residual[j] / scale[j] + (before > 0 ? now / before : 0.0) * direction[j];
      if (!apply(pace)) return false;
      if (mass > 0)
        for (int64_t j = 0; j < m; ++j) along += diagonal[j] / mass * direction[j];
      for (int64_t j = 0; j < m; ++j) {
        image[j] += along * diagonal[j];
        curvature += direction[j] * image[j];
      }
      if (!(curvature > 0)) break;
      for (int64_t j = 0; j < m; ++j) {
        step[j] += now / curvature * direction[j];
        residual[j] -= now / curvature * image[j];
      }
      before = now;
    }
    return finite();
  }

  bool finite() const {
    double sum = 0;
    for (int64_t j = 0; j < m; ++j) sum += step[j] * 0;
    return sum == 0;
  }

 public:
  double longest() const {
    double most = 0;
    for (int64_t j = 0; j < m; ++j) most = std::fmax(most, std::fabs(step[j]));
    return most;
  }

  Array<double> diagonal, right, step;  // (m,)
  Array<double> shared;                 // (m,) sum_i weight_i s_ij, with the entries that were left out

 private:
  int64_t m = 0;
  double ridge = 0;                                 // added to the diagonal, relative to it
  Array<double> rest;                               // (m,) see spread_rest
  double over_rest = 0;                             // the reciprocal of its sum
  Array<int64_t> begin;                             // of the rows' entries
  Array<int32_t> column;                            // of each entry
  Array<double> share;                              // each entry
  Array<double> weight;                             // of each row
  Array<double> matrix, over;                       // of the factorisation
  Array<double> residual, direction, image, scale;  // of the conjugate gradients
};

}  // namespace otalign::OTALIGN_ISA
