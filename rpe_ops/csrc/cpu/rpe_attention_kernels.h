// The tile kernels of rpe_attention, for a file of each instruction set: it defines RPE_ISA (a namespace), RPE_BYTES (of a
// vector) and, where they are there, RPE_AVX2, RPE_AVX512, and RPE_BRAIN where bfloat16 has products of its own.

namespace rpe_ops::RPE_ISA {

#define RPE_INLINE inline __attribute__((always_inline))

#include "rpe_attention_simd.h"
#include "rpe_attention_storage.h"
#include "rpe_attention_product.h"
#include "rpe_attention_axes.h"
#include "rpe_attention_buckets.h"
#include "rpe_attention_tiles.h"

#undef RPE_INLINE

// with the products X
template <class X>
Kernels kernels_of() {
  return {&scratch_bytes<X>, &kept_bytes<X>, &forward<X>, &backward<X>, &finish<X>, simd<typename X::Number>::W};
}

Kernels kernels([[maybe_unused]] Storage storage) {
#ifdef RPE_BRAIN
  return kernels_of<Brain>();
#else
  return storage == Storage::f64 ? kernels_of<Exact<double>>() : kernels_of<Exact<float>>();
#endif
}

}  // namespace rpe_ops::RPE_ISA
