// x86-64 with AVX-512 F, BW, DQ and VL.
#include "kernels.h"

#if DRIVEKD_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

// To the end of the file, so that templates instantiated there are covered too.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
// The intrinsics of GCC 12 start from a variable that they leave uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace drivekd {
namespace {

struct Simd {
  static constexpr int kWidth = 8;
  using D = __m512d;
  using F = __m512;

  static __m128i load_bits(const char* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }
  static void store_bits(char* at, __m128i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), x);
  }

  static D load(F64, const char* at) { return _mm512_loadu_pd(at); }
  static D load(F32, const char* at) {
    return _mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(at)));
  }
  static D load(BF16, const char* at) {
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(at)), 16);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(wide));
  }
  static D load(F16, const char* at) { return _mm512_cvtps_pd(_mm256_cvtph_ps(load_bits(at))); }

  static void store(F64, char* at, D x) { _mm512_storeu_pd(at, x); }
  static void store(F32, char* at, D x) {
    _mm256_storeu_ps(reinterpret_cast<float*>(at), _mm512_cvtpd_ps(x));
  }
  static void store(BF16, char* at, D x) {
    const __m256 floats = _mm512_cvtpd_ps(x);
    const __m256i raw = _mm256_castps_si256(floats);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(raw, _mm256_set1_epi32(0x400000));
    const __mmask8 nan = _mm256_cmp_ps_mask(floats, floats, _CMP_UNORD_Q);
    const __m256i rounded = _mm256_srli_epi32(_mm256_mask_blend_epi32(nan, even, quiet), 16);
    store_bits(at, _mm256_cvtepi32_epi16(rounded));
  }
  static void store(F16, char* at, D x) {
    store_bits(at, _mm256_cvtps_ph(_mm512_cvtpd_ps(x), _MM_FROUND_TO_NEAREST_INT));
  }

  static F even(const char* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(at), 16));
  }
  static F odd(const char* at) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(at), upper));
  }
  static D low(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
  static D high(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
};

#include "kernels.inc"

}  // namespace

const Kernels kAvx512Kernels = all_kernels();

}  // namespace drivekd

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
