// rpe_index:      Y[b,h,i,j] = X[b,h,i, ids[i,j]]
// rpe_bucket_sum: S[b,h,i,n] = sum of X[b,h,i,j] over ids[i,j] = n, in an order that depends on the ids and sizes alone
//
// The kernels and the sizes of their blocks, on raw pointers. Only words of CUDA are used, so that the tests can compile
// this file for the host as well, with the threads of a block emulated.
//
// Both kernels move one byte of a map (B, H, Lq, Lk) per byte of work, so memory sets their time as long as enough of it
// is on its way: an H200 wants 4.8 TB/s * 0.7 us = 3.4 MB, 25 KiB in each of 132 multiprocessors. What a block needs
// besides (ids, 8 bytes each, and divisions of 64 bits) it does once for many maps.

#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <type_traits>

namespace rpe_ops {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
// Shared memory that every GPU gives a block without being asked.
constexpr int64_t kSharedBytes = 48 * 1024;
// Of it a block of rpe_index takes no more, where one set of tables fits, so that a multiprocessor holds several.
constexpr int64_t kIndexBytes = 24 * 1024;
// Entries of a map that a block of rpe_index writes: two vectors of 16 bytes a thread in float32, one in bfloat16.
constexpr int kTile = 2048;
// Sets of maps whose tables stand in shared memory together.
constexpr int64_t kMaxSets = 4;
// Keys of a row that a block of rpe_bucket_sum holds at a time: 7 for a lane to sort. 197 keys are one chunk, and 32 rows
// of them in float32, or 64 in 16 bits, are 25 KiB.
constexpr int kLaneKeys = 7;
constexpr int kMaxChunk = kWarp * kLaneKeys;
// Blocks for each multiprocessor: more of them even the end out, fewer read the ids less often.
constexpr int64_t kIndexBlocks = 8, kSumBlocks = 12;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
// Sizes up to here are counted in 32 bits; the kernels for larger ones, and for tables or bins that no shared memory
// holds, are slow.
constexpr int64_t kMaxSize = int64_t{1} << 30;

// The first three strides of a (B, H, Lq, _) tensor whose last stride is 1.
struct Rows {
  int64_t heads, queries;
  int64_t stride_b, stride_h, stride_i;

  __device__ int64_t at(int64_t map, int64_t i) const {
    return map / heads * stride_b + map % heads * stride_h + i * stride_i;
  }

  // The same for fewer than 2^31 maps, without a division of 64 bits, which takes a hundred instructions.
  __device__ int64_t near(int map, int i) const {
    const int b = map < heads ? 0 : static_cast<uint32_t>(map) / static_cast<uint32_t>(heads);
    return b * stride_b + (map - b * static_cast<int>(heads)) * stride_h + i * stride_i;
  }
};

struct Index {
  const void* data;
  int bytes;  // 1: uint8, 2: int16, 4: int32, 8: int64
  int64_t stride_i, stride_j;
};

struct Problem {
  const void* x;
  Rows rows;
  int64_t maps, buckets, keys;
  Index index;
  void* result;  // begins at a multiple of 16 bytes

  bool is_usual() const { return std::max(std::max(maps, rows.queries), std::max(buckets, keys)) <= kMaxSize; }
};

template <class From>
struct Typed {
  using type = From;
};

// call(Typed<C++ type of the ids>)
template <class Call>
__device__ void with_ids(const Index& index, const Call& call) {
  switch (index.bytes) {
    case 1: return call(Typed<uint8_t>{});
    case 2: return call(Typed<int16_t>{});
    case 4: return call(Typed<int32_t>{});
    default: return call(Typed<int64_t>{});
  }
}

template <class From>
__device__ int64_t id_at(const Index& index, int64_t i, int64_t j) {
  return static_cast<int64_t>(static_cast<const From*>(index.data)[i * index.stride_i + j * index.stride_j]);
}

// Ids that are outside the table stop the program when `Ids` goes out of scope. They are taken as 0 all the same: builds
// with NDEBUG keep the assert of CUDA off, and even they must not read or write elsewhere.
struct Ids {
  int64_t buckets;
  bool inside = true;

