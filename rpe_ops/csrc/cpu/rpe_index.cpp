// rpe_index:      Y[b,h,i,j] = X[b,h,i, ids[i,j]]
// rpe_bucket_sum: S[b,h,i,n] = sum of X[b,h,i,j] over ids[i,j] = n, j ascending, so the bits do not depend on threads
//
// Both read the index once, before anything is written: it is small beside the maps (no batch, no heads). That pass
// finds the least and the largest id, which are checked, and leaves a copy in the smallest integers that hold N - 1.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "isa.h"

// The wide loops are chosen when the program runs; every compiler builds the plain ones, which are all that is left
// with RPE_OPS_PLAIN or on other processors.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(RPE_OPS_PLAIN)
#include <immintrin.h>
#define RPE_OPS_X86
#define RPE_OPS_INLINE inline __attribute__((always_inline))
#define RPE_OPS_AVX2 __attribute__((target("avx2,f16c")))
#define RPE_OPS_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define RPE_OPS_INLINE inline
#endif

namespace rpe_ops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// A thread is worth waking for this many elements, about 20 us of work.
constexpr int64_t kElementsPerThread = 32768;
// The same for the pass over the index, which does less for each: 100 us. Waking threads twice in a call is dear where
// other programs run on their cores.
constexpr int64_t kIdsPerThread = 524288;
// Ids that a block of query rows keeps in the first-level cache while all batches and heads pass by.
constexpr int64_t kBlockIds = 16384;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first three sizes and strides of a (B, H, Lq, _) tensor whose last stride is 1.
struct Rows {
  int64_t heads, queries;
  int64_t stride_b, stride_h, stride_i;

  int64_t at(int64_t bh, int64_t i) const {
    return bh / heads * stride_b + bh % heads * stride_h + i * stride_i;
  }
};

struct Bounds {
  int64_t low = std::numeric_limits<int64_t>::max();
  int64_t high = std::numeric_limits<int64_t>::min();
};

template <class From, class Id>
RPE_OPS_INLINE void narrow_run(const From* index, int64_t stride, Id* ids, int64_t keys, From& low, From& high) {
  From lowest = low, highest = high;
  for (int64_t j = 0; j < keys; ++j) {
    const From value = index[j * stride];
    lowest = std::min(lowest, value);
    highest = std::max(highest, value);
    ids[j] = static_cast<Id>(value);
  }
  low = lowest;
  high = highest;
}

template <class T, class Id>
void index_row(const T* row, const Id* ids, T* out, int64_t keys) {
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    const T a = row[ids[j]], b = row[ids[j + 1]], c = row[ids[j + 2]], d = row[ids[j + 3]];
    out[j] = a;
    out[j + 1] = b;
    out[j + 2] = c;
    out[j + 3] = d;
  }
  for (; j < keys; ++j) out[j] = row[ids[j]];
}

// kRows rows at once, each with bins of its own: their chains of load, add and store overlap, where neighbours of one
// row often want the same bin and have to wait for each other.
template <int kRows, class T, class Sum, class Id>
void sum_rows(const T* const* rows, const Id* const* ids, Sum* bins, int64_t buckets, int64_t keys) {
  for (int64_t j = 0; j < keys; ++j)
    for (int r = 0; r < kRows; ++r) bins[r * buckets + ids[r][j]] += static_cast<Sum>(rows[r][j]);
}

#ifdef RPE_OPS_X86

template <class From, class Id>
RPE_OPS_AVX512 void narrow_run_avx512(const From* index, Id* ids, int64_t keys, From& low, From& high) {
  narrow_run(index, 1, ids, keys, low, high);
}

// A table row in kRegs registers of 64 bytes, and 64 bytes of look-ups in it: one permutation for two registers, and
// the bit of the id that chooses between two pairs. A gather instruction takes an access for each element.
template <int kBytes>
struct Table;

template <>
struct Table<2> {
  static constexpr int kLanes = 32;
  RPE_OPS_AVX512 static __m512i load(const void* row, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, row); }
  RPE_OPS_AVX512 static void store(void* out, uint32_t mask, __m512i v) { _mm512_mask_storeu_epi16(out, mask, v); }
  RPE_OPS_AVX512 static __m512i ids(const uint8_t* ids) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids)));
  }
  RPE_OPS_AVX512 static __m512i ids(const uint8_t* ids, uint32_t mask) {
    return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, ids));
  }
  RPE_OPS_AVX512 static __m512i pair(__m512i a, __m512i id, __m512i b) { return _mm512_permutex2var_epi16(a, id, b); }
  RPE_OPS_AVX512 static __m512i choose(__m512i a, __m512i b, __m512i id, int bit) {
    return _mm512_mask_mov_epi16(a, _mm512_test_epi16_mask(id, _mm512_set1_epi16(static_cast<short>(bit))), b);
  }
};

