// The CPU engine: it solves the items of a batch over OpenMP threads, longest item first, and computes no padding.
#pragma once

#include "../problem.h"
#include "isa.h"

namespace otalign::cpu {

// All throw std::invalid_argument, before anything is written, if the problem is malformed or its memory too small; and
// std::bad_alloc. They return false if `poll`, which only the calling thread calls, has returned true; outputs are then
// incomplete.
bool forward(const Problem& problem, Poll poll);
bool backward(const Problem& problem, const Gradients& gradients, Poll poll);

// Copies the plans from the places of Problem::plan to `dense` (B, N, M) T, contiguous, with zeros for the padding; and
// back.
bool unpack(const Problem& problem, Span<void> dense, Poll poll);
bool pack(const Problem& problem, Span<const void> dense, Poll poll);

}  // namespace otalign::cpu