  __device__ explicit Ids(int64_t buckets) : buckets(buckets) {}
  __device__ ~Ids() { assert(inside && "index out of bounds: expected 0 <= index < N"); }

  __device__ int64_t checked(int64_t id) {
    const bool is_one = static_cast<uint64_t>(id) < static_cast<uint64_t>(buckets);
    inside = inside && is_one;
    return is_one ? id : 0;
  }
};

#ifdef __CUDACC__
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
}
#endif

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is copied to shared memory in the background has 4 bytes at least: entries of 16 bits come in pairs.
template <class T>
constexpr int kEntriesOfAWord = sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1;

// A warp copies from[0 .. count) to to[shift ...] in the background, until `arrived`. The shift, 0 or 1, is where `from`
// begins within a word.
template <int trips, class T>
__device__ int copy_row(T* to, const T* from, int count, int lane) {
  constexpr int kPart = kEntriesOfAWord<T>;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(T) % kPart);
  from -= shift;
  const int end = shift + count;
  if (kPart > 1) {  // half a word at an end
    if (shift > 0 && lane == 0) to[shift] = from[shift];
    if (end % kPart > 0 && lane == kWarp - 1) to[end - 1] = from[end - 1];
  }
  for (int first = shift + lane; first < end / kPart; first += trips * kWarp) {
#pragma unroll
    for (int u = 0; u < trips; ++u) {
      const int word = first + u * kWarp;
      if (word < end / kPart) __pipeline_memcpy_async(to + word * kPart, from + word * kPart, kPart * sizeof(T));
    }
  }
  return shift;
}

__device__ inline void arrived() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// A block writes the entries [tile * E - shift, ...) of the (Lq, Lk) matrix, rows after rows, for several maps (b, h). The
// shift makes every vector of 16 bytes begin where memory wants it. Maps lie Lq Lk entries apart, often an odd number,
// so only every `classes`-th map has the same shift: a block serves maps of one class.
//
// In shared memory the tables of a set of maps, as many as a vector has entries, lie entry beside entry: one reading of 16
// bytes looks an id up in all of them, and V readings are V vectors of V maps, turned over in registers.
struct IndexPlan {
  int entries;  // E
  int classes;
  int sets;               // in shared memory at a time
  int pitch;              // entries of a table there
  int groups, maps_each;  // a block for each group of maps of a class
  int64_t tiles, blocks;
  int64_t shared_bytes;
};

// blocks = 0 where no table fits into shared memory.
inline IndexPlan plan_index(const Problem& p, int bytes, int64_t multiprocessors) {
  IndexPlan plan{};
  if (!p.is_usual()) return plan;
  const int vector = 16 / bytes;
  const int64_t total = p.rows.queries * p.keys;
  while (plan.classes == 0 || plan.classes * total % vector != 0) ++plan.classes;
  plan.classes = static_cast<int>(std::min<int64_t>(plan.classes, p.maps));
  const int64_t maps = ceil_div(p.maps, plan.classes);
  for (plan.entries = kTile; plan.entries >= 64; plan.entries /= 2) {
    const int64_t pitch = std::min(p.rows.queries, (plan.entries - 1) / p.keys + 2) * p.buckets;
    const int64_t ids = plan.entries * int64_t{2}, set = pitch * 16;
    if (ids + set > kSharedBytes) continue;
    plan.sets = static_cast<int>(
        std::min(std::max<int64_t>((kIndexBytes - ids) / set, 1), std::min(kMaxSets, ceil_div(maps, vector))));
    plan.pitch = static_cast<int>(pitch);
    plan.shared_bytes = ids + plan.sets * set;
    plan.tiles = ceil_div(total + vector - 1, plan.entries);
    const int64_t tiles = plan.tiles * plan.classes;
    const int64_t groups = std::min(ceil_div(kIndexBlocks * multiprocessors, tiles), ceil_div(maps, vector));
    plan.maps_each = static_cast<int>(ceil_div(maps, groups * vector) * vector);  // whole sets
    plan.groups = static_cast<int>(ceil_div(maps, plan.maps_each));
    plan.blocks = tiles * plan.groups <= kMaxBlocks ? tiles * plan.groups : 0;
    return plan;
  }
  return plan;
}

