// What the calls of the CUDA runtime share: errors as text, and calls while a graph is captured.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace otalign::cuda {

// The text as a C string, until the thread's next call.
inline const char* message(const std::string& text) {
  thread_local std::string kept;
  kept = text;
  return kept.c_str();
}

inline const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or else it would surface again as the error of the next launch
  return message(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

#define OTALIGN_TRY(call) \
  if (const char* error = otalign::cuda::message(call)) return error

// In its scope, this thread may load kernels although a stream is being captured. In the default mode of a capture,
// this would be an error and would end the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace otalign::cuda
