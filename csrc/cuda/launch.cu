#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "heuristics.h"
#include "launch.h"
#include "runtime.h"

namespace otalign::cuda {
namespace {

template <int... shapes>
const void* kernel(int shape, Kind kind, std::integer_sequence<int, shapes...>) {
  static const Kernels all[] = {kernels<shapes>()...};
  return all[shape].of[kind];
}

const void* kernel(int shape, Kind kind) {
  static_assert(kTileShapeCount == OTALIGN_TILE_SHAPES, "CMakeLists.txt sets how many tile shapes are compiled");
  return kernel(shape, kind, std::make_integer_sequence<int, kTileShapeCount>());
}

bool is_relaxed(const CudaProblem& p) { return p.rho_x < HUGE_VAL || p.rho_y < HUGE_VAL; }

Kind kind_of(const CudaProblem& p, bool adjoint) {
  if (adjoint) return kAdjoint;
  if (p.accelerate && p.tol > 0) return kAccelerated;
  return is_relaxed(p) ? kRelaxed : kStrict;
}

struct Launch {
  cudaLaunchConfig_t native{};
  cudaLaunchAttribute cluster{};

  Launch(const LaunchConfig& config, int clusters, void* stream) {
    native.gridDim = clusters * config.cluster;
    native.blockDim = kTileShapes[config.shape].threads();
    native.dynamicSmemBytes = config.bytes;
    native.stream = static_cast<cudaStream_t>(stream);
    if (config.cluster == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = config.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    native.attrs = &cluster;
    native.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

// Allows the kernel all the shared memory and the largest cluster that a configuration may have.
cudaError_t prepare(const void* kernel, const Chip& chip) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chip.shared_of_block);
  if (status == cudaSuccess && chip.clusters)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

// How many clusters of this configuration run at the same time; 0 if none can.
int max_resident(const void* kernel, const LaunchConfig& config, const Chip& chip) {
  int count = 0;
  if (config.cluster > 1) {
    const Launch launch(config, 1, nullptr);
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &launch.native) != cudaSuccess) count = 0;
  } else {
    const int threads = kTileShapes[config.shape].threads();
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, config.bytes) != cudaSuccess) count = 0;
    count *= chip.processors;
  }
  cudaGetLastError();
  return count;
}

// What the heuristics need to know of the device to launch `kernel`.
const char* chip(int device, const void* kernel, Chip* out) {
  OTALIGN_TRY(cudaDeviceGetAttribute(&out->processors, cudaDevAttrMultiProcessorCount, device));
  OTALIGN_TRY(cudaDeviceGetAttribute(&out->shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  // The chip and the kernels both have to support clusters: kernels that the driver compiles from PTX for 8.0 do not.
  cudaFuncAttributes compiled;
  OTALIGN_TRY(cudaFuncGetAttributes(&compiled, kernel));
  out->clusters = compiled.ptxVersion >= 90 && compiled.binaryVersion >= 90;
  return nullptr;
}

std::mutex mutex;  // of what find() shares among threads
Form form;         // that a benchmark asks for

// The heuristics query the runtime for every size of clusters, so their result is kept for every kind of batch.
const char* find(const CudaProblem& p, Kind kind, int device, LaunchConfig* out) {
  using Key = std::tuple<int, int, int64_t, int64_t, int64_t, bool, int, int>;
  static std::map<Key, LaunchConfig> known;
  OTALIGN_TRY(cudaSetDevice(device));
  const bool ragged = p.x.lengths || p.x.starts || p.y.lengths || p.y.starts;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{device, kind, p.items, p.x.size, p.y.size, ragged, form.shape, form.cluster};
  if (const auto found = known.find(key); found != known.end()) {
    *out = found->second;
    return nullptr;
  }
  const ShapeRange shapes = form.given() ? ShapeRange{form.shape, form.shape + 1} : shapes_for(p.y.size);
  if (shapes.begin == shapes.end)
    return message("no kernel fits: y has items of up to " + std::to_string(p.y.size) + " points, " +
                   std::to_string(kTileShapes[kTileShapeCount - 1].width) + " are the most");
  const RelaxedCapture relaxed;
  Chip on{};
  if (const char* error = chip(device, kernel(shapes.begin, kind), &on)) return error;
  // Only these: the first query for a kernel loads it, and where the driver has to compile it from PTX, that takes
  // seconds.
  for (int shape = shapes.begin; shape < shapes.end; ++shape) OTALIGN_TRY(prepare(kernel(shape, kind), on));
  const auto resident = [&](const LaunchConfig& config) {
    return max_resident(kernel(config.shape, kind), config, on);
  };
  const bool accelerate = kind == kAccelerated;
  if (form.given()) {
    const std::string error = choose(on, form, p.items, p.x.size, p.y.size, ragged, accelerate, resident, out);
    if (!error.empty()) return message(error);
  } else {
    *out = choose(on, p.items, p.x.size, p.y.size, ragged, accelerate, resident);
    if (out->in_flight == 0)
      return message("no kernel fits into the shared memory of device " + std::to_string(device));
  }
  if (known.size() >= 4096) known.clear();
  known[key] = *out;
  return nullptr;
}

const char* run(const CudaProblem& problem, const Adjoints& adjoints, Kind kind, int device, void* stream, bool wait) {
  Arguments arguments{problem, adjoints, {}, {}, static_cast<float>(problem.tol)};
  if (const char* error = find(problem, kind, device, &arguments.config)) return error;
  arguments.memory = shared_memory(kTileShapes[arguments.config.shape], arguments.config);
  const Launch launch(arguments.config, arguments.config.in_flight, stream);
  void* pointers[] = {&arguments};
  OTALIGN_TRY(cudaLaunchKernelExC(&launch.native, kernel(arguments.config.shape, kind), pointers));
  if (wait) OTALIGN_TRY(cudaStreamSynchronize(launch.native.stream));
  return nullptr;
}

}  // namespace

const char* configure(const CudaProblem& problem, bool adjoint, int device, LaunchConfig* config, int64_t* scratch) {
  if (const char* error = find(problem, kind_of(problem, adjoint), device, config)) return error;
  *scratch = off_chip_rows(*config, problem.x.size) > 0 ? scratch_bytes(problem) : 0;
  return nullptr;
}

const char* force(int shape, int cluster) {
  const Form wanted{shape, cluster};
  if (const std::string error = why_no_form(wanted); !error.empty()) return message(error);
  const std::lock_guard<std::mutex> lock(mutex);
  form = wanted.given() ? wanted : Form{};
  return nullptr;
}

const char* solve(const CudaProblem& problem, int device, void* stream, bool wait) {
  return run(problem, {}, kind_of(problem, false), device, stream, wait);
}

const char* solve_adjoint(const CudaProblem& problem, const Adjoints& adjoints, int device, void* stream, bool wait) {
  return run(problem, adjoints, kAdjoint, device, stream, wait);
}

}  // namespace otalign::cuda
