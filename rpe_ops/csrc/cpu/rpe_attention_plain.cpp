// The kernels of rpe_attention in vectors of 16 bytes, which every machine has or a compiler splits.

#include "rpe_attention.h"

#define RPE_ISA plain
#define RPE_BYTES 16
#include "rpe_attention_kernels.h"
