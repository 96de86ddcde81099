// The tile kernels of rpe_attention. No include guard: rpe_attention.cpp includes this file once for each instruction set,
// with RPE_ISA (a namespace), RPE_BYTES (of a vector) and, for AVX-512, RPE_AVX512 set, and RPE_BRAIN where bfloat16 has
// products of its own.

namespace rpe_ops::RPE_ISA {

#define RPE_INLINE inline __attribute__((always_inline))

template <class T>
struct simd;
template <>
struct simd<float> {
  typedef float v __attribute__((vector_size(RPE_BYTES)));
  typedef float u __attribute__((vector_size(RPE_BYTES), aligned(4), may_alias));
  typedef int32_t i __attribute__((vector_size(RPE_BYTES)));
  using integer = int32_t;
  static constexpr int W = RPE_BYTES / 4;
  static constexpr float log2e = 1.44269504f, shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, least = -87.0f;
  static constexpr int mantissa = 23, terms = 6;
  static constexpr float series[terms] = {1.9875691e-4f, 1.3981999e-3f, 8.3334519e-3f,
                                          4.1665795e-2f, 1.6666665e-1f, 5.0000001e-1f};
};
template <>
struct simd<double> {
  typedef double v __attribute__((vector_size(RPE_BYTES)));
  typedef double u __attribute__((vector_size(RPE_BYTES), aligned(8), may_alias));
  typedef int64_t i __attribute__((vector_size(RPE_BYTES)));
  using integer = int64_t;
  static constexpr int W = RPE_BYTES / 8;
  static constexpr double log2e = 1.4426950408889634, shift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6, least = -708.0;
  static constexpr int mantissa = 52, terms = 12;
  static constexpr double series[terms] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                           1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                           1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

template <class T>
using vec = typename simd<T>::v;
template <class T>
using uvec = typename simd<T>::u;

template <class T>
RPE_INLINE vec<T> load(const T* from) {
  return *reinterpret_cast<const uvec<T>*>(from);
}
template <class T>
RPE_INLINE void store(T* to, vec<T> x) {
  *reinterpret_cast<uvec<T>*>(to) = x;
}
template <class T>
RPE_INLINE vec<T> spread(T x) {
  return vec<T>{} + x;
}

// exp(x) for x <= 88 to about 1 ulp; 0 below the smallest normal number, also for -inf.
template <class T>
RPE_INLINE vec<T> exponential(vec<T> x) {
  using s = simd<T>;
  typedef typename s::i ivec;
  const vec<T> clamped = x < spread(s::least) ? spread(s::least) : x;
  const vec<T> shifted = clamped * s::log2e + s::shift;
  const vec<T> n = shifted - s::shift;
  const vec<T> r = (clamped - n * s::ln2_high) - n * s::ln2_low;
  vec<T> p = spread(s::series[0]);
#pragma GCC unroll 12
  for (int t = 1; t < s::terms; ++t) p = p * r + s::series[t];
  p = p * (r * r) + r + T(1);
  const ivec bits = (ivec)p + ((ivec)shifted << s::mantissa);
  return x < spread(s::least) ? vec<T>{} : (vec<T>)bits;
}

template <class T>
RPE_INLINE T sum_of(vec<T> x) {
  T total = 0;
  for (int w = 0; w < simd<T>::W; ++w) total += x[w];
  return total;
}

// ---- storage <-> working precision

RPE_INLINE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
RPE_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
RPE_INLINE float from_half(uint16_t h) {
  // exponent and mantissa move into place, 2^112 corrects the bias, subnormal numbers included
  const float magnitude = from_bits(uint32_t(h & 0x7fff) << 13) * from_bits(0x77800000u);
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return from_bits(to_bits(magnitude) | special | uint32_t(h & 0x8000) << 16);
}
RPE_INLINE uint16_t to_half(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // a subnormal half: adding 0.5 aligns and rounds the mantissa
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
RPE_INLINE float from_brain(uint16_t h) { return from_bits(uint32_t(h) << 16); }
RPE_INLINE uint16_t to_brain(float x) {
  const uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);  // no branch: loops become vectors
}

template <class T>
T get(const char* data, int64_t at, Storage storage) {
  switch (storage) {
    case Storage::f32: return T(reinterpret_cast<const float*>(data)[at]);
    case Storage::f64: return T(reinterpret_cast<const double*>(data)[at]);
    case Storage::bf16: return T(from_brain(reinterpret_cast<const uint16_t*>(data)[at]));
    case Storage::f16: return T(from_half(reinterpret_cast<const uint16_t*>(data)[at]));
    default: return reinterpret_cast<const uint8_t*>(data)[at] ? T(0) : -T(__builtin_inf());
  }
}

inline int64_t row_of(const View& view, int64_t b, int64_t h, int64_t l) {
  return b * view.b + h * view.h + l * view.l;
}

// to[0..n) = factor * row `at` of view
template <class T>
void load_row(T* __restrict to, const View& view, int64_t at, int64_t n, T factor = T(1)) {
  const char* data = view.data;
  if (view.d == 1 && view.storage == Storage::f32) {
    const float* from = reinterpret_cast<const float*>(data) + at;
    for (int64_t c = 0; c < n; ++c) to[c] = T(from[c]) * factor;
  } else if (view.d == 1 && view.storage == Storage::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(data) + at;
    for (int64_t c = 0; c < n; ++c) to[c] = T(from_brain(from[c])) * factor;
  } else {
    for (int64_t c = 0; c < n; ++c) to[c] = get<T>(data, at + c * view.d, view.storage) * factor;
  }
}

template <class T>
void put(char* data, int64_t at, Storage storage, T x) {
  switch (storage) {
    case Storage::f32: reinterpret_cast<float*>(data)[at] = float(x); break;
    case Storage::f64: reinterpret_cast<double*>(data)[at] = double(x); break;
    case Storage::bf16: reinterpret_cast<uint16_t*>(data)[at] = to_brain(float(x)); break;
    default: reinterpret_cast<uint16_t*>(data)[at] = to_half(float(x));
  }
}

template <class T>
void store_row(const View& view, int64_t at, const T* __restrict from, int64_t n, T factor = T(1)) {
  if (view.d == 1 && view.storage == Storage::f32) {
    float* to = reinterpret_cast<float*>(view.data) + at;
    for (int64_t c = 0; c < n; ++c) to[c] = float(from[c] * factor);
  } else if (view.d == 1 && view.storage == Storage::bf16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(view.data) + at;
    for (int64_t c = 0; c < n; ++c) to[c] = to_brain(float(from[c] * factor));
  } else {
    for (int64_t c = 0; c < n; ++c) put<T>(view.data, at + c * view.d, view.storage, from[c] * factor);
  }
}

// The used columns of a row of a table, side by side.
template <class T>
void load_table(T* __restrict to, const Term& term, const View& view, int64_t at) {
  if (term.used == term.buckets) return load_row<T>(to, view, at, term.used);
  for (int64_t c = 0; c < term.used; ++c) to[c] = get<T>(view.data, at + term.columns[c] * view.d, view.storage);
}
template <class T>
void store_table(const Term& term, const View& view, int64_t at, const T* __restrict from, T factor) {
  if (term.used == term.buckets) return store_row<T>(view, at, from, term.used, factor);
  for (int64_t c = 0; c < term.buckets; ++c) put<T>(view.data, at + c * view.d, view.storage, T(0));
  for (int64_t c = 0; c < term.used; ++c) {
    put<T>(view.data, at + term.columns[c] * view.d, view.storage, from[c] * factor);
  }
}

// ---- scratch of a thread, and how products read matrices

// Without a base it only counts.
template <class T>
struct Arena {
  char* base;
  int64_t used = 0;
  T* take(int64_t n) { return array<T>(n); }
  template <class U>
  U* array(int64_t n) {
    U* at = base == nullptr ? nullptr : reinterpret_cast<U*>(base + used);
    used += round_up(n * int64_t(sizeof(U)), 64) + 64;  // a line between, against 4 KiB aliases
    return at;
  }
};

// A matrix (R, C) of numbers, and the forms in which products read it: `rows` where they add along its rows, `pairs`
// where they add along its columns.
template <class T, class Item>
struct Operand {
  T* numbers = nullptr;
  Item* rows = nullptr;
  Item* pairs = nullptr;
};

// Products of the numbers themselves: one form serves all.
template <class T>
struct Exact {
  using Number = T;
  using Item = T;
  using Matrix = Operand<T, T>;
  using vector = vec<T>;
  static constexpr bool rounds = false;
  static constexpr int64_t items(int64_t n) { return n; }  // that hold n numbers of a sum