template <int bytes>
struct alignas(bytes) Vector {
  unsigned char data[bytes];
};

// Entries are moved as they are: Bits is an unsigned integer of their size.
template <class Bits>
__global__ void __launch_bounds__(kThreads, 4) index_kernel(Problem p, IndexPlan plan) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Bits));
  uint16_t* offsets = reinterpret_cast<uint16_t*>(shared_memory());  // (E): of an id's entry in a set, in bytes
  unsigned char* sets = shared_memory() + plan.entries * sizeof(uint16_t);  // (sets, pitch, V)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int buckets = static_cast<int>(p.buckets);
  const int64_t total = p.rows.queries * p.keys;

  // all maps of a tile run together: the second reading of its ids comes out of a cache
  const uint32_t of_tile = blockIdx.x / static_cast<uint32_t>(plan.groups);
  const int first = static_cast<int>(blockIdx.x - of_tile * plan.groups) * plan.maps_each;  // within its class
  const uint32_t tile = of_tile / static_cast<uint32_t>(plan.classes);
  const int map_class = static_cast<int>(of_tile - tile * plan.classes);
  const int of_class = (static_cast<int>(p.maps) - map_class + plan.classes - 1) / plan.classes;
  const int last = min(first + plan.maps_each, of_class);
  const int64_t begin = static_cast<int64_t>(tile) * plan.entries - map_class * total % kVector;
  const int low = begin < 0 ? static_cast<int>(-begin) : 0;
  const int high = static_cast<int>(min(static_cast<int64_t>(plan.entries), total - begin));
  if (last <= first || high <= low) return;  // alike for all threads

  const int keys = static_cast<int>(p.keys);
  const int row = static_cast<int>(
      (begin + low) >> 32 == 0 ? static_cast<uint32_t>(begin + low) / static_cast<uint32_t>(keys) : (begin + low) / keys);
  const int column = static_cast<int>(begin + low - static_cast<int64_t>(row) * keys) - low;
  // of the rows that a tile may touch, by a product: all numbers are below 2^13, and half an entry beside a border
  const bool is_long = keys >= plan.entries;
  const float part = 1.0f / static_cast<float>(keys);
  const auto row_of = [&](int entry) {
    return is_long ? static_cast<int>(column + entry >= keys)
                   : static_cast<int>((static_cast<float>(column + entry) + 0.5f) * part);
  };
  const auto read_ids = [&] {
    Ids all(p.buckets);
    // from the end of a row of ids to the next: nothing where they are contiguous
    const int64_t step = p.index.stride_i - keys * p.index.stride_j;
    const int64_t at = row * p.index.stride_i + column * p.index.stride_j;
    with_ids(p.index, [&](auto typed) {
      using From = typename decltype(typed)::type;
      const From* data = static_cast<const From*>(p.index.data) + at;
      const auto keep = [&](int entry, int row, From id) {
        offsets[entry] = static_cast<uint16_t>((row * buckets + static_cast<int>(all.checked(id))) * 16);
      };
      int entry = low + static_cast<int>(threadIdx.x);
      constexpr int kTogether = 4;  // on their way from memory
      if (step == 0 && p.index.stride_j == 1) {
        for (; entry + (kTogether - 1) * kThreads < high; entry += kTogether * kThreads) {
          From ids[kTogether];
#pragma unroll
          for (int u = 0; u < kTogether; ++u) ids[u] = data[entry + u * kThreads];
#pragma unroll
          for (int u = 0; u < kTogether; ++u) keep(entry + u * kThreads, row_of(entry + u * kThreads), ids[u]);
        }
      }
      for (; entry < high; entry += kThreads)
        keep(entry, row_of(entry), data[entry * p.index.stride_j + row_of(entry) * step]);
    });
  };

  const int rows = row_of(high - 1) + 1;
  const Bits* x = static_cast<const Bits*>(p.x);
  for (int at_map = first; at_map < last; at_map += plan.sets * kVector) {
    const int maps = min(plan.sets * kVector, last - at_map), count = (maps + kVector - 1) / kVector;
    if (at_map > first) __syncthreads();
    for (int q = warp; q < count * rows; q += kWarps) {
      // neighbouring lanes have the maps of the set, so that they write one piece of shared memory
      const int set = q / rows, r = q - set * rows, m = set * kVector + lane % kVector;
      if (m >= maps) continue;
      const Bits* from = x + p.rows.near(map_class + plan.classes * (at_map + m), row + r);
      Bits* to = reinterpret_cast<Bits*>(sets + (set * plan.pitch + r * buckets) * 16) + lane % kVector;
#pragma unroll 4
      for (int n = lane / kVector; n < buckets; n += kWarp / kVector) {
        if constexpr (sizeof(Bits) < 4)  // less is not copied in the background
          to[n * kVector] = from[n];
        else
          __pipeline_memcpy_async(to + n * kVector, from + n, sizeof(Bits));
      }
    }
    if (at_map == first) read_ids();  // while the tables are on their way
    arrived();
    __syncthreads();
    const int64_t apart = plan.classes * total;
    Bits* tile_of_first = static_cast<Bits*>(p.result) + (map_class + plan.classes * at_map) * total + begin;
    for (int entry = static_cast<int>(threadIdx.x) * kVector; entry < high; entry += kThreads * kVector) {
      if (entry + kVector <= low) continue;
      Bits* to = tile_of_first + entry;
      if (entry >= low && entry + kVector <= high) {
        union {
          Vector<2 * kVector> vector;
          uint16_t one[kVector];
        } at;
        at.vector = *reinterpret_cast<const Vector<2 * kVector>*>(offsets + entry);
        for (int m = 0; m < maps; m += kVector) {
          const unsigned char* set = sets + m / kVector * plan.pitch * 16;
          union {
            uint4 vector;
            Bits one[kVector];
          } found[kVector], out;
#pragma unroll
          for (int v = 0; v < kVector; ++v) found[v].vector = *reinterpret_cast<const uint4*>(set + at.one[v]);
#pragma unroll
          for (int other = 0; other < kVector; ++other, to += apart) {
            if (m + other >= maps) break;
#pragma unroll
            for (int v = 0; v < kVector; ++v) out.one[v] = found[v].one[other];
            *reinterpret_cast<uint4*>(to) = out.vector;
          }
        }
      } else {
        for (int m = 0; m < maps; ++m, to += apart)
          for (int v = 0; v < kVector; ++v)
            if (entry + v >= low && entry + v < high)
              to[v] = reinterpret_cast<const Bits*>(
                  sets + m / kVector * plan.pitch * 16 + offsets[entry + v])[m % kVector];
      }
    }
  }
}

