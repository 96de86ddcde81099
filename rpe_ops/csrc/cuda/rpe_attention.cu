// rpe_attention on CUDA tensors of 16 bits, for maps that factor: checks. Launches are in rpe_attention_launches.h.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <tuple>
#include <vector>

#include "../check.h"
#include "rpe_attention_run.h"

namespace rpe_ops {
namespace {

Device ask(int device) {
  Device found{};
  check_cuda(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check_cuda(cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device));
  return found;
}

}  // namespace

Device of_device(int device) {
  constexpr int kMost = 64;
  static std::once_flag once[kMost];
  static Device known[kMost];
  if (device >= kMost) return ask(device);
  std::call_once(once[device], [&] { known[device] = ask(device); });
  return known[device];
}

namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

// Whether rows begin at multiples of 16 bytes, and a head's numbers can be counted in 32 bits.
bool is_aligned(const Tensor& x) {
  return x.dim() == 4 && x.stride(3) == 1 && (x.stride(0) | x.stride(1) | x.stride(2)) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.size(2) * x.stride(2) < int64_t{1} << 31;
}

// As it is, or a copy.
Tensor aligned(const Tensor& x) { return is_aligned(x) ? x : torch::stable::clone(torch::stable::contiguous(x)); }

Heads heads_of(const Tensor& x, const char* name, const Tensor& like) {
  check(x.dim() == 4 && x.scalar_type() == like.scalar_type() && x.device() == like.device(), name,
        " and q differ in dimensions, dtype or device");
  for (int d = 0; d < 4; ++d)
    check(x.size(d) == like.size(d), name, " has shape ", shape_of(x), "; expected ", shape_of(like));
  check(is_aligned(x), name, ": rows do not begin at multiples of 16 bytes");
  return {x.data_ptr(), x.stride(0), x.stride(1), int(x.stride(2))};
}

constexpr const char* kOutOfMemory = "CUDA out of memory";  // rpe_attention_cuda.py knows it by these words

// Memory on the device of x, of sizes and strides: without the way through torch's dispatcher, which takes longer.
Tensor empty_strided(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle made = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cuda(), x.get_device_index(), &made);
  check(error == AOTI_TORCH_SUCCESS, kOutOfMemory, " in rpe_attention");
  return Tensor(made);
}

int32_t dtype_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();
}

Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return empty_strided(x, sizes, strides, dtype);
}

// (B, H, L, D) that lies in memory as (B, L, H, D): what follows an attention merges the heads without a copy.
Tensor empty_heads(const Tensor& q) {
  const int64_t H = q.size(1), L = q.size(2), D = q.size(3);
  return empty_strided(q, {q.size(0), H, L, D}, {L * H * D, D, H * D, 1}, dtype_of(q));
}

// One call: the tensors' sizes, the encodings, and which kernels there are for them.
struct Call {
  Attention a{};
  int64_t B, H, L, D;
  bool q, k, v, is_half;
  cudaStream_t stream;
  Device device;

  // on has bits 1, 2, 4 for encodings on q, k and v, and tables, maps and numbers are those, in this order
  Call(const Tensor& x, const Tensors& tables, const Tensors& maps, const Numbers& numbers, int64_t on, double scale) {
    check(x.dim() == 4 && (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16),
          "q is neither float16 nor bfloat16 of 4 dimensions");
    B = x.size(0), H = x.size(1), L = x.size(2), D = x.size(3);
    check(D >= 8 && D <= 128 && D % 8 == 0, "head size ", D, "; expected a multiple of 8 up to 128");
    check(scale > 0, "scale=", scale, "; expected a positive number");
    q = on & 1, k = on & 2, v = on & 4, is_half = x.scalar_type() == ScalarType::Half;
    const size_t count = q + k + v;
    check(count > 0 && tables.size() == count && maps.size() == count && numbers.size() == 5 * count,
          "expected a table, a map and five numbers for each encoding");
    const int64_t height = numbers[0], width = numbers[1], skip = numbers[2];
    check(height > 0 && width > 0 && skip >= 0 && height <= 1 << 20 && width <= 1 << 20 && L == skip + height * width &&
              L < int64_t{1} << 24,
          L, " tokens; expected skip=", skip, " + ", height, " * ", width);
    a.map = geometry_of(int(height), int(width), int(skip));
    a.batch = int(B), a.heads = int(H), a.head_pieces = int(D / 8), a.scale = float(scale);
    size_t n = 0;
    if (q) encode(a.on_q, x, tables[n], maps[n], &numbers[5 * n], false), ++n;
    if (k) encode(a.on_k, x, tables[n], maps[n], &numbers[5 * n], false), ++n;
    if (v) encode(a.on_v, x, tables[n], maps[n], &numbers[5 * n], true), ++n;
    stream = current_stream(x);
    device = of_device(x.get_device_index());
  }

