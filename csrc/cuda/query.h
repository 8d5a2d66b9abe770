// Queries of the CUDA runtime: versions, and whether the kernels run on a device. No CUDA header here, so that
// bindings.cpp compiles without the toolkit.
#pragma once

namespace otalign::cuda {

// Versions are 1000 * major + 10 * minor.
int runtime_version();  // of the toolkit that this was built with
int driver_version();   // the newest runtime that the driver supports; 0 without a driver

// Why this device cannot run the kernels; nullptr if it can. The thread's next call may overwrite the text. `device`
// becomes the current one.
const char* reason_missing(int device);

}  // namespace otalign::cuda
