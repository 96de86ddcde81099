// Attention with relative position encodings on a GPU's matrix units, forward and backward, for maps that factor.
//
//   s[i, j] = scale (q[i] . (k[j] + Wk[:, ids_k[i, j]]) + k[j] . Wq[:, ids_q[j, i]])
//   out[i]  = sum over j of p[i, j] (v[j] + Wv[ids_v[i, j]]),  p = softmax(s)
//
// The bucket of an offset is rows[dr] + columns[dc]. Encodings have 64 places, 8 rows of 8: place (g, c) is that bucket,
// and places of row 7 or column 7 are those of skip tokens where there are any.
//
// A warp has a group of 16 tokens of one image column ("its rows"), and takes the other tokens in chunks of 16 of one
// image row. With g = rows[r - r'] for each of its rows, and P[c, slot] = 1 where columns[...] of a slot is c, the same
// for every image row:
//
//   near table, of its rows:   bias[i, slot] = sum over c of table[i, g(i), c] P[c, slot]     one product of inner size 8
//   far table, of the slots:   bias[i, slot] = sum over g of [g(i) = g] table[slot, c(slot), g]   the same
//   bucket sums of its rows:   sums[i, g(i), c] += sum over slots of x[i, slot] P[c, slot]
//
// Each warp alone writes its rows and their sums, in the order of image rows: no atomics, every run the same bits.
//
// Tokens in front of the map (skip) take the rows and slots that image columns and rows leave free, then groups and
// chunks of their own.

#pragma once

#include <cstdint>

#include "warp.h"

namespace rpe_ops {

constexpr int kPlaces = 8;
constexpr int kAllPlaces = kPlaces * kPlaces;
constexpr int kGroup = 16;           // tokens of a warp, and of a chunk
constexpr int kMaxWarps = 8;
constexpr int kTablePitch = 2 * kAllPlaces + 16;  // bytes from row to row: 16 more, so that 8 rows lie in 32 banks
constexpr int kSumsPitch = kAllPlaces + 8;        // floats
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
// A row's numbers are 2^(s - top), and top follows the largest s only when it is left behind by this much.
constexpr float kSlack = 8.0f;

template <int D>
constexpr int kPitch = 2 * D + 16;

// (B, H, L, D), strides in numbers, the last is 1.
struct Heads {
  void* data;
  int64_t b, h;
  int l;  // a head's numbers are counted in 32 bits
};

struct Encoding {
  const int32_t* axes;  // 2 height - 1 multiples of columns, 2 width - 1 numbers below it; null where there is none
  const void* weights;  // W
  bool is_float;        // W's numbers are float, not those of q
  int64_t h, d, n;      // strides of W
  int rows, columns, buckets;
  void* far;   // (B, H, L, 64), places turned: the table of each token, for the warps that have others
  void* sums;  // (B, H, L, 64): bucket sums
};

struct Geometry {
  int height, width, skip, length;
  int up, free_rows, groups;                // groups of an image column, rows left free by one, groups of a head
  int across, free_slots, rows_end, chunks; // chunks of an image row, slots left free by one, chunks of the map, of a head
};

inline Geometry geometry_of(int height, int width, int skip) {
  Geometry g{};
  g.height = height, g.width = width, g.skip = skip, g.length = skip + height * width;
  const auto more = [&](int free) { return skip > free ? (skip - free + kGroup - 1) / kGroup : 0; };
  g.up = (height + kGroup - 1) / kGroup;
  g.free_rows = g.up * kGroup - height;
  g.groups = g.up * width + more(g.free_rows * width);
  g.across = (width + kGroup - 1) / kGroup;
  g.free_slots = g.across * kGroup - width;
  g.rows_end = g.across * height;
  g.chunks = g.rows_end + more(g.free_slots * height);
  return g;
}

struct Attention {
  Geometry map;
  int batch, heads, head_pieces;  // B, H, and D in pieces of 8
  float scale;
  Encoding on_q, on_k, on_v;
  Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float *lse, *delta;  // (B, H, L)
};

// What a block has in shared memory, in bytes from its beginning.
struct Layout {
  int stages, weights, axes, chunks, warps, warp_bytes, places, classes, tokens, sums, tables, bytes;
};

enum class Pass { kForward, kQueries, kKeys };

// Chunks that a block has in shared memory at a time, as many are on their way: 4 where that leaves room for two blocks.
template <Pass pass, int On>
constexpr int kChunksOfStage = On == 2 && pass == Pass::kForward ? 4 : 2;

// Encodings whose tables are of the warp's rows (near), whose sums it adds up, and whose tables are of the slots (far).
struct Uses {
  bool near_k, near_v, near_q, far_q, far_k, far_v, sum_k, sum_q, sum_v;
  __host__ __device__ int nears() const { return near_k + near_v + near_q; }
  __host__ __device__ int fars() const { return far_q + far_k + far_v; }
  __host__ __device__ int sums() const { return sum_k + sum_q + sum_v; }
};

__host__ __device__ inline Uses uses_of(Pass pass, bool q, bool k, bool v) {
  Uses u{};
  if (pass == Pass::kKeys) {
    u.near_q = u.sum_q = q, u.far_k = k, u.far_v = v;
  } else {
    u.near_k = k, u.far_q = q;
    if (pass == Pass::kForward) u.sum_v = v;
    else u.near_v = v, u.sum_k = k;
  }
  return u;
}

// Of an encoding: rows[difference], as often the row of skip tokens, columns[difference].
__host__ __device__ inline int axes_bytes(const Geometry& map) { return 2 * (2 * map.height - 1) + 2 * map.width - 1; }

template <int D, int On, Pass pass>
__host__ __device__ inline Layout layout_of(const Geometry& map, const Uses& u, int warps) {
  Layout l{};
  const auto whole = [](int bytes) { return (bytes + 15) / 16 * 16; };
  constexpr int kChunks = kChunksOfStage<pass, On>;
  const int stage = kChunks * kGroup * (2 * kPitch<D> + u.fars() * kTablePitch + 8);
  l.stages = 0;
  l.weights = 2 * stage;
  const int weights = u.near_k + u.near_v + u.near_q + u.sum_v;  // W of each, staged once
  l.chunks = l.weights + weights * kAllPlaces * kPitch<D>;
  l.axes = l.chunks + (map.chunks + kChunks - 1) / kChunks * kChunks * 16;
  l.warps = l.axes + whole(3 * axes_bytes(map));
  // of a warp: rows or near tables, sums, P of near tables and of sums, classes of far tables
  constexpr int kRows = kGroup * (kPitch<D> > kTablePitch ? kPitch<D> : kTablePitch);
  l.tables = 0;
  const int tables = u.nears() > 1 ? 2 : 1;
  l.sums = tables * kRows;
  l.places = l.sums + u.sums() * kGroup * kSumsPitch * 4;
  l.classes = l.places + (u.nears() + u.sums()) * (map.across + 1) * 32 * 8;
  l.tokens = whole(l.classes + u.fars() * (map.across + 1) * kGroup);
  l.warp_bytes = l.tokens + kGroup * 4;
  l.bytes = l.warps + warps * l.warp_bytes;
  return l;
}

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* attention_memory() {
  extern __shared__ __align__(16) unsigned char attention_bytes[];
  return attention_bytes;
}
#else
inline unsigned char* attention_memory() { return shared_memory(); }
#endif

// Of a chunk: the image row, which of its chunks it is (`across` of the geometry: none of the map), a bit for each slot
// that has a token, and how to find that: slots below `of_map` from `token`, the others, of skip tokens, from `skip`.
struct Chunk {
  int row, across, token, skip, of_map;
  uint32_t there;

