// Stands in for CUDA's header of this name: storage and conversions, half to even.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float x) : bits(rounded(x)) {}

  operator float() const {
    const int exponent = bits >> 10 & 31;
    const float fraction = float(bits & 1023);
    float magnitude;
    if (exponent == 31) {
      magnitude = fraction == 0 ? INFINITY : NAN;
    } else {
      magnitude = exponent == 0 ? ldexpf(fraction, -24) : ldexpf(fraction + 1024, exponent - 25);
    }
    return bits >> 15 ? -magnitude : magnitude;
  }

 private:
  static uint16_t rounded(float x) {
    if (x != x) return 0x7fff;  // the device's NaN
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    const float magnitude = fabsf(x);
    if (magnitude == 0) return sign;
    if (magnitude >= 65520) return sign | 0x7c00;
    int exponent;
    frexpf(magnitude, &exponent);
    // The last of 11 bits, or 2^-24 below the normal numbers; rintf rounds half to even.
    const int last = std::max(exponent - 11, -24);
    const int units = int(rintf(ldexpf(magnitude, -last)));
    // A carry into the exponent comes out of the sum by itself.
    return uint16_t(sign | (((last + 24) << 10) + units));
  }
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return std::bit_cast<__half>(bits); }
