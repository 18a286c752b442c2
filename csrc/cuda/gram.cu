// Gram matrices: partial inner products item by item, then sums over items in their order.
//
// Accumulation: products of bf16 gradients are exact in float and are summed there, 16 of them (8
// for more than four gradients); everything else is double. No atomics.
#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/elements.cuh"
#include "cuda/tables.h"

namespace drivekd_cuda {
namespace {

constexpr int kWarps = kThreads / 32;

template <int kCount>
struct GramEntry {
  const void* grads[kCount];
  int64_t size;
  int64_t first_slot;
};

template <class T, int kCount>
__device__ __forceinline__ void add_products(const typename Format<T>::Exact (&x)[kCount],
                                             typename Format<T>::Exact (&sums)[num_pairs(kCount)]) {
#pragma unroll
  for (int a = 0; a < kCount; ++a)
#pragma unroll
    for (int b = 0; b <= a; ++b) sums[num_pairs(a) + b] += x[a] * x[b];
}

// `kParts` vectors of every gradient, kThreads apart: all loads first.
template <class T, int kCount, int kParts>
__device__ __forceinline__ void add_vectors(const T* const (&grads)[kCount], int vector,
                                            double (&sums)[num_pairs(kCount)]) {
  using Exact = typename Format<T>::Exact;
  Vector<T> loaded[kParts][kCount];
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      loaded[part][k] =
          reinterpret_cast<const Vector<T>*>(grads[k])[vector + part * kThreads];
  Exact own[num_pairs(kCount)] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      Exact x[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = Format<T>::exact(loaded[part][k].x[i]);
      add_products<T, kCount>(x, own);
    }
#pragma unroll
  for (int pair = 0; pair < num_pairs(kCount); ++pair) sums[pair] += own[pair];
}

// Lanes, then warps, in a fixed order; thread p of the block writes pair p.
template <int kPairs>
__device__ __forceinline__ void write_block_sums(double (&sums)[kPairs], double* partials,
                                                 int64_t stride) {
  __shared__ double shared[kPairs][kWarps];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      sums[pair] += __shfl_down_sync(0xffffffffu, sums[pair], offset);
    if (threadIdx.x % 32 == 0) shared[pair][threadIdx.x / 32] = sums[pair];
  }
  __syncthreads();
  if (threadIdx.x < kPairs) {
    double total = 0.0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared[threadIdx.x][warp];
    partials[threadIdx.x * stride] = total;
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(const __grid_constant__ Table<GramEntry<kCount>> table, double* partials,
                int64_t num_slots) {
  constexpr int kParts = kCount <= 4 ? 2 : 1;
  const int item = blockIdx.x;
  const int entry = entry_of(table, item);
  const GramEntry<kCount>& own = table.entries[entry];
  const int64_t chunk = item - table.first_item[entry];
  const int64_t start = chunk * kChunk;
  const int length = static_cast<int>(min(own.size - start, static_cast<int64_t>(kChunk)));
  const T* grads[kCount];
  uintptr_t bits = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    grads[k] = static_cast<const T*>(own.grads[k]) + start;
    bits |= reinterpret_cast<uintptr_t>(grads[k]);
  }
  double sums[num_pairs(kCount)] = {};
  const int vectors = bits % 16 == 0 ? length / Vector<T>::kSize : 0;
  int vector = threadIdx.x;
  for (; vector + (kParts - 1) * kThreads < vectors; vector += kParts * kThreads)
    add_vectors<T, kCount, kParts>(grads, vector, sums);
  if (kParts > 1 && vector < vectors) add_vectors<T, kCount, 1>(grads, vector, sums);
#pragma unroll 1
  for (int i = vectors * Vector<T>::kSize + threadIdx.x; i < length; i += kThreads) {
    typename Format<T>::Exact x[kCount], products[num_pairs(kCount)] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = Format<T>::exact(grads[k][i]);
    add_products<T, kCount>(x, products);
#pragma unroll
    for (int pair = 0; pair < num_pairs(kCount); ++pair) sums[pair] += products[pair];
  }
  write_block_sums(sums, partials + own.first_slot + chunk, num_slots);
}

// The slots of one pattern, and the tasks that its tensors have gradients of.
struct Pattern {
  int64_t begin;
  int64_t end;
  int32_t row;
  int32_t count;
  int32_t tasks[DRIVEKD_CUDA_MAX_COUNT];
};
struct Patterns {
  static constexpr int kCapacity = kTableBytes / sizeof(Pattern);
  Pattern entries[kCapacity];
};

__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ Patterns patterns, const double* partials,
                int64_t num_slots, int64_t num_tasks, double* gram) {
  const Pattern& own = patterns.entries[blockIdx.x];
  const int pair = blockIdx.y;
  int a = 0;
  while (num_pairs(a + 1) <= pair) ++a;
  if (a >= own.count) return;
  const int b = pair - num_pairs(a);
  double sums[1] = {0.0};
  for (int64_t slot = own.begin + threadIdx.x; slot < own.end; slot += kThreads)
    sums[0] += partials[pair * num_slots + slot];
  __shared__ double total;
  write_block_sums(sums, &total, 1);
  if (threadIdx.x == 0) {
    double* matrix = gram + own.row * num_tasks * num_tasks;
    matrix[own.tasks[a] * num_tasks + own.tasks[b]] = total;
    matrix[own.tasks[b] * num_tasks + own.tasks[a]] = total;
  }
}

// Slots of a pattern follow each other, in the order of its tensors.
struct Slots {
  std::vector<Pattern> patterns;
  std::vector<int64_t> first;  // of each tensor
  int64_t count = 0;
  int32_t most = 0;  // gradients of a tensor
};

Slots number_slots(const drivekd_lists& lists, int64_t num_rows) {
  Slots slots;
  std::vector<int64_t> next(num_rows, 0), example(num_rows, -1);
  for (int64_t t = 0; t < lists.num_tensors; ++t) {
    const drivekd_tensor& tensor = lists.tensors[t];
    next[tensor.row] += num_items(tensor.size);
    if (example[tensor.row] < 0) example[tensor.row] = t;
    slots.most = std::max(slots.most, tensor.count);
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    if (example[row] < 0) continue;
    const drivekd_tensor& tensor = lists.tensors[example[row]];
    Pattern pattern{slots.count, slots.count + next[row], static_cast<int32_t>(row), tensor.count, {}};
    for (int32_t k = 0; k < tensor.count; ++k)
      pattern.tasks[k] = static_cast<int32_t>(lists.tasks[tensor.first + k]);
    slots.patterns.push_back(pattern);
    next[row] = slots.count;
    slots.count = pattern.end;
  }
  for (int64_t t = 0; t < lists.num_tensors; ++t) {
    slots.first.push_back(next[lists.tensors[t].row]);
    next[lists.tensors[t].row] += num_items(lists.tensors[t].size);
  }
  return slots;
}

template <class T, int kCount>
int32_t gram_of(const drivekd_lists& lists, int32_t dtype, const Slots& slots, double* partials,
                cudaStream_t stream) {
  const auto fill = [&](GramEntry<kCount>& entry, int64_t t) {
    const drivekd_tensor& tensor = lists.tensors[t];
    for (int k = 0; k < kCount; ++k) entry.grads[k] = lists.grads[tensor.first + k];
    entry.size = tensor.size;
    entry.first_slot = slots.first[t];
  };
  const auto launch = [&](const Table<GramEntry<kCount>>& table, int32_t items) -> int32_t {
    gram_kernel<T, kCount><<<items, kThreads, 0, stream>>>(table, partials, slots.count);
    return cudaGetLastError();
  };
  return for_each_table<GramEntry<kCount>>(lists, dtype, kCount, fill, launch);
}

template <class T>
int32_t grams_of(const drivekd_lists& lists, int32_t dtype, const Slots& slots, double* partials,
                 cudaStream_t stream) {
  int32_t status = 0;
  const auto run = [&](auto one) {
    if (status == 0) status = one(lists, dtype, slots, partials, stream);
  };
  run(gram_of<T, 1>);
  run(gram_of<T, 2>);
  run(gram_of<T, 3>);
  run(gram_of<T, 4>);
  run(gram_of<T, 5>);
  run(gram_of<T, 6>);
  run(gram_of<T, 7>);
  run(gram_of<T, 8>);
  return status;
}

int32_t fold(const Slots& slots, const double* partials, int64_t num_tasks, double* gram,
             cudaStream_t stream) {
  const auto patterns = std::make_unique<Patterns>();
  const int64_t count = static_cast<int64_t>(slots.patterns.size());
  for (int64_t first = 0; first < count; first += Patterns::kCapacity) {
    const int64_t own = std::min<int64_t>(Patterns::kCapacity, count - first);
    std::copy_n(slots.patterns.begin() + first, own, patterns->entries);
    const dim3 grid(static_cast<unsigned>(own), num_pairs(slots.most));
    fold_kernel<<<grid, kThreads, 0, stream>>>(*patterns, partials, slots.count, num_tasks, gram);
    if (const int32_t status = cudaGetLastError()) return status;
  }
  return 0;
}

}  // namespace
}  // namespace drivekd_cuda

