// Checks that operators share, with sentences for users. They stand here a second time (the Python faces check first)
// because torch.ops.rpe_ops.* can be called directly, and no call may read or write outside its tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rpe_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arrives in Python as a RuntimeError that says this and nothing of files and lines.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  const char* separator = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d, separator = ", ") text << separator << tensor.size(d);
  text << (tensor.dim() == 0 ? "()" : ")");
  return text.str();
}

inline void check_shapes(const Tensor& input, const Tensor& index) {
  check(
      input.dim() == 4 && index.dim() == 2 && index.size(0) == input.size(2),
      "input has shape ", shape_of(input), ", index ", shape_of(index), "; expected (B, H, Lq, _) and (Lq, Lk)");
}

inline void check_columns(const Tensor& input, const Tensor& index, int64_t num_buckets) {
  check(
      index.size(1) == input.size(3),
      "index has ", index.size(1), " columns, input ", input.size(3), "; expected the same Lk");
  check(num_buckets >= 0, "num_buckets=", num_buckets, "; expected at least 0");
}

inline void check_in_table(int64_t lowest, int64_t highest, int64_t num_buckets) {
  const int64_t offender = lowest < 0 ? lowest : highest;
  check(
      lowest >= 0 && highest < num_buckets,
      "index ", offender, " is out of bounds for a table of N=", num_buckets, " buckets; expected 0 <= index < ",
      num_buckets);
}

inline void check_one_device(const Tensor& input, const Tensor& index) {
  check(
      input.device() == index.device(), "input and index are on two devices: move one of them");
}

}  // namespace rpe_ops
