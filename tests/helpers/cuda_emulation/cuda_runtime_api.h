// As much of CUDA as csrc/cuda uses, on CPU threads: one block at a time, a thread for each of its
// threads. What it shows is indexing, order of sums and launches; it knows no memory model.
#pragma once
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static
#define CUDART_VERSION 0

using cudaStream_t = void*;
using cudaError_t = int;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx;

namespace emulation {
inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline double exchanged[32][32];

template <class Kernel, class... Arguments>
void launch(dim3 grid, int num_threads, Kernel kernel, const Arguments&... arguments) {
  block = std::make_unique<std::barrier<>>(num_threads);
  warps.clear();
  for (int warp = 0; warp < num_threads / 32; ++warp)
    warps.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread)
    threads.emplace_back([&, thread] {
      threadIdx = dim3(thread, 0, 0);
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, 0);
          kernel(arguments...);
          block->arrive_and_wait();
        }
    });
  for (std::thread& thread : threads) thread.join();
}
}  // namespace emulation

inline void __syncthreads() { emulation::block->arrive_and_wait(); }
inline double __shfl_down_sync(unsigned, double value, int offset) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulation::exchanged[warp][lane] = value;
  emulation::warps[warp]->arrive_and_wait();
  const double other = lane + offset < 32 ? emulation::exchanged[warp][lane + offset] : value;
  emulation::warps[warp]->arrive_and_wait();
  return other;
}

inline int cudaGetLastError() { return 0; }
inline int cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return 0;
}
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
