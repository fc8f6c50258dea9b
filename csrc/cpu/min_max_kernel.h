// Minimum and maximum; both are NaN if there is a NaN.

template <class T>
static void min_max(const T* x, int64_t n, float* low, float* high) {
  using S = Register<T>;
  constexpr int w = S::width,
                kUnroll = 4;  // four independent chains hide the latency of min and max
  const auto infinity = S::set(typename S::scalar(__builtin_inf()));
  const auto minus_infinity = S::set(typename S::scalar(-__builtin_inf()));
  typename S::reg lows[kUnroll], highs[kUnroll];
  typename S::mask nan = S::none();
  for (int u = 0; u < kUnroll; ++u) lows[u] = infinity, highs[u] = minus_infinity;
  for (; n >= w * kUnroll; n -= w * kUnroll, x += w * kUnroll) {
    for (int u = 0; u < kUnroll; ++u) {
      const auto value = S::load(x + u * w);
      nan = S::either(nan, S::is_nan(value));
      lows[u] = S::min(value, lows[u]);
      highs[u] = S::max(value, highs[u]);
    }
  }
  for (; n > 0; n -= w, x += w) {
    const int lanes = n < w ? int(n) : w;
    const auto value = S::load(x, lanes);
    const auto inside = S::from_bits(lanes == w ? ~0u : (1u << lanes) - 1);
    nan = S::either(nan, S::is_nan(value));
    lows[0] = S::min(S::select(inside, value, infinity), lows[0]);
    highs[0] = S::max(S::select(inside, value, minus_infinity), highs[0]);
  }
  for (int u = 1; u < kUnroll; ++u) {
    lows[0] = S::min(lows[u], lows[0]);
    highs[0] = S::max(highs[u], highs[0]);
  }
  typename S::scalar lanes[w], smallest, largest;
  S::store(lanes, lows[0]);
  smallest = lanes[0];
  for (int i = 1; i < w; ++i) smallest = lanes[i] < smallest ? lanes[i] : smallest;
  S::store(lanes, highs[0]);
  largest = lanes[0];
  for (int i = 1; i < w; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  const bool any_nan = S::bits(nan) != 0;
  *low = any_nan ? __builtin_nanf("") : float(smallest);
  *high = any_nan ? __builtin_nanf("") : float(largest);
}

template <class T>
static void min_max_columns(const T* x, int64_t rows, int64_t columns, float* low, float* high) {
  using S = Register<T>;
  constexpr int w = S::width;
  for (int64_t c = 0; c < columns; c += w) {
    const int lanes = columns - c < w ? int(columns - c) : w;
    typename S::reg least = S::load(x + c, lanes), most = least;
    typename S::mask nan = S::is_nan(least);
    for (int64_t row = 1; row < rows; ++row) {
      const auto value = S::load(x + row * columns + c, lanes);
      nan = S::either(nan, S::is_nan(value));
      least = S::min(value, least);
      most = S::max(value, most);
    }
    const auto not_a_number = S::set(typename S::scalar(__builtin_nan("")));
    S::store(low + c, S::select(nan, not_a_number, least), lanes);
    S::store(high + c, S::select(nan, not_a_number, most), lanes);
  }
}