template <>
struct Table<4> {
  static constexpr int kLanes = 16;
  RPE_OPS_AVX512 static __m512i load(const void* row, uint32_t mask) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), row);
  }
  RPE_OPS_AVX512 static void store(void* out, uint32_t mask, __m512i v) {
    _mm512_mask_storeu_epi32(out, static_cast<__mmask16>(mask), v);
  }
  RPE_OPS_AVX512 static __m512i ids(const uint8_t* ids) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)));
  }
  RPE_OPS_AVX512 static __m512i ids(const uint8_t* ids, uint32_t mask) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), ids));
  }
  RPE_OPS_AVX512 static __m512i pair(__m512i a, __m512i id, __m512i b) { return _mm512_permutex2var_epi32(a, id, b); }
  RPE_OPS_AVX512 static __m512i choose(__m512i a, __m512i b, __m512i id, int bit) {
    return _mm512_mask_mov_epi32(a, _mm512_test_epi32_mask(id, _mm512_set1_epi32(bit)), b);
  }
};

template <>
struct Table<8> {
  static constexpr int kLanes = 8;
  RPE_OPS_AVX512 static __m512i load(const void* row, uint32_t mask) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), row);
  }
  RPE_OPS_AVX512 static void store(void* out, uint32_t mask, __m512i v) {
    _mm512_mask_storeu_epi64(out, static_cast<__mmask8>(mask), v);
  }
  RPE_OPS_AVX512 static __m512i ids(const uint8_t* ids) {
    return _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(ids)));
  }
  RPE_OPS_AVX512 static __m512i ids(const uint8_t* ids, uint32_t mask) {
    return _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), ids));
  }
  RPE_OPS_AVX512 static __m512i pair(__m512i a, __m512i id, __m512i b) { return _mm512_permutex2var_epi64(a, id, b); }
  RPE_OPS_AVX512 static __m512i choose(__m512i a, __m512i b, __m512i id, int bit) {
    return _mm512_mask_mov_epi64(a, _mm512_test_epi64_mask(id, _mm512_set1_epi64(bit)), b);
  }
};

// The first `count` of 32 bits, for masks.
inline uint32_t first_bits(int64_t count) {
  return count >= 32 ? ~uint32_t{0} : count <= 0 ? 0 : (uint32_t{1} << count) - 1;
}

template <int kBytes, int kRegs>
RPE_OPS_AVX512 inline __attribute__((always_inline)) __m512i look_up(const __m512i* table, __m512i id) {
  using V = Table<kBytes>;
  if constexpr (kRegs == 2) {
    return V::pair(table[0], id, table[1]);
  } else {
    return V::choose(
        look_up<kBytes, kRegs / 2>(table, id), look_up<kBytes, kRegs / 2>(table + kRegs / 2, id), id,
        kRegs / 2 * V::kLanes);
  }
}

// `rows` rows of Y. Stores begin at a boundary of 64 bytes. The vectors at both ends of a row overlap their neighbours,
// and write what stands there already: on some processors a store under a mask takes as long as ten without.
template <int kBytes, int kRegs>
RPE_OPS_AVX512 void index_rows_registers(
    const char* x, int64_t stride, int64_t buckets, const uint8_t* ids, char* y, int64_t keys, int64_t rows) {
  using V = Table<kBytes>;
  int64_t offsets[kRegs];
  uint32_t masks[kRegs];
  for (int r = 0; r < kRegs; ++r) {
    masks[r] = first_bits(buckets - r * V::kLanes);
    offsets[r] = masks[r] ? r * 64 : 0;  // under a mask of zeros nothing is read, but no address may leave the row
  }
  const uint32_t short_mask = first_bits(keys);
  const int64_t last = keys - V::kLanes;
  for (int64_t i = 0; i < rows; ++i, x += stride, ids += keys, y += keys * kBytes) {
    __m512i table[kRegs];
    for (int r = 0; r < kRegs; ++r) table[r] = V::load(x + offsets[r], masks[r]);
    if (last < 0) {
      V::store(y, short_mask, look_up<kBytes, kRegs>(table, V::ids(ids, short_mask)));
      continue;
    }
    _mm512_storeu_si512(y, look_up<kBytes, kRegs>(table, V::ids(ids)));
    for (int64_t j = (64 - reinterpret_cast<uintptr_t>(y) % 64) / kBytes; j < last; j += V::kLanes)
      _mm512_storeu_si512(y + j * kBytes, look_up<kBytes, kRegs>(table, V::ids(ids + j)));
    _mm512_storeu_si512(y + last * kBytes, look_up<kBytes, kRegs>(table, V::ids(ids + last)));
  }
}

