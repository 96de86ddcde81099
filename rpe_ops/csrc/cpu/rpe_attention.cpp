// rpe_attention on a CPU: forward and backward of attention with encodings on queries, keys and values.
//
// A thread takes tiles: a few queries of one head against all keys. The tile's scores stay in its caches; nothing of size
// Lq x Lk is written. The backward computes them again from the logarithm of the softmax's denominators, and one thread
// does all tiles of a head, so every sum has one order, whatever the number of threads.

#include "rpe_attention.h"

#include "../check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

// The instruction set is chosen at run time. Only gcc takes target pragmas; others get what their flags say.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RPE_ATTENTION_X86
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never leave this file
#endif

#define RPE_ISA plain
#define RPE_BYTES 16
#include "rpe_attention_tile.h"
#undef RPE_ISA
#undef RPE_BYTES

#ifdef RPE_ATTENTION_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define RPE_ISA avx2
#define RPE_BYTES 32
#include "rpe_attention_tile.h"
#undef RPE_ISA
#undef RPE_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define RPE_AVX512
#define RPE_ISA avx512
#define RPE_BYTES 64
#include "rpe_attention_tile.h"
#undef RPE_ISA
#undef RPE_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define RPE_BRAIN
#define RPE_ISA avx512_bf16
#define RPE_BYTES 64
#include "rpe_attention_tile.h"
#undef RPE_BRAIN
#undef RPE_AVX512
#undef RPE_ISA
#undef RPE_BYTES
#pragma GCC pop_options
#endif

