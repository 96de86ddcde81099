// Every schema of the namespace `rpe_ops`. The kernels register themselves, one file for each operator and device.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(rpe_ops, m) {
  m.def("rpe_index(Tensor input, Tensor index) -> Tensor");
  m.def("rpe_bucket_sum(Tensor input, Tensor index, SymInt num_buckets) -> Tensor");
}
