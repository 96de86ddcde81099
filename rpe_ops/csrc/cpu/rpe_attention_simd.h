// Part of rpe_attention_kernels.h: vectors, and what is computed of them.

template <class T>
struct simd;
template <>
struct simd<float> {
  typedef float v __attribute__((vector_size(RPE_BYTES)));
  typedef float u __attribute__((vector_size(RPE_BYTES), aligned(4), may_alias));
  typedef int32_t i __attribute__((vector_size(RPE_BYTES)));
  using integer = int32_t;
  static constexpr int W = RPE_BYTES / 4;
  static constexpr float log2e = 1.44269504f;
  static constexpr float shift = 12583039.0f;  // 1.5 * 2^23 + 127: adding it rounds to an integer, with an exponent's bias
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
  static constexpr double log2e = 1.4426950408889634, shift = 6755399441056767.0;  // 1.5 * 2^52 + 1023
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
  return x - vec<T>{};  // -0 - 0 = -0, so that nothing is left to compute; 0 + x would be an addition
}

// exp(x) for x <= 88 to about 1 ulp; 0 below the smallest normal number, also for -inf; NaN of every NaN, whatever its bits.
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
  p *= (vec<T>)((ivec)shifted << s::mantissa);  // 2^n
  return x < spread(s::least) ? vec<T>{} : p;
}

template <class T>
RPE_INLINE T sum_of(vec<T> x) {
  T total = 0;
  for (int w = 0; w < simd<T>::W; ++w) total += x[w];
  return total;
}

// ---- eight numbers: what the axes of maps are read by, on every instruction set

template <class T>
struct eight {
  typedef T v __attribute__((vector_size(8 * sizeof(T))));
  typedef T u __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T>
using oct = typename eight<T>::v;

template <class T>
RPE_INLINE oct<T> load8(const T* from) {
  return *reinterpret_cast<const typename eight<T>::u*>(from);
}
template <class T>
RPE_INLINE void store8(T* to, oct<T> x) {
  *reinterpret_cast<typename eight<T>::u*>(to) = x;
}
template <class T>
using oct_bits = typename eight<typename simd<T>::integer>::v;
// x where the bits are all ones, 0 where they are all zeros
template <class T>
RPE_INLINE oct<T> keep_bits(oct<T> x, oct_bits<T> bits) {
  return (oct<T>)((oct_bits<T>)x & bits);
}
// the first `count` numbers of x, zeros behind
template <class T>
RPE_INLINE oct<T> first_of(oct<T> x, int64_t count) {
  using I = typename simd<T>::integer;
  static constexpr I ones_and_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return keep_bits<T>(x, load8(ones_and_zeros + 8 - count));
}

// table[ids[m]] for eight ids below 8 * S, or of any size for S = 0
template <int S, class T>
RPE_INLINE oct<T> look_up8(const T* table, const int32_t* ids) {
#ifdef RPE_AVX2
  if constexpr (sizeof(T) == 4 && S > 0) {
    const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids));
    if constexpr (S == 1) return (oct<T>)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), id);
#ifdef RPE_AVX512
    return (oct<T>)_mm256_permutex2var_ps(_mm256_loadu_ps(table), id, _mm256_loadu_ps(table + 8));
#else
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), id);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), id);
    return (oct<T>)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(id, 28)));
#endif
  }
#endif
  T found[8];
  for (int m = 0; m < 8; ++m) found[m] = table[ids[m]];
  return load8<T>(found);
}

// r[m][n] <-> r[n][m]
template <class T>
RPE_INLINE void transpose8(oct<T> r[8]) {
#ifdef RPE_AVX2
  if constexpr (sizeof(T) == 4) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = (oct<T>)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      r[i + 4] = (oct<T>)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
    return;
  }
#endif
  T all[8][8];
  for (int m = 0; m < 8; ++m) {
    for (int n = 0; n < 8; ++n) all[n][m] = r[m][n];
  }
  for (int m = 0; m < 8; ++m) r[m] = load8<T>(all[m]);
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
