// The kernels of csrc/cuda, compiled for the CPU over the intrinsics.h beside, as a library that Python loads with ctypes.
#include "cuda/adjoint.cuh"
#include "cuda/heuristics.h"
#include "cuda/sinkhorn.cuh"

namespace otalign::cuda {
namespace {

#ifndef OTALIGN_FORMS
#define OTALIGN_FORMS 0, 1, 2, 3, 4, 5, 6, 7, 8
#endif

template <int N>
bool run_form(const Arguments& arguments, int kind, unsigned seed) {
  using L = Layout<N>;
  const Choice& choice = arguments.choice;
  if (choice.form != N) return false;
  port::launch(choice.in_flight, choice.cluster, L::kThreads, choice.bytes, seed, [&] {
    if (kind == 0) Sinkhorn<L, false>(arguments).run();
    if (kind == 1) Sinkhorn<L, true>(arguments).run();
    if (kind == 2) Lift<L>(arguments).run();
  });
  return true;
}

template <int... N>
bool run_any(const Arguments& arguments, int kind, unsigned seed, std::integer_sequence<int, N...>) {
  return (run_form<N>(arguments, kind, seed) || ...);
}

}  // namespace
}  // namespace otalign::cuda

using namespace otalign;
using namespace otalign::cuda;

extern "C" {

// The choice of the rule for a chip on which a processor can have so many blocks, and clusters of more than 8 or not.
void host_choose(int processors, int shared_of_block, int largest_cluster, int64_t items, int64_t size_x,
                 int64_t size_y, Choice* out) {
  const Chip chip{processors, shared_of_block, largest_cluster > 1};
  *out = choose(chip, items, size_x, size_y, true, [&](const Choice& choice) {
    if (choice.cluster > largest_cluster) return 0;
    const int by_registers = 65536 / (256 * kForms[choice.form].threads());
    const int by_memory = (shared_of_block + 1024) / (choice.bytes + 1024);
    return std::min(by_registers, by_memory) * processors / choice.cluster;
  });
}

// A choice as it is wanted: form, blocks an item, rows of a block in shared memory, clusters.
void host_force(int form, int cluster, int shared, int in_flight, int scatter, int ordered, Choice* out) {
  *out = {form, cluster, in_flight, shared, 0, scatter, ordered};
  out->bytes = 4 * memory(kForms[form], *out).end;
}

int64_t host_scratch(const Problem* problem, const Choice* choice) {
  return far_rows(*choice, problem->x.size) > 0 ? scratch_bytes(*problem) : 0;
}

// Kinds as in launch.h. False if the form is not among those compiled.
bool host_run(const Problem* problem, const Lifts* lifts, const Choice* choice, int kind, unsigned seed) {
  const Arguments arguments{*problem, lifts ? *lifts : Lifts{}, *choice, memory(kForms[choice->form], *choice),
                            static_cast<float>(problem->tol)};
  return run_any(arguments, kind, seed, std::integer_sequence<int, OTALIGN_FORMS>());
}

int host_held(int form) { return kForms[form].held(); }
int host_step(int form) { return kForms[form].step(); }
}
