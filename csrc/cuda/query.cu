#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda/query.h"

namespace otalign::cuda {
namespace {

const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or else it would surface again as the error of the next launch
  return cudaGetErrorString(status);
}

}  // namespace

const char* versions(int* runtime, int* driver, int* count) {
  *runtime = CUDART_VERSION;
  *driver = *count = 0;
  if (const char* error = message(cudaDriverGetVersion(driver))) return error;
  if (*driver == 0) return "no NVIDIA driver was found";
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) *count = 0;
  return message(status);
}

const char* device(int index, Device* out) {
  cudaDeviceProp properties;
  if (const char* error = message(cudaGetDeviceProperties(&properties, index))) return error;
  std::memcpy(out->name, properties.name, sizeof out->name);
  out->major = properties.major;
  out->minor = properties.minor;
  out->memory = static_cast<int64_t>(properties.totalGlobalMem);
  return nullptr;
}

}  // namespace otalign::cuda