// For tables that shared memory does not hold: a block takes a row of a map straight from global memory.
template <class Bits>
__global__ void __launch_bounds__(kThreads) index_large_kernel(Problem p) {
  const int64_t rows = p.maps * p.rows.queries;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t map = r / p.rows.queries, i = r - map * p.rows.queries;
    const Bits* from = static_cast<const Bits*>(p.x) + p.rows.at(map, i);
    Bits* to = static_cast<Bits*>(p.result) + r * p.keys;
    Ids all(p.buckets);
    with_ids(p.index, [&](auto typed) {
      using From = typename decltype(typed)::type;
      for (int64_t j = threadIdx.x; j < p.keys; j += kThreads) to[j] = from[all.checked(id_at<From>(p.index, i, j))];
    });
  }
}

// A block has one query row i and, in each round, 32 K maps: lane l of every warp adds up for the maps l K .. l K + K - 1.
// The keys of a chunk are sorted by bucket once for all maps, so that a sum is a walk over neighbours in that order, in a
// register, and no two threads ever add to the same number. A warp takes the buckets that begin in its eighth of the order.
struct SumPlan {
  int chunk, chunks;  // keys of a chunk
  int slots;          // chunks whose order is kept; chunks, or 1: then a chunk is sorted again for each round
  int pitch;          // entries from one row in shared memory to the next: an odd number of words, for the banks
  int rounds;         // of a block
  int64_t blocks;
  int64_t shared_bytes;
};

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// K: 2 maps a lane make 16-bit rows as many bytes as those of float32, and share the cost of the order.
template <class T>
int maps_of_a_lane(int64_t buckets) {
  return sizeof(T) == 2 && buckets <= 96 ? 2 : 1;
}

