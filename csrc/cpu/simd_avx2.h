// Eight float32 lanes of AVX2 with FMA and F16C. Included inside the namespace of its instruction
// set; the operations are those of Portable in simd_portable.h.

struct Avx2 {
  static constexpr int width = 8;
  using scalar = float;
  using mask = __m256;  // all ones in the lanes that are set
  using reg = __m256;

  static reg set(float x) { return _mm256_set1_ps(x); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static reg abs(reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static reg round(reg a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static reg mul_float32(reg a, reg b) { return mul(a, b); }

  static reg times_power(reg a, reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  static mask equal(reg a, reg b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static mask greater(reg a, reg b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static mask is_nan(reg a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static mask both(mask a, mask b) { return _mm256_and_ps(a, b); }
  static mask either(mask a, mask b) { return _mm256_or_ps(a, b); }
  static mask none() { return _mm256_setzero_ps(); }
  static mask from_bits(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
  }
  static uint32_t bits(mask m) { return uint32_t(_mm256_movemask_ps(m)); }
  static reg select(mask m, reg a, reg b) { return _mm256_blendv_ps(b, a, m); }

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static reg widen_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static __m128i narrow_bf16(reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                                 _mm256_castps_si256(is_nan(a)));
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static __m128i narrow_f16(reg a) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // AVX2 has no masked 16-bit accesses, so partial registers go through the stack.
  static __m128i partial(const void* p, int n) {
    uint16_t lanes[8] = {};
    __builtin_memcpy(lanes, p, size_t(n) * 2);
    return _mm_loadu_si128((const __m128i*)lanes);
  }
  static void partial_store(void* p, __m128i value, int n) {
    uint16_t lanes[8];
    _mm_storeu_si128((__m128i*)lanes, value);
    __builtin_memcpy(p, lanes, size_t(n) * 2);
  }

  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load(const bf16* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
  static reg load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static reg load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static reg load(const bf16* p, int n) { return widen_bf16(partial(p, n)); }
  static reg load(const f16* p, int n) { return _mm256_cvtph_ps(partial(p, n)); }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
  static void store(bf16* p, reg a) { _mm_storeu_si128((__m128i*)p, narrow_bf16(a)); }
  static void store(f16* p, reg a) { _mm_storeu_si128((__m128i*)p, narrow_f16(a)); }
  static void stream(float* p, reg a) { _mm256_stream_ps(p, a); }
  static void stream(bf16* p, reg a) { _mm_stream_si128((__m128i*)p, narrow_bf16(a)); }
  static void stream(f16* p, reg a) { _mm_stream_si128((__m128i*)p, narrow_f16(a)); }
  static void fence() { _mm_sfence(); }
  static void store(float* p, reg a, int n) { _mm256_maskstore_ps(p, first(n), a); }
  static void store(bf16* p, reg a, int n) { partial_store(p, narrow_bf16(a), n); }
  static void store(f16* p, reg a, int n) { partial_store(p, narrow_f16(a), n); }
};
