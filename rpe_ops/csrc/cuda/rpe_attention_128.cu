// Attention with heads of up to 128.

#include "rpe_attention_launches.h"

namespace rpe_ops {

RPE_OPS_LAUNCHES(Half, 128)
RPE_OPS_LAUNCHES(Brain, 128)

}  // namespace rpe_ops
