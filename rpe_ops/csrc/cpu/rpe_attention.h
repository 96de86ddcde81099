// What the tile kernels of rpe_attention are told: raw pointers, sizes and strides (in elements), nothing of torch.

#pragma once

#include <cstdint>

namespace rpe_ops {

enum class Storage : int { f32, f64, bf16, f16, boolean };

// A (B, H, L, D) tensor of any strides.
struct View {
  char* data = nullptr;
  int64_t b = 0, h = 0, l = 0, d = 0;
  Storage storage = Storage::f32;
};

// One side table with its ids, or the weight W that it is a product with: then neither the table nor its gradient is ever
// in memory. `ids` are compact: columns that the map never uses have none. On keys and values they are
// rows, each of a query, padded to `ids_stride` with zeros; on queries blocks (Lq / 16, Lk, 16), as tiles read them.
//
// A row of a map of tokens has few kinds of image rows: far ones are alike. Where that is so, the keys are `first` single
// ones and `segments` of `length` each, and `groups` tells for each query which segments have the same ids: their weights
// are added as vectors before they are sorted into buckets. A row of `groups` is the segments in order of their groups,
// then the sizes of the groups, 0 behind the last.
struct Term {
  View table;               // side table; on values the gradient of the bucket sums; or W, (H, D, N), on values (H, N, D)
  View result;              // its gradient; on values the bucket sums; or the gradient of W, for each (b, h)
  bool weight = false;      // `table` is W
  const void* ids = nullptr;
  int64_t ids_stride = 0;
  bool narrow = true;       // ids are uint8, else int32
  const int32_t* columns = nullptr;  // compact id -> column of the table
  int64_t used = 0;         // number of compact ids
  int64_t buckets = 0;      // number of columns
  int64_t width = 0;        // `used`, padded to whole vectors and to 8
  int64_t first = 0, segments = 0, length = 0;
  const uint8_t* groups = nullptr;
  int64_t groups_stride = 0;
};

struct Problem {
  int64_t B, H, Lq, Lk, D;
  View q, k, v, out, mask;  // mask: strides 0 where it broadcasts, data null where there is none
  View grad_out, grad_q, grad_k, grad_v;
  Term *on_q, *on_k, *on_v;
  int64_t num_q, num_k, num_v;
  bool backward;
  void* lse;                // (B, H, Lq), float, double for float64
  double scale;
  double dropout_p;
  uint64_t seed;

  int64_t tile;             // queries in a tile, a multiple of 16
  int64_t tiles;            // ceil(Lq / tile)
};

template <int n>
struct Count {
  static constexpr int value = n;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace rpe_ops
