// Storage formats on the device: 16 bytes of elements, and their conversions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace drivekd_cuda {

// Products of two elements are exact in `Exact`.
template <class T>
struct Format;

template <>
struct Format<double> {
  using Exact = double;
  static __device__ __forceinline__ double exact(double x) { return x; }
  static __device__ __forceinline__ double rounded(double x) { return x; }
};
template <>
struct Format<float> {
  using Exact = double;
  static __device__ __forceinline__ double exact(float x) { return x; }
  static __device__ __forceinline__ float rounded(double x) { return static_cast<float>(x); }
};
template <>
struct Format<__half> {
  using Exact = double;
  static __device__ __forceinline__ double exact(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half rounded(double x) {
    return __float2half_rn(static_cast<float>(x));
  }
};
template <>
struct Format<__nv_bfloat16> {
  using Exact = float;
  static __device__ __forceinline__ float exact(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 rounded(double x) {
    return __float2bfloat16_rn(static_cast<float>(x));
  }
};

// 16 bytes, read and written at once.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

}  // namespace drivekd_cuda