namespace rpe_ops {
namespace {

// ---- raw pointers and sizes

struct Kernels {
  int64_t (*scratch_bytes)(const Problem&);
  void (*forward)(const Problem&, char*, int64_t, int64_t);
  void (*backward)(const Problem&, char*, int64_t, int64_t);
  int64_t width;  // of a vector, in elements
};

// The instruction sets of x86 that this machine has, as far as RPE_OPS_CPU_ISA allows them: tests try each.
struct Supported {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
};

Supported supported() {
  Supported has;
#ifdef RPE_ATTENTION_X86
  const char* wish = std::getenv("RPE_OPS_CPU_ISA");
  const std::string most = wish == nullptr ? "avx512_bf16" : wish;
  has.avx2 = most != "plain" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  has.avx512 = (most == "avx512" || most == "avx512_bf16") && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
  has.avx512_bf16 = has.avx512 && most == "avx512_bf16" && __builtin_cpu_supports("avx512bf16");
#endif
  return has;
}

// of the instruction set NAME, with the products X
#define RPE_KERNELS(NAME, X, WIDTH) \
  Kernels { &NAME::scratch_bytes<NAME::X>, &NAME::forward<NAME::X>, &NAME::backward<NAME::X>, int64_t(WIDTH) }

template <class T>
Kernels kernels(Storage storage) {
#ifdef RPE_ATTENTION_X86
  const Supported has = supported();
  if (has.avx512_bf16 && storage == Storage::bf16) return RPE_KERNELS(avx512_bf16, Brain, 16);
  if (has.avx512) return RPE_KERNELS(avx512, Exact<T>, 64 / sizeof(T));
  if (has.avx2) return RPE_KERNELS(avx2, Exact<T>, 32 / sizeof(T));
#endif
  return RPE_KERNELS(plain, Exact<T>, 16 / sizeof(T));
}

#undef RPE_KERNELS

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

// A plan's columns begin with: how many occur, then first, segments and length of `Term`.
constexpr int64_t kHeader = 4;

int64_t most_segments(int64_t cols) { return std::min<int64_t>(255, cols / 4); }

// The segments of a row of ids in order of their groups, then the groups' sizes; returns the number of groups,
// or `most` when there are as many.
int64_t group(const uint8_t* ids, int64_t first, int64_t segments, int64_t length, int64_t most, uint8_t* to) {
  int64_t representatives[256], group_of[256], sizes[256], groups = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* here = ids + first + s * length;
    int64_t g = 0;
    while (g < groups && std::memcmp(here, ids + first + representatives[g] * length, size_t(length)) != 0) ++g;
    if (g == groups) {
      if (groups + 1 >= most) return most;
      representatives[groups] = s;
      sizes[groups++] = 0;
    }
    group_of[s] = g;
    ++sizes[g];
  }
  if (to != nullptr) {
    for (int64_t g = 0, at = 0; g < groups; ++g) {
      for (int64_t s = 0; s < segments; ++s) {
        if (group_of[s] == g) to[at++] = uint8_t(s);
      }
    }
    for (int64_t g = 0; g < segments; ++g) to[segments + g] = uint8_t(g < groups ? sizes[g] : 0);
  }
  return groups;
}

// The segments that leave the least to sort, judged by a few rows.
void find_segments(const uint8_t* ids, int64_t stride, int64_t rows, int64_t cols, int32_t* header, uint8_t* groups) {
  double least = 0.8 * double(cols);
  for (int64_t first = 0; first <= std::min<int64_t>(8, cols); ++first) {
    for (int64_t length = 4; length <= std::min<int64_t>(255, (cols - first) / 2); ++length) {
      const int64_t segments = (cols - first) / length;
      if (segments * length != cols - first || segments > most_segments(cols)) continue;
      double cost = 0;
      for (const int64_t i : {rows / 3, rows / 2, rows - 1}) {
        const int64_t most = int64_t(3 * least) / length + 2;
        const int64_t count = group(ids + i * stride, first, segments, length, most, nullptr);
        // a sum of vectors costs as much as sorting two numbers, and a group has to be begun
        cost += double(first + count * (length + 8) + 2 * segments * ((length + 15) / 16)) / 3;
        if (cost >= least) break;
      }
      if (cost < least) {
        least = cost;
        header[1] = int32_t(first), header[2] = int32_t(segments), header[3] = int32_t(length);
      }
    }
  }
  for (int64_t i = 0; header[2] > 0 && i < rows; ++i) {
    group(ids + i * stride, header[1], header[2], header[3], 256, groups + i * 2 * most_segments(cols));
  }
}

// A plan is checked as any input is: a call of the bare operator reads nothing outside its tensors.
Term term_of(
    const Tensor& ids, const Tensor& columns, const Tensor& groups, int64_t rows, int64_t cols, bool blocks,
    int64_t vector, const char* name) {
  Term term;
  term.narrow = ids.scalar_type() == ScalarType::Byte;
  check(term.narrow || ids.scalar_type() == ScalarType::Int, name, ": ids of a plan are uint8 or int32");
  check(columns.scalar_type() == ScalarType::Int && columns.dim() == 1 && columns.numel() >= kHeader &&
            columns.is_contiguous() && ids.is_contiguous() && groups.is_contiguous() &&
            groups.scalar_type() == ScalarType::Byte,
        name, ": not a plan of rpe_attention_plan");
  if (blocks) {
    check_size(ids, name, {round_up(cols, 16) / 16, rows, 16});
  } else {
    check_size(ids, name, {rows, round_up(cols, 16)});
  }
  term.ids = ids.const_data_ptr();
  term.ids_stride = round_up(cols, 16);
  const int32_t* column = static_cast<const int32_t*>(columns.const_data_ptr());
  term.buckets = columns.numel() - kHeader;
  term.used = column[0];
  term.columns = column + kHeader;
  vector = std::max<int64_t>(vector, 8);
  term.width = std::max(round_up(term.used, vector), vector);
  bool sound = term.used >= 0 && term.used <= term.buckets;
  for (int64_t c = 0; sound && c < term.used; ++c) sound = term.columns[c] >= 0 && term.columns[c] < term.buckets;
  check(sound, name, ": not a plan of rpe_attention_plan");
  if (!blocks && column[2] > 0) {
    term.first = column[1], term.segments = column[2], term.length = column[3];
    check_size(groups, name, {rows, 2 * most_segments(cols)});
    term.groups = static_cast<const uint8_t*>(groups.const_data_ptr());
    term.groups_stride = 2 * most_segments(cols);
    sound = term.narrow && term.first >= 0 && term.length > 0 && term.length < 256 &&
            term.segments <= most_segments(cols) && term.first + term.segments * term.length == cols;
    for (int64_t i = 0; sound && i < rows; ++i) {
      const uint8_t* row = term.groups + i * term.groups_stride;
      uint8_t last = 0;
      for (int64_t s = 0; s < term.segments; ++s) last = std::max(last, row[s]);
      int64_t total = 0;
      for (int64_t s = 0; s < term.segments && total < term.segments && row[term.segments + s] > 0; ++s) {
        total += row[term.segments + s];
      }
      sound = last < term.segments && total == term.segments;
    }
    check(sound, name, ": not a plan of rpe_attention_plan");
  }
  const int64_t count = ids.numel();
  const auto within = [&](const auto* id) {
    std::remove_cv_t<std::remove_pointer_t<decltype(id)>> low = 0, high = 0;
    for (int64_t n = 0; n < count; ++n) {
      low = std::min(low, id[n]);
      high = std::max(high, id[n]);
    }
    check(count == 0 || (low >= 0 && high < term.used), name, ": not a plan of rpe_attention_plan");
  };
  if (term.narrow) {
    within(static_cast<const uint8_t*>(term.ids));
  } else {
    within(static_cast<const int32_t*>(term.ids));
  }
  return term;
}

using Tensors = std::vector<Tensor>;

// What forward and backward share.
struct Call {
  Problem p{};
  std::vector<Term> on_q, on_k, on_v;
  Kernels kernel{};
  Tensor seed;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensors& tables_q, const Tensors& tables_k,
       const Tensors& tables_v, const Tensors& plan_q, const Tensors& plan_k, const Tensors& plan_v, const std::optional<Tensor>& attn_mask,
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
    kernel = wide ? kernels<double>(p.q.storage) : kernels<float>(p.q.storage);
    terms(on_q, plan_q, &tables_q, p.Lk, p.Lq, "encoding on q");
    terms(on_k, plan_k, &tables_k, p.Lq, p.Lk, "encoding on k");
    terms(on_v, plan_v, tables_v.empty() ? nullptr : &tables_v, p.Lq, p.Lk, "encoding on v");
    p.on_q = on_q.data(), p.on_k = on_k.data(), p.on_v = on_v.data();
    p.num_q = int64_t(on_q.size()), p.num_k = int64_t(on_k.size()), p.num_v = int64_t(on_v.size());
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

