// Arithmetic, loads and stores, and atomics: what a thread does alone.
#pragma once
#include <bit>
#include <concepts>

#include "keywords.h"
#include "vectors.h"

// Arithmetic with its rounding spelled out. glibc has functions named __expf and so on already.
#define __expf expf
#define __logf logf
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline int __float2int_rn(float a) { return int(rintf(a)); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}

#define EMULATOR_MIN_MAX(T)                            \
  inline T min(T a, T b) { return a < b ? a : b; }     \
  inline T max(T a, T b) { return a > b ? a : b; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
// The number where the other is NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// Loads and stores with a cache hint, for the types that the device has them for: a pack of one's
// own is not among them.
struct __half;
struct __half2;
struct __nv_bfloat16;
struct __nv_bfloat162;

namespace emulator {

template <class T, class... Any>
concept OneOf = (std::same_as<T, Any> || ...);
template <class T>
concept Hinted =
    OneOf<T, char, signed char, unsigned char, short, unsigned short, int, unsigned, long,
          unsigned long, long long, unsigned long long, float, double, char2, char4, uchar2, uchar4,
          short2, short4, ushort2, ushort4, int2, int4, uint2, uint4, longlong2, ulonglong2, float2,
          float4, double2, __half, __half2, __nv_bfloat16, __nv_bfloat162>;

// Every atomic is sequentially consistent, so there is no order left for a fence to make.
template <class T>
T update(T* address, auto&& f) {
  std::atomic_ref<T> atomic(*address);
  T before = atomic.load();
  while (!atomic.compare_exchange_weak(before, f(before))) {
  }
  return before;
}

template <class T>
concept Integer = OneOf<T, int, unsigned, unsigned long long>;
template <class T>
concept Ordered = OneOf<T, int, unsigned, long long, unsigned long long>;

}  // namespace emulator

#define EMULATOR_LOAD(name) \
  template <emulator::Hinted T> T name(const T* address) { return *address; }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD

#define EMULATOR_STORE(name) \
  template <emulator::Hinted T> void name(T* address, std::type_identity_t<T> value) { \
    *address = value; \
  }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// Each returns the value before. The types are those of the device: no int64_t among them.
template <class T>
  requires emulator::Integer<T> || emulator::OneOf<T, float, double>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return T(old + value); });
}
template <emulator::OneOf<int, unsigned> T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return T(old - value); });
}
template <emulator::Ordered T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return std::min(old, value); });
}
template <emulator::Ordered T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return std::max(old, value); });
}
template <emulator::Integer T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return old & value; });
}
template <emulator::Integer T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return old | value; });
}
template <emulator::Integer T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return emulator::update(address, [=](T old) { return old ^ value; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulator::update(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned last) {
  return emulator::update(address,
                          [=](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}
template <class T>
  requires emulator::Integer<T> || std::same_as<T, float>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).exchange(value);
}
template <class T>
  requires emulator::Integer<T> || std::same_as<T, unsigned short>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value);
  return expected;
}
