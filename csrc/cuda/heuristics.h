// How a batch is solved, by rule from its sizes and the chip; nothing is tuned while running.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tiling.h"

namespace otalign::cuda {

struct Chip {
  int processors;
  int shared_of_block;  // bytes that a block may have
  bool clusters;
};

// The times behind the rule are cycles of one iteration, estimated from the machine code and a model of the chip, not
// measured: what an iteration takes at least, an exchange among blocks, and each row in registers, shared memory and
// L2.
struct Estimate {
  static double iteration(const Form& form, int rows, int near, const Choice& choice) {
    const double turns = std::max(1.0, form.warps / 4.0);  // warps that share a scheduler
    const int in_registers = std::min(rows, form.held());
    const double of_registers = 2.0 * form.columns() * ((in_registers + form.step() - 1) / form.step()) * turns;
    const double of_shared = (std::min(rows, near) - in_registers) * (form.width * 4 / 64.0 + 40.0 / form.warps);
    const double of_far = (rows - std::min(rows, near)) * (form.width * 4 / 20.0);
    const double exchange = choice.cluster == 1 ? 0 : (choice.scatter ? 900 : 450) + 10 * choice.cluster;
    return 700 + 150 * turns + of_registers + of_shared + of_far + exchange;
  }
};

// Bytes of scratch memory, if there are such rows.
inline int64_t scratch_bytes(const Problem& problem) {
  return 4 * ((4 * problem.x.rows + 31) / 32 * 32 + problem.x.rows * problem.pitch);
}

// The choice for a form and a size of clusters; active(choice) tells how many clusters run at the same time, 0 if none
// can.
template <class Active>
Choice choose(const Chip& chip, int form_number, int cluster, int64_t items, int64_t size_x, bool ragged,
              Active active) {
  const Form& form = kForms[form_number];
  Choice choice{};
  choice.form = form_number;
  choice.cluster = cluster;
  choice.scatter = cluster * form.width > kScatterFrom;
  choice.ordered = ragged && items <= kOrdered;
  const int64_t rows = (size_x + cluster - 1) / cluster;
  const int64_t wanted = std::max<int64_t>(0, rows - form.held() + form.step() - 1) / form.step() * form.step();
  const int free = chip.shared_of_block / 4 - memory(form, choice).end;
  choice.shared = static_cast<int>(std::min<int64_t>(wanted, free / (form.width + 4) / form.step() * form.step()));
  if (free < 0) return choice;  // in_flight is 0
  choice.bytes = 4 * memory(form, choice).end;
  choice.in_flight = static_cast<int>(std::min<int64_t>(items, active(choice)));
  choice.ordered = choice.ordered && choice.in_flight < items;
  choice.bytes = 4 * memory(form, choice).end;
  return choice;
}

// The choice that takes the least time by the estimate; in_flight is 0 if y is too long.
template <class Active>
Choice choose(const Chip& chip, int64_t items, int64_t size_x, int64_t size_y, bool ragged, Active active) {
  Choice best{};
  double least = 0;
  int width = 0;
  for (int number = 0; number < kFormCount; ++number) {
    const Form& form = kForms[number];
    if (form.width < size_y || (width != 0 && form.width != width)) continue;
    width = form.width;
    for (const int cluster : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
      if (cluster > 1 && (!chip.clusters || cluster > size_x)) break;
      const Choice choice = choose(chip, number, cluster, items, size_x, ragged, active);
      if (choice.in_flight <= 0) continue;
      const int rows = static_cast<int>((size_x + cluster - 1) / cluster);
      const double rounds = static_cast<double>((items + choice.in_flight - 1) / choice.in_flight);
      const double together = static_cast<double>(choice.in_flight) * cluster / chip.processors;
      const double slower =
          std::max(1.0, 0.35 * together + 0.65);  // blocks that share a processor hide each other's waiting
      const double time =
          rounds * slower * Estimate::iteration(form, rows, form.held() + choice.shared, choice) * (1 + 0.01 * cluster);
      if (best.in_flight == 0 || time < least) {
        best = choice;
        least = time;
      }
    }
  }
  return best;
}

}  // namespace otalign::cuda
