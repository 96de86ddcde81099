// rpe_attention on a CPU: forward and backward of attention with encodings on queries, keys and values.
//
// A thread takes tiles: a few queries of one head against all keys. The tile's scores stay in its caches; nothing of size
// Lq x Lk is written. The backward computes them again from the logarithm of the softmax's denominators. The tiles of a head
// are a few parts, fewer where there are many heads: each adds up for itself, and their sums are added in their order, so
// that the bits are those of one thread, whatever the number of threads.

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
#include <utility>
#include <vector>

namespace rpe_ops {
namespace {

// ---- raw pointers and sizes

// what these kernels take: on other machines, and from other compilers than g++, there are the plain ones alone
Isa isa_of_attention() {
  const Isa wanted = isa();  // which refuses names that it does not know
#ifdef RPE_ATTENTION_X86
  return wanted;
#else
  return std::min(wanted, Isa::plain);
#endif
}

Kernels kernels(Storage storage) {
  [[maybe_unused]] const Isa taken = isa_of_attention();
#ifdef RPE_ATTENTION_X86
  switch (taken) {
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
  Scratch(Scratch&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
};

// as many queries as keep a tile's scores at 256 KiB, so that keys and values fit L2 beside them
constexpr int64_t kScoreBytes = int64_t(1) << 18;
int64_t tile_of(int64_t keys, int64_t bytes) { return 32 * bytes * std::max<int64_t>(keys, 1) <= kScoreBytes ? 32 : 16; }
int64_t tiles_of(int64_t queries, int64_t tile) { return (queries + tile - 1) / tile; }

// Of how many parts the tiles of a head are in the backward: about 48 parts of all heads, of two tiles or more. A function
// of sizes alone, for the parts are the order of sums.
int64_t parts_of(int64_t heads, int64_t tiles) {
  const int64_t wanted = (48 + heads - 1) / std::max<int64_t>(heads, 1);
  return std::max<int64_t>(1, std::min(wanted, (tiles + 1) / 2));
}

// The parts of all heads that threads take: whole heads where these are many, or come out even.
struct Shares {
  int64_t heads, parts, threads;

  int64_t begin(int64_t thread) const {
    const bool whole = heads % threads == 0 || heads >= 4 * threads;
    return whole ? heads * thread / threads * parts : heads * parts * thread / threads;
  }
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
    p.tile = tile_of(p.Lk, wide ? 8 : 4);
    p.tiles = tiles_of(p.Lq, p.tile);
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

  // Where 16 queries have too many scores for that, 32 of them take the keys in blocks of image rows. Maps that are no sum of
  // two axes, or not all of one grid, are read whole, and so are bucket sums that are a result.
  void make_blocks() {
    const int64_t number_bytes = p.q.storage == Storage::f64 ? 8 : 4;
    if (16 * number_bytes * p.Lk <= kScoreBytes) return;
    KeyBlocks blocks{0, p.Lk, 1, 0};  // without a map
    bool first = true;
    for (const std::vector<Term>* terms : {&on_q, &on_k, &on_v}) {
      for (const Term& term : *terms) {
        const Map& map = term.map;
        if (map.kind != Map::axes || (terms == &on_v && !term.weight)) return;
        if (first) blocks = {0, map.height, map.width, map.skip};
        if (map.height != blocks.height || map.width != blocks.width || map.skip != blocks.skip) return;
        first = false;
      }
    }
    const int64_t most = kScoreBytes / (32 * number_bytes), wanted = (p.Lk + most - 1) / most;
    blocks.rows = std::max<int64_t>(1, (blocks.height + wanted - 1) / wanted);
    p.blocks = blocks;
    p.tile = 32;
    p.tiles = tiles_of(p.Lq, p.tile);
  }

  void run_forward() {
    make_blocks();
    const int64_t bytes = kernel.scratch_bytes(p);
    torch::stable::parallel_for(0, p.B * p.H * p.tiles, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      kernel.forward(p, scratch.data, begin, end);
    });
  }

  void run_backward() {
    p.backward = true;
    p.parts = parts_of(p.B * p.H, p.tiles);
    const Shares shares{p.B * p.H, p.parts, int64_t(torch::stable::get_num_threads())};
    const int64_t bytes = kernel.scratch_bytes(p), kept_bytes = kernel.kept_bytes(p);
    // what is kept of heads that several threads work on: in one piece of each thread's first parts, and of every other part
    std::vector<char*> kept(size_t(p.B * p.H * p.parts), nullptr);
    std::vector<Scratch> pieces;
    std::vector<int64_t> split;
    const auto keep = [&](int64_t at) {
      pieces.emplace_back(kept_bytes);
      kept[size_t(at)] = pieces.back().data;
    };
    for (int64_t thread = 0; thread < shares.threads; ++thread) {
      const int64_t begin = shares.begin(thread), end = shares.begin(thread + 1);
      for (int64_t at = begin; at < end; ++at) {
        const int64_t first = at / p.parts * p.parts;
        if (begin <= first && first + p.parts <= end) continue;
        if (at == first) split.push_back(at / p.parts);
        if (at == first || begin > first) keep(at);
      }
    }
    torch::stable::parallel_for(0, shares.threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t thread = from; thread < to; ++thread) {
        const int64_t begin = shares.begin(thread), end = shares.begin(thread + 1);
        if (begin == end) continue;
        const Scratch scratch(bytes);
        kernel.backward(p, scratch.data, kept.data(), begin, end);
      }
    });
    torch::stable::parallel_for(0, int64_t(split.size()), 1, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        const Scratch scratch(bytes);
        kernel.finish(p, scratch.data, kept.data(), split[size_t(n)]);
      }
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
  if (p.B * p.H > 0) call.run_forward();
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
  if (p.B * p.H > 0) call.run_backward();
  return {grad_q, grad_k, grad_v, grads_q, grads_k, grads_v};
}

// The tiles that each of `threads` threads takes in a backward of (B, H) heads and `tokens` queries and keys; `like` says
// the device.
Tensor rpe_attention_shares(Tensor like, int64_t heads, int64_t tokens, int64_t threads) {
  check(heads > 0 && tokens > 0 && threads > 0, "heads=", heads, ", tokens=", tokens, ", threads=", threads,
        "; expected at least 1");
  Problem p{};
  p.tiles = tiles_of(tokens, tile_of(tokens, 4));
  p.parts = parts_of(heads, p.tiles);
  const Shares shares{heads, p.parts, threads};
  const auto before = [&](int64_t at) { return at / p.parts * p.tiles + p.first_tile(at % p.parts); };
  Tensor counts = torch::stable::new_empty(like, {threads}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t t = 0; t < threads; ++t) to[t] = before(shares.begin(t + 1)) - before(shares.begin(t));
  return counts;
}

// The name of the instruction set that kernels take; q only says that it is asked of the CPU.
std::string rpe_isa(Tensor) { return kIsaNames[int(isa_of_attention())]; }

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CPU, m) {
  m.impl("rpe_attention", TORCH_BOX(&rpe_ops::rpe_attention));
  m.impl("rpe_attention_backward", TORCH_BOX(&rpe_ops::rpe_attention_backward));
  m.impl("rpe_attention_shares", TORCH_BOX(&rpe_ops::rpe_attention_shares));
  m.impl("rpe_isa", TORCH_BOX(&rpe_ops::rpe_isa));
}