using IndexRows = void (*)(const char*, int64_t, int64_t, const uint8_t*, char*, int64_t, int64_t);

// The loop for a table of that many buckets, or null where more registers than pay would be needed.
template <int kBytes>
IndexRows index_rows_in_registers(Isa has, int64_t buckets) {
  constexpr int kLanes = Table<kBytes>::kLanes;
  if (has < Isa::avx512) return nullptr;
  if (buckets <= 2 * kLanes) return index_rows_registers<kBytes, 2>;
  if (buckets <= 4 * kLanes) return index_rows_registers<kBytes, 4>;
  if (buckets <= 8 * kLanes) return index_rows_registers<kBytes, 8>;
  // for float64 the plain loop is no faster than twice as many registers
  if (kBytes == 8 && buckets <= 16 * kLanes) return index_rows_registers<kBytes, 16>;
  return nullptr;
}

// kKeys keys of kLanes maps, turned so that a register holds one key of all maps. All maps share the ids, so a key adds
// its register to one bin of all of them: no lane ever meets another's bin. The lower half of each register is loaded
// from the first half of the maps and the upper half from the second, which leaves turns within halves.
template <class T>
struct Tile;

struct FloatTile {
  using Sum = float;
  using Vector = __m256;
  static constexpr int kLanes = 8;
  RPE_OPS_AVX2 static __m256 zero() { return _mm256_setzero_ps(); }
  RPE_OPS_AVX2 static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  RPE_OPS_AVX2 static __m256 get(const float* bin) { return _mm256_load_ps(bin); }
  RPE_OPS_AVX2 static void put(float* bin, __m256 v) { _mm256_store_ps(bin, v); }
  RPE_OPS_AVX2 static RPE_OPS_INLINE __m256 halves(const void* low, const void* high) {
    return _mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_loadu_ps(static_cast<const float*>(low))),
        _mm_loadu_ps(static_cast<const float*>(high)), 1);
  }
  RPE_OPS_AVX2 static RPE_OPS_INLINE void turn(const __m256* v, __m256* turned) {
    const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
    const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
    turned[0] = _mm256_shuffle_ps(a, c, 0x44);
    turned[1] = _mm256_shuffle_ps(a, c, 0xee);
    turned[2] = _mm256_shuffle_ps(b, d, 0x44);
    turned[3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  // Four 32-bit words of each of the eight rows, turned.
  template <class T>
  RPE_OPS_AVX2 static RPE_OPS_INLINE void load_turned(const T* const* rows, int64_t j, __m256* turned) {
    const __m256 v[4] = {
        halves(rows[0] + j, rows[4] + j), halves(rows[1] + j, rows[5] + j), halves(rows[2] + j, rows[6] + j),
        halves(rows[3] + j, rows[7] + j)};
    turn(v, turned);
  }
};

template <>
struct Tile<float> : FloatTile {
  static constexpr int kKeys = 4;
  RPE_OPS_AVX2 static RPE_OPS_INLINE void load(const float* const* rows, int64_t j, __m256* keys) {
    load_turned(rows, j, keys);
  }
  RPE_OPS_AVX2 static void store(float* to, __m128 v) { _mm_storeu_ps(to, v); }
};

// Two 16-bit keys travel as one word while they are turned.
template <>
struct Tile<BFloat16> : FloatTile {
  static constexpr int kKeys = 8;
  RPE_OPS_AVX2 static RPE_OPS_INLINE void load(const BFloat16* const* rows, int64_t j, __m256* keys) {
    __m256 pairs[4];
    load_turned(rows, j, pairs);
    for (int c = 0; c < 4; ++c) {
      const __m256i pair = _mm256_castps_si256(pairs[c]);
      keys[2 * c] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
      keys[2 * c + 1] = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(~0xffff)));
    }
  }
  RPE_OPS_AVX2 static void store(BFloat16* to, __m128 v) {
    // to nearest, ties to even; NaN stays NaN
    const __m128i bits = _mm_castps_si128(v);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff))), 16);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(v, v));
    const __m128i words = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc0), nan);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(words, words));
  }
};

