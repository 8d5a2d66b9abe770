#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "resident.h"
#include "rule.h"

namespace otalign::cuda {
namespace {

const char* message(const std::string& text) {
  thread_local std::string kept;
  kept = text;
  return kept.c_str();
}

const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // what is reported here must not surface as the error of somebody's next launch
  return message(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

#define OTALIGN_TRY(call) \
  if (const char* error = message(call)) return error

const void* kernel(int form, Kind kind) {
  if (form < 4) return narrow_kernels(form).of[kind];
  return (form < 7 ? middle_kernels(form - 4) : wide_kernels(form - 7)).of[kind];
}

bool is_relaxed(const Problem& p) { return damping(1, p.rho_x) != 1 || damping(1, p.rho_y) != 1; }

Kind kind_of(const Problem& p, bool lift) { return lift ? kLift : is_relaxed(p) ? kRelaxed : kStrict; }

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  Launch(const Choice& choice, int clusters, void* stream) {
    config.gridDim = clusters * choice.cluster;
    config.blockDim = kForms[choice.form].threads();
    config.dynamicSmemBytes = choice.bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    if (choice.cluster == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = choice.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

// Allows the kernel what the choice takes.
cudaError_t prepare(const void* kernel, const Choice& choice) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, choice.bytes);
  if (status == cudaSuccess && choice.cluster > 8)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

// How many clusters of this choice run at the same time.
int active(const void* kernel, const Choice& choice, const Chip& chip) {
  int count = 0;
  if (prepare(kernel, choice) == cudaSuccess) {
    if (choice.cluster > 1) {
      const Launch launch(choice, 1, nullptr);
      if (cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) != cudaSuccess) count = 0;
    } else {
      const int threads = kForms[choice.form].threads();
      if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, choice.bytes) != cudaSuccess)
        count = 0;
      count *= chip.processors;
    }
  }
  cudaGetLastError();
  return count;
}

const char* chip(int device, Chip* out) {
  int major = 0;
  OTALIGN_TRY(cudaDeviceGetAttribute(&out->processors, cudaDevAttrMultiProcessorCount, device));
  OTALIGN_TRY(cudaDeviceGetAttribute(&out->shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  OTALIGN_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  out->clusters = major >= 9;
  return nullptr;
}

// The rule asks the runtime about every size of clusters: once for every kind of batch.
const char* find(const Problem& p, Kind kind, Choice* out) {
  using Key = std::tuple<int, int, int64_t, int64_t, int64_t>;
  static std::mutex mutex;
  static std::map<Key, Choice> known;
  int device = 0;
  OTALIGN_TRY(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{device, kind, p.items, p.x.size, p.y.size};
  if (const auto found = known.find(key); found != known.end()) {
    *out = found->second;
    return nullptr;
  }
  Chip on{};
  if (const char* error = chip(device, &on)) return error;
  *out = choose(on, p.items, p.x.size, p.y.size,
                [&](const Choice& choice) { return active(kernel(choice.form, kind), choice, on); });
  if (out->in_flight == 0)
    return message("no kernel fits: y has items of up to " + std::to_string(p.y.size) + " points, " +
                   std::to_string(kForms[kFormCount - 1].width) + " are the most, on compute capability 8.0 or later");
  if (known.size() >= 4096) known.clear();
  known[key] = *out;
  return nullptr;
}

const char* run(const Problem& problem, const Lifts& lifts, Kind kind, void* stream, bool wait) {
  Arguments arguments{problem, lifts, {}, {}};
  if (const char* error = find(problem, kind, &arguments.choice)) return error;
  arguments.memory = memory(kForms[arguments.choice.form], arguments.choice);
  const void* const function = kernel(arguments.choice.form, kind);
  const Launch launch(arguments.choice, arguments.choice.in_flight, stream);
  void* pointers[] = {&arguments};
  // Another choice for the same kernel may have come between.
  OTALIGN_TRY(prepare(function, arguments.choice));
  OTALIGN_TRY(cudaLaunchKernelExC(&launch.config, function, pointers));
  if (wait) OTALIGN_TRY(cudaStreamSynchronize(launch.config.stream));
  return nullptr;
}

}  // namespace

const char* plan(const Problem& problem, bool lift, Choice* choice, int64_t* scratch) {
  if (const char* error = find(problem, kind_of(problem, lift), choice)) return error;
  *scratch = far_rows(*choice, problem.x.size) > 0 ? scratch_bytes(problem) : 0;
  return nullptr;
}

const char* solve(const Problem& problem, void* stream, bool wait) {
  return run(problem, {}, kind_of(problem, false), stream, wait);
}

const char* lift(const Problem& problem, const Lifts& lifts, void* stream, bool wait) {
  return run(problem, lifts, kLift, stream, wait);
}

}  // namespace otalign::cuda