  static RPE_INLINE vec<T> read(const T* from) { return load(from); }
  static RPE_INLINE vec<T> repeat(T x) { return spread(x); }
  static RPE_INLINE vec<T> multiply_add(vec<T> sum, vec<T> x, vec<T> y) { return sum + x * y; }

  static Matrix over(Arena<T>&, T* numbers, int64_t, int64_t, bool, bool) { return {numbers, numbers, numbers}; }
  static Matrix input(Arena<T>& arena, int64_t R, int64_t C, bool pairs) {
    return over(arena, arena.take(R * C), R, C, true, pairs);
  }
  static void load_row(const Matrix& to, int64_t at, const View& view, int64_t from, int64_t n, T factor) {
    RPE_ISA::load_row<T>(to.rows + at, view, from, n, factor);
  }
  static void clear_row(const Matrix& to, int64_t at, int64_t n) {
    for (int64_t c = 0; c < n; ++c) to.rows[at + c] = T(0);
  }
  static void make_rows(const Matrix&, int64_t, int64_t, int64_t) {}
  static void make_pairs(const Matrix&, int64_t, int64_t) {}
  static void pair_rows(const Matrix&, int64_t, int64_t) {}
};

#ifdef RPE_BRAIN
#include "rpe_attention_brain.h"
#endif

// ---- matrix products: C (M, N) [+]= factor A (M, K) B (K, N), M a multiple of 8, N of whole vectors

#ifdef RPE_AVX512
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;  // kRows * kVectors sums stay in registers

// TA: A is given as (K, M). K counts items. The factor is for products that round: others have it in A.
template <class X, int NV, bool TA>
void block_product(int64_t K, const typename X::Item* a, int64_t lda, const typename X::Item* b, int64_t ldb,
                   typename X::Number* c, int64_t ldc, bool add, typename X::Number factor) {
  using T = typename X::Number;
  constexpr int W = simd<T>::W;
  vec<T> sum[kRows][NV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[r][n] = add ? load(c + r * ldc + n * W) : vec<T>{};
  }
  for (int64_t k = 0; k < K; ++k) {
    typename X::vector row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = X::read(b + k * ldb + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename X::vector x = X::repeat(TA ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[r][n] = X::multiply_add(sum[r][n], x, row[n]);
    }
  }
  if (X::rounds && factor != T(1)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[r][n] *= factor;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + r * ldc + n * W, sum[r][n]);
  }
}

// Vectors of the next panel, of those that are left: 3, but 2 and 2 rather than 3 and 1.
RPE_INLINE int64_t panel_of(int64_t left) { return left == 4 ? 2 : left < kVectors ? left : kVectors; }

// A is `rows` with stride lda, or (TA) `pairs`; B is `pairs` with stride ldb, or lies panel by panel
template <class X, bool TA>
void product(int64_t M, int64_t vectors, int64_t K, const typename X::Item* a, int64_t lda, const typename X::Item* b,
             int64_t ldb, bool panelled, typename X::Number* c, int64_t ldc, bool add,
             typename X::Number factor = typename X::Number(1)) {
  using T = typename X::Number;
  constexpr int W = simd<T>::W;
  constexpr int64_t depth = 128;  // rows of B that stay in L1
  K = X::items(K);
  if (!TA) lda = X::items(lda);
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = panel_of(vectors - first);
    const typename X::Item* panel = b + first * W * (panelled ? K : 1);
    const int64_t stride = panelled ? count * W : ldb;
    for (int64_t k = 0; k == 0 || k < K; k += depth) {
      const int64_t deep = K - k < depth ? K - k : depth;
      const T last = k + depth < K ? T(1) : factor;
      for (int64_t m = 0; m < M; m += kRows) {
        const typename X::Item* from = a + (TA ? k * lda + m : m * lda + k);
        T* to = c + m * ldc + first * W;
        const bool more = add || k > 0;
        if (count == 3) {
          block_product<X, 3, TA>(deep, from, lda, panel + k * stride, stride, to, ldc, more, last);
        } else if (count == 2) {
          block_product<X, 2, TA>(deep, from, lda, panel + k * stride, stride, to, ldc, more, last);
        } else {
          block_product<X, 1, TA>(deep, from, lda, panel + k * stride, stride, to, ldc, more, last);
        }
      }
    }
    first += count;
  }
}

#ifdef RPE_AVX512
RPE_INLINE void transpose16(__m512 r[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

// to = from^T in panels: from (rows, D) with stride ld, rows padded with zeros to whole vectors
template <class X>
void pack_transposed(typename X::Item* to, const typename X::Item* from, int64_t ld, int64_t rows, int64_t D) {
  using T = typename X::Item;
  constexpr int W = simd<typename X::Number>::W;
  ld = X::items(ld), D = X::items(D);
  const int64_t vectors = round_up(rows, W) / W;
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = panel_of(vectors - first);
    T* panel = to + first * W * D;
    for (int64_t n = 0; n < count; ++n) {
      const T* block = from + (first + n) * W * ld;
      int64_t d = 0;
#ifdef RPE_AVX512
      if constexpr (sizeof(T) == 4) {
        for (; d + 16 <= D; d += 16) {
          __m512 r[16];
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) r[w] = _mm512_loadu_ps(reinterpret_cast<const float*>(block + w * ld + d));
          transpose16(r);
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) {
            _mm512_storeu_ps(reinterpret_cast<float*>(panel + ((d + w) * count + n) * 16), r[w]);
          }
        }
      }
#endif
      for (; d < D; ++d) {
        for (int w = 0; w < W; ++w) panel[(d * count + n) * W + w] = block[w * ld + d];
      }
    }
    first += count;
  }
}