// blocks = 0 where no chunk fits into shared memory.
template <class T>
SumPlan plan_sum(const Problem& p, int64_t multiprocessors) {
  SumPlan plan{};
  const int64_t round = kWarp * maps_of_a_lane<T>(p.buckets);
  const int part = kEntriesOfAWord<T>;
  const auto fits = [&](int64_t chunk, bool keep) {
    plan.chunks = static_cast<int>(ceil_div(p.keys, chunk));
    plan.chunk = static_cast<int>(ceil_div(p.keys, plan.chunks));
    plan.slots = keep ? plan.chunks : 1;
    plan.pitch = static_cast<int>(ceil_div(plan.chunk + part - 1, part) | 1) * part;
    plan.shared_bytes = round * plan.pitch * static_cast<int64_t>(sizeof(T)) +
        p.buckets * (round + 1) * static_cast<int64_t>(sizeof(SumOf<T>)) + round * 2 +
        plan.slots * (plan.chunk + p.buckets + 1) * int64_t{2};
    return plan.shared_bytes <= kSharedBytes;
  };
  if (!p.is_usual()) return plan;
  bool found = false;
  for (int64_t chunk = kMaxChunk; !found && chunk >= 4 * kWarp; chunk -= kWarp) found = fits(chunk, true);
  for (int64_t chunk = kMaxChunk; !found && chunk >= kWarp; chunk -= kWarp) found = fits(chunk, false);
  if (!found) return plan;
  const int64_t rounds = ceil_div(p.maps, round);
  plan.rounds = static_cast<int>(
      ceil_div(rounds, std::min(ceil_div(kSumBlocks * multiprocessors, p.rows.queries), rounds)));
  const int64_t blocks = p.rows.queries * ceil_div(rounds, plan.rounds);
  plan.blocks = blocks <= kMaxBlocks ? blocks : 0;
  return plan;
}

