#include <cuda_runtime_api.h>

#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "launch.h"
#include "heuristics.h"

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
  static_assert(kFormCount == 9, "the files in instances/ have to have every form");
  if (form < 4) return kernels_of_columns_32_64(form).of[kind];
  return (form < 7 ? kernels_of_columns_128_256(form - 4) : kernels_of_columns_512_1024(form - 7)).of[kind];
}

bool is_relaxed(const Problem& p) { return p.rho_x < HUGE_VAL || p.rho_y < HUGE_VAL; }

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

// Allows the kernel all that a choice may take.
cudaError_t prepare(const void* kernel, const Chip& chip) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chip.shared_of_block);
  if (status == cudaSuccess && chip.clusters)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

// How many clusters of this choice run at the same time.
int active(const void* kernel, const Choice& choice, const Chip& chip) {
  int count = 0;
  if (choice.cluster > 1) {
    const Launch launch(choice, 1, nullptr);
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) != cudaSuccess) count = 0;
  } else {
    const int threads = kForms[choice.form].threads();
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, choice.bytes) != cudaSuccess) count = 0;
    count *= chip.processors;
  }
  cudaGetLastError();
  return count;
}

const char* chip(int device, Chip* out) {
  OTALIGN_TRY(cudaDeviceGetAttribute(&out->processors, cudaDevAttrMultiProcessorCount, device));
  OTALIGN_TRY(cudaDeviceGetAttribute(&out->shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  // The kernels, not only the chip, have to know clusters: those made for 8.0 and compiled again by the driver do not.
  cudaFuncAttributes compiled;
  OTALIGN_TRY(cudaFuncGetAttributes(&compiled, kernel(0, kStrict)));
  out->clusters = compiled.ptxVersion >= 90 && compiled.binaryVersion >= 90;
  return nullptr;
}

// The rule asks the runtime about every size of clusters: once for every kind of batch.
const char* find(const Problem& p, Kind kind, int device, Choice* out) {
  using Key = std::tuple<int, int, int64_t, int64_t, int64_t, bool>;
  static std::mutex mutex;
  static std::map<Key, Choice> known;
  OTALIGN_TRY(cudaSetDevice(device));
  const bool ragged = p.x.lengths || p.x.starts || p.y.lengths || p.y.starts;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{device, kind, p.items, p.x.size, p.y.size, ragged};
  if (const auto found = known.find(key); found != known.end()) {
    *out = found->second;
    return nullptr;
  }
  Chip on{};
  if (const char* error = chip(device, &on)) return error;
  for (int form = 0; form < kFormCount; ++form) OTALIGN_TRY(prepare(kernel(form, kind), on));
  *out = choose(on, p.items, p.x.size, p.y.size, ragged,
                [&](const Choice& choice) { return active(kernel(choice.form, kind), choice, on); });
  if (out->in_flight == 0)
    return message("no kernel fits: y has items of up to " + std::to_string(p.y.size) + " points, " +
                   std::to_string(kForms[kFormCount - 1].width) + " are the most");
  if (known.size() >= 4096) known.clear();
  known[key] = *out;
  return nullptr;
}

const char* run(const Problem& problem, const Lifts& lifts, Kind kind, int device, void* stream, bool wait) {
  Arguments arguments{problem, lifts, {}, {}, static_cast<float>(problem.tol)};
  if (const char* error = find(problem, kind, device, &arguments.choice)) return error;
  arguments.memory = memory(kForms[arguments.choice.form], arguments.choice);
  const Launch launch(arguments.choice, arguments.choice.in_flight, stream);
  void* pointers[] = {&arguments};
  OTALIGN_TRY(cudaLaunchKernelExC(&launch.config, kernel(arguments.choice.form, kind), pointers));
  if (wait) OTALIGN_TRY(cudaStreamSynchronize(launch.config.stream));
  return nullptr;
}

}  // namespace

const char* plan(const Problem& problem, bool lift, int device, Choice* choice, int64_t* scratch) {
  if (const char* error = find(problem, kind_of(problem, lift), device, choice)) return error;
  *scratch = far_rows(*choice, problem.x.size) > 0 ? scratch_bytes(problem) : 0;
  return nullptr;
}

const char* solve(const Problem& problem, int device, void* stream, bool wait) {
  return run(problem, {}, kind_of(problem, false), device, stream, wait);
}

const char* lift(const Problem& problem, const Lifts& lifts, int device, void* stream, bool wait) {
  return run(problem, lifts, kLift, device, stream, wait);
}

}  // namespace otalign::cuda
