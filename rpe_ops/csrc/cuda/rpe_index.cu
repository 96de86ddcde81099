// rpe_index:      Y[b,h,i,j] = X[b,h,i, ids[i,j]]
// rpe_bucket_sum: S[b,h,i,n] = sum of X[b,h,i,j] over ids[i,j] = n, in an order that depends on the sizes alone
//
// A block of threads has one query row i and several maps (b, h). It reads the ids of the row once, as they are, checks
// them and keeps them in shared memory as 16-bit integers; the tables, or the bins, of a few maps stand there too. Rows
// longer than a chunk are taken chunk by chunk. Nothing is added by an atomic: bins belong to one thread each.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../check.h"

namespace rpe_ops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Keys of a row, at most, whose ids are in shared memory at a time: 8 KiB of 16-bit ids.
constexpr int kMaxChunk = 4096;
// Maps that a block serves with one reading of the ids; what an int64 index costs is divided by it.
constexpr int kMaps = 16;
// Shared memory that every GPU gives a block without being asked.
constexpr int64_t kSharedBytes = 48 * 1024;
// Bins of a warp's lanes stand kWarp apart, so that no two lanes ever want one bank of shared memory.
constexpr int kLanes = kWarp;

// The first three strides of a (B, H, Lq, _) tensor whose last stride is 1.
struct Rows {
  int64_t heads, queries;
  int64_t stride_b, stride_h, stride_i;

  __host__ __device__ int64_t at(int64_t bh, int64_t i) const {
    return bh / heads * stride_b + bh % heads * stride_h + i * stride_i;
  }
};

template <class From>
struct Index {
  const From* data;
  int64_t stride_i, stride_j;
};

// An id that is outside the table stops the program. It is taken as 0 all the same: builds with NDEBUG keep the assert
// of CUDA off, and even they must not read or write elsewhere.
template <class From>
__device__ int64_t checked(From value, int64_t buckets) {
  const int64_t id = static_cast<int64_t>(value);
  const bool inside = id >= 0 && id < buckets;
  assert(inside && "index out of bounds: expected 0 <= index < N");
  return inside ? id : 0;
}

template <class T, class From>
__global__ void __launch_bounds__(kThreads)
    index_kernel(
        const T* x, Rows rows, int64_t maps, int64_t buckets, Index<From> index, int64_t keys, T* y, int tables,
        int chunk) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint16_t* ids = reinterpret_cast<uint16_t*>(shared);
  T* table = reinterpret_cast<T*>(shared + chunk * sizeof(uint16_t));  // (tables, buckets)
  const int64_t first_map = static_cast<int64_t>(blockIdx.y) * kMaps;
  const int64_t last_map = min(first_map + kMaps, maps);
  for (int64_t i = blockIdx.x; i < rows.queries; i += gridDim.x) {
    for (int64_t begin = 0; begin < keys; begin += chunk) {
      const int count = static_cast<int>(min(static_cast<int64_t>(chunk), keys - begin));
      __syncthreads();
      for (int j = threadIdx.x; j < count; j += kThreads)
        ids[j] = static_cast<uint16_t>(
            checked(index.data[i * index.stride_i + (begin + j) * index.stride_j], buckets));
      for (int64_t map = first_map; map < last_map; map += tables) {
        const int group = static_cast<int>(min(static_cast<int64_t>(tables), last_map - map));
        __syncthreads();
        for (int n = threadIdx.x; n < group * buckets; n += kThreads)
          table[n] = x[rows.at(map + n / buckets, i) + n % buckets];
        __syncthreads();
        for (int m = 0; m < group; ++m) {
          const T* from = table + m * buckets;
          T* to = y + ((map + m) * rows.queries + i) * keys + begin;
          for (int j = threadIdx.x; j < count; j += kThreads) to[j] = from[ids[j]];
        }
      }
    }
  }
}

// For tables that shared memory does not hold: straight from global memory.
template <class T, class From>
__global__ void __launch_bounds__(kThreads)
    index_large_kernel(const T* x, Rows rows, int64_t maps, int64_t buckets, Index<From> index, int64_t keys, T* y) {
  const int64_t total = maps * rows.queries * keys;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < total; e += step) {
    const int64_t j = e % keys, i = e / keys % rows.queries, map = e / keys / rows.queries;
    y[e] = x[rows.at(map, i) + checked(index.data[i * index.stride_i + j * index.stride_j], buckets)];
  }
}

