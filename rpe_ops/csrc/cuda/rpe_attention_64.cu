// Attention with heads of up to 64.

#include "rpe_attention_launches.h"

namespace rpe_ops {

RPE_OPS_LAUNCHES(Half, 64)
RPE_OPS_LAUNCHES(Brain, 64)

}  // namespace rpe_ops