template <>
struct Tile<Half> : FloatTile {
  static constexpr int kKeys = 8;
  RPE_OPS_AVX2 static RPE_OPS_INLINE void load(const Half* const* rows, int64_t j, __m256* keys) {
    __m256 pairs[4];
    load_turned(rows, j, pairs);
    for (int c = 0; c < 4; ++c) {
      // words of 16 bits, by quarters: even keys of maps 0 to 3, odd keys, even keys of maps 4 to 7, odd keys
      const __m256i pair = _mm256_castps_si256(pairs[c]);
      const __m256i even = _mm256_and_si256(pair, _mm256_set1_epi32(0xffff)), odd = _mm256_srli_epi32(pair, 16);
      const __m256i apart = _mm256_permute4x64_epi64(_mm256_packus_epi32(even, odd), 0xd8);
      keys[2 * c] = _mm256_cvtph_ps(_mm256_castsi256_si128(apart));
      keys[2 * c + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1));
    }
  }
  RPE_OPS_AVX2 static void store(Half* to, __m128 v) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Tile<double> {
  using Sum = double;
  using Vector = __m256d;
  static constexpr int kLanes = 4, kKeys = 2;
  RPE_OPS_AVX2 static __m256d zero() { return _mm256_setzero_pd(); }
  RPE_OPS_AVX2 static __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
  RPE_OPS_AVX2 static __m256d get(const double* bin) { return _mm256_load_pd(bin); }
  RPE_OPS_AVX2 static void put(double* bin, __m256d v) { _mm256_store_pd(bin, v); }
  RPE_OPS_AVX2 static RPE_OPS_INLINE __m256d halves(const double* low, const double* high) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(low)), _mm_loadu_pd(high), 1);
  }
  RPE_OPS_AVX2 static RPE_OPS_INLINE void turn(const __m256d* v, __m256d* turned) {
    turned[0] = _mm256_unpacklo_pd(v[0], v[1]);
    turned[1] = _mm256_unpackhi_pd(v[0], v[1]);
  }
  RPE_OPS_AVX2 static RPE_OPS_INLINE void load(const double* const* rows, int64_t j, __m256d* keys) {
    const __m256d v[2] = {halves(rows[0] + j, rows[2] + j), halves(rows[1] + j, rows[3] + j)};
    turn(v, keys);
  }
  RPE_OPS_AVX2 static void store(double* to, __m128d v) { _mm_storeu_pd(to, v); }
};

RPE_OPS_AVX2 inline __m128 upper_half(__m256 v) { return _mm256_extractf128_ps(v, 1); }
RPE_OPS_AVX2 inline __m128d upper_half(__m256d v) { return _mm256_extractf128_pd(v, 1); }
RPE_OPS_AVX2 inline __m128 lower_half(__m256 v) { return _mm256_castps256_ps128(v); }
RPE_OPS_AVX2 inline __m128d lower_half(__m256d v) { return _mm256_castpd256_pd128(v); }

// Neighbouring keys often want the same bin and would wait for each other's store: they take turns in so many sets.
constexpr int kSets = 2;

// bins[c % kSets][ids[c]] += keys[c] for c in [first, kKeys)
template <class V, class Id>
RPE_OPS_AVX2 RPE_OPS_INLINE void add_keys(
    const typename V::Vector* keys, const Id* ids, int first, typename V::Sum* bins, int64_t set_size) {
  for (int c = first; c < V::kKeys; ++c) {
    typename V::Sum* bin = bins + c % kSets * set_size + static_cast<int64_t>(ids[c]) * V::kLanes;
    V::put(bin, V::add(V::get(bin), keys[c]));
  }
}

