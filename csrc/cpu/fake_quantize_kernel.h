// Quantize-dequantize with a mask of one bit per element, and the gradient through that mask.

// Collects mask bits in memory order, low bit first, and writes whole 64-bit words.
struct BitWriter {
  uint8_t* out;
  uint64_t word = 0;
  int count = 0;

  explicit BitWriter(uint8_t* out) : out(out) {}
  // Appends the low n bits, 1 <= n <= 64; the others must be 0.
  void push(uint64_t bits, int n) {
    word |= bits << count;
    count += n;
    if (count < 64) return;
    __builtin_memcpy(out, &word, 8);
    out += 8;
    count -= 64;
    word = count ? bits >> (n - count) : 0;
  }
  void finish() {
    for (; count > 0; count -= 8, word >>= 8) *out++ = uint8_t(word);
  }
};

// Scale and zero point of the channels of one register.
template <class S>
struct QParams {
  typename S::reg scale, inv_scale, zero_point;

  static QParams broadcast(const QuantizeParams& p, int64_t channel) {
    return {S::set(p.scale[channel]), S::set(p.inv_scale[channel]), S::set(p.zero_point[channel])};
  }
  static QParams load(const QuantizeParams& p, int64_t channel) {
    return {S::load(p.scale + channel), S::load(p.inv_scale + channel),
            S::load(p.zero_point + channel)};
  }
};

template <class S, QuantizeMode kMode>
struct Quantizer {
  using reg = typename S::reg;
  reg quant_min, quant_max, zero;
  bool per_tensor;

  explicit Quantizer(const QuantizeParams& p)
      : quant_min(S::set(p.quant_min)),
        quant_max(S::set(p.quant_max)),
        zero(S::set(0)),
        per_tensor(p.per_tensor) {}

  // Returns a bit per lane: whether x is in range.
  uint32_t operator()(reg x, const QParams<S>& qparams, reg& y) const {
    typename S::mask positive = S::none();
    if (kMode == QuantizeMode::kRelu) {
      positive = S::greater(x, zero);
      x = S::max(zero, x);
    }
    // q = nearbyint(x · (1/scale)) + zero_point; min and max return their second operand for NaN
    const reg rounded = S::add(S::round(S::mul(x, qparams.inv_scale)), qparams.zero_point);
    const reg raised = kMode == QuantizeMode::kLowestForNan ? S::max(rounded, quant_min)
                                                            : S::max(quant_min, rounded);
    const reg q = S::min(quant_max, raised);
    // y = (q − zero_point) · scale
    const reg level = S::sub(q, qparams.zero_point);
    y = per_tensor ? S::mul_float32(level, qparams.scale) : S::mul(level, qparams.scale);
    const typename S::mask inside = S::equal(rounded, q);
    return S::bits(kMode == QuantizeMode::kRelu ? S::both(inside, positive) : inside);
  }
};

// n elements of one channel.
template <class S, QuantizeMode kMode, class T>
static void quantize_run(const T* x, T* y, int64_t n, const Quantizer<S, kMode>& quantize,
                         const QParams<S>& qparams, bool stream, BitWriter& mask) {
  constexpr int w = S::width;
  typename S::reg value;
  stream = stream && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  for (; n >= 64; n -= 64, x += 64, y += 64) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i += w) {
      bits |= uint64_t(quantize(S::load(x + i), qparams, value)) << i;
      stream ? S::stream(y + i, value) : S::store(y + i, value);
    }
    if (mask.out) mask.push(bits, 64);
  }
  for (; n > 0; n -= w, x += w, y += w) {
    const int lanes = n < w ? int(n) : w;
    const uint64_t bits = quantize(S::load(x, lanes), qparams, value);
    S::store(y, value, lanes);
    if (mask.out) mask.push(bits & ((uint64_t(1) << lanes) - 1), lanes);
  }
}

// inner == 1: n elements of consecutive channels, starting at `channel`.
template <class S, QuantizeMode kMode, class T>
static void quantize_columns(const T* x, T* y, int64_t n, const Quantizer<S, kMode>& quantize,
                             const QuantizeParams& p, int64_t channel, BitWriter& mask) {
  constexpr int w = S::width;
  typename S::reg value;
  for (; n > 0; n -= w, x += w, y += w) {
    const int lanes = n < w ? int(n) : w;
    const uint64_t bits = quantize(S::load(x, lanes), QParams<S>::load(p, channel), value);
    S::store(y, value, lanes);
    if (mask.out) mask.push(bits & ((uint64_t(1) << lanes) - 1), lanes);
    channel += w;
    if (channel >= p.channels) channel %= p.channels;
  }
}

template <class T, QuantizeMode kMode>
static void fake_quantize_range(const T* x, T* y, uint8_t* mask, int64_t begin, int64_t end,
                                const QuantizeParams& p) {
  using S = Register<T>;
  const Quantizer<S, kMode> quantize(p);
  BitWriter writer(mask ? mask + begin / 8 : nullptr);
  int64_t run = begin / p.inner;
  if (p.inner == 1 && p.channels > 1) {
    quantize_columns<S>(x + begin, y + begin, end - begin, quantize, p, run % p.channels, writer);
  } else {
    for (int64_t i = begin; i < end; ++run) {
      const int64_t stop = (run + 1) * p.inner < end ? (run + 1) * p.inner : end;
      const auto qparams = QParams<S>::broadcast(p, run % p.channels);
      quantize_run<S>(x + i, y + i, stop - i, quantize, qparams, p.stream, writer);
      i = stop;
    }
  }
  if (mask) writer.finish();
  if (p.stream) S::fence();
}

template <class T>
static void fake_quantize(const T* x, T* y, uint8_t* mask, int64_t begin, int64_t end,
                          const QuantizeParams& p, QuantizeMode mode) {
  if (mode == QuantizeMode::kRelu) {
    fake_quantize_range<T, QuantizeMode::kRelu>(x, y, mask, begin, end, p);
  } else if (mode == QuantizeMode::kLowestForNan) {
    fake_quantize_range<T, QuantizeMode::kLowestForNan>(x, y, mask, begin, end, p);
  } else {
    fake_quantize_range<T, QuantizeMode::kPropagateNan>(x, y, mask, begin, end, p);
  }
}

template <class T>
static void masked_grad(const T* grad, const uint8_t* mask, T* out, int64_t begin, int64_t end,
                        bool stream) {
  using S = Register<T>;
  constexpr int w = S::width;
  const typename S::reg zero = S::set(0);
  stream = stream && reinterpret_cast<uintptr_t>(out + begin) % 64 == 0;
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    uint64_t bits;
    __builtin_memcpy(&bits, mask + i / 8, 8);
    for (int j = 0; j < 64; j += w) {
      const auto kept = S::from_bits(uint32_t(bits >> j));
      const auto value = S::select(kept, S::load(grad + i + j), zero);
      stream ? S::stream(out + i + j, value) : S::store(out + i + j, value);
    }
  }
  if (stream) S::fence();
  for (; i < end; i += 8) {  // a byte of the mask at a time
    const int lanes = end - i < 8 ? int(end - i) : 8;
    const auto kept = S::from_bits(mask[i / 8]);
    S::store(out + i, S::select(kept, S::load(grad + i, lanes), zero), lanes);
  }
}
