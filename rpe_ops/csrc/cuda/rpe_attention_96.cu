// Attention with heads of up to 96.

#include "rpe_attention_launches.h"

namespace rpe_ops {

RPE_OPS_LAUNCHES(Half, 96)
RPE_OPS_LAUNCHES(Brain, 96)

}  // namespace rpe_ops
