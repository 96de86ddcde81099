// The CUDA kernels of rpe_attention as a library of the host: test_rpe_attention_cuda.py calls it.

#define RPE_OPS_ON_HOST
#include "../../rpe_ops/csrc/cuda/rpe_attention_tables.h"

using namespace rpe_ops;

struct Options {
  int64_t warps, parts;  // of a block; blocks that share the samples of a head
  int64_t order;
  int64_t is_known;  // which encodings there are, when it is compiled
};

namespace {

template <class Kernel>
void launch(int64_t blocks, int threads, int64_t shared_bytes, const Options& o, const Kernel& kernel) {
  on_host::launch(0, blocks, threads, shared_bytes, static_cast<int>(o.order), kernel);
}

template <class T, int D, int On, Pass pass>
void attend(const Attention& a, const Options& o) {
  const int warps = static_cast<int>(o.warps);
  const Uses uses = uses_of(pass, a.on_q.axes != nullptr, a.on_k.axes != nullptr, a.on_v.axes != nullptr);
  const int64_t blocks = (a.map.groups + warps - 1) / warps * a.heads * o.parts;
  launch(blocks, 32 * warps, layout_of<D, On, pass>(a.map, uses, warps).bytes, o, [&] { attention_kernel<T, D, On, pass>(a); });
}

template <class T, int D, Pass pass>
void with_encodings(const Attention& a, const Options& o) {
  const bool q = a.on_q.axes != nullptr, k = a.on_k.axes != nullptr, v = a.on_v.axes != nullptr;
  if constexpr (D == 64) {
    if (o.is_known && !q && k && !v) return attend<T, D, 2, pass>(a, o);
    if (o.is_known && q && k && v) return attend<T, D, 7, pass>(a, o);
  }
  attend<T, D, 8, pass>(a, o);
}

template <class T, int D>
void forward(const Attention& a, const Options& o) {
  const int64_t blocks = o.parts * a.heads;
  if (a.on_q.axes != nullptr)
    launch(blocks, 32 * kMaxWarps, kSideBytes<D>, o, [&] {
      side_tables_kernel<T, D>(
          a.k, a.on_q, a.heads, a.head_pieces, a.map.length, int64_t{a.batch} * a.map.length, a.map.skip > 0);
    });
  with_encodings<T, D, Pass::kForward>(a, o);
}

template <class T, int D>
void backward(const Attention& a, const Options& o, TableGradients all) {
  with_encodings<T, D, Pass::kQueries>(a, o);
  with_encodings<T, D, Pass::kKeys>(a, o);
  if (all.count == 0) return;
  const int64_t blocks = int64_t{all.count} * all.heads * all.splits;
  std::vector<float> parts(blocks * D * kAllPlaces, NAN);
  all.parts = parts.data();
  launch(blocks, 2 * D, kGradientBytes<D>, o, [&] { table_gradients_kernel<T, D>(all); });
  launch(int64_t{all.count} * all.heads * (D * kAllPlaces / kFoldThreads), kFoldThreads, kFoldThreads * 4, o, [&] {
    fold_gradients_kernel<T, D>(all);
  });
}

template <class Call>
void with_types(char type, int pieces, const Call& call) {
  const auto with = [&](auto dtype) {
    if (pieces <= 4) call(dtype, std::integral_constant<int, 32>());
    else if (pieces <= 8) call(dtype, std::integral_constant<int, 64>());
    else if (pieces <= 12) call(dtype, std::integral_constant<int, 96>());
    else call(dtype, std::integral_constant<int, 128>());
  };
  if (type == 'h') with(Half());
  else with(Brain());
}

}  // namespace

// Of the map, `a` has height, width and skip; the rest is found here.
extern "C" void forward_on_host(char type, Attention* a, const Options* o) {
  a->map = geometry_of(a->map.height, a->map.width, a->map.skip);
  with_types(type, a->head_pieces, [&](auto dtype, auto head) { forward<decltype(dtype), decltype(head)::value>(*a, *o); });
}

extern "C" void backward_on_host(char type, const Attention* a, const Options* o, const TableGradients* all) {
  with_types(type, a->head_pieces, [&](auto dtype, auto head) {
    backward<decltype(dtype), decltype(head)::value>(*a, *o, *all);
  });
}
