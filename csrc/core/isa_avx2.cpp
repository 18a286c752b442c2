// x86-64 with AVX2, FMA and F16C.
#include "kernels.h"

#if DRIVEKD_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

// To the end of the file, so that templates instantiated there are covered too.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace drivekd {
namespace {

struct Simd {
  static constexpr int kWidth = 4;
  using D = __m256d;
  using F = __m256;

  static __m128i load_bits(const char* at) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  }
  static void store_bits(char* at, __m128i x) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), x);
  }

  static D load(F64, const char* at) { return _mm256_loadu_pd(reinterpret_cast<const double*>(at)); }
  static D load(F32, const char* at) {
    return _mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(at)));
  }
  static D load(BF16, const char* at) {
    const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(load_bits(at)), 16);
    return _mm256_cvtps_pd(_mm_castsi128_ps(wide));
  }
  static D load(F16, const char* at) { return _mm256_cvtps_pd(_mm_cvtph_ps(load_bits(at))); }

  static void store(F64, char* at, D x) { _mm256_storeu_pd(reinterpret_cast<double*>(at), x); }
  static void store(F32, char* at, D x) {
    _mm_storeu_ps(reinterpret_cast<float*>(at), _mm256_cvtpd_ps(x));
  }
  static void store(BF16, char* at, D x) {
    const __m128 floats = _mm256_cvtpd_ps(x);
    const __m128i raw = _mm_castps_si128(floats);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(raw, 16), _mm_set1_epi32(1));
    const __m128i even = _mm_add_epi32(raw, _mm_add_epi32(odd, _mm_set1_epi32(0x7FFF)));
    const __m128i quiet = _mm_or_si128(raw, _mm_set1_epi32(0x400000));
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(floats, floats));
    const __m128i rounded = _mm_srli_epi32(_mm_blendv_epi8(even, quiet, nan), 16);
    store_bits(at, _mm_packus_epi32(rounded, rounded));
  }
  static void store(F16, char* at, D x) {
    store_bits(at, _mm_cvtps_ph(_mm256_cvtpd_ps(x), _MM_FROUND_TO_NEAREST_INT));
  }

  static F even(const char* at) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  }
  static F odd(const char* at) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(both, upper));
  }
  static D low(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
  static D high(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
};

#include "kernels.inc"

}  // namespace

const Kernels kAvx2Kernels = all_kernels();

}  // namespace drivekd

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
