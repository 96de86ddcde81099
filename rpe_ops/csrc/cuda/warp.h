// The instructions of a warp that the attention kernels use, as functions. Every lane of a warp calls them together.
//
// Lane l of 32 holds, with group = l / 4 and t = l % 4, of
//   A, 16 x 16 of 16 bits: rows group and group + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9, in the order a[0] (group, 2t),
//     a[1] (group + 8, 2t), a[2] (group, 2t + 8), a[3] (group + 8, 2t + 8); of A, 16 x 8: a0 and a1
//   B, 16 x 8: rows 2t, 2t + 1 (b0) and 2t + 8, 2t + 9 (b1) of column group; of B, 8 x 8: b0
//   C, 16 x 8 of float: c[0], c[1] row group, columns 2t, 2t + 1; c[2], c[3] row group + 8
// (PTX ISA, "Matrix multiply-accumulate operation using mma instruction").
//
// tests/on_host/warp.h has the same functions, emulated.

#pragma once

#ifdef RPE_OPS_ON_HOST
#include "on_host/warp.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rpe_ops {

using Half = __half;
using Brain = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// c += A B, 16 x 8 x 16.
template <class T>
__device__ __forceinline__ void multiply16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && !__is_same(T, Half))
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += A B, 16 x 8 x 8.
template <class T>
__device__ __forceinline__ void multiply8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (!__is_same(T, Half))
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// 8 x 8 matrices of 16 bits from shared memory: lanes 8n to 8n + 7 give the address of the rows of matrix n, 16 bytes
// each, and lane l gets columns 2t, 2t + 1 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)));
}

// The same of matrices that are turned: lane l gets rows 2t, 2t + 1 of column l / 4 of each.
__device__ __forceinline__ void load_turned(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// 16 bytes to shared memory, or zeros; they are there after end_copies, wait_copies and a barrier.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

// 4 bytes to shared memory.
__device__ __forceinline__ void copy4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies but the last `pending`.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ float exchanged(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers in 32 bits, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (__is_same(T, Half))
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
  if constexpr (__is_same(T, Half)) return __half22float2(*reinterpret_cast<const __half2*>(&both));
  else return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

template <class T>
constexpr uint32_t kOne = __is_same(T, Half) ? 0x3c00u : 0x3f80u;

}  // namespace rpe_ops

#endif
