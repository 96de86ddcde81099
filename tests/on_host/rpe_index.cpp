// The CUDA kernels of rpe_index and rpe_bucket_sum as a library of the host: test_rpe_index_cuda.py calls it.

#include "cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../rpe_ops/csrc/cuda/rpe_index_kernels.h"

using namespace rpe_ops;

struct Options {
  int64_t multiprocessors;
  int64_t first_block;  // below 0: counted from the end
  int64_t order;
};

namespace {

template <class Kernel>
void launch(int64_t blocks, int64_t shared_bytes, const Options& o, const Kernel& kernel) {
  on_host::launch(
      o.first_block < 0 ? blocks + o.first_block : o.first_block, blocks, kThreads, shared_bytes,
      static_cast<int>(o.order), kernel);
}

template <class Bits>
int64_t index_on_host(const Problem& p, const Options& o) {
  const IndexPlan plan = plan_index(p, sizeof(Bits), o.multiprocessors);
  if (plan.blocks > 0)
    launch(plan.blocks, plan.shared_bytes, o, [&] { index_kernel<Bits>(p, plan); });
  else
    launch(blocks_of_large(p), 0, o, [&] { index_large_kernel<Bits>(p); });
  return plan.blocks;
}

template <class T>
int64_t sum_on_host(const Problem& p, const Options& o) {
  const SumPlan plan = plan_sum<T>(p, o.multiprocessors);
  if (plan.blocks == 0)
    launch(blocks_of_large(p), 0, o, [&] { sum_large_kernel<T>(p); });
  else if (maps_of_a_lane<T>(p.buckets) == 1)
    launch(plan.blocks, plan.shared_bytes, o, [&] { sum_kernel<T, 1>(p, plan); });
  else if constexpr (sizeof(T) == 2)
    launch(plan.blocks, plan.shared_bytes, o, [&] { sum_kernel<T, 2>(p, plan); });
  // blocks, and how often a row's order is made: 0 once for all maps, 1 in every round
  return plan.blocks * 2 + (plan.slots != plan.chunks);
}

}  // namespace

extern "C" int64_t rpe_index_on_host(const Problem* p, const Options* o, int bytes) {
  return bytes == 2 ? index_on_host<uint16_t>(*p, *o)
      : bytes == 4  ? index_on_host<uint32_t>(*p, *o)
                    : index_on_host<uint64_t>(*p, *o);
}

extern "C" int64_t rpe_bucket_sum_on_host(const Problem* p, const Options* o, char type) {
  return type == 'd' ? sum_on_host<double>(*p, *o)
      : type == 'f'  ? sum_on_host<float>(*p, *o)
      : type == 'h'  ? sum_on_host<c10::Half>(*p, *o)
                     : sum_on_host<c10::BFloat16>(*p, *o);
}