  __device__ uint4 packed() const {
    return make_uint4(token, skip, there | of_map << 16, row | across << 16);
  }
  __device__ static Chunk unpacked(const uint4& x) {
    return {static_cast<int>(x.w & 0xffff), static_cast<int>(x.w >> 16), static_cast<int>(x.x), static_cast<int>(x.y),
            static_cast<int>(x.z >> 16), x.z & 0xffff};
  }
  // -1 where there is none.
  __device__ int token_of(int slot) const {
    return there >> slot & 1 ? (slot < of_map ? token : skip) + slot : -1;
  }
};

// The bucket of a place of 64, -1 where there is none.
__host__ __device__ inline int bucket_of(const Encoding& e, bool skips, int place) {
  const int row = place / kPlaces, column = place % kPlaces, bucket = row * e.columns + column;
  if (row < e.rows && column < e.columns && bucket < e.buckets - skips) return bucket;
  return skips ? e.buckets - 1 : -1;
}

// A tile of 16 rows and 16 slots: tile += rows x slots^T; slots (16, D) in shared memory.
template <class T, int D>
__device__ __forceinline__ void multiply_slots(
    float (&tile)[2][4], const uint32_t (&x)[D / 16][4], const unsigned char* slots) {
  const int lane = threadIdx.x % 32;
  const unsigned char* row = slots + (lane % 8 + lane / 16 * 8) * kPitch<D> + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t r[4];
    load_matrices(r, row + 32 * step);
    multiply16<T>(tile[0], x[step], r[0], r[1]);
    multiply16<T>(tile[1], x[step], r[2], r[3]);
  }
}

// sum += x slots; x (16, 16), slots (16, D) in shared memory.
template <class T, int D>
__device__ __forceinline__ void add_slots(float (&sum)[D / 8][4], const uint32_t (&x)[4], const unsigned char* slots) {
  const int lane = threadIdx.x % 32;
  const unsigned char* row = slots + lane % 16 * kPitch<D> + lane / 16 * 16;
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t r[4];
    load_turned(r, row + 32 * n);
    multiply16<T>(sum[2 * n], x, r[0], r[1]);
    multiply16<T>(sum[2 * n + 1], x, r[2], r[3]);
  }
}

