// exp and log1p of a register, within 2 ULP. float64 uses libm.

template <class S>
static typename S::reg exp_of(typename S::reg x) {
  if constexpr (sizeof(typename S::scalar) == 8) {
    return S::exp(x);
  } else {
    // exp(x) = 2^n · exp(r), n = nearbyint(x / ln 2), |r| <= ln 2 / 2; x <= 0 here
    const auto lowest = S::set(-87.0f);
    const auto bounded = S::max(lowest, x);
    const auto n = S::round(S::mul(bounded, S::set(1.44269504088896341f)));
    // ln 2 in two parts, the first with few enough bits that its product with n is exact
    auto r = S::fma(n, S::set(-0.693359375f), bounded);
    r = S::fma(n, S::set(2.12194440054690583e-4f), r);
    // Taylor series; the first term left out is below 1e-8
    auto p = S::set(1.0f / 5040);
    p = S::fma(p, r, S::set(1.0f / 720));
    p = S::fma(p, r, S::set(1.0f / 120));
    p = S::fma(p, r, S::set(1.0f / 24));
    p = S::fma(p, r, S::set(1.0f / 6));
    p = S::fma(p, r, S::set(0.5f));
    p = S::fma(p, r, S::set(1.0f));
    p = S::fma(p, r, S::set(1.0f));
    // results below the smallest normal number are flushed to 0
    return S::select(S::greater(lowest, x), S::set(0), S::times_power(p, n));
  }
}

// log(1 + e) for e in [0, 1].
template <class S>
static typename S::reg log1p_of(typename S::reg e) {
  if constexpr (sizeof(typename S::scalar) == 8) {
    return S::log1p(e);
  } else {
    // log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3
    const auto s = S::div(e, S::add(e, S::set(2.0f))), square = S::mul(s, s);
    auto p = S::set(1.0f / 15);
    for (int k = 13; k >= 3; k -= 2) p = S::fma(p, square, S::set(1.0f / k));
    p = S::mul(p, square);
    return S::fma(S::add(s, s), p, S::add(s, s));
  }
}
