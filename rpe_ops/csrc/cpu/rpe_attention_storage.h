// Part of rpe_attention_kernels.h: from storage to the working precision and back, and the scratch of a thread.

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

// to[0..used) = factor * the columns that occur, of a row of a table
template <class T>
void load_table(T* __restrict to, const Term& term, const View& view, int64_t at, T factor = T(1)) {
  if (term.used == 0) return;
  if (term.dense) return load_row<T>(to, view, at + term.columns[0] * view.d, term.used, factor);
  const auto pick = [&](const auto* from, const auto& widen) {
    for (int64_t c = 0; c < term.used; ++c) to[c] = T(widen(from[term.columns[c] * view.d])) * factor;
  };
  if (view.storage == Storage::f32) {
    pick(reinterpret_cast<const float*>(view.data) + at, [](float x) { return x; });
  } else if (view.storage == Storage::bf16) {
    pick(reinterpret_cast<const uint16_t*>(view.data) + at, [](uint16_t x) { return from_brain(x); });
  } else {
    for (int64_t c = 0; c < term.used; ++c) {
      to[c] = get<T>(view.data, at + term.columns[c] * view.d, view.storage) * factor;
    }
  }
}
// a row of a table: the columns that occur, and zeros
template <class T>
void store_table(const Term& term, const View& view, int64_t at, const T* __restrict from, T factor) {
  if (term.dense && term.used == term.buckets) return store_row<T>(view, at, from, term.used, factor);
  for (int64_t c = 0; c < term.buckets; ++c) put<T>(view.data, at + c * view.d, view.storage, T(0));
  for (int64_t c = 0; c < term.used; ++c) {
    put<T>(view.data, at + term.columns[c] * view.d, view.storage, from[c] * factor);
  }
}

// ---- scratch of a thread

template <class T>
inline void clear(T* at, int64_t n) {
  for (int64_t c = 0; c < n; ++c) at[c] = T(0);
}

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
