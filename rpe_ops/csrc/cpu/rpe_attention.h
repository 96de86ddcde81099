// What the tile kernels of rpe_attention are told: raw pointers, sizes and strides (in elements), nothing of torch.

#pragma once

#include <cstddef>
#include <cstdint>

namespace rpe_ops {

enum class Storage : int { f32, f64, bf16, f16, boolean };

// A (B, H, L, D) tensor of any strides.
struct View {
  char* data = nullptr;
  int64_t b = 0, h = 0, l = 0, d = 0;
  Storage storage = Storage::f32;
};

// What tells the bucket of a pair of tokens. Kernels count buckets that occur, from 0 on: their ids are compact.
//
// Free ids are a matrix. The other two are of a grid: `skip` tokens without a place, then height x width in row-major
// order; the bucket is a function of (row, column) of the token whose table is read, less those of the other one. Where it
// is a sum of two axes, whose equal values are neighbours, a run of one axis is a slot, and the id of a pair of slots is
// row slot * col_slots + column slot, for terms on queries column slot * row_slots + row slot.
//
// Along an image row of the other tokens an offset falls: axes and offsets lie reversed, and are read forwards.
struct Map {
  enum Kind : int { free, offsets, axes };
  Kind kind = free;

  const void* ids = nullptr;  // free: the id is ids[i * row + j * column] - lowest
  int64_t row = 0, column = 0, bytes = 8, lowest = 0;

  int64_t height = 0, width = 0, skip = 0;
  int32_t skip_id = 0;
  bool odd = false;  // on queries: of another grid than that which orders the queries

  int64_t row_slots = 0, col_slots = 0;
  const int32_t* run_of = nullptr;     // axes: (2h - 1), the run of rows; its slot is row_slots - 1 - run
  const int32_t* run_start = nullptr;  // axes: (row_slots + 1)
  const int32_t* goes_on = nullptr;    // axes: (2h - 1), -1 where the run is that of the row before, else 0
  const int32_t* col_slot = nullptr;   // axes: (2w - 1), and 16 zeros on both sides
  const int32_t* col_goes_on = nullptr;  // axes: (2w - 1), as `goes_on`

  const void* of_offset = nullptr;  // ids (2h - 1, 2w - 1), on queries (2w - 1, 2h - 1); 16 zeros behind each row
  int64_t stride = 0;
  const int32_t* earlier = nullptr;  // offsets: (2h - 1), the last row before this one that is the same, or -1
  const int32_t* later = nullptr;    // and the first one behind it
};

// One side table with its map, or the weight W that it is a product with: then neither the table nor its gradient is ever
// in memory.
struct Term {
  View table;               // side table; on values the gradient of the bucket sums; or W, (H, D, N), on values (H, N, D)
  View result;              // its gradient; on values the bucket sums; or the gradient of W, for each (b, h)
  bool weight = false;      // `table` is W
  Map map;
  const int32_t* columns = nullptr;  // compact id -> column of the table
  bool dense = false;       // the columns follow each other
  bool narrow = true;       // ids are uint8, else int32
  int64_t used = 0;         // number of compact ids
  int64_t buckets = 0;      // number of columns
  int64_t width = 0;        // `used`, padded to whole vectors and to 8
};

// Image rows of keys, in the forward of long sequences: a tile takes some at a time, the tokens in front with the first.
struct KeyBlocks {
  int64_t rows = 0;  // of a block; 0: all keys are one
  int64_t height = 0, width = 0, skip = 0;

  int64_t count() const { return rows == 0 ? 1 : (height + rows - 1) / rows; }
  int64_t rows_of(int64_t n) const { return height - n * rows < rows ? height - n * rows : rows; }
  int64_t first_key(int64_t n) const { return n == 0 ? 0 : skip + n * rows * width; }
  int64_t keys(int64_t n) const { return (n == 0 ? skip : 0) + rows_of(n) * width; }
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

  // Queries are taken column by column of this grid, the skip tokens last, where an encoding on queries has one: then
  // those of a tile that share a column share the columns' slots. Height 0: as they come.
  int64_t height, width, skip;
  KeyBlocks blocks;
  int64_t tile;             // queries in a tile, a multiple of 16
  int64_t tiles;            // ceil(Lq / tile)
  int64_t parts;            // of the tiles of a head in the backward: each has sums of its own, added in their order

  // of a part, whose tiles end where the next one begins
  int64_t first_tile(int64_t part) const { return tiles * part / parts; }

  // the query at a place of that order
  int64_t query_at(int64_t place) const {
    if (height == 0) return place;
    const int64_t map = height * width;
    return place < map ? skip + place % height * width + place / height : place - map;
  }
};

// The kernels of one instruction set for one dtype. `kept` has a place for each part of all heads: null, or where the sums
// of a part go whose head other threads work on too; those of the first parts of a head, that one thread has, to part 0.
struct Kernels {
  int64_t (*scratch_bytes)(const Problem&);
  int64_t (*kept_bytes)(const Problem&);
  void (*forward)(const Problem&, char* scratch, int64_t begin, int64_t end);  // tiles of all heads
  void (*backward)(const Problem&, char* scratch, char* const* kept, int64_t begin, int64_t end);  // parts of all heads
  void (*finish)(const Problem&, char* scratch, char* const* kept, int64_t head);  // one whose parts are kept
  int64_t width;  // of a vector, in elements
};

// A file for each. Only gcc takes target pragmas; of other compilers the plain ones get what their flags say.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RPE_ATTENTION_X86
#endif
namespace plain {
Kernels kernels(Storage);
}
namespace avx2 {
Kernels kernels(Storage);
}
namespace avx512 {
Kernels kernels(Storage);
}
namespace avx512_bf16 {  // of bfloat16 alone
Kernels kernels(Storage);
}

template <int n>
struct Count {
  static constexpr int value = n;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace rpe_ops
