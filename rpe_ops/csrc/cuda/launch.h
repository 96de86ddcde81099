// What every launch on a CUDA device needs.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../check.h"

namespace rpe_ops {

// The macros of torch for this are not in the headers of every torch that the library is built against.
inline void check_cuda(cudaError_t error) {
  check(error == cudaSuccess, "CUDA did not start a kernel of rpe_ops: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& input) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream);
  check(error == AOTI_TORCH_SUCCESS, "torch knows no current stream of CUDA device ", input.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

}  // namespace rpe_ops