// ---- gather and bucket sums

#ifdef RPE_AVX512
template <int R>
struct Registers {
  __m512 part[R];
  RPE_INLINE explicit Registers(const float* table) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = _mm512_loadu_ps(table + 16 * r);
  }
  RPE_INLINE __m512 operator()(const uint8_t* ids) const {
    const __m512i id = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)));
    if constexpr (R == 1) {
      return _mm512_permutexvar_ps(id, part[0]);
    } else if constexpr (R == 2) {
      return _mm512_permutex2var_ps(part[0], id, part[1]);
    } else {
      const __m512 low = _mm512_permutex2var_ps(part[0], id, part[1]);
      const __m512 high = _mm512_permutex2var_ps(part[2], id, part[3]);
      return _mm512_mask_blend_ps(_mm512_test_epi32_mask(id, _mm512_set1_epi32(32)), low, high);
    }
  }
};
#endif

// row[j] += table[ids[j]]
template <class T>
void add_gathered(T* __restrict row, const T* __restrict table, const Term& term, int64_t i, int64_t n) {
  if (!term.narrow) {
    const int32_t* ids = static_cast<const int32_t*>(term.ids) + i * term.ids_stride;
    for (int64_t j = 0; j < n; ++j) row[j] += table[ids[j]];
    return;
  }
  const uint8_t* ids = static_cast<const uint8_t*>(term.ids) + i * term.ids_stride;
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4) {
    const auto in_registers = [&](const auto& lookup) {
      for (int64_t j = 0; j < n; j += 16) {
        _mm512_storeu_ps(row + j, _mm512_add_ps(_mm512_loadu_ps(row + j), lookup(ids + j)));
      }
    };
    if (term.width <= 16) return in_registers(Registers<1>(table));
    if (term.width <= 32) return in_registers(Registers<2>(table));
    if (term.width <= 64) return in_registers(Registers<4>(table));
  }
#endif
  for (int64_t j = 0; j < n; ++j) row[j] += table[ids[j]];
}

// Where the ids of query i begin, that of key 0 first.
RPE_INLINE int64_t block_of(int64_t i, int64_t keys) { return i / 16 * keys * 16; }