  void encode(Encoding& e, const Tensor& x, const Tensor& W, const Tensor& map, const int64_t* numbers, bool on_v) const {
    for (int i = 0; i < 3; ++i) {
      const int64_t size[] = {a.map.height, a.map.width, a.map.skip};
      check(numbers[i] == size[i], "maps of several sizes; expected one");
    }
    e.buckets = int(numbers[3]), e.columns = int(numbers[4]);
    const int skips = a.map.skip > 0;
    check(e.buckets > 0 && e.columns > 0 && e.columns + skips <= kPlaces, "columns=", e.columns, " of ", e.buckets,
          " buckets; expected at most ", kPlaces, " with that of skip tokens");
    e.rows = (e.buckets - skips + e.columns - 1) / e.columns;
    check(e.rows + skips <= kPlaces, "rows=", e.rows, " of buckets; expected at most ", kPlaces,
          " with that of skip tokens");
    check(map.scalar_type() == ScalarType::Int && map.dim() == 1 && map.is_contiguous() && map.device() == x.device() &&
              map.size(0) == 2 * a.map.height + 2 * a.map.width - 2,
          "a map is not int32 of 2h-1 + 2w-1 numbers on q's device");
    e.axes = static_cast<const int32_t*>(map.data_ptr());
    e.is_float = W.scalar_type() == ScalarType::Float;
    check(W.device() == x.device() && (e.is_float || W.scalar_type() == x.scalar_type()),
          "W is neither float32 nor of q's dtype, or not on its device");
    check(W.dim() == 3 && W.size(0) == H && W.size(on_v ? 2 : 1) == D && W.size(on_v ? 1 : 2) == e.buckets,
          "W has shape ", shape_of(W), "; expected (H, D, N), on values (H, N, D)");
    e.weights = W.data_ptr();
    e.h = W.stride(0), e.d = W.stride(on_v ? 2 : 1), e.n = W.stride(on_v ? 1 : 2);
  }

  Tensor tables_of(const Tensor& x) const { return empty(x, {B, H, L, kAllPlaces}, dtype_of(x)); }

  // f of a dtype and a head size that kernels are made for
  template <class F>
  void with_types(const F& f) const {
    const auto with = [&](auto dtype) {
      if (D <= 32) f(dtype, std::integral_constant<int, 32>());
      else if (D <= 64) f(dtype, std::integral_constant<int, 64>());
      else if (D <= 96) f(dtype, std::integral_constant<int, 96>());
      else f(dtype, std::integral_constant<int, 128>());
    };
    if (is_half) with(Half());
    else with(Brain());
  }

  Run run() const { return {a, H, L, B * L, q, k, v, stream, device}; }

  void attend(Pass pass) const {
    with_types([&](auto dtype, auto head) { rpe_ops::attend<decltype(dtype), decltype(head)::value>(run(), pass); });
  }

  void find_far_q() const {
    with_types([&](auto dtype, auto head) { side_tables<decltype(dtype), decltype(head)::value>(run()); });
  }
};

