// The inner loops, one set per instruction set (isa_*.cpp), and the set in use.
#pragma once
#include <array>
#include <cstdint>

#include "drivekd_core.h"

namespace drivekd {

constexpr int kNumDtypes = 4;
constexpr int kMaxTasks = 8;

// Storage formats, as tags for the loads and stores of an instruction set.
struct F64 {
  static constexpr int64_t kSize = 8;
};
struct F32 {
  static constexpr int64_t kSize = 4;
};
struct BF16 {
  static constexpr int64_t kSize = 2;
};
struct F16 {
  static constexpr int64_t kSize = 2;
};

// Pairs (a, b), b <= a, in the order (0,0) (1,0) (1,1) (2,0) ...
constexpr int num_pairs(int tasks) { return tasks * (tasks + 1) / 2; }

// Adds the inner products of every pair over elements [begin, end) to `sums`.
using GramKernel = void (*)(const char* const* grads, int64_t begin, int64_t end, double* sums);

struct Terms {
  const char* const* grads;
  const double* weights;
  int32_t count;
  bool accumulate;
  char* out;
};
// Writes the combination of elements [begin, end).
using CombineKernel = void (*)(const Terms& terms, int64_t begin, int64_t end);

struct Kernels {
  std::array<std::array<GramKernel, kMaxTasks>, kNumDtypes> gram;  // by dtype, by tasks less one
  std::array<CombineKernel, kNumDtypes> combine;                   // by dtype
};

extern const Kernels kBaseKernels;
#if defined(__x86_64__)
#define DRIVEKD_X86 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#else
#define DRIVEKD_X86 0
#endif

const Kernels& current_kernels();

}  // namespace drivekd
