// Attention with heads of up to 32.

#include "rpe_attention_launches.h"

namespace rpe_ops {

RPE_OPS_LAUNCHES(Half, 32)
RPE_OPS_LAUNCHES(Brain, 32)

}  // namespace rpe_ops
