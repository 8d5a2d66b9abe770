// Where the kernel matrix of an item lies: which thread holds which of its numbers, and the map of shared memory.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace otalign::cuda {

// The shape of a block's tile of the matrix: each thread of `warps` warps holds rows x (width / lanes) numbers of it in
// registers. `lanes` lanes of a warp lie side by side across the columns and take groups of four columns in turn; the
// other lanes of the warp lie below them. The warps take rows in turn. So the rows of the block come in steps, and
// every warp has its share of a short item.
struct TileShape {
  int width;  // columns in all
  int lanes, rows, warps;

  OTALIGN_ANYWHERE constexpr int columns() const { return width / lanes; }
  OTALIGN_ANYWHERE constexpr int threads() const { return 32 * warps; }
  OTALIGN_ANYWHERE constexpr int step() const { return 32 / lanes * warps; }
  OTALIGN_ANYWHERE constexpr int held() const { return rows * step(); }  // rows in registers
  // What a warp, or a block, sums: one number for each column, and four more.
  OTALIGN_ANYWHERE constexpr int pitch() const { return width + 4; }
};

// The shapes that are compiled, by width. heuristics.h takes one of those of the least width that holds y. How many
// there are stands in CMakeLists.txt as well, which compiles tile_shape.cu once for each.
constexpr TileShape kTileShapes[] = {
    {32, 4, 16, 1}, {32, 4, 16, 4},  {64, 8, 16, 1},  {64, 8, 16, 4},   {128, 8, 8, 4},
    {128, 8, 8, 8}, {256, 16, 8, 8}, {512, 32, 8, 8}, {1024, 32, 0, 8},
};
constexpr int kTileShapeCount = sizeof kTileShapes / sizeof *kTileShapes;

// The kernels of a shape. The accelerated one is for all marginals: it is the longest, and plain passes are not all
// that it does.
enum Kind { kStrict, kRelaxed, kAccelerated, kAdjoint };
constexpr int kKinds = 4;

// How a batch is launched; from heuristics.h.
struct LaunchConfig {
  int32_t shape;       // index into kTileShapes
  int32_t cluster;     // blocks an item
  int32_t in_flight;   // clusters
  int32_t shared;      // rows of a block in shared memory, a multiple of the step; those that do not fit lie in L2
  int32_t bytes;       // of shared memory for a block
  int32_t scatter;     // 1: blocks sum slices of the columns for each other; 0: each sums all columns
  int32_t ordered;     // 1: items are taken longest first
  int32_t accelerate;  // 1: there is room for the memory of the accelerated solver
};

constexpr int kOrdered = 256;  // most items that are put in order; among more, the lengths of a block's items even out
constexpr int kScatterFrom = 1024;  // most numbers that a block receives without `scatter`

// The map of a block's shared memory, in floats. First come the mailboxes (four of eight bytes), then:
constexpr int kSums = 8;          // (warps,) partial sums over the block
constexpr int kNumbers = 16;      // (4,) numbers that an exchange has summed
constexpr int kCurrentItem = 20;  // CurrentItem of block.cuh
constexpr int kFixed = 48;
constexpr int kRemembered = 13;  // column vectors of the accelerated solver
constexpr int kCourse = 80;      // its Course of course.h
struct SharedMemory {
  // The tile shape alone places these.
  int32_t columns;  // (5, width) column vectors
  int32_t parts;    // (warps, width + 4) what the warps have summed
  int32_t factors;  // (held,) factors of the rows in registers
  int32_t rows;     // (4, held) their row vectors
  int32_t inbox;    // (2, inbox_pitch) what other blocks send
  // The launch places these.
  int32_t shared_rows;  // (4, shared) row vectors of the rows in shared memory
  int32_t kernel;       // (shared, width) rows of the matrix
  int32_t remembered;   // (13, width) column vectors of the accelerated solver
  int32_t products;     // (2, warps, 16) what the warps have summed for it, then (16,) the sums of the block
  int32_t course;       // (80,) its Course
  int32_t order;        // (256,) sizes of items, then (256,) their order as 16-bit integers
  int32_t end;          // floats in all
  int32_t inbox_pitch;  // floats from one of the two inboxes to the other
  int32_t slice;        // columns that a block sums for the others, in groups of four
  int32_t direct;       // blocks of a cluster whose blocks send all sums to each other; 0 = they send slices
};

constexpr SharedMemory shared_memory(const TileShape& shape, const LaunchConfig& config) {
  SharedMemory at{};
  const bool alone = config.cluster == 1;
  at.slice = alone ? 0 : (shape.width / 4 + config.cluster) / config.cluster;
  at.inbox_pitch = alone            ? 0
                   : config.scatter ? config.cluster * at.slice * 4 + shape.pitch()
                                    : config.cluster * shape.pitch();
  at.direct = config.scatter ? 0 : config.cluster;
  at.columns = kFixed;
  at.parts = at.columns + 5 * shape.width;
  at.factors = at.parts + shape.warps * shape.pitch();
  at.rows = at.factors + shape.held();
  at.inbox = at.rows + 4 * shape.held();
  at.shared_rows = at.inbox + 2 * at.inbox_pitch;
  at.kernel = at.shared_rows + 4 * config.shared;
  at.remembered = at.kernel + config.shared * shape.width;
  at.products = at.remembered + (config.accelerate ? kRemembered * shape.width : 0);
  at.course = at.products + (config.accelerate ? 2 * shape.warps * 16 + 16 : 0);
  at.order = at.course + (config.accelerate ? kCourse : 0);
  at.end = at.order + (config.ordered ? kOrdered + kOrdered / 2 : 0);
  return at;
}

// A shape at compile time.
template <int N>
struct Tiling {
  static constexpr TileShape kShape = kTileShapes[N];
  static constexpr int kWidth = kShape.width, kLanes = kShape.lanes, kColumns = kShape.columns(), kRows = kShape.rows;
  static constexpr int kWarps = kShape.warps, kThreads = kShape.threads();
  static constexpr int kBelow = 32 / kLanes;  // lanes below each other
  static constexpr int kStep = kShape.step(), kHeld = kShape.held(), kPitch = kShape.pitch();
  static constexpr int kAtOnce = kRows * kColumns > 64 ? 1 : 2;  // rows of a lane that are read from memory together
  OTALIGN_ANYWHERE static constexpr TileShape shape() { return {kWidth, kLanes, kRows, kWarps}; }
  // What shared_memory() places in every launch alike.
  static constexpr SharedMemory kPlaces = shared_memory(kShape, LaunchConfig{N, 1});
  static constexpr int kColumnsAt = kPlaces.columns, kPartsAt = kPlaces.parts, kFactorsAt = kPlaces.factors;
  static constexpr int kRowsAt = kPlaces.rows, kInboxAt = kPlaces.inbox;
  static_assert(kColumns % 4 == 0 && kColumns <= 32 && kRows % 4 == 0 && kWarps <= 8);
};

// Rows of a block that have no place on the chip and lie in scratch memory.
inline int off_chip_rows(const LaunchConfig& config, int64_t size_x) {
  const int64_t rows = (size_x + config.cluster - 1) / config.cluster;
  const int64_t on_chip = kTileShapes[config.shape].held() + config.shared;
  return rows > on_chip ? static_cast<int>(rows - on_chip) : 0;
}

}  // namespace otalign::cuda
