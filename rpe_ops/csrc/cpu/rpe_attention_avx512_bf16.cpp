// The kernels of rpe_attention for bfloat16 with products of its own (AVX512_BF16).

#include "rpe_attention.h"

#ifdef RPE_ATTENTION_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define RPE_AVX2
#define RPE_AVX512
#define RPE_BRAIN
#define RPE_ISA avx512_bf16
#define RPE_BYTES 64
#include "rpe_attention_kernels.h"
#pragma GCC pop_options
#endif