// s_rows[l][n] = sum of x_rows[l][j] over ids[j] = n, for one query row of kLanes maps.
// bins: kSets * buckets * kLanes numbers, aligned to 32 bytes.
template <class T, class Id>
RPE_OPS_AVX2 void sum_lanes(
    const T* const* x_rows, T* const* s_rows, const Id* ids, int64_t keys, int64_t buckets,
    typename Tile<T>::Sum* bins) {
  using V = Tile<T>;
  constexpr int kLanes = V::kLanes, kKeys = V::kKeys;
  const int64_t set_size = buckets * kLanes;
  for (int64_t n = 0; n < kSets * set_size; n += kLanes) V::put(bins + n, V::zero());
  const T* x[kLanes];  // a copy that no store to a bin can change, for all the compiler knows
  std::copy(x_rows, x_rows + kLanes, x);
  typename V::Vector tile[kKeys];
  int64_t j = 0;
  for (; j + kKeys <= keys; j += kKeys) {
    V::load(x, j, tile);
    add_keys<V>(tile, ids + j, 0, bins, set_size);
  }
  if (j < keys) {
    // the last tile begins earlier, and its first keys have been added already
    const int64_t last = keys - kKeys;
    V::load(x, last, tile);
    add_keys<V>(tile, ids + last, static_cast<int>(j - last), bins, set_size);
  }
  constexpr int kColumns = kLanes / 2;  // of S, in half a register
  typename V::Vector sums[kColumns], rows[kColumns];
  for (int64_t n = 0; n < buckets; n += kColumns) {
    const int64_t first = std::min(n, buckets - kColumns);
    for (int c = 0; c < kColumns; ++c) {
      const typename V::Sum* bin = bins + (first + c) * kLanes;
      sums[c] = V::add(V::get(bin), V::get(bin + set_size));
    }
    V::turn(sums, rows);
    for (int c = 0; c < kColumns; ++c) {
      V::store(s_rows[c] + first, lower_half(rows[c]));
      V::store(s_rows[c + kColumns] + first, upper_half(rows[c]));
    }
  }
}
static_assert(kSets == 2, "sum_lanes adds two sets");

// Bins of one thread beyond which they leave the second-level cache, and the plain loop is no slower.
constexpr int64_t kMaxBinBytes = 256 * 1024;
// So few maps in the last group of lanes are left to the plain loop.
constexpr int64_t kMinLanes = 3;

// Sums of as many leading maps as fill lanes well; returns how many.
template <class T, class Id>
int64_t sum_maps_lanes(Isa has, const T* x, Rows rows, int64_t bh_count, int64_t buckets, const Id* ids, int64_t keys, T* s) {
  using V = Tile<T>;
  using Sum = typename V::Sum;
  constexpr int kLanes = V::kLanes;
  const int64_t bin_bytes = kSets * buckets * kLanes * static_cast<int64_t>(sizeof(Sum));
  if (has < Isa::avx2 || bin_bytes > kMaxBinBytes || keys < V::kKeys || buckets < kLanes / 2) return 0;
  const int64_t done = bh_count % kLanes < kMinLanes ? bh_count / kLanes * kLanes : bh_count;
  // rows inside, groups of maps outside: each lane reads one long piece
  torch::stable::parallel_for(
      0, ceil_div(done, kLanes) * rows.queries, std::max<int64_t>(1, kElementsPerThread / (kLanes * keys)),
      [&](int64_t begin, int64_t end) {
        const std::unique_ptr<char[]> memory(new char[bin_bytes + 32]);
        Sum* bins = reinterpret_cast<Sum*>((reinterpret_cast<uintptr_t>(memory.get()) + 31) / 32 * 32);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t bh = item / rows.queries * kLanes, i = item % rows.queries;
          const T* x_rows[kLanes];
          T* s_rows[kLanes];
          for (int l = 0; l < kLanes; ++l) {
            const int64_t map = std::min(bh + l, done - 1);  // spare lanes repeat the last map
            x_rows[l] = x + rows.at(map, i);
            s_rows[l] = s + (map * rows.queries + i) * buckets;
          }
          sum_lanes(x_rows, s_rows, ids + i * keys, keys, buckets, bins);
        }
      });
  return done;
}

#endif  // RPE_OPS_X86

