// Part of rpe_attention_kernels.h: products of bfloat16, added up in float32. Weights, gradients of scores and bucket sums are
// rounded for the products that read them, as flash attention does; all else in a tile stays float32.

typedef uint16_t brain __attribute__((may_alias));

struct Brain {
  using Number = float;
  using Item = uint32_t;  // two numbers that follow each other in a sum
  using Matrix = Operand<float, uint32_t>;
  using vector = __m512i;
  static constexpr bool rounds = true;
  static constexpr int64_t items(int64_t n) { return (n + 1) / 2; }

  static RPE_INLINE __m512i read(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static RPE_INLINE __m512i repeat(uint32_t x) { return _mm512_set1_epi32(int32_t(x)); }
  static RPE_INLINE __m512 multiply_add(__m512 sum, __m512i x, __m512i y) {
    return _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(y));
  }

  // a[0], b[0], a[1], b[1], ... of two rows that stand behind one another in x
  static RPE_INLINE __m512i interleave(__m512i x) {
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16));
    return _mm512_permutexvar_epi16(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), x);
  }

  // C is a multiple of 16
  static Matrix over(Arena<float>& arena, float* numbers, int64_t R, int64_t C, bool rows, bool pairs) {
    return {numbers, rows ? arena.array<uint32_t>(R * items(C)) : nullptr,
            pairs ? arena.array<uint32_t>(items(R) * C) : nullptr};
  }
  static Matrix input(Arena<float>& arena, int64_t R, int64_t C, bool pairs) {
    return over(arena, nullptr, R, C, true, pairs);
  }

  // what is in bfloat16 already is copied
  static void load_row(const Matrix& to, int64_t at, const View& view, int64_t from, int64_t n, float) {
    brain* row = reinterpret_cast<brain*>(to.rows) + at;
    const brain* data = reinterpret_cast<const brain*>(view.data) + from;
    if (view.storage == Storage::bf16 && view.d == 1) {
      __builtin_memcpy(row, data, size_t(n) * sizeof(brain));
    } else if (view.storage == Storage::bf16) {
      for (int64_t c = 0; c < n; ++c) row[c] = data[c * view.d];
    } else {
      for (int64_t c = 0; c < n; ++c) row[c] = to_brain(get<float>(view.data, from + c * view.d, view.storage));
    }
  }
  static const uint32_t* in_place(const View&, int64_t) { return nullptr; }
  static void clear_row(const Matrix& to, int64_t at, int64_t n) {
    brain* row = reinterpret_cast<brain*>(to.rows) + at;
    for (int64_t c = 0; c < n; ++c) row[c] = 0;
  }

  // rows [first, first + count) of the numbers, (R, C), as rows
  static void make_rows(const Matrix& of, int64_t first, int64_t count, int64_t C) {
    brain* to = reinterpret_cast<brain*>(of.rows);
    for (int64_t c = first * C; c < (first + count) * C; c += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(of.numbers + c));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), __m256i(rounded));
    }
  }
  // the numbers, (R, C), as pairs
  static void make_pairs(const Matrix& of, int64_t R, int64_t C) {
    for (int64_t r = 0; r < R; r += 2) {
      const float *one = of.numbers + r * C, *other = one + C;
      for (int64_t c = 0; c < C; c += 16) {
        const __m512 last = r + 1 < R ? _mm512_loadu_ps(other + c) : _mm512_setzero_ps();
        const __m512i both = __m512i(_mm512_cvtne2ps_pbh(last, _mm512_loadu_ps(one + c)));
        _mm512_storeu_si512(of.pairs + r / 2 * C + c, interleave(both));
      }
    }
  }
  // the rows, (R, C), as pairs
  static void pair_rows(const Matrix& of, int64_t R, int64_t C) {
    const brain* from = reinterpret_cast<const brain*>(of.rows);
    for (int64_t r = 0; r < R; r += 2) {
      const brain* row = from + r * C;
      for (int64_t c = 0; c < C; c += 16) {
        const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c));
        const __m256i other = r + 1 < R ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + C + c))
                                        : _mm256_setzero_si256();
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1);
        _mm512_storeu_si512(of.pairs + r / 2 * C + c, interleave(both));
      }
    }
  }
};
