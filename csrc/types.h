// Number formats as they lie in memory, and their conversions for single values.
#pragma once

#include <cstdint>
#include <cstring>

namespace dlm {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Internal linkage: these are compiled once per instruction set, and the copies must stay apart.
namespace {

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits((uint32_t)x.bits << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3FF;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Round to nearest, ties to even, as XLA and torch do.
inline void from_float(float x, float& out) { out = x; }

inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = bits_of(x);
  // Rounding would carry a NaN's mantissa over into infinity.
  out.bits = x != x ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float x, Float16& out) {
  constexpr uint32_t kInfinite = 0x7F800000;
  constexpr uint32_t kTooLarge = 0x477FF000;     // 65520, the first number that rounds to infinity
  constexpr uint32_t kLeastNormal = 0x38800000;  // 2^-14
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > kInfinite) {  // NaN
    out.bits = 0x7E00;
  } else if (magnitude >= kTooLarge) {
    out.bits = (uint16_t)(sign | 0x7C00);
  } else if (magnitude < kLeastNormal) {
    // Subnormal: adding 0.5 lets the float adder round to a multiple of 2^-24.
    out.bits = (uint16_t)(sign | (bits_of(from_bits(magnitude) + 0.5f) - 0x3F000000));
  } else {
    out.bits = (uint16_t)(sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13));
  }
}

// Calls use(a value of the type) for the type that dtype names.
template <typename Use>
inline void with_dtype(DType dtype, Use&& use) {
  switch (dtype) {
    case DType::kFloat32: return use(float{});
    case DType::kBFloat16: return use(BFloat16{});
    case DType::kFloat16: return use(Float16{});
  }
}

}  // namespace
}  // namespace dlm