// S[i, j] += tables[j, ids[j, i]] for the queries i of a tile and the keys [begin, end)
template <class T>
void add_gathered_transposed(T* tile, int64_t ld, const T* tables, const Term& term, int64_t first, int64_t rows,
                             int64_t keys, int64_t begin, int64_t end) {
  const auto plain = [&](const auto* ids) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        tile[i * ld + j] += tables[j * term.width + ids[block_of(first + i, keys) + j * 16 + i % 16]];
      }
    }
  };
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4) {
    const auto in_registers = [&](auto parts) {
      constexpr int R = decltype(parts)::value;
      for (int64_t i = 0; i < rows; i += 16) {
        const uint8_t* ids = static_cast<const uint8_t*>(term.ids) + block_of(first + i, keys);
        for (int64_t j = begin; j < end; j += 16) {
          __m512 r[16];
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) {
            // what lies beyond the last key is masked later
            const int64_t key = j + w < keys ? j + w : keys - 1;
            r[w] = Registers<R>(tables + key * term.width)(ids + key * 16);
          }
          transpose16(r);
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) {
            float* to = tile + (i + w) * ld + j;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), r[w]));
          }
        }
      }
    };
    if (term.narrow && term.width <= 16) return in_registers(Count<1>());
    if (term.narrow && term.width <= 32) return in_registers(Count<2>());
    if (term.narrow && term.width <= 64) return in_registers(Count<4>());
  }
#endif
  if (term.narrow) {
    plain(static_cast<const uint8_t*>(term.ids));
  } else {
    plain(static_cast<const int32_t*>(term.ids));
  }
}

// sums[n] = sum of row[j] over ids[j] = n; `sums` has room for four copies, so that equal neighbours do not wait
template <class T>
void bucket_sums(T* __restrict sums, const T* __restrict row, const Term& term, int64_t i, int64_t n,
                 T* __restrict buffer) {
  constexpr int W = simd<T>::W;
  const int64_t width = term.width;
  for (int64_t c = 0; c < 4 * width; c += W) store(sums + c, vec<T>{});
  const auto add = [&](const T* from, const auto* ids, int64_t count) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) sums[w * width + ids[j + w]] += from[j + w];
    }
    for (; j < count; ++j) sums[ids[j]] += from[j];
  };
  if (!term.narrow) {
    add(row, static_cast<const int32_t*>(term.ids) + i * term.ids_stride, n);
  } else if (const uint8_t* ids = static_cast<const uint8_t*>(term.ids) + i * term.ids_stride; term.groups == nullptr) {
    add(row, ids, n);
  } else {
    add(row, ids, term.first);
    const uint8_t* members = term.groups + i * term.groups_stride;
    const uint8_t* sizes = members + term.segments;
    const T* totals[256];
    const uint8_t* buckets[256];
    int64_t count = 0;
    for (int64_t seen = 0; seen < term.segments; seen += sizes[count++]) {
      const int64_t at = term.first + members[seen] * term.length;
      totals[count] = row + at;
      buckets[count] = ids + at;
      if (sizes[count] == 1) continue;
      for (int64_t c = 0; c < term.length; c += W) {
        vec<T> total = load(row + at + c);
        for (int64_t s = 1; s < sizes[count]; ++s) {
          total += load(row + term.first + members[seen + s] * term.length + c);
        }
        store(buffer + c, total);
      }
      totals[count] = buffer;
      buffer += term.length;
    }
    // across the groups, which seldom share a bucket, before the next column, which often does
    for (int64_t c = 0; c < term.length; ++c) {
      T* __restrict copy = sums + c % 4 * width;
      for (int64_t g = 0; g < count; ++g) copy[buckets[g][c]] += totals[g][c];
    }
  }
  for (int64_t c = 0; c < width; c += W) {
    const T* at = sums + c;
    store(sums + c, (load(at) + load(at + width)) + (load(at + 2 * width) + load(at + 3 * width)));
  }
}

// sums[j, n] += sum of tile[i, j] over the queries i of a tile with ids[j, i] = n
template <class T>
void bucket_sums_transposed(T* sums, const T* tile, int64_t ld, const Term& term, int64_t first, int64_t rows,
                            int64_t keys) {
  const int64_t width = term.width;
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4) {
    if (term.narrow) {
      for (int64_t i = 0; i < rows; i += 16) {
        const uint8_t* ids = static_cast<const uint8_t*>(term.ids) + block_of(first + i, keys);
        const int64_t high = rows - i < 16 ? rows - i : 16;
        for (int64_t j = 0; j < keys; j += 16) {
          __m512 r[16];
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) r[w] = _mm512_loadu_ps(tile + (i + w) * ld + j);
          transpose16(r);
          alignas(64) float block[16][16];
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) _mm512_store_ps(block[w], r[w]);
          if (j + 16 <= keys) {
            // four keys in turn: equal neighbours of one row do not wait for each other
            for (int w = 0; w < 16; w += 4) {
              float* to = sums + (j + w) * width;
              const uint8_t* id = ids + (j + w) * 16;
              for (int64_t n = 0; n < high; ++n) {
                to[id[n]] += block[w][n];
                to[width + id[16 + n]] += block[w + 1][n];
                to[2 * width + id[32 + n]] += block[w + 2][n];
                to[3 * width + id[48 + n]] += block[w + 3][n];
              }
            }
          } else {
            for (int64_t w = 0; w < keys - j; ++w) {
              for (int64_t n = 0; n < high; ++n) sums[(j + w) * width + ids[(j + w) * 16 + n]] += block[w][n];
            }
          }
        }
      }
      return;
    }
  }
#endif
  const auto add = [&](const auto* ids) {
    for (int64_t j = 0; j < keys; ++j) {
      T* to = sums + j * width;
      for (int64_t i = 0; i < rows; ++i) {
        to[ids[block_of(first + i, keys) + j * 16 + i % 16]] += tile[i * ld + j];
      }
    }
  };
  if (term.narrow) {
    add(static_cast<const uint8_t*>(term.ids));
  } else {
    add(static_cast<const int32_t*>(term.ids));
  }
}

// ---- dropout: weight (b, h, i, j) is dropped iff mix(key(seed, b, h, i) ^ j) >> 8 is below p * 2^24

