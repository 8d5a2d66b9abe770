// What the CUDA kernels take. All numbers are float32, in memory of one GPU; all strides are in elements.
//
// A side's vectors have one element per point, so (rows,) in all, contiguous.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "../span.h"
#include "tiling.h"

namespace otalign::cuda {

// One side of a batch of B items.
struct CudaSide {
  Span<const int64_t> lengths;  // (B,) points of each item; null = all full, or packed
  Span<const int64_t> starts;   // (B + 1,) first row of each item if packed, then the number of rows; null = padded
  int64_t size;                 // rows of an item's slot if padded; if packed, at least the longest length
  int64_t rows;                 // rows in all

  Span<const float> weights;  // (rows,) mass, sums to 1 an item; null = uniform
  Span<float> potential;      // (rows,) f or g, in the unit of the cost: out of a solve, into the implicit system
};

struct CudaProblem : Options {
  int64_t items;  // B
  CudaSide x, y;

  // (x.rows, pitch): row i holds the costs of point i of x to the points of y of the same item, prior included, then
  // zeros up to a multiple of 4. Aligned to 16 bytes.
  Span<const float> costs;

  Span<const double> reg;  // (B,), in the unit of the cost; null = `reg_of_all`
  double reg_of_all;
  Span<const float> init;  // (y.rows,) g to start from; null = zero

  Span<float> value;     // (B,) out
  Span<float> linear;    // (B,) out: <P, C>
  Span<float> error;     // (B,) out: L1 error of the marginals; NaN if the item has no finite solution
  Span<int32_t> n_iter;  // (B,) out

  int64_t pitch;        // elements from one row of `costs` to the next, a multiple of 4
  Span<float> scratch;  // as many bytes as cuda::configure says, aligned to 16; null if these are none
};

// The implicit system of a batch: what flows back by transport cost and plan, and the adjoints, which solve it.
struct Adjoints {
  Span<const float> linear;  // (B,) or one: gradient by <P, C>; null = zero
  int64_t linear_step;       // elements of `linear` from one item to the next: 0 if all have the same
  Span<const float> plan;    // (x.rows, pitch) gradient by the plan, placed as the costs; null = zero
  Span<float> x;             // (x.rows,) out, in the unit of `plan`
  Span<float> y;             // (y.rows,) out, in the unit of `plan`
};

// The one argument of every kernel.
struct Arguments {
  CudaProblem problem;
  Adjoints adjoints;
  LaunchConfig config;
  SharedMemory memory;
  float tol;
};

// Bytes of scratch memory for a batch that has rows in it: four numbers for each row, then the rows of the matrix,
// placed as the costs.
inline int64_t scratch_bytes(const CudaProblem& problem) {
  return 4 * ((4 * problem.x.rows + 31) / 32 * 32 + problem.x.rows * problem.pitch);
}

}  // namespace otalign::cuda