// W of a head with its buckets in their places, (64, D), by a whole block; turned: place (g, c) is where (c, g) was.
template <class T, int D>
__device__ void put_weights(unsigned char* to, const Encoding& e, int h, int pieces, bool skips, bool turned) {
  constexpr int kBatch = 8;  // loads on their way together
  for (int first = threadIdx.x; first < kAllPlaces * D; first += kBatch * blockDim.x) {
    float x[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int i = first + n * blockDim.x, place = i % kAllPlaces, d = i / kAllPlaces;
      const int bucket = bucket_of(e, skips, turned ? place % kPlaces * kPlaces + place / kPlaces : place);
      x[n] = 0.0f;
      if (bucket >= 0 && d < 8 * pieces) {
        const int64_t from = h * e.h + d * e.d + bucket * e.n;
        if (e.is_float) x[n] = static_cast<const float*>(e.weights)[from];
        else x[n] = unpack<T>(static_cast<const uint16_t*>(e.weights)[from]).x;
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int i = first + n * blockDim.x, place = i % kAllPlaces, d = i / kAllPlaces;
      if (i < kAllPlaces * D)
        *reinterpret_cast<uint16_t*>(to + place * kPitch<D> + 2 * d) = static_cast<uint16_t>(pack<T>(x[n], 0.0f));
    }
  }
}

// 16 rows times W, (64, D), to 16 rows of 64 places; for one warp.
template <class T, int D>
__device__ void put_table(unsigned char* to, const uint32_t (&x)[D / 16][4], const unsigned char* W) {
  const int part = threadIdx.x % 4, line = threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < kAllPlaces / 16; ++n) {
    float tile[2][4] = {};
    multiply_slots<T, D>(tile, x, W + n * 16 * kPitch<D>);
    uint32_t* low = reinterpret_cast<uint32_t*>(to + line * kTablePitch + 32 * n) + part;
    uint32_t* high = low + 8 * kTablePitch / 4;
    low[0] = pack<T>(tile[0][0], tile[0][1]), low[4] = pack<T>(tile[1][0], tile[1][1]);
    high[0] = pack<T>(tile[0][2], tile[0][3]), high[4] = pack<T>(tile[1][2], tile[1][3]);
  }
  sync_warp();
}

// 16 rows of D in shared memory as operands, for one warp.
template <int D>
__device__ __forceinline__ void take_operands(uint32_t (&to)[D / 16][4], const unsigned char* rows) {
  const int lane = threadIdx.x % 32;
  const unsigned char* row = rows + lane % 16 * kPitch<D> + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) load_matrices(to[step], row + 32 * step);
}

// One warp of a block, and what it does in all three kernels. `On` has a bit for each of q, k, v; 8 reads it at run time.
template <class T, int D, int On, Pass pass>
struct Warp {
  static constexpr int kPieces = D / 8, kSteps = D / 16, kChunks = kChunksOfStage<pass, On>, kStage = kChunks * kGroup;
  using Rows = uint32_t[kSteps][4];   // A operands of the 16 rows
  using Wide = float[D / 8][4];       // 16 rows of D sums
  using Tile = float[2][4];           // 16 rows, 16 slots

  // Bucket sums of the image row at hand, which go to their row of places when the next one begins.
  struct Total {
    float x[4];
    int row;
  };

  const Attention& a;
  const Geometry& map;
  const Uses use;
  const Layout at;
  unsigned char *shared, *mine;
  int lane, part, line;  // part of four lanes, line of eight
  int h, group, column;
  int first, step;    // of the samples that the block takes, one after the other
  int b;              // the one at hand
  int64_t head;       // b * H + h
  int near_row, near_low, near_high, far_low, far_high;  // into rows(): of lane % 16, line and line + 8

  __device__ static Uses uses(const Attention& a) {
    if constexpr (On < 8) return uses_of(pass, On & 1, On & 2, On & 4);
    return uses_of(pass, a.on_q.axes != nullptr, a.on_k.axes != nullptr, a.on_v.axes != nullptr);
  }

