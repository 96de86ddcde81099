// The kernels of rpe_attention for AVX2.

#include "rpe_attention.h"

#ifdef RPE_ATTENTION_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define RPE_AVX2
#define RPE_ISA avx2
#define RPE_BYTES 32
#include "rpe_attention_kernels.h"
#pragma GCC pop_options
#endif
