// rpe_attention on a CPU: forward and backward of attention with encodings on queries, keys and values.
//
// A thread takes tiles: a few queries of one head against all keys. The tile's scores stay in its caches; nothing of size
// Lq x Lk is written. The backward computes them again from the logarithm of the softmax's denominators, and one thread
// does all tiles of a head, so every sum has one order, whatever the number of threads.

#include "isa.h"
#include "rpe_attention.h"
#include "rpe_attention_maps.h"

#include "../check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace rpe_ops {
namespace {

// ---- raw pointers and sizes

Kernels kernels(Storage storage) {
#ifdef RPE_ATTENTION_X86
  switch (isa()) {
    case Isa::avx512_bf16: return storage == Storage::bf16 ? avx512_bf16::kernels(storage) : avx512::kernels(storage);
    case Isa::avx512: return avx512::kernels(storage);
    case Isa::avx2: return avx2::kernels(storage);
    default: break;
  }
#endif
  return plain::kernels(storage);
}

struct Scratch {
  char* data;
  explicit Scratch(int64_t bytes) : data(static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// ---- tensors, checks, dtypes

Storage storage_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Storage::f64;
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Half: return Storage::f16;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Bool: return Storage::boolean;
    default: check(false, name, " is neither floating point nor bool");
  }
  return Storage::f32;
}

View view_of(const Tensor& tensor, const char* name) {
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3),
          storage_of(tensor, name)};
}

void check_size(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
  bool same = tensor.dim() == int64_t(sizes.size());
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == sizes[size_t(d)];
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  check(same, name, " has shape ", shape_of(tensor), "; expected (", expected, ")");
}

using Tensors = std::vector<Tensor>;

// The arguments of an encoding: tables, maps, and four sizes for each map.
struct Encoding {
  const Tensors& tables;
  const Tensors& maps;
  const std::vector<int64_t>& sizes;
};

