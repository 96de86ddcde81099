// The CUDA kernels of rpe_attention as a library of the host: test_rpe_attention_cuda.py calls it.

#define RPE_OPS_ON_HOST
#include "../../rpe_ops/csrc/cuda/rpe_attention_kernels.h"

using namespace rpe_ops;

struct Options {
  int64_t batch, warps, order;
  int64_t is_known;  // which encodings there are, when it is compiled
};

namespace {

template <class T, int D, int On, Pass pass>
int64_t launch(const Attention& a, const Options& o, const Uses& use) {
  const int warps = static_cast<int>(o.warps);
  const int64_t blocks = (a.map.groups + warps - 1) / warps * o.batch * a.heads;
  const int64_t bytes = layout_of<D>(a.map, use, warps).bytes;
  on_host::launch(0, blocks, 32 * warps, bytes, static_cast<int>(o.order), [&] { attention_kernel<T, D, On, pass>(a); });
  return bytes;
}

template <class T, int D, Pass pass>
int64_t with_encodings(const Attention& a, const Options& o) {
  const bool q = a.on_q.axes != nullptr, k = a.on_k.axes != nullptr, v = a.on_v.axes != nullptr;
  const Uses use = uses_of(pass, q, k, v);
  if constexpr (D == 64) {
    if (o.is_known && !q && k && !v) return launch<T, D, 2, pass>(a, o, use);
    if (o.is_known && q && k && v) return launch<T, D, 7, pass>(a, o, use);
  }
  return launch<T, D, 8, pass>(a, o, use);
}

template <class T, int D>
int64_t with_pass(const Attention& a, const Options& o, int pass) {
  return pass == 0 ? with_encodings<T, D, Pass::kForward>(a, o)
      : pass == 1  ? with_encodings<T, D, Pass::kQueries>(a, o)
                   : with_encodings<T, D, Pass::kKeys>(a, o);
}

template <class T>
int64_t with_head(const Attention& a, const Options& o, int pass) {
  return a.head_pieces <= 4 ? with_pass<T, 32>(a, o, pass)
      : a.head_pieces <= 8  ? with_pass<T, 64>(a, o, pass)
      : a.head_pieces <= 12 ? with_pass<T, 96>(a, o, pass)
                            : with_pass<T, 128>(a, o, pass);
}

}  // namespace

// One of three kernels: 0 forward, 1 of queries, 2 of keys. Of the map a has height, width and skip. The result is how many
// bytes of shared memory a block takes.
extern "C" int64_t attention_on_host(char type, int pass, const Attention* given, const Options* o) {
  Attention a = *given;
  a.map = geometry_of(a.map.height, a.map.width, a.map.skip);
  return type == 'h' ? with_head<Half>(a, *o, pass) : with_head<Brain>(a, *o, pass);
}
