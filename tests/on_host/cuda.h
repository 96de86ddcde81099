// The words of CUDA that the kernels of rpe_ops use, for a host without a GPU: the threads of a block are fibers that run
// one at a time, each until it waits for others. What a block has in shared memory is garbage at first and lies between
// guards; copies in the background arrive when their thread waits for them, and not before. Threads run in rising,
// falling or shuffled order, so that a barrier which is missing shows as a wrong result in one of them.

#pragma once

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
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint3 threadIdx, blockIdx, gridDim;

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

namespace on_host {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 * 1024;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf saved;
  bool is_started = false;
  State state = State::kReady;
  int64_t deposit = 0;
  std::vector<Copy> copies;
};

inline std::vector<Fiber> fibers;
inline unsigned current, threads_of_block;
inline jmp_buf scheduler;
inline unsigned char* shared = nullptr;
inline const std::function<void()>* body = nullptr;

inline void yield(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  if (_setjmp(self.saved) == 0) _longjmp(scheduler, 1);
}

// Every fiber runs one kernel after another, so that stacks are set up once.
inline void live() {
  for (;;) {
    (*body)();
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

inline void run_block(const std::vector<unsigned>& order) {
  for (unsigned t = 0; t < threads_of_block; ++t) fibers[t].state = State::kReady;
  for (bool is_going = true; is_going;) {
    for (unsigned t : order)
      if (fibers[t].state == State::kReady) resume(t);
    is_going = release(0, threads_of_block, State::kAtBlock);
    for (unsigned t = 0; t < threads_of_block; t += kLanes) is_going |= release(t, t + kLanes, State::kAtWarp);
  }
  for (unsigned t = 0; t < threads_of_block; ++t)
    if (fibers[t].state != State::kDone) {
      std::fprintf(stderr, "thread %u of block %u waits for ever\n", t, blockIdx.x);
      std::abort();
    }
}

// Threads run in rising order (0), falling (1), or another one in every block.
inline void launch(
    int64_t first, int64_t blocks, unsigned threads, int64_t shared_bytes, int order, const std::function<void()>& kernel) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  threads_of_block = threads;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  body = &kernel;
  std::vector<unsigned> turns(threads);
  for (unsigned t = 0; t < threads; ++t) turns[t] = order == 1 ? threads - 1 - t : t;
  uint64_t random = 1;
  constexpr int64_t kGuard = 64;
  std::vector<uint4> storage((shared_bytes + 2 * kGuard + 15) / 16);
  unsigned char* memory = reinterpret_cast<unsigned char*>(storage.data());
  for (int64_t block = first; block < blocks; ++block) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    std::memset(memory, 0xff, shared_bytes + 2 * kGuard);  // NaN, and ids beyond every table
    shared = memory + kGuard;
    if (order == 2)
      for (unsigned t = threads; t > 1; --t) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        std::swap(turns[t - 1], turns[(random >> 33) % t]);
      }
    run_block(turns);
    for (int64_t b = 0; b < kGuard; ++b)
      if (memory[b] != 0xff || memory[kGuard + shared_bytes + b] != 0xff) {
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
  on_host::fibers[on_host::current].copies.push_back({to, from, bytes});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
  for (const on_host::Copy& copy : on_host::fibers[on_host::current].copies) std::memcpy(copy.to, copy.from, copy.bytes);
  on_host::fibers[on_host::current].copies.clear();
}