RPE_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
inline uint32_t dropout_key(uint64_t seed, int64_t head, int64_t i) {
  const uint32_t key = mix(mix(uint32_t(seed) + 0x9e3779b9u) ^ uint32_t(seed >> 32));
  return mix(mix(key ^ uint32_t(head)) ^ uint32_t(i));
}
// keep[j] = 1 / (1 - p) or 0
template <class T>
void dropout_row(T* __restrict keep, double p, uint32_t key, int64_t n) {
  const int32_t least = int32_t(p * 16777216.0 + 0.5);
  const T factor = p < 1 ? T(1 / (1 - p)) : T(0);
  for (int64_t j = 0; j < n; ++j) keep[j] = int32_t(mix(key ^ uint32_t(j)) >> 8) < least ? T(0) : factor;
}

// ---- the tile

// What a thread keeps of a term, all but `table` where it has a weight. On queries an exact W comes with the scale.
template <class X>
struct Weight {
  typename X::Matrix down;  // (D, width): W, on values its transpose
  typename X::Matrix up;    // (width, Dp): the transpose of W, on values W
  typename X::Matrix tile;  // (tile, width): rows of the table of a tile's queries, then those of its gradient; on
                            // values first those of the bucket sums' gradient, then the sums
  typename X::Matrix table;  // (L8, width): on queries the gradient of the table of all keys
  typename X::Number* gradient = nullptr;  // of W, laid out as W is
};

template <class X>
struct Worker {
  using T = typename X::Number;
  using Matrix = typename X::Matrix;
  static constexpr int W = simd<T>::W;
  const Problem& p;
  const int64_t Dp = round_up(p.D, W > 8 ? W : 8), Lp = round_up(p.Lk, W), L16 = round_up(p.Lk, 16);
  const int64_t L8 = round_up(p.Lk, 8);
  const bool backward = p.backward;
  // rounded queries would be rounded again by the scale: they get it behind their products
  const T early = X::rounds ? T(1) : T(p.scale), late = X::rounds ? T(p.scale) : T(1);
  Arena<T> arena;
  Matrix keys, values, query, grad, scores, weights_grad;
  typename X::Item *keys_t, *values_t;
  T *result, *mask_row, *keep, *row_table, *segment, *grad_k = nullptr, *grad_v = nullptr, *tables_q;
  Weight<X> *weights_q, *weights_k, *weights_v;
  int64_t head = -1, b = 0, h = 0;
  bool mask_ready = false;

  Worker(const Problem& problem, char* scratch) : p(problem), arena{scratch} {
    const int64_t M = p.tile;
    keys = X::input(arena, L16, Dp, backward);
    keys_t = arena.template array<typename X::Item>(Lp * X::items(p.D));
    values = X::input(arena, L16, Dp, !backward);
    values_t = backward ? arena.template array<typename X::Item>(Lp * X::items(p.D)) : nullptr;
    query = X::input(arena, M, Dp, backward);
    if (backward) grad = X::input(arena, M, Dp, true);
    scores = X::over(arena, arena.take(M * L16), M, L16, !backward, backward);
    if (backward) weights_grad = X::over(arena, arena.take(M * L16), M, L16, true, true);
    result = arena.take(M * Dp);
    mask_row = p.mask.data != nullptr ? arena.take(L16) : nullptr;
    keep = p.dropout_p > 0 ? arena.take(L16) : nullptr;
    int64_t widest = W, total = 0;
    for (int64_t t = 0; t < p.num_k; ++t) widest = widest < p.on_k[t].width ? p.on_k[t].width : widest;
    for (int64_t t = 0; t < p.num_v; ++t) widest = widest < p.on_v[t].width ? p.on_v[t].width : widest;
    for (int64_t t = 0; t < p.num_q; ++t) total += p.on_q[t].width;
    row_table = arena.take(4 * widest);
    segment = arena.take(p.Lk + W);
    tables_q = arena.take(total * L8);
    if (backward) {
      grad_k = arena.take(L16 * Dp);
      grad_v = arena.take(L16 * Dp);
    }
    weights_q = weights(p.on_q, p.num_q, true, backward, 0, backward ? L8 : 0);
    weights_k = weights(p.on_k, p.num_k, true, backward, M, 0);
    weights_v = weights(p.on_v, p.num_v, backward, !backward, M, 0);
  }

  Weight<X>* weights(const Term* terms, int64_t count, bool down, bool up, int64_t tile, int64_t table) {
    Weight<X>* all = arena.template array<Weight<X>>(count);
    for (int64_t t = 0; t < count; ++t) {
      Weight<X> one;
      const int64_t width = terms[t].width;
      const bool weight = terms[t].weight;
      if (table > 0) one.table = X::over(arena, arena.take(table * width), table, width, weight, weight);
      if (weight) {
        if (down) one.down = X::over(arena, arena.take(p.D * width), p.D, width, false, true);
        if (up) one.up = X::over(arena, arena.take(width * Dp), width, Dp, false, true);
        if (tile > 0) one.tile = X::over(arena, arena.take(tile * width), tile, width, true, true);
        if (backward) one.gradient = arena.take(Dp * width);
      }
      if (all != nullptr) all[t] = one;
    }
    return all;
  }

