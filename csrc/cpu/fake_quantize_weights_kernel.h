// The gradient of a row of a weight: clipped without a stored mask, or copied if the row is in
// range.

template <class T>
static void clipped_grad(const T* x, const T* grad, T* out, int64_t n, const QuantizeParams& p) {
  using S = Register<T>;
  constexpr int w = S::width;
  const Quantizer<S, QuantizeMode::kPropagateNan> quantize(p);
  const auto qparams = QParams<S>::broadcast(p, 0);
  const auto zero = S::set(0);
  typename S::reg value;
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const auto inside = S::from_bits(quantize(S::load(x + i), qparams, value));
    S::store(out + i, S::select(inside, S::load(grad + i), zero));
  }
  if (i < n) {
    const int lanes = int(n - i);
    const auto inside = S::from_bits(quantize(S::load(x + i, lanes), qparams, value));
    S::store(out + i, S::select(inside, S::load(grad + i, lanes), zero), lanes);
  }
}

template <class T>
static void copy(const T* from, T* to, int64_t n) {
  using S = Register<T>;
  constexpr int w = S::width;
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + w <= n; i += w) S::stream(to + i, S::load(from + i));
  }
  for (; i < n; ++i) to[i] = from[i];
  S::fence();
}
