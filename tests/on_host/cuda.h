// The words of CUDA that the kernels of rpe_ops use, for a host without a GPU: the threads of a block are fibers that run
// one at a time, each until it waits for others. What a block has in shared memory is garbage at first and lies between
// guards. Threads run in rising or falling order, each warp as far as it can, or shuffled, so that a barrier which is
// missing shows as a wrong result in one of them. Copies in the background arrive as late as they may (rising), at once (falling) or either way (shuffled).

#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __expf expf  // glibc declares the first name too

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace on_host {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 * 1024;

// kTogether: in an instruction of the whole warp, until its last lane comes (warp.h).
enum class State { kReady, kAtBlock, kAtWarp, kTogether, kDone };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
  int64_t group;

  void arrive() const { from == nullptr ? std::memset(to, 0, bytes) : std::memcpy(to, from, bytes); }
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf saved;
  bool is_started = false;
  State state = State::kReady;
  int64_t deposit = 0;
  std::vector<Copy> copies;
  int64_t group = 0;  // of copies, the one that is open
};

inline std::vector<Fiber> fibers;
inline unsigned current, threads_of_block;
inline jmp_buf scheduler;
inline unsigned char* shared = nullptr;
inline int64_t shared_bytes = 0;
inline int order = 0;
inline uint64_t random = 1;
inline const std::function<void()>* body = nullptr;

inline unsigned random_below(unsigned end) {
  random = random * 6364136223846793005u + 1442695040888963407u;
  return (random >> 33) % end;
}

inline void yield(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  if (_setjmp(self.saved) == 0) _longjmp(scheduler, 1);
}

inline void copy(void* to, const void* from, size_t bytes) {
  Fiber& self = fibers[current];
  const Copy copy{to, from, bytes, self.group};
  if (order == 1 || (order == 2 && random_below(2) == 0)) copy.arrive();
  else self.copies.push_back(copy);
}

inline void end_copies() { ++fibers[current].group; }

// What is in the last `pending` groups, or in none yet, does not arrive.
inline void wait_copies(int64_t pending) {
  Fiber& self = fibers[current];
  size_t arrived = 0;
  for (; arrived < self.copies.size() && self.copies[arrived].group < self.group - pending; ++arrived)
    self.copies[arrived].arrive();
  self.copies.erase(self.copies.begin(), self.copies.begin() + arrived);
}

// Every fiber runs one kernel after another, so that stacks are set up once.
inline void live() {
  for (;;) {
    (*body)();
    end_copies();
    wait_copies(0);
    yield(State::kDone);
  }
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.saved, 1);
  fiber.is_started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

// True where all threads in [begin, end) that are not done stand at this barrier, which then lets them go.
inline bool release(unsigned begin, unsigned end, State barrier) {
  bool is_any = false;
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state == State::kDone) continue;
    if (fibers[t].state != barrier) return false;
    is_any = true;
  }
  for (unsigned t = begin; t < end; ++t)
    if (fibers[t].state == barrier) fibers[t].state = State::kReady;
  return is_any;
}

// True where one of these threads went on, or may now.
inline bool run_some(const unsigned* turns, unsigned count) {
  bool is_any = false;
  for (unsigned i = 0; i < count; ++i)
    if (fibers[turns[i]].state == State::kReady) is_any = true, resume(turns[i]);
  for (unsigned t = 0; t < threads_of_block; t += kLanes) is_any |= release(t, t + kLanes, State::kAtWarp);
  return is_any;
}