// A warp sorts the ids of keys [begin, begin + count) of row i: order[starts[n] .. starts[n + 1]) are the keys of bucket n,
// rising, as distances from begin in bytes.
__device__ inline void sort_chunk(
    const Problem& p, int i, int begin, int count, int bytes, int lane, uint16_t* order, uint16_t* starts) {
  const int buckets = static_cast<int>(p.buckets);
  int id[kLaneKeys];  // and in its upper half, later, how many keys of the bucket stand before
  {
    Ids all(p.buckets);
    with_ids(p.index, [&](auto typed) {
      using From = typename decltype(typed)::type;
      int64_t ids[kLaneKeys];
#pragma unroll
      for (int u = 0; u < kLaneKeys; ++u)
        ids[u] = id_at<From>(p.index, i, begin + min(u * kWarp + lane, count - 1));
#pragma unroll
      for (int u = 0; u < kLaneKeys; ++u) id[u] = static_cast<int>(all.checked(ids[u]));
    });
  }
  for (int n = lane; n <= buckets; n += kWarp) starts[n] = 0;
  __syncwarp();
#pragma unroll
  for (int u = 0; u < kLaneKeys; ++u) {
    const int n = u * kWarp + lane < count ? id[u] : buckets;  // what is beyond the end comes last
    const unsigned same = __match_any_sync(kAllLanes, n);
    const int before = __popc(same & ((1u << lane) - 1));
    id[u] |= (starts[n] + before) << 16;
    __syncwarp();
    if (before == 0) starts[n] = static_cast<uint16_t>(starts[n] + __popc(same));
    __syncwarp();
  }
  int so_far = 0;
  for (int first = 0; first < buckets; first += kWarp) {
    const int here = first + lane < buckets ? starts[first + lane] : 0;
    int sum = here;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (first + lane < buckets) starts[first + lane] = static_cast<uint16_t>(so_far + sum - here);
    so_far += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) starts[buckets] = static_cast<uint16_t>(count);
  __syncwarp();
#pragma unroll
  for (int u = 0; u < kLaneKeys; ++u)
    if (u * kWarp + lane < count) order[starts[id[u] & 0xffff] + (id[u] >> 16)] =
          static_cast<uint16_t>((u * kWarp + lane) * bytes);
}

