// Linear combinations: one read of every gradient, sums in double, one rounding, one write.
#include "cuda/elements.cuh"
#include "cuda/tables.h"

namespace drivekd_cuda {
namespace {

template <int kCount>
struct CombineEntry {
  const void* grads[kCount];
  void* out;
  int64_t size;
  int32_t weights[kCount];  // places
};

template <class T, int kCount>
__device__ __forceinline__ T combined(const T (&x)[kCount], const double (&weights)[kCount],
                                      bool accumulate, T old) {
  double sum = accumulate ? static_cast<double>(Format<T>::exact(old)) : 0.0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum += static_cast<double>(Format<T>::exact(x[k])) * weights[k];
  return Format<T>::rounded(sum);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ Table<CombineEntry<kCount>> table,
                   const double* weights, bool accumulate) {
  const int item = blockIdx.x;
  const int entry = entry_of(table, item);
  const CombineEntry<kCount>& own = table.entries[entry];
  const int64_t start = static_cast<int64_t>(item - table.first_item[entry]) * kChunk;
  const int length = static_cast<int>(min(own.size - start, static_cast<int64_t>(kChunk)));
  T* const out = static_cast<T*>(own.out) + start;
  const T* grads[kCount];
  double weight[kCount];
  uintptr_t bits = reinterpret_cast<uintptr_t>(out);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    grads[k] = static_cast<const T*>(own.grads[k]) + start;
    weight[k] = weights[own.weights[k]];
    bits |= reinterpret_cast<uintptr_t>(grads[k]);
  }
  const int vectors = bits % 16 == 0 ? length / Vector<T>::kSize : 0;
  for (int vector = threadIdx.x; vector < vectors; vector += kThreads) {
    Vector<T> x[kCount], result = {};
    Vector<T>* const target = reinterpret_cast<Vector<T>*>(out) + vector;
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = reinterpret_cast<const Vector<T>*>(grads[k])[vector];
    if (accumulate) result = *target;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      T one[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) one[k] = x[k].x[i];
      result.x[i] = combined<T, kCount>(one, weight, accumulate, result.x[i]);
    }
    *target = result;
  }
#pragma unroll 1
  for (int i = vectors * Vector<T>::kSize + threadIdx.x; i < length; i += kThreads) {
    T one[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) one[k] = grads[k][i];
    out[i] = combined<T, kCount>(one, weight, accumulate, accumulate ? out[i] : one[0]);
  }
}

struct Call {
  const drivekd_lists& lists;
  const double* weights;
  bool accumulate;
  void* const* out;
  cudaStream_t stream;
};

template <class T, int kCount>
int32_t combine_of(const Call& call, int32_t dtype) {
  const auto fill = [&](CombineEntry<kCount>& entry, int64_t t) {
    const drivekd_tensor& tensor = call.lists.tensors[t];
    for (int k = 0; k < kCount; ++k) {
      entry.grads[k] = call.lists.grads[tensor.first + k];
      entry.weights[k] = static_cast<int32_t>(tensor.row * call.lists.num_tasks +
                                              call.lists.tasks[tensor.first + k]);
    }
    entry.out = call.out[t];
    entry.size = tensor.size;
  };
  const auto launch = [&](const Table<CombineEntry<kCount>>& table, int32_t items) -> int32_t {
    combine_kernel<T, kCount>
        <<<items, kThreads, 0, call.stream>>>(table, call.weights, call.accumulate);
    return cudaGetLastError();
  };
  return for_each_table<CombineEntry<kCount>>(call.lists, dtype, kCount, fill, launch);
}

template <class T>
int32_t combines_of(const Call& call, int32_t dtype) {
  int32_t status = 0;
  const auto run = [&](auto one) {
    if (status == 0) status = one(call, dtype);
  };
  run(combine_of<T, 1>);
  run(combine_of<T, 2>);
  run(combine_of<T, 3>);
  run(combine_of<T, 4>);
  run(combine_of<T, 5>);
  run(combine_of<T, 6>);
  run(combine_of<T, 7>);
  run(combine_of<T, 8>);
  return status;
}

}  // namespace
}  // namespace drivekd_cuda

extern "C" int32_t drivekd_cuda_combine(const drivekd_lists* lists, const double* weights,
                                        int32_t accumulate, void* const* out, void* stream) {
  using namespace drivekd_cuda;
  if (!counts_fit(*lists)) return -1;
  const Call call{*lists, weights, accumulate != 0, out, static_cast<cudaStream_t>(stream)};
  int32_t status = combines_of<double>(call, DRIVEKD_F64);
  if (status == 0) status = combines_of<float>(call, DRIVEKD_F32);
  if (status == 0) status = combines_of<__nv_bfloat16>(call, DRIVEKD_BF16);
  if (status == 0) status = combines_of<__half>(call, DRIVEKD_F16);
  return status;
}
