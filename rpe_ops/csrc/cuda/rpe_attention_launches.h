// Launches of the attention kernels of one head size: how many warps a block has, and how many blocks there are.

#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

#include "rpe_attention_run.h"

namespace rpe_ops {

template <auto kernel, class... Arguments>
void launch(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  check(blocks < int64_t{1} << 31, "rpe_attention: ", blocks, " blocks are more than a launch can have");
  if (shared_bytes > 48 * 1024) {
    // every device is asked once for as much as a block may have, and not at every launch: that takes longer than a launch
    static std::atomic<uint64_t> asked{0};
    int device = 0;
    check_cuda(cudaGetDevice(&device));
    const uint64_t bit = uint64_t{1} << device % 64;
    if (device >= 64 || !(asked.load(std::memory_order_relaxed) & bit)) {
      const int most = of_device(device).shared_bytes;
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      asked.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  check_cuda(cudaGetLastError());
}

// In how many parts the samples are taken side by side, where so many blocks are at work at a time. A block takes the
// samples of a part one after the other, and has to prepare only once; the numbers are chunks that take as long.
inline int64_t replicas_of(const Attention& a, int64_t kinds, int64_t capacity) {
  constexpr int64_t kOnce = 10, kEach = 9;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= a.batch; ++parts) {
    const int64_t waves = (kinds * parts + capacity - 1) / capacity, samples = (a.batch + parts - 1) / parts;
    const int64_t cost = waves * (kOnce + samples * (a.map.chunks + kEach));
    if (cost < least) best = parts, least = cost;
  }
  return best;
}

template <class T, int D, int On, Pass pass>
void launch_attention(const Run& run) {
  const Attention& a = run.a;
  const Uses uses = uses_of(pass, run.q, run.k, run.v);
  constexpr auto kernel = attention_kernel<T, D, On, pass>;
  static const int registers = [] {
    cudaFuncAttributes found{};
    check_cuda(cudaFuncGetAttributes(&found, kernel));
    return (found.numRegs + 7) / 8 * 8;
  }();
  // the most groups at work in a multiprocessor; of what is about the same, more warps, which read memory less often
  int warps = 0, capacity = 0;
  double best = 0;
  for (int w = std::min(kMaxWarps, a.map.groups); w > 0; --w) {
    const int bytes = layout_of<D, On, pass>(a.map, uses, w).bytes;
    if (bytes > run.device.shared_bytes || (w < 4 && best > 0)) continue;
    const int resident =
        std::min(65536 / (registers * 32 * w), (run.device.shared_bytes + 1024) / (bytes + 1024));
    const double at_work = double(resident) * w * a.map.groups / ((a.map.groups + w - 1) / w * w);
    if (at_work > best * 1.05) warps = w, best = at_work, capacity = resident * run.device.processors;
  }
  check(warps > 0, "no block of attention on a map of ", a.map.height, " x ", a.map.width, " has enough shared memory");
  const int64_t kinds = run.heads * ((a.map.groups + warps - 1) / warps);
  launch<kernel>(
      kinds * replicas_of(a, kinds, capacity), 32 * warps, layout_of<D, On, pass>(a.map, uses, warps).bytes, run.stream,
      a);
}

// Encodings on keys alone, and for the usual head size on all three, have kernels of their own.
template <class T, int D, Pass pass>
void attend_with(const Run& run) {
  if (run.k && !run.q && !run.v) return launch_attention<T, D, 2, pass>(run);
  if constexpr (D == 64)
    if (run.q && run.k && run.v) return launch_attention<T, D, 7, pass>(run);
  launch_attention<T, D, 8, pass>(run);
}

template <class T, int D>
void attend(const Run& run, Pass pass) {
  switch (pass) {
    case Pass::kForward: return attend_with<T, D, Pass::kForward>(run);
    case Pass::kQueries: return attend_with<T, D, Pass::kQueries>(run);
    case Pass::kKeys: return attend_with<T, D, Pass::kKeys>(run);
  }
}

template <class T, int D>
void side_tables(const Run& run) {
  const Attention& a = run.a;
  const int64_t all = (run.tokens + kSideTokens - 1) / kSideTokens;
  const int64_t blocks = std::min(all, (4 * run.device.processors + run.heads - 1) / run.heads);
  launch<side_tables_kernel<T, D>>(
      blocks * run.heads, 32 * kMaxWarps, kSideBytes<D>, run.stream, a.k, a.on_q, a.heads, a.head_pieces, int(run.length),
      run.tokens, a.map.skip > 0);
}

template <class T, int D>
void table_gradients(const TableGradients& all, cudaStream_t stream) {
  const int64_t tables = int64_t{all.count} * all.heads;
  launch<table_gradients_kernel<T, D>>(tables * all.splits, 2 * D, kGradientBytes<D>, stream, all);
  launch<fold_gradients_kernel<T, D>>(
      tables * (D * kAllPlaces / kFoldThreads), kFoldThreads, kFoldThreads * 4, stream, all);
}

#define RPE_OPS_LAUNCHES(T, D)                                    \
  template void attend<T, D>(const Run&, Pass);                   \
  template void side_tables<T, D>(const Run&);                    \
  template void table_gradients<T, D>(const TableGradients&, cudaStream_t);

}  // namespace rpe_ops
