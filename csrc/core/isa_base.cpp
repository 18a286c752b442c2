// Every processor: the vector extensions of GCC and Clang at 16 bytes, no intrinsics.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace drivekd {
namespace {

template <class V>
V load_as(const char* at) {
  V x;
  std::memcpy(&x, at, sizeof(V));
  return x;
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

float from_bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

uint16_t to_bf16(double value) {
  const float x = static_cast<float>(value);
  const uint32_t raw = bits<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((raw >> 16) | 0x40u);
  return static_cast<uint16_t>((raw + 0x7FFFu + ((raw >> 16) & 1u)) >> 16);
}

// IEEE half precision in integer arithmetic, so that it does not depend on how the processor treats
// subnormal floats.
float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  if (exponent == 0x0F800000u) return bits<float>(sign | (magnitude + ((255u - 31u) << 23)));
  if (exponent != 0) return bits<float>(sign | (magnitude + ((127u - 15u) << 23)));
  // 2^-14 (1 + mantissa) - 2^-14 is the subnormal value, from normal operands.
  const float value = bits<float>(magnitude + (113u << 23)) - bits<float>(113u << 23);
  return bits<float>(sign | bits<uint32_t>(value));
}

uint16_t to_f16(double value) {
  const uint32_t raw = bits<uint32_t>(static_cast<float>(value));
  const uint32_t magnitude = raw & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude >= (143u << 23)) {
    half = magnitude > (255u << 23) ? 0x7E00u : 0x7C00u;
  } else if (magnitude < (113u << 23)) {
    // Adding 0.5 leaves the subnormal half, rounded to even, in the low bits of the mantissa.
    half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - (126u << 23);
  } else {
    half = (magnitude - ((127u - 15u) << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | ((raw >> 16) & 0x8000u));
}

struct Simd {
  static constexpr int kWidth = 2;
  typedef double D __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));

  static D load(F64, const char* at) { return load_as<D>(at); }
  static D load(F32, const char* at) {
    const auto x = load_as<std::array<float, 2>>(at);
    return D{x[0], x[1]};
  }
  static D load(BF16, const char* at) {
    const auto x = load_as<std::array<uint16_t, 2>>(at);
    return D{from_bf16(x[0]), from_bf16(x[1])};
  }
  static D load(F16, const char* at) {
    const auto x = load_as<std::array<uint16_t, 2>>(at);
    return D{from_f16(x[0]), from_f16(x[1])};
  }

  static void store(F64, char* at, D x) { std::memcpy(at, &x, sizeof(x)); }
  static void store(F32, char* at, D x) {
    const std::array<float, 2> floats{static_cast<float>(x[0]), static_cast<float>(x[1])};
    std::memcpy(at, floats.data(), sizeof(floats));
  }
  static void store(BF16, char* at, D x) {
    const std::array<uint16_t, 2> halves{to_bf16(x[0]), to_bf16(x[1])};
    std::memcpy(at, halves.data(), sizeof(halves));
  }
  static void store(F16, char* at, D x) {
    const std::array<uint16_t, 2> halves{to_f16(x[0]), to_f16(x[1])};
    std::memcpy(at, halves.data(), sizeof(halves));
  }

  // Which of them comes first in memory does not matter to a sum over both.
  static F even(const char* at) { return bits<F>(load_as<U>(at) << 16); }
  static F odd(const char* at) { return bits<F>(load_as<U>(at) & 0xFFFF0000u); }
  static D low(F x) { return D{x[0], x[1]}; }
  static D high(F x) { return D{x[2], x[3]}; }
};

#include "kernels.inc"

}  // namespace

const Kernels kBaseKernels = all_kernels();

}  // namespace drivekd