// The first bucket whose keys begin at `position` of the order or later.
__device__ inline int bucket_from(const uint16_t* starts, int buckets, int position, int lane) {
  int n = 0;
  for (int first = 0; first < buckets; first += kWarp)
    n += __popc(__ballot_sync(kAllLanes, first + lane < buckets && starts[first + lane] < position));
  return n;
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads, 5) sum_kernel(Problem p, SumPlan plan) {
  using Sum = SumOf<T>;
  constexpr int kMaps = kWarp * K, kPitch = kMaps + 1;
  constexpr int kTrips = kLaneKeys / kEntriesOfAWord<T> + (kEntriesOfAWord<T> > 1);  // of a warp along a chunk
  T* tile = reinterpret_cast<T*>(shared_memory());                  // (K, 32, pitch)
  Sum* bins = reinterpret_cast<Sum*>(tile + kMaps * plan.pitch);  // (N, K * 32 + 1)
  uint16_t* shifts = reinterpret_cast<uint16_t*>(bins + p.buckets * kPitch);  // (K, 32)
  uint16_t* orders = shifts + kMaps;                                          // (slots, chunk)
  uint16_t* all_starts = orders + plan.slots * plan.chunk;                    // (slots, N + 1)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int buckets = static_cast<int>(p.buckets), keys = static_cast<int>(p.keys);

  // neighbouring rows run together: their ends share pieces of memory
  const uint32_t queries = static_cast<uint32_t>(p.rows.queries), of_maps = blockIdx.x / queries;
  const int i = static_cast<int>(blockIdx.x - of_maps * queries);
  const int first = static_cast<int>(of_maps) * plan.rounds * kMaps;
  const int last = min(static_cast<int>(p.maps), first + plan.rounds * kMaps);
  const T* x = static_cast<const T*>(p.x);
  const auto keys_of = [&](int c) { return min(plan.chunk, keys - c * plan.chunk); };
  const auto map_of = [&](int round, int row) { return round + row % kWarp * K + row / kWarp; };
  const auto fill = [&](int round, int c) {
    for (int row = warp; row < kMaps; row += kWarps) {
      const int map = map_of(round, row);
      if (map >= last) continue;
      const T* from = x + p.rows.near(map, i) + c * plan.chunk;
      const int shift = copy_row<kTrips>(tile + row * plan.pitch, from, keys_of(c), lane);
      if (lane == 0) shifts[row] = static_cast<uint16_t>(shift);
    }
  };
  const auto sort = [&](int c, int slot) {
    sort_chunk(
        p, i, c * plan.chunk, keys_of(c), sizeof(T), lane, orders + slot * plan.chunk,
        all_starts + slot * (buckets + 1));
  };

  fill(first, 0);
  if (plan.slots == plan.chunks)
    for (int c = warp; c < plan.chunks; c += kWarps) sort(c, c);
  for (int round = first, c = 0; round < last;) {
    const int slot = plan.slots == plan.chunks ? c : 0;
    if (plan.slots != plan.chunks && warp == 0) sort(c, 0);
    arrived();
    __syncthreads();
    const uint16_t* order = orders + slot * plan.chunk;
    const uint16_t* starts = all_starts + slot * (buckets + 1);
    const int count = keys_of(c);
    const int n_begin = bucket_from(starts, buckets, warp * count / kWarps, lane);
    const int n_end =
        warp == kWarps - 1 ? buckets : bucket_from(starts, buckets, (warp + 1) * count / kWarps, lane);
    const unsigned char* mine[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int row = k * kWarp + lane;
      const int shift = kEntriesOfAWord<T> == 1 || map_of(round, row) >= last ? 0 : shifts[row];
      mine[k] = reinterpret_cast<const unsigned char*>(tile + row * plan.pitch + shift);
    }
    const auto add = [&](auto is_first) {
      Sum* bin = bins + n_begin * kPitch + lane;
      const uint16_t* at = order + starts[n_begin];
      for (int n = n_begin; n < n_end; ++n, bin += kPitch) {
        const uint16_t* end = order + starts[n + 1];
        Sum sum[K] = {};
#pragma unroll 4
        for (; at < end; ++at) {
          const int offset = *at;
#pragma unroll
          for (int k = 0; k < K; ++k) sum[k] += static_cast<Sum>(*reinterpret_cast<const T*>(mine[k] + offset));
        }
#pragma unroll
        for (int k = 0; k < K; ++k) bin[k * kWarp] = decltype(is_first)::value ? sum[k] : bin[k * kWarp] + sum[k];
      }
    };
    if (c == 0)
      add(std::true_type{});
    else
      add(std::false_type{});
    __syncthreads();
    // the tile is free: what comes next is on its way while the sums are written
    const bool is_end = c + 1 == plan.chunks;
    const int next = is_end ? 0 : c + 1, next_round = is_end ? round + kMaps : round;
    if (next_round < last) fill(next_round, next);
    if (is_end) {
      for (int row = warp; row < kMaps; row += kWarps) {
        const int map = map_of(round, row);
        if (map >= last) continue;
        T* to = static_cast<T*>(p.result) + (map * p.rows.queries + i) * p.buckets;
#pragma unroll 2
        for (int n = lane; n < buckets; n += kWarp) to[n] = static_cast<T>(bins[n * kPitch + row]);
      }
    }
    c = next;
    round = next_round;
  }
}

// For more bins than shared memory holds: a block has a row of a map, a thread sums bins, reading the whole row for each.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_large_kernel(Problem p) {
  const int64_t rows = p.maps * p.rows.queries;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t map = r / p.rows.queries, i = r - map * p.rows.queries;
    const T* from = static_cast<const T*>(p.x) + p.rows.at(map, i);
    T* to = static_cast<T*>(p.result) + r * p.buckets;
    Ids all(p.buckets);
    with_ids(p.index, [&](auto typed) {
      using From = typename decltype(typed)::type;
      for (int64_t n = threadIdx.x; n < p.buckets; n += kThreads) {
        SumOf<T> sum = 0;
        for (int64_t j = 0; j < p.keys; ++j)
          if (all.checked(id_at<From>(p.index, i, j)) == n) sum += static_cast<SumOf<T>>(from[j]);
        to[n] = static_cast<T>(sum);
      }
    });
  }
}

inline int64_t blocks_of_large(const Problem& p) { return std::min<int64_t>(p.maps * p.rows.queries, 1 << 20); }

}  // namespace
}  // namespace rpe_ops