// What forward and backward share.
struct Call {
  Problem p{};
  std::vector<Term> on_q, on_k, on_v;
  std::vector<std::unique_ptr<OwnedMap>> maps;
  Kernels kernel{};

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& attn_mask,
       const std::optional<Tensor>& seed, double scale, double dropout_p) {
    check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v have ", q.dim(), ", ", k.dim(), ", ", v.dim(),
          " dimensions; expected 4");
    p.B = q.size(0), p.H = q.size(1), p.Lq = q.size(2), p.D = q.size(3), p.Lk = k.size(2);
    check_size(k, "k", {p.B, p.H, p.Lk, p.D});
    check_size(v, "v", {p.B, p.H, p.Lk, p.D});
    check(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k, v differ in dtype");
    p.q = view_of(q, "q"), p.k = view_of(k, "k"), p.v = view_of(v, "v");
    check(p.q.storage != Storage::boolean, "q is bool; expected floating point");
    const bool wide = p.q.storage == Storage::f64;
    kernel = kernels(p.q.storage);
    if (attn_mask.has_value()) {
      check_size(*attn_mask, "attn_mask", {p.B, p.H, p.Lq, p.Lk});
      p.mask = view_of(*attn_mask, "attn_mask");
    }
    check(dropout_p >= 0 && dropout_p <= 1, "dropout_p=", dropout_p, "; expected 0 <= dropout_p <= 1");
    p.scale = scale, p.dropout_p = dropout_p;
    if (dropout_p > 0) {
      check(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
            "dropout needs a seed, an int64 tensor of one element");
      p.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
    }
    // as many queries as keep the tile's scores at 256 KiB, so that keys and values fit L2 beside them
    const int64_t bytes = std::max<int64_t>(p.Lk, 1) * (wide ? 8 : 4);
    p.tile = 32 * bytes <= int64_t(1) << 18 ? 32 : 16;
    p.tiles = (p.Lq + p.tile - 1) / p.tile;
  }

  void encode(const Encoding& q, const Encoding& k, const Encoding& v) {
    terms(on_q, q, p.Lk, p.Lq, "encoding on q");
    terms(on_k, k, p.Lq, p.Lk, "encoding on k");
    terms(on_v, v, p.Lq, p.Lk, "encoding on v");
    p.on_q = on_q.data(), p.on_k = on_k.data(), p.on_v = on_v.data();
    p.num_q = int64_t(on_q.size()), p.num_k = int64_t(on_k.size()), p.num_v = int64_t(on_v.size());
  }

  void terms(std::vector<Term>& to, const Encoding& encoding, int64_t rows, int64_t cols, const char* name) {
    const auto& [tables, tensors, sizes] = encoding;
    const bool only_sums = &to == &on_v && tables.empty();
    check((only_sums || tables.size() == tensors.size()) && sizes.size() == 4 * tensors.size(), name, ": ",
          tables.size(), " tables, ", tensors.size(), " maps, ", sizes.size(),
          " sizes; expected a map for each table and four sizes for each map");
    for (size_t t = 0; t < tensors.size(); ++t) {
      const MapSizes of{sizes[4 * t], sizes[4 * t + 1], sizes[4 * t + 2], sizes[4 * t + 3]};
      maps.push_back(std::make_unique<OwnedMap>(tensors[t], of, rows, cols, &to == &on_q, name));
      OwnedMap& map = *maps.back();
      if (&to == &on_q && map.map.kind != Map::free) {
        if (p.height == 0) p.height = of.height, p.width = of.width, p.skip = of.skip;
        if (p.height != of.height || p.width != of.width || p.skip != of.skip) map.make_odd();
      }
      Term term;
      map.describe(term);
      const int64_t vector = std::max<int64_t>(kernel.width, 8);
      term.width = std::max(round_up(term.used, vector), vector);
      if (!only_sums) add_table(term, tables[t], rows, &to == &on_v, name);
      to.push_back(term);
    }
  }

  void add_table(Term& term, const Tensor& table, int64_t rows, bool on_values, const char* name) {
    term.weight = table.dim() == 3;
    if (term.weight) {
      check_size(table, name, {p.H, on_values ? term.buckets : p.D, on_values ? p.D : term.buckets});
      term.table = {static_cast<char*>(table.data_ptr()), 0, table.stride(0), table.stride(1), table.stride(2),
                    storage_of(table, name)};
    } else {
      check(!on_values, name, ": expected W, of 3 dimensions");
      check_size(table, name, {p.B, p.H, rows, term.buckets});
      term.table = view_of(table, name);
    }
    check(term.table.storage != Storage::boolean, name, ": the table is bool; expected floating point");
  }

  void run(bool backward) {
    p.backward = backward;
    if (p.B * p.H == 0) return;
    const int64_t tasks = backward ? p.B * p.H : p.B * p.H * p.tiles;
    const int64_t bytes = kernel.scratch_bytes(p);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      (backward ? kernel.backward : kernel.forward)(p, scratch.data, begin, end);
    });
  }
};

// (B, H, L, D) that lies in memory as (B, L, H, D): what follows an attention merges the heads without a copy
Tensor empty_heads(const Tensor& like, int64_t B, int64_t H, int64_t L, int64_t D) {
  return torch::stable::transpose(torch::stable::new_empty(like, {B, L, H, D}), 1, 2);
}

