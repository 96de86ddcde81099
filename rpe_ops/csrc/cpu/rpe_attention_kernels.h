// The tile kernels of rpe_attention. No include guards, here and in the rooms below: rpe_attention.cpp includes this file
// once for each instruction set, with RPE_ISA (a namespace), RPE_BYTES (of a vector) and, where they are there, RPE_AVX2,
// RPE_AVX512, and RPE_BRAIN where bfloat16 has products of its own.

namespace rpe_ops::RPE_ISA {

#define RPE_INLINE inline __attribute__((always_inline))

#include "rpe_attention_simd.h"
#include "rpe_attention_storage.h"
#include "rpe_attention_product.h"
#include "rpe_attention_axes.h"
#include "rpe_attention_buckets.h"
#include "rpe_attention_tiles.h"

#undef RPE_INLINE

}  // namespace rpe_ops::RPE_ISA
