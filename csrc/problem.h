// The plain structs that every engine takes: pointers, strides in elements, lengths, options. No torch, no CUDA header.
#pragma once

#include <cstdint>

namespace otalign {

enum class Scalar : int32_t { f32, f64, bf16, f16 };
enum class Cost : int32_t { cosine, sqeuclidean, euclidean, dot, given };
enum class PriorKind : int32_t { none, quadratic, absolute, order_preserving, band };

// One side of the problem. Vectors with one number per point start at `row(item)`, and are contiguous.
struct Side {
  const int64_t* lengths;  // (B); on a GPU null if full or packed
  const int64_t* starts;   // (B) first row of each item if packed, else null; on a GPU (B + 1)
  int64_t size;            // rows of an item's slot if padded
  int64_t rows;            // rows in all

  const void* points;  // (B, size, D) or (rows, D); null if the cost is given
  Scalar points_type;
  int64_t item_stride, row_stride;

  const void* weights;  // T, normalised; null = uniform
  void* potential;      // T, out
  void* mass;           // T, out: sum of the plan over the other side, divided by the weight
  void* scale;          // T, out: reciprocal norms (cosine)

  int64_t row(int64_t item) const { return starts ? starts[item] : item * size; }
  int64_t element(int64_t item) const { return starts ? starts[item] * row_stride : item * item_stride; }
};

// A batch of B problems. T is double if `is_double`, else float.
struct Problem {
  int64_t items;
  int64_t dim;  // D
  bool is_double;
  Side x, y;

  Cost cost;
  const void* given;  // (B, N, M), the cost if it is given; on a GPU every cost, T, (rows of x, pitch)
  Scalar given_type;
  int64_t given_strides[3];

  PriorKind prior;
  double prior_parameters[2];

  const double* reg;  // (B); null = `reg_of_all`
  double reg_of_all;
  double rho_x, rho_y;
  const void* init;  // T, g to start from; null = zero
  int64_t max_iter;
  double tol;
  bool symmetric;  // both sides are the same points with the same weights: solved by one potential, f = g

  void* plan;      // T, the plans one behind the other, see plan_stride
  void* distance;  // T, the same layout: distances, kept for the Euclidean cost; else null
  int64_t capacity;

  void* value;   // T (B), out
  void* linear;  // T (B), out
  void* error;   // T (B), out
  int32_t* n_iter;

  int32_t threads;
  int64_t pitch;  // on a GPU: numbers from one row of the costs to the next
  void* scratch;  // on a GPU: memory of as many bytes as cuda::plan says, aligned to 16
};

// What flows back: gradients by value, linear and plan come in (null = zero), gradients by the inputs go out (null =
// not wanted). They have the layout of the inputs, but are contiguous; padding is zeroed.
struct Gradients {
  const void* value;   // T (B)
  const void* linear;  // T (B)
  const void* plan;    // T, layout of Problem::plan
  void* x;             // type of the points
  void* y;
  void* given;  // type of the given cost
  void* a;      // T
  void* b;      // T
};

// The implicit system of a batch on a GPU: what flows back by transport cost and plan, and the lifts that solve it.
struct Lifts {
  const void* linear;   // T; null = zero
  int64_t linear_step;  // numbers from one item's to the next: 0 if all have the same
  const void* plan;     // T, (rows of x, pitch); null = zero
  void* x;              // T, out, as the potentials
  void* y;
};

// Elements from one item's plan to the next: its own, and a gap of zeros so that a vector may be read across its end.
constexpr int64_t kPlanGap = 16;
inline int64_t plan_stride(int64_t n, int64_t m) { return (n * m + kPlanGap + 15) / 16 * 16; }

}  // namespace otalign
