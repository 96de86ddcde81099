// Each function of rpe_ops/csrc/cuda/warp.h in a warp of its own: test_warp_on_host.py calls them.

#define RPE_OPS_ON_HOST
#include "../../rpe_ops/csrc/cuda/warp.h"

using namespace rpe_ops;

namespace {

template <class Kernel>
void run(int64_t threads, int64_t shared_bytes, int64_t order, const Kernel& kernel) {
  on_host::launch(0, 1, static_cast<unsigned>(threads), shared_bytes, static_cast<int>(order), kernel);
}

template <class T>
void product(int depth, const uint32_t (*a)[4], const uint32_t (*b)[2], float (*c)[4], int order) {
  run(32, 0, order, [=] {
    const unsigned l = threadIdx.x;
    if (depth == 16) multiply16<T>(c[l], a[l], b[l][0], b[l][1]);
    else multiply8<T>(c[l], a[l][0], a[l][1], b[l][0]);
  });
}

// result (16, 8) = A (16, 16) B (16, 8), both by way of shared memory.
template <class T>
void product_from_shared(const unsigned char* a, const unsigned char* b, float* result, int order) {
  run(32, 1024, order, [=] {
    const unsigned l = threadIdx.x;
    unsigned char* shared = shared_memory();  // A, then B twice, side by side
    copy16(shared + 16 * l, a + 16 * l, true);
    copy16(shared + 512 + 16 * l, b + 16 * (l / 2), true);
    end_copies();
    wait_copies<0>();
    sync_warp();
    uint32_t left[4], right[4];
    load_matrices(left, shared + l % 16 * 32 + l / 16 * 16);
    load_turned(right, shared + 512 + l % 16 * 32 + l / 16 * 16);
    float c[4] = {};
    multiply16<T>(c, left, right[0], right[1]);
    float again[4] = {};
    multiply16<T>(again, left, right[2], right[3]);
    for (unsigned r = 0; r < 4; ++r)
      result[(l / 4 + r / 2 * 8) * 8 + l % 4 * 2 + r % 2] = c[r] == again[r] ? c[r] : -1e9f;
  });
}

}  // namespace

extern "C" void multiplied(char type, int depth, const void* a, const void* b, float* c, int order) {
  (type == 'h' ? product<Half> : product<Brain>)(
      depth, static_cast<const uint32_t(*)[4]>(a), static_cast<const uint32_t(*)[2]>(b), reinterpret_cast<float(*)[4]>(c),
      order);
}

extern "C" void multiplied_from_shared(char type, const void* a, const void* b, float* result, int order) {
  (type == 'h' ? product_from_shared<Half> : product_from_shared<Brain>)(
      static_cast<const unsigned char*>(a), static_cast<const unsigned char*>(b), result, order);
}

// result (32, matrices): a warp loads from `bytes` bytes, lane l at offset[l], and writes zeros there at once.
extern "C" void loaded(int matrices, int is_turned, const void* from, int64_t bytes, const int64_t* offset, uint32_t* result, int order) {
  run(32, bytes, order, [=] {
    const unsigned l = threadIdx.x;
    unsigned char* shared = shared_memory();
    if (l == 5) std::memcpy(shared, from, bytes);
    sync_warp();
    uint32_t four[4], two[2];
    if (is_turned) load_turned(four, shared + offset[l]);
    else if (matrices == 4) load_matrices(four, shared + offset[l]);
    else load_matrices(two, shared + offset[l]);
    std::memset(shared, 0, bytes);
    for (int m = 0; m < matrices; ++m) result[l * matrices + m] = matrices == 4 ? four[m] : two[m];
  });
}

// Three groups of copies, the second empty: 16 bytes, none, 16 zeros, then 16 bytes in a group that is not ended.
// seen (4, 3): the first byte of each place with 2, 1, 0 groups left to arrive, and when the open one is ended as well.
extern "C" void copied(const unsigned char* from, int64_t shift, int there, unsigned char* seen, int order) {
  run(1, 48, order, [=] {
    unsigned char* shared = shared_memory();
    const auto look = [&](int row) {
      for (int place = 0; place < 3; ++place) seen[row * 3 + place] = shared[place * 16];
    };
    copy16(shared + shift, from, there);
    end_copies();
    end_copies();
    copy16(shared + 16, from + 16, false);
    end_copies();
    copy16(shared + 32, from + 32, true);
    wait_copies<2>();
    look(0);
    wait_copies<1>();
    look(1);
    wait_copies<0>();
    look(2);
    end_copies();
    wait_copies<0>();
    look(3);
  });
}

// 4 bytes to `shift` of shared memory, and from there to `to`.
extern "C" void copied4(const void* from, int64_t shift, void* to, int order) {
  run(1, 48, order, [=] {
    copy4(shared_memory() + shift, from);
    end_copies();
    wait_copies<0>();
    std::memcpy(to, shared_memory() + shift, 4);
  });
}

// exchanged(x, mask) and any_lane(x > bound) of every lane of some warps, 1000 times one after the other.
extern "C" void talked(int64_t threads, const float* x, int mask, float bound, float* other, int* any, int order) {
  run(threads, 0, order, [=] {
    const unsigned t = threadIdx.x;
    other[t] = x[t];
    for (int i = 0; i < 1001; ++i) other[t] = exchanged(other[t], mask);
    any[t] = any_lane(x[t] > bound);
  });
}

// Lanes that differ in the function that they call.
extern "C" void apart() {
  run(32, 0, 0, [] {
    if (threadIdx.x < 16) sync_warp();
    else any_lane(true);
  });
}

// A lane that is gone.
extern "C" void gone() {
  run(32, 0, 0, [] {
    if (threadIdx.x != 7) sync_warp();
  });
}

extern "C" void packed(char type, int64_t count, const float (*x)[2], uint32_t* both, float (*again)[2]) {
  for (int64_t i = 0; i < count; ++i) {
    both[i] = type == 'h' ? pack<Half>(x[i][0], x[i][1]) : pack<Brain>(x[i][0], x[i][1]);
    const float2 y = type == 'h' ? unpack<Half>(both[i]) : unpack<Brain>(both[i]);
    again[i][0] = y.x, again[i][1] = y.y;
  }
}

extern "C" uint32_t one(char type) { return type == 'h' ? kOne<Half> : kOne<Brain>; }

extern "C" float power(float x) { return power_of_2(x); }
