// csrc/cuda/launch.cu and query.cu over a CUDA runtime without a GPU, as a library that Python loads with ctypes.
#include <cuda_runtime_api.h>

#include <map>
#include <set>

#include "cuda/launch.h"

namespace otalign::cuda {

// A kernel is an address.
int kernel_places[kTileShapeCount][kAdjoint + 1];

template <int shape>
Kernels kernels() {
  Kernels found{};
  for (int kind = 0; kind <= kAdjoint; ++kind) found.of[kind] = &kernel_places[shape][kind];
  return found;
}

}  // namespace otalign::cuda

#define OTALIGN_TILE_SHAPES 9
#define OTALIGN_CUDA_ARCHS "8.0 9.0a 10.0+PTX"
#include "cuda/launch.cu"
#include "cuda/query.cu"

using namespace otalign;
using namespace otalign::cuda;

// The GPU and its driver, as the test wants them.
struct FakeGpu {
  int driver;           // its version; 0 without a driver
  int major, minor;     // compute capability
  int code;             // that of the code which the driver loads, times 10
  int processors;       // multiprocessors
  int shared;           // bytes of shared memory that a block may have
  int largest_cluster;  // that finds room
  int load_error;       // of loading a kernel, as a cudaError_t
  int capturing;        // 1: a stream is being captured
};

namespace {

FakeGpu gpu;
std::set<const void*> loaded;
const void* launched_kernel;
std::map<cudaLaunchAttributeID, cudaLaunchAttribute> launched_attributes;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t initialise() {
  if (gpu.driver == 0) return cudaErrorNoDevice;
  return gpu.driver / 1000 < CUDART_VERSION / 1000 ? cudaErrorInsufficientDriver : cudaSuccess;
}

cudaError_t load(const void* kernel) {
  if (loaded.count(kernel)) return cudaSuccess;
  if (gpu.capturing && capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  if (gpu.load_error == cudaSuccess) loaded.insert(kernel);
  return static_cast<cudaError_t>(gpu.load_error);
}

int resident_blocks(int threads, size_t bytes) {
  return std::min(65536 / (256 * threads), static_cast<int>((gpu.shared + 1024) / (bytes + 1024)));
}

}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorNoDevice ? "cudaErrorNoDevice" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t status) {
  thread_local std::string text;
  text = "error " + std::to_string(status);
  return text.c_str();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = gpu.driver;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return initialise(); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = gpu.processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = gpu.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = gpu.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = gpu.shared;
      break;
  }
  return initialise();
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* kernel) {
  out->ptxVersion = out->binaryVersion = gpu.code;
  return load(kernel);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int) { return load(kernel); }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* kernel, int threads, size_t bytes) {
  *count = resident_blocks(threads, bytes);
  return load(kernel);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  if (config->numAttrs != 1 || config->attrs->id != cudaLaunchAttributeClusterDimension) return cudaErrorInvalidValue;
  const int cluster = static_cast<int>(config->attrs->val.clusterDim.x);
  const int blocks = resident_blocks(static_cast<int>(config->blockDim.x), config->dynamicSmemBytes) * gpu.processors;
  *count = cluster > gpu.largest_cluster ? 0 : blocks / cluster;
  return load(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  launched_kernel = kernel;
  launched_attributes.clear();
  for (unsigned i = 0; i < config->numAttrs; ++i) launched_attributes[config->attrs[i].id] = config->attrs[i];
  return load(kernel);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

extern "C" {

// Another GPU, on which nothing is loaded yet.
void fake_gpu(const FakeGpu* wanted) {
  gpu = *wanted;
  loaded.clear();
}
bool fake_loaded(int shape, int kind) { return loaded.count(&kernel_places[shape][kind]) > 0; }
bool fake_launched(int shape, int kind) { return launched_kernel == &kernel_places[shape][kind]; }
// Of the last launch: blocks in a cluster, 0 without the attribute; whether it may begin before the kernel before it
// has ended.
int fake_launched_cluster() {
  const auto found = launched_attributes.find(cudaLaunchAttributeClusterDimension);
  return found == launched_attributes.end() ? 0 : static_cast<int>(found->second.val.clusterDim.x);
}
bool fake_launched_early() {
  const auto found = launched_attributes.find(cudaLaunchAttributeProgrammaticStreamSerialization);
  return found != launched_attributes.end() && found->second.val.programmaticStreamSerializationAllowed;
}
void fake_allow_early_launch(bool allowed) { allow_early_launch(allowed); }
int fake_capture_mode() { return capture_mode; }

const char* fake_reason_missing(int device) { return cuda::reason_missing(device); }
const char* fake_force(int shape, int cluster) { return force(shape, cluster); }
// The configuration of a kind of batch; an error, or null.
const char* fake_configure(int device, int64_t items, int64_t size_x, int64_t size_y, int kind, LaunchConfig* config) {
  CudaProblem problem{};
  problem.items = items;
  problem.x.size = size_x;
  problem.y.size = size_y;
  problem.rho_x = HUGE_VAL;
  problem.rho_y = kind == kRelaxed ? 1.0 : HUGE_VAL;
  problem.accelerate = kind == kAccelerated;
  problem.tol = 1e-3;
  int64_t scratch = 0;
  return configure(problem, kind == kAdjoint, device, config, &scratch);
}
const char* fake_solve(int device, int64_t items, int64_t size_x, int64_t size_y, bool adjoint) {
  CudaProblem problem{};
  problem.items = items;
  problem.x.size = size_x;
  problem.y.size = size_y;
  problem.rho_x = problem.rho_y = HUGE_VAL;
  return adjoint ? solve_adjoint(problem, {}, device, nullptr, false) : solve(problem, device, nullptr, false);
}
}