// A warp sums one map. Each lane has bins of its own, bins[n][lane], and takes every 32nd key, so the reads of a warp
// are one piece of memory; at the end the lanes of a bin are added in a fixed tree.
template <class T, class Sum, class From>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(
        const T* x, Rows rows, int64_t maps, int64_t buckets, Index<From> index, int64_t keys, T* s, int chunk) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint16_t* ids = reinterpret_cast<uint16_t*>(shared);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Sum* bins = reinterpret_cast<Sum*>(shared + chunk * sizeof(uint16_t)) + warp * buckets * kLanes;
  const int64_t first_map = static_cast<int64_t>(blockIdx.y) * kMaps;
  const int64_t last_map = min(first_map + kMaps, maps);
  for (int64_t i = blockIdx.x; i < rows.queries; i += gridDim.x) {
    // one chunk: the ids are read once for all maps; several: once for each round of warps
    for (int64_t round = first_map; round < last_map; round += warps) {
      const int64_t map = round + warp;
      const bool mine = map < last_map;
      if (mine)
        for (int n = 0; n < buckets; ++n) bins[n * kLanes + lane] = Sum(0);
      for (int64_t begin = 0; begin < keys; begin += chunk) {
        const int count = static_cast<int>(min(static_cast<int64_t>(chunk), keys - begin));
        if (round == first_map || keys > chunk) {
          __syncthreads();
          for (int j = threadIdx.x; j < count; j += blockDim.x)
            ids[j] = static_cast<uint16_t>(
                checked(index.data[i * index.stride_i + (begin + j) * index.stride_j], buckets));
          __syncthreads();
        }
        if (mine) {
          const T* from = x + rows.at(map, i) + begin;
#pragma unroll 4
          for (int j = lane; j < count; j += kLanes) bins[ids[j] * kLanes + lane] += static_cast<Sum>(from[j]);
        }
      }
      __syncwarp();
      if (mine) {
        T* to = s + (map * rows.queries + i) * buckets;
        for (int first = 0; first < buckets; first += kWarp) {
          // lane l adds up bin first + l; beginning at another column in each lane keeps the banks apart, and the order
          // is a function of n alone
          const int n = first + lane;
          if (n < buckets) {
            Sum sum = 0;
            for (int l = 0; l < kLanes; ++l) sum += bins[n * kLanes + (l + lane) % kLanes];
            to[n] = static_cast<T>(sum);
          }
        }
      }
      __syncwarp();
    }
    __syncthreads();
  }
}

// For more bins than shared memory holds: a thread sums one bin, reading the whole row.
template <class T, class Sum, class From>
__global__ void __launch_bounds__(kThreads)
    sum_large_kernel(const T* x, Rows rows, int64_t maps, int64_t buckets, Index<From> index, int64_t keys, T* s) {
  const int64_t total = maps * rows.queries * buckets;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < total; e += step) {
    const int64_t n = e % buckets, i = e / buckets % rows.queries, map = e / buckets / rows.queries;
    const T* from = x + rows.at(map, i);
    Sum sum = 0;
    for (int64_t j = 0; j < keys; ++j)
      if (checked(index.data[i * index.stride_i + j * index.stride_j], buckets) == n) sum += static_cast<Sum>(from[j]);
    s[e] = static_cast<T>(sum);
  }
}

// The macros of torch for this are not in the headers of every torch that the library is built against.
void check_launch() {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "CUDA did not start a kernel of rpe_ops: ", cudaGetErrorString(error));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grid dimensions: any number of blocks in x, 65535 in y.
dim3 grid_of(const Rows& rows, int64_t maps) {
  return dim3(
      static_cast<unsigned>(std::min<int64_t>(rows.queries, 1 << 20)), static_cast<unsigned>(ceil_div(maps, kMaps)));
}

constexpr int64_t kMaxMaps = 65535 * kMaps;

// A multiple of 8, which keeps what follows the ids in shared memory at 16 bytes.
int chunk_of(int64_t keys) { return static_cast<int>(std::min<int64_t>(ceil_div(keys, 8) * 8, kMaxChunk)); }

template <class T, class From>
void launch_index(
    const T* x, Rows rows, int64_t maps, int64_t buckets, Index<From> index, int64_t keys, T* y, cudaStream_t stream) {
  const int chunk = chunk_of(keys);
  const int64_t ids_bytes = chunk * sizeof(uint16_t), table_bytes = buckets * static_cast<int64_t>(sizeof(T));
  const int64_t tables = std::min<int64_t>(kMaps, (kSharedBytes - ids_bytes) / table_bytes);
  if (tables < 1 || maps > kMaxMaps) {
    const int64_t blocks = std::min<int64_t>(ceil_div(maps * rows.queries * keys, kThreads), 1 << 20);
    index_large_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(x, rows, maps, buckets, index, keys, y);
  } else {
    index_kernel<<<grid_of(rows, maps), kThreads, ids_bytes + tables * table_bytes, stream>>>(
        x, rows, maps, buckets, index, keys, y, static_cast<int>(tables), chunk);
  }
  check_launch();
}

