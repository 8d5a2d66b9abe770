// What the tests ask of the heuristics and of the sizes in csrc/cuda, as a library that Python loads with ctypes.
#include <algorithm>
#include <string>

#include "cuda/arguments.h"
#include "cuda/heuristics.h"

using namespace otalign;
using namespace otalign::cuda;

extern "C" {

// Why there is no such form, for any batch and any chip, or null.
const char* host_why_no_form(int shape, int cluster) {
  thread_local std::string error;
  error = why_no_form({shape, cluster});
  return error.empty() ? nullptr : error.c_str();
}

// The configuration for a chip with this many processors, bytes of shared memory for a block, and blocks in the largest
// cluster: that of a form as cuda_force takes it, or, with the shape -1, the one that the heuristics choose. Returns
// why the form cannot be, or null.
const char* host_choose(int processors, int shared_of_block, int largest_cluster, int64_t items, int64_t size_x,
                        int64_t size_y, bool accelerate, int shape, int cluster, LaunchConfig* out) {
  const Chip chip{processors, shared_of_block, largest_cluster > 1};
  const auto resident = [&](const LaunchConfig& config) {
    if (config.cluster > largest_cluster) return 0;
    const int by_registers = 65536 / (256 * kTileShapes[config.shape].threads());
    const int by_memory = (shared_of_block + 1024) / (config.bytes + 1024);
    return std::min(by_registers, by_memory) * processors / config.cluster;
  };
  if (const Form form{shape, cluster}; form.given()) {
    thread_local std::string error;
    error = choose(chip, form, items, size_x, size_y, true, accelerate, resident, out);
    return error.empty() ? nullptr : error.c_str();
  }
  *out = choose(chip, items, size_x, size_y, true, accelerate, resident);
  return nullptr;
}

// A given configuration: tile shape, blocks an item, rows of a block in shared memory, clusters. With the scatter -1,
// blocks scatter by the rule of the heuristics.
void host_force(int shape, int cluster, int shared, int in_flight, int scatter, int ordered, int accelerate,
                LaunchConfig* out) {
  if (scatter < 0) scatter = scatters(kTileShapes[shape].width, cluster);
  *out = {shape, cluster, in_flight, shared, 0, scatter, ordered, accelerate};
  out->bytes = 4 * shared_memory(kTileShapes[shape], *out).end;
}

int64_t host_scratch(const CudaProblem* problem, const LaunchConfig* config) {
  return off_chip_rows(*config, problem->x.size) > 0 ? scratch_bytes(*problem) : 0;
}

// Width, lanes, rows and warps of a tile shape.
void host_shape(int shape, int32_t* out) {
  const TileShape& found = kTileShapes[shape];
  out[0] = found.width, out[1] = found.lanes, out[2] = found.rows, out[3] = found.warps;
}
int host_held(int shape) { return kTileShapes[shape].held(); }
int host_step(int shape) { return kTileShapes[shape].step(); }
}
