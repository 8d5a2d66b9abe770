// How a batch is launched, from its sizes and the chip alone. Nothing is tuned at run time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "tiling.h"

namespace otalign::cuda {

struct Chip {
  int processors;
  int shared_of_block;  // bytes of shared memory that a block may have
  bool clusters;
};

// Cycles of one iteration, estimated from the machine code and a model of the chip, not measured: the least that an
// iteration takes, an exchange among blocks, and each row in registers, shared memory and L2.
struct Estimate {
  static double iteration(const TileShape& shape, int rows, int on_chip, const LaunchConfig& config) {
    const double turns = std::max(1.0, shape.warps / 4.0);  // warps that share a scheduler
    const int in_registers = std::min(rows, shape.held());
    const double of_registers = 2.0 * shape.columns() * ((in_registers + shape.step() - 1) / shape.step()) * turns;
    const double of_shared = (std::min(rows, on_chip) - in_registers) * (shape.width * 4 / 64.0 + 40.0 / shape.warps);
    const double of_l2 = (rows - std::min(rows, on_chip)) * (shape.width * 4 / 20.0);
    const double exchange = config.cluster == 1 ? 0 : (config.scatter ? 900 : 450) + 10 * config.cluster;
    return 700 + 150 * turns + of_registers + of_shared + of_l2 + exchange;
  }
};

// The configuration for one shape and one size of clusters; its in_flight is 0 if the shape cannot be launched.
// max_resident(config) is how many clusters run at the same time, 0 if none can.
template <class MaxResident>
LaunchConfig choose(const Chip& chip, int shape_index, int cluster, int64_t items, int64_t size_x, bool ragged,
                    bool accelerate, MaxResident max_resident) {
  const TileShape& shape = kTileShapes[shape_index];
  LaunchConfig config{};
  config.shape = shape_index;
  config.cluster = cluster;
  config.scatter = scatters(shape.width, cluster);
  config.ordered = ragged && items <= kOrdered;
  config.accelerate = accelerate;
  const int64_t rows = (size_x + cluster - 1) / cluster;
  const int64_t wanted = std::max<int64_t>(0, rows - shape.held() + shape.step() - 1) / shape.step() * shape.step();
  const int free = chip.shared_of_block / 4 - shared_memory(shape, config).end;
  config.shared = static_cast<int>(std::min<int64_t>(wanted, free / (shape.width + 4) / shape.step() * shape.step()));
  if (free < 0) return config;  // in_flight is 0
  config.bytes = 4 * shared_memory(shape, config).end;
  config.in_flight = static_cast<int>(std::min<int64_t>(items, max_resident(config)));
  config.ordered = config.ordered && config.in_flight < items;
  config.bytes = 4 * shared_memory(shape, config).end;
  return config;
}

// Indices into kTileShapes: from `begin` up to, but without, `end`.
struct ShapeRange {
  int begin, end;
};

// The shapes among which choose() decides: those of the least width that holds y; none if y is too long for all.
inline ShapeRange shapes_for(int64_t size_y) {
  int begin = 0;
  while (begin < kTileShapeCount && kTileShapes[begin].width < size_y) ++begin;
  int end = begin;
  while (end < kTileShapeCount && kTileShapes[end].width == kTileShapes[begin].width) ++end;
  return {begin, end};
}

// The configuration of least time by the estimate; its in_flight is 0 if no shape can be launched.
template <class MaxResident>
LaunchConfig choose(const Chip& chip, int64_t items, int64_t size_x, int64_t size_y, bool ragged, bool accelerate,
                    MaxResident max_resident) {
  LaunchConfig best{};
  double least = 0;
  const ShapeRange shapes = shapes_for(size_y);
  for (int index = shapes.begin; index < shapes.end; ++index) {
    const TileShape& shape = kTileShapes[index];
    for (const int cluster : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
      if (cluster > 1 && (!chip.clusters || cluster > size_x)) break;
      const LaunchConfig config = choose(chip, index, cluster, items, size_x, ragged, accelerate, max_resident);
      if (config.in_flight <= 0) continue;
      const int rows = static_cast<int>((size_x + cluster - 1) / cluster);
      const double rounds = static_cast<double>((items + config.in_flight - 1) / config.in_flight);
      const double blocks_per_processor = static_cast<double>(config.in_flight) * cluster / chip.processors;
      // Blocks that share a processor hide each other's waiting.
      const double slower = std::max(1.0, 0.35 * blocks_per_processor + 0.65);
      const double time = rounds * slower * Estimate::iteration(shape, rows, shape.held() + config.shared, config) *
                          (1 + 0.01 * cluster);
      if (best.in_flight == 0 || time < least) {
        best = config;
        least = time;
      }
    }
  }
  return best;
}

// What a benchmark may put in the place of the heuristics' choice: a tile shape and a size of clusters. A negative
// shape leaves the choice to the heuristics.
struct Form {
  int shape = -1;
  int cluster = 0;

  bool given() const { return shape >= 0; }
};
constexpr int kLargestCluster = 16;  // that any chip has

// Why there is no such form, for any batch and any chip; "" if there is, or if none is given.
inline std::string why_no_form(const Form& form) {
  if (!form.given()) return "";
  if (form.shape >= kTileShapeCount)
    return "expected a tile shape from 0 to " + std::to_string(kTileShapeCount - 1) +
           ", or -1 for the heuristics, got " + std::to_string(form.shape);
  if (form.cluster < 1 || form.cluster > kLargestCluster)
    return "expected a cluster of 1 to " + std::to_string(kLargestCluster) + " blocks, got " +
           std::to_string(form.cluster);
  return "";
}

// The configuration of a form that is given. Returns why this batch cannot have it on this chip, or "".
template <class MaxResident>
std::string choose(const Chip& chip, const Form& form, int64_t items, int64_t size_x, int64_t size_y, bool ragged,
                   bool accelerate, MaxResident max_resident, LaunchConfig* out) {
  const TileShape& shape = kTileShapes[form.shape];
  const std::string name =
      "tile shape " + std::to_string(form.shape) + " in clusters of " + std::to_string(form.cluster);
  if (size_y > shape.width)
    return name + " has " + std::to_string(shape.width) + " columns, and y has items of up to " +
           std::to_string(size_y) + " points";
  if (form.cluster > 1 && !chip.clusters)
    return name + ": this chip, or the code that its driver has loaded, has no clusters of blocks";
  *out = choose(chip, form.shape, form.cluster, items, size_x, ragged, accelerate, max_resident);
  if (out->in_flight > 0) return "";
  LaunchConfig least = *out;  // without rows of the matrix in shared memory
  least.shared = std::max(0, least.shared);
  const int bytes = 4 * shared_memory(shape, least).end;
  const std::string needs = name + " needs " + std::to_string(bytes) + " bytes of shared memory for a block";
  return bytes > chip.shared_of_block ? needs + ", which has at most " + std::to_string(chip.shared_of_block)
                                      : needs + ", and finds no room on this chip";
}

}  // namespace otalign::cuda
