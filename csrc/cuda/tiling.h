// Where the kernel matrix of an item lies: which thread holds which of its numbers, and the plan of shared memory.
#pragma once

#include <cstdint>

#include "../absorb.h"
#include "../problem.h"

namespace otalign::cuda {

// How a block of `warps` holds rows x (width / lanes) numbers of the matrix a thread, in registers. Of a warp's lanes,
// `lanes` lie across the columns, groups of four columns taking turns, and the others below each other; rows take turns
// among warps. So the block's rows come in steps, and every warp has its share of a short item.
struct Form {
  int width;  // columns in all
  int lanes, rows, warps;

  OTALIGN_ANYWHERE constexpr int columns() const { return width / lanes; }
  OTALIGN_ANYWHERE constexpr int threads() const { return 32 * warps; }
  OTALIGN_ANYWHERE constexpr int step() const { return 32 / lanes * warps; }
  OTALIGN_ANYWHERE constexpr int held() const { return rows * step(); }  // rows in registers
  OTALIGN_ANYWHERE constexpr int pitch() const {
    return width + 4;
  }  // what a warp, or a block, sums: columns, and four numbers
};

// The forms that are compiled: the first that is wide enough, and has enough rows, for what heuristics.h wants.
constexpr Form kForms[] = {
    {32, 4, 16, 1}, {32, 4, 16, 4},  {64, 8, 16, 1},  {64, 8, 16, 4},   {128, 8, 8, 4},
    {128, 8, 8, 8}, {256, 16, 8, 8}, {512, 32, 8, 8}, {1024, 32, 0, 8},
};
constexpr int kFormCount = sizeof kForms / sizeof *kForms;

template <int N>
struct Layout {
  static constexpr Form kForm = kForms[N];
  static constexpr int kWidth = kForm.width, kLanes = kForm.lanes, kColumns = kForm.columns(), kRows = kForm.rows;
  static constexpr int kWarps = kForm.warps, kThreads = kForm.threads();
  static constexpr int kBelow = 32 / kLanes;  // lanes below each other
  static constexpr int kStep = kForm.step(), kHeld = kForm.held(), kPitch = kForm.pitch();
  static constexpr int kAtOnce = kRows * kColumns > 64 ? 1 : 2;  // rows of a lane that are read from memory together
  OTALIGN_ANYWHERE static constexpr Form form() { return {kWidth, kLanes, kRows, kWarps}; }
  static_assert(kColumns % 4 == 0 && kColumns <= 32 && kRows % 4 == 0 && kWarps <= 8);
};

// How a batch is solved; from heuristics.h.
struct Choice {
  int32_t form;       // of kForms
  int32_t cluster;    // blocks an item
  int32_t in_flight;  // clusters
  int32_t shared;     // rows of a block in shared memory, a multiple of the step; those that do not fit lie in L2
  int32_t bytes;      // of shared memory for a block
  int32_t scatter;    // whether blocks sum slices of the columns for each other, or each all of them
  int32_t ordered;    // whether items are taken longest first
};

constexpr int kOrdered = 256;       // items that are put in order; of more, chance evens out who gets the longest
constexpr int kScatterFrom = 1024;  // numbers that a block receives otherwise

// Offsets into a block's shared memory, in floats: first the mailboxes (four of eight bytes), then
constexpr int kSums = 8;      // what the warps have, for sums over the block
constexpr int kNumbers = 16;  // four numbers that an exchange has summed
constexpr int kItem = 20;     // what is known of the item
constexpr int kFixed = 44;
struct Memory {
  int32_t columns, parts, inbox, factors, rows, kernel, order, end;
  int32_t inbox_pitch;  // of one of the two buffers
  int32_t slice;        // columns that a block sums for the others, in groups of four
};

constexpr Memory memory(const Form& form, const Choice& choice) {
  Memory at{};
  const bool alone = choice.cluster == 1;
  at.slice = alone ? 0 : (form.width / 4 + choice.cluster) / choice.cluster;
  at.inbox_pitch = alone            ? 0
                   : choice.scatter ? choice.cluster * at.slice * 4 + form.pitch()
                                    : choice.cluster * form.pitch();
  at.columns = kFixed;
  at.parts = at.columns + 5 * form.width;
  at.inbox = at.parts + form.warps * form.pitch();
  at.factors = at.inbox + 2 * at.inbox_pitch;
  at.rows = at.factors + form.held();
  at.kernel = at.rows + 4 * (form.held() + choice.shared);
  at.order = at.kernel + choice.shared * form.width;
  at.end = at.order + (choice.ordered ? kOrdered + kOrdered / 2 : 0);
  return at;
}

// What a kernel is given.
struct Arguments {
  Problem problem;
  Lifts lifts;
  Choice choice;
  Memory memory;
  float tol;
};

// The rows of a block that find no place on the chip.
inline int far_rows(const Choice& choice, int64_t size_x) {
  const int64_t rows = (size_x + choice.cluster - 1) / choice.cluster;
  const int64_t near = kForms[choice.form].held() + choice.shared;
  return rows > near ? static_cast<int>(rows - near) : 0;
}

}  // namespace otalign::cuda
