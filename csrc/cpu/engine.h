// The CPU engine: a batch of items over OpenMP threads, longest item first, each costing only its valid part.
#pragma once

#include "../problem.h"
#include "isa.h"

namespace otalign::cpu {

// All throw std::invalid_argument for a malformed problem or memory that is too small for it, before anything is
// written, and std::bad_alloc. They return false if `poll`, which only the calling thread asks, wanted them to stop;
// outputs are then incomplete.
bool forward(const Problem& problem, Poll poll);
bool backward(const Problem& problem, const Gradients& gradients, Poll poll);

// Plans from one behind the other (Problem::plan's layout) to (B, size_x, size_y), zero on the padding, and back.
void unpack(const Problem& problem, Span<void> dense);
void pack(const Problem& problem, Span<const void> dense);

}  // namespace otalign::cpu