std::tuple<Tensor, Tensor, Tensor> rpe_attention_cuda(
    Tensor q, Tensor k, Tensor v, Tensors tables, Tensors maps, Numbers numbers, int64_t on, double scale, bool keeps) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = aligned(q), k = aligned(k), v = aligned(v);
  Call call(q, tables, maps, numbers, on, scale);
  Attention& a = call.a;
  Tensor out = empty_heads(q), lse = empty(q, {call.B, call.H, call.L}, aoti_torch_dtype_float32());
  Tensor sums = call.v && keeps ? call.tables_of(q) : empty(q, {0}, dtype_of(q));
  if (call.B * call.H == 0) return {out, lse, sums};
  a.q = heads_of(q, "q", q), a.k = heads_of(k, "k", q), a.v = heads_of(v, "v", q), a.out = heads_of(out, "out", q);
  a.lse = static_cast<float*>(lse.data_ptr());
  if (call.v && keeps) a.on_v.sums = sums.data_ptr();
  Tensor far;
  if (call.q) {
    far = call.tables_of(q);
    a.on_q.far = far.data_ptr();
    call.find_far_q();
  }
  call.attend(Pass::kForward);
  return {out, lse, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> rpe_attention_cuda_backward(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor sums, Tensors tables, Tensors maps,
    Numbers numbers, int64_t on, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = aligned(q), k = aligned(k), v = aligned(v), grad_out = aligned(grad_out), out = aligned(out);
  Call call(q, tables, maps, numbers, on, scale);
  Attention& a = call.a;
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(q), grad_v = empty_heads(q);
  Tensors grads;
  for (const Tensor& table : tables) {
    const Numbers sizes{table.size(0), table.size(1), table.size(2)};
    const bool is_float = table.scalar_type() == ScalarType::Float;
    grads.push_back(
        call.B == 0 ? torch::stable::new_zeros(table, sizes)
                    : empty(q, sizes, is_float ? aoti_torch_dtype_float32() : dtype_of(q)));
  }
  if (call.B * call.H == 0) return {grad_q, grad_k, grad_v, grads};
  check(lse.dim() == 3 && lse.numel() == call.B * call.H * call.L && lse.is_contiguous() &&
            lse.scalar_type() == ScalarType::Float && lse.device() == q.device(),
        "lse is not what rpe_attention returned");
  check(!call.v || (sums.numel() == call.B * call.H * call.L * kAllPlaces && sums.is_contiguous() &&
                    sums.scalar_type() == q.scalar_type() && sums.device() == q.device()),
        "sums are not what rpe_attention returned");
  const Tensor delta = empty(q, {call.B, call.H, call.L}, aoti_torch_dtype_float32());
  a.q = heads_of(q, "q", q), a.k = heads_of(k, "k", q), a.v = heads_of(v, "v", q);
  a.out = heads_of(out, "out", q), a.grad_out = heads_of(grad_out, "grad_out", q);
  a.grad_q = heads_of(grad_q, "grad_q", q), a.grad_k = heads_of(grad_k, "grad_k", q);
  a.grad_v = heads_of(grad_v, "grad_v", q);
  a.lse = static_cast<float*>(lse.data_ptr()), a.delta = static_cast<float*>(delta.data_ptr());
  Tensors kept;  // until the kernels are launched: afterwards the stream keeps the order
  const auto memory = [&] {
    kept.push_back(call.tables_of(q));
    return kept.back().data_ptr();
  };
  if (call.q) a.on_q.far = memory(), a.on_q.sums = memory();
  if (call.k) a.on_k.far = memory(), a.on_k.sums = memory();
  if (call.v) a.on_v.far = memory(), a.on_v.sums = sums.data_ptr();
  if (call.q) call.find_far_q();
  call.attend(Pass::kQueries);
  call.attend(Pass::kKeys);

  TableGradients all{};
  const auto add = [&](const Heads& x, Encoding e, bool on_v) {
    const Tensor& grad = grads[all.count];
    e.h = grad.stride(0), e.d = grad.stride(on_v ? 2 : 1), e.n = grad.stride(on_v ? 1 : 2);
    all.of[all.count++] = {x, e.sums, e, grad.data_ptr(), on_v ? 1.0f : a.scale};
  };
  if (call.q) add(a.k, a.on_q, false);
  if (call.k) add(a.q, a.on_k, false);
  if (call.v) add(a.grad_out, a.on_v, true);
  all.heads = a.heads, all.pieces = a.head_pieces, all.length = int(call.L), all.tokens = call.B * call.L;
  all.skips = a.map.skip > 0;
  // a few blocks for each multiprocessor, and at least four stages of tokens for each block
  const int64_t most = (all.tokens + 4 * kStage - 1) / (4 * kStage);
  all.splits = int(std::max<int64_t>(1, std::min<int64_t>(most, 4 * call.device.processors / (all.count * all.heads))));
  call.with_types([&](auto dtype, auto head) {
    using T = decltype(dtype);
    constexpr int kHead = decltype(head)::value;
    const int64_t blocks = int64_t{all.count} * all.heads * all.splits;
    const Tensor parts = empty(q, {blocks, kHead, kAllPlaces}, aoti_torch_dtype_float32());
    all.parts = static_cast<float*>(parts.data_ptr());
    table_gradients<T, kHead>(all, call.stream);
  });
  return {grad_q, grad_k, grad_v, grads};
}

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CUDA, m) {
  m.impl("rpe_attention_cuda", TORCH_BOX(&rpe_ops::rpe_attention_cuda));
  m.impl("rpe_attention_cuda_backward", TORCH_BOX(&rpe_ops::rpe_attention_cuda_backward));
}
