// What stands beside the attention kernels: side tables of all tokens, and the gradients of W.

#pragma once

#include "rpe_attention_kernels.h"

namespace rpe_ops {

constexpr int kSideTokens = kMaxWarps * kGroup;  // of a block of side_tables_kernel at a time

template <int D>
constexpr int kSideBytes = kAllPlaces * kPitch<D> + kSideTokens * (kPitch<D> > kTablePitch ? kPitch<D> : kTablePitch);

// far[b, h, l, (c, g)] = x[b, h, l] . W[:, bucket(g, c)]: a block takes every `gridDim.x / heads`-th 128 tokens of a head.
template <class T, int D>
__global__ void __launch_bounds__(32 * kMaxWarps)
side_tables_kernel(const Heads x, const Encoding e, const int heads, const int pieces, const int length,
                   const int64_t tokens, const bool skips) {
  unsigned char* W = attention_memory();
  constexpr int kBytes = kPitch<D> > kTablePitch ? kPitch<D> : kTablePitch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned char* mine = W + kAllPlaces * kPitch<D> + warp * kGroup * kBytes;
  const int h = blockIdx.x % heads;
  put_weights<T, D>(W, e, h, pieces, skips, true);
  __syncthreads();
  for (int64_t first = int64_t{blockIdx.x / heads} * kSideTokens; first < tokens;
       first += int64_t{gridDim.x / heads} * kSideTokens) {
    for (int i = lane; i < kGroup * (D / 8); i += 32) {
      const int u = i / (D / 8), piece = i % (D / 8);
      const int64_t token = first + warp * kGroup + u;
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (token < tokens && piece < pieces)
        bits = *reinterpret_cast<const uint4*>(
            static_cast<const uint16_t*>(x.data) + token / length * x.b + h * x.h + token % length * x.l + 8 * piece);
      *reinterpret_cast<uint4*>(mine + u * kPitch<D> + 16 * piece) = bits;
    }
    sync_warp();
    uint32_t rows[D / 16][4];
    take_operands<D>(rows, mine);
    sync_warp();
    put_table<T, D>(mine, rows, W);
    for (int i = lane; i < kGroup * kPlaces; i += 32) {
      const int u = i / kPlaces, piece = i % kPlaces;
      const int64_t token = first + warp * kGroup + u;
      if (token >= tokens) continue;
      const int64_t row = (token / length * heads + h) * length + token % length;
      reinterpret_cast<uint4*>(static_cast<uint16_t*>(e.far) + row * kAllPlaces)[piece] =
          *reinterpret_cast<const uint4*>(mine + u * kTablePitch + 16 * piece);
    }
    sync_warp();
  }
}

// The gradient of one W: that of W[d, bucket] is factor times the sum over tokens of x[token, d] sums[token, place].
struct TableGradient {
  Heads x;
  const void* sums;  // (B, H, L, 64)
  Encoding e;        // of W, with the strides of the gradient
  void* grad;
  float factor;
};

struct TableGradients {
  TableGradient of[3];
  int count, heads, pieces, length;
  int64_t tokens;  // of a head, over all samples
  int splits;
  bool skips;
  float* parts;  // (count, H, splits, D, 64)
};

constexpr int kStage = 2 * kGroup;  // tokens that a block of table_gradients_kernel has in shared memory at a time

template <int D>
constexpr int kGradientBytes = 2 * kStage * (kPitch<D> + kTablePitch);

// A block adds up some tokens of one head for one table; each of its D / 16 warps has 16 rows of W.
template <class T, int D>
__global__ void __launch_bounds__(2 * D) table_gradients_kernel(const TableGradients all) {
  unsigned char* shared = attention_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int split = blockIdx.x % all.splits, h = blockIdx.x / all.splits % all.heads;
  const TableGradient& one = all.of[blockIdx.x / all.splits / all.heads];
  const int64_t stages = (all.tokens + kStage - 1) / kStage, each = (stages + all.splits - 1) / all.splits;
  const int64_t begin = split * each, end = min(begin + each, stages);
  const auto fetch = [&](int64_t n) {
    unsigned char* to = shared + n % 2 * (kGradientBytes<D> / 2);
    for (int i = threadIdx.x; i < kStage * (D / 8); i += blockDim.x) {
      const int slot = i / (D / 8), piece = i % (D / 8);
      const int64_t token = n * kStage + slot;
      const bool there = token < all.tokens && piece < all.pieces;
      const int64_t at = there ? token / all.length * one.x.b + h * one.x.h + token % all.length * one.x.l + 8 * piece : 0;
      copy16(to + slot * kPitch<D> + 16 * piece, static_cast<const uint16_t*>(one.x.data) + at, there);
    }
    for (int i = threadIdx.x; i < kStage * kPlaces; i += blockDim.x) {
      const int slot = i / kPlaces, piece = i % kPlaces;
      const int64_t token = n * kStage + slot;
      const bool there = token < all.tokens;
      const int64_t row = there ? (token / all.length * all.heads + h) * all.length + token % all.length : 0;
      copy16(
          to + kStage * kPitch<D> + slot * kTablePitch + 16 * piece,
          static_cast<const uint16_t*>(one.sums) + row * kAllPlaces + 8 * piece, there);
    }
    end_copies();
  };
  float acc[kPlaces][4] = {};
  if (begin < end) fetch(begin);
  for (int64_t n = begin; n < end; ++n) {
    wait_copies<0>();
    __syncthreads();
    if (n + 1 < end) fetch(n + 1);
    const unsigned char* x = shared + n % 2 * (kGradientBytes<D> / 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = half * kGroup + lane % 8 + lane / 16 * 8;
      uint32_t rows[4];
      load_turned(rows, x + token * kPitch<D> + 32 * warp + lane / 8 % 2 * 16);
      add_slots<T, kAllPlaces>(acc, rows, x + kStage * kPitch<D> + half * kGroup * kTablePitch);
    }
  }
  float2* to = reinterpret_cast<float2*>(all.parts + (int64_t{blockIdx.x} * D + 16 * warp + lane / 4) * kAllPlaces) + lane % 4;
#pragma unroll
  for (int n = 0; n < kPlaces; ++n) {
    to[4 * n] = make_float2(acc[n][0], acc[n][1]);
    to[4 * n + 8 * kAllPlaces / 2] = make_float2(acc[n][2], acc[n][3]);
  }
}

constexpr int kFoldThreads = 256;

// Adds up the parts of a table, and the places of each bucket; a block has 4 rows of W.
template <class T, int D>
__global__ void __launch_bounds__(kFoldThreads) fold_gradients_kernel(const TableGradients all) {
  float* sums = reinterpret_cast<float*>(attention_memory());
  constexpr int kRows = kFoldThreads / kAllPlaces, kBlocks = D / kRows;
  const int place = threadIdx.x % kAllPlaces, row = threadIdx.x / kAllPlaces;
  const int d = blockIdx.x % kBlocks * kRows + row, table = blockIdx.x / kBlocks;
  const int h = table % all.heads;
  const TableGradient& one = all.of[table / all.heads];
  const float* parts = all.parts + (int64_t{table} * all.splits * D + d) * kAllPlaces + place;
  float sum = 0.0f;
  for (int split = 0; split < all.splits; ++split) sum += parts[int64_t{split} * D * kAllPlaces];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (d >= 8 * all.pieces) return;
  for (int bucket = place; bucket < one.e.buckets; bucket += kAllPlaces) {
    float total = 0.0f;
    for (int p = 0; p < kAllPlaces; ++p)
      if (bucket_of(one.e, all.skips, p) == bucket) total += sums[row * kAllPlaces + p];
    const int64_t to = h * one.e.h + d * one.e.d + bucket * one.e.n;
    if (one.e.is_float) static_cast<float*>(one.grad)[to] = total * one.factor;
    else static_cast<uint16_t*>(one.grad)[to] = static_cast<uint16_t>(pack<T>(total * one.factor, 0.0f));
  }
}

}  // namespace rpe_ops
