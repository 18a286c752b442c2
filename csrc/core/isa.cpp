// The choice of an instruction set at run time.
#include <atomic>

#include "kernels.h"

namespace {

drivekd_isa best_isa() {
#if DRIVEKD_X86
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? DRIVEKD_AVX512 : DRIVEKD_AVX2;
#endif
  return DRIVEKD_BASE;
}

std::atomic<drivekd_isa>& current() {
  static std::atomic<drivekd_isa> isa{best_isa()};
  return isa;
}

}  // namespace

extern "C" drivekd_isa drivekd_current_isa(void) { return current().load(); }

extern "C" void drivekd_limit_isa(drivekd_isa limit) {
  const drivekd_isa best = best_isa();
  current().store(limit < best ? limit : best);
}

const drivekd::Kernels& drivekd::current_kernels() {
#if DRIVEKD_X86
  if (drivekd_current_isa() == DRIVEKD_AVX512) return kAvx512Kernels;
  if (drivekd_current_isa() == DRIVEKD_AVX2) return kAvx2Kernels;
#endif
  return kBaseKernels;
}
