// The gradients of x, of a learned scale and of a learned zero point.

// The backward of one register: stores grad_x, adds to the sums for scale and zero point.
template <class S, class T>
struct LsqBackward {
  typename S::reg quant_min, quant_max, zero;

  explicit LsqBackward(const QuantizeParams& p)
      : quant_min(S::set(p.quant_min)), quant_max(S::set(p.quant_max)), zero(S::set(0)) {}

  void operator()(const T* grad_y, const T* x, T* grad_x, int lanes, const QParams<S>& qparams,
                  typename S::reg& scale_sum, typename S::reg& outside_sum) const {
    const auto grad = S::load(grad_y, lanes);
    // v = x / scale, rounded = nearbyint(v) + zero_point, q = clamp(rounded)
    const auto v = S::mul(S::load(x, lanes), qparams.inv_scale);
    const auto rounded = S::add(S::round(v), qparams.zero_point);
    const auto q = S::min(quant_max, S::max(quant_min, rounded));
    const auto inside = S::equal(rounded, q);
    S::store(grad_x, S::select(inside, grad, zero), lanes);
    // dy/dscale = q − zero_point − (v inside, 0 outside)
    const auto slope = S::sub(S::sub(q, qparams.zero_point), S::select(inside, v, zero));
    const auto present = S::from_bits(lanes == S::width ? ~0u : (1u << lanes) - 1);
    scale_sum = S::fma(S::select(present, grad, zero), S::select(present, slope, zero), scale_sum);
    outside_sum = S::add(outside_sum, S::select(inside, zero, grad));
  }
};

template <class S>
static double sum_lanes(typename S::reg r) {
  typename S::scalar lanes[S::width];
  S::store(lanes, r);
  double sum = 0;
  for (int i = 0; i < S::width; ++i) sum += double(lanes[i]);
  return sum;
}

template <class T>
static void lsq_backward(const T* grad, const T* x, T* grad_x, int64_t n, const QuantizeParams& p,
                         int64_t channel, double* sums) {
  using S = Register<T>;
  constexpr int w = S::width;
  const LsqBackward<S, T> backward(p);
  const auto qparams = QParams<S>::broadcast(p, channel);
  // Sums are float32 within a span, float64 across spans.
  constexpr int64_t span = 64 * w;
  for (int64_t begin = 0; begin < n; begin += span) {
    const int64_t end = begin + span < n ? begin + span : n;
    auto scale_sum = S::set(0), outside_sum = S::set(0);
    int64_t i = begin;
    for (; i + w <= end; i += w) {
      backward(grad + i, x + i, grad_x + i, w, qparams, scale_sum, outside_sum);
    }
    if (i < end)
      backward(grad + i, x + i, grad_x + i, int(end - i), qparams, scale_sum, outside_sum);
    sums[0] += sum_lanes<S>(scale_sum);
    sums[1] += sum_lanes<S>(outside_sum);
  }
}

template <class T>
static void lsq_backward_columns(const T* grad, const T* x, T* grad_x, int64_t rows,
                                 const QuantizeParams& p, double* sums) {
  using S = Register<T>;
  constexpr int w = S::width;
  const LsqBackward<S, T> backward(p);
  for (int64_t c = 0; c < p.channels; c += w) {
    const int lanes = p.channels - c < w ? int(p.channels - c) : w;
    const auto qparams = QParams<S>::load(p, c);
    auto scale_sum = S::set(0), outside_sum = S::set(0);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i = row * p.channels + c;
      backward(grad + i, x + i, grad_x + i, lanes, qparams, scale_sum, outside_sum);
    }
    typename S::scalar scale_lanes[w], outside_lanes[w];
    S::store(scale_lanes, scale_sum);
    S::store(outside_lanes, outside_sum);
    for (int i = 0; i < lanes; ++i) {
      sums[2 * (c + i)] += double(scale_lanes[i]);
      sums[2 * (c + i) + 1] += double(outside_lanes[i]);
    }
  }
}