template <class T, class From>
void launch_sum(
    const T* x, Rows rows, int64_t maps, int64_t buckets, Index<From> index, int64_t keys, T* s, cudaStream_t stream) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int chunk = chunk_of(keys);
  const int64_t ids_bytes = chunk * sizeof(uint16_t);
  const int64_t warp_bytes = buckets * kLanes * static_cast<int64_t>(sizeof(Sum));
  const int64_t warps = std::min<int64_t>(kThreads / kWarp, (kSharedBytes - ids_bytes) / std::max<int64_t>(warp_bytes, 1));
  if (warps < 1 || maps > kMaxMaps) {
    const int64_t blocks = std::min<int64_t>(ceil_div(maps * rows.queries * buckets, kThreads), 1 << 20);
    sum_large_kernel<T, Sum, From>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(x, rows, maps, buckets, index, keys, s);
  } else {
    const unsigned threads = static_cast<unsigned>(warps * kWarp);
    sum_kernel<T, Sum, From><<<grid_of(rows, maps), threads, ids_bytes + warps * warp_bytes, stream>>>(
        x, rows, maps, buckets, index, keys, s, chunk);
  }
  check_launch();
}

// call(zero of the C++ type) for the four floating-point types.
template <class Call>
void with_dtype(const Tensor& input, const Call& call) {
  switch (input.scalar_type()) {
    case ScalarType::Double: return call(double{});
    case ScalarType::Float: return call(float{});
    case ScalarType::Half: return call(Half{});
    case ScalarType::BFloat16: return call(BFloat16{});
    default: check(false, "input is neither float64, float32, float16 nor bfloat16");
  }
}

template <class Call>
void with_index(const Tensor& index, const Call& call) {
  const auto as = [&](auto zero) {
    using From = decltype(zero);
    call(Index<From>{static_cast<const From*>(index.const_data_ptr()), index.stride(0), index.stride(1)});
  };
  switch (index.scalar_type()) {
    case ScalarType::Byte: return as(uint8_t{});
    case ScalarType::Short: return as(int16_t{});
    case ScalarType::Int: return as(int32_t{});
    case ScalarType::Long: return as(int64_t{});
    default: check(false, "index is neither uint8, int16, int32 nor int64");
  }
}

Tensor with_unit_last_stride(const Tensor& input) {
  return input.size(3) <= 1 || input.stride(3) == 1 ? input : torch::stable::contiguous(input);
}

Rows rows_of(const Tensor& input) {
  return {input.size(1), input.size(2), input.stride(0), input.stride(1), input.stride(2)};
}

cudaStream_t current_stream(const Tensor& input) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream);
  check(error == AOTI_TORCH_SUCCESS, "torch knows no current stream of CUDA device ", input.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

Tensor rpe_index(const Tensor& input, const Tensor& index) {
  check_shapes(input, index);
  check_one_device(input, index);
  const int64_t keys = index.size(1), buckets = input.size(3), maps = input.size(0) * input.size(1);
  Tensor output = torch::stable::new_empty(input, {input.size(0), input.size(1), input.size(2), keys});
  if (output.numel() == 0) return output;
  check(buckets > 0, "a table of N=0 buckets has no entry for ", index.numel(), " ids");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor x = with_unit_last_stride(input);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    with_index(index, [&](auto ids) {
      launch_index(
          static_cast<const T*>(x.const_data_ptr()), rows_of(x), maps, buckets, ids, keys,
          static_cast<T*>(output.mutable_data_ptr()), current_stream(x));
    });
  });
  return output;
}

Tensor rpe_bucket_sum(const Tensor& input, const Tensor& index, int64_t num_buckets) {
  check_shapes(input, index);
  check_columns(input, index, num_buckets);
  check_one_device(input, index);
  const std::vector<int64_t> sizes = {input.size(0), input.size(1), input.size(2), num_buckets};
  if (input.numel() == 0) return torch::stable::new_zeros(input, sizes);
  check(num_buckets > 0, "num_buckets=0 has no bucket for ", index.numel(), " ids");
  const int64_t keys = index.size(1), maps = input.size(0) * input.size(1);
  Tensor output = torch::stable::new_empty(input, sizes);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor x = with_unit_last_stride(input);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    with_index(index, [&](auto ids) {
      launch_sum(
          static_cast<const T*>(x.const_data_ptr()), rows_of(x), maps, num_buckets, ids, keys,
          static_cast<T*>(output.mutable_data_ptr()), current_stream(x));
    });
  });
  return output;
}

}  // namespace
}  // namespace rpe_ops

STABLE_TORCH_LIBRARY_IMPL(rpe_ops, CUDA, m) {
  m.impl("rpe_index", TORCH_BOX(&rpe_ops::rpe_index));
  m.impl("rpe_bucket_sum", TORCH_BOX(&rpe_ops::rpe_bucket_sum));
}
