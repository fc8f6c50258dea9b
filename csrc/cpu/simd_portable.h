// A vector register of N lanes in plain C++, with the operations of simd_avx2.h and simd_avx512.h.
// It serves float64 everywhere, and all types where neither can run.
//
// Included in the namespace of an instruction set (see instruction_set_portable.cpp): translation
// units that are compiled for different targets must not share a function.

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {  // zero and subnormals: fraction · 2^-24 is exact in float
    const float value = float(fraction) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t half_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;    // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;   // 65520 and more round to infinity
  if (bits < 0x38800000) {                        // below 2^-14: a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    return sign | uint16_t(__builtin_rintf(magnitude * 16777216.0f));
  }
  bits += 0xfff + (bits >> 13 & 1);  // half to even
  return sign | uint16_t((bits >> 13) - (112 << 10));
}

inline float bfloat_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t bfloat_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float power_of_two(float n) {
  if (n != n) return n;
  const uint32_t bits = uint32_t(int(n) + 127) << 23;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

template <class F, int N>
struct Portable {
  static constexpr int width = N;
  using scalar = F;
  using mask = uint32_t;  // bit i belongs to lane i
  struct reg {
    F lane[N];
  };

#define DIVQAT_LANES(expression)              \
  reg r;                                      \
  for (int i = 0; i < N; ++i) r.lane[i] = expression; \
  return r
#define DIVQAT_BITS(expression)                                     \
  mask m = 0;                                                       \
  for (int i = 0; i < N; ++i) m |= uint32_t(bool(expression)) << i; \
  return m

  static reg set(F x) { DIVQAT_LANES(x); }
  static reg add(reg a, reg b) { DIVQAT_LANES(a.lane[i] + b.lane[i]); }
  static reg sub(reg a, reg b) { DIVQAT_LANES(a.lane[i] - b.lane[i]); }
  static reg mul(reg a, reg b) { DIVQAT_LANES(a.lane[i] * b.lane[i]); }
  static reg div(reg a, reg b) { DIVQAT_LANES(a.lane[i] / b.lane[i]); }
  // a · b + c, rounded once or twice.
  static reg fma(reg a, reg b, reg c) { DIVQAT_LANES(a.lane[i] * b.lane[i] + c.lane[i]); }
  // The second operand if either is NaN, as on x86.
  static reg min(reg a, reg b) { DIVQAT_LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
  static reg max(reg a, reg b) { DIVQAT_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
  static reg abs(reg a) { DIVQAT_LANES(F(__builtin_fabs(a.lane[i]))); }
  // Rounds half to even.
  static reg round(reg a) { DIVQAT_LANES(F(__builtin_rint(a.lane[i]))); }
  // The product computed in float32.
  static reg mul_float32(reg a, reg b) { DIVQAT_LANES(F(float(a.lane[i]) * float(b.lane[i]))); }

  // a · 2^n for an integer n in [-126, 127].
  static reg times_power(reg a, reg n) { DIVQAT_LANES(a.lane[i] * power_of_two(float(n.lane[i]))); }
  static reg exp(reg a) { DIVQAT_LANES(F(__builtin_exp(a.lane[i]))); }
  static reg log1p(reg a) { DIVQAT_LANES(F(__builtin_log1p(a.lane[i]))); }

  static mask equal(reg a, reg b) { DIVQAT_BITS(a.lane[i] == b.lane[i]); }
  static mask greater(reg a, reg b) { DIVQAT_BITS(a.lane[i] > b.lane[i]); }
  static mask is_nan(reg a) { DIVQAT_BITS(a.lane[i] != a.lane[i]); }
  static mask both(mask a, mask b) { return a & b; }
  static mask either(mask a, mask b) { return a | b; }
  static mask none() { return 0; }
  static mask from_bits(uint32_t bits) { return bits; }
  static uint32_t bits(mask m) { return m; }
  // a where the mask is set, else b.
  static reg select(mask m, reg a, reg b) { DIVQAT_LANES(m >> i & 1 ? a.lane[i] : b.lane[i]); }
#undef DIVQAT_LANES
#undef DIVQAT_BITS

  static F get(float x) { return x; }
  static F get(double x) { return F(x); }
  static F get(bf16 x) { return bfloat_to_float(x.bits); }
  static F get(f16 x) { return half_to_float(x.bits); }
  static void put(float& x, F value) { x = float(value); }
  static void put(double& x, F value) { x = value; }
  static void put(bf16& x, F value) { x.bits = bfloat_from_float(float(value)); }
  static void put(f16& x, F value) { x.bits = half_from_float(float(value)); }

  template <class T>
  static reg load(const T* p) {
    reg r;
    for (int i = 0; i < N; ++i) r.lane[i] = get(p[i]);
    return r;
  }
  // The first n lanes; the others are 0.
  template <class T>
  static reg load(const T* p, int n) {
    reg r = {};
    for (int i = 0; i < n; ++i) r.lane[i] = get(p[i]);
    return r;
  }
  template <class T>
  static void store(T* p, reg r) {
    for (int i = 0; i < N; ++i) put(p[i], r.lane[i]);
  }
  template <class T>
  static void stream(T* p, reg r) {
    store(p, r);
  }
  static void fence() {}
  template <class T>
  static void store(T* p, reg r, int n) {
    for (int i = 0; i < n; ++i) put(p[i], r.lane[i]);
  }
};
