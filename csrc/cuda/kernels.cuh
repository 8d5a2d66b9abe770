// The kernels of a form.
#pragma once

#include "adjoint.cuh"
#include "launch.h"
#include "sinkhorn.cuh"

namespace otalign::cuda {

template <class L, bool kRelaxed>
__global__ void __launch_bounds__(L::kThreads) sinkhorn_kernel(const __grid_constant__ Arguments arguments) {
  Sinkhorn<L, kRelaxed>(arguments).run();
}

template <class L>
__global__ void __launch_bounds__(L::kThreads) lift_kernel(const __grid_constant__ Arguments arguments) {
  Lift<L>(arguments).run();
}

template <int N>
Kernels kernels() {
  using L = Layout<N>;
  return {{reinterpret_cast<const void*>(&sinkhorn_kernel<L, false>),
           reinterpret_cast<const void*>(&sinkhorn_kernel<L, true>), reinterpret_cast<const void*>(&lift_kernel<L>)}};
}

}  // namespace otalign::cuda
