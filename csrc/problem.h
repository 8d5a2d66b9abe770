// What the CPU engine takes: pointers, strides in elements, lengths, options. No torch. The GPU's structs are in
// cuda/arguments.h.
//
// Shapes are in elements: B items; N = x.size, M = y.size; D dimensions; n, m the lengths of one item. T is the type of
// the computation: double if `is_double`, else float. A side's vectors have one element per point, so (rows,) in all,
// contiguous; an item's part starts at `row(item)`.
#pragma once

#include <cstdint>

#include "span.h"

namespace otalign {

enum class Scalar : int32_t { f32, f64, bf16, f16 };
enum class Cost : int32_t { cosine, sqeuclidean, euclidean, dot, given };
enum class PriorKind : int32_t { none, quadratic, absolute, order_preserving, band };

// The options that are plain numbers. Python sets them by these names, for the CPU engine and the CUDA kernels alike.
struct Options {
  double rho_x, rho_y;  // relaxation of the marginals, in the unit of the cost; infinite = strict
  int64_t max_iter;     // at least 1
  double tol;           // an item stops at this L1 error of the marginals; 0 = make all iterations
  bool accelerate;      // Newton's steps in the place of many iterations (accelerate.h); not if tol = 0
};

// One side of the problem.
struct Side {
  Span<const int64_t> lengths;  // (B,) points of each item
  Span<const int64_t> starts;   // (B,) first row of each item if packed; null = padded
  int64_t size;                 // rows of an item's slot if padded; if packed, at least the longest length
  int64_t rows;                 // rows in all

  Span<const void> points;  // (B, size, D) or (rows, D) of `points_type`; D contiguous; null if the cost is given
  Scalar points_type;
  int64_t item_stride, row_stride;  // elements of `points` from one item to the next, and from one row to the next

  Span<const void> weights;  // (rows,) T, mass, sums to 1 an item; null = uniform
  Span<void> potential;      // (rows,) T, out: f or g, in the unit of the cost
  Span<void> mass;           // (rows,) T, out: sum of the plan over the other side, divided by the weight
  Span<void> scale;          // (rows,) T, out: reciprocal norms (cosine) or squared norms of the points over 2^exponent
  Span<void> exponent;       // (rows,) T, out: 0, except for norms whose squares leave the range of T

  int64_t row(int64_t item) const { return starts ? starts[item] : item * size; }
  int64_t element(int64_t item) const { return starts ? starts[item] * row_stride : item * item_stride; }
};

// A batch of B problems.
struct Problem : Options {
  int64_t items;  // B
  int64_t dim;    // D
  bool is_double;
  Side x, y;

  Cost cost;
  Span<const void> given;  // (B, N, M) of `given_type`: the cost if it is given, else null
  Scalar given_type;
  int64_t given_strides[3];  // in elements

  PriorKind prior;
  double prior_parameters[2];

  Span<const double> reg;  // (B,), in the unit of the cost
  Span<const void> init;   // (y.rows,) T: g to start from; null = zero
  bool symmetric;          // both sides are the same points with the same weights: solved by one potential, f = g

  // The plans, one behind the other: item b has (n, m) elements of T, row-major, and then zeros up to plan_stride(n,
  // m). Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan.
  Span<void> plan;      // (capacity,) T, out
  Span<void> distance;  // (capacity,) T, out, placed as `plan`: distances, kept for the Euclidean cost; else null
  int64_t capacity;     // elements in `plan`

  Span<void> value;      // (B,) T, out
  Span<void> linear;     // (B,) T, out: <P, C>
  Span<void> error;      // (B,) T, out: L1 error of the marginals; NaN if the item has no finite solution
  Span<int32_t> n_iter;  // (B,) out

  int32_t threads;
};

// The backward pass. Gradients by value, linear and plan come in (null = zero); gradients by the inputs go out (null =
// not wanted). The latter have the shape of the inputs, but are contiguous; their padding is set to zero.
struct Gradients {
  Span<const void> value;   // (B,) T
  Span<const void> linear;  // (B,) T
  Span<const void> plan;    // (capacity,) T, placed as Problem::plan
  Span<void> x;             // (B, N, D) or (x.rows, D) of x.points_type, out
  Span<void> y;             // (B, M, D) or (y.rows, D) of y.points_type, out
  Span<void> given;         // (B, N, M) of given_type, out
  Span<void> a;             // (x.rows,) T, out
  Span<void> b;             // (y.rows,) T, out
};

// Elements from one item's plan to the next: its own, and a gap of zeros so that a vector may be read across its end.
constexpr int64_t kPlanGap = 16;
inline int64_t plan_stride(int64_t n, int64_t m) { return (n * m + kPlanGap + 15) / 16 * 16; }

}  // namespace otalign
