// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL). Included inside the namespace of its
// instruction set; the operations are those of Portable in simd_portable.h.

struct Avx512 {
  static constexpr int width = 16;
  using scalar = float;
  using mask = __mmask16;
  using reg = __m512;

  static reg set(float x) { return _mm512_set1_ps(x); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static reg abs(reg a) { return _mm512_abs_ps(a); }
  static reg round(reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static reg mul_float32(reg a, reg b) { return mul(a, b); }

  static reg times_power(reg a, reg n) { return _mm512_scalef_ps(a, n); }

  static mask equal(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static mask greater(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static mask is_nan(reg a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static mask both(mask a, mask b) { return a & b; }
  static mask either(mask a, mask b) { return a | b; }
  static mask none() { return 0; }
  static mask from_bits(uint32_t bits) { return mask(bits); }
  static uint32_t bits(mask m) { return m; }
  static reg select(mask m, reg a, reg b) { return _mm512_mask_blend_ps(m, b, a); }

  static mask first(int n) { return mask((1u << n) - 1); }
  static reg widen_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static __m256i narrow_bf16(reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, is_nan(a), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static __m256i narrow_f16(reg a) {
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static reg load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static reg load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static reg load(const bf16* p, int n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static reg load(const f16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static void store(bf16* p, reg a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
  static void store(f16* p, reg a) { _mm256_storeu_si256((__m256i*)p, narrow_f16(a)); }
  // Non-temporal; p is aligned to the size of the access.
  static void stream(float* p, reg a) { _mm512_stream_ps(p, a); }
  static void stream(bf16* p, reg a) { _mm256_stream_si256((__m256i*)p, narrow_bf16(a)); }
  static void stream(f16* p, reg a) { _mm256_stream_si256((__m256i*)p, narrow_f16(a)); }
  static void fence() { _mm_sfence(); }
  static void store(float* p, reg a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  static void store(bf16* p, reg a, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a));
  }
  static void store(f16* p, reg a, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a));
  }
};
