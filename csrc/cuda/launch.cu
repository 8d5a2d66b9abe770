#include <atomic>
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "heuristics.h"
#include "launch.h"
#include "query.h"
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

// A configuration, and whether its kernel may begin before the kernel before it in the stream has ended.
struct Found {
  LaunchConfig config;
  bool early;
};

struct Launch {
  cudaLaunchConfig_t native{};
  cudaLaunchAttribute attributes[2]{};

  Launch(const LaunchConfig& config, int clusters, void* stream, bool early) {
    native.gridDim = clusters * config.cluster;
    native.blockDim = kTileShapes[config.shape].threads();
    native.dynamicSmemBytes = config.bytes;
    native.stream = static_cast<cudaStream_t>(stream);
    if (config.cluster > 1) {
      cudaLaunchAttribute& cluster = add(cudaLaunchAttributeClusterDimension);
      cluster.val.clusterDim.x = config.cluster;
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (early) add(cudaLaunchAttributeProgrammaticStreamSerialization).val.programmaticStreamSerializationAllowed = 1;
  }
  Launch(const Launch&) = delete;

 private:
  cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
    native.attrs = attributes;
    attributes[native.numAttrs].id = id;
    return attributes[native.numAttrs++];
  }
};

// Whether the kernels may begin early: the driver then sets up their blocks as soon as those of the kernel before have
// ended, or have said that it may, and does not wait until what they wrote has reached memory. The kernels themselves
// wait for that, in intrinsics::wait_for_kernels_before, which code for 9.0 or later has. Where the stream is captured,
// the graph gets an edge of this kind, which drivers know since 12.3. After anything but a kernel, the launch is an
// ordinary one.
bool may_begin_early(const Chip& chip) {
  constexpr int kSince = 12030;
  return CUDART_VERSION >= kSince && chip.clusters && driver_version() >= kSince;
}

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
    const Launch launch(config, 1, nullptr, false);
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

std::mutex mutex;                      // of what find() shares among threads
Form form;                             // that a benchmark asks for
std::atomic<bool> early_launch{true};  // whether a benchmark lets kernels begin early

// The heuristics query the runtime for every size of clusters, so their result is kept for every kind of batch.
const char* find(const CudaProblem& p, Kind kind, int device, Found* out) {
  using Key = std::tuple<int, int, int64_t, int64_t, int64_t, bool, int, int>;
  static std::map<Key, Found> known;
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
  LaunchConfig config;
  if (form.given()) {
    const std::string error = choose(on, form, p.items, p.x.size, p.y.size, ragged, accelerate, resident, &config);
    if (!error.empty()) return message(error);
  } else {
    config = choose(on, p.items, p.x.size, p.y.size, ragged, accelerate, resident);
    if (config.in_flight == 0)
      return message("no kernel fits into the shared memory of device " + std::to_string(device));
  }
  *out = {config, may_begin_early(on)};
  if (known.size() >= 4096) known.clear();
  known[key] = *out;
  return nullptr;
}

const char* run(const CudaProblem& problem, const Adjoints& adjoints, Kind kind, int device, void* stream, bool wait) {
  Found found;
  if (const char* error = find(problem, kind, device, &found)) return error;
  const LaunchConfig& config = found.config;
  Arguments arguments{problem, adjoints, config, shared_memory(kTileShapes[config.shape], config),
                      static_cast<float>(problem.tol)};
  const Launch launch(config, config.in_flight, stream, found.early && early_launch);
  void* pointers[] = {&arguments};
  OTALIGN_TRY(cudaLaunchKernelExC(&launch.native, kernel(config.shape, kind), pointers));
  if (wait) OTALIGN_TRY(cudaStreamSynchronize(launch.native.stream));
  return nullptr;
}

}  // namespace

const char* configure(const CudaProblem& problem, bool adjoint, int device, LaunchConfig* config, int64_t* scratch) {
  Found found;
  if (const char* error = find(problem, kind_of(problem, adjoint), device, &found)) return error;
  *config = found.config;
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

void allow_early_launch(bool allowed) { early_launch = allowed; }

const char* solve(const CudaProblem& problem, int device, void* stream, bool wait) {
  return run(problem, {}, kind_of(problem, false), device, stream, wait);
}

const char* solve_adjoint(const CudaProblem& problem, const Adjoints& adjoints, int device, void* stream, bool wait) {
  return run(problem, adjoints, kAdjoint, device, stream, wait);
}

}  // namespace otalign::cuda