extern "C" int64_t drivekd_cuda_gram_partials(const drivekd_lists* lists) {
  int64_t items = 0;
  int32_t most = 0;
  for (int64_t t = 0; t < lists->num_tensors; ++t) {
    items += drivekd_cuda::num_items(lists->tensors[t].size);
    most = std::max(most, lists->tensors[t].count);
  }
  return items * drivekd_cuda::num_pairs(most);
}

extern "C" int32_t drivekd_cuda_gram(const drivekd_lists* lists, int64_t num_rows,
                                     double* partials, double* gram, void* stream) {
  using namespace drivekd_cuda;
  if (!counts_fit(*lists)) return -1;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t tasks = lists->num_tasks;
  const Slots slots = number_slots(*lists, num_rows);
  // Rows and columns of absent tasks are zero; no bit of 0.0 is set.
  int32_t status = cudaMemsetAsync(gram, 0, num_rows * tasks * tasks * sizeof(double), queue);
  if (status == 0) status = grams_of<double>(*lists, DRIVEKD_F64, slots, partials, queue);
  if (status == 0) status = grams_of<float>(*lists, DRIVEKD_F32, slots, partials, queue);
  if (status == 0) status = grams_of<__nv_bfloat16>(*lists, DRIVEKD_BF16, slots, partials, queue);
  if (status == 0) status = grams_of<__half>(*lists, DRIVEKD_F16, slots, partials, queue);
  return status != 0 ? status : fold(slots, partials, tasks, gram, queue);
}

extern "C" int32_t drivekd_cuda_version(void) { return CUDART_VERSION; }

extern "C" const char* drivekd_cuda_message(int32_t status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