  // W of this head, in the forms that are wanted of it
  void load_weight(const Weight<X>& to, const Term& term, T factor) {
    const int64_t width = term.width;
    for (int64_t d = 0; d < p.D; ++d) {
      T* row = to.down.numbers + d * width;
      load_table(row, term, term.table, row_of(term.table, 0, h, d));
      for (int64_t c = 0; c < term.used; ++c) row[c] *= factor;
      clear(row + term.used, width - term.used);
    }
    X::make_pairs(to.down, p.D, width);
    if (!backward) return;
    transpose(to.up.numbers, Dp, to.down.numbers, width, p.D, width);
    X::make_pairs(to.up, width, Dp);
  }
  void load_weight_on_values(const Weight<X>& to, const Term& term) {
    if (!backward) {
      for (int64_t c = 0; c < term.used; ++c) {
        T* row = to.up.numbers + c * Dp;
        load_row<T>(row, term.table, row_of(term.table, 0, h, term.columns[c]), p.D);
        clear(row + p.D, Dp - p.D);
      }
      clear(to.up.numbers + term.used * Dp, (term.width - term.used) * Dp);
      X::make_pairs(to.up, term.width, Dp);
    } else {
      for (int64_t c = 0; c < term.used; ++c) {
        const int64_t at = row_of(term.table, 0, h, term.columns[c]);
        for (int64_t d = 0; d < p.D; ++d) {
          to.down.numbers[d * term.width + c] = get<T>(term.table.data, at + d * term.table.d, term.table.storage);
        }
      }
      for (int64_t d = 0; d < p.D; ++d) {
        clear(to.down.numbers + d * term.width + term.used, term.width - term.used);
      }
      X::make_pairs(to.down, p.D, term.width);
    }
  }

