// Queries of the CUDA runtime: versions and devices. No CUDA header here, so that bindings.cpp compiles without the
// toolkit.
#pragma once

#include <cstdint>

namespace otalign::cuda {

struct Device {
  char name[256];    // ends with 0
  int major, minor;  // compute capability
  int64_t memory;    // bytes
};

// Both return nullptr, or an error as a static string. Versions are 1000 * major + 10 * minor; the driver's is the
// newest runtime that it supports, 0 without a driver. `count` is 0 after an error.
const char* versions(int* runtime, int* driver, int* count);
const char* device(int index, Device* out);

}  // namespace otalign::cuda
