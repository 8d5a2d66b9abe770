#include "../kernels.cuh"

namespace otalign::cuda {

Kernels kernels_of_columns_512_1024(int index) {
  const Kernels all[] = {kernels<7>(), kernels<8>()};
  return all[index];
}

}  // namespace otalign::cuda
