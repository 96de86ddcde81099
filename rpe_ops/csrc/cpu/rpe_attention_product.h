// Part of rpe_attention_kernels.h: products of matrices that lie in scratch.

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
  // row `at` of a view, where products can read it as it lies
  static const T* in_place(const View& view, int64_t at) {
    const bool same = view.storage == (sizeof(T) == 4 ? Storage::f32 : Storage::f64) && view.d == 1;
    return same ? reinterpret_cast<const T*>(view.data) + at : nullptr;
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

// A matrix of a product: where it begins, and from a row to the next.
template <class T>
struct Rows {
  T* at;
  int64_t stride;
};
// B lies in rows, or panel by panel.
template <class Item>
struct Right {
  const Item* at;
  int64_t stride;
  bool panelled = false;
};
// The factor is for products that round: others have it in A.
template <class T>
struct Sums {
  T* at;
  int64_t stride;
  bool add = false;
  T factor = T(1);
};

// TA: A is given as (K, M). K counts items.
template <class X, int NV, bool TA>
void block_product(int64_t K, Rows<const typename X::Item> A, Rows<const typename X::Item> B,
                   Sums<typename X::Number> C) {
  using T = typename X::Number;
  constexpr int W = simd<T>::W;
  const auto *a = A.at, *b = B.at;
  const int64_t lda = A.stride, ldb = B.stride, ldc = C.stride;
  T* c = C.at;
  vec<T> sum[kRows][NV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[r][n] = !X::rounds && C.add ? load(c + r * ldc + n * W) : vec<T>{};
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
  if (X::rounds && C.factor != T(1)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[r][n] *= C.factor;
    }
  }
  if (X::rounds && C.add) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[r][n] += load(c + r * ldc + n * W);
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

// A is `rows`, or (TA) `pairs`; B is `pairs`, or lies panel by panel
template <class X, bool TA>
void product(int64_t M, int64_t vectors, int64_t K, Rows<const typename X::Item> A, Right<typename X::Item> B,
             Sums<typename X::Number> C) {
  using Item = typename X::Item;
  constexpr int W = simd<typename X::Number>::W;
  constexpr int64_t depth = 128;  // rows of B that stay in L1
  K = X::items(K);
  const int64_t lda = TA ? A.stride : X::items(A.stride);
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = panel_of(vectors - first);
    const Item* panel = B.at + first * W * (B.panelled ? K : 1);
    const int64_t stride = B.panelled ? count * W : B.stride;
    for (int64_t k = 0; k == 0 || k < K; k += depth) {
      const int64_t deep = K - k < depth ? K - k : depth;
      const Rows<const Item> right{panel + k * stride, stride};
      for (int64_t m = 0; m < M; m += kRows) {
        const Rows<const Item> left{A.at + (TA ? k * lda + m : m * lda + k), lda};
        const Sums<typename X::Number> to{C.at + m * C.stride + first * W, C.stride, C.add || k > 0, C.factor};
        if (count == 3) {
          block_product<X, 3, TA>(deep, left, right, to);
        } else if (count == 2) {
          block_product<X, 2, TA>(deep, left, right, to);
        } else {
          block_product<X, 1, TA>(deep, left, right, to);
        }
      }
    }
    first += count;
  }
}

// to = from^T in panels: from (rows, D) with stride ld, to as many rows as whole vectors hold. With `tail`, room for as many
// rows as a vector has, those behind the last are zeros; without it they are read too.
template <class X>
void pack_transposed(typename X::Item* to, const typename X::Item* from, int64_t ld, int64_t rows, int64_t D,
                     typename X::Item* tail) {
  using T = typename X::Item;
  constexpr int W = simd<typename X::Number>::W;
  ld = X::items(ld), D = X::items(D);
  const int64_t vectors = round_up(rows, W) / W;
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = panel_of(vectors - first);
    T* panel = to + first * W * D;
    for (int64_t n = 0; n < count; ++n) {
      const T* block = from + (first + n) * W * ld;
      int64_t step = ld, d = 0;
      if (const int64_t left = rows - (first + n) * W; tail != nullptr && left < W) {
        for (int64_t w = 0; w < left; ++w) __builtin_memcpy(tail + w * D, block + w * ld, std::size_t(D) * sizeof(T));
        clear(tail + left * D, (W - left) * D);
        block = tail, step = D;
      }
#ifdef RPE_AVX512
      if constexpr (sizeof(T) == 4) {
        for (; d + 16 <= D; d += 16) {
          __m512 r[16];
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) r[w] = _mm512_loadu_ps(reinterpret_cast<const float*>(block + w * step + d));
          transpose16(r);
#pragma GCC unroll 16
          for (int w = 0; w < 16; ++w) {
            _mm512_storeu_ps(reinterpret_cast<float*>(panel + ((d + w) * count + n) * 16), r[w]);
          }
        }
      }
#endif
#if defined(RPE_AVX2) && !defined(RPE_AVX512)
      if constexpr (sizeof(T) == 4) {
        for (; d + 8 <= D; d += 8) {
          oct<T> r[8];
#pragma GCC unroll 8
          for (int w = 0; w < 8; ++w) r[w] = load8(block + w * step + d);
          transpose8<T>(r);
#pragma GCC unroll 8
          for (int w = 0; w < 8; ++w) store8(panel + ((d + w) * count + n) * 8, r[w]);
        }
      }
#endif
      for (; d < D; ++d) {
        for (int w = 0; w < W; ++w) panel[(d * count + n) * W + w] = block[w * step + d];
      }
    }
    first += count;
  }
}