// Y of `count` query rows of one (b, h).
template <class T, class Id>
void index_rows(
    [[maybe_unused]] Isa has, const T* x, int64_t stride, int64_t buckets, const Id* ids, T* y, int64_t keys, int64_t count) {
#ifdef RPE_OPS_X86
  if constexpr (std::is_same_v<Id, uint8_t>) {
    if (const IndexRows in_registers = index_rows_in_registers<sizeof(T)>(has, buckets)) {
      in_registers(
          reinterpret_cast<const char*>(x), stride * static_cast<int64_t>(sizeof(T)), buckets, ids,
          reinterpret_cast<char*>(y), keys, count);
      return;
    }
  }
#endif
  for (int64_t i = 0; i < count; ++i) index_row(x + i * stride, ids + i * keys, y + i * keys, keys);
}

template <class T, class Id>
void index_maps(Isa has, const T* x, Rows rows, int64_t bh_count, int64_t buckets, const Id* ids, int64_t keys, T* y) {
  // blocks of rows outside, maps inside: the ids of a block stay in the cache, and what is written is one long piece
  const int64_t block = std::max<int64_t>(1, std::min(kBlockIds / keys, ceil_div(rows.queries * bh_count, 64)));
  const int64_t blocks = ceil_div(rows.queries, block);
  torch::stable::parallel_for(
      0, blocks * bh_count, std::max<int64_t>(1, kElementsPerThread / (block * keys)), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = item / bh_count * block, bh = item % bh_count;
          index_rows(
              has, x + rows.at(bh, first), rows.stride_i, buckets, ids + first * keys,
              y + (bh * rows.queries + first) * keys, keys, std::min(block, rows.queries - first));
        }
      });
}

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

// One work item is kRows consecutive rows of the flattened (bh, i); the last one may have fewer.
template <class T, class Id>
void sum_maps_plain(
    const T* x, Rows rows, int64_t bh_first, int64_t bh_count, int64_t buckets, const Id* ids, int64_t keys, T* s) {
  using Sum = typename SumOf<T>::type;
  constexpr int kRows = 8;
  const int64_t total = (bh_count - bh_first) * rows.queries;
  torch::stable::parallel_for(
      0, ceil_div(total, kRows), std::max<int64_t>(1, kElementsPerThread / (kRows * (keys + buckets))),
      [&](int64_t begin, int64_t end) {
        std::vector<Sum> bins(kRows * buckets);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = bh_first * rows.queries + item * kRows;
          const int count = static_cast<int>(std::min<int64_t>(kRows, bh_count * rows.queries - first));
          const T* x_rows[kRows];
          const Id* id_rows[kRows];
          for (int r = 0; r < count; ++r) {
            const int64_t bh = (first + r) / rows.queries, i = (first + r) % rows.queries;
            x_rows[r] = x + rows.at(bh, i);
            id_rows[r] = ids + i * keys;
          }
          std::fill(bins.begin(), bins.end(), Sum{0});
          if (count == kRows) {
            sum_rows<kRows>(x_rows, id_rows, bins.data(), buckets, keys);
          } else {
            for (int r = 0; r < count; ++r)
              sum_rows<1>(x_rows + r, id_rows + r, bins.data() + r * buckets, buckets, keys);
          }
          for (int64_t n = 0; n < count * buckets; ++n) s[first * buckets + n] = static_cast<T>(bins[n]);
        }
      });
}

template <class From, class Id>
void narrow_row([[maybe_unused]] Isa has, const From* index, int64_t stride, Id* ids, int64_t keys, From& low, From& high) {
#ifdef RPE_OPS_X86
  if (stride == 1 && has >= Isa::avx512) return narrow_run_avx512(index, ids, keys, low, high);
#endif
  narrow_run(index, stride, ids, keys, low, high);
}

// The index as small integers, row after row, and its bounds.
template <class From, class Id>
Bounds narrow(
    Isa has, const From* index, int64_t stride_i, int64_t stride_j, int64_t queries, int64_t keys, Id* ids) {
  const int64_t pieces = std::min<int64_t>(queries, 64);
  std::vector<Bounds> bounds(pieces);
  torch::stable::parallel_for(
      0, pieces, std::max<int64_t>(1, kIdsPerThread * pieces / (queries * keys)), [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
          From low = std::numeric_limits<From>::max(), high = std::numeric_limits<From>::min();
          for (int64_t i = queries * piece / pieces; i < queries * (piece + 1) / pieces; ++i)
            narrow_row(has, index + i * stride_i, stride_j, ids + i * keys, keys, low, high);
          bounds[piece] = {static_cast<int64_t>(low), static_cast<int64_t>(high)};
        }
      });
  Bounds all;
  for (const Bounds& one : bounds) all = {std::min(all.low, one.low), std::max(all.high, one.high)};
  return all;
}

