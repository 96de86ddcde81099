// Every schema of the namespace `rpe_ops`. The kernels register themselves, one file for each operator and device.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(rpe_ops, m) {
  m.def("rpe_index(Tensor input, Tensor index) -> Tensor");
  m.def("rpe_bucket_sum(Tensor input, Tensor index, SymInt num_buckets) -> Tensor");
  m.def("rpe_attention_shares(Tensor like, int heads, int tokens, int threads) -> Tensor");
  m.def("rpe_isa(Tensor q) -> str");
  m.def(
      "rpe_attention(Tensor q, Tensor k, Tensor v, Tensor[] tables_q, Tensor[] tables_k, Tensor[] tables_v, "
      "Tensor[] maps_q, Tensor[] maps_k, Tensor[] maps_v, SymInt[] sizes_q, SymInt[] sizes_k, SymInt[] sizes_v, "
      "Tensor? attn_mask, Tensor? seed, float scale, float dropout_p) -> (Tensor, Tensor, Tensor[])");
  m.def(
      "rpe_attention_backward(Tensor grad_out, Tensor[] grad_sums, Tensor q, Tensor k, Tensor v, Tensor lse, "
      "Tensor[] tables_q, Tensor[] tables_k, Tensor[] tables_v, Tensor[] maps_q, Tensor[] maps_k, Tensor[] maps_v, "
      "SymInt[] sizes_q, SymInt[] sizes_k, SymInt[] sizes_v, Tensor? attn_mask, Tensor? seed, float scale, "
      "float dropout_p) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor[])");
  m.def(
      "rpe_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor[] tables, Tensor[] maps, SymInt[] numbers, int on, "
      "float scale, bool keeps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rpe_attention_cuda_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor sums, "
      "Tensor[] tables, Tensor[] maps, SymInt[] numbers, int on, float scale) -> (Tensor, Tensor, Tensor, Tensor[])");
}