  // to (cols, ld) = from (rows, cols)^T, zeros behind
  static void transpose(T* to, int64_t ld, const T* from, int64_t from_ld, int64_t rows, int64_t cols) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r) to[c * ld + r] = from[r * from_ld + c];
      clear(to + c * ld + rows, ld - rows);
    }
  }

  static void clear(T* at, int64_t n) {
    for (int64_t c = 0; c < n; ++c) at[c] = T(0);
  }

  // rows [first, first + rows) of view, padded with zeros to (padded, Dp)
  void load_rows(const Matrix& to, const View& view, int64_t first, int64_t rows, int64_t padded, T factor = T(1)) {
    for (int64_t l = 0; l < rows; ++l) {
      X::load_row(to, l * Dp, view, row_of(view, b, h, first + l), p.D, factor);
      X::clear_row(to, l * Dp + p.D, Dp - p.D);
    }
    X::clear_row(to, rows * Dp, (padded - rows) * Dp);
  }

  void enter(int64_t next) {
    head = next;
    b = head / p.H;
    h = head % p.H;
    mask_ready = false;
    load_rows(keys, p.k, 0, p.Lk, L16);
    pack_transposed<X>(keys_t, keys.rows, Dp, p.Lk, p.D);
    load_rows(values, p.v, 0, p.Lk, L16);
    if (!backward) {
      X::pair_rows(values, p.Lk, Dp);
    } else {
      X::pair_rows(keys, p.Lk, Dp);
      pack_transposed<X>(values_t, values.rows, Dp, p.Lk, p.D);
      clear(grad_k, L16 * Dp);
      clear(grad_v, L16 * Dp);
    }
    T* at = tables_q;
    for (int64_t t = 0; t < p.num_q; ++t) {
      const Term& term = p.on_q[t];
      if (term.weight) {
        load_weight(weights_q[t], term, early);
        product<X, false>(L8, term.width / W, p.D, keys.rows, Dp, weights_q[t].down.pairs, term.width, false, at,
                          term.width, false, late);
      } else {
        for (int64_t j = 0; j < p.Lk; ++j) {
          load_table(at + j * term.width, term, term.table, row_of(term.table, b, h, j));
        }
      }
      if (backward) clear(weights_q[t].table.numbers, L8 * term.width);
      at += L8 * term.width;
    }
    for (int64_t t = 0; t < p.num_k; ++t) {
      if (!p.on_k[t].weight) continue;
      load_weight(weights_k[t], p.on_k[t], T(1));
      if (backward) clear(weights_k[t].gradient, Dp * p.on_k[t].width);
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      if (!p.on_v[t].weight) continue;
      load_weight_on_values(weights_v[t], p.on_v[t]);
      if (backward) clear(weights_v[t].gradient, Dp * p.on_v[t].width);
    }
  }

  // scale q k^T, then the encodings on queries, whose tables belong to columns of the tile
  void score_tile(int64_t first, int64_t rows) {
    load_rows(query, p.q, first, rows, round_up(rows, 8), early);
    for (int64_t t = 0; t < p.num_k; ++t) {
      const int64_t width = p.on_k[t].width;
      if (!p.on_k[t].weight) continue;
      product<X, false>(round_up(rows, 8), width / W, p.D, query.rows, Dp, weights_k[t].down.pairs, width, false,
                        weights_k[t].tile.numbers, width, false, late);
    }
    for (int64_t n = 0; n < Lp / W;) {
      const int64_t count = panel_of(Lp / W - n), begin = n * W;
      product<X, false>(round_up(rows, 8), count, p.D, query.rows, Dp, keys_t + begin * X::items(p.D), 0, true,
                        scores.numbers + begin, L16, false, late);
      n += count;
      const int64_t end = n * W < p.Lk ? n * W : p.Lk;
      const T* at = tables_q;
      for (int64_t t = 0; t < p.num_q; ++t) {
        add_gathered_transposed(scores.numbers, L16, at, p.on_q[t], first, rows, p.Lk, begin, end);
        at += p.on_q[t].width * L8;
      }
    }
  }

  void read_mask(int64_t i) {
    if (mask_ready && p.mask.l == 0) return;
    load_row<T>(mask_row, p.mask, row_of(p.mask, b, h, i), p.Lk);
    for (int64_t j = p.Lk; j < Lp; ++j) mask_row[j] = T(0);
    mask_ready = true;
  }

  // row r of the table of query i
  const T* table_row(const Term& term, const Weight<X>& weight, int64_t r, int64_t i) {
    if (term.weight) return weight.tile.numbers + r * term.width;
    load_table(row_table, term, term.table, row_of(term.table, b, h, i));
    return row_table;
  }

  // row r of the sums of query i goes where it is wanted
  void put_sums(const Term& term, const Weight<X>& weight, int64_t r, int64_t i, T factor) {
    if (!term.weight) return store_table(term, term.result, row_of(term.result, b, h, i), row_table, factor);
    for (int64_t c = 0; c < term.width; c += W) store(weight.tile.numbers + r * term.width + c, load(row_table + c));
  }

  // the encodings on keys, and the mask, of row r of the tile
  void finish_scores(T* row, int64_t r, int64_t i) {
    for (int64_t t = 0; t < p.num_k; ++t) {
      add_gathered(row, table_row(p.on_k[t], weights_k[t], r, i), p.on_k[t], i, Lp);
    }
    if (p.mask.data != nullptr) {
      read_mask(i);
      for (int64_t j = 0; j < Lp; j += W) store(row + j, load(row + j) + load(mask_row + j));
    }
    for (int64_t j = p.Lk; j < Lp; ++j) row[j] = -T(__builtin_inf());
  }

  void forward_tile(int64_t tile) {
    const int64_t first = tile * p.tile, left = p.Lq - first, rows = left < p.tile ? left : p.tile;
    score_tile(first, rows);
    T factor[64];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      T* row = scores.numbers + r * L16;
      finish_scores(row, r, i);
      vec<T> most = spread(-T(__builtin_inf()));
      for (int64_t j = 0; j < Lp; j += W) {
        const vec<T> x = load(row + j);
        most = most > x ? most : x;
      }
      T top = most[0];
      for (int w = 1; w < W; ++w) top = top > most[w] ? top : most[w];
      const bool empty = top == -T(__builtin_inf());
      const vec<T> base = spread(empty ? T(0) : top);
      vec<T> total{};
      for (int64_t j = 0; j < Lp; j += W) {
        const vec<T> x = exponential<T>(load(row + j) - base);
        total += x;
        store(row + j, x);
      }
      const T sum = sum_of<T>(total);
      factor[r] = empty ? T(0) : 1 / sum;
      // exp(s - inf) = 0: the backward of a row without a key is zero by itself
      static_cast<T*>(p.lse)[head * p.Lq + i] = empty ? T(__builtin_inf()) : top + T(__builtin_log(sum));
      if (keep != nullptr) {
        dropout_row(keep, p.dropout_p, dropout_key(p.seed, head, i), Lp);
        for (int64_t j = 0; j < Lp; j += W) store(row + j, load(row + j) * load(keep + j));
      }
      for (int64_t t = 0; t < p.num_v; ++t) {
        const Term& term = p.on_v[t];
        bucket_sums(row_table, row, term, i, p.Lk, segment);
        put_sums(term, weights_v[t], r, i, factor[r]);
      }
      X::make_rows(scores, r, 1, L16);
    }
    product<X, false>(round_up(rows, 8), Dp / W, p.Lk, scores.rows, L16, values.pairs, Dp, false, result, Dp, false);
    for (int64_t t = 0; t < p.num_v; ++t) {
      const int64_t width = p.on_v[t].width;
      if (!p.on_v[t].weight) continue;
      X::make_rows(weights_v[t].tile, 0, rows, width);
      product<X, false>(round_up(rows, 8), Dp / W, width, weights_v[t].tile.rows, width, weights_v[t].up.pairs, Dp,
                        false, result, Dp, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_row<T>(p.out, row_of(p.out, b, h, first + r), result + r * Dp, p.D, factor[r]);
    }
  }

  // scores -> weights (after dropout), weights_grad -> gradient of the scores
  void backward_row(T* row, T* grad_row, int64_t r, int64_t i) {
    finish_scores(row, r, i);
    const vec<T> lse = spread(static_cast<const T*>(p.lse)[head * p.Lq + i]);
    for (int64_t t = 0; t < p.num_v; ++t) {
      add_gathered(grad_row, table_row(p.on_v[t], weights_v[t], r, i), p.on_v[t], i, Lp);
    }
    if (keep != nullptr) {
      dropout_row(keep, p.dropout_p, dropout_key(p.seed, head, i), Lp);
      for (int64_t j = 0; j < Lp; j += W) store(grad_row + j, load(grad_row + j) * load(keep + j));
    }
    vec<T> dot{}, sum{};
    for (int64_t j = 0; j < Lp; j += W) {
      const vec<T> x = exponential<T>(load(row + j) - lse);
      dot += x * load(grad_row + j);
      sum += x;
      store(row + j, x);
    }
    // lse is rounded, by more than eps where it is large: these weights add up to about 1, those below to 1
    const T total = sum_of<T>(sum);
    const vec<T> factor = spread(total > 0 ? 1 / total : T(0)), delta = factor * sum_of<T>(dot);
    for (int64_t j = 0; j < Lp; j += W) {
      const vec<T> x = load(row + j) * factor;
      store(grad_row + j, x * (load(grad_row + j) - delta));
      store(row + j, keep != nullptr ? x * load(keep + j) : x);
    }
    for (int64_t t = 0; t < p.num_k; ++t) {
      bucket_sums(row_table, grad_row, p.on_k[t], i, p.Lk, segment);
      put_sums(p.on_k[t], weights_k[t], r, i, T(1));
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      if (!p.on_v[t].weight) continue;
      bucket_sums(row_table, row, p.on_v[t], i, p.Lk, segment);
      put_sums(p.on_v[t], weights_v[t], r, i, T(1));
    }
  }

  void backward_tile(int64_t tile) {
    const int64_t first = tile * p.tile, left = p.Lq - first, rows = left < p.tile ? left : p.tile;
    const int64_t padded = round_up(rows, 8), keys8 = round_up(p.Lk, 8);
    score_tile(first, rows);
    load_rows(grad, p.grad_out, first, rows, padded);
    X::pair_rows(query, rows, Dp);
    X::pair_rows(grad, rows, Dp);
    product<X, false>(padded, Lp / W, p.D, grad.rows, Dp, values_t, 0, true, weights_grad.numbers, L16, false);
    for (int64_t t = 0; t < p.num_v; ++t) {
      const int64_t width = p.on_v[t].width;
      if (!p.on_v[t].weight) continue;
      product<X, false>(padded, width / W, p.D, grad.rows, Dp, weights_v[t].down.pairs, width, false,
                        weights_v[t].tile.numbers, width, false);
    }
    for (int64_t r = 0; r < rows; ++r) {
      backward_row(scores.numbers + r * L16, weights_grad.numbers + r * L16, r, first + r);
    }
    X::make_pairs(scores, rows, L16);
    X::make_pairs(weights_grad, rows, L16);
    X::make_rows(weights_grad, 0, rows, L16);
    for (int64_t t = 0; t < p.num_q; ++t) {
      bucket_sums_transposed(weights_q[t].table.numbers, weights_grad.numbers, L16, p.on_q[t], first, rows, p.Lk);
    }
    product<X, true>(keys8, Dp / W, rows, scores.pairs, L16, grad.pairs, Dp, false, grad_v, Dp, true);
    product<X, true>(keys8, Dp / W, rows, weights_grad.pairs, L16, query.pairs, Dp, false, grad_k, Dp, true);
    product<X, false>(padded, Dp / W, p.Lk, weights_grad.rows, L16, keys.pairs, Dp, false, result, Dp, false);
    for (int64_t t = 0; t < p.num_k; ++t) {
      const int64_t width = p.on_k[t].width;
      const Weight<X>& weight = weights_k[t];
      if (!p.on_k[t].weight) continue;
      X::make_rows(weight.tile, 0, rows, width);
      X::make_pairs(weight.tile, rows, width);
      product<X, true>(Dp, width / W, rows, query.pairs, Dp, weight.tile.pairs, width, false, weight.gradient, width,
                       true);
      product<X, false>(padded, Dp / W, width, weight.tile.rows, width, weight.up.pairs, Dp, false, result, Dp, true);
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      const int64_t width = p.on_v[t].width;
      if (!p.on_v[t].weight) continue;
      X::make_pairs(weights_v[t].tile, rows, width);
      product<X, true>(width, Dp / W, rows, weights_v[t].tile.pairs, width, grad.pairs, Dp, false,
                       weights_v[t].gradient, Dp, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_row<T>(p.grad_q, row_of(p.grad_q, b, h, first + r), result + r * Dp, p.D, T(p.scale));
    }
  }

  void leave() {
    for (int64_t t = 0; t < p.num_q; ++t) {
      const Term& term = p.on_q[t];
      const Weight<X>& weight = weights_q[t];
      const int64_t width = term.width;
      if (term.weight) {
        X::make_rows(weight.table, 0, L8, width);
        X::make_pairs(weight.table, p.Lk, width);
        product<X, false>(L8, Dp / W, width, weight.table.rows, width, weight.up.pairs, Dp, false, grad_k, Dp, true);
        product<X, true>(Dp, width / W, p.Lk, keys.pairs, Dp, weight.table.pairs, width, false, weight.gradient, width,
                         false);
        store_weight(term, weight.gradient, T(p.scale));
      } else {
        for (int64_t j = 0; j < p.Lk; ++j) {
          store_table(term, term.result, row_of(term.result, b, h, j), weight.table.numbers + j * width, T(1));
        }
      }
    }
    for (int64_t t = 0; t < p.num_k; ++t) {
      if (p.on_k[t].weight) store_weight(p.on_k[t], weights_k[t].gradient, late);
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      const Term& term = p.on_v[t];
      for (int64_t c = 0; term.weight && c < term.used; ++c) {  // the other rows are zero
        store_row<T>(term.result, row_of(term.result, b, h, term.columns[c]), weights_v[t].gradient + c * Dp, p.D);
      }
    }
    for (int64_t j = 0; j < p.Lk; ++j) {
      store_row<T>(p.grad_k, row_of(p.grad_k, b, h, j), grad_k + j * Dp, p.D, late);
      store_row<T>(p.grad_v, row_of(p.grad_v, b, h, j), grad_v + j * Dp, p.D);
    }
  }

  void store_weight(const Term& term, const T* gradient, T factor) {
    for (int64_t d = 0; d < p.D; ++d) {
      store_table(term, term.result, row_of(term.result, b, h, d), gradient + d * term.width, factor);
    }
  }
};

template <class X>
int64_t scratch_bytes(const Problem& problem) {
  return Worker<X>(problem, nullptr).arena.used;
}

// tiles [begin, end), counted over all heads
template <class X>
void forward(const Problem& problem, char* scratch, int64_t begin, int64_t end) {
  Worker<X> worker(problem, scratch);
  for (int64_t t = begin; t < end; ++t) {
    if (t / problem.tiles != worker.head) worker.enter(t / problem.tiles);
    worker.forward_tile(t % problem.tiles);
  }
}

// heads [begin, end)
template <class X>
void backward(const Problem& problem, char* scratch, int64_t begin, int64_t end) {
  Worker<X> worker(problem, scratch);
  for (int64_t head = begin; head < end; ++head) {
    worker.enter(head);
    for (int64_t tile = 0; tile < problem.tiles; ++tile) worker.backward_tile(tile);
    worker.leave();
  }
}

#undef RPE_INLINE

}  // namespace rpe_ops::RPE_ISA
