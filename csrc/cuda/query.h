// What the CUDA runtime sees. No CUDA header here, so that bindings.cpp compiles without the toolkit.
#pragma once

#include <cstdint>

namespace otalign::cuda {

struct Device {
  char name[256];
  int major, minor;  // compute capability
  int64_t memory;    // bytes
};

// Both return nullptr, or a static string that says what went wrong. Versions are 1000 * major + 10 * minor;
// the driver's is the newest that it supports, 0 without a driver. `count` is 0 after a failure.
const char* versions(int* runtime, int* driver, int* count);
const char* device(int index, Device* out);

}  // namespace otalign::cuda
