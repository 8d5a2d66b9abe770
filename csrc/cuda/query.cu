#include <string>

#include "query.h"
#include "runtime.h"

namespace otalign::cuda {
namespace {

constexpr int kOldest = 8;  // the major number of the compute capability that the kernels need

// Compiled for the same architectures as all kernels, but where the driver has to compile PTX, it takes no time.
__global__ void empty_kernel() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// What is wrong and how the user mends it; "" for errors whose own text has to do.
std::string explanation(cudaError_t status, const std::string& capability) {
  switch (status) {
    case cudaErrorInsufficientDriver:
      return "the driver supports CUDA " + version(driver_version()) + ", but the extension was built with CUDA " +
             version(runtime_version()) + "; update the driver, or build the extension with an older toolkit";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return "the extension was built for compute capability " OTALIGN_CUDA_ARCHS ", and the GPU has " + capability +
             "; build the extension with TORCH_CUDA_ARCH_LIST=" + capability;
    default:
      return "";
  }
}

const char* explain(cudaError_t status, const std::string& capability = "") {
  if (status == cudaSuccess) return nullptr;
  const std::string text = explanation(status, capability), error = message(status);
  return message(text.empty() ? error : text + " (" + error + ")");
}

}  // namespace

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* reason_missing(int device) {
  if (driver_version() == 0) return "no NVIDIA driver was found";
  int major = 0, minor = 0;
  if (const char* reason = explain(cudaSetDevice(device))) return reason;
  OTALIGN_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  OTALIGN_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (major < kOldest)
    return message("the kernels need compute capability " + std::to_string(kOldest) + ".0, and the GPU has " +
                   capability);
  // The query loads the kernel, so it fails as a launch would fail. It puts nothing on a stream.
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes;
  return explain(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&empty_kernel)), capability);
}

}  // namespace otalign::cuda