// use(ids) with the checked ids as const uint8_t*, uint16_t* or int64_t*, whichever holds buckets - 1.
template <class Use>
void with_ids(Isa has, const Tensor& index, int64_t buckets, const Use& use) {
  const int64_t queries = index.size(0), keys = index.size(1);
  const auto narrowed = [&](auto id) {
    using Id = decltype(id);
    const std::unique_ptr<Id[]> ids(new Id[queries * keys]);
    const auto bounds_of = [&](auto from) {
      using From = decltype(from);
      return narrow(
          has, static_cast<const From*>(index.const_data_ptr()), index.stride(0), index.stride(1), queries, keys,
          ids.get());
    };
    Bounds bounds;
    switch (index.scalar_type()) {
      case ScalarType::Byte: bounds = bounds_of(uint8_t{}); break;
      case ScalarType::Short: bounds = bounds_of(int16_t{}); break;
      case ScalarType::Int: bounds = bounds_of(int32_t{}); break;
      case ScalarType::Long: bounds = bounds_of(int64_t{}); break;
      default: check(false, "index is neither uint8, int16, int32 nor int64");
    }
    check_in_table(bounds.low, bounds.high, buckets);
    use(const_cast<const Id*>(ids.get()));
  };
  if (buckets <= 1 << 8) return narrowed(uint8_t{});
  if (buckets <= 1 << 16) return narrowed(uint16_t{});
  narrowed(int64_t{});
}

// call(zero of the C++ type) for the four floating-point types.
template <class Call>
void with_dtype(const Tensor& input, const Call& call) {
  switch (input.scalar_type()) {
    case ScalarType::Double: return call(double{});
    case ScalarType::Float: return call(float{});
    case ScalarType::Half: return call(Half{});
    case ScalarType::BFloat16: return call(BFloat16{});
    default: check(false, "input is neither float64, float32, float16 nor bfloat16");
  }
}

Tensor with_unit_last_stride(const Tensor& input) {
  return input.size(3) <= 1 || input.stride(3) == 1 ? input : torch::stable::contiguous(input);
}

Rows rows_of(const Tensor& input) {
  return {input.size(1), input.size(2), input.stride(0), input.stride(1), input.stride(2)};
}

Tensor rpe_index(const Tensor& input, const Tensor& index) {
  check_shapes(input, index);
  const int64_t keys = index.size(1), buckets = input.size(3), maps = input.size(0) * input.size(1);
  Tensor output = torch::stable::new_empty(input, {input.size(0), input.size(1), input.size(2), keys});
  if (output.numel() == 0) return output;
  const Tensor x = with_unit_last_stride(input);
  const Isa has = isa();
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    with_ids(has, index, buckets, [&](const auto* ids) {
      index_maps(
          has, static_cast<const T*>(x.const_data_ptr()), rows_of(x), maps, buckets, ids, keys,
          static_cast<T*>(output.mutable_data_ptr()));
    });
  });
  return output;
}

Tensor rpe_bucket_sum(const Tensor& input, const Tensor& index, int64_t num_buckets) {
  check_shapes(input, index);
  check_columns(input, index, num_buckets);
  const std::vector<int64_t> sizes = {input.size(0), input.size(1), input.size(2), num_buckets};
  if (input.numel() == 0) return torch::stable::new_zeros(input, sizes);
  const int64_t keys = index.size(1), maps = input.size(0) * input.size(1);
  Tensor output = torch::stable::new_empty(input, sizes);
  const Tensor x = with_unit_last_stride(input);
  const Isa has = isa();
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    with_ids(has, index, num_buckets, [&](const auto* ids) {
      const T* from = static_cast<const T*>(x.const_data_ptr());
      T* to = static_cast<T*>(output.mutable_data_ptr());
      int64_t done = 0;
#ifdef RPE_OPS_X86
      done = sum_maps_lanes(has, from, rows_of(x), maps, num_buckets, ids, keys, to);
#endif
      if (done < maps) sum_maps_plain(from, rows_of(x), done, maps, num_buckets, ids, keys, to);
    });
  });
  return output;
}

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CPU, m) {
  m.impl("rpe_index", TORCH_BOX(&rpe_ops::rpe_index));
  m.impl("rpe_bucket_sum", TORCH_BOX(&rpe_ops::rpe_bucket_sum));
}
