// How the rest of the extension launches the kernels. No CUDA header here, so that bindings.cpp compiles without the
// toolkit.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace otalign::cuda {

struct Kernels {
  const void* of[kKinds];  // the device functions, by Kind
};
// The kernels of kTileShapes[shape]; tile_shape.cu defines it.
template <int shape>
Kernels kernels();

// Each of these returns nullptr, or an error: a string that begins with the name of CUDA's error, or says why there is
// no launch. The thread's next call may overwrite it. `device` becomes the current one.

// How the batch is to be launched, and the bytes of scratch memory that it needs. Of the problem it reads sizes, items,
// relaxation, and whether it is accelerated.
const char* configure(const CudaProblem& problem, bool adjoint, int device, LaunchConfig* config, int64_t* scratch);
// For benchmarks: from now on every batch has this tile shape and this many blocks an item, or an error. A negative
// shape gives the choice back to the heuristics. Of the whole process; no other thread may be between `configure` and
// `solve`.
const char* force(int shape, int cluster);
// For benchmarks: whether kernels may begin before the kernel before them has ended, where this is possible; at first
// they may.
void allow_early_launch(bool allowed);
// Solves the batch; with `wait`, faults of the kernel are among the errors.
const char* solve(const CudaProblem& problem, int device, void* stream, bool wait);
// Solves the implicit system.
const char* solve_adjoint(const CudaProblem& problem, const Adjoints& adjoints, int device, void* stream, bool wait);

}  // namespace otalign::cuda
