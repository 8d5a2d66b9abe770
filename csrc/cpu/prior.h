// The prior's term B in a row of the cost, as Prior.matrix in otalign/prior.py.
#pragma once

#include <cmath>

#include "isa.h"
#include "simd.h"

namespace otalign::OTALIGN_ISA {

template <class T>
class PriorRow {
 public:
  explicit PriorRow(const Item<T>& item) : kind(item.prior), n(item.n), m(item.m) {
    p0 = item.prior_parameters[0];
    const double inv_n = 1.0 / n, inv_m = 1.0 / m;
    if (kind == PriorKind::order_preserving) {
      const double delta = item.prior_parameters[1];
      quadratic = item.reg / (2 * delta * delta * (inv_n * inv_n + inv_m * inv_m));
      constant = item.reg * std::log(delta * std::sqrt(2 * 3.141592653589793));
    } else if (kind == PriorKind::band) {
      const double spacing = n > 1 ? static_cast<double>(m - 1) / (n - 1) : HUGE_VAL;
      double width = p0 > 0.5 ? p0 : 0.5;
      if (0.5 * spacing > width) width = 0.5 * spacing;
      p0 = width + 1e-9 * (m > 1 ? m : 1);
    }
  }

  bool none() const { return kind == PriorKind::none; }

  // row_j += B(i, j) for all j.
  void add(int64_t i, T* row) const {
    const double u = n > 1 ? static_cast<double>(i) / (n - 1) : 0.0, inv_m = m > 1 ? 1.0 / (m - 1) : 0.0;
    switch (kind) {
      case PriorKind::none:
        return;
      case PriorKind::quadratic:
        for (int64_t j = 0; j < m; ++j) row[j] += static_cast<T>(p0 * (u - j * inv_m) * (u - j * inv_m));
        return;
      case PriorKind::absolute:
        for (int64_t j = 0; j < m; ++j) row[j] += static_cast<T>(p0 * std::fabs(u - j * inv_m));
        return;
      case PriorKind::order_preserving: {
        const double position = static_cast<double>(i + 1) / n, step = 1.0 / m;
        for (int64_t j = 0; j < m; ++j) {
          const double e = position - (j + 1) * step;
          row[j] += static_cast<T>(-p0 / (e * e + 1) + quadratic * e * e + constant);
        }
        return;
      }
      case PriorKind::band:
        for (int64_t j = 0; j < m; ++j)
          if (!(std::fabs(u - j * inv_m) * (m - 1) <= p0)) row[j] = static_cast<T>(HUGE_VAL);
        return;
    }
  }

 private:
  PriorKind kind;
  int64_t n, m;
  double p0, quadratic = 0, constant = 0;
};

}  // namespace otalign::OTALIGN_ISA
