// What rpe_attention.cu launches, and rpe_attention_launches.h defines: for each head size in a file of its own, so that
// compilers work on several at a time.

#pragma once

#include "launch.h"
#include "rpe_attention_tables.h"

namespace rpe_ops {

struct Device {
  int shared_bytes, processors;  // that a block may have; multiprocessors
};

// What a device has is asked for once.
Device of_device(int device);

struct Run {
  const Attention& a;
  int64_t heads, length, tokens;  // H, L, B * L
  bool q, k, v;                   // which have encodings
  cudaStream_t stream;
  Device device;
};

template <class T, int D>
void attend(const Run& run, Pass pass);

// The far tables of encodings on q, for the forward and for the gradients of queries.
template <class T, int D>
void side_tables(const Run& run);

template <class T, int D>
void table_gradients(const TableGradients& all, cudaStream_t stream);

}  // namespace rpe_ops
