#include "kernels.cuh"

namespace otalign::cuda {

Kernels wide_kernels(int form) {
  const Kernels all[] = {kernels<7>(), kernels<8>()};
  return all[form];
}

}  // namespace otalign::cuda