inline void run_block(const std::vector<unsigned>& turns) {
  for (unsigned t = 0; t < threads_of_block; ++t) fibers[t].state = State::kReady;
  // a warp goes on as far as it can before the next one, or all threads step by step
  const unsigned step = order == 2 || threads_of_block % kLanes != 0 ? threads_of_block : kLanes;
  for (bool is_going = true; is_going;) {
    is_going = false;
    for (unsigned first = 0; first < threads_of_block; first += step)
      while (run_some(&turns[first], step)) is_going = true;
    is_going |= release(0, threads_of_block, State::kAtBlock);
  }
  for (unsigned t = 0; t < threads_of_block; ++t)
    if (fibers[t].state != State::kDone) {
      std::fprintf(stderr, "thread %u of block %u waits for ever\n", t, blockIdx.x);
      std::abort();
    }
}

// Threads run in rising order (0), falling (1), or another one in every block.
inline void launch(
    int64_t first, int64_t blocks, unsigned threads, int64_t bytes, int turn, const std::function<void()>& kernel) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  threads_of_block = threads;
  shared_bytes = bytes;
  order = turn;
  random = 1;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {threads, 1, 1};
  body = &kernel;
  std::vector<unsigned> turns(threads);
  for (unsigned t = 0; t < threads; ++t) turns[t] = order == 1 ? threads - 1 - t : t;
  constexpr int64_t kGuard = 64;
  std::vector<uint4> storage((bytes + 2 * kGuard + 15) / 16);
  unsigned char* memory = reinterpret_cast<unsigned char*>(storage.data());
  for (int64_t block = first; block < blocks; ++block) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    std::memset(memory, 0xff, bytes + 2 * kGuard);  // NaN, and ids beyond every table
    shared = memory + kGuard;
    if (order == 2)
      for (unsigned t = threads; t > 1; --t) std::swap(turns[t - 1], turns[random_below(t)]);
    run_block(turns);
    for (int64_t b = 0; b < kGuard; ++b)
      if (memory[b] != 0xff || memory[kGuard + bytes + b] != 0xff) {
        std::fprintf(stderr, "block %u wrote outside its shared memory\n", blockIdx.x);
        std::abort();
      }
  }
}

inline unsigned lane() { return current % kLanes; }

// All lanes of a warp put a value down; each then has what `use` makes of the 32.
template <class Use>
auto exchange(int64_t value, const Use& use) {
  fibers[current].deposit = value;
  yield(State::kAtWarp);
  const auto result = use(&fibers[current - lane()]);
  yield(State::kAtWarp);
  return result;
}

}  // namespace on_host

inline unsigned char* shared_memory() { return on_host::shared; }
inline void __syncthreads() { on_host::yield(on_host::State::kAtBlock); }
inline void __syncwarp() { on_host::yield(on_host::State::kAtWarp); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned __match_any_sync(unsigned, int value) {
  return on_host::exchange(value, [&](const on_host::Fiber* lanes) {
    unsigned same = 0;
    for (unsigned l = 0; l < on_host::kLanes; ++l) same |= (lanes[l].deposit == value ? 1u : 0u) << l;
    return same;
  });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return on_host::exchange(value, [](const on_host::Fiber* lanes) {
    unsigned all = 0;
    for (unsigned l = 0; l < on_host::kLanes; ++l) all |= (lanes[l].deposit != 0 ? 1u : 0u) << l;
    return all;
  });
}

inline int __shfl_sync(unsigned, int value, int from) {
  return on_host::exchange(value, [&](const on_host::Fiber* lanes) { return static_cast<int>(lanes[from].deposit); });
}

inline int __shfl_up_sync(unsigned, int value, unsigned step) {
  return on_host::exchange(value, [&](const on_host::Fiber* lanes) {
    const unsigned lane = on_host::lane();
    return static_cast<int>(lanes[lane >= step ? lane - step : lane].deposit);
  });
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto is_aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || !is_aligned(to) || !is_aligned(from)) {
    std::fprintf(stderr, "a copy of %zu bytes is not aligned\n", bytes);
    std::abort();
  }
  on_host::copy(to, from, bytes);
}
inline void __pipeline_commit() { on_host::end_copies(); }
inline void __pipeline_wait_prior(int pending) { on_host::wait_copies(pending); }