std::tuple<Tensor, Tensor, Tensors> rpe_attention(
    Tensor q, Tensor k, Tensor v, Tensors tables_q, Tensors tables_k, Tensors tables_v, Tensors maps_q, Tensors maps_k,
    Tensors maps_v, std::vector<int64_t> sizes_q, std::vector<int64_t> sizes_k, std::vector<int64_t> sizes_v,
    std::optional<Tensor> attn_mask, std::optional<Tensor> seed, double scale, double dropout_p) {
  Call call(q, k, v, attn_mask, seed, scale, dropout_p);
  call.encode({tables_q, maps_q, sizes_q}, {tables_k, maps_k, sizes_k}, {tables_v, maps_v, sizes_v});
  Problem& p = call.p;
  Tensor out = empty_heads(q, p.B, p.H, p.Lq, p.D);
  const auto precise = p.q.storage == Storage::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(q, {p.B, p.H, p.Lq}, precise);
  Tensors sums;
  for (Term& term : call.on_v) {
    if (term.weight) continue;
    sums.push_back(torch::stable::new_empty(q, {p.B, p.H, p.Lq, term.buckets}));
    term.result = view_of(sums.back(), "sums");
  }
  p.out = view_of(out, "out");
  p.lse = lse.mutable_data_ptr();
  call.run(false);
  return {out, lse, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors> rpe_attention_backward(
    Tensor grad_out, Tensors grad_sums, Tensor q, Tensor k, Tensor v, Tensor lse, Tensors tables_q, Tensors tables_k,
    Tensors tables_v, Tensors maps_q, Tensors maps_k, Tensors maps_v, std::vector<int64_t> sizes_q,
    std::vector<int64_t> sizes_k, std::vector<int64_t> sizes_v, std::optional<Tensor> attn_mask,
    std::optional<Tensor> seed, double scale, double dropout_p) {
  Call call(q, k, v, attn_mask, seed, scale, dropout_p);
  call.encode({tables_q, maps_q, sizes_q}, {tables_k, maps_k, sizes_k}, {tables_v, maps_v, sizes_v});
  Problem& p = call.p;
  check_size(grad_out, "grad_out", {p.B, p.H, p.Lq, p.D});
  check_size(lse, "lse", {p.B, p.H, p.Lq});
  const auto precise = p.q.storage == Storage::f64 ? ScalarType::Double : ScalarType::Float;
  check(lse.is_contiguous() && lse.scalar_type() == precise, "lse is not what rpe_attention returned");
  check(grad_sums.size() == (tables_v.empty() ? call.on_v.size() : 0), "expected a gradient for every bucket sum");
  Tensor grad_q = empty_heads(q, p.B, p.H, p.Lq, p.D);
  Tensor grad_k = empty_heads(q, p.B, p.H, p.Lk, p.D), grad_v = empty_heads(q, p.B, p.H, p.Lk, p.D);
  p.grad_out = view_of(grad_out, "grad_out");
  p.grad_q = view_of(grad_q, "grad_q"), p.grad_k = view_of(grad_k, "grad_k"), p.grad_v = view_of(grad_v, "grad_v");
  p.lse = lse.data_ptr();
  for (size_t t = 0; t < grad_sums.size(); ++t) {
    check_size(grad_sums[t], "grad_sums", {p.B, p.H, p.Lq, call.on_v[t].buckets});
    call.on_v[t].table = view_of(grad_sums[t], "grad_sums");
  }
  const auto results = [&](std::vector<Term>& terms, const Tensors& tables, int64_t rows) {
    Tensors grads;
    for (size_t t = 0; t < terms.size(); ++t) {
      const std::vector<int64_t> sizes{p.B, p.H, terms[t].weight ? p.D : rows, terms[t].buckets};
      grads.push_back(terms[t].weight ? torch::stable::new_empty(tables[t], sizes, precise)
                                      : torch::stable::new_empty(tables[t], sizes));
      terms[t].result = view_of(grads.back(), "gradient");
    }
    return grads;
  };
  Tensors grads_q = results(call.on_q, tables_q, p.Lk), grads_k = results(call.on_k, tables_k, p.Lq), grads_v;
  for (size_t t = 0; t < tables_v.size(); ++t) {
    Term& term = call.on_v[t];
    grads_v.push_back(torch::stable::new_zeros(tables_v[t], {p.B, p.H, term.buckets, p.D}, precise));
    term.result = view_of(grads_v.back(), "gradient");
  }
  call.run(true);
  return {grad_q, grad_k, grad_v, grads_q, grads_k, grads_v};
}

// The name of the instruction set that kernels take; q only says that it is asked of the CPU.
std::string rpe_isa(Tensor) { return kIsaNames[int(isa())]; }

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CPU, m) {
  m.impl("rpe_attention", TORCH_BOX(&rpe_ops::rpe_attention));
  m.impl("rpe_attention_backward", TORCH_BOX(&rpe_ops::rpe_attention_backward));
  m.impl("rpe_isa", TORCH_BOX(&rpe_ops::rpe_isa));
}
