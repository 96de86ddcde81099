// The operators rpe_index and rpe_bucket_sum on CUDA tensors: checks, dtypes, launches. Their kernels are in
// rpe_index_kernels.h.

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "../check.h"
#include "launch.h"
#include "rpe_index_kernels.h"

namespace rpe_ops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kNoFloat = "input is neither float64, float32, float16 nor bfloat16";

int64_t multiprocessors(const Tensor& input) {
  int count = 1;
  check(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, input.get_device_index()) == cudaSuccess,
      "CUDA does not say how many multiprocessors device ", input.get_device_index(), " has");
  return count;
}

template <class Bits>
void launch_index(const Problem& problem, int64_t processors, cudaStream_t stream) {
  const IndexPlan plan = plan_index(problem, sizeof(Bits), processors);
  if (plan.blocks > 0)
    index_kernel<Bits><<<static_cast<unsigned>(plan.blocks), kThreads, plan.shared_bytes, stream>>>(problem, plan);
  else
    index_large_kernel<Bits><<<static_cast<unsigned>(blocks_of_large(problem)), kThreads, 0, stream>>>(problem);
  check_cuda(cudaGetLastError());
}

template <class T>
void launch_sum(const Problem& problem, int64_t processors, cudaStream_t stream) {
  const SumPlan plan = plan_sum<T>(problem, processors);
  const unsigned blocks = static_cast<unsigned>(plan.blocks > 0 ? plan.blocks : blocks_of_large(problem));
  if (plan.blocks == 0) {
    sum_large_kernel<T><<<blocks, kThreads, 0, stream>>>(problem);
  } else if (maps_of_a_lane<T>(problem.buckets) == 1) {
    sum_kernel<T, 1><<<blocks, kThreads, plan.shared_bytes, stream>>>(problem, plan);
  } else if constexpr (sizeof(T) == 2) {
    sum_kernel<T, 2><<<blocks, kThreads, plan.shared_bytes, stream>>>(problem, plan);
  }
  check_cuda(cudaGetLastError());
}

Tensor with_unit_last_stride(const Tensor& input) {
  return input.size(3) <= 1 || input.stride(3) == 1 ? input : torch::stable::contiguous(input);
}

Problem problem_of(const Tensor& input, const Tensor& index, int64_t buckets, const Tensor& output) {
  int bytes = 0;
  switch (index.scalar_type()) {
    case ScalarType::Byte: bytes = 1; break;
    case ScalarType::Short: bytes = 2; break;
    case ScalarType::Int: bytes = 4; break;
    case ScalarType::Long: bytes = 8; break;
    default: check(false, "index is neither uint8, int16, int32 nor int64");
  }
  const int64_t maps = input.size(0) * input.size(1);
  // maps that lie evenly need no division
  const bool even = input.stride(0) == input.size(1) * input.stride(1);
  const Rows rows{even ? maps : input.size(1), input.size(2), input.stride(0), input.stride(1), input.stride(2)};
  void* result = output.mutable_data_ptr();
  check(reinterpret_cast<uintptr_t>(result) % 16 == 0, "torch has allocated memory that does not begin at 16 bytes");
  return {
      input.const_data_ptr(), rows, maps, buckets, index.size(1),
      {index.const_data_ptr(), bytes, index.stride(0), index.stride(1)}, result};
}

Tensor rpe_index(const Tensor& input, const Tensor& index) {
  check_shapes(input, index);
  check_one_device(input, index);
  Tensor output = torch::stable::new_empty(input, {input.size(0), input.size(1), input.size(2), index.size(1)});
  if (output.numel() == 0) return output;
  check(input.size(3) > 0, "a table of N=0 buckets has no entry for ", index.numel(), " ids");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor x = with_unit_last_stride(input);
  const Problem problem = problem_of(x, index, x.size(3), output);
  const int64_t processors = multiprocessors(x);
  const cudaStream_t stream = current_stream(x);
  switch (x.scalar_type()) {
    case ScalarType::Double: launch_index<uint64_t>(problem, processors, stream); break;
    case ScalarType::Float: launch_index<uint32_t>(problem, processors, stream); break;
    case ScalarType::Half:
    case ScalarType::BFloat16: launch_index<uint16_t>(problem, processors, stream); break;
    default: check(false, kNoFloat);
  }
  return output;
}

Tensor rpe_bucket_sum(const Tensor& input, const Tensor& index, int64_t num_buckets) {
  check_shapes(input, index);
  check_columns(input, index, num_buckets);
  check_one_device(input, index);
  const std::vector<int64_t> sizes = {input.size(0), input.size(1), input.size(2), num_buckets};
  if (input.numel() == 0) return torch::stable::new_zeros(input, sizes);
  check(num_buckets > 0, "num_buckets=0 has no bucket for ", index.numel(), " ids");
  Tensor output = torch::stable::new_empty(input, sizes);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor x = with_unit_last_stride(input);
  const Problem problem = problem_of(x, index, num_buckets, output);
  const int64_t processors = multiprocessors(x);
  const cudaStream_t stream = current_stream(x);
  switch (x.scalar_type()) {
    case ScalarType::Double: launch_sum<double>(problem, processors, stream); break;
    case ScalarType::Float: launch_sum<float>(problem, processors, stream); break;
    case ScalarType::Half: launch_sum<Half>(problem, processors, stream); break;
    case ScalarType::BFloat16: launch_sum<BFloat16>(problem, processors, stream); break;
    default: check(false, kNoFloat);
  }
  return output;
}

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CUDA, m) {
  m.impl("rpe_index", TORCH_BOX(&rpe_ops::rpe_index));
  m.impl("rpe_bucket_sum", TORCH_BOX(&rpe_ops::rpe_bucket_sum));
}
