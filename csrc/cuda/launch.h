// What the rest of the extension sees of the kernels. No CUDA header here, so that bindings.cpp compiles without the
// toolkit.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "tiling.h"

namespace otalign::cuda {

enum Kind { kStrict, kRelaxed, kLift };  // kernels of a form
struct Kernels {
  const void* of[3];
};
// The kernels in instances/, by the number of columns of their forms; `form` counts within a file.
Kernels kernels_of_columns_32_64(int form);
Kernels kernels_of_columns_128_256(int form);
Kernels kernels_of_columns_512_1024(int form);

// All of these return nullptr, or a string that begins with the name of CUDA's error, or tells why not; the thread's
// next call may overwrite it. `device` becomes the current one. A plan needs of a problem its sizes, items and
// relaxation.
const char* plan(const Problem& problem, bool lift, int device, Choice* choice, int64_t* scratch);
// Solves the batch; with `wait`, faults of the kernel are among the errors.
const char* solve(const Problem& problem, int device, void* stream, bool wait);
// Solves the implicit system.
const char* lift(const Problem& problem, const Lifts& lifts, int device, void* stream, bool wait);

}  // namespace otalign::cuda