  void terms(std::vector<Term>& to, const Tensors& plans, const Tensors* tables, int64_t rows, int64_t cols,
             const char* name) {
    check(plans.size() % 3 == 0 && (tables == nullptr || tables->size() * 3 == plans.size()), name,
          ": a plan is three tensors, and every table has one");
    for (size_t t = 0; t * 3 < plans.size(); ++t) {
      Term term = term_of(
          plans[3 * t], plans[3 * t + 1], plans[3 * t + 2], rows, cols, &to == &on_q, kernel.width, name);
      if (tables != nullptr) {
        const Tensor& table = (*tables)[t];
        term.weight = table.dim() == 3;
        if (term.weight) {
          const bool on_values = &to == &on_v;
          check_size(table, name, {p.H, on_values ? term.buckets : p.D, on_values ? p.D : term.buckets});
          term.table = {static_cast<char*>(table.data_ptr()), 0, table.stride(0), table.stride(1), table.stride(2),
                        storage_of(table, name)};
        } else {
          check(&to != &on_v, name, ": expected W, of 3 dimensions");
          check_size(table, name, {p.B, p.H, rows, term.buckets});
          term.table = view_of(table, name);
        }
        check(term.table.storage != Storage::boolean, name, ": the table is bool; expected floating point");
      }
      to.push_back(term);
    }
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
    Tensor q, Tensor k, Tensor v, Tensors tables_q, Tensors tables_k, Tensors tables_v, Tensors plan_q, Tensors plan_k,
    Tensors plan_v, std::optional<Tensor> attn_mask, std::optional<Tensor> seed, double scale, double dropout_p) {
  Call call(q, k, v, tables_q, tables_k, tables_v, plan_q, plan_k, plan_v, attn_mask, seed, scale, dropout_p);
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
    Tensors tables_v, Tensors plan_q, Tensors plan_k, Tensors plan_v, std::optional<Tensor> attn_mask,
    std::optional<Tensor> seed, double scale, double dropout_p) {
  Call call(q, k, v, tables_q, tables_k, tables_v, plan_q, plan_k, plan_v, attn_mask, seed, scale, dropout_p);
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

// ids (R, C) -> ids among the columns that occur, uint8 where N allows, in rows padded to 16 or, for an encoding on
// queries, in blocks (C / 16, R, 16); [header..., columns that occur...]; and the groups of segments of each row
std::tuple<Tensor, Tensor, Tensor> rpe_attention_plan(Tensor ids, int64_t num_buckets, bool blocks) {
  check(ids.dim() == 2, "ids have shape ", shape_of(ids), "; expected (Lq, Lk)");
  check(num_buckets >= 0 && num_buckets < int64_t(1) << 31, "num_buckets=", num_buckets, "; expected below 2^31");
  const int64_t rows = ids.size(0), cols = ids.size(1), stride = round_up(cols, 16);
  const auto type = num_buckets <= 256 ? ScalarType::Byte : ScalarType::Int;
  Tensor compact = blocks ? torch::stable::new_zeros(ids, {stride / 16, rows, 16}, type)
                          : torch::stable::new_zeros(ids, {rows, stride}, type);
  Tensor columns = torch::stable::new_zeros(ids, {num_buckets + kHeader}, ScalarType::Int);
  Tensor groups = torch::stable::new_zeros(ids, {blocks ? 0 : rows, 2 * most_segments(cols)}, ScalarType::Byte);
  int32_t* column = static_cast<int32_t*>(columns.mutable_data_ptr());
  const auto plan = [&](auto zero) {
    using Id = decltype(zero);
    const Id* from = static_cast<const Id*>(ids.const_data_ptr());
    const int64_t row = ids.stride(0), step = ids.stride(1);
    std::vector<int32_t> compact_of(size_t(num_buckets), 0);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t id = int64_t(from[i * row + j * step]);
        check_in_table(id, id, num_buckets);
        compact_of[size_t(id)] = 1;
      }
    }
    int32_t count = 0;
    for (int64_t n = 0; n < num_buckets; ++n) {
      if (compact_of[size_t(n)] != 0) {
        compact_of[size_t(n)] = count++;
        column[kHeader + count - 1] = int32_t(n);
      }
    }
    column[0] = count;
    const auto write = [&](auto* to) {
      using Out = std::remove_pointer_t<decltype(to)>;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          const int64_t at = blocks ? (j / 16 * rows + i) * 16 + j % 16 : i * stride + j;
          to[at] = Out(compact_of[size_t(from[i * row + j * step])]);
        }
      }
    };
    if (type == ScalarType::Byte) {
      write(static_cast<uint8_t*>(compact.mutable_data_ptr()));
    } else {
      write(static_cast<int32_t*>(compact.mutable_data_ptr()));
    }
  };
  switch (ids.scalar_type()) {
    case ScalarType::Byte: plan(uint8_t{}); break;
    case ScalarType::Short: plan(int16_t{}); break;
    case ScalarType::Int: plan(int32_t{}); break;
    case ScalarType::Long: plan(int64_t{}); break;
    default: check(false, "ids are neither uint8, int16, int32 nor int64");
  }
  if (!blocks && type == ScalarType::Byte && compact.numel() > 0) {
    find_segments(
        static_cast<const uint8_t*>(compact.const_data_ptr()), stride, rows, cols, column,
        static_cast<uint8_t*>(groups.mutable_data_ptr()));
  }
  return {compact, columns, groups};
}

// Whether products of such a q are products of bfloat16.
bool rpe_attention_in_bfloat16(Tensor q) {
  return q.scalar_type() == ScalarType::BFloat16 && supported().avx512_bf16;
}

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CPU, m) {
  m.impl("rpe_attention", TORCH_BOX(&rpe_ops::rpe_attention));
  m.impl("rpe_attention_backward", TORCH_BOX(&rpe_ops::rpe_attention_backward));
  m.impl("rpe_attention_plan", TORCH_BOX(&rpe_ops::rpe_attention_plan));
  m.impl("rpe_attention_in_bfloat16", TORCH_BOX(&rpe_ops::rpe_attention_in_bfloat16));
}