  __device__ explicit Warp(const Attention& attention)
      : a(attention), map(attention.map), use(uses(attention)),
        at(layout_of<D, On, pass>(attention.map, use, blockDim.x / 32)), shared(attention_memory()) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const int blocks = (map.groups + warps - 1) / warps;
    h = blockIdx.x / blocks % a.heads;
    first = blockIdx.x / (blocks * a.heads), step = gridDim.x / (blocks * a.heads);
    group = blockIdx.x % blocks * warps + warp;
    lane = threadIdx.x % 32, part = lane % 4, line = lane / 4;
    mine = shared + at.warps + warp * at.warp_bytes;
    const bool is_map = group < map.up * map.width;
    column = is_map ? group / map.up : 0;
    const auto row_of = [&](int u) {
      const int row = group % map.up * kGroup + u;
      return is_map && row < map.height ? row : -1;
    };
    const int differences = 2 * map.height - 1, middle = map.height - 1;
    const auto near = [&](int row) { return row < 0 ? differences + middle : row + middle; };
    const auto far = [&](int row) { return row < 0 ? differences : middle - row; };
    near_row = near(row_of(lane % kGroup));
    near_low = near(row_of(line)), near_high = near(row_of(line + 8));
    far_low = far(row_of(line)), far_high = far(row_of(line + 8));
  }

  // --- tokens ---

  __device__ int find_token(int u) const {
    const int of_map = map.up * map.width;
    int skip = map.free_rows * map.width + (group - of_map) * kGroup + u;
    if (group < of_map) {
      const int row = group % map.up * kGroup + u;
      if (row < map.height) return map.skip + row * map.width + column;
      skip = column * map.free_rows + row - map.height;
    }
    return group < map.groups && skip < map.skip ? skip : -1;
  }

  __device__ int& token_of_row(int u) const { return reinterpret_cast<int*>(mine + at.tokens)[u]; }

  // Every chunk of the head, to shared memory.
  __device__ void put_chunks() const {
    const auto bits = [](int count) { return count <= 0 ? 0u : (1u << min(count, kGroup)) - 1; };
    for (int n = threadIdx.x; n < kChunks * stages(); n += blockDim.x) {
      Chunk c{};
      if (n < map.rows_end) {
        c.row = n / map.across, c.across = n % map.across;
        const int x = c.across * kGroup;
        c.of_map = min(map.width - x, kGroup);
        c.token = map.skip + c.row * map.width + x;
        c.skip = c.row * map.free_slots - c.of_map;
        c.there = bits(c.of_map);
        if (c.across == map.across - 1)
          c.there |= bits(min(map.skip - c.row * map.free_slots, map.free_slots)) << c.of_map;
      } else {
        c.across = map.across;
        c.skip = map.free_slots * map.height + (n - map.rows_end) * kGroup;
        c.there = bits(map.skip - c.skip);
      }
      chunks()[n] = c.packed();
    }
  }

  // --- shared memory ---

  __device__ unsigned char* stage(int n) const {
    return shared + at.stages + n % 2 * ((at.weights - at.stages) / 2);
  }
  __device__ unsigned char* far_of(int n, int far) const {
    return stage(n) + kStage * (2 * kPitch<D> + far * kTablePitch);
  }
  __device__ float* of_slots(int n) const { return reinterpret_cast<float*>(far_of(n, use.fars())); }
  __device__ unsigned char* weights(int n) const { return shared + at.weights + n * kAllPlaces * kPitch<D>; }
  __device__ uint4* chunks() const { return reinterpret_cast<uint4*>(shared + at.chunks); }
  __device__ unsigned char* rows(int encoding) const { return shared + at.axes + encoding * axes_bytes(map); }
  __device__ unsigned char* table(int n) const {
    return mine + at.tables + n * kGroup * (kPitch<D> > kTablePitch ? kPitch<D> : kTablePitch);
  }
  __device__ float* sums() const { return reinterpret_cast<float*>(mine + at.sums); }
  __device__ uint2& places(int n, int across) const {
    return reinterpret_cast<uint2*>(mine + at.places)[(n * (map.across + 1) + across) * 32 + lane];
  }
  __device__ unsigned char& class_of_slot(int far, int across, int slot) const {
    return mine[at.classes + (far * (map.across + 1) + across) * kGroup + slot];
  }

  // --- before the loop ---

  __device__ void put_axes(int encoding, const Encoding& e) const {
    const int differences = 2 * map.height - 1;
    for (int i = threadIdx.x; i < axes_bytes(map); i += blockDim.x) {
      int place = kPlaces - 1;
      if (i < differences) place = e.axes[i] / e.columns;
      if (i >= 2 * differences) place = e.axes[i - differences];
      rows(encoding)[i] = static_cast<unsigned char>(place & (kPlaces - 1));
    }
  }

  __device__ int class_of(int encoding, bool near, int across, int slot) const {
    const int x = across * kGroup + slot, difference = near ? column - x : x - column;
    const unsigned char* columns = rows(encoding) + 2 * (2 * map.height - 1) + map.width - 1;
    return across == map.across || x >= map.width ? kPlaces - 1 : columns[difference];
  }

  // The place `place` of one of a pair of numbers that stand for 2 part and 2 part + 1.
  __device__ uint32_t one_of(int place) const { return place / 2 == part ? kOne<T> << 16 * (place % 2) : 0; }

  __device__ void put_near(int n, int e) const {
    for (int x = 0; x <= map.across; ++x)
      places(n, x) = make_uint2(one_of(class_of(e, true, x, line)), one_of(class_of(e, true, x, line + 8)));
  }

  __device__ void put_sum(int n, int e) const {
    for (int x = 0; x <= map.across; ++x) {
      const auto two = [&](int slot) {
        return (class_of(e, true, x, slot) == line ? kOne<T> : 0) |
               (class_of(e, true, x, slot + 1) == line ? kOne<T> << 16 : 0);
      };
      places(n, x) = make_uint2(two(2 * part), two(2 * part + 8));
    }
  }

  // All sums of the warp are zero.
  __device__ Total clear_sums() const {
#pragma unroll
    for (int g = 0; g < kPlaces; ++g) *sum_at(line, g) = *sum_at(line + 8, g) = make_float2(0.0f, 0.0f);
    return {};
  }

  __device__ void put_far(int far, int e) const {
    if (lane < kGroup)
      for (int x = 0; x <= map.across; ++x)
        class_of_slot(far, x, lane) = static_cast<unsigned char>(class_of(e, false, x, lane));
  }

  // The warp's 16 rows of x on their way to registers; `take_rows` makes operands of them, through shared memory that is
  // free again afterwards.
  using Bits = uint4[kPieces / 2];

  __device__ void load_rows(Bits& bits, const Heads& x) const {
    const T* from = static_cast<const T*>(x.data) + b * x.b + h * x.h;
#pragma unroll
    for (int n = 0; n < kPieces / 2; ++n) {
      const int u = (lane + 32 * n) / kPieces, piece = (lane + 32 * n) % kPieces, token = token_of_row(u);
      bits[n] = make_uint4(0, 0, 0, 0);
      if (token >= 0 && piece < a.head_pieces)
        bits[n] = *reinterpret_cast<const uint4*>(from + static_cast<uint32_t>(token * x.l + piece * 8));
    }
  }

  __device__ void take_rows(Rows& to, const Bits& bits, unsigned char* through) const {
#pragma unroll
    for (int n = 0; n < kPieces / 2; ++n) {
      const int u = (lane + 32 * n) / kPieces, piece = (lane + 32 * n) % kPieces;
      *reinterpret_cast<uint4*>(through + u * kPitch<D> + 16 * piece) = bits[n];
    }
    sync_warp();
    take_operands<D>(to, through);
    sync_warp();
  }

  // A near table in memory, turned, for those to whom it is a far one.
  __device__ void write_far(void* far, const unsigned char* from) const {
    for (int i = lane; i < kGroup * kPlaces; i += 32) {
      const int u = i / kPlaces, c = i % kPlaces, token = token_of_row(u);
      const uint16_t* places = reinterpret_cast<const uint16_t*>(from + u * kTablePitch) + c;
      uint32_t two[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) two[g] = places[16 * g] | uint32_t{places[16 * g + 8]} << 16;
      if (token >= 0) write_piece(far, token, c, make_uint4(two[0], two[1], two[2], two[3]));
    }
  }

  __device__ void write_piece(void* to, int token, int piece, uint4 bits) const {
    reinterpret_cast<uint4*>(static_cast<T*>(to) + (head * map.length + token) * kAllPlaces)[piece] = bits;
  }

  // --- the loop ---

  // What the slots' tokens have, from the beginning of the head.
  struct Slots {
    const T *x, *y;
    int x_l, y_l;
    int64_t token;  // of (B, H, L)
  };

  __device__ Slots slots_of(const Heads& x, const Heads& y, int sample) const {
    return {
        static_cast<const T*>(x.data) + sample * x.b + h * x.h, static_cast<const T*>(y.data) + sample * y.b + h * y.h,
        x.l, y.l, (int64_t{sample} * a.heads + h) * map.length};
  }

  // The tokens of some chunks on their way to the shared memory of stage n.
  __device__ void fetch(int n, int chunk, const Slots& from) const {
    unsigned char* to = stage(n);
    for (int i = threadIdx.x; i < kStage * kPieces; i += blockDim.x) {
      const int slot = i / kPieces, piece = i % kPieces;
      const int token = Chunk::unpacked(chunks()[chunk + slot / kGroup]).token_of(slot % kGroup);
      const bool there = token >= 0 && piece < a.head_pieces;
      const int row = there ? token : 0, beside = there ? 8 * piece : 0;
      copy16(to + slot * kPitch<D> + 16 * piece, from.x + static_cast<uint32_t>(row * from.x_l + beside), there);
      copy16(
          to + (kStage + slot) * kPitch<D> + 16 * piece, from.y + static_cast<uint32_t>(row * from.y_l + beside), there);
    }
    if (use.fars() > 0)
      for (int i = threadIdx.x; i < kStage * kPlaces; i += blockDim.x) {
        const int slot = i / kPlaces, piece = i % kPlaces;
        const int token = Chunk::unpacked(chunks()[chunk + slot / kGroup]).token_of(slot % kGroup);
        const int64_t row = (from.token + max(token, 0)) * kAllPlaces + 8 * piece;
        unsigned char* far = far_of(n, 0) + slot * kTablePitch + 16 * piece;
        if (use.far_q) copy16(far, static_cast<const T*>(a.on_q.far) + row, token >= 0), far += kStage * kTablePitch;
        if (use.far_k) copy16(far, static_cast<const T*>(a.on_k.far) + row, token >= 0), far += kStage * kTablePitch;
        if (use.far_v) copy16(far, static_cast<const T*>(a.on_v.far) + row, token >= 0);
      }
    if constexpr (pass == Pass::kKeys)
      for (int slot = threadIdx.x; slot < kStage; slot += blockDim.x) {
        const int token = Chunk::unpacked(chunks()[chunk + slot / kGroup]).token_of(slot % kGroup);
        copy4(of_slots(n) + slot, a.lse + from.token + max(token, 0));
        copy4(of_slots(n) + kStage + slot, a.delta + from.token + max(token, 0));
      }
    end_copies();
  }

  __device__ int stages() const { return (map.chunks + kChunks - 1) / kChunks; }

  // Everything that samples have in common: `of_warp` is what only this warp reads.
  template <class OfWarp>
  __device__ void prepare(const OfWarp& of_warp) const {
    put_chunks();
    if (use.far_q || use.near_q || use.sum_q) put_axes(0, a.on_q);
    if (use.far_k || use.near_k || use.sum_k) put_axes(1, a.on_k);
    if (use.far_v || use.near_v || use.sum_v) put_axes(2, a.on_v);
    if (lane < kGroup) token_of_row(lane) = find_token(lane);
    __syncthreads();
    of_warp();
  }

  // For every sample: `begin`, `with` the chunks of each stage (the stage, its first chunk, their number), `end`.
  template <class Begin, class With, class End>
  __device__ void run(const Heads& x, const Heads& y, const Begin& begin, const With& with, const End& end) {
    Slots slots = slots_of(x, y, first);
    fetch(0, 0, slots);
    __syncthreads();
    int n = 0;
    for (b = first; b < a.batch; b += step) {
      head = int64_t{b} * a.heads + h;
      begin();
      for (int chunk = 0; chunk < map.chunks; chunk += kChunks, ++n) {
        wait_copies<0>();
        __syncthreads();
        if (chunk + kChunks < map.chunks) {
          fetch(n + 1, chunk + kChunks, slots);
        } else if (b + step < a.batch) {
          slots = slots_of(x, y, b + step);
          fetch(n + 1, 0, slots);
        }
        with(n, chunk, min(kChunks, map.chunks - chunk));
      }
      end();
    }
  }

  __device__ Chunk chunk_of(int n) const { return Chunk::unpacked(chunks()[n]); }

  __device__ void add_near(Tile& tile, int encoding, int n, int place, const Chunk& c) const {
    const int g = rows(encoding)[near_row - c.row];
    uint32_t r[2];
    load_matrices(r, table(n) + lane % 16 * kTablePitch + 16 * g);
    const uint2 P = places(place, c.across);
    multiply8<T>(tile[0], r[0], r[1], P.x);
    multiply8<T>(tile[1], r[0], r[1], P.y);
  }

  __device__ void add_far(Tile& tile, int encoding, int far, const Chunk& c, const unsigned char* slots) const {
    const uint32_t low = one_of(rows(encoding)[far_low + c.row]), high = one_of(rows(encoding)[far_high + c.row]);
    uint32_t r[2];
    load_matrices(r, slots + lane % 16 * kTablePitch + 16 * class_of_slot(far, c.across, lane % 16));
    multiply8<T>(tile[0], low, high, r[0]);
    multiply8<T>(tile[1], low, high, r[1]);
  }

  __device__ float2* sum_at(int u, int g) const {
    return reinterpret_cast<float2*>(sums() + u * kSumsPitch + g * kPlaces) + part;
  }

  __device__ void put_sums(Total& total, int encoding) const {
    float2* low = sum_at(line, rows(encoding)[near_low - total.row]);
    float2* high = sum_at(line + 8, rows(encoding)[near_high - total.row]);
    low->x += total.x[0], low->y += total.x[1];
    high->x += total.x[2], high->y += total.x[3];
    total.x[0] = total.x[1] = total.x[2] = total.x[3] = 0.0f;
  }

  // total += x P^T of a chunk.
  __device__ void add_chunk(Total& total, int encoding, int place, const Chunk& c, const uint32_t (&x)[4]) const {
    if (c.row != total.row) put_sums(total, encoding), total.row = c.row;
    const uint2 P = places(place, c.across);
    multiply16<T>(total.x, x, P.x, P.y);
  }

  __device__ static void clear(Wide& sum) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum[i / 4][i % 4] = 0.0f;
  }

  // Whether there is a token for number i of a tile.
  __device__ bool has(const Chunk& c, int i) const { return c.there >> 2 * part & 1u << (i / 4 * 8 + i % 2); }
  __device__ int slot_of(int n, int i) const { return 8 * n + 2 * part + i % 2; }

  // A tile as an operand whose columns are multiplied with slots.
  __device__ static void to_operand(uint32_t (&x)[4], const Tile& tile) {
    x[0] = pack<T>(tile[0][0], tile[0][1]), x[1] = pack<T>(tile[0][2], tile[0][3]);
    x[2] = pack<T>(tile[1][0], tile[1][1]), x[3] = pack<T>(tile[1][2], tile[1][3]);
  }

  // --- after the loop ---

  // acc += sums W, sums times `low` and `high` first.
  __device__ void add_sums(Wide& acc, const unsigned char* W, float low, float high) const {
#pragma unroll
    for (int n = 0; n < kPlaces / 2; ++n) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2* two = sum_at(line + i % 2 * 8, 2 * n + i / 2);
        const float factor = i % 2 ? high : low;
        two->x *= factor, two->y *= factor;
        x[i] = pack<T>(two->x, two->y);
      }
      add_slots<T, D>(acc, x, W + 16 * n * kPitch<D>);
    }
  }

  __device__ void write_sums(void* to) const {
    sync_warp();
    for (int i = lane; i < kGroup * kPlaces; i += 32) {
      const int u = i / kPlaces, g = i % kPlaces, token = token_of_row(u);
      const float* x = sums() + u * kSumsPitch + g * kPlaces;
      const uint4 bits = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
      if (token >= 0) write_piece(to, token, g, bits);
    }
  }

  __device__ void write_rows(const Heads& to, const Wide& x, float low, float high) const {
    unsigned char* through = table(0);
    sync_warp();
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      uint32_t* at_low = reinterpret_cast<uint32_t*>(through + line * kPitch<D> + 16 * n) + part;
      at_low[0] = pack<T>(x[n][0] * low, x[n][1] * low);
      at_low[8 * kPitch<D> / 4] = pack<T>(x[n][2] * high, x[n][3] * high);
    }
    sync_warp();
    T* base = static_cast<T*>(to.data) + b * to.b + h * to.h;
    for (int i = lane; i < kGroup * kPieces; i += 32) {
      const int u = i / kPieces, piece = i % kPieces, token = token_of_row(u);
      if (token >= 0 && piece < a.head_pieces)
        *reinterpret_cast<uint4*>(base + token * to.l + 8 * piece) =
            *reinterpret_cast<const uint4*>(through + u * kPitch<D> + 16 * piece);
    }
    sync_warp();
  }

  __device__ void forward() {
    const int of_v = use.near_k;
    prepare([&] {
      if (use.near_k) put_weights<T, D>(weights(0), a.on_k, h, a.head_pieces, map.skip > 0, false), put_near(0, 1);
      if (use.sum_v) put_weights<T, D>(weights(of_v), a.on_v, h, a.head_pieces, map.skip > 0, false), put_sum(of_v, 2);
      if (use.far_q) put_far(0, 0);
    });
    const float factor = a.scale * kLog2e;
    Rows q;
    Wide acc;
    float top[2], weight[2];
    Total total{};
    const auto begin = [&] {
      Bits bits;
      load_rows(bits, a.q);
      take_rows(q, bits, table(0));
      if (use.near_k) put_table<T, D>(table(0), q, weights(0));
      if (use.sum_v) total = clear_sums();
      top[0] = top[1] = -1e30f, weight[0] = weight[1] = 0.0f;
      clear(acc);
    };
    const auto two = [&](int n, int chunk, int beside) {
      float s[2][2][4] = {};
      Chunk chunks[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Chunk c = chunks[half] = chunk_of(chunk + beside + half);
        multiply_slots<T, D>(s[half], q, stage(n) + (beside + half) * kGroup * kPitch<D>);
        if (use.near_k) add_near(s[half], 1, 0, 0, c);
        if (use.far_q) add_far(s[half], 0, 0, c, far_of(n, 0) + (beside + half) * kGroup * kTablePitch);
        if (c.there != 0xffff)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (!has(c, i)) s[half][i / 4][i % 4] = -INFINITY;
      }
      float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < 16; ++i) most[i % 4 / 2] = fmaxf(most[i % 4 / 2], s[i / 8][i / 4 % 2][i % 4]);
      most[0] *= factor, most[1] *= factor;
      if (any_lane(most[0] > top[0] + kSlack || most[1] > top[1] + kSlack)) {
        float fade[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          most[r] = fmaxf(most[r], exchanged(most[r], 1));
          most[r] = fmaxf(fmaxf(most[r], exchanged(most[r], 2)), top[r]);
          fade[r] = power_of_2(top[r] - most[r]);
          top[r] = most[r], weight[r] *= fade[r];
        }
#pragma unroll
        for (int i = 0; i < D / 2; ++i) acc[i / 4][i % 4] *= fade[i % 4 / 2];
        if (use.sum_v) {
          for (int i = 0; i < 4; ++i) total.x[i] *= fade[i / 2];
          for (int g = 0; g < kPlaces; ++g) {
            float2 *low = sum_at(line, g), *high = sum_at(line + 8, g);
            low->x *= fade[0], low->y *= fade[0], high->x *= fade[1], high->y *= fade[1];
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = s[half][i / 4][i % 4];
          x = power_of_2(x * factor - top[i % 4 / 2]);
          weight[i % 4 / 2] += x;
        }
        uint32_t p[4];
        to_operand(p, s[half]);
        add_slots<T, D>(acc, p, stage(n) + (kStage + (beside + half) * kGroup) * kPitch<D>);
        if (use.sum_v) add_chunk(total, 2, of_v, chunks[half], p);
      }
    };
    const auto with = [&](int n, int chunk, int count) {
      for (int beside = 0; beside < count; beside += 2) two(n, chunk, beside);
    };
    const auto end = [&] {
      float share[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        weight[r] += exchanged(weight[r], 1);
        weight[r] += exchanged(weight[r], 2);
        share[r] = 1.0f / weight[r];
      }
      if (use.sum_v) {
        put_sums(total, 2);
#pragma unroll
        for (int i = 0; i < D / 2; ++i) acc[i / 4][i % 4] *= share[i % 4 / 2];
        add_sums(acc, weights(of_v), share[0], share[1]);
        if (a.on_v.sums != nullptr) write_sums(a.on_v.sums);
        share[0] = share[1] = 1.0f;
      }
      write_rows(a.out, acc, share[0], share[1]);
      if (part == 0)
        for (int r = 0; r < 2; ++r) {
          const int token = token_of_row(line + 8 * r);
          if (token >= 0) a.lse[head * map.length + token] = (top[r] + log2f(weight[r])) * kLn2;
        }
    };
    run(a.k, a.v, begin, with, end);
  }

  // delta[i] = <grad_out[i], out[i]> of rows line and line + 8, and the same to memory.
  __device__ void find_delta(float (&delta)[2], const Bits& grad_out, const Bits& out) const {
    float* parts = reinterpret_cast<float*>(table(0));  // of each row, one from each lane that has a piece of it
#pragma unroll
    for (int n = 0; n < kPieces / 2; ++n) {
      const uint32_t ones[4] = {grad_out[n].x, grad_out[n].y, grad_out[n].z, grad_out[n].w};
      const uint32_t others[4] = {out[n].x, out[n].y, out[n].z, out[n].w};
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(ones[i]), y = unpack<T>(others[i]);
        sum += x.x * y.x + x.y * y.y;
      }
      parts[lane + 32 * n] = sum;
    }
    sync_warp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      delta[r] = 0.0f;
      for (int piece = part; piece < kPieces; piece += 4) delta[r] += parts[(line + 8 * r) * kPieces + piece];
      delta[r] += exchanged(delta[r], 1);
      delta[r] += exchanged(delta[r], 2);
      const int token = token_of_row(line + 8 * r);
      if (part == 0 && token >= 0) a.delta[head * map.length + token] = delta[r];
    }
    sync_warp();
  }

  __device__ void queries() {
    const int of_v = use.near_k, sum = use.nears();
    prepare([&] {
      if (use.near_k) put_weights<T, D>(weights(0), a.on_k, h, a.head_pieces, map.skip > 0, false), put_near(0, 1);
      if (use.near_v) put_weights<T, D>(weights(of_v), a.on_v, h, a.head_pieces, map.skip > 0, false), put_near(of_v, 2);
      if (use.sum_k) put_sum(sum, 1);
      if (use.far_q) put_far(0, 0);
    });
    const float factor = a.scale * kLog2e;
    Rows q, grad_out;
    Wide acc;
    float delta[2], lse[2];
    Total total{};
    const auto begin = [&] {
      Bits of_q, of_grad, of_out;
      load_rows(of_q, a.q), load_rows(of_grad, a.grad_out), load_rows(of_out, a.out);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = token_of_row(line + 8 * r);
        lse[r] = token >= 0 ? a.lse[head * map.length + token] * kLog2e : INFINITY;
      }
      find_delta(delta, of_grad, of_out);
      take_rows(q, of_q, table(0));
      take_rows(grad_out, of_grad, table(0));
      if (use.near_k) {
        put_table<T, D>(table(0), q, weights(0));
        write_far(a.on_k.far, table(0));
      }
      if (use.near_v) {
        put_table<T, D>(table(of_v), grad_out, weights(of_v));
        write_far(a.on_v.far, table(of_v));
      }
      if (use.sum_k) total = clear_sums();
      clear(acc);
    };
    const auto with = [&](int n, int chunk, int count) {
#pragma unroll 2
      for (int beside = 0; beside < count; ++beside) {
        const Chunk c = chunk_of(chunk + beside);
        const unsigned char* k = stage(n) + beside * kGroup * kPitch<D>;
        Tile s{}, grad{};
        multiply_slots<T, D>(s, q, k);
        if (use.near_k) add_near(s, 1, 0, 0, c);
        if (use.far_q) add_far(s, 0, 0, c, far_of(n, 0) + beside * kGroup * kTablePitch);
        multiply_slots<T, D>(grad, grad_out, k + kStage * kPitch<D>);
        if (use.near_v) add_near(grad, 2, of_v, of_v, c);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int r = i % 4 / 2;
          const float p = power_of_2(s[i / 4][i % 4] * factor - lse[r]);
          s[i / 4][i % 4] = p * (grad[i / 4][i % 4] - delta[r]);
        }
        if (c.there != 0xffff)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (!has(c, i)) s[i / 4][i % 4] = 0.0f;
        uint32_t x[4];
        to_operand(x, s);
        add_slots<T, D>(acc, x, k);
        if (use.sum_k) add_chunk(total, 1, sum, c, x);
      }
    };
    const auto end = [&] {
      if (use.sum_k) {
        put_sums(total, 1);
        add_sums(acc, weights(0), 1.0f, 1.0f);
        write_sums(a.on_k.sums);
      }
      write_rows(a.grad_q, acc, a.scale, a.scale);
    };
    run(a.k, a.v, begin, with, end);
  }

  __device__ void keys() {
    const int far = use.far_k;
    prepare([&] {
      if (use.near_q) {
        put_weights<T, D>(weights(0), a.on_q, h, a.head_pieces, map.skip > 0, false);
        put_near(0, 0), put_sum(1, 0);
      }
      if (use.far_k) put_far(0, 1);
      if (use.far_v) put_far(far, 2);
    });
    const float factor = a.scale * kLog2e;
    Rows k, v;
    Wide acc_k, acc_v;
    Total total{};
    const auto begin = [&] {
      Bits of_k, of_v;
      load_rows(of_k, a.k), load_rows(of_v, a.v);
      take_rows(k, of_k, table(0));
      take_rows(v, of_v, table(0));
      if (use.near_q) put_table<T, D>(table(0), k, weights(0));
      if (use.sum_q) total = clear_sums();
      clear(acc_k), clear(acc_v);
    };
    const auto with = [&](int n, int chunk, int count) {
#pragma unroll 2
      for (int beside = 0; beside < count; ++beside) {
        const Chunk c = chunk_of(chunk + beside);
        const unsigned char* q = stage(n) + beside * kGroup * kPitch<D>;
        const unsigned char* tables = far_of(n, 0) + beside * kGroup * kTablePitch;
        const float* lse = of_slots(n) + beside * kGroup;
        Tile s{}, grad{};
        multiply_slots<T, D>(s, k, q);
        if (use.near_q) add_near(s, 0, 0, 0, c);
        if (use.far_k) add_far(s, 1, 0, c, tables);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = s[i / 4][i % 4];
          x = power_of_2(x * factor - lse[slot_of(i / 4, i)] * kLog2e);
        }
        if (c.there != 0xffff)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (!has(c, i)) s[i / 4][i % 4] = 0.0f;
        multiply_slots<T, D>(grad, v, q + kStage * kPitch<D>);
        if (use.far_v) add_far(grad, 2, far, c, tables + far * kStage * kTablePitch);
        uint32_t x[4];
        to_operand(x, s);
        add_slots<T, D>(acc_v, x, q + kStage * kPitch<D>);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          s[i / 4][i % 4] *= grad[i / 4][i % 4] - lse[kStage + slot_of(i / 4, i)];
        to_operand(x, s);
        add_slots<T, D>(acc_k, x, q);
        if (use.sum_q) add_chunk(total, 0, 1, c, x);
      }
    };
    const auto end = [&] {
      if (use.sum_q) {
        put_sums(total, 0);
        add_sums(acc_k, weights(0), 1.0f, 1.0f);
        write_sums(a.on_q.sums);
      }
      write_rows(a.grad_k, acc_k, a.scale, a.scale);
      write_rows(a.grad_v, acc_v, 1.0f, 1.0f);
    };
    run(a.q, a.grad_out, begin, with, end);
  }
};

// Registers of a thread, so that a multiprocessor has 16 warps, or 12 where each holds two gradients.
template <int D, Pass pass>
constexpr int kRegisters = D > 64 ? 255 : pass == Pass::kKeys ? 168 : 128;

template <class T, int D, int On, Pass pass>
__global__ void __maxnreg__((kRegisters<D, pass>)) attention_kernel(const Attention a) {
  Warp<T, D, On, pass> warp(a);
  if constexpr (pass == Pass::kForward) warp.forward();
  if constexpr (pass == Pass::kQueries) warp.queries();
  if constexpr (pass == Pass::kKeys) warp.keys();
}

}  // namespace rpe_ops
