// The functions of rpe_ops/csrc/cuda/warp.h for a host without a GPU. Each lane puts its operands down; the last one to come
// works for all 32, and none goes on before.

#pragma once

#include "cuda.h"

#include <cfloat>
#include <type_traits>

namespace on_host {

constexpr unsigned kMaxWarps = 32;

// Room for what one lane puts down and gets: the operands and the result of multiply16.
struct Words {
  uint32_t a[4], b[2];
  float c[4];
  uint16_t row[8];
};

struct Warp {
  const char* instruction;
  unsigned arrived;
  Words lanes[kLanes];
};

inline Warp warps[kMaxWarps];

[[noreturn]] inline void stop(const char* instruction, const char* what, const void* at = nullptr) {
  std::fprintf(stderr, "thread %u of block %u, %s: %s (%p)\n", current, blockIdx.x, instruction, what, at);
  std::abort();
}

// work(lanes), by the last of them. A lane has its words again when this returns.
template <class Work>
void together(const char* instruction, const Work& work) {
  const unsigned first = current - lane();
  Warp& warp = warps[first / kLanes];
  if (warp.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0) stop(instruction, "other lanes are in another function");
  if (++warp.arrived < kLanes) return yield(State::kTogether);
  warp.arrived = 0;
  work(warp.lanes);
  for (unsigned l = 0; l < kLanes; ++l)
    if (first + l != current) fibers[first + l].state = State::kReady;
}

inline Words& words() { return warps[current / kLanes].lanes[lane()]; }

inline void check_multiple(const char* instruction, const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes == 0) return;
  stop(instruction, bytes == 4 ? "not at a multiple of 4 bytes" : "not at a multiple of 16 bytes", at);
}

// at[0 .. bytes) is in the block's shared memory, and begins at a multiple of them.
inline void check_shared(const char* instruction, const void* at, int64_t bytes = 16) {
  const int64_t offset = static_cast<const unsigned char*>(at) - shared;
  if (offset < 0 || offset + bytes > shared_bytes) stop(instruction, "not in shared memory", at);
  check_multiple(instruction, at, bytes);
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

}  // namespace on_host

namespace rpe_ops {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <class T>
constexpr uint32_t kOne = std::is_same_v<T, Half> ? 0x3c00u : 0x3f80u;

}  // namespace rpe_ops

namespace on_host {

template <class T>
float widened(uint32_t bits) {
  if constexpr (!std::is_same_v<T, rpe_ops::Half>) return float_of(bits << 16);
  const uint32_t sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return float_of(sign | 0x7f800000 | rest);  // infinity, NaN
  return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
}

// To the nearest, and of two to the even one; every NaN is 0x7fff, as the GPU has it.
template <class T>
uint32_t rounded(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if constexpr (!std::is_same_v<T, rpe_ops::Half>) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  if (size >= bits_of(65520.0f)) return sign | 0x7c00;
  // subnormal: units of 2^-24, as the numbers from 0.5 to 1 have
  if (size < bits_of(0x1p-14f)) return sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f));
  return sign | ((size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13);
}

// c += A B of a warp: A 16 x depth, B depth x 8.
template <class T, int depth>
void multiply(Words* lanes) {
  float a[16][depth], b[depth][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4, t = l % 4;
    for (int r = 0; r < depth / 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[group + r % 2 * 8][2 * t + half + r / 2 * 8] = widened<T>(lanes[l].a[r] >> 16 * half & 0xffff);
    for (int r = 0; r < depth / 8; ++r)
      for (int half = 0; half < 2; ++half)
        b[2 * t + half + r * 8][group] = widened<T>(lanes[l].b[r] >> 16 * half & 0xffff);
    for (int r = 0; r < 4; ++r) c[group + r / 2 * 8][2 * t + r % 2] = lanes[l].c[r];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) lanes[l].c[r] = c[l / 4 + r / 2 * 8][2 * (l % 4) + r % 2];
}

template <int matrices, bool is_turned>
void load(const char* instruction, uint32_t (&result)[matrices], const void* row) {
  if (lane() < 8 * matrices) {
    check_shared(instruction, row);
    std::memcpy(words().row, row, sizeof(words().row));  // at once: what other lanes wrote may not be there yet
  }
  together(instruction, [](Words* lanes) {
    for (int m = 0; m < matrices; ++m) {
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        const Words* rows = &lanes[8 * m];
        const uint32_t low = is_turned ? rows[j].row[i] : rows[i].row[j];
        const uint32_t high = is_turned ? rows[j + 1].row[i] : rows[i].row[j + 1];
        lanes[l].a[m] = low | high << 16;
      }
    }
  });
  std::memcpy(result, words().a, sizeof(result));
}

}  // namespace on_host

namespace rpe_ops {

template <class T>
void multiply16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_host::Words& words = on_host::words();
  std::memcpy(words.a, a, sizeof(a));
  std::memcpy(words.c, c, sizeof(c));
  words.b[0] = b0, words.b[1] = b1;
  on_host::together("multiply16", on_host::multiply<T, 16>);
  std::memcpy(c, words.c, sizeof(c));
}

template <class T>
void multiply8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  on_host::Words& words = on_host::words();
  words.a[0] = a0, words.a[1] = a1, words.b[0] = b;
  std::memcpy(words.c, c, sizeof(c));
  on_host::together("multiply8", on_host::multiply<T, 8>);
  std::memcpy(c, words.c, sizeof(c));
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { on_host::load<4, false>("load_matrices of 4", r, row); }
inline void load_matrices(uint32_t (&r)[2], const void* row) { on_host::load<2, false>("load_matrices of 2", r, row); }
inline void load_turned(uint32_t (&r)[4], const void* row) { on_host::load<4, true>("load_turned", r, row); }

inline void copy16(void* shared, const void* global, bool there) {
  on_host::check_shared("copy16", shared);
  on_host::check_multiple("copy16", global, 16);
  on_host::copy(shared, there ? global : nullptr, 16);
}

inline void copy4(void* shared, const void* global) {
  on_host::check_shared("copy4", shared, 4);
  on_host::check_multiple("copy4", global, 4);
  on_host::copy(shared, global, 4);
}

inline void end_copies() { on_host::end_copies(); }

template <int pending>
void wait_copies() {
  on_host::wait_copies(pending);
}

inline float exchanged(float x, int mask) {
  on_host::Words& words = on_host::words();
  words.c[0] = x;
  words.b[0] = on_host::lane() ^ mask;
  if (words.b[0] >= on_host::kLanes) on_host::stop("exchanged", "a lane beyond 31");
  on_host::together("exchanged", [](on_host::Words* lanes) {
    for (unsigned l = 0; l < on_host::kLanes; ++l) lanes[l].c[1] = lanes[lanes[l].b[0]].c[0];
  });
  return words.c[1];
}

inline bool any_lane(bool x) {
  on_host::Words& words = on_host::words();
  words.a[0] = x;
  on_host::together("any_lane", [](on_host::Words* lanes) {
    uint32_t any = 0;
    for (unsigned l = 0; l < on_host::kLanes; ++l) any |= lanes[l].a[0];
    for (unsigned l = 0; l < on_host::kLanes; ++l) lanes[l].a[1] = any;
  });
  return words.a[1] != 0;
}

inline void sync_warp() {
  on_host::together("sync_warp", [](on_host::Words*) {});
}

// 2^x, without subnormal numbers.
inline float power_of_2(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
}

template <class T>
uint32_t pack(float low, float high) {
  return on_host::rounded<T>(low) | on_host::rounded<T>(high) << 16;
}

template <class T>
float2 unpack(uint32_t both) {
  return {on_host::widened<T>(both & 0xffff), on_host::widened<T>(both >> 16)};
}

}  // namespace rpe_ops
